"""GPTQ: round the weights to a few bits, column by column, and let those behind make up for what rounding costs.

Frantar et al., ICLR 2023 (arXiv:2210.17323). The linears inside the blocks keep their shapes, embeddings and head their
numbers. With H = E[x x^T] of what a matrix reads and U the upper factor of its inverse, H^-1 = U^T U, column by column:

    code = clamp(round(w_c / s + z), 0, 2^bits - 1),   w'_c = (code - z) s      (s, z: of the row, or of a group in it)
    e = (w_c - w'_c) / U_cc,   W_:j -= e U_cj    for j > c

What is written are the codes, packed into words, with their scales. It is a step for the end: behind any cut, on sums
of the cut model.

What is done differently from the release, and the option that gives the release's way back:

* Every half is measured behind all that is quantised already, as with `true_sequential` and a half for a step.
  `inputs=stepwise` measures each linear behind those of its half before it, `inputs=original` the model as it was.
* Grids have zero in their middle, which every engine's fast kernels take. The release's go from the smallest to the
  largest weight (`symmetric=false`).
* Grids of groups are made when the sweep comes to the group, from its weights as they are by then; the release takes
  what they were before the sweep's block of 128 columns. `grids=static` makes all of them before the sweep.
* `order=energy` takes the columns whose inputs are largest first. Its grids are static, so that the groups on disk are
  of neighbours, and no engine has to look columns up.
* Scales are rounded to the type that they are stored in before the sweep, not behind it.
* Inputs that are always zero are no special case: with the damping on its diagonal, H makes them the cheapest. The
  release sets their columns to zero.
* Weights that are zero stay zero, for models with zeros in them; every grid contains zero. `keep_zeros=false` lets them
  move with the others.
* `search=true` looks for the range of each grid that rounds best (mean error to the power of 2.4), as the release's
  `mse` does: 80 ranges from the whole down to a fifth of it.
* `sweep=false` rounds every weight to the nearest value and makes up for nothing: the baseline. It needs no text.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import grid, layout, sparsity
from microtome.compensate import Columns, Rule, swept
from microtome.edit import Quantise
from microtome.errors import BadInput
from microtome.grid import Coding, Grid
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Stat

NAME = "gptq"
MOST_BITS = 8  # that the formats of files hold
LEAST_GROUP = 8  # that is worth its scales
RANGES, POWER = tuple(1.0 - step / 100 for step in range(80)), 2.4


@dataclass(frozen=True)
class GPTQ:
    """Options of GPTQ; see the head of this file."""

    bits: int = 4
    group: int = 0
    symmetric: bool = True
    order: Literal["given", "energy"] = "given"
    grids: Literal["auto", "static", "current"] = "auto"
    search: bool = False
    keep_zeros: bool = True
    sweep: bool = True
    damping: float = 0.01
    block: int = 128
    inputs: Literal["compressed", "stepwise", "original"] = "compressed"
    store: Literal["auto", "compressed-tensors", "gptq", "dense"] = "auto"

    dial: ClassVar[str] = "bits"
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.WEIGHTS})
    idle: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Stat]:
        """What arrives, unless weights are rounded one by one."""
        return sparsity.SITES if self.sweep else frozenset()

    @property
    def sequential(self) -> bool:
        """Whether halves are measured behind those that are quantised already."""
        return self.sweep and self.inputs != "original"

    @property
    def stepwise(self) -> bool:
        """Whether linears are, too."""
        return self.sweep and self.inputs == "stepwise"

    @property
    def static(self) -> bool:
        """Whether all grids are made before the sweep."""
        return not self.sweep or self.order == "energy" or self.grids == "static" or not self.group

    @property
    def coding(self) -> Coding:
        """How weights are put in codes."""
        return Coding(self.bits, max(self.group, 0), self.symmetric)

    @property
    def told(self) -> str:
        """The dial in words."""
        return self.coding.told

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse bits that no file holds, groups that do not divide a matrix, and options that do not go together."""
        if not 2 <= self.bits <= MOST_BITS:
            raise BadInput(f"bits={self.bits} of gptq is no number of bits from 2 to {MOST_BITS}.")
        if self.group < -1:
            raise BadInput(f"group={self.group} of gptq is the number of columns that share a grid; 0 is a whole row.")
        if self.order == "energy" and self.grids == "current":
            raise BadInput("order=energy of gptq needs grids=static: its groups are not swept one after the other.")
        sparsity.check_sweep(NAME, self.damping, self.block)
        if self.coding.group:
            check_groups(config, self.group)

    def zeros(self, config: MicrotomeConfig) -> int:
        """None are what it is after."""
        return 0

    def solve(self, view: View) -> list[Quantise]:
        """The codes of every matrix of the view."""
        return [self.quantised(view, name, weight_OI) for name, weight_OI in sparsity.linears(view).items()]

    def quantised(self, view: View, name: str, weight_OI: Tensor) -> Quantise:
        """The codes of one matrix, and its grids."""
        codes = Codes(self, weight_OI, torch.float16 if self.store == "gptq" else view.dtype)
        if self.sweep:
            moment = view.moment(sparsity.READS[name])
            moment.check(f"{sparsity.READS[name].value} of block {view.block}", weight_OI.shape[1])
            hessian_II = moment.mean_NN
            order_I = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
            order = order_I if self.order == "energy" else None
            block = -(-self.block // codes.wide) * codes.wide if self.group > 0 else self.block  # whole groups
            swept(weight_OI, hessian_II, codes.choose, block=block, damping=self.damping, order=order)
        else:
            for column in range(weight_OI.shape[1]):
                codes.rounded(weight_OI[:, column], column)
        scale_OG, zero_OG = (torch.cat([getattr(one, what) for one in codes.made], 1) for what in ("scale", "zero"))
        return Quantise(view.full(f"{name}.weight"), codes.codes_OI, scale_OG, zero_OG.to(torch.uint8), self.coding)


class Codes:
    """The codes of one matrix in the making, and the grids of its groups."""

    def __init__(self, method: GPTQ, weight_OI: Tensor, dtype: torch.dtype) -> None:
        self.method, self.dtype = method, dtype
        self.wide = method.coding.group or weight_OI.shape[1]
        self.codes_OI = torch.zeros(weight_OI.shape, dtype=torch.uint8)
        self.zero_OI = (weight_OI == 0) & method.keep_zeros
        self.made = [self.grid(one) for one in weight_OI.split(self.wide, 1)] if method.static else list[Grid]()

    def grid(self, weight_OG: Tensor) -> Grid:
        """The grid of a group, with scales as they are stored."""
        bits, symmetric = self.method.bits, self.method.symmetric
        if self.method.search:
            return best(weight_OG, bits, symmetric=symmetric, dtype=self.dtype)
        return grid.fit(weight_OG, bits, symmetric=symmetric).stored_as(self.dtype)

    def choose(self, columns: Columns) -> Rule:
        """What the sweep asks at every block."""

        def rule(place: int) -> Tensor:
            if not self.method.static and place % self.wide == 0:
                self.made.append(self.grid(columns.weight[:, place : place + self.wide]))
            return self.rounded(columns.weight[:, place], int(columns.order[place]))

        return rule

    def rounded(self, weight_O: Tensor, column: int) -> Tensor:
        """A column's nearest values; their codes are noted."""
        mine = self.made[column // self.wide]
        code_O1 = grid.codes(mine, weight_O.masked_fill(self.zero_OI[:, column], 0.0)[:, None])
        self.codes_OI[:, column] = code_O1[:, 0].to(torch.uint8)
        return grid.values(mine, code_O1)[:, 0]


def check_groups(config: MicrotomeConfig, group: int) -> None:
    """Refuse a group that does not divide the inputs of every matrix."""
    inputs = {f"{layout.prefix(block)}{name}": size for block, name, (_, size) in sparsity.shapes(config)}
    odd = next((name for name, size in inputs.items() if size % group), None)
    if odd is not None:
        most = math.gcd(*inputs.values(), 128)
        fit = f"group={most}, or group=0" if most >= LEAST_GROUP else "group=0"
        raise BadInput(
            f"group={group} of gptq does not divide the {inputs[odd]} inputs of {odd}: give {fit}, a grid for each row."
        )


def best(weight_OG: Tensor, bits: int, *, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid of each row that rounds its weights best, of those over a part of their range."""
    found, least_O = None, torch.full((len(weight_OG),), torch.inf, dtype=weight_OG.dtype)
    for part in RANGES:
        one = grid.fit(part * weight_OG, bits, symmetric=symmetric).stored_as(dtype)
        error_O = (grid.round_to(one, weight_OG) - weight_OG).abs().pow(POWER).sum(1)
        better_O1 = (error_O < least_O)[:, None]
        least_O = torch.minimum(error_O, least_O)
        found = (
            one
            if found is None
            else Grid(
                bits, torch.where(better_O1, one.scale, found.scale), torch.where(better_O1, one.zero, found.zero)
            )
        )
    assert found is not None
    return found


METHOD = GPTQ
