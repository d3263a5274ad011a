"""Healing: a compressed model trained to be more like its original, and written tensor by tensor in the same shapes.

Both models are loaded as transformers loads them, the small one learns (`training`) what `distillation` says, and of
its checkpoint every tensor that was trained is replaced; the rest is copied as it is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import adapters, coded, distillation
from microtome.adapters import Trained
from microtome.calibrate import Progress
from microtome.checkpoint import Writer
from microtome.distillation import Objective
from microtome.errors import BadInput, UnsupportedModel
from microtome.loading import load
from microtome.planner import Opened
from microtome.source import Source
from microtome.training import RATES, SCALES, SLOWER, Heal, History, Training, still

SMALL = 100_000_000  # numbers: so far all weights are trained unless told otherwise, beyond it adapters are
MAPPED = 64  # windows that the maps between two streams are fitted on


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one healing has to do with: the model, its original if it has one, windows [N, T], and the options."""

    found: Opened
    teacher: Path | None
    ids: Tensor
    options: Heal
    device: torch.device
    identity: str = ""
    progress: Progress | None = None


@dataclass(frozen=True)
class Cure:
    """How a healing went."""

    train: str
    history: History
    trained: int  # numbers
    sparse: int  # matrices that kept their zeros
    coded: int  # matrices that kept their codes
    nonzero: int  # numbers in what was written

    def lines(self) -> list[str]:
        """For the terminal and the card."""
        history = self.history
        first, best = history.losses[0][1], min(loss for _, loss in history.losses)
        took = f"{history.steps} steps in {history.seconds:.0f} s{', stopped early' if history.early else ''}"
        took += f", the peak rate divided by {SLOWER**history.slower:.0f} on the way" if history.slower else ""
        loss = f"held-out loss {first:.4f} to {best:.4f} nats per token, after {history.best} steps"
        kept = f"; {self.sparse} sparse matrices kept their zeros" if self.sparse else ""
        kept += f"; {self.coded} matrices kept their codes and learned scales" if self.coded else ""
        return [f"{took}: {loss}", f"{self.trained:,} numbers trained ({self.train}){kept}"]


@dataclass(eq=False)
class Patient:
    """A loaded model, what is trained of it, and where each trained weight lies in the checkpoint."""

    model: Any
    trained: Trained
    homes: dict[str, str] = field(default_factory=dict[str, str])  # stored name to name in the model
    coded: int = 0  # matrices in codes


def pays(device: torch.device) -> bool:
    """Whether products in bf16 are faster here than in fp32."""
    if device.type == "cpu":
        known: Mapping[str, Any] = torch.cpu.get_capabilities() if "get_capabilities" in dir(torch.cpu) else {}
        return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def settled(options: Heal, found: Opened) -> Heal:
    """The options with what was left to us: what to train, and how fast."""
    train, is_coded = options.train, found.source.quantised is not None
    if is_coded:
        check_coded(options, found.source.name)
        train = "full"
    if train == "auto":
        stored = sum(found.source.tensors[name].nbytes for name in found.source.tensors) // found.dtype.itemsize
        train = "full" if stored <= SMALL else "lora"
    rate = options.rate or (SCALES if is_coded else RATES[train])
    return replace(options, train=train, rate=rate, alpha=options.alpha or 2.0 * options.rank)


def check_coded(options: Heal, name: str) -> None:
    """Refuse what codes cannot follow."""
    if options.train == "lora":
        raise BadInput(f"{name} is in codes, which adapters cannot be added to: train=full trains its scales.")
    if not options.keep_zeros:
        raise BadInput(f"{name} is in codes, which stay as they are, zeros too: heal it with keep_zeros=true.")


