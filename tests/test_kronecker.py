"""Costs and updates under a Kronecker metric, against the constrained quadratic problem written out and solved."""

import pytest
import torch
from models import error
from torch import Tensor

from microtome.kronecker import Metric, grouped
from microtome.linalg import restoration

ROWS, COLUMNS = 6, 10


def spd(size: int, seed: int) -> Tensor:
    draws = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws.T @ draws / (3 * size)


def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def metric(damp_a: float = 0.0, damp_g: float = 0.0) -> Metric:
    return Metric.of(spd(COLUMNS, 1), spd(ROWS, 2), damp_a, damp_g, "same")


def by_force(w: Tensor, gone: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, float]:
    """The change D of least tr(G D A D^T) / 2 that makes the weights of a mask zero, by Lagrange's equations."""
    hessian, places = torch.kron(g, a), gone.flatten().nonzero()[:, 0]
    picks = torch.eye(w.numel(), dtype=torch.float64)[places]
    zero = torch.zeros(len(places), len(places), dtype=torch.float64)
    system = torch.cat([torch.cat([hessian, picks.T], 1), torch.cat([picks, zero], 1)])
    right = torch.cat([torch.zeros(w.numel(), dtype=torch.float64), -w.flatten()[places]])
    change = torch.linalg.solve(system, right)[: w.numel()]
    return (w.flatten() + change).view_as(w), float(change @ hessian @ change / 2)


def cost(change: Tensor, a: Tensor, g: Tensor) -> float:
    return float((g @ change @ a @ change.T).trace() / 2)


def mask(rows: list[int], columns: list[int]) -> Tensor:
    gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    gone[rows], gone[:, columns] = True, True
    return gone


@pytest.mark.parametrize(
    ("rows", "columns"), [([2], []), ([], [7]), ([0, 3], []), ([], [1, 8, 9]), ([1, 5], [0, 4, 6])]
)
def test_rows_and_columns(rows: list[int], columns: list[int]) -> None:
    a, g, w, one = spd(COLUMNS, 1), spd(ROWS, 2), weight(), metric()
    want, loss = by_force(w, mask(rows, columns), a, g)
    have = one.without_columns(one.without_rows(w, torch.tensor(rows)), torch.tensor(columns))
    assert error(have, want) < 1e-9
    other = one.without_rows(one.without_columns(w, torch.tensor(columns)), torch.tensor(rows))
    assert error(other, want) < 1e-9  # the two projections commute
    assert (have[mask(rows, columns)] == 0).all()
    if len(rows) + len(columns) == 1:
        assert float(one.rows(w)[rows] if rows else one.columns(w)[columns]) == pytest.approx(loss)
    masked = w.masked_fill(mask(rows, columns), 0.0)
    assert loss < cost(masked - w, a, g)


def test_the_released_sum_is_worse_for_both() -> None:
    a, g, w, one = spd(COLUMNS, 1), spd(ROWS, 2), weight(), metric()
    rows, columns = torch.tensor([1, 5]), torch.tensor([0, 4, 6])
    gone = mask([1, 5], [0, 4, 6])
    together = one.without_columns(one.without_rows(w, rows), columns)
    added = (one.without_rows(w, rows) + one.without_columns(w, columns) - w).masked_fill(gone, 0.0)
    assert cost(together - w, a, g) < cost(added - w, a, g) < cost(w.masked_fill(gone, 0.0) - w, a, g)


def test_single_weights() -> None:
    a, g, w, one = spd(COLUMNS, 1), spd(ROWS, 2), weight(), metric()
    costs = one.elements(w)
    for place in ((0, 0), (3, 7), (5, 9)):
        gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        gone[place] = True
        want, loss = by_force(w, gone, a, g)
        assert float(costs[place]) == pytest.approx(loss)
        assert error(one.without_elements(w, gone, 100), want) < 1e-9
    many = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.4
    want, loss = by_force(w, many, a, g)
    assert error(one.without_elements(w, many, 100), want) < 1e-9
    apart = one.without_elements(w, many, 4)  # groups of rows: zeros are zeros, and it costs no less than all at once
    assert (apart[many] == 0).all()
    assert loss < cost(apart - w, a, g) < cost(w.masked_fill(many, 0.0) - w, a, g)


def test_groups_are_rows_in_order() -> None:
    assert grouped([3, 0, 4, 9, 1, 1], 7) == [slice(0, 3), slice(3, 4), slice(4, 6)]
    assert grouped([0, 0], 5) == [slice(0, 2)]
    assert grouped([8, 8], 5) == [slice(0, 1), slice(1, 2)]


def test_without_output_curvature_it_is_the_restoration() -> None:
    """G = I: what FASP and MoDeGPT do with columns, damping and all, and the costs of optimal brain surgery."""
    a, w, gone = spd(COLUMNS, 1), weight(), torch.tensor([0, 4, 6])
    kept = torch.tensor([1, 2, 3, 5, 7, 8, 9])
    plain = Metric.of(a, torch.eye(ROWS, dtype=torch.float64), 0.02, 0.0, "same")
    want = w @ restoration(a, kept, 0.02)
    assert error(plain.without_columns(w, gone)[:, kept], want) < 1e-9
    assert error(metric(0.02, 0.3).without_columns(w, gone)[:, kept], want) < 1e-9  # whatever G is
    inverse = torch.linalg.inv(a + 0.02 * a.diagonal().mean() * torch.eye(COLUMNS))
    assert error(plain.columns(w), w.square().sum(0) / inverse.diagonal() / 2) < 1e-9
    assert error(plain.elements(w), w.square() / inverse.diagonal() / 2) < 1e-9


def test_damping() -> None:
    a, g, w = spd(COLUMNS, 1), spd(ROWS, 2), weight()
    da, dg = a + 0.1 * a.diagonal().mean() * torch.eye(COLUMNS), g + 0.2 * g.diagonal().mean() * torch.eye(ROWS)
    same, release = (Metric.of(a, g, 0.1, 0.2, way) for way in ("same", "release"))
    _, loss = by_force(w, mask([2], []), da, dg)
    assert float(same.rows(w)[2]) == pytest.approx(loss)
    want = (w[2] @ a @ w[2]) / torch.linalg.inv(dg)[2, 2] / 2
    assert float(release.rows(w)[2]) == pytest.approx(float(want))
    want = (w[:, 3] @ g @ w[:, 3]) / torch.linalg.inv(da)[3, 3] / 2
    assert float(release.columns(w)[3]) == pytest.approx(float(want))


def test_what_is_dead_costs_nothing() -> None:
    """Inputs that are always zero, outputs that no loss depends on, and a matrix of which nothing is known."""
    a, g, w = spd(COLUMNS, 1), spd(ROWS, 2), weight()
    a[4], a[:, 4], g[1], g[:, 1] = 0.0, 0.0, 0.0, 0.0
    one = Metric.of(a, g, 0.01, 0.01, "same")
    assert one.columns(w)[4] == 0
    assert one.rows(w)[1] == 0
    assert (one.columns(w) > 0).sum() == COLUMNS - 1
    assert (one.rows(w) > 0).sum() == ROWS - 1
    blank = Metric.of(torch.zeros(COLUMNS, COLUMNS), torch.zeros(ROWS, ROWS), 0.01, 0.01, "same")
    assert (blank.rows(w) == 0).all()
    assert torch.isfinite(blank.without_rows(w, torch.tensor([0, 1]))).all()
