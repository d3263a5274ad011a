"""SliceGPT: rotate the residual stream into its principal components and slice the small ones off.

Ashkboos et al., ICLR 2024 (arXiv:2401.15024). An RMSNorm commutes with a rotation Q, so every weight that writes the
stream can be rotated by Q^T and every weight that reads it by Q without changing the model (section 3.1). With Q the
eigenvectors of the stream's second moment, the last coordinates carry little, and their rows and columns are deleted.

    C = E[z z^T],  C = Q Lambda Q^T,  shrink = Q[:, :R]^T,  grow = Q[:, :R]            (eq. 8)

What is done differently from the release, and the option that gives the release's way back:

* `basis=global`: one Q for all junctions instead of one each. No shortcut matrices (a third of what the release
  removes goes back into them), and the result is a stock checkpoint. `basis=junction` is the paper's form.
* `signal=normed`: z is what the norm hands on, as eq. 8 says; the release takes the stream before the norm, where a few
  large tokens outweigh the rest (`signal=residual`).
* `gauge`: only the span of a basis matters. Turned inside its span, the shortcut S becomes I - U U^T of rank N - R
  (`lowrank`), or every second one diagonal (`diagonal`); the release stores R x R numbers (`dense`). `auto` takes the
  form that stores least.
* `centre=exact`: the mean is taken out only where a LayerNorm subtracts it. The release centres the embeddings of
  RMSNorm models too, which changes the function before anything is sliced (`centre=release`).
* `norm`: a LayerNorm may stay one (`layer`): bases then contain the ones vector as the uniform vector, so means
  survive, and a tied head can use them. `rms` is the paper's conversion (section 3.2). `auto`: `rms` for junctions of
  an untied model, else `layer`.
* Tied embeddings stay tied: with one basis the final gain is refitted to what the sliced embedding can express, with
  several an R x R adapter stands before the head. `untie` gives the head its own weights, as published.
* `head=full` leaves the last junction and the head at full width, as the release does; `auto` does so only under
  `--slice`, the paper's dial.
* `readers=regressed`: what is cut off is not independent of what stays. A reader of z = Q^T x sees its least-squares
  guess of x, x ~ C Q (Q^T C Q)^-1 z with the junction's own C and a ridge towards Q, times the factor by which the norm
  over fewer coordinates overstates them. With a junction's own basis only that factor is left. `transposed` is eq. 8.
* `orientation=random` turns the coordinates that are kept by a rotation drawn from `seed`, which changes the model no
  more than the choice of Q does: no coordinate is larger than the others then, as a later quantisation may like it.
* `inputs=compressed` measures a junction behind the already sliced ones (the paper's choice for junctions),
  `original` measures all of them in the dense model; a global basis always does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome.edit import Correct, Edit, Rewrite
from microtome.errors import BadInput, UnsupportedModel
from microtome.layout import EMBEDDING, FINAL_NORM, even
from microtome.linalg import eigh_descending, solve_psd, to_uniform
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Space, Symmetry
from microtome.stats import Moment, Stat
from microtome.surgery import Form, Gauge

CHUNK = 16384  # rows of the vocabulary at a time


@dataclass(frozen=True)
class SliceGPT:
    """Options of SliceGPT; see the head of this file."""

    basis: Literal["global", "junction"] = "global"
    signal: Literal["normed", "residual"] = "normed"
    gauge: Literal["auto", "lowrank", "diagonal", "dense"] = "auto"
    inputs: Literal["auto", "compressed", "original"] = "auto"
    centre: Literal["exact", "release"] = "exact"
    norm: Literal["auto", "rms", "layer"] = "auto"
    head: Literal["auto", "sliced", "full"] = "auto"
    readers: Literal["auto", "regressed", "transposed"] = "auto"
    ridge: float = 0.1
    orientation: Literal["principal", "random"] = "principal"
    seed: int = 0
    untie: bool = False

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.MOMENT})
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.RESIDUAL})

    @property
    def split(self) -> bool:
        """A basis for every junction, or one for all."""
        return self.basis == "junction"

    @property
    def sequential(self) -> bool:
        """Whether junctions are measured behind sliced ones."""
        return self.split if self.inputs == "auto" else self.inputs == "compressed"

    @property
    def normed(self) -> bool:
        """Whether the stream is measured behind its norm."""
        return self.signal == "normed"

    @property
    def regressed(self) -> bool:
        """Whether readers see a guess of what was cut; only sums behind the norm tell how."""
        return self.normed if self.readers == "auto" else self.readers == "regressed"

    @property
    def pooled(self) -> bool:
        """One basis needs only the total, unless readers are regressed by each junction's own."""
        return not self.split and not self.regressed

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse models whose stream admits no rotation, and options that contradict each other or the model."""
        if config.norm_placement != "pre":
            raise UnsupportedModel(
                f"slicegpt cannot rotate the residual stream of this {config.source_model_type}: it normalises what a "
                "half writes, and such a norm's gain fixes the basis."
            )
        if not even(config) or config.norm_divisor is not None:
            raise UnsupportedModel(
                "slicegpt slices a stream once: this model has been sliced already. Start from the original."
            )
        tied = config.tie_word_embeddings and not self.untie
        if not config.final_norm or (tied and not config.final_norm_gain):
            raise UnsupportedModel(
                f"slicegpt cannot cut this {config.source_model_type}: its final norm is missing, or has no gain that "
                "a tied head could be refitted with."
            )
        if self.readers == "regressed" and not self.normed:
            raise BadInput("readers=regressed needs signal=normed: readers see the stream behind its norm.")
        if not 0 <= self.ridge < math.inf:
            raise BadInput(f"ridge={self.ridge} of slicegpt is no number from 0 on.")
        if self.split and self.orientation == "random":
            raise BadInput("orientation=random needs basis=global: elsewhere the gauge turns bases inside their span.")
        if not self.split:
            self.check_global()
        self.check_norms(config)

    def check_global(self) -> None:
        """Refuse options that only bases of their own can have."""
        wrong = {"inputs": self.inputs == "compressed", "gauge": self.gauge != "auto", "head": self.head == "full"}
        for option in (name for name, is_wrong in wrong.items() if is_wrong):
            raise BadInput(
                f"{option}={getattr(self, option)} needs basis=junction: one basis for all junctions is made before "
                "any is sliced, has no shortcuts and one width."
            )

    def check_norms(self, config: MicrotomeConfig) -> None:
        """Refuse forms of the norms that the model, or its tied head, cannot take."""
        tied = config.tie_word_embeddings and not self.untie
        if tied and (self.centre == "release" or (self.norm == "rms" and config.norm == "layer")):
            raise BadInput("centring the embeddings changes a head that is tied to them: add --untie.")
        if self.norm == "layer" and config.norm != "layer":
            raise BadInput("norm=layer keeps a LayerNorm, and this model has RMSNorms.")
        if self.gauge == "diagonal" and config.parallel != "none":
            raise BadInput(
                "gauge=diagonal pairs the two junctions of a block, and parallel blocks have one: use lowrank."
            )
        if self.split and self.gauge == "diagonal" and self.form(config).norm == "layer":
            raise BadInput(
                "gauge=diagonal cannot keep a LayerNorm's ones vector in place: use gauge=lowrank, or --untie."
            )

    def form(self, config: MicrotomeConfig) -> Form:
        """RMSNorm or LayerNorm, tied or not, centred or not."""
        untied = self.untie or not config.tie_word_embeddings
        norm = config.norm
        if norm == "layer" and (self.norm == "rms" or (self.norm == "auto" and self.split and untied)):
            norm = "rms"
        return Form(norm=norm, untie=untied, centre_always=self.centre == "release")

    def whole_head(self, *, by_slice: bool) -> bool:
        """Whether the last junction keeps its width; under the paper's dial, as in the release."""
        return self.split and (self.head == "full" or (self.head == "auto" and by_slice))

    def join(self, config: MicrotomeConfig, width: int) -> Gauge | None:
        """The gauge, or the one that stores least per block: r (n - r) twice, r^2 + r, or r^2 twice."""
        if not self.split:
            return None
        centred = self.form(config).norm == "layer"
        if self.gauge != "auto":
            return Gauge(self.gauge, centred)
        pairs = config.parallel == "none"  # of junctions, which a diagonal gauge needs
        least = "lowrank" if centred or not pairs or 2 * (config.hidden_size - width) < width + 1 else "diagonal"
        return Gauge(least, centred)

    def solve(self, spaces: Sequence[Space], stats: Mapping[str, Moment], ranks: Mapping[str, int]) -> list[Rewrite]:
        """The top principal components: of each junction, or of the sum over all of them."""
        bases = {}
        if not self.split:
            shared_NR = shared_basis(spaces, stats, ranks)
            if self.orientation == "random":
                shared_NR = shared_NR @ turn(spaces[0], shared_NR.shape[1], self.seed)
            bases = dict.fromkeys((space.name for space in spaces), shared_NR)
        edits: list[Rewrite] = []
        for space in spaces:
            moment = stats.get(space.name)
            basis_NR = bases.get(space.name)
            if basis_NR is None:
                basis_NR = principal_basis(space, stats[space.name], ranks[space.name])
            read = None
            if moment is not None and self.regressed:
                # The ridge regression on a junction's own components is the identity.
                ridge = math.inf if self.split else self.ridge
                read = partial(seen_by_readers, basis_NR, moment, ridge)
            edits.append(Rewrite.orthogonal(space, basis_NR, read))
        return edits

    def finish(
        self, tensors: Mapping[str, Tensor], rewrites: Mapping[str, Rewrite], final: Moment | None
    ) -> list[Edit]:
        """The gain, or the adapter, that lets a tied head read the sliced stream."""
        gram_NN = gram(tensors[EMBEDDING])
        gain_N = tensors[FINAL_NORM].double()
        bias_N = tensors["model.norm.bias"].double() if "model.norm.bias" in tensors else None
        last = max((int(name.removeprefix("residual.")), name) for name in rewrites)[1]
        first_NR, last_NR = rewrites["residual.0"].grow, rewrites[last].seen
        if self.split:
            return tied_adapter(first_NR, last_NR, gram_NN, gain_N, bias_N)
        if final is None:
            raise ValueError("the final norm was not measured")
        factor = overstatement(first_NR, final) if self.regressed else 1.0
        return tied_gain(first_NR, gram_NN, gain_N, bias_N, final, factor)


