"""The sweep over columns: what it costs is what the errors add up to, whatever is chosen; by definition and by hand."""

from collections.abc import Callable

import pytest
import torch
from folders import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from models import error
from sweeping import correlated, damped, moment_of, refitted, spent, swept_by_hand
from torch import Tensor

from microtome import compensate
from microtome.compensate import Choose, Columns, swept
from microtome.errors import NumericalFailure


def weight_of(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deciding(decide: Callable[[Tensor, int], Tensor]) -> Choose:
    """A choice by the column as it is by now and its number in the matrix."""

    def choose(columns: Columns) -> Callable[[int], Tensor]:
        return lambda place: decide(columns.weight[:, place], int(columns.order[place]))

    return choose


def masking(zero: Tensor) -> Choose:
    return deciding(lambda now, column: now.masked_fill(zero[:, column], 0.0))


def rounding(step: float) -> Choose:
    return deciding(lambda now, _: (now / step).round() * step)


def both(zero: Tensor, step: float) -> Choose:
    return deciding(lambda now, column: (now.masked_fill(zero[:, column], 0.0) / step).round() * step)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6), shape=st.tuples(st.integers(1, 5), st.integers(1, 12)), block=st.integers(1, 14),
    kind=st.sampled_from(["mask", "round", "both"]), dead=st.booleans(), damping=st.floats(1e-3, 1.0),
)  # fmt: skip
def test_the_errors_add_up_to_the_loss(
    seed: int, shape: tuple[int, int], block: int, kind: str, dead: bool, damping: float
) -> None:
    """The sum of e^2 is tr((W - W') H (W - W')^T), for any mask, rounding, order and block, dead inputs and all."""
    rows, size = shape
    generator = torch.Generator().manual_seed(seed)
    x = correlated(size, seed=seed)
    if dead:
        x[:, seed % size] = 0.0
    hessian, weight = moment_of(x), weight_of(rows, size, seed)
    zero = torch.rand(rows, size, generator=generator) < 0.5
    choose = {"mask": masking(zero), "round": rounding(0.3), "both": both(zero, 0.3)}[kind]
    order = torch.randperm(size, generator=generator)
    done = swept(weight, hessian, choose, block=block, damping=damping, order=order)
    if dead and size == 1:
        want = (weight - done.weight).square().sum(1)  # nothing is known: the identity
    else:
        want = spent(weight, done.weight, damped(hessian, damping))
    assert torch.allclose(done.loss, want, rtol=1e-8, atol=1e-12)
    if kind != "round":
        assert not done.weight[zero].any()
    if kind != "mask":
        assert torch.allclose(done.weight / 0.3, (done.weight / 0.3).round(), atol=1e-9)


@pytest.mark.parametrize("block", [1, 3, 7, 128])
def test_the_sweep_by_hand(block: int) -> None:
    """With the inverse of what is left of H taken anew before every column; blocks change nothing."""
    hessian, weight = moment_of(correlated(9)), weight_of(4, 9)
    zero = torch.rand(4, 9, generator=torch.Generator().manual_seed(5)) < 0.5
    want = swept_by_hand(weight, damped(hessian), lambda c, live, _: live[:, c].masked_fill(zero[:, c], 0.0))
    assert error(swept(weight, hessian, masking(zero), block=block).weight, want) < 1e-9
    want = swept_by_hand(weight, damped(hessian), lambda c, live, _: (live[:, c] / 0.2).round() * 0.2)
    assert error(swept(weight, hessian, rounding(0.2), block=block).weight, want) < 1e-9


def test_the_factor() -> None:
    """U^T U is the inverse, and the square of U_cc that of what is left of the matrix."""
    matrix = damped(moment_of(correlated(8)))
    upper = compensate.inverse_factor(matrix)
    assert torch.equal(upper, upper.triu())
    assert error(upper.T @ upper, torch.linalg.inv(matrix)) < 1e-10
    lefts = torch.stack([torch.linalg.inv(matrix[c:, c:])[0, 0] for c in range(8)])
    assert error(upper.diagonal().square(), lefts) < 1e-10


