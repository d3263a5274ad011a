"""Magnitude: drop the neurons, channels of heads or key-value groups with the smallest weights. No data.

Han et al., 2015 (arXiv:1506.02626) drop single weights by |w|; here all rows and columns that belong to a coordinate
are taken together, as structured magnitude pruning does (van der Ouderaa et al., 2024, arXiv:2312.17244, rank them by
their L2 norms over the whole model).

    score_j = ( sum over all w of j's rows and columns of |w|^p )^(1/p)             p = 2 (`norm=l2`), 1 (`norm=l1`)

Decided here, with an option where that matters:

* `reduce=joint` is one norm over all matrices. `sum`, `max` and `prod` take a norm per matrix and put these together;
  `prod` does not change when a neuron's row is multiplied by what its column is divided by.
* For a budget over all blocks (`--allocate global`) the scores are means per number, (mean |w|^p)^(1/p): a neuron and a
  head hold different numbers of weights.
* A bias counts with its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import members
from microtome.edit import Edit
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Space
from microtome.stats import Stat


@dataclass(frozen=True)
class Magnitude:
    """Options of structured magnitude; see the head of this file."""

    norm: Literal["l2", "l1"] = "l2"
    reduce: Literal["joint", "sum", "max", "prod"] = "joint"
    spaces: members.Spaces = "ffn+heads"

    needs: ClassVar[frozenset[Stat]] = frozenset()
    sequential: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def targets(self) -> frozenset[Kind]:
        """The spaces that are cut."""
        return members.kinds(self.spaces)

    def check(self, config: MicrotomeConfig) -> None:
        """Every decoder has weights."""

    def size(self, view: View, space: Space, *, mean: bool) -> Tensor:
        """The score of every coordinate of a space [N]; `mean` over its numbers instead of their sum."""
        power = {"l1": 1.0, "l2": 2.0}[self.norm]
        parts = [one.flatten(1) for one in members.of(view, space, view.weights).values()]
        if self.reduce == "joint":
            parts = [torch.cat(parts, 1)]
        norms = torch.stack([(one.abs().pow(power).mean if mean else one.abs().pow(power).sum)(1) for one in parts])
        norms = norms.pow(1.0 / power)
        if self.reduce == "prod":
            return norms.prod(0)
        return norms.amax(0) if self.reduce == "max" else norms.sum(0)

    def scores(self, view: View) -> dict[str, list[float]]:
        """Mean sizes, over all groups of a block."""
        return members.units(
            view,
            {
                space.name: self.size(view, space, mean=True) / len(view.of_kind(space.kind))
                for space in view.spaces.values()
            },
        )

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The largest of every space."""
        return members.chosen(
            view, widths, {space.name: self.size(view, space, mean=False) for space in view.spaces.values()}
        )


METHOD = Magnitude
