"""Quantised weights in training: codes and zero points stay as they are, their scales learn.

    w = level * s,     level = code - zero point,     s = s_0 exp(x)

x is what is trained, one number for each scale: a step of the optimiser changes every scale by the same part of it,
decay leads back to s_0, and no scale changes its sign. Products see s as the file will hold it, in fp16 or bf16 as the
case may be; gradients pass that rounding by. A weight whose level is zero stays zero.

Letters: O outputs, I inputs, G groups of inputs that share a scale (1: whole rows); one row of scales may serve all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microtome.adapters import Trained
from microtome.dequantise import Packed
from microtome.errors import UnsupportedModel
from microtome.source import Source

WORDS = ("packed", "qweight")  # parts that hold codes in words, one of which every format here has
SCALES = ("scale", "scales")
ALONG = "scales"  # the part that is stored [G, O], as GPTQ and AWQ have it
PLACE = "parametrizations.weight.original"  # where torch keeps what is trained of a linear's weight


class Scaled(nn.Module):
    """How a linear's weight [O, I] comes of the logarithms [O, G] by which its scales have changed."""

    level: Tensor  # [O, I]
    start: Tensor  # [O, G]
    group: Tensor  # [I]

    def __init__(self, level_OI: Tensor, start_OG: Tensor, group_I: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        for name, one in (("level", level_OI.to(torch.int16)), ("start", start_OG), ("group", group_I)):
            self.register_buffer(name, one)

    def right_inverse(self, _weight: Tensor) -> Tensor:
        """The logarithms to begin with."""
        return torch.zeros_like(self.start)

    def forward(self, change_OG: Tensor) -> Tensor:
        """The weight, with a graph."""
        wide_OG = self.start * change_OG.exp()
        scale_OG = wide_OG + (wide_OG.to(self.dtype).to(wide_OG) - wide_OG).detach()
        scale_OI = scale_OG if scale_OG.shape[1] == 1 else scale_OG.index_select(1, self.group)
        return self.level.to(scale_OI) * scale_OI


@dataclass(frozen=True, eq=False)
class Coded:
    """One quantised matrix of a model: where its scales lie in the files, and in which shape."""

    stored: str
    shape: tuple[int, ...]
    along: bool  # whether they are stored [G, O]
    scaled: Scaled

    def scales(self, change_OG: Tensor) -> Tensor:
        """The scales as the files hold them."""
        scale_OG = (self.scaled.start * change_OG.exp()).to(self.scaled.dtype)
        return (scale_OG.T if self.along else scale_OG).reshape(self.shape).contiguous()


def read(source: Source, name: str) -> Coded:
    """A quantised matrix of a checkpoint; raises UnsupportedModel where its codes do not lie in words."""
    assert source.quantised is not None
    packed, method = source.quantised.tensors[name], source.quantised.method
    part = next((one for one in SCALES if one in packed.parts), "")
    if not part or not any(one in packed.parts for one in WORDS):
        raise UnsupportedModel(
            f"{source.name} is quantised, and training would leave its grid: of {method} no scales are trained, only "
            "of codes in words (compressed-tensors, gptq, awq). Heal it before it is quantised."
        )
    parts = {key: source.stored(place) for key, place in packed.parts.items()}
    held = parts[part]
    flat = held.T if part == ALONG else held
    start_OG = (flat if flat.dim() == 2 else flat.reshape(-1, 1)).float()
    level_OI = packed.recipe(parts | {part: torch.ones_like(held)})
    scaled = Scaled(level_OI, start_OG.contiguous(), groups(packed, parts, start_OG.shape[1]), held.dtype)
    return Coded(packed.parts[part], tuple(held.shape), part == ALONG, scaled)


def groups(packed: Packed, parts: Mapping[str, Tensor], count: int) -> Tensor:
    """The group of every column [I]."""
    if "group" in parts and int(parts["group"].min()) >= 0:
        return parts["group"].long()
    return torch.arange(packed.shape[1]) // math.ceil(packed.shape[1] / count)


def opened(source: Source, model: Any, homes: Mapping[str, str]) -> dict[str, Coded]:
    """Let a loaded model compute with scales that can be trained; what is coded, by the name of what is trained of it.

    `homes` say which name each stored tensor has in the model. Raises UnsupportedModel where codes are of no linear.
    """
    assert source.quantised is not None
    found: dict[str, Coded] = {}
    for name in sorted(source.quantised.tensors):
        module = homes.get(name, "").removesuffix(".weight")
        linear = model.get_submodule(module) if module else None
        if not isinstance(linear, nn.Linear):
            raise UnsupportedModel(f"{source.name} has {name} in codes, which is no linear: it cannot be healed.")
        one = read(source, name)
        parametrize.register_parametrization(linear, "weight", one.scaled.to(linear.weight.device), unsafe=True)
        found[f"{module}.{PLACE}"] = one
    return found


def merged(trained: Trained, coded: Mapping[str, Coded]) -> Trained:
    """The same, with the scales as they are stored in place of what was trained of them."""

    def merge() -> dict[str, Tensor]:
        found = trained.merge()
        return {name: coded[name].scales(one) if name in coded else one for name, one in found.items()}

    return replace(trained, merge=merge)
