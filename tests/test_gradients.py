"""Gradients of the loss: transformers' own model under autograd in fp64 says the same, and so do finite differences."""

from typing import Any

import pytest
import torch
from folders import raises
from models import TINY, built, canonical, doubled, loaded
from tinies import CALIBRATION, compress, folder
from torch import Tensor

from microtome import arch, planner
from microtome.errors import BadInput, NumericalFailure
from microtome.gradients import Gradients, gradients
from microtome.source import open_source
from microtome.stats import Sample

NAMES = ["llama-gqa-llama3-tied", "opt-tied", "gemma2", "phi-tied-gqa", "phi3-partial-longrope", "gpt_neox"]


def of(name: str, sample: Sample, dtype: torch.dtype = torch.float64) -> Gradients:
    with open_source(folder(name)) as source:
        return gradients(planner.opened(source), CALIBRATION, sample, device=torch.device("cpu"), dtype=dtype)


def stocks_own(name: str, rows: Tensor) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, mean gradients and mean squares by transformers' model and its own loss, under the canonical names."""
    model = built(TINY[name]).double()
    table, config = arch.find(TINY[name]["model_type"]), canonical(name)[0]
    losses, each = list[float](), list[dict[str, Tensor]]()
    for row in rows:
        model.zero_grad()
        loss = model(input_ids=row[None], labels=row[None]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        found = {key: one.grad.clone() for key, one in model.named_parameters()}
        places = {key: place for block in range(3) for key, place in arch.stored_names(table, config, block).items()}
        each.append(arch.lower_tensors(found, places))
    means = {key: torch.stack([one[key] for one in each]).mean(0) for key in each[0]}
    squares = {key: torch.stack([one[key] ** 2 for one in each]).mean(0) for key in each[0]}
    return sum(losses) / len(losses), means, squares


@pytest.mark.parametrize("name", NAMES)
def test_transformers_own_model_says_the_same(name: str) -> None:
    have = of(name, Sample(3, 10))
    loss, means, squares = stocks_own(name, CALIBRATION[:3, :10])
    assert have.loss == pytest.approx(loss, rel=1e-6)  # norms are computed in fp32 in both
    for block in range(3):
        first, second = have.first(block), have.squares(block)
        mine = {key for key in means if key.startswith(f"model.layers.{block}.")}
        assert {f"model.layers.{block}.{key}" for key in first} == mine
        for key in first:
            full = f"model.layers.{block}.{key}"
            assert (first[key] - means[full]).abs().max() <= 1e-5 * max(1e-3, means[full].abs().max()), key
            assert (second[key] - squares[full]).abs().max() <= 1e-5 * max(1e-3, squares[full].abs().max()), key


def test_finite_differences() -> None:
    name, step = "opt-tied", 1e-2
    have, (config, tensors) = of(name, Sample(4)), canonical(name)

    @torch.no_grad()
    def loss(changed: dict[str, Tensor]) -> float:
        model: Any = loaded(config, doubled(changed))
        logits = model(input_ids=CALIBRATION[:4]).logits
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), CALIBRATION[:4, 1:])
        return float(each)

    for key in ("mlp.down_proj.weight", "self_attn.q_proj.bias", "self_attn.v_proj.weight", "input_layernorm.weight"):
        full, sides, slope = f"model.layers.1.{key}", list[float](), have.first(1)[key]
        place = tuple(int(one) for one in torch.unravel_index(slope.abs().argmax(), slope.shape))
        for sign in (1, -1):
            moved = doubled(tensors)
            moved[full] = moved[full].clone()
            moved[full][place] += sign * step
            sides.append(loss(moved))
        assert float(slope[place]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)


def test_samples() -> None:
    short, whole = of("llama", Sample(2, 8)), of("llama", Sample(2))
    assert short.loss != whole.loss
    again = of("llama", Sample(100, 4000))
    every = of("llama", Sample(len(CALIBRATION)))
    assert all(torch.equal(again.means[key], every.means[key]) for key in every.means), "as many as there are"
    with raises(BadInput, r"gradients need at least 1 sequence, not 0"):
        Sample(0)
    with raises(BadInput, r"sequences of at least 2 tokens, not 1: 1 predicts the next"):
        Sample(1, 1)


def test_nothing_is_drawn_and_nothing_but_blocks_is_kept() -> None:
    state = torch.get_rng_state()
    found = of("llama", Sample(1, 8), torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert all(key.startswith("model.layers.") for key in found.means)
    assert {tensor.dtype for tensor in found.means.values()} == {torch.float32}
    assert all((tensor >= 0).all() for tensor in found.mean_squares.values())


def test_what_is_not_finite_is_said_in_one_line(tmp_path: Any) -> None:
    model = built(TINY["llama"])
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e30
    model.save_pretrained(tmp_path / "source")
    with raises(NumericalFailure, r"the loss is not finite on calibration sequence 1: the model overflows there"):
        compress(tmp_path / "source", tmp_path / "out", keep=0.7, method="llmpruner")
    assert not (tmp_path / "out").exists()
