"""Data sets on the hub, with stand-ins for it: what is fetched, what is streamed, which part measures, what is refused."""

import gzip
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from words import BLANK, BOS, ids, tokenizer, words

from microtome import corpora
from microtome.data import calibration, evaluation
from microtome.errors import BadInput, UnknownName

# Known data sets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.usefixtures("cache")
def test_offline_says_at_once_what_to_do() -> None:
    start = time.monotonic()
    with pytest.raises(
        BadInput, match=r"wikitext2 is not in the local cache and HF_HUB_OFFLINE is set: pass a text file"
    ):
        evaluation("wikitext2", tokenizer())
    assert time.monotonic() - start < 5


@pytest.mark.usefixtures("cache")
def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\n to host")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(BadInput, match=r"cannot fetch wikitext2 .*\(no route to host\): pass a text file"):
        calibration("wikitext2", tokenizer())


def test_wikitext2_is_read_from_the_cache_by_split(cache: Path) -> None:
    folder = held(cache, "wikitext2") / "wikitext-2-raw-v1"
    folder.mkdir()
    pq.write_table(pa.table({"text": [words(0, 9)]}), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.table({"text": [words(9, 18)]}), folder / "test-00000-of-00001.parquet")
    train = calibration("wikitext2", tokenizer(), length=10)
    assert (train.ids.tolist(), train.source) == ([[BOS, *ids(0, 9)]], "wikitext2 (train)")
    test = evaluation("wikitext2", tokenizer(), length=10)
    assert (test.ids.tolist(), test.source) == ([[BOS, *ids(9, 18)]], "wikitext2 (test)")


@pytest.mark.usefixtures("cache")
def test_a_path_wins_over_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "a.txt").write_text(words(0, 9))
    monkeypatch.chdir(tmp_path)
    assert evaluation("wikitext2", tokenizer(), length=10).source == "wikitext2/"
    monkeypatch.chdir(tmp_path / "wikitext2")
    assert evaluation(".", tokenizer(), length=10).source == "wikitext2/"