def shared_basis(spaces: Sequence[Space], stats: Mapping[str, Moment], ranks: Mapping[str, int]) -> Tensor:
    """One basis [N, rank] for all junctions, from the sum of their sums."""
    space = spaces[0]
    total = stats.get("residual")
    if total is None:
        total = Moment(space.size)
        for one in spaces:
            total.add_moment(stats[one.name])
    return principal_basis(space, total, ranks[space.name])


def principal_basis(space: Space, moment: Moment, rank: int) -> Tensor:
    """Orthonormal columns [N, rank] along the largest eigenvalues of the second moment.

    Where the space is centred, the span contains the ones vector, and it is the uniform vector of the new coordinates.
    """
    moment.check(space.name, rank)
    moment_NN = moment.mean_NN
    if space.symmetry is not Symmetry.CENTRED:
        return eigh_descending(moment_NN, space.name)[1][:, :rank].contiguous()
    ones_N = torch.full((space.size,), space.size**-0.5, dtype=torch.float64)
    projector = torch.eye(space.size, dtype=torch.float64) - torch.outer(ones_N, ones_N)
    scale = moment_NN.diagonal().mean()
    _, vectors = eigh_descending(projector @ moment_NN @ projector - scale * torch.outer(ones_N, ones_N), space.name)
    return torch.cat([vectors[:, : rank - 1], ones_N[:, None]], dim=1) @ to_uniform(rank)


