"""Grids: every value found by trying all, zero exactly among them."""

import pytest
import torch
from folders import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microtome import grid
from microtome.errors import BadInput


def rows_of(seed: int, shift: float = 0.0) -> Tensor:
    found = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    found[:, 2] = 0.0
    found[1] = 0.0
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), bits=st.integers(2, 5), symmetric=st.booleans(), shift=st.sampled_from([0.0, 4.0, -4.0])
)
def test_the_nearest_of_all_values(seed: int, bits: int, symmetric: bool, shift: float) -> None:
    """2^bits values at even distances, from the row's smallest to its largest weight, zero among them."""
    weight = rows_of(seed, shift)
    found = grid.fit(weight, bits, symmetric=symmetric)
    have = grid.round_to(found, weight)
    for row in range(5):
        numbers, codes = weight[row].tolist(), range(2**bits)
        low, high = min(*numbers, 0.0), max(*numbers, 0.0)
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        step = (high - low) / (2**bits - 1) or 1.0
        zero = 2 ** (bits - 1) if symmetric else round(-low / step)
        values = [(code - zero) * step for code in codes]
        assert 0.0 in values
        for number, one in zip(numbers, have[row].tolist(), strict=True):
            assert min(abs(one - value) for value in values) < 1e-12
            assert abs(one - number) <= min(abs(value - number) for value in values) + 1e-12
            assert abs(one - number) <= step / 2 + 1e-12  # nothing is cut off by more than a rounding
    assert not have[weight == 0].any()
    assert torch.equal(grid.values(found, grid.codes(found, weight)), have)
    assert torch.equal(grid.round_to(found, have), have)


def test_scales_that_are_stored_shorter() -> None:
    found = grid.fit(rows_of(3), 4).stored_as(torch.bfloat16)
    assert torch.equal(found.scale, found.scale.bfloat16().double())
    assert not torch.equal(found.scale, grid.fit(rows_of(3), 4).scale)


@pytest.mark.parametrize("bits", [-1, 0, 1, 17])
def test_bits_that_no_grid_has(bits: int) -> None:
    with raises(BadInput, f"bits={bits} is no number of bits from 2 to 16"):
        grid.fit(rows_of(0), bits)
