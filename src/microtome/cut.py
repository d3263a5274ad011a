"""The cut itself: measure, solve, rewrite and write, one part of the decoder at a time."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import arch, cache, layout, sparsity, surgery, wrapper
from microtome.calibrate import Progress, Stream, allocated
from microtome.checkpoint import Writer, copy_companions
from microtome.edit import Edit, Quantise, Rewrite
from microtome.errors import NumericalFailure
from microtome.layout import EMBEDDING, FINAL_NORM, Part
from microtome.lineage import Made
from microtome.modeling_microtome import MicrotomeConfig
from microtome.planner import Opened, Outcome
from microtome.space import Space
from microtome.stats import Moment
from microtome.surgery import Gauge, Tensors


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
    files: list[Any] = field(default_factory=list[Any])  # temporary ones, open until the cut is done
    cache: Path | None = None  # of statistics
    gradients: Any = None  # of the loss, for methods that need them
    keep_bases: bool = False  # whether a later step asks how coordinates have changed
    nonzero: dict[Part, int] = field(default_factory=dict[Part, int])  # numbers in what was stored that are not zero
    stored: torch.dtype = torch.float32  # of the result

    @property
    def working(self) -> torch.dtype:
        """The precision of surgery: fp64 for fp32 weights, fp32 for shorter ones."""
        return torch.float64 if self.opened.dtype in (torch.float32, torch.float64) else torch.float32

    def formed(self, part: Part, *, again: bool = False) -> Tensors:
        """A part of the source in the method's form, in working precision; `again` has been checked before."""
        tensors = self.opened.read(part, self.working, check=not again)
        config = self.opened.config
        form = self.outcome.method.form(config)
        if part == "head" and config.tie_word_embeddings and form.untie:
            tensors[layout.HEAD] = self.opened.read("stem", self.working)[EMBEDDING]
        return surgery.formed(tensors, part, config, form)

    def timed(self, what: str, since: float) -> None:
        """Add the seconds since a moment to a stage."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since

    def original_map(self, edit: Rewrite) -> Tensor:
        """How a junction's coordinates come from the source's own, [R, N]: what is centred lost its mean before."""
        centred = self.outcome.formed.norm == "rms" and self.opened.config.norm == "layer"
        return edit.shrink - edit.shrink.mean(1, keepdim=True) if centred else edit.shrink

    def spaces(self) -> dict[int, Space]:
        """The space of every junction."""
        config = self.outcome.formed
        return dict(zip(layout.junctions(config), layout.residual_spaces(config, split=True), strict=True))

    def ranks(self) -> dict[str, int]:
        """The width that every junction's space keeps."""
        return {space.name: self.outcome.widths[number] for number, space in self.spaces().items()}

    def stream(self) -> Stream:
        """The calibration rows, ready to be pushed."""
        assert self.ids is not None
        return Stream(
            self.outcome.formed,
            self.ids,
            device=self.device,
            dtype=self.dtype,
            scratch=self.scratch,
            progress=self.progress,
        )

    def moment(self) -> Moment:
        """Empty sums at the uncut width; a method may have some of its own (`sums`)."""
        assert self.ids is not None
        size, own = self.outcome.formed.hidden_size, getattr(self.outcome.method, "sums", None)
        return Moment(size, self.device) if own is None else own(size, self.ids.numel(), self.device)


@contextmanager
def clock(seconds: dict[str, float], what: str) -> Generator[None]:
    """Add what the block takes to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - start


def halves(config: MicrotomeConfig) -> tuple[tuple[str, ...], ...]:
    """What a block does between two junctions."""
    return (("attn",), ("mlp",)) if config.parallel == "none" else (("attn", "mlp"),)


@torch.inference_mode()
def one_basis(work: Work) -> tuple[dict[str, Rewrite], Moment]:
    """Push the stream through the uncut model and solve all junctions together; also the last junction's sums."""
    start, spaces, method = time.perf_counter(), work.spaces(), work.outcome.method
    size, last = work.outcome.formed.hidden_size, 2 * work.outcome.formed.num_hidden_layers
    shape = (len(spaces), size, size)
    kept, file = (None, None) if method.pooled else allocated(shape, torch.float64, work.scratch, "sums")
    sums: dict[str, Moment] = {}
    final = total = work.moment()
    for place, (number, moment) in enumerate(uncut_sums(work)):
        if kept is not None:
            sums[spaces[number].name] = moment.kept(kept[place])
        elif place > 0:
            total.add_moment(moment)
        else:
            sums["residual"] = total = moment.kept(torch.empty(size, size, dtype=torch.float64))
        final = moment if number == last else final
    work.timed("survey", start)
    start = time.perf_counter()
    edits = method.solve(list(spaces.values()), sums, work.ranks())
    work.files.append(file)  # the sums are read again when readers are cut
    work.timed("solve", start)
    return {edit.space.name: edit for edit in edits}, final


