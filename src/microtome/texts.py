"""Where text comes from: files, folders and data sets known by name.

`.txt .jsonl .json .parquet` (and compressed), folders of them, ids in `.pt` or `.npy`, lists of strings, tensors.
"""

import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from microtome.errors import BadInput, UnknownName

PLAIN = (".txt", ".raw", ".tokens")  # the latter two are WikiText's own names
TEXT = (*PLAIN, ".jsonl", ".json", ".parquet")
IDS = (".pt", ".npy")
CONVERSATIONS = ("messages", "conversations", "conversation")

# Pinned, so that nobody's numbers move with the data set; and a pinned file in the cache is found without the network.
WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
KNOWN: Mapping[str, str] = {"wikitext2": "wikitext-2-raw-v1/{split}-00000-of-00001.parquet"}


@dataclass(frozen=True)
class Text:
    """Text and what it is called."""

    source: str
    content: str


Spec = str | Path | Tensor | Text | Sequence[str]


def parted(spec: Spec, column: str | None = None, held_out: float = 0.1) -> tuple[Text, Text] | None:
    """The beginning and the end of one text, cut between documents, so that one part can measure the other.

    None for ids, and for data sets that have a split of their own.
    """
    if isinstance(spec, str | Path) and _existing(spec) is None:
        return None
    source, content = load(spec, "train", column)
    if isinstance(content, Tensor):
        return None
    at = content.find("\n\n", int(len(content) * (1 - held_out)))
    at = int(len(content) * (1 - held_out)) if at < 0 else at + 2
    share = round(100 * held_out)
    return Text(f"{source} (first {100 - share} %)", content[:at]), Text(f"{source} (last {share} %)", content[at:])


def load(spec: Spec, split: str, column: str | None) -> tuple[str, str | Tensor]:
    """What `spec` is called, and its text or ids."""
    if isinstance(spec, Text):
        return spec.source, spec.content
    if isinstance(spec, Tensor):
        return "the tensor of ids", spec
    if not isinstance(spec, str | Path):
        if not all(isinstance(text, str) for text in cast("Sequence[object]", spec)):
            raise BadInput("data must be a path, a known name, a tensor of ids or a list of strings")
        return "the list of texts", _joined("the list of texts", spec)
    path = _existing(spec)
    if path is None:
        return f"{spec} ({split})", _joined(str(spec), _documents(_from_hub(str(spec), split), column))
    if path.is_dir():
        return f"{path.name}/", _joined(
            str(path), (text for file in _texts_in(path) for text in _documents(file, column))
        )
    return path.name, _read_ids(path) if _kind(path) in IDS else _joined(str(path), _documents(path, column))


def _existing(spec: str | Path) -> Path | None:
    """The path of a file or folder that exists; None for what may be the name of a data set."""
    try:
        if str(spec) and Path(spec).exists():
            return Path(spec).absolute()  # for the name of "."; not resolved, a link's target may have no suffix
    except OSError:
        pass  # longer than a name may be
    if isinstance(spec, str) and re.fullmatch(r"[\w-]+", spec):
        return None
    raise BadInput(f"no file or folder {str(spec)[:200]!r}. Data sets known by name: {', '.join(KNOWN)}.")


