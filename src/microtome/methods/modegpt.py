"""MoDeGPT: factor pairs of matrices inside a block, each by the decomposition that its nonlinearity allows.

Lin et al., ICLR 2025 (arXiv:2408.09632). Between the two matrices of a pair lie neurons, query-key channels or value
channels; fewer of them are kept, and what the pair computes on calibration tokens changes least.

    I   neurons          keep those with the largest [C (C + lambda I)^-1]_jj, refit what reads them   (Nystrom)
    II  queries, keys    keep those with the largest E[q_i^2] E[k_i^2]                                 (CR)
    III values, output   truncate the SVD of C^1/2 W_v W_o                                             (SVD)
    sparsity of block l: proportional to softmax(-s / 0.1)_l, s its influence

No code of the authors is known. Type III needs no root of the stream's moment: with R^T R = W_v C W_v^T the factors are
U^T R^-T W_v and W_o R^T U, U the leading eigenvectors of R W_o^T W_o R^T, and a whole group of query heads is one such
problem. What is done differently, and the option that takes it back:

* `score=obs` sees the down projection, and so what is lost; `ridge` is the paper's leverage, which does not.
* `damping`: the refit is tied to the weights as they are. Towards 0 it is the paper's pseudo-inverse.
* `qk=svd`: without a rotary any channels of queries and keys can be mixed, and the scores have a best low rank. Keys
  count without their mean: it moves all scores of a query alike, which softmax does not see. `cr` selects.
* `qk_rate=0.5`: query-key channels lose half of what the others do; 1 is the paper's.
* With a rotary whole pairs are kept, (E[q_i^2] + E[q_i'^2]) (E[k_i^2] + E[k_i'^2]), which no position changes.
* `values=contexts`: values are measured as attention has mixed them, and the output projection is refitted to all heads
  at once; `stream` is the paper's C of single tokens, a head by itself.
* `vo_gqa=stacked` is the optimum for all query heads of a group; `paper` truncates by the values alone.
* `split=balanced` gives both factors the root of the singular values; `paper` gives them to the values.
* `means=auto`: a bias behind a pair takes up what the cut moves on average; `all` adds such biases; `paper` only moves
  the value bias there, exactly, since attention weights sum to one. Without such a bias it is cut with the values.
* `inputs=compressed`: each half is measured behind what is cut already; `original` is the paper's one pass.
* Under a norm of queries and keys these are left alone.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import columns, inner
from microtome.edit import Correct, Edit, Rewrite, Select
from microtome.errors import BadInput, UnknownName, UnsupportedModel
from microtome.inner import View
from microtome.linalg import eigh_descending
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Space
from microtome.stats import Moment, Stat

SPACES = {"ffn": Kind.FFN, "qk": Kind.QK, "vo": Kind.VO}
OUT = {Kind.FFN: "mlp.down_proj", Kind.VO: "self_attn.o_proj"}
DEAD = 1e-12  # of the largest energy: what is below it is rounding


@dataclass(frozen=True)
class MoDeGPT:
    """Options of MoDeGPT; see the head of this file."""

    spaces: str = "all"  # or some of ffn, qk, vo, with commas
    score: Literal["obs", "wanda", "l2", "ridge"] = "obs"
    ridge: float = 0.01  # of the mean diagonal of C, in the score
    damping: float = 0.01  # the same, in the refit
    qk: Literal["svd", "cr"] = "svd"
    qk_rate: float = 0.5  # what query-key channels lose, relative to the others
    values: Literal["contexts", "stream"] = "contexts"  # what value channels are measured by
    vo_gqa: Literal["stacked", "paper"] = "stacked"
    split: Literal["balanced", "paper"] = "balanced"
    means: Literal["auto", "all", "paper"] = "auto"
    inputs: Literal["compressed", "original"] = "compressed"

    allocation: ClassVar[str] = "influence"
    through_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in self.named:
            if name not in SPACES:
                raise UnknownName("space of modegpt", name, ("all", *SPACES))
        for name, value in (("ridge", self.ridge), ("damping", self.damping)):
            if not 0.0 <= value < math.inf:
                raise BadInput(f"{name}={value} of modegpt is no number from 0 on.")
        if not 0.0 <= self.qk_rate <= 1.0:
            raise BadInput(f"qk_rate={self.qk_rate} of modegpt is no share from 0 to 1 of what the others lose.")

    @property
    def named(self) -> Sequence[str]:
        """The spaces as the option names them."""
        return list(SPACES) if self.spaces == "all" else [name.strip() for name in self.spaces.split(",")]

    @property
    def targets(self) -> frozenset[Kind]:
        """Neurons, query-key and value channels, or some of them."""
        return frozenset(SPACES[name] for name in self.named)

    @property
    def needs(self) -> frozenset[Stat]:
        """What the down projection reads, and what queries, keys and values do."""
        values = Stat.HEADS if self.values == "contexts" else Stat.ATTENTION
        sites = {Kind.FFN: {Stat.NEURONS}, Kind.QK: {Stat.ATTENTION, values}, Kind.VO: {values}}
        return frozenset(site for kind in self.targets for site in sites[kind])

    @property
    def sequential(self) -> bool:
        """Whether halves are measured behind those that are cut already."""
        return self.inputs == "compressed"

    @property
    def biased(self) -> bool:
        """Whether projections without a bias get one."""
        return self.means == "all"

    @property
    def rates(self) -> Mapping[Kind, float]:
        """Query-key channels may be spared."""
        return {Kind.QK: self.qk_rate}

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse to cut nothing but query-key channels that a norm measures."""
        if config.qk_norm is not None and self.targets == frozenset({Kind.QK}):
            raise UnsupportedModel(
                f"this {config.source_model_type} norms its queries and keys, and modegpt leaves such channels alone: "
                "name other spaces, such as spaces=ffn,vo."
            )

    def scores(self, view: View) -> dict[str, list[float]]:
        """What share of a half's output is lost with every unit of a width, per parameter, for budgets over all blocks.

        Shares, since the stream grows: an early block writes little, and all behind it read that.
        """
        heads, lost, whole = Heads(view), dict[Kind, list[Tensor]](), dict[Kind, float]()
        if view.of_kind(Kind.FFN):
            moment, weight = self.seen_neurons(view), view.weights["mlp.down_proj.weight"]
            lost[Kind.FFN] = [columns.worth(weight, moment, "obs", self.ridge)]
            whole[Kind.FFN] = float(((weight.double() @ moment.mean_NN) * weight).sum())
        for kind, errors in ((Kind.VO, self.output_errors), (Kind.QK, self.score_errors)):
            if spaces := view.of_kind(kind):
                lost[kind] = [errors(heads, space) for space in spaces]
                values = inner.spaces_of(view.config, view.block, [Kind.VO]).values()
                whole[kind] = sum(float(self.output_errors(heads, space).sum()) for space in values)
        units = {kind: torch.stack([one.sort(descending=True).values for one in lost[kind]]).sum(0) for kind in lost}
        return {
            f"{view.block}.{inner.NAMES[kind]}": (one / max(whole[kind], 1e-300) / inner.cost(view, kind)).tolist()
            for kind, one in units.items()
        }

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The three types, as far as the view has them and they get narrower."""
        edits: list[Edit] = []
        asked = columns.widths_by_kind(view, widths).items()
        ranks = {kind: rank for kind, rank in asked if any(rank < space.size for space in view.of_kind(kind))}
        if Kind.FFN in ranks:
            edits += self.neurons(view, ranks[Kind.FFN])
        heads = Heads(view)
        if Kind.QK in ranks:
            edits += [self.query_key(heads, space, ranks[Kind.QK]) for space in view.of_kind(Kind.QK)]
        if Kind.VO in ranks:
            edits += self.value_output(heads, ranks[Kind.VO])
        return edits

    def gathers(self, view: View, kind: Kind) -> bool:
        """Whether there is a bias behind the pair."""
        return self.biased or f"{OUT[kind]}.bias" in view.weights

    def takes_means(self, view: View, kind: Kind) -> bool:
        """Whether that bias takes up what the cut moves on average."""
        return self.means != "paper" and self.gathers(view, kind)

    # --- type I -----------------------------------------------------------------------------------------------------

    def seen_neurons(self, view: View) -> Moment:
        """The neurons' sums, about their mean where a bias gathers that."""
        moment = view.moment(Stat.NEURONS)
        moment.check(f"block {view.block}", 1)
        return centred(moment) if self.takes_means(view, Kind.FFN) else moment

    def neurons(self, view: View, rank: int) -> list[Edit]:
        """The best neurons, the down projection refitted to them."""
        moment, weight = self.seen_neurons(view), view.weights["mlp.down_proj.weight"]
        if self.score == "ridge":
            worth = leverage(moment.mean_NN, self.ridge)
        else:
            worth = columns.worth(weight, moment, self.score, self.ridge)
        chosen = columns.selected(view, Kind.FFN, rank, worth)
        edits = columns.refitted(view, Kind.FFN, chosen, moment, self.damping)
        if not self.takes_means(view, Kind.FFN):
            return edits
        mean_N, (refit,) = view.moment(Stat.NEURONS).mean_N, [one for one in edits if isinstance(one, Correct)]
        moved_D = weight.double() @ mean_N - refit.value.double() @ mean_N[columns.left(chosen)]
        return [*edits, added(view, Kind.FFN, moved_D)]

    # --- type II ----------------------------------------------------------------------------------------------------

    def query_key(self, heads: "Heads", space: Space, rank: int) -> Select | Rewrite:
        """A selection of channels, or the best low rank of the scores."""
        if not self.mixes(space):
            left = inner.turning(space.pairs, space.size, rank)
            return Select(space, inner.best_channels(space, channels(heads, space), rank, left))
        shrink, grow, _ = self.low_rank(heads, space)
        return Rewrite(space, shrink[:rank], grow[:, :rank])

    def mixes(self, space: Space) -> bool:
        """Whether channels of queries and keys are mixed, not selected."""
        return self.qk == "svd" and not space.pairs

    def low_rank(self, heads: "Heads", space: Space) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of queries and keys by falling share in the scores, and these shares, as `oblique` has them."""
        return oblique(heads.energy(space, "q_proj"), heads.spread(space, "k_proj"), power=0.5)

    def score_errors(self, heads: "Heads", space: Space) -> Tensor:
        """What the half's output may lose with each channel, [N]: the energy of its scores times that of the values.

        A pair that turns freely has half the energy of its product in each score, and two channels.
        """
        if self.mixes(space):
            errors_N = self.low_rank(heads, space)[2]
        else:
            errors_N = channels(heads, space)
            pairs_P = errors_N[: space.pairs]
            errors_N = torch.cat([pairs_P / 4, pairs_P / 4, errors_N[2 * space.pairs :]])
        sizes = heads.view.sizes
        scale = sizes.head_dim**-0.5 if sizes.attention_scale is None else sizes.attention_scale
        name = space.name.replace(".qk.", ".vo.")
        values = inner.spaces_of(heads.view.config, heads.view.block, [Kind.VO])[name]
        times = sizes.num_attention_heads // sizes.num_key_value_heads
        heard = heads.mixed(values, about_mean=True) if self.values == "contexts" else heads.spread(values, "v_proj")
        return errors_N * scale**2 * (heard * readers(heads.view, values)).sum() / times

    # --- type III ---------------------------------------------------------------------------------------------------

    def gathered(self, heads: "Heads", space: Space) -> Tensor:
        """What of the values' mean the output bias takes over, [N]."""
        if not self.gathers(heads.view, Kind.VO):
            return torch.zeros(space.size, dtype=torch.float64)
        return heads.bias(space, "v_proj") if self.means == "paper" else heads.mean(space, "v_proj")

    def written(self, heads: "Heads", space: Space) -> Tensor:
        """The second moment [N, N] of contexts or of single tokens' values, without what the output bias takes over."""
        if self.values == "contexts":
            return heads.mixed(space, about_mean=self.takes_means(heads.view, Kind.VO))
        left_N = heads.mean(space, "v_proj") - self.gathered(heads, space)
        return heads.spread(space, "v_proj") + torch.outer(left_N, left_N)

    def output_errors(self, heads: "Heads", space: Space) -> Tensor:
        """What the output loses with each channel, [N]; all of it together is what the group writes."""
        return oblique(self.written(heads, space), readers(heads.view, space), power=0.5)[2]

    def truncated(self, heads: "Heads", space: Space, rank: int) -> Rewrite:
        """The values that say most of the output of all query heads, or of the values themselves."""
        reader_NN = readers(heads.view, space)
        if columns.columns_of(space).shape[1] > 1 and self.vo_gqa == "paper":
            reader_NN = torch.eye(space.size, dtype=torch.float64)
        power = 0.5 if self.split == "balanced" else 1.0
        shrink_NN, grow_NN, _ = oblique(self.written(heads, space), reader_NN, power)
        return Rewrite(space, shrink_NN[:rank], grow_NN[:, :rank])

    def value_output(self, heads: "Heads", rank: int) -> list[Edit]:
        """The truncated values of every group; the output projection refitted to all of them, or its bias moved."""
        view, found = heads.view, [self.truncated(heads, space, rank) for space in heads.view.of_kind(Kind.VO)]
        weight_DC, edits = view.weights["self_attn.o_proj.weight"], list[Edit](found)
        if self.values == "contexts":
            return edits + self.refitted(heads, found)
        if not self.gathers(view, Kind.VO):
            return edits
        moved_D = torch.zeros(len(weight_DC), dtype=torch.float64)
        for one in found:
            mean_N = self.gathered(heads, one.space)
            for at in columns.columns_of(one.space).T:
                moved_D += weight_DC[:, at].double() @ (mean_N - one.grow @ (one.shrink @ mean_N))
        return [*edits, added(view, Kind.VO, moved_D)]

    def refitted(self, heads: "Heads", found: Sequence[Rewrite]) -> list[Edit]:
        """The output projection of the contexts that are left, over all heads at once."""
        view, (mean_C, moment_CC) = heads.view, heads.contexts
        by_column = {int(at[0]): one for one in found for at in columns.columns_of(one.space).T}
        shrink_RC = torch.block_diag(*(by_column[first].shrink for first in sorted(by_column)))
        grow_CR = torch.block_diag(*(by_column[first].grow for first in sorted(by_column)))
        like, gathers = view.weights["self_attn.o_proj.weight"], self.takes_means(view, Kind.VO)
        weight_DC, moment_CC = like.double(), moment_CC - torch.outer(mean_C, mean_C) * gathers
        inner_RR = shrink_RC @ moment_CC @ shrink_RC.T
        damping = max(self.damping, DEAD) * inner_RR.diagonal().mean().clamp_min(1e-300)
        missed_DR = weight_DC @ (moment_CC @ shrink_RC.T - grow_CR @ inner_RR)
        solved_DR = torch.linalg.solve(inner_RR + damping * torch.eye(len(inner_RR)).double(), missed_DR.T).T
        refit_DR = weight_DC @ grow_CR + solved_DR
        edits: list[Edit] = [Correct(view.full("self_attn.o_proj.weight"), refit_DR.to(like.dtype))]
        if gathers:
            edits.append(added(view, Kind.VO, weight_DC @ mean_C - refit_DR @ (shrink_RC @ mean_C)))
        return edits


