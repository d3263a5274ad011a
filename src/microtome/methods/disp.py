"""DISP-LLM: every half reads and writes coordinates of the stream of its own, learned with the neurons by masking.

Gao et al., NeurIPS 2024 (arXiv:2410.11988). Cutting the same coordinates of the stream everywhere costs much, and a
basis of its own for every junction costs shortcuts. Here the stream keeps its width; each half gathers some coordinates
behind the norm, which measures all of them, and adds what it writes to some, so that no weight changes:

    u = norm(x)[I1]     x[I2] += Attention(u)         Wq, Wk, Wv <- W[:, I1]    Wo <- Wo[I2]
    u = norm(x)[I3]     x[I5] += MLP(u)               Wg, Wu <- W[I4][:, I3]    Wd <- Wd[I5][:, I4]

The five masks m of every block are learned together, the model frozen, by the loss on text and the size T(m):

    minimise over the logits o   E_m[cross-entropy] + lambda |log(T(m) / T_wanted)|,    m ~ Bernoulli(sigmoid(o + 3))

A hypernetwork makes the logits: a fixed random vector [32] for each mask, a bidirectional GRU [2 x 64] over the masks
in their order, LayerNorm, GELU, and a matrix for each mask. The gradient through the draw is ReinMax's (Liu et al.,
2023), which for one bit is dL/do = dL/dm (1 - P(m)) / 2, right in expectation where L is quadratic in every bit.

The paper and its release differ; the default follows the paper, and what neither says is decided here.

* `estimator=gumbel` is the release: the loss sees soft masks, sigmoid((o + 3 + Gumbel) / 0.4), those of gated neurons
  squared, and the size sees other draws, rounded. Its lambda is 16, the paper's 6 (`penalty`).
* Masks are exported without noise: one threshold over all logits, at which the blocks store exactly what `keep` asks,
  to within one coordinate; the release draws once more. Every mask keeps at least one coordinate.
* T counts all that the blocks store: biases, norms, and the indices; paper and release count matrices. Heads are not
  cut. Under grouped queries the reading mask counts with what queries, keys and values store, as in the release for
  Qwen3.
* The vectors of the hypernetwork stay fixed, as the paper has them; the release trains them by mistake.
* `network=direct` learns every logit by itself, and `rate` 0 means 0.001 for the hypernetwork, 0.05 for that.
* `steps`: the paper takes 10,000 with 2,048 tokens each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from microtome import inner
from microtome.edit import Edit, Select
from microtome.errors import BadInput
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Learning, Masks, Stat

RATES = {"hyper": 1e-3, "direct": 5e-2}
PENALTIES = {"reinmax": 6.0, "gumbel": 16.0}


@dataclass(frozen=True)
class DISP:
    """Options of DISP-LLM; see the head of this file."""

    steps: int = 1000
    batch: int = 1
    rate: float = 0.0
    penalty: float = 0.0
    network: Literal["hyper", "direct"] = "hyper"
    estimator: Literal["reinmax", "gumbel"] = "reinmax"
    seed: int = 0

    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "global"
    rates: ClassVar[Mapping[Kind, float]] = {}
    multiple: ClassVar[int] = 1  # of all widths, unless told
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MASKS})
    targets: ClassVar[frozenset[Kind]] = frozenset(
        {Kind.ATTN_READ, Kind.ATTN_WRITE, Kind.MLP_READ, Kind.FFN, Kind.MLP_WRITE}
    )
    sequential: ClassVar[bool] = False

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse options out of range."""
        right = {
            "steps": (self.steps >= 1, "number from 1 on"),
            "batch": (self.batch >= 1, "number from 1 on"),
            "rate": (0.0 <= self.rate < math.inf, "number from 0 on"),
            "penalty": (0.0 <= self.penalty < math.inf, "number from 0 on"),
        }
        for option, words in ((name, words) for name, (is_right, words) in right.items() if not is_right):
            raise BadInput(f"{option}={getattr(self, option)} of disp is no {words}.")

    @property
    def learning(self) -> Learning:
        """How the masks are learned."""
        rate, penalty = self.rate or RATES[self.network], self.penalty or PENALTIES[self.estimator]
        return Learning(self.steps, rate, penalty, self.batch, self.seed, self.network, self.estimator)

    def scores(self, view: View) -> dict[str, list[float]]:
        """The logits of every mask: how much a coordinate is wanted for what it stores."""
        return {name: logits(view)[name].tolist() for name in view.spaces}

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The coordinates that are wanted most."""
        return [
            Select(space, inner.best(logits(view)[name], widths[name]))
            for name, space in view.spaces.items()
            if name in widths and widths[name] < space.size
        ]


def logits(view: View) -> Mapping[str, Tensor]:
    """What has been learned of a block, by space."""
    found = view.stats[Stat.MASKS]
    assert isinstance(found, Masks)
    return found.logits


METHOD = DISP
