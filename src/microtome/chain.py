"""Steps over one model, one after the other: each reads what the one before it wrote.

What lies between two steps is a checkpoint in a temporary folder, in fp32 where the weights are shorter: a model larger
than memory passes through a recipe as it passes through one method.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import cut, gradients, layout, passes, planner, restore, survey
from microtome.calibrate import Progress
from microtome.checkpoint import Writer
from microtome.cut import Work
from microtome.edit import Plan
from microtome.errors import BadInput
from microtome.lineage import Lineage
from microtome.passes import Allocation, Step
from microtome.planner import Opened, Outcome
from microtome.restore import Restore
from microtome.source import open_source
from microtome.stats import Sample, Stat
from microtome.survey import Statistics

AnyStep = Step | Restore


@dataclass
class Run:
    """What all steps share: the uncut model, the calibration ids, where and how precisely to compute."""

    dense: Opened
    ids: Tensor | None
    device: torch.device
    dtype: torch.dtype  # of the hidden states
    scratch: Path | None = None
    cache: Path | None = None  # of statistics
    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    known: dict[Opened, Statistics] = field(default_factory=dict[Opened, Statistics])  # of the model at hand

    def work(self, opened: Opened, outcome: Outcome) -> Work:
        """One step's carrier."""
        return Work(
            opened, outcome, self.ids, self.device, self.dtype, self.scratch, self.progress, self.seconds,
            cache=self.cache,
        )  # fmt: skip

    def measure(self, opened: Opened, step: Step) -> passes.Measure:
        """Sums of one model, for a step: what has been measured of it is not measured again."""
        sample = getattr(step.method, "sample", Sample())

        def measured(wanted: frozenset[Stat]) -> Statistics:
            if opened not in self.known:
                self.known.clear()  # of the model before this step: nobody asks again
            known = self.known.setdefault(opened, Statistics())
            have = {stat for _, stat in known.found}
            if (missing := (wanted - have) & survey.MEASURED) and self.ids is not None:
                with cut.clock(self.seconds, "survey"):
                    more = survey.survey(
                        opened, self.ids, missing, device=self.device, dtype=self.dtype, scratch=self.scratch,
                        progress=self.progress, cache=self.cache,
                    )  # fmt: skip
                known.found.update(more.found)
            held = None if known.gradients is None else known.gradients.sample
            if Stat.GRADIENT in wanted and held != sample and self.ids is not None:
                with cut.clock(self.seconds, "gradients"):
                    found = gradients.gradients(opened, self.ids, sample, device=self.device, progress=self.progress)
                self.known[opened] = known = replace(known, gradients=found)
            return known

        return passes.Measure(measured, self.ids, self.device, self.dtype, self.progress)

    @property
    def whole(self) -> int:
        """What `keep` is a fraction of: the numbers that the uncut blocks store."""
        return layout.count_blocks(self.dense.config)


def early(run: Run, steps: Sequence[AnyStep]) -> Outcome | None:
    """What the first step comes to, if that is known before anything is measured; None if not."""
    step = steps[0]
    if isinstance(step, Restore) or step.needs():
        return None
    return first_outcome(run, steps)


def first_outcome(run: Run, steps: Sequence[AnyStep]) -> Outcome:
    """What the first step comes to, with the wrapper that the source is in if it is the only one."""
    step = steps[0]
    if isinstance(step, Restore):
        raise BadInput("restore has nothing to restore: it comes behind a cut.")
    out = passes.settled(run.dense, step, run.whole, run.measure(run.dense, step))
    if len(steps) == 1 or run.dense.wrapper is None:
        return planner.rewrapped(run.dense, out)
    return replace(out, alone="a recipe of several steps cuts the decoder alone")


