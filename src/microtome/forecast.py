"""What a compression would come to, before anything is written: `microtome plan`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microtome import budget, chain, fisher, layout, passes, planner, recipes, shots, spend
from microtome.budget import Sizes
from microtome.calibrate import SPILL, free_memory
from microtome.edit import Plan
from microtome.errors import BadInput
from microtome.loading import device_of, dtype_of, tokenizer_of
from microtome.mixture import Data, tokens_of
from microtome.modeling_microtome import MicrotomeConfig
from microtome.order import AnyStep, check_order, replayed
from microtome.passes import Allocation, Step
from microtome.planner import Opened, Outcome
from microtome.refine import CURVATURE
from microtome.restore import Restore
from microtome.running import window_of
from microtome.source import open_source
from microtome.stats import SITES, Stat
from microtome.target import ANY, Target, Targets
from microtome.training import Heal

HELD = 3  # numbers that refinement holds for every neuron of the curvature's tokens; of a share of attention one


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user says of a cut: a plan, a recipe, or one method with its dials; a target goes with each."""

    plan: Plan | None = None
    recipe: Any = None
    method: str = "slicegpt"
    options: Mapping[str, Any] | None = None
    keep: float | None = None
    slice: float | None = None
    multiple_of: int | None = None
    allocate: str | Mapping[str, Any] | None = None
    restore: bool | Mapping[str, Any] = False
    target: Targets = None

    def steps(self) -> list[AnyStep]:
        """The steps, with restoration behind a method that is to be restored; raises BadInput where they are mixed."""
        wanted = Target.parsed(self.target)
        found = self.single() if self.plan is None and self.recipe is None else self.chained()
        return shots.fired(
            replace(one, target=one.target.joined(wanted)) if isinstance(one, Step) else one for one in found
        )

    def chained(self) -> list[AnyStep]:
        """Those of a plan or a recipe."""
        if self.plan is not None and self.recipe is not None:
            raise BadInput("give a plan or a recipe, not both.")
        dials = (self.keep, self.slice, self.multiple_of, self.allocate)
        if any(one is not None for one in dials) or self.options or self.restore:
            what = "plan" if self.plan is not None else "recipe"
            raise BadInput(
                f"a {what} has its own dials and options: give no keep, slice, multiple_of, allocate, options or "
                "restore beside it."
            )
        return replayed(self.plan) if self.plan is not None else recipes.steps(self.recipe or {})

    def single(self) -> list[AnyStep]:
        """The one method, and what restores it."""
        spends = None if self.allocate is None else Allocation.parsed(self.allocate)
        passes.check_dials(self.method, self.keep, self.slice, spends, self.multiple_of)
        step = passes.stepped(
            self.method, self.options or {}, keep=self.keep, slice=self.slice, multiple=self.multiple_of,
            allocation=spends,
        )  # fmt: skip
        if not self.restore and not isinstance(self.restore, Mapping):
            return [step]
        behind = Restore(**self.restore) if isinstance(self.restore, Mapping) else Restore()
        check_order([step, behind])
        return [step, behind]


@dataclass(frozen=True, eq=False)
class Preview:
    """A dry run: what `compress` would make, and what it would need."""

    name: str
    outcomes: list[Outcome]  # of every step
    before: Sizes
    after: Sizes
    memory: dict[str, int]  # bytes: one block, sums, hidden states
    notes: tuple[str, ...] = ()
    target: Target = ANY

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
            "target": self.target.words,
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
    target: Targets = None,
) -> Preview:
    """What `compress` with the same arguments would make: exact widths and sizes; nothing is written.

    Allocations that depend on activations need `data`.
    """
    steps = Asked(
        recipe=recipe, method=method, options=options, keep=keep, slice=slice, multiple_of=multiple_of,
        allocate=allocate, restore=restore, target=target,
    ).steps()  # fmt: skip
    stored, place = dtype_of(dtype), device_of(device)
    first = steps[0]
    shared = spend.is_shared(steps)
    measured = data is not None and isinstance(first, Step) and (shared or bool(first.needs()))
    scored = shared or (isinstance(first, Step) and first.spends.name in ("global", "auto"))
    with open_source(model, revision=revision, weights=measured or scored) as source:
        found = planner.opened(source)
        wide = torch.float32 if place.type == "cpu" else found.dtype
        run = chain.Run(found, None, place, wide, cache=None if cache is None else Path(cache))
        window = window_of(source, length, found.config.max_position_embeddings)
        if measured and data is not None:
            words = tokenizer_of(source.folder)
            asked_for: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "column": text_column}
            tokens, _ = tokens_of(found, words, data, None, needed=True, measure=False, device=place, **asked_for)
            run.ids = None if tokens is None else tokens.ids
        steps = spend.split(run, steps)
        outs = chain.dry(run, steps)
        before = budget.sizes(found.config, itemsize=found.dtype.itemsize)
        before = replace(before, nbytes=found.nbytes or before.nbytes)
        after = chain.left(steps, outs, planner.sizes_after(found, outs[-1], stored))
        memory = memory_of(found, steps, outs, samples, window)
    notes = (*planner.notes(found, outs[-1]), *chain.remarks(steps, outs[-1]), *run.notes)
    return Preview(str(model), outs, before, after, memory, notes, chain.target_of(steps))


