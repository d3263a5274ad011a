"""Trained models, sliced in the paper's form and packed: the ceiling is nearly met, and perplexity stays."""

from pathlib import Path
from typing import Any

import pytest
import torch

import microtome
from microtome import arch, bitsback, data
from microtome.bitsback import sites
from microtome.evaluate import perplexity
from microtome.loading import load
from microtome.running import generate
from microtome.shards import read_config

SHARED = Path(__file__).parents[2].parent / "shared"

pytestmark = [pytest.mark.real, pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")]

FORM = {"basis": "junction", "gauge": "dense", "untie": True}


@pytest.mark.parametrize("name", ["stories-3m", "shakespeare-opt-0.8m"])
def test_a_sliced_model_is_packed(name: str, tmp_path: Path) -> None:
    tokens = SHARED / "data" / "tokens"
    common: dict[str, Any] = {"options": FORM, "dtype": "float16", "samples": None, "measure": False}
    microtome.compress(
        SHARED / "models" / name, data=tokens / f"{name}.calib.pt", slice=0.25, out=tmp_path / "cut", **common
    )
    found: dict[str, float] = {"cut": measured(tmp_path / "cut", name)}
    config = arch.lower(read_config(tmp_path / "cut"))
    dimensions = sum(site.turned * (site.turned - 1) // 2 for site in sites.cut(config).sites)
    for kind, exact in (("loose", False), ("exact", True)):
        report = bitsback.pack(tmp_path / "cut", tmp_path / f"{kind}.mtpack", exact=exact)
        saved = 1 - report.bytes["weights"] / report.bytes["model"]
        assert (0.75 if exact else 0.9) * 2 * dimensions < saved * report.bytes["model"] < 2 * dimensions
        assert report.words["listed"] < 5e-3 * report.words["taken"]
        bitsback.unpack(tmp_path / f"{kind}.mtpack", tmp_path / kind)
        found[kind] = measured(tmp_path / kind, name)
    assert abs(found["loose"] / found["cut"] - 1) < 2e-3
    assert abs(found["exact"] / found["cut"] - 1) < 2e-3
    prompt = "Once upon a time" if name == "stories-3m" else "ROMEO"
    text = [generate(tmp_path / one, prompt, tokens=12, dtype="float32") for one in ("cut", "exact")]
    assert text[0] == text[1]
    assert len(text[0]) > len(prompt)


def measured(folder: Path, name: str) -> float:
    """Perplexity of the first windows."""
    loaded = load(folder, device=torch.device("cpu"), dtype=torch.float32)
    file, size = SHARED / "data" / "tokens" / f"{name}.eval.pt", loaded.config.vocab_size
    length = torch.load(file, weights_only=True).shape[1]
    return perplexity(loaded, data.evaluation(str(file), None, length=length, vocab_size=size, limit=16)).value
