"""DOTResize: merge coordinates by optimal transport onto those that are kept, instead of dropping the others.

Verma, Murray, Duh, 2025 (arXiv:2507.04517). Reconstructed from its abstracts and from what others wrote about it: there
is no published code, and nothing here was verified against the authors. Among N coordinates of the residual stream the
R strongest are kept; entropic transport moves the mass of all onto these, by how alike they are over tokens x that a
norm has handed on:

    C_ij = E|x_i - x_j|, j kept, over its mean     P = argmin <P, C> + entropy <P, log P - 1>, marginals 1/N and 1/R
    T = R P [N, R]      T = Q U, Q orthonormal, U triangular      shrink = Q^T, grow = Q

A norm lets an orthogonal map pass and no other, hence the factorisation; U cancels against what undoes T. So this is
SliceGPT with the span of T in place of the principal components, and runs on SliceGPT's engine: forms, shortcuts, tied
heads and files are the same. By least squares it can only lose to the principal components; what can speak for it is
robustness. What is decided here, with an option where that matters:

* `basis=global`: one map for the whole stream, from distances over all junctions, and a stock result. `junction` is one
  for each, behind what is cut already, as the paper has it.
* `dec`: readers see Q (`pinv`: T is undone by its pseudo-inverse), or the way back along the transport, U B with
  B = N P^T (`transport`), or SliceGPT's regression on the kept coordinates (`regressed`). The stream goes past by Q.
* `cost=l1` needs a sum of its own, over `tokens` evenly spaced tokens; `l2` follows from the second moment.
* `mass=even`: every kept coordinate takes its share 1/R, as published; `free`: as much as is nearest to it.
* `signed`: a coordinate may be merged with the negative of another: C = min(E|x_i - x_j|, E|x_i + x_j|).
* `merge=none` drops what is not kept, for comparison.
* A coordinate that is a copy of a kept one is kept only if nothing else is left; a map that is nearly singular is
  refused. At full width nothing is mapped. Under a LayerNorm that stays one, the ones vector is in every span.
* `space=ffn`, which is not the paper's: the same for the neurons of every feed-forward half, by `cost=l2`. Gate and up
  become T^T W, down W N P. Exact for copies, an approximation for all else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from microtome import inner
from microtome.edit import Edit, Rewrite, Select
from microtome.errors import BadInput, NumericalFailure, UnsupportedModel
from microtome.inner import View
from microtome.layout import even
from microtome.linalg import sinkhorn, to_uniform
from microtome.methods.slicegpt import SliceGPT, seen_by_readers
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Space, Symmetry
from microtome.stats import Moment, Stat
from microtome.surgery import Form, Gauge

COPY = 1e-6  # of the mean distance: coordinates that are this close are copies
MOST_CONDITION = 1e4


class Distances(Moment):
    """Second moments of all tokens, and mean distances E|x_i -+ x_j| [N, N] and sizes E|x_i| [N] of some."""

    def __init__(self, size: int, device: torch.device | str, every: int, *, signed: bool) -> None:
        super().__init__(size, device)
        self.every, self.signs = every, (1, -1) if signed else (1,)
        self.apart = {sign: torch.zeros(size, size, dtype=torch.float64, device=device) for sign in self.signs}
        self.size_N = torch.zeros(size, dtype=torch.float64, device=device)
        self.seen = 0

    def add(self, z: Tensor) -> None:
        """Count tokens z [..., N], and the distances of every so manieth."""
        z_TN = z.reshape(-1, z.shape[-1]).float()
        some_NT = z_TN[-self.tokens % self.every :: self.every].T.contiguous()
        for sign in self.signs:
            self.apart[sign] += torch.cdist(some_NT, sign * some_NT, p=1.0)
        self.size_N += some_NT.abs().sum(1)
        self.seen += some_NT.shape[1]
        super().add(z_TN)

    def add_moment(self, other: Moment) -> None:
        """Count another junction's."""
        super().add_moment(other)
        assert isinstance(other, Distances)
        for sign in self.signs:
            self.apart[sign] = self.apart[sign] + other.apart[sign].to(self.size_N.device)
        self.size_N = self.size_N + other.size_N.to(self.size_N.device)
        self.seen += other.seen

    def kept(self, into: Tensor) -> "Distances":
        """The same sums, stored beside `into` [N, N]."""
        other = super().kept(into)
        assert isinstance(other, Distances)
        other.apart = {sign: apart.to(into.device, copy=True) for sign, apart in self.apart.items()}
        other.size_N = self.size_N.to(into.device, copy=True)
        return other


