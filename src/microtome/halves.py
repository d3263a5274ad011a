"""A half of a block around some weights: what it writes, and how that moves with the weights.

Both halves are said once more than in the decoder, for here their derivatives are wanted: tangents (what a change of
the weights does to what is written) and cotangents (what an error in what is written asks of each linear's outputs).

Shapes: B windows of T tokens, D numbers read, O numbers written, F neurons, H heads in G groups, C channels of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from microtome.modeling_microtome import MicrotomeAttention, repeat_groups

NUDGE = 1e-3  # for the slope of the activation
Weights = tuple[Tensor, ...]  # of the linears that read, then of the one that writes; intercepts are columns


class Point(Protocol):
    """A half at some weights, on some windows."""

    inputs: list[Tensor]  # what every linear reads [B, T, .]

    def written(self) -> Tensor:
        """What the half writes [B, T, O]."""
        ...

    def tangent(self, change: Sequence[Tensor]) -> Tensor:
        """How what is written moves with the weights [B, T, O], to first order."""
        ...

    def cotangents(self, error: Tensor) -> list[Tensor]:
        """For an error [B, T, O] how every linear's outputs should move against it, [B, T, .] each."""
        ...


At = Callable[[Weights, Tensor], Point]  # of weights, and what is read [B, T, D]


class FeedForward:
    """down(act(gate(x)) * up(x)), or down(act(up(x))); weights are gate (where there is one), up, down."""

    def __init__(self, weights: Weights, read: Tensor, act: Callable[[Tensor], Tensor]) -> None:
        gate = read @ weights[0].T
        rise, hidden = (act(gate + NUDGE) - act(gate - NUDGE)) / (2 * NUDGE), act(gate)
        self.slopes = [rise]
        if len(weights) == 3:
            up = read @ weights[1].T
            self.slopes, hidden = [rise * up, hidden], hidden * up
        self.down_OF = weights[-1]
        self.inputs = [*(read for _ in self.slopes), hidden]

    def written(self) -> Tensor:
        """What the half writes."""
        return self.inputs[-1] @ self.down_OF.T

    def tangent(self, change: Sequence[Tensor]) -> Tensor:
        """Neurons move by their slopes, and are written by the weights at hand."""
        moved = torch.stack([
            slope * (read @ one.T) for slope, read, one in zip(self.slopes, self.inputs, change, strict=False)
        ])  # fmt: skip
        return moved.sum(0) @ self.down_OF.T + self.inputs[-1] @ change[-1].T

    def cotangents(self, error: Tensor) -> list[Tensor]:
        """The error as the neurons see it, times their slopes."""
        seen = error @ self.down_OF
        return [*(slope * seen for slope in self.slopes), error]


class Attention:
    """Causal attention without norms of queries and keys, or a cap; weights are queries, keys, values, output.

    `around` is what the block's attention needs beside the stream: the rotary's turn, and a mask or None.
    """

    def __init__(self, weights: Weights, read: Tensor, module: MicrotomeAttention, around: Mapping[str, Any]) -> None:
        self.module, self.weights = module, weights
        self.around = around["position_embeddings"] if module.rotary else None
        self.query, self.key, self.value = self.projected(weights, read)
        scores = self.query @ self.key.transpose(2, 3) * module.scaling
        if (mask := around["attention_mask"]) is None:
            later_TT = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later_TT, -torch.inf)
        else:
            scores = scores + mask
        self.share_BHTT = scores.softmax(-1)
        self.inputs = [read, read, read, joined(self.share_BHTT @ self.value)]

    def projected(self, weights: Sequence[Tensor], read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, C], turned where the block turns them."""
        times = self.module.num_key_value_groups
        groups = self.module.heads // times
        query, key = self.turn(parted(read @ weights[0].T, self.module.heads), parted(read @ weights[1].T, groups))
        value = parted(read @ weights[2].T, groups)
        return query, repeat_groups(key, times), repeat_groups(value, times)

    def turn(self, query: Tensor, key: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions, or back."""
        if self.around is None:
            return query, key
        cos, sin = (one.to(query.dtype) for one in self.around)
        return self.module.turn(query, key, (cos, -sin if back else sin))

    def written(self) -> Tensor:
        """What the half writes."""
        return self.inputs[3] @ self.weights[3].T

    def through_softmax(self, scores: Tensor) -> Tensor:
        """What changes of scores do to the shares, or errors of shares to the scores: its Jacobian is symmetric."""
        weighted = scores * self.share_BHTT
        return weighted - self.share_BHTT * weighted.sum(-1, keepdim=True)

    def tangent(self, change: Sequence[Tensor]) -> Tensor:
        """By the product rule, through scores, shares and contexts."""
        query, key, value = self.projected(change, self.inputs[0])
        scores = (query @ self.key.transpose(2, 3) + self.query @ key.transpose(2, 3)) * self.module.scaling
        contexts = joined(self.through_softmax(scores) @ self.value + self.share_BHTT @ value)
        return contexts @ self.weights[3].T + self.inputs[3] @ change[3].T

    def cotangents(self, error: Tensor) -> list[Tensor]:
        """The same way back."""
        seen = parted(error @ self.weights[3], self.module.heads)
        scores = self.through_softmax(seen @ self.value.transpose(2, 3)) * self.module.scaling
        value = self.pooled(self.share_BHTT.transpose(2, 3) @ seen)
        key = self.pooled(scores.transpose(2, 3) @ self.query)
        query, key = self.turn(scores @ self.key, key, back=True)
        return [joined(query), joined(key), joined(value), error]

    def pooled(self, x: Tensor) -> Tensor:
        """The sum over each group's heads [B, G, T, C]."""
        return x.unflatten(1, (-1, self.module.num_key_value_groups)).sum(2)


def parted(x: Tensor, heads: int) -> Tensor:
    """Heads [B, heads, T, C] of what lies side by side [B, T, heads C]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """Heads [B, heads, T, C] side by side [B, T, heads C]."""
    return x.transpose(1, 2).flatten(2)
