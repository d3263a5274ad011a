"""The files of a model folder, checked from config, index and headers alone, before any tensor is read.

A folder that passes has a config with a model_type, and safetensors files as long as their headers say, without holes
or overlaps, in which every tensor occurs once and in a type that we read. The format: eight bytes of little-endian
length, that many bytes of JSON (name to dtype, shape and offsets), then the tensors.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import torch

from microtome.errors import BadCheckpoint, MicrotomeError, UnsupportedModel

CONFIG, CARD = "config.json", "README.md"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
DEQUANTISED = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq")  # what `dequantise` reads
_QUANTISED_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NARROW_FLOATS = ("F8", "F6", "F4")
_PACKED = frozenset({"I32", "U32", "I8", "U8"})
# GPT-NeoX and others store causal masks as bytes, in `attention.bias`; packed weights have names that end like these.
_PACKED_NAME = re.compile(r"weight|qzeros|scales|packed|absmax|quant|scb|g_idx|blocks$", re.IGNORECASE)
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: `start` counts bytes from the beginning of its shard."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file, as its header describes it."""

    nbytes: int
    header: bytes
    tensors: Mapping[str, Stored]


def read_config(folder: Path) -> dict[str, Any]:
    """Parse config.json; raise UnsupportedModel if it calls the model quantised in a way that is not read."""
    path = folder / CONFIG
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UnsupportedModel(f"{folder} holds an adapter. Merge it into its base model and give the result.")
        raise BadCheckpoint(f"{folder} has no {CONFIG}. Give a Hugging Face model folder.")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise BadCheckpoint(f"{path} has no model_type. Give the {CONFIG} that belongs to the weights.")
    for key in ("quantization_config", "compression_config", "quantization"):
        value = config.get(key)
        if value and not (key == "quantization_config" and _method(value) in DEQUANTISED):
            raise _quantised(f"{path} has a {key} ({_describe(value)})")
    return config


def read_index(folder: Path) -> dict[str, str]:
    """Parse the index: stored name to shard, every shard a plain path inside the folder."""
    path = folder / INDEX
    weight_map: Any = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken(path, "has no weight_map")
    for shard in cast("dict[str, Any]", weight_map).values():
        # Only the text counts, because the hub's cache is made of links that leave the folder. What POSIX calls
        # absolute has a root for Windows too.
        where = PureWindowsPath(shard) if isinstance(shard, str) else None
        if where is None or where.drive or where.root or ".." in where.parts:
            raise BadCheckpoint(f"{path} names a shard outside its folder: {shard!r}. Do not use this checkpoint.")
        if where.suffix != ".safetensors":
            raise _broken(path, f"names {shard!r}, which is not a safetensors file")
    return cast("dict[str, str]", weight_map)


def read_shards(folder: Path, *, quantised: bool = False) -> dict[str, Shard]:
    """Check all weight files, and that the index and they agree; packed weights pass where they are announced.

    Where both a single file and an index exist the single file counts, as in transformers. Tensors that the index
    forgets are there all the same, also as in transformers.
    """
    single = (folder / SINGLE).is_file()
    if not single and not (folder / INDEX).is_file():
        raise no_weights(str(folder), sorted(path.name for path in folder.iterdir()))
    placed = {} if single else read_index(folder)
    names = [SINGLE] if single else sorted(set(placed.values()))
    shards = {shard: _read_shard(folder, shard, quantised=quantised) for shard in names}
    homes: dict[str, str] = {}
    for shard, content in shards.items():
        for name in content.tensors:
            if name in homes:
                raise _broken(folder, f"holds {name} twice, in {homes[name]} and in {shard}")
            homes[name] = shard
    for name, shard in placed.items():
        if name not in shards[shard].tensors:
            raise _broken(folder / INDEX, f"places {name} in {shard}, which does not hold it")
    if not homes:
        raise _broken(folder, "has weight files without a single tensor")
    return shards


def no_weights(place: str, files: Iterable[str]) -> MicrotomeError:
    """Say why a place without safetensors weights is refused, from the names of its files."""
    files = [name for name in files if name != "training_args.bin"]
    first = {suffix: name for name in reversed(files) if (suffix := name.rpartition(".")[2])}
    missing = f"neither {SINGLE} nor {INDEX}"
    if "safetensors" in first:
        return BadCheckpoint(f"{place} has {first['safetensors']}, but {missing}. Download the missing file.")
    if pickle := first.get("bin") or first.get("pt") or first.get("pth"):
        convert = f"M.from_pretrained({place!r}, dtype='auto').save_pretrained('converted')"
        return UnsupportedModel(
            f"{place} holds only pickle weights ({pickle}), which can run code when opened. If trusted, convert: "
            f'python -c "from transformers import AutoModelForCausalLM as M; {convert}", then copy the tokenizer files.'
        )
    if gguf := first.get("gguf"):
        return UnsupportedModel(f"{place} holds only GGUF ({gguf}), an export. Give the folder that it was made from.")
    listed = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
    return BadCheckpoint(f"{place} has {missing}; it holds: {listed or 'nothing'}. Download the weights.")


