"""One pass over a model: what a step of a recipe asks for, the widths that this comes to, and carrying it out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from microtome import allocate, budget, cut, inner, layout, methods, narrow, planner, probe, report
from microtome.allocate import Fractions, Widths
from microtome.calibrate import Progress
from microtome.checkpoint import Writer
from microtome.cut import Work
from microtome.errors import BadInput, BadPlan, UnknownName
from microtome.inner import Dial
from microtome.lineage import Made
from microtome.planner import Opened, Outcome
from microtome.space import Kind
from microtome.stats import Stat
from microtome.survey import Statistics
from microtome.target import ANY, Target


@dataclass(frozen=True)
class Measure:
    """What can be measured of the model at hand: sums, by a survey if need be, and what a narrower width costs."""

    sums: Callable[[frozenset[Stat]], Statistics]
    ids: Tensor | None = None
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    progress: Progress | None = None
    probed: dict[str, Fractions] = field(default_factory=dict[str, Fractions])  # what `auto` has found, by method

    def __call__(self, wanted: frozenset[Stat]) -> Statistics:
        """The sums that are wanted, and maybe others."""
        return self.sums(wanted)


@dataclass(frozen=True)
class Allocation:
    """How a budget is spent over the blocks; see `allocate`."""

    name: str = "uniform"
    temperature: float = 0.1  # of influence
    base: float = 1 / 3  # of redundancy: the share of the mean slice that every block loses at least
    table: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.name not in (*allocate.ALLOCATORS, "table"):
            raise UnknownName("allocation", self.name, allocate.ALLOCATORS)

    @classmethod
    def parsed(cls, text: object) -> "Allocation":
        """From "influence", "influence,temperature=0.05", or a table of widths.

        Raises UnknownName or BadInput in one line.
        """
        if isinstance(text, Mapping):
            return cls("table", table={str(key): one for key, one in cast("Mapping[Any, Any]", text).items()})
        if not isinstance(text, str):
            raise BadInput(f"an allocation is a name or a table of widths, not {text!r}.")
        name, *pairs = text.split(",")
        values: dict[str, Any] = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in ("temperature", "base"):
                raise UnknownName(f"setting of the allocation {name}", key, ("temperature", "base"))
            try:
                values[key] = float(value)
            except ValueError as error:
                raise BadInput(f"{key} of the allocation {name} is a number, not {value!r}.") from error
        if name not in allocate.ALLOCATORS:
            raise UnknownName("allocation", name, allocate.ALLOCATORS)
        return cls(name, **values)

    @property
    def is_table(self) -> bool:
        """Whether the widths are given, so that there is no budget to spend."""
        return self.name == "table"


def check_dials(
    name: str, keep: float | None, slice_: float | None, spends: Allocation | None, multiple: int | None = None
) -> None:
    """Refuse both dials, neither, and values outside their range; a table of widths needs none."""
    if methods.dial_of(name) is not None:
        methods.check_dials(name, keep, slice_, allocate=spends, multiple_of=multiple)
    elif spends is None or not spends.is_table:
        budget.check_dials(keep, slice_)
    elif keep is not None or slice_ is not None:
        raise BadInput("a table of widths leaves no budget to spend: give no --keep or --slice beside it.")


@dataclass(frozen=True)
class Step:
    """What one pass is asked for. `keep` is the fraction of the original's blocks that is left after it."""

    name: str
    method: Any
    keep: float | None = None
    slice: float | None = None
    multiple: int | None = None
    target: Target = ANY
    allocation: Allocation | None = None  # None: what the method's paper does
    widths: Mapping[str, int] | None = None  # of a plan that is replayed
    shared: bool = False  # whether `keep` is that of several steps together, to be split before any is carried out

    @property
    def is_inner(self) -> bool:
        """Whether it cuts spaces inside the blocks, not the residual stream."""
        return Kind.RESIDUAL not in self.method.targets

    @property
    def spends(self) -> Allocation:
        """The allocation in force."""
        return self.allocation or Allocation(getattr(self.method, "allocation", "uniform"))

    @property
    def is_weights(self) -> bool:
        """Whether it changes single weights, and no width."""
        return Kind.WEIGHTS in self.method.targets

    @property
    def drops_blocks(self) -> bool:
        """Whether it leaves out whole blocks or halves, and changes no matrix that stays."""
        return self.method.targets <= {Kind.BLOCKS, Kind.HALVES}

    @property
    def is_coded(self) -> bool:
        """Whether it puts weights in codes, which no later step may change."""
        return getattr(self.method, "coding", None) is not None

    def needs(self) -> frozenset[Stat]:
        """What must be measured on the uncut model before the widths are known."""
        if self.keep == 1.0 or self.widths is not None:
            return frozenset()
        by_influence = self.spends.name in ("influence", "redundancy", "auto")  # auto asks for tokens, whatever else
        first = frozenset({Stat.INFLUENCE}) if by_influence else frozenset[Stat]()
        return first | (
            self.method.needs if self.is_inner and self.spends.name in ("global", "auto") else frozenset[Stat]()
        )


