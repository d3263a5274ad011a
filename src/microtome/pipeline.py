"""From a folder and a dial to a smaller folder: the file to read first.

open      folder -> canonical config, tensors one part at a time            source, arch, planner
plan      dial -> widths -> the config of the result: stock or our own      planner, budget, surgery
survey    stream the calibration text through all blocks, keep small sums   calibrate, stats
cut       solve -> edits -> surgery -> write, one part at a time            methods, cut, surgery, checkpoint
finish    tokenizer, licence, plan.json, card; measure before and after     checkpoint, report, evaluate
"""

import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from microtome import budget, cut, data, methods, planner, report
from microtome.budget import Sizes
from microtome.calibrate import Progress, free_memory
from microtome.checkpoint import Writer, front_matter
from microtome.data import Tokens
from microtome.edit import Plan
from microtome.errors import BadInput, BadOutput, NumericalFailure
from microtome.evaluate import Perplexity, perplexity
from microtome.loading import device_of, dtype_of, load, tokenizer_of
from microtome.planner import Opened, Outcome
from microtome.running import DEFAULT_LENGTH, window_of
from microtome.source import open_source
from microtome.texts import Spec, parted

EVAL_WINDOWS = 64  # that compress measures on where the user names no evaluation text


class Held:
    """A temporary folder that goes with the last reference to it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="microtome-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class Result:
    """What came of a compression. `why_not` says why the result is not a stock checkpoint, None if it is one."""

    folder: Path
    plan: Plan
    why_not: str | None
    before: Sizes
    after: Sizes
    perplexity_before: Perplexity | None = None
    perplexity_after: Perplexity | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    notes: tuple[str, ...] = ()
    hold: "Held | None" = None  # keeps a temporary folder alive

    @property
    def stock(self) -> bool:
        """Whether the architecture's own class loads it."""
        return self.why_not is None

    def load(self, device: str = "auto", dtype: str | None = None) -> Any:
        """The compressed model as transformers loads it."""
        return load(self.folder, device=device_of(device), dtype=dtype_of(dtype))

    def to_json(self) -> dict[str, Any]:
        """Plain data: what `--json` prints and `plan.json` records."""
        measured = {
            "before": asdict(self.perplexity_before) if self.perplexity_before else None,
            "after": asdict(self.perplexity_after) if self.perplexity_after else None,
        }
        return {
            "folder": str(self.folder),
            "stock": self.stock,
            "why_not_stock": self.why_not,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "perplexity": measured,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "notes": list(self.notes),
        }