def held(cache: Path, name: str) -> Path:
    """The folder in the cache where the files of a known data set are looked for."""
    known = corpora.KNOWN[name]
    folder = cache / f"datasets--{known.repo.replace('/', '--')}"
    commit = known.revision if known.pinned else "0" * 40
    if not known.pinned:
        (folder / "refs" / known.revision).parent.mkdir(parents=True)
        (folder / "refs" / known.revision).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def packed(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def test_c4_is_the_beginning_of_a_shard_of_lines(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are named .json, hold an object on each line, and what lies behind the first documents is not read."""
    monkeypatch.setitem(corpora.KNOWN, "c4", replace(corpora.KNOWN["c4"], most={"train": 2, "test": 1}))  # type: ignore[arg-type]
    folder = held(cache, "c4")
    lines = [json.dumps({"text": words(n, n + 3), "url": "w9"}) for n in (0, 3)]
    packed(folder / "en" / "c4-train.00000-of-01024.json.gz", [*lines, "{broken"])
    packed(folder / "en" / "c4-validation.00000-of-00008.json.gz", [lines[1], "{broken"])
    train = calibration("c4", tokenizer(), length=8)
    assert (train.ids.tolist(), train.source) == ([[BOS, *ids(0, 3), BLANK, *ids(3, 6)]], "c4 (train)")
    test = evaluation("c4", tokenizer(), length=4)
    assert (test.ids.tolist(), test.source) == ([[BOS, *ids(3, 6)]], "c4 (test)")
    packed(folder / "en" / "c4-validation.00000-of-00008.json.gz", ["{broken"])
    with pytest.raises(BadInput, match=r"cannot read .*c4-validation\.00000-of-00008\.json\.gz: "):
        evaluation("c4", tokenizer(), length=4)


def test_alpaca_has_one_file_and_its_end_is_the_test(cache: Path) -> None:
    file = held(cache, "alpaca") / corpora.KNOWN["alpaca"].files["train"]
    file.parent.mkdir()
    rows = [{"instruction": "w1", "output": "w2", "text": words(n, n + 1)} for n in range(100, 120)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    train = calibration("alpaca", tokenizer(), length=36)
    test = evaluation("alpaca", tokenizer(), length=4)
    assert [one for one in train.ids[0].tolist() if one not in (BOS, BLANK)] == ids(100, 118)
    assert test.ids.tolist() == [[BOS, *ids(118, 119), BLANK, *ids(119, 120)]]
    assert (train.source, test.source) == ("alpaca (train)", "alpaca (test)")


def test_a_revision_that_is_not_pinned_is_said(cache: Path) -> None:
    file = held(cache, "ptb") / "penn_treebank" / "test" / "0000.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table({"sentence": [words(0, 3), words(3, 5)]}), file)
    test = evaluation("ptb", tokenizer(), length=7, text_column="ignored")
    assert test.ids.tolist() == [[BOS, *ids(0, 3), BLANK, *ids(3, 5)]]
    assert test.source == "ptb (test, revision not pinned)"
    assert [name for name, one in corpora.KNOWN.items() if not one.pinned] == ["ptb"]


# Any other data set


class Library:
    """A stand-in for `datasets`: splits of rows, and what was asked of it."""

    def __init__(self, splits: dict[str, Any]) -> None:
        self.splits = splits
        self.asked: list[tuple[str, str | None]] = []

    def load_dataset(self, repo: str, config: str | None, *, streaming: bool) -> dict[str, Any]:
        assert streaming, "nothing is to be downloaded whole"
        self.asked.append((repo, config))
        return self.splits


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    def stand_in(**splits: Any) -> Library:
        made = Library(splits)
        monkeypatch.setitem(sys.modules, "datasets", made)
        return made

    return stand_in


def rows(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"body": words(n, n + 1), "id": n} for n in range(start, stop)]


def content(tokens: Any) -> list[int]:
    return [one for row in tokens.ids.tolist() for one in row if one not in (BOS, BLANK)]


@pytest.mark.parametrize(
    ("splits", "train", "test", "names"),
    [
        ({"test": rows(9, 12), "train": rows(0, 9)}, (0, 9), (9, 12), ("train", "test")),
        ({"train": rows(0, 9), "validation": rows(9, 12)}, (0, 9), (9, 12), ("train", "validation")),
        ({"train_gen": rows(0, 4), "train_sft": [], "test_sft": rows(4, 8)}, (0, 4), (4, 8), ("train_gen", "test_sft")),
        ({"train": rows(0, 20)}, (0, 18), (18, 20), ("train", "train")),
        ({"all": rows(0, 20)}, (0, 18), (18, 20), ("all", "all")),
    ],
)
def test_splits_of_a_data_set_on_the_hub(
    library: Any, splits: dict[str, Any], train: tuple[int, int], test: tuple[int, int], names: tuple[str, str]
) -> None:
    made = library(**splits)
    found = calibration("owner/some-set", tokenizer(), samples=None, length=2, text_column="body")
    assert sorted(content(found)) == ids(*train)
    assert found.source == f"owner/some-set ({names[0]}, revision not pinned)"
    held_out = evaluation("owner/some-set:en", tokenizer(), length=2, text_column="body")
    assert content(held_out) == ids(*test)
    assert held_out.source == f"owner/some-set:en ({names[1]}, revision not pinned)"
    assert made.asked == [("owner/some-set", None), ("owner/some-set", "en")]


@pytest.mark.parametrize(("limit", "value"), [("DOCUMENTS", 5), ("CHARACTERS", 11)])
def test_only_the_beginning_is_streamed(library: Any, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    """Five documents of three characters: the fourth passes 11 characters, so one less is read by that measure."""

    def endless() -> Iterator[dict[str, str]]:
        number = 10
        while True:
            yield {"body": f"w{number}"}
            number += 1

    monkeypatch.setattr(corpora, limit, value)
    library(train=endless(), test=[])
    found = calibration("owner/name", tokenizer(), samples=None, length=2, text_column="body")
    assert sorted(content(found)) == ids(10, 15 if limit == "DOCUMENTS" else 14)


def test_the_real_library_streams_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a folder in the place of a hub id, so its own splits and rows can be had without the hub."""
    pytest.importorskip("datasets")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, (start, stop) in {"train": (0, 5), "test": (5, 7)}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(start, stop)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split, name, (start, stop) in (("train", "train", (0, 5)), ("test", "test", (5, 7))):
        assert corpora.streamed("owner/name", split, "body") == (
            f"owner/name ({name}, revision not pinned)",
            rows(start, stop),
        )


def test_columns_of_the_hub(library: Any) -> None:
    library(train=rows(0, 5))
    with pytest.raises(UnknownName, match=r"no column of owner/name named 'bdy'\. Did you mean 'body'"):
        calibration("owner/name", tokenizer(), text_column="bdy")
    with pytest.raises(BadInput, match=r"owner/name row 1: column 'id' holds int, not text"):
        calibration("owner/name", tokenizer(), text_column="id")
    library(train=[], test=[])
    with pytest.raises(BadInput, match="owner/name is empty"):
        calibration("owner/name", tokenizer(), text_column="body")


def test_what_can_go_wrong_on_the_hub(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ValueError("Config name\n is missing")

    made = library()
    with pytest.raises(
        BadInput, match=r"cannot read owner/name .*\(it has no splits\): check owner/name, whether it wants"
    ):
        calibration("owner/name", tokenizer(), text_column="body")
    made.load_dataset = failing
    with pytest.raises(BadInput, match=r"cannot read owner/name .*\(Config name is missing\)") as caught:
        calibration("owner/name", tokenizer(), text_column="body")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    words_of_it = r"reading the hub data set owner/name needs the datasets library: pip install 'microtome\[data\]'"
    with pytest.raises(BadInput, match=words_of_it):
        calibration("owner/name", tokenizer(), text_column="body")


def test_a_missing_path_is_told_from_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a column, nothing is asked of the hub, and what is a path stays one with it."""
    unused = SimpleNamespace(load_dataset=lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setitem(sys.modules, "datasets", unused)
    with pytest.raises(
        BadInput, match=r"no file or folder 'owner/name'.*for the data set owner/name on the hub, name its"
    ):
        calibration("owner/name", tokenizer())
    for path in ("texts/some.jsonl", "./owner/name", "a/b/c", "texts/some.jsonl.xz", Path("owner/name")):
        with pytest.raises(BadInput, match=r"no file or folder .*wikitext2, self\.$"):
            calibration(path, tokenizer(), text_column="body")


def test_self_is_no_text_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="perplexity of a model on its own samples says nothing"):
        evaluation("self", tokenizer())
    with pytest.raises(BadInput, match="self is text that the model writes: only `compress` can calibrate on it"):
        calibration("self", tokenizer())
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "a.txt").write_text(words(0, 9))
    monkeypatch.chdir(tmp_path)
    assert evaluation("self", tokenizer(), length=10).source == "self/"
