"""The methods' linear algebra by what it promises, for any sizes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microtome.errors import NumericalFailure
from microtome.linalg import eigh_descending, factor_deficit, polar, solve_psd, to_uniform

SEED = st.integers(0, 2**31)
quick = settings(max_examples=60, deadline=None)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(size: int, rank: int, seed: int) -> Tensor:
    """Columns [size, rank]."""
    return torch.linalg.qr(normal(size, size, seed=seed))[0][:, :rank]


def same(have: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(have, want, atol=1e-9, rtol=1e-9)


@quick
@given(size=st.integers(1, 12), seed=SEED)
def test_eigenvectors_come_largest_first(size: int, seed: int) -> None:
    values = torch.linspace(5.0, 0.0, size, dtype=torch.float64)
    vectors = orthonormal(size, size, seed)
    moment = vectors * values @ vectors.T
    have, basis = eigh_descending(moment, "x")
    torch.testing.assert_close(have, values, atol=1e-9, rtol=0)
    same(basis.T @ basis, torch.eye(size, dtype=torch.float64))
    same(basis * have @ basis.T, moment)
    assert have.dtype == basis.dtype == torch.float64
    lopsided, _ = eigh_descending(moment + normal(size, size, seed=seed).triu(1) * 1e-12, "x")
    torch.testing.assert_close(lopsided, values, atol=1e-9, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_that_are_not_finite_are_named(bad: float) -> None:
    moment = torch.eye(3, dtype=torch.float64)
    moment[1, 2] = bad
    with pytest.raises(NumericalFailure, match=r"the statistics of residual\.7 are not finite"):
        eigh_descending(moment, "residual.7")


@quick
@given(st.integers(1, 40))
def test_the_reflection_carries_the_last_unit_vector_to_the_uniform_one(size: int) -> None:
    turn = to_uniform(size)
    last = torch.eye(size, dtype=torch.float64)[:, -1]
    uniform = torch.full((size,), size**-0.5, dtype=torch.float64)
    same(turn @ last, uniform)
    same(turn @ uniform, last)
    same(turn, turn.T)
    same(turn @ turn, torch.eye(size, dtype=torch.float64))


@quick
@given(size=st.integers(1, 10), rank=st.integers(0, 10), columns=st.integers(0, 3), seed=SEED)
def test_singular_systems_get_the_least_squares_solution(size: int, rank: int, columns: int, seed: int) -> None:
    """Against the pseudo-inverse, for systems of any rank; no columns means a plain vector."""
    factor = orthonormal(size, min(rank, size), seed) * torch.linspace(1.0, 2.0, min(rank, size), dtype=torch.float64)
    matrix = factor @ factor.T
    right = normal(size, *([columns] if columns else []), seed=seed + 1)
    have = solve_psd(matrix, right)
    assert have.shape == right.shape
    same(have, torch.linalg.pinv(matrix, rtol=1e-8, hermitian=True) @ right)


def test_a_dead_channel_costs_nothing() -> None:
    """A coordinate that is always zero gets zero, whatever stands on the right, and does not disturb the others."""
    matrix = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    have = solve_psd(matrix, torch.tensor([3.0, 0.0, 7.0]))
    same(have, torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64))
    assert torch.equal(solve_psd(torch.zeros(2, 2), torch.ones(2)), torch.zeros(2, dtype=torch.float64))


@quick
@given(narrow=st.integers(1, 8), more=st.integers(0, 4), seed=SEED)
def test_alignment_makes_any_shortcut_symmetric(narrow: int, more: int, seed: int) -> None:
    shortcut = normal(narrow + more, narrow, seed=seed)
    rotation = polar(shortcut)
    turned = rotation @ shortcut
    symmetric = turned[:narrow]
    same(rotation @ rotation.T, torch.eye(narrow + more, dtype=torch.float64))
    same(turned[narrow:], torch.zeros(more, narrow, dtype=torch.float64))
    same(symmetric, symmetric.T)
    assert torch.linalg.eigvalsh(symmetric).min() >= -1e-9
    same(symmetric @ symmetric, shortcut.T @ shortcut)  # the polar factor is unique


@quick
@given(size=st.integers(2, 12), data=st.data(), seed=SEED)
def test_what_two_subspaces_lack_has_few_dimensions(size: int, data: st.DataObject, seed: int) -> None:
    """I - S has rank at most n - r, and its factor says so exactly."""
    rank = data.draw(st.integers(1, size))
    before, after = orthonormal(size, rank, seed), orthonormal(size, rank, seed + 1)
    symmetric = polar(after.T @ before) @ after.T @ before
    identity = torch.eye(rank, dtype=torch.float64)
    assert torch.linalg.matrix_rank(identity - symmetric, atol=1e-8) <= size - rank
    factor = factor_deficit(symmetric, min(rank, size - rank))
    assert factor.shape == (rank, min(rank, size - rank))
    torch.testing.assert_close(identity - factor @ factor.T, symmetric, atol=1e-7, rtol=0)
