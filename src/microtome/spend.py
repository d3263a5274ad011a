"""One budget for all steps of a recipe: what each costs alone is measured, and the budget goes where it costs least.

Steps cut different spaces (the residual stream, what lies inside the blocks, whole blocks). Each is carried out alone
at several sizes, restored if the recipe restores, and the divergence of the model's predictions from the uncut model's
is measured on a few windows. Sizes multiply and divergences add up, to first order: that orders the splits of the
budget, and the best few, each over other steps, are carried out and measured as they are. The last step takes up what
the others leave, so it should be the one with the finest widths; it gets all of the budget unless a split is clearly
better. It is measured first: what costs as much as it does with all of the budget is followed no further.
"""

import itertools
import math
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from microtome import allocate, chain, layout, probe
from microtome.chain import Run
from microtome.checkpoint import Writer
from microtome.errors import BadInput, BadPlan
from microtome.order import AnyStep
from microtome.passes import Step
from microtome.planner import opened
from microtome.restore import Restore
from microtome.source import open_source

SHARES = (0.2, 0.4, 0.7, 1.0)  # of the budget, in logs, that each step is measured with
FINALISTS = 3  # splits that are measured as a whole
FITTED = (16384, 65536)  # tokens, at least and at most, that steps are cut and restored by before they are measured
EACH = 16  # of them for every neuron of a block: enough to tell splits apart
SLACK = 0.01  # by which the steps before the last may miss the budget without another step


@dataclass(frozen=True)
class Point:
    """A step alone: the fraction of the blocks that it leaves, and the divergence in nats per token."""

    keep: float
    loss: float


def is_shared(steps: Sequence[AnyStep]) -> bool:
    """Whether the steps have one budget that must be split first."""
    return any(isinstance(step, Step) and step.shared for step in steps)


def split(run: Run, steps: Sequence[AnyStep]) -> list[AnyStep]:
    """The steps with a size for each; those that the budget is not spent on are left out, and `run.notes` tells.

    Raises BadInput without calibration text, and BadPlan where no split reaches the budget.
    """
    mine = [step for step in steps if isinstance(step, Step) and step.shared]
    if len(mine) < 2:
        return [replace(step, shared=False) if isinstance(step, Step) else step for step in steps]
    if run.ids is None:
        raise BadInput("one budget for several steps is split by what is measured: give --data.")
    restores = any(isinstance(step, Restore) for step in steps)
    behind = [Restore(predictions=False)] if restores else []  # linear fits tell steps apart
    found = partial(shares_of, run, mine, run.ids, behind)
    shares = found() if run.kept is None else run.kept.value(("split", mine, behind), found)
    run.notes.append("one budget: " + ", ".join(said(step, share) for step, share in zip(mine, shares, strict=True)))
    return given(steps, shares)


def shares_of(run: Run, steps: Sequence[Step], ids: Tensor, behind: Sequence[AnyStep]) -> list[float]:
    """What every step keeps, by what it costs with other steps behind it."""
    (keep,) = {step.keep for step in steps}
    assert keep is not None
    with tempfile.TemporaryDirectory(prefix="microtome-", dir=run.scratch) as folder:
        fitted, unseen = apart(ids, run.dense.config.intermediate_size)
        beside = replace(
            run, ids=fitted, cache=run.cache or Path(folder) / "cache", progress=None, known={}, probed={}, kept=None
        )
        table, curves, most = Table(beside, unseen, behind), list[list[Point]](), math.inf
        for number, step in enumerate(reversed(steps)):
            curves.insert(0, table.measured(step, keep, most))
            if number == 0 and curves[0][-1].keep <= keep * (1.0 + SLACK) and len(curves[0]) > 1:
                most = curves[0][-1].loss  # what all of the budget costs there: a part that costs more is no use
            if run.progress is not None:
                run.progress("splitting the budget", (number + 1) / (len(steps) + 1))
        return table.best(steps, finalists(splits(curves, keep)))


def given(steps: Sequence[AnyStep], shares: Sequence[float]) -> list[AnyStep]:
    """The steps with their sizes; those that keep everything are left out."""
    left, found, sizes = 1.0, list[AnyStep](), iter(shares)
    for step in steps:
        if not isinstance(step, Step) or not step.shared:
            found.append(step)
            continue
        share = next(sizes)
        left *= share
        if share < 1.0:
            found.append(replace(step, keep=left, shared=False))
    return found


def said(step: Step, share: float) -> str:
    """What a step gets, in words."""
    return f"{step.name} keeps {share:.3f}" if share < 1.0 else f"{step.name} is not used"


