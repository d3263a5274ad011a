"""Table of a sweep with steps behind every result: benchmarks/finished.md from benchmarks/finished.csv.

    microtome sweep ../shared/models/stories-260k -r benchmarks/finished.yaml --out benchmarks/finished.csv
    python benchmarks/finished.py

Perplexity of every result as it is, healed, and in fewer bits (a scale for each output). Methods of single weights keep
all widths; their share of weights that are not zero stands in place of a size.
"""

from pathlib import Path

from methods import cell

from microtome.sweep import Row, table

HERE = Path(__file__).parent


def tables(rows: list[Row]) -> str:
    """All of it, in markdown."""
    out = [
        "# Results with healing and fewer bits",
        "",
        (__doc__ or "").strip().split("\n\n")[-1].replace("\n", " "),
        "",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        then = list(dict.fromkeys(row.then for row in mine))
        dense = next(row.dense for row in mine if row.dense is not None)
        out += [
            f"## {Path(model).name}",
            "",
            f"Dense {dense:.2f}. {next(row.protocol for row in mine if row.protocol)}",
            "",
        ]
        out += [
            f"| method | keep | {' | '.join(name or 'as it is' for name in then)} |",
            f"|---|--:|{'--:|' * len(then)}",
        ]
        for entry, keep in dict.fromkeys((row.entry, row.keep) for row in mine):
            found = {row.then: row for row in mine if (row.entry, row.keep) == (entry, keep)}
            density = next((row.density for row in found.values() if row.density is not None), None)
            size = f"{keep:g}" if density is None else f"{density:g} of the weights"
            out.append(f"| {entry} | {size} | {' | '.join(cell(found.get(name)) for name in then)} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    (HERE / "finished.md").write_text(tables(table(HERE / "finished.csv")))