class Heads:
    """Moments of queries, keys and values, from those of the stream that they read; and of contexts, as measured."""

    def __init__(self, view: View) -> None:
        self.view = view

    @cached_property
    def stream(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of what queries, keys and values read."""
        moment = self.view.moment(Stat.ATTENTION)
        moment.check(f"block {self.view.block}", 1)
        return moment.mean_N, centred(moment).mean_NN

    @cached_property
    def contexts(self) -> tuple[Tensor, Tensor]:
        """Mean [C] and second moment [C, C] of what attention has mixed of the values, all heads side by side."""
        moment = self.view.moment(Stat.HEADS)
        moment.check(f"block {self.view.block}", 1)
        return moment.mean_N, moment.mean_NN

    def mixed(self, space: Space, *, about_mean: bool) -> Tensor:
        """Second moment or covariance of contexts [N, N], the mean over a group's query heads."""
        mean_C, moment_CC = self.contexts
        lost_C = mean_C * about_mean
        heads = [moment_CC[at][:, at] - torch.outer(lost_C[at], lost_C[at]) for at in columns.columns_of(space).T]
        return torch.stack(heads).mean(0)

    def rows(self, space: Space, linear: str) -> list[Tensor]:
        """Which rows of a linear belong to a space's coordinates [N], a head at a time."""
        name = self.view.full(f"self_attn.{linear}.weight")
        return list(next(axis.at for axis in space.axes if axis.tensor == name).T)

    def weights(self, space: Space, linear: str) -> list[Tensor]:
        """A linear's weight [N, D], a head at a time."""
        weight = self.view.weights[f"self_attn.{linear}.weight"]
        return [weight[at].double() for at in self.rows(space, linear)]

    def bias(self, space: Space, linear: str, head: int = 0) -> Tensor:
        """The bias of one head's rows [N]; zeros where there is none."""
        bias = self.view.weights.get(f"self_attn.{linear}.bias")
        return torch.zeros(space.size).double() if bias is None else bias[self.rows(space, linear)[head]].double()

    def mean(self, space: Space, linear: str, head: int = 0) -> Tensor:
        """The mean of one head's numbers [N]."""
        return self.weights(space, linear)[head] @ self.stream[0] + self.bias(space, linear, head)

    def spread(self, space: Space, linear: str) -> Tensor:
        """The covariance of the space's numbers [N, N], added up over its heads."""
        return torch.stack([weight @ self.stream[1] @ weight.T for weight in self.weights(space, linear)]).sum(0)

    def energy(self, space: Space, linear: str) -> Tensor:
        """The same with the means: the second moment."""
        means = torch.stack([self.mean(space, linear, head) for head in range(len(self.rows(space, linear)))])
        return self.spread(space, linear) + means.T @ means


def centred(moment: Moment) -> Moment:
    """The same sums about their mean."""
    made = copy(moment)
    made.upper_NN = (moment.upper_NN - torch.outer(moment.sum_N, moment.sum_N) / max(moment.tokens, 1)).triu()
    made.sum_N = torch.zeros_like(moment.sum_N)
    return made


def leverage(moment_NN: Tensor, ridge: float) -> Tensor:
    """Ridge leverage [C (C + lambda I)^-1]_jj of every coordinate [N]."""
    damping = max(ridge, DEAD) * moment_NN.diagonal().mean().clamp_min(1e-300)
    identity = torch.eye(len(moment_NN), dtype=torch.float64)
    return 1.0 - damping * torch.linalg.inv(moment_NN + damping * identity).diagonal()


def channels(heads: Heads, space: Space) -> Tensor:
    """E[q_i^2] E[k_i^2] of query-key channels [N]; a pair's joint score stands at its first half, 0 at the second."""
    query_N, key_N = (heads.energy(space, name).diagonal() for name in ("q_proj", "k_proj"))
    query_P, key_P = (one[: 2 * space.pairs].reshape(2, space.pairs).sum(0) for one in (query_N, key_N))
    return torch.cat([query_P * key_P, torch.zeros_like(query_P), (query_N * key_N)[2 * space.pairs :]])


def readers(view: View, space: Space) -> Tensor:
    """Sum over a group's query heads of W_o^T W_o, [N, N]."""
    weight_DC = view.weights["self_attn.o_proj.weight"].double()
    return torch.stack([weight_DC[:, at].T @ weight_DC[:, at] for at in columns.columns_of(space).T]).sum(0)


def oblique(writer_NN: Tensor, reader_NN: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """Maps shrink [N, N] and grow [N, N] whose first r rows and columns are the best of rank r, and what each adds [N].

    With E[z z^T] = `writer` = R^T R and M^T M = `reader`, the best approximation of M z through r numbers is
    M R^T U_r (U_r^T R^-T z), U the eigenvectors of R M^T M R^T by falling eigenvalue; the others add up to the error.
    `power` of the singular values goes to shrink. Directions of z without energy are left out.
    """
    values_N, vectors_NN = eigh_descending(writer_NN, "the channels of a head")
    alive_N = values_N > DEAD * values_N[0].clamp_min(1e-300)
    root_N = values_N.clamp_min(0.0).sqrt() * alive_N
    inverse_N = torch.where(alive_N, 1.0 / root_N.where(alive_N, torch.ones_like(root_N)), root_N)
    half_NN = root_N[:, None] * vectors_NN.T
    energy_N, turn_NN = eigh_descending(half_NN @ reader_NN @ half_NN.T, "the channels of a head")
    sigma_N = energy_N.clamp_min(0.0).sqrt()
    scale_N = sigma_N.where(sigma_N > DEAD * sigma_N[0], torch.ones_like(sigma_N)) ** power
    shrink_NN = scale_N[:, None] * (turn_NN.T @ (inverse_N[:, None] * vectors_NN.T))
    return shrink_NN, half_NN.T @ turn_NN / scale_N, energy_N.clamp_min(0.0)


def added(view: View, kind: Kind, moved_D: Tensor) -> Correct:
    """The bias of a pair's second matrix with a constant added."""
    name, like = f"{OUT[kind]}.bias", view.weights[f"{OUT[kind]}.weight"]
    bias = view.weights.get(name)
    total_D = moved_D if bias is None else bias.double() + moved_D
    return Correct(view.full(name), total_D.to(like.dtype))


METHOD = MoDeGPT
