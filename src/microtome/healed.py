"""`heal`: a compressed folder healed from end to end, with what was done in its plan and its card."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microtome.calibrate import Progress
from microtome.checkpoint import Writer, amend, copy_companions, front_matter
from microtome.data import Tokens
from microtome.edit import Plan
from microtome.errors import BadInput, BadOutput, NumericalFailure
from microtome.evaluate import Perplexity, perplexity
from microtome.healing import Cure, Lesson, cured, settled
from microtome.loading import device_of, load, tokenizer_of
from microtome.mixture import Data, record, remarks, tokens_of
from microtome.planner import Opened, opened, plan_of
from microtome.report import remeasured
from microtome.running import window_of
from microtome.shards import CARD, CONFIG
from microtome.source import Source, open_source
from microtome.texts import Spec
from microtome.training import STATE, Heal

PLAN, DECODER = "plan.json", "modeling_microtome.py"
EMPTY: dict[str, Any] = {"method": "heal", "options": {}, "keep": None, "slice": None, "widths": {}}


@dataclass(frozen=True, eq=False)
class Healed:
    """What came of `heal`."""

    folder: Path
    options: Heal
    cure: Cure
    record: dict[str, Any]  # data and original
    original: Perplexity | None = None
    before: Perplexity | None = None
    after: Perplexity | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data: what `--json` prints, and what plan.json records."""
        values = {name: getattr(self, name) for name in ("original", "before", "after")}
        return {
            "folder": str(self.folder),
            "options": self.options.to_json(),
            **asdict(self.cure),
            **self.record,
            "perplexity": {name: asdict(one) if one is not None else None for name, one in values.items()},
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """What came of it, for the terminal and the card."""
        values = {"original": self.original, "before": self.before, "healed": self.after}
        known = {name: one for name, one in values.items() if one is not None}
        lines = self.cure.lines()
        if known:
            lines.insert(0, "perplexity: " + ", ".join(f"{name} {one.value:.4g}" for name, one in known.items()))
            lines.append(next(iter(known.values())).protocol())
        return [*lines, *self.notes]


def heal(  # noqa: PLR0913 - the one call, all by name
    model: str | Path,
    *,
    data: Data,
    out: str | Path,
    teacher: str | Path | None = None,
    options: Heal | Mapping[str, Any] | None = None,
    samples: int | None = None,
    length: int | None = None,
    eval_data: Spec | None = None,
    text_column: str | None = None,
    measure: bool = True,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    scratch: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> Healed:
    """Train a compressed checkpoint to be more like its original, and write it in the same shapes and form.

    `model` is a folder, `data` text to learn from (as `compress` takes it), of which `samples` windows of `length`
    tokens are drawn. `teacher` is the original, by default the one that the folder's plan.json names. `options` are
    those of `Heal`. Perplexity is measured on `eval_data`, or on text kept out of `data`. A run that is stopped leaves
    its state in `OUT.partial`, or in `scratch`; the same call with `resume` goes on from it.

    Raises subclasses of MicrotomeError; nothing half-written stays behind.
    """
    chosen = options if isinstance(options, Heal) else Heal(**(options or {}))
    folder, target = Path(out), device_of(device)
    state = state_of(folder, scratch)
    with ExitStack() as stack:
        found = opened(stack.enter_context(open_source(model)))
        chosen = settled(chosen, found)
        original = stack.enter_context(open_source(original_of(found, teacher))) if chosen.taught else None
        tokens, held = texts(
            found, original, data, eval_data, samples=samples or chosen.samples, length=length, seed=chosen.seed,
            measure=measure, device=target, column=text_column, progress=progress,
        )  # fmt: skip
        about = record_of(found, original, tokens)
        identity = hashlib.sha256(json.dumps(about | {"model": found.source.digest()}).encode()).hexdigest()
        lesson = Lesson(
            found, None if original is None else original.folder, tokens.ids, chosen, target, identity, progress
        )
        with Writer(folder, overwrite=overwrite, source=found.source.folder) as writer:
            check_state(state, overwrite=overwrite, resume=resume)
            writer.require(found.nbytes)
            try:
                cure = cured(lesson, writer, state=state, resume=resume)
            except NumericalFailure:  # nobody wants to go on from there
                forget(state)
                raise
            said = [tokens.note] if tokens.note else []
            result = Healed(folder, chosen, cure, about, notes=(*said, *remarks(held, measure=measure)))
            finish(found, writer, result, tokens, command)
        forget(state)
        if held is not None:
            result = measured(result, found, original, held, target, progress)
            amend(folder, recorded(found, result, tokens, command))
    return result


def texts(
    found: Opened, original: Source | None, data: Data, eval_data: Spec | None, **asked: Any
) -> tuple[Tokens, Tokens | None]:
    """Windows to learn from, and to measure on; raises BadInput where the original has another vocabulary."""
    if original is not None:
        size, have = opened(original).config.vocab_size, found.config.vocab_size
        if size != have:
            raise BadInput(
                f"{original.name} has a vocabulary of {size}, and {found.source.name} one of {have}: give the model "
                "that it was made from by --teacher, or --loss text."
            )
    window = window_of(found.source, asked.pop("length"), found.config.max_position_embeddings)
    if original is not None:
        window_of(original, window, window)  # which may have learned fewer positions
    words = tokenizer_of(found.source.folder)
    tokens, held = tokens_of(found, words, data, eval_data, needed=True, length=window, **asked)
    assert tokens is not None
    return tokens, held


def original_of(found: Opened, teacher: str | Path | None) -> str | Path:
    """Where the model lies that this one was made from; raises BadInput where nothing says so."""
    if teacher is not None:
        return teacher
    advice = "give it by --teacher, or learn from text alone by --loss text."
    if not (found.source.folder / PLAN).is_file():
        raise BadInput(f"{found.source.name} has no {PLAN} that names its original: {advice}")
    recorded = Plan.read(found.source.folder).source
    name = str(recorded.get("name"))
    if not Path(name).expanduser().is_dir():
        raise BadInput(f"the original of {found.source.name}, {name}, is no folder here: {advice}")
    with open_source(name) as source:
        if source.digest() != recorded.get("digest"):
            raise BadInput(f"{name} has other weights than {found.source.name} was made from: {advice}")
    return name


def record_of(found: Opened, original: Source | None, tokens: Tokens) -> dict[str, Any]:
    """What was learned from, as data."""
    calibration = plan_of(found, [EMPTY], tokens).calibration | record(tokens)
    teacher = None if original is None else {"name": original.name, "digest": original.digest()}
    return {"data": calibration, "teacher": teacher}


def state_of(out: str | Path, scratch: str | Path | None) -> Path:
    """The folder of a run's state."""
    return Path(out).with_name(f"{Path(out).name}.partial") if scratch is None else Path(scratch)


def check_state(state: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to lose what an interrupted run has left."""
    if (state / STATE).exists() and not resume and not overwrite:
        raise BadOutput(f"{state} holds the state of a run that was stopped: go on by --resume, or remove it.")


def forget(state: Path) -> None:
    """Remove a state that nobody needs any more, and its folder if nothing else is in it."""
    with suppress(OSError):
        (state / STATE).unlink(missing_ok=True)
        state.rmdir()


def finish(found: Opened, writer: Writer, result: Healed, tokens: Tokens, command: str | None) -> None:
    """What lies beside the weights: config, decoder and companions as they were, plan and card with what was done."""
    folder = found.source.folder
    for name in (CONFIG, DECODER):
        if (folder / name).is_file():
            writer.copy(folder / name)
    copy_companions(found.source, writer, whole=True)
    for name, text in recorded(found, result, tokens, command).items():
        writer.write_text(name, text)


def recorded(found: Opened, result: Healed, tokens: Tokens, command: str | None) -> dict[str, str]:
    """Names and texts of plan.json and the card."""
    folder, step = found.source.folder, EMPTY | {"options": result.options.to_json()}
    own = (folder / PLAN).is_file()
    if own:
        plan: dict[str, Any] = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        plan["then"] = [*plan.get("then", []), step]
    else:
        plan = plan_of(found, [step], tokens).to_json()
    plan["result"] = {**plan.get("result", {}), "healing": result.to_json()}
    return {
        PLAN: json.dumps(plan, indent=2, ensure_ascii=False) + "\n",
        CARD: card(found, result, command, own=own and (folder / CARD).is_file()),
    }


def card(found: Opened, result: Healed, command: str | None, *, own: bool) -> str:
    """The card of the source with a section more; a short one where the source's was not made by us."""
    said = "\n".join(f"- {line}" for line in result.lines())
    section = f"## Healed\n\n```sh\n{command or 'microtome.heal(...), from Python'}\n```\n\n{said}\n"
    if own:
        text = (found.source.folder / CARD).read_text(encoding="utf-8").rstrip("\n") + f"\n\n{section}"
        return remeasured(text, result.folder.name, result.after)
    facts = {"library_name": "transformers", "tags": ["microtome"], **front_matter(found.source)}
    return f"---\n{json.dumps(facts, ensure_ascii=False)}\n---\n\n# {result.folder.name}\n\n{section}"


def measured(
    result: Healed,
    found: Opened,
    original: Source | None,
    tokens: Tokens,
    device: torch.device,
    progress: Progress | None,
) -> Healed:
    """The result with perplexities of the original, of the model as it was, and of what was written."""
    folders = {"before": found.source.folder, "after": result.folder}
    if original is not None:
        folders = {"original": original.folder, **folders}
    values: dict[str, Any] = {}
    notes = [*result.notes, *([tokens.note] if tokens.note else [])]
    for what, folder in folders.items():
        loaded = load(folder, device=device, dtype=torch.float32 if device.type == "cpu" else None)
        report_to = (lambda fraction, what=what: progress(f"perplexity, {what}", fraction)) if progress else None
        try:
            values[what] = perplexity(loaded, tokens, progress=report_to)
        except NumericalFailure as error:  # the result is written: say what is wrong
            notes.append(f"perplexity ({what}) could not be measured: {error}")
    return replace(result, **values, notes=tuple(notes))
