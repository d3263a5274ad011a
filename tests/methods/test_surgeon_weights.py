"""LLM Surgeon for single weights: the threshold by hand, the updates by the definition, counts, and patterns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import BRIEF, parts, with_bias
from folders import raises
from models import TINY, built, canonical, error, logits
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

import microtome
from microtome import fisher, layout, planner, sparsity
from microtome.errors import BadInput
from microtome.methods.surgeon_weights import SurgeonWeights, below_threshold
from microtome.narrow import view_of
from microtome.source import open_source
from microtome.sparsity import READS
from microtome.stats import Fisher, Stat
from microtome.survey import Statistics

QUICK = {"sequences": 5, "length": 16, "correlate": 100}
NAME = "surgeon_weights"


def curved(name: str, method: SurgeonWeights) -> Statistics:
    with open_source(folder(name)) as source:
        found = fisher.factors(planner.opened(source), CALIBRATION, method.curvature, device=torch.device("cpu"))
        return Statistics(dict(found))


def linears(name: str, block: int) -> list[str]:
    return [linear for linear in READS if f"{linear}.weight" in parts(name, block)]


def damped(matrix: Tensor, damping: float) -> Tensor:
    matrix = matrix.double()
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def inverses(name: str, block: int, linear: str, statistics: Statistics, damping: float) -> tuple[Tensor, Tensor]:
    factors, wide = statistics.found[block, Stat.FISHER], with_bias(parts(name, block), linear, slice(None)).shape[1]
    assert isinstance(factors, Fisher)
    a = damped(factors.inputs[READS[linear]][:wide, :wide], damping)
    return torch.linalg.inv(a), torch.linalg.inv(damped(factors.outputs[linear], damping))


def stored(out: Path, name: str, block: int, linear: str) -> Tensor:
    tensors = weights(out)
    if name == "llama":
        return tensors[f"{layout.prefix(block)}{linear}.weight"].double()
    short = {"self_attn.o_proj": "self_attn.out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2"}.get(linear, linear)
    return tensors[f"model.decoder.layers.{block}.{short}.weight"].double()


def test_density_1_leaves_every_byte(tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "out", method=NAME, options={"density": 1.0})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder("llama") / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [*BRIEF, "gpt_neox", "gemma2"])
def test_runs_and_loads(name: str, tmp_path: Path) -> None:
    """Twice the same bytes; as many zeros as the density says; the size that a dry run tells."""
    asked: dict[str, Any] = {"method": NAME, "options": {**QUICK, "density": 0.7}}
    config = canonical(name)[0]
    first, again = (compress(folder(name), tmp_path / place, **asked) for place in ("first", "again"))
    assert weights(tmp_path / "first").keys() == weights(tmp_path / "again").keys()
    assert all(torch.equal(one, weights(tmp_path / "again")[key]) for key, one in weights(tmp_path / "first").items())
    assert torch.isfinite(logits(first.load(), HELD_OUT)).all()
    assert first.after == again.after
    assert first.before.nonzero is not None
    assert first.after.nonzero is not None
    gone = first.before.nonzero - first.after.nonzero
    assert gone == sum(sparsity.gone(rows * columns, 0.7) for _, _, (rows, columns) in sparsity.shapes(config))
    assert microtome.preview(folder(name), **asked).after.nonzero == first.after.nonzero
    whole = compress(folder(name), tmp_path / "model", method=NAME, options={**asked["options"], "scope": "model"})
    assert whole.after.nonzero == first.before.nonzero - sparsity.gone(sparsity.weights(config), 0.7)


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_one_threshold_for_all_matrices(name: str, tmp_path: Path) -> None:
    """By sorting the costs of all weights, each written out from inverses."""
    options = {**QUICK, "density": 0.6, "update": "none", "damp_a": 0.02, "damp_g": 0.02, "scope": "model"}
    compress(folder(name), tmp_path / "out", method=NAME, options=options)
    statistics, costs, masks = curved(name, SurgeonWeights(sequences=5, length=16)), list[Tensor](), list[Tensor]()
    for block in range(3):
        for linear in linears(name, block):
            ai, gi = inverses(name, block, linear, statistics, 0.02)
            w = parts(name, block)[f"{linear}.weight"]
            cost = w.square() / (2 * gi.diagonal()[:, None] * ai.diagonal()[None, : w.shape[1]])
            costs.append(cost.flatten())
            masks.append((stored(tmp_path / "out", name, block, linear) == 0).flatten())
    every, gone = torch.cat(costs), torch.cat(masks)
    assert every[gone].max() <= every[~gone].min() * (1 + 1e-5)
    assert int(gone.sum()) == every.numel() - round(0.6 * every.numel())
    shares = {round(float(mask.double().mean()), 3) for mask in masks}
    assert len(shares) > 3, "matrices lose different shares"


def test_weights_that_stay_make_up_for_the_others() -> None:
    """A whole matrix in one group: W' minimises the metric's cost among matrices with these zeros (its slope is 0)."""
    method = SurgeonWeights(density=0.8, scope="matrix", correlate=10**6, sequences=4, damp_a=0.05, damp_g=0.05)
    statistics = curved("opt-tied", method)
    with open_source(folder("opt-tied")) as source:
        found = planner.opened(source)
        view = view_of(found, method, 1, found.read(1, torch.float64), ("attn", "mlp"), statistics)
    new = {edit.tensor.removeprefix(layout.prefix(1)): edit.value for edit in method.solve(view)}
    for linear in ("self_attn.k_proj", "mlp.down_proj"):
        old = with_bias(parts("opt-tied", 1), linear, slice(None))
        have = torch.cat([new[f"{linear}.weight"], new[f"{linear}.bias"][:, None]], 1)
        gone = torch.cat([new[f"{linear}.weight"] == 0, torch.zeros(len(old), 1, dtype=torch.bool)], 1)
        assert int(gone.sum()) == sparsity.gone(new[f"{linear}.weight"].numel(), 0.8)
        ai, gi = inverses("opt-tied", 1, linear, statistics, 0.05)
        slope = torch.linalg.inv(gi) @ (have - old) @ torch.linalg.inv(ai)
        assert slope[~gone].abs().max() < 1e-6 * slope[gone].abs().max()


@pytest.mark.parametrize("name", ["opt-tied"])
def test_two_products(name: str, tmp_path: Path) -> None:
    """Counts as with one, and where weights are free the slope of both products' cost vanishes."""
    asked: dict[str, Any] = {"method": NAME, "options": {**QUICK, "density": 0.7, "rank": 2, "scope": "model"}}
    result = compress(folder(name), tmp_path / "out", **asked)
    assert result.before.nonzero is not None
    assert result.after.nonzero is not None
    gone = result.before.nonzero - result.after.nonzero
    assert gone == sparsity.gone(sparsity.weights(canonical(name)[0]), 0.7)
    method = SurgeonWeights(density=0.8, scope="matrix", correlate=10**6, sequences=4, damp_a=0.05, damp_g=0.05, rank=2)
    statistics = curved(name, method)
    with open_source(folder(name)) as source:
        found = planner.opened(source)
        view = view_of(found, method, 1, found.read(1, torch.float64), ("attn", "mlp"), statistics)
    new = {edit.tensor.removeprefix(layout.prefix(1)): edit.value for edit in method.solve(view)}
    factors, linear = statistics.found[1, Stat.FISHER], "self_attn.k_proj"
    assert isinstance(factors, Fisher)
    old = with_bias(parts(name, 1), linear, slice(None))
    biased = [new[f"{linear}.bias"][:, None]] if f"{linear}.bias" in new else []
    have = torch.cat([new[f"{linear}.weight"], *biased], 1)
    slope = sum(damped(g, 0.05) @ (have - old) @ damped(a, 0.05) for a, g in zip(*factors.pairs[linear], strict=True))
    assert isinstance(slope, Tensor)
    struck = torch.cat([new[f"{linear}.weight"] == 0, *(torch.zeros(len(old), 1, dtype=torch.bool) for _ in biased)], 1)
    assert slope[~struck].abs().max() < 1e-6 * slope[struck].abs().max()


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_2_of_4(name: str, tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", method=NAME, options={**QUICK, "pattern": "2:4"})
    for block in range(3):
        for linear in linears(name, block):
            zeros = stored(tmp_path / "out", name, block, linear) == 0
            assert (zeros.view(zeros.shape[0], -1, 4).sum(2) == 2).all()
    assert result.stock


def test_dead_inputs_go_first(tmp_path: Path) -> None:
    """Neurons that never fire: their columns cost next to nothing, and without them nothing changes."""
    model = built(TINY["llama"])
    for block in model.model.layers:
        block.mlp.up_proj.weight.data[:40] = 0.0
    model.save_pretrained(tmp_path / "source")
    gone = 3 * 40 * canonical("llama")[0].hidden_size  # of the down projections; as many are zero in up already
    density = 1 - 2 * gone / sparsity.weights(canonical("llama")[0])
    options = {"density": density, "damp_a": 1e-6, "scope": "model"}
    result = compress(tmp_path / "source", tmp_path / "out", method=NAME, options=options)
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) < 1e-3


