"""Results with healing and fewer bits: runs benchmarks/finished.yaml, and makes finished.md of finished.csv.

    python benchmarks/finished.py                            # the table of what has been run
    python benchmarks/finished.py stories-260k stories-3m    # run what is missing of these first

Perplexity of every result as it is, healed, and in fewer bits (a scale for each output). Healed is 200 steps of 8 windows
on stories-260k and shakespeare-opt-0.8m, 100 of 4 on the others. Methods of single weights keep all widths; their share
of weights that are not zero stands in place of a size.
"""

import sys
from pathlib import Path
from typing import Any

from methods import cell

from microtome import sweep
from microtome.sweep import Row, table
from microtome_cli import hold_heap

HERE = Path(__file__).parent
TABLE = HERE / "finished.csv"
STORIES = "../shared/data/tinystories/train.txt"
TEXT = {  # that a model was trained on; of Shakespeare's the evaluation begins 3,855 characters behind what is taken
    "stories-260k": STORIES,
    "babyllama-0.9m": STORIES,
    "shakespeare-opt-0.8m": "build/shakespeare.txt",
    "stories-3m": STORIES,
    "wiki-opt-6m": "../shared/data/wikitext2/wiki.train.tokens",
}
LENGTH = {"shakespeare-opt-0.8m": 64}  # where the context is shorter
BRIEF = ("babyllama-0.9m", "stories-3m", "wiki-opt-6m")  # their steps take long: fewer of them, and fewer entries
FEW = ("modegpt", "surgeon", "disp", "best", "sparsegpt-0.5", "sparsegpt-2-4", "sparsegpt-0.4", "sparsegpt-0.3")


def settings(model: str) -> dict[str, Any]:
    """The sweep of one model."""
    held = sweep.read(HERE / "finished.yaml")
    held |= {"data": TEXT[model], "length": LENGTH.get(model, held["length"])}
    if model not in BRIEF:
        return held
    heal = {"heal": {"steps": 100, "batch": 4}}
    then = {name: [heal if "heal" in step else step for step in steps] for name, steps in held["then"].items()}
    return held | {"then": then, "entries": {name: held["entries"][name] for name in FEW}}


def run(models: list[str]) -> None:
    """Every run that the table lacks."""
    if not models:
        return
    hold_heap()
    whole = HERE.parents[1] / "shared" / "data" / "shakespeare.txt"
    (HERE.parent / "build").mkdir(exist_ok=True)
    (HERE.parent / "build" / "shakespeare.txt").write_text(whole.read_text()[:1_000_000])
    for model in models:
        sweep.sweep([f"../shared/models/{model}"], settings(model), TABLE)


def tables(rows: list[Row]) -> str:
    """All of it, in markdown."""
    out = [
        "# Results with healing and fewer bits",
        "",
        (__doc__ or "").strip().split("\n\n")[-1].replace("\n", " "),
        "",
    ]
    entries = list(sweep.read(HERE / "finished.yaml")["entries"])
    for model in TEXT:
        if not (mine := [row for row in rows if Path(row.model).name == model]):
            continue
        then = list(dict.fromkeys(row.then for row in mine))
        dense = next(row.dense for row in mine if row.dense is not None)
        out += [
            f"## {model}",
            "",
            f"Dense {dense:.2f}. {next(row.protocol for row in mine if row.protocol)}",
            "",
        ]
        out += [
            f"| method | keep | {' | '.join(name or 'as it is' for name in then)} |",
            f"|---|--:|{'--:|' * len(then)}",
        ]
        cells = {(row.entry, row.keep) for row in mine}
        for entry, keep in sorted(cells, key=lambda one: (entries.index(one[0]), -one[1])):
            found = {row.then: row for row in mine if (row.entry, row.keep) == (entry, keep)}
            density = next((row.density for row in found.values() if row.density is not None), None)
            size = f"{keep:g}" if density is None else f"{density:g} of the weights"
            out.append(f"| {entry} | {size} | {' | '.join(cell(found.get(name)) for name in then)} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    run(sys.argv[1:])
    (HERE / "finished.md").write_text(tables(table(TABLE)))
