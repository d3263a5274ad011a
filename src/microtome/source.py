"""A model folder opened for reading: its config, and its stored tensors one at a time.

What the tensors mean is not known here: names, shapes and types are those of the files. Nothing that a checkpoint ships
is executed; `auto_map` and its Python files are ignored. Reads go through `readinto` instead of a memory map: a tensor
owns its bytes, a second read is a second copy, resident memory is what was asked for, and a file that shrinks during a
run is an error instead of a signal.
"""

import difflib
import hashlib
import math
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from torch import Tensor

from microtome.dequantise import Packed, Quantised, dequantised
from microtome.errors import BadCheckpoint, BadInput, NumericalFailure
from microtome.shards import (
    CARD,
    CONFIG,
    INDEX,
    SINGLE,
    Shard,
    Stored,
    no_weights,
    read_bytes,
    read_config,
    read_index,
    read_shards,
)

COMPANIONS = (
    *("tokenizer*", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "*.jinja", "generation_config.json"),
    *("LICENSE*", "License*", "license*", "LICENCE*", "COPYING*", "NOTICE*", "Notice*", "USE_POLICY*"),
)
"""Patterns of the files that travel with weights: how text becomes tokens, and the terms of use."""

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that travel with a multimodal wrapper: how images and sound become numbers."""

_SAMPLE = 4096  # bytes of each end of a tensor that enter the digest


@dataclass(frozen=True, eq=False)
class Source:
    """An opened model folder.

    `name` is what the user typed, `revision` the commit if it came from the hub. `trust` is the user's word on code in
    the checkpoint, kept for whoever loads the tokenizer; nothing is executed here. Of a quantised checkpoint names,
    shapes and types are those of the weights that it stands for, and `config` says nothing of quantisation; `tensors`
    are the stored ones all the same.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    shards: Mapping[str, Shard]
    tensors: Mapping[str, Stored]
    trust: bool = False
    quantised: Quantised | None = None
    _files: dict[str, FileIO] = field(default_factory=dict[str, FileIO], init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def names(self) -> tuple[str, ...]:
        """Stored names in alphabetical order."""
        if self.quantised is None:
            return tuple(sorted(self.tensors))
        return tuple(sorted((set(self.tensors) - self.quantised.hidden) | set(self.quantised.tensors)))

    def __contains__(self, name: object) -> bool:
        if self.quantised is None:
            return name in self.tensors
        return name in self.quantised.tensors or (name in self.tensors and name not in self.quantised.hidden)

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape, from the header."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored type, from the header."""
        return self._find(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, on the CPU, in its stored type. Threads may read at once."""
        if self.quantised is not None and name in self.quantised.tensors:
            return self.quantised.tensors[name].read(self.stored)
        self._find(name)
        return self.stored(name)

    def stored(self, name: str) -> Tensor:
        """Read one tensor as the files hold it, a part of a quantised one too."""
        stored = self.tensors[name]
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        self._read(stored.shard, stored.start, raw.numpy().data)
        return raw.view(stored.dtype).reshape(stored.shape)

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise NumericalFailure if `tensor`, which was read as `name`, holds NaN or infinity."""
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return
        low, high = torch.aminmax(tensor)  # NaN goes through both, and unlike isfinite they need no temporaries
        if math.isfinite(low.item()) and math.isfinite(high.item()):
            return
        bad, found = tensor.numel() - int(tensor.isfinite().sum()), self._find(name)
        home = found.shard if isinstance(found, Stored) else self.tensors[next(iter(found.parts.values()))].shard
        raise NumericalFailure(
            f"{name} in {self.folder / home} is NaN or infinite in {bad:,} of {tensor.numel():,} "
            "places. Give a checkpoint of finite weights."
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.nbytes for shard in self.shards.values())

    def digest(self) -> str:
        """Identify the weights by a sha256 that reads little of them.

        Hashed, each part after its length: the bytes of config.json; then for every shard, in order of name, its name,
        size and header, and the first and last 4 KiB of every tensor (all of a tensor up to 8 KiB). That tells
        checkpoints apart, also those that differ in a few matrices; it does not prove that every byte is as it was.
        """
        sha = hashlib.sha256()

        def add(part: bytes | bytearray) -> None:
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(part)

        add(read_bytes(self.folder / CONFIG))
        for name, shard in sorted(self.shards.items()):
            for part in (name.encode(), str(shard.nbytes).encode(), shard.header):
                add(part)
            for stored in sorted(shard.tensors.values(), key=lambda stored: stored.start):
                sample = bytearray(min(stored.nbytes, 2 * _SAMPLE))
                half = len(sample) // 2
                self._read(name, stored.start, memoryview(sample)[:half])
                self._read(name, stored.start + stored.nbytes - len(sample) + half, memoryview(sample)[half:])
                add(sample)
        return sha.hexdigest()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _find(self, name: str) -> Stored | Packed:
        if self.quantised is not None and name in self.quantised.tensors:
            return self.quantised.tensors[name]
        if name in self:
            return self.tensors[name]
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" The nearest is {near[0]!r}." if near else ""
        raise BadCheckpoint(f"{self.folder} holds no tensor named {name!r}.{hint}")

    def _read(self, shard: str, start: int, into: memoryview) -> None:
        path = self.folder / shard
        done = 0
        try:
            with self._lock:
                if shard not in self._files:
                    self._files[shard] = FileIO(path)
                file = self._files[shard]
                file.seek(start)
                while done < len(into) and (count := file.readinto(into[done:])):  # Linux gives at most 2 GiB a call
                    done += count
        except OSError as error:
            raise BadCheckpoint(f"cannot read {path}: {error.strerror}.") from error
        if done < len(into):
            raise BadCheckpoint(f"{path} became shorter after it was opened. Leave the folder alone during a run.")


def open_source(model: str | Path, *, revision: str | None = None, trust: bool = False, weights: bool = True) -> Source:
    """Open a folder, or download a hub model and open that, and check config, index and all headers.

    `revision` is a branch, tag or commit of the hub. `trust` executes nothing; it brings a hub model's Python files
    along. Without `weights` a hub model's are not downloaded, and the source then has no tensors.

    Raises BadInput if there is no such model, BadCheckpoint if its files are broken, and UnsupportedModel if its
    weights are pickled, GGUF or quantised.
    """
    name, folder, commit = str(model), Path(model).expanduser(), None
    if not name or not folder.is_dir():
        folder, commit = _download(name, revision, trust=trust, weights=weights)
        if not weights:
            return Source(folder, name, commit, plain(read_config(folder)), {}, {}, trust)
    elif revision is not None:
        raise BadInput(f"{name} is a folder and has no revision {revision!r}. Leave that out, or give a hub id.")
    config = read_config(folder)
    shards = read_shards(folder, quantised=bool(config.get("quantization_config")))
    tensors = {name: stored for shard in shards.values() for name, stored in shard.tensors.items()}
    source = Source(folder, name, commit, config, shards, tensors, trust)
    quantised = dequantised(config, tensors, source.stored)
    return source if quantised is None else replace(source, config=plain(config), quantised=quantised)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of quantisation."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _download(name: str, revision: str | None, *, trust: bool, weights: bool) -> tuple[Path, str | None]:
    """Fetch what a compression reads, into the hub's cache; return the folder there and the commit.

    Small files come first, so that a model which is refused is refused before its gigabytes come.
    """
    _refuse_path(name)
    folder = _fetch(name, revision, [CONFIG, INDEX, CARD, *COMPANIONS, *PROCESSORS, *(["*.py"] if trust else [])])
    commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    read_config(folder)
    if not weights:
        return folder, commit
    _fetch(name, commit or revision, [SINGLE])
    if not (folder / SINGLE).is_file():
        if not (folder / INDEX).is_file():
            files: list[str] = []
            with suppress(Exception):  # the names only make the refusal more precise
                files = huggingface_hub.list_repo_files(name, revision=commit or revision)
            raise no_weights(name, files)
        _fetch(name, commit or revision, sorted(set(read_index(folder).values())))
    return folder, commit


def _refuse_path(name: str) -> None:
    """Refuse what is meant as a path, so that a typing error in one never becomes a question to the hub."""
    if Path(name).expanduser().is_file():
        raise BadInput(f"{name} is a file. Give the folder that holds it.")
    if not name or name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        raise BadInput(
            f"no folder {name!r}.{_nearest(name)} Give an existing model folder, or a hub id such as owner/name."
        )


def _nearest(name: str) -> str:
    """The folder whose name is nearest, for whoever mistyped one."""
    path, beside = Path(name).expanduser(), list[str]()
    with suppress(OSError):
        beside = [one.name for one in path.parent.iterdir() if one.is_dir()]
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the HTTP library below, and with it the classes of errors, differ between versions
        raise BadInput(_explain(name, revision, error)) from error


def _explain(name: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, hub.GatedRepoError):
        return f"{name} is gated on the hub. Accept its terms on its page there, then run `hf auth login`."
    if isinstance(error, hub.RepositoryNotFoundError):
        fact = f"no folder and no hub model {name!r}.{_nearest(name)}"
        return f"{fact} Check the spelling; for a private model run `hf auth login`."
    if isinstance(error, hub.RevisionNotFoundError):
        return f"hub model {name} has no revision {revision!r}. Give a branch, a tag or a commit of it."
    if isinstance(error, hub.HFValidationError):
        return f"no folder named {name!r}, and no hub id looks like it. Give a folder, or an id such as owner/name."
    reason = next(iter(str(error).splitlines()), "").strip().rstrip(".") or type(error).__name__
    return (
        f"no folder named {name!r}, and the hub could not be reached ({reason}).{_nearest(name)} "
        f"Run `hf download {name}` where it can be, or give a folder."
    )
