"""What rows, columns and single weights of a matrix cost where the loss bends by a Kronecker product, G x A.

A change D of a matrix W [O, I] is taken to cost tr(G D A D^T) / 2. Setting rows, columns or single weights to zero is a
constraint, and what the rest does best to make up for it is known in closed form; so is the cost:

    row r       W_r A W_r^T / (2 [G^-1]_rr)            W' = L W,  L = I - G^-1_:r ([G^-1]_rr)^-1 E_r^T
    column c    W_c^T G W_c / (2 [A^-1]_cc)            W' = W R,  R = I - E_c ([A^-1]_cc)^-1 [A^-1]_c:
    both                                               W' = L W R, for sets of rows and columns
    weight rc   W_rc^2 / (2 [G^-1]_rr [A^-1]_cc)

L and R project in metrics of their own, so that the product is the optimum for rows and columns together; this is
optimal brain surgery (Hassibi and Stork, 1993), in blocks. Letters: O outputs, I inputs, Q removed weights.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from microtome.compensate import damped, inverse_factor
from microtome.errors import BadInput

Damping = Literal["same", "release"]


@dataclass(frozen=True, eq=False)
class Metric:
    """G and A of one matrix, fp64: as they count in numerators, and inverted."""

    inputs: Tensor  # [I, I]
    outputs: Tensor  # [O, O]
    input_inverse: Tensor
    output_inverse: Tensor
    read: Tensor  # bool [I]: whether an input is ever anything but zero
    heard: Tensor  # bool [O]: whether the loss depends on an output

    @classmethod
    def of(cls, input_II: Tensor, output_OO: Tensor, damp_a: float, damp_g: float, damping: Damping) -> "Metric":
        """Damped, relative to the mean of each diagonal; under `release` the numerators are not.

        Raises NumericalFailure where a factor is not finite.
        """
        inputs, outputs = damped(input_II, damp_a), damped(output_OO, damp_g)
        same = damping == "same"
        return cls(
            inputs if same else input_II.double(),
            outputs if same else output_OO.double(),
            inverse(inputs),
            inverse(outputs),
            input_II.diagonal() > 0,
            output_OO.diagonal() > 0,
        )

    def rows(self, weight_OI: Tensor) -> Tensor:
        """What every row costs [O]; nothing where the loss does not depend on it."""
        size_O = ((weight_OI @ self.inputs) * weight_OI).sum(1)
        return size_O / (2.0 * self.output_inverse.diagonal()) * self.heard

    def columns(self, weight_OI: Tensor) -> Tensor:
        """What every column costs [I]; nothing where it reads zeros."""
        size_I = ((self.outputs @ weight_OI) * weight_OI).sum(0)
        return size_I / (2.0 * self.input_inverse.diagonal()) * self.read

    def elements(self, weight_OI: Tensor) -> Tensor:
        """What every weight costs [O, I]."""
        spread_OI = self.output_inverse.diagonal()[:, None] * self.input_inverse.diagonal()
        return weight_OI.square() / (2.0 * spread_OI)

    def without_rows(self, weight_OI: Tensor, gone: Tensor) -> Tensor:
        """L W: the rows `gone` are zero, and the others make up for them."""
        if not len(gone):
            return weight_OI
        corner, cross = self.output_inverse[gone][:, gone], self.output_inverse[:, gone]
        out_OI = weight_OI - cross @ torch.linalg.solve(corner, weight_OI[gone])
        out_OI[gone] = 0.0
        return out_OI

    def without_columns(self, weight_OI: Tensor, gone: Tensor) -> Tensor:
        """W R: the columns `gone` are zero, and the others make up for them."""
        if not len(gone):
            return weight_OI
        corner, cross = self.input_inverse[gone][:, gone], self.input_inverse[gone]
        out_OI = weight_OI - torch.linalg.solve(corner, weight_OI[:, gone].T).T @ cross
        out_OI[:, gone] = 0.0
        return out_OI

    def without(self, weight_OI: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """L W R: both, and the optimum for both."""
        return self.without_columns(self.without_rows(weight_OI, rows), columns)

    def without_elements(self, weight_OI: Tensor, gone_OI: Tensor, most: int) -> Tensor:
        """The weights of the mask `gone_OI` are zero, and the others make up for them.

        Rows that follow each other are taken together as long as no more than `most` removed weights (at least one row)
        are; each such group sees what those before it have changed.
        """
        out_OI = weight_OI.clone()
        for rows in grouped(gone_OI.sum(1).tolist(), most):
            row_Q, column_Q = gone_OI[rows].nonzero(as_tuple=True)
            row_Q = row_Q + rows.start
            if not len(row_Q):
                continue
            corner_QQ = self.output_inverse[row_Q][:, row_Q] * self.input_inverse[column_Q][:, column_Q]
            spread = torch.zeros(rows.stop - rows.start, weight_OI.shape[1], dtype=out_OI.dtype)
            spread[row_Q - rows.start, column_Q] = torch.linalg.solve(corner_QQ, out_OI[row_Q, column_Q])
            out_OI -= self.output_inverse[:, rows] @ (spread @ self.input_inverse)
        return out_OI.masked_fill(gone_OI, 0.0)


def inverse(matrix_NN: Tensor) -> Tensor:
    """The inverse of a symmetric positive matrix, fp64."""
    upper_NN = inverse_factor(matrix_NN)
    return upper_NN.T @ upper_NN


def grouped(counts: list[int], most: int) -> list[slice]:
    """Consecutive rows whose counts add up to `most` or less; a row with more stands alone."""
    found, start, total = list[slice](), 0, 0
    for number, count in enumerate(counts):
        if total and total + count > most:
            found.append(slice(start, number))
            start, total = number, 0
        total += count
    return [*found, slice(start, len(counts))]


def check_damping(method: str, damp_a: float, damp_g: float) -> None:
    """Refuse a damping below zero."""
    for name, value in (("damp_a", damp_a), ("damp_g", damp_g)):
        if not 0.0 <= value < math.inf:
            raise BadInput(f"{name}={value} of {method} is no number from 0 on.")


def check_rank(method: str, rank: int, damping: Damping = "same") -> None:
    """Refuse more than two products, and two without a damping of their own in costs."""
    if rank not in (1, 2):
        raise BadInput(f"rank={rank} of {method} is 1 or 2: three products have no basis in which all are diagonal.")
    if rank == 2 and damping == "release":
        raise BadInput(f"rank=2 of {method} has one damping in costs and inverses: give damping=same.")
