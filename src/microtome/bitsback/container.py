"""The file: magic, version, a header as compressed JSON, then sections, each with a checksum. docs/pack.md has it all.

Nothing of what is read is trusted: a file that is cut short, damaged, or of another kind is refused in one line.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from microtome.bitsback import words
from microtome.bitsback.coder import Packed
from microtome.bitsback.sites import Cut, Lies, Site
from microtome.checkpoint import hidden
from microtome.errors import BadCheckpoint, BadInput, BadOutput, MicrotomeError

MAGIC = b"\x93MTPACK\n"
VERSION = 1
START = struct.Struct("<8sIIQ")  # magic, version, CRC-32 and bytes of the header
SECTIONS = ("files", "others", "records", "body")
CHUNK = 1 << 22  # words that are coded with one histogram


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file says: the words, and all that is no 16-bit word."""

    header: dict[str, Any]
    packed: Packed
    others: dict[str, Tensor]
    files: dict[str, bytes]


def check_out(out: Path, *, overwrite: bool) -> Path:
    """The path of a file to write. Raises BadOutput where something is in the way."""
    path = out.expanduser()
    if path.is_dir():
        raise BadOutput(f"{path} is a folder. Give the name of a file, such as {path / 'model.mtpack'}.")
    if path.exists() and not overwrite:
        raise BadOutput(f"{path} exists. Choose another file, or pass --overwrite.")
    if not path.absolute().parent.is_dir():
        raise BadOutput(f"there is no folder {path.absolute().parent}. Make it, or choose another file.")
    return path


def described(packed: Packed) -> dict[str, Any]:
    """The part of the header that says how words are laid out."""
    cut = packed.cut
    numbers = {name: number for number, (name, _, _) in enumerate(cut.tensors)}
    return {
        "word": str(packed.dtype).removeprefix("torch."),
        "exact": packed.exact,
        "sites": [
            [one.name, one.size, one.centred, [[numbers[lie.tensor], lie.dim, lie.first] for lie in one.axes]]
            for one in cut.sites
        ],
        "exponents": list(packed.exponents),
        "records": [len(one) for one in packed.records],
    }


def write(
    out: Path, packed: Packed, header: Mapping[str, Any], others: Iterable[Tensor], files: Mapping[str, bytes]
) -> dict[str, int]:
    """Write a file, whole or not at all; return the bytes of its sections, and of its header with the start."""
    small = {name: zlib.compress(data, 9) for name, data in files.items()}
    coded = bool(header["coded"])
    parts = {
        "files": b"".join(small.values()),
        "others": b"".join(one.contiguous().view(torch.uint8).numpy().tobytes() for one in others),
        "records": b"".join(packed.records),
        "body": squeezed(packed.body, packed.dtype) if coded else packed.body.numpy().data.cast("B"),
    }
    told = {
        **header,
        **described(packed),
        "files": [[name, len(data)] for name, data in small.items()],
        "sections": [[name, len(data), zlib.crc32(data)] for name, data in parts.items()],
    }
    text = zlib.compress(json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode(), 9)
    partial = hidden(out, "partial")
    try:
        with partial.open("wb") as file:
            for one in (START.pack(MAGIC, VERSION, zlib.crc32(text), len(text)), text, *parts.values()):
                file.write(one)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        raise BadOutput(f"could not write {out} ({error.strerror}). Choose another file.") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return {"header": START.size + len(text)} | {name: len(data) for name, data in parts.items()}


# --- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Contents:
    """Read and check a file. Raises BadInput where there is none, BadCheckpoint where it is damaged or another kind."""
    try:
        with path.open("rb") as file:
            header = read_header(path, file)
            return understood(path, header, {name: section(path, file, header, name) for name in SECTIONS})
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}. Give a file that `microtome pack` wrote.") from error
    except MicrotomeError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, zlib.error) as error:
        raise damaged(path, f"its header makes no sense ({type(error).__name__})") from error


def damaged(path: Path, fact: str) -> BadCheckpoint:
    """One line about a file that is not whole."""
    return BadCheckpoint(f"{path} is damaged: {fact}. Copy it again from where it was made.")


