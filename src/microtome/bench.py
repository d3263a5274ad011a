"""How fast two models run, side by side: one process each, asked in turn, so that a busy minute hits both.

Prefill is one pass over a prompt, decode one token at a time with a cache. Ratios are taken within a round, and
reported by median and range over the rounds; single times on a shared machine mean little.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from microtome.errors import BadInput, MicrotomeError
from microtome.loading import device_of, dtype_of, load
from microtome.source import open_source


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
class Timing:
    """Tokens per second of both models, and how many times faster the compressed one is: median and range."""

    workload: Workload
    baseline: float
    compressed: float
    speedup: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Report:
    """All timings, and what they were taken on. Bytes are of weight files and of the process's peak memory."""

    timings: tuple[Timing, ...]
    threads: int
    device: str
    dtype: str
    rounds: int
    file_bytes: tuple[int, int]
    peak_bytes: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table: what, baseline, compressed, speed-up with its range."""
        return [
            (
                f"{one.workload.text()} (tokens/s)",
                f"{one.baseline:,.1f}",
                f"{one.compressed:,.1f}",
                f"{one.speedup:.2f} ({one.slowest:.2f} to {one.fastest:.2f})",
            )
            for one in self.timings
        ]

    def remarks(self) -> list[str]:
        """The setting, and why a cut is not faster where it is not."""
        lines = [
            f"{self.rounds} rounds, {self.threads} threads, {self.device}, {self.dtype}; speed-ups: median (range)"
        ]
        ratio = self.file_bytes[0] / max(self.file_bytes[1], 1)
        slow = [one for one in self.timings if one.speedup < 1.0]
        if slow:
            lines.append(
                f"not faster: {', '.join(one.workload.text() for one in slow)}. The weights shrink {ratio:.2f} times; "
                "what a run spends elsewhere (attention, starting kernels, added shortcuts) does not shrink with them, "
                "and widths that are no multiple of 64 use tensor cores badly."
            )
        return lines


def compare(  # noqa: PLR0913 - the options of one act, all by name
    model: str | Path,
    baseline: str | Path,
    *,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Time a model beside its baseline: prefill and decode at every batch size, in turn, round by round."""
    if min(*batches, prompt, tokens, rounds) < 1:
        raise BadInput("bench takes batch sizes, prompt, tokens and rounds of at least 1.")
    where = device_of(device)
    dtype_of(dtype)
    files: list[int] = []
    for name in (baseline, model):
        with open_source(name) as source:
            files.append(source.nbytes)
    works = [Workload(kind, batch, prompt, tokens) for batch in batches for kind in ("prefill", "decode")]
    count = threads or torch.get_num_threads()
    pair = [Runner(str(name), device, dtype, count) for name in (baseline, model)]
    try:
        for runner in pair:
            runner.ready()
        for work in works:  # a first round that does not count: caches, kernels, frequencies
            for runner in pair:
                runner.seconds(work)
        times: dict[Workload, list[tuple[float, float]]] = {work: [] for work in works}
        for number in range(rounds):
            for work in works:
                order = pair if number % 2 == 0 else pair[::-1]
                seconds = {runner.name: runner.seconds(work) for runner in order}
                times[work].append((seconds[pair[0].name], seconds[pair[1].name]))
            if progress is not None:
                progress("rounds", (number + 1) / rounds)
        peaks = [runner.peak() for runner in pair]
        used = pair[0].dtype
    finally:
        for runner in pair:
            runner.stop()
    return Report(
        tuple(timing(work, pairs) for work, pairs in times.items()),
        count,
        str(where),
        used,
        rounds,
        (files[0], files[1]),
        (peaks[0], peaks[1]),
    )


def timing(work: Workload, pairs: Sequence[tuple[float, float]]) -> Timing:
    """Median rates, and the median and range of the ratios within a round."""
    ratios = [old / new for old, new in pairs]
    old, new = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Timing(work, work.count / old, work.count / new, statistics.median(ratios), min(ratios), max(ratios))


class Runner:
    """One model in a process of its own, which answers with seconds."""

    def __init__(self, folder: str, device: str, dtype: str | None, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, folder, device, dtype, threads), daemon=True)
        self.process.start()
        other.close()
        self.name, self.dtype = f"{id(self)}", ""

    def ready(self) -> None:
        """Wait until the model is loaded."""
        self.dtype = str(self.answer())

    def answer(self) -> Any:
        """What the process says next; its refusals are raised here."""
        try:
            found = self.pipe.recv()
        except EOFError as error:
            raise BadInput(
                "a benchmark process died: out of memory? Use fewer --batch or a shorter --prompt."
            ) from error
        if isinstance(found, MicrotomeError):
            raise found
        return found

    def seconds(self, work: Workload) -> float:
        """Of one run."""
        self.pipe.send(work)
        return float(self.answer())

    def peak(self) -> int:
        """Bytes of memory at most so far."""
        self.pipe.send("peak")
        return int(self.answer())

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()


def serve(pipe: Connection, folder: str, device: str, dtype: str | None, threads: int) -> None:
    """The other process: load a model, and time what is asked until the pipe closes."""
    torch.set_num_threads(threads)
    target = device_of(device)
    wide = dtype_of(dtype) or (torch.float32 if target.type == "cpu" else None)
    try:
        model = load(folder, device=target, dtype=wide)
    except MicrotomeError as error:
        pipe.send(error)
        return
    pipe.send(str(next(model.parameters()).dtype).removeprefix("torch."))
    try:
        while True:
            asked = pipe.recv()
            pipe.send(peak_bytes(target) if asked == "peak" else timed(model, asked, target))
    except (EOFError, OSError):
        return


@torch.inference_mode()
def timed(model: Any, work: Workload, device: torch.device) -> float:
    """Seconds of one prefill, or of `tokens` greedy steps behind one that is not timed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (work.batch, work.prompt), generator=generator).to(device)
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    finish()
    if work.kind == "prefill":
        return time.perf_counter() - start
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(work.tokens):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
    finish()
    return time.perf_counter() - start


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held: on the accelerator where there is one."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
