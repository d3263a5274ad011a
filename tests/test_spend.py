"""One budget for several steps: it goes to what is redundant, the sizes multiply, and no better split exists."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, built, error, logits
from test_chain import same
from tinies import CALIBRATION, HELD_OUT, compress, folder, planted

import microtome
from microtome import probe, recipes, spend
from microtome.edit import Plan
from microtome.errors import BadInput, BadPlan
from microtome.passes import Step
from microtome.spend import Point

STREAM: dict[str, Any] = {"slicegpt": {"multiple_of": 4}}
NEURONS: dict[str, Any] = {"fasp": {"options": {"spaces": "ffn"}, "multiple_of": 4}}


def shared(*steps: Any, keep: float = 0.75) -> dict[str, Any]:
    return {"keep": keep, "spend": "auto", "steps": list(steps)}


def dead_neurons(place: Path) -> Any:
    """A tiny Llama, most of whose neurons nobody reads."""
    model = built(TINY["llama"])
    for block in model.model.layers:
        block.mlp.down_proj.weight.data[:, 20:] = 0.0
    model.save_pretrained(place)
    return model


def test_splits_are_told_apart_on_some_windows_and_measured_on_others() -> None:
    ids = torch.arange(600)[:, None].expand(600, 256)
    for neurons, tokens in ((100, 16384), (2048, 32768), (11008, 65536)):
        fitted, unseen = spend.apart(ids, neurons)
        assert (fitted.numel(), unseen.numel()) == (tokens, probe.TOKENS)
    assert fitted[:, 0].diff().unique().tolist() == [2, 3]  # from all over the text
    assert fitted.max() < unseen.min()
    fitted, unseen = spend.apart(ids[:64], 80)
    assert torch.equal(torch.cat([fitted, unseen]), ids[:64])


# --- where it goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(STREAM, NEURONS), (NEURONS, STREAM)], ids=["stream-first", "neurons-first"])
def test_dead_neurons_pay_for_all(steps: tuple[Any, ...], tmp_path: Path) -> None:
    model = dead_neurons(tmp_path / "source")
    result = compress(tmp_path / "source", tmp_path / "out", recipe=shared(*steps))
    assert [result.plan.method, *(step["method"] for step in result.plan.then)] == ["fasp"]
    assert "one budget: " in result.notes[0]
    assert "slicegpt is not used" in result.notes[0]
    assert result.after.decoder / result.before.decoder == pytest.approx(0.75, abs=0.02)
    assert error(logits(result.load(device="cpu", dtype="float32"), HELD_OUT), logits(model, HELD_OUT)) < 1e-4


def test_a_redundant_stream_pays_for_all(tmp_path: Path) -> None:
    model = planted("llama", rank=24)
    model.save_pretrained(tmp_path / "source")
    result = compress(tmp_path / "source", tmp_path / "out", recipe=shared(STREAM, NEURONS))
    assert (result.plan.method, result.plan.then) == ("slicegpt", [])
    assert result.notes[0].endswith("fasp is not used")
    assert error(logits(result.load(device="cpu", dtype="float32"), HELD_OUT), logits(model, HELD_OUT)) < 1e-3


def test_both_pay_where_one_cannot(tmp_path: Path) -> None:
    """Neurons alone are less than what has to go."""
    result = compress(folder("llama"), tmp_path / "out", recipe=shared(STREAM, NEURONS, keep=0.4))
    assert {result.plan.method, *(step["method"] for step in result.plan.then)} == {"slicegpt", "fasp"}
    assert result.after.decoder / result.before.decoder == pytest.approx(0.4, abs=0.02)


def test_a_step_with_its_own_size_is_left_alone(tmp_path: Path) -> None:
    own = {"slicegpt": {"multiple_of": 4, "keep": 0.9}}
    result = compress(folder("llama"), tmp_path / "out", recipe=shared(own, NEURONS))
    plain = compress(folder("llama"), tmp_path / "plain", recipe={"keep": 0.75, "steps": [own, NEURONS]})
    same(tmp_path / "out", tmp_path / "plain")
    assert result.plan == plain.plan


def test_a_restored_recipe_is_measured_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    found = spend.Table.moved

    def moved(self: spend.Table, steps: Any) -> torch.Tensor:
        seen.append([type(step).__name__ for step in (*steps, *self.behind)])
        return found(self, steps)

    monkeypatch.setattr(spend.Table, "moved", moved)
    compress(folder("llama"), tmp_path / "out", recipe=shared(STREAM, NEURONS, "restore"))
    assert {names[-1] for names in seen} == {"Restore"}
    assert {len(names) for names in seen} == {2, 3}  # each alone, and the best splits as a whole


def test_no_step_goes_further_than_what_the_last_one_costs_with_all_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergences grow with the cut: what is worse than the last step alone has no part in a better split."""
    seen: list[str] = []

    def moved(_self: spend.Table, steps: Any) -> torch.Tensor:
        seen.append("+".join(step.name for step in steps))
        return torch.tensor([0.5 if seen[-1] == "slicegpt" else 0.4])

    monkeypatch.setattr(spend.Table, "moved", moved)
    result = compress(folder("llama"), tmp_path / "out", recipe=shared(STREAM, NEURONS))
    assert seen[: len(spend.SHARES) + 1] == ["fasp"] * len(spend.SHARES) + ["slicegpt"]
    assert seen.count("slicegpt") == 1
    assert result.notes[0].endswith("slicegpt is not used, fasp keeps 0.750")


