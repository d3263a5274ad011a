"""Linear algebra of the methods: pure functions on matrices, solved in fp64.

Letters: N size of a space, R numbers kept, A and B two neighbouring junctions.
"""

import math

import torch
from torch import Tensor

from microtome.errors import NumericalFailure, is_out_of_memory


def eigh_descending(moment_NN: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues [N], largest first, and eigenvectors [N, N] as columns, of a symmetric matrix.

    Raises NumericalFailure, naming `what`, if the matrix is not finite or the decomposition does not converge.
    """
    if not torch.isfinite(moment_NN).all():
        raise NumericalFailure(
            f"the statistics of {what} are not finite: the model overflows there. Try --dtype float32."
        )
    symmetric = (moment_NN.double() + moment_NN.double().T) / 2
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        if is_out_of_memory(error):
            raise
        raise NumericalFailure(f"the eigenvalues of {what} do not converge: its statistics are degenerate.") from error
    return values.flip(0), vectors.flip(1)


def to_uniform(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The reflection [R, R] that carries the last unit vector to the uniform one, and back."""
    v = torch.full((size,), size**-0.5, dtype=dtype)
    v[-1] -= 1.0
    squared = v @ v
    identity = torch.eye(size, dtype=dtype)
    return identity if squared < 1e-30 else identity - (2.0 / squared) * torch.outer(v, v)


def solve_psd(matrix_NN: Tensor, right: Tensor, ridge: float = 1e-10) -> Tensor:
    """Least-squares solution of a symmetric positive semi-definite system, by its eigenvectors in fp64.

    Directions below `ridge` times the largest eigenvalue are left out, so a vocabulary smaller than the width, or
    a dead channel, costs nothing.
    """
    values, vectors = torch.linalg.eigh((matrix_NN.double() + matrix_NN.double().T) / 2)
    kept = values > ridge * values[-1].clamp_min(1e-300)
    inverse = torch.where(kept, 1.0 / values.where(kept, torch.ones_like(values)), torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right.double().reshape(len(values), -1))).reshape(right.shape)


def polar(shortcut_BA: Tensor) -> Tensor:
    """A rotation [B, B] of the wider or equal side that makes a shortcut symmetric.

    With S = U Sigma V^T and B >= A, the rotation [V U^T; U_perp^T] turns S into [V Sigma V^T; 0].
    """
    wide, narrow = shortcut_BA.shape
    u_BB, _, vt_AA = torch.linalg.svd(shortcut_BA.double(), full_matrices=True)
    if wide == narrow:
        return vt_AA.T @ u_BB.T
    return torch.cat([vt_AA.T @ u_BB[:, :narrow].T, u_BB[:, narrow:].T])


def factor_deficit(symmetric_AA: Tensor, rank: int) -> Tensor:
    """The factor U [A, rank] of I - S = U U^T, for a symmetric S with eigenvalues in [0, 1]."""
    deficit = torch.eye(len(symmetric_AA), dtype=torch.float64) - symmetric_AA
    values, vectors = torch.linalg.eigh((deficit + deficit.T) / 2)
    return vectors[:, len(values) - rank :] * values[len(values) - rank :].clamp_min(0.0).sqrt()


def damped_cholesky(matrix_NN: Tensor, ridge: float) -> Tensor:
    """The lower factor [N, N] of A + lambda I, lambda relative to the mean of A's diagonal.

    Sums of fp32 products can have eigenvalues a little below zero: lambda grows tenfold until the factor exists.
    Raises NumericalFailure where the matrix is not finite.
    """
    mean = matrix_NN.diagonal().mean().clamp_min(1e-150)
    identity = torch.eye(len(matrix_NN), dtype=matrix_NN.dtype, device=matrix_NN.device)
    damping = max(ridge, 1e-9)
    while damping < 1e3:
        factor, failed = torch.linalg.cholesky_ex(matrix_NN + damping * mean * identity)
        if not failed:
            return factor
        damping *= 10.0
    raise NumericalFailure("the sums of a least-squares fit are not finite: the model overflows. Try --dtype float32.")


def restoration(moment_NN: Tensor, kept_R: Tensor, ridge: float) -> Tensor:
    """What readers make of the kept coordinates, [N, R], so that their outputs come closest to those over all N.

    The least-squares guess of every coordinate from the kept ones, tied by a ridge (relative to the diagonal's mean) to
    leaving the readers as they are: the rows of kept coordinates are unit vectors, those of the others are
    C_PM (C_MM + lambda I)^-1. It is at once Nystrom's matrix (MoDeGPT), FASP's restoration and the multi-column update
    of optimal brain surgery.
    """
    moment = moment_NN.double()
    inner_RR = moment[kept_R][:, kept_R]
    damping = max(ridge, 1e-12) * moment.diagonal().mean().clamp_min(1e-300)
    identity = torch.eye(len(kept_R), dtype=torch.float64)
    cross_RN = moment[kept_R]
    solved = torch.linalg.solve(inner_RR + damping * identity, cross_RN).T
    solved[kept_R] = identity
    return solved


def sinkhorn(cost_NR: Tensor, entropy: float, rounds: int = 1000, tolerance: float = 1e-6) -> Tensor:
    """The plan P [N, R] of least <P, C> + entropy <P, log P - 1> whose rows sum to 1/N and whose columns sum to 1/R.

    In logs, so that a small entropy does not underflow. Columns are exact; rounds end when rows are off by less than
    `tolerance` altogether.
    """
    rows, columns = cost_NR.shape
    kernel_NR = -cost_NR.double() / entropy
    plan_NR, g_R = kernel_NR, torch.zeros(columns, dtype=torch.float64)
    for number in range(1, rounds + 1):
        f_N = -math.log(rows) - torch.logsumexp(kernel_NR + g_R, 1)
        g_R = -math.log(columns) - torch.logsumexp(kernel_NR + f_N[:, None], 0)
        if number % 10 == 0 or number == rounds:
            plan_NR = (kernel_NR + f_N[:, None] + g_R).exp()
            if (plan_NR.sum(1) - 1 / rows).abs().sum() < tolerance:
                break
    return plan_NR


def check_squares(what: str, value: Tensor) -> None:
    """Say of what the squared gradients are too large to be summed."""
    if not torch.isfinite(value).all():
        raise NumericalFailure(
            f"the squared gradients of {what} are not finite: gradients are too large there. Check the weights with "
            "`microtome evaluate`, or give other --data."
        )
