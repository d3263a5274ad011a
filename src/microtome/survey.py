"""One pass over the uncut decoder that measures every block, and keeps what it measured for the next method.

A second method on the same model and text reads the sums from the cache instead of measuring (`cache`). Where all of
them together are too large for memory they are in a file (`Shelf`), from which a block's are read when it is cut.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import cache as cache_files
from microtome import layout
from microtome.calibrate import Progress, Stream, allocated
from microtome.errors import NumericalFailure
from microtome.gradients import Gradients
from microtome.planner import Opened
from microtome.stats import INFLUENCES, SITES, Fisher, Influence, Masks, Moment, Stat

Key = tuple[int, Stat]
Measured = Moment | Influence | Masks | Fisher
MEASURED = frozenset({*SITES, *INFLUENCES})


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was measured, by block and site."""

    found: dict[Key, Measured] = field(default_factory=dict[Key, Measured])
    gradients: Gradients | None = None

    def of(self, block: int, wanted: frozenset[Stat]) -> dict[Stat, Measured]:
        """What is known of one block; a half that it lacks has no sums."""
        return {stat: self.found[block, stat] for stat in sorted(wanted) if (block, stat) in self.found}

    def influences(self, blocks: int) -> list[float]:
        """The influence of every block."""
        values = [self.found[block, Stat.INFLUENCE] for block in range(blocks)]
        return [value.mean for value in values if isinstance(value, Influence)]


def width(config: Any, block: int, stat: Stat) -> int:
    """How many numbers a site has in one block; 0 where the block lacks the half."""
    sizes = config.per_layer_config[block]
    if layout.skips(sizes, SITES[stat].partition(".")[0]):
        return 0
    weight = layout.shapes(config, block)[f"{layout.prefix(block)}{SITES[stat]}.weight"]
    return weight[1]


@torch.inference_mode()
def survey(  # noqa: PLR0913 - what is measured, of what, and how
    opened: Opened,
    ids: Tensor,
    wanted: frozenset[Stat],
    *,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Statistics:
    """Measure the wanted sites of every block in one pass; what the cache holds is not measured again."""
    config, blocks = opened.config, range(opened.config.num_hidden_layers)
    wanted &= MEASURED
    folder = None if cache is None else cache / key(opened, ids, device, dtype)
    shelf = Shelf(config, wanted, scratch)
    done = {key: shelf.kept(key, value) for key, value in read(folder, config, wanted)}
    missing = frozenset(
        stat for stat in wanted if any((block, stat) not in done for block in blocks if has(config, block, stat))
    )
    if not missing:
        return Statistics(done)
    stream = Stream(config, ids, device=device, dtype=dtype, scratch=scratch, progress=progress)
    stream.start(opened.read("stem", dtype), None, normed=True)
    for block in blocks:
        mine = measured(stream, block, opened.read(block, dtype), missing)
        if folder is not None:
            write(folder, block, mine)
        done |= {(block, stat): shelf.kept((block, stat), value) for stat, value in mine.items()}
    stream.close()
    return Statistics(done)


def measured(
    stream: Stream, block: int, tensors: Mapping[str, Tensor], wanted: frozenset[Stat]
) -> dict[Stat, Moment | Influence]:
    """Push the stream past a block, and what it did on the way."""
    config = stream.config
    moments = {
        stat: Moment(width(config, block, stat), stream.device)
        for stat in wanted
        if has(config, block, stat) and stat in SITES
    }
    influences = {stat: Influence() for stat in wanted if stat in INFLUENCES and has(config, block, stat)}
    across = {INFLUENCES[stat]: influence.add for stat, influence in influences.items()}
    taps = {SITES[stat]: moment.add for stat, moment in moments.items()}
    whole = ("attn", "mlp")
    if set(across) <= {whole}:
        stream.push(block, tensors, taps=taps, across=across.get(whole))
    else:
        if whole in across:
            stream.push(block, tensors, across=across[whole], keep=False)
        for half in whole:
            stream.push(block, tensors, (half,), taps, across.get((half,)))
    for stat, moment in moments.items():
        check_finite(moment, stat, block)
    if not all(math.isfinite(influence.sum) for influence in influences.values()):
        raise NumericalFailure(f"the stream is not finite behind block {block}. Try --dtype float32.")
    return moments | influences


class Shelf:
    """Room for the sums of all blocks, in memory or in a file that is gone when nobody refers to them any more."""

    def __init__(self, config: Any, wanted: frozenset[Stat], scratch: Path | None) -> None:
        self.at: dict[Key, int] = {}
        total = 0
        for block in range(config.num_hidden_layers):
            for stat in wanted & frozenset(SITES):
                self.at[block, stat] = total
                total += width(config, block, stat) ** 2
        self.flat, file = allocated((total,), torch.float64, scratch if total else None, "sums")
        if file is not None:
            file.close()  # its name goes now; what is mapped stays

    def kept(self, key: Key, value: Measured) -> Measured:
        """What was measured at a place, its sums on the shelf."""
        if not isinstance(value, Moment):
            return value
        size = len(value.sum_N)
        return value.kept(self.flat[self.at[key] :][: size * size].view(size, size))


def has(config: Any, block: int, stat: Stat) -> bool:
    """Whether a block has a site."""
    if stat not in INFLUENCES:
        return width(config, block, stat) > 0
    modules = {"attn": "self_attn", "mlp": "mlp"}
    return stat is Stat.INFLUENCE or not layout.skips(config.per_layer_config[block], modules[INFLUENCES[stat][0]])


def check_finite(moment: Moment, stat: Stat, block: int) -> None:
    """Say in which block the activations stopped being numbers."""
    if not moment.is_finite:
        raise NumericalFailure(
            f"activations in block {block} are not finite (what {SITES[stat]} reads): the model overflows there. "
            "Try --dtype float32."
        )


# --- the cache ------------------------------------------------------------------------------------------------------


def key(opened: Opened, ids: Tensor, device: torch.device, dtype: torch.dtype) -> str:
    """A folder name for one model, one text and one precision."""
    return cache_files.key(opened.source.digest(), ids, device, dtype)


def place(folder: Path, block: int, stat: Stat) -> Path:
    """The file of one site of one block."""
    return folder / f"block-{block:03d}-{stat.value}.safetensors"


def read(folder: Path | None, config: Any, wanted: frozenset[Stat]) -> Iterator[tuple[Key, Measured]]:
    """What the cache holds, one after the other; a file that cannot be read is measured again."""
    for block in range(config.num_hidden_layers) if folder is not None else ():
        for stat in wanted:
            value = cache_files.read(place(folder or Path(), block, stat))
            if value is not None:
                yield (block, stat), value


def write(folder: Path, block: int, values: Mapping[Stat, Moment | Influence]) -> None:
    """Keep what was measured of a block."""
    for stat, value in values.items():
        cache_files.write(place(folder, block, stat), value)