def uncut_sums(work: Work) -> Iterator[tuple[int, Moment]]:
    """Every junction's number and sums in the uncut model: from the cache if it has them all, else for the cache."""
    out, own = work.outcome, getattr(work.outcome.method, "sums", None)  # sums of the method's own kind are not kept
    if work.cache is None or work.ids is None or own is not None:
        yield from junction_sums(work, lambda _number: None)
        return
    folder = work.cache / cache.key(work.opened.source.digest(), work.ids, work.device, work.dtype)
    form = out.method.form(work.opened.config)
    kind = f"{'normed' if out.method.normed else 'raw'}-{form.norm}{'-centred' if form.centre_always else ''}"
    files = {n: folder / f"junction-{n:03d}-{kind}.safetensors" for n in layout.junctions(out.formed)}
    if all(file.is_file() for file in files.values()):
        held = {number: cache.read(file) for number, file in files.items()}
        known = {number: moment for number, moment in held.items() if isinstance(moment, Moment)}
        if len(known) == len(files):
            yield from known.items()
            return
    for number, moment in junction_sums(work, lambda _number: None):
        cache.write(files[number], moment)
        yield number, moment


def check_finite(moment: Moment, name: str, block: int) -> None:
    """Say in which block the activations stopped being numbers."""
    if not moment.is_finite:
        raise NumericalFailure(
            f"activations leave block {block} not finite ({name}): the model overflows there. Try --dtype float32."
        )


def junction_sums(work: Work, basis: Callable[[int], Rewrite | None]) -> Iterator[tuple[int, Moment]]:
    """Push the stream from junction to junction, and yield each one's number and sums.

    `basis(number)` is asked when the stream leaves a junction: with an edit, its readers are cut and only what lies in
    its span goes on; with None the model runs uncut.
    """
    config, spaces, normed = work.outcome.formed, work.spaces(), work.outcome.method.normed
    numbers, stream, moment = iter(layout.junctions(config)), work.stream(), work.moment()
    stream.start(work.formed("stem"), moment, normed=normed)
    number = next(numbers)
    yield number, moment
    for block in range(config.num_hidden_layers):
        tensors = work.formed(block)
        for half in halves(config):
            edit, moment = basis(number), work.moment()
            narrowed = tensors if edit is None else surgery.apply(at_work(tensors, stream.dtype), [readers_only(edit)])
            stream.advance(block, half, narrowed, edit, moment, normed=normed)
            number = next(numbers)
            check_finite(moment, spaces[number].name, block)
            yield number, moment
    stream.close()


def without_data(work: Work) -> dict[str, Rewrite]:
    """The bases of a method that needs no activations."""
    edits = work.outcome.method.solve(list(work.spaces().values()), {}, work.ranks())
    joined = edits if work.outcome.gauge is None else gauged(edits, work.outcome.gauge)
    return {edit.space.name: edit for edit in joined}


