"""One block of the canonical decoder as ONNX operators, and the pieces that all of it is made of.

Shapes as in `modeling_microtome`: B batch, T new positions, S all positions, D stream, H query heads, G key-value
heads, R = H / G, K query-key width, U value width, P rotary pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microtome.export.onnx.graph import Graph
from microtome.layout import prefix, skips
from microtome.modeling_microtome import MicrotomeConfig

Tensors = dict[str, Tensor]

ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "silu": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
    "swish": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
    "gelu": lambda g, x: g.op("Gelu", x),
    "gelu_new": lambda g, x: g.op("Gelu", x, approximate="tanh"),
    "gelu_fast": lambda g, x: g.op("Gelu", x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda g, x: g.op("Gelu", x, approximate="tanh"),
    "quick_gelu": lambda g, x: g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.number(1.702)))),
    "relu": lambda g, x: g.op("Relu", x),
    "relu2": lambda g, x: g.op("Mul", g.op("Relu", x), g.op("Relu", x)),
    "tanh": lambda g, x: g.op("Tanh", x),
    "sigmoid": lambda g, x: g.op("Sigmoid", x),
}


@dataclass(frozen=True)
class Seen:
    """What all blocks share: by kind of block the mask [B, 1, T, S], and cosine and sine [B, T, P]."""

    masks: dict[str, str] = field(default_factory=dict[str, str])
    turns: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])


def cache_names(block: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Inputs and outputs of a block's cache: keys, values."""
    kinds = ("key", "value")
    past, present = ([f"{word}.{block}.{kind}" for kind in kinds] for word in ("past_key_values", "present"))
    return (past[0], past[1]), (present[0], present[1])


# --- pieces ---------------------------------------------------------------------------------------------------------


def cast(g: Graph, x: str, dtype: torch.dtype | None = None) -> str:
    """In the graph's type, or from that into another; free where all is fp32."""
    return x if g.dtype == torch.float32 else g.op("Cast", x, to=g.kind(dtype or g.dtype))


def linear(g: Graph, tensors: Tensors, name: str, x: str) -> str:
    """x W^T + b; ONNX multiplies by what is stored, so it is stored [in, out]."""
    return biased(g, tensors, name, g.op("MatMul", x, g.weight(f"{name}.weight", tensors[f"{name}.weight"].T)))


def biased(g: Graph, tensors: Tensors, name: str, x: str) -> str:
    """The bias of a linear, where it has one."""
    bias = tensors.get(f"{name}.bias")
    return x if bias is None else g.op("Add", x, g.weight(f"{name}.bias", bias))


def sliced(g: Graph, x: str, start: int, end: int) -> str:
    """Some of the last dimension."""
    return g.op("Slice", x, g.ints(start), g.ints(end), g.ints(-1))


def padded(g: Graph, x: str, count: int) -> str:
    """Zeros behind the last dimension."""
    return g.op("Pad", x, g.ints(0, count), g.number(0.0), g.ints(-1))


def capped(g: Graph, x: str, cap: float, dtype: torch.dtype | None = None) -> str:
    """cap tanh(x / cap)."""
    return g.op("Mul", g.op("Tanh", g.op("Div", x, g.number(cap, dtype))), g.number(cap, dtype))


def norm(g: Graph, config: MicrotomeConfig, tensors: Tensors, name: str, x: str, width: int) -> str:
    """An RMSNorm or LayerNorm whose mean square divides by another number than the width, in fp32.

    z / sqrt(sum z^2 / n + eps) with n for the divisor is a plain norm with gain sqrt(n / width) and eps n / width.
    """
    scale = (config.norm_divisor or width) / width
    weight = tensors.get(f"{name}.weight")
    gain = torch.ones(width) if weight is None else weight.float() + config.norm_offset
    gain, eps = g.constant(f"{name}.gain", gain * scale**0.5), config.norm_eps * scale
    x = cast(g, x, torch.float32)
    centred = config.norm == "layer"
    x = g.op("LayerNormalization", x, gain, axis=-1, epsilon=eps) if centred else rms(g, x, gain, eps)
    bias = tensors.get(f"{name}.bias")
    return cast(g, x if bias is None else g.op("Add", x, g.constant(f"{name}.bias", bias.float())))


