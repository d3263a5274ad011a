"""Trained models with half of their weights set to zero: the order that the papers find."""

from pathlib import Path
from typing import Any

import pytest
import torch

import microtome
from microtome.data import Tokens
from microtome.evaluate import perplexity

SHARED = Path(__file__).parents[2].parent / "shared"

pytestmark = [pytest.mark.real, pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")]


def measured(name: str, method: str, out: Path, **options: Any) -> tuple[int | None, float]:
    """Numbers that are not zero and perplexity, calibrated on 32 windows."""
    ids = {
        kind: torch.load(SHARED / "data" / "tokens" / f"{name}.{kind}.pt", weights_only=True)
        for kind in ("calib", "eval")
    }
    result = microtome.compress(
        SHARED / "models" / name, method=method, options=options, data=ids["calib"][:32], measure=False, out=out
    )
    model = result.load(device="cpu", dtype="float32")
    return result.after.nonzero, perplexity(model, Tokens(ids["eval"][:16], "ids", "")).value


@pytest.mark.parametrize("name", ["stories-3m", "wiki-opt-6m"])
def test_who_makes_up_for_more_loses_less(name: str, tmp_path: Path) -> None:
    """At equal zeros: magnitude, then Wanda, then SparseGPT; and sparser matrices where the loss feels little."""
    asked: list[tuple[str, dict[str, Any]]] = [("wanda", {"score": "magnitude"}), ("wanda", {}), ("sparsegpt", {})]
    found = [measured(name, method, tmp_path / str(n), **options) for n, (method, options) in enumerate(asked)]
    assert len({nonzero for nonzero, _ in found}) == 1
    losses = [value for _, value in found]
    assert losses == sorted(losses, reverse=True)
