"""Bits-back coding of the rotations that leave a decoder as it is: a model folder into one smaller file, and back.

He, Flamich and Hernandez-Lobato, "Getting Free Bits Back from Rotational Symmetries in LLMs" (arXiv:2410.01309). Many
checkpoints compute the same function: those whose stream is turned by a rotation. A file that says which one it holds
says too much. So the rotation is chosen by bits that have to be stored anyway, and the reader, who finds the rotation
in the weights, has those bits back: t (t - 1) / 2 words for every rotation of size t.

What is done differently from what the authors report, and why: sites beside the stream are used too (value and
query-key channels, columns of low-rank shortcuts), and the last junction; what the first rotation is made of are the
columns of a few coordinates that are left alone, so that no tensor has to be set aside; words are paired sorted with
sorted, in fp64; what could round otherwise on another machine is listed, so that checksums hold everywhere.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from microtome import arch, layout
from microtome.arch import Stored
from microtome.bitsback import coder, container, sites, words
from microtome.bitsback.sites import Cut
from microtome.checkpoint import Writer
from microtome.errors import BadCheckpoint, BadInput, NumericalFailure, UnsupportedModel
from microtome.planner import Opened, opened
from microtome.shards import CARD, CONFIG
from microtome.source import COMPANIONS, open_source

TRAVELS = (*COMPANIONS, CARD, CONFIG, "plan.json", "*.py", "additional_chat_templates/*.jinja")
ZEROS = 0.1  # a larger share of zeros in what is turned is a sparsity that a rotation would fill
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Report:
    """What came of packing or unpacking: bytes, and how they come about."""

    file: Path
    folder: Path
    exact: bool
    word: str
    sites: int
    bytes: dict[str, int | None]  # dense source (None: unknown), model (weights), file, weights in the file, formula
    words: dict[str, int]  # all, taken back, listed
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        said = {"file": str(self.file), "folder": str(self.folder), "exact": self.exact, "word": self.word}
        rest = {"sites": self.sites, "bytes": self.bytes, "words": self.words}
        return {**said, **rest, "seconds": self.seconds, "notes": list(self.notes)}

    def rows(self) -> list[tuple[str, str, str]]:
        """What is how large, beside the weights of the model."""
        named = {
            "dense": "weights of the model that it was cut from",
            "model": "weights of the model",
            "weights": "the same in the file",
            "formula": "the least that its sites allow",
            "companions": "config, tokenizer, card, plan, compressed",
            "header": "header of the file",
            "file": "file",
        }
        whole, found = self.bytes["model"] or 1, list[tuple[str, str, str]]()
        for name, label in named.items():
            if (size := self.bytes[name]) is not None:
                found.append((label, f"{size:,}", f"{size / whole:.4f}"))
        return found

    @property
    def grown(self) -> bool:
        """Whether what was packed is larger than what it was packed from."""
        return (self.bytes["weights"] or 0) > (self.bytes["model"] or 0)

    def lines(self) -> list[str]:
        """Remarks below the table."""
        said = self.words
        how = "all words exact" if self.exact else f"{said['listed']:,} words listed, the others within the tolerance"
        return [
            f"{self.sites} sites: {said['taken']:,} of {said['all']:,} {self.word} words taken back, {how}",
            *(["it did not pay: this file is larger than the weights."] if self.grown else []),
            *self.notes,
            f"seconds: {', '.join(f'{name} {value:.1f}' for name, value in self.seconds.items())}",
        ]


def refused(found: Opened) -> None:
    """Say what cannot be packed, before a weight is read."""
    if found.wrapper is not None:
        raise UnsupportedModel(
            f"what a {found.wrapper.model_type} has around its decoder would turn with it: pack the text decoder alone."
        )
    if found.source.quantised is not None:
        raise UnsupportedModel(
            f"this model is quantised ({found.source.quantised.method}), and a rotation would leave its grid: pack the "
            "model that it was quantised from."
        )


def read(found: Opened, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Canonical tensors as [rows, columns] of 16-bit words, and those that hold none; `dtype` rounds to it first."""
    held, others = dict[str, Tensor](), dict[str, Tensor]()
    for part in layout.parts(found.config):
        for name, tensor in found.read(part).items():
            if not tensor.is_floating_point():
                others[name] = tensor
                continue
            kind = dtype or found.dtype
            if (tensor.dtype is not kind and dtype is None) or kind not in words.TYPES.values():
                raise BadInput(
                    f"{name} of {found.source.name} is {str(tensor.dtype)[6:]}, and packing is of words of one type of "
                    "16 bits: add --dtype float16 (or bfloat16), which rounds once."
                )
            short = tensor.to(kind)
            if not torch.isfinite(short).all():
                raise NumericalFailure(f"{name} is too large for {str(kind)[6:]}: pack it as --dtype bfloat16.")
            held[name] = short.reshape(tensor.shape[0], -1).contiguous()
    return held, others


