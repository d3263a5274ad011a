"""The sweep over columns: every column of a matrix is decided once, and those behind it make up for what that costs.

With H = E[x x^T] of what the matrix reads and U the upper factor of its inverse, H^-1 = U^T U, column c is given new
values q, and all later columns what is left to make up for it:

    e = (w_c - q) / U_cc,     W_:j -= e U_cj   for j > c

Frantar and Alistarh take it for pruning (SparseGPT, arXiv:2301.00774) and rounding (GPTQ, arXiv:2210.17323). Whatever
is chosen, by a mask, a grid or both, the sum of all e^2 is tr((W - W') H (W - W')^T), with the damping in H.

Letters: O outputs, I inputs, B columns of a block, G of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.errors import NumericalFailure
from microtome.linalg import damped_cholesky


@dataclass(frozen=True, eq=False)
class Columns:
    """A block of columns, when the sweep comes to it. Columns are numbered in the order of the sweep.

    `weight` is the whole matrix in that order, and changes as the sweep goes on: in front of a column lies what is
    decided; behind it, within the block, what makes up for that. Columns behind the block lag behind by the block.
    """

    start: int
    stop: int
    weight: Tensor  # [O, I]
    spread: Tensor  # [I], U_cc: an error of d in column c costs d^2 / U_cc^2
    energy: Tensor  # [I], the diagonal of the damped H
    order: Tensor  # [I], which column of the matrix each one is

    @property
    def here(self) -> Tensor:
        """The block's own columns as they are by now [O, B]."""
        return self.weight[:, self.start : self.stop]


Rule = Callable[[int], Tensor]  # the new values [O] of a column, by its number in the order of the sweep
Choose = Callable[[Columns], Rule]  # called when the sweep comes to a block


@dataclass(frozen=True, eq=False)
class Swept:
    """The new matrix, in the order of the old, and what every row's change costs: (w - w') H (w - w')^T."""

    weight: Tensor  # [O, I]
    loss: Tensor  # [O]


def swept(
    weight_OI: Tensor,
    hessian_II: Tensor,
    choose: Choose,
    *,
    block: int = 128,
    damping: float = 0.01,
    order: Tensor | None = None,
) -> Swept:
    """Decide all columns in turn, `block` at a time, in the precision of the weights; factors are fp64.

    `damping` is relative to the mean of the diagonal of H [I, I]. `order` [I] is the order in which columns are taken,
    by default their own. Raises NumericalFailure where H is not finite.
    """
    order_I = torch.arange(weight_OI.shape[1]) if order is None else order
    live_OI = weight_OI[:, order_I].clone()
    damped_II = damped(hessian_II, damping)[order_I][:, order_I]
    scale = float(damped_II.diagonal().mean())
    factor_II = inverse_factor(damped_II / scale).to(live_OI)  # of size one, whatever the activations are
    spread_I, energy_I = factor_II.diagonal() / scale**0.5, damped_II.diagonal().to(live_OI)
    loss_O = torch.zeros(len(live_OI), dtype=torch.float64)
    for start in range(0, live_OI.shape[1], block):
        stop = min(start + block, live_OI.shape[1])
        rule = choose(Columns(start, stop, live_OI, spread_I, energy_I, order_I))
        errors_OB = live_OI.new_empty(len(live_OI), stop - start)
        for column in range(start, stop):
            new_O = rule(column)
            error_O = (live_OI[:, column] - new_O) / factor_II[column, column]
            live_OI[:, column] = new_O
            live_OI[:, column + 1 : stop] -= error_O[:, None] * factor_II[column, column + 1 : stop]
            errors_OB[:, column - start] = error_O
        live_OI[:, stop:] -= errors_OB @ factor_II[start:stop, stop:]
        loss_O += errors_OB.double().square().sum(1)
    out_OI = torch.empty_like(live_OI)
    out_OI[:, order_I] = live_OI
    return Swept(out_OI, loss_O * scale)


def damped(hessian_II: Tensor, damping: float) -> Tensor:
    """H, symmetric and in fp64, with `damping` times its mean diagonal added to the diagonal.

    Nothing is known of inputs that are always zero, all of them: then it is the identity. Raises NumericalFailure where
    H is not finite.
    """
    if not torch.isfinite(hessian_II).all():
        raise NumericalFailure("the second moments are not finite: the model overflows. Try --dtype float32.")
    symmetric_II = (hessian_II.double() + hessian_II.double().T) / 2
    mean, identity = symmetric_II.diagonal().mean(), torch.eye(len(symmetric_II), dtype=torch.float64)
    return symmetric_II + damping * mean * identity if mean > 0 else identity


def inverse_factor(matrix_II: Tensor) -> Tensor:
    """The upper U [I, I] with U^T U = A^-1, for a symmetric positive A.

    Taken from the factor of A in reversed order, A = R R^T with R upper, so that A is never inverted: U = R^-1. Where A
    is singular the least multiple of the identity is added that makes it regular.
    """
    lower_II, failed = torch.linalg.cholesky_ex(matrix_II.flip(0, 1))
    if failed:
        lower_II = damped_cholesky(matrix_II.flip(0, 1), 1e-9)
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype)
    return torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
