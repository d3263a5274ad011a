"""Where text comes from: files, folders and data sets on the hub.

`.txt .jsonl .json .parquet` (and compressed), folders of them, ids in `.pt` or `.npy`, lists of strings, tensors. Rows
of a table give the text of one column; conversations become text by the tokenizer's chat template.
"""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from microtome import chat, corpora
from microtome.errors import BadInput, UnknownName

PLAIN = (".txt", ".raw", ".tokens")  # the latter two are WikiText's own names
TEXT = (*PLAIN, ".jsonl", ".json", ".parquet")
IDS = (".pt", ".npy")
SEPARATOR = "<|endoftext|>"  # the end of a document in plain text, whatever the tokenizer calls it
SELF = "self"  # text that the model writes itself


@dataclass(frozen=True)
class Text:
    """Text and what it is called."""

    source: str
    content: str


Spec = str | Path | Tensor | Text | Sequence[str]


def parted(
    spec: Spec, column: str | None = None, held_out: float = 0.1, tokenizer: Any | None = None
) -> tuple[Text, Text] | None:
    """The beginning and the end of one text, cut between documents, so that one part can measure the other.

    None for ids, and for data sets that have a split of their own.
    """
    if named(spec, column):
        return None
    source, content = load(spec, "train", column, tokenizer)
    if isinstance(content, Tensor):
        return None
    end, at = SEPARATOR if SEPARATOR in content else "\n\n", int(len(content) * (1 - held_out))
    at = found + len(end) if (found := content.find(end, at)) >= 0 else at
    share = round(100 * held_out)
    return Text(f"{source} (first {100 - share} %)", content[:at]), Text(f"{source} (last {share} %)", content[at:])


def named(spec: Spec, column: str | None = None) -> bool:
    """Whether this is the name of a data set, or `self`, rather than a path, a text or ids."""
    return isinstance(spec, str | Path) and _existing(spec, column) is None


def is_self(spec: Spec) -> bool:
    """Whether this asks for text that the model writes itself; a file of that name comes first."""
    return isinstance(spec, str) and spec == SELF and named(spec)


def load(spec: Spec, split: str, column: str | None, tokenizer: Any | None = None) -> tuple[str, str | Tensor]:
    """What `spec` is called, and its text or ids. `column` is for files and hub ids, the tokenizer for conversations.

    Raises BadInput or UnknownName.
    """
    if isinstance(spec, Text):
        return spec.source, spec.content
    if isinstance(spec, Tensor):
        return "the tensor of ids", spec
    if not isinstance(spec, str | Path):
        texts = cast("object", spec)
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in cast("list[object]", texts)):
            raise BadInput("data must be a path, a known name, a tensor of ids or a list of strings")
        return "the list of texts", _joined("the list of texts", spec)
    reader = Reader(column, tokenizer)
    path = _existing(spec, column)
    if path is None:
        source, documents = _from_hub(str(spec), split, reader)
        return source, _joined(str(spec), documents)
    if path.is_dir():
        return f"{path.name}/", _joined(
            str(path), (text for file in _texts_in(path) for text in reader.documents(file))
        )
    return path.name, _read_ids(path) if _kind(path) in IDS else _joined(str(path), reader.documents(path))


def _existing(spec: str | Path, column: str | None = None) -> Path | None:
    """The path of a file or folder that exists; None for what may be the name of a data set."""
    try:
        if str(spec) and Path(spec).exists():
            return Path(spec).absolute()  # for the name of "."; not resolved, a link's target may have no suffix
    except OSError:
        pass  # longer than a name may be
    if isinstance(spec, str) and re.fullmatch(r"[\w-]+", spec):
        return None
    on_hub = isinstance(spec, str) and corpora.is_id(spec) and _kind(Path(spec)) not in (*TEXT, *IDS)
    if on_hub and column is not None:
        return None
    known = f"Data sets known by name: {', '.join(corpora.KNOWN)}, {SELF}"
    advice = f"; for the data set {spec} on the hub, name its column by --text-column" if on_hub else ""
    raise BadInput(f"no file or folder {str(spec)[:200]!r}. {known}{advice[:200]}.")


