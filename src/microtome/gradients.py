"""Gradients of the language-model loss: what methods of the Taylor and Fisher kind know of a model.

L_i is the mean next-token cross-entropy of calibration sequence i, g_i its gradient. Kept are, for every weight of
every block, the mean of g_i and the mean of g_i^2 (the diagonal of the empirical Fisher information over sequences).

The decoder is never whole in memory. On the way there the stream is kept in front of every block; on the way back each
block is read and run again, and hands the gradient of the stream to the one before it (`Backward`). In memory are one
block with its gradients, the streams, and the sums; streams and sums may live in files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import layout
from microtome.calibrate import Progress, Stream, allocated, attention_of
from microtome.errors import NumericalFailure
from microtome.layout import Part
from microtome.modeling_microtome import MicrotomeBlock, MicrotomeForCausalLM, MicrotomeRotary
from microtome.planner import Opened
from microtome.stats import Sample

HALVES = ("attn", "mlp")
LOGITS = 1 << 26  # numbers that the head makes at a time


@dataclass(frozen=True, eq=False)
class Gradients:
    """Mean gradients and mean squared gradients over sequences, by canonical name, on the CPU or in a file."""

    sample: Sample
    loss: float  # mean over the sequences, nats per token
    means: Mapping[str, Tensor]
    mean_squares: Mapping[str, Tensor]
    file: Any = None  # that holds them, if they are in one

    def first(self, block: int) -> dict[str, Tensor]:
        """The mean gradient of every weight of a block, under its name without the block's prefix."""
        return of_block(self.means, block)

    def squares(self, block: int) -> dict[str, Tensor]:
        """The mean over sequences of the squared gradient of every weight of a block."""
        return of_block(self.mean_squares, block)


