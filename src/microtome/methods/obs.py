"""OBS: set one weight to zero at a time, the cheapest, and let the others of its row make up for it exactly.

Hassibi and Stork, 1993 (optimal brain surgery), row by row as Frantar and Alistarh, 2022 (arXiv:2208.11580). The
linears inside the blocks keep their shapes. With H = E[x x^T] of what a matrix reads, for every row w,

    cost of w_q = w_q^2 / [H^-1]_qq
    w <- w - w_q / [H^-1]_qq  H^-1_:q,    H^-1 <- H^-1 - H^-1_:q H^-1_q: / [H^-1]_qq

until enough are zero. What stays of a row is then the best there is for its zeros; the zeros are chosen greedily. A row
of n inputs has an inverse of its own and takes up to n steps of n^2: this is the measure for faster methods, on small
models. Zeros by themselves save neither memory nor time: the result is stored as densely as before.

What is decided here, with an option where that matters:

* `compare=matrix`: rows compete for the matrix's zeros, by what their next one costs, as in the paper of 2022;
  `row` gives every row the same number.
* `pattern=2:4` (4:8, ...): a group that has its zeros is left alone.
* `widest`: a matrix that reads more than so many numbers is refused.
* `inputs` and `damping` are those of `sparsegpt`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import sparsity
from microtome.compensate import damped, inverse_factor
from microtome.edit import Correct
from microtome.errors import BadInput
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Stat

NAME = "obs"
HELD = 1 << 24  # numbers of inverses that are held at once


@dataclass(frozen=True)
class OBS:
    """Options of OBS; see the head of this file."""

    density: float = 0.5
    pattern: str = sparsity.NO_PATTERN
    compare: Literal["matrix", "row"] = "matrix"
    damping: float = 0.01
    inputs: Literal["compressed", "stepwise", "original"] = "compressed"
    widest: int = 1024

    dial: ClassVar[str] = "density"
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.WEIGHTS})
    needs: ClassVar[frozenset[Stat]] = sparsity.SITES
    sequential = property(sparsity.is_sequential)
    stepwise = property(sparsity.is_stepwise)

    @property
    def idle(self) -> bool:
        """Whether nothing changes."""
        return self.share == 1.0

    @property
    def share(self) -> float:
        """The fraction of weights that stays."""
        return sparsity.density_of(NAME, self.density, self.pattern)

    @property
    def told(self) -> str:
        """The dial in words."""
        return sparsity.told(self.density, self.pattern)

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse densities and patterns that do not fit a matrix, and matrices that would take too long."""
        sparsity.check_density(NAME, self.density, self.pattern)
        sparsity.check_pattern(config, NAME, self.pattern)
        sparsity.check_sweep(NAME, self.damping, 1)
        block, name, (_, columns) = max(sparsity.shapes(config), key=lambda one: one[2][1])
        if columns > self.widest:
            raise BadInput(
                f"obs inverts a matrix for every row, and {name} of block {block} reads {columns} numbers, over "
                f"widest={self.widest}: take sparsegpt, or raise widest."
            )

    def zeros(self, config: MicrotomeConfig) -> int:
        """Of every matrix, or every row, as many as the density says."""
        return sum(self.gone(rows, columns) for _, _, (rows, columns) in sparsity.shapes(config))

    def gone(self, rows: int, columns: int) -> int:
        """How many weights of one matrix are set to zero."""
        if self.compare == "row":
            return rows * sparsity.gone(columns, self.share)
        return sparsity.gone(rows * columns, self.share)

    def solve(self, view: View) -> list[Correct]:
        """Every matrix of the view with its zeros."""
        edits: list[Correct] = []
        for name, weight_OI in sparsity.linears(view).items():
            moment = view.moment(sparsity.READS[name])
            moment.check(f"{sparsity.READS[name].value} of block {view.block}", weight_OI.shape[1])
            done_OI = self.pruned(weight_OI.double(), moment.mean_NN)
            edits.append(Correct(view.full(f"{name}.weight"), done_OI.to(weight_OI.dtype)))
        return edits

    def pruned(self, weight_OI: Tensor, moment_II: Tensor) -> Tensor:
        """A matrix with its zeros, and what makes up for them, fp64."""
        found = sparsity.pattern_of(NAME, self.pattern)
        factor_II = inverse_factor(damped(moment_II, self.damping))
        inverse_II = factor_II.T @ factor_II
        rows, columns = weight_OI.shape
        counts_O = torch.full((rows,), sparsity.gone(columns, self.share))
        if self.compare == "matrix" and found is None:
            _, costs_OI = greedy(weight_OI, inverse_II, torch.full((rows,), columns), None)
            counts_O = sparsity.lowest(costs_OI.cummax(1).values, self.gone(rows, columns)).sum(1)
        return greedy(weight_OI, inverse_II, counts_O, found)[0]


def greedy(
    weight_OI: Tensor, inverse_II: Tensor, counts_O: Tensor, pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Every row with so many zeros, chosen one by one, and what each of them cost in turn [O, I] (then infinity)."""
    size = max(1, HELD // inverse_II.numel())
    pieces = [
        chosen(rows_RI, inverse_II, counts_R, pattern)
        for rows_RI, counts_R in zip(weight_OI.split(size), counts_O.split(size), strict=True)
    ]
    return torch.cat([weights for weights, _ in pieces]), torch.cat([costs for _, costs in pieces])


def chosen(
    weight_RI: Tensor, inverse_II: Tensor, counts_R: Tensor, pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """The same for rows whose inverses fit into memory."""
    live_RI, rows = weight_RI.clone(), torch.arange(len(weight_RI))
    inverse_RII = inverse_II.expand(len(rows), -1, -1).clone()
    gone_RI = torch.zeros_like(live_RI, dtype=torch.bool)
    costs_RI = torch.full_like(live_RI, torch.inf)
    for step in range(int(counts_R.max()) if len(counts_R) else 0):
        spread_RI = inverse_RII.diagonal(dim1=1, dim2=2)
        cost_RI = (live_RI.square() / spread_RI).masked_fill(gone_RI | full(gone_RI, pattern), torch.inf)
        on_R, at = counts_R > step, cost_RI.argmin(1)
        costs_RI[on_R, step] = cost_RI[rows, at][on_R]
        column_RI = inverse_RII[rows, :, at] * on_R[:, None]  # nothing moves in rows that have their zeros
        scaled_RI = column_RI / spread_RI[rows, at][:, None]
        live_RI -= live_RI[rows, at][:, None] * scaled_RI
        inverse_RII.baddbmm_(column_RI[:, :, None], scaled_RI[:, None, :], alpha=-1.0)
        gone_RI[rows, at] |= on_R
        live_RI[gone_RI] = 0.0
    return live_RI, costs_RI


def full(gone_RI: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """Which weights lie in a group that has its zeros."""
    if pattern is None:
        return torch.zeros_like(gone_RI)
    kept, size = pattern
    grouped = gone_RI.view(len(gone_RI), -1, size)
    return (grouped.sum(2, keepdim=True) >= size - kept).expand_as(grouped).reshape_as(gone_RI)


METHOD = OBS