@dataclass(frozen=True)
class DOTResize:
    """Options of DOTResize; see the head of this file."""

    space: Literal["residual", "ffn"] = "residual"
    basis: Literal["global", "junction"] = "global"
    dec: Literal["pinv", "transport", "regressed"] = "pinv"
    cost: Literal["auto", "l1", "l2"] = "auto"
    entropy: float = 0.1
    mass: Literal["even", "free"] = "even"
    merge: Literal["transport", "none"] = "transport"
    signed: bool = False
    tokens: int = 8192
    untie: bool = False

    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def engine(self) -> SliceGPT:
        """What carries a basis of the stream out."""
        return SliceGPT(
            basis=self.basis, untie=self.untie, readers="regressed" if self.dec == "regressed" else "transposed"
        )

    @property
    def targets(self) -> frozenset[Kind]:
        """The residual stream, or neurons."""
        return frozenset({Kind.RESIDUAL if self.space == "residual" else Kind.FFN})

    @property
    def needs(self) -> frozenset[Stat]:
        """Sums at the junctions, or of what the down projections read."""
        return frozenset({Stat.MOMENT if self.space == "residual" else Stat.NEURONS})

    @property
    def by(self) -> str:
        """The distance in force."""
        return self.cost if self.cost != "auto" else "l1" if self.space == "residual" else "l2"

    @property
    def split(self) -> bool:
        """A basis for every junction, or one for all."""
        return self.engine.split

    @property
    def sequential(self) -> bool:
        """Whether what is cut is measured behind what has been cut before it."""
        return self.space == "ffn" or self.engine.sequential

    @property
    def normed(self) -> bool:
        """The stream is measured behind its norm: tokens weigh the same."""
        return True

    @property
    def pooled(self) -> bool:
        """One basis needs only the total, unless readers are regressed by each junction's own."""
        return self.engine.pooled

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse options out of range, and models whose stream admits no rotation."""
        if not 1e-4 <= self.entropy < math.inf:
            raise BadInput(f"entropy={self.entropy} of dotresize is no number from 0.0001 on.")
        if self.tokens < 1:
            raise BadInput(f"tokens={self.tokens} of dotresize is no number of tokens from 1 on.")
        if self.space == "ffn":
            self.check_neurons()
        else:
            check_stream(config, untie=self.untie)
            self.engine.check_norms(config)

    def check_neurons(self) -> None:
        """Refuse options that only the stream has."""
        wrong = {
            "cost": self.cost == "l1",
            "signed": self.signed,
            "basis": self.basis == "junction",
            "dec": self.dec != "pinv",
            "untie": self.untie,
        }
        for option in (name for name, is_wrong in wrong.items() if is_wrong):
            value = str(getattr(self, option)).lower()
            raise BadInput(f"{option}={value} of dotresize is for the residual stream: neurons have no such thing.")

    def sums(self, size: int, tokens: int, device: torch.device) -> Moment:
        """Empty sums of a junction that `tokens` tokens will pass; distances are taken of some."""
        if self.by == "l2" or self.merge == "none":
            return Moment(size, device)
        return Distances(size, device, max(1, tokens // self.tokens), signed=self.signed)

    def form(self, config: MicrotomeConfig) -> Form:
        """SliceGPT's."""
        return self.engine.form(config)

    def whole_head(self, *, by_slice: bool) -> bool:
        """As SliceGPT has it: under the paper's dial the last of several bases is left whole."""
        return self.engine.whole_head(by_slice=by_slice)

    def join(self, config: MicrotomeConfig, width: int) -> Gauge | None:
        """SliceGPT's shortcuts."""
        return self.engine.join(config, width)

    def scores(self, view: View) -> dict[str, list[float]]:
        """By neuron: the root mean square of its activation per stored number."""
        if not view.of_kind(Kind.FFN):
            return {}
        size_N = view.moment(Stat.NEURONS).mean_NN.diagonal().clamp_min(0).sqrt() / inner.cost(view, Kind.FFN)
        return {f"{view.block}.ffn": size_N.sort(descending=True).values.tolist()}

    def solve(
        self, seen: View | Sequence[Space], sums: Mapping[str, Any], ranks: Mapping[str, int] | None = None
    ) -> list[Any]:
        """The edits of a half's neurons, by their widths; or of junctions, by their sums and ranks."""
        if isinstance(seen, View):
            return self.merged_neurons(seen, sums)
        assert ranks is not None
        if not self.split:
            found = self.basis_of(seen[0], pooled(sums), ranks[seen[0].name])
            bases = dict.fromkeys((space.name for space in seen), found)
        else:
            bases = {space.name: self.basis_of(space, sums[space.name], ranks[space.name]) for space in seen}
        return [self.edit(space, *bases[space.name], sums.get(space.name)) for space in seen]

    def edit(self, space: Space, basis_NR: Tensor, back_NR: Tensor, moment: Moment | None) -> Rewrite:
        """A junction in its basis; what readers see of it is up to `dec`."""
        if self.dec == "regressed":
            assert moment is not None
            return Rewrite.orthogonal(space, basis_NR, partial(seen_by_readers, basis_NR, moment, self.engine.ridge))
        return Rewrite.orthogonal(space, basis_NR, (lambda: back_NR) if self.dec == "transport" else None)

    def basis_of(self, space: Space, moment: Moment, rank: int) -> tuple[Tensor, Tensor]:
        """Orthonormal columns Q [N, rank] that span T, and the way back along the transport (U B)^T [N, rank].

        Where the space is centred, Q holds the ones vector as the uniform vector of the new coordinates.
        """
        moment.check(space.name, 1)
        if rank == space.size:
            whole_NN = torch.eye(space.size, dtype=torch.float64)
            return whole_NN, whole_NN
        if space.symmetry is not Symmetry.CENTRED:
            map_NR, back_NR = self.map_of(moment, rank, space.name)
            basis_NR, upper_RR = factored(map_NR, space.name)
            return basis_NR, back_NR @ upper_RR.T
        map_NR, back_NR = self.centred_map(moment, rank, space.name)
        basis_NR, upper_RR = factored(map_NR, space.name)
        ones_N1 = torch.full((space.size, 1), space.size**-0.5, dtype=torch.float64)
        both = [torch.cat([one_NR, ones_N1], 1) @ to_uniform(rank) for one_NR in (basis_NR, back_NR @ upper_RR.T)]
        return both[0], both[1]

    def centred_map(self, moment: Moment, rank: int, what: str) -> tuple[Tensor, Tensor]:
        """T less its means and B^T, both [N, rank - 1], for a stream without a mean.

        The columns of T add up to a multiple of the ones vector where every coordinate gives and takes its share: less
        their means, one of them follows from the others. Else there is a column less from the start.
        """
        map_NR, back_NR = self.map_of(moment, rank, what)
        total_N = map_NR.sum(1)
        if (total_N - total_N.mean()).abs().max() <= 1e-3 * total_N.mean().abs():
            map_NR, back_NR = map_NR[:, :-1], back_NR[:, :-1] - back_NR[:, -1:]
        else:
            map_NR, back_NR = self.map_of(moment, rank - 1, what)
        return map_NR - map_NR.mean(0), back_NR

    def map_of(self, moment: Moment, rank: int, what: str) -> tuple[Tensor, Tensor]:
        """T and B^T, both [N, rank]: merged coordinates are x T, and x comes back as x T B."""
        apart_NN, signs_NN, size_N = self.measured(moment)
        if not torch.isfinite(apart_NN).all():
            raise NumericalFailure(f"distances at {what} are not finite: the model overflows. Try --dtype float32.")
        kept_R = representatives(apart_NN, size_N, rank)
        if self.merge == "none":
            unit_NR = torch.eye(len(size_N), dtype=torch.float64)[:, kept_R]
            return unit_NR, unit_NR
        plan_NR = transport(apart_NN[:, kept_R], self.entropy, free=self.mass == "free")
        signs_NR = signs_NN[:, kept_R]
        return plan_NR / plan_NR.sum(0).clamp_min(1e-300) * signs_NR, plan_NR * len(size_N) * signs_NR

    def measured(self, moment: Moment) -> tuple[Tensor, Tensor, Tensor]:
        """Distances [N, N], the signs that they are over [N, N], and the sizes [N] of all coordinates."""
        if isinstance(moment, Distances):
            near_NN = moment.apart[1].cpu() / moment.seen
            far_NN = moment.apart[-1].cpu() / moment.seen if self.signed else near_NN
            size_N = moment.size_N.cpu() / moment.seen
        else:
            moment_NN = moment.mean_NN
            energy_N = moment_NN.diagonal()
            both_NN = energy_N[:, None] + energy_N
            near_NN = (both_NN - 2 * moment_NN).clamp_min(0).sqrt()
            far_NN = (both_NN + 2 * moment_NN).clamp_min(0).sqrt() if self.signed else near_NN
            size_N = energy_N.clamp_min(0).sqrt()
        return torch.minimum(near_NN, far_NN), torch.where(near_NN <= far_NN, 1.0, -1.0).double(), size_N

    def merged_neurons(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """Neurons merged: what writes them is averaged, what reads them added up."""
        edits: list[Edit] = []
        for space in view.of_kind(Kind.FFN):
            moment, wide = view.moment(Stat.NEURONS), widths.get(space.name, space.size)
            moment.check(space.name, 1)
            if wide == space.size:
                continue
            map_NR, back_NR = self.map_of(moment, wide, space.name)
            if self.merge == "none":
                edits.append(Select(space, map_NR.argmax(0)))
            else:
                edits.append(Rewrite(space, map_NR.T, back_NR))
        return edits

    def finish(
        self, tensors: Mapping[str, Tensor], rewrites: Mapping[str, Rewrite], final: Moment | None
    ) -> list[Edit]:
        """SliceGPT's corrections of a tied head."""
        return self.engine.finish(tensors, rewrites, final)


def check_stream(config: MicrotomeConfig, *, untie: bool) -> None:
    """Refuse streams that cannot be rotated, and tied heads that could not be refitted."""
    if config.norm_placement != "pre":
        raise UnsupportedModel(
            f"dotresize cannot change the basis of the stream of this {config.source_model_type}: it normalises what a "
            "half writes. Use space=ffn."
        )
    if not even(config) or config.norm_divisor is not None:
        raise UnsupportedModel("dotresize cuts a stream once: this model has been sliced already. Use space=ffn.")
    tied = config.tie_word_embeddings and not untie
    if not config.final_norm or (tied and not config.final_norm_gain):
        raise UnsupportedModel(
            f"dotresize cannot cut the stream of this {config.source_model_type}: its final norm is missing, or has no "
            "gain that a tied head could be refitted with. Use space=ffn."
        )


def factored(map_NR: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """T = Q U: orthonormal columns [N, R], and a triangle [R, R] with a positive diagonal, which must be invertible."""
    basis_NR, upper_RR = torch.linalg.qr(map_NR)
    if len(upper_RR) and not torch.linalg.cond(upper_RR) < MOST_CONDITION:
        raise NumericalFailure(
            f"the transport map of {what} is nearly singular: kept coordinates are alike. "
            "Cut more, or take a smaller entropy."
        )
    signs_R = torch.where(upper_RR.diagonal() < 0, -1.0, 1.0)
    return basis_NR * signs_R, signs_R[:, None] * upper_RR


def pooled(sums: Mapping[str, Moment]) -> Moment:
    """The total over all junctions."""
    first, *others = sums.values()
    if not others:
        return first
    total = first.kept(torch.empty_like(first.upper_NN))
    for one in others:
        total.add_moment(one)
    return total


def representatives(apart_NN: Tensor, size_N: Tensor, rank: int) -> Tensor:
    """The `rank` coordinates with the largest sizes, in order of index; copies of one come after all else."""
    order = torch.argsort(size_N, descending=True, stable=True).tolist()
    limit = COPY * float(apart_NN.mean())
    nearest_N = torch.full_like(size_N, math.inf)  # to a coordinate that stands before it in the order
    first, copies = list[int](), list[int]()
    for index in order:
        (copies if nearest_N[index] <= limit else first).append(index)
        nearest_N = torch.minimum(nearest_N, apart_NN[index])
    return torch.tensor([*first, *copies][:rank]).sort().values


def transport(apart_NR: Tensor, entropy: float, *, free: bool) -> Tensor:
    """The plan [N, R] over distances in units of their mean; free, only what leaves every coordinate is prescribed."""
    cost_NR = apart_NR / apart_NR.mean().clamp_min(1e-300)
    if free:
        return torch.softmax(-cost_NR / entropy, 1) / len(cost_NR)
    return sinkhorn(cost_NR, entropy)


METHOD = DOTResize
