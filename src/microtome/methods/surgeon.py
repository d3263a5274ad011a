"""LLM Surgeon: drop the coordinates that the loss needs least, by its curvature, and let the weights make up for them.

van der Ouderaa et al., ICLR 2024 (arXiv:2312.17244). Around trained weights the loss bends by Fisher's matrix, which
for a linear W is about G x A: A = E[z z^T] of what it reads (and a one for the bias), G = E[g g^T] of the gradients in
what it writes. Rows and columns of all matrices compete by what they cost, in units of the loss,

    row r     W_r A W_r^T / (2 [G^-1]_rr)              column c     W_c^T G W_c / (2 [A^-1]_cc)

one threshold for the whole model decides which go, and what stays makes up for all of them together:
W' = (I - G^-1_:r ([G^-1]_rr)^-1 E_r^T) W (I - E_c ([A^-1]_cc)^-1 [A^-1]_c:).

What is done differently, and the option that gives the paper's or the release's way back:

* The paper leaves zeros in matrices of the old shape. Here a coordinate of a space goes (a neuron, a value-output
  channel, a query-key channel, a key-value group): the rows that write it and the columns that read it, and shapes get
  smaller. It costs what its rows and columns cost together (`cost=sum`); `cost=least` takes the cheapest of them.
* Its rows and columns going are one event: once nothing reads a neuron, nothing is lost by its rows. So the columns
  that stay make up for it, and rows only of queries and keys, which nothing reads (`update=readers`). `update=joint`
  takes rows and columns of every matrix as the paper does, `sum` adds the two updates as the release does by default,
  `none` leaves what stays as it is.
* A budget is met in parameters, whatever a coordinate stores: `threshold=cost` is the paper's threshold on the cost;
  `threshold=parameter` divides it by what is freed.
* Costs and updates have the same damping. The release leaves it out of the numerators: `damping=release`.
* `rank=2` takes Fisher's matrix for the sum of two such products, fitted to it (`pairs`), of which costs and updates
  are as exact as of one. The paper names sums of products too; its factors may be indefinite, those here are not.
* A bias is the last column of its matrix, makes up for what goes, and is never removed by itself; the release may.
* One shot; `shots=40` is the paper's schedule: each is a step of its own, on a model that was measured again.
  `correct=N` trains low-rank factors on the text for N steps between shots.
* Key-value groups keep one width per block, so that the result runs densely.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import inner, kronecker, members, pairs
from microtome.edit import Correct, Edit, Select
from microtome.errors import BadInput
from microtome.inner import View
from microtome.kronecker import Damping, Metric
from microtome.modeling_microtome import MicrotomeConfig
from microtome.pairs import Pair
from microtome.space import Kind, Role, Space
from microtome.sparsity import READS
from microtome.stats import Curvature, Sample, Stat

Index = list[Tensor]
NONE = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class Surgeon:
    """Options of LLM Surgeon; see the head of this file."""

    cost: Literal["sum", "least"] = "sum"
    update: Literal["readers", "joint", "sum", "none"] = "readers"
    threshold: Literal["cost", "parameter"] = "cost"
    damp_a: float = 0.01
    damp_g: float = 0.01
    damping: Damping = "same"
    rank: int = 1
    sequences: int = 128
    length: int = 0
    labels: Literal["data", "model"] = "data"
    seed: int = 0
    shots: int = 1
    correct: int = 0
    spaces: Literal["ffn+vo", "ffn+qk+vo", "ffn+heads", "ffn", "vo", "qk", "heads"] = "ffn+vo"

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.FISHER})
    sequential: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "global"
    rates: ClassVar[Mapping[Kind, float]] = {}

    @property
    def curvature(self) -> Curvature:
        """What the factors are taken on."""
        return Curvature(Sample(self.sequences, self.length or None), self.labels, self.seed, self.rank)

    @property
    def targets(self) -> frozenset[Kind]:
        """The kinds of spaces that are cut."""
        return members.kinds(self.spaces)

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse numbers that make no sense."""
        kronecker.check_damping("surgeon", self.damp_a, self.damp_g)
        kronecker.check_rank("surgeon", self.rank, self.damping)
        if self.shots < 1:
            raise BadInput(f"shots={self.shots} of surgeon: at least one.")
        if self.correct < 0:
            raise BadInput(f"correct={self.correct} of surgeon is a number of training steps between shots.")
        _ = self.curvature

    def matrices(self, view: View) -> dict[str, tuple[Tensor, Metric | Pair]]:
        """The linears that the view's spaces lie in, and their metrics."""
        names = {name for space in view.spaces.values() for name, _, _ in places(view, space)}
        return pairs.matrices(view, names, self.damp_a, self.damp_g, self.damping)

    def worth(self, view: View) -> dict[str, Tensor]:
        """What removing every coordinate costs [N], by space."""
        costs = {
            name: (metric.rows(weight_OI), metric.columns(weight_OI))
            for name, (weight_OI, metric) in self.matrices(view).items()
        }
        found: dict[str, Tensor] = {}
        for space in view.spaces.values():
            each = torch.stack([costs[name][dim][at].sum(1) for name, dim, at in places(view, space)])
            found[space.name] = each.sum(0) if self.cost == "sum" else each.amin(0)
        return found

    def scores(self, view: View) -> dict[str, list[float]]:
        """What every unit costs: for one threshold over all blocks."""
        each = self.threshold == "parameter"
        return members.units(
            view,
            {
                name: cost_N / (inner.cost(view, view.spaces[name].kind) if each else 1)
                for name, cost_N in self.worth(view).items()
            },
        )

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The coordinates that cost most, and matrices that make up for the others."""
        selects = [edit for edit in members.chosen(view, widths, self.worth(view)) if isinstance(edit, Select)]
        if self.update == "none":
            return [*selects]
        rows, columns = self.constraints(view, selects)
        full, changed = {view.full(name): tensor for name, tensor in view.weights.items()}, list[str]()
        for name, (weight_OI, metric) in self.matrices(view).items():
            gone_rows, gone_columns = (torch.cat([NONE, *one.get(name, [])]) for one in (rows, columns))
            if not len(gone_rows) + len(gone_columns):
                continue
            if self.update == "sum":
                without_rows = metric.without(weight_OI, gone_rows, NONE)
                new_OI = without_rows + metric.without(weight_OI, NONE, gone_columns) - weight_OI
            else:
                new_OI = metric.without(weight_OI, gone_rows, gone_columns)
            like = view.weights[f"{name}.weight"]
            full[view.full(f"{name}.weight")] = new_OI[:, : like.shape[1]].to(like)
            changed.append(view.full(f"{name}.weight"))
            if new_OI.shape[1] > like.shape[1]:
                full[view.full(f"{name}.bias")] = new_OI[:, -1].to(like)
                changed.append(view.full(f"{name}.bias"))
        done = inner.narrowed(full, selects, view.block)
        return [*selects, *(Correct(name, done[name]) for name in changed)]

    def constraints(self, view: View, selects: list[Select]) -> tuple[dict[str, Index], dict[str, Index]]:
        """Rows and columns by linear that are to be zero, and that the rest of their matrix makes up for."""
        rows, columns = dict[str, Index](), dict[str, Index]()
        for edit in selects:
            gone = torch.ones(edit.space.size, dtype=torch.bool)
            gone[edit.indices] = False
            mine = list(places(view, edit.space))
            read = any(dim for _, dim, _ in mine)
            for name, dim, at in mine:
                if dim or self.update != "readers" or not read:
                    (columns if dim else rows).setdefault(name, []).append(at[gone].flatten())
        return rows, columns


def places(view: View, space: Space) -> Iterator[tuple[str, int, Tensor]]:
    """Where a space lies in the linears: name, 0 for rows and 1 for columns, positions [N, copies]."""
    for axis in space.axes:
        name, _, part = axis.tensor.removeprefix(view.full("")).rpartition(".")
        if part == "weight" and name in READS and axis.role is not Role.SCALES:
            yield name, axis.dim, axis.at


METHOD = Surgeon