# --- what comes of it -----------------------------------------------------------------------------------------------


def test_a_dry_run_a_wet_one_and_a_replay_agree(tmp_path: Path) -> None:
    recipe = shared("depth", STREAM, NEURONS, keep=0.45)
    dry = microtome.preview(folder("llama"), recipe=recipe, data=CALIBRATION)
    wet = compress(folder("llama"), tmp_path / "out", recipe=recipe)
    assert dry.after == wet.after
    assert dry.notes == wet.notes
    compress(folder("llama"), tmp_path / "again", plan=Plan.read(tmp_path / "out"))
    same(tmp_path / "again", tmp_path / "out")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    compress(folder("llama"), tmp_path / "out", recipe=shared(STREAM, NEURONS), scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_is_measured_is_not_what_is_fitted() -> None:
    fitted, unseen = spend.apart(torch.arange(1200 * 16).view(1200, 16), 2048)
    assert (len(fitted), len(unseen)) == (1072, 128)
    assert set(fitted.flatten().tolist()).isdisjoint(unseen.flatten().tolist())
    fitted, unseen = spend.apart(CALIBRATION, 80)  # few windows: a third
    assert (len(fitted), len(unseen)) == (6, 2)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (shared(STREAM, NEURONS) | {"spend": "most"}, r"spend is each .* or auto .*, not 'most'"),
        (shared(STREAM, NEURONS, keep=0.02), "no split of the budget over the steps comes to keep 0.02"),
    ],
    ids=["word", "budget"],
)
def test_a_budget_that_cannot_be(recipe: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises((BadInput, BadPlan), match=words):
        compress(folder("llama"), tmp_path / "out", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


def test_it_needs_text() -> None:
    with pytest.raises(BadInput, match="one budget for several steps is split by what is measured: give --data"):
        microtome.preview(folder("llama"), recipe=shared(STREAM, NEURONS))


# --- the split ------------------------------------------------------------------------------------------------------

curve = st.lists(st.tuples(st.floats(0.3, 0.95), st.floats(0.0, 3.0)), min_size=1, max_size=4).map(
    lambda points: [Point(1.0, 0.0), *(Point(keep, loss) for keep, loss in points)]
)


@settings(max_examples=60, deadline=None)
@given(curves=st.lists(curve, min_size=2, max_size=3), keep=st.floats(0.4, 0.95))
def test_no_split_is_better(curves: list[list[Point]], keep: float) -> None:
    """Against all combinations, with the last step's curve as the lowest line over any two of its points."""

    def last(fraction: float) -> float:
        best = math.inf
        points = curves[-1]
        floor = [(point.keep, max(other.loss for other in points if other.keep >= point.keep)) for point in points]
        for (x0, y0), (x1, y1) in itertools.product(floor, floor):
            if x0 <= fraction + 1e-12 <= x1 + 2e-12:
                best = min(best, y0 if x0 == x1 else y0 + (y1 - y0) * (fraction - x0) / (x1 - x0))
        return best

    def total(shares: list[float]) -> float:
        return last(shares[-1]) + sum(
            min(point.loss for point in points if point.keep == share)
            for points, share in zip(curves[:-1], shares[:-1], strict=True)
        )

    combinations = [
        [*(point.keep for point in chosen), keep / math.prod(point.keep for point in chosen)]
        for chosen in itertools.product(*curves[:-1])
    ]
    least = min(point.keep for point in curves[-1])
    possible = [total(one) for one in combinations if least <= one[-1] <= 1.0]
    try:
        (have, *others) = spend.splits(curves, keep)
    except BadPlan:
        assert not possible
        return
    assert math.prod(have) == pytest.approx(keep, rel=0.011)
    if least <= have[-1]:
        assert total(have) <= min(possible, default=math.inf) + 1e-6
    assert all(math.prod(one) == pytest.approx(keep, rel=0.011) for one in others)
    used = [tuple(share < 1.0 for share in one) for one in (have, *others)]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize(
    ("both", "chosen"),
    [
        ([0.30, 0.10, 0.20], 0),  # clearly better than the last step alone
        ([0.99, 1.20, 0.78], 1),  # better on the mean by 0.01, with a standard error of 0.12
        ([1.20, 1.10, 1.00], 1),
    ],
)
def test_a_split_has_to_be_clearly_better_than_the_last_step_alone(
    both: list[float], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step alone moves all three windows by one nat; the split over both as is said."""
    steps = [step for step in recipes.steps(shared(STREAM, NEURONS)) if isinstance(step, Step)]
    shares = [[0.9, 0.83], [1.0, 0.75]]
    moves = {2: torch.tensor(both, dtype=torch.float64), 1: torch.ones(3, dtype=torch.float64)}
    monkeypatch.setattr(spend.Table, "moved", lambda _self, some: moves[len(some)])
    table = spend.Table(run=Any, ids=CALIBRATION, behind=[])  # pyright: ignore[reportArgumentType]
    assert table.best(steps, spend.finalists(shares)) == shares[chosen]


def test_the_last_step_alone_is_always_measured() -> None:
    shares = [[0.9, 0.9, 0.9], [0.8, 0.9, 1.0], [0.8, 1.0, 0.9], [1.0, 0.8, 1.0], [1.0, 1.0, 0.7]]
    assert spend.finalists(shares) == [shares[4], *shares[:3]]
    assert spend.finalists(shares[:4]) == shares[:3]
    assert spend.finalists([shares[4], shares[0]]) == [shares[4], shares[0]]


def test_a_split_that_cannot_be_carried_out_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [step for step in recipes.steps(shared(STREAM, NEURONS)) if isinstance(step, Step)]

    def moved(_self: spend.Table, some: list[Any]) -> torch.Tensor:
        if len(some) == 1:
            raise BadPlan("no such width")
        return torch.ones(3)

    monkeypatch.setattr(spend.Table, "moved", moved)
    table = spend.Table(run=Any, ids=CALIBRATION, behind=[])  # pyright: ignore[reportArgumentType]
    assert table.best(steps, [[1.0, 0.75], [0.9, 0.83]]) == [0.9, 0.83]
