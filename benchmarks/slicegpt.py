"""The table of SliceGPT's variants on small trained models, at equal stored size and under one protocol.

    python benchmarks/slicegpt.py                         # every model in ../shared/models, keep 0.95 0.9 0.8 0.7
    python benchmarks/slicegpt.py --models stories-3m --keeps 0.8

Every row calibrates and measures on the exact token ids in ../shared/data/tokens, fp32, mean over all predicted tokens.
"release" rows are the release's algorithm and widths; its stored size is what it is, so the last column says what our
default reaches at the largest friendly width that stores no more. Writes benchmarks/slicegpt.json and .md.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import microtome
from microtome import budget

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
RELEASE = {"basis": "junction", "signal": "residual", "gauge": "dense", "centre": "release", "untie": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "global, eq. 8 readers": {"readers": "transposed"},
    "global, residual signal": {"signal": "residual"},
    "junction, low-rank": {"basis": "junction"},
    "junction, low-rank, untied": {"basis": "junction", "untie": True},
}
SLICES = (0.1, 0.2, 0.25, 0.3)


def row(model: str, name: str, options: dict[str, Any], **dial: Any) -> dict[str, Any]:
    """One compression, measured."""
    tokens = SHARED / "data" / "tokens"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = microtome.compress(
            SHARED / "models" / model,
            data=tokens / f"{model}.calib.pt",
            eval_data=tokens / f"{model}.eval.pt",
            out=Path(folder) / "out",
            options=options,
            samples=None,
            dtype="float32",
            **dial,
        )
    assert result.perplexity_before is not None and result.perplexity_after is not None
    found = {
        "model": model,
        "variant": name,
        **dial,
        "widths": sorted(set(result.plan.widths.values())),
        "stock": result.stock,
        "decoder": result.after.decoder,
        "stored": result.after.stored,
        "dense_stored": result.before.stored,
        "dense_perplexity": result.perplexity_before.value,
        "perplexity": result.perplexity_after.value,
        "protocol": result.perplexity_after.protocol(),
        "cut_seconds": sum(value for stage, value in result.seconds.items() if not stage.startswith("evaluate")),
        "seconds": time.perf_counter() - start,
    }
    print(
        f"{model:22} {name:28} {dial!s:16} ppl {found['perplexity']:8.3f}  stored {found['stored']:9,}  {found['widths']}",
        flush=True,
    )
    return found


def at_most(model: str, stored: int, dense: int) -> dict[str, Any] | None:
    """Our default at the largest friendly width that stores at most `stored`; None where the dense model does."""
    if stored >= dense:
        return None
    config = json.loads((SHARED / "models" / model / "config.json").read_text())
    size = config["hidden_size"]
    step = budget.friendly(size)
    for wide in range(size - size % step, 0, -step):
        if microtome.preview(SHARED / "models" / model, slice=1 - wide / size, multiple_of=step).after.stored <= stored:
            return row(model, "default, at most", {}, slice=1 - wide / size, multiple_of=step)
    return None


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table a model."""
    out = [
        "Perplexity (lower is better) and stored parameters, tied weights once. Made by `python benchmarks/slicegpt.py`.\n"
    ]
    for model in dict.fromkeys(one["model"] for one in rows):
        mine = [one for one in rows if one["model"] == model]
        dense = mine[0]
        out.append(
            f"\n## {model}: dense {dense['dense_perplexity']:.3f} at {dense['dense_stored'] / 1e6:.3f} M\n\n{dense['protocol']}\n"
        )
        keeps = sorted({one["keep"] for one in mine if "keep" in one}, reverse=True)
        out.append("| variant | " + " | ".join(f"keep {keep}" for keep in keeps) + " |\n|---|" + "--:|" * len(keeps))
        for name in dict.fromkeys(one["variant"] for one in mine if "keep" in one):
            cells = [next(one for one in mine if one["variant"] == name and one.get("keep") == keep) for keep in keeps]
            out.append(
                f"| {name} | "
                + " | ".join(f"{one['perplexity']:.3f}, {one['stored'] / 1e6:.3f} M" for one in cells)
                + " |"
            )
        out.append("\n| release's slice | release | ours, storing no more |\n|---|--:|--:|")
        for one in (one for one in mine if one["variant"] == "release"):
            ours = one["ours"]
            text = f"{dense['dense_perplexity']:.3f}, {dense['dense_stored'] / 1e6:.3f} M (the dense model)"
            if ours is not None:
                text = f"{ours['perplexity']:.3f}, {ours['stored'] / 1e6:.3f} M"
            out.append(f"| {one['slice']:.0%} | {one['perplexity']:.3f}, {one['stored'] / 1e6:.3f} M | {text} |")
    return "\n".join(out) + "\n"


def short_table(rows: list[dict[str, Any]]) -> str:
    """The README's table: the default's perplexity and stored size for every model and keep."""
    mine = [one for one in rows if one["variant"] == "default" and "keep" in one]
    keeps = sorted({one["keep"] for one in mine}, reverse=True)
    out = [
        "| model | dense | " + " | ".join(f"keep {keep}" for keep in keeps) + " |",
        "|---|--:|" + "--:|" * len(keeps),
    ]
    for model in dict.fromkeys(one["model"] for one in mine):
        cells = sorted((one for one in mine if one["model"] == model), key=lambda one: -one["keep"])
        texts = [f"{one['perplexity']:.2f} ({one['stored'] / 1e6:.3f} M)" for one in cells]
        dense = f"{cells[0]['dense_perplexity']:.2f} ({cells[0]['dense_stored'] / 1e6:.3f} M)"
        out.append(f"| {model} | {dense} | " + " | ".join(texts) + " |")
    return "\n".join(out) + "\n"


def fill_readme(rows: list[dict[str, Any]]) -> None:
    """Replace the README's measured table."""
    readme = HERE.parent / "README.md"
    before, rest = readme.read_text().split("<!-- table:demo -->\n")
    after = rest.split("<!-- /table -->")[1]
    readme.write_text(f"{before}<!-- table:demo -->\n{short_table(rows)}<!-- /table -->{after}")


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="*", default=sorted(one.name for one in (SHARED / "models").iterdir() if one.is_dir())
    )
    parser.add_argument("--keeps", nargs="*", type=float, default=[0.95, 0.9, 0.8, 0.7])
    parser.add_argument("--out", type=Path, default=HERE / "slicegpt.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        rows += [row(model, name, options, keep=keep) for name, options in VARIANTS.items() for keep in args.keeps]
        for slice_ in SLICES:
            release = row(model, "release", RELEASE, slice=slice_)
            rows.append({**release, "ours": at_most(model, release["stored"], release["dense_stored"])})
    record = {
        "command": " ".join(["python", "benchmarks/slicegpt.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(rows))
    if args.out == HERE / "slicegpt.json":
        fill_readme(rows)


if __name__ == "__main__":
    main()
