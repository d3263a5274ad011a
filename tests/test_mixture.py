"""Several sources of calibration text: shares by weight, what is recorded, what is measured on, what is refused."""

import hashlib
import json
from math import fsum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinies import CALIBRATION, compress, folder, spoken, text, tokenizer

import microtome
from microtome import mixture
from microtome.data import calibration
from microtome.errors import BadInput
from microtome.mixture import mixed, parsed, shares, weighted
from microtome.texts import Text

SMALL: dict[str, Any] = {"slice": 0.3, "length": 24}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(text())
    (tmp_path / "b.txt").write_text(text(seed=1))
    (tmp_path / "c=2.txt").write_text(text(seed=2))
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    return tmp_path


def stored(result: microtome.Result) -> bytes:
    return (result.folder / "model.safetensors").read_bytes()


# Shares


@pytest.mark.parametrize(
    ("weights", "samples", "counts"),
    [
        ([0.7, 0.3], 10, [7, 3]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([0.7, 0.3], 128, [90, 38]),  # 89.6 and 38.4
        ([5, 3, 1], 7, [4, 2, 1]),  # 3.89, 2.33, 0.78
        ([0.98, 0.01, 0.01], 10, [8, 1, 1]),
        ([1e-9, 1], 2, [1, 1]),
        ([3.0], 4, [4]),
    ],
)
def test_shares_by_hand(weights: list[float], samples: int, counts: list[int]) -> None:
    assert shares(weights, samples) == counts


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(6, 400))
def test_shares_add_up_and_miss_their_quota_by_less_than_a_window(weights: list[int], samples: int) -> None:
    counts = shares(weights, samples)
    assert sum(counts) == samples
    assert min(counts) >= 1
    assert shares([4.0 * weight for weight in weights], samples) == counts
    quotas = [samples * weight / fsum(weights) for weight in weights]
    if min(quotas) >= 1:
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))
        gains = [quota - int(quota) for quota in quotas]  # whoever was rounded up had no smaller remainder
        up = [gain for gain, count, quota in zip(gains, counts, quotas, strict=True) if count > int(quota)]
        down = [gain for gain, count, quota in zip(gains, counts, quotas, strict=True) if count == int(quota)]
        assert not up or not down or min(up) >= max(down) - 1e-9


def test_fewer_windows_than_sources() -> None:
    with pytest.raises(BadInput, match="2 windows cannot be of 3 sources: take more --samples"):
        shares([1, 1, 1], 2)


# What is given


def test_sources_as_they_are_typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert parsed(["wikitext2"]) == "wikitext2"
    assert parsed(["a.txt=1"]) == "a.txt"
    assert parsed(["c=2.txt"]) == "c=2.txt", "a path of the whole name comes first"
    assert parsed(["c=2.txt=.5", "alpaca", "self=3e-1"]) == [("c=2.txt", 0.5), ("alpaca", 1.0), ("self", 0.3)]
    assert parsed(["x" * 5000]) == "x" * 5000
    with pytest.raises(
        BadInput, match=r"--data alpaca=0,3: '0,3' is no weight, and there is no file or folder of that"
    ):
        parsed(["alpaca=0,3"])


def test_sources_in_python() -> None:
    ids = torch.zeros(2, 2, dtype=torch.int64)
    for one in ("wikitext2", ["some text", "another"], ids, Text("a", "b")):
        assert [(source.spec, source.weight) for source in weighted(one)] == [(one, 1.0)]
    for many in ({"a": 2, "b": 0.5, "c": 0}, [("a", 2), ("b", 0.5), ("c", 0.0)]):
        assert [(source.spec, source.weight) for source in weighted(many)] == [("a", 2.0), ("b", 0.5)]
    for weight in (-1, float("nan"), float("inf"), "much", True, None):
        wrong: Any = {"a": weight, "b": 1}
        with pytest.raises(BadInput, match=r"the weight of a is .*: give a number from 0 on"):
            weighted(wrong)
    with pytest.raises(BadInput, match="no source of calibration text has a weight above 0"):
        weighted({"a": 0})


# What is drawn


def test_a_mixture_is_the_windows_of_all_in_another_order(place: Path) -> None:
    parts = [calibration(place / name, tokenizer(), samples=5, length=8) for name in ("a.txt", "b.txt")]
    found = mixed(parts, [1.0, 0.25], seed=3)
    rows = [tuple(row) for row in found.ids.tolist()]
    given = [tuple(row) for part in parts for row in part.ids.tolist()]
    assert sorted(rows) == sorted(given)
    assert rows != given
    plain = found.ids.numpy().astype("<i8").tobytes()
    assert found.sha256 == hashlib.sha256(b"10x8:" + plain).hexdigest()
    assert found.source == "1 of a.txt + 0.25 of b.txt"
    assert torch.equal(mixed(parts, [1.0, 0.25], seed=3).ids, found.ids)
    assert not torch.equal(mixed(parts, [1.0, 0.25], seed=4).ids, found.ids)
    short = calibration(["abc"], tokenizer(), samples=5, length=8)
    with pytest.raises(
        BadInput, match=r"the list of texts has windows of 3 tokens, the other sources of 8: all must be"
    ):
        mixed([parts[0], short], [1, 1], seed=0)


