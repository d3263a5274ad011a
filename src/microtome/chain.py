"""Steps over one model, one after the other: each reads what the one before it wrote.

What lies between two steps is a checkpoint in a temporary folder, in fp32 where the weights are shorter: a model larger
than memory passes through a recipe as it passes through one method.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from microtome import (
    curvature,
    cut,
    fisher,
    gradients,
    healing,
    layout,
    masks,
    order,
    passes,
    planner,
    restore,
    sparsity,
    survey,
)
from microtome.allocate import Fractions
from microtome.budget import Sizes
from microtome.calibrate import Progress
from microtome.checkpoint import Writer
from microtome.cut import Work
from microtome.data import Tokens
from microtome.errors import BadInput
from microtome.kept import Kept, Stage
from microtome.lineage import Lineage
from microtome.order import AnyStep, check_packed, is_coded, word_of
from microtome.passes import Allocation, Step
from microtome.planner import Opened, Outcome
from microtome.restore import Restore
from microtome.source import open_source
from microtome.space import Kind
from microtome.stats import Curvature, Fisher, Masks, Sample, Stat
from microtome.survey import Statistics
from microtome.target import ANY, Target
from microtome.training import Heal


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
    probed: dict[str, Fractions] = field(default_factory=dict[str, Fractions])  # how `auto` spends on that model
    notes: list[str] = field(default_factory=list[str])  # for the user
    nonzero: int | None = None  # numbers in what the last step wrote that are not zero
    more: Callable[[int], Tokens | None] | None = None  # so many windows of the same text, to heal with
    kept: Kept | None = None  # what runs that begin alike share

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
                self.probed.clear()
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
                taken = curvature.curvature if sample.probes else gradients.gradients
                with cut.clock(self.seconds, "gradients"):
                    found = taken(
                        opened, self.ids, sample, device=self.device, scratch=self.scratch, progress=self.progress
                    )
                self.known[opened] = known = replace(known, gradients=found)
            if Stat.FISHER in wanted and self.ids is not None:
                self.bend(opened, step.method.curvature, known, self.ids)
            if Stat.MASKS in wanted and self.ids is not None:
                self.learn(opened, step, known, self.ids)
            return known

        return passes.Measure(measured, self.ids, self.device, self.dtype, self.progress, self.probed)

    def bend(self, opened: Opened, how: Curvature, known: Statistics, ids: Tensor) -> None:
        """How the loss bends around the weights of a model, unless it is known on just those tokens."""
        held = known.found.get((0, Stat.FISHER))
        if not isinstance(held, Fisher) or held.how != how:
            fisher.check_tokens(opened.config, ids, how)
            with cut.clock(self.seconds, "curvature"):
                known.found.update(
                    fisher.factors(opened, ids, how, device=self.device, scratch=self.scratch, progress=self.progress)
                )

    def learn(self, opened: Opened, step: Step, known: Statistics, ids: Tensor) -> None:
        """Masks for the size that a step comes to, unless they are known for just that."""
        size, how = passes.aimed(opened, step, self.whole), step.method.learning
        held = known.found.get((0, Stat.MASKS))
        if not isinstance(held, Masks) or (held.how, held.wanted) != (how, size):
            with cut.clock(self.seconds, "masks"):
                known.found.update(
                    masks.learned(opened, ids, how, size, device=self.device, dtype=self.dtype, progress=self.progress)
                )

    @property
    def whole(self) -> int:
        """What `keep` is a fraction of: the numbers that the uncut blocks store."""
        return layout.count_blocks(self.dense.config)


def early(run: Run, steps: Sequence[AnyStep]) -> Outcome | None:
    """What the first step comes to, if that is known before anything is measured; None if not."""
    step = steps[0]
    if not isinstance(step, Step) or step.shared or step.needs():
        return None
    return first_outcome(run, steps)


def first_outcome(run: Run, steps: Sequence[AnyStep]) -> Outcome:
    """What the first step comes to, with the wrapper that the source is in if it is the only one."""
    step = steps[0]
    if not isinstance(step, Step):
        raise BadInput(f"{word_of(step)} has nothing to {word_of(step)}: it comes behind a cut.")
    made = partial(passes.settled, run.dense, step, run.whole, run.measure(run.dense, step))
    out = made() if run.kept is None else run.kept.value(("first", step), made)
    check_target(run, steps, 0, out)
    if len(steps) == 1 or run.dense.wrapper is None:
        return planner.rewrapped(run.dense, out)
    return replace(out, alone="a recipe of several steps cuts the decoder alone")


def target_of(steps: Sequence[AnyStep]) -> Target:
    """The engines that the result is meant for."""
    return next((step.target for step in steps if isinstance(step, Step)), ANY)


def check_target(run: Run, steps: Sequence[AnyStep], number: int, out: Outcome) -> None:
    """Raise BadPlan where no later step can mend what an engine cannot run, BadInput where none can heal it."""
    step = steps[number]
    if isinstance(step, Step) and any(isinstance(later, Heal) for later in steps[number + 1 :]):
        check_packed(step, out)
    if not any(isinstance(later, Step) for later in steps[number + 1 :]):
        target_of(steps).check(out.final, run.dense.config)


def remarks(steps: Sequence[AnyStep], out: Outcome) -> list[str]:
    """What a user should know of the result on the engines that it is meant for."""
    return [*order.remarks(steps), *target_of(steps).notes(out.final, stock=out.stock is not None)]


def dry(run: Run, steps: Sequence[AnyStep]) -> list[Outcome]:
    """What every step would come to, by configs alone: nothing is cut.

    An even cut stands in for widths that are measured behind other steps, or learned. Raises BadInput where the first
    step's depend on what is measured and there is nothing to measure, or blocks go behind other steps.
    """
    opened, done = run.dense, list[Outcome]()
    for number, step in enumerate(steps):
        if not isinstance(step, Step):
            done.append(refilled(opened, done[-1]))
            continue
        if step.needs() and (number or run.ids is None):
            step = evened(run, step, number)  # noqa: PLW2901 - stands in for what is measured or learned
        done.append(
            passes.settled(opened, step, run.whole, run.measure(opened, step))
            if number
            else first_outcome(run, [step, *steps[1:]])
        )
        check_target(run, steps, number, done[-1])
        opened = planner.imagined(opened, done[-1])
    return done


def evened(run: Run, step: Step, number: int) -> Step:
    """A step with an even cut in place of what it will measure behind the others or learn, said in the notes."""
    learned = Stat.MASKS in step.method.needs
    if not (number or learned):
        raise BadInput(f"the widths of step {number + 1}, {step.name}, depend on activations: give --data.")
    if step.method.targets & {Kind.BLOCKS, Kind.HALVES}:
        raise BadInput(f"what {step.name} drops whole behind other steps depends on these: the run itself will tell.")
    why = "learns its widths" if learned else "measures its widths behind the steps before it"
    run.notes.append(
        f"{step.name} {why}: these are those of an even cut of about the same size. The run meets --keep to within "
        "one coordinate."
    )
    return replace(step, allocation=Allocation("uniform"))


def needs_data(steps: Sequence[AnyStep], first: Outcome | None) -> bool:
    """Whether any step asks for activations."""
    if len(steps) == 1 and first is not None and not first.changed:
        return False
    return any(
        not isinstance(step, Step) or bool(step.needs()) or (step.keep != 1.0 and bool(step.method.needs))
        for step in steps
    )


def carried_out(
    run: Run, steps: Sequence[AnyStep], first: Outcome, writer: Writer, dtype: torch.dtype
) -> list[Outcome]:
    """Carry out all steps, the last one into the writer; the outcome of each.

    A run that shares what its steps come to goes on from what is there, and copies what the last one leaves; but for
    codes, wrappers, and scales of embeddings, which are rounded with the stored type: there the last step is its own.
    """
    kept, behind, dense = run.kept, Stage(run.dense), run.dense
    plain = dense.wrapper is None and dense.config.embedding_scale == 1.0 and not any(map(is_coded, steps))
    copies = kept is not None and plain
    if kept is not None and (found := kept.behind(steps if copies else steps[:-1])) is not None:
        behind, run.nonzero = found, found.nonzero
        run.notes += found.notes
        for number, out in enumerate(found.done):
            check_target(run, steps, number, out)
    with ExitStack() as stack:
        for _ in range(len(behind.done), len(steps) - (not copies)):
            behind = stage(run, steps, behind, first, dtype, stack if kept is None else kept.stack)
            if kept is not None:
                kept.stages.append(behind)
        done = list(behind.done)
        if copies:
            run.nonzero = copied(run, behind, writer, dtype)
        else:
            one(run, steps, behind.opened, Lineage(list(behind.made)), done, first, writer, dtype, keep_bases=False)
    return done


def stage(
    run: Run, steps: Sequence[AnyStep], behind: Stage, first: Outcome, dtype: torch.dtype, stack: ExitStack
) -> Stage:
    """Carry out the next step into a folder that lives as long as the stack."""
    start, before, number = time.perf_counter(), len(run.notes), len(behind.done)
    lineage, done = Lineage(list(behind.made)), list(behind.done)
    # codes are chosen for scales as they are stored
    wide = dtype if is_coded(steps[number]) else torch.promote_types(run.dense.dtype, torch.float32)
    bases = run.kept is not None or any(isinstance(one, Restore) for one in steps[number + 1 :])
    with ExitStack() as own:
        folder = Path(own.enter_context(tempfile.TemporaryDirectory(prefix="microtome-", dir=run.scratch)))
        with Writer(folder / "model") as sink:
            one(run, steps, behind.opened, lineage, done, first, sink, wide, keep_bases=bases)
        opened = planner.opened(own.enter_context(open_source(folder / "model")))
        stack.push(own.pop_all())
    notes, took = (*behind.notes, *run.notes[before:]), behind.seconds + time.perf_counter() - start
    return Stage(opened, steps[: number + 1], lineage.steps, done, run.nonzero, notes, took)


def copied(run: Run, behind: Stage, writer: Writer, dtype: torch.dtype) -> int:
    """Write the checkpoint behind some steps as the result of the last one; how many of its numbers are not zero."""
    out = behind.done[-1]
    work = run.work(behind.opened, planner.same(behind.opened, out.why_not))
    sink = cut.Sink(work, writer, dtype)
    for part in layout.parts(behind.opened.config):
        sink.store(part, behind.opened.read(part))
    cut.finish(writer, run.dense, out, dtype)
    return sum(work.nonzero.values())


def one(  # noqa: PLR0913, PLR0917
    run: Run,
    steps: Sequence[AnyStep],
    opened: Opened,
    lineage: Lineage,
    done: list[Outcome],
    first: Outcome,
    sink: Writer,
    dtype: torch.dtype,
    *,
    keep_bases: bool,
) -> None:
    """Carry out the next step on what those before it have made, and note its outcome and what became of the spaces."""
    step = steps[len(done)]
    if isinstance(step, Restore):
        out = planner.same(opened, done[-1].why_not)
        restore.restored(run.dense, lineage, step, run.work(opened, out), sink, dtype)
    elif isinstance(step, Heal):
        out = refilled(opened, done[-1])
        run.nonzero = mended(run, step, opened, sink, dtype)
    else:
        out = passes.settled(opened, step, run.whole, run.measure(opened, step)) if done else first
        check_target(run, steps, len(done), out)  # as early as the widths are known
        work = run.work(opened, out)
        work.keep_bases = keep_bases
        lineage.steps.append(passes.carried_out(work, step, sink, dtype, run.measure(opened, step)))
        run.nonzero = sum(work.nonzero.values()) or None  # none where the files were copied
    cut.finish(sink, run.dense, out, dtype)
    done.append(out)


def refilled(opened: Opened, before: Outcome) -> Outcome:
    """The outcome of a step that changes numbers, and leaves what is in codes there."""
    return replace(planner.same(opened, before.why_not), packing=before.packing)


def mended(run: Run, step: Heal, opened: Opened, sink: Writer, dtype: torch.dtype) -> int:
    """Heal what the steps so far have made, and write it; how many of its numbers are not zero."""
    tokens = None if run.more is None else run.more(step.samples)
    if tokens is None:
        raise BadInput("healing needs text to learn from: give --data.")
    options = healing.settled(step, opened)
    teacher = run.dense.source.folder if options.taught else None
    lesson = healing.Lesson(opened, teacher, tokens.ids, options, run.device, progress=run.progress)
    with cut.clock(run.seconds, "heal"):
        found = healing.cured(lesson, sink, dtype)
    run.notes += [f"healed: {line}" for line in found.lines()]
    return found.nonzero


def sets_zeros(run: Run, steps: Sequence[AnyStep]) -> bool:
    """Whether any step is there to set single weights to zero."""
    config = run.dense.config
    return any(isinstance(one, Step) and one.is_weights and one.method.zeros(config) > 0 for one in steps)


def nonzero(opened: Opened) -> int:
    """How many of a model's stored numbers are not zero, tied weights once."""
    return sum(sparsity.nonzero(opened.read(part, check=False).values()) for part in layout.parts(opened.config))


def left(steps: Sequence[AnyStep], outs: Sequence[Outcome], after: Sizes) -> Sizes:
    """The sizes with the numbers that will not be zero, where the last step alone decides that."""
    step = steps[-1]
    if not isinstance(step, Step) or not outs[-1].weights or not (gone := step.method.zeros(outs[-1].final)):
        return after
    return replace(after, nonzero=after.stored - gone)
