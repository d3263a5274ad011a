"""Allocators: budgets are met as closely as steps allow, and every rule is what its paper says."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, built, canonical, logits
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights

import microtome
from microtome import allocate, budget, inner, layout, planner, survey
from microtome.allocate import MOST, Widths
from microtome.errors import BadInput, BadPlan, UnknownName
from microtome.inner import Dial
from microtome.modeling_microtome import MicrotomeForCausalLM
from microtome.passes import Allocation
from microtome.source import open_source
from microtome.space import Kind
from microtome.stats import Stat


def dials(*sizes: int, step: int = 1, kind: str = "ffn") -> dict[str, Dial]:
    """One width in every block."""
    return {f"{b}.{kind}": Dial(f"{b}.{kind}", b, kind, size, step, step) for b, size in enumerate(sizes)}


def counted(cost: Mapping[str, int]) -> Any:
    return lambda widths: sum(cost[name] * wide for name, wide in widths.items())


SCORES = st.lists(st.floats(0.01, 1.5), min_size=3, max_size=6)


# --- the budget -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(4, 60), min_size=1, max_size=4), st.integers(1, 3), st.floats(0.3, 1.0), st.integers(0, 2),
    SCORES,
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_width_s_step_comes_closer(sizes: list[int], cost: int, keep: float, rule: int, scores: list[float]) -> None:
    """With one price for all, the count is off by half a step at most: what any choice of widths can do."""
    some = dials(*sizes)
    scores = [*scores, *scores][: len(sizes)]
    fractions = [
        allocate.uniform(some), allocate.influence(some, scores, 0.3), allocate.redundancy(some, scores, 0.5)
    ][rule]  # fmt: skip
    count = counted(dict.fromkeys(some, cost))
    target = keep * cost * sum(sizes)
    lowest = sum(cost * some[name].nearest(value * some[name].size) for name, value in fractions(0.0).items())
    if lowest > target:
        return
    assert abs(count(allocate.solve(some, fractions, count, target)) - target) <= cost / 2 + 1e-6


def test_the_closest_of_all_choices_on_small_cases() -> None:
    some = dials(6, 5, step=1)
    for price in ({"0.ffn": 3, "1.ffn": 3}, {"0.ffn": 2, "1.ffn": 2}):
        count = counted(price)
        for target in range(8, 33):
            every = [count({"0.ffn": a, "1.ffn": b}) for a in range(1, 7) for b in range(1, 6)]
            nearest = min(abs(one - target) for one in every)
            have = count(allocate.solve(some, allocate.uniform(some), count, target))
            assert abs(have - target) == nearest


@given(st.lists(st.integers(10, 200), min_size=2, max_size=5), SCORES)
@settings(max_examples=30, deadline=None)
def test_more_budget_narrows_nothing_much(sizes: list[int], scores: list[float]) -> None:
    """The count rises with the budget, and so does what the rule asks of every width."""
    some = dials(*sizes)
    scores = [*scores, *scores][: len(sizes)]
    count = counted(dict.fromkeys(some, 1))
    for rule in (allocate.uniform(some), allocate.influence(some, scores, 0.2), allocate.redundancy(some, scores, 0.3)):
        made = [count(allocate.solve(some, rule, count, keep * sum(sizes))) for keep in (0.85, 0.9, 0.95)]
        assert made == sorted(made)
        steps = [rule(t) for t in (0.0, 0.3, 0.6, 0.9, 1.0)]
        for name in some:
            values = [one[name] for one in steps]
            assert values == sorted(values)
        assert steps[-1] == pytest.approx(dict.fromkeys(some, 1.0))


def test_uniform_stays_even() -> None:
    """The same width in every block, and of all such widths the one whose count is closest."""
    config = canonical("llama")[0]
    some = inner.dials(config, {Kind.FFN, Kind.VO})

    def count(widths: Widths) -> int:
        return layout.count_blocks(inner.narrowed_config(config, widths))

    for keep in (0.5, 0.71, 0.9):
        target = keep * layout.count_blocks(config)
        found = allocate.solve(some, allocate.uniform(some), count, target, even=True)
        assert len({found[f"{block}.ffn"] for block in range(3)}) == 1
        assert len({found[f"{block}.vo"] for block in range(3)}) == 1
        rules = [allocate.uniform(some)(t) for t in torch.linspace(0, 1, 2001).tolist()]
        even = {tuple(dial.nearest(rule[name] * dial.size) for name, dial in some.items()) for rule in rules}
        every = [count(dict(zip(some, one, strict=True))) for one in even]
        assert abs(count(found) - target) == min(abs(one - target) for one in every)


def test_rates_spare_some_kinds() -> None:
    some = dials(100) | {"0.qk": Dial("0.qk", 0, "qk", 100, 1, 1)}
    assert allocate.uniform(some, {"qk": 0.25})(0.6) == pytest.approx({"0.ffn": 0.6, "0.qk": 0.9})
    held = allocate.influence(some, [1.0], 1.0, {"qk": 0.25})(0.5)
    assert 1 - held["0.qk"] == pytest.approx(0.25 * (1 - held["0.ffn"]))


def test_a_budget_out_of_reach_is_refused() -> None:
    some = dials(10, 10)
    count = counted({"0.ffn": 1, "1.ffn": 1})
    words = "the budget of 1 parameters cannot be reached: with every width at its narrowest 2 remain"
    with pytest.raises(BadPlan, match=words):
        allocate.solve(some, allocate.uniform(some), count, 1.0)


# --- influence: MoDeGPT's equation 11 -------------------------------------------------------------------------------


@given(SCORES, st.floats(0.3, 3.0))
@settings(max_examples=30, deadline=None)
def test_influence_is_the_closed_form(scores: list[float], temperature: float) -> None:
    """phi_l = c softmax(-s / temperature)_l, as long as none is above the most that may go."""
    some = dials(*[1000] * len(scores))
    weights_ = torch.softmax(-torch.tensor(scores, dtype=torch.float64) / temperature, 0)
    lost = 1 - torch.tensor(list(allocate.influence(some, scores, temperature)(0.9).values()), dtype=torch.float64)
    assert lost.max() < MOST
    assert (lost / lost.sum() - weights_).abs().max() < 1e-9


def test_influence_maximises_the_entropic_objective() -> None:
    """sum_l s_l (1 - phi_l) + eps H(phi) under a fixed mean: no other point on the plane is better."""
    scores = torch.tensor([0.1, 0.5, 0.2, 0.9], dtype=torch.float64)
    eps = 0.4
    some = dials(*[1000] * 4)
    phi = 1 - torch.tensor(list(allocate.influence(some, scores.tolist(), eps)(0.85).values()), dtype=torch.float64)

    def objective(point: torch.Tensor) -> torch.Tensor:
        return (scores * (1 - point)).sum() - eps * (point * point.log()).sum()

    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 3e-2):
        for _ in range(50):
            step = torch.randn(4, generator=generator, dtype=torch.float64) * size
            other = phi + step - step.mean()
            if other.min() > 0:
                assert objective(other) < objective(phi)


def test_a_high_temperature_is_uniform_and_a_low_one_is_finite() -> None:
    some = dials(*[100] * 3)
    values = list(allocate.influence(some, [0.1, 0.9, 0.4], 1e9)(0.5).values())
    assert max(values) - min(values) < 1e-8
    low = allocate.influence(some, [0.1, 0.9, 0.4], 1e-4)
    assert all(math.isfinite(one) for t in (0.0, 0.5, 1.0) for one in low(t).values())
    assert list(low(0.0).values()) == pytest.approx([1 - MOST] * 3)  # every budget down to the most can be met
    with pytest.raises(BadInput, match="temperature of an allocation is a number above 0, not 0"):
        allocate.influence(some, [0.1, 0.9, 0.4], 0.0)


# --- redundancy: dynamic slicing ------------------------------------------------------------------------------------


@given(SCORES, st.floats(0.0, 1.0), st.floats(0.01, 0.3))
@settings(max_examples=50, deadline=None)
def test_redundancy_is_the_paper_s_rule(scores: list[float], base: float, mean: float) -> None:
    """FS = SB + (SP - SB) LR / mean(LR); its mean is SP, and a permutation of the blocks permutes it."""
    low, high = min(scores), max(scores)
    if 0 < high - low < 1e-6:
        return
    redundant = [1 - (one - low) / (high - low) if high > low else 1.0 for one in scores]
    average = sum(redundant) / len(redundant)
    wanted = [base * mean + (mean - base * mean) * one / average for one in redundant]
    have = [mean * share for share in allocate.redundancy_shares(scores, base)]
    assert have == pytest.approx(wanted, abs=1e-12)
    assert sum(have) / len(have) == pytest.approx(mean, abs=1e-12)
    assert allocate.redundancy_shares(scores[::-1], base) == pytest.approx([one / mean for one in have[::-1]])
    order = sorted(range(len(scores)), key=lambda block: scores[block])
    assert all(have[a] >= have[b] - 1e-12 for a, b in itertools.pairwise(order))


def test_a_base_outside_its_range_is_refused() -> None:
    with pytest.raises(BadInput, match="base of redundancy is a share from 0 to 1"):
        allocate.redundancy(dials(4), [0.3], 1.2)


def measured(name: str) -> list[float]:
    with open_source(folder(name)) as source:
        found = planner.opened(source)
        stats = survey.survey(found, CALIBRATION, frozenset({Stat.INFLUENCE}), device=torch.device("cpu"),
                              dtype=torch.float32)  # fmt: skip
        return stats.influences(found.config.num_hidden_layers)


@pytest.mark.parametrize("name", ["llama", "opt-tied", "phi", "gemma2"])
def test_influences_are_those_of_the_streams_that_transformers_shows(name: str) -> None:
    """By hooks on the blocks themselves: the last of `hidden_states` is behind the final norm."""
    name = next(one for one in TINY if one.startswith(name))
    model = built(TINY[name])
    streams: list[tuple[torch.Tensor, torch.Tensor]] = []
    decoder = model.model.decoder if name.startswith("opt") else model.model
    for block in decoder.layers:
        block.register_forward_hook(
            lambda _m, args, kwargs, out: streams.append(
                ((args or (kwargs["hidden_states"],))[0], out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
    logits(model, CALIBRATION)
    wanted = []
    for before, after in streams:
        x, y = before.double().flatten(0, -2), after.double().flatten(0, -2)
        wanted.append((1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean().item())
    assert measured(name) == pytest.approx(wanted, rel=1e-4)


def test_a_block_that_does_nothing_is_the_most_redundant(tmp_path: Path) -> None:
    model = built(TINY["llama"])
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        linear.weight.data.zero_()
    model.save_pretrained(tmp_path)
    with open_source(tmp_path) as source:
        found = planner.opened(source)
        scores = survey.survey(found, CALIBRATION, frozenset({Stat.INFLUENCE}), device=torch.device("cpu"),
                               dtype=torch.float32).influences(3)  # fmt: skip
    assert scores[1] == pytest.approx(0.0, abs=1e-6)
    shares = allocate.redundancy_shares(scores, 0.0)
    assert shares[1] == max(shares)


# --- dynamic slicing, end to end ------------------------------------------------------------------------------------

JUNCTION = {"basis": "junction"}


@pytest.mark.parametrize("dial", [{"slice": 0.3}, {"keep": 0.7}], ids=str)
@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_dynamic_slicing(name: str, dial: dict[str, float], tmp_path: Path) -> None:
    """Widths by the rule, from scores measured apart; the result loads, and twice the same."""
    result = compress(folder(name), tmp_path / "out", options=JUNCTION, allocate="redundancy,base=0.2", **dial)
    preview = microtome.preview(folder(name), options=JUNCTION, allocate="redundancy,base=0.2", data=CALIBRATION,
                                **dial)  # fmt: skip
    assert preview.after.stored == result.after.stored
    size, widths = 48, result.plan.widths
    shares = allocate.redundancy_shares(measured(name), 0.2)
    if "slice" in dial:
        wanted = [int((1 - 0.3 * share) * size) // 8 * 8 for share in shares]
        assert sum(0.3 * share for share in shares) / 3 == pytest.approx(0.3)
        assert [widths[f"residual.{number}"] for number in range(6)] == [one for one in wanted for _ in range(2)]
        assert widths["residual.6"] == size
    else:
        blocks = [widths[f"residual.{2 * block}"] for block in range(3)]
        order = sorted(range(3), key=lambda block: shares[block])
        assert blocks[order[0]] >= blocks[order[1]] >= blocks[order[2]]
        assert blocks[order[0]] > blocks[order[2]]
        assert result.after.decoder == pytest.approx(0.7 * result.before.decoder, rel=0.03)
    model = result.load(device="cpu", dtype="float32")
    assert isinstance(model, MicrotomeForCausalLM)
    have = logits(model, HELD_OUT)
    assert torch.isfinite(have).all()
    assert [sizes.residual_in for sizes in (model.config.per_layer_config[block] for block in range(3))] == [
        widths[f"residual.{2 * block}"] for block in range(3)
    ]
    model.save_pretrained(tmp_path / "again")
    again = microtome.loading.load(tmp_path / "again", device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(logits(again, HELD_OUT), have)


def test_a_base_of_the_whole_slice_is_slicegpt_bit_for_bit(tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "plain", options=JUNCTION, slice=0.3)
    compress(folder("llama"), tmp_path / "dynamic", options=JUNCTION, slice=0.3, allocate="redundancy,base=1")
    plain, dynamic = weights(tmp_path / "plain"), weights(tmp_path / "dynamic")
    assert plain.keys() == dynamic.keys()
    assert all(torch.equal(plain[name], dynamic[name]) for name in plain)


def test_the_whole_width_is_the_model_itself(tmp_path: Path) -> None:
    """A slice of nothing turns the stream and loses nothing; keep 1 leaves every byte."""
    turned = compress(folder("llama"), tmp_path / "turned", options=JUNCTION, slice=0.0, allocate="redundancy")
    have = logits(turned.load(device="cpu", dtype="float32"), HELD_OUT)
    want = logits(built(TINY["llama"]), HELD_OUT)
    assert (have - want).abs().max() < 1e-4 * want.abs().max()
    compress(folder("llama"), tmp_path / "same", options=JUNCTION, keep=1.0, allocate="redundancy")
    original, same = weights(folder("llama")), weights(tmp_path / "same")
    assert all(torch.equal(original[name], same[name]) for name in original)


def test_one_basis_has_one_width(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="redundancy gives the stream several widths: that needs -o basis=junction"):
        compress(folder("llama"), tmp_path / "out", keep=0.8, allocate="redundancy")
    assert not (tmp_path / "out").exists()


# --- scores and losses ----------------------------------------------------------------------------------------------


def test_by_score_takes_the_lowest_wherever_they_are() -> None:
    some = dials(4, 4)
    scores = {"0.ffn": [9.0, 1.0, 8.0, 2.0], "1.ffn": [7.0, 6.0, 5.0, 0.5]}
    count = counted({"0.ffn": 1, "1.ffn": 1})
    rule = allocate.by_score(some, scores)
    assert allocate.solve(some, rule, count, 5) == {"0.ffn": 2, "1.ffn": 3}  # 0.5, 1 and 2 go
    assert allocate.solve(some, rule, count, 4) == {"0.ffn": 2, "1.ffn": 2}  # and 5
    assert allocate.solve(some, rule, count, 8) == {"0.ffn": 4, "1.ffn": 4}


@given(st.lists(st.lists(st.floats(0.0, 2.0), min_size=4, max_size=4), min_size=2, max_size=3))
@settings(max_examples=40, deadline=None)
def test_by_loss_is_the_best_of_all_choices(drops: list[list[float]]) -> None:
    """Convex curves with equal costs: at every count, no choice of widths has a smaller loss."""
    some = dials(*[5] * len(drops))
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, steps in zip(some, drops, strict=True):
        total, curve = 0.0, []
        for number, drop in enumerate(sorted(steps), 1):
            total += drop
            curve.append((1 - number / 5, total))
        curves[name] = curve
    loss = {name: {5: 0.0} | {round(5 * f): value for f, value in curve} for name, curve in curves.items()}
    count = counted(dict.fromkeys(some, 1))
    rule = allocate.by_loss(some, curves, dict.fromkeys(some, 1.0))
    for target in range(2 * len(some), 5 * len(some) + 1):
        widths = allocate.solve(some, rule, count, target)
        assert count(widths) == target
        choices = [one for one in itertools.product(range(1, 6), repeat=len(some)) if sum(one) == target]
        best = min(sum(loss[name][wide] for name, wide in zip(some, one, strict=True)) for one in choices)
        assert sum(loss[name][wide] for name, wide in widths.items()) == pytest.approx(best, abs=1e-9)


def test_no_width_goes_where_nothing_was_measured_before_it_must() -> None:
    """The cheap one stops at its narrowest point until the dear one has come to its own; then both go on together."""
    some = dials(10, 10)
    curves = {"0.ffn": [(0.4, 0.0), (1.0, 0.0)], "1.ffn": [(0.4, 9.0), (1.0, 0.0)]}
    rule = allocate.by_loss(some, curves, dict.fromkeys(some, 1.0))
    assert rule(0.5) == pytest.approx({"0.ffn": 0.4, "1.ffn": 0.6})
    assert rule(0.4) == pytest.approx({"0.ffn": 0.4, "1.ffn": 0.4})
    assert rule(0.2) == pytest.approx({"0.ffn": 0.2, "1.ffn": 0.2})


def test_a_noisy_curve_is_made_convex_and_falling() -> None:
    hull = allocate.convex([(0.2, 3.0), (0.4, 1.0), (0.6, 1.5), (0.8, -0.1), (1.0, 0.0)])
    assert hull == [(0.2, 3.0), (0.4, 1.5), (0.8, 0.0), (1.0, 0.0)]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    assert allocate.value_at(hull, 0.6) == pytest.approx(0.75)
    assert allocate.value_at(hull, 0.1) == pytest.approx(3.75)  # the first piece goes on


def test_points_that_are_measured_twice_count_once() -> None:
    some = dials(4)
    rule = allocate.by_loss(some, {"0.ffn": [(0.5, 1.0), (0.5, 2.0), (1.0, 0.3)]}, {"0.ffn": 1.0})
    assert rule(0.5) == {"0.ffn": 0.5}


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_goes_by_width_block_and_kind() -> None:
    some = dials(100, 100, 100, 100, step=4) | dials(8, 8, 8, 8, step=2, kind="qk")
    found = allocate.table(some, {"ffn": 0.5, "1": 0.25, "3.ffn": 77, "qk": 6})
    assert found == {
        "0.ffn": 48, "1.ffn": 24, "2.ffn": 48, "3.ffn": 77, "0.qk": 6, "1.qk": 2, "2.qk": 6, "3.qk": 6
    }  # fmt: skip
    halves = {"0.mlp": Dial("0.mlp", 0, "mlp", 1, 1, 0)}
    assert allocate.table(halves, {"mlp": 0}) == {"0.mlp": 0}


@pytest.mark.parametrize(("given", "words"), [
    ({"fnn": 0.5}, r"no width is called 'fnn' here. Known, for instance: 0, 0.ffn, ffn"),
    ({"ffn": 0}, r"0.ffn is given as 0: a fraction up to 1, or a width up to 16"),
    ({"ffn": 17}, r"0.ffn is given as 17: a fraction"),
    ({"ffn": True}, r"0.ffn is given as True"),
    ({"ffn": "wide"}, r"0.ffn is given as 'wide'"),
    ({"ffn": float("nan")}, r"0.ffn is given as nan"),
    ({"ffn": 3.5}, r"0.ffn is given as 3.5: a width is a whole number"),
])  # fmt: skip
def test_a_table_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadPlan, match=words):
        allocate.table(dials(16), given)


def test_odd_query_key_channels_are_refused() -> None:
    with pytest.raises(
        BadPlan, match=r"0\.qk is given as 5: a width is a whole number, and of query-key channels even"
    ):
        allocate.table(dials(8, step=2, kind="qk"), {"qk": 5})


def test_a_table_of_widths_needs_no_budget(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", method="fasp", allocate={"ffn": 0.5, "0.vo": 4})
    assert result.plan.widths == {f"{block}.ffn": 40 for block in range(3)} | {"0.vo": 4, "1.vo": 8, "2.vo": 8}
    with pytest.raises(BadInput, match="a table of widths leaves no budget to spend: give no --keep"):
        compress(folder("llama"), tmp_path / "no", method="fasp", keep=0.5, allocate={"ffn": 0.5})


@pytest.mark.parametrize(("text", "words", "kind"), [
    ("influense", "no allocation named 'influense'. Did you mean 'influence'", UnknownName),
    ("table", "no allocation named 'table'", UnknownName),
    ("influence,temprature=1", "no setting of the allocation influence named 'temprature'", UnknownName),
    ("influence,temperature=hot", "temperature of the allocation influence is a number, not 'hot'", BadInput),
    (3, "an allocation is a name or a table of widths, not 3", BadInput),
])  # fmt: skip
def test_allocations_that_are_none(text: Any, words: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=words):
        Allocation.parsed(text)


def test_allocations_are_read() -> None:
    assert Allocation.parsed("influence,temperature=0.05") == Allocation("influence", temperature=0.05)
    assert Allocation.parsed("redundancy,base=0") == Allocation("redundancy", base=0.0)
    assert budget.friendly(80) == 2