def test_ties_are_counted_once() -> None:
    costs = {(0, "a"): torch.tensor([1.0, 2.0, 2.0]), (0, "b"): torch.tensor([2.0, 0.5, 3.0])}
    assert below_threshold(costs, 3) == {(0, "a"): 2, (0, "b"): 1}
    assert below_threshold(costs, 4) == {(0, "a"): 3, (0, "b"): 1}
    assert below_threshold(costs, 0) == {(0, "a"): 0, (0, "b"): 0}
    assert sum(below_threshold({(0, "a"): torch.zeros(9)}, 5).values()) == 5


@pytest.mark.parametrize(("options", "words"), [
    ({"density": 0.0}, "density=0.0 of surgeon_weights is outside"),
    ({"pattern": "4:2"}, "pattern=4:2 of surgeon_weights is no N:M"),
    ({"damp_g": -0.1}, "damp_g=-0.1 of surgeon_weights is no number from 0 on"),
    ({"rank": 0}, "rank=0 of surgeon_weights is 1 or 2: three products have no basis in which all are diagonal"),
    ({"correlate": 0}, "correlate=0 of surgeon_weights is no number of weights"),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with raises(BadInput, words):
        compress(folder("llama"), tmp_path / "out", method=NAME, options=options)
    assert not (tmp_path / "out").exists()