def test_a_mixture_is_recorded(place: Path) -> None:
    result = compress(
        spoken(), place / "out", data={place / "a.txt": 3, str(place / "b.txt"): 1}, samples=8, measure=True, **SMALL
    )
    record = json.loads((place / "out" / "plan.json").read_text())["calibration"]
    assert record["source"] == "3 of a.txt (first 90 %) + 1 of b.txt"
    assert (record["windows"], record["length"]) == (8, 24)
    content = text()
    at = content.find("\n\n", int(len(content) * 0.9)) + 2
    head = calibration(Text("", content[:at]), tokenizer(), samples=6, length=24)
    other = calibration(place / "b.txt", tokenizer(), samples=2, length=24)
    assert record["sources"] == [
        {"source": "a.txt (first 90 %)", "weight": 3.0, "windows": 6, "sha256": head.sha256},
        {"source": "b.txt", "weight": 1.0, "windows": 2, "sha256": other.sha256},
    ]
    assert microtome.edit.Plan.read(place / "out").calibration == record
    assert result.perplexity_after is not None
    assert result.perplexity_after.source == "a.txt (last 10 %)"
    assert "of 2 sources the first text is measured on, a.txt (last 10 %)" in result.notes
    assert "3 of a.txt (first 90 %) + 1 of b.txt, 8 windows" in (place / "out" / "README.md").read_text()


def test_one_source_with_a_weight_is_that_source(place: Path) -> None:
    common: dict[str, Any] = {"samples": 8, "measure": True, **SMALL}
    plain = compress(spoken(), place / "plain", data=place / "a.txt", **common)
    for run, data in (("mapping", {place / "a.txt": 0.2}), ("pairs", [(place / "a.txt", 2), (place / "b.txt", 0)])):
        same = compress(spoken(), place / run, data=data, **common)
        assert stored(same) == stored(plain)
        assert same.plan.calibration == plain.plan.calibration
        assert "sources" not in same.plan.calibration
        assert same.notes == plain.notes


def test_what_a_mixture_is_measured_on(place: Path) -> None:
    """The first text, not the model's own; ids on themselves; a text that is named whole, and nothing is said then."""
    common: dict[str, Any] = {"samples": 8, "measure": True, "overwrite": True, **SMALL}
    given: list[tuple[Any, Any, str, int]] = [
        ({"self": 1, place / "a.txt": 1}, None, "a.txt (last 10 %)", 1),
        ({place / "ids.pt": 1, place / "a.txt": 1}, None, "ids.pt, the calibration tokens themselves", 2),
        ({place / "a.txt": 1, "self": 1}, place / "b.txt", "b.txt", 0),
    ]
    for data, eval_data, source, notes in given:
        result = compress(spoken(), place / "out", data=data, eval_data=eval_data, **common)
        assert result.perplexity_after is not None
        assert result.perplexity_after.source == source
        assert len([note for note in result.notes if "measured on" in note or "are used" in note]) == notes


def test_what_cannot_be_mixed(place: Path) -> None:
    both = {place / "a.txt": 1, place / "b.txt": 1}
    for more, words in (
        ({"samples": None}, "several sources share the windows by weight: say how many, by --samples"),
        ({"samples": 1}, "1 windows cannot be of 2 sources"),
        ({"data": {place / "a.txt": 1, place / "none.txt": 1}}, "no file or folder '.*none.txt'"),
        ({"data": 5}, "data must be a path, a known name, a tensor of ids or a list of strings"),
        ({"data": {5: 1, "self": 1}}, "data must be a path, a known name, a tensor of ids or a list of strings"),
    ):
        with pytest.raises(BadInput, match=words):
            compress(spoken(), place / "out", **{"data": both, "samples": 8, **SMALL, **more})
    assert not (place / "out").exists()


# Text of the model's own


def test_a_model_calibrates_on_what_it_writes(place: Path) -> None:
    common: dict[str, Any] = {"data": "self", "samples": 12, **SMALL}
    first = compress(spoken(), place / "first", measure=True, **common)
    again = compress(spoken(), place / "again", **common)
    other = compress(spoken(), place / "other", seed=1, **common)
    assert stored(first) == stored(again) != stored(other)
    assert first.plan.calibration["source"] == "self (written by the model at temperature 1, seed 0)"
    assert (first.plan.calibration["windows"], first.plan.calibration["length"]) == (12, 24)
    assert first.perplexity_before is first.perplexity_after is None
    assert first.notes == (mixture.UNMEASURED,)
    assert mixture.UNMEASURED in (place / "first" / "README.md").read_text()
    assert again.notes == ()
    measured = compress(spoken(), place / "measured", measure=True, eval_data=place / "a.txt", **common)
    assert stored(measured) == stored(first)
    assert measured.perplexity_after is not None
    assert measured.perplexity_after.source == "a.txt"
    assert measured.notes == ()


def test_a_model_without_a_tokenizer_writes_too(place: Path) -> None:
    told: list[str] = []
    result = compress(
        folder("opt-tied"), place / "out", data="self", samples=12, progress=lambda what, _: told.append(what), **SMALL
    )
    assert result.plan.calibration["windows"] == 12
    assert told[0] == "writing text"


def test_what_the_model_cannot_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, words in (
        ({"samples": None}, "self needs a number of windows to write, at least 1, not None"),
        ({"samples": 0}, "self needs a number of windows to write, at least 1, not 0"),
        ({"length": 1}, "length must be at least 2 tokens"),
        ({"seed": -1}, "seed must lie between 0 and"),
        ({"data": CALIBRATION, "eval_data": "self", "measure": True}, "perplexity of a model on its own samples says"),
    ):
        with pytest.raises(BadInput, match=words):
            compress(spoken(), place / "out", **{"data": "self", "samples": 8, **SMALL, **more})
    monkeypatch.setattr(mixture, "free_memory", lambda: 1000)
    with pytest.raises(
        BadInput, match=r"self: the model must run to write text, and 0\.0 GB do not fit into memory\. Give"
    ):
        compress(spoken(), place / "out", data="self", **SMALL)
    assert not (place / "out").exists()
