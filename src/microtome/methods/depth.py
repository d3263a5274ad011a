"""Depth: leave out whole blocks, those that turn the stream least.

Men et al., 2024 (ShortGPT, arXiv:2403.03853). A block that hands its input on almost unchanged can be taken out.

    influence = 1 - E[ x . y / (|x| |y|) ]             x, y: the stream of a token before and behind the block

The lowest go until the budget is met; all are measured once, in the uncut model, and nothing is refitted. The last
block's y is taken before the final norm.

* `unit=half` leaves out attention and feed-forward halves instead, each scored by the influence of the half alone, per
  parameter: the two do not store the same. The result is our own decoder, where whole blocks leave a stock one.
* `protect_first`, `protect_last`: so many blocks at either end stay.
* The angular distance over runs of blocks (Gromov et al., arXiv:2403.17887) is left out: the best run of n blocks need
  not hold the best run of n - 1, and a budget over all blocks asks for one order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from microtome import members
from microtome.edit import Edit
from microtome.errors import UnsupportedModel
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import INFLUENCES, Influence, Stat

HALVES = {"attn": (Stat.ATTENTION_INFLUENCE, "self_attn."), "mlp": (Stat.MLP_INFLUENCE, "mlp.")}


@dataclass(frozen=True)
class Depth:
    """Options of depth; see the head of this file."""

    unit: Literal["block", "half"] = "block"
    protect_first: int = 0
    protect_last: int = 0

    sequential: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "global"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def targets(self) -> frozenset[Kind]:
        """Blocks, or their halves."""
        return frozenset({Kind.BLOCKS if self.unit == "block" else Kind.HALVES})

    @property
    def needs(self) -> frozenset[Stat]:
        """How far blocks or halves turn the stream."""
        return frozenset(stat for stat in INFLUENCES if (stat is Stat.INFLUENCE) == (self.unit == "block"))

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse halves that stand side by side, and a protection that leaves nothing."""
        if self.unit == "half" and config.parallel != "none":
            raise UnsupportedModel(
                f"the halves of this {config.source_model_type} read the stream side by side: depth takes unit=block."
            )
        members.check_ends("depth", self.protect_first, self.protect_last, config)

    def spared(self, config: MicrotomeConfig) -> frozenset[int]:
        """The blocks at either end that stay."""
        return members.ends(self.protect_first, self.protect_last, config)

    def scores(self, view: View) -> dict[str, list[float]]:
        """The influence of the block, or of each half per parameter."""
        if self.unit == "block":
            return {str(view.block): [influence(view, Stat.INFLUENCE)]}
        found: dict[str, list[float]] = {}
        for half, (stat, module) in HALVES.items():
            numbers = sum(tensor.numel() for name, tensor in view.weights.items() if name.startswith(module))
            if numbers:
                found[f"{view.block}.{half}"] = [influence(view, stat) / numbers]
        return found

    def solve(self, _view: View, _widths: Mapping[str, int]) -> list[Edit]:
        """Nothing: what is left out leaves no weight to change."""
        return []


def influence(view: View, stat: Stat) -> float:
    """A mean over all calibration tokens."""
    found = view.stats[stat]
    assert isinstance(found, Influence)
    return found.mean


METHOD = Depth