def _from_hub(name: str, split: str, reader: "Reader") -> tuple[str, list[str]]:
    """What a data set on the hub is called, and its documents."""
    if name == SELF:
        if split == "test":
            raise BadInput("the perplexity of a model on its own samples says nothing: measure on other text than self")
        raise BadInput("self is text that the model writes: only `compress` can calibrate on it")
    if corpora.is_id(name):
        source, rows = corpora.streamed(name, split, str(reader.column))
        return source, reader.column_of({f"row {number}": row for number, row in enumerate(rows, 1)}, name)
    known, path = corpora.find(name), corpora.fetched(name, split)
    own = Reader(known.column, reader.tokenizer)
    if _kind(path) == ".parquet":
        documents = own.parquet(path)
    else:
        rows = corpora.first_rows(path, known.most.get(split))
        documents = own.column_of({f"line {number}": row for number, row in enumerate(rows, 1)}, str(path))
    if known.single:
        documents = documents[corpora.held_out(len(documents), split)]
    return f"{name} ({split}{'' if known.pinned else ', revision not pinned'})", documents


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


@dataclass(frozen=True)
class Reader:
    """How rows become texts: the column that the user wants, and the tokenizer whose template renders conversations."""

    column: str | None
    tokenizer: Any | None

    def documents(self, path: Path) -> list[str]:
        """The texts in a file."""
        match _kind(path):
            case ".parquet":
                return self.parquet(path)
            case ".jsonl":
                lines = enumerate(_read_text(path).split("\n"), 1)
                return self.column_of(
                    {
                        f"line {number}": _parsed(f"{path} line {number}", line)
                        for number, line in lines
                        if line.strip()
                    },
                    str(path),
                )
            case ".json":
                held = _parsed(str(path), _read_text(path))
                if not isinstance(held, list):
                    raise BadInput(f"{path} is no JSON list of objects or strings: name it .jsonl if each line is one")
                items = enumerate(cast("list[object]", held), 1)
                return self.column_of({f"item {number}": item for number, item in items}, str(path))
            case kind if kind in PLAIN:
                return [_read_text(path)]
            case _:
                raise BadInput(f"{path} is of no known kind: text is {', '.join(TEXT)}, token ids are {', '.join(IDS)}")

    def column_of(self, rows: Mapping[str, object], path: str) -> list[str]:
        """The texts of rows, strings or objects, by their place in the file; a missing or null text is no document."""
        types: dict[str, set[type]] = {}
        for place, row in rows.items():
            if not isinstance(row, str | dict):
                raise BadInput(f"{path} {place} holds {type(row).__name__}, not an object or a string")
            for key, value in cast("dict[str, object]", row).items() if isinstance(row, dict) else ():
                types.setdefault(key, set()).add(type(value))
        is_text = {key: found - {type(None)} == {str} for key, found in types.items()}
        column = _choose(is_text, path, self.column) if is_text else ""
        values = {
            place: row if isinstance(row, str) else cast("dict[str, object]", row).get(column)
            for place, row in rows.items()
        }
        return self.texts(values, path, column)

    def texts(self, values: Mapping[str, object], path: str, column: str) -> list[str]:
        """The texts of one column's values: text as it is, conversations rendered, null and empty ones left out."""
        texts: list[str] = []
        for place, value in values.items():
            if isinstance(value, str):
                texts.append(value)
            elif isinstance(value, list) and all(isinstance(turn, dict) for turn in cast("list[object]", value)):
                text = chat.rendered(cast("list[object]", value), self.tokenizer, f"{path} {place}")
                texts += [text] if text else []
            elif value is not None:
                raise BadInput(f"{path} {place}: column {column!r} holds {type(value).__name__}, not text")
        return texts

    def parquet(self, path: Path) -> list[str]:
        """The texts of one column of a parquet file."""
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
                column = _choose(is_text, str(path), self.column)
                if not is_text[column] and not re.match(r"(large_)?list<.*struct<", types[column]):
                    raise BadInput(f"{path}: column {column!r} holds {types[column]}, not text")
                values = file.read(columns=[column]).column(column).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"cannot read {path} as parquet: {_reason(error)}") from error
        return self.texts({f"row {number}": value for number, value in enumerate(values, 1)}, str(path), column)


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


def _choose(columns: Mapping[str, bool], path: str, wanted: str | None) -> str:
    """The column to read, of those that hold text (True) or something else."""
    if wanted is not None:
        if wanted not in columns:
            raise UnknownName(f"column of {path}", wanted, columns)
        return wanted
    if "text" in columns:
        return "text"
    if conversations := [name for name in chat.COLUMNS if name in columns]:
        return conversations[0]
    texts = [name for name, is_text in columns.items() if is_text]
    if len(texts) != 1:
        listed = ", ".join(sorted(columns))
        raise BadInput(f"{path} has no column 'text', nor just one other that holds text: choose one of {listed}")
    return texts[0]


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


def _reason(error: Exception) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
