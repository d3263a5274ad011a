"""Small sums over the calibration tokens: what a method may know of the activations.

Products are taken in at least fp32: a bf16 product rounds its output and leaves negative eigenvalues. Sums are fp64.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from microtome.errors import BadInput, NumericalFailure

PIECES, MIN_PIECE = 4, 128  # columns are split in four where that leaves GEMMs large enough: 10 of 16 products


class Stat(StrEnum):
    """What a method may ask for: moments of what linears read, and what a block does to the stream."""

    MOMENT = "moment"  # at every junction of the residual stream
    ATTENTION = "attention"  # what queries, keys and values read: the normed stream [D]
    HEADS = "heads"  # what the output projection reads: the heads' contexts side by side [H U]
    MLP = "mlp"  # what gate and up read [D]
    NEURONS = "neurons"  # what the down projection reads [F]
    INFLUENCE = "influence"  # how far a block turns the stream: one number
    ATTENTION_INFLUENCE = "influence-attention"  # the same for its attention half alone
    MLP_INFLUENCE = "influence-mlp"  # and for its feed-forward half
    GRADIENT = "gradient"  # of the loss, for every weight; a method's `sample` says on what
    FISHER = "fisher"  # Kronecker factors of the loss's curvature, for every linear; a method's `curvature` says how
    MASKS = "masks"  # how much every coordinate is wanted, learned by masking; a method's `learning` says how


SITES = {  # which linear's input a moment is taken of
    Stat.ATTENTION: "self_attn.q_proj",
    Stat.HEADS: "self_attn.o_proj",
    Stat.MLP: "mlp.up_proj",
    Stat.NEURONS: "mlp.down_proj",
}
INFLUENCES = {  # of which halves an influence is taken
    Stat.INFLUENCE: ("attn", "mlp"),
    Stat.ATTENTION_INFLUENCE: ("attn",),
    Stat.MLP_INFLUENCE: ("mlp",),
}


@dataclass(frozen=True)
class Sample:
    """Which calibration tokens gradients are taken on: the first tokens of the first rows."""

    sequences: int = 10
    length: int | None = None  # None: whole rows
    probes: int = 0  # of the loss's curvature; without any the squares are those of gradients

    def __post_init__(self) -> None:
        if self.probes < 0:
            raise BadInput(f"{self.probes} is no number of probes.")
        if self.sequences < 1:
            raise BadInput(f"gradients need at least 1 sequence, not {self.sequences}.")
        if self.length is not None and self.length < 2:
            raise BadInput(f"gradients need sequences of at least 2 tokens, not {self.length}: 1 predicts the next.")


@dataclass(frozen=True)
class Curvature:
    """On which tokens the loss's curvature is taken, and with which labels: the text's own, or the model's draws."""

    sample: Sample
    labels: Literal["data", "model"] = "data"
    seed: int = 0  # of the draws
    rank: int = 1  # Kronecker products that it is taken for the sum of: 1 or 2


@dataclass(frozen=True, eq=False)
class Fisher:
    """Kronecker factors of one block, fp32 on the CPU or in a file: a linear's curvature is about G x A.

    With L the mean loss of a sequence: G = E[g g^T] of the gradients g of L in the linear's outputs, A = E[z z^T] of
    z = (a, 1), what it reads and a one for its bias; E over all tokens. Of two products only `pairs` are there.
    """

    inputs: Mapping[Stat, Tensor]  # A [I + 1, I + 1] by the site where a is read: linears that read the same share it
    outputs: Mapping[str, Tensor]  # G [O, O] by linear: "mlp.down_proj"
    how: Curvature
    file: object = None  # that holds them, if they are in one
    pairs: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    # by linear: A [2, I, I], with one more input where it has a bias, and G [2, O, O]


@dataclass(frozen=True)
class Learning:
    """How masks are learned (`masks`): AdamW over `steps` batches of calibration windows."""

    steps: int
    rate: float
    penalty: float  # what the logarithm of size over budget counts beside the loss: the paper's lambda
    batch: int  # windows in a step
    seed: int
    network: Literal["hyper", "direct"]
    estimator: Literal["reinmax", "gumbel"]


