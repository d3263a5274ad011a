"""Trained models: what chooses by activations or gradients does better than the lot at equal size."""

from pathlib import Path
from typing import Any

import pytest
import torch

import microtome
from microtome.data import Tokens
from microtome.evaluate import perplexity

SHARED = Path(__file__).parents[2].parent / "shared"

pytestmark = [pytest.mark.real, pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")]


def measured(name: str, method: str, out: Path, **chosen: Any) -> tuple[int, float]:
    """Stored parameters and perplexity, calibrated on 32 windows."""
    ids = {
        kind: torch.load(SHARED / "data" / "tokens" / f"{name}.{kind}.pt", weights_only=True)
        for kind in ("calib", "eval")
    }
    asked = {"keep": 0.8, "method": method, "data": ids["calib"][:32], "measure": False, "out": out, **chosen}
    result = microtome.compress(SHARED / "models" / name, **asked)
    model = result.load(device="cpu", dtype="float32")
    return result.after.stored, perplexity(model, Tokens(ids["eval"][:32], "ids", "")).value


@pytest.mark.parametrize("name", ["stories-260k", "stories-3m"])
def test_better_than_by_lot(name: str, tmp_path: Path) -> None:
    by_lot = [measured(name, "random", tmp_path / f"random{seed}", options={"seed": seed}) for seed in range(3)]
    for method in ("flap", "llmpruner", "surgeon"):
        size, value = measured(name, method, tmp_path / method, allocate="uniform")
        assert size <= 1.01 * by_lot[0][0]
        assert value < 0.8 * min(value for _, value in by_lot)


def test_the_block_with_the_least_influence_is_missed_least(tmp_path: Path) -> None:
    """Of the six single blocks of this model; Men et al. claim no more than a tendency."""
    alone = [
        measured("stories-3m", "depth", tmp_path / str(block), keep=None, allocate={str(block): 0})[1]
        for block in range(6)
    ]
    assert measured("stories-3m", "depth", tmp_path / "chosen", keep=0.83)[1] == min(alone)