def settled(found: Opened, step: Step, whole: int, measure: Measure) -> Outcome:
    """The widths of a step and everything that follows from them.

    `whole` is the number of parameters that `keep` refers to. Raises BadPlan where the budget cannot be met.
    """
    if step.is_weights:
        step.method.check(found.config)
        return planner.weights_outcome(found, step.method)
    if step.widths is not None:
        return replayed(found, step)
    if not step.is_inner:
        return settled_stream(found, step, whole, measure)
    if step.slice is not None:
        raise BadInput(
            f"--slice is the dial of the residual stream, and {step.name} cuts inside the blocks: use --keep."
        )
    if step.keep == 1.0:
        return planner.inner_outcome(found, step.method, {})
    step.method.check(found.config)
    dials = dials_of(found, step)
    biased = bool(step.method.biased)
    config = found.config

    def count(widths: Widths) -> int:
        return layout.count_blocks(inner.narrowed_config(config, widths, biased=biased))

    if step.spends.is_table:
        named = unbound(found, step) | dials  # a rule that a table breaks is told by its name
        return planner.inner_outcome(found, step.method, allocate.table(named, step.spends.table))
    assert step.keep is not None
    fractions = fractions_of(found, step, dials, measure)
    whole_units = all(dial.size == 1 for dial in dials.values())  # strictly by rank: none comes back before another
    widths = allocate.solve(
        dials, fractions, count, step.keep * whole, even=step.spends.name == "uniform" or whole_units
    )
    return planner.inner_outcome(found, step.method, widths)


def unbound(found: Opened, step: Step) -> dict[str, Dial]:
    """Every width that the step's method can choose, whatever its target."""
    spared = getattr(step.method, "spared", None)  # a method may leave some blocks whole
    whole = frozenset[int]() if spared is None else spared(found.config)
    finest = step.multiple or getattr(step.method, "multiple", None)
    dials = inner.dials(found.config, inner.kinds_of(step.method, found.config), finest)
    dials = {name: dial for name, dial in dials.items() if dial.block not in whole}
    if not dials:
        raise BadPlan(f"{step.name} finds nothing to cut in this {found.config.source_model_type}.")
    return dials


def dials_of(found: Opened, step: Step) -> dict[str, Dial]:
    """The same, in steps that its target can run."""
    dials, blocks = unbound(found, step), range(found.config.num_hidden_layers)
    spared = {dial.block for dial in dials.values()} != set(blocks)
    rates = {step.method.rates.get(kind, 1.0) for kind in (Kind.QK, Kind.VO)}
    alike = step.spends.name == "uniform" and len(rates) == 1 and not spared
    fitted = step.target.dials(found.config, dials, asked=step.multiple is not None, alike=alike)
    if not fitted and not step.spends.is_table:
        raise BadPlan(
            f"{step.name} cuts {listed(dials)} here, and --target {step.target} leaves none of these to be cut: choose "
            "a method or spaces with neurons or key-value groups in it, whole blocks (depth), or a smaller multiple."
        )
    return fitted


def listed(dials: Mapping[str, Dial]) -> str:
    """The kinds of widths, in words."""
    others = {"block": "blocks", "attn": "halves of blocks", "mlp": "halves of blocks"}
    return " and ".join(dict.fromkeys((report.INNER | others).get(dial.kind, dial.kind) for dial in dials.values()))


def aimed(found: Opened, step: Step, whole: int) -> float:
    """How many numbers the blocks are to store behind a step, for what is learned before its widths are known.

    Raises BadPlan where the narrowest widths store more.
    """
    dials = dials_of(found, step)
    given = allocate.table(dials, step.spends.table) if step.spends.is_table else step.widths
    if step.keep is None and given is not None:
        return layout.count_blocks(inner.narrowed_config(found.config, given, biased=bool(step.method.biased)))
    assert step.keep is not None
    least = {name: dial.least for name, dial in dials.items()}
    lowest = inner.narrowed_config(found.config, least, biased=bool(step.method.biased))
    allocate.check_reach(layout.count_blocks(lowest), step.keep * whole)
    return step.keep * whole


def fractions_of(found: Opened, step: Step, dials: Mapping[str, Dial], measure: Measure) -> Fractions:
    """How the step's allocation spends a budget on a model's widths."""
    spends, rates = step.spends, {inner.NAMES[kind]: rate for kind, rate in step.method.rates.items()}
    if spends.name != "global" and all(dial.size == 1 for dial in dials.values()):
        raise BadInput(
            f"the allocation {spends.name} gives every width a share, and {step.name} can only drop what it cuts "
            "whole: give --allocate global, or a table of widths."
        )
    if spends.name == "uniform":
        return allocate.uniform(dials, rates)
    blocks = found.config.num_hidden_layers
    if spends.name in ("influence", "redundancy"):
        scores = measure(frozenset({Stat.INFLUENCE})).influences(blocks)
        if spends.name == "influence":
            return allocate.influence(dials, scores, spends.temperature, rates)
        return allocate.redundancy(dials, scores, spends.base, rates)
    if spends.name == "global":
        return allocate.by_score(dials, scores_of(found, step, measure))
    return by_measurement(found, step, dials, measure)


