"""What tests of single weights share: tokens at a linear, second moments, and the sweep told one weight at a time."""

from collections.abc import Callable
from typing import Any

import torch
from models import logits
from torch import Tensor

LINEARS = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
BOTH = (*LINEARS["attn"], *LINEARS["mlp"])


def tokens_at(model: Any, name: str, ids: Tensor) -> Tensor:
    """What a linear of our decoder reads of a text [T, N], fp64."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    logits(model, ids)
    hook.remove()
    return seen[0].double()


def moment_of(x: Tensor) -> Tensor:
    """E[x x^T]."""
    return x.T @ x / len(x)


def correlated(size: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """Tokens [T, N] whose coordinates have much to do with each other, fp64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, size, generator=generator, dtype=torch.float64) @ (
        mix + size**0.5 * torch.eye(size, dtype=torch.float64)
    )


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """With a part of the mean diagonal on the diagonal."""
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def swept_by_hand(weight: Tensor, hessian: Tensor, decide: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """The sweep from its definition: before every column the inverse of what is left of H is taken anew.

    `decide` gives a column's new values from its number, the matrix as it is by now, and the first row of that inverse.
    """
    live = weight.clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        new = decide(column, live, inverse[0])
        for row in range(len(live)):
            change = (live[row, column] - new[row]) / inverse[0, 0]
            live[row, column:] -= change * inverse[0]
            live[row, column] = new[row]
    return live


def spent(before: Tensor, after: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - W') H (W - W')^T), row by row."""
    return torch.stack([row @ hessian @ row for row in before - after])


def refitted(weight: Tensor, hessian: Tensor, zero: Tensor) -> Tensor:
    """The best rows with these zeros."""
    out = torch.zeros_like(weight)
    for row, gone in enumerate(zero):
        left = (~gone).nonzero().flatten()
        out[row, left] = torch.linalg.solve(hessian[left][:, left], hessian[left] @ weight[row])
    return out
