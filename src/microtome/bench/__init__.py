"""How fast two models run in an engine, side by side: one process each, asked in turn, so that a busy minute hits both.

Prefill is one pass over a prompt, decode one token at a time with a cache. Ratios are taken within a round, and
reported by median and range over the rounds; single times on a shared machine mean little. Engines are transformers,
llama.cpp, ONNX Runtime and vLLM, a module each; what one of them cannot read is exported for it first.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microtome.bench.process import Died, Runner
from microtome.bench.work import ENGINES, Matrix, Settings, Workload, engine_of, find
from microtome.errors import BadInput, MicrotomeError
from microtome.loading import device_of, dtype_of

MOST = 6  # widths or tensors that a remark names


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
    """All timings in one engine, and what they were taken on.

    Bytes are of weight files, of the process's peak memory, and of what a process has before a model is loaded.
    `uneven` are widths that only the compressed model has and the engine's kernels do not like, and `aligned` what
    they like multiples of; `notes` are facts about its files.
    """

    timings: tuple[Timing, ...]
    threads: int
    device: str
    dtype: str
    rounds: int
    file_bytes: tuple[int, int]
    peak_bytes: tuple[int, int]
    idle_bytes: int = 0
    engine: str = "hf"
    version: str = ""
    aligned: int = 64
    uneven: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

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
        setting = f"{self.rounds} rounds, {self.threads} threads, {self.device}, {self.dtype}, {self.version}"
        idle = f"a process without a model holds {self.idle_bytes / 1e6:,.0f} MB"
        lines = [f"{setting}; {idle}; speed-ups: median (range)"]
        ratio = self.file_bytes[0] / max(self.file_bytes[1], 1)
        slow = [one for one in self.timings if one.speedup < 1.0]
        if slow:
            widths = f" Widths of {listed(self.uneven)} are no multiples of {self.aligned}, which its kernels work in."
            lines.append(
                f"not faster: {', '.join(one.workload.text() for one in slow)}. The files shrink {ratio:.2f} times; "
                "what a run spends elsewhere (attention, starting kernels, added shortcuts) does not shrink with them."
                f"{widths if self.uneven else ''}"
            )
        return [*lines, *self.notes]


def compare(  # noqa: PLR0913 - the options of one act, all by name
    model: str | Path,
    baseline: str | Path,
    *,
    engine: str | None = None,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    quantize: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Time a model beside its baseline: prefill and decode at every batch size, in turn, round by round.

    Without `engine` it is transformers, or what a file is for. `quantize` is a type of llama.cpp. Raises Absent where
    the engine is not installed, and UnsupportedModel where it cannot say one of the models.
    """
    if min(*batches, prompt, tokens, rounds) < 1:
        raise BadInput("bench takes batch sizes, prompt, tokens and rounds of at least 1.")
    name = engine or engine_of(model)
    module = find(name)
    if quantize is not None and name != "llamacpp":
        raise BadInput(f"--quantize {quantize} is for --engine llamacpp: leave it out.")
    settings = Settings(threads or torch.get_num_threads(), device, None if dtype == "auto" else dtype, quantize)
    works = [Workload(what, batch, prompt, tokens) for batch in batches for what in ("prefill", "decode")]
    device_of(device)
    dtype_of(dtype)
    version = module.version()
    with tempfile.TemporaryDirectory(prefix="microtome-bench-") as temporary:
        places = [
            module.placed(str(one), settings, Path(temporary) / word)
            for one, word in ((baseline, "baseline"), (model, "compressed"))
        ]
        found = asked(name, [place.path for place in places], settings, works, rounds, progress)
        old, new = (module.matrices(place.path) for place in places)
    return replace(
        found,
        file_bytes=(places[0].nbytes, places[1].nbytes),
        version=version,
        aligned=module.ALIGNED,
        uneven=uneven(old, new, module.ALIGNED),
        notes=(*found.notes, *(fallen(new, found.dtype.partition(" ")[0]) if name == "llamacpp" else ())),
    )


