"""Text to windows of token ids: what is cut, what is drawn, what is refused and in which words."""

import copy
import functools
import gzip
import json
import lzma
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from words import BLANK, BOS, DOCUMENTS, STREAM, UNKNOWN, WORDS, ids, tokenizer, words

from microtome import data
from microtome.data import calibration, evaluation
from microtome.errors import BadInput, UnknownName
from microtome.texts import parted


def write_all(folder: Path) -> dict[str, Path]:
    """The documents in every kind of text file."""
    lines = "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(DOCUMENTS))
    contents = {
        "a.txt": "\n\n".join(DOCUMENTS).encode(),
        "bom.txt": b"\xef\xbb\xbf" + "\n\n".join(DOCUMENTS).encode(),
        "a.raw": "\n\n".join(DOCUMENTS).encode(),
        "a.jsonl": lines.encode(),
        "windows.jsonl": lines.replace("\n", "\r\n\r\n").encode(),
        "strings.jsonl": "\n".join(json.dumps(text) for text in DOCUMENTS).encode(),
        "a.json": json.dumps([{"id": 0, "only": text} for text in DOCUMENTS]).encode(),
        "nulls.json": json.dumps([{"text": None}, *({"text": text} for text in DOCUMENTS), {"other": 1}]).encode(),
        "strings.json": json.dumps(DOCUMENTS).encode(),
    }
    contents |= {f"{name}.xz": lzma.compress(raw) for name, raw in contents.items()}
    contents |= {
        f"{name}.GZ": gzip.compress(raw, mtime=0) for name, raw in contents.items() if not name.endswith(".xz")
    }
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)
    pq.write_table(pa.table({"id": [0, 1, 2], "text": DOCUMENTS}), folder / "a.parquet")
    pq.write_table(pa.table({"id": [0, 1, 2, 3], "story": [None, *DOCUMENTS]}), folder / "only.parquet")
    return {path.name: path for path in folder.iterdir()}


# Evaluation


def test_evaluation_cuts_the_stream_in_order_and_drops_the_tail() -> None:
    tokens = evaluation(DOCUMENTS, tokenizer(), length=5)
    assert tokens.ids.tolist() == [STREAM[0:5], STREAM[5:10], STREAM[10:15], STREAM[15:20]]
    assert (tokens.ids.dtype, tokens.count, tokens.note) == (torch.int64, 20, "")


def test_every_kind_of_file_holds_the_same_text(tmp_path: Path) -> None:
    for name, path in write_all(tmp_path).items():
        tokens = evaluation(path, tokenizer(), length=23)
        assert tokens.ids.tolist() == [STREAM], name
        assert tokens.source == name
    assert evaluation(str(tmp_path / "a.txt"), tokenizer(), length=23).sha256 == tokens.sha256


def test_a_folder_is_its_text_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(DOCUMENTS[1])
    (tmp_path / "a.jsonl").write_text(json.dumps(DOCUMENTS[0]))
    (tmp_path / "c.json.xz").write_bytes(lzma.compress(json.dumps(DOCUMENTS[2:]).encode()))
    (tmp_path / "README").write_text("not this one")
    (tmp_path / ".hidden.txt").write_text("nor this")
    (tmp_path / "d.txt").mkdir()
    tokens = evaluation(tmp_path, tokenizer(), length=23)
    assert tokens.ids.tolist() == [STREAM]
    assert tokens.source == f"{tmp_path.name}/"


def test_a_blank_row_counts_as_a_document_as_in_the_usual_wikitext_protocol() -> None:
    tokens = evaluation(["", words(0, 1), "", words(1, 2)], tokenizer(), length=6)
    assert tokens.ids.tolist() == [[BOS, BLANK, *ids(0, 1), BLANK, BLANK, *ids(1, 2)]]


def ended(*texts: str) -> str:
    return "\n<|endoftext|>\n".join(texts)


@pytest.mark.parametrize(("before", "after"), [("", ""), ("<|endoftext|>\n", ""), ("", "\n<|endoftext|>\n")])
def test_a_document_behind_a_separator_begins_as_a_text_of_its_own(tmp_path: Path, before: str, after: str) -> None:
    (tmp_path / "a.txt").write_text(before + ended(*DOCUMENTS) + after)
    tokens = evaluation(tmp_path / "a.txt", tokenizer(), length=23)
    assert tokens.ids.tolist() == [[BOS, *ids(0, 5), BOS, *ids(5, 7), BOS, *ids(7, 20)]]