def of_block(tensors: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """The tensors of one block, without its prefix."""
    head = layout.prefix(block)
    return {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}


def gradients(  # noqa: PLR0913
    opened: Opened,
    ids: Tensor,
    sample: Sample,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Gradients:
    """Run the sample's sequences through the decoder and back.

    Raises NumericalFailure where the loss or a gradient is not finite.
    """
    rows = ids[: sample.sequences, : sample.length]
    config = opened.config
    stored = [layout.shapes(config, block) for block in range(config.num_hidden_layers)]
    shapes = {name: shape for one in stored for name, shape in one.items() if not name.endswith("_index")}
    both, file = allocated((2, sum(prod(shape) for shape in shapes.values())), dtype, scratch)
    means, mean_squares = (dict(views(flat, shapes)) for flat in both)
    with torch.inference_mode(False), torch.enable_grad():
        way = Backward(opened, rows, device=device, dtype=dtype, scratch=scratch, progress=progress)
        for block in way.backwards():
            module = way.module(block)
            named = {layout.prefix(block) + name: one for name, one in module.named_parameters()}
            sums = {name: torch.zeros(2, *one.shape, dtype=dtype, device=device) for name, one in named.items()}
            for number in range(len(rows)):
                slopes = way.back(module, block, slice(number, number + 1), named.values)
                for name, slope in zip(named, slopes, strict=True):
                    check_finite(f"the gradient of {name}", slope, number)
                    sums[name][0] += slope / len(rows)
                    sums[name][1] += slope.square() / len(rows)
            for name, (mean, mean_square) in sums.items():
                means[name].copy_(mean)
                mean_squares[name].copy_(mean_square)
    return Gradients(sample, sum(way.losses) / len(rows), means, mean_squares, file)


def views(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """One tensor cut into named ones."""
    pieces = flat.split([prod(shape) for shape in shapes.values()])
    for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
        yield name, piece.view(shape)


class Backward:
    """Every sequence's loss, and its gradient carried back through the decoder one block at a time.

    `losses` are in nats per token. With a generator, labels are drawn from the model's own predictions.
    """

    def __init__(  # noqa: PLR0913
        self,
        opened: Opened,
        rows: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path | None = None,
        progress: Progress | None = None,
        labels: torch.Generator | None = None,
    ) -> None:
        self.opened, self.progress, self.blocks = opened, progress, opened.config.num_hidden_layers
        self.stream = Stream(opened.config, rows, device=device, dtype=dtype, scratch=scratch)
        self.before, self.file = allocated((self.blocks, *self.stream.hidden.shape), dtype, scratch)
        with torch.no_grad():
            self.stream.start(opened.read("stem", dtype), None, normed=True)
            for block in range(self.blocks):
                self.before[block].copy_(self.stream.hidden)
                self.stream.push(block, opened.read(block, dtype))
                if progress is not None:
                    progress("gradients", (block + 1) / (3 * self.blocks))
        model = assembled(opened, ("stem", "head"), device, dtype).requires_grad_(requires_grad=False)
        self.losses = [self.ended(model, number, labels) for number in range(len(rows))]

    def ended(self, model: MicrotomeForCausalLM, number: int, labels: torch.Generator | None) -> float:
        """The loss of one sequence; its gradient takes the place of the stream behind the last block."""
        stream, wide = self.stream, self.opened.config.hidden_size
        x_TD, ids_T = stream.hidden[number, :, :wide].to(stream.device), stream.ids[number].to(stream.device)
        count, slope_TD, loss = len(ids_T) - 1, torch.zeros_like(x_TD), 0.0
        size = max(1, LOGITS // self.opened.config.vocab_size)
        for start in range(0, count, size):
            some = slice(start, min(start + size, count))
            z_TD = x_TD[some].detach().requires_grad_()
            logits_TV = model.head(z_TD if model.model.norm is None else model.model.norm(z_TD))
            logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
            wanted_T = ids_T[1:][some] if labels is None else drawn(logits_TV.detach(), labels)
            part = torch.nn.functional.cross_entropy(logits_TV, wanted_T, reduction="sum") / count
            (slope_TD[some],) = torch.autograd.grad(part, z_TD)
            loss += float(part.detach())
        check_finite("the loss", torch.tensor(loss), number)
        stream.hidden[number, :, :wide] = slope_TD
        return loss

    def module(self, block: int) -> MicrotomeBlock:
        """A block, ready to run."""
        return self.stream.module(block, self.opened.read(block, self.stream.dtype, check=False), HALVES)

    def batches(self) -> Iterator[slice]:
        """All sequences, as many at a time as go through a block together."""
        for start in range(0, self.stream.rows, self.stream.batch):
            yield slice(start, min(start + self.stream.batch, self.stream.rows))

    def back(
        self, module: MicrotomeBlock, block: int, rows: slice, wanted: Callable[[], Iterable[Tensor]]
    ) -> list[Tensor]:
        """Run a block again and carry the gradients of some sequences through it.

        Returned are those of the tensors that `wanted` names once the block has run, summed over the sequences. Blocks
        come last to first, and every sequence once.
        """
        stream, config = self.stream, self.opened.config
        wide = layout.residual_width(config, layout.junction(config, block, "in"))
        x = self.before[block, rows, :, :wide].to(stream.device).requires_grad_()
        y = module(x, **stream.beside(block))
        slope = stream.hidden[rows, :, : y.shape[-1]].to(stream.device, copy=True)  # it is returned, too, as it is
        first, *found = torch.autograd.grad(y, [x, *wanted()], slope)
        stream.hidden[rows, :, :wide] = first
        return found

    def backwards(self) -> Iterator[int]:
        """All blocks from the last to the first, told of when they are done; then memory and files are given back."""
        for block in reversed(range(self.blocks)):
            yield block
            if self.progress is not None:
                self.progress("gradients", 1.0 - 2.0 * block / (3 * self.blocks))
        self.before = torch.empty(0)
        self.stream.close()
        if self.file is not None:
            self.file.close()


def drawn(logits_TV: Tensor, generator: torch.Generator) -> Tensor:
    """A token for every position [T], drawn from the predictions."""
    sums_TV = logits_TV.softmax(-1).cumsum(-1)
    uniform_T = torch.rand(len(sums_TV), generator=generator, dtype=torch.float64).to(sums_TV)
    return torch.searchsorted(sums_TV, (uniform_T * sums_TV[:, -1])[:, None])[:, 0].clamp_max(sums_TV.shape[1] - 1)


def assembled(opened: Opened, parts: Iterable[Part], device: torch.device, dtype: torch.dtype) -> MicrotomeForCausalLM:
    """The canonical decoder with the weights of some parts; the others hold none."""
    config = copy(opened.config)
    # How attention is computed is an attribute that transformers keeps off the config's own fields.
    setattr(config, "_attn_implementation", attention_of(config))  # noqa: B010
    with torch.device("meta"):
        model = MicrotomeForCausalLM(config).eval()
    for part in parts:
        tensors = opened.read(part)
        floating = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }
        model.load_state_dict(floating, strict=False, assign=True)
    model.tie_weights()
    return model


def decoder(opened: Opened, device: torch.device, dtype: torch.dtype) -> MicrotomeForCausalLM:
    """The whole canonical decoder with the weights of a checkpoint; those of the blocks want gradients."""
    model = assembled(opened, layout.parts(opened.config), device, dtype)
    for module in model.modules():
        if isinstance(module, MicrotomeRotary):  # frequencies are stored nowhere
            module.to_empty(device=device)
            turns, _ = module.frequencies()
            module.inv_freq.copy_(turns)
            module.original_inv_freq.copy_(turns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers."))
    return model


def check_finite(what: str, value: Tensor, number: int) -> None:
    """Say what stopped being a number, and on which sequence."""
    if not torch.isfinite(value.detach()).all():
        raise NumericalFailure(
            f"{what} is not finite on calibration sequence {number + 1}: the model overflows there, or its text holds "
            "what it cannot read. Check the weights with `microtome evaluate`, or give other --data."
        )
