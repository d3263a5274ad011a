"""Exact optimal brain surgery: greedy by the formulas, one inverse at a time; best for its zeros, whatever they are."""

import itertools
from pathlib import Path

import pytest
import torch
from acceptance import BRIEF
from folders import raises
from models import canonical, error, logits, ours, stock
from sweeping import correlated, damped, moment_of, refitted, spent, tokens_at
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

from microtome import layout
from microtome.errors import BadInput
from microtome.forecast import preview
from microtome.methods import obs
from microtome.methods.obs import OBS


def weight_of(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def greedy_by_hand(row: Tensor, hessian: Tensor, count: int) -> tuple[list[int], list[float]]:
    """The weights that go, in turn, and what each costs: for every candidate the loss of all zeros so far and it."""
    gone, costs, before = list[int](), list[float](), 0.0
    for _ in range(count):
        losses = {}
        for one in set(range(len(row))) - set(gone):
            zero = torch.zeros(1, len(row), dtype=torch.bool)
            zero[0, [*gone, one]] = True
            losses[one] = spent(row[None], refitted(row[None], hessian, zero), hessian).item()
        best = min(losses, key=lambda one: losses[one])
        gone.append(best)
        costs.append(losses[best] - before)
        before = losses[best]
    return gone, costs


def test_each_weight_in_turn_by_refitting_all() -> None:
    """Which goes, what it costs, and what is left: by least squares over every set that could be."""
    hessian, weight = damped(moment_of(correlated(7))), weight_of(3, 7)
    done, costs = obs.greedy(weight, torch.linalg.inv(hessian), torch.tensor([4, 4, 2]), None)
    for row, count in enumerate([4, 4, 2]):
        gone, want = greedy_by_hand(weight[row], hessian, count)
        assert (done[row] == 0).nonzero().flatten().tolist() == sorted(gone)
        assert costs[row, :count].tolist() == pytest.approx(want, rel=1e-6)
        assert torch.isinf(costs[row, count:]).all()
    assert error(done, refitted(weight, hessian, done == 0)) < 1e-8
    assert torch.allclose(spent(weight, done, hessian), costs.masked_fill(costs.isinf(), 0.0).sum(1), rtol=1e-7)


def test_one_weight_is_the_closed_form() -> None:
    hessian, weight = damped(moment_of(correlated(6))), weight_of(1, 6)
    inverse = torch.linalg.inv(hessian)
    best = int((weight[0].square() / inverse.diagonal()).argmin())
    want = weight - weight[0, best] / inverse[best, best] * inverse[best]
    assert error(obs.greedy(weight, inverse, torch.tensor([1]), None)[0], want) < 1e-10


def test_rows_compete_for_the_zeros_of_a_matrix() -> None:
    """By a heap: the row whose next zero is cheapest takes it."""
    moment, weight = moment_of(correlated(6)), weight_of(4, 6) * torch.tensor([[0.1], [1.0], [1.0], [5.0]]).double()
    hessian = damped(moment)
    turns = [greedy_by_hand(row, hessian, 6)[1] for row in weight]
    counts = [0, 0, 0, 0]
    for _ in range(12):
        counts[min((one for one in range(4) if counts[one] < 6), key=lambda one: turns[one][counts[one]])] += 1
    done = OBS().pruned(weight, moment)
    assert (done == 0).sum(1).tolist() == counts
    assert counts[0] > counts[3]
    assert (OBS(compare="row").pruned(weight, moment) == 0).sum(1).tolist() == [3, 3, 3, 3]


def test_one_of_four_is_the_best_of_all_masks() -> None:
    """A group of four of which one goes: of all four ways the cheapest; two of four are no worse than magnitude's."""
    moment, weight = moment_of(correlated(4)), weight_of(5, 4)
    hessian = damped(moment)
    done = OBS(pattern="3:4").pruned(weight, moment)
    for row in range(5):
        losses = {}
        for one in range(4):
            zero = torch.zeros(1, 4, dtype=torch.bool)
            zero[0, one] = True
            losses[one] = spent(weight[row : row + 1], refitted(weight[row : row + 1], hessian, zero), hessian).item()
        assert (done[row] == 0).nonzero().flatten().tolist() == [min(losses, key=lambda one: losses[one])]
    two = OBS(pattern="2:4").pruned(weight, moment)
    every = []
    for gone in itertools.combinations(range(4), 2):
        zero = torch.zeros(5, 4, dtype=torch.bool)
        zero[:, list(gone)] = True
        every.append(spent(weight, refitted(weight, hessian, zero), hessian))
    best, worst = torch.stack(every).amin(0), torch.stack(every).amax(0)
    loss = spent(weight, two, hessian)
    assert (loss >= best - 1e-9).all()
    assert loss.sum() < 0.5 * (best + worst).sum()


@pytest.mark.parametrize("name", BRIEF[1:])
def test_checkpoints(name: str, tmp_path: Path) -> None:
    """What a dry run says, groups of four, and nearer to the dense model than SparseGPT and Wanda at the same zeros."""
    options = {"pattern": "2:4"}
    made = compress(folder(name), tmp_path / "out", method="obs", options=options)
    assert made.stock
    assert preview(folder(name), method="obs", options=options).after == made.after
    want, off = logits(stock(name), HELD_OUT), {}
    for method in ("wanda", "sparsegpt"):
        other = compress(folder(name), tmp_path / method, method=method, options=options)
        off[method] = (logits(other.load(), HELD_OUT) - want).square().mean().item()
        assert other.after.nonzero == made.after.nonzero
    assert (logits(made.load(), HELD_OUT) - want).square().mean().item() < off["sparsegpt"] < off["wanda"]


def test_a_matrix_of_a_checkpoint(tmp_path: Path) -> None:
    """Rows of fp32 weights, from tokens of the dense model."""
    options = {"inputs": "original", "compare": "row", "density": 0.9}
    compress(folder("llama-gqa-llama3-tied"), tmp_path / "out", method="obs", options=options)
    key = f"{layout.prefix(1)}self_attn.k_proj"
    weight = canonical("llama-gqa-llama3-tied")[1][f"{key}.weight"].double()
    hessian = damped(moment_of(tokens_at(ours("llama-gqa-llama3-tied"), key, CALIBRATION)))
    done = weights(tmp_path / "out")[f"{key}.weight"]
    count = weight.shape[1] - round(0.9 * weight.shape[1])
    for row in (0, len(weight) - 1):
        gone, _ = greedy_by_hand(weight[row], hessian, count)
        assert (done[row] == 0).nonzero().flatten().tolist() == sorted(gone)
    assert error(done, refitted(weight, hessian, done == 0)) < 1e-5


def test_what_would_take_too_long_is_refused(tmp_path: Path) -> None:
    with raises(
        BadInput, r"obs inverts a matrix for every row, and mlp.down_proj of block 0 reads 80 numbers, over widest=79"
    ):
        compress(folder("llama"), tmp_path / "out", method="obs", options={"widest": 79})
    with raises(BadInput, r"density=2.0 of obs is outside \(0, 1\]"):
        compress(folder("llama"), tmp_path / "out", method="obs", options={"density": 2})
    assert not (tmp_path / "out").exists()


def test_at_density_1_every_byte_is_the_same(tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "out", method="obs", options={"density": 1})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder("llama") / "model.safetensors").read_bytes()
