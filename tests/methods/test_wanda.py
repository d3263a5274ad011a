"""Wanda: its score and its zeros weight by weight; magnitude, which needs no text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import KINDS_OF_MODELS
from folders import raises
from models import canonical, loaded, logits, ours
from sweeping import BOTH, tokens_at
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

from microtome import layout
from microtome.errors import BadInput
from microtome.forecast import preview

GQA = "llama-gqa-llama3-tied"


def zeros_by_hand(weight: Tensor, norms: Tensor, gone: int) -> Tensor:
    """Row by row and weight by weight: the lowest |w| ||x|| of every row."""
    out = weight.clone()
    for row in range(len(weight)):
        scored = sorted((abs(float(weight[row, j])) * float(norms[j]), j) for j in range(weight.shape[1]))
        for _, j in scored[:gone]:
            out[row, j] = 0.0
    return out


@pytest.mark.parametrize(("score", "density"), [("wanda", 0.5), ("wanda", 0.33), ("magnitude", 0.6)])
def test_rows_by_hand(score: str, density: float, tmp_path: Path) -> None:
    """In every row floor((1 - density) inputs) go, by tokens of the dense model; nothing else changes."""
    options = {"score": score, "density": density, "compare": "row", "inputs": "original"}
    compress(folder(GQA), tmp_path / "out", method="wanda", options=options)
    done, (_, tensors) = weights(tmp_path / "out"), canonical(GQA)
    for block in range(2):
        for name in BOTH:
            key = f"{layout.prefix(block)}{name}"
            weight = tensors[f"{key}.weight"]
            norms = (
                tokens_at(ours(GQA), key, CALIBRATION).norm(dim=0) if score == "wanda" else torch.ones(weight.shape[1])
            )
            gone = int((1 - density) * weight.shape[1] + 1e-9)
            assert torch.equal(done[f"{key}.weight"], zeros_by_hand(weight, norms, gone)), key


def test_magnitude_is_a_threshold_on_every_matrix(tmp_path: Path) -> None:
    """As the papers have their baseline; without text."""
    made = compress(folder("llama"), tmp_path / "out", method="wanda", options={"score": "magnitude", "density": 0.4})
    assert made.plan.calibration == {}
    done, (_, tensors) = weights(tmp_path / "out"), canonical("llama")
    for name in BOTH:
        key = f"{layout.prefix(1)}{name}.weight"
        numbers = sorted(tensors[key].abs().flatten().tolist())
        threshold = numbers[len(numbers) - round(0.4 * len(numbers))]
        assert torch.equal(done[key], tensors[key] * (tensors[key].abs() >= threshold))


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:4"])
def test_groups_by_hand(pattern: str, score: str, tmp_path: Path) -> None:
    kept, size = (int(one) for one in pattern.split(":"))
    options = {"score": score, "pattern": pattern, "inputs": "original"}
    compress(folder("llama"), tmp_path / "out", method="wanda", options=options)
    done, (_, tensors) = weights(tmp_path / "out"), canonical("llama")
    key = f"{layout.prefix(2)}mlp.down_proj"
    weight = tensors[f"{key}.weight"]
    norms = tokens_at(ours("llama"), key, CALIBRATION).norm(dim=0) if score == "wanda" else torch.ones(weight.shape[1])
    for first in range(0, weight.shape[1], size):
        at = slice(first, first + size)
        assert torch.equal(done[f"{key}.weight"][:, at], zeros_by_hand(weight[:, at], norms[at], size - kept))


@pytest.mark.parametrize("inputs", ["compressed", "stepwise"])
def test_what_is_measured_is_what_is_sparse_already(inputs: str, tmp_path: Path) -> None:
    """The last linear of the last block, from tokens of the result, its own half dense or not."""
    compress(folder("llama"), tmp_path / "out", method="wanda", options={"inputs": inputs})
    done, (config, tensors) = weights(tmp_path / "out"), canonical("llama")
    key = f"{layout.prefix(2)}mlp.down_proj"
    before = done | ({name: tensors[name] for name in done if name.startswith(f"{layout.prefix(2)}mlp")}
                     if inputs == "compressed" else {})  # fmt: skip
    norms = tokens_at(loaded(config, before), key, CALIBRATION).norm(dim=0)
    assert torch.equal(done[f"{key}.weight"], zeros_by_hand(tensors[f"{key}.weight"], norms, 40))


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"density": 0.45}
    result = compress(folder(name), tmp_path / "out", method="wanda", options=options)
    assert result.stock
    assert preview(folder(name), method="wanda", options=options).after == result.after
    assert torch.isfinite(logits(result.load(), HELD_OUT)).all()


def test_at_density_1_every_byte_is_the_same(tmp_path: Path) -> None:
    compress(folder(GQA), tmp_path / "out", method="wanda", options={"density": 1})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder(GQA) / "model.safetensors").read_bytes()


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for place in ("one", "two"):
        compress(folder(GQA), tmp_path / place, method="wanda")
        files.append((tmp_path / place / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for options, words in (
        ({"density": -0.1}, r"density=-0.1 of wanda is outside \(0, 1\]"),
        ({"pattern": "2:4", "density": 0.6}, "pattern=2:4 of wanda is a density of 0.5, not 0.6"),
        ({"pattern": "7:9"}, "groups of 9 do not divide"),
    ):
        with raises(BadInput, words):
            compress(folder("llama"), tmp_path / "out", method="wanda", options=options)
        assert not (tmp_path / "out").exists()
