"""LLM-Pruner: drop the neurons and heads without which the loss, to first order, changes least.

Ma et al., NeurIPS 2023 (arXiv:2305.11627). Rows and columns that only make sense together form a group: a row of gate
and up with a column of down; the rows of query, key and value of a head with its columns of the output projection. With
g the gradient of the language-model loss on a few calibration sequences, a weight w is worth

    |w g|                              `element=param_first`
    |w^2 E[g^2]|                       `element=param_second`    (E over sequences: the diagonal of Fisher's matrix)
    |w g - w^2 E[g^2] / 2|             `element=param_mix`
    |sum of w g over the row|          `element=vectorize`

and a group what its rows and columns are worth, added up within each matrix and put together over matrices by `reduce`.

What is decided here, and the option that gives the paper's or the release's way back:

* The unit of attention is a key-value group with all its query heads. `max` and `prod` put whole groups together; the
  release does so channel by channel before it adds up a head. `first` counts keys and gates only (up where there are no
  gates): the matrices that the release starts its groups from.
* All blocks lose the same share. The release leaves the first 4 and the last 2 of 32 alone: `protect_first=4`,
  `protect_last=2`. `--allocate global` ranks groups over all blocks, by what they are worth per parameter.
* `sequences=10`, `length=64` are the release's; `length=0` takes whole windows. The text is the calibration text.
* A bias counts with its row. Channels of the residual stream (the release's channel mode) are not cut, and nothing is
  tuned afterwards: `restore` refits in closed form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import inner, layout, members
from microtome.edit import Edit
from microtome.inner import View
from microtome.linalg import check_squares
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Sample, Stat

FIRST = ("self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")  # of each half, the first that there is


@dataclass(frozen=True)
class LLMPruner:
    """Options of LLM-Pruner; see the head of this file."""

    element: Literal["param_first", "param_second", "param_mix", "vectorize"] = "param_first"
    reduce: Literal["sum", "max", "prod", "first"] = "sum"
    sequences: int = 10
    length: int = 64
    protect_first: int = 0
    protect_last: int = 0
    spaces: Literal["ffn+heads", "ffn", "heads"] = "ffn+heads"

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.GRADIENT})
    sequential: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def sample(self) -> Sample:
        """What the gradients are taken on."""
        return Sample(self.sequences, self.length or None)

    @property
    def targets(self) -> frozenset[Kind]:
        """Neurons and key-value groups, or one of them."""
        return members.kinds(self.spaces)

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse a protection that leaves nothing."""
        members.check_ends("llmpruner", self.protect_first, self.protect_last, config)

    def spared(self, config: MicrotomeConfig) -> frozenset[int]:
        """The blocks at either end that stay whole."""
        return members.ends(self.protect_first, self.protect_last, config)

    def worth(self, view: View) -> dict[str, Tensor]:
        """What every coordinate is worth [N], by space."""
        values = {name: self.salience(view, name) for name in view.gradients}
        return {space.name: self.grouped(members.of(view, space, values)) for space in view.spaces.values()}

    def salience(self, view: View, name: str) -> Tensor:
        """What every weight of a tensor is worth, before signs are dropped."""
        weight, first = view.weights[name].double(), view.gradients[name].double()
        if self.element in ("param_first", "vectorize"):
            return weight * first
        check_squares(f"{layout.prefix(view.block)}{name}", view.squares[name])
        second = weight.square() * view.squares[name].double()
        return second if self.element == "param_second" else weight * first - second / 2

    def grouped(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The members [N, rows, entries] of every matrix, put together [N]."""
        if self.element == "vectorize":
            each = {linear: part.sum(2).abs().sum(1) for linear, part in parts.items()}
        else:
            each = {linear: part.abs().sum((1, 2)) for linear, part in parts.items()}
        if self.reduce == "first":
            return each[next(linear for linear in FIRST if linear in each)]
        stacked = torch.stack(list(each.values()))
        if self.reduce == "max":
            return stacked.amax(0)
        return stacked.prod(0) if self.reduce == "prod" else stacked.sum(0)

    def scores(self, view: View) -> dict[str, list[float]]:
        """The worth of every unit per parameter."""
        worth = self.worth(view)
        return members.units(
            view, {space.name: worth[space.name] / inner.cost(view, space.kind) for space in view.spaces.values()}
        )

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The groups that are worth most."""
        return members.chosen(view, widths, self.worth(view))


METHOD = LLMPruner
