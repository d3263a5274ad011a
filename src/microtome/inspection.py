"""What a model is and what could be cut from it: the report of `microtome inspect`.

Sizes, spaces and the reach of every method are counted from the config. Spectra of what reads the stream need the
weights, and spectra of the stream itself, the change that each block makes and dead neurons need a text.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microtome import anatomy, budget, data, inner, layout, methods, planner, spectra
from microtome.anatomy import SpaceKind
from microtome.budget import Sizes
from microtome.calibrate import Progress
from microtome.data import Tokens
from microtome.errors import BadInput, MicrotomeError
from microtome.loading import device_of, tokenizer_of
from microtome.modeling_microtome import MicrotomeConfig
from microtome.planner import Opened
from microtome.running import window_of
from microtome.shards import read_config
from microtome.source import Source, open_source
from microtome.space import Kind
from microtome.spectra import Change, Junction, Neurons, short
from microtome.texts import Spec


@dataclass(frozen=True)
class Reach:
    """What a method with its default options could make of the model.

    Shares are of the blocks' stored numbers, as `keep` counts; `step` is the difference that one step of a width makes:
    of the stream, or of one inner width. `why` is a refusal in the method's own words, None where there is none.
    """

    method: str
    targets: tuple[str, ...]
    why: str | None = None
    smallest: float | None = None
    largest: float | None = None
    widths: tuple[int, int, int] | None = None  # narrowest, widest, step
    step: float | None = None
    stock: bool | None = None  # whether the smallest result loads with transformers alone


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` finds. Fields that were not asked for are empty."""

    name: str
    architecture: str
    features: dict[str, str]
    dtype: str
    sizes: Sizes
    parts: dict[str, int]  # stored numbers by what they are for
    spaces: tuple[SpaceKind, ...]
    methods: tuple[Reach, ...]
    junctions: tuple[Junction, ...]
    changes: tuple[Change, ...] = ()
    neurons: tuple[Neurons, ...] = ()
    calibration: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`: the same model, text and options give the same."""
        plain = ("name", "architecture", "features", "dtype", "parts", "calibration")
        return {
            **{field: getattr(self, field) for field in plain},
            "sizes": asdict(self.sizes),
            "spaces": [asdict(one) | {"sizes": list(one.sizes)} for one in self.spaces],
            "methods": [reach_json(one) for one in self.methods],
            "junctions": [junction_json(one) for one in self.junctions],
            "blocks": [
                {name: short(value) for name, value in change_numbers(one).items()} | {"block": one.block}
                for one in self.changes
            ],
            "neurons": [
                {"block": one.block, "size": one.size, "dead": one.dead, **one.spectrum.summary()}
                for one in self.neurons
            ],
            "notes": list(self.notes),
        }


def reach_json(reach: Reach) -> dict[str, Any]:
    """A method's reach as plain data; its fractions to six digits."""
    fractions = {name: getattr(reach, name) for name in ("smallest", "largest", "step")}
    rounded = {name: None if value is None else short(value) for name, value in fractions.items()}
    lists = {"targets": list(reach.targets), "widths": None if reach.widths is None else list(reach.widths)}
    return asdict(reach) | rounded | lists


def junction_json(junction: Junction) -> dict[str, Any]:
    """A junction as plain data, null for what was not measured."""
    found = {name: getattr(junction, name) for name in ("readers", "behind_norm", "before_norm")}
    return {
        "number": junction.number,
        "where": junction.where,
        "width": junction.width,
        **{name: None if one is None else one.to_json() for name, one in found.items()},
    }


def change_numbers(change: Change) -> dict[str, float]:
    """What a block does, by name."""
    names = ("cosine", "influence", "angle", "norm_in", "norm_out", "growth", "relative")
    return {name: getattr(change, name) for name in names}


# --- what methods could do ------------------------------------------------------------------------------------------


def reach(found: Opened, name: str) -> Reach:
    """How far a method with default options could go, counted without a weight; a refusal is part of the answer."""
    method = methods.build(name, {})
    targets = tuple(sorted(str(kind) for kind in method.targets))
    try:
        method.check(found.config)
        if Kind.WEIGHTS in method.targets:
            return Reach(name, targets, stock=planner.weights_outcome(found, method).stock is not None)
        far = reach_of_stream(found, method) if Kind.RESIDUAL in method.targets else reach_inside(found, method)
    except MicrotomeError as refusal:
        return Reach(name, targets, str(refusal))
    return replace(far, method=name, targets=targets)


def reach_of_stream(found: Opened, method: Any) -> Reach:
    """The narrowest and the widest stream that the dial can come to."""
    whole = layout.count_blocks(found.config)
    least, most = (planner.plan_widths(found, method, keep, None, None) for keep in (1e-9, 1.0 - 1e-9))
    low, high = (layout.count_blocks(one.final) / whole for one in (least, most))
    narrow, wide = min(least.widths.values()), max(most.widths.values())
    multiple = budget.friendly(found.config.hidden_size)
    step = (high - low) / ((wide - narrow) // multiple) if wide > narrow else None
    return Reach("", (), None, low, high, (narrow, wide, multiple), step, least.stock is not None)


def reach_inside(found: Opened, method: Any) -> Reach:
    """Every inner width at its narrowest, and the smallest step of one width; of blocks and halves the first stays."""
    dials, whole = inner.dials(found.config, inner.kinds_of(method, found.config)), layout.count_blocks(found.config)
    if not dials:
        return Reach("", (), f"there is nothing for it to cut in this {found.config.source_model_type}.")
    first = {dial.kind: dial for dial in reversed(dials.values())}  # the first dial of every kind
    widths = {name: dial.least or int(dial is first[dial.kind]) for name, dial in dials.items()}
    least = planner.inner_outcome(found, method, widths)
    smaller = [{one.name: max(one.least, one.size - one.step)} for one in first.values()]
    counts = [layout.count_blocks(planner.inner_outcome(found, method, one).final) for one in smaller]
    high = max([count for count in counts if count < whole], default=whole) / whole
    low = layout.count_blocks(least.final) / whole
    return Reach("", (), None, low, high, None, 1.0 - high, least.stock is not None)


# --- the report -----------------------------------------------------------------------------------------------------


def inspect(  # noqa: PLR0913 - the one call, all by name
    model: str | Path,
    *,
    data: Spec | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    text_column: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    method: str | None = None,
    weights: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """What a model is made of, how its energy is spread, and what each method, or the one named, could cut.

    Without `weights` only config.json is read, and there are no spectra. With `data` the text is pushed through the
    model, one block in memory at a time. Raises subclasses of MicrotomeError.
    """
    names = methods.known() if method is None else [method]
    for name in names:
        methods.find(name)
    if data is not None and not weights:
        raise BadInput("--data needs the weights: a text runs through them. Leave out --no-weights, or --data.")
    target = device_of(device)
    with closing(config_only(model, revision) if not weights else open_source(model, revision=revision)) as source:
        found = planner.opened(source)
        report = counted(found, names)
        if not weights:
            return report
        drawn: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "text_column": text_column}
        tokens = None if data is None else windows(found, data, **drawn)
        report = with_readers(report, found, progress)
        return report if tokens is None else with_activity(report, found, tokens, target, progress)


def config_only(model: str | Path, revision: str | None) -> Source:
    """A source without tensors: of a folder its config.json is all that is read."""
    folder = Path(model).expanduser()
    if str(model) and folder.is_dir() and revision is None:
        return Source(folder, str(model), None, read_config(folder), {}, {})
    return open_source(model, revision=revision, weights=False)


def counted(found: Opened, names: Iterable[str]) -> Inspection:
    """The report as far as the config tells."""
    config = found.config
    sizes = budget.sizes(config, itemsize=found.dtype.itemsize)
    return Inspection(
        name=found.source.name,
        architecture=str(config.source_model_type),
        features=anatomy.features(config),
        dtype=str(found.dtype)[6:],
        sizes=replace(sizes, nbytes=found.nbytes or sizes.nbytes),
        parts=anatomy.parts(config),
        spaces=anatomy.space_kinds(config),
        methods=tuple(reach(found, name) for name in names),
        junctions=tuple(
            Junction(number, spectra.where(config, number), layout.residual_width(config, number))
            for number in layout.junctions(config)
        ),
        notes=outer(found),
    )


def outer(found: Opened) -> tuple[str, ...]:
    """What a reader must know of a checkpoint that is more than a stock decoder."""
    kind, inner = str(found.source.config["model_type"]), found.config.source_model_type
    if kind == inner:
        return ()
    if kind == found.config.model_type:
        return (f"a {inner} that Microtome has cut, in a format of its own",)
    return (f"only the {inner} inside this {kind} is counted and measured; bytes are of all weights",)


def windows(found: Opened, spec: Spec, *, length: int | None, **drawn: Any) -> Tokens:
    """Calibration windows, drawn as `compress` draws them; see `data.calibration` for what else there is to say."""
    size = window_of(found.source, length, found.config.max_position_embeddings)
    words, known = tokenizer_of(found.source.folder), found.config.vocab_size
    return data.calibration(spec, words, length=size, vocab_size=known, **drawn)


def with_readers(report: Inspection, found: Opened, progress: Progress | None) -> Inspection:
    """The report with what the weights tell."""
    readers = spectra.reader_spectra(found, progress)
    return replace(report, junctions=tuple(replace(one, readers=readers.get(one.number)) for one in report.junctions))


def with_activity(
    report: Inspection, found: Opened, tokens: Tokens, device: torch.device, progress: Progress | None
) -> Inspection:
    """The report with what a text tells; hidden states are fp32 on a CPU, in the model's own type elsewhere."""
    dtype = torch.float32 if device.type == "cpu" else found.dtype
    seen = spectra.activity(found, tokens.ids, device=device, dtype=dtype, progress=progress)
    junctions = [
        replace(one, behind_norm=seen.junctions[one.number][0], before_norm=seen.junctions[one.number][1])
        for one in report.junctions
    ]
    about: dict[str, Any] = {"source": tokens.source, "sha256": tokens.sha256}
    about |= {"windows": tokens.ids.shape[0], "length": tokens.ids.shape[1]}
    return replace(
        report,
        junctions=tuple(junctions),
        changes=seen.changes,
        neurons=seen.neurons,
        calibration=about,
        notes=(*report.notes, *remarks(tokens, found.config, seen.neurons)),
    )


def remarks(tokens: Tokens, config: MicrotomeConfig, neurons: Sequence[Neurons]) -> list[str]:
    """What a reader must know of the text."""
    widest = max([config.hidden_size, *(one.size for one in neurons)])
    few = f"{tokens.count:,} tokens cannot fill {widest:,} directions: spectra end there. Raise --samples or --length."
    return [one for one in (tokens.note, few if tokens.count < widest else "") if one]