def chosen_cut(found: Opened, held: dict[str, Tensor], *, inner: bool, leave: Sequence[str]) -> tuple[Cut, list[str]]:
    """The sites of a model, and the names of those that are left out because they could not be told.

    Raises where none pays, a name is unknown, or what would be turned is sparse.
    """

    def steady(tensor: str, first: int, stop: int) -> bool:
        part = held[tensor][first:stop]
        return bool((part == (0 if tensor.endswith("bias") else part[:1])).all())

    config = found.config
    known = [one.name for one in (*sites.stream_sites(config, lambda *_: True), *sites.inner_sites(config))]
    for name in leave:
        if name not in known:
            raise BadInput(f"--leave {name}: this model has no such site. It has {arch.listed(known)}.")
    cut = sites.cut(config, steady, inner=inner, leave=leave, floats=held.__contains__)
    dropped = coder.degenerate(cut, held)
    if dropped:
        cut = sites.cut(config, steady, inner=inner, leave=[*leave, *dropped], floats=held.__contains__)
    if not cut.sites:
        raise UnsupportedModel(
            "nothing of this model can be turned without changing it: gains of norms fix its stream. Fold them first: "
            "microtome compress MODEL --slice 0."
        )
    moved = [piece for piece in cut.pieces if piece.last >= 0]
    zeros = sum(
        int((held[cut.tensors[one.tensor][0]][slice(*one.rows), slice(*one.columns)] == 0).sum()) for one in moved
    )
    share = zeros / sum(piece.words for piece in moved)
    if share > ZEROS:
        raise UnsupportedModel(
            f"{share:.0%} of the weights that would be turned are zero, and a rotation would fill them: pack the model "
            "before single weights are removed."
        )
    return cut, dropped


