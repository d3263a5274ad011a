"""How the loss bends around the weights: Kronecker factors of Fisher's information, for every linear of every block.

A linear reads a and writes W a + b; g is the gradient of a sequence's mean loss in what it writes. Fisher's matrix of
(W, b) is E[(g x z)(g x z)^T] with z = (a, 1), and is taken for G x A, G = E[g g^T] and A = E[z z^T], as if the two were
independent, tokens too (K-FAC: Martens and Grosse, arXiv:1503.05671). Blocks are visited one at a time, from the last
to the first (`gradients.Backward`); the factors of a block that memory has no room for lie in a file. For a sum of two
products (`pairs`) the tokens of one block are kept, in memory or in a file, until its factors are fitted to them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from microtome import layout, pairs
from microtome.calibrate import Progress, allocated, submodule
from microtome.errors import BadInput
from microtome.gradients import Backward, check_finite, views
from microtome.linalg import check_squares
from microtome.modeling_microtome import MicrotomeBlock, MicrotomeConfig
from microtome.planner import Opened
from microtome.sparsity import READS
from microtome.sparsity import shapes as linears_of
from microtome.stats import Curvature, Fisher, Moment, Stat

Seen = tuple[slice, Mapping[Stat, Tensor], Mapping[str, Tensor]]  # rows, what linears read, what came back to them


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
        for block in way.backwards():
            found[block, Stat.FISHER] = of_block(way, block, how, scratch)
    return found


def of_block(way: Backward, block: int, how: Curvature, scratch: Path | None) -> Fisher:
    """Carry all sequences back through one block, and sum up what its linears read and what comes back to them."""
    module = way.module(block).requires_grad_(requires_grad=False)
    linears = {name: one for name in READS if isinstance(one := submodule(module, name), torch.nn.Linear)}
    seen = passed(way, module, block, linears)
    if how.rank == 2:
        return of_two(way, block, linears, seen, how, scratch)
    inputs, outputs = dict[Stat, Moment](), dict[str, Moment]()
    for name, linear in linears.items():
        inputs.setdefault(READS[name], Moment(linear.in_features, way.stream.device))
        outputs[name] = Moment(linear.out_features, way.stream.device)
    for _, sites, slopes in seen:
        for stat, x in sites.items():
            inputs[stat].add(x)
        for name, slope in slopes.items():
            outputs[name].add(slope)
    for stat, moment in inputs.items():
        moment.check(f"{stat.value} of block {block}", 0)
    for name, moment in outputs.items():
        check_squares(f"what {layout.prefix(block)}{name} writes", moment.upper_NN)
    shapes: dict[str, tuple[int, ...]] = {stat.value: (len(one.sum_N) + 1,) * 2 for stat, one in inputs.items()}
    shapes |= {name: (len(one.sum_N),) * 2 for name, one in outputs.items()}
    flat, file = allocated((sum(prod(shape) for shape in shapes.values()),), torch.float32, scratch)
    kept = dict(views(flat, shapes))
    for stat, moment in inputs.items():
        kept[stat.value].copy_(moment.with_one)
    for name, moment in outputs.items():
        kept[name].copy_(moment.mean_NN)
    return Fisher({stat: kept[stat.value] for stat in inputs}, {name: kept[name] for name in outputs}, how, file)


def passed(way: Backward, module: MicrotomeBlock, block: int, linears: Mapping[str, torch.nn.Linear]) -> Iterator[Seen]:
    """Carry sequences back through a block, some at a time: which ones, what its linears read, and what came back."""
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for name, linear in linears.items():
        linear.register_forward_hook(noting(read, written, name))
    for rows in way.batches():
        back = way.back(module, block, rows, written.values)
        slopes = dict(zip(list(written), back, strict=True))
        for name, slope in slopes.items():
            for number, one in enumerate(slope, rows.start):
                check_finite(f"the gradient of what {layout.prefix(block)}{name} writes", one, number)
        yield rows, {READS[name]: x for name, x in read.items()}, slopes


def of_two(
    way: Backward,
    block: int,
    linears: Mapping[str, torch.nn.Linear],
    seen: Iterable[Seen],
    how: Curvature,
    scratch: Path | None,
) -> Fisher:
    """Keep what all tokens bring to and from the linears of a block, and fit two products to each of these."""
    rows, length = way.stream.rows, way.stream.length
    wide = {READS[name]: linear.in_features for name, linear in linears.items()}
    widths = {stat.value: size for stat, size in wide.items()}
    widths |= {name: linear.out_features for name, linear in linears.items()}
    flat, tokens = allocated((sum(rows * length * size for size in widths.values()),), torch.float32, scratch)
    kept = dict(views(flat, {what: (rows, length, size) for what, size in widths.items()}))
    for some, sites, slopes in seen:
        for what, x in (*((stat.value, x) for stat, x in sites.items()), *slopes.items()):
            kept[what][some].copy_(x)
    sizes = sizes_of(way.opened.config, block)
    shapes = {f"{name}.{side}": (2, size, size) for name, both in sizes.items() for side, size in enumerate(both)}
    whole, file = allocated((sum(prod(shape) for shape in shapes.values()),), torch.float32, scratch)
    factors = dict(views(whole, shapes))
    for name, (_, size) in sizes.items():
        z_TI, g_TO = kept[READS[name].value].flatten(0, 1), kept[name].flatten(0, 1)
        if size > z_TI.shape[1]:
            z_TI = torch.cat([z_TI, torch.ones(len(z_TI), 1)], 1)
        for side, one in zip((1, 0), pairs.fitted(z_TI, g_TO), strict=True):
            factors[f"{name}.{side}"].copy_(one)
    if tokens is not None:
        tokens.close()
    return Fisher({}, {}, how, file, {name: (factors[f"{name}.1"], factors[f"{name}.0"]) for name in sizes})


def check_tokens(config: MicrotomeConfig, ids: Tensor, how: Curvature) -> None:
    """Refuse fewer tokens than the widest factor has rows: it would be singular, and damping alone would decide."""
    tokens = ids[: how.sample.sequences, : how.sample.length].numel()
    block, name, shape = max(linears_of(config), key=lambda one: max(one[2]))
    if tokens < max(shape):
        raise BadInput(
            f"{tokens} calibration tokens cannot span the {max(shape)} directions of a Kronecker factor of "
            f"{layout.prefix(block)}{name}. Give more text, or raise --samples, --length or the method's sequences."
        )


def numbers(config: MicrotomeConfig, block: int, rank: int = 1) -> int:
    """How many numbers the factors of one block are."""
    if rank == 2:
        return sum(2 * (columns**2 + rows**2) for rows, columns in sizes_of(config, block).values())
    shapes = {name: shape for number, name, shape in linears_of(config) if number == block}
    inputs = {READS[name]: columns for name, (_, columns) in shapes.items()}
    return sum((wide + 1) ** 2 for wide in inputs.values()) + sum(rows**2 for rows, _ in shapes.values())


def sizes_of(config: MicrotomeConfig, block: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linears of a block by name, with one more input where there is a bias."""
    stored, head = layout.shapes(config, block), layout.prefix(block)
    return {
        name: (rows, columns + (f"{head}{name}.bias" in stored))
        for number, name, (rows, columns) in linears_of(config)
        if number == block
    }


def tokens_of(config: MicrotomeConfig, block: int) -> int:
    """How many numbers of every token are kept until two products are fitted to a block."""
    sizes = {name: shape for number, name, shape in linears_of(config) if number == block}
    return sum({READS[name]: columns for name, (_, columns) in sizes.items()}.values()) + sum(
        rows for rows, _ in sizes.values()
    )


def noting(
    read: dict[str, Tensor], written: dict[str, Tensor], name: str
) -> Callable[[torch.nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that remembers what a linear has just read and written."""

    def hook(_module: torch.nn.Module, seen: tuple[Tensor, ...], out: Tensor) -> None:
        read[name], written[name] = seen[0].detach(), out

    return hook
