"""Edits: the closed ways in which a method changes a decoder. Plan: the widths, decided before any weight is cut."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.errors import BadPlan
from microtome.grid import Coding
from microtome.space import Space

PLAN_VERSION = 1


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A change of width: writers of the space see `shrink` [R, N], what is carried past them `grow` [N, R].

    Readers see what `read` returns [N, R] where it is given, else `grow`: behind a norm, what they see of the stream is
    not what the stream carries. It is made when it is asked for, so that only one junction's lies in memory.
    """

    space: Space
    shrink: Tensor
    grow: Tensor
    read: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        rank = len(self.shrink)
        wanted = (self.space.size, rank)
        if self.shrink.shape != wanted[::-1] or self.grow.shape != wanted:
            raise BadPlan(
                f"{self.space.name} of size {self.space.size}: shrink {tuple(self.shrink.shape)} and "
                f"grow {tuple(self.grow.shape)} do not fit."
            )

    @classmethod
    def orthogonal(cls, space: Space, basis_NR: Tensor, read: Callable[[], Tensor] | None = None) -> "Rewrite":
        """Coordinates along orthonormal columns; junctions with the same basis share its memory."""
        return cls(space, basis_NR.T, basis_NR, read)

    def rotated(self, rotation_RR: Tensor) -> "Rewrite":
        """The same subspace in another orthonormal basis; for orthogonal rewrites."""
        old = self.read
        read = None if old is None else lambda: old() @ rotation_RR.T
        return Rewrite.orthogonal(self.space, self.grow @ rotation_RR.T, read)

    @property
    def seen(self) -> Tensor:
        """What readers see, [N, R]."""
        return self.grow if self.read is None else self.read()


@dataclass(frozen=True, eq=False)
class Select:
    """A change of width that keeps some coordinates, `indices` [R], as they are; readers may see a `read` [N, R]."""

    space: Space
    indices: Tensor
    read: Tensor | None = None

    @property
    def shrink(self) -> Tensor:
        """The same as a matrix, [R, N]."""
        rows = torch.zeros(len(self.indices), self.space.size, dtype=torch.float64)
        rows[torch.arange(len(self.indices)), self.indices] = 1.0
        return rows


@dataclass(frozen=True, eq=False)
class Correct:
    """New values of one tensor, in the coordinates after all rewrites."""

    tensor: str
    value: Tensor


@dataclass(frozen=True, eq=False)
class Quantise:
    """New values of one matrix, (code - zero) * scale, with a scale and a zero for every group of columns of a row."""

    tensor: str
    codes: Tensor  # [O, I], whole numbers from 0 to 2^bits - 1
    scale: Tensor  # [O, G]
    zero: Tensor  # [O, G], the code of zero
    coding: Coding

    @property
    def value(self) -> Tensor:
        """The values [O, I], in the type of the scales."""
        wide = self.coding.group or self.codes.shape[1]
        scale_OI, zero_OI = (
            one.repeat_interleave(wide, 1)[:, : self.codes.shape[1]] for one in (self.scale, self.zero.to(self.scale))
        )
        return (self.codes.to(self.scale) - zero_OI) * scale_OI


Edit = Rewrite | Select | Correct | Quantise


@dataclass(frozen=True)
class Plan:
    """What is going to be done, as plain data; `plan.json` in a result says what was done."""

    method: str
    options: dict[str, Any]
    keep: float | None
    slice: float | None
    widths: dict[str, int]  # every space that is cut, and the width that it keeps
    allocation: dict[str, Any] | None = None  # how the budget was spent over the blocks
    then: list[dict[str, Any]] = field(default_factory=list)  # further steps of a recipe, in the same words
    target: list[str] = field(default_factory=list)  # the engines that it keeps to: vllm, gguf, tp=N
    source: dict[str, Any] = field(default_factory=dict)  # name, revision, digest
    calibration: dict[str, Any] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data for `plan.json`."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan in a file, or in a result's folder."""
        file = path / "plan.json" if path.is_dir() else path
        try:
            return cls.from_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadPlan(f"cannot read the plan {file}: {error.strerror}. Give the plan.json of a result.") from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> "Plan":
        """The plan in a `plan.json`; unknown fields are refused, except the record of what came of it."""
        try:
            plain: dict[str, Any] = dict(json.loads(data) if isinstance(data, str) else data)
        except ValueError as error:
            raise BadPlan(f"this plan is not JSON: {error}.") from error
        plain.pop("result", None)
        unknown = sorted(set(plain) - set(cls.__dataclass_fields__))
        if unknown or int(plain.get("version", 0)) > PLAN_VERSION:
            raise BadPlan(
                f"plan.json of version {plain.get('version')} has unknown fields {unknown}: upgrade microtome."
            )
        return cls(**plain)
