"""Restoration: refit every linear of a cut decoder, in closed form, to what the uncut one computes there.

The calibration rows run through both decoders side by side, and each linear is solved as soon as the cut decoder,
already restored up to there, feeds it: so errors do not accumulate, they are corrected.

* A linear that reads the stream (queries, keys, values, gate, up) is fitted to the outputs of the uncut one, in the
  rows that are left.
* A linear that writes the stream (output and down projection) is fitted to the uncut stream behind the half, in the
  coordinates that are left, minus what the cut stream carries past the half. Behind a norm of its own (post, sandwich),
  where the stream is out of reach, it stays as the cut left it.
* The head is fitted to the uncut logits, then to what they predict (heads.py).

Each is a ridge regression towards the weights that the cut left (regression.py). The ridge is chosen, per linear, by
the error on calibration windows that the fit has not seen; then all windows are used. Linears with a bias have an
intercept. With `refine` the matrices of a half are then fitted together (refine.py).
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microtome import layout
from microtome.calibrate import Stream, run_halves, submodule
from microtome.checkpoint import Writer
from microtome.cut import Sink, Work, clock
from microtome.errors import BadInput
from microtome.halves import At, Attention, FeedForward
from microtome.heads import Ending
from microtome.lineage import Lineage
from microtome.modeling_microtome import MicrotomeBlock
from microtome.narrow import halves_of
from microtome.planner import Opened
from microtome.refine import Piece, refined
from microtome.regression import Fit, replace_each, replace_together, with_ones
from microtome.surgery import Tensors

READERS = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
MATRICES = {"attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
PIECE = 2048  # tokens of a half that are refined at a time


@dataclass(frozen=True)
class Restore:
    """Options of restoration."""

    ridge: float | None = None  # relative; None: chosen on held-out windows
    windows: int | None = None  # of the calibration windows; None: all
    held_out: float = 0.125  # of the windows, to choose the ridge on
    readers: bool = True
    writers: bool = True
    head: bool = True
    normed: bool = True  # what writes the stream is fitted to it as the norms behind it will see it
    refine: int = 0  # Gauss-Newton steps for every half that reads the stream alone (refine.py)
    predictions: bool = True  # the head is fitted to what the uncut one predicts, behind the fit to its logits

    def __post_init__(self) -> None:
        if not 0.0 < self.held_out < 1.0:
            raise BadInput(f"held_out={self.held_out} of restore lies between 0 and 1: the share of windows set aside.")
        if self.ridge is not None and not self.ridge >= 0.0:
            raise BadInput(f"ridge={self.ridge} of restore is no number from 0 on.")
        if self.refine < 0:
            raise BadInput(f"refine={self.refine} of restore is no number of steps.")
        if self.windows is not None and self.windows < 2:
            raise BadInput(f"windows={self.windows} of restore: at least 2, one of them to choose the ridge on.")

    def to_json(self) -> dict[str, Any]:
        """As a plan keeps it."""
        return asdict(self)


@torch.inference_mode()
def restored(dense: Opened, lineage: Lineage, options: Restore, work: Work, writer: Writer, dtype: torch.dtype) -> None:
    """Refit the model that `work` opens to the uncut one, and write it."""
    if work.ids is None:
        raise BadInput("restoration needs calibration text: give --data.")
    with clock(work.seconds, "restore"):
        Restoration(dense, lineage, options, work, Sink(work, writer, dtype)).run()


class Restoration:
    """Two streams side by side, and the block that they are at."""

    def __init__(self, dense: Opened, lineage: Lineage, options: Restore, work: Work, sink: Sink) -> None:
        assert work.ids is not None
        ids = work.ids[: options.windows]
        if len(ids) < 2:
            raise BadInput(f"restoration needs at least 2 windows, one to choose the ridge on, not {len(ids)}.")
        self.dense, self.cut, self.lineage, self.options, self.work, self.sink = (
            dense, work.opened, lineage, options, work, sink,
        )  # fmt: skip
        asked: dict[str, Any] = {"device": work.device, "dtype": work.dtype, "scratch": work.scratch}
        self.whole = Stream(dense.config, ids, **asked)
        self.small = Stream(work.opened.config, ids, **asked, progress=self.report, passes=2)
        aside = min(max(1, round(len(ids) * options.held_out)), len(ids) - 1)
        self.held = len(ids) - aside  # windows from here on are set aside
        self.wide = layout.residual_width(dense.config, 0)  # of the uncut stream, where it is
        self.blocks = lineage.blocks(work.opened.config.num_hidden_layers)

    def report(self, _what: str, fraction: float) -> None:
        """Progress under the name of this stage."""
        if self.work.progress is not None:
            self.work.progress("restoration", fraction)

    def slices(self, size: int | None = None) -> list[tuple[slice, int]]:
        """Rows that go through together, and whether they are set aside."""
        size = size or self.small.batch
        return [
            (slice(start, min(start + size, last)), held)
            for first, last, held in ((0, self.held, 0), (self.held, self.small.rows, 1))
            for start in range(first, last, size)
        ]

    def run(self) -> None:
        """Restore every block in order, then the head, and write all of it."""
        stem, wide = self.cut.read("stem", self.work.working), self.dense.read("stem", self.work.dtype)
        self.whole.start(wide, None, normed=True)
        self.small.start({name: tensor.to(self.work.dtype) for name, tensor in stem.items()}, None, normed=True)
        self.sink.store("stem", stem)
        behind = 0  # the block of the uncut decoder that its stream has reached
        for block, original in enumerate(self.blocks):
            self.skip(behind, original)
            tensors = dict(self.cut.read(block, self.work.working))
            after = self.blocks[block + 1] if block + 1 < len(self.blocks) else self.dense.config.num_hidden_layers
            own = self.dense.read(original, self.work.dtype)
            halves = halves_of(self.small.config)
            for mine in halves:
                self.readers(block, original, mine, own, tensors)
                if mine == halves[-1]:
                    self.skip(original + 1, after)  # dropped blocks: what was lost with them is made up for here
                self.writers(block, mine, tensors)
                self.small.push(block, tensors, mine)
            behind = after
            self.sink.store(block, tensors)
        self.sink.store("head", self.head())
        self.whole.close()
        self.small.close()

    def skip(self, first: int, last: int) -> None:
        """Push the uncut stream past blocks that the cut decoder lacks."""
        for block in range(first, last):
            self.whole.push(block, self.dense.read(block, self.work.dtype))
            self.wide = layout.residual_width(self.whole.config, 2 * block + 2)

    def readers(self, block: int, original: int, halves: tuple[str, ...], own: Tensors, tensors: Tensors) -> None:
        """Fit what reads the stream; the uncut stream goes past the halves on the way."""
        module = self.small.module(block, tensors, halves)
        whole = self.whole.module(original, own, halves)
        made: dict[str, Tensor] = {}
        linears: dict[str, torch.nn.Module] = {}
        for name in (name for half in halves for name in READERS[half]):
            linear, narrow = submodule(whole, name), submodule(module, name)
            if linear is None or narrow is None or not self.options.readers:
                continue
            linears[name] = narrow
            # A cut that moved the bias behind attention wants none here.
            gone = getattr(linear, "bias", None) if getattr(narrow, "bias", None) is None else None
            linear.register_forward_hook(
                lambda _m, _seen, out, name=name, gone=gone: made.update({name: out if gone is None else out - gone})
            )
        place = layout.junction(self.small.config, block, "in" if "attn" in halves else "mid")
        wide = layout.residual_width(self.small.config, place)
        together = dict[tuple[str, bool], list[str]]()  # linears that read the same
        for name in linears:
            biased = f"{layout.prefix(block)}{name}.bias" in tensors
            together.setdefault(("attn" if name.startswith("self_attn") else "mlp", biased), []).append(name)
        fits = dict[tuple[str, bool], Fit]()
        wider = self.wide
        for rows, held in self.slices():
            x = self.whole.hidden[rows, :, : self.wide].to(self.whole.device)
            y = run_halves(whole, halves, x, self.whole.beside(original))
            self.whole.hidden[rows, :, : y.shape[-1]] = y
            wider = y.shape[-1]
            x = self.small.hidden[rows, :, :wide].to(self.small.device)
            seen = {half: module.read(x, half) for half in halves}
            for (half, biased), names in together.items():
                missing = torch.cat(
                    [
                        self.lineage.rows(made[name].flatten(0, -2).T, f"{name}.weight", block).T
                        - linears[name](seen[half]).flatten(0, -2)
                        for name in names
                    ],
                    dim=1,
                )
                z = with_ones(seen[half], biased)
                if (half, biased) not in fits:
                    fits[half, biased] = Fit(z.shape[-1], missing.shape[-1], self.small.device)
                fits[half, biased].add(z, missing, held)
        self.wide = wider
        for read, fit in fits.items():
            names = [f"{layout.prefix(block)}{name}" for name in together[read]]
            replace_each(tensors, names, fit, self.options.ridge)

    def writers(self, block: int, halves: tuple[str, ...], tensors: Tensors) -> None:
        """Fit what writes the stream, all halves that read the same stream together."""
        goal = self.goal(block, halves, tensors)
        found = {WRITERS[half]: submodule(goal.module, WRITERS[half]) for half in halves}
        linears = {name: linear for name, linear in found.items() if linear is not None}
        placed = self.small.config.norm_placement != "pre" or (goal.written is not None and len(linears) > 1)
        if not linears or not self.options.writers or placed:
            return
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, linear in linears.items():
            linear.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: (args[0], out)}))
        biased = any(f"{layout.prefix(block)}{name}.bias" in tensors for name in linears)
        fit: Fit | None = None
        for rows, held in self.slices():
            x, wanted, weight = goal(rows)
            run_halves(goal.module, halves, x, self.small.beside(block))
            missing = wanted - torch.stack([out for _, out in seen.values()]).sum(0)
            z = with_ones(torch.cat([z for z, _ in seen.values()], dim=-1), biased)
            fit = fit or Fit(z.shape[-1], missing.shape[-1], self.small.device)
            fit.add(z * weight, missing * weight, held)
        if fit is not None:
            names = [f"{layout.prefix(block)}{name}" for name in linears]
            replace_together(tensors, names, fit, self.options.ridge)
        if self.options.refine and len(halves) == 1:
            self.refine(block, halves[0], tensors, goal)

    def goal(self, block: int, halves: tuple[str, ...], tensors: Tensors) -> "Goal":
        """What some halves should write."""
        module, config = self.small.module(block, tensors, halves), self.small.config
        before = layout.junction(config, block, "in" if "attn" in halves else "mid")
        kept = self.lineage.stream(
            layout.junction(config, block, "out" if "mlp" in halves else "mid"), config.num_hidden_layers
        )
        written = [index for half in halves if (index := getattr(module, f"{half}_write_index")) is not None]
        return Goal(
            self.small,
            self.whole,
            module,
            "attn" if "attn" in halves else "mlp",
            (layout.residual_width(config, before), self.wide),
            None if kept is None else kept.to(self.small.device, self.small.dtype),
            written[0].long() if written else None,
            self.options.normed,
        )

    def refine(self, block: int, half: str, tensors: Tensors, goal: "Goal") -> None:
        """Fit the matrices of a half together, from where the linear fits have left them."""
        if (at := point_of(goal.module, half, self.small.beside(block))) is None:
            return
        head = f"{layout.prefix(block)}{'mlp' if half == 'mlp' else 'self_attn'}."
        names = [name for name in MATRICES[half] if f"{head}{name}.weight" in tensors]
        *reads, write = names
        biased, after = f"{head}{reads[-1]}.bias" in tensors, tensors.get(f"{head}{write}.bias")

        def piece(rows: slice) -> Piece:
            x, wanted, weight = goal(rows)
            wanted = wanted if after is None else wanted - after.to(wanted)
            read = with_ones(goal.module.read(x, half), biased)
            return Piece(read.float(), wanted.float(), weight.float())

        size = max(1, PIECE // self.small.length)
        pieces: tuple[list[Any], list[Any]] = ([], [])
        for rows, held in self.slices(size):
            pieces[held].append(partial(piece, rows))
        like = tensors[f"{head}{write}.weight"]
        start = [tensors[f"{head}{name}.weight"] for name in names]
        if biased:
            start = [torch.cat([one, tensors[f"{head}{name}.bias"][:, None]], 1)
                     for name, one in zip(reads, start, strict=False)] + start[-1:]  # fmt: skip
        weights = tuple(one.to(self.small.device, torch.float32) for one in start)
        found = refined(at, *pieces, weights, self.options.refine)
        fitted = [
            one if new is old else new.cpu().to(like) for one, new, old in zip(start, found, weights, strict=True)
        ]
        tensors[f"{head}{write}.weight"] = fitted[-1].contiguous()
        for name, one in zip(reads, fitted, strict=False):
            tensors[f"{head}{name}.weight"] = (one[:, :-1] if biased else one).contiguous()
            if biased:
                tensors[f"{head}{name}.bias"] = one[:, -1].contiguous()

    def head(self) -> Tensors:
        """The head's tensors, fitted to the uncut model's."""
        tensors = dict(self.cut.read("head", self.work.working))
        if not self.options.head:
            return tensors
        ending = Ending(self.dense, self.cut, self.whole, self.small, self.slices())
        return ending.restored(tensors, self.options.ridge, predictions=self.options.predictions)


@dataclass(frozen=True, eq=False)
class Goal:
    """What halves of a block of the cut decoder should write, so that its stream comes to the uncut one's."""

    small: Stream
    whole: Stream
    module: MicrotomeBlock
    first: str  # half, whose shortcut carries the stream past
    widths: tuple[int, int]  # of the cut stream before, of the uncut one behind
    kept: Tensor | None  # [R, N], what is left of the uncut coordinates
    written: Tensor | None  # the coordinates that the half writes
    normed: bool

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The stream that is read, what should be written, and what a token's error counts [B, T, 1]."""
        config = self.small.config
        x = self.small.hidden[rows, :, : self.widths[0]].to(self.small.device)
        target = self.whole.hidden[rows, :, : self.widths[1]].to(self.small.device)
        weight = self.weight(target)
        shortcut = self.module.attn_shortcut if self.first == "attn" else self.module.mlp_shortcut
        assert shortcut is not None
        target = ((target if self.kept is None else target @ self.kept.T) - shortcut(x)) / config.residual_scale
        return x, target if self.written is None else target.index_select(-1, self.written), weight

    def weight(self, x: Tensor) -> Tensor:
        """What a token's error counts: one over the length of the uncut stream, for a norm will divide by it."""
        lengths = x.float().square().mean(-1, keepdim=True)
        return lengths.add(1e-12).rsqrt().to(x.dtype) if self.normed else torch.ones_like(lengths).to(x.dtype)


def point_of(module: MicrotomeBlock, half: str, around: dict[str, Any]) -> At | None:
    """How a half is linearised; None where attention norms its queries and keys, or caps its scores."""
    if half == "mlp":
        assert module.mlp is not None
        act = module.mlp.act_fn
        return lambda weights, read: FeedForward(weights, read, act)
    attn = module.self_attn
    assert attn is not None
    if attn.q_norm is not None or attn.softcap is not None:
        return None
    return lambda weights, read: Attention(weights, read, attn, around)