def gauged(edits: Iterable[Rewrite], gauge: Gauge) -> Iterator[Rewrite]:
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
def own_bases(
    work: Work, write: Callable[[Part, Tensors, Mapping[str, Rewrite]], None], made: Made | None
) -> dict[str, Rewrite]:
    """Solve every junction when the stream reaches it, and write each block as soon as its bases are final.

    Returns the first and the last bases: what the head needs.
    """
    start, spaces, gauge, method = time.perf_counter(), work.spaces(), work.outcome.gauge, work.outcome.method
    assert gauge is not None
    parallel = work.outcome.formed.parallel != "none"
    raw: dict[int, Rewrite] = {}
    final: dict[str, Rewrite] = {}

    def solve() -> Iterator[Rewrite]:
        for number, moment in junction_sums(work, lambda number: raw[number] if method.sequential else None):
            since, space = time.perf_counter(), spaces[number]
            (edit,) = method.solve([space], {space.name: moment}, {space.name: work.outcome.widths[number]})
            raw.clear()
            raw[number] = edit
            work.timed("solve", since)
            yield edit

    waiting = list(layout.parts(work.outcome.formed)[:-1])
    for edit in gauged(solve(), gauge):
        final[edit.space.name] = edit
        if made is not None:
            made.stream[edit.space.name] = work.original_map(edit)
        while waiting and around(waiting[0], parallel) <= set(final):
            part = waiting.pop(0)
            write(part, work.formed(part, again=True), final)
            for name in around(part, parallel) - {"residual.0", edit.space.name}:
                if not any(name in around(later, parallel) for later in waiting[:1]):
                    del final[name]  # the first stays for a tied head, the last for any
    work.timed("survey and cut", start)
    return final


def around(part: Part, parallel: bool) -> set[str]:
    """Names of the junctions whose bases a part needs."""
    if part == "stem":
        return {"residual.0"}
    first = 2 * int(part)
    return {f"residual.{number}" for number in ((first, first + 2) if parallel else (first, first + 1, first + 2))}


