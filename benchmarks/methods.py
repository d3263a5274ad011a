"""Tables of a sweep: benchmarks/methods.md and .json from the rows that `microtome sweep` has written, or reference.md.

    microtome sweep ../shared/models/stories-3m ... -r benchmarks/methods.yaml --out methods.csv
    python benchmarks/methods.py methods.csv
    python benchmarks/methods.py                # both from what is beside this file: methods.json, reference.csv

One table for each model: perplexity by method and keep, without and with restoration; numbers stored in all at the
smallest keep, and seconds of one run without measuring (the median over sizes, on a machine busy with another run). Equal
is what the blocks store: where the stream is narrower, embeddings and head are smaller too. A cell whose blocks are not
within 1 % of the size that was asked for tells its true fraction: what drops the same share of whole groups or blocks
everywhere has coarse steps.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from microtome.sweep import Row, table

HERE = Path(__file__).parent


def cell(row: Row | None) -> str:
    """Perplexity, and the size where it is not the one asked for."""
    if row is None:
        return ""
    if row.perplexity is None:
        return "not reached" if "cannot be reached" in row.error or "no block is left" in row.error else "refused"
    told = f"{row.perplexity:.2f}" if row.perplexity < 1000 else f"{row.perplexity:.0f}"
    off = abs(row.decoder_ratio / row.keep - 1.0) > 0.01 if row.decoder_ratio else False
    return f"{told} ({row.decoder_ratio:.3f})" if off else told


def cost(rows: Iterable[Row], least: float) -> tuple[str, str]:
    """How much is stored at the smallest size, and how long a run takes."""
    done = [row for row in rows if row.perplexity is not None]
    stored = next((f"{row.stored:,}" for row in done if row.keep == least), "")
    seconds = statistics.median(row.seconds for row in done) if done else None
    return stored, "" if seconds is None else f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"


def tables(rows: list[Row]) -> str:
    """All of it, in markdown."""
    out = ["# Every method at equal size", "", (__doc__ or "").strip().split("\n\n")[-1].replace("\n", " "), ""]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        keeps = sorted({row.keep for row in mine}, reverse=True)
        dense = next(row.dense for row in mine if row.dense is not None)
        protocol = next(row.protocol for row in mine if row.protocol)
        out += [f"## {Path(model).name}", "", f"Dense {dense:.2f}. {protocol}", ""]
        columns = [*(f"keep {keep}" for keep in keeps), f"stored at {keeps[-1]}", "seconds"]
        out += [f"| method | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
        for entry, restore in dict.fromkeys((row.entry, row.restore) for row in mine):
            found = {row.keep: row for row in mine if (row.entry, row.restore) == (entry, restore)}
            name = f"{entry}, restored" if restore else entry
            cells = [*(cell(found.get(keep)) for keep in keeps), *cost(found.values(), keeps[-1])]
            out.append(f"| {name} | {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)


def main() -> None:
    """Read the tables that are named, write what is beside this file."""
    if not sys.argv[1:]:
        (HERE / "reference.md").write_text(tables(table(HERE / "reference.csv")))
        known = [Row(**one) for one in json.loads((HERE / "methods.json").read_text())]
        (HERE / "methods.md").write_text(tables(known))
        return
    rows = [row for place in sys.argv[1:] for row in table(Path(place))]
    named = [asdict(row) | {"model": Path(row.model).name} for row in rows]
    (HERE / "methods.json").write_text(json.dumps(named, indent=1) + "\n")
    (HERE / "methods.md").write_text(tables(rows))


if __name__ == "__main__":
    main()
