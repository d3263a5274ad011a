"""What is timed, on what, and what an engine has to say for itself."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from microtome.errors import BadInput, UnknownName

ENGINES = ("hf", "llamacpp", "onnx", "vllm")
FILES = {".gguf": "llamacpp", ".onnx": "onnx"}  # files that an engine takes as they are


@dataclass(frozen=True)
class Workload:
    """One thing to time: `prefill` of a prompt, or `decode` of `tokens` behind it."""

    kind: str
    batch: int
    prompt: int
    tokens: int

    @property
    def count(self) -> int:
        """Tokens that one run processes."""
        return self.batch * (self.prompt if self.kind == "prefill" else self.tokens)

    def text(self) -> str:
        """In few words."""
        what = f"prefill {self.prompt}" if self.kind == "prefill" else f"decode {self.tokens} behind {self.prompt}"
        return f"{what}, batch {self.batch}"


@dataclass(frozen=True)
class Settings:
    """What holds for both models; `dtype` None is fp32 on a CPU, `quantize` a type of llama.cpp.

    `repack` lets llama.cpp hold weights in another order than the file, for kernels of one processor (AMX, AVX-512).
    """

    threads: int
    device: str = "auto"
    dtype: str | None = None
    quantize: str | None = None
    repack: bool = True


@dataclass(frozen=True)
class Place:
    """What an engine opens, the size of its weight files, and where it is a file that was not made here."""

    path: str
    nbytes: int
    given: bool = False


@dataclass(frozen=True)
class Matrix:
    """A stored matrix: its shape, and the type of its numbers as the file names it."""

    shape: tuple[int, ...]
    dtype: str


class Engine(Protocol):
    """A loaded model; `dtype` is what its weights are stored in."""

    dtype: str

    def seconds(self, work: Workload) -> float: ...  # noqa: D102


class Kind(Protocol):
    """The module of one engine.

    NAME is the package behind it, ALIGNED the widths that its kernels like. `version` raises Absent where it is not
    installed; `placed` makes what the engine opens, in an empty folder; `opened` runs in the process that is timed.
    """

    ALIGNED: int

    def version(self) -> str: ...  # noqa: D102
    def placed(self, model: str, settings: Settings, folder: Path) -> Place: ...  # noqa: D102
    def opened(self, path: str, settings: Settings) -> Engine: ...  # noqa: D102
    def matrices(self, path: str) -> Mapping[str, Matrix]: ...  # noqa: D102


def find(name: str) -> Kind:
    """The module of an engine."""
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES)
    return importlib.import_module(f"microtome.bench.{name}")  # type: ignore[return-value]


def engine_of(model: str | Path) -> str:
    """The engine that a model is for: of a file by its ending, else transformers."""
    return FILES.get(Path(model).suffix, "hf") if Path(model).is_file() else "hf"


def given_file(model: str, engine: str, settings: Settings) -> Path | None:
    """The file that a user gave for an engine; None for a folder or hub id. It is taken as it is stored."""
    path = Path(model).expanduser()
    suffix = next(ending for ending, name in FILES.items() if name == engine)
    if not path.is_file():
        return None
    if path.suffix != suffix:
        raise BadInput(f"{model} is no file for --engine {engine}: give a model folder, or a {suffix} file.")
    if settings.dtype is not None or settings.quantize is not None:
        raise BadInput(f"{model} is timed as it is stored: leave out --dtype and --quantize, or give a model folder.")
    return path
