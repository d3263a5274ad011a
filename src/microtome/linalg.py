"""Linear algebra of the methods: pure functions on matrices, solved in fp64.

Letters: N size of a space, R numbers kept, A and B two neighbouring junctions.
"""

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