def test_what_a_choice_is_shown() -> None:
    """Spread and energy of every column in the order of the sweep, and only the columns in front are decided."""
    hessian, weight = moment_of(correlated(6)), weight_of(3, 6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    turned, seen = damped(hessian)[order][:, order], list[Columns]()

    def choose(columns: Columns) -> Callable[[int], Tensor]:
        seen.append(columns)
        if columns.start == 0:
            assert torch.equal(columns.weight, weight[:, order])
        else:
            assert not columns.weight[:, : columns.start].any()
            assert columns.here.shape == (3, columns.stop - columns.start)
        return lambda _: torch.zeros(3, dtype=torch.float64)

    swept(weight, hessian, choose, block=4, order=order)
    assert [(one.start, one.stop) for one in seen] == [(0, 4), (4, 6)]
    lefts = torch.stack([torch.linalg.inv(turned[c:, c:])[0, 0] for c in range(6)])
    assert error(seen[0].spread.square(), lefts) < 1e-9
    assert error(seen[0].energy, turned.diagonal()) < 1e-12
    assert torch.equal(seen[0].order, order)


def test_one_weight_alone_is_optimal_brain_surgery() -> None:
    """The first column's weight goes: the closed form of its update and of its cost."""
    hessian, weight = moment_of(correlated(5)), weight_of(1, 5)
    zero = torch.tensor([[True, False, False, False, False]])
    done = swept(weight, hessian, masking(zero))
    inverse = torch.linalg.inv(damped(hessian))
    assert error(done.weight, weight - weight[0, 0] / inverse[0, 0] * inverse[:1]) < 1e-10
    assert done.loss.item() == pytest.approx((weight[0, 0] ** 2 / inverse[0, 0]).item(), rel=1e-9)


def test_columns_that_go_first_are_made_up_for_in_full() -> None:
    """Taken first, the sweep over whole columns is the least-squares fit of the others; in any case it lies between."""
    hessian, weight = moment_of(correlated(8)), weight_of(4, 8)
    zero = torch.zeros(4, 8, dtype=torch.bool)
    zero[:, [1, 4, 6]] = True
    metric, order = damped(hessian), torch.tensor([1, 4, 6, 0, 2, 3, 5, 7])
    best = refitted(weight, metric, zero)
    assert error(swept(weight, hessian, masking(zero), order=order).weight, best) < 1e-9
    losses = [
        spent(weight, one, metric).sum()
        for one in (best, swept(weight, hessian, masking(zero)).weight, weight.masked_fill(zero, 0.0))
    ]
    assert losses[0] < losses[1] < losses[2]


def test_inputs_that_have_nothing_to_do_with_each_other() -> None:
    """Nothing can be made up for; and where no input was ever seen, nothing is known."""
    weight = weight_of(4, 8)
    zero = torch.rand(4, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    for hessian in (torch.diag(torch.arange(8.0, dtype=torch.float64)), torch.zeros(8, 8, dtype=torch.float64)):
        assert torch.equal(swept(weight, hessian, masking(zero)).weight, weight.masked_fill(zero, 0.0))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_short_floats_and_any_scale(scale: float) -> None:
    """The scale of the activations is of no account; fp32 weights come to the same as fp64 ones."""
    hessian, weight = moment_of(correlated(16)), weight_of(4, 16)
    zero = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    want = swept(weight, hessian, masking(zero)).weight
    have = swept(weight.float(), scale * hessian, masking(zero)).weight
    assert have.dtype == torch.float32
    assert error(have, want) < 1e-4


def test_inputs_that_repeat_each_other() -> None:
    """Without damping H is singular: the least that makes it regular is added, and twins do each other's work."""
    x = correlated(4)
    x, weight = torch.cat([x, x], 1), weight_of(3, 8)
    zero = torch.zeros(3, 8, dtype=torch.bool)
    zero[:, :4] = True
    done = swept(weight, moment_of(x), masking(zero), damping=0.0).weight
    assert error(x @ done.T, x @ weight.T) < 1e-3


def test_what_is_not_finite_is_refused() -> None:
    hessian = torch.full((4, 4), torch.nan)
    with raises(NumericalFailure, "the second moments are not finite"):
        swept(weight_of(2, 4), hessian, rounding(0.1))
