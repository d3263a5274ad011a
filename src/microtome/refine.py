"""Refinement of a half of a block: its matrices fitted together to what the half should write.

Neurons that were chosen for what they compute in the uncut decoder are not the best that as many can do, and neither
are heads. The fit min || half(W, x) - y ||^2 over all matrices of the half is a nonlinear least-squares problem; it is
solved by Gauss-Newton steps with a damping that follows success (Levenberg and Marquardt). A step solves its normal
equations by conjugate gradients: the right side from all tokens, the curvature from some, another draw at every step.
The preconditioner takes the curvature of each matrix for a Kronecker product of moments: of what the linear reads, and
of what random errors ask of its outputs. No gradient of the model's loss is taken, and nothing outside the half is
looked at. A step is kept only if it does better on tokens that it has not seen.

Shapes: B windows of T tokens at a time, D numbers read, O numbers written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.halves import At, Point, Weights
from microtome.linalg import damped_cholesky

ITERATIONS = 8  # of conjugate gradients in a step, at most
ENOUGH = 1e-3  # of the preconditioned residual, where they end
CURVATURE = 16384  # tokens that a step's curvature is taken from
DAMPING = 0.03  # of the first step, relative to the curvature
NEGLIGIBLE = 1e-8  # of what should be written, in squares: nothing is missing
LENGTHS = (1.0, 0.5, 0.25)  # of a step that are tried


@dataclass(frozen=True)
class Piece:
    """Some windows of what a half reads and should write."""

    read: Tensor  # [B, T, D]
    wanted: Tensor  # [B, T, O]
    weight: Tensor  # [B, T, 1], what a token's error counts

    def missing(self, point: Point) -> Tensor:
        """What is not written [B, T, O], weighted."""
        return (self.wanted - point.written()) * self.weight


Pieces = Sequence[Callable[[], Piece]]  # made when they are asked for: not all are in memory at once


def error(at: At, pieces: Pieces, weights: Weights) -> float:
    """The sum of squares of what is missing."""
    found = (make() for make in pieces)
    return sum(float(one.missing(at(weights, one.read)).square().sum()) for one in found)


def refined(at: At, fitted: Pieces, unseen: Pieces, weights: Weights, steps: int) -> Weights:
    """The weights after up to so many Gauss-Newton steps; as they were if no step helps on unseen tokens."""
    best, damping = error(at, unseen, weights), DAMPING
    if best <= NEGLIGIBLE * sum(float((one.wanted * one.weight).square().sum()) for one in (make() for make in unseen)):
        return weights
    for number in range(steps):
        change = step(at, fitted, weights, damping, number)
        tried = [
            (length, tuple(one + length * more for one, more in zip(weights, change, strict=True)))
            for length in LENGTHS
        ]
        errors = [(error(at, unseen, one), length, one) for length, one in tried]
        least, length, moved = min(errors, key=lambda found: found[0])
        if least < best:
            weights, best = moved, least
        damping = damping / 3 if least <= best and length == 1.0 else damping * 4
    return weights


def step(at: At, fitted: Pieces, weights: Weights, damping: float, number: int) -> list[Tensor]:
    """The change of a Gauss-Newton step; `number` draws the tokens of its curvature."""
    curvature = Curvature(at, drawn(fitted, number), weights, damping, number)
    change = [torch.zeros_like(one) for one in weights]
    residual = slope(at, fitted, weights)
    scaled = curvature.undone(residual)
    direction, power = list(scaled), dot(residual, scaled)
    enough = ENOUGH * power
    for _ in range(ITERATIONS):
        if power <= enough:
            break
        bent = curvature.of(direction)
        length = power / max(dot(direction, bent), 1e-300)
        change = [one + length * way for one, way in zip(change, direction, strict=True)]
        residual = [one - length * bend for one, bend in zip(residual, bent, strict=True)]
        scaled = curvature.undone(residual)
        before, power = power, dot(residual, scaled)
        direction = [one + (power / before) * way for one, way in zip(scaled, direction, strict=True)]
    return change


def slope(at: At, fitted: Pieces, weights: Weights) -> list[Tensor]:
    """Half the descent of the mean square of what is missing, over all tokens, one like each of the weights."""
    found, tokens = [torch.zeros_like(one) for one in weights], 0
    for make in fitted:
        piece = make()
        point = at(weights, piece.read)
        tokens += piece.weight.numel()
        add(found, point.cotangents(piece.missing(point) * piece.weight), point.inputs)
    return [one / tokens for one in found]


def drawn(fitted: Pieces, number: int) -> list[Piece]:
    """Pieces by chance, as many as the curvature is taken from."""
    order = torch.randperm(len(fitted), generator=torch.Generator().manual_seed(number)).tolist()
    found, tokens = list[Piece](), 0
    for place in order:
        if tokens < CURVATURE:
            found.append(fitted[place]())
            tokens += found[-1].weight.numel()
    return found


class Curvature:
    """The normal equations of a linearised half on some tokens, damped, and their approximate inverse."""

    def __init__(self, at: At, pieces: Sequence[Piece], weights: Weights, damping: float, seed: int) -> None:
        self.points = [(at(weights, piece.read), piece.weight) for piece in pieces]
        self.tokens = sum(piece.weight.numel() for piece in pieces)
        generator = torch.Generator().manual_seed(seed)
        asked = [torch.zeros(len(one), len(one), dtype=torch.float64) for one in weights]
        reads = [torch.zeros(one.shape[1], one.shape[1], dtype=torch.float64) for one in weights]
        for point, weight in self.points:
            chance = torch.randn(*weight.shape[:-1], len(weights[-1]), generator=generator).to(weight) * weight
            for mine, own in ((asked, point.cotangents(chance)), (reads, point.inputs)):
                for total, one in zip(mine, own, strict=True):
                    tokens = one.flatten(0, -2)
                    total.add_((tokens.T @ tokens).cpu() / self.tokens)
        like = weights[0]
        self.damping = [
            damping * float(one.diagonal().mean() * other.diagonal().mean())
            for one, other in zip(asked, reads, strict=True)
        ]
        self.inverses = [
            (inverse(one, damping**0.5).to(like), inverse(other, damping**0.5).to(like))
            for one, other in zip(asked, reads, strict=True)
        ]

    def of(self, change: Sequence[Tensor]) -> list[Tensor]:
        """The damped curvature times a change of the weights."""
        found = [torch.zeros_like(one) for one in change]
        for point, weight in self.points:
            add(found, point.cotangents(point.tangent(change) * weight.square()), point.inputs)
        return [one / self.tokens + by * way for one, by, way in zip(found, self.damping, change, strict=True)]

    def undone(self, change: Sequence[Tensor]) -> list[Tensor]:
        """What the preconditioner makes of it: the inverse of a Kronecker product for every matrix."""
        return [left @ one @ right for (left, right), one in zip(self.inverses, change, strict=True)]


def add(totals: Sequence[Tensor], asked: Sequence[Tensor], reads: Sequence[Tensor]) -> None:
    """Add the outer products, over tokens, of what outputs are asked for and what their linears read."""
    for total, one, other in zip(totals, asked, reads, strict=True):
        total.add_(one.flatten(0, -2).T @ other.flatten(0, -2))


def inverse(moment_NN: Tensor, ridge: float) -> Tensor:
    """(A + lambda I)^-1, lambda relative to the mean of A's diagonal."""
    return torch.cholesky_inverse(damped_cholesky(moment_NN, ridge))


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The inner product of lists of tensors."""
    return float(sum((left.double() * right.double()).sum() for left, right in zip(one, other, strict=True)))
