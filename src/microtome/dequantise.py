"""Quantised checkpoints read as the numbers that they stand for, one tensor at a time.

A format is recognised by the names and types beside each weight, not by what config.json says of groups or of modules
that were left out. With w [N, K] the weight, s its scales, q its whole numbers and z their zero points:

    fp8                 w = q s            q [N, K] in e4m3 or e5m2; s for each block, row or tensor
    compressed-tensors  w = (q - z) s      q [N, K] in e4m3 or int8, or 2 to 8 bits a number in int32 along K
    gptq                w = (q - z) s[g]   q packed along K, z along N; g is the group of each of the K columns
    awq                 w = (q - z) s      q and z packed along N, the eight numbers of a word in an order of their own
    bitsandbytes        w = code[q] s      q in 4 bits, s for each block, itself quantised or not; int8: w = q s / 127

Sums and products are in fp32, and there is one cast to the type of the result. What else such a checkpoint quantises
when it runs (activations, the cache) is not kept.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from microtome.errors import BadCheckpoint, UnsupportedModel
from microtome.shards import Stored

Parts = Mapping[str, Tensor]
Read = Callable[[str], Tensor]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word its first to last column lies
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.uint8, torch.int32)
MASKS = ("attention.bias", "attn.bias")  # of bytes, in old checkpoints
INDICES = "_index"  # whole numbers of our own decoder, no weights
RUNNING = (  # scales of what is quantised when the model runs
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point"),
    *(".activation_scale", ".q_scale", ".k_scale", ".v_scale"),
)


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor stored as several: `parts` are their names by what they are, `recipe` makes fp32 numbers of them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, str]
    recipe: Callable[[Parts], Tensor]

    def read(self, read: Read) -> Tensor:
        """The numbers that it stands for."""
        return self.recipe({part: read(name) for part, name in self.parts.items()}).to(self.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class Quantised:
    """What of a checkpoint is quantised: its tensors by the names of plain ones, and stored names that then vanish."""

    method: str
    dtype: torch.dtype
    tensors: Mapping[str, Packed]
    hidden: frozenset[str]


@dataclass(frozen=True, eq=False)
class Files:
    """What a format looks at: its part of config.json, the headers, and small tensors that hold shapes."""

    facts: Mapping[str, Any]
    stored: Mapping[str, Stored]
    read: Read
    dtype: torch.dtype

    def modules(self, ending: str) -> list[str]:
        """What stands before an ending, for every stored name that has it."""
        return sorted(name.removesuffix(ending) for name in self.stored if name.endswith(ending))

    def parts(self, module: str, **endings: str) -> dict[str, str]:
        """The stored names of a module's parts, of those that are there."""
        return {part: module + ending for part, ending in endings.items() if module + ending in self.stored}

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape; BadCheckpoint where there is no such tensor."""
        if name not in self.stored:
            raise BadCheckpoint(f"the quantised checkpoint lacks {name}. Download it again.")
        return self.stored[name].shape

    def packed(self, shape: tuple[int, ...], parts: Mapping[str, str], recipe: Callable[[Parts], Tensor]) -> Packed:
        """A weight that comes out in the type of the result."""
        return Packed(shape, self.dtype, parts, recipe)


def dequantised(config: Mapping[str, Any], stored: Mapping[str, Stored], read: Read) -> Quantised | None:
    """What of a checkpoint is quantised, or None for a plain one.

    Raises UnsupportedModel for a variant of a format that is not read, and BadCheckpoint where parts do not fit.
    """
    facts: Mapping[str, Any] | None = config.get("quantization_config")
    if not facts:
        return None
    method = str(facts.get("quant_method") or "bitsandbytes")
    files = Files(facts, stored, read, result_type(config))
    found = FORMATS[method](files)
    used = {name for packed in found.values() for name in packed.parts.values()}
    hidden = frozenset(used | {name for name in stored if name.endswith(RUNNING)})
    rest = {name: one for name, one in stored.items() if name not in hidden and not name.endswith((*MASKS, INDICES))}
    odd = sorted(
        name for name, one in rest.items() if one.dtype in FP8 or (one.dtype in INTEGERS and len(one.shape) > 1)
    )
    if odd:
        kind = str(stored[odd[0]].dtype).removeprefix("torch.")
        raise unread(method, f"{odd[0]} is stored as {kind} without what {method} stores beside it")
    if not found:
        raise BadCheckpoint(
            f"config.json says {method}, and no tensor is stored that way. Remove its quantization_config if the "
            "weights are plain."
        )
    if twice := sorted(set(found) & set(rest)):
        raise BadCheckpoint(f"the checkpoint holds {twice[0]} twice, quantised and plain. Download it again.")
    return Quantised(method, files.dtype, found, hidden)


def result_type(config: Mapping[str, Any]) -> torch.dtype:
    """The type that the model was trained in, as config.json or its text decoder's part says; else bf16."""
    inner: Any = config.get("text_config")
    places = [config, *([cast("dict[str, Any]", inner)] if isinstance(inner, dict) else [])]
    names = [str(one.get(key)) for one in places for key in ("dtype", "torch_dtype")]
    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return next((types[name] for name in names if name in types), torch.bfloat16)


