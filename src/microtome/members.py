"""What belongs to every coordinate of an inner space: rows of what writes it, columns of what reads it.

A neuron is a row of gate and up and a column of the down projection; a value-output channel a row of the values and a
column of the output projection for each of its query heads; a key-value group all rows and columns of its heads.
Methods that keep or drop whole coordinates score these members and select.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from microtome import inner
from microtome.edit import Edit, Select
from microtome.errors import BadInput
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Role, Space

Spaces = Literal["ffn+heads", "ffn", "heads", "vo", "qk", "ffn+vo", "ffn+qk+vo"]


def kinds(spaces: str) -> frozenset[Kind]:
    """The kinds of spaces that an option names: "ffn+heads"."""
    return frozenset(inner.KINDS[name] for name in spaces.split("+"))


def dial(view: View, kind: Kind) -> str:
    """The name of a kind's width in this block."""
    return f"{view.block}.{inner.NAMES[kind]}"


def ends(first: int, last: int, config: MicrotomeConfig) -> frozenset[int]:
    """The first and last so many blocks."""
    blocks = config.num_hidden_layers
    return frozenset({*range(first), *range(blocks - last, blocks)})


def check_ends(method: str, first: int, last: int, config: MicrotomeConfig) -> None:
    """Raise BadInput where so many protected blocks are no numbers, or leave nothing."""
    said = f"protect_first={first} and protect_last={last} of {method}"
    if min(first, last) < 0:
        raise BadInput(f"{said} are numbers of blocks: give 0 or more.")
    if first + last >= config.num_hidden_layers:
        raise BadInput(f"{said} leave none of {config.num_hidden_layers} blocks to cut: protect fewer.")


def of(view: View, space: Space, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of every coordinate's members [N, rows, entries], by linear: "mlp.up_proj".

    `values` are named and shaped like the weights of the view. A bias is one more entry of its row. Gains and the
    indices of rotary pairs are left out.
    """
    found: dict[str, Tensor] = {}
    for axis in space.axes:
        name = axis.tensor.removeprefix(view.full(""))
        linear, _, part = name.rpartition(".")
        if axis.role is Role.SCALES or part not in ("weight", "bias"):
            continue
        mine = values[name].movedim(axis.dim, 0)[axis.at].double()
        mine = mine[..., None] if part == "bias" else mine
        found[linear] = torch.cat([found[linear], mine], -1) if linear in found else mine
    return found


def selected(view: View, kind: Kind, rank: int, scores: Mapping[str, Tensor]) -> list[Edit]:
    """The `rank` coordinates of every space of a kind that score highest; `scores` [N] by space.

    Query-key channels go in whole rotary pairs. Where one gain serves all heads, all groups keep the same channels.
    """
    spaces = view.of_kind(kind)
    if kind is Kind.QK and view.config.qk_norm == "head":
        total = torch.stack([scores[space.name] for space in spaces]).sum(0)
        scores = {space.name: total for space in spaces}
    edits: list[Edit] = []
    for space in spaces:
        left = inner.turning(space.pairs, space.size, rank) if kind is Kind.QK else 0
        edits.append(Select(space, inner.best_channels(space, scores[space.name], rank, left)))
    return edits


def chosen(view: View, widths: Mapping[str, int], scores: Mapping[str, Tensor]) -> list[Edit]:
    """The highest scores of every space that gets narrower, by the widths of the plan."""
    edits: list[Edit] = []
    for kind in inner.NAMES:
        spaces = view.of_kind(kind)
        if spaces and widths.get(dial(view, kind), spaces[0].size) < spaces[0].size:
            edits += selected(view, kind, widths[dial(view, kind)], scores)
    return edits


def units(view: View, scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Scores of the units of every dial: a unit is one coordinate of every group, each group's in falling order."""
    found: dict[str, list[float]] = {}
    for kind in inner.NAMES:
        if spaces := view.of_kind(kind):
            ranked = [scores[space.name].sort(descending=True).values for space in spaces]
            found[dial(view, kind)] = torch.stack(ranked).sum(0).tolist()
    return found
