"""The head fitted to predictions: derivatives by autograd, the optimum by another optimiser."""

from typing import Any

import pytest
import torch
from models import TINY, canonical, ids, logits, ours
from test_restore import canonical_of, recipe
from tinies import compress, folder
from torch import Tensor
from torch.nn import functional

from microtome.predictions import Logits, Predictor, States, newton

FEATURES, ROWS, VOCABULARY, WIDE = 5, 4, 11, 7
KINDS = ("gain", "adapter", "matrix")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(kind: str) -> tuple[Predictor, Tensor, Any]:
    """What is fitted, from where, and tokens by their seed."""
    table = None if kind == "matrix" else random(0, VOCABULARY, FEATURES if kind == "gain" else ROWS)
    weights = {"gain": random(1, FEATURES).abs(), "adapter": 0.2 * random(1, ROWS, FEATURES)}
    uncut = Logits(random(2, VOCABULARY, WIDE), random(3, VOCABULARY), 0.5)

    def states(seed: int, tokens: int = 60) -> States:
        state = random(seed, tokens, FEATURES)
        return States(state, uncut, torch.cat([state, random(seed + 1, tokens, WIDE - FEATURES)], 1))

    predictor = Predictor(Logits(table, random(4, VOCABULARY) if kind == "gain" else None, 0.7))
    return predictor, weights.get(kind, random(1, VOCABULARY, FEATURES)), states


def divergence(kind: str, weights: Tensor, tokens: States) -> Tensor:
    """KL in nats per token, by torch's own, of logits written out."""
    predictor, _, _ = case(kind)
    table, bias, uncut = predictor.logits.table, predictor.logits.bias, tokens.logits
    mapped = tokens.state * weights if kind == "gain" else tokens.state @ weights.T
    have = 0.7 * ((mapped if table is None else mapped @ table.T) + (0.0 if bias is None else bias))
    assert uncut.table is not None and uncut.bias is not None  # noqa: PT018
    want = 0.5 * (tokens.whole @ uncut.table.T + uncut.bias)
    return functional.kl_div(have.log_softmax(-1), want.log_softmax(-1), reduction="batchmean", log_target=True)


@pytest.mark.parametrize("kind", KINDS)
def test_descent_and_curvature_are_autograd_s(kind: str) -> None:
    predictor, weights, states = case(kind)
    tokens, change = states(5), torch.randn_like(weights)
    value: Any = divergence(kind, weights, tokens)
    assert predictor.divergence(weights, tokens) == pytest.approx(value.item(), rel=1e-9)
    slope: Any = torch.autograd.functional.jacobian(lambda w: divergence(kind, w, tokens), weights)
    torch.testing.assert_close(predictor.descent(weights, tokens), -slope)
    bent: Any = torch.autograd.functional.hvp(lambda w: divergence(kind, w, tokens), weights, change)[1]
    torch.testing.assert_close(predictor.curved(weights, change, tokens), bent)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_end_at_the_optimum(kind: str) -> None:
    """By LBFGS on the same divergence; no step makes it worse on the way."""
    predictor, weights, states = case(kind)
    tokens = states(5)
    best = weights.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([best], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = divergence(kind, best, tokens)
        loss.backward()
        return loss

    optimiser.step(closure)
    least, before = divergence(kind, best, tokens).item(), divergence(kind, weights, tokens).item()
    start = before
    for _ in range(25):
        weights = newton(predictor, weights, tokens, tokens)
        after = divergence(kind, weights, tokens).item()
        assert after <= before
        before = after
    assert abs(before - least) <= 1e-3 * (start - least)


def test_a_step_that_does_not_help_on_unseen_tokens_is_not_taken() -> None:
    predictor, weights, states = case("matrix")
    uncut = Logits(weights, None, 0.7 * (1 + 1e-3))
    unseen = States(random(9, 60, FEATURES), uncut, random(9, 60, FEATURES))  # wants next to nothing else
    assert newton(predictor, weights, states(5), unseen) is weights


def test_equal_predictions_are_left_as_they_are() -> None:
    predictor, weights, _ = case("matrix")
    tokens = States(random(9, 60, FEATURES), Logits(weights, None, 0.7), random(9, 60, FEATURES))
    assert newton(predictor, weights, tokens, tokens) is weights


HEADS = {"untied": ("llama", {"slice": 0.2}), "tied": ("llama-gqa-llama3-tied", {"slice": 0.2}),
         "offset": ("gemma", {"slice": 0.2}), "scaled": ("granite-tied", {"slice": 0.2}),
         "bias": ("phi", {"slice": 0.2}), "norm bias": ("opt-tied", {"slice": 0.2}),
         "adapter": ("opt-tied", {"slice": 0.2, "options": {"basis": "junction"}})}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_predicts_more_like_the_uncut_one(kind: str, tmp_path: Any) -> None:
    name, cut = HEADS[kind]
    assert name in TINY
    text = ids(rows=96, length=24)
    want = logits(ours(name), text).double().log_softmax(-1)
    found: list[float] = []
    for predictions in (False, True):
        step = {"restore": {"readers": False, "writers": False, "predictions": predictions}}
        compress(
            folder(name), tmp_path / str(predictions), recipe=recipe({"slicegpt": cut}, step), data=text, samples=None
        )
        have = logits(canonical_of(tmp_path / str(predictions)), text).double().log_softmax(-1)
        found.append(functional.kl_div(have, want, reduction="sum", log_target=True).item())
    assert found[1] < found[0]
    assert canonical(name)[0].tie_word_embeddings == (kind not in {"untied", "bias"})
