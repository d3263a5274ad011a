"""What the first steps of a recipe have come to, kept for other recipes that begin alike.

A sweep asks for every result as it is and once more with other steps behind it. Its runs share the split of a budget,
the first step's widths, and the checkpoint that every step has left, in a temporary folder that goes with the group.
A result that is copied from such a checkpoint is rounded from fp32 numbers, not from those the step computed with.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from microtome.lineage import Made
from microtome.planner import Opened, Outcome


@dataclass(frozen=True, eq=False)
class Stage:
    """The state behind some steps: the checkpoint, in fp32 or wider, and what is known of it."""

    opened: Opened
    steps: Sequence[Any] = ()
    made: Sequence[Made] = ()  # the lineage
    done: Sequence[Outcome] = ()
    nonzero: int | None = None
    notes: Sequence[str] = ()
    seconds: float = 0.0  # that all of the steps took


@dataclass(eq=False)
class Kept:
    """What a group of runs shares, as long as they agree in what a result depends on; on leaving it all goes."""

    identity: Any = None  # of the model, the text, and how both are treated
    ids: Tensor | None = None
    stages: list[Stage] = field(default_factory=list[Stage])
    values: list[tuple[Any, Any, float]] = field(default_factory=list[tuple[Any, Any, float]])
    saved: float = 0.0  # seconds that the run at hand need not spend again
    stack: ExitStack = field(default_factory=ExitStack)  # the checkpoints

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.stages.clear()
        self.values.clear()
        self.stack.close()

    def begin(self, identity: Any, ids: Tensor | None) -> None:
        """A run on these windows [N, T], None where no step needs any; what was kept of others is of no use to it."""
        same = self.ids is None or ids is None or torch.equal(self.ids, ids)
        if identity != self.identity or not same:
            self.clear()
            self.ids = None
        self.identity, self.saved = identity, 0.0
        self.ids = self.ids if ids is None else ids

    def value(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made under an equal key before, or is made now."""
        for known, value, seconds in self.values:
            if known == key:
                self.saved += seconds
                return value
        start = time.perf_counter()
        value = make()
        self.values.append((key, value, time.perf_counter() - start))
        return value

    def behind(self, steps: Sequence[Any]) -> Stage | None:
        """The longest kept stage that some steps begin with; its seconds count as saved."""
        fits = [one for one in self.stages if list(steps[: len(one.steps)]) == list(one.steps)]
        found = max(fits, key=lambda one: len(one.steps), default=None)
        self.saved += found.seconds if found is not None else 0.0
        return found
