"""An inspection for a terminal: tables of text, and a line of blocks for every spectrum."""

from dataclasses import dataclass
from itertools import pairwise
from math import log10
from typing import TYPE_CHECKING

from microtome.report import COUNTS, bytes_text
from microtome.spectra import SHARES

if TYPE_CHECKING:
    from microtome.inspection import Inspection, Reach
    from microtome.spectra import Spectrum

LEVELS = "▁▂▃▄▅▆▇█"
COLUMNS = 20  # of a line of blocks
DECADES = 4  # from the full block down to the lowest
SPECTRA = {
    "readers": "what reads the stream (weights, gains folded)",
    "behind_norm": "the stream behind its norms (text)",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; columns named in `words` stand to the left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[str] = frozenset()


def decay(spectrum: "Spectrum") -> str:
    """Eigenvalues from the first to the last as blocks, each a geometric mean, DECADES below the first at the least."""
    values, first = spectrum.values, spectrum.values[0]
    if not first:
        return LEVELS[0] * min(COLUMNS, len(values))
    depths = [min(-log10(max(value / first, 1e-30)), float(DECADES)) for value in values]
    columns = min(COLUMNS, len(depths))
    edges = [place * len(depths) // columns for place in range(columns + 1)]
    means = [sum(depths[a:b]) / (b - a) for a, b in pairwise(edges)]
    return "".join(LEVELS[round((1 - mean / DECADES) * (len(LEVELS) - 1))] for mean in means)


def tables(found: "Inspection") -> list[Table]:
    """All tables of a report, in the order in which they are read."""
    counted = [Table("Architecture", ("", ""), tuple(found.features.items()), frozenset({""})), sizes(found)]
    measured = [
        junctions(found, field) for field in SPECTRA if any(getattr(one, field) is not None for one in found.junctions)
    ]
    return [*counted, spaces(found), reaches(found), *measured, *([blocks(found)] if found.changes else [])]


def sizes(found: "Inspection") -> Table:
    """Parameters, and what they are for; FLOPs and bytes."""
    rows = [(label, f"{getattr(found.sizes, name):,}", "") for name, label in COUNTS]
    for name, label in (("nbytes", f"weights in {found.dtype}"), ("kv_bytes", "key-value cache per token")):
        rows.append((label, bytes_text(getattr(found.sizes, name)), ""))
    for name, count in found.parts.items():
        tied = name == "head" and not count
        rows.append((f"stored: {name}", "tied" if tied else f"{count:,}", percent(count / found.sizes.stored)))
    return Table("Sizes", ("", "value", "of stored"), tuple(rows))


def spaces(found: "Inspection") -> Table:
    """The spaces by kind: how many, how large, and what depends on them."""
    rows = [
        (
            one.kind,
            str(one.number),
            " or ".join(str(size) for size in one.sizes),
            str(one.multiple),
            f"{one.stored:,}",
            percent(one.stored / found.sizes.stored),
            one.symmetry,
        )
        for one in found.spaces
    ]
    columns = ("", "number", "size", "multiple", "parameters", "of stored", "what leaves the function unchanged")
    return Table("Spaces", columns, tuple(rows), frozenset({columns[-1]}))


def reaches(found: "Inspection") -> Table:
    """What every method could make of the model."""
    rows = [(one.method, ", ".join(one.targets), reach_words(one)) for one in found.methods]
    return Table("Methods, with default options", ("", "cuts", "reach"), tuple(rows), frozenset({"cuts", "reach"}))


def reach_words(reach: "Reach") -> str:
    """Smallest, largest and step, or the refusal."""
    if reach.smallest is None or reach.largest is None:
        return "single weights: every size stays" if reach.why is None else f"cannot: {reach.why}"
    words = f"keep {reach.smallest:.4f} to {reach.largest:.4f}"
    if reach.step is not None and reach.smallest < reach.largest:
        words += f" in steps of ~{reach.step:.2g}"
    if reach.widths is not None:
        narrow, wide, multiple = reach.widths
        words += f" (widths {narrow} to {wide} by {multiple})"
    return words + (", stock" if reach.stock else ", own format")


def junctions(found: "Inspection", field: str) -> Table:
    """One kind of spectrum at every junction."""
    columns = ("", "read by", "eigenvalues", "width", "effective", *(percent(share) for share in SHARES))
    rows: list[tuple[str, ...]] = []
    for one in found.junctions:
        spectrum: Spectrum | None = getattr(one, field)
        if spectrum is None:
            rows.append((str(one.number), one.where, "nothing reads here", str(one.width), *("" for _ in columns[4:])))
            continue
        counts = (str(spectrum.components(share)) for share in SHARES)
        place = (str(one.number), one.where, decay(spectrum), str(one.width))
        rows.append((*place, f"{spectrum.effective_rank:.1f}", *counts))
    return Table(f"Spectra of {SPECTRA[field]}", columns, tuple(rows), frozenset({"read by", "eigenvalues"}))


def blocks(found: "Inspection") -> Table:
    """What each block changes, and its neurons."""
    columns = ("block", "influence", "cosine", "angle", "growth", "change", "neurons", "dead", "effective", "99 %")
    rows: list[tuple[str, ...]] = []
    for change, neurons in zip(found.changes, found.neurons, strict=True):
        moved = (change.influence, change.cosine, change.angle, change.growth, change.relative)
        spectrum = neurons.spectrum
        used = (str(neurons.size), str(neurons.dead), f"{spectrum.effective_rank:.1f}", str(spectrum.components(0.99)))
        rows.append((str(change.block), *(f"{one:.4f}" for one in moved), *used))
    return Table("Blocks", columns, tuple(rows))


def percent(share: float) -> str:
    """A share as a reader expects it."""
    return f"{100 * share:.3g} %"


def legend(found: "Inspection") -> list[str]:
    """What the numbers mean, and under which protocol they were measured."""
    lines: list[str] = []
    if found.junctions[-1].readers is not None:
        lines.append(
            "effective: exp of the entropy of the eigenvalues over their sum. Percentages: components that hold this "
            f"share of the sum. Blocks of a spectrum: logarithmic, {DECADES} decades."
        )
    if found.changes:
        lines.append(
            "influence: 1 - cosine of a block's input and output, mean over tokens; angle: arccos / pi; growth: of the "
            "mean norm; change: |Y - X| / |X|; dead: neurons below 1 % of the block's mean activity."
        )
    if found.calibration is not None:
        about = found.calibration
        sha = str(about["sha256"])[:12]
        lines.append(f"text: {about['source']}, {about['windows']} windows of {about['length']} tokens (sha256 {sha})")
    return [*lines, *found.notes]
