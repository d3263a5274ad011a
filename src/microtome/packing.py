"""Quantised matrices on disk: their codes packed into words, under the names that engines read.

The words of a row hold the bits of its codes one behind the other, lowest first. With w [N, K] a matrix, s its scales
and z the codes of zero, one for each of G groups of columns, w = (code - z) s:

    compressed-tensors  weight_packed [N, words of K], weight_scale [N, G], weight_zero_point [words of N, G] unless
                        zero lies midway, weight_shape; format "pack-quantized"
    gptq                qweight [words of K, N], qzeros [G, words of N] (less one each), scales [G, N] in fp16, g_idx

Matrices that a checkpoint holds as one (queries, keys and values) are packed as one: they read the same numbers, so
that their groups agree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import arch, layout, sparsity
from microtome.arch import Architecture, Stored
from microtome.edit import Quantise
from microtome.errors import BadInput
from microtome.grid import Coding
from microtome.layout import HEAD
from microtome.modeling_microtome import MicrotomeConfig

COMPRESSED, GPTQ, DENSE, AUTO = "compressed-tensors", "gptq", "dense", "auto"
LIBRARIES = {COMPRESSED: "compressed-tensors", GPTQ: "gptqmodel"}  # what transformers needs beside itself
CHUNK = 1024  # rows that are packed at a time
KEPT = ("head_adapter", "re:.*_shortcut")  # linears of our own decoder that are not quantised


@dataclass(frozen=True)
class Packing:
    """What of a result is packed, and how."""

    form: str  # COMPRESSED or GPTQ
    coding: Coding
    matrices: Mapping[str, tuple[int, int]]  # stored names and shapes [O, I]
    kept: tuple[str, ...]  # linears that are not quantised

    @property
    def library(self) -> str:
        """The package that transformers needs to load it."""
        return LIBRARIES[self.form]

    @property
    def note(self) -> str:
        """What a user should know of the files."""
        engines = "" if self.coding.bits in (4, 8) else "; vLLM reads 4 and 8 bits only"
        return (
            f"weights are packed as {self.form}, {self.coding.told}: transformers needs `pip install {self.library}`"
            f"{engines}."
        )

    def saved(self, itemsize: int) -> int:
        """By how many bytes the files are smaller than with numbers of `itemsize` bytes."""
        plain = sum(itemsize * rows * columns for rows, columns in self.matrices.values())
        return plain - sum(self.nbytes(rows, columns, itemsize) for rows, columns in self.matrices.values())

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes of one matrix [rows, columns]: words, scales, zeros, and its shape or the groups of its columns."""
        bits, groups = self.coding.bits, self.coding.groups(columns)
        codes, zeros = 4 * rows * word_count(columns, bits), 4 * groups * word_count(rows, bits)
        if self.form == GPTQ:
            return codes + zeros + 2 * groups * rows + 4 * columns
        return codes + (0 if self.coding.symmetric else zeros) + itemsize * groups * rows + 2 * 8

    def fields(self) -> dict[str, Any]:
        """What config.json says of it."""
        bits, group, symmetric = self.coding.bits, self.coding.group, self.coding.symmetric
        if self.form == GPTQ:
            said = {
                "quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric, "desc_act": False,
                "lm_head": False, "checkpoint_format": "gptq",
            }  # fmt: skip
            return {"quantization_config": said}
        weights = {
            "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
            "group_size": group or None, "dynamic": False,
        }  # fmt: skip
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        said: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(self.kept),
        }
        if not symmetric:  # kept in codes, transformers' classes have no place for packed zero points
            said["dequantize"] = True
        return {"quantization_config": said}

    def packed(
        self, tensors: Mapping[str, Tensor], edits: Sequence[Quantise], places: Mapping[str, Stored], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The stored tensors of a part, with the parts of quantised matrices in place of their values."""
        mine = {edit.tensor: places[edit.tensor] for edit in edits}
        codes, scales, zeros = (
            arch.raise_tensors({edit.tensor: getattr(edit, what) for edit in edits}, mine)
            for what in ("codes", "scale", "zero")
        )
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            out |= self.parts(name, codes[name], scales[name], zeros[name], dtype) if name in codes else {name: tensor}
        return out

    def parts(self, name: str, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, dtype: torch.dtype) -> Any:
        """One matrix as it is stored, by name; `dtype` is that of the scales."""
        module, bits = name.removesuffix("weight"), self.coding.bits
        rows, columns = codes_OI.shape
        words_OW = words(codes_OI, bits)
        if self.form == GPTQ:
            wide = self.coding.group or columns
            ones = torch.ones_like(zero_OG).T
            return {
                f"{module}qweight": words_OW.T.contiguous(),
                f"{module}qzeros": words(zero_OG.T, bits) - words(ones, bits),  # words wrap as its readers' do
                f"{module}scales": scale_OG.T.contiguous().half(),
                f"{module}g_idx": torch.arange(columns, dtype=torch.int32) // wide,
            }
        found = {
            f"{name}_packed": words_OW,
            f"{name}_scale": scale_OG.to(dtype),
            f"{name}_shape": torch.tensor([rows, columns]),
        }
        if not self.coding.symmetric:
            found[f"{name}_zero_point"] = words(zero_OG.T, bits).T.contiguous()
        return found


def word_count(count: int, bits: int) -> int:
    """Words of 32 bits that so many numbers take."""
    return math.ceil(count * bits / 32)


def words(codes_RC: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, one behind the other in int32 words [R, W], lowest bits first, across words if need be."""
    place_C = torch.arange(codes_RC.shape[1]) * bits
    count, pieces = word_count(codes_RC.shape[1], bits), list[Tensor]()
    for rows in codes_RC.split(CHUNK):
        shifted_RC = rows.long() << (place_C % 32)
        out = torch.zeros(len(rows), count + 1, dtype=torch.int64)
        out.index_add_(1, place_C // 32, shifted_RC & 0xFFFFFFFF)
        out.index_add_(1, place_C // 32 + 1, shifted_RC >> 32)
        pieces.append(torch.where(out >= 1 << 31, out - (1 << 32), out)[:, :count].int())
    return torch.cat(pieces)


class Unsaid(Exception):
    """Why no file of a format can hold a result."""


def chosen(
    method: Any, table: Architecture, config: MicrotomeConfig, *, wrapped: bool
) -> tuple[Packing | None, str | None]:
    """How a method's result is packed, or None for plain numbers; and why, where the method did not ask for those.

    Raises BadInput where the method asks for a format that cannot say the result.
    """
    coding, store = getattr(method, "coding", None), getattr(method, "store", DENSE)
    if coding is None or store == DENSE:
        return None, None
    try:
        return planned(COMPRESSED if store == AUTO else store, coding, table, config, wrapped=wrapped), None
    except Unsaid as fact:
        if store == AUTO:
            return None, str(fact)
        fix = "Give -o store=dense, which writes the rounded values as plain numbers."
        raise BadInput(f"store={store}: {fact}. {fix}") from fact


def planned(form: str, coding: Coding, table: Architecture, config: MicrotomeConfig, *, wrapped: bool) -> Packing:
    """How a result of a table is packed; raises Unsaid where the format, or what loads it, cannot say it."""
    names = table.names(config)
    places = {f"{layout.prefix(block)}{name}.weight": shape for block, name, shape in sparsity.shapes(config)}
    matrices: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in places.items():
        place = names[name]
        if place.transposed:
            raise Unsaid(f"{place.name} is stored transposed, in a class of its own (Conv1D)")
        above = matrices.get(place.name, (0, columns))
        matrices[place.name] = (above[0] + rows, columns)
    if wrapped:
        raise Unsaid("the decoder lies inside a multimodal wrapper, whose other linears are not quantised")
    if form == GPTQ:
        check_gptq(coding, table, matrices)
    kept = tuple(dict.fromkeys(["lm_head", names[HEAD].name.removesuffix(".weight")]))
    return Packing(form, coding, matrices, (*kept, *(KEPT if table.MODEL_TYPES == (arch.OWN,) else ())))


def check_gptq(coding: Coding, table: Architecture, matrices: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what words of whole numbers cannot hold, and decoders that its loader does not know."""
    if table.MODEL_TYPES == (arch.OWN,):
        raise Unsaid("its loader knows architectures by name, and Microtome's own is not among them")
    if 32 % coding.bits:
        raise Unsaid(f"a word does not hold whole numbers of {coding.bits} bits")
    for name, shape in matrices.items():
        if any(size % (32 // coding.bits) for size in shape):
            raise Unsaid(f"{name} is {shape[0]} x {shape[1]}, no multiples of {32 // coding.bits} numbers a word")


__all__ = ["AUTO", "COMPRESSED", "DENSE", "GPTQ", "Packing", "chosen", "planned", "words"]
