"""llama.cpp on a written file: through llama-cpp-python logits, through xllamacpp the likeliest tokens."""

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import BadInput, NumericalFailure
from microtome.export.gguf.fold import Frame, frequencies
from microtome.planner import Opened
from microtome.verdict import Absent, Verdict, absent, held, informed, logits, probe, reference

SCRIPT = Path(__file__).with_name("llama_cpp_process.py")
LOGITS, TOKENS = "llama-cpp-python", "xllamacpp"
BATCH = 256  # llama.cpp rounds contexts up to a multiple of this


def installed(package: str) -> str | None:
    """The version of a package, which is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(task: str, *words: object) -> None:
    """A task of the script; raises NumericalFailure where llama.cpp refuses the file or ends the process."""
    command = [sys.executable, "-P", str(SCRIPT), task, *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "error" in line.lower() or "assert" in line.lower()), "")
    raise NumericalFailure(
        f"llama.cpp fails at what was written ({task}, exit {done.returncode}{told and ': '}{told[:300]}), which was "
        "removed. This is a fault of Microtome or of the engine."
    )


def ids_for(frame: Frame) -> Tensor:
    """Token ids [1, T] to compare on.

    With longrope long enough that llama.cpp, which chooses the frequencies by the size of its cache, chooses as
    transformers does, which chooses by the text; not beyond a window that llama.cpp does not have.
    """
    config, turns = frame.config, frequencies(frame)
    if turns.original is not None and turns.original < BATCH:
        return probe(config, turns.original + 8)
    windowed = config.sliding_window is not None and not frame.family.windows
    return probe(config, min(32, int(config.sliding_window or 32))) if windowed else probe(config)


def loaded(task: str, file: Path, ids: Tensor, folder: Path) -> Any:
    """What the script makes of token ids."""
    import numpy as np

    given, made = folder / "ids.npy", folder / "made.npy"
    np.save(given, ids[0].numpy())
    try:
        run(task, file, made, given)
        return np.load(made)
    finally:
        given.unlink(missing_ok=True)
        made.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Judge:
    """An engine by name and version, the checkpoint that it is held against, and what that computes of `ids` [1, T]."""

    package: str
    release: str
    frame: Frame
    opened: Opened
    folder: Path
    ids: Tensor

    @property
    def name(self) -> str:
        """The engine as a user reads it."""
        return f"llama.cpp ({self.package} {self.release})"

    @cached_property
    def wanted(self) -> Tensor:
        """The logits [T, V] of the checkpoint in our own decoder, in fp32."""
        return logits(reference(self.opened), self.ids)

    def exact(self, file: Path) -> Verdict:
        """The verdict on a file in fp32."""
        if self.package == TOKENS:
            return self.greedy(file, self.frame.family.tolerance)
        found = torch.from_numpy(loaded("logits", file, self.ids, self.folder))
        return held(self.name, self.wanted, found, self.frame.family.tolerance)

    def rounded(self, verdict: Verdict, file: Path, kind: str) -> Verdict:
        """A verdict with what is to be said of a file of another type; no engine that is installed may fail at it."""
        if self.package == TOKENS:
            return self.counted(verdict, file, kind)
        try:
            return informed(verdict, kind, self.wanted, torch.from_numpy(loaded("logits", file, self.ids, self.folder)))
        except NumericalFailure:
            if (release := installed(TOKENS)) is None:
                raise
            other = replace(self, package=TOKENS, release=release)
            return other.counted(verdict, file, f"{kind} (at which {self.package} fails here, by {other.name})")

    def counted(self, verdict: Verdict, file: Path, kind: str) -> Verdict:
        """A verdict with how many likeliest tokens of a rounded file are those of the checkpoint."""
        found = self.greedy(file, 0.0)
        same, count = found.numbers["same"], found.numbers["tokens"]
        words = f"{verdict.words}; {kind}: {same:.0f} of {count:.0f} likeliest tokens agree"
        numbers = {**verdict.numbers, f"{kind.split(maxsplit=1)[0]}_same_argmax": same / max(count, 1.0)}
        return replace(verdict, words=words, numbers=numbers, passed=verdict.passed and count > 0)

    def greedy(self, file: Path, tolerance: float) -> Verdict:
        """The verdict by the likeliest token after every prefix; one that is nearly as likely will do."""
        found = torch.from_numpy(loaded("greedy", file, self.ids, self.folder))
        told = found >= 0
        chosen = self.wanted.gather(1, found.clamp(min=0)[:, None])[:, 0]
        near = self.wanted.max(-1).values - chosen <= tolerance * max(1.0, self.wanted.abs().max().item())
        same, count = int((near & told).sum()), int(told.sum())
        words = f"{self.name}: {same} of {count} likeliest tokens are those of the checkpoint"
        enough = 2 * count >= len(found)
        return Verdict(self.name, same == count and enough, words, {"tokens": float(count), "same": float(same)})


def judge(frame: Frame, opened: Opened, folder: Path, *, tokens: bool) -> Judge:
    """The engine that is installed, for logits if it can be; raises Absent where none is, or none takes the file.

    `tokens` says whether the file holds a tokenizer, without which xllamacpp loads none.
    """
    for package in (LOGITS, TOKENS):
        if (release := installed(package)) is not None:
            if package == TOKENS and not tokens:
                raise Absent("xllamacpp loads no file without a tokenizer: pip install llama-cpp-python.")
            return Judge(package, release, frame, opened, folder, ids_for(frame))
    raise absent("llama.cpp, which would run the file (xllamacpp or llama-cpp-python),", "gguf")


def quantised(file: Path, out: Path, number: int) -> None:
    """A file of another type by llama.cpp's own quantiser; raises BadInput where there is none."""
    program = shutil.which("llama-quantize")
    if installed(LOGITS) is not None:
        run("quantise", file, out, number)
    elif program is not None:
        done = subprocess.run([program, str(file), str(out), str(number)], capture_output=True, check=False)
        if done.returncode:
            raise NumericalFailure(f"llama-quantize ended with {done.returncode} on {file.name}.")
    else:
        raise BadInput(quantiser_missing())


def quantiser_missing() -> str:
    """The one line for a type that only llama.cpp itself quantises to."""
    return (
        "K-quants are llama.cpp's own: pip install llama-cpp-python, or put its llama-quantize on the PATH; "
        "Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0 need neither."
    )


def has_quantiser() -> bool:
    """Whether llama.cpp's own quantiser is at hand."""
    return installed(LOGITS) is not None or shutil.which("llama-quantize") is not None
