"""SliceGPT once more, step by step as the paper tells it, and knowing nothing of the product."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Parts = dict[str, Tensor]


class Paper:
    """Algorithm 1 on an untied Llama without biases, in fp64, all calibration tokens at once.

    normed: PCA of what the norm hands on (eq. 8), or of the stream. sequential: junctions are measured behind sliced
    ones. one: the same basis everywhere. ridge: readers are fitted to the tokens instead of taken from the basis.
    head: leave the last junction at full width.
    """

    def __init__(self, model: Any, *, normed: bool = True, sequential: bool = True, one: bool = False,
                 ridge: float | None = None, head: bool = True) -> None:  # fmt: skip
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.config, self.normed, self.sequential, self.one, self.head = model.config, normed, sequential, one, head
        self.size, self.blocks, self.ridge = model.config.hidden_size, model.config.num_hidden_layers, ridge

    def matrix(self, block: int, name: str, gain: str = "") -> Tensor:
        """A weight [out, in], with the gain of the norm that it reads through."""
        weight = self.weights[f"model.layers.{block}.{name}.weight"]
        return weight * self.weights[f"model.layers.{block}.{gain}.weight"] if gain else weight

    def norm(self, x: Tensor) -> Tensor:
        """RMSNorm without a gain, dividing by the uncut width whatever the width of x."""
        return x * (x.pow(2).sum(-1, keepdim=True) / self.size + self.config.rms_norm_eps).rsqrt()

    def attention(self, block: int, x: Tensor, reader: Tensor) -> Tensor:
        """What attention writes, if its projections see `reader` [N, R] instead of the whole stream."""
        heads, wide, length = self.config.num_attention_heads, self.config.head_dim, x.shape[1]
        q, k, v = (
            (x @ reader.T @ self.matrix(block, f"self_attn.{name}_proj", "input_layernorm").T)
            .unflatten(-1, (heads, wide))
            .transpose(1, 2)
            for name in "qkv"
        )
        turns = self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, wide, 2).double() / wide)
        angles = torch.arange(length).double()[:, None] * turns.repeat(2)
        q, k = (
            z * angles.cos() + torch.cat((-z[..., wide // 2 :], z[..., : wide // 2]), -1) * angles.sin() for z in (q, k)
        )
        scores = (q @ k.mT / wide**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ self.matrix(block, "self_attn.o_proj").T

    def mlp(self, block: int, x: Tensor, reader: Tensor) -> Tensor:
        """What the MLP writes."""
        gate, up = (
            x @ reader.T @ self.matrix(block, f"mlp.{name}_proj", "post_attention_layernorm").T
            for name in ("gate", "up")
        )
        return (torch.nn.functional.silu(gate) * up) @ self.matrix(block, "mlp.down_proj").T

    def halves(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """What lies between neighbouring junctions."""
        return [
            lambda x, reader, block=block, half=half: half(block, x, reader)
            for block in range(self.blocks)
            for half in (self.attention, self.mlp)
        ]

    def dense(self, tokens: Tensor) -> Tensor:
        """Logits of the uncut model."""
        whole = torch.eye(self.size).double()
        return self.run(tokens, [whole] * (2 * self.blocks + 1), [whole] * (2 * self.blocks + 1))

    def run(self, tokens: Tensor, bases: list[Tensor], readers: list[Tensor]) -> Tensor:
        """Logits with a basis [N, R] at every junction, and dense shortcuts Q_a^T Q_b between them."""
        z = self.weights["model.embed_tokens.weight"][tokens] @ bases[0]
        for half, here, next_, reader in zip(self.halves(), bases, bases[1:], readers, strict=False):
            z = z @ (here.T @ next_) + half(self.norm(z), reader) @ next_
        return self.norm(z) @ readers[-1].T @ (self.weights["lm_head.weight"] * self.weights["model.norm.weight"]).T

    def signal(self, x: Tensor) -> Tensor:
        """What a junction is measured by, [T, N]."""
        return (self.norm(x) if self.normed else x).flatten(0, 1)

    def pca(self, z: Tensor, rank: int) -> Tensor:
        """The top eigenvectors of z^T z."""
        return torch.linalg.eigh(z.T @ z).eigenvectors.flip(1)[:, :rank]

    def reader(self, z: Tensor, basis: Tensor) -> Tensor:
        """The basis itself, or a ridge regression of z on what is kept, by the length that the norm overstates."""
        if self.ridge is None:
            return basis
        kept, rank = z @ basis, basis.shape[1]
        weight = (self.ridge * kept.pow(2).sum() / rank).sqrt()
        left, right = torch.cat([kept, weight * torch.eye(rank)]), torch.cat([z, weight * basis.T])
        return torch.linalg.lstsq(left, right).solution.T * (kept.norm() / z.norm())

    def sliced(self, calibration: Tensor, rank: int) -> Callable[[Tensor], Tensor]:
        """The sliced model, as a function from tokens to logits."""
        x = self.weights["model.embed_tokens.weight"][calibration]
        whole = torch.eye(self.size).double()
        bases, readers, signals = [self.pca(self.signal(x), rank)], [], [self.signal(x)]
        for number, half in enumerate(self.halves(), 1):
            basis = bases[-1] if self.sequential else whole
            readers.append(self.reader(signals[-1], bases[-1]))
            seen = x @ basis  # what is cut of the stream is lost to everything behind it
            x = seen @ basis.T + half(self.norm(seen), readers[-1] if self.sequential else whole)
            signals.append(self.signal(x))
            full = self.head and number == 2 * self.blocks
            bases.append(self.pca(signals[-1], self.size if full else rank))
        if self.one:
            bases = [self.pca(torch.cat(signals), rank)] * len(signals)
        readers = [self.reader(z, basis) for z, basis in zip(signals, bases, strict=True)]
        return lambda tokens: self.run(tokens, bases, readers)