def test_a_tokenizer_without_special_tokens_reads_a_blank_line_between_documents() -> None:
    plain = copy.deepcopy(tokenizer())
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    assert evaluation([ended("", *DOCUMENTS)], plain, length=22).ids.tolist() == [STREAM[1:]]


def test_a_separator_that_the_tokenizer_knows_stays() -> None:
    knowing = copy.deepcopy(tokenizer())
    knowing.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokens = evaluation(["w0<|endoftext|>w1"], knowing, length=4)
    assert tokens.ids.tolist() == [[BOS, *ids(0, 1), knowing.eos_token_id, *ids(1, 2)]]


def test_stretches_of_a_large_text_keep_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WHOLE", 100)
    tokens = calibration([ended(*(words(i, i + 3) for i in range(3000)))], tokenizer(), samples=20, length=4)
    begun = tokens.ids.flatten() == BOS
    assert 0.2 < float(begun.double().mean()) < 0.3
    assert float((tokens.ids == UNKNOWN).double().mean()) < 0.02  # at most the ends of a stretch


def test_text_is_parted_where_a_document_ends() -> None:
    parts = parted([ended(*(words(i, i + 3) for i in range(100)))])
    assert parts is not None
    assert parts[0].content.endswith("<|endoftext|>")
    assert evaluation([parts[1].content], tokenizer(), length=4).ids[0, 0] == BOS


def test_text_of_nothing_but_separators_is_refused() -> None:
    with pytest.raises(BadInput, match=r"at least 2 are needed"):
        evaluation([ended("", "", "")], tokenizer(), length=4)


def test_a_line_separator_within_json_does_not_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "w0 \u2028 w1"}, ensure_ascii=False), encoding="utf-8")
    assert evaluation(path, tokenizer(), length=4).ids.tolist() == [[BOS, 3, UNKNOWN, 4]]


@pytest.mark.parametrize("word", ["w1 ", "w1 " + " " * 600], ids=["dense", "needs the whole text"])
def test_limit_keeps_the_first_windows_and_tokenises_no_more_than_it_must(word: str) -> None:
    text = [word * 400]
    every = evaluation(text, tokenizer(), length=4)
    some = evaluation(text, Counting(), length=4, limit=3)
    assert len(every.ids) == 100
    assert torch.equal(some.ids, every.ids[:3])
    assert evaluation(text, tokenizer(), length=4, limit=1000).sha256 == every.sha256


def test_limit_does_not_tokenise_a_large_text() -> None:
    counting = Counting()
    evaluation([words(0, WORDS)], counting, length=4, limit=2)
    assert counting.characters == 2 * 4 * data.MARGIN


def test_a_text_shorter_than_a_window_is_one_shorter_window_and_says_so() -> None:
    for act in (calibration, evaluation):
        tokens = act(DOCUMENTS, tokenizer(), length=100)
        assert tokens.ids.tolist() == [STREAM]
        assert "23 tokens, fewer than a window of 100" in tokens.note


def test_long_texts_bring_no_warning_from_the_tokenizer() -> None:
    fresh = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", model_max_length=8)
    evaluation([words(0, 100)], fresh, length=4)
    assert not fresh.deprecation_warnings
    fresh(words(0, 100))
    assert fresh.deprecation_warnings, "the test no longer sees the warning"


# Calibration


class Counting:
    """The tokenizer, how many characters it was given, and where it was to add special tokens."""

    def __init__(self) -> None:
        self.characters = 0
        self.special: list[bool] = []

    def __call__(self, text: str, **flags: Any) -> Any:
        self.characters += len(text)
        self.special.append(flags["add_special_tokens"])
        return tokenizer()(text, **flags)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(8, 300), length=st.integers(2, 12), samples=st.integers(1, 200), seed=st.integers(0, 2**63 - 1))
