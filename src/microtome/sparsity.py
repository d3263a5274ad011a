"""Which single weights are set to zero: how many, in which matrices, and the lowest by a score, at once or in a sweep.

A density is the fraction of the weights of the blocks' linears that stay; N:M keeps N of every M consecutive inputs of
each output. Letters: O outputs, I inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from microtome import grid, layout
from microtome.compensate import Choose, Columns, Rule, swept
from microtome.edit import Correct
from microtome.errors import BadInput
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Stat

READS = {  # the linears inside a block, and where what they read is measured
    "self_attn.q_proj": Stat.ATTENTION,
    "self_attn.k_proj": Stat.ATTENTION,
    "self_attn.v_proj": Stat.ATTENTION,
    "self_attn.o_proj": Stat.HEADS,
    "mlp.gate_proj": Stat.MLP,
    "mlp.up_proj": Stat.MLP,
    "mlp.down_proj": Stat.NEURONS,
}
SITES = frozenset(READS.values())
NO_PATTERN = "none"
Key = tuple[int, str]  # a linear: its block, and its name there


def linears(view: View) -> dict[str, Tensor]:
    """The weights [O, I] of the halves that a view shows, by name; of those whose inputs are known, if any are."""
    halves = {"attn": "self_attn", "mlp": "mlp"}
    shown = {halves[half] for half in view.halves}
    sites = [stat for stat in view.stats if stat in SITES]
    return {
        name: view.weights[f"{name}.weight"]
        for name, stat in READS.items()
        if f"{name}.weight" in view.weights and name.partition(".")[0] in shown and (not sites or stat in sites)
    }


def shapes(config: MicrotomeConfig) -> Iterator[tuple[int, str, tuple[int, int]]]:
    """Block, name and shape of every linear inside the blocks."""
    for block in range(config.num_hidden_layers):
        for full, shape in layout.shapes(config, block).items():
            name = full.removeprefix(layout.prefix(block)).removesuffix(".weight")
            if name in READS and len(shape) == 2:
                yield block, name, (shape[0], shape[1])


def nonzero(tensors: Iterable[Tensor]) -> int:
    """How many numbers are not zero; of a table of places all count."""
    return sum(int(one.count_nonzero()) if one.is_floating_point() else one.numel() for one in tensors)


def weights(config: MicrotomeConfig) -> int:
    """The number of weights of all linears inside the blocks."""
    return sum(prod(shape) for _, _, shape in shapes(config))


# --- in which order -------------------------------------------------------------------------------------------------


class Fed(Protocol):
    """A method with an option that says behind what matrices are measured."""

    @property
    def inputs(self) -> str:
        """Behind what is compressed already, linear by linear (stepwise), or in the original."""
        ...


def is_sequential(method: Fed) -> bool:
    """Whether halves are measured behind those that are sparse already."""
    return method.inputs != "original"


def is_stepwise(method: Fed) -> bool:
    """Whether linears are, too."""
    return method.inputs == "stepwise"


# --- how many -------------------------------------------------------------------------------------------------------


def pattern_of(method: str, pattern: str) -> tuple[int, int] | None:
    """N and M of "2:4": so many of every M stay; None for "none". Raises BadInput for anything else."""
    if pattern == NO_PATTERN:
        return None
    kept, _, size = pattern.partition(":")
    if kept.isdecimal() and size.isdecimal() and 1 <= int(kept) < int(size):
        return int(kept), int(size)
    raise BadInput(f"pattern={pattern} of {method} is no N:M: write 2:4 for 2 of every 4 weights that stay, or none.")


def check_density(method: str, density: float, pattern: str, default: float = 0.5) -> None:
    """Refuse a density outside (0, 1], and one that is not the pattern's."""
    if not 0.0 < density <= 1.0:
        raise BadInput(f"density={density} of {method} is outside (0, 1]: it is the fraction of weights that stay.")
    found = pattern_of(method, pattern)
    if found is not None and density not in (default, found[0] / found[1]):
        fact = f"pattern={pattern} of {method} is a density of {found[0] / found[1]:g}, not {density:g}"
        raise BadInput(f"{fact}: give one of the two.")


def check_pattern(config: MicrotomeConfig, method: str, pattern: str, block: int | None = None) -> None:
    """Refuse a linear whose inputs groups do not divide, and a sweep's `block` of columns that cuts groups."""
    found = pattern_of(method, pattern)
    if found is None:
        return
    for number, name, (_, columns) in shapes(config):
        if columns % found[1]:
            fact = f"pattern={pattern} of {method}: {layout.prefix(number)}{name}.weight reads {columns} numbers"
            raise BadInput(f"{fact}, which groups of {found[1]} do not divide. Give a density instead.")
    if block is not None and block % found[1]:
        raise BadInput(f"block={block} of {method} is no multiple of {found[1]}, as pattern={pattern} needs.")


def density_of(method: str, density: float, pattern: str) -> float:
    """The fraction of weights that stays."""
    found = pattern_of(method, pattern)
    return density if found is None else found[0] / found[1]


def told(density: float, pattern: str, bits: int = 0) -> str:
    """The dial in words."""
    dial = f"density {density:g}" if pattern == NO_PATTERN else f"pattern {pattern}"
    return f"{dial} at {bits} bits" if bits else dial


def gone(count: int, density: float) -> int:
    """How many of `count` weights are set to zero: the nearest number."""
    return count - round(density * count)


# --- which ----------------------------------------------------------------------------------------------------------


