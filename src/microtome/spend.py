"""One budget for all steps of a recipe: what each costs alone is measured, and the budget goes where it costs least.

Steps cut different spaces (the residual stream, what lies inside the blocks, whole blocks). Each is carried out alone
at several sizes, restored if the recipe restores, and the divergence of the model's predictions from the uncut model's
is measured on a few windows. Sizes multiply and divergences add up, to first order: the split of the budget with the
least sum is taken. The last step takes up what the others leave, so it should be the one with the finest widths.
"""

import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from microtome import allocate, chain, layout, probe
from microtome.chain import AnyStep, Run
from microtome.checkpoint import Writer
from microtome.errors import BadInput, BadPlan
from microtome.passes import Step
from microtome.planner import opened
from microtome.restore import Restore
from microtome.source import open_source

SHARES = (0.2, 0.4, 0.7, 1.0)  # of the budget, in logs, that each step is measured with
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
    (keep,) = {step.keep for step in mine}
    assert keep is not None
    with tempfile.TemporaryDirectory(prefix="microtome-", dir=run.scratch) as folder:
        fitted, unseen = apart(run.ids)
        beside = replace(run, ids=fitted, cache=run.cache or Path(folder) / "cache", progress=None, known={}, probed={})
        restores = any(isinstance(step, Restore) for step in steps)
        curves = []
        for number, step in enumerate(mine):
            curves.append(measured(beside, step, keep, unseen, restores=restores))
            if run.progress is not None:
                run.progress("splitting the budget", (number + 1) / len(mine))
    shares = cheapest(curves, keep)
    run.notes.append("one budget: " + ", ".join(said(step, share) for step, share in zip(mine, shares, strict=True)))
    left, found = 1.0, list[AnyStep]()
    sizes = iter(shares)
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


def apart(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Windows to cut and restore by, and windows to measure on: the last ones, which nothing has been fitted to."""
    aside = min(max(1, probe.TOKENS // ids.shape[1]), len(ids) // 3)
    return (ids[:-aside], ids[-aside:]) if aside else (ids, ids)


def measured(run: Run, step: Step, keep: float, ids: Tensor, *, restores: bool) -> list[Point]:
    """A step alone at several sizes down to the whole budget; sizes that it cannot come to are left out."""
    want = probe.predicted(run.dense, ids, run.device, run.dtype)
    found: dict[float, Point] = {1.0: Point(1.0, 0.0)}
    for share in SHARES:
        alone: list[AnyStep] = [replace(step, keep=keep**share, shared=False)]
        try:
            first = chain.first_outcome(run, alone)
        except BadPlan:
            continue
        size = layout.count_blocks(first.final) / run.whole
        if first.changed and size not in found:
            behind = [Restore(predictions=False)] if restores else []  # the linear fits: they tell steps apart
            found[size] = Point(size, divergence(run, [*alone, *behind], want, ids))
    return sorted(found.values(), key=lambda point: -point.keep)


@torch.inference_mode()
def divergence(run: Run, steps: Sequence[AnyStep], want: Tensor, ids: Tensor) -> float:
    """Carry steps out into a folder that goes again, and see how far the predictions have moved; nats per token."""
    with tempfile.TemporaryDirectory(prefix="microtome-", dir=run.scratch) as folder:
        place = Path(folder) / "model"
        with Writer(place) as sink:
            chain.carried_out(run, steps, chain.first_outcome(run, steps), sink, torch.float32)
        with open_source(place) as source:
            return probe.divergence(want, probe.predicted(opened(source), ids, run.device, run.dtype))


def cheapest(curves: Sequence[Sequence[Point]], keep: float) -> list[float]:
    """What every step keeps, so that the product is `keep` and the sum of the divergences is least.

    All steps but the last stay at sizes that were measured; the last one's divergence is interpolated.
    """
    *before, last = curves
    hull = allocate.convex(sorted((point.keep, point.loss) for point in last))
    best, loss = None, math.inf
    for chosen in itertools.product(*before):
        rest = keep / math.prod(point.keep for point in chosen)
        if rest > 1.0 + SLACK or rest < hull[0][0] * (1.0 - SLACK):
            continue
        rest = 1.0 if rest > 1.0 - SLACK else rest
        total = sum(point.loss for point in chosen) + allocate.value_at(hull, rest)
        if total < loss:
            best, loss = [*(point.keep for point in chosen), rest], total
    if best is None:
        raise BadPlan(f"no split of the budget over the steps comes to keep {keep:g}: add a step, or keep more.")
    return best
