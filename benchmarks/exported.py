"""Results of four kinds of recipe, from every model in ../shared, in every format: what the engines make of them.

    python benchmarks/exported.py [--models stories-3m]

Each model is cut to 0.8 of its blocks: its stream (stock where it can be), its neurons, neurons and whole groups of
heads by a global score (ragged), and all of these in a row, restored. Each result is exported and verified: logits of 32
random tokens against our own decoder in fp32, as a part of the largest logit, and how many of the likeliest tokens are
the same. A format that cannot say a result says why. Writes benchmarks/exported.json and exported.md.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import microtome
from microtome.errors import MicrotomeError
from microtome.export import export, known

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
NEURONS = {"fasp": {"options": {"spaces": "ffn"}}}
RECIPES: dict[str, list[Any]] = {
    "stream": ["slicegpt"],
    "neurons": [NEURONS],
    "ragged": [{"flap": {"allocate": "global"}}],
    "all": [{"slicegpt": {"keep": 0.95}}, {"flap": {"options": {"spaces": "heads"}, "keep": 0.93}}, NEURONS, "restore"],
}


def judged(folder: Path, form: str, out: Path) -> dict[str, Any]:
    """One result in one format: the engine's verdict, or why there is none."""
    try:
        place = out / (f"{form}.gguf" if form == "gguf" else form)
        done = export(folder, to=form, out=place, dtype="float32", verify=True)
    except MicrotomeError as error:
        return {"refused": " ".join(str(error).split()).partition(": ")[2]}
    assert done.verdict is not None
    numbers = done.verdict.numbers
    return {
        "engine": done.verdict.engine,
        "difference": numbers["largest_difference"] / max(1.0, numbers["scale"]),
        "same_argmax": numbers["same_argmax"],
        "bytes": done.nbytes,
    }


def rows(names: list[str]) -> list[dict[str, Any]]:
    """Every model by every recipe, with all formats."""
    found: list[dict[str, Any]] = []
    for name in names:
        tokens = SHARED / "data" / "tokens" / f"{name}.calib.pt"
        for kind, steps in RECIPES.items():
            with tempfile.TemporaryDirectory() as temporary:
                made = microtome.compress(
                    SHARED / "models" / name, recipe={"keep": 0.8, "multiple_of": 4, "steps": steps}, data=tokens,
                    samples=64, measure=False, out=Path(temporary) / "cut",
                )  # fmt: skip
                judged_all = {form: judged(made.folder, form, Path(temporary)) for form in known()}
                keep = made.after.decoder / made.before.decoder
                found.append({"model": name, "recipe": kind, "keep": keep, "stock": made.stock, **judged_all})
                print(json.dumps(found[-1], indent=1), flush=True)
    return found


def cell(found: dict[str, Any]) -> str:
    """A verdict in few words."""
    if "refused" in found:
        return "refused"
    same = found["same_argmax"]
    return f"{found['difference']:.0e}" + ("" if same == 1.0 else f", {100 * same:.0f} % alike")


def table(found: list[dict[str, Any]]) -> str:
    """All of it, in markdown."""
    forms = known()
    out = ["# Results in other formats", "", (__doc__ or "").strip().split("\n\n")[-1].replace("\n", " "), ""]
    out += [f"| model | recipe | keep | {' | '.join(forms)} |", f"|---|---|--:|{'--:|' * len(forms)}"]
    for row in found:
        told = " | ".join(cell(row[form]) for form in forms)
        out.append(f"| {row['model']} | {row['recipe']} | {row['keep']:.3f} | {told} |")
    why: dict[str, list[str]] = {}
    for row in found:
        for form in forms:
            if reason := row[form].get("refused"):
                why.setdefault(f"{form}: {reason}", []).append(f"{row['model']} ({row['recipe']})")
    return "\n".join(
        [*out, "", "Refused:", "", *(f"- {', '.join(names)}: {reason}" for reason, names in why.items()), ""]
    )


def main() -> None:
    """All models, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=sorted(path.name for path in (SHARED / "models").glob("*/")))
    found = rows(parser.parse_args().models)
    engines = sorted({row[form]["engine"] for row in found for form in known() if "engine" in row[form]})
    record = {"microtome": version("microtome"), "engines": engines, "rows": found}
    (HERE / "exported.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "exported.md").write_text(table(found))


if __name__ == "__main__":
    main()
