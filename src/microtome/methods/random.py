"""Random: keep neurons, channels of heads or whole key-value groups by lot. The control of every other method.

A method that chooses by weights, activations or gradients has to do better than this at the same widths. The draw of a
space depends on `seed` and on the space's name only, so it is the same in every run and whatever else is cut.

* `spaces`: `ffn+heads` cuts what FLAP and LLM-Pruner cut, `ffn+vo` what FASP cuts, `ffn+qk+vo` what MoDeGPT cuts.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microtome import members
from microtome.edit import Edit
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind
from microtome.stats import Stat


@dataclass(frozen=True)
class Random:
    """Options of random selection; see the head of this file."""

    seed: int = 0
    spaces: members.Spaces = "ffn+heads"

    needs: ClassVar[frozenset[Stat]] = frozenset()
    sequential: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def targets(self) -> frozenset[Kind]:
        """The spaces that are cut."""
        return members.kinds(self.spaces)

    def check(self, config: MicrotomeConfig) -> None:
        """Everything can be drawn from."""

    def drawn(self, view: View) -> dict[str, Tensor]:
        """A number from 0 to 1 for every coordinate, by space."""
        found: dict[str, Tensor] = {}
        for space in view.spaces.values():
            digest = hashlib.sha256(f"{self.seed} {space.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            found[space.name] = torch.rand(space.size, generator=generator, dtype=torch.float64)
        return found

    def scores(self, view: View) -> dict[str, list[float]]:
        """By lot over all blocks."""
        return members.units(view, self.drawn(view))

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """Whatever was drawn."""
        return members.chosen(view, widths, self.drawn(view))


METHOD = Random
