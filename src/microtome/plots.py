"""An inspection as a figure: decay and effective rank of the spectra, what each block changes, and sizes."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microtome.errors import BadInput, BadOutput

if TYPE_CHECKING:
    from microtome.inspection import Inspection
    from microtome.spectra import Spectrum

INCHES, DPI = (12.0, 8.5), 130
FLOOR = 1e-7  # of the first eigenvalue: what lies below is rounding
MAP, DARK = "viridis", 0.92  # its brightest end cannot be seen on white
NAMES = {
    "behind_norm": "stream behind its norm",
    "before_norm": "stream before its norm",
    "readers": "weights that read",
}
COLOURS = {"behind_norm": "tab:blue", "before_norm": "tab:cyan", "readers": "tab:orange"}


def check(path: Path, *, weights: bool = True) -> None:
    """Refuse, before anything slow, a figure that could not be drawn or written; it shows spectra of the weights."""
    if not weights:
        raise BadInput("--png shows spectra, and they need the weights: leave out --no-weights, or --png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--png needs matplotlib, which is not installed: pip install matplotlib.")
    if path.is_dir():
        raise BadOutput(f"{path} is a folder: give --png the name of a file in it.")
    if not path.parent.is_dir():
        raise BadOutput(f"there is no folder {path.parent} for the figure: make it, or give --png another name.")


def write(found: "Inspection", path: Path) -> None:
    """Draw a report into a PNG file, whole or not at all.

    Raises BadInput without spectra to draw or without matplotlib, BadOutput where the file cannot be written.
    """
    check(path, weights=found.junctions[-1].readers is not None)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    partial = path.with_name(f".{path.name}.partial")
    canvas = FigureCanvasAgg(figure(found))
    try:
        with partial.open("wb") as file:
            canvas.print_png(file)
        partial.replace(path)
    except OSError as error:
        raise BadOutput(f"cannot write the figure {path}: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)


def figure(found: "Inspection") -> Any:
    """Four panels under the name of the model and the protocol."""
    from matplotlib.figure import Figure

    drawn: Any = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    drawn.suptitle(title(found), fontsize=12)
    upper, lower = drawn.subfigures(2, 1)  # laid out one by one: a label in one row leaves no gap in the other
    (decay, rank), (change, parts) = upper.subplots(1, 2), lower.subplots(1, 2)
    draw_decay(upper, decay, found)
    draw_rank(rank, found)
    if found.changes:
        draw_change(change, found)
    else:
        draw_components(change, found)
    draw_parts(parts, found)
    return drawn


def title(found: "Inspection") -> str:
    """The model, and the text that ran through it."""
    name = found.name.rstrip("/").rsplit("/", 1)[-1]
    about = found.calibration
    text = "weights alone, no text"
    if about is not None:
        source = str(about["source"]).rstrip("/").rsplit("/", 1)[-1]
        text = f"{source}, {about['windows']} windows of {about['length']} tokens"
    return f"{name} ({found.architecture}, {found.sizes.stored:,} parameters): {text}"


def main_field(found: "Inspection") -> str:
    """The spectrum that is drawn at every junction: the stream's, or what reads it where there is no text."""
    return "readers" if found.calibration is None else "behind_norm"