def read_bytes(path: Path) -> bytes:
    """Read a small file; BadCheckpoint if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"cannot read {path}: {error.strerror}.") from error


def _broken(path: Path, fact: str) -> BadCheckpoint:
    return BadCheckpoint(f"{path} {fact}. Download it again.")


def _quantised(fact: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{fact}: the model is quantised. Give the checkpoint that it was quantised from, or a dequantised copy; "
        f"{', '.join(DEQUANTISED)} are read as they are."
    )


def _method(quantisation: object) -> str:
    facts = cast("dict[str, Any]", quantisation) if isinstance(quantisation, dict) else {}
    bnb = any("bnb" in key or key.startswith("load_in_") for key in facts)
    return str(facts.get("quant_method") or ("bitsandbytes" if bnb else "unnamed method"))


def _describe(quantisation: object) -> str:
    facts = cast("dict[str, Any]", quantisation) if isinstance(quantisation, dict) else {}
    return f"{_method(facts)}, {facts['bits']} bits" if "bits" in facts else _method(facts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: Any = json.loads(read_bytes(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _broken(path, "is not a JSON object")
    return cast("dict[str, Any]", value)


def _read_shard(folder: Path, shard: str, *, quantised: bool) -> Shard:
    path = folder / shard
    if not path.is_file():
        raise _broken(folder / INDEX, f"names {shard}, which is not there")
    size, header = _read_header(path)
    try:
        entries: Any = json.loads(header)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"has a corrupt header ({error})") from error
    if not isinstance(entries, dict):
        raise _broken(path, "has a corrupt header (not a JSON object)")
    offset = end = 8 + len(header)
    tensors = {
        name: _read_entry(path, shard, offset, name, entry, _DTYPES | _QUANTISED_DTYPES if quantised else _DTYPES)
        for name, entry in cast("dict[str, Any]", entries).items()
        if name != "__metadata__"
    }
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start != end:
            raise _broken(path, f"has a corrupt header ({name} begins at byte {stored.start:,} instead of {end:,})")
        end += stored.nbytes
    if size < end:
        raise _broken(path, f"is truncated: it has {size:,} of {end:,} bytes")
    if size > end:
        raise _broken(path, f"has {size - end:,} bytes after its last tensor")
    return Shard(size, header, tensors)


def _read_header(path: Path) -> tuple[int, bytes]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            length = int.from_bytes(first, "little")
            header = file.read(length) if length <= _HEADER_LIMIT else b""
    except OSError as error:
        raise BadCheckpoint(f"cannot read {path}: {error.strerror}.") from error
    if first == b"version ":
        raise BadCheckpoint(f"{path} is a Git LFS pointer instead of weights. Run `git lfs pull` in its folder.")
    if length > _HEADER_LIMIT:
        raise _broken(path, f"has a corrupt header (a length of {length:,} bytes)")
    if len(first) < 8 or len(header) < length:
        raise _broken(path, f"is truncated: it ends within its header, after {size:,} bytes")
    return size, header


def _read_entry(
    path: Path, shard: str, offset: int, name: str, entry: object, dtypes: Mapping[str, torch.dtype]
) -> Stored:
    """Check what a header says of one tensor; `offset` is where the header ends."""
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            sizes = cast("list[Any]", shape)
        case _:
            raise _broken(path, f"has a corrupt header ({name} lacks a dtype, a shape or offsets)")
    packed = kind in _PACKED and _PACKED_NAME.search(name.rpartition(".")[2]) and dtypes is _DTYPES
    if packed or (kind.startswith(_NARROW_FLOATS) and kind not in dtypes):
        raise _quantised(f"{path} stores {name} as {kind}")
    if kind not in dtypes:
        raise UnsupportedModel(f"{path} stores {name} as {kind}. Give a checkpoint of {', '.join(_DTYPES)}.")
    dtype = dtypes[kind]
    if not all(isinstance(size, int) and 0 <= size < 1 << 48 for size in sizes):
        raise _broken(path, f"has a corrupt header ({name} has the shape {sizes})")
    if end - start != math.prod(sizes) * dtype.itemsize:
        raise _broken(path, f"has a corrupt header ({name}: {end - start:,} bytes are not {kind} of shape {sizes})")
    return Stored(shard, dtype, tuple(sizes), offset + start, end - start)