def compress(  # noqa: PLR0913 - the one call, all by name
    model: Any,
    *,
    method: str = "slicegpt",
    keep: float | None = None,
    slice: float | None = None,  # noqa: A002 - the paper's word
    data: Spec = "wikitext2",
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    samples: int | None = 128,
    length: int | None = None,
    seed: int = 0,
    eval_data: Spec | None = None,
    measure: bool = True,
    device: str = "auto",
    dtype: str | None = None,
    multiple_of: int | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5_000_000_000,
    revision: str | None = None,
    scratch: str | Path | None = None,
    tokenizer: Any = None,
    command: str | None = None,
    progress: Progress | None = None,
    plan: Plan | None = None,
) -> Result:
    """Make a trained decoder smaller and write it as a folder that loads like the original.

    `model` is a folder, a hub id, or a transformers model in memory. Give `keep` (fraction of the blocks' stored
    parameters) or `slice` (the paper's fraction of the width). `data` is calibration text: a known data set, a file, a
    folder, texts, or token ids [N, T]. Without `out` the result lies in a temporary folder that lives as long as the
    Result. `eval_data` measures perplexity; by default it is the data set's test split, or the last tenth of the text,
    which is then kept out of calibration. A `plan` (of a plan.json) replays its method, options and widths, strictly.

    Raises subclasses of MicrotomeError; nothing half-written stays behind.
    """
    if plan is None:
        budget.check_dials(keep, slice)
    elif keep is not None or slice is not None or options:
        raise BadInput("a plan has its own dial and options: give no keep, slice or options beside it.")
    chosen = methods.build(method, options or {})
    stored = dtype_of(dtype)
    target = device_of(device)
    with ExitStack() as stack:
        found = planner.opened(stack.enter_context(open_source(folder_of(model, tokenizer, stack), revision=revision)))
        if plan is None:
            outcome = planner.plan_widths(found, chosen, keep, slice, multiple_of)
        else:
            chosen, outcome = planner.replayed(found, plan)
            method, keep, slice = plan.method, plan.keep, plan.slice  # noqa: A001
        words = tokenizer if tokenizer is not None else tokenizer_of(found.source.folder)
        calibration, evaluation = tokens_of(
            found,
            words,
            data,
            eval_data,
            samples=samples,
            length=length,
            seed=seed,
            needed=bool(outcome.widths and chosen.needs),
            measure=measure,
        )
        hold = Held() if out is None else None
        folder = hold.path / "model" if hold is not None else Path(str(out))
        work = cut.Work(
            found,
            outcome,
            None if calibration is None else calibration.ids,
            target,
            hidden_type(found, target),
            None if scratch is None else Path(scratch),
            progress,
        )
        done = planner.plan_of(found, outcome, keep, slice, method, calibration)
        original = replace(budget.sizes(found.config, itemsize=found.dtype.itemsize), nbytes=found.nbytes)
        first = Result(
            folder,
            done,
            outcome.why_not,
            original,
            budget.sizes(outcome.final, itemsize=(stored or found.dtype).itemsize),
        )
        with Writer(folder, overwrite=overwrite, max_shard_size=max_shard_size, source=found.source.folder) as writer:
            writer.require(int(first.after.nbytes or 0))
            if outcome.widths:
                cut.cut(work, writer, stored)
            else:
                cut.copy_untouched(found, writer, stored)
            cut.finish(writer, found, outcome, stored)
            after = replace(first.after, nbytes=writer.total_bytes)
            result = replace(first, after=after, seconds=work.seconds, hold=hold)
            for name, text in recorded(result, found, command).items():
                writer.write_text(name, text)
        if measure and evaluation is not None:
            result = measured(result, found.source.folder, evaluation, calibration, target, progress)
            update_record(result, found, command)
    return result


def folder_of(model: Any, tokenizer: Any, stack: ExitStack) -> str | Path:
    """Where a model lies; one in memory is written to a folder that lives as long as the stack."""
    if isinstance(model, str | Path):
        return model
    if not callable(getattr(model, "save_pretrained", None)):
        raise BadInput(f"cannot compress a {type(model).__name__}: give a folder, a hub id or a transformers model.")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="microtome-source-"))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Path(folder)


def hidden_type(found: Opened, device: torch.device) -> torch.dtype:
    """Hidden states are fp32 on a CPU, and in the model's own type on an accelerator."""
    return torch.float32 if device.type == "cpu" else found.dtype


def tokens_of(  # noqa: PLR0913
    found: Opened,
    tokenizer: Any,
    spec: Spec,
    eval_spec: Spec | None,
    *,
    samples: int | None,
    length: int | None,
    seed: int,
    needed: bool,
    measure: bool,
) -> tuple[Tokens | None, Tokens | None]:
    """Calibration and evaluation windows; a text without a test split gives its last tenth to evaluation."""
    config = found.config
    window = window_of(found.source, length, config.max_position_embeddings)
    common: dict[str, Any] = {"length": window, "vocab_size": config.vocab_size}
    limit = EVAL_WINDOWS if eval_spec is None else None  # what the user named is measured whole
    if eval_spec is None and measure:
        parts = parted(spec)
        if parts is not None:
            spec, eval_spec = parts
        elif isinstance(spec, str) and not Path(spec).exists():
            eval_spec = spec  # a known data set: its test split
    calibration = data.calibration(spec, tokenizer, samples=samples, seed=seed, **common) if needed else None
    if not measure:
        return calibration, None
    if eval_spec is None:  # only ids were given: measured on themselves, and said so
        inside = calibration or data.calibration(spec, tokenizer, samples=samples, seed=seed, **common)
        return calibration, replace(inside, source=f"{inside.source}, the calibration tokens themselves")
    return calibration, data.evaluation(eval_spec, tokenizer, limit=limit, **common)


