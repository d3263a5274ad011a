"""LLM Surgeon for single weights: set to zero what the loss needs least, by its curvature, the others making up for it.

van der Ouderaa et al., ICLR 2024 (arXiv:2312.17244); `surgeon` cuts whole coordinates by the same curvature. The
linears inside the blocks keep their shapes. With G x A for Fisher's matrix of a linear, a weight costs

    w_rc^2 / (2 [G^-1]_rr [A^-1]_cc)

in units of the loss; every matrix loses the same share, the cheapest first, and for the set Q of its removed weights
W' = W - G^-1 S A^-1, where S holds the solution l of ([G^-1]_rr' [A^-1]_cc')_QQ l = w_Q at its places. Zeros by
themselves save neither memory nor time: the result is stored as densely as before.

What is done differently, and the option that gives the paper's or the release's way back:

* Q is too large to solve for at once. As in the release, rows that follow each other are taken together as long as
  no more than `correlate` removed weights are, each group on what those before it have left; the release takes 2000.
  `update=none` leaves what stays as it is.
* `rank=2` takes Fisher's matrix for the sum of two such products (`pairs`); costs and updates are exact there, too.
* `scope=model` is the paper's one threshold for the whole model. Single costs understate what goes jointly, and on four
  of five small models it does worse.
* `pattern=2:4` (4:8, ...) keeps the dearest of every group of inputs. The release counts on a bias column, so that
  without one its groups straddle rows.
* As many weights go as the density says, rounded in every matrix, or exactly with `scope=model`. Biases make up for
  what goes and never go.
* One shot: several are several steps of a recipe, with densities that fall.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import kronecker, pairs, sparsity
from microtome.edit import Correct
from microtome.errors import BadInput
from microtome.inner import View
from microtome.kronecker import Metric
from microtome.modeling_microtome import MicrotomeConfig
from microtome.pairs import Pair
from microtome.space import Kind
from microtome.sparsity import Counted, Key
from microtome.stats import Curvature, Sample, Stat

NAME = "surgeon_weights"


@dataclass(frozen=True)
class SurgeonWeights:
    """Options of LLM Surgeon for single weights; see the head of this file."""

    density: float = 0.5
    pattern: str = sparsity.NO_PATTERN
    scope: Literal["matrix", "model"] = "matrix"
    update: Literal["grouped", "none"] = "grouped"
    correlate: int = 500
    damp_a: float = 0.01
    damp_g: float = 0.1
    rank: int = 1
    sequences: int = 128
    length: int = 0
    labels: Literal["data", "model"] = "data"
    seed: int = 0

    dial: ClassVar[str] = "density"
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.WEIGHTS})
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.FISHER})
    sequential: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False

    @property
    def curvature(self) -> Curvature:
        """What the factors are taken on."""
        return Curvature(Sample(self.sequences, self.length or None), self.labels, self.seed, self.rank)

    @property
    def share(self) -> float:
        """The fraction of weights that stays."""
        return sparsity.density_of(NAME, self.density, self.pattern)

    @property
    def idle(self) -> bool:
        """Whether nothing changes."""
        return self.share == 1.0

    @property
    def told(self) -> str:
        """The dial in words."""
        return sparsity.told(self.density, self.pattern)

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse densities, patterns and numbers that make no sense, or do not fit a matrix."""
        sparsity.check_density(NAME, self.density, self.pattern)
        sparsity.check_pattern(config, NAME, self.pattern)
        kronecker.check_damping(NAME, self.damp_a, self.damp_g)
        kronecker.check_rank(NAME, self.rank)
        if self.correlate < 1:
            raise BadInput(f"correlate={self.correlate} of {NAME} is no number of weights.")
        _ = self.curvature

    def zeros(self, config: MicrotomeConfig) -> int:
        """As many as the density says, of all matrices together or of every one."""
        if self.by_threshold:
            return sparsity.gone(sparsity.weights(config), self.share)
        return sum(sparsity.gone(rows * columns, self.share) for _, _, (rows, columns) in sparsity.shapes(config))

    @property
    def by_threshold(self) -> bool:
        """Whether weights of all matrices compete."""
        return self.scope == "model" and self.pattern == sparsity.NO_PATTERN

    def matrices(self, view: View) -> dict[str, tuple[Tensor, Metric | Pair]]:
        """Every linear of the view and its metric."""
        return pairs.matrices(view, sparsity.linears(view), self.damp_a, self.damp_g, "same")

    def learn(self, view_of: Callable[[int], View], widths: Mapping[str, int]) -> "SurgeonWeights | Counted":
        """The method with the zeros of every matrix, from the costs of all weights, 4 bytes each."""
        if not self.by_threshold:
            return self
        config, costs = view_of(0).config, dict[Key, Tensor]()
        for block in range(config.num_hidden_layers):
            view = view_of(block)
            for name, (weight_OI, metric) in self.matrices(view).items():
                inputs = view.weights[f"{name}.weight"].shape[1]
                costs[block, name] = metric.elements(weight_OI)[:, :inputs].float().flatten()
        return Counted(self, below_threshold(costs, self.zeros(config)), self.needs)

    def solve(self, view: View) -> list[Correct]:
        """Every matrix of the view, each with its share of zeros."""
        sizes = {name: weight.numel() for name, weight in sparsity.linears(view).items()}
        return self.cut(view, {(view.block, name): sparsity.gone(size, self.share) for name, size in sizes.items()})

    def cut(self, view: View, counts: Mapping[Key, int]) -> list[Correct]:
        """New weights and biases of every matrix, the cheapest so many weights being zero."""
        pattern, edits = sparsity.pattern_of(NAME, self.pattern), list[Correct]()
        for name, (weight_OI, metric) in self.matrices(view).items():
            like = view.weights[f"{name}.weight"]
            inputs = like.shape[1]
            cost_OI = metric.elements(weight_OI)[:, :inputs]
            gone_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
            gone_OI[:, :inputs] = (
                sparsity.lowest(cost_OI, counts[view.block, name])
                if pattern is None
                else sparsity.lowest_of_groups(cost_OI, pattern)
            )
            if self.update == "grouped":
                new_OI = metric.without_elements(weight_OI, gone_OI, self.correlate)
            else:
                new_OI = weight_OI.masked_fill(gone_OI, 0.0)
            edits.append(Correct(view.full(f"{name}.weight"), new_OI[:, :inputs].to(like)))
            if weight_OI.shape[1] > inputs:
                edits.append(Correct(view.full(f"{name}.bias"), new_OI[:, -1].to(like)))
        return edits


def below_threshold(costs: Mapping[Key, Tensor], total: int) -> dict[Key, int]:
    """How many of the `total` cheapest weights of all lie in every matrix; ties go to those that come first."""
    if not total:
        return dict.fromkeys(costs, 0)
    threshold = torch.cat(list(costs.values())).kthvalue(total).values
    counts = {key: int((cost < threshold).sum()) for key, cost in costs.items()}
    left = total - sum(counts.values())
    for key, cost in costs.items():
        more = min(left, int((cost == threshold).sum()))
        counts[key] += more
        left -= more
    return counts


METHOD = SurgeonWeights
