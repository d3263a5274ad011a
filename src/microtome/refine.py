"""Refinement of a feed-forward half: its three matrices fitted together to what the half should write.

Neurons that were chosen for what they compute in the uncut decoder are not the best that as many can do. The fit min
|| D (act(G z) * U z) - y ||^2 over gate G, up U and down D is a nonlinear least-squares problem; it is solved by
Gauss-Newton steps, each a linear least-squares problem in all three at once, by conjugate gradients with the diagonal
of the normal equations as preconditioner and a damping that follows success (Levenberg and Marquardt). No gradient of
the model's loss is taken, and nothing outside the half is looked at. A step is kept only if it does better on tokens
that it has not seen.

Shapes: T tokens, D numbers read, O numbers written, F neurons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 12  # of conjugate gradients in a step
NUDGE = 1e-3  # for the slope of the activation
LENGTHS = (1.0, 0.5, 0.25)  # of a step that are tried
Weights = tuple[Tensor, ...]  # gate (where there is one), up, down


@dataclass(frozen=True, eq=False)
class Half:
    """What a feed-forward half reads and should write, token by token."""

    read: Tensor  # [T, D]
    wanted: Tensor  # [T, O], weighted like the tokens
    weight: Tensor  # [T], what a token's error counts
    act: Callable[[Tensor], Tensor]

    def hidden(self, weights: Weights) -> Tensor:
        """The neurons [T, F], weighted like the tokens."""
        first = self.act(self.read @ weights[0].T)
        return (first if len(weights) == 2 else first * (self.read @ weights[1].T)) * self.weight[:, None]

    def error(self, weights: Weights) -> float:
        """Mean square of what is missing."""
        return float((self.wanted - self.hidden(weights) @ weights[-1].T).square().mean())

    def slopes(self, weights: Weights) -> list[Tensor]:
        """By how much each neuron moves with its rows' outputs: one [T, F] for the gate, one for up."""
        gate = self.read @ weights[0].T
        rise = (self.act(gate + NUDGE) - self.act(gate - NUDGE)) / (2 * NUDGE) * self.weight[:, None]
        if len(weights) == 2:
            return [rise]
        return [rise * (self.read @ weights[1].T), self.act(gate) * self.weight[:, None]]


def refined(fitted: Half, unseen: Half, weights: Weights, steps: int) -> Weights:
    """The weights after up to so many Gauss-Newton steps; as they were if no step helps on unseen tokens."""
    best, damping = unseen.error(weights), 1e-3
    for _ in range(steps):
        change = step(fitted, weights, damping)
        tried = [
            (length, tuple(one + length * more for one, more in zip(weights, change, strict=True)))
            for length in LENGTHS
        ]
        errors = [(unseen.error(one), length, one) for length, one in tried]
        least, length, moved = min(errors, key=lambda found: found[0])
        if least < best:
            weights, best = moved, least
        damping = damping / 3 if least <= best and length == 1.0 else damping * 4
    return weights


def step(half: Half, weights: Weights, damping: float) -> list[Tensor]:
    """One Gauss-Newton step, by conjugate gradients."""
    down_OF, read_TD, count = weights[-1], half.read, len(half.read)
    hidden_TF, slopes = half.hidden(weights), half.slopes(weights)
    missing_TO = half.wanted - hidden_TF @ down_OF.T

    def forward(change: Sequence[Tensor]) -> Tensor:
        moved = sum(slope * (read_TD @ one.T) for slope, one in zip(slopes, change, strict=False))
        assert isinstance(moved, Tensor)
        return moved @ down_OF.T + hidden_TF @ change[-1].T

    def backward(error_TO: Tensor) -> list[Tensor]:
        seen_TF = error_TO @ down_OF
        return [*((slope * seen_TF).T @ read_TD / count for slope in slopes), error_TO.T @ hidden_TF / count]

    energy_D, reach_F = read_TD.square().mean(0), down_OF.square().sum(0)
    diagonal = [(slope.square().mean(0) * reach_F)[:, None] * energy_D for slope in slopes]
    diagonal.append(hidden_TF.square().mean(0).expand_as(down_OF))
    diagonal = [one + 1e-6 * one.mean().clamp_min(1e-30) for one in diagonal]
    change = [torch.zeros_like(one) for one in weights]
    residual = backward(missing_TO)
    scaled = [one / by for one, by in zip(residual, diagonal, strict=True)]
    direction, power = list(scaled), dot(residual, scaled)
    for _ in range(ITERATIONS):
        curved = backward(forward(direction))
        curved = [one + damping * by * way for one, by, way in zip(curved, diagonal, direction, strict=True)]
        length = power / max(dot(direction, curved), 1e-300)
        change = [one + length * way for one, way in zip(change, direction, strict=True)]
        residual = [one - length * bend for one, bend in zip(residual, curved, strict=True)]
        scaled = [one / by for one, by in zip(residual, diagonal, strict=True)]
        before, power = power, dot(residual, scaled)
        if power <= 1e-12 * max(before, 1e-300):
            break
        direction = [one + (power / before) * way for one, way in zip(scaled, direction, strict=True)]
    return change


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The inner product of lists of tensors."""
    return float(sum((left.double() * right.double()).sum() for left, right in zip(one, other, strict=True)))