def turn(space: Space, rank: int, seed: int) -> Tensor:
    """A rotation [rank, rank] drawn from a seed; where the space is centred, one that leaves the uniform vector."""
    centred = space.symmetry is Symmetry.CENTRED
    drawn = torch.randn(
        rank - centred, rank - centred, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    basis, upper = torch.linalg.qr(drawn)
    basis = basis * upper.diagonal().sign()  # evenly over all rotations
    if not centred:
        return basis
    to_RR = to_uniform(rank)
    return to_RR.T @ torch.block_diag(basis, torch.ones(1, 1, dtype=torch.float64)) @ to_RR


def overstatement(basis_NR: Tensor, moment: Moment) -> Tensor:
    """By how much less the kept coordinates measure than the whole: sqrt(tr(Q^T C Q) / tr(C)).

    A norm over the kept coordinates divides by their length alone, so that they come out longer by one over this.
    """
    moment_NN = moment.mean_NN
    return ((basis_NR * (moment_NN @ basis_NR)).sum() / moment_NN.diagonal().sum().clamp_min(1e-300)).sqrt()


def regressed_readers(basis_NR: Tensor, moment: Moment, ridge: float) -> Tensor:
    """The ridge regression of x on z = Q^T x, [N, R]; Q at full width, or under an infinite ridge."""
    if math.isinf(ridge):
        return basis_NR
    cross_RN = basis_NR.T @ moment.mean_NN
    inner_RR = cross_RN @ basis_NR
    damping = ridge * inner_RR.diagonal().mean().clamp_min(1e-300)
    ridged_RR = inner_RR + damping * torch.eye(len(inner_RR), dtype=torch.float64)
    return torch.linalg.solve(ridged_RR, cross_RN + damping * basis_NR.T).T


def seen_by_readers(basis_NR: Tensor, moment: Moment, ridge: float) -> Tensor:
    """What readers make of the kept coordinates behind their norm, [N, R]."""
    return regressed_readers(basis_NR, moment, ridge) * overstatement(basis_NR, moment)


def gram(table_VN: Tensor) -> Tensor:
    """E^T E [N, N] of an embedding table, in fp64 a few rows at a time."""
    total = torch.zeros(table_VN.shape[1], table_VN.shape[1], dtype=torch.float64)
    for rows in table_VN.split(CHUNK):
        total += rows.double().T @ rows.double()
    return total


def tied_gain(
    basis_NR: Tensor, gram_NN: Tensor, gain_N: Tensor, bias_N: Tensor | None, final: Moment, factor: Tensor | float
) -> list[Edit]:
    """The final gain (and bias) with which the sliced, tied embedding comes closest to the dense logits.

    With x the dense normed states, E' = E Q and z = Q^T x, least squares over tokens and vocabulary of
    E' (gamma o z + beta) against E (g o x + b):  (G o C) gamma + ... = rowsum((Q^T M) o (Q^T E^T E diag(g))), where
    G = E'^T E', C = E[z z^T], M = E[x x^T], o elementwise. The gain carries the overstatement `factor`.
    """
    moment_NN, mean_N = final.mean_NN, final.mean_N
    reach_RN = basis_NR.T @ gram_NN  # E'^T E
    gram_RR, cross_RN, mean_R = reach_RN @ basis_NR, basis_NR.T @ moment_NN, basis_NR.T @ mean_N
    left_RR = gram_RR * (cross_RN @ basis_NR)
    right_R = (cross_RN * (reach_RN * gain_N)).sum(1)
    if bias_N is None:
        return [Correct(FINAL_NORM, solve_psd(left_RR, right_R) * factor)]
    right_R = right_R + mean_R * (reach_RN @ bias_N)
    mixed_RR = mean_R[:, None] * gram_RR
    left = torch.cat([torch.cat([left_RR, mixed_RR], 1), torch.cat([mixed_RR.T, gram_RR], 1)])
    solution = solve_psd(left, torch.cat([right_R, reach_RN @ (gain_N * mean_N + bias_N)]))
    rank = len(mean_R)
    return [Correct(FINAL_NORM, solution[:rank] * factor), Correct("model.norm.bias", solution[rank:])]


def tied_adapter(
    first_NR: Tensor, last_NR: Tensor, gram_NN: Tensor, gain_N: Tensor, bias_N: Tensor | None
) -> list[Edit]:
    """The adapter A with E Q_first A closest to E diag(g) Q_last: exact at full width."""
    reach_RN = first_NR.T @ gram_NN
    gram_RR = reach_RN @ first_NR
    edits: list[Edit] = [Correct("head_adapter.weight", solve_psd(gram_RR, (reach_RN * gain_N) @ last_NR))]
    if bias_N is not None:
        edits.append(Correct("head_adapter.bias", solve_psd(gram_RR, reach_RN @ bias_N)))
    return edits


METHOD = SliceGPT
