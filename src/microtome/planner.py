"""What a result will be, known before a weight is read: widths, sizes, and whether a stock config can say it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from microtome import arch, budget, layout, methods, surgery
from microtome.data import Tokens
from microtome.edit import Plan
from microtome.errors import BadInput, BadPlan
from microtome.layout import EMBEDDING, Part
from microtome.loading import dtype_of
from microtome.modeling_microtome import MicrotomeConfig
from microtome.source import Source
from microtome.space import Kind
from microtome.surgery import Gauge, Tensors


@dataclass(frozen=True, eq=False)
class Opened:
    """A source, its table and its canonical config."""

    source: Source
    table: arch.Architecture
    config: MicrotomeConfig
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
        return tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, file headers not counted."""
        return sum(prod(self.source.shape(name)) * self.source.dtype(name).itemsize for name in self.source.names())

    @property
    def dtype(self) -> torch.dtype:
        """The type that the embedding is stored in, or that the config names where no weights are at hand."""
        if not self.source.tensors:
            named = self.source.config.get("dtype") or self.source.config.get("torch_dtype")
            return dtype_of(str(named) if named else None) or torch.float32
        return self.source.dtype(self.stored(arch.stored_names(self.table, self.config, "stem")[EMBEDDING].name))


def opened(source: Source) -> Opened:
    """Recognise the architecture by its config, and hold the checkpoint's tensors against its table."""
    config = arch.lower(source.config)
    table = arch.find(str(source.config["model_type"]))
    found = Opened(source, table, config)
    if not source.tensors:  # a hub model whose weights were not downloaded
        return found
    arch.check_names(source.names(), config, table)
    found = Opened(source, table, config, arch.spelled(source.names(), config, table))
    for part in layout.parts(config):
        wanted = arch.stored_names(table, config, part)
        for name, shape in layout.shapes(config, part).items():
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


def outcome(fields: Mapping[str, Any], config: MicrotomeConfig, method: Any, widths: Mapping[int, int]) -> Outcome:
    """The configs of a result with these widths; without widths it is the source."""
    if not widths:
        return Outcome(method, {}, None, config, config, config, dict(fields), None)
    formed = surgery.formed_config(config, method.form(config))
    gauge = method.join(config, min(widths.values()))
    cut = surgery.resized_config(formed, widths, gauge)
    standard = surgery.standard_config(cut, config.norm_offset, implied_scale(fields, cut)) if layout.even(cut) else cut
    try:
        stock = arch.raise_config(fields, standard)
    except arch.NotStock as reason:
        return Outcome(method, dict(widths), gauge, formed, cut, cut, None, str(reason))
    return Outcome(method, dict(widths), gauge, formed, cut, standard, stock, None)


def implied_scale(fields: Mapping[str, Any], cut: MicrotomeConfig) -> float | None:
    """The embedding scale that the architecture's config implies by its width, if it does."""
    implied = getattr(arch.find(str(fields["model_type"])), "embedding_scale", None)
    return None if implied is None else implied(cut.hidden_size)


def plan_widths(found: Opened, method: Any, keep: float | None, slice_: float | None, multiple: int | None) -> Outcome:
    """Solve the dial for widths. `keep` 1 leaves the model as it is; `slice` 0 rotates it at full width."""
    if Kind.RESIDUAL not in method.targets:
        raise BadInput(
            f"{type(method).__name__} does not cut the residual stream, the only space that can be cut so far."
        )
    budget.check_dials(keep, slice_)
    fields, config = found.source.config, found.config
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
    wide = budget.nearest_width(size, keep, multiple, count, layout.count_blocks(config))
    return outcome(fields, config, method, widths(wide))


def replayed(found: Opened, plan: Plan) -> tuple[Any, Outcome]:
    """The method and the outcome that a plan records, width by width.

    Raises BadPlan where the plan is of another model, or names other spaces than the method cuts.
    """
    method, config = methods.build(plan.method, plan.options), found.config
    if plan.source.get("digest") != found.source.digest():
        raise BadPlan(f"plan.json was made for other weights than {found.source.name}: {plan.source.get('name')}.")
    if not plan.widths:
        return method, outcome(found.source.config, config, method, {})
    method.check(config)
    names = recorded_names(method, layout.junctions(config))
    if set(plan.widths) != set(names.values()):
        odd = sorted(set(plan.widths) ^ set(names.values()))
        raise BadPlan(f"plan.json does not fit {plan.method} on {found.source.name}: missing or unknown spaces {odd}.")
    widths = {number: plan.widths[name] for number, name in names.items()}
    if not all(1 <= wide <= config.hidden_size for wide in widths.values()):
        raise BadPlan(f"plan.json has widths outside 1 to {config.hidden_size}: {sorted(set(widths.values()))}.")
    return method, outcome(found.source.config, config, method, widths)


def recorded_names(method: Any, numbers: Iterable[int]) -> dict[int, str]:
    """What a plan calls the junctions: all the same where one basis serves them."""
    return {number: f"residual.{number}" if method.split else "residual" for number in numbers}


def plan_of(
    found: Opened, out: Outcome, keep: float | None, slice_: float | None, name: str, tokens: Tokens | None
) -> Plan:
    """What is done, as `plan.json` keeps it."""
    names = recorded_names(out.method, out.widths)
    calibration = {} if tokens is None else {
        "source": tokens.source, "sha256": tokens.sha256, "windows": tokens.ids.shape[0], "length": tokens.ids.shape[1],
    }  # fmt: skip
    return Plan(
        method=name,
        options=asdict(out.method),
        keep=keep,
        slice=slice_,
        widths={names[number]: wide for number, wide in out.widths.items()},
        source={
            "name": found.source.name,
            "revision": found.source.revision,
            "digest": found.source.digest(),
            "dtype": str(found.dtype)[6:],
        },
        calibration=calibration,
    )