def apart(ids: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """Windows to cut and restore by, and windows to measure on: the last ones, which nothing has been fitted to."""
    least, most = FITTED
    tokens = min(max(least, EACH * neurons), most)
    aside = min(max(1, probe.TOKENS // ids.shape[1]), len(ids) // 3)
    fitted, unseen = (ids[:-aside], ids[-aside:]) if aside else (ids, ids)
    return probe.spread(fitted, tokens), unseen


@dataclass(frozen=True, eq=False)
class Table:
    """What is measured: divergences on windows [N, T] that nothing was fitted to, with what comes behind every step."""

    run: Run
    ids: Tensor
    behind: Sequence[AnyStep]

    def measured(self, step: Step, keep: float, most: float = math.inf) -> list[Point]:
        """A step alone at several sizes down to the whole budget; none further than one that costs `most` or more.

        Sizes that it cannot come to are left out.
        """
        found: dict[float, Point] = {1.0: Point(1.0, 0.0)}
        for share in SHARES:
            alone: list[AnyStep] = [replace(step, keep=keep**share, shared=False)]
            try:
                first = chain.first_outcome(self.run, alone)
            except BadPlan:
                continue
            size = layout.count_blocks(first.final) / self.run.whole
            if first.changed and size not in found:
                found[size] = Point(size, float(self.moved(alone).mean()))
                if found[size].loss >= most:
                    break
        return sorted(found.values(), key=lambda point: -point.keep)

    def best(self, steps: Sequence[Step], shares: Sequence[list[float]]) -> list[float]:
        """Of some splits the one that diverges least as a whole; the first, unless others are clearly better.

        Clearly is by more than a standard error over the windows. Splits that cannot be carried out are passed over.
        """
        if len(shares) == 1:
            return shares[0]
        found = list[tuple[list[float], Tensor]]()
        for one in shares:
            with suppress(BadPlan):
                found.append((one, self.moved(given(steps, one))))
        if not found:
            return shares[0]
        (first, usual), *others = found
        better = [(one, far) for one, far in others if (usual - far).mean() > error(usual - far)]
        return min(better, key=lambda both: float(both[1].mean()))[0] if better else first

    @cached_property
    def want(self) -> Tensor:
        """The uncut model's predictions."""
        return probe.predicted(self.run.dense, self.ids, self.run.device, self.run.dtype)

    @torch.inference_mode()
    def moved(self, steps: Sequence[AnyStep]) -> Tensor:
        """How far predictions move in every window [N], in nats per token, by steps whose folder goes again."""
        run, steps = self.run, [*steps, *self.behind]
        with tempfile.TemporaryDirectory(prefix="microtome-", dir=run.scratch) as folder:
            place = Path(folder) / "model"
            with Writer(place) as sink:
                chain.carried_out(run, steps, chain.first_outcome(run, steps), sink, torch.float32)
            with open_source(place) as source:
                have = probe.predicted(opened(source), self.ids, run.device, run.dtype)
        windows = zip(self.want.chunk(len(self.ids)), have.chunk(len(self.ids)), strict=True)
        return torch.tensor([probe.divergence(*both) for both in windows], dtype=torch.float64)


def finalists(shares: Sequence[list[float]]) -> list[list[float]]:
    """The splits to measure as a whole: that of the last step alone, if there is one, and then the best."""
    alone = [one for one in shares if all(share == 1.0 for share in one[:-1])]
    return [*alone, *(one for one in shares[:FINALISTS] if one not in alone)]


def error(differences: Tensor) -> float:
    """The standard error of the mean of some differences [N]; 0 of one."""
    return float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0


def splits(curves: Sequence[Sequence[Point]], keep: float) -> list[list[float]]:
    """What every step keeps, so that the product is `keep`: of every set of steps the split with the least sum.

    By the sum of their divergences, the least first; [steps] numbers each. All steps but the last stay at sizes that
    were measured; the last one's divergence is interpolated. Raises BadPlan if there is none.
    """
    *before, last = curves
    hull = allocate.convex(sorted((point.keep, point.loss) for point in last))
    found: dict[tuple[bool, ...], tuple[float, list[float]]] = {}
    for chosen in itertools.product(*before):
        rest = keep / math.prod(point.keep for point in chosen)
        if rest > 1.0 + SLACK or rest < hull[0][0] * (1.0 - SLACK):
            continue
        rest = 1.0 if rest > 1.0 - SLACK else rest
        total = sum(point.loss for point in chosen) + allocate.value_at(hull, rest)
        sizes = [*(point.keep for point in chosen), rest]
        used = tuple(size < 1.0 for size in sizes)
        if used not in found or total < found[used][0]:
            found[used] = total, sizes
    if not found:
        raise BadPlan(f"no split of the budget over the steps comes to keep {keep:g}: add a step, or keep more.")
    return [sizes for _, sizes in sorted(found.values(), key=lambda one: one[0])]
