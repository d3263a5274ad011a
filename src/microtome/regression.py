"""One ridge regression towards weights at hand, with a strength that is chosen on tokens that it has not seen.

W = W0 + B (A + lambda I)^-1 with A = E[z z^T] and B = E[(y - W0 z) z^T]: an infinite ridge leaves W0 as it is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from microtome.linalg import damped_cholesky, eigh_descending
from microtome.surgery import Tensors

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ridges, relative to the mean of A's diagonal


class Fit:
    """Sums for a regression on z [T, F] of what W0 z lacks, r [T, O]: of windows to fit, and of those held out.

    Linears that read the same z share one, their outputs in a row. What is missing is summed, not what is wanted: where
    nothing is missing, sums in fp32 would leave their rounding.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        self.zz = torch.zeros(2, features, features, dtype=torch.float64, device=device)
        self.rz = torch.zeros(2, outputs, features, dtype=torch.float64, device=device)

    def add(self, z: Tensor, r: Tensor, held: int) -> None:
        """Count tokens; `held` is 1 for windows that the fit must not see."""
        z_TF, r_TO = z.reshape(-1, z.shape[-1]).float(), r.reshape(-1, r.shape[-1]).float()
        self.zz[held] += z_TF.T @ z_TF
        self.rz[held] += r_TO.T @ z_TF

    def solved(self, start_OF: Tensor, ridge: float | None, outputs: Sequence[int] = ()) -> Tensor:
        """The weights nearest to what is wanted, tied by a ridge to what they were [O, F].

        `outputs` are those of each linear, one by default: where the ridge is chosen, each has its own.
        """
        groups = torch.arange(self.rz.shape[1]).split(list(outputs) or [self.rz.shape[1]])
        ridges = self.best(groups) if ridge is None else [ridge] * len(groups)
        found = start_OF.to(self.zz).clone()
        for one in {one for one in ridges if math.isfinite(one)}:
            rows = torch.cat([group for group, own in zip(groups, ridges, strict=True) if own == one])
            factor = damped_cholesky(self.zz.sum(0), one)
            found[rows] += torch.cholesky_solve(self.rz[:, rows].sum(0).T, factor).T
        return found

    def best(self, groups: Sequence[Tensor]) -> list[float]:
        """The ridge of each group of outputs that does best on windows not seen by the fit; infinite where none helps.

        In the eigenbasis of A a fit is a diagonal D = 1 / (a + lambda), and what it changes there is a quadratic in D.
        """
        values_F, basis_FF = eigh_descending(self.zz[0], "what a linear reads")
        unseen_FF = basis_FF.T @ self.zz[1] @ basis_FF
        fitted, wanted = self.rz @ basis_FF
        found = list[float]()
        for rows in groups:
            bent_FF = (fitted[rows].T @ fitted[rows]) * unseen_FF
            slope_F = (fitted[rows] * wanted[rows]).sum(0)
            losses = {math.inf: 0.0}
            for ridge in GRID:
                scale_F = 1.0 / (values_F.clamp_min(0.0) + ridge * values_F.mean()).clamp_min(1e-150)
                losses[ridge] = float(scale_F @ bent_FF @ scale_F - 2.0 * (slope_F @ scale_F))
            found.append(min(losses, key=lambda ridge: (losses[ridge], -ridge)))
        return found


def with_ones(z: Tensor, wanted: bool) -> Tensor:
    """A feature that is always one, for an intercept."""
    return torch.cat([z, z.new_ones(*z.shape[:-1], 1)], dim=-1) if wanted else z


def replace_each(tensors: Tensors, names: Sequence[str], fit: Fit, ridge: float | None) -> None:
    """Put the fitted weights and biases of linears that read the same in their place."""
    biased = f"{names[0]}.bias" in tensors
    old = [tensors[f"{name}.weight"] for name in names]
    start = torch.cat([one.double() for one in old])
    if biased:
        start = torch.cat([start, torch.cat([tensors[f"{name}.bias"].double() for name in names])[:, None]], 1)
    sizes = [len(one) for one in old]
    for name, like, one in zip(names, old, fit.solved(start, ridge, sizes).cpu().split(sizes), strict=True):
        tensors[f"{name}.weight"] = (one[:, :-1] if biased else one).to(like.dtype).contiguous()
        if biased:
            tensors[f"{name}.bias"] = one[:, -1].to(tensors[f"{name}.bias"].dtype).contiguous()


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
