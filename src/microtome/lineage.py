"""How the coordinates of a cut decoder come from those of the uncut one, step by step.

Restoration asks for it: what the uncut decoder computes is a target only in the coordinates that are left.
"""

from dataclasses import dataclass, field

from torch import Tensor

from microtome import inner, layout
from microtome.inner import Narrowing
from microtome.modeling_microtome import MicrotomeConfig


@dataclass
class Made:
    """What one step has done to a decoder."""

    config: MicrotomeConfig  # before the step
    edits: dict[int, list[Narrowing]] = field(default_factory=dict[int, list[Narrowing]])  # of inner spaces, by block
    stream: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # maps [R, N] of the junctions, by space
    blocks: list[int] | None = None  # the blocks that are left; None: all

    def block(self, place: int) -> int:
        """Which block stands at a place after the step."""
        return place if self.blocks is None else self.blocks[place]

    def junction(self, number: int, blocks: int) -> int:
        """Which junction has a number after the step, when `blocks` are left; a dropped block's lie before the next."""
        if number == 2 * blocks:
            return 2 * self.config.num_hidden_layers
        return 2 * self.block(number // 2) + number % 2


@dataclass
class Lineage:
    """The steps since the uncut decoder, and the number of blocks that are left behind them."""

    steps: list[Made] = field(default_factory=list[Made])

    def blocks(self, left: int) -> list[int]:
        """Which blocks of the uncut decoder the `left` ones are."""
        return [self.path(block)[0] for block in range(left)]

    def path(self, block: int) -> list[int]:
        """The number of a block before each step, and after the last."""
        found = [block]
        for made in reversed(self.steps):
            found.insert(0, made.block(found[0]))
        return found

    def rows(self, wide_OT: Tensor, tensor: str, block: int) -> Tensor:
        """Outputs [O, T] of an uncut linear in what is left of its rows; `tensor` lacks the block's prefix."""
        out = wide_OT
        for made, number in zip(self.steps, self.path(block), strict=False):
            name = layout.prefix(number) + tensor
            for kind in inner.NAMES:
                mine = [
                    edit
                    for edit in made.edits.get(number, [])
                    if edit.space.kind is kind and any((axis.tensor, axis.dim) == (name, 0) for axis in edit.space.axes)
                ]
                if mine:
                    out = inner.narrowed_axis(out, name, 0, mine)
        return out

    def stream(self, number: int, left: int) -> Tensor | None:
        """The map [R, N] of a junction of the decoder with `left` blocks; None where nothing is cut there."""
        numbers, count = [number], left
        for made in reversed(self.steps):
            numbers.insert(0, made.junction(numbers[0], count))
            count = made.config.num_hidden_layers
        found: Tensor | None = None
        for made, own in zip(self.steps, numbers, strict=False):
            if f"residual.{own}" in made.stream:
                mine = made.stream[f"residual.{own}"]
                found = mine if found is None else mine @ found
        return found
