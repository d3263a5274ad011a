"""One ridge regression towards weights at hand, with a strength that is chosen on tokens that it has not seen.

W = W0 + B (A + lambda I)^-1 with A = E[z z^T] and B = E[(y - W0 z) z^T]: an infinite ridge leaves W0 as it is.
"""

import math

import torch
from torch import Tensor

from microtome.linalg import damped_cholesky
from microtome.surgery import Tensors

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ridges, relative to the mean of A's diagonal


class Fit:
    """Sums for a regression on z [T, F] of what W0 z lacks, r [T, O]: of windows to fit, and of those held out.

    What is missing is summed, not what is wanted: where nothing is missing, sums in fp32 would leave their rounding.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        self.zz = torch.zeros(2, features, features, dtype=torch.float64, device=device)
        self.rz = torch.zeros(2, outputs, features, dtype=torch.float64, device=device)

    def add(self, z: Tensor, r: Tensor, held: int) -> None:
        """Count tokens; `held` is 1 for windows that the fit must not see."""
        z_TF, r_TO = z.reshape(-1, z.shape[-1]).float(), r.reshape(-1, r.shape[-1]).float()
        self.zz[held] += z_TF.T @ z_TF
        self.rz[held] += r_TO.T @ z_TF

    def solved(self, start_OF: Tensor, ridge: float | None) -> Tensor:
        """The weights nearest to what is wanted, tied by a ridge to what they were [O, F]."""
        ridge = self.best() if ridge is None else ridge
        start = start_OF.to(self.zz)
        if math.isinf(ridge):
            return start
        return start + torch.cholesky_solve(self.rz.sum(0).T, damped_cholesky(self.zz.sum(0), ridge)).T

    def best(self) -> float:
        """The ridge whose fit does best on the windows that it has not seen; infinite where none helps."""
        gram_FF, cross_FF = self.rz[0].T @ self.rz[0], self.rz[0].T @ self.rz[1]
        losses = {math.inf: 0.0}
        for ridge in GRID:
            inverse = torch.cholesky_inverse(damped_cholesky(self.zz[0], ridge))  # the step is rz @ inverse
            change = ((inverse @ gram_FF @ inverse) * self.zz[1]).sum() - 2.0 * (inverse * cross_FF).sum()
            losses[ridge] = float(change)
        return min(losses, key=lambda ridge: (losses[ridge], -ridge))


def with_ones(z: Tensor, wanted: bool) -> Tensor:
    """A feature that is always one, for an intercept."""
    return torch.cat([z, z.new_ones(*z.shape[:-1], 1)], dim=-1) if wanted else z


def replace_together(tensors: Tensors, names: list[str], fit: Fit, ridge: float | None) -> None:
    """Put fitted weights and biases in their place; where outputs are added up, one bias takes it all."""
    like = tensors[f"{names[0]}.weight"]
    biased = [f"{name}.bias" for name in names if f"{name}.bias" in tensors]
    start = [tensors[f"{name}.weight"].double() for name in names]
    if biased:
        start.append(torch.stack([tensors[name].double() for name in biased]).sum(0)[:, None])
    solved = fit.solved(torch.cat(start, dim=1), ridge).cpu()
    pieces = solved.split([one.shape[1] for one in start], dim=1)
    for name, piece in zip(names, pieces, strict=False):
        tensors[f"{name}.weight"] = piece.to(like.dtype).contiguous()
    if biased:
        more = (pieces[-1] - start[-1])[:, 0]
        tensors[biased[0]] = (tensors[biased[0]].double() + more).to(like.dtype)
