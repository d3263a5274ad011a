"""Which weights go: counted and chosen by trying all."""

import itertools

import pytest
import torch
from folders import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, canonical
from sweeping import BOTH, correlated, damped, moment_of
from torch import Tensor

from microtome import arch, grid, sparsity
from microtome.compensate import swept
from microtome.errors import BadInput


def scores_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "gpt2-untied", "phi3-partial-longrope"])
def test_linears_inside_the_blocks_and_no_other(name: str) -> None:
    """Every matrix of a block but norms, biases and buffers; neither embeddings nor head."""
    config, tensors = canonical(name)
    want = {
        (int(key.split(".")[2]), ".".join(key.split(".")[3:5]), tuple(tensor.shape))
        for key, tensor in tensors.items()
        if key.startswith("model.layers.") and key.endswith("weight") and tensor.ndim == 2
    }
    found = set(sparsity.shapes(config))
    assert found == want
    assert {name for _, name, _ in found} <= set(BOTH)
    assert sparsity.weights(config) == sum(rows * columns for _, _, (rows, columns) in want)


def test_the_lowest_by_sorting_everything() -> None:
    score = scores_of(6, 8)
    score[2:4] = 0.5  # ties
    flat = sorted((value, place) for place, value in enumerate(score.flatten().tolist()))
    for count in (0, 1, 17, 48):
        mask = sparsity.lowest(score, count)
        assert set(mask.flatten().nonzero().flatten().tolist()) == {place for _, place in flat[:count]}
    for count in (0, 3, 8):
        mask = sparsity.lowest_of_rows(score, count)
        for row in range(6):
            ranked = sorted(range(8), key=lambda place, row=row: (score[row, place].item(), place))
            assert set(mask[row].nonzero().flatten().tolist()) == set(ranked[:count])


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_groups_by_trying_all_masks(pattern: tuple[int, int]) -> None:
    kept, size = pattern
    score = scores_of(5, 3 * size)
    mask = sparsity.lowest_of_groups(score, pattern)
    for row, first in itertools.product(range(5), range(0, 3 * size, size)):
        group = score[row, first : first + size]
        best = min(itertools.combinations(range(size), size - kept), key=lambda gone: sum(group[one] for one in gone))
        assert mask[row, first : first + size].nonzero().flatten().tolist() == list(best)


def test_two_of_four_cost_least_of_all_masks() -> None:
    """A row of four weights whose inputs have nothing to do with each other: of all six masks the cheapest."""
    energy = torch.tensor([0.3, 2.0, 1.0, 0.7], dtype=torch.float64)
    hessian = torch.diag(energy)
    for seed in range(10):
        weight = scores_of(1, 4, seed) - 0.5
        done = swept(weight, hessian, sparsity.by_groups((2, 4))).weight
        losses = {gone: (weight[0, list(gone)] ** 2 * energy[list(gone)]).sum().item() for gone in
                  itertools.combinations(range(4), 2)}  # fmt: skip
        assert tuple((done[0] == 0).nonzero().flatten().tolist()) == min(losses, key=lambda gone: losses[gone])


def test_groups_are_chosen_when_the_sweep_comes_to_them() -> None:
    """From the weights as they are by then: the second group of a row, by hand."""
    hessian, weight = damped(moment_of(correlated(8))), scores_of(3, 8) - 0.5
    live = weight.clone()
    for first in (0, 4):
        lefts = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(first, first + 4)])
        gone = sparsity.lowest_of_groups(live[:, first : first + 4].square() / lefts, (2, 4))
        for column in range(first, first + 4):
            inverse = torch.linalg.inv(hessian[column:, column:])
            change = live[:, column].masked_fill(~gone[:, column - first], 0.0) / inverse[0, 0]
            live[:, column:] -= change[:, None] * inverse[0]
            live[:, column][gone[:, column - first]] = 0.0
    have = swept(weight, moment_of(correlated(8)), sparsity.by_groups((2, 4))).weight
    assert torch.allclose(have, live, rtol=1e-8, atol=1e-10)
    at_once = sparsity.lowest_of_groups(weight.square(), (2, 4))
    assert not torch.equal(have == 0, at_once)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 20), block=st.integers(1, 21), data=st.data())
def test_blocks_share_the_zeros_to_the_last(rows: int, columns: int, block: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(0, rows * columns))
    weight = scores_of(rows, columns) + 0.5
    done = swept(weight, torch.eye(columns, dtype=torch.float64), sparsity.by_blocks(total), block=block).weight
    assert int((done == 0).sum()) == total
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        share = total * (stop - start) / columns
        assert abs(int((done[:, start:stop] == 0).sum()) - share) < 1 + 1e-9


def test_rounding_in_the_sweep_leaves_zeros_and_grids() -> None:
    hessian, weight = moment_of(correlated(8)), scores_of(4, 8) + 1.0
    done = swept(weight, hessian, sparsity.rounded(sparsity.by_blocks(16), weight, 3, 4)).weight
    assert int((done == 0).sum()) >= 16
    for first in (0, 4):
        own = grid.fit(weight[:, first : first + 4], 3)
        assert torch.equal(grid.round_to(own, done[:, first : first + 4]), done[:, first : first + 4])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=8), density=st.floats(0.05, 1.0), seed=st.integers(0, 999)
)
def test_shares_come_to_the_total(sizes: list[int], density: float, seed: int) -> None:
    """Each within one of its own wish."""
    generator = torch.Generator().manual_seed(seed)
    lean = (torch.rand(len(sizes), generator=generator) * 0.1 * min(density, 1 - density)).tolist()
    densities = {number: density - one for number, one in enumerate(lean)}
    counts = dict(enumerate(sizes))
    total = round(sum((1 - densities[number]) * size for number, size in counts.items()))
    wished = sum((1 - densities[number]) * size for number, size in counts.items())
    if total > wished:  # rounded up: the densities say a little less
        total -= 1
    found = sparsity.shares(densities, counts, total)
    floors = sum(int((1 - densities[number]) * size + 1e-9) for number, size in counts.items())
    assert sum(found.values()) == max(total, floors)
    assert all(abs(found[number] - (1 - densities[number]) * size) < 1 + 1e-6 for number, size in counts.items())


@pytest.mark.parametrize("pattern", ["2", "4:2", "2:2", "0:4", "a:b", "2:4:8", "-2:4", ""])
def test_patterns_that_are_none(pattern: str) -> None:
    with raises(BadInput, f"pattern={pattern} of sparsegpt is no N:M: write 2:4"):
        sparsity.pattern_of("sparsegpt", pattern)


def test_a_matrix_that_groups_do_not_divide_is_named() -> None:
    config = arch.lower(TINY["llama"] | {"intermediate_size": 82})
    with raises(BadInput, r"model.layers.0.mlp.down_proj.weight reads 82 numbers, which groups of 4 do not divide"):
        sparsity.check_pattern(config, "wanda", "2:4")