def test_calibration_draws_distinct_windows_of_the_stream(size: int, length: int, samples: int, seed: int) -> None:
    stream = [BOS, *ids(0, size)]
    windows = [tuple(stream[i : i + length]) for i in range(0, len(stream) - length + 1, length)] or [tuple(stream)]
    tokens = calibration([words(0, size)], tokenizer(), samples=samples, length=length, seed=seed)
    drawn = [tuple(row) for row in tokens.ids.tolist()]
    assert len(drawn) == len(set(drawn)) == min(samples, len(windows))
    assert set(drawn) <= set(windows)
    again = calibration([words(0, size)], tokenizer(), samples=samples, length=length, seed=seed)
    assert again.sha256 == tokens.sha256
    fewer = calibration([words(0, size)], tokenizer(), samples=max(1, samples // 2), length=length, seed=seed)
    assert torch.equal(fewer.ids, tokens.ids[: len(fewer.ids)]), "more samples extend the draw, they do not redo it"


def test_seeds_draw_differently() -> None:
    draws = {calibration([words(0, 400)], tokenizer(), samples=20, length=4, seed=seed).sha256 for seed in range(5)}
    assert len(draws) == 5


def test_fewer_windows_than_samples_are_all_used_with_a_note() -> None:
    tokens = calibration(DOCUMENTS, tokenizer(), samples=9, length=5)
    assert sorted(tokens.ids.tolist()) == sorted([STREAM[0:5], STREAM[5:10], STREAM[10:15], STREAM[15:20]])
    assert "4 windows of 5 tokens, fewer than the 9 asked for" in tokens.note
    assert calibration(DOCUMENTS, tokenizer(), samples=4, length=5).note == ""
    assert len(calibration(DOCUMENTS, tokenizer(), samples=None, length=5).ids) == 4


def test_a_large_text_is_sampled_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    text = [words(0, WORDS)]
    monkeypatch.setattr(data, "WHOLE", 1000)
    counting = Counting()
    tokens = calibration(text, counting, samples=50, length=16, seed=3)
    assert tokens.ids.shape == (50, 16)
    assert counting.characters < len(text[0]) / 2
    assert calibration(text, tokenizer(), samples=50, length=16, seed=3).sha256 == tokens.sha256
    assert calibration(text, tokenizer(), samples=50, length=16, seed=4).sha256 != tokens.sha256
    # a stretch holds some 700 words: within it neighbours stay neighbours, and only its two edges can be cut words
    breaks = int((tokens.ids.diff(dim=1) != 1).sum())
    assert 0 < breaks <= 6
    assert tokens.ids.unique().numel() >= tokens.count - 4
    assert counting.special == [True, False]


def test_a_large_text_that_is_needed_whole_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibration([words(0, WORDS)], tokenizer(), samples=None, length=10)
    monkeypatch.setattr(data, "WHOLE", 1000)
    assert calibration([words(0, WORDS)], tokenizer(), samples=None, length=10).sha256 == whole.sha256
    scarce = calibration([words(0, WORDS)], tokenizer(), samples=10**6, length=10)
    assert len(scarce.ids) >= WORDS // 10
    assert "fewer than the 1000000 asked for" in scarce.note


# Token ids


def test_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    ids_NT = torch.arange(24).view(4, 6)
    torch.save(ids_NT.to(torch.int32), tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", ids_NT.numpy().astype(">u2"))
    for spec in (ids_NT, ids_NT.t().contiguous().t(), tmp_path / "a.pt", str(tmp_path / "a.npy")):
        for act in (calibration, evaluation):
            tokens = act(spec, None, vocab_size=24)
            assert torch.equal(tokens.ids, ids_NT)
            assert (tokens.ids.dtype, tokens.note) == (torch.int64, "")
            assert tokens.sha256 == calibration(ids_NT, None).sha256
    assert calibration(tmp_path / "a.pt", None).source == "a.pt"


def test_ids_give_their_first_rows_and_columns() -> None:
    ids_NT = torch.arange(24).view(4, 6)
    some = calibration(ids_NT, None, samples=3, length=5)
    assert torch.equal(some.ids, ids_NT[:3, :5])
    assert "[4, 6], the first [3, 5] are used" in some.note
    assert torch.equal(evaluation(ids_NT, None, limit=1, length=2).ids, ids_NT[:1, :2])
    assert torch.equal(calibration(ids_NT.repeat(200, 1), None, samples=None, length=None).ids, ids_NT.repeat(200, 1))


def test_later_changes_to_the_users_tensor_do_not_reach_the_tokens() -> None:
    ids_NT = torch.arange(24).view(4, 6)
    tokens = calibration(ids_NT, None)
    ids_NT.zero_()
    assert tokens.ids[3, 5] == 23


def test_the_hash_sees_ids_and_shape() -> None:
    flat = torch.arange(12)
    hashes = {calibration(flat.view(shape), None).sha256 for shape in ((2, 6), (6, 2), (3, 4))}
    hashes.add(calibration(flat.flip(0).view(3, 4), None).sha256)
    assert len(hashes) == 4


# Columns


ALPACA = [{"instruction": "w0", "input": "w1", "output": "w2"}]


def test_the_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    pq.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        tokens = evaluation(tmp_path / name, tokenizer(), length=2, text_column="output")
        assert tokens.ids.tolist() == [[BOS, 5]]
        with pytest.raises(BadInput, match=r"no column 'text'.*choose one of input, instruction, output"):
            evaluation(tmp_path / name, tokenizer())
        with pytest.raises(UnknownName, match=r"no column of .*named 'outptu'. Did you mean 'output'"):
            evaluation(tmp_path / name, tokenizer(), text_column="outptu")


# Refusals


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n\n ", r"a\.txt is empty"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(byte 3\).*iconv"),
        ("a.txt.xz", b"nothing packed", r"cannot read .*a\.txt\.xz"),
        ("a.txt.xz", lzma.compress(b"w0 w1 w2")[:-9], r"cannot read .*a\.txt\.xz"),
        ("a.txt.gz", b"nothing packed", r"cannot read .*a\.txt\.gz"),
        ("a.txt.gz", gzip.compress(b"w0 w1 w2", mtime=0)[:-9], r"cannot read .*a\.txt\.gz"),
        ("a.jsonl", b'{"text": "w0"}\n\n{"text": w1}\n', r"a\.jsonl line 3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not JSON"),
        ("a.jsonl", b'{"text": "w0"}\n[1]\n', r"a\.jsonl line 2 holds list, not an object or a string"),
        ("a.jsonl", b'{"text": "w0"}\n{"text": 5}\n', r"a\.jsonl line 2: column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "w0 \\ud800"}\n', r"half of a surrogate pair"),
        ("a.jsonl", b'{"n": 5}\n', r"no column 'text', nor just one other that holds text: choose one of n"),
        ("a.jsonl", b"{}\n", r"a\.jsonl is empty"),
        ("a.json", b'{"text": "w0"}', r"a\.json is no JSON list"),
        ("a.json", b'{"text": "w0"}\n{"text": "w1"}', r"a\.json is not JSON.*name it \.jsonl"),
        ("a.json", b"[]", r"a\.json is empty"),
        ("a.parquet", b"PAR1 but not really", r"cannot read .*a\.parquet as parquet"),
        ("a.parquet", b"", r"cannot read .*a\.parquet as parquet"),
        ("a.parquet", parquet(pa.table({"text": [1, 2]})), r"column 'text' holds int64, not text"),
        ("a.parquet", parquet(pa.table({"text": pa.array([], pa.string())})), r"a\.parquet is empty"),
        ("a.csv", b"text\nw0", r"a\.csv is of no known kind: text is \.txt"),
        ("a.pt", b"", r"cannot read .*a\.pt as one tensor of token ids"),
        ("a.pt", b"not a tensor", r"cannot read .*a\.pt as one tensor of token ids"),
        ("a.npy", b"not an array", r"cannot read .*a\.npy as one tensor of token ids"),
        ("a.npy", b"", r"cannot read .*a\.npy as one tensor of token ids"),
    ],
)
def test_unusable_files_are_refused_in_words(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    for act in (calibration, evaluation):
        with pytest.raises(BadInput, match=message) as caught:
            act(tmp_path / name, tokenizer())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.zeros(4, 4), r"token ids are integers, but .* holds float32"),
        (torch.zeros(4, 4, dtype=torch.bool), r"token ids are integers, but .* holds bool"),
        (torch.arange(4), r"token ids are \[N, T\].* has shape \[4\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"has shape \[1, 2, 3\]"),
        (torch.zeros(0, 4, dtype=torch.int64), r"has shape \[0, 4\]"),
        (torch.zeros(4, 1, dtype=torch.int64), r"at least 1 window of 2 tokens, but .* has shape \[4, 1\]"),
        (
            torch.tensor([[3, 4023]]),
            r"the largest token id of .* is 4023, .*vocabulary has 4003 entries.*another tokenizer",
        ),
        (torch.tensor([[3, -100]]), r"the smallest token id of .* is -100"),
    ],
)
def test_ids_that_are_no_windows_of_this_vocabulary_are_refused(
    tmp_path: Path, held: torch.Tensor, message: str
) -> None:
    torch.save(held, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", held.numpy())
    for spec in (held, tmp_path / "a.pt", tmp_path / "a.npy"):
        with pytest.raises(BadInput, match=message):
            calibration(spec, None, vocab_size=4003)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def test_files_of_ids_hold_one_tensor_and_no_code(tmp_path: Path) -> None:
    torch.save({"ids": torch.zeros(2, 2, dtype=torch.int64)}, tmp_path / "dict.pt")
    with pytest.raises(BadInput, match=r"dict\.pt holds dict, not one dense tensor"):
        calibration(tmp_path / "dict.pt", None)
    torch.save(torch.ones(2, 2, dtype=torch.int64).to_sparse(), tmp_path / "sparse.pt")
    with pytest.raises(BadInput, match="not one dense tensor"):
        calibration(tmp_path / "sparse.pt", None)
    code = Code(str(tmp_path / "ran"))
    torch.save(code, tmp_path / "code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(code))
    np.save(tmp_path / "code.npy", np.array([[code]], dtype=object), allow_pickle=True)
    for name in ("code.pt", "plain.pt", "code.npy"):
        with pytest.raises(BadInput, match=f"cannot read .*{name}"):
            calibration(tmp_path / name, None)
        assert not (tmp_path / "ran").exists()


def test_text_from_another_models_tokenizer_is_refused() -> None:
    for act in (calibration, evaluation):
        with pytest.raises(BadInput, match=r"largest token id of the list of texts is 12, .*vocabulary has 10 entries"):
            act([words(0, 10)], tokenizer(), vocab_size=10)
        assert act([words(0, 10)], tokenizer(), vocab_size=13).count == 11


def test_text_needs_a_tokenizer_and_a_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 10))
    for act in (calibration, evaluation):
        with pytest.raises(BadInput, match=r"a\.txt is text, but the model folder has no tokenizer: pass token ids"):
            act(tmp_path / "a.txt", None)
        with pytest.raises(BadInput, match=r"a\.txt is text: say how many tokens make a window"):
            act(tmp_path / "a.txt", tokenizer(), length=None)