@dataclass(frozen=True, eq=False)
class Masks:
    """What masking has learned of one block, and for which size: the logit of every coordinate, fp32 on the CPU."""

    logits: Mapping[str, Tensor]  # by space
    how: Learning
    wanted: float  # numbers that all blocks were to store


class Moment:
    """Sum of z z^T [N, N] and of z [N] over tokens z."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.upper_NN = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.sum_N = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, z: Tensor) -> None:
        """Count tokens z [..., N]."""
        z_TN = z.reshape(-1, z.shape[-1]).float()
        pieces = z_TN.split(max(MIN_PIECE, -(-z_TN.shape[1] // PIECES)), dim=1)
        starts = [0, *accumulate(piece.shape[1] for piece in pieces)]
        for i, left in enumerate(pieces):  # the upper triangle of blocks; the lower one is its mirror
            for j, right in enumerate(pieces[i:], start=i):
                self.upper_NN[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] += left.T @ right
        self.sum_N += z_TN.sum(0)
        self.tokens += len(z_TN)

    @property
    def sum_NN(self) -> Tensor:
        """Sum of z z^T, both triangles."""
        return self.upper_NN.triu() + self.upper_NN.triu(1).T

    def add_moment(self, other: "Moment") -> None:
        """Count what another moment has counted of the same tokens, at another place: they become no more tokens."""
        self.upper_NN += other.upper_NN.to(self.upper_NN.device)
        self.sum_N += other.sum_N.to(self.sum_N.device)
        self.tokens = max(self.tokens, other.tokens)

    def kept(self, into: Tensor) -> "Moment":
        """The same sums with the big one stored in `into` [N, N], which may be a file."""
        other = copy(self)
        other.upper_NN = into.copy_(self.upper_NN)
        other.sum_N = self.sum_N.to(into.device, copy=True)
        return other

    def check(self, what: str, rank: int) -> None:
        """Raise where the sums are not finite, or have seen too few tokens to span `rank` directions."""
        if not self.is_finite:
            raise NumericalFailure(
                f"activations at {what} are not finite: the model overflows there. Try --dtype float32."
            )
        if self.tokens < rank:
            raise BadInput(
                f"{self.tokens} calibration tokens cannot span {rank} directions at {what}. "
                "Give more text, or raise --samples or --length."
            )

    @property
    def is_finite(self) -> bool:
        """Whether no token has overflowed."""
        return bool(torch.isfinite(self.sum_N).all() and torch.isfinite(self.upper_NN.sum()))

    @property
    def mean_NN(self) -> Tensor:
        """Second moment E[z z^T], fp64 on the CPU."""
        return (self.sum_NN / max(self.tokens, 1)).cpu()

    @property
    def mean_N(self) -> Tensor:
        """Mean E[z], fp64 on the CPU."""
        return (self.sum_N / max(self.tokens, 1)).cpu()

    @property
    def with_one(self) -> Tensor:
        """Second moment of (z, 1), fp64 [N + 1, N + 1] on the CPU: what a bias reads is a one."""
        mean_N = self.mean_N
        last = torch.cat([mean_N, torch.ones(1, dtype=mean_N.dtype)])
        return torch.cat([torch.cat([self.mean_NN, mean_N[:, None]], 1), last[None]])


class Influence:
    """Block influence, 1 - E[cos(x, y)], of a block that turns tokens x [..., D] into y (Men et al. 2024, eq. 1).

    The same of one half: x is then the stream before it, y behind it.
    """

    def __init__(self) -> None:
        self.sum = 0.0
        self.tokens = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Count tokens on both sides of the block, the raw stream; a last block's are taken before the final norm."""
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.sum += float((1.0 - cosine).double().sum())
        self.tokens += cosine.numel()

    @property
    def mean(self) -> float:
        """Between 0 (the block only stretches) and 2."""
        return self.sum / max(self.tokens, 1)
