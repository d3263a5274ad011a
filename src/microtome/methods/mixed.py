"""Mixed sparsity: more zeros in matrices that the loss hardly feels, fewer where it does; then SparseGPT's sweep.

Shao, Liu and Qian, ICASSP 2024 (arXiv:2310.09499). The linears inside the blocks keep their shapes. Two things differ
from `sparsegpt`. The saliency of a weight is what it costs without and with others making up for it, together; and
every matrix has a density of its own, by its rank among all K of them, from the least sensitive on:

    ISC_rc     = w_rc^2 (H_cc + 1 / [H^-1]_cc)              (in the sweep: U_cc^2 for [H^-1]_cc, see `sparsegpt`)
    sparsity_k = 1 - density + alpha (1 - 2 rank_k / (K - 1))
    sens_k     = tr(loss's Hessian of matrix k) / its number of weights

Zeros by themselves save neither memory nor time: the result is stored as densely as before.

What is done differently, and the option that gives the paper's or the release's way back:

* The paper's rule balances matrices, not weights: models come out denser than they were asked to be. Here all densities
  are moved by the same amount until the weights are as many as `density` says; `budget=matrices` is the paper's.
* `sensitivity=fisher` takes squared gradients, one backward pass for each sequence, in place of the Hessian's trace.
  `hutchinson` estimates the trace by `probes` random signs and two backward passes for each: for small models.
* `sensitivity_of=weight` is the paper's average over a matrix's weights; `matrix` is the trace that the release ranks.
* Linears are ranked; the release ranks norms beside them. `level=block` ranks the sums over blocks instead.
* `saliency=isc_released` has the first power of U_cc, as the release computes it with its own scale of H (windows of
  2048 tokens); its mask then depends on the scale of the activations. `obs` is SparseGPT's.
* `bits` and `group` round in the same sweep, as `sparsegpt` does; the paper rounds afterwards. Zeros stay zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import sparsity
from microtome.compensate import Choose, Columns
from microtome.edit import Correct
from microtome.errors import BadInput, NumericalFailure
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.sparsity import Counted, Key
from microtome.stats import Sample, Stat

NAME = "mixed"
LEAST, RELEASED = 0.01, 2.0 * 2048  # the lowest density of a matrix; by what the release multiplies H


@dataclass(frozen=True)
class Mixed:
    """Options of mixed sparsity; see the head of this file."""

    density: float = 0.5
    alpha: float = 0.1
    saliency: Literal["isc", "isc_released", "obs"] = "isc"
    sensitivity: Literal["fisher", "hutchinson"] = "fisher"
    sensitivity_of: Literal["weight", "matrix"] = "weight"
    level: Literal["matrix", "block"] = "matrix"
    budget: Literal["weights", "matrices"] = "weights"
    sequences: int = 16
    length: int = 0
    probes: int = 8
    damping: float = 0.01
    block: int = 128
    inputs: Literal["compressed", "stepwise", "original"] = "compressed"
    bits: int = 0
    group: int = 0

    dial: ClassVar[str] = "density"
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.WEIGHTS})
    needs: ClassVar[frozenset[Stat]] = sparsity.SITES | {Stat.GRADIENT}
    sequential = property(sparsity.is_sequential)
    stepwise = property(sparsity.is_stepwise)

    @property
    def sample(self) -> Sample:
        """The text that gradients are taken on, and how often curvature is probed."""
        return Sample(self.sequences, self.length or None, self.probes if self.sensitivity == "hutchinson" else 0)

    @property
    def idle(self) -> bool:
        """Whether nothing changes."""
        return self.density == 1.0 and not self.bits

    @property
    def share(self) -> float:
        """The fraction of weights that stays."""
        return self.density

    @property
    def told(self) -> str:
        """The dial in words."""
        return sparsity.told(self.density, sparsity.NO_PATTERN, self.bits)

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse densities that no matrix can have, and a sweep or sample that makes no sense."""
        sparsity.check_density(NAME, self.density, sparsity.NO_PATTERN)
        if not 0.0 <= self.alpha < 1.0:
            raise BadInput(
                f"alpha={self.alpha} of {NAME} is outside [0, 1): by so much densities differ from the mean."
            )
        if self.sensitivity == "hutchinson" and self.probes < 1:
            raise BadInput(f"probes={self.probes} of {NAME}: sensitivity=hutchinson needs at least 1.")
        sparsity.check_sweep(NAME, self.damping, self.block)
        sparsity.check_grid(NAME, self.bits, self.group)
        _ = self.sample

    def zeros(self, config: MicrotomeConfig) -> int:
        """As many as the density says, of all matrices together."""
        return sparsity.gone(sparsity.weights(config), self.density)

    def learn(self, view_of: Callable[[int], View], widths: Mapping[str, int]) -> Counted:
        """The method with the zeros of every matrix, from the sensitivities of all."""
        config = view_of(0).config
        felt: dict[Key, float] = {}
        for block in range(config.num_hidden_layers):
            view = view_of(block)
            felt |= {(block, name): self.felt(view, name) for name in sparsity.linears(view)}
        sizes = {(block, name): rows * columns for block, name, (rows, columns) in sparsity.shapes(config)}
        return Counted(self, self.counted(felt, sizes), sparsity.SITES)

    def felt(self, view: View, name: str) -> float:
        """How much the loss feels a matrix; estimates below zero count as above, as in the release."""
        curved_OI = view.squares[f"{name}.weight"].double()
        found = float((curved_OI.mean() if self.sensitivity_of == "weight" else curved_OI.sum()).abs())
        if not torch.isfinite(torch.tensor(found)):
            raise NumericalFailure(f"the sensitivity of {view.full(name)} is not finite. Try --dtype float32.")
        return found

    def counted(self, felt: Mapping[Key, float], sizes: Mapping[Key, int]) -> dict[Key, int]:
        """How many weights of every matrix are set to zero."""
        if self.level == "block":
            blocks = {block: sum(one for key, one in felt.items() if key[0] == block) for block, _ in felt}
            felt = {key: blocks[key[0]] for key in felt}
        densities = shared(felt, sizes, self.density, self.alpha, exact=self.budget == "weights")
        if self.budget == "weights":
            return sparsity.shares(densities, sizes, sparsity.gone(sum(sizes.values()), self.density))
        return {key: sparsity.gone(size, densities[key]) for key, size in sizes.items()}

    def solve(self, view: View) -> list[Correct]:
        """Only after `learn`, which knows how many weights of each matrix go."""
        raise AssertionError(f"{NAME} has not seen all blocks")

    def cut(self, view: View, counts: Mapping[Key, int]) -> list[Correct]:
        """The sweep over every matrix of the view."""
        score = {"isc": isc, "isc_released": isc_released, "obs": sparsity.obs}[self.saliency]

        def chooser(name: str, weight_OI: Tensor) -> Choose:
            mask = sparsity.by_blocks(counts[view.block, name], score)
            return sparsity.rounded(mask, weight_OI, self.bits, self.group) if self.bits else mask

        return sparsity.sweep(view, chooser, block=self.block, damping=self.damping)


