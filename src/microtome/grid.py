"""Grids: the few values that a quantised weight may have, evenly spaced, zero always among them.

    value = (code - zero) * scale,     code in 0 .. 2^bits - 1

Every row has a grid of its own, over all its columns or over a group of them. Letters: O rows, G columns of a group.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microtome.errors import BadInput

MOST_BITS = 16


@dataclass(frozen=True, eq=False)
class Grid:
    """One grid for each row: `scale` and `zero` [O, 1], the distance of two values and the code of zero."""

    bits: int
    scale: Tensor
    zero: Tensor

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def stored_as(self, dtype: torch.dtype) -> "Grid":
        """The grid whose scales can be stored in a shorter type."""
        return replace(self, scale=self.scale.to(dtype).to(self.scale))


@dataclass(frozen=True)
class Coding:
    """How weights are put in codes: bits of each, columns of a group (0: whole rows), and whether zero lies midway."""

    bits: int
    group: int = 0
    symmetric: bool = False

    def groups(self, columns: int) -> int:
        """How many grids every row has."""
        return -(-columns // self.group) if self.group else 1

    @property
    def told(self) -> str:
        """In words: "4 bits in groups of 128"."""
        return (
            f"{self.bits} bits in groups of {self.group}" if self.group else f"{self.bits} bits, a scale for each row"
        )


def fit(weight_OG: Tensor, bits: int, *, symmetric: bool = False) -> Grid:
    """The grid from the smallest to the largest weight of each row, zero included.

    A symmetric one has zero in its middle, at code 2^(bits - 1): it reaches as far on both sides, and its largest value
    lies half a step below the largest weight. A row of zeros gets a grid of distance 1. Raises BadInput for bits.
    """
    check_bits(bits)
    low_O1 = weight_OG.amin(1, keepdim=True).clamp_max(0)
    high_O1 = weight_OG.amax(1, keepdim=True).clamp_min(0)
    if symmetric:
        high_O1 = torch.maximum(high_O1, -low_O1)
        low_O1 = -high_O1
    span_O1 = (high_O1 - low_O1) / (2**bits - 1)
    scale_O1 = torch.where(span_O1 > 0, span_O1, torch.ones_like(span_O1))
    middle = torch.full_like(scale_O1, 2 ** (bits - 1))
    return Grid(bits, scale_O1, middle if symmetric else (-low_O1 / scale_O1).round())


def check_bits(bits: int) -> None:
    """Refuse fewer than two bits, and more than a weight has to give."""
    if not 2 <= bits <= MOST_BITS:
        raise BadInput(f"bits={bits} is no number of bits from 2 to {MOST_BITS}.")


def codes(grid: Grid, weight_OG: Tensor) -> Tensor:
    """The code of the nearest value of every weight, int32 [O, G]."""
    return (weight_OG / grid.scale + grid.zero).round().clamp(0, grid.top).int()


def values(grid: Grid, codes_OG: Tensor) -> Tensor:
    """What codes stand for [O, G], in the type of the scales."""
    return (codes_OG - grid.zero) * grid.scale


def round_to(grid: Grid, weight_OG: Tensor) -> Tensor:
    """Every weight at the nearest value of its row's grid; zeros stay exactly zero."""
    return values(grid, codes(grid, weight_OG))
