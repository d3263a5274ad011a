"""Refinement of a feed-forward half: its steps are Gauss-Newton's, and only what helps on unseen tokens is kept."""

from typing import Any

import pytest
import torch
from models import ids, logits, stock
from tinies import HELD_OUT, compress, folder
from torch import Tensor
from torch.nn import functional

from microtome import refine
from microtome.errors import BadInput
from microtome.refine import Half, Weights, refined

SIZES = {"T": 60, "D": 4, "F": 3, "O": 5}


def weights(seed: int, *, gated: bool) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    rows = [random(SIZES["F"], SIZES["D"]) for _ in range(1 + gated)]
    return (*rows, random(SIZES["O"], SIZES["F"]))


def written(read: Tensor, some: Weights) -> Tensor:
    """What a half writes, said once more."""
    first = functional.silu(read @ some[0].T)
    return (first * (read @ some[1].T) if len(some) == 3 else first) @ some[-1].T


def half(some: Weights, seed: int, tokens: int = SIZES["T"]) -> Half:
    """Tokens of which `some` weights are the best, and errors of which do not count alike."""
    generator = torch.Generator().manual_seed(seed)
    read = torch.randn(tokens, SIZES["D"], generator=generator, dtype=torch.float64)
    weight = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.5
    return Half(read, written(read, some) * weight[:, None], weight, functional.silu)


@pytest.mark.parametrize("gated", [True, False])
def test_a_step_is_the_least_squares_solution_of_the_linearised_half(
    gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "ITERATIONS", 500)
    tokens, start = half(weights(0, gated=gated), 1), weights(2, gated=gated)
    change = refine.step(tokens, start, 1e-9)
    slopes: Any = torch.autograd.functional.jacobian(
        lambda *some: (written(tokens.read, some) * tokens.weight[:, None]).flatten(), start
    )
    matrix = torch.cat([one.flatten(1) for one in slopes], dim=1)
    missing = (tokens.wanted - written(tokens.read, start) * tokens.weight[:, None]).flatten()
    best = torch.linalg.lstsq(matrix, missing[:, None], driver="gelsd").solution[:, 0]
    # Rows may be scaled against columns without effect: what the change does is unique, the change itself is not.
    ours = matrix @ torch.cat([one.flatten() for one in change])
    torch.testing.assert_close(ours, matrix @ best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_weights_that_exist_are_found(gated: bool) -> None:
    truth = weights(3, gated=gated)
    start = tuple(one + 0.1 * two for one, two in zip(truth, weights(4, gated=gated), strict=True))
    fitted, unseen = half(truth, 5, 400), half(truth, 6, 100)
    found = refined(fitted, unseen, start, 8)
    assert unseen.error(found) < 1e-3 * unseen.error(start)


def test_what_does_not_help_on_unseen_tokens_is_not_done() -> None:
    start = weights(7, gated=True)
    fitted, unseen = half(weights(8, gated=True), 9), half(start, 10)  # the unseen tokens want nothing else
    found = refined(fitted, unseen, start, 3)
    assert all(torch.equal(one, two) for one, two in zip(found, start, strict=True))


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied"])
def test_a_restored_decoder_comes_closer_refined(name: str, tmp_path: Any) -> None:
    """With and without a gate, with and without biases, on the tokens that it was fitted to."""
    text = ids(rows=96, length=24)
    want = logits(stock(name), text)
    off: list[float] = []
    for steps in (0, 3):
        made = compress(
            folder(name), tmp_path / str(steps), method="fasp", options={"spaces": "ffn"}, keep=0.8,
            restore={"refine": steps}, data=text, samples=None,
        )  # fmt: skip
        off.append((logits(made.load(), text) - want).square().mean().item())
        assert torch.isfinite(logits(made.load(), HELD_OUT)).all()
    assert off[1] < off[0]


def test_steps_are_a_number(tmp_path: Any) -> None:
    with pytest.raises(BadInput, match="refine=-1 of restore is no number of steps"):
        compress(folder("llama"), tmp_path / "out", method="fasp", keep=0.8, restore={"refine": -1})
