"""How the loss bends around the weights: Kronecker factors of Fisher's information, for every linear of every block.

A linear reads a and writes W a + b; g is the gradient of a sequence's mean loss in what it writes. Fisher's matrix of
(W, b) is E[(g x z)(g x z)^T] with z = (a, 1), and is taken for G x A, G = E[g g^T] and A = E[z z^T], as if the two were
independent, tokens too (K-FAC: Martens and Grosse, arXiv:1503.05671). Blocks are visited one at a time, from the last
to the first (`gradients.Backward`); the factors of a block that memory has no room for lie in a file.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from microtome import layout
from microtome.calibrate import Progress, allocated, submodule
from microtome.gradients import Backward, check_finite, views
from microtome.modeling_microtome import MicrotomeConfig
from microtome.planner import Opened
from microtome.sparsity import READS
from microtome.sparsity import shapes as linears
from microtome.stats import Curvature, Fisher, Moment, Stat


def factors(  # noqa: PLR0913
    opened: Opened,
    ids: Tensor,
    how: Curvature,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> dict[tuple[int, Stat], Fisher]:
    """The factors of every block, on the first tokens of the first rows of `ids` [N, T].

    Raises NumericalFailure where the loss or a gradient is not finite.
    """
    rows = ids[: how.sample.sequences, : how.sample.length]
    labels = torch.Generator().manual_seed(how.seed) if how.labels == "model" else None
    found: dict[tuple[int, Stat], Fisher] = {}
    with torch.inference_mode(False), torch.enable_grad():
        way = Backward(opened, rows, device=device, dtype=dtype, scratch=scratch, progress=progress, labels=labels)
        for block in reversed(range(opened.config.num_hidden_layers)):
            found[block, Stat.FISHER] = of_block(way, block, how, scratch)
            way.report(block)
        way.close()
    return found


def of_block(way: Backward, block: int, how: Curvature, scratch: Path | None) -> Fisher:
    """Carry all sequences back through one block, and sum up what its linears read and what comes back to them."""
    module = way.module(block).requires_grad_(requires_grad=False)
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    inputs, outputs = dict[Stat, Moment](), dict[str, Moment]()
    for name, stat in READS.items():
        linear = submodule(module, name)
        if isinstance(linear, torch.nn.Linear):
            inputs.setdefault(stat, Moment(linear.in_features, way.stream.device))
            outputs[name] = Moment(linear.out_features, way.stream.device)
            linear.register_forward_hook(noting(read, written, name))
    for rows in way.batches():
        slopes = way.back(module, block, rows, written.values)
        sites = {READS[name]: x for name, x in read.items()}
        for stat, x in sites.items():
            inputs[stat].add(x)
        for name, slope in zip(list(written), slopes, strict=True):
            for number, one in enumerate(slope, rows.start):
                check_finite(f"the gradient of what {layout.prefix(block)}{name} writes", one, number)
            outputs[name].add(slope)
    shapes: dict[str, tuple[int, ...]] = {stat.value: (len(one.sum_N) + 1,) * 2 for stat, one in inputs.items()}
    shapes |= {name: (len(one.sum_N),) * 2 for name, one in outputs.items()}
    flat, file = allocated((sum(prod(shape) for shape in shapes.values()),), torch.float32, scratch)
    kept = dict(views(flat, shapes))
    for stat, moment in inputs.items():
        kept[stat.value].copy_(moment.with_one)
    for name, moment in outputs.items():
        kept[name].copy_(moment.mean_NN)
    return Fisher({stat: kept[stat.value] for stat in inputs}, {name: kept[name] for name in outputs}, how, file)


def numbers(config: MicrotomeConfig, block: int) -> int:
    """How many numbers the factors of one block are."""
    shapes = {name: shape for number, name, shape in linears(config) if number == block}
    inputs = {READS[name]: columns for name, (_, columns) in shapes.items()}
    return sum((wide + 1) ** 2 for wide in inputs.values()) + sum(rows**2 for rows, _ in shapes.values())


def noting(
    read: dict[str, Tensor], written: dict[str, Tensor], name: str
) -> Callable[[torch.nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that remembers what a linear has just read and written."""

    def hook(_module: torch.nn.Module, seen: tuple[Tensor, ...], out: Tensor) -> None:
        read[name], written[name] = seen[0].detach(), out

    return hook
