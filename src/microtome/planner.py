"""What a result will be, known before a weight is read: widths, sizes, and whether a stock config can say it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from microtome import allocate, arch, budget, inner, layout, packing, surgery, wrapper
from microtome.allocate import Fractions
from microtome.budget import Sizes
from microtome.data import Tokens
from microtome.edit import Plan
from microtome.errors import BadInput, BadPlan
from microtome.inner import Dial
from microtome.layout import EMBEDDING, HEAD, Part
from microtome.loading import auto_class, dtype_of
from microtome.modeling_microtome import MicrotomeConfig
from microtome.packing import Packing
from microtome.source import Source
from microtome.surgery import Gauge, Tensors
from microtome.wrapper import Wrapper


@dataclass(frozen=True, eq=False)
class Opened:
    """A source, its table, its canonical config, and the config.json of the decoder, which a wrapper has inside."""

    source: Source
    table: arch.Architecture
    config: MicrotomeConfig
    fields: Mapping[str, Any]
    wrapper: Wrapper | None = None
    spelling: Mapping[str, str] = field(default_factory=dict[str, str])  # the table's names that differ here

    def stored(self, name: str) -> str:
        """How this checkpoint spells a name of the table."""
        return self.spelling.get(name, name)

    def read(self, part: Part, dtype: torch.dtype | None = None, *, check: bool = True) -> Tensors:
        """The canonical tensors of one part, checked for values that are not finite; in `dtype` if given."""
        wanted = arch.stored_names(self.table, self.config, part)
        stored: dict[str, Tensor] = {}
        for place in wanted.values():
            if place.name not in stored:
                stored[place.name] = self.source.tensor(self.stored(place.name))
                if check:
                    self.source.check_finite(self.stored(place.name), stored[place.name])
        tensors = arch.lower_tensors(stored, wanted)
        if dtype is None:
            return tensors
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, file headers not counted."""
        return sum(stored.nbytes for stored in self.source.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type that the embedding is stored in, or that the config names where no weights are at hand."""
        if not self.source.tensors:
            named = self.source.config.get("dtype") or self.source.config.get("torch_dtype")
            return dtype_of(str(named) if named else None) or torch.float32
        return self.source.dtype(self.stored(arch.stored_names(self.table, self.config, "stem")[EMBEDDING].name))


def opened(source: Source) -> Opened:
    """Recognise the architecture by its config, and hold the checkpoint's tensors against its table."""
    found = unchecked(source)
    if not source.tensors:  # a hub model whose weights were not downloaded
        return found
    config, table, names = found.config, found.table, source.names()
    if found.wrapper is None:
        found = replace(found, spelling=arch.spelled(names, config, table))
    arch.check_names(names if found.wrapper is None else wrapper.decoders_own(found.wrapper, names), config, table)
    places = table.names(config)  # of all blocks, so asked for once
    for part in layout.parts(config):
        shapes = layout.shapes(config, part)
        wanted = {name: places[name] for name in shapes}
        for name, shape in shapes.items():
            place = wanted[name]
            have = source.shape(found.stored(place.name))
            rows = sum(len(other.rows or ()) for other in wanted.values() if other.name == place.name)
            whole = shape if place.rows is None else (rows, *shape[1:])
            said = whole[::-1] if place.transposed else whole
            if have != said:
                raise BadInput(
                    f"{found.stored(place.name)} has shape {list(have)}, and config.json says {list(said)}: "
                    "they are not of one model."
                )
    return found


def unchecked(source: Source) -> Opened:
    """A source, recognised by its config and, inside a wrapper, by the place of the decoder among its tensors."""
    fields = arch.decoder_fields(source.config)
    table, config = arch.find(str(fields["model_type"])), arch.lower(fields)
    if fields["model_type"] == source.config["model_type"]:
        return Opened(source, table, config, fields)
    around = wrapper.wrapped(source.config, source.names(), table, config)
    names = [around.spelling[table.names(config)[one].name] for one in (EMBEDDING, HEAD)]
    both = config.tie_word_embeddings and all(name in source for name in names)
    if both and wrapper.differs(*(source.tensor(name) for name in names)):
        fields = {**fields, "tie_word_embeddings": False}
        config = arch.lower(fields)
    return Opened(source, table, config, fields, around, around.spelling)


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
    whole: dict[str, Any] | None = None  # the config.json of the wrapper, if the source is in one and it is kept
    alone: str | None = None  # else the reason
    inner: dict[str, int] = field(default_factory=dict[str, int])  # widths inside blocks, by dial
    weights: bool = False  # whether single weights change, and no width
    packing: Packing | None = None  # how quantised weights are stored, unless as plain numbers
    unpacked: str | None = None  # why they are plain numbers, where nobody asked for that

    @property
    def changed(self) -> bool:
        """Whether anything is cut, or given other values."""
        return bool(self.widths or self.inner or self.weights)

    @property
    def table(self) -> arch.Architecture:
        """The table of what is written."""
        return arch.find(arch.OWN if self.stock is None else str(self.stock["model_type"]))

    @property
    def named(self) -> dict[str, int]:
        """Every width that was chosen, under the name that a plan has for it."""
        names = recorded_names(self.method, self.widths)
        return {names[number]: wide for number, wide in self.widths.items()} | self.inner


def untouched(fields: Mapping[str, Any], config: MicrotomeConfig, method: Any) -> Outcome:
    """The source as it is; a checkpoint of our own is no stock one for that."""
    own = fields["model_type"] == arch.OWN
    stock, why_not = (None, "it was made from a Microtome checkpoint") if own else (dict(fields), None)
    return Outcome(method, {}, None, config, config, config, stock, why_not)


def outcome(fields: Mapping[str, Any], config: MicrotomeConfig, method: Any, widths: Mapping[int, int]) -> Outcome:
    """The configs of a result with these widths; without widths it is the source."""
    if not widths:
        return untouched(fields, config, method)
    if not layout.is_shared(config):
        raise BadPlan(
            "each half of this decoder reads and writes coordinates of the stream of its own, which a new basis would "
            "mix: slice the stream first, or cut what lies inside the blocks."
        )
    formed = surgery.formed_config(config, method.form(config))
    gauge = method.join(config, min(widths.values()))
    cut = surgery.resized_config(formed, widths, gauge)
    standard = surgery.standard_config(cut, config.norm_offset, implied_scale(fields, cut)) if layout.even(cut) else cut
    try:
        stock = arch.raise_config(fields, standard)
    except arch.NotStock as reason:
        return Outcome(method, dict(widths), gauge, formed, cut, cut, None, str(reason))
    return Outcome(method, dict(widths), gauge, formed, cut, standard, stock, None)


def rewrapped(found: Opened, out: Outcome) -> Outcome:
    """The outcome with the wrapper that the source is in, or with the reason why the decoder is written alone."""
    around = found.wrapper
    if around is None:
        return out
    if not out.changed:
        return replace(out, whole=dict(around.fields))
    if out.stock is None:
        return replace(out, alone=f"a config of {around.model_type} holds a stock decoder only")
    turned, size = bool(out.widths), found.config.hidden_size
    centred = turned and (out.formed.norm != found.config.norm or out.method.form(found.config).centre_always)
    whole = wrapper.rewrap(around, out.stock, out.final, size, turned=turned, centred=centred)
    return replace(out, alone=whole) if isinstance(whole, str) else replace(out, whole=whole)


def sizes_after(found: Opened, out: Outcome, dtype: torch.dtype | None) -> Sizes:
    """Sizes of the result; its bytes with what a wrapper carries beside the decoder."""
    itemsize, source = (dtype or found.dtype).itemsize, found.source
    sizes = budget.sizes(out.final, itemsize=itemsize)
    if out.packing is not None:
        sizes = replace(sizes, nbytes=(sizes.nbytes or 0) - out.packing.saved(itemsize))
    if found.wrapper is None or out.whole is None:
        return sizes
    turned = set(found.wrapper.writers()) if out.widths else set[str]()
    kept = sum(
        prod(source.shape(name)) * source.dtype(name).itemsize for name in found.wrapper.carried if name not in turned
    )
    columns = sum(prod(source.shape(name)) for name in turned) // found.config.hidden_size
    return replace(sizes, nbytes=(sizes.nbytes or 0) + kept + columns * out.final.hidden_size * itemsize)


def loaded_by(out: Outcome) -> str:
    """The name of the auto class that loads the result."""
    return "AutoModelForCausalLM" if out.whole is None else str(auto_class(arch.stock_config(out.whole)).__name__)


def notes(found: Opened, out: Outcome) -> tuple[str, ...]:
    """What a user should know of a source that is not a plain decoder."""
    said: list[str] = []
    if (quantised := found.source.quantised) is not None:
        to = str(quantised.dtype).removeprefix("torch.")
        said.append(f"the source was dequantised from {quantised.method} to {to}; its bytes are the quantised ones.")
    if out.packing is not None:
        said.append(out.packing.note)
    if out.unpacked is not None:
        said.append(f"quantised weights are stored as plain numbers, no smaller than before: {out.unpacked}.")
    kind = "" if found.wrapper is None else found.wrapper.model_type
    if kind and out.whole is None:
        why = out.alone or "only one step at a time goes back into a wrapper"
        said.append(f"the result is the text decoder of this {kind}, without the rest: {why}.")
    elif kind:
        said.append(f"the result is a whole {kind}; parameters and FLOPs count its text decoder, bytes all of it.")
    return tuple(said)


def implied_scale(fields: Mapping[str, Any], cut: MicrotomeConfig) -> float | None:
    """The embedding scale that the architecture's config implies by its width, if it does."""
    implied = getattr(arch.find(str(fields["model_type"])), "embedding_scale", None)
    return None if implied is None else implied(cut.hidden_size)


def inner_outcome(found: Opened, method: Any, widths: Mapping[str, int]) -> Outcome:
    """The configs of a result with these inner widths; without any it is the source."""
    fields, config = found.fields, found.config
    if not widths:
        return untouched(fields, config, method)
    if len(inner.dropped(widths)) == config.num_hidden_layers:
        raise BadPlan(f"no block is left of {config.num_hidden_layers}: keep more.")
    final = inner.narrowed_config(config, widths, biased=bool(method.biased))
    try:
        stock, why_not = arch.raise_config(fields, final), None
    except arch.NotStock as reason:
        stock, why_not = None, str(reason)
    return Outcome(method, {}, None, config, final, final, stock, why_not, inner=dict(widths))


def weights_outcome(found: Opened, method: Any) -> Outcome:
    """The outcome of a method that changes single weights: the configs of the source."""
    whole = untouched(found.fields, found.config, method)
    if method.idle:
        return whole
    packed, reason = packing.chosen(method, whole.table, whole.final, wrapped=found.wrapper is not None)
    return replace(whole, weights=True, packing=packed, unpacked=reason)


def imagined(found: Opened, out: Outcome) -> Opened:
    """What a result would be opened as, known by its config alone."""
    fields = out.stock if out.stock is not None else {"model_type": arch.OWN}
    return replace(found, config=out.final, fields=fields, wrapper=None, spelling={})


def same(found: Opened, why_not: str | None) -> Outcome:
    """The outcome of a step that changes numbers and no shape; `why_not` is why the model is not stock."""
    fields, config = found.fields, found.config
    stock = None if fields["model_type"] == arch.OWN else dict(fields)
    return Outcome(None, {}, None, config, config, config, stock, None if stock else why_not)


def plan_widths(
    found: Opened,
    method: Any,
    keep: float | None,
    slice_: float | None,
    multiple: int | None,
    whole: int | None = None,
) -> Outcome:
    """Solve the dial for widths. `keep` 1 leaves the model as it is; `slice` 0 rotates it at full width.

    `whole` is what `keep` is a fraction of, by default the blocks as they are.
    """
    budget.check_dials(keep, slice_)
    fields, config = found.fields, found.config
    if keep == 1.0:
        return outcome(fields, config, method, {})
    method.check(config)
    size, last = config.hidden_size, 2 * config.num_hidden_layers
    full = method.whole_head(by_slice=slice_ is not None)

    def widths(wide: int) -> dict[int, int]:
        return {number: size if full and number == last else wide for number in layout.junctions(config)}

    def count(wide: int) -> int:
        return layout.count_blocks(outcome(fields, config, method, widths(wide)).final)

    if slice_ is not None:
        return outcome(fields, config, method, widths(budget.sliced_width(size, slice_, multiple)))
    assert keep is not None
    wide = budget.nearest_width(size, keep, multiple, count, whole or layout.count_blocks(config))
    return outcome(fields, config, method, widths(wide))


def plan_uneven(  # noqa: PLR0913, PLR0917
    found: Opened,
    method: Any,
    keep: float | None,
    slice_: float | None,
    multiple: int | None,
    whole: int,
    shares: Callable[[Mapping[str, Dial]], Fractions],
) -> Outcome:
    """Widths of the stream that differ from block to block: `shares` says how a budget is spent over them.

    Under `slice` their mean over blocks is what the paper of dynamic slicing asks for, and each is rounded down to a
    multiple of 8; under `keep` the parameters are counted.
    """
    budget.check_dials(keep, slice_)
    fields, config = found.fields, found.config
    method.check(config)
    size, blocks = config.hidden_size, config.num_hidden_layers
    step = multiple or (budget.PAPER_MULTIPLE if slice_ is not None else budget.friendly(size))
    dials = {f"stream.{block}": Dial(f"stream.{block}", block, "stream", size, step, step) for block in range(blocks)}
    full = method.whole_head(by_slice=slice_ is not None)
    fractions = shares(dials)

    def made(wides: Mapping[str, int]) -> Outcome:
        last = size if full else wides[f"stream.{blocks - 1}"]
        names = {number: f"stream.{min(number // 2, blocks - 1)}" for number in layout.junctions(config)}
        return outcome(
            fields, config, method, {n: last if n == 2 * blocks else wides[name] for n, name in names.items()}
        )

    if keep is not None:
        return made(
            allocate.solve(dials, fractions, lambda wides: layout.count_blocks(made(wides).final), keep * whole)
        )
    assert slice_ is not None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(fractions(middle).values()) / blocks < 1.0 - slice_ else (low, middle)
    wanted = fractions(high)
    return made({name: max(step, int(wanted[name] * size + 1e-9) // step * step) for name in dials})


def replayed_widths(found: Opened, name: str, method: Any, recorded: Mapping[str, int]) -> Outcome:
    """The outcome that a plan records for the stream, width by width.

    Raises BadPlan where it names other spaces than the method cuts.
    """
    config = found.config
    if not recorded:
        return outcome(found.fields, config, method, {})
    method.check(config)
    names = recorded_names(method, layout.junctions(config))
    if set(recorded) != set(names.values()):
        odd = sorted(set(recorded) ^ set(names.values()))
        raise BadPlan(f"plan.json does not fit {name} on {found.source.name}: missing or unknown spaces {odd}.")
    widths = {number: recorded[space] for number, space in names.items()}
    if not all(1 <= wide <= config.hidden_size for wide in widths.values()):
        raise BadPlan(f"plan.json has widths outside 1 to {config.hidden_size}: {sorted(set(widths.values()))}.")
    return outcome(found.fields, config, method, widths)


def check_source(found: Opened, plan: Plan) -> None:
    """Raise BadPlan where a plan is of another model."""
    if plan.source.get("digest") != found.source.digest():
        raise BadPlan(f"plan.json was made for other weights than {found.source.name}: {plan.source.get('name')}.")


def recorded_names(method: Any, numbers: Iterable[int]) -> dict[int, str]:
    """What a plan calls the junctions: all the same where one basis serves them."""
    return {number: f"residual.{number}" if method.split else "residual" for number in numbers}


def plan_of(found: Opened, steps: Sequence[Mapping[str, Any]], tokens: Tokens | None) -> Plan:
    """What is done, as `plan.json` keeps it: the first step in its own fields, the others behind it."""
    calibration = {} if tokens is None else {
        "source": tokens.source, "sha256": tokens.sha256, "windows": tokens.ids.shape[0], "length": tokens.ids.shape[1],
    }  # fmt: skip
    return Plan(
        **steps[0],
        then=[dict(step) for step in steps[1:]],
        source={
            "name": found.source.name,
            "revision": found.source.revision,
            "digest": found.source.digest(),
            "dtype": str(found.dtype)[6:],
        },
        calibration=calibration,
    )