def unread(method: str, fact: str) -> UnsupportedModel:
    """The refusal of a variant of a format."""
    return UnsupportedModel(
        f"this {method} checkpoint cannot be dequantised: {fact}. Give the checkpoint that it was quantised from, or a "
        "dequantised copy."
    )


# --- recipes --------------------------------------------------------------------------------------------------------


def fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers of `bits` bits in int32 words [..., W], lowest bits first: int32 [..., W * 32 / bits].

    Where words do not hold whole numbers, some lie across two.
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)
    place = bits * torch.arange(32 * words.shape[-1] // bits)
    low, high = (words.long() & 0xFFFFFFFF)[..., place // 32], words[..., (place // 32 + 1) % words.shape[-1]].long()
    return (((low | (high << 32)) >> (place % 32)) & ((1 << bits) - 1)).int()


def spread(grid: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    """Scales or zero points for every number of a weight [N, K]: one for all, or a grid of blocks of equal size."""
    values = (grid.float() - 127.0).exp2() if grid.dtype == torch.uint8 else grid.float()  # a byte is an exponent
    if values.numel() == 1:
        return values.reshape(1, 1)
    values = values if values.dim() == 2 else values[:, None]
    rows, columns = block or (math.ceil(shape[0] / values.shape[0]), math.ceil(shape[1] / values.shape[1]))
    if tuple(values.shape) != (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)):
        raise BadCheckpoint(
            f"scales of shape {list(grid.shape)} do not fit a weight of shape {list(shape)} in blocks of "
            f"{rows} x {columns}. Download it again."
        )
    wide = values.repeat_interleave(rows, 0)[: shape[0]]
    return wide if columns >= shape[1] else wide.repeat_interleave(columns, 1)[:, : shape[1]]


def scaled(parts: Parts, *, block: tuple[int, int] | None) -> Tensor:
    """Numbers stored one by one, less their zero points, times their scales."""
    weight = parts["weight"].float()
    shape = tuple(weight.shape)
    if "zero" in parts:
        weight = weight - spread(parts["zero"].short(), shape, block)
    return weight * spread(parts["scale"], shape, block)


def unpacked_rows(parts: Parts, *, shape: tuple[int, int], bits: int) -> Tensor:
    """Numbers packed along K with their middle at zero; zero points are packed along N."""
    middle = 1 << (bits - 1)
    weight = fields(parts["packed"], bits)[:, : shape[1]].float() - middle
    column = torch.arange(shape[1])
    size = math.ceil(shape[1] / (parts["scale"].shape[-1] if parts["scale"].dim() == 2 else 1))
    group = parts["group"].long() if "group" in parts and int(parts["group"].min()) >= 0 else column // size
    scale = spread(parts["scale"], shape, None) if parts["scale"].numel() == 1 else parts["scale"].float()
    scale = scale if scale.dim() == 2 else scale[:, None]
    if "zero" in parts:
        zero = parts["zero"].float()
        if parts["zero"].dtype == torch.int32:
            zero = fields(parts["zero"].T, bits).T[: shape[0]].float() - middle
        weight = weight - (zero[:, group] if zero.shape[1] > 1 else zero)
    return weight * (scale[:, group] if scale.shape[1] > 1 else scale)


def gptq_weight(parts: Parts, *, bits: int, size: int, low: bool) -> Tensor:
    """GPTQ's words [K / p, N]; `low` says that zero points are stored less one, a word at a time."""
    weight_NK = fields(parts["qweight"].T, bits).float()
    zeros = parts["qzeros"]
    if low:
        zeros = zeros + sum(1 << place for place in range(0, 32, bits))  # int32 wraps as the words do
    zero_GN = fields(zeros, bits)[:, : weight_NK.shape[0]].float()
    column = torch.arange(weight_NK.shape[1])
    group = parts["group"].long() if "group" in parts else column // size
    return (weight_NK - zero_GN[group].T) * parts["scales"].float()[group].T


def awq_weight(parts: Parts) -> Tensor:
    """AWQ's words [K, N / 8]."""

    def ordered(words: Tensor) -> Tensor:
        return fields(words, 4).unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2).float()

    weight_KN, zero_GN, scale_GN = ordered(parts["qweight"]), ordered(parts["qzeros"]), parts["scales"].float()
    size = weight_KN.shape[0] // scale_GN.shape[0]
    zero_KN, scale_KN = (one.repeat_interleave(size, 0) for one in (zero_GN, scale_GN))
    return ((weight_KN - zero_KN) * scale_KN).T


def blockwise(codes: Tensor, table: Tensor, absmax: Tensor, size: int) -> Tensor:
    """Entries of a table times the scale of each block of `size` numbers, flat."""
    values = table.float()[codes.reshape(-1).long()]
    return values * absmax.float().reshape(-1).repeat_interleave(size)[: len(values)]


def four_bit(parts: Parts, *, state: Mapping[str, Any]) -> Tensor:
    """bitsandbytes' nf4 and fp4: two numbers a byte, the first in its upper half."""
    absmax = parts["absmax"]
    if "nested" in parts:
        nested = blockwise(absmax, parts["nested_table"], parts["nested"], int(state["nested_blocksize"]))
        absmax = nested + float(state["nested_offset"])
    numbers = torch.stack([parts["weight"] >> 4, parts["weight"] & 15], -1).reshape(-1)
    shape = [int(size) for size in state["shape"]]
    values = blockwise(numbers[: math.prod(shape)], parts["table"], absmax, int(state["blocksize"]))
    return values.reshape(shape)


def eight_bit(parts: Parts) -> Tensor:
    """bitsandbytes' int8: the largest number of each row is stored, and stands for 127."""
    return parts["weight"].float() * (parts["scale"].float() / 127.0)[:, None]


# --- formats --------------------------------------------------------------------------------------------------------


def fp8(files: Files) -> dict[str, Packed]:
    """DeepSeek's and Qwen's fp8: `weight_scale_inv`, which multiplies, for each block."""
    given = files.facts.get("weight_block_size", (128, 128))
    block = None if given is None else (int(given[0]), int(given[1]))
    found: dict[str, Packed] = {}
    for module in files.modules(".weight_scale_inv"):
        shape = files.shape(f"{module}.weight")
        parts = files.parts(module, weight=".weight", scale=".weight_scale_inv")
        if files.stored[parts["weight"]].dtype not in FP8:
            raise unread("fp8", f"{parts['weight']} has scales and is no fp8")
        found[parts["weight"]] = files.packed(shape, parts, partial(scaled, block=block))
    return found


def compressed(files: Files) -> dict[str, Packed]:
    """compressed-tensors: `weight_scale` beside an fp8 or int8 weight, or beside `weight_packed`."""
    for key in ("transform_config", "sparsity_config"):
        value: Any = files.facts.get(key)
        if value and not (key == "sparsity_config" and value.get("format") in {"dense", None}):
            raise unread("compressed-tensors", f"it has a {key}")
    if odd := files.modules(".weight_global_scale"):
        raise unread("compressed-tensors", f"{odd[0]} is in a format with two levels of scales (nvfp4)")
    groups = [one["weights"] for one in (files.facts.get("config_groups") or {}).values() if one.get("weights")]
    found: dict[str, Packed] = {}
    for module in files.modules(".weight_scale"):
        name = f"{module}.weight"
        parts = files.parts(module, scale=".weight_scale", zero=".weight_zero_point", group=".weight_g_idx")
        if f"{module}.weight_packed" in files.stored:
            found[name] = packed_rows(files, module, parts, {int(one["num_bits"]) for one in groups})
            continue
        blocks = {tuple(one.get("block_structure") or ()) for one in groups} - {()}
        block = cast("tuple[int, int]", next(iter(blocks))) if len(blocks) == 1 else None
        own = len(files.shape(f"{module}.weight_scale")) == 2 and files.shape(f"{module}.weight_scale")[1] > 1
        if files.stored[f"{module}.weight_scale"].dtype == torch.uint8:
            raise unread("compressed-tensors", f"the scales of {name} are exponents (mxfp8)")
        shape = files.shape(name)
        recipe = partial(scaled, block=block if own else None)
        found[name] = files.packed(shape, {"weight": name, **parts}, recipe)
    return found


def packed_rows(files: Files, module: str, parts: Mapping[str, str], widths: set[int]) -> Packed:
    """One weight of compressed-tensors whose numbers are packed into words."""
    name = f"{module}.weight_packed"
    words = files.shape(name)
    said = f"{module}.weight_shape"
    files.shape(said)
    size = [int(one) for one in files.read(said)]
    exact = {bits for bits in {2, 4, 8} | widths if math.ceil(size[-1] * bits / 32) == words[-1]}
    bits = next(iter(exact & widths or exact), 0) if len(exact & widths) <= 1 else 0
    if len(size) != 2 or files.stored[name].dtype != torch.int32 or bits == 0:
        raise unread("compressed-tensors", f"{name} is not 2 to 8 bits a number in int32, row by row")
    shape = (size[0], size[1])
    whole = {"packed": name, "said": said, **parts}
    return files.packed(shape, whole, partial(unpacked_rows, shape=shape, bits=bits))


def gptq(files: Files) -> dict[str, Packed]:
    """GPTQ: `qweight`, `qzeros`, `scales` and, as a rule, `g_idx`."""
    form = str(files.facts.get("checkpoint_format") or files.facts.get("format") or "gptq")
    if form not in {"gptq", "gptq_v2"}:
        raise unread("gptq", f"its checkpoint_format is {form!r}; gptq and gptq_v2 are read")
    found: dict[str, Packed] = {}
    for module in files.modules(".qweight"):
        rows, outputs = files.shape(f"{module}.qweight")
        inputs = files.stored[f"{module}.g_idx"].shape[0] if f"{module}.g_idx" in files.stored else 0
        bits = 32 * rows // inputs if inputs else int(files.facts.get("bits") or 0)
        if bits not in {2, 4, 8}:
            raise unread("gptq", f"{module}.qweight has {bits} bits a number; 2, 4 and 8 are read")
        inputs = inputs or 32 * rows // bits
        files.shape(f"{module}.qzeros")
        groups = files.shape(f"{module}.scales")[0]
        parts = files.parts(module, qweight=".qweight", qzeros=".qzeros", scales=".scales", group=".g_idx")
        recipe = partial(gptq_weight, bits=bits, size=math.ceil(inputs / groups), low=form == "gptq")
        found[f"{module}.weight"] = files.packed((outputs, inputs), parts, recipe)
    return found


def awq(files: Files) -> dict[str, Packed]:
    """AWQ in the layout of its `gemm` kernels."""
    version = str(files.facts.get("version", "gemm")).lower()
    bits = files.facts.get("bits", files.facts.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise unread("awq", f"its version is {version!r} with {bits} bits; gemm with 4 is read")
    found: dict[str, Packed] = {}
    for module in files.modules(".qweight"):
        inputs, words = files.shape(f"{module}.qweight")
        files.shape(f"{module}.qzeros")
        files.shape(f"{module}.scales")
        parts = files.parts(module, qweight=".qweight", qzeros=".qzeros", scales=".scales")
        found[f"{module}.weight"] = files.packed((8 * words, inputs), parts, awq_weight)
    return found


def bitsandbytes(files: Files) -> dict[str, Packed]:
    """bitsandbytes: 4 bits with a state beside each weight, or int8 with `SCB`."""
    found: dict[str, Packed] = {}
    for kind in ("nf4", "fp4"):
        ending = f".quant_state.bitsandbytes__{kind}"
        for name in files.modules(ending):
            state: dict[str, Any] = json.loads(bytes(files.read(name + ending).tolist()))
            files.shape(name)
            nested = {"nested": ".nested_absmax", "nested_table": ".nested_quant_map"}
            whole = files.parts(name, weight="", absmax=".absmax", table=".quant_map", state=ending, **nested)
            recipe = partial(four_bit, state=state)
            found[name] = files.packed(tuple(int(size) for size in state["shape"]), whole, recipe)
    for module in files.modules(".SCB"):
        shape = files.shape(f"{module}.weight")
        parts = files.parts(module, weight=".weight", scale=".SCB", form=".weight_format")
        if "form" in parts and int(files.read(parts["form"]).reshape(-1)[0]) != 0:
            raise unread("bitsandbytes", f"{module}.weight lies in an order of a GPU's own (weight_format)")
        found[f"{module}.weight"] = files.packed(shape, parts, eight_bit)
    return found


FORMATS: Mapping[str, Callable[[Files], dict[str, Packed]]] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed,
    "fp8": fp8,
    "gptq": gptq,
}
