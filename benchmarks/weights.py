"""Methods of single weights: adds the rows of sweeps to weights.json, and makes weights.md of it.

    microtome sweep MODEL ... -r benchmarks/weights.yaml --out weights.csv
    python benchmarks/weights.py weights.csv

Perplexity by method, and share of the weights of the blocks' linears that stay or pattern, on 64 windows of each model's
calibration text. Zeros save nothing by themselves. What is not named is as the method has it; other options are in
weights.yaml.
"""

import json
import sys
from pathlib import Path
from typing import Any

from microtome import sweep
from microtome.sweep import Row

HERE = Path(__file__).parent
KNOWN = HERE / "weights.json"


def record(row: Row, entries: dict[str, Any]) -> dict[str, Any]:
    """A row of a sweep as weights.json has it."""
    assert row.dense is not None
    assert row.perplexity is not None
    return {
        "model": Path(row.model).name,
        "entry": row.entry,
        **entries[row.entry],
        "dense": round(row.dense, 4),
        "perplexity": round(row.perplexity, 4),
        "nonzero": row.nonzero,
        "stored": row.stored,
        "protocol": row.protocol,
    }


def markdown(rows: list[dict[str, Any]], entries: list[str]) -> str:
    """The table: a row for each method, a column for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["entry"]): row for row in rows}
    out = ["# Single weights", "", (__doc__ or "").strip().split("\n\n")[-1].replace("\n", " "), ""]
    for model in models:
        one = next(row for row in rows if row["model"] == model)
        out += [f"- {model}: dense {one['dense']:.2f}; {one['protocol']}"]
    out += ["", f"| method | {' | '.join(models)} |", f"|---|{'--:|' * len(models)}"]
    for entry in entries:
        cells = [f"{found[model, entry]['perplexity']:.2f}" if (model, entry) in found else "" for model in models]
        out += [f"| {entry} | {' | '.join(cells)} |"] if any(cells) else []
    return "\n".join([*out, ""])


def main() -> None:
    """Read the tables that are named, and write what is beside this file."""
    held: dict[str, Any] = json.loads(KNOWN.read_text())
    entries = sweep.read(HERE / "weights.yaml")["entries"]
    new = [record(row, entries) for place in sys.argv[1:] for row in sweep.table(Path(place)) if not row.error]
    rows = {(row["model"], row["entry"]): row for row in [*held["rows"], *new]}
    held["rows"] = list(rows.values())
    KNOWN.write_text(json.dumps(held, indent=1) + "\n")
    (HERE / "weights.md").write_text(markdown(held["rows"], list(entries)))


if __name__ == "__main__":
    main()