def pack(  # noqa: PLR0913
    model: str | Path,
    out: str | Path,
    *,
    exact: bool = False,
    coded: bool = False,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
    inner: bool = True,
    leave: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Pack a model folder into one file; see docs/pack.md.

    `exact` brings every word of the member that is stored back as it was; else words that choose rotations come back
    within `tolerance` (relative to the scale of their tensor). `coded` entropy-codes what is left. `leave` names sites.
    """
    path, began = container.check_out(Path(out), overwrite=overwrite), time.perf_counter()
    if tolerance is not None and not 0.0 < tolerance < 1.0:
        raise BadInput(f"--tolerance {tolerance} is no number between 0 and 1. For none at all give --exact.")
    words.library()
    with open_source(model) as source:
        found = opened(source)
        refused(found)
        held, others = read(found, dtype)
        kind = dtype or found.dtype
        files = travelling(source.folder, kind if kind is not found.dtype else None)
        places = {name: place for part in layout.parts(found.config) for name, place in stored(found, part)}
    cut, dropped = chosen_cut(found, held, inner=inner, leave=leave)
    read_in, began = time.perf_counter() - began, time.perf_counter()
    allowed = None if exact else tolerance or words.TOLERANCES[kind]
    shapes = {
        name: shape for part in layout.parts(found.config) for name, shape in layout.shapes(found.config, part).items()
    }
    packed, member = coder.packed(cut, held, tolerance=allowed, progress=staged(progress, "packing"))
    header = {
        "coded": coded,
        "tolerance": allowed,
        "tensors": [[*one, list(shapes[one[0]]), *place_told(places[one[0]])] for one in cut.tensors],
        "others": [
            [name, str(one.dtype).removeprefix("torch."), list(one.shape), *place_told(places[name])]
            for name, one in others.items()
        ],
        "sha256": digest(member.held.values(), others.values()),
    }
    worked, began = time.perf_counter() - began, time.perf_counter()
    parts = container.write(path, packed, header, others.values(), files)
    seconds = {"read": read_in, "turn": worked, "write": time.perf_counter() - began}
    return Report(
        path, source.folder, exact, str(kind).removeprefix("torch."), len(cut.sites),
        sizes(packed, others.values(), files, path, parts), counts(packed), seconds,
        notes(packed, parts, dropped, coded=coded, rounded=kind is not found.dtype),
    )  # fmt: skip


def staged(progress: Progress | None, what: str) -> coder.Report | None:
    """Progress of one stage."""
    return None if progress is None else lambda fraction: progress(what, fraction)


def travelling(folder: Path, rounded: torch.dtype | None) -> dict[str, bytes]:
    """The files that travel, by name; config.json says the type that weights are rounded to."""
    every = sorted(path for path in folder.rglob("*") if path.is_file() and len(path.relative_to(folder).parts) <= 2)
    names = {path.relative_to(folder).as_posix(): path for path in every}
    kept = {name: path for name, path in names.items() if any(matches(name, pattern) for pattern in TRAVELS)}
    files = {name: path.read_bytes() for name, path in kept.items()}
    if rounded is not None:
        fields: dict[str, Any] = json.loads(files[CONFIG])
        fields.pop("torch_dtype", None)
        files[CONFIG] = json.dumps(fields | {"dtype": str(rounded).removeprefix("torch.")}, indent=2).encode() + b"\n"
    return files


def matches(name: str, pattern: str) -> bool:
    """Whether a file's name is one of a pattern, in the same folder."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def stored(found: Opened, part: layout.Part) -> Iterable[tuple[str, Stored]]:
    """Where every canonical tensor of a part lies in this checkpoint."""
    for name, place in arch.stored_names(found.table, found.config, part).items():
        yield name, Stored(found.stored(place.name), place.rows, place.transposed)


def place_told(place: Stored) -> list[Any]:
    """Stored name, whether transposed, and which rows, as runs [first, how many]; None: all."""
    runs: list[list[int]] | None = None if place.rows is None else []
    for row in place.rows or ():
        assert runs is not None
        if runs and row == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([row, 1])
    return [place.name, place.transposed, runs]


def digest(*groups: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors, one after the other."""
    sha = hashlib.sha256()
    for one in (one for group in groups for one in group):
        sha.update(one.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


# --- what it comes to -----------------------------------------------------------------------------------------------


def sizes(
    packed: coder.Packed, others: Iterable[Tensor], files: dict[str, bytes], path: Path, parts: dict[str, int]
) -> dict[str, int | None]:
    """Bytes before and after; `formula` is the weights less 2 bytes for every dimension of the groups."""
    beside = sum(one.numel() * one.element_size() for one in others)
    model = 2 * packed.cut.words + beside
    return {
        "dense": dense_bytes(files),
        "model": model,
        "file": path.stat().st_size,
        "weights": parts["others"] + parts["records"] + parts["body"],
        "formula": model - 2 * sites.ceiling(packed.cut),
        "companions": parts["files"],
        "header": parts["header"],
    }


def dense_bytes(files: dict[str, bytes]) -> int | None:
    """Bytes of the weights of the model that this one was cut from, as its plan says; None where it does not."""
    try:
        return int(json.loads(files["plan.json"])["result"]["before"]["nbytes"])
    except (KeyError, TypeError, ValueError):
        return None


def counts(packed: coder.Packed) -> dict[str, int]:
    """Words: all, those that are not in the body, and those that the records list."""
    listed = sum(
        words.HEAD.unpack_from(data, 4 * site.turned)[0]
        for data, site in zip(packed.records, packed.cut.sites, strict=True)
    )
    return {"all": packed.cut.words, "taken": packed.cut.saved, "listed": listed}


def notes(
    packed: coder.Packed, parts: dict[str, int], dropped: list[str], *, coded: bool, rounded: bool
) -> tuple[str, ...]:
    """What a user should know of the file."""
    kind = str(packed.dtype).removeprefix("torch.")
    said = [f"rounded to {kind} first"] if rounded else []
    if dropped:
        said.append(f"left as they are, since their carriers are degenerate: {arch.listed(dropped)}")
    if coded:
        plain = 2 * len(packed.body)
        said.append(f"entropy coding takes the body from {plain:,} to {parts['body']:,} bytes")
    return tuple(said)


# --- the way back ---------------------------------------------------------------------------------------------------


def unpack(
    file: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Report:
    """Unpack a file into an ordinary model folder, checked against the checksums in the file."""
    path, began = Path(file).expanduser(), time.perf_counter()
    if path.is_dir():
        raise BadInput(f"{path} is a folder. Give a file that `microtome pack` wrote.")
    with Writer(out, overwrite=overwrite, max_shard_size=max_shard_size) as writer, TemporaryDirectory() as scratch:
        contents = container.read(path)
        read_in, began = time.perf_counter() - began, time.perf_counter()
        packed = contents.packed
        tensors = coder.unpacked(packed, staged(progress, "unpacking"))
        if digest(tensors.values(), contents.others.values()) != contents.header["sha256"]:
            raise BadCheckpoint(f"{path} does not give the weights that were packed: its checksum of them differs.")
        worked, began = time.perf_counter() - began, time.perf_counter()
        for name, tensor in raised(contents, tensors).items():
            writer.add(name, tensor)
        for name, data in contents.files.items():
            (Path(scratch) / "file").write_bytes(data)
            writer.copy(Path(scratch) / "file", name)
    seconds = {"read": read_in, "turn": worked, "write": time.perf_counter() - began}
    parts = {name: size for name, size, _ in contents.header["sections"]}
    parts["header"] = path.stat().st_size - sum(parts.values())
    return Report(
        path, Path(out), packed.exact, str(packed.dtype).removeprefix("torch."), len(packed.cut.sites),
        sizes(packed, contents.others.values(), contents.files, path, parts), counts(packed), seconds,
        ("every weight matches the checksum in the file",),
    )  # fmt: skip


def raised(contents: container.Contents, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their stored names and in their stored shapes."""
    places, held = dict[str, Stored](), dict[str, Tensor]()
    told = [(name, shape, place) for name, _, _, shape, *place in contents.header["tensors"]]
    told += [(name, shape, place) for name, _, shape, *place in contents.header["others"]]
    for name, shape, (home, transposed, runs) in told:
        held[name] = (tensors | contents.others)[name].reshape([int(one) for one in shape])
        rows = None if runs is None else tuple(row for first, many in runs for row in range(first, first + many))
        places[name] = Stored(str(home), rows, bool(transposed))
    return arch.raise_tensors(held, places)