def _kind(path: Path) -> str:
    """The suffix that tells what is inside: `.jsonl` for `a.jsonl.xz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in {".xz", ".gz"} else suffix


def _texts_in(folder: Path) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    except OSError as error:
        raise BadInput(f"cannot read {folder}: {error}") from error
    if ids := [file.name for file in files if _kind(file) in IDS]:
        raise BadInput(f"{folder} holds token ids ({ids[0]}): pass that file itself, a folder is for text")
    if texts := [file for file in files if _kind(file) in TEXT]:
        return texts
    raise BadInput(f"{folder} holds no text: looked for {', '.join(TEXT)}")


def _joined(place: str, documents: Iterable[str]) -> str:
    text = "\n\n".join(documents)
    if not text.strip():
        raise BadInput(f"{place} is empty: there is no text in it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{place} holds {text[error.start]!r}, half of a surrogate pair: mend its \\u escapes"
        ) from error
    return text


def _documents(path: Path, column: str | None) -> list[str]:
    match _kind(path):
        case ".parquet":
            return _read_parquet(path, column)
        case ".jsonl":
            lines = enumerate(_read_text(path).split("\n"), 1)
            rows = {f"line {number}": _parsed(f"{path} line {number}", line) for number, line in lines if line.strip()}
            return _column_of(rows, path, column)
        case ".json":
            held = _parsed(str(path), _read_text(path))
            if not isinstance(held, list):
                raise BadInput(f"{path} is no JSON list of objects or strings: name it .jsonl if each line is one")
            items = enumerate(cast("list[object]", held), 1)
            return _column_of({f"item {number}": item for number, item in items}, path, column)
        case kind if kind in PLAIN:
            return [_read_text(path)]
        case _:
            raise BadInput(f"{path} is of no known kind: text is {', '.join(TEXT)}, token ids are {', '.join(IDS)}")


def _read_text(path: Path) -> str:
    unpack = {".xz": lzma.decompress, ".gz": gzip.decompress}.get(path.suffix.lower(), bytes)
    try:
        return unpack(path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}): convert it, for instance with iconv") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise BadInput(f"cannot read {path}: {error}") from error


def _parsed(place: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = ": name it .jsonl if each line is an object or a string" if "Extra data" in str(error) else ""
        raise BadInput(f"{place} is not JSON ({error}){hint}") from error


def _column_of(rows: Mapping[str, object], path: Path, wanted: str | None) -> list[str]:
    """The texts of rows, strings or objects, by their place in the file; a missing or null text is no document."""
    types: dict[str, set[type]] = {}
    for place, row in rows.items():
        if not isinstance(row, str | dict):
            raise BadInput(f"{path} {place} holds {type(row).__name__}, not an object or a string")
        for key, value in cast("dict[str, object]", row).items() if isinstance(row, dict) else ():
            types.setdefault(key, set()).add(type(value))
    is_text = {key: found - {type(None)} == {str} for key, found in types.items()}
    column = _choose(is_text, path, wanted) if is_text else ""
    texts: list[str] = []
    for place, row in rows.items():
        value = row if isinstance(row, str) else cast("dict[str, object]", row).get(column)
        if isinstance(value, str):
            texts.append(value)
        elif value is not None:
            raise BadInput(f"{path} {place}: column {column!r} holds {type(value).__name__}, not text")
    return texts


def _choose(columns: Mapping[str, bool], path: Path, wanted: str | None) -> str:
    """The column to read, of those that hold text (True) or something else."""
    if wanted is not None and wanted not in columns:
        raise UnknownName(f"column of {path}", wanted, columns)
    texts = [name for name, is_text in columns.items() if is_text]
    conversations = [name for name in columns if name in CONVERSATIONS and name not in texts]
    if wanted is None and "text" in columns:
        return "text"
    if conversations and wanted in (None, *conversations):
        fact = f"column {wanted or conversations[0]!r} of {path} holds conversations, which are not read"
        raise BadInput(f"{fact}: render them into a column 'text'")
    if wanted is None and len(texts) != 1:
        listed = ", ".join(sorted(columns))
        raise BadInput(f"{path} has no column 'text', nor just one other that holds text: choose one of {listed}")
    return wanted or texts[0]


def _read_parquet(path: Path, wanted: str | None) -> list[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        fact = f"reading {path.name} needs pyarrow"
        raise BadInput(f"{fact}: pip install pyarrow, or pass a .txt or .jsonl file") from error
    try:
        with pq.ParquetFile(path) as file:
            types = {field.name: str(field.type) for field in file.schema_arrow}
            is_text = {name: held in {"string", "large_string", "string_view"} for name, held in types.items()}
            column = _choose(is_text, path, wanted)
            if not is_text[column]:
                raise BadInput(f"{path}: column {column!r} holds {types[column]}, not text")
            texts = file.read(columns=[column]).column(column).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"cannot read {path} as parquet: {_reason(error)}") from error
    return [text for text in texts if text is not None]


def _read_ids(path: Path) -> Tensor:
    try:
        if path.suffix.lower() == ".npy":
            ids = np.load(path, allow_pickle=False)
            held = torch.from_numpy(ids.astype(ids.dtype.newbyteorder("=")))
        else:
            held = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a file that is not what its name says can raise anything
        raise BadInput(f"cannot read {path} as one tensor of token ids [N, T]: {_reason(error)}") from error
    if not isinstance(held, Tensor) or held.layout != torch.strided:
        raise BadInput(f"{path} holds {type(held).__name__}, not one dense tensor of token ids [N, T]")
    return held


def _from_hub(name: str, split: str) -> Path:
    """The parquet file of a known data set, from the cache or else downloaded."""
    if name not in KNOWN:
        raise UnknownName("data set", name, KNOWN)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    (repo, revision), file = WIKITEXT, KNOWN[name].format(split=split)
    advice = "pass a text file instead (--data FILE), or run it once with a connection, which keeps a copy"
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise BadInput(f"{name} is not in the local cache and HF_HUB_OFFLINE is set: {advice}") from error
    try:
        HfApi().dataset_info(repo, revision=revision, timeout=10)  # without a connection a download retries for long
        return Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except Exception as error:  # the HTTP library's, the hub's and the system's own
        raise BadInput(f"cannot fetch {name} from the Hugging Face hub ({_reason(error)}): {advice}") from error


def _reason(error: Exception) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
