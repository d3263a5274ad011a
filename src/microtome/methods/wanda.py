"""Wanda: set the weights to zero that are small where little arrives; nothing makes up for them.

Sun et al., ICLR 2024 (arXiv:2306.11695). The linears inside the blocks keep their shapes; within every output row,

    score_ij = |W_ij| ||X_j||_2

and the lowest go: floor(density's complement times the inputs) of each row, or all but N of M consecutive inputs
(`pattern=2:4`). With `score=magnitude` the score is |W_ij| alone, of a whole matrix at a time, as the papers have their
baseline: that needs no text.

Zeros by themselves save neither memory nor time: the result is stored as densely as before.

What is decided here, with an option where that matters:

* Every half is measured behind all that is sparse already. The release measures a whole block at a time;
  `inputs=stepwise` measures each linear behind those of its half before it, `inputs=original` the dense model.
* `compare` says what competes: the weights of a row, or of a whole matrix. `auto` is a row for Wanda's score and a
  matrix for magnitude.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from microtome import sparsity
from microtome.edit import Correct
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Stat

NAME = "wanda"


@dataclass(frozen=True)
class Wanda:
    """Options of Wanda; see the head of this file."""

    density: float = 0.5
    pattern: str = sparsity.NO_PATTERN
    score: Literal["wanda", "magnitude"] = "wanda"
    compare: Literal["auto", "row", "matrix"] = "auto"
    inputs: Literal["compressed", "stepwise", "original"] = "compressed"

    dial: ClassVar[str] = "density"
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.WEIGHTS})
    sequential = property(sparsity.is_sequential)

    @property
    def needs(self) -> frozenset[Stat]:
        """What arrives, unless magnitude alone counts."""
        return sparsity.SITES if self.score == "wanda" else frozenset()

    @property
    def stepwise(self) -> bool:
        """Whether linears are, too."""
        return self.inputs == "stepwise" and bool(self.needs)

    @property
    def idle(self) -> bool:
        """Whether nothing changes."""
        return self.share == 1.0

    @property
    def share(self) -> float:
        """The fraction of weights that stays."""
        return sparsity.density_of(NAME, self.density, self.pattern)

    @property
    def by_row(self) -> bool:
        """Whether the weights of a row compete, or those of a matrix."""
        return self.compare == "row" or (self.compare == "auto" and self.score == "wanda")

    @property
    def told(self) -> str:
        """The dial in words."""
        return sparsity.told(self.density, self.pattern)

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse densities and patterns that make no sense, or do not fit a matrix."""
        sparsity.check_density(NAME, self.density, self.pattern)
        sparsity.check_pattern(config, NAME, self.pattern)

    def zeros(self, config: MicrotomeConfig) -> int:
        """Of every matrix, or every row, as many as the density says."""
        return sum(self.gone(rows, columns) for _, _, (rows, columns) in sparsity.shapes(config))

    def gone(self, rows: int, columns: int) -> int:
        """How many weights of one matrix are set to zero."""
        whole_rows = self.by_row and self.pattern == sparsity.NO_PATTERN
        return rows * self.of_row(columns) if whole_rows else sparsity.gone(rows * columns, self.share)

    def of_row(self, columns: int) -> int:
        """How many weights of a row go: rounded down, as in the paper."""
        return int(columns * (1.0 - self.share) + 1e-9)

    def solve(self, view: View) -> list[Correct]:
        """Every matrix of the view with its zeros."""
        return [
            Correct(view.full(f"{name}.weight"), weight_OI.masked_fill(self.mask(view, name, weight_OI), 0.0))
            for name, weight_OI in sparsity.linears(view).items()
        ]

    def mask(self, view: View, name: str, weight_OI: Tensor) -> Tensor:
        """Which weights of a matrix go [O, I]."""
        score_OI = weight_OI.abs()
        if self.score == "wanda":
            moment = view.moment(sparsity.READS[name])
            moment.check(f"{sparsity.READS[name].value} of block {view.block}", 1)
            score_OI = score_OI * moment.mean_NN.diagonal().clamp_min(0).sqrt()
        found = sparsity.pattern_of(NAME, self.pattern)
        if found is not None:
            return sparsity.lowest_of_groups(score_OI, found)
        rows, columns = weight_OI.shape
        if self.by_row:
            return sparsity.lowest_of_rows(score_OI, self.of_row(columns))
        return sparsity.lowest(score_OI, self.gone(rows, columns))


METHOD = Wanda