def memory_of(found: Opened, steps: list[AnyStep], outs: list[Outcome], samples: int, window: int) -> dict[str, int]:
    """Bytes that the run holds at once: one block's weights, the largest sums, the hidden states.

    Sums that are too large for the memory that is free now are in a file.
    """
    config, size, tokens = found.config, found.config.hidden_size, samples * window
    changed = any(out.changed for out in outs)
    limit, sums, filed = SPILL * free_memory(), 0, 0
    for step, out in zip(steps, outs, strict=True):
        kept, at_work = sums_of(found, step, out)
        sums, filed = max(sums, at_work + (kept if kept <= limit else 0)), max(filed, kept if kept > limit else 0)
    streams = 2 if any(isinstance(step, Restore) for step in steps) else 1
    if any(isinstance(step, Step) and Stat.FISHER in step.method.needs for step in steps):
        streams = config.num_hidden_layers + 1  # in front of every block, and the gradient
    learns = changed and any(isinstance(step, Step) and Stat.MASKS in step.method.needs for step in steps)
    whole = {"the whole model": (4 if found.dtype == torch.float32 else 2) * layout.count(config)} if learns else {}
    heals = any(isinstance(step, Heal) for step in steps)  # the original; and the result, gradients and AdamW's sums
    whole |= {"healing": 4 * (layout.count(config) + 4 * layout.count(outs[-1].final))} if heals else {}
    if any(isinstance(step, Restore) and step.refine for step in steps):
        whole["refinement"] = 4 * min(tokens, CURVATURE) * held_of(outs[-1].final, window)
    paired = any(isinstance(step, Step) and getattr(step.method, "rank", 1) == 2 for step in steps)
    widths = max(fisher.tokens_of(config, block) for block in range(config.num_hidden_layers)) if paired else 0
    return whole | {
        **({"tokens of a block": 4 * tokens * widths} if paired else {}),
        "one block": (8 if found.dtype == torch.float32 else 4)
        * max(layout.count(config, block) for block in range(config.num_hidden_layers)),
        "sums": sums if changed else 0,
        **({"sums in a file": filed} if filed else {}),
        "hidden states": 4 * tokens * size * streams if changed else 0,
    }


def held_of(config: MicrotomeConfig, window: int) -> int:
    """Numbers that refinement holds for a token, in the half where they are most."""
    blocks = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
    return max(max(HELD * one.intermediate_size, one.num_attention_heads * window) for one in blocks)


def sums_of(found: Opened, step: AnyStep, out: Outcome) -> tuple[int, int]:
    """Bytes of a step's sums: those that are kept of all places together, and those of the place at work."""
    config, size = found.config, found.config.hidden_size
    blocks = range(config.num_hidden_layers)
    if isinstance(step, Restore):
        widest = max(size, *(config.per_layer_config[block].intermediate_size for block in blocks))
        return 0, 8 * 6 * widest * widest
    if not isinstance(step, Step):
        return 0, 0
    if out.widths:
        one = 8 * size * size
        return (0, 3 * one) if step.method.split or step.method.pooled else (len(out.widths) * one, 2 * one)
    if not (out.inner or out.weights):
        return 0, 0
    if Stat.FISHER in step.method.needs:
        numbers = [fisher.numbers(config, block, step.method.rank) for block in blocks]
        return 4 * sum(numbers), 8 * max(numbers)
    each = [8 * sum_of_squares(found, step, block) for block in blocks]
    all_kept = not step.method.sequential or step.needs() & frozenset(SITES)  # for scores, before anything is cut
    return sum(each) if all_kept else 0, max(each)


def sum_of_squares(found: Opened, step: passes.Step, block: int) -> int:
    """Numbers in the sums that a step keeps of one block."""
    from microtome import survey

    return sum(survey.width(found.config, block, stat) ** 2 for stat in step.method.needs if stat in SITES)
