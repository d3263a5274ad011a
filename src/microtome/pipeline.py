"""From a folder and a dial to a smaller folder: the file to read first.

    open      folder -> canonical config, tensors one part at a time
    plan      dial -> widths -> the config of the result, and whether the architecture's own config can say it
    survey    stream all blocks, cut nothing, keep sums          (unless every junction is measured behind cut ones)
    cut       stream them again: solve -> edits -> surgery -> write
    finish    tokenizer, licence, plan.json, card; measure before and after
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import arch, budget, layout, methods, surgery
from microtome.calibrate import Progress, Stream
from microtome.checkpoint import Writer, copy_companions
from microtome.data import Tokens
from microtome.edit import Edit, Plan, Rewrite
from microtome.errors import BadInput, NumericalFailure
from microtome.layout import EMBEDDING, FINAL_NORM, Part
from microtome.modeling_microtome import MicrotomeConfig
from microtome.source import Source
from microtome.space import Space
from microtome.stats import Moment
from microtome.surgery import Gauge, Tensors


@dataclass(frozen=True, eq=False)
class Opened:
    """A source, its table and its canonical config."""

    source: Source
    table: arch.Architecture
    config: MicrotomeConfig

    def read(self, part: Part, dtype: torch.dtype | None = None) -> Tensors:
        """The canonical tensors of one part, checked for values that are not finite; in `dtype` if given."""
        wanted = arch.stored_names(self.table, self.config, part)
        stored: dict[str, Tensor] = {}
        for place in wanted.values():
            if place.name not in stored:
                stored[place.name] = self.source.tensor(place.name)
                self.source.check_finite(place.name, stored[place.name])
        tensors = arch.lower_tensors(stored, wanted)
        return tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type that the embedding is stored in."""
        return self.source.dtype(arch.stored_names(self.table, self.config, "stem")[EMBEDDING].name)


def opened(source: Source) -> Opened:
    """Recognise the architecture by its config, and hold the checkpoint's tensors against its table."""
    config = arch.lower(source.config)
    table = arch.find(str(source.config["model_type"]))
    arch.check_names(source.names(), config, table)
    found = Opened(source, table, config)
    for part in layout.parts(config):
        wanted = arch.stored_names(table, config, part)
        for name, shape in layout.shapes(config, part).items():
            place = wanted[name]
            have = source.shape(place.name)
            if place.rows is None and (have[::-1] if place.transposed else have) != shape:
                raise BadInput(f"{place.name} has shape {list(have)}, and config.json says {list(shape)}: they are not of one model.")
    return found


# --- plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything about a result that is known before a weight is read."""

    method: Any
    widths: dict[int, int]  # junction number to width
    gauge: Gauge | None
    formed: MicrotomeConfig  # uncut, in the method's form
    cut: MicrotomeConfig  # cut, in the method's form
    final: MicrotomeConfig  # as written
    stock: dict[str, Any] | None  # the config.json of the architecture, if it can say the result
    why_not: str | None  # else the reason

    @property
    def untouched(self) -> bool:
        """Whether nothing is cut at all."""
        return not self.widths


def outcome(fields: Mapping[str, Any], config: MicrotomeConfig, method: Any, widths: Mapping[int, int]) -> Outcome:
    """The configs of a result with these widths; without widths it is the source."""
    if not widths:
        return Outcome(method, {}, None, config, config, config, dict(fields), None)
    formed = surgery.formed_config(config, method.form(config))
    size = config.hidden_size
    gauge = method.join(size, min(widths.values()))
    cut = surgery.resized_config(formed, widths, gauge)
    standard = surgery.standard_config(cut) if not cut.is_heterogeneous else cut
    try:
        stock = arch.raise_config(fields, standard)
    except arch.NotStock as reason:
        return Outcome(method, dict(widths), gauge, formed, cut, cut, None, str(reason))
    return Outcome(method, dict(widths), gauge, formed, cut, standard, stock, None)


def plan_widths(
    fields: Mapping[str, Any], config: MicrotomeConfig, method: Any, keep: float | None, slice_: float | None, multiple: int | None
) -> Outcome:
    """Solve the dial for widths. `keep` 1 leaves the model as it is; `slice` 0 rotates it at full width."""
    budget.check_dials(keep, slice_)
    if keep == 1.0:
        return outcome(fields, config, method, {})
    method.check(config)
    size, last = config.hidden_size, 2 * config.num_hidden_layers
    whole = layout.count_blocks(config)

    def widths(wide: int) -> dict[int, int]:
        full = method.head == "full" or (method.head == "auto" and slice_ is not None and method.split)
        return {number: size if full and number == last else wide for number in layout.junctions(config)}

    if slice_ is not None:
        return outcome(fields, config, method, widths(budget.sliced_width(size, slice_, multiple)))

    def count(wide: int) -> int:
        return layout.count_blocks(outcome_config(config, method, widths(wide)))

    return outcome(fields, config, method, widths(budget.nearest_width(size, float(keep or 0), multiple, count, whole)))


