"""Rotations out of words, and words out of rotations: the arithmetic of bits-back coding.

He, Flamich and Hernandez-Lobato (arXiv:2410.01309). Words taken off a stack fill a symmetric matrix A = Q Lambda Q^T.
A site whose carrier is C = U Sigma V^T is turned by Q U^T, so that the carrier becomes Q Sigma V^T: whoever has it
finds Q up to the signs of its columns, on which A does not depend, and with the eigenvalues A, and so the words.

Letters: K coordinates of a site, T size of its rotation (K, or K - 1 where the uniform vector stays), W words.
"""

from collections.abc import Iterable
from math import frexp

import torch
from torch import Tensor

from microtome.errors import NumericalFailure
from microtome.linalg import to_uniform

GAP = 1e-9  # the least relative distance of two squared singular values


def symmetric(upper_W: Tensor, size: int) -> Tensor:
    """The symmetric matrix [T, T] in fp64 whose upper triangle, row by row, is given."""
    row, column = torch.triu_indices(size, size)
    matrix_TT = torch.empty(size, size, dtype=torch.float64)
    matrix_TT[row, column] = upper_W.double()
    matrix_TT[column, row] = upper_W.double()
    return matrix_TT


def upper(matrix_TT: Tensor) -> Tensor:
    """The upper triangle of a matrix, row by row."""
    row, column = torch.triu_indices(*matrix_TT.shape)
    return matrix_TT[row, column]


def drawn(matrix_TT: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors [T, T] as columns and eigenvalues [T], largest first, of a matrix of words."""
    values, vectors = torch.linalg.eigh(matrix_TT)
    return vectors.flip(1), values.flip(0)


def gram(carriers: Iterable[Tensor], size: int, *, centred: bool) -> Tensor:
    """C C^T [T, T] in fp64 of carriers [K, columns]; of what is turned, where the uniform vector stays."""
    total_KK = torch.zeros(size, size, dtype=torch.float64)
    for one in carriers:
        wide = one.double()
        total_KK += wide @ wide.T
    if not centred:
        return total_KK
    to_KK = to_uniform(size)
    return (to_KK @ total_KK @ to_KK)[:-1, :-1]


def check_distinct(values_T: Tensor, name: str) -> None:
    """Raise NumericalFailure where two squared singular values [T], falling, are the same, or one is nothing.

    The frame is not unique then, and the words would not come back.
    """
    values = values_T.clamp_min(0.0)
    least = float(values[-1] / values[0].clamp_min(1e-300))
    gaps = (values[:-1] - values[1:]) / values[:-1].clamp_min(1e-300)
    nearest = float(gaps.min()) if len(gaps) else 1.0
    if least < GAP * GAP or nearest < GAP:
        raise NumericalFailure(
            f"the carrier of {name} is degenerate (least relative gap {min(nearest, least):.1e}, needed {GAP:.0e}): "
            f"its rotation cannot be told from the weights. Leave it out, with --leave {name}."
        )


def frame(gram_TT: Tensor, name: str) -> Tensor:
    """The left singular vectors [T, T] of a carrier as columns, the largest singular value first."""
    values, vectors = torch.linalg.eigh(gram_TT)
    check_distinct(values.flip(0), name)
    return vectors.flip(1)


def turn(frame_TT: Tensor, drawn_TT: Tensor, size: int, *, centred: bool) -> Tensor:
    """The orthogonal matrix [K, K] that brings a frame to the eigenvectors that were drawn."""
    matrix_TT = drawn_TT @ frame_TT.T
    if not centred:
        return matrix_TT
    to_KK = to_uniform(size)
    return to_KK @ torch.block_diag(matrix_TT, torch.ones(1, 1, dtype=torch.float64)) @ to_KK


def recovered(frame_TT: Tensor, eigenvalues_T: Tensor) -> Tensor:
    """The words [W] that a rotation was drawn from, nearly: sorted with sorted, so that near ties cost least."""
    return upper((frame_TT * eigenvalues_T.double()) @ frame_TT.T)


def exponent(values: Tensor) -> int:
    """The power of two nearest below the root mean square: words of different tensors are drawn at one scale."""
    square = float(values.double().pow(2).mean()) if values.numel() else 0.0
    return 0 if square == 0.0 else frexp(square**0.5)[1] - 1
