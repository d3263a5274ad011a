"""FASP: cut linked rows and columns of feed-forward and value-output pairs, and refit what reads them.

Hu et al., 2025 (arXiv:2501.09412). In y = W2 f(W1 x), column j of W2 and row j of W1 (and of the gate) go together:
once the column is gone the row is of no use, so that removing it costs nothing more. Queries and keys are left alone.

    score_j = sum_i |W2_ij| ||X_j||_2                              (X: what W2 reads)
    W2'_M   = W2 C_:M (C_MM + lambda I)^-1                         (C = E[X X^T], M: what is kept)

No code is published, and the text leaves open what follows; it is decided here, with an option where that matters.

* `ridge`: the constant of the normal equations. The ridge pulls towards the weights as they are instead of to zero.
* `inputs=compressed`: blocks in order, attention before feed-forward, each measured behind what is cut already.
* Every head keeps the same number of value channels, so that the result runs densely. Under grouped queries a value
  channel is read by several columns: their scores are added up.
* The budget counts all that blocks store, so the paper's correction for uncut queries and keys is in it.
* `score=l2` takes E[X_j^2] ||W2_j||^2, and `score=obs` what is lost after the others have made up for it,
  ||W2_j||^2 / [C^-1]_jj, both per neuron.
* `spaces`: both pairs, or one of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from microtome import columns, inner
from microtome.edit import Edit
from microtome.errors import BadInput
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Stat


@dataclass(frozen=True)
class FASP:
    """Options of FASP; see the head of this file."""

    score: Literal["wanda", "l2", "obs"] = "wanda"
    ridge: float = 0.01
    inputs: Literal["compressed", "original"] = "compressed"
    spaces: Literal["both", "ffn", "vo"] = "both"

    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def targets(self) -> frozenset[Kind]:
        """Neurons, value-output channels, or both."""
        return {"both": frozenset({Kind.FFN, Kind.VO}), "ffn": frozenset({Kind.FFN}), "vo": frozenset({Kind.VO})}[
            self.spaces
        ]

    @property
    def needs(self) -> frozenset[Stat]:
        """What the second matrices of the pairs read."""
        sites = {Kind.FFN: Stat.NEURONS, Kind.VO: Stat.HEADS}
        return frozenset(sites[kind] for kind in self.targets)

    @property
    def sequential(self) -> bool:
        """Whether blocks are measured behind those that are cut already."""
        return self.inputs == "compressed"

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse a ridge that is none."""
        if not 0.0 <= self.ridge < math.inf:
            raise BadInput(f"ridge={self.ridge} of fasp is no number from 0 on.")

    def scores(self, view: View) -> dict[str, list[float]]:
        """What every unit of a width is worth per parameter, for budgets over all blocks."""
        found: dict[str, list[float]] = {}
        for kind in self.targets:
            if not view.of_kind(kind):
                continue
            weight, moment = view.weights[f"{columns.READER[kind]}.weight"], view.moment(columns.SITE[kind])
            units = columns.by_dial(view, kind, columns.worth(weight, moment, "obs", self.ridge))
            found[f"{view.block}.{inner.NAMES[kind]}"] = [one / inner.cost(view, kind) for one in units]
        return found

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The best columns of each pair, refitted."""
        edits: list[Edit] = []
        for kind, rank in columns.widths_by_kind(view, widths).items():
            moment = view.moment(columns.SITE[kind])
            moment.check(f"block {view.block}", 1)
            worth = columns.worth(view.weights[f"{columns.READER[kind]}.weight"], moment, self.score, self.ridge)
            edits += columns.refitted(view, kind, columns.selected(view, kind, rank, worth), moment, self.ridge)
        return edits


METHOD = FASP