def at_work(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The tensors in the precision that the stream runs in: what is cut for measuring only needs no more."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def readers_only(edit: Rewrite) -> Rewrite:
    """The edit for what reads the space: what writes it stays at full width while the next basis is unknown."""
    space = edit.space
    axes = tuple(axis for axis in space.axes if axis.role.value == "reads")
    narrow = Space(space.name, space.kind, space.block, space.size, space.symmetry, axes)
    return Rewrite(narrow, edit.shrink, edit.grow, edit.read)


@dataclass(frozen=True, eq=False)
class Sink:
    """Where finished parts go: rewritten, held against the plan, cast, and stored under the names of the result."""

    work: Work
    writer: Writer
    dtype: torch.dtype
    coded: Sequence[Quantise] = ()  # what is to be packed of the part at hand

    def write(self, part: Part, tensors: Tensors, rewrites: Mapping[str, Rewrite], extra: Sequence[Edit] = ()) -> None:
        """Apply the edits to a part in the method's form, and store it."""
        since, out = time.perf_counter(), self.work.outcome
        done = surgery.apply(tensors, rewrites.values())
        if isinstance(part, int) and out.gauge is not None:
            done |= surgery.shortcuts(out.cut, part, rewrites)
        done = surgery.apply(done, surgery.corrections(extra, part, out.cut))
        if out.stock is not None:
            done = surgery.standardised(done, part, out.cut, out.final, self.dtype)
        self.store(part, done, rewrites.get("residual.0"))
        self.work.timed("write", since)

    def store(self, part: Part, tensors: Tensors, first: Rewrite | None = None) -> None:
        """Cast and store the canonical tensors of a part; `first` turns what else writes the stream, with the stem."""
        out = self.work.outcome
        made, wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, layout.shapes(out.final, part)
        if made != wanted:
            raise AssertionError(f"part {part} came out as {made}, planned {wanted}")
        cast = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
        self.work.nonzero[part] = sparsity.nonzero(cast.values())
        for name, tensor in cast.items():
            if not torch.isfinite(torch.stack(tensor.aminmax())).all():
                raise NumericalFailure(f"{name} is not finite in {str(self.dtype)[6:]}: choose --dtype float32.")
        places = arch.stored_names(out.table, out.final, part)
        cast = arch.raise_tensors(cast, places)
        if out.packing is not None:
            cast = out.packing.packed(cast, self.coded, places, self.dtype)
        for name, tensor in cast.items():
            self.writer.add(name if out.whole is None else self.work.opened.stored(name), tensor)
        if part == "stem" and out.whole is not None:
            self.carry(first)

    def carry(self, first: Rewrite | None) -> None:
        """Store what a wrapper has beside its decoder: what writes the stream in its new basis, the rest as it is."""
        source, around = self.work.opened.source, self.work.opened.wrapper
        assert around is not None
        for name in around.carried:
            tensor = source.tensor(name)
            source.check_finite(name, tensor)
            if first is not None and name in around.writers():
                wide = {name: tensor.to(self.work.working)}
                tensor = wrapper.reprojected(wide, around, first)[name].to(self.dtype)
            self.writer.add(name, tensor)


@torch.inference_mode()
def cut(work: Work, writer: Writer, dtype: torch.dtype | None) -> Made:
    """Solve every basis, rewrite every part, and write it under the names of the result."""
    made, out, sink = Made(work.opened.config), work.outcome, Sink(work, writer, dtype or work.opened.dtype)
    final: Moment | None = None
    if out.method.split and out.method.needs:
        rewrites = own_bases(work, sink.write, made if work.keep_bases else None)
    else:
        rewrites, final = one_basis(work) if out.method.needs else (without_data(work), None)
        for number, part in enumerate(layout.parts(out.formed)[:-1], start=1):
            sink.write(part, work.formed(part, again=True), rewrites)
            if work.progress is not None:
                work.progress("writing", number / (1 + out.formed.num_hidden_layers))
        if work.keep_bases:
            made.stream |= {name: work.original_map(edit) for name, edit in rewrites.items()}
    head = work.formed("head")
    extra: list[Edit] = []
    if FINAL_NORM in head:  # tied: the sliced embedding must learn to be a head
        since = time.perf_counter()
        extra = out.method.finish(work.opened.read("stem", check=False) | head, rewrites, final)
        head = {name: tensor for name, tensor in head.items() if not name.startswith("model.norm.")}
        work.timed("solve", since)
    sink.write("head", head, rewrites, extra)
    for file in work.files:
        if file is not None:
            file.close()
    return made


def copy_untouched(found: Opened, writer: Writer, dtype: torch.dtype | None, *, whole: bool) -> None:
    """Write every tensor as it is stored, unless `dtype` is another than the model's; `whole` with its wrapper."""
    dtype = None if dtype == found.dtype else dtype
    if whole and found.wrapper is not None:
        for name in found.source.names():
            tensor = found.source.tensor(name)
            found.source.check_finite(name, tensor)
            own = dtype is None or name in found.wrapper.carried
            writer.add(name, tensor if own else tensor.to(dtype))
        return
    for part in layout.parts(found.config):
        tensors = arch.raise_tensors(found.read(part), arch.stored_names(found.table, found.config, part))
        for name, tensor in tensors.items():
            writer.add(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)


def finish(writer: Writer, found: Opened, out: Outcome, dtype: torch.dtype | None) -> None:
    """Config, tokenizer and licence beside the weights; our decoder's file where only it can load them."""
    stored = str(dtype or found.dtype).removeprefix("torch.")
    if out.stock is not None:
        config = {**(out.whole or out.stock), "dtype": stored}
        for name in ("torch_dtype", "auto_map"):  # an old spelling, and code that is neither needed nor copied
            config.pop(name, None)
    else:
        config = own_config(out.final, stored)
        writer.copy(Path(__file__).with_name("modeling_microtome.py"))
    writer.write_json("config.json", config | ({} if out.packing is None else out.packing.fields()))
    copy_companions(found.source, writer, whole=out.whole is not None)


def own_config(config: MicrotomeConfig, dtype: str) -> dict[str, Any]:
    """The config.json of our own class, which loads after `import microtome`, or with trust_remote_code."""
    plain = config.to_dict()
    classes = {
        "AutoConfig": "MicrotomeConfig",
        "AutoModel": "MicrotomeModel",
        "AutoModelForCausalLM": "MicrotomeForCausalLM",
    }
    return {
        **plain,
        "architectures": ["MicrotomeForCausalLM"],
        "auto_map": {auto: f"modeling_microtome.{name}" for auto, name in classes.items()},
        "dtype": dtype,
    }