def by_measurement(found: Opened, step: Step, dials: Mapping[str, Dial], measure: Measure) -> Fractions:
    """Spend the cut where it costs least: what each width costs is measured, and follows the scores from there."""
    assert measure.ids is not None
    scores = scores_of(found, step, measure)  # before the probe: it asks for all sums
    name = f"{step.method!r}, multiples of {step.multiple}"
    if name in measure.probed:
        return measure.probed[name]
    biased = bool(step.method.biased)
    measured = probe.losses(
        found,
        narrow.learned(found, step.method, torch.float64, {}),
        dials,
        measure(step.method.needs),
        measure.ids,
        biased=biased,
        device=measure.device or torch.device("cpu"),
        dtype=measure.dtype,
        progress=measure.progress,
    )
    costs = probe.costs(found, dials, biased=biased)
    measure.probed[name] = allocate.by_loss(dials, probe.curves(measured, scores), costs)
    return measure.probed[name]


def scores_of(found: Opened, step: Step, measure: Measure) -> dict[str, list[float]]:
    """The method's scores of every unit of every width, from the uncut model."""
    statistics = measure(step.method.needs)
    method = narrow.learned(found, step.method, torch.float64, {})
    scores: dict[str, list[float]] = {}
    for block in range(found.config.num_hidden_layers):
        view = narrow.view_of(
            found, method, block, found.read(block, torch.float64), ("attn", "mlp"), statistics, statistics.gradients
        )
        scores |= {name: [float(one) for one in values] for name, values in method.scores(view).items()}
    return scores


def settled_stream(found: Opened, step: Step, whole: int, measure: Measure) -> Outcome:
    """The widths of the residual stream: one for all junctions, or by the redundancy of the blocks."""
    if step.keep == 1.0:
        return planner.outcome(found.fields, found.config, step.method, {})
    step.target.check_stream(step.name, split=step.method.split)
    size = found.config.hidden_size
    wished = budget.PAPER_MULTIPLE if step.slice is not None else budget.friendly(size)
    multiple = step.target.stream_step(size, step.multiple, wished)
    if step.spends.name == "uniform":
        return planner.plan_widths(found, step.method, step.keep, step.slice, multiple, whole)
    if step.spends.name not in ("redundancy", "influence") or not step.method.split:
        raise BadInput(
            f"the allocation {step.spends.name} gives the stream several widths: that needs -o basis=junction, and "
            "redundancy or influence."
        )
    scores = measure(frozenset({Stat.INFLUENCE})).influences(found.config.num_hidden_layers)
    return planner.plan_uneven(
        found, step.method, step.keep, step.slice, multiple, whole, partial(shares, step.spends, scores)
    )


def shares(spends: Allocation, scores: list[float], dials: Mapping[str, Dial]) -> Fractions:
    """The fractions of the junctions' widths, by block."""
    if spends.name == "influence":
        return allocate.influence(dials, scores, spends.temperature)
    return allocate.redundancy(dials, scores, spends.base)


def replayed(found: Opened, step: Step) -> Outcome:
    """The outcome that a plan records, width by width; raises BadPlan where its spaces are not the method's."""
    assert step.widths is not None
    if not step.is_inner or not step.widths:
        return planner.replayed_widths(found, step.name, step.method, step.widths)
    step.method.check(found.config)
    dials = inner.dials(found.config, inner.kinds_of(step.method, found.config), 1)
    if odd := sorted(set(step.widths) - set(dials)):
        raise BadPlan(f"plan.json does not fit {step.name} on {found.source.name}: unknown spaces {odd[:4]}.")
    if wrong := sorted(name for name, wide in step.widths.items() if not dials[name].least <= wide <= dials[name].size):
        raise BadPlan(f"plan.json has a width outside 1 to {dials[wrong[0]].size}: {wrong[0]}.")
    return planner.inner_outcome(found, step.method, dict(step.widths))


def carried_out(work: Work, step: Step, writer: Writer, dtype: torch.dtype | None, measure: Measure) -> Made:
    """Cut a model as settled and write it."""
    out = work.outcome
    if not out.changed:
        cut.copy_untouched(work.opened, writer, dtype, whole=out.whole is not None)
        return Made(work.opened.config)
    if not step.is_inner:
        return cut.cut(work, writer, dtype)
    statistics = measure(
        step.method.needs & {Stat.GRADIENT, Stat.FISHER} if step.method.sequential else step.method.needs
    )
    work.gradients = statistics.gradients
    return narrow.narrow(work, writer, statistics, dtype)


def stepped(name: str, options: Mapping[str, Any], **asked: Any) -> Step:
    """A step by the name of its method."""
    return Step(name, methods.build(name, options), **asked)


def recorded(step: Step, out: Outcome) -> dict[str, Any]:
    """A step as a plan keeps it."""
    return {
        "method": step.name,
        "options": asdict(step.method),
        "keep": step.keep,
        "slice": step.slice,
        "widths": out.named,
        "allocation": asdict(step.spends) if out.changed and not out.weights else None,
    }
