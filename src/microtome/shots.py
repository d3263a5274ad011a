"""Cuts in several shots: one step of a recipe becomes many, each of which takes a part of what goes and measures anew.

A method that offers it has an option `shots`. The parts are equal: what the blocks keep goes down linearly, from what
the step before leaves. A method with an option `correct` has low-rank factors trained on the text for so many steps
between its shots. A plan records every shot as a step of its own.
"""

from collections.abc import Iterable
from dataclasses import replace

from microtome.errors import BadInput
from microtome.order import AnyStep
from microtome.passes import Step
from microtome.training import Heal

RANK, RATE, WINDOWS = 8, 1e-4, 1  # of the factors between shots


def fired(steps: Iterable[AnyStep]) -> list[AnyStep]:
    """The steps, with those of several shots written out.

    Raises BadInput for shots of a step whose size is not known before the run.
    """
    found, before = list[AnyStep](), 1.0
    for step in steps:
        if not isinstance(step, Step):
            found.append(step)
            continue
        found += written_out(step, before)
        before = before if step.keep is None else step.keep
    return found


def written_out(step: Step, before: float) -> list[AnyStep]:
    """The shots of one step, in front of which the blocks keep `before`."""
    count = getattr(step.method, "shots", 1)
    if count <= 1 or step.widths is not None:
        return [step]
    if step.keep is None or step.shared:
        why = "a table of widths" if step.keep is None else "spend: auto"
        raise BadInput(f"{count} shots of {step.name} need a keep of their own, which {why} does not give: one shot.")
    if not before > step.keep:
        return [replace(step, method=replace(step.method, shots=1))]
    found = list[AnyStep]()
    between = getattr(step.method, "correct", 0)
    for number in range(1, count + 1):
        keep = step.keep if number == count else before - (before - step.keep) * number / count
        found.append(replace(step, keep=round(keep, 9), method=replace(step.method, shots=1)))
        if between and number < count:
            found.append(Heal(train="lora", steps=between, loss="text", rank=RANK, rate=RATE, batch=WINDOWS))
    return found
