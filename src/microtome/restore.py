"""Restoration: refit every linear of a cut decoder, in closed form, to what the uncut one computes there.

The calibration rows run through both decoders side by side, and each linear is solved as soon as the cut decoder,
already restored up to there, feeds it: so errors do not accumulate, they are corrected.

* A linear that reads the stream (queries, keys, values, gate, up) is fitted to the outputs of the uncut one, in the
  rows that are left.
* A linear that writes the stream (output and down projection) is fitted to the uncut stream behind the half, in the
  coordinates that are left, minus what the cut stream carries past the half. Behind a norm of its own (post, sandwich),
  where the stream is out of reach, it stays as the cut left it.
* The head is fitted to the uncut logits; a tied one has only the final gain, or its adapter, to do so with.

Each is a ridge regression towards the weights W0 that the cut left, W = W0 + B (A + lambda I)^-1 with A = E[z z^T] and
B = E[(y - W0 z) z^T]: an infinite ridge leaves them as they are. Lambda is chosen, per linear, by the error on
calibration windows that the fit has not seen; then all windows are used. Linears with a bias have an intercept.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import layout
from microtome.calibrate import Stream, run_halves, submodule
from microtome.checkpoint import Writer
from microtome.cut import Sink, Work, clock
from microtome.errors import BadInput
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD
from microtome.linalg import damped_cholesky
from microtome.lineage import Lineage
from microtome.modeling_microtome import MicrotomeBlock
from microtome.narrow import halves_of
from microtome.planner import Opened
from microtome.refine import Half, refined
from microtome.surgery import Tensors

GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ridges, relative to the mean of A's diagonal
READERS = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
}
Pair = tuple[Tensor, Tensor, Tensor]  # what a half reads, what it should write, what that counts
WRITERS = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}


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
    refine: int = 0  # Gauss-Newton steps for every feed-forward half (refine.py)

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


class Fit:
    """Sums for a regression on z [T, F] of what W0 z lacks, r [T, O]: of windows to fit, and of those held out.

    What is missing is summed, not what is wanted: where nothing is missing, sums in fp32 would leave their rounding.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        self.zz = torch.zeros(2, features, features, dtype=torch.float64, device=device)
        self.rz = torch.zeros(2, outputs, features, dtype=torch.float64, device=device)

    def add(self, z: Tensor, r: Tensor, held: int) -> None:
        """Count tokens; `held` is 1 for windows that the fit must not see."""
        z_TF, r_TO = z.reshape(-1, z.shape[-1]).float(), r.reshape(-1, r.shape[-1]).float()
        self.zz[held] += z_TF.T @ z_TF
        self.rz[held] += r_TO.T @ z_TF

    def solved(self, start_OF: Tensor, ridge: float | None) -> Tensor:
        """The weights nearest to what is wanted, tied by a ridge to what they were [O, F]."""
        ridge = self.best() if ridge is None else ridge
        start = start_OF.to(self.zz)
        if math.isinf(ridge):
            return start
        return start + torch.cholesky_solve(self.rz.sum(0).T, damped_cholesky(self.zz.sum(0), ridge)).T

    def best(self) -> float:
        """The ridge whose fit does best on the windows that it has not seen; infinite where none helps."""
        gram_FF, cross_FF = self.rz[0].T @ self.rz[0], self.rz[0].T @ self.rz[1]
        losses = {math.inf: 0.0}
        for ridge in GRID:
            inverse = torch.cholesky_inverse(damped_cholesky(self.zz[0], ridge))  # the step is rz @ inverse
            change = ((inverse @ gram_FF @ inverse) * self.zz[1]).sum() - 2.0 * (inverse * cross_FF).sum()
            losses[ridge] = float(change)
        return min(losses, key=lambda ridge: (losses[ridge], -ridge))


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

    def slices(self) -> list[tuple[slice, int]]:
        """Rows that go through together, and whether they are set aside."""
        return [
            (slice(start, min(start + self.small.batch, last)), held)
            for first, last, held in ((0, self.held, 0), (self.held, self.small.rows, 1))
            for start in range(first, last, self.small.batch)
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
        fits: dict[str, Fit] = {}
        wider = self.wide
        for rows, held in self.slices():
            x = self.whole.hidden[rows, :, : self.wide].to(self.whole.device)
            y = run_halves(whole, halves, x, self.whole.beside(original))
            self.whole.hidden[rows, :, : y.shape[-1]] = y
            wider = y.shape[-1]
            x = self.small.hidden[rows, :, :wide].to(self.small.device)
            seen = {half: read(module, half, x) for half in halves}
            for name, linear in linears.items():
                z = seen["attn" if name.startswith("self_attn") else "mlp"]
                target = self.lineage.rows(made[name].flatten(0, -2).T, f"{name}.weight", block).T
                missing = target - linear(z).flatten(0, -2)
                z = with_ones(z, f"{layout.prefix(block)}{name}.bias" in tensors)
                if name not in fits:
                    fits[name] = Fit(z.shape[-1], missing.shape[-1], self.small.device)
                fits[name].add(z, missing, held)
        self.wide = wider
        for name, fit in fits.items():
            self.replace_together(tensors, [f"{layout.prefix(block)}{name}"], fit)

    def writers(self, block: int, halves: tuple[str, ...], tensors: Tensors) -> None:
        """Fit what writes the stream, all halves that read the same stream together."""
        module, config = self.small.module(block, tensors, halves), self.small.config
        found = {WRITERS[half]: submodule(module, WRITERS[half]) for half in halves}
        linears = {name: linear for name, linear in found.items() if linear is not None}
        written = [index for half in halves if (index := getattr(module, f"{half}_write_index")) is not None]
        if not linears or not self.options.writers or config.norm_placement != "pre" or (written and len(linears) > 1):
            return
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name, linear in linears.items():
            linear.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: (args[0], out)}))
        before = layout.junction(config, block, "in" if "attn" in halves else "mid")
        after = layout.junction(config, block, "out" if "mlp" in halves else "mid")
        kept = self.lineage.stream(after, config.num_hidden_layers)
        kept = None if kept is None else kept.to(self.small.device, self.small.dtype)
        wide, biased = (
            layout.residual_width(config, before),
            any(f"{layout.prefix(block)}{name}.bias" in tensors for name in linears),
        )
        shortcut = module.attn_shortcut if "attn" in halves else module.mlp_shortcut
        assert shortcut is not None
        fit: Fit | None = None
        pairs: tuple[list[Pair], list[Pair]] = ([], [])
        for rows, held in self.slices():
            x = self.small.hidden[rows, :, :wide].to(self.small.device)
            run_halves(module, halves, x, self.small.beside(block))
            target = self.whole.hidden[rows, :, : self.wide].to(self.small.device)
            weight = self.weight(target)
            target = ((target if kept is None else target @ kept.T) - shortcut(x)) / config.residual_scale
            target = target.index_select(-1, written[0].long()) if written else target
            missing = target - torch.stack([out for _, out in seen.values()]).sum(0)
            z = with_ones(torch.cat([z for z, _ in seen.values()], dim=-1), biased)
            fit = fit or Fit(z.shape[-1], missing.shape[-1], self.small.device)
            fit.add(z * weight, missing * weight, held)
            if self.options.refine and halves == ("mlp",):
                pairs[held].append((read(module, "mlp", x), target, weight))
        if fit is not None:
            self.replace_together(tensors, [f"{layout.prefix(block)}{name}" for name in linears], fit)
        if pairs[0]:
            self.refine(tensors, f"{layout.prefix(block)}mlp.", pairs, module)

    def weight(self, x: Tensor) -> Tensor:
        """What a token's error counts: one over the length of the uncut stream, for a norm will divide by it."""
        lengths = x.float().square().mean(-1, keepdim=True)
        return lengths.add(1e-12).rsqrt().to(x.dtype) if self.options.normed else torch.ones_like(lengths).to(x.dtype)

    def refine(self, tensors: Tensors, head: str, pairs: tuple[list[Pair], list[Pair]], module: MicrotomeBlock) -> None:
        """Fit the matrices of a feed-forward half together, from where the linear fits have left them."""
        names = [name for name in ("gate_proj", "up_proj") if f"{head}{name}.weight" in tensors]
        biased = f"{head}up_proj.bias" in tensors
        after = tensors.get(f"{head}down_proj.bias")
        assert module.mlp is not None
        halves: list[Half] = []
        for part in pairs:
            z, target, weight = (torch.cat([one[place].flatten(0, -2) for one in part]) for place in range(3))
            target = target if after is None else target - after.to(target)
            halves.append(Half(with_ones(z, biased), target * weight, weight[:, 0], module.mlp.act_fn))
        like = tensors[f"{head}down_proj.weight"]
        start = [tensors[f"{head}{name}.weight"] for name in names]
        if biased:
            start = [
                torch.cat([one, tensors[f"{head}{name}.bias"][:, None]], 1)
                for name, one in zip(names, start, strict=True)
            ]
        weights = tuple(one.to(halves[0].read) for one in (*start, like))
        fitted = [one.cpu().to(like.dtype) for one in refined(halves[0], halves[1], weights, self.options.refine)]
        tensors[f"{head}down_proj.weight"] = fitted[-1].contiguous()
        for name, one in zip(names, fitted, strict=False):
            tensors[f"{head}{name}.weight"] = (one[:, :-1] if biased else one).contiguous()
            if biased:
                tensors[f"{head}{name}.bias"] = one[:, -1].contiguous()

    def replace_together(self, tensors: Tensors, names: list[str], fit: Fit) -> None:
        """Put fitted weights and biases in their place; where outputs are added up, one bias takes it all."""
        like = tensors[f"{names[0]}.weight"]
        biased = [f"{name}.bias" for name in names if f"{name}.bias" in tensors]
        start = [tensors[f"{name}.weight"].double() for name in names]
        if biased:
            start.append(torch.stack([tensors[name].double() for name in biased]).sum(0)[:, None])
        solved = fit.solved(torch.cat(start, dim=1), self.options.ridge).cpu()
        pieces = solved.split([one.shape[1] for one in start], dim=1)
        for name, piece in zip(names, pieces, strict=False):
            tensors[f"{name}.weight"] = piece.to(like.dtype).contiguous()
        if biased:
            more = (pieces[-1] - start[-1])[:, 0]
            tensors[biased[0]] = (tensors[biased[0]].double() + more).to(like.dtype)

    # --- the head ---------------------------------------------------------------------------------------------------

    def head(self) -> Tensors:
        """The head's tensors, fitted to the uncut logits."""
        tensors = dict(self.cut.read("head", self.work.working))
        if not self.options.head:
            return tensors
        config, whole = self.small.config, self.dense.read("head", torch.float64)
        table = whole[HEAD] if HEAD in whole else self.dense.read("stem", torch.float64)[EMBEDDING]
        gain_alone = config.tie_word_embeddings and not config.head_adapter
        zz, yz = self.ends(norm_of(whole), {} if gain_alone else norm_of(tensors))
        if not config.tie_word_embeddings:
            wanted = table @ yz
            if (bias := whole.get("lm_head.bias")) is not None:
                wanted = wanted + bias[:, None] * zz[:, -1:]
            return self.head_of(tensors, "lm_head", zz, wanted)
        small = self.cut.read("stem", torch.float64)[EMBEDDING]
        gram_RR = small.T @ small
        reach = small.T @ (table @ yz)  # E'^T of the logits, times z
        if config.head_adapter:
            return self.head_of(tensors, "head_adapter", zz, torch.linalg.pinv(gram_RR, hermitian=True) @ reach)
        if FINAL_NORM not in tensors:
            return tensors
        gain = tensors[FINAL_NORM].double() + config.norm_offset
        if (bias := tensors.get("model.norm.bias")) is not None:
            reach = reach - (gram_RR @ bias.double())[:, None] * zz[:, -1:]
        fit = Fit(len(gain), 1, torch.device("cpu"))
        fit.zz = gram_RR * zz[:, :-1, :-1]
        fit.rz = reach.diagonal(dim1=1, dim2=2)[:, None] - gain @ fit.zz[:, None]
        solved = fit.solved(gain[None], self.options.ridge)[0] - config.norm_offset
        return tensors | {FINAL_NORM: solved.to(tensors[FINAL_NORM].dtype)}

    def head_of(self, tensors: Tensors, name: str, zz: Tensor, wanted: Tensor) -> Tensors:
        """A linear of the head, and its bias if any, fitted to what is wanted of it times (z, 1) [2, O, F + 1]."""
        start = tensors[f"{name}.weight"].double()
        if f"{name}.bias" in tensors:
            start = torch.cat([start, tensors[f"{name}.bias"].double()[:, None]], dim=1)
        features = start.shape[1]
        fit = Fit(features, 1, torch.device("cpu"))
        fit.zz = zz[:, :features, :features]
        fit.rz = wanted[:, :, :features] - start @ fit.zz
        self.replace_together(tensors, [name], fit)
        return tensors

    def ends(self, final: Tensors, own: Tensors) -> tuple[Tensor, Tensor]:
        """Sums of z z^T [2, F + 1, F + 1] and y z^T [2, D, F + 1] of the final states y uncut and z, 1 cut; fp64, CPU.

        The norms' gains and biases are those given. In fp64, for the head is solved from their difference.
        """
        wide, size = self.small.config.hidden_size + 1, self.whole.config.hidden_size
        zz, yz = (torch.zeros(2, rows, wide, dtype=torch.float64, device=self.small.device) for rows in (wide, size))
        for rows, held in self.slices():
            z = with_ones(end(self.small, rows, own), True).flatten(0, -2).double()
            zz[held] += z.T @ z
            yz[held] += end(self.whole, rows, final).flatten(0, -2).double().T @ z
        return zz.cpu(), yz.cpu()


def norm_of(head: Tensors) -> Tensors:
    """Gain and bias of the final norm."""
    return {name.removeprefix("model.norm."): one for name, one in head.items() if name.startswith("model.norm.")}


def read(module: MicrotomeBlock, half: str, x: Tensor) -> Tensor:
    """What the linears of a half read of the stream."""
    shared = half == "attn" or (module.parallel == "shared" and module.self_attn is not None)
    norm = module.input_layernorm if shared else module.post_attention_layernorm
    return module.gather(x if norm is None else norm(x), half)


def with_ones(z: Tensor, wanted: bool) -> Tensor:
    """A feature that is always one, for an intercept."""
    return torch.cat([z, z.new_ones(*z.shape[:-1], 1)], dim=-1) if wanted else z


def end(stream: Stream, rows: slice, final: Mapping[str, Tensor]) -> Tensor:
    """The final states [.., T, D] behind the final norm, with the gain and bias that are given."""
    x = stream.hidden[rows, :, : stream.config.hidden_size].to(stream.device)
    z = stream.norm(x) if stream.config.final_norm else x
    if "weight" in final:
        z = z * (final["weight"].to(z) + stream.config.norm_offset)
    return z + final["bias"].to(z) if "bias" in final else z
