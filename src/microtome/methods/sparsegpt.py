"""SparseGPT: set the weights to zero that cost least, column by column, and let the others make up for them.

Frantar and Alistarh, ICML 2023 (arXiv:2301.00774). The linears inside the blocks keep their shapes. With H = E[x x^T]
of what a matrix reads and U the upper factor of its inverse, H^-1 = U^T U, a sweep passes over the columns c:

    cost of w_rc = w_rc^2 / U_cc^2                   (of 128 columns at a time, and all rows, the cheapest go)
    e = (w_c - w'_c) / U_cc,   W_:j -= e U_cj        (w'_c: the column with its zeros; j > c: what makes up for them)

Zeros by themselves save neither memory nor time: the result is stored as densely as before.

What is done differently, and the option that gives the paper's or the release's way back:

* Exactly as many weights go as the density says. The release takes all up to a threshold: one more for each block.
* Inputs that are always zero are no special case: with the damping on its diagonal, H makes them the cheapest. The
  release sets their columns to zero beside what the density says.
* Every half is measured behind all that is sparse already. The release measures a whole block at a time;
  `inputs=stepwise` measures each linear behind those of its half before it, `inputs=original` the dense model.
* `pattern=2:4` (4:8, ...) chooses when the sweep enters each group, as in the paper; `block` must hold whole groups.
* `bits` rounds what stays in the same sweep, to a grid from the smallest to the largest weight of each row (of `group`
  columns), fixed before the sweep; zero lies on it, so that zeros stay. What is stored are the rounded values.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from microtome import sparsity
from microtome.compensate import Choose
from microtome.edit import Correct
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Stat

NAME = "sparsegpt"


@dataclass(frozen=True)
class SparseGPT:
    """Options of SparseGPT; see the head of this file."""

    density: float = 0.5
    pattern: str = sparsity.NO_PATTERN
    damping: float = 0.01
    block: int = 128
    inputs: Literal["compressed", "stepwise", "original"] = "compressed"
    bits: int = 0
    group: int = 0

    dial: ClassVar[str] = "density"
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.WEIGHTS})
    needs: ClassVar[frozenset[Stat]] = sparsity.SITES
    sequential = property(sparsity.is_sequential)
    stepwise = property(sparsity.is_stepwise)

    @property
    def idle(self) -> bool:
        """Whether nothing changes."""
        return self.share == 1.0 and not self.bits

    @property
    def share(self) -> float:
        """The fraction of weights that stays."""
        return sparsity.density_of(NAME, self.density, self.pattern)

    @property
    def told(self) -> str:
        """The dial in words."""
        return sparsity.told(self.density, self.pattern, self.bits)

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse densities, patterns and bits that make no sense, or do not fit a matrix."""
        sparsity.check_density(NAME, self.density, self.pattern)
        sparsity.check_sweep(NAME, self.damping, self.block)
        sparsity.check_pattern(config, NAME, self.pattern, self.block)
        sparsity.check_grid(NAME, self.bits, self.group)

    def zeros(self, config: MicrotomeConfig) -> int:
        """As many as the density says, of every matrix."""
        return sum(sparsity.gone(rows * columns, self.share) for _, _, (rows, columns) in sparsity.shapes(config))

    def solve(self, view: View) -> list[Correct]:
        """The sweep over every matrix of the view."""
        return sparsity.sweep(
            view, lambda _, weight_OI: self.chooser(weight_OI), block=self.block, damping=self.damping
        )

    def chooser(self, weight_OI: Tensor) -> Choose:
        """What the sweep asks at every block of a matrix."""
        found = sparsity.pattern_of(NAME, self.pattern)
        if found is not None:
            mask = sparsity.by_groups(found)
        else:
            mask = sparsity.by_blocks(sparsity.gone(weight_OI.numel(), self.share))
        return sparsity.rounded(mask, weight_OI, self.bits, self.group) if self.bits else mask


METHOD = SparseGPT