def rms(g: Graph, x: str, gain: str, eps: float) -> str:
    """An RMSNorm written out, as runtimes know it to fuse."""
    single = torch.float32
    mean = g.op("ReduceMean", g.op("Pow", x, g.number(2.0, single)), g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.number(eps, single)))
    return g.op("Mul", g.op("Div", x, root), gain)


# --- a block --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One block: its tensors by their names without the block's, and what all blocks share."""

    g: Graph
    config: MicrotomeConfig
    number: int
    tensors: Tensors
    seen: Seen

    @property
    def sizes(self) -> Any:
        """The block's own config."""
        return self.config.per_layer_config[self.number]

    def name(self, word: str) -> str:
        """The full name of one of the block's modules."""
        return prefix(self.number) + word

    def has(self, half: str) -> bool:
        """Whether the block has a half, "self_attn" or "mlp"."""
        return not skips(self.sizes, half)

    def through(self, x: str) -> str:
        """The stream [B, T, residual_in] to [B, T, residual_out]."""
        sizes, side_by_side = self.sizes, self.config.parallel != "none"
        middle = sizes.residual_out if side_by_side else sizes.residual_mid
        carried = self.shortcut("attn_shortcut", x, sizes.residual_in, middle)
        if side_by_side:
            out = self.g.op("Add", carried, self.attention(x)) if self.has("self_attn") else carried
            return self.g.op("Add", out, self.feed_forward(x)) if self.has("mlp") else out
        x = self.g.op("Add", carried, self.attention(x)) if self.has("self_attn") else carried
        carried = self.shortcut("mlp_shortcut", x, sizes.residual_mid, sizes.residual_out)
        return self.g.op("Add", carried, self.feed_forward(x)) if self.has("mlp") else carried

    def shortcut(self, which: str, x: str, wide: int, out: int) -> str:
        """What carries the stream past a half; the kinds are those of MicrotomeShortcut."""
        kind, name = getattr(self.sizes, which), self.name(which)
        if kind == "dense":
            return linear(self.g, self.tensors, name, x)
        if kind == "diagonal":
            weight = self.tensors[f"{name}.weight"]
            x = self.g.op("Mul", self.fit(x, wide, len(weight)), self.g.weight(f"{name}.weight", weight))
            return self.fit(x, len(weight), out)
        if kind == "lowrank":
            weight = self.tensors[f"{name}.weight"]
            less = self.low_rank(x, weight, weight, name)
            return self.fit(self.g.op("Sub", x, less), wide, out)
        if kind == "factored":
            less = self.low_rank(x, self.tensors[f"{name}.left"], self.tensors[f"{name}.right"], name)
            return self.g.op("Sub", self.fit(x, wide, out), less)
        return self.fit(x, wide, out)

    def low_rank(self, x: str, left: Tensor, right: Tensor, name: str) -> str:
        """A B^T x."""
        inner = self.g.op("MatMul", x, self.g.weight(f"{name}.right", right))
        return self.g.op("MatMul", inner, self.g.weight(f"{name}.left", left.T))

    def fit(self, x: str, wide: int, out: int) -> str:
        """Cut or zero-padded to a width."""
        if wide == out:
            return x
        return sliced(self.g, x, 0, out) if wide > out else padded(self.g, x, out - wide)

    def reads(self, x: str, half: str) -> str:
        """What the linears of a half read: the normed stream, or some of its coordinates."""
        together = half == "mlp" and self.config.parallel == "shared" and self.has("self_attn")
        first = half == "attn" or together
        if self.config.norm_placement in ("pre", "sandwich"):
            wide = self.sizes.residual_in if first or self.config.parallel != "none" else self.sizes.residual_mid
            x = self.normed("input_layernorm" if first else "post_attention_layernorm", x, wide)
        index = self.tensors.get(self.name(f"{half}_read_index"))
        return x if index is None else self.g.op("Gather", x, self.index(f"{half}_read_index", index), axis=-1)

    def normed(self, word: str, x: str, wide: int) -> str:
        """A norm of the block; the parallel form asks for its one norm twice, and a runtime merges the two."""
        return norm(self.g, self.config, self.tensors, self.name(word), x, wide)

    def index(self, word: str, index: Tensor) -> str:
        """Places along a dimension."""
        return self.g.constant(self.name(word), index.long())

    def writes(self, z: str, half: str, wide: int) -> str:
        """What a half adds to the stream: at its places, normed and scaled."""
        index = self.tensors.get(self.name(f"{half}_write_index"))
        if index is not None:  # a column of zeros behind what was written is what all other places take
            source = torch.full((wide,), len(index), dtype=torch.int64)
            source[index.long()] = torch.arange(len(index))
            z = self.g.op("Gather", padded(self.g, z, 1), self.index(f"{half}_write_index", source), axis=-1)
        if self.config.norm_placement in ("post", "sandwich"):
            z = self.normed(f"{half}_out_layernorm", z, wide)
        scale = self.config.residual_scale
        return z if scale == 1.0 else self.g.op("Mul", z, self.g.number(scale))

    def feed_forward(self, x: str) -> str:
        """What the MLP half adds to the stream."""
        g, x = self.g, self.reads(x, "mlp")
        z = linear(g, self.tensors, self.name("mlp.up_proj"), x)
        act = ACTIVATIONS[self.config.hidden_act]
        if self.config.mlp_gated:
            z = g.op("Mul", act(g, linear(g, self.tensors, self.name("mlp.gate_proj"), x)), z)
        else:
            z = act(g, z)
        return self.writes(linear(g, self.tensors, self.name("mlp.down_proj"), z), "mlp", self.sizes.residual_out)

    def attention(self, x: str) -> str:
        """What the attention half adds to the stream; the cache grows by what is new."""
        g, sizes, x = self.g, self.sizes, self.reads(x, "attn")
        heads, groups, wide = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.v_head_dim
        query, key = self.projected("q", x, heads), self.projected("k", x, groups)
        value = self.by_head(linear(g, self.tensors, self.name("self_attn.v_proj"), x), groups, wide)
        kind = (self.config.layer_types or [])[self.number]
        if self.config.positions == "rotary" and sizes.rotary:
            query, key = self.turned(query, kind, heads), self.turned(key, kind, groups)
        (past_key, past_value), (present_key, present_value) = cache_names(self.number)
        key, value = g.op("Concat", past_key, key, axis=2), g.op("Concat", past_value, value, axis=2)
        shape = ("batch_size", groups, "total_sequence_length")
        g.give(present_key, key, g.dtype, (*shape, sizes.head_dim))
        g.give(present_value, value, g.dtype, (*shape, wide))
        context = self.context(query, key, value, kind)  # [B, H, T, U]
        merged = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), g.ints(0, 0, heads * wide))
        out = linear(g, self.tensors, self.name("self_attn.o_proj"), merged)
        return self.writes(out, "attn", sizes.residual_out if self.config.parallel != "none" else sizes.residual_mid)

    def context(self, query: str, key: str, value: str, kind: str) -> str:
        """Scores, mask, softmax, values. The R queries of a key-value head stand in a row, so that no key is copied."""
        g, sizes = self.g, self.sizes
        heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
        shared = heads != groups
        scale = sizes.head_dim**-0.5 if sizes.attention_scale is None else sizes.attention_scale
        query = g.op("Mul", query, g.number(scale))
        query = g.op("Reshape", query, g.ints(0, groups, -1, sizes.head_dim)) if shared else query  # [B, G, R T, K]
        scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.regrouped(scores, heads) if shared else scores
        if self.config.attention_softcap is not None:
            scores = capped(g, scores, self.config.attention_softcap)
        scores = cast(g, g.op("Add", scores, self.seen.masks[kind]), torch.float32)
        weights = cast(g, g.op("Softmax", scores, axis=-1))
        weights = self.regrouped(weights, groups) if shared else weights
        found = g.op("MatMul", weights, value)
        return g.op("Reshape", found, g.ints(0, heads, -1, sizes.v_head_dim)) if shared else found

    def regrouped(self, scores: str, heads: int) -> str:
        """Scores by query head or by key-value head; both lie in memory alike."""
        return self.g.op("Reshape", scores, self.g.ints(0, heads, -1, 0))

    def projected(self, word: str, x: str, heads: int) -> str:
        """Queries or keys [B, heads, T, K], normed where the model norms them."""
        wide, kind, name = self.sizes.head_dim, self.config.qk_norm, self.name(f"self_attn.{word}_norm")
        z = linear(self.g, self.tensors, self.name(f"self_attn.{word}_proj"), x)
        if kind == "full":
            z = self.head_normed(name, z)
        z = self.g.op("Reshape", z, self.g.ints(0, 0, heads, wide))
        z = self.head_normed(name, z) if kind == "head" else z
        return self.g.op("Transpose", z, perm=[0, 2, 1, 3])

    def by_head(self, z: str, heads: int, wide: int) -> str:
        """[B, T, heads * wide] to [B, heads, T, wide]."""
        shaped = self.g.op("Reshape", z, self.g.ints(0, 0, heads, wide))
        return self.g.op("Transpose", shaped, perm=[0, 2, 1, 3])

    def head_normed(self, name: str, z: str) -> str:
        """An RMSNorm over query or key channels, never rescaled by a slice of the stream."""
        gain = self.tensors[f"{name}.weight"].float() + self.config.norm_offset
        z = rms(
            self.g,
            cast(self.g, z, torch.float32),
            self.g.constant(f"{name}.gain", gain),
            self.config.qk_norm_eps or 0.0,
        )
        return cast(self.g, z)

    def turned(self, x: str, kind: str, heads: int) -> str:
        """Queries or keys [B, heads, T, K] with their first 2 P channels rotated, in pairs (i, i + P)."""
        g, sizes, waves = self.g, self.sizes, self.seen.turns[kind]
        index, wide = self.tensors.get(self.name("self_attn.rotary_index")), sizes.head_dim
        if index is not None:  # every key-value head has pairs of its own, and its R queries have the same
            rows = index.long().repeat_interleave(heads // len(index), dim=0)
            name = g.constant(self.name(f"rotary_index.{heads}"), rows)
            pairs = rows.shape[1]
            cos, sin = (g.op("Transpose", g.op("Gather", one, name, axis=-1), perm=[0, 2, 1, 3]) for one in waves)
        else:
            every = self.pairs()
            pairs = every if sizes.rotary_pairs is None else min(sizes.rotary_pairs, every)
            cut = waves if pairs == every else [sliced(g, one, 0, pairs) for one in waves]
            cos, sin = (g.op("Unsqueeze", one, g.ints(1)) for one in cut)
        lengths = [pairs, pairs, wide - 2 * pairs]
        parts = g.node("Split", (x, g.ints(*lengths[: 2 + bool(lengths[2])])), 2 + bool(lengths[2]), axis=-1)
        first, second, rest = parts[0], parts[1], parts[2:]
        left = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
        right = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
        return g.op("Concat", left, right, *rest, axis=-1)

    def pairs(self) -> int:
        """Pairs that the frequencies have."""
        parameters = self.config.rope_parameters or {}
        own = parameters.get((self.config.layer_types or [])[self.number], parameters)
        return int((self.config.rotary_head_dim or 0) * own.get("partial_rotary_factor", 1.0)) // 2
