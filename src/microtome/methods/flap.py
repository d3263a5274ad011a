"""FLAP: cut the channels whose activations vary least, and put their mean into a bias.

An et al., AAAI 2024 (arXiv:2312.11983). What an output or down projection loses with column j is a constant plus a
fluctuation. The constant goes into a bias; the columns with the smallest fluctuation go.

    score_j = Var[X_j] ||W_:j||^2          (WIFV: the expected square of what stays wrong behind the bias)
    b'      = b + W_:P E[X_P]              (P: what is cut)

What is cut are neurons, by the columns of the down projection, and whole heads, by those of the output projection. Over
all blocks the scores are standardised, block by block and projection by projection, (score - mean) / deviation, and one
threshold decides (AL-AM, the default). `--allocate uniform` is UL-UM: every block loses the same.

What is decided here, and the option that gives the release's way back where they differ:

* A head's unit is a key-value group with all its query heads: its score is the mean over their columns.
* `squared=true` squares the scores of the output projection before they are standardised, as the release does; the text
  does not say so.
* The budget is counted in parameters, so no weight for heads against neurons is needed. Every block keeps at least
  one group and a few neurons.
* `compensate=false` leaves the bias out: a decoder without biases stays one.
* `inputs=compressed` measures the means behind what is cut already; the budget is spent by the uncut model either way.
* Variances are of all calibration tokens at once, in fp64; the release's running update skips its first sample.
* AL-MM, which fixes the number of heads first, is left out: a table of widths says the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from microtome import columns, inner, members
from microtome.edit import Correct, Edit, Select
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Space
from microtome.stats import Moment, Stat


@dataclass(frozen=True)
class FLAP:
    """Options of FLAP; see the head of this file."""

    metric: Literal["wifv", "ifv", "wifn"] = "wifv"
    compensate: bool = True
    squared: bool = False
    inputs: Literal["original", "compressed"] = "original"
    spaces: Literal["ffn+heads", "ffn", "heads"] = "ffn+heads"

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.NEURONS, Stat.HEADS})
    allocation: ClassVar[str] = "global"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def biased(self) -> bool:
        """Whether every output and down projection gets a bias."""
        return self.compensate

    @property
    def targets(self) -> frozenset[Kind]:
        """Neurons and key-value groups, or one of them."""
        return members.kinds(self.spaces)

    @property
    def sequential(self) -> bool:
        """Whether blocks are measured behind those that are cut already."""
        return self.inputs == "compressed"

    def check(self, config: MicrotomeConfig) -> None:
        """Every decoder has output and down projections."""

    def fluctuation(self, weight_OC: Tensor, moment: Moment, kind: Kind) -> Tensor:
        """The metric of every column [C]."""
        energy_C, mean_C = moment.mean_NN.diagonal(), moment.mean_N
        variance_C = (energy_C - mean_C.pow(2)).clamp_min(0)
        score_C = {
            "wifv": variance_C * weight_OC.double().pow(2).sum(0),
            "ifv": variance_C,
            "wifn": weight_OC.double().abs().mean(0) * energy_C.clamp_min(0).sqrt(),
        }[self.metric]
        return score_C.pow(2) if self.squared and kind is Kind.HEADS else score_C

    def worth(self, view: View, kind: Kind) -> Tensor:
        """The metric of every column of a kind's reader."""
        return self.fluctuation(view.weights[f"{columns.READER[kind]}.weight"], view.moment(columns.SITE[kind]), kind)

    def scores(self, view: View) -> dict[str, list[float]]:
        """Standardised over the columns of a projection; the mean over the columns of a group."""
        found: dict[str, list[float]] = {}
        for kind in self.targets:
            for space in view.of_kind(kind):
                score_C = self.worth(view, kind)
                spread = score_C.std(correction=0).clamp_min(1e-300)
                found[members.dial(view, kind)] = per_unit((score_C - score_C.mean()) / spread, space).tolist()
        return found

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The columns that fluctuate most, and the mean of the others as a bias."""
        edits: list[Edit] = []
        for kind, rank in columns.widths_by_kind(view, widths).items():
            for space in view.of_kind(kind):
                moment = view.moment(columns.SITE[kind])
                moment.check(f"block {view.block}", 1)
                kept_R = inner.best(per_unit(self.worth(view, kind), space), rank)
                edits.append(Select(space, kept_R))
                if self.compensate:
                    edits.append(compensation(view, kind, moment, columns.columns_of(space)[kept_R].flatten()))
        return edits


def per_unit(score_C: Tensor, space: Space) -> Tensor:
    """The mean over the columns of every coordinate [N]."""
    return score_C[columns.columns_of(space)].mean(1)


def compensation(view: View, kind: Kind, moment: Moment, kept_R: Tensor) -> Correct:
    """The bias of a kind's reader with what its other columns add on average."""
    reader = columns.READER[kind]
    weight_OC = view.weights[f"{reader}.weight"]
    lost_C = moment.mean_N.clone()
    lost_C[kept_R] = 0.0
    bias_O = weight_OC.double() @ lost_C
    if (old_O := view.weights.get(f"{reader}.bias")) is not None:
        bias_O += old_O
    return Correct(view.full(f"{reader}.bias"), bias_O.to(weight_OC.dtype))


METHOD = FLAP