def compare_all(
    model: str | Path, baseline: str | Path, engines: Sequence[str], *, quantize: str | None = None, **chosen: Any
) -> tuple[list[Report], list[str]]:
    """Reports of several engines, and a line for each that could not be asked; raises where none could."""
    for name in engines:
        find(name)
    if quantize is not None and "llamacpp" not in engines:
        raise BadInput(f"--quantize {quantize} is for --engine llamacpp: leave it out.")
    reports, lines, errors = list[Report](), list[str](), list[MicrotomeError]()
    for name in engines:
        kind = quantize if name == "llamacpp" else None
        try:
            reports.append(compare(model, baseline, engine=name, quantize=kind, **chosen))
        except MicrotomeError as error:
            errors.append(error)
            lines.append(f"{name}: {error}")
    if errors and not reports:
        raise errors[0]
    return reports, lines


def asked(
    engine: str,
    paths: Sequence[str],
    settings: Settings,
    works: Sequence[Workload],
    rounds: int,
    progress: Callable[[str, float], None] | None,
) -> Report:
    """The timings; of llama.cpp without the kernels of one processor where they end the process."""
    try:
        return timed(engine, paths, settings, works, rounds, progress)
    except Died:
        if engine != "llamacpp":
            raise
    found = timed(engine, paths, replace(settings, repack=False), works, rounds, progress)
    return replace(found, notes=("llama.cpp's kernels for this processor ended the process: timed without them.",))


def timed(
    engine: str,
    paths: Sequence[str],
    settings: Settings,
    works: Sequence[Workload],
    rounds: int,
    progress: Callable[[str, float], None] | None,
) -> Report:
    """The timings of two models in two processes that are asked in turn."""
    pair = [Runner(engine, path, settings) for path in paths]
    try:
        for runner in pair:
            runner.ready()
        for work in works:  # a first round that does not count: caches, kernels, frequencies
            for runner in pair:
                runner.seconds(work)
        times: dict[Workload, list[tuple[float, float]]] = {work: [] for work in works}
        for number in range(rounds):
            for work in works:
                order = (0, 1) if number % 2 == 0 else (1, 0)
                seconds = {place: pair[place].seconds(work) for place in order}
                times[work].append((seconds[0], seconds[1]))
            if progress is not None:
                progress(f"rounds of {engine}", (number + 1) / rounds)
        peaks = [runner.peak() for runner in pair]
    finally:
        for runner in pair:
            runner.stop()
    return Report(
        tuple(timing(work, pairs) for work, pairs in times.items()),
        settings.threads,
        str(device_of(settings.device)),
        " beside ".join(dict.fromkeys(runner.dtype for runner in reversed(pair))),
        rounds,
        (0, 0),
        (peaks[0], peaks[1]),
        min(runner.idle for runner in pair),
        engine,
    )


def timing(work: Workload, pairs: Sequence[tuple[float, float]]) -> Timing:
    """Median rates, and the median and range of the ratios within a round."""
    ratios = [old / new for old, new in pairs]
    old, new = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Timing(work, work.count / old, work.count / new, statistics.median(ratios), min(ratios), max(ratios))


# --- widths ---------------------------------------------------------------------------------------------------------


def uneven(old: Mapping[str, Matrix], new: Mapping[str, Matrix], aligned: int) -> tuple[int, ...]:
    """Widths that the compressed model alone has, and that are no multiples of what an engine works in."""
    before, after = ({size for one in stored.values() for size in one.shape} for stored in (old, new))
    return tuple(sorted(size for size in after - before if size % aligned))


def fallen(stored: Mapping[str, Matrix], kind: str) -> tuple[str, ...]:
    """What a quantised file holds in another type than its own, because rows do not fill its blocks."""
    if not kind.startswith(("Q", "IQ", "TQ")):
        return ()
    block = 256 if "K" in kind.split("_") else 32
    odd = {name: one for name, one in stored.items() if one.shape[1] % block}
    if not odd:
        return ()
    kinds, rows = sorted({one.dtype for one in odd.values()}), sorted({one.shape[1] for one in odd.values()})
    line = (
        f"{len(odd)} of {len(stored)} matrices of the compressed file are {' and '.join(kinds)} instead of {kind}: "
        f"rows of {listed(rows)} numbers fill no blocks of {block}. Cut with --target gguf."
    )
    return (line,)


def listed(numbers: Sequence[int]) -> str:
    """The first few of many numbers."""
    more = f" and {len(numbers) - MOST} more" if len(numbers) > MOST else ""
    return ", ".join(str(one) for one in numbers[:MOST]) + more


__all__ = ["ENGINES", "Report", "Timing", "Workload", "compare", "compare_all", "engine_of", "timing"]
