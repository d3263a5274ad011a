"""Spaces: the named coordinate systems of a decoder, and the tensor axes that use them.

Every axis of every weight writes a space (rows of `up_proj`), reads one (columns of `down_proj`), scales one (a norm's
gain), or is free (the vocabulary). Making a model narrower means to replace a space's n numbers z by `shrink z`, and
to let its readers see `grow shrink z`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Kind(StrEnum):
    """What a space is; methods name the kinds they can cut."""

    RESIDUAL = "residual"
    FFN = "ffn"
    QK = "query-key"
    VO = "value-output"
    HEADS = "heads"
    ATTN_READ = "attention-read"  # what a half reads of the stream, and what it writes
    ATTN_WRITE = "attention-write"
    MLP_READ = "mlp-read"
    MLP_WRITE = "mlp-write"
    HALVES = "halves"  # attention and feed-forward halves of blocks, left out whole
    BLOCKS = "blocks"  # the same for blocks
    WEIGHTS = "weights"  # no space: single weights of the linears inside the blocks


class Role(StrEnum):
    """How an axis uses a space. A dual axis meets a writer in a dot product (keys meet queries)."""

    WRITES = "writes"
    READS = "reads"
    SCALES = "scales"
    DUAL = "dual"


class Symmetry(StrEnum):
    """The changes of basis that leave the model's function unchanged."""

    PERMUTE = "permute"  # neurons behind a nonlinearity, heads
    LINEAR = "linear"  # any invertible matrix: values, and keys without a rotary
    ORTHOGONAL = "orthogonal"  # the residual stream under a folded RMSNorm
    CENTRED = "centred"  # orthogonal, and fixing the ones vector: under a folded LayerNorm
    PAIRS = "pairs"  # one rotation per rotary pair; invertible on the channels that do not turn
    SIGNS = "signs"  # one sign per rotary pair: query and key norms with gains


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of one tensor: coordinate c of the space lies at the positions `at[c]` along it."""

    tensor: str
    dim: int
    role: Role
    at: Tensor  # int64 [size, copies]


@dataclass(frozen=True, eq=False)
class Space:
    """A coordinate system of `size` numbers and everything that uses it."""

    name: str
    kind: Kind
    block: int | None  # None: shared by several blocks
    size: int
    symmetry: Symmetry
    axes: tuple[Axis, ...]
    pairs: int = 0  # rotary pairs, for query-key spaces: coordinates (i, i + pairs) turn together


def mix(tensor: Tensor, dim: int, at: Tensor, matrix_RN: Tensor) -> Tensor:
    """Replace the N coordinates that lie at `at` [N, copies] along `dim` by the R that `matrix_RN` makes of them.

    A whole axis shrinks from N * copies to R * copies positions, kept in the order of `at`; positions outside `at`
    stay, which needs R == N. The result has the matrix's dtype.
    """
    rows, (size, copies) = matrix_RN.shape[0], at.shape
    moved = tensor.movedim(dim, 0).to(matrix_RN.dtype)
    if size * copies == moved.shape[0] and copies == 1 and torch.equal(at[:, 0], torch.arange(size)):
        flat = matrix_RN @ moved.reshape(size, -1)  # the common case: one GEMM, no gather
        return flat.reshape(rows, *moved.shape[1:]).movedim(0, dim)
    old = moved[at.T.reshape(-1)].reshape(copies, size, -1)
    new = (matrix_RN @ old).reshape(copies * rows, *moved.shape[1:])
    if rows == size:
        out = moved.clone()
        out[at.T.reshape(-1)] = new
        return out.movedim(0, dim)
    if size * copies != moved.shape[0]:
        raise ValueError(f"cannot narrow {size} of {moved.shape[0]} positions: the axis holds other coordinates too")
    kept = at[:rows].T.reshape(-1)
    return new[torch.argsort(kept)].movedim(0, dim)


def change_basis(tensors: Mapping[str, Tensor], space: Space, shrink_RN: Tensor, grow_NR: Tensor) -> dict[str, Tensor]:
    """The tensors with the space rewritten: writers see `shrink`, readers and duals the transpose of `grow`.

    Tensors that the space does not touch, and axes whose tensor is not in the mapping, are left alone.

    Raises ValueError where a gain scales the space and the map is not a selection: fold the norms first.
    """
    out = dict(tensors)
    for axis in space.axes:
        if axis.tensor not in out:
            continue
        matrix = shrink_RN if axis.role is Role.WRITES else grow_NR.T
        if axis.role is Role.SCALES:
            matrix = selection(space, shrink_RN)
        tensor = out[axis.tensor]
        mixed = mix(tensor, axis.dim, axis.at, matrix)
        out[axis.tensor] = mixed if tensor.is_floating_point() else mixed.to(tensor.dtype)  # indices stay indices
    return out


def selection(space: Space, shrink_RN: Tensor) -> Tensor:
    """What a signed selection of coordinates does to a gain: the same without the signs."""
    chosen = shrink_RN.abs()
    if not torch.equal(chosen.sum(1), torch.ones(len(chosen), dtype=chosen.dtype)) or chosen.max() != 1:
        raise ValueError(f"{space.name} is scaled by a gain, which only a selection of coordinates keeps")
    return chosen
