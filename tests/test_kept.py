"""What runs that begin alike share: made once, never by runs that differ, and gone at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tree
from tinies import CALIBRATION, HELD_OUT, compress, folder, spoken, weights

from microtome import chain, spend, sweep
from microtome.kept import Kept

HEAL: dict[str, Any] = {"heal": {"steps": 2, "batch": 1}}
BITS: dict[str, Any] = {"gptq": {"options": {"bits": 4, "group": 0}}}


def recipe(*steps: Any, keep: float = 0.8) -> dict[str, Any]:
    return {"keep": keep, "steps": ["fasp", *steps]}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of the steps that are carried out."""
    found, one = list[str](), chain.one

    def noted(run: Any, steps: Any, opened: Any, lineage: Any, done: list[Any], *rest: Any, **more: Any) -> None:
        found.append(getattr(steps[len(done)], "name", type(steps[len(done)]).__name__.lower()))
        one(run, steps, opened, lineage, done, *rest, **more)

    monkeypatch.setattr(chain, "one", noted)
    return found


def test_a_value_is_made_once_and_its_seconds_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 8.0, 10.0, 12.0])
    monkeypatch.setattr("microtome.kept.time.perf_counter", lambda: next(now))
    with Kept() as kept:
        assert [kept.value(key, lambda key=key: key * 2) for key in (1, 1, 2, 1)] == [2, 2, 4, 2]
        assert kept.saved == 14.0
        kept.begin("other", CALIBRATION)
        assert kept.saved == 0.0
        assert kept.values == []


@pytest.mark.parametrize(
    ("identity", "ids", "stays"),
    [("a", CALIBRATION.clone(), True), ("a", None, True), ("a", HELD_OUT, False), ("b", CALIBRATION, False)],
)
def test_what_differs_shares_nothing(identity: str, ids: torch.Tensor | None, stays: bool) -> None:
    with Kept() as kept:
        kept.begin("a", None)
        kept.begin("a", CALIBRATION)
        kept.value("key", lambda: 1)
        kept.begin(identity, ids)
        assert bool(kept.values) == stays


@pytest.mark.parametrize("lists", [([BITS, HEAL], [BITS]), ([HEAL, BITS], [HEAL]), (["restore", HEAL], [])])
def test_shorter_recipes_may_come_behind_longer_ones(
    lists: tuple[list[Any], ...], made: list[str], tmp_path: Path
) -> None:
    """And are byte for byte what they are alone, in fp32."""
    pytest.importorskip("compressed_tensors")
    with Kept() as kept:
        for number, steps in enumerate(lists):
            compress(folder("llama"), tmp_path / f"{number}", recipe=recipe(*steps), kept=kept)
    assert made.count("fasp") == 1
    for number, steps in enumerate(lists):
        compress(folder("llama"), tmp_path / f"alone-{number}", recipe=recipe(*steps))
        have, want = weights(tmp_path / f"{number}"), weights(tmp_path / f"alone-{number}")
        assert have.keys() == want.keys()
        assert all(torch.equal(have[name], want[name]) for name in want)


def test_models_and_types_share_nothing(made: list[str], tmp_path: Path) -> None:
    with Kept() as kept:
        compress(folder("llama"), tmp_path / "a", recipe=recipe(), kept=kept)
        compress(folder("mistral-window"), tmp_path / "b", recipe=recipe(), kept=kept)
        compress(folder("mistral-window"), tmp_path / "c", recipe=recipe(), kept=kept, dtype="bfloat16")
        compress(folder("mistral-window"), tmp_path / "d", recipe=recipe(), kept=kept, dtype="bfloat16")
    assert made == ["fasp"] * 3
    assert {one.dtype for one in weights(tmp_path / "c").values()} == {torch.bfloat16}


def test_a_copy_in_16_bits_is_off_by_a_rounding_at_most(tmp_path: Path) -> None:
    source = spoken("llama", torch.bfloat16)
    with Kept() as kept:
        compress(source, tmp_path / "copied", recipe=recipe(), kept=kept)
    compress(source, tmp_path / "alone", recipe=recipe())
    have, want = weights(tmp_path / "copied"), weights(tmp_path / "alone")
    for name, one in want.items():
        torch.testing.assert_close(have[name].float(), one.float(), rtol=2**-7, atol=0.0)


def test_scales_of_embeddings_are_rounded_with_the_stored_type(tmp_path: Path) -> None:
    """Gemma multiplies by a number in the model's type, so that its last step is not copied from fp32."""
    with Kept() as kept:
        made = compress(spoken("gemma", torch.bfloat16), tmp_path / "shared", keep=0.7, kept=kept)
    assert made.stock
    compress(spoken("gemma", torch.bfloat16), tmp_path / "alone", keep=0.7)
    assert tree(tmp_path / "shared").keys() == tree(tmp_path / "alone").keys()
    assert all(
        torch.equal(one, other)
        for one, other in zip(weights(tmp_path / "shared").values(), weights(tmp_path / "alone").values(), strict=True)
    )


def test_a_target_is_checked_of_what_is_shared_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, check = list[int](), chain.check_target

    def noted(run: Any, steps: Any, number: int, out: Any) -> None:
        seen.append(number)
        check(run, steps, number, out)

    with Kept() as kept:
        compress(folder("llama"), tmp_path / "a", recipe=recipe("restore", HEAL), kept=kept)
        monkeypatch.setattr(chain, "check_target", noted)
        compress(folder("llama"), tmp_path / "b", recipe=recipe("restore"), kept=kept)
    assert set(seen) == {0, 1}


def test_checkpoints_go_with_the_group(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with Kept() as kept:
        compress(folder("llama"), tmp_path / "out", recipe=recipe("restore"), kept=kept, scratch=tmp_path / "scratch")
        assert len(list((tmp_path / "scratch").iterdir())) == len(kept.stages) == 2
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_split_of_one_budget_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, counts = spend.shares_of, list[int]()

    def counted(*given: Any) -> list[float]:
        counts.append(1)
        return found(*given)

    monkeypatch.setattr(spend, "shares_of", counted)
    both = {"keep": 0.8, "spend": "auto", "steps": ["slicegpt", "fasp"]}
    with Kept() as kept:
        for number, more in enumerate(([], [HEAL])):
            compress(
                folder("llama"), tmp_path / f"{number}", recipe=both | {"steps": [*both["steps"], *more]}, kept=kept
            )
    assert len(counts) == 1


def test_a_sweep_learns_nothing_from_what_it_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without eval_data a text's last tenth is measured on, and no row calibrates or heals on it."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"{number} is a number of this text." for number in range(400)))
    seen, plain = list[Any](), sweep.compress

    def noted(*given: Any, **named: Any) -> Any:
        seen.append(named["data"].content)
        return plain(*given, **named)

    monkeypatch.setattr(sweep, "compress", noted)
    held = {
        "keep": 0.8, "data": str(tmp_path / "text.txt"), "samples": 4, "length": 24, "entries": {"fasp": {}},
        "then": {"healed": [HEAL]},
    }  # fmt: skip
    rows = sweep.sweep([str(spoken())], held, tmp_path / "table.csv")
    assert [row.error for row in rows] == ["", ""]
    assert {text.split()[-7] for text in seen} < {str(number) for number in range(355, 365)}