def lowest(score: Tensor, count: int) -> Tensor:
    """The `count` lowest of all scores, as a mask; ties go to the smaller index."""
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[torch.argsort(score.flatten(), stable=True)[:count]] = True
    return mask.view_as(score)


def lowest_of_rows(score_OI: Tensor, count: int) -> Tensor:
    """The `count` lowest scores of every row, as a mask [O, I]."""
    places = torch.argsort(score_OI, dim=1, stable=True)[:, :count]
    return torch.zeros_like(score_OI, dtype=torch.bool).scatter_(1, places, value=True)


def lowest_of_groups(score_OI: Tensor, pattern: tuple[int, int]) -> Tensor:
    """The scores of every group of M columns but its N highest, as a mask [O, I]."""
    kept, size = pattern
    grouped = score_OI.reshape(-1, size)
    return lowest_of_rows(grouped, size - kept).view_as(score_OI)


def shares(densities: Mapping[Any, float], sizes: Mapping[Any, int], total: int) -> dict[Any, int]:
    """Whole numbers of zeros for matrices of these sizes and densities, `total` in all, by largest remainder."""
    wanted = {key: (1.0 - densities[key]) * size for key, size in sizes.items()}
    counts = {key: int(want + 1e-9) for key, want in wanted.items()}
    by_rest = sorted(counts, key=lambda key: (counts[key] - wanted[key], str(key)))
    for key in by_rest[: total - sum(counts.values())]:
        counts[key] += 1
    return counts


class Cutting(Protocol):
    """A method that can be told how many weights of every matrix go."""

    def cut(self, view: View, counts: Mapping[Key, int]) -> list[Correct]:
        """New weights and biases of every matrix."""
        ...


@dataclass(frozen=True, eq=False)
class Counted:
    """A method that has seen all blocks, how many weights of every matrix go, and what it measures from now on."""

    method: Cutting
    counts: Mapping[Key, int]
    needs: frozenset[Stat]

    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.WEIGHTS})

    def solve(self, view: View) -> list[Correct]:
        """Every matrix of the view, each with its own number of zeros."""
        return self.method.cut(view, self.counts)


# --- in a sweep -----------------------------------------------------------------------------------------------------

Score = Callable[[Tensor, Columns, slice], Tensor]  # of weights [O, B] that stand at some columns of a sweep


def obs(weight_OB: Tensor, columns: Columns, at: slice) -> Tensor:
    """What it costs to set each weight to zero, the columns behind it making up for it: w^2 / U_cc^2."""
    return (weight_OB / columns.spread[at]).square()


def by_blocks(total: int, score: Score = obs) -> Choose:
    """Zeros for the lowest of every block's weights over all rows, `total` in the matrix, each block its share."""

    def choose(columns: Columns) -> Rule:
        size = columns.weight.shape[1]
        count = total * columns.stop // size - total * columns.start // size
        gone_OB = lowest(score(columns.here, columns, slice(columns.start, columns.stop)), count)
        return lambda column: columns.weight[:, column].masked_fill(gone_OB[:, column - columns.start], 0.0)

    return choose


def by_groups(pattern: tuple[int, int], score: Score = obs) -> Choose:
    """Zeros for all but the N highest of M weights, chosen when the sweep comes to the first of them."""
    size = pattern[1]

    def choose(columns: Columns) -> Rule:
        masks: dict[int, Tensor] = {}

        def rule(column: int) -> Tensor:
            first = column // size * size
            if first not in masks:
                at = slice(first, first + size)
                masks[first] = lowest_of_groups(score(columns.weight[:, at], columns, at), pattern)
            return columns.weight[:, column].masked_fill(masks[first][:, column - first], 0.0)

        return rule

    return choose


def sweep(view: View, chooser: Callable[[str, Tensor], Choose], *, block: int, damping: float) -> list[Correct]:
    """Every matrix of a view swept: `chooser` says, by name and weight, what is asked at every block of its columns."""
    edits: list[Correct] = []
    for name, weight_OI in linears(view).items():
        moment = view.moment(READS[name])
        moment.check(f"{READS[name].value} of block {view.block}", weight_OI.shape[1])
        done = swept(weight_OI, moment.mean_NN, chooser(name, weight_OI), block=block, damping=damping)
        edits.append(Correct(view.full(f"{name}.weight"), done.weight))
    return edits


def rounded(mask: Choose, weight_OI: Tensor, bits: int, group: int) -> Choose:
    """The same choice, with what stays rounded to the grids of the matrix as it was: zeros lie on them.

    A grid serves `group` columns of a row, or all of them where it is 0.
    """
    wide = group or weight_OI.shape[1]
    grids = [grid.fit(piece_OG, bits) for piece_OG in weight_OI.split(wide, dim=1)]

    def choose(columns: Columns) -> Rule:
        kept = mask(columns)
        return lambda column: grid.round_to(grids[column // wide], kept(column)[:, None])[:, 0]

    return choose


def check_sweep(method: str, damping: float, block: int) -> None:
    """Refuse a damping below zero and blocks without columns."""
    if not 0.0 <= damping < float("inf"):
        raise BadInput(f"damping={damping} of {method} is no number from 0 on.")
    if block < 1:
        raise BadInput(f"block={block} of {method} is no number of columns.")


def check_grid(method: str, bits: int, group: int) -> None:
    """Refuse bits that no grid has, and groups without columns or without bits."""
    if bits:
        grid.check_bits(bits)
    if group < 0 or (group and not bits):
        raise BadInput(f"group={group} of {method} is the number of columns that share a grid: it needs bits, too.")