def patient(lesson: Lesson, *, short: bool) -> Patient:
    """The model in fp32, or as it is stored where only adapters are trained in `short` products."""
    found, options = lesson.found, lesson.options
    stored = options.train == "lora" and short and lesson.device.type != "cpu"
    model = load(found.source.folder, device=lesson.device, dtype=None if stored else torch.float32)
    homes, held = homes_of(found, model), dict[str, coded.Coded]()
    if found.source.quantised is not None:
        held = coded.opened(found.source, model, homes)
        homes = {stored: name for stored, name in homes.items() if stored not in found.source.quantised.tensors}
        homes |= {one.stored: name for name, one in held.items()}
    model.requires_grad_(False)
    if options.train == "lora":
        trained = adapters.lora(
            model, rank=options.rank, alpha=options.alpha or 1.0, targets=options.targets,
            keep_zeros=options.keep_zeros, seed=options.seed,
        )  # fmt: skip
    else:
        trained = adapters.full(model, embeddings=options.embeddings, keep_zeros=options.keep_zeros)
        trained = coded.merged(trained, held)
    if lost := sorted(set(trained.merge()) - set(homes.values())):
        raise UnsupportedModel(
            f"{found.source.name} stores {lost[0]} under another name than transformers has for it: heal the decoder "
            "alone."
        )
    return Patient(model, trained, homes, len(held))


def homes_of(found: Opened, model: Any) -> dict[str, str]:
    """Under which name `named_parameters` has each stored tensor; a tied weight under the one that comes first.

    A checkpoint may lack the first word of all names, and the decoder inside a wrapper has other names in each.
    """
    first = {id(one): name for name, one in model.named_parameters()}
    inside = {name: first[id(one)] for name, one in model.state_dict(keep_vars=True).items() if id(one) in first}
    decoder = adapters.decoder_of(model)
    within = next((name for name, one in model.named_modules() if one is decoder), "")
    spelling = {} if found.wrapper is None else found.wrapper.spelling
    places = {stored: f"{within}.{name.partition('.')[2]}" for name, stored in spelling.items()}
    prefix, homes = f"{model.base_model_prefix}.", dict[str, str]()
    for name in found.source.names():
        for spelled in (name, prefix + name, name.removeprefix(prefix), places.get(name, "")):
            if spelled in inside:
                homes[name] = inside[spelled]
                break
    return homes


def cured(
    lesson: Lesson, writer: Writer, dtype: torch.dtype | None = None, *, state: Path | None = None, resume: bool = False
) -> Cure:
    """Train, and write every tensor of the model: in `dtype`, or as it is stored.

    Raises what `Training.run` raises, and UnsupportedModel for a model that cannot be trained.
    """
    options, short = lesson.options, pays(lesson.device)
    who = patient(lesson, short=short)
    teacher = None
    if lesson.teacher is not None:
        teacher = load(
            lesson.teacher, device=lesson.device, dtype=torch.float32 if lesson.device.type == "cpu" else None
        )
        teacher.requires_grad_(False)
    with still(who.model, checkpointing=options.checkpointing), torch.inference_mode(False), torch.enable_grad():
        objective = Objective(teacher, options.temperature, options.text, options.hidden)
        if teacher is not None and options.hidden > 0.0:
            ids = lesson.ids[:MAPPED].to(lesson.device)
            objective = replace(objective, maps=distillation.maps(who.model, teacher, ids, options.batch))
        rate = options.rate or RATES[options.train]
        training = Training(
            who.model, who.trained, objective, lesson.ids, options, rate, short, state, lesson.identity, lesson.progress
        )
        history = training.run(resume=resume)
    nonzero = write(lesson.found.source, who, writer, dtype)
    return Cure(options.train, history, who.trained.count, len(who.trained.masks), who.coded, nonzero)


def write(source: Source, who: Patient, writer: Writer, dtype: torch.dtype | None) -> int:
    """Every tensor of a checkpoint, with new values where it was trained; how many numbers are not zero.

    What belongs to codes keeps its type.
    """
    merged, nonzero = who.trained.merge(), 0
    parts = frozenset[str]() if source.quantised is None else source.quantised.hidden
    for name in sorted(source.tensors):
        tensor = source.stored(name)
        made = merged.get(who.homes.get(name, ""))
        wide = tensor if made is None else made.detach().cpu()
        if wide.is_floating_point():
            wide = wide.to(tensor.dtype if name in parts else dtype or tensor.dtype)
            source.check_finite(name, wide)
        writer.add(name, wide)
        nonzero += 0 if name in parts else int(wide.count_nonzero())
    for name in () if source.quantised is None else source.quantised.tensors:
        nonzero += int(source.tensor(name).count_nonzero())
    return nonzero
