"""What a parameter costs in loss, by measurement: one width narrowed at a time, all else as it is.

Every width of every block is narrowed twice, by the method itself, and the divergence of the model's predictions from
the uncut model's is measured on a few windows. All narrowed models run side by side, and share the uncut blocks before
theirs: the weights are read once, and L blocks with K widths each cost about K L^2 block passes over those windows.
How the loss grows on either side of the measured point follows the method's own scores.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from microtome import inner, layout, narrow
from microtome.calibrate import Progress, Stream, run_halves
from microtome.inner import Dial
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD
from microtome.planner import Opened
from microtome.survey import Statistics

TOKENS = 2048  # predicted by every narrowed model
PARTS = (0.7, 0.35)  # of a width, where it is measured
WHOLE = ("attn", "mlp")


@torch.inference_mode()
def losses(  # noqa: PLR0913
    found: Opened,
    method: Any,
    dials: Mapping[str, Dial],
    statistics: Statistics,
    ids: Tensor,
    *,
    biased: bool,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """For every dial the fractions at which it was measured, and the divergence there, in nats per token."""
    stream = Stream(found.config, spread(ids), device=device, dtype=dtype, progress=progress)
    stream.start(found.read("stem", dtype), None, normed=True)
    x, cut = stream.hidden.to(device), dict[tuple[str, int], Tensor]()
    for block in range(found.config.num_hidden_layers):
        tensors = found.read(block, torch.float64)
        module = stream.module(block, tensors, WHOLE)
        cut = {name: run_halves(module, WHOLE, one, stream.beside(block)) for name, one in cut.items()}
        mine = [dial for dial in dials.values() if dial.block == block]
        view = narrow.view_of(found, method, block, tensors, WHOLE, statistics, statistics.gradients)
        for name, wide in [(dial.name, wide) for dial in mine for wide in probed(dial)]:
            config = inner.narrowed_config(found.config, {name: wide}, biased=biased)
            edits = method.solve(view, {name: wide})
            done = narrow.shaped(inner.narrowed(tensors, edits, block), config, block, block)
            narrower = stream.module(block, done, WHOLE, config)
            cut[name, wide] = run_halves(narrower, WHOLE, x, stream.beside(block))
        x = run_halves(module, WHOLE, x, stream.beside(block))
        if progress is not None:
            progress("probing", (block + 1) / found.config.num_hidden_layers)
    logits = Predictions(found, stream)
    want = logits(x)
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in dials}
    for (name, wide), one in cut.items():
        out[name].append((wide / dials[name].size, divergence(want, logits(one))))
    return out


@torch.inference_mode()
def predicted(found: Opened, ids: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Log-probabilities [N T, V] of a decoder, block by block."""
    stream = Stream(found.config, ids, device=device, dtype=dtype)
    stream.start(found.read("stem", dtype), None, normed=True)
    for block in range(found.config.num_hidden_layers):
        stream.push(block, found.read(block, dtype))
    return Predictions(found, stream)(stream.hidden.to(device))


def spread(ids: Tensor, tokens: int = TOKENS) -> Tensor:
    """Windows [N, T] of so many tokens from all over the text: neighbours are alike."""
    count = min(len(ids), max(1, tokens // ids.shape[1]))
    return ids[torch.arange(count) * len(ids) // count]


def probed(dial: Dial) -> list[int]:
    """The widths at which a dial is measured, widest first."""
    wides = (max(min(dial.nearest(part * dial.size), dial.size - dial.step), dial.least) for part in PARTS)
    return sorted({wide for wide in wides if wide < dial.size}, reverse=True)


class Predictions:
    """The decoder's end: final states to log-probabilities."""

    def __init__(self, found: Opened, stream: Stream) -> None:
        head = found.read("head", stream.dtype)
        self.table = (head[HEAD] if HEAD in head else found.read("stem", stream.dtype)[EMBEDDING]).to(stream.device)
        self.parts = {name: tensor.to(stream.device) for name, tensor in head.items()}
        self.stream = stream

    def __call__(self, x: Tensor) -> Tensor:
        """The stream [N, T, D] to log-probabilities [N T, V], fp32."""
        config = self.stream.config
        z = self.stream.norm(x[..., : config.hidden_size]) if config.final_norm else x
        if FINAL_NORM in self.parts:
            z = z * (self.parts[FINAL_NORM] + config.norm_offset)
        if "model.norm.bias" in self.parts:
            z = z + self.parts["model.norm.bias"]
        if "head_adapter.weight" in self.parts:
            z = torch.nn.functional.linear(z, self.parts["head_adapter.weight"], self.parts.get("head_adapter.bias"))
        logits = torch.nn.functional.linear(z, self.table, self.parts.get("lm_head.bias")).float()
        logits *= config.logits_scale
        if config.logits_softcap is not None:
            logits = torch.tanh(logits / config.logits_softcap) * config.logits_softcap
        return torch.log_softmax(logits.flatten(0, -2), dim=-1)


def divergence(want: Tensor, have: Tensor) -> float:
    """Kullback-Leibler divergence of predictions [T, V] from those that are wanted, in nats per token."""
    return float((want.exp() * (want - have)).sum(-1).double().mean())


def curves(
    measured: Mapping[str, Sequence[tuple[float, float]]], scores: Mapping[str, Sequence[float]]
) -> dict[str, list[tuple[float, float]]]:
    """Points (fraction kept, loss) of every dial: what was measured, and between it as the method's scores grow."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, points in measured.items():
        units = sorted(max(float(one), 0.0) for one in scores[name])
        lost = list(accumulate(units, initial=0.0))  # when the lowest 0, 1, ... units go
        pieces, before, loss = list[tuple[float, float]](), 0, 0.0
        for at, value in sorted(points, reverse=True):
            gone = min(len(units), max(before + 1, round((1.0 - at) * len(units))))
            rise = max(value - loss, 0.0) / max(lost[gone] - lost[before], 1e-300)
            pieces += [(1.0 - n / len(units), loss + rise * (lost[n] - lost[before])) for n in range(before, gone)]
            before, loss = gone, loss + rise * (lost[gone] - lost[before])
        pieces.append((1.0 - before / len(units), loss))
        found[name] = pieces
    return found


def costs(found: Opened, dials: Mapping[str, Dial], *, biased: bool) -> dict[str, float]:
    """The numbers that one unit of each width stores, by counting."""
    whole = layout.count_blocks(inner.narrowed_config(found.config, {}, biased=biased))
    out: dict[str, float] = {}
    for name, dial in dials.items():
        fewer = inner.narrowed_config(found.config, {name: dial.size - dial.step}, biased=biased)
        out[name] = max(whole - layout.count_blocks(fewer), 1) / dial.step
    return out