def draw_decay(drawn: Any, axes: Any, found: "Inspection") -> None:
    """Eigenvalues over the first, a line for each junction, coloured by depth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    field, last = main_field(found), found.junctions[-1].number
    colours = ListedColormap([colormaps[MAP](DARK * step / 255) for step in range(256)])
    depth = Normalize(0, last / 2)
    for one in found.junctions:
        spectrum: Spectrum | None = getattr(one, field)
        if spectrum is None:
            continue
        first = spectrum.values[0] or 1.0
        kept = [value / first for value in spectrum.values if value / first > FLOOR]
        axes.plot(range(1, len(kept) + 1), kept, color=colours(depth(one.number / 2)), linewidth=1.1)
    axes.set(xscale="log", yscale="log", xlabel="component", ylabel="eigenvalue / first eigenvalue")
    axes.set_title(f"Eigenvalue decay: {NAMES[field]}", fontsize=11)
    axes.set_xlim(1, max(one.width for one in found.junctions))
    bar = drawn.colorbar(ScalarMappable(depth, colours), ax=axes, pad=0.02)
    bar.set_label("depth (blocks passed)")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, which="major")


def draw_rank(axes: Any, found: "Inspection") -> None:
    """Effective ranks by depth, below the width of the stream."""
    for field, name in NAMES.items():
        known = [(one.number / 2, getattr(one, field)) for one in found.junctions if getattr(one, field) is not None]
        if known:
            ranks = [spectrum.effective_rank for _, spectrum in known]
            style = {"marker": "o", "markersize": 3.5, "linewidth": 1.3}
            axes.plot([place for place, _ in known], ranks, color=COLOURS[field], label=name, **style)
    widths = draw_widths(axes, found)
    axes.set(xlabel="depth (blocks passed)", ylabel="effective rank (directions)")
    axes.set_ylim(0, 1.32 * max(widths))
    axes.set_title("Effective rank of each junction", fontsize=11)
    axes.legend(fontsize=8.5, ncols=2, loc="upper center", frameon=False)
    finish_depth(axes)


def draw_widths(axes: Any, found: "Inspection") -> list[int]:
    """The width of the stream by depth, as a dashed line; returns the widths."""
    widths = [one.width for one in found.junctions]
    places = [one.number / 2 for one in found.junctions]
    axes.plot(places, widths, color="0.4", linestyle="--", linewidth=1.0, label=f"width ({max(widths)})")
    return widths


def draw_change(axes: Any, found: "Inspection") -> None:
    """Block influence, and how much of each block's neurons is used."""
    blocks = [one.block for one in found.changes]
    axes.bar(blocks, [one.influence for one in found.changes], color=COLOURS["behind_norm"], width=0.75)
    axes.set(xlabel="block", ylabel="block influence (1 - cosine)")
    axes.set_title("What each block changes, and what its neurons span", fontsize=11)
    axes.yaxis.label.set_color(COLOURS["behind_norm"])
    other = axes.twinx()
    shares = [one.spectrum.effective_rank / max(one.size, 1) for one in found.neurons]
    other.plot(blocks, shares, marker="o", markersize=3.5, linewidth=1.3, color=COLOURS["readers"])
    other.set_ylabel("effective rank of neurons / neurons", color=COLOURS["readers"])
    other.set_ylim(0, max(1.15 * max(shares), 1e-6))
    finish_depth(axes)


def draw_components(axes: Any, found: "Inspection") -> None:
    """Without a text: how many components of what reads hold most of it."""
    places = [one.number / 2 for one in found.junctions if one.readers is not None]
    for share, colour in ((0.9, "tab:green"), (0.99, "tab:purple")):
        held = [one.readers.components(share) for one in found.junctions if one.readers is not None]
        axes.plot(places, held, marker="o", markersize=3.5, linewidth=1.3, color=colour, label=f"{share:.0%}")
    widths = draw_widths(axes, found)
    axes.set(xlabel="depth (blocks passed)", ylabel="components")
    axes.set_ylim(0, 1.2 * max(widths))
    axes.set_title("Components that hold the energy of what reads", fontsize=11)
    axes.legend(fontsize=8.5, ncols=3, loc="upper center", frameon=False)
    finish_depth(axes)


def draw_parts(axes: Any, found: "Inspection") -> None:
    """Stored parameters by what they are for."""
    names, counts = list(found.parts), list(found.parts.values())
    bars = axes.barh(names, [count / 1e6 for count in counts], color=COLOURS["behind_norm"], height=0.65)
    labels = [
        "tied to the embeddings" if name == "head" and not count else f"{count:,}, {count / found.sizes.stored:.1%}"
        for name, count in zip(names, counts, strict=True)
    ]
    axes.bar_label(bars, labels=labels, padding=4, fontsize=9)
    axes.set_xlim(0, 1.45 * max(counts) / 1e6)
    axes.invert_yaxis()
    axes.set(xlabel="stored parameters (millions)")
    axes.set_title("Sizes by part", fontsize=11)
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)


def finish_depth(axes: Any) -> None:
    """Whole numbers below, and a grid behind."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
