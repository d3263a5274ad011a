"""The cut of inner spaces: measure a block, let the method solve it, rewrite it, write it.

Methods with `inputs=compressed` see each half behind everything that has been cut before it; the others see sums of the
uncut model, from a survey that all methods share. Methods of single weights pass through the same loop.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from microtome import inner, layout, survey
from microtome.calibrate import Stream
from microtome.checkpoint import Writer
from microtome.cut import Sink, Work
from microtome.edit import Correct, Edit, Quantise, Rewrite, Select
from microtome.inner import View
from microtome.lineage import Made
from microtome.modeling_microtome import MicrotomeConfig
from microtome.planner import Opened
from microtome.stats import SITES, Moment, Stat
from microtome.surgery import Tensors
from microtome.survey import Statistics

HALF = {site: {"self_attn": "attn", "mlp": "mlp"}[site.partition(".")[0]] for site in SITES.values()}


def view_of(  # noqa: PLR0913, PLR0917 - what it is made of
    found: Opened,
    method: Any,
    block: int,
    tensors: Mapping[str, Tensor],
    halves: tuple[str, ...],
    stats: Statistics | Mapping[Stat, Any],
    gradients: Any = None,
) -> View:
    """What a method sees of some halves of a block."""
    kinds = [kind for kind in inner.kinds_of(method, found.config) if inner.half_of(kind) in halves]
    spaces = inner.spaces_of(found.config, block, kinds)
    head = layout.prefix(block)
    names = {name.removeprefix(head): tensor for name, tensor in tensors.items()}
    known = stats.of(block, method.needs) if isinstance(stats, Statistics) else stats
    first, squares = ({}, {}) if gradients is None else (gradients.first(block), gradients.squares(block))
    return View(found.config, block, halves, names, spaces, known, first, squares)


def learned(
    found: Opened,
    method: Any,
    dtype: torch.dtype,
    widths: Mapping[str, int],
    gradients: Any = None,
    statistics: Statistics | None = None,
) -> Any:
    """The method after it has seen the weights of all blocks, where it wants to (`learn`) before the first is cut."""
    learn = getattr(method, "learn", None)
    if learn is None:
        return method
    both, known = ("attn", "mlp"), statistics or Statistics()
    return learn(lambda block: view_of(found, method, block, found.read(block, dtype), both, known, gradients), widths)


def widths_of(work: Work, block: int, halves: tuple[str, ...]) -> dict[str, int]:
    """The widths that the plan gives the inner spaces of some halves, by dial."""
    names = {inner.NAMES[kind]: inner.half_of(kind) for kind in inner.NAMES}
    return {
        name: wide
        for name, wide in work.outcome.inner.items()
        if name.startswith(f"{block}.") and names.get(name.partition(".")[2]) in halves
    }


def solved(
    work: Work,
    block: int,
    tensors: Tensors,
    halves: tuple[str, ...],
    stats: Mapping[Stat, Any],
    whole: Mapping[str, int],
) -> list[Edit]:
    """The method's edits of some halves of a block; none where nothing there gets narrower than it is `whole`."""
    widths, start = widths_of(work, block, halves), time.perf_counter()
    if work.outcome.weights:
        seen = view_of(work.opened, work.outcome.method, block, tensors, halves, stats, work.gradients)
        edits = work.outcome.method.solve(replace(seen, dtype=work.stored))
        work.timed("solve", start)
        return edits
    if not any(wide < whole[name] for name, wide in widths.items()):
        return []
    seen = view_of(work.opened, work.outcome.method, block, tensors, halves, stats, work.gradients)
    edits = work.outcome.method.solve(seen, widths)
    work.timed("solve", start)
    return edits


@torch.inference_mode()
def narrow(work: Work, writer: Writer, statistics: Statistics, dtype: torch.dtype | None) -> Made:
    """Cut every block and write the whole decoder; what was kept of every space is returned."""
    start, out, config = time.perf_counter(), work.outcome, work.opened.config
    method = learned(work.opened, out.method, work.working, out.inner, work.gradients, statistics)
    work = replace(work, outcome=replace(out, method=method), stored=dtype or work.opened.dtype)
    work.timed("solve", start)
    sink, made = Sink(work, writer, work.stored), Made(config)
    whole = {name: dial.size for name, dial in inner.dials(config, out.method.targets).items()} if out.inner else {}
    gone = set(inner.dropped(out.inner))
    left = [block for block in range(config.num_hidden_layers) if block not in gone]
    made.blocks = left if gone else None
    behind = Behind(work) if out.method.needs and out.method.sequential else None
    sink.store("stem", work.opened.read("stem", work.working))
    for block in range(config.num_hidden_layers):
        if block in gone:
            continue
        tensors, edits = work.opened.read(block, work.working), list[Edit]()
        for halves in halves_of(config):
            for wanted in stages(out.method, halves):
                stats = statistics.of(block, wanted)
                if behind is not None:
                    stats |= behind.measured(block, tensors | corrected(edits), halves, wanted)
                edits += solved(work, block, tensors, halves, stats, whole)
            if behind is not None:
                behind.advance(block, tensors, edits, halves)
        done = finished(work, block, tensors, edits)
        made.edits[block] = [edit for edit in edits if isinstance(edit, Rewrite | Select)]
        coded = [edit for edit in edits if isinstance(edit, Quantise)]
        replace(sink, coded=coded).store(left.index(block), renamed(done, block, left.index(block)))
        if work.progress is not None:
            work.progress("writing", (block + 1) / config.num_hidden_layers)
    sink.store("head", work.opened.read("head", work.working))
    if behind is not None:
        behind.stream.close()
    return made


