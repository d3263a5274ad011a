"""A curvature of two Kronecker products, F = G_1 x A_1 + G_2 x A_2: how it is fitted, and what single parts cost there.

One product takes what a linear reads for independent of the gradients in what it writes. Two come nearer to Fisher's
matrix E[(g x z)(g x z)^T]: they are the sum of least squared distance from it whose four factors are positive
semidefinite. Each factor in turn has a closed form, given the other three: for G_1, with T = E[(z^T A_1 z) g g^T],

    G_1 = [ (T - <A_1, A_2> G_2) / <A_1, A_1> ]_+           (eigenvalues below zero taken out)

Two symmetric positive matrices have one basis in which both are diagonal. With A_j = P_A diag(a_j) P_A^T, the same for
G_j, and Q = P^-T,

    F^-1 X = Q_G (M * Q_G^T X Q_A) Q_A^T,                   M = 1 / (g_1 a_1^T + g_2 a_2^T)

so that everything which `kronecker` has for one product is exact for two. Of rows and columns that go what stays is a
block of rows and columns, on which the curvature is again two products: the optimum for both is one solution of the
kind above, W'_free = (F_free)^-1 (F W)_free. More than two products have no such basis.

Letters: T tokens, O outputs, I inputs, Q removed weights, K of a basis, R Kronecker products that make up F^-1.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from microtome.compensate import damped
from microtome.inner import View
from microtome.kronecker import Damping, Metric, grouped
from microtome.linalg import damped_cholesky
from microtome.sparsity import READS
from microtome.stats import Fisher, Stat

SWEEPS = 8  # over the four factors, when they are fitted
CHUNK = 4096  # tokens at a time
CUT = 1e-12  # of the largest singular value of M: what is below is left out of F^-1 where single weights go
Two = tuple[Tensor, Tensor]


# --- fitted -----------------------------------------------------------------------------------------------------------


def fitted(z_TI: Tensor, g_TO: Tensor) -> Two:
    """The factors A [2, I, I] and G [2, O, O] of two products, fp64, from tokens on the CPU, which may lie in a file.

    They start as the moments of two halves of the tokens, those with large gradients and those with small ones.
    """
    size_z, size_g = (float(one.double().square().mean().sqrt()) or 1.0 for one in (z_TI, g_TO))
    strength_T = g_TO.square().sum(1)
    large_T = torch.zeros(len(g_TO))
    large_T[strength_T.argsort(descending=True, stable=True)[: (len(g_TO) + 1) // 2]] = 1.0
    halves = (large_T, 1.0 - large_T)
    shares = [max(float(one.mean()), 1.0 / len(g_TO)) for one in halves]
    inputs = [weighted(z_TI, one, size_z) for one in halves]
    outputs = [weighted(g_TO, one, size_g) / share for one, share in zip(halves, shares, strict=True)]
    for _ in range(SWEEPS):
        for mine, other in ((0, 1), (1, 0)):
            refit(inputs, outputs, mine, other, weighted(z_TI, valued(g_TO, outputs[mine], size_g), size_z))
            refit(outputs, inputs, mine, other, weighted(g_TO, valued(z_TI, inputs[mine], size_z), size_g))
    return torch.stack(inputs) * size_z**2, torch.stack(outputs) * size_g**2


def refit(one: list[Tensor], others: list[Tensor], mine: int, other: int, target: Tensor) -> None:
    """The best factor of one product, given all other factors; one that faces nothing is nothing."""
    energy = float(others[mine].square().sum())
    free = target - float((others[0] * others[1]).sum()) * one[other]
    one[mine] = positive(free / energy) if energy > 0.0 else torch.zeros_like(target)


def positive(matrix_NN: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh((matrix_NN + matrix_NN.T) / 2)
    return (vectors * values.clamp_min(0.0)) @ vectors.T


def weighted(x_TN: Tensor, weight_T: Tensor, size: float) -> Tensor:
    """E[w x x^T] [N, N] of tokens over their size: products in fp32, sums in fp64."""
    out = torch.zeros(x_TN.shape[1], x_TN.shape[1], dtype=torch.float64)
    for start in range(0, len(x_TN), CHUNK):
        some = x_TN[start : start + CHUNK].float() / size
        out += (some * weight_T[start : start + CHUNK, None]).T @ some
    return out / len(x_TN)


def valued(x_TN: Tensor, matrix_NN: Tensor, size: float) -> Tensor:
    """x^T B x of every token over its size [T], fp32."""
    short = matrix_NN.float()
    pieces = ((one.float() / size @ short).mul_(one.float() / size).sum(1) for one in x_TN.split(CHUNK))
    return torch.cat(list(pieces)).clamp_min(0.0)


# --- one basis for two ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Basis:
    """Where two matrices are diagonal: B_j = P diag(d_j) P^T, and Q = P^-T."""

    into: Tensor  # P [N, K]
    back: Tensor  # Q [N, K]
    first: Tensor  # d_1 [K]
    second: Tensor  # d_2 [K]

    @classmethod
    def of(cls, first_NN: Tensor, second_NN: Tensor) -> "Basis":
        """Of symmetric positive matrices, one of which may be singular; raises NumericalFailure."""
        sizes = [float(one.diagonal().mean()) or 1.0 for one in (first_NN, second_NN)]
        both_NN = first_NN / sizes[0] + second_NN / sizes[1]
        lower, failed = torch.linalg.cholesky_ex(both_NN)
        if failed:
            lower = damped_cholesky(both_NN, 0.0)
        half = torch.linalg.solve_triangular(lower, torch.stack([first_NN, second_NN]), upper=False)
        inner = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        _, turn = torch.linalg.eigh((inner[0] + inner[0].T) / 2)
        back = torch.linalg.solve_triangular(lower.T, turn, upper=True)
        first, second = ((turn.T @ one @ turn).diagonal().clamp_min(0.0) for one in inner)
        return cls(lower @ turn, back, first, second)


def spread(outputs: Basis, inputs: Basis) -> Tensor:
    """M [K, K]: what F^-1 is in the bases of both sides."""
    size = outputs.first[:, None] * inputs.first + outputs.second[:, None] * inputs.second
    return 1.0 / size.clamp_min(1e-300)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two products of one matrix, damped, fp64; asked what `kronecker.Metric` is asked."""

    inputs: Tensor  # [2, I, I]
    outputs: Tensor  # [2, O, O]
    read: Tensor  # bool [I]: whether an input is ever anything but zero
    heard: Tensor  # bool [O]: whether the loss depends on an output

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, damp_a: float, damp_g: float) -> "Pair":
        """Every factor damped relative to the mean of its diagonal; raises NumericalFailure where it is not finite."""
        return cls(
            torch.stack([damped(one, damp_a) for one in inputs]),
            torch.stack([damped(one, damp_g) for one in outputs]),
            (inputs.diagonal(dim1=1, dim2=2) > 0).any(0),
            (outputs.diagonal(dim1=1, dim2=2) > 0).any(0),
        )

    @cached_property
    def bases(self) -> tuple[Basis, Basis]:
        """Of outputs and inputs."""
        return Basis.of(*self.outputs), Basis.of(*self.inputs)

    @cached_property
    def inverse(self) -> Two:
        """F^-1 as a sum of products: factors [R, O, O] and [R, I, I]."""
        outputs, inputs = self.bases
        u_KR, sizes, v_RK = torch.linalg.svd(spread(outputs, inputs), full_matrices=False)
        kept = sizes > CUT * sizes[0]
        root = sizes[kept].sqrt()
        left, right = (u_KR[:, kept] * root).T, root[:, None] * v_RK[kept]
        return (
            (outputs.back * left[:, None]) @ outputs.back.T,
            (inputs.back * right[:, None]) @ inputs.back.T,
        )

    def rows(self, weight_OI: Tensor) -> Tensor:
        """What every row costs [O], the others making up for it; nothing where the loss does not depend on it."""
        outputs, inputs = self.bases
        energy_OK = outputs.back.square() @ spread(outputs, inputs)
        return ((weight_OI @ inputs.into).square() / energy_OK).sum(1) / 2.0 * self.heard

    def columns(self, weight_OI: Tensor) -> Tensor:
        """What every column costs [I]; nothing where it reads zeros."""
        outputs, inputs = self.bases
        energy_KI = spread(outputs, inputs) @ inputs.back.square().T
        return ((outputs.into.T @ weight_OI).square() / energy_KI).sum(0) / 2.0 * self.read

    def elements(self, weight_OI: Tensor) -> Tensor:
        """What every weight costs [O, I]."""
        outputs, inputs = self.bases
        spread_OI = outputs.back.square() @ spread(outputs, inputs) @ inputs.back.square().T
        return weight_OI.square() / (2.0 * spread_OI)

    def without(self, weight_OI: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Rows and columns are zero, and what is left is the optimum for both together."""
        if not len(rows) + len(columns):
            return weight_OI
        out_OI = torch.zeros_like(weight_OI)
        kept_rows, kept_columns = rest(rows, weight_OI.shape[0]), rest(columns, weight_OI.shape[1])
        if not (len(kept_rows) and len(kept_columns)):
            return out_OI
        pull_OI = (self.outputs @ weight_OI @ self.inputs).sum(0)[kept_rows][:, kept_columns]
        outputs = Basis.of(*self.outputs[:, kept_rows][:, :, kept_rows])
        inputs = Basis.of(*self.inputs[:, kept_columns][:, :, kept_columns])
        inside = outputs.back.T @ pull_OI @ inputs.back * spread(outputs, inputs)
        out_OI[kept_rows[:, None], kept_columns] = outputs.back @ inside @ inputs.back.T
        return out_OI

    def without_elements(self, weight_OI: Tensor, gone_OI: Tensor, most: int) -> Tensor:
        """As `Metric.without_elements`: groups of rows, each on what those before it have changed."""
        out_OI, (output_ROO, input_RII) = weight_OI.clone(), self.inverse
        for rows in grouped(gone_OI.sum(1).tolist(), most):
            row_Q, column_Q = gone_OI[rows].nonzero(as_tuple=True)
            row_Q = row_Q + rows.start
            if not len(row_Q):
                continue
            corner_QQ = torch.zeros(len(row_Q), len(row_Q), dtype=out_OI.dtype)
            for output_OO, input_II in zip(output_ROO, input_RII, strict=True):
                corner_QQ += output_OO[row_Q][:, row_Q] * input_II[column_Q][:, column_Q]
            push = torch.zeros(rows.stop - rows.start, weight_OI.shape[1], dtype=out_OI.dtype)
            push[row_Q - rows.start, column_Q] = torch.linalg.solve(corner_QQ, out_OI[row_Q, column_Q])
            out_OI -= (output_ROO[:, :, rows] @ (push @ input_RII)).sum(0)
        return out_OI.masked_fill(gone_OI, 0.0)


def rest(gone: Tensor, size: int) -> Tensor:
    """The indices that are not among some."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[gone] = False
    return kept.nonzero()[:, 0]


def matrices(
    view: View, names: Iterable[str], damp_a: float, damp_g: float, damping: Damping
) -> dict[str, tuple[Tensor, Metric | Pair]]:
    """Some linears of a view, their biases as last columns, and their metrics; fp64.

    A second product that has come out empty leaves one.
    """
    fisher, found = view.stats[Stat.FISHER], dict[str, tuple[Tensor, Metric | Pair]]()
    assert isinstance(fisher, Fisher)
    for name in sorted(names):
        weight_OI = view.weights[f"{name}.weight"].double()
        if (bias_O := view.weights.get(f"{name}.bias")) is not None:
            weight_OI = torch.cat([weight_OI, bias_O.double()[:, None]], 1)
        size = weight_OI.shape[1]
        if name in fisher.pairs:
            inputs, outputs = fisher.pairs[name]
            found[name] = weight_OI, paired(inputs[:, :size, :size], outputs, damp_a, damp_g)
            continue
        factors = fisher.inputs[READS[name]][:size, :size], fisher.outputs[name]
        found[name] = weight_OI, Metric.of(*factors, damp_a, damp_g, damping)
    return found


def paired(inputs: Tensor, outputs: Tensor, damp_a: float, damp_g: float) -> Metric | Pair:
    """The metric of two products, or of the one that is there."""
    there = [place for place in range(2) if math.prod(float(one[place].trace()) for one in (inputs, outputs)) > 0.0]
    if len(there) == 2:
        return Pair.of(inputs, outputs, damp_a, damp_g)
    place = next(iter(there), 0)
    return Metric.of(inputs[place], outputs[place], damp_a, damp_g, "same")