def read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The header of a file, checked; of another version it is not looked at."""
    start = file.read(START.size)
    if start[: len(MAGIC)] != MAGIC:
        raise BadInput(f"{path} is no packed model. Give a file that `microtome pack` wrote.")
    if len(start) < START.size:
        raise damaged(path, "it ends within its first bytes")
    _, version, wanted, size = START.unpack(start)
    if version != VERSION:
        raise BadInput(f"{path} is a packed model of version {version}, and this reads {VERSION}: upgrade microtome.")
    text = file.read(min(size, os.fstat(file.fileno()).st_size))
    if len(text) < size or zlib.crc32(text) != wanted:
        raise damaged(path, "its header does not match its checksum")
    return json.loads(zlib.decompress(text))


def section(path: Path, file: BinaryIO, header: Mapping[str, Any], name: str) -> bytearray:
    """The next section, which has to be this one."""
    told, size, wanted = header["sections"][SECTIONS.index(name)]
    data = bytearray(min(int(size), os.fstat(file.fileno()).st_size))
    have = file.readinto(data)  # type: ignore[attr-defined]
    if told != name or have < size:
        raise damaged(path, f"it ends within its {name}")
    if zlib.crc32(data) != wanted:
        raise damaged(path, f"its {name} do not match their checksum")
    return data


def understood(path: Path, header: dict[str, Any], parts: Mapping[str, bytearray]) -> Contents:
    """The contents of checked sections."""
    dtype, names = words.TYPES[header["word"]], [name for name, *_ in header["tensors"]]
    sites = tuple(
        Site(name, int(size), bool(centred), tuple(Lies(names[tensor], int(dim), int(at)) for tensor, dim, at in axes))
        for name, size, centred, axes in header["sites"]
    )
    cut = Cut(tuple((name, int(rows), int(columns)) for name, rows, columns, *_ in header["tensors"]), sites)
    records, at = list[bytes](), 0
    for size in header["records"]:
        records.append(bytes(parts["records"][at : at + size]))
        at += size
    if len(records) != len(sites) or at != len(parts["records"]) or len(header["exponents"]) != len(cut.pieces):
        raise damaged(path, "its header and its records do not belong together")
    if any(abs(one) > 150 for one in header["exponents"]):  # beyond what a bfloat16 can be
        raise damaged(path, "its scales are no scales of words")
    count = cut.words - cut.saved
    if header["coded"]:
        body = swelled(bytes(parts["body"]), count, dtype)
    elif len(parts["body"]) == 2 * count:
        body = torch.frombuffer(parts["body"] or bytearray(2), dtype=torch.int16)[:count]
    else:
        raise damaged(path, f"its body has {len(parts['body']):,} bytes instead of {2 * count:,}")
    packed = Packed(cut, dtype, tuple(map(int, header["exponents"])), body, tuple(records), bool(header["exact"]))
    return Contents(header, packed, other_tensors(header, parts["others"]), companions(header, bytes(parts["files"])))


def other_tensors(header: Mapping[str, Any], data: bytearray) -> dict[str, Tensor]:
    """What is no 16-bit word, as it was stored."""
    found, at = dict[str, Tensor](), 0
    for name, kind, shape, *_ in header["others"]:
        dtype: torch.dtype = getattr(torch, kind)
        size = dtype.itemsize * torch.Size(shape).numel()
        raw = torch.frombuffer(data, dtype=torch.uint8)[at : at + size] if size else torch.empty(0, dtype=torch.uint8)
        found[name] = raw.clone().view(dtype).reshape(shape)
        at += size
    return found


def companions(header: Mapping[str, Any], data: bytes) -> dict[str, bytes]:
    """The files of the folder, by name."""
    found, at = dict[str, bytes](), 0
    for name, size in header["files"]:
        where = PureWindowsPath(name)
        if where.drive or where.root or ".." in where.parts or PurePosixPath(name).name != where.name:
            raise BadCheckpoint(f"the packed file names a file outside its folder: {name!r}. Do not use it.")
        found[name] = zlib.decompress(data[at : at + size])
        at += size
    return found


# --- the body, coded ------------------------------------------------------------------------------------------------


def split(dtype: torch.dtype) -> tuple[int, int]:
    """How many symbols the coded upper part of a word has, and how many bits the lower: all exponent bits are coded."""
    return (256, 8) if dtype is torch.float16 else (512, 7)


def squeezed(body: Tensor, dtype: torch.dtype) -> bytes:
    """Words with sign and exponent entropy-coded, chunk by chunk: the chunk's histogram, then an ANS code."""
    model, out = words.library().model, bytearray()
    (symbols, low), coder = split(dtype), words.library().stack.AnsCoder
    for chunk in body.split(CHUNK):
        wide = chunk.to(torch.int32) & 0xFFFF
        upper, lower = wide >> low, wide & ((1 << low) - 1)
        counts = torch.bincount(upper, minlength=symbols).to(torch.int32)
        ans = coder()
        ans.encode_reverse(lower.numpy(), model.Uniform(1 << low))
        ans.encode_reverse(upper.numpy(), categorical(counts))
        code = ans.get_compressed().tobytes()
        head = zlib.compress(counts.numpy().tobytes(), 9)
        out += struct.pack("<II", len(head), len(code)) + head + code
    return bytes(out)


def categorical(counts: Tensor) -> Any:
    """The model of a histogram; a symbol that does not occur costs the others nothing to speak of."""
    return words.library().model.Categorical((counts.double() / counts.sum()).numpy(), perfect=False)


def swelled(data: bytes, count: int, dtype: torch.dtype) -> Tensor:
    """The words of a coded body."""
    import numpy as np

    model, (_, low), at = words.library().model, split(dtype), 0
    found = torch.empty(count, dtype=torch.int16)
    for chunk in found.split(CHUNK):
        head, code = struct.unpack_from("<II", data, at)
        counts = torch.frombuffer(bytearray(zlib.decompress(data[at + 8 : at + 8 + head])), dtype=torch.int32)
        packed = np.frombuffer(data[at + 8 + head : at + 8 + head + code], np.uint32)
        ans = words.library().stack.AnsCoder(packed.copy())
        upper = torch.from_numpy(ans.decode(categorical(counts), len(chunk)))
        lower = torch.from_numpy(ans.decode(model.Uniform(1 << low), len(chunk)))
        chunk[:] = ((upper << low) | lower).to(torch.int16)
        at += 8 + head + code
    return found