def outcome_config(config: MicrotomeConfig, method: Any, widths: Mapping[int, int]) -> MicrotomeConfig:
    """The cut config alone, for counting."""
    formed = surgery.formed_config(config, method.form(config))
    return surgery.resized_config(formed, widths, method.join(config.hidden_size, min(widths.values())))


# --- survey and cut -------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """One run over a model: what is being done, with what precision, and how it reports."""

    opened: Opened
    outcome: Outcome
    ids: Tensor | None
    device: torch.device
    dtype: torch.dtype  # of the hidden states
    scratch: Path | None = None
    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def working(self) -> torch.dtype:
        """The precision of surgery: fp64 for fp32 weights, fp32 for shorter ones."""
        return torch.float64 if self.opened.dtype in (torch.float32, torch.float64) else torch.float32

    def formed(self, part: Part) -> Tensors:
        """A part of the source in the method's form, in working precision."""
        tensors = self.opened.read(part, self.working)
        config = self.opened.config
        form = self.outcome.method.form(config)
        if part == "head" and config.tie_word_embeddings and form.untie:
            tensors[layout.HEAD] = self.opened.read("stem", self.working)[EMBEDDING]
        return surgery.formed(tensors, part, config, form)

    def timed(self, what: str, since: float) -> None:
        """Add the seconds since a moment to a stage."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since

    def spaces(self) -> dict[int, Space]:
        """The space of every junction: one each, or the same for all."""
        config, split = self.outcome.formed, self.outcome.method.split
        found = layout.residual_spaces(config, split=split)
        return dict(zip(layout.junctions(config), found, strict=True)) if split else dict.fromkeys(layout.junctions(config), found[0])

    def stream(self) -> Stream:
        """The calibration rows, ready to be pushed."""
        assert self.ids is not None
        return Stream(
            self.outcome.formed, self.ids, device=self.device, dtype=self.dtype, scratch=self.scratch, progress=self.progress
        )

    def moment(self) -> Moment:
        """Empty sums at the uncut width."""
        return Moment(self.outcome.formed.hidden_size, self.device)


def halves(config: MicrotomeConfig) -> tuple[tuple[str, ...], ...]:
    """What a block does between two junctions."""
    return (("attn",), ("mlp",)) if config.parallel == "none" else (("attn", "mlp"),)


@torch.inference_mode()
def survey(work: Work) -> tuple[dict[str, Moment], Moment]:
    """Push the stream through the uncut model: sums of every space, and those of the last junction alone."""
    start, spaces, normed = time.perf_counter(), work.spaces(), work.outcome.method.normed
    sums = {space.name: work.moment() for space in spaces.values()}
    numbers = iter(layout.junctions(work.outcome.formed))
    stream, final = work.stream(), work.moment()
    stream.start(work.formed("stem"), sums[spaces[next(numbers)].name], normed=normed)
    for block in range(work.outcome.formed.num_hidden_layers):
        tensors = work.formed(block)
        for half in halves(work.outcome.formed):
            number = next(numbers)
            target = final if number == 2 * work.outcome.formed.num_hidden_layers else sums[spaces[number].name]
            stream.advance(block, half, tensors, None, target, normed=normed)
            check_finite(target, spaces[number].name, block)
    sums[spaces[2 * work.outcome.formed.num_hidden_layers].name].merge(final)
    stream.close()
    work.timed("survey", start)
    return sums, final


def check_finite(moment: Moment, name: str, block: int) -> None:
    """Say in which block the activations stopped being numbers."""
    if not torch.isfinite(moment.sum_NN).all():
        raise NumericalFailure(f"activations leave block {block} not finite ({name}): the model overflows there. Try --dtype float32.")


def solved(work: Work, sums: Mapping[str, Moment]) -> dict[str, Rewrite]:
    """The edits of spaces whose sums are all known, joined by the gauge."""
    start = time.perf_counter()
    spaces = {space.name: space for space in work.spaces().values()}
    ranks = {space.name: work.outcome.widths[number] for number, space in work.spaces().items()}
    found = {edit.space.name: edit for edit in work.outcome.method.solve(list(spaces.values()), sums, ranks)}
    work.timed("solve", start)
    if work.outcome.gauge is None:
        return found
    ordered = [found[name] for name in spaces]
    return {edit.space.name: edit for edit in gauged(ordered, work.outcome.gauge)}


def gauged(edits: Sequence[Rewrite] | Iterator[Rewrite], gauge: Gauge) -> Iterator[Rewrite]:
    """The bases in order, each turned inside its span as the gauge wants, as soon as it can be."""
    before: Rewrite | None = None
    for number, edit in enumerate(edits):
        after = edit if before is None else surgery.gauged(before, edit, gauge)
        if gauge.kind == "diagonal":
            if before is not None and number % 2 == 1:
                before, after = surgery.diagonalised(before, after)
            if before is not None:
                yield before
        else:
            yield after
        before = after
    if gauge.kind == "diagonal" and before is not None:
        yield before


@torch.inference_mode()
def sequential(work: Work, write: Callable[[Part, Tensors, Mapping[str, Rewrite]], None]) -> dict[str, Rewrite]:
    """Measure every junction behind the ones already cut, and write each block as soon as its bases are final."""
    start, config, gauge = time.perf_counter(), work.outcome.formed, work.outcome.gauge
    assert gauge is not None
    waiting: list[tuple[Part, Tensors, set[str]]] = []
    final: dict[str, Rewrite] = {}

    def flush() -> None:
        while waiting and waiting[0][2] <= set(final):
            part, tensors, _ = waiting.pop(0)
            write(part, tensors, final)

    for edit in gauged(measured(work, waiting), gauge):
        final[edit.space.name] = edit
        flush()
    flush()
    work.timed("survey and cut", start)
    assert not waiting, f"bases of {[part for part, *_ in waiting]} were never solved"
    assert config.num_hidden_layers * 2 + 1 >= len(final)
    return final


def measured(work: Work, waiting: list[tuple[Part, Tensors, set[str]]]) -> Iterator[Rewrite]:
    """The stream through a model that is cut as it goes: yields the basis of each junction when it is reached."""
    config, method, spaces = work.outcome.formed, work.outcome.method, work.spaces()
    numbers = iter(layout.junctions(config))
    stream, moment = work.stream(), work.moment()

    def solve(number: int, sums: Moment) -> Rewrite:
        since = time.perf_counter()
        space = spaces[number]
        (edit,) = method.solve([space], {space.name: sums}, {space.name: work.outcome.widths[number]})
        work.timed("solve", since)
        return edit

    stem = work.formed("stem")
    stream.start(stem, moment, normed=method.normed)
    edit = solve(next(numbers), moment)
    waiting.append(("stem", stem, {edit.space.name}))
    yield edit
    for block in range(config.num_hidden_layers):
        tensors = work.formed(block)
        needs = {edit.space.name}
        entry: tuple[Part, Tensors, set[str]] = (block, tensors, needs)
        waiting.append(entry)
        needs.add(f"residual.{2 * block + 2}")
        if config.parallel == "none":
            needs.add(f"residual.{2 * block + 1}")
        for half in halves(config):
            moment = work.moment()
            narrowed = surgery.apply(tensors, [readers_only(edit)])
            stream.advance(block, half, narrowed, edit.grow, moment, normed=method.normed)
            number = next(numbers)
            check_finite(moment, spaces[number].name, block)
            edit = solve(number, moment)
            yield edit
    stream.close()


def readers_only(edit: Rewrite) -> Rewrite:
    """The edit for what reads the space: what writes it stays at full width while the next basis is unknown."""
    space = edit.space
    axes = tuple(axis for axis in space.axes if axis.role.value == "reads")
    return Rewrite(Space(space.name, space.kind, space.block, space.size, space.symmetry, axes), edit.shrink, edit.grow)


@torch.inference_mode()
def cut(work: Work, writer: Writer, dtype: torch.dtype | None) -> None:
    """Solve every basis, rewrite every part, and write it under the names of the result."""
    out, opened_ = work.outcome, work.opened
    table = arch.find(str(out.stock["model_type"])) if out.stock is not None else None

    def write(part: Part, tensors: Tensors, rewrites: Mapping[str, Rewrite], extra: Sequence[Edit] = ()) -> None:
        since = time.perf_counter()
        done = surgery.apply(tensors, rewrites.values())
        if isinstance(part, int) and out.gauge is not None:
            done |= surgery.shortcuts(out.cut, part, rewrites)
        done = surgery.apply(done, surgery.corrections(extra, part, out.cut))
        if out.stock is not None:
            done = surgery.standardised(done, part, out.cut)
        store(part, done)
        work.timed("write", since)

    def store(part: Part, tensors: Tensors) -> None:
        wanted = layout.shapes(out.final, part)
        if set(wanted) != set(tensors) or any(tuple(tensors[name].shape) != wanted[name] for name in wanted):
            raise AssertionError(f"part {part} came out as {{n: tuple(t.shape) for n, t in tensors.items()}}, planned {wanted}")
        cast = {name: tensor.to(dtype or opened_.dtype) for name, tensor in tensors.items()}
        for name, tensor in cast.items():
            if not torch.isfinite(tensor).all():
                raise NumericalFailure(f"{name} is not finite in {str(dtype or opened_.dtype).removeprefix('torch.')}: choose --dtype float32.")
        named = cast if table is None else arch.raise_tensors(cast, arch.stored_names(table, out.final, part))
        for name, tensor in named.items():
            writer.add(name, tensor)

    final: Moment | None = None
    if out.method.sequential:
        rewrites = sequential(work, write)
    else:
        sums, final = survey(work)
        rewrites = solved(work, sums)
        for part in layout.parts(out.formed)[:-1]:
            write(part, work.formed(part), rewrites)
    head = work.formed("head")
    extra: list[Edit] = []
    if FINAL_NORM in head:  # tied: the sliced embedding must learn to be a head
        since = time.perf_counter()
        extra = out.method.finish(work.opened.read("stem") | head, rewrites, final)
        head = {name: tensor for name, tensor in head.items() if not name.startswith("model.norm.")}
        work.timed("solve", since)
    write("head", head, rewrites, extra)


def copy_untouched(found: Opened, writer: Writer, dtype: torch.dtype | None) -> None:
    """Write every tensor as it is stored."""
    for part in layout.parts(found.config):
        tensors = arch.raise_tensors(found.read(part), arch.stored_names(found.table, found.config, part))
        for name, tensor in tensors.items():
            writer.add(name, tensor if dtype is None else tensor.to(dtype))


# --- the record -----------------------------------------------------------------------------------------------------


def plan_of(found: Opened, out: Outcome, keep: float | None, slice_: float | None, name: str, tokens: Tokens | None) -> Plan:
    """What is done, as `plan.json` keeps it."""
    names = {number: f"residual.{number}" if out.method.split else "residual" for number in out.widths}
    calibration = {} if tokens is None else {
        "source": tokens.source, "sha256": tokens.sha256, "windows": tokens.ids.shape[0], "length": tokens.ids.shape[1],
    }  # fmt: skip
    return Plan(
        method=name,
        options=asdict(out.method),
        keep=keep,
        slice=slice_,
        widths={names[number]: wide for number, wide in out.widths.items()},
        source={"name": found.source.name, "revision": found.source.revision, "digest": found.source.digest()},
        calibration=calibration,
    )


def finish(work_dir: Writer, found: Opened, out: Outcome, plan: Plan, dtype: torch.dtype | None) -> None:
    """Config, tokenizer, licence and plan beside the weights; our decoder's file where only it can load them."""
    stored = str(dtype or found.dtype).removeprefix("torch.")
    if out.stock is not None:
        config = {**out.stock, "dtype": stored}
        config.pop("torch_dtype", None)
    else:
        config = own_config(out.final, stored)
        work_dir.copy(Path(__file__).with_name("modeling_microtome.py"))
    work_dir.write_json("config.json", config)
    copy_companions(found.source, work_dir)
    work_dir.write_json("plan.json", plan.to_json())


def own_config(config: MicrotomeConfig, dtype: str) -> dict[str, Any]:
    """The config.json of our own class, which loads after `import microtome`, or with trust_remote_code."""
    plain = config.to_dict()
    classes = {"AutoConfig": "MicrotomeConfig", "AutoModel": "MicrotomeModel", "AutoModelForCausalLM": "MicrotomeForCausalLM"}
    return {
        **plain,
        "architectures": ["MicrotomeForCausalLM"],
        "auto_map": {auto: f"modeling_microtome.{name}" for auto, name in classes.items()},
        "dtype": dtype,
    }


def build_method(name: str, options: Mapping[str, Any] | None) -> Any:
    """The method with its options, checked."""
    return methods.build(name, options or {})
