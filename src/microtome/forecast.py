"""What a compression would come to, before anything is written: `microtome plan`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microtome import budget, chain, layout, passes, planner, recipes
from microtome.budget import Sizes
from microtome.chain import AnyStep
from microtome.edit import Plan
from microtome.errors import BadInput
from microtome.loading import device_of, dtype_of, tokenizer_of
from microtome.mixture import Data, tokens_of
from microtome.passes import Allocation
from microtome.planner import Opened, Outcome
from microtome.restore import Restore
from microtome.running import window_of
from microtome.source import open_source


def asked(  # noqa: PLR0913
    plan: Plan | None,
    recipe: Any,
    method: str,
    options: Mapping[str, Any] | None,
    *,
    keep: float | None,
    slice: float | None,  # noqa: A002
    multiple_of: int | None,
    allocation: str | Mapping[str, Any] | None,
    restore: bool | Mapping[str, Any],
) -> list[AnyStep]:
    """What is asked for, as steps: those of a plan, of a recipe, or the one method, and restoration behind it.

    Raises BadInput where they are mixed.
    """
    if plan is not None or recipe is not None:
        if plan is not None and recipe is not None:
            raise BadInput("give a plan or a recipe, not both.")
        if any(one is not None for one in (keep, slice, multiple_of, allocation)) or options or restore:
            what = "plan" if plan is not None else "recipe"
            raise BadInput(
                f"a {what} has its own dials and options: give no keep, slice, multiple_of, allocate, options or "
                "restore beside it."
            )
        return chain.replayed(plan) if plan is not None else recipes.steps(recipe or {})
    spends = None if allocation is None else Allocation.parsed(allocation)
    passes.check_dials(keep, slice, spends)
    step = passes.stepped(method, options or {}, keep=keep, slice=slice, multiple=multiple_of, allocation=spends)
    if isinstance(restore, Mapping):
        return [step, Restore(**restore)]
    return [step, Restore()] if restore else [step]


@dataclass(frozen=True, eq=False)
class Preview:
    """A dry run: what `compress` would make, and what it would need."""

    name: str
    outcomes: list[Outcome]  # of every step
    before: Sizes
    after: Sizes
    memory: dict[str, int]  # bytes: one block, sums, hidden states
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """What comes of the last step."""
        return self.outcomes[-1]

    @property
    def widths(self) -> dict[str, int]:
        """Every width that is chosen, by space; a later step's in place of an earlier one's."""
        found: dict[str, int] = {}
        for out in self.outcomes:
            found |= {f"residual.{number}": wide for number, wide in out.widths.items()} | out.inner
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "model": self.name,
            "widths": self.widths,
            "stock": self.outcome.stock is not None,
            "why_not_stock": self.outcome.why_not,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "memory": self.memory,
            "notes": list(self.notes),
        }


def preview(  # noqa: PLR0913
    model: str | Path,
    *,
    method: str = "slicegpt",
    keep: float | None = None,
    slice: float | None = None,  # noqa: A002
    options: Mapping[str, Any] | None = None,
    data: Data | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    text_column: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    multiple_of: int | None = None,
    revision: str | None = None,
    recipe: Any = None,
    restore: bool | Mapping[str, Any] = False,
    allocate: str | Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
) -> Preview:
    """What `compress` with the same arguments would make: exact widths and sizes; nothing is written.

    Allocations that depend on activations need `data`.
    """
    steps = asked(
        None, recipe, method, options, keep=keep, slice=slice, multiple_of=multiple_of, allocation=allocate,
        restore=restore,
    )  # fmt: skip
    stored, target = dtype_of(dtype), device_of(device)
    measured = data is not None and not isinstance(steps[0], Restore) and bool(steps[0].needs())
    first = steps[0]
    scored = not isinstance(first, Restore) and first.spends.name in ("global", "auto")
    with open_source(model, revision=revision, weights=measured or scored) as source:
        found = planner.opened(source)
        wide = torch.float32 if target.type == "cpu" else found.dtype
        run = chain.Run(found, None, target, wide, cache=None if cache is None else Path(cache))
        window = window_of(source, length, found.config.max_position_embeddings)
        if measured and data is not None:
            words = tokenizer_of(source.folder)
            asked_for: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "column": text_column}
            tokens, _ = tokens_of(found, words, data, None, needed=True, measure=False, device=target, **asked_for)
            run.ids = None if tokens is None else tokens.ids
        outs = chain.dry(run, steps)
        before = budget.sizes(found.config, itemsize=found.dtype.itemsize)
        before = replace(before, nbytes=found.nbytes or before.nbytes)
        after = planner.sizes_after(found, outs[-1], stored)
        memory = memory_of(found, steps, outs, samples * window)
    return Preview(str(model), outs, before, after, memory, planner.notes(found, outs[-1]))


def memory_of(found: Opened, steps: list[AnyStep], outs: list[Outcome], tokens: int) -> dict[str, int]:
    """Bytes that the run holds at once: one block's weights, its largest sums, the hidden states."""
    config, size = found.config, found.config.hidden_size
    changed = any(out.changed for out in outs)
    sums = 0
    for step, out in zip(steps, outs, strict=True):
        if isinstance(step, Restore):
            widest = max(size, *(config.per_layer_config[b].intermediate_size for b in range(config.num_hidden_layers)))
            sums = max(sums, 8 * 6 * widest * widest)
        elif out.widths:
            each = 1 if step.method.split or step.method.pooled else len(out.widths)
            sums = max(sums, 8 * size * size * (each + 2))
        elif out.inner:
            each = 1 if step.method.sequential else config.num_hidden_layers
            sums = max(sums, each * 8 * max(sum_of_squares(found, step, b) for b in range(config.num_hidden_layers)))
    streams = 2 if any(isinstance(step, Restore) for step in steps) else 1
    return {
        "one block": (8 if found.dtype == torch.float32 else 4)
        * max(layout.count(config, block) for block in range(config.num_hidden_layers)),
        "sums": sums if changed else 0,
        "hidden states": 4 * tokens * size * streams if changed else 0,
    }


def sum_of_squares(found: Opened, step: passes.Step, block: int) -> int:
    """Numbers in the sums that a step keeps of one block."""
    from microtome import survey
    from microtome.stats import SITES

    return sum(survey.width(found.config, block, stat) ** 2 for stat in step.method.needs if stat in SITES)