def isc(weight_OB: Tensor, columns: Columns, at: slice) -> Tensor:
    """What a weight costs without others making up for it and with that, together."""
    return weight_OB.square() * (columns.energy[at] + columns.spread[at].square().reciprocal())


def isc_released(weight_OB: Tensor, columns: Columns, at: slice) -> Tensor:
    """The same with a first power, which changes its weight with the scale of H: taken at that of the release."""
    return weight_OB.square() * (RELEASED * columns.energy[at] + RELEASED**0.5 / columns.spread[at])


def shared(
    felt: Mapping[Key, float], sizes: Mapping[Key, int], density: float, alpha: float, *, exact: bool
) -> dict[Key, float]:
    """Densities by rank: from `alpha` below the mean for what is felt least to `alpha` above it.

    `exact` moves them all until their mean over weights is `density`; else their mean over matrices is. Equal
    sensitivities share a rank.
    """
    ranks = {value: rank for rank, value in enumerate(sorted(set(felt.values())))}
    last = max(len(ranks) - 1, 1)
    tilt = {key: alpha * (2 * ranks[one] / last - 1) if len(ranks) > 1 else 0.0 for key, one in felt.items()}
    total, low, high = sum(sizes.values()), -1.0, 1.0

    def moved(by: float) -> dict[Key, float]:
        return {key: min(max(density + lean + by, min(LEAST, density)), 1.0) for key, lean in tilt.items()}

    if not exact:
        return moved(0.0)
    for _ in range(100):
        middle = (low + high) / 2
        mean = sum(share * sizes[key] for key, share in moved(middle).items()) / total
        low, high = (middle, high) if mean < density else (low, middle)
    return moved(high)


METHOD = Mixed