def dry(run: Run, steps: Sequence[AnyStep]) -> list[Outcome]:
    """What every step would come to, by configs alone: nothing is cut.

    Raises BadInput where a step's widths depend on what is measured and there is nothing to measure, or on what the
    steps before it make of the weights.
    """
    opened, done = run.dense, list[Outcome]()
    for number, step in enumerate(steps):
        if isinstance(step, Restore):
            done.append(planner.same(opened, done[-1].why_not))
            continue
        if step.needs() and (number or run.ids is None):
            remedy = "give --data" if not number else "the run itself will tell"
            raise BadInput(f"the widths of step {number + 1}, {step.name}, depend on activations: {remedy}.")
        done.append(
            passes.settled(opened, step, run.whole, run.measure(opened, step)) if number else first_outcome(run, steps)
        )
        opened = planner.imagined(opened, done[-1])
    return done


def needs_data(steps: Sequence[AnyStep], first: Outcome | None) -> bool:
    """Whether any step asks for activations."""
    if len(steps) == 1 and first is not None and not first.changed:
        return False
    return any(
        isinstance(step, Restore) or bool(step.needs()) or (step.keep != 1.0 and bool(step.method.needs))
        for step in steps
    )


def carried_out(
    run: Run, steps: Sequence[AnyStep], first: Outcome, writer: Writer, dtype: torch.dtype
) -> list[Outcome]:
    """Carry out all steps, the last one into the writer; the outcome of each."""
    opened, lineage, done = run.dense, Lineage(), list[Outcome]()
    with ExitStack() as stack:
        for number, step in enumerate(steps[:-1]):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="microtome-", dir=run.scratch)))
            later = any(isinstance(one, Restore) for one in steps[number + 1 :])
            with Writer(folder / "model") as sink:
                wide = torch.promote_types(run.dense.dtype, torch.float32)
                one(run, step, opened, lineage, done, first, sink, wide, keep_bases=later)
            opened = planner.opened(stack.enter_context(open_source(folder / "model")))
        one(run, steps[-1], opened, lineage, done, first, writer, dtype, keep_bases=False)
    return done


def one(  # noqa: PLR0913, PLR0917
    run: Run,
    step: AnyStep,
    opened: Opened,
    lineage: Lineage,
    done: list[Outcome],
    first: Outcome,
    sink: Writer,
    dtype: torch.dtype,
    *,
    keep_bases: bool,
) -> None:
    """Carry out one step on what the one before it has made, and note its outcome and what became of the spaces."""
    if isinstance(step, Restore):
        out = planner.same(opened, done[-1].why_not)
        restore.restored(run.dense, lineage, step, run.work(opened, out), sink, dtype)
    else:
        out = passes.settled(opened, step, run.whole, run.measure(opened, step)) if done else first
        work = run.work(opened, out)
        work.keep_bases = keep_bases
        lineage.steps.append(passes.carried_out(work, step, sink, dtype, run.measure(opened, step)))
    cut.finish(sink, run.dense, out, dtype)
    done.append(out)


def recorded(steps: Sequence[AnyStep], outs: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The steps as a plan keeps them."""
    return [
        {"method": "restore", "options": step.to_json(), "keep": None, "slice": None, "widths": {}}
        if isinstance(step, Restore)
        else passes.recorded(step, out)
        for step, out in zip(steps, outs, strict=True)
    ]


def replayed(plan: Plan) -> list[AnyStep]:
    """The steps of a plan, with the widths that it records."""
    first = {name: getattr(plan, name) for name in ("method", "options", "keep", "slice", "widths", "allocation")}
    return [again(step) for step in (first, *plan.then)]


def again(recorded: Mapping[str, Any]) -> AnyStep:
    """One recorded step."""
    if recorded["method"] == "restore":
        return Restore(**recorded["options"])
    spends = recorded.get("allocation")
    return passes.stepped(
        recorded["method"],
        recorded["options"],
        keep=recorded["keep"],
        slice=recorded["slice"],
        allocation=None if spends is None else Allocation(**spends),
        widths=recorded["widths"],
    )