def test_a_text_of_one_token_predicts_nothing() -> None:
    bare = functools.partial(tokenizer())
    with pytest.raises(BadInput, match=r"makes 1 token\(s\): at least 2 are needed"):
        evaluation(["w0"], lambda text, **flags: bare(text, **flags | {"add_special_tokens": False}))


@pytest.mark.parametrize(
    ("act", "options", "message"),
    [
        (calibration, {"samples": 0}, "samples must be at least 1, not 0"),
        (calibration, {"length": 1}, "length must be at least 2 tokens"),
        (calibration, {"seed": -1}, "seed must lie between 0 and"),
        (calibration, {"seed": 2**63}, "seed must lie between 0 and"),
        (evaluation, {"limit": 0}, "limit must be at least 1, not 0"),
        (evaluation, {"length": -5}, "length must be at least 2 tokens"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(act: Callable[..., Any], options: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        act(DOCUMENTS, tokenizer(), **options)


def test_folders_without_text_or_with_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no text: looked for \.txt"):
        calibration(tmp_path, tokenizer())
    (tmp_path / "a.txt").write_text("w0 w1")
    torch.save(torch.zeros(2, 2, dtype=torch.int64), tmp_path / "b.pt")
    with pytest.raises(BadInput, match=r"holds token ids \(b\.pt\): pass that file itself"):
        calibration(tmp_path, tokenizer())


@pytest.mark.parametrize(
    "spec", ["missing.txt", "some/folder", Path("missing"), "", "two words", "x" * 5000 + ".txt", "a\0b"]
)
def test_missing_files_are_refused(spec: str | Path) -> None:
    with pytest.raises(BadInput, match=r"no file or folder .*wikitext2") as caught:
        calibration(spec, tokenizer())
    assert len(str(caught.value)) < 300


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no data set named 'wikitxt2'\. Did you mean 'wikitext2'\?"):
        calibration("wikitxt2", tokenizer())
    with pytest.raises(UnknownName, match=r"no data set named 'book'\. Known: alpaca, c4, ptb, self, wikitext2"):
        evaluation("book", tokenizer())


def test_a_list_of_something_else_is_refused() -> None:
    mixed: Any = ["w0", 5]
    with pytest.raises(BadInput, match="a list of strings"):
        calibration(mixed, tokenizer())


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(pa.table({"text": DOCUMENTS})))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"needs pyarrow: pip install pyarrow"):
        evaluation(tmp_path / "a.parquet", tokenizer())