def halves_of(config: Any) -> tuple[tuple[str, ...], ...]:
    """What a method solves at a time: a half, or both where they read the same stream."""
    return (("attn",), ("mlp",)) if config.parallel == "none" else (("attn", "mlp"),)


def stages(method: Any, halves: tuple[str, ...]) -> list[frozenset[Stat]]:
    """What is measured of some halves at a time: everything, or one site behind the other (`stepwise`)."""
    if not getattr(method, "stepwise", False):
        return [method.needs]
    return [frozenset({stat}) for stat, site in SITES.items() if stat in method.needs and HALF[site] in halves]


def corrected(edits: list[Edit]) -> Tensors:
    """The tensors that have been given new values."""
    return {edit.tensor: edit.value for edit in edits if isinstance(edit, Correct | Quantise)}


def finished(work: Work, block: int, tensors: Tensors, edits: list[Edit]) -> Tensors:
    """The block's tensors as the plan wants them: narrowed, without skipped halves, with zeros for added biases."""
    out = work.outcome
    place = block - sum(other < block for other in inner.dropped(out.inner))
    return shaped(inner.narrowed(tensors, edits, block), out.final, block, place)


def shaped(tensors: Tensors, config: MicrotomeConfig, block: int, place: int) -> Tensors:
    """What a config has of a block that stands at `place` in it: no skipped halves, and zeros for biases it lacks."""
    old, new, done = layout.prefix(block), layout.prefix(place), dict(tensors)
    wanted = {old + name.removeprefix(new): shape for name, shape in layout.shapes(config, place).items()}
    for name in [name for name in wanted if name not in done and ".post_attention_layernorm." in name]:
        done[name] = done[name.replace("post_attention_", "input_")]  # attention is dropped, and shared its norm
    like = next(iter(tensors.values()))
    added = {
        name: torch.zeros(shape, dtype=like.dtype)
        for name, shape in wanted.items()
        if name not in done and name.endswith(".bias")
    }
    return {name: tensor for name, tensor in (done | added).items() if name in wanted}


def renamed(tensors: Tensors, block: int, place: int) -> Tensors:
    """The tensors under the number that the block has in the result."""
    return {layout.prefix(place) + name.removeprefix(layout.prefix(block)): tensor for name, tensor in tensors.items()}


class Behind:
    """The calibration rows behind everything that has been cut so far."""

    def __init__(self, work: Work) -> None:
        assert work.ids is not None
        self.work = work
        kept = {name: wide for name, wide in work.outcome.inner.items() if not name.isdigit()}
        self.stream = Stream(  # blocks keep their numbers: those that are dropped are not pushed
            inner.narrowed_config(work.opened.config, kept, biased=bool(getattr(work.outcome.method, "biased", False))),
            work.ids,
            device=work.device,
            dtype=work.dtype,
            scratch=work.scratch,
            progress=work.progress,
            passes=2,
        )
        self.stream.start(work.opened.read("stem", work.dtype), None, normed=True)

    def measured(
        self, block: int, tensors: Tensors, halves: tuple[str, ...], wanted: frozenset[Stat]
    ) -> dict[Stat, Moment]:
        """What the wanted sites of some halves see, the halves themselves still of full width."""
        since = time.perf_counter()
        sites = {stat: site for stat, site in SITES.items() if stat in wanted}
        mine = {
            stat: Moment(survey.width(self.work.opened.config, block, stat), self.stream.device)
            for stat, site in sites.items()
            if HALF[site] in halves and survey.has(self.work.opened.config, block, stat)
        }
        taps = {SITES[stat]: moment.add for stat, moment in mine.items()}
        self.stream.push(block, tensors, halves, taps, config=self.work.opened.config, keep=False)
        for stat, moment in mine.items():
            survey.check_finite(moment, stat, block)
        self.work.timed("survey", since)
        return mine

    def advance(self, block: int, tensors: Tensors, edits: list[Edit], halves: tuple[str, ...]) -> None:
        """Push the rows past the halves as they have been cut."""
        since = time.perf_counter()
        self.stream.push(block, finished(self.work, block, tensors, edits), halves)
        self.work.timed("survey", since)