def measured(
    result: Result,
    source: Path,
    tokens: Tokens,
    calibration: Tokens | None,
    device: torch.device,
    progress: Progress | None,
) -> Result:
    """The result with perplexities of the original and of what was written, loaded as a user would."""
    notes = [note for note in (tokens.note, calibration.note if calibration else "") if note]
    values: list[Perplexity | None] = []
    for what, folder, nbytes in (
        ("original", source, result.before.nbytes),
        ("compressed", result.folder, result.after.nbytes),
    ):
        wide = torch.float32 if device.type == "cpu" else None
        factor = 2 if wide is not None and str(result.plan.source.get("dtype")) != "float32" else 1
        if device.type == "cpu" and (nbytes or 0) * factor > 0.8 * free_memory():
            notes.append(
                f"perplexity of the {what} was not measured: it does not fit into memory. "
                "Run `microtome evaluate` on a larger machine."
            )
            values.append(None)
            continue
        start = time.perf_counter()
        model = load(folder, device=device, dtype=wide)
        report_to = (lambda fraction, what=what: progress(f"perplexity, {what}", fraction)) if progress else None
        try:
            values.append(perplexity(model, tokens, progress=report_to))
        except NumericalFailure as error:  # the result is written and whole: say what is wrong with it
            notes.append(f"perplexity of the {what} could not be measured: {error}")
            values.append(None)
        result.seconds[f"evaluate {what}"] = time.perf_counter() - start
        del model
    return replace(result, perplexity_before=values[0], perplexity_after=values[1], notes=tuple(notes))


def recorded(result: Result, found: Opened, command: str | None) -> dict[str, str]:
    """Names and texts of plan.json and the card."""
    plan = {**result.plan.to_json(), "result": result.to_json()}
    return {
        "plan.json": json.dumps(plan, indent=2, ensure_ascii=False) + "\n",
        "README.md": report.card(result, front_matter(found.source), command),
    }


def update_record(result: Result, found: Opened, command: str | None) -> None:
    """The same files with the measurements, each replaced in one step."""
    for name, text in recorded(result, found, command).items():
        partial = result.folder / f".{name}.partial"
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(result.folder / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            fact = f"{result.folder} is complete, but its perplexity could not be added to {name}"
            raise BadOutput(f"{fact} ({error.strerror}). Run `microtome evaluate` for it.") from error


@dataclass(frozen=True, eq=False)
class Preview:
    """A dry run: what `compress` would make, and what it would need."""

    name: str
    outcome: Outcome
    before: Sizes
    after: Sizes
    memory: dict[str, int]  # bytes: one block, sums, hidden states

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "model": self.name,
            "widths": {f"residual.{number}": wide for number, wide in self.outcome.widths.items()},
            "stock": self.outcome.stock is not None,
            "why_not_stock": self.outcome.why_not,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "memory": self.memory,
        }


def preview(  # noqa: PLR0913
    model: str | Path,
    *,
    method: str = "slicegpt",
    keep: float | None = None,
    slice: float | None = None,  # noqa: A002
    options: Mapping[str, Any] | None = None,
    samples: int = 128,
    length: int | None = None,
    dtype: str | None = None,
    multiple_of: int | None = None,
    revision: str | None = None,
) -> Preview:
    """What `compress` with the same arguments would make: exact widths and sizes; nothing is written."""
    budget.check_dials(keep, slice)
    chosen, stored = methods.build(method, options or {}), dtype_of(dtype)
    with open_source(model, revision=revision, weights=False) as source:
        found = planner.opened(source)
        outcome = planner.plan_widths(found, chosen, keep, slice, multiple_of)
        before = budget.sizes(found.config, itemsize=found.dtype.itemsize)
        before = replace(before, nbytes=found.nbytes or before.nbytes)
        after = budget.sizes(outcome.final, itemsize=(stored or found.dtype).itemsize)
        window = length or min(DEFAULT_LENGTH, found.config.max_position_embeddings)
        size, junctions = found.config.hidden_size, len(outcome.widths)
        each = 1 if not outcome.widths or outcome.method.split or outcome.method.pooled else junctions
        wide = 8 if found.dtype == torch.float32 else 4
        memory = {
            "one block": wide
            * max(budget.layout.count(found.config, block) for block in range(found.config.num_hidden_layers)),
            "sums": 8 * size * size * (each + 2) if outcome.widths else 0,
            "hidden states": 4 * samples * window * size if outcome.widths else 0,
        }
    return Preview(str(model), outcome, before, after, memory)


__all__ = ["Preview", "Result", "compress", "preview"]
