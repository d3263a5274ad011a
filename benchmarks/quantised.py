"""Rounding a rotated stream: does a random orientation of what slicing keeps help 4 bits?

    python benchmarks/quantised.py      # every model in ../shared/models but the smallest; rows that are there stay

Perplexity in fp32 of the rounded models, weights inside the blocks only, a symmetric grid for each row; `rtn4` rounds to
the nearest value, `gptq4` and `gptq8` make up for it. "as it is" has the architecture's own basis. The others are
`slicegpt -o untie=true`, for a tied head cannot follow a rotation without loss: at keep 1 the same function in another
basis, at keep 0.8 sliced; "random" is a mean over seeds. Calibrated and measured on the exact token ids in
../shared/data/tokens. Writes benchmarks/quantised.json and .md.
"""

import json
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import microtome
from microtome import running
from microtome_cli import hold_heap

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
MODELS = ("stories-3m", "babyllama-0.9m", "shakespeare-opt-0.8m", "wiki-opt-6m")
SEEDS = (0, 1)
ROUNDED: dict[str, dict[str, Any]] = {
    "rtn4": {"bits": 4, "sweep": False},
    "gptq4": {"bits": 4},
    "gptq8": {"bits": 8},
}


def cut(model: str, out: Path, orientation: str, seed: int, **dial: float) -> Path:
    """The model in a rotated basis, sliced or not."""
    options = {"orientation": orientation, "seed": seed, "untie": True}
    made = microtome.compress(SHARED / "models" / model, options=options, out=out, **common(model), **dial)
    return made.folder


def common(model: str) -> dict[str, Any]:
    """What every run has."""
    return {
        "data": SHARED / "data" / "tokens" / f"{model}.calib.pt", "samples": 64, "measure": False, "dtype": "float32"
    }  # fmt: skip


def measured(model: str, folder: Path) -> Any:
    """Perplexity on all evaluation windows."""
    (found,) = running.evaluate(folder, str(SHARED / "data" / "tokens" / f"{model}.eval.pt")).values()
    return found


def rows(model: str, place: Path, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every basis and rounding of one model that is not known."""
    there = {(one["model"], one["basis"], one["keep"], one["seed"]) for one in known}
    bases: list[tuple[str, float, int, dict[str, float] | None]] = [("as it is", 1.0, 0, None)]
    for keep, dial in ((1.0, {"slice": 0.0}), (0.8, {"keep": 0.8})):
        bases.append(("principal", keep, 0, dial))
        bases += [("random", keep, seed, dial) for seed in SEEDS]
    for number, (name, keep, seed, dial) in enumerate(bases):
        if (model, name, keep, seed) in there:
            continue
        start = time.perf_counter()
        own = SHARED / "models" / model
        folder = own if dial is None else cut(model, place / f"{model}-{number}", name, seed, **dial)
        whole = measured(model, folder)
        found: dict[str, Any] = {"model": model, "basis": name, "keep": keep, "seed": seed, "fp32": whole.value}
        for rounded, options in ROUNDED.items():
            made = microtome.compress(
                folder, method="gptq", options=options, out=place / f"{model}-{number}-{rounded}", **common(model)
            )
            found[rounded] = measured(model, made.folder).value
        print(found, flush=True)
        yield found | {"protocol": whole.protocol(), "seconds": time.perf_counter() - start}


def markdown(found: list[dict[str, Any]]) -> str:
    """One table: a line for each model, keep and basis."""
    about = " ".join((__doc__ or "").strip().split("\n\n")[-1].split())
    out = [
        "# Rotated and rounded",
        "",
        f"{about} The command: `python benchmarks/quantised.py`.",
        "",
        "Small models: see benchmarks/methods.md for what they are.",
        "",
    ]
    out += ["| model | keep | basis | fp32 | rtn4 | gptq4 | gptq8 |", "|---|--:|---|--:|--:|--:|--:|"]
    for key in dict.fromkeys((one["model"], one["keep"], one["basis"]) for one in found):
        mine = [one for one in found if (one["model"], one["keep"], one["basis"]) == key]
        means = [sum(one[name] for one in mine) / len(mine) for name in ("fp32", *ROUNDED)]
        basis = f"random, {len(mine)} seed{'s' * (len(mine) > 1)}" if key[2] == "random" else key[2]
        out.append(f"| {key[0]} | {key[1]} | {basis} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join([*out, ""])


def write(found: list[dict[str, Any]]) -> None:
    """What is beside this file."""
    made = {
        "command": "python benchmarks/quantised.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "rows": found,
    }
    (HERE / "quantised.json").write_text(json.dumps(made, indent=1) + "\n")
    (HERE / "quantised.md").write_text(markdown(found))


def main() -> None:
    """Measure what is not there yet."""
    hold_heap()
    place = HERE / "quantised.json"
    found = json.loads(place.read_text())["rows"] if place.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            for row in rows(model, Path(folder), found):
                found.append(row)
                write(found)


if __name__ == "__main__":
    main()
