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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from microtome import budget, chain, order, planner, report, spend
from microtome.budget import Sizes
from microtome.calibrate import Progress, free_memory
from microtome.checkpoint import Writer, amend, front_matter
from microtome.data import Tokens
from microtome.edit import Plan
from microtome.errors import BadInput, NumericalFailure, UnsupportedModel
from microtome.evaluate import Perplexity, perplexity
from microtome.forecast import Asked, Preview, preview
from microtome.kept import Kept
from microtome.loading import device_of, dtype_of, load, tokenizer_of
from microtome.mixture import Data, record, remarks, tokens_of
from microtome.planner import Opened
from microtome.source import open_source
from microtome.target import Targets
from microtome.texts import Spec, Text


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
    auto_class: str = "AutoModelForCausalLM"  # of transformers, that loads it
    library: str | None = None  # that transformers needs to load it
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
    data: Data = "wikitext2",
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    samples: int | None = 128,
    length: int | None = None,
    seed: int = 0,
    eval_data: Spec | None = None,
    text_column: str | None = None,
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
    recipe: Any = None,
    restore: bool | Mapping[str, Any] = False,
    allocate: str | Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    target: Targets = None,
    kept: Kept | None = None,
) -> Result:
    """Make a trained decoder smaller and write it as a folder that loads like the original.

    `model` is a folder, a hub id, or a transformers model in memory. Give `keep` (fraction of the blocks' stored
    parameters) or `slice` (the paper's fraction of the width). `data` is calibration text: a known data set, a file, a
    folder, texts, token ids [N, T], `self` (the model writes it), or several of these with weights, as a mapping or as
    pairs. `text_column` is what to read of a table, and makes `owner/name` a data set on the hub. Without `out` the
    result lies in a temporary folder that lives as long as the Result. `eval_data` measures perplexity; by default it
    is the (first) data set's test split, or the last tenth of the text, which is then kept out of calibration. A `plan`
    (of a plan.json) replays its method, options and widths, strictly. A `recipe` (a YAML file, or its contents) chains
    several methods. `allocate` spends the budget over the blocks ("uniform", "influence", "redundancy", "global", or a
    table of widths); by default as the method's paper does. `restore` refits the result to the original in closed form.
    `cache` is a folder that keeps what was measured for the next method on the same model and text. `target` keeps all
    widths to what engines can run: "vllm", "gguf", "tp=2" (docs/targets.md), or several.
    `kept` is for several runs that begin alike, as `with Kept() as kept:` around them: what their first steps come to
    is made once.

    Raises subclasses of MicrotomeError; nothing half-written stays behind.
    """
    steps = Asked(
        plan=plan, recipe=recipe, method=method, options=options, keep=keep, slice=slice, multiple_of=multiple_of,
        allocate=allocate, restore=restore, target=target,
    ).steps()  # fmt: skip
    stored, place = dtype_of(dtype), device_of(device)
    with ExitStack() as stack:
        found = planner.opened(stack.enter_context(open_source(folder_of(model, tokenizer, stack), revision=revision)))
        if plan is not None:
            planner.check_source(found, plan)
        run = chain.Run(
            found,
            None,
            place,
            hidden_type(found, place),
            None if scratch is None else Path(scratch),
            None if cache is None else Path(cache),
            progress,
            kept=kept,
        )
        early = chain.early(replace(run, kept=None), steps)  # None where something must be measured first
        words = tokenizer if tokenizer is not None else tokenizer_of(found.source.folder)
        drawn = partial(
            tokens_of, found, words, data, eval_data, length=length, seed=seed, measure=measure, device=place,
            column=text_column, progress=progress,
        )  # fmt: skip
        calibration, evaluation = drawn(samples=samples, needed=chain.needs_data(steps, early))
        run.ids = None if calibration is None else calibration.ids
        if kept is not None:
            said = data if isinstance(data, str | Path | Text) else None  # of other kinds the windows alone
            kept.begin((found.source.digest(), said, samples, length, seed, text_column, stored, place), run.ids)
        run.more = lambda wanted: drawn(samples=wanted, needed=True)[0]
        steps = spend.split(run, steps)
        hold = Held() if out is None else None
        folder = hold.path / "model" if hold is not None else Path(str(out))
        original = replace(
            budget.sizes(found.config, itemsize=found.dtype.itemsize),
            nbytes=found.nbytes,
            nonzero=chain.nonzero(found) if chain.sets_zeros(run, steps) else None,
        )
        with Writer(folder, overwrite=overwrite, max_shard_size=max_shard_size, source=found.source.folder) as writer:
            writer.require(0 if early is None else int(planner.sizes_after(found, early, stored).nbytes or 0))
            outs = chain.carried_out(run, steps, chain.first_outcome(run, steps), writer, stored or found.dtype)
            done = planner.plan_of(found, order.recorded(steps, outs), calibration)
            result = Result(
                folder,
                replace(
                    done,
                    calibration=done.calibration | record(calibration),
                    target=chain.target_of(steps).words,
                ),
                outs[-1].why_not,
                original,
                replace(
                    planner.sizes_after(found, outs[-1], stored),
                    nbytes=writer.total_bytes,
                    nonzero=run.nonzero if original.nonzero is not None else None,
                ),
                seconds=run.seconds,
                notes=(
                    *planner.notes(found, outs[-1]),
                    *chain.remarks(steps, outs[-1]),
                    *run.notes,
                    *remarks(evaluation, measure=measure),
                ),
                auto_class=planner.loaded_by(outs[-1]),
                library=None if outs[-1].packing is None else outs[-1].packing.library,
                hold=hold,
            )
            for name, text in recorded(result, found, command).items():
                writer.write_text(name, text)
        if measure and evaluation is not None:
            result = measured(result, found.source.folder, evaluation, calibration, place, progress)
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


def measured(
    result: Result,
    source: Path,
    tokens: Tokens,
    calibration: Tokens | None,
    device: torch.device,
    progress: Progress | None,
) -> Result:
    """The result with perplexities of the original and of what was written, loaded as a user would."""
    notes = [note for note in (*result.notes, tokens.note, calibration.note if calibration else "") if note]
    values: list[Perplexity | None] = []
    for what, folder, nbytes in (
        ("original", source, max(result.before.nbytes or 0, 2 * result.before.stored)),  # it may be quantised
        ("compressed", result.folder, max(result.after.nbytes or 0, 2 * result.after.stored)),
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
        report_to = (lambda fraction, what=what: progress(f"perplexity, {what}", fraction)) if progress else None
        try:
            values.append(perplexity(load(folder, device=device, dtype=wide), tokens, progress=report_to))
        except (NumericalFailure, UnsupportedModel) as error:  # the result is written: say what is wrong with it
            notes.append(f"perplexity of the {what} could not be measured: {error}")
            values.append(None)
        result.seconds[f"evaluate {what}"] = time.perf_counter() - start
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
    amend(result.folder, recorded(result, found, command))


__all__ = ["Preview", "Result", "compress", "preview"]
