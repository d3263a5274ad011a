"""A model folder written: complete under its name, or not there at all.

Everything goes into a hidden sibling of the output, which takes the output's name in one rename when all files are on
the disk. A process that is killed leaves at most that sibling, `.NAME.partial-*`, and an output that is being replaced
keeps its files until the new ones are complete.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from microtome.errors import BadInput, BadOutput
from microtome.shards import CARD, CONFIG, INDEX, SINGLE
from microtome.source import COMPANIONS, PROCESSORS, Source

_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_CARD_FACTS = ("license", "license_name", "license_link", "language")
_NOT_COMPANIONS = (".py", ".bin", ".pt", ".pth", ".safetensors", ".gguf", ".onnx")


class Writer:
    """A model folder in the making, to be used in a `with` statement.

    `total_bytes` counts the tensors added so far, `files` names what the folder holds.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        max_shard_size: int = 5_000_000_000,
        source: Path | None = None,
    ) -> None:
        if max_shard_size <= 0:
            raise BadInput(f"max_shard_size is {max_shard_size}. Give a positive number of bytes.")
        self.total_bytes = 0
        self._out = Path(out).expanduser().resolve()  # of a link the target is replaced
        self._overwrite = overwrite
        self._max_shard_size = max_shard_size
        self._source = source
        self._folder: Path | None = None
        self._made: list[Path] = []
        self._files: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._homes: dict[str, int] = {}  # tensor to number of its shard, from 1
        self._shards = 0
        self._check_out()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, in alphabetical order; weights are among them from the end of the `with` statement on."""
        return tuple(sorted(self._files))

    def require(self, nbytes: int) -> None:
        """Raise BadOutput if the output's disk has less than `nbytes` free."""
        free = shutil.disk_usage(self._standing()).free
        if free < nbytes:
            raise BadOutput(_full(self._out, nbytes, free))

    def add(self, name: str, tensor: Tensor) -> None:
        """Store a copy of `tensor` under `name`; the caller may change or free its own.

        Up to one shard waits in memory: it goes to the disk when the next tensor does not fit into it.
        """
        assert name not in self._homes, f"{name} is added twice"
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + nbytes > self._max_shard_size:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._homes[name] = self._shards + 1
        self._pending_bytes += nbytes
        self.total_bytes += nbytes

    def write_text(self, name: str, text: str) -> None:
        """Write a file of text, in UTF-8 and with the line ends as given."""
        data = text.encode()
        with self._writing(name, len(data)):
            self._place(name).write_bytes(data)

    def write_json(self, name: str, value: object) -> None:
        """Write `value` as indented JSON, keys in the order given."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy(self, path: Path, name: str | None = None) -> None:
        """Copy the contents of a file; links are followed, permissions are not taken over."""
        with self._writing(name or path.name, path.stat().st_size if path.exists() else 0):
            shutil.copyfile(path, self._place(name or path.name))

    def __enter__(self) -> Self:
        folder = self._sibling("partial")
        try:
            with self._writing("the folder"):
                for missing in [above for above in reversed(folder.parents) if not above.exists()]:
                    missing.mkdir(exist_ok=True)
                    self._made.append(missing)
                folder.mkdir()
        except BaseException:
            self._discard()
            raise
        self._folder = folder
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        done = False
        try:
            if kind is None:
                self._finish()
                done = True
        finally:
            self._pending.clear()
            if not done:
                self._discard()

    def _check_out(self) -> None:
        out = self._out
        check_replaced(out, self._source, overwrite=self._overwrite)
        standing = self._standing()
        if not standing.is_dir():
            raise BadOutput(f"{standing} is a file, so {out} cannot be made. Choose another output folder.")
        if not os.access(standing, os.W_OK | os.X_OK):
            raise BadOutput(f"no permission to write in {standing}. Choose another output folder.")

    def _standing(self) -> Path:
        """The nearest folder above the output that exists."""
        return next(folder for folder in self._out.parents if folder.exists())

    def _sibling(self, what: str) -> Path:
        return hidden(self._out, what)

    def _open(self) -> Path:
        assert self._folder is not None, "a Writer is used in a with statement"
        return self._folder

    def _place(self, name: str) -> Path:
        assert not {"..", "/"}.intersection(PurePosixPath(name).parts), f"{name!r} leaves the folder"
        path = self._open() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.add(name)
        return path

    @contextmanager
    def _writing(self, what: str, nbytes: int = 0) -> Generator[None]:
        """Turn the system's errors into BadOutput; `nbytes` is what `what` needs on the disk."""
        try:
            yield
        except BadOutput:
            raise
        except SafetensorError as error:  # its Rust code puts the error number into the text
            number = re.search(r"os error (\d+)", str(error))
            raise self._failed(what, nbytes, int(number[1]) if number else 0, str(error)) from error
        except OSError as error:
            raise self._failed(what, nbytes, error.errno or 0, str(error)) from error

    def _failed(self, what: str, nbytes: int, number: int, text: str) -> BadOutput:
        if number in {errno.ENOSPC, errno.EDQUOT}:
            return BadOutput(_full(self._out, nbytes, shutil.disk_usage(self._standing()).free))
        if number in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return BadOutput(f"no permission to write {what} of {self._out} ({text}). Choose another output folder.")
        return BadOutput(f"could not write {what} of {self._out} ({text}).")

    def _flush(self) -> None:
        """Write the waiting tensors as a shard; its final name needs the number of shards, known only at the end."""
        path = self._open() / _shard_name(self._shards + 1, 0)
        with self._writing("the weights", self._pending_bytes):
            save_file(self._pending, path, metadata={"format": "pt"})
            path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes files that only the owner may read
        self._shards += 1
        self._pending.clear()
        self._pending_bytes = 0

    def _finish(self) -> None:
        folder = self._open()
        if self._pending:
            self._flush()
        with self._writing("the weights"):
            self._name_shards(folder)
            for path in sorted(folder.rglob("*")):
                _sync(path)
            _sync(folder)
        self._check_out()
        with self._writing("the finished folder"):
            if self._out.exists():
                replace(self._out, folder)
            else:
                folder.rename(self._out)
            _sync(self._out.parent)

    def _name_shards(self, folder: Path) -> None:
        count = self._shards
        final = {number: SINGLE if count == 1 else _shard_name(number, count) for number in range(1, count + 1)}
        for number, name in final.items():
            (folder / _shard_name(number, 0)).rename(folder / name)
        self._files.update(final.values())
        if count > 1:
            weight_map = {name: final[number] for name, number in sorted(self._homes.items())}
            self.write_json(INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})

    def _discard(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody else may have put something there
                folder.rmdir()


def check_replaced(out: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise BadOutput where a folder at `out` would replace what it must not, such as the model that is read."""
    if source is not None and out.exists():
        inside = source.resolve()
        if any(folder.exists() and out.samefile(folder) for folder in (inside, *inside.parents)):
            raise BadOutput(f"{out} is or contains the model that is read. Choose another output folder.")
    if out.is_dir() and overwrite:
        if not (out / CONFIG).is_file() and any(out.iterdir()):
            raise BadOutput(f"{out} is not a model folder, so it is not overwritten. Choose another, or remove it.")
    elif out.is_dir():
        raise BadOutput(f"{out} exists. Choose another output folder, or pass --overwrite.")
    elif out.exists():
        raise BadOutput(f"{out} is a file. Choose another output folder.")


def hidden(out: Path, what: str) -> Path:
    """A sibling of an output that nobody else has, to be partial or old."""
    return out.with_name(f".{out.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")


def replace(out: Path, folder: Path) -> None:
    """Give a finished folder the name of another, which goes, or keeps its name if that fails."""
    old = hidden(out, "old")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise BadOutput(f"{out} is complete, but its old files could not be removed. Delete {old}.") from error


def copy_companions(source: Source, writer: Writer, *, whole: bool = False) -> list[str]:
    """Copy tokenizer, chat template, generation config, licence and notices; return the names of the files.

    Weights, index, config, model card and Python files stay behind, and without `whole` what only a multimodal wrapper
    needs.
    """
    found = companions(source, whole=whole)
    for name, path in found.items():
        writer.copy(path, name)
    return list(found)


def companions(source: Source, *, whole: bool = False) -> dict[str, Path]:
    """The files that travel with the weights of a source, by the names that they have in a result."""
    patterns = (*COMPANIONS, *PROCESSORS) if whole else COMPANIONS
    files = [path for path in sorted(source.folder.iterdir()) if path.is_file() and path.suffix not in _NOT_COMPANIONS]
    chosen = [path for path in files if any(fnmatch(path.name, pattern) for pattern in patterns)]
    chosen += sorted((source.folder / "additional_chat_templates").glob("*.jinja"))
    return {path.relative_to(source.folder).as_posix(): path for path in chosen}


def front_matter(source: Source) -> dict[str, Any]:
    """Licence and language as the model card of the source states them; empty if there is no card, or a broken one."""
    try:
        text = (source.folder / CARD).read_text(encoding="utf-8-sig")
        block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        # Every scalar stays text: to YAML's usual rules the language code `no` is False.
        facts: Any = yaml.load(block[1], Loader=yaml.BaseLoader) if block else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    known = cast("Mapping[str, Any]", facts) if isinstance(facts, dict) else {}
    return {key: known[key] for key in _CARD_FACTS if known.get(key)}


def parse_size(size: str | int) -> int:
    """Bytes of a size such as `5GB`, `500 MB`, `2GiB` or a plain number; KB, MB, GB, TB are powers of 1000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE | re.ASCII)
    unit = (_DECIMAL | _BINARY).get(match[2].upper()) if match else None
    nbytes = int(Fraction(match[1]) * unit) if match and unit else 0
    if nbytes <= 0:
        raise BadInput(f"{size!r} is not a size. Give a number of bytes, or one with a unit: 500MB, 5GB, 2GiB.")
    return nbytes


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _full(out: Path, nbytes: int, free: int) -> str:
    return f"the disk of {out} is full: {nbytes:,} bytes are needed, {free:,} are free. Free some, or choose another."


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems refuse to sync folders
            raise
    finally:
        os.close(handle)


def amend(folder: Path, texts: Mapping[str, str]) -> None:
    """Put plan and card with the measurements into a finished folder, each file replaced in one step."""
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            fact = f"{folder} is complete, but its perplexity could not be added to {name}"
            raise BadOutput(f"{fact} ({error.strerror}). Run `microtome evaluate` for it.") from error
