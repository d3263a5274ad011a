"""The head fitted to what the uncut model predicts: one Newton step on the divergence of the predictions.

The divergence KL(p || q) of q = softmax(E (A z) + c) from the uncut model's p is convex in A, which is the head's
matrix (E is the identity), an adapter before a tied table E, or the diagonal of a gain. Its curvature along a change dA
is that of the softmax, diag(q) - q q^T, applied to E (dA z). The step is solved by conjugate gradients, and is taken
only as far as it helps on tokens that it has not seen. Least squares of logits, which come before, count the logits of
words alike that are likely and that never come; the divergence does not.

Shapes: T tokens, F features of the final state, A rows of the map, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.linalg import damped_cholesky

ITERATIONS = 8  # of conjugate gradients
RIDGE = 1e-2  # of the preconditioner, relative
LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)  # of the step that are tried: far from the least it goes too far
LOGITS = 2**24  # at a time
EQUAL = 1e-7  # nats per token: nothing is missing


@dataclass(frozen=True)
class States:
    """Final states of both models, behind their norms."""

    state: Tensor  # [T, F] of the cut model, what the map reads
    logits: "Logits"  # of the uncut model
    whole: Tensor  # [T, D] of the uncut model

    def chunks(self, words: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The cut model's states and the uncut one's log-probabilities, a few tokens at a time."""
        size = max(1, LOGITS // words)
        for state, whole in zip(self.state.split(size), self.whole.split(size), strict=True):
            yield state, self.logits.of(whole).log_softmax(-1)


@dataclass(frozen=True)
class Logits:
    """How logits come of what a map makes of a final state: scale (E x + c); without a table E x itself is x."""

    table: Tensor | None  # [V, A]
    bias: Tensor | None  # [V]
    scale: float

    def of(self, x: Tensor) -> Tensor:
        """Logits [T, V] of x [T, A]."""
        return self.moved(x) if self.bias is None else self.moved(x) + self.scale * self.bias

    def moved(self, x: Tensor) -> Tensor:
        """How logits move with x [T, A]."""
        return self.scale * (x if self.table is None else x @ self.table.T)

    def back(self, error: Tensor) -> Tensor:
        """What an error of logits [T, V] asks of x [T, A]."""
        return self.scale * (error if self.table is None else error @ self.table)


@dataclass(frozen=True)
class Predictor:
    """A map [A, F] before the logits, or a gain [F] in its place, that is fitted."""

    logits: Logits

    def mapped(self, weights: Tensor, state: Tensor) -> Tensor:
        """What the map makes of states [T, A]."""
        return state * weights if weights.ndim == 1 else state @ weights.T

    def summed(self, weights: Tensor, asked: Tensor, state: Tensor) -> Tensor:
        """What is asked of the map's outputs, as a change of weights, over tokens."""
        return (asked * state).sum(0) if weights.ndim == 1 else asked.T @ state

    def divergence(self, weights: Tensor, tokens: States) -> float:
        """KL(uncut || cut) in nats per token."""
        total = 0.0
        for state, want in tokens.chunks(self.words(weights)):
            have = self.logits.of(self.mapped(weights, state)).log_softmax(-1)
            total += float((want.exp() * (want - have)).sum())
        return total / len(tokens.state)

    def words(self, weights: Tensor) -> int:
        """The size of the vocabulary."""
        return len(weights) if self.logits.table is None else len(self.logits.table)

    def descent(self, weights: Tensor, tokens: States) -> Tensor:
        """The direction in which the divergence falls, like the weights."""
        found = torch.zeros_like(weights)
        for state, want in tokens.chunks(self.words(weights)):
            have = self.logits.of(self.mapped(weights, state)).softmax(-1)
            found += self.summed(weights, self.logits.back(want.exp() - have), state)
        return found / len(tokens.state)

    def curved(self, weights: Tensor, change: Tensor, tokens: States) -> Tensor:
        """The curvature of the divergence times a change of weights."""
        found = torch.zeros_like(weights)
        for state in tokens.state.split(max(1, LOGITS // self.words(weights))):
            have = self.logits.of(self.mapped(weights, state)).softmax(-1)
            moved = have * self.logits.moved(self.mapped(change, state))
            moved -= have * moved.sum(-1, keepdim=True)
            found += self.summed(weights, self.logits.back(moved), state)
        return found / len(tokens.state)


def newton(predictor: Predictor, weights: Tensor, fitted: States, unseen: States) -> Tensor:
    """The weights after a Newton step, as far as it lowers the divergence on unseen tokens; else as they were."""
    best = predictor.divergence(weights, unseen)
    if best < EQUAL:
        return weights
    change = solved(predictor, weights, fitted)
    errors = {length: predictor.divergence(weights + length * change, unseen) for length in LENGTHS}
    length = min(errors, key=errors.__getitem__)
    return weights + length * change if errors[length] < best else weights


def solved(predictor: Predictor, weights: Tensor, tokens: States) -> Tensor:
    """The Newton step, by conjugate gradients; what the map reads is evened out beforehand."""
    moment_FF = (tokens.state.T @ tokens.state).double() / len(tokens.state)
    even = torch.cholesky_inverse(damped_cholesky(moment_FF, RIDGE)).to(weights)
    change, residual = torch.zeros_like(weights), predictor.descent(weights, tokens)
    scaled = residual if weights.ndim == 1 else residual @ even
    direction, power = scaled, float((residual * scaled).sum())
    for _ in range(ITERATIONS):
        bent = predictor.curved(weights, direction, tokens)
        length = power / max(float((direction * bent).sum()), 1e-300)
        change, residual = change + length * direction, residual - length * bent
        scaled = residual if weights.ndim == 1 else residual @ even
        before, power = power, float((residual * scaled).sum())
        if power <= 1e-12 * before:
            break
        direction = scaled + (power / before) * direction
    return change
