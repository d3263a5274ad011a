"""Data sets on the Hugging Face hub: a few known by name, and any other by its id.

A known data set is one file for each split, fetched once and found in the cache from then on. Any other is streamed by
the `datasets` library, which is optional, and only its first documents are read.
"""

import gzip
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from microtome.errors import BadInput, UnknownName

DOCUMENTS = 20_000  # of a streamed data set, or of a shard: a hundred times what a calibration takes
CHARACTERS = 2**26  # of a streamed data set
HELD_OUT = 10  # one document in so many, the last ones, where a data set has a single split
OFFLINE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class Known:
    """Where a data set lies and what is read of it. Without a commit in `revision` its numbers may move with it."""

    repo: str
    revision: str
    files: Mapping[str, str]
    about: str
    column: str = "text"
    most: Mapping[str, int] = field(default_factory=dict[str, int])  # documents of a split, all if it is not named

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, so that nobody's numbers move with the data set."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None

    @property
    def single(self) -> bool:
        """Whether training and test part are of one file."""
        return len(set(self.files.values())) == 1


KNOWN: Mapping[str, Known] = {
    "alpaca": Known(
        "tatsu-lab/alpaca",
        "dce01c9b08f87459cf36a430d809084718273017",
        dict.fromkeys(("train", "test"), "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"),
        "instruction, input and answer in Alpaca's own prompt; the last tenth is the test split",
    ),
    "c4": Known(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
        "English web pages: the first 20,000 of a shard, and the first 1,100 of a validation shard as the test split",
        most={"train": DOCUMENTS, "test": 1100},  # 1,100 are what GPTQ and its successors measure on
    ),
    "ptb": Known(
        "ptb-text-only/ptb_text_only",
        "refs/convert/parquet",  # no commit is known for certain: the record says that it is not pinned
        {split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "test")},
        "Penn Treebank as language models use it; its revision is not pinned",
        column="sentence",
    ),
    "wikitext2": Known(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "test")},
        "WikiText-2, raw",
    ),
}


def is_id(name: str) -> bool:
    """Whether a name reads as a data set on the hub: `owner/name`, or `owner/name:config`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", name) is not None


def find(name: str) -> Known:
    """The data set of a name; raises UnknownName."""
    if name not in KNOWN:
        raise UnknownName("data set", name, [*KNOWN, "self"])
    return KNOWN[name]


def fetched(name: str, split: str) -> Path:
    """The file of a known data set, from the cache or else downloaded. Raises BadInput where neither can be."""
    known = find(name)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    place: dict[str, Any] = {"repo_type": "dataset", "revision": known.revision}
    advice = "pass a text file instead (--data FILE), or run it once with a connection, which keeps a copy"
    try:
        return Path(hf_hub_download(known.repo, known.files[split], local_files_only=True, **place))
    except LocalEntryNotFoundError as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFFLINE:
            raise BadInput(f"{name} is not in the local cache and HF_HUB_OFFLINE is set: {advice}") from error
    try:
        # without a connection a download retries for long
        HfApi().dataset_info(known.repo, revision=known.revision, timeout=10)
        return Path(hf_hub_download(known.repo, known.files[split], **place))
    except Exception as error:  # the HTTP library's, the hub's and the system's own
        raise BadInput(f"cannot fetch {name} from the Hugging Face hub ({_reason(error)}): {advice}") from error


def first_rows(path: Path, most: int | None) -> list[object]:
    """The first rows of a packed file with a JSON object on each line; the rest is not even unpacked."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, most)]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise BadInput(f"cannot read {path}: {_reason(error)}") from error


def streamed(name: str, split: str, column: str) -> tuple[str, list[object]]:
    """What a data set on the hub is called, and its first rows; a split is held out of the training one if need be.

    `name` is `owner/name` or `owner/name:config`. Raises BadInput in one line for whatever goes wrong on the way.
    """
    repo, _, config = name.partition(":")
    try:
        library: Any = importlib.import_module("datasets")  # not by `import`: it may be missing where types are checked
    except ImportError as error:
        advice = "pip install 'microtome[data]', or pass a file"
        raise BadInput(f"reading the hub data set {name} needs the datasets library: {advice}") from error
    try:
        splits: Any = library.load_dataset(repo, config or None, streaming=True)
        train, test = _splits([str(one) for one in splits])
        rows = _within(splits[train if split == "train" else test], column)
    except Exception as error:  # the library's own, the hub's, and those of its file readers
        advice = f"check owner/name{'' if config else ', whether it wants a config (owner/name:config)'} and connection"
        raise BadInput(f"cannot read {name} from the Hugging Face hub ({_reason(error)}): {advice}") from error
    chosen = train if split == "train" else test
    return f"{name} ({chosen}, revision not pinned)", rows[held_out(len(rows), split)] if train == test else rows


def _splits(names: list[str]) -> tuple[str, str]:
    """The split to calibrate on and the one to measure on, which may be the same."""
    if not names:
        raise ValueError("it has no splits")
    train = next((name for name in names if name.startswith("train")), names[0])
    measures = (name for start in ("test", "valid", "dev") for name in names if name.startswith(start))
    return train, next(measures, train)


def _within(rows: Iterable[Any], column: str) -> list[object]:
    """The first rows: no more documents and characters than a calibration can want."""
    kept: list[object] = []
    size = 0
    for row in islice(rows, DOCUMENTS):
        kept.append(row)
        size += len(str(row.get(column, "")))
        if size > CHARACTERS:
            break
    return kept


def held_out(count: int, split: str) -> slice:
    """The part of so many documents of a single split that serves for training, or the last tenth for the test."""
    at = count - count // HELD_OUT
    return slice(0, at) if split == "train" else slice(at, count)


def _reason(error: Exception) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


__all__ = ["KNOWN", "Known", "fetched", "find", "first_rows", "held_out", "is_id", "streamed"]
