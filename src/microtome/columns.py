"""Columns of the matrices that read an inner space: what each is worth, and how the kept ones make up for the others.

A space of neurons is read by the down projection, one column for each coordinate; value-output channels and whole
key-value groups by the output projection, several columns for each.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from microtome import inner
from microtome.edit import Correct, Edit, Select
from microtome.inner import View
from microtome.linalg import damped_cholesky, restoration
from microtome.space import Kind, Role, Space
from microtome.stats import Moment, Stat

SITE = {Kind.FFN: Stat.NEURONS, Kind.VO: Stat.HEADS, Kind.HEADS: Stat.HEADS}
READER = {Kind.FFN: "mlp.down_proj", Kind.VO: "self_attn.o_proj", Kind.HEADS: "self_attn.o_proj"}
Score = Literal["wanda", "l2", "obs"]


def columns_of(space: Space) -> Tensor:
    """Which columns of its reader belong to every coordinate of a space, [N, copies]."""
    return next(axis.at for axis in space.axes if axis.role is Role.READS)


def per_coordinate(space: Space, columns_C: Tensor) -> Tensor:
    """Scores of columns added up to scores of the space's coordinates [N]."""
    return columns_C[columns_of(space)].sum(1)


def worth(weight_OC: Tensor, moment: Moment | None, score: Score, ridge: float = 0.01) -> Tensor:
    """What every column of a matrix contributes to its output, [C].

    wanda   sum_i |W_ij| ||X_j||
    l2      E[X_j^2] ||W_j||^2
    obs     ||W_j||^2 / [C^-1]_jj: what is lost after the other columns have made up for it
    """
    assert moment is not None
    moment_CC = moment.mean_NN
    energy_C = moment_CC.diagonal()
    if score == "wanda":
        return weight_OC.abs().sum(0) * energy_C.clamp_min(0).sqrt()
    if score == "l2":
        return weight_OC.pow(2).sum(0) * energy_C
    inverse = torch.cholesky_inverse(damped_cholesky(moment_CC, ridge))
    return weight_OC.pow(2).sum(0).double() / inverse.diagonal()


def selected(view: View, kind: Kind, rank: int, columns_C: Tensor) -> list[tuple[Space, Tensor]]:
    """The best `rank` coordinates of every space of a kind, by scores of its reader's columns."""
    return [(space, inner.best(per_coordinate(space, columns_C), rank)) for space in view.of_kind(kind)]


def left(chosen: Sequence[tuple[Space, Tensor]]) -> Tensor:
    """The columns that selections leave of their reader, in the order that they will have."""
    found = [columns_of(space)[indices] for space, indices in chosen]  # [R, copies]
    if chosen[0][0].kind is not Kind.HEADS:  # a group's columns stay together; of channels, those of a query head
        found = [columns.T for columns in found]
    return torch.cat(sorted((row for rows in found for row in rows), key=lambda row: int(row[0])))


def refitted(
    view: View, kind: Kind, chosen: Sequence[tuple[Space, Tensor]], moment: Moment, ridge: float
) -> list[Edit]:
    """Selections, with their reader's kept columns making up for the others over the whole reader at once."""
    name, kept_R = READER[kind], left(chosen)
    edits: list[Edit] = [Select(space, indices) for space, indices in chosen]
    weight_OC = view.weights[f"{name}.weight"]
    refit_OR = weight_OC.double() @ restoration(moment.mean_NN, kept_R, ridge)
    return [*edits, Correct(view.full(f"{name}.weight"), refit_OR.to(weight_OC.dtype))]


def widths_by_kind(view: View, widths: Mapping[str, int]) -> dict[Kind, int]:
    """The widths that the plan gives this view, by kind."""
    return {kind: widths[name] for kind, short in inner.NAMES.items() if (name := f"{view.block}.{short}") in widths}


def by_dial(view: View, kind: Kind, columns_C: Tensor) -> list[float]:
    """Scores of the units of a kind's dial: of all groups together, each group's in falling order, added up."""
    ranked = [per_coordinate(space, columns_C).sort(descending=True).values for space in view.of_kind(kind)]
    return torch.stack(ranked).sum(0).tolist()
