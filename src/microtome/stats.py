"""Small sums over the calibration tokens: what a method may know of the activations.

Products are taken in at least fp32: a bf16 product rounds its output and leaves negative eigenvalues. Sums are fp64.
"""

from enum import StrEnum

import torch
from torch import Tensor

from microtome.errors import BadInput, NumericalFailure


class Stat(StrEnum):
    """What a method may ask for."""

    MOMENT = "moment"


class Moment:
    """Sum of z z^T [N, N] and of z [N] over tokens z."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.sum_NN = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.sum_N = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, z: Tensor) -> None:
        """Count tokens z [..., N]."""
        z_TN = z.reshape(-1, z.shape[-1]).float()
        self.sum_NN += z_TN.T @ z_TN
        self.sum_N += z_TN.sum(0)
        self.tokens += len(z_TN)

    def keep(self, into: Tensor) -> "Moment":
        """The same sums with the big one stored in `into` [N, N], which may be a file; empties nothing."""
        into.copy_(self.sum_NN)
        kept = Moment.__new__(Moment)
        kept.sum_NN, kept.sum_N, kept.tokens = into, self.sum_N.cpu(), self.tokens
        return kept

    def check(self, what: str, rank: int) -> None:
        """Raise where the sums are not finite, or have seen too few tokens to span `rank` directions."""
        if not torch.isfinite(self.sum_NN).all():
            raise NumericalFailure(
                f"activations at {what} are not finite: the model overflows there. Try --dtype float32."
            )
        if self.tokens < rank:
            raise BadInput(
                f"{self.tokens} calibration tokens cannot span {rank} directions at {what}. "
                "Give more text, or raise --samples or --length."
            )

    @property
    def mean_NN(self) -> Tensor:
        """Second moment E[z z^T], fp64 on the CPU."""
        return (self.sum_NN / max(self.tokens, 1)).cpu()

    @property
    def mean_N(self) -> Tensor:
        """Mean E[z], fp64 on the CPU."""
        return (self.sum_N / max(self.tokens, 1)).cpu()
