"""Canonical tensors under the names, in the order and in the sizes that llama.cpp reads.

Shape letters: H query heads, G key-value heads, K query-key width, P pairs that turn.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import layout, plain, surgery
from microtome.export.gguf.family import Family, Sizes, blocks, rotaries, with_attention, written
from microtome.layout import EMBEDDING, HEAD, POSITIONS, Part, prefix
from microtome.modeling_microtome import MicrotomeConfig, MicrotomeRotary
from microtome.surgery import Tensors

KINDS = ("weight", "bias")
QKV = ("q_proj", "k_proj", "v_proj")
STILL = 1e30  # what the frequency of a pair is divided by that does not turn
NAMES = {
    EMBEDDING: "token_embd", POSITIONS: "position_embd", HEAD: "output", "model.norm": "output_norm",
    "lm_head": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "attn_out_layernorm": "post_attention_norm", "mlp_out_layernorm": "post_ffw_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Frame:
    """What a file will say: the family, the decoder with what the engine does by itself taken out, and without any
    constants, and the sizes of every block."""

    family: Family
    config: MicrotomeConfig
    plain: MicrotomeConfig
    sizes: list[Sizes]

    @property
    def head_dim(self) -> int:
        """The width of every head, of values too."""
        return int(with_attention(self.config)[0].head_dim)

    @property
    def pairs(self) -> int:
        """Pairs of channels that turn."""
        return layout.rotary_pairs(self.config, with_attention(self.config)[0])

    @property
    def tied(self) -> bool:
        """Whether the file has no head."""
        return bool(self.config.tie_word_embeddings) and self.family.tied is not False


def framed(family: Family, config: MicrotomeConfig) -> Frame:
    """The frame of a decoder in a family that can say it."""
    width, changes = config.hidden_size, dict[str, Any]()
    if family.scaled:
        changes["embedding_scale"] = config.embedding_scale / width**0.5
    own = {block: dict[str, Any]() for block in range(config.num_hidden_layers)}
    for block, sizes in enumerate(blocks(config)):
        if family.narrow == config.num_hidden_layers:
            usual = sizes.head_dim**-0.5
            engine = (width // sizes.num_attention_heads) ** -0.5
            own[block]["attention_scale"] = (sizes.attention_scale or usual) / engine * usual
    seen = surgery.rebuilt(config, own, **changes)
    return Frame(family, seen, plain.plain_config(seen), written(family, config))


# --- frequencies ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Frequencies:
    """What the frequencies theta^(-2 i / K) are divided by, pair by pair (None: by one); `long` beyond `original`
    positions. What cosines and sines are multiplied by is squared in `scores`."""

    theta: float
    factors: Tensor | None = None
    long: Tensor | None = None
    original: int | None = None
    scores: float = 1.0


def frequencies(frame: Frame) -> Frequencies:
    """The frequencies of a decoder of one rotary, in a family that reads them from a tensor."""
    (parameters, *_), config = rotaries(frame.config), frame.config
    theta = float(parameters.get("rope_theta", 10000.0))
    if config.positions != "rotary":
        return Frequencies(theta)
    nested = next((key for key, one in (config.rope_parameters or {}).items() if isinstance(one, dict)), None)
    rotary = MicrotomeRotary(config, nested)
    whole = frame.head_dim if frame.family.factors else 2 * frame.pairs
    base = theta ** (-torch.arange(0, whole, 2, dtype=torch.float64) / whole)
    if parameters.get("rope_type") != "longrope":
        factors = divided(base, rotary.inv_freq[: frame.pairs])
        plainly = bool((factors - 1.0).abs().max() < 1e-6)
        return Frequencies(theta, None if plainly else factors, scores=rotary.attention_scaling**2)
    original = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    short, long = (
        divided(base, at_length(rotary, length)[: frame.pairs]) for length in (original, config.max_position_embeddings)
    )
    return Frequencies(theta, short, long, original, rotary.attention_scaling**2)


def at_length(rotary: MicrotomeRotary, length: int) -> Tensor:
    """The angles per position of every pair for a text of so many tokens."""
    rotary.forward(torch.zeros(1), torch.tensor([[length - 1]]))
    return rotary.inv_freq.clone()


def divided(base: Tensor, wanted: Tensor) -> Tensor:
    """What the frequencies of an engine are divided by, so that the first pairs turn as wanted and the rest do not."""
    factors = torch.full_like(base, STILL)
    factors[: len(wanted)] = base[: len(wanted)] / wanted.double()
    return factors


# --- tensors --------------------------------------------------------------------------------------------------------


def converted(tensors: Mapping[str, Tensor], part: Part, frame: Frame, scores: float) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part as the file has them, by name; `scores` is what queries take over from the rotary."""
    out = plain.plained(tensors, part, frame.config)
    if part == "stem":
        yield from stem(out, frame)
        return
    if part == "head":
        yield from head(out, frame)
        return
    whole = block(out, int(part), frame, scores)
    if frame.family.packed:
        whole = packed(whole)
    for name, tensor in whole.items():
        module, kind = name.rsplit(".", 1)
        yield f"blk.{part}.{NAMES[module]}.{kind}" if module in NAMES else f"blk.{part}.{name}", tensor


def stem(tensors: Tensors, frame: Frame) -> Iterator[tuple[str, Tensor]]:
    """Embeddings, and positions without the rows before the first."""
    yield "token_embd.weight", tensors[EMBEDDING]
    if POSITIONS in tensors:
        yield "position_embd.weight", tensors[POSITIONS][frame.config.position_offset :]


def head(tensors: Tensors, frame: Frame) -> Iterator[tuple[str, Tensor]]:
    """The last norm and the head; the biases that llama.cpp wants."""
    for name in sorted(tensors):
        if name != HEAD or not frame.tied:
            module, kind = name.rsplit(".", 1)
            yield f"{NAMES[module]}.{kind}", tensors[name]
    if frame.family.head_bias and "lm_head.bias" not in tensors:
        yield "output.bias", torch.zeros(frame.config.vocab_size)


def block(tensors: Tensors, number: int, frame: Frame, scores: float) -> Tensors:
    """The tensors of a block without their prefix, with zeros where the file has more than the decoder."""
    out = {name.removeprefix(prefix(number)): tensor for name, tensor in tensors.items()}
    sizes, target, config = frame.config.per_layer_config[number], frame.sizes[number], frame.config
    wide, width = frame.head_dim, config.hidden_size
    if target.groups and layout.skips(sizes, "self_attn"):
        out |= empty_attention(frame, target)
        if config.parallel == "shared":  # the MLP then has a norm of its own
            out |= {f"input_layernorm.{kind}": out.pop(f"post_attention_layernorm.{kind}") for kind in KINDS}
    elif target.groups:
        attention(out, sizes, frame, scores)
        if config.qk_norm == "full":
            widen_norms(out, target, wide)
        pad_heads(out, target, wide)
    fill(out, frame, target)
    for name in ("mlp.gate_proj", "mlp.up_proj") if config.mlp_gated else ("mlp.up_proj",):
        out[f"{name}.weight"] = rows(out.get(f"{name}.weight", torch.zeros(0, width)), target.ffn)
        if f"{name}.bias" in out:
            out[f"{name}.bias"] = rows(out[f"{name}.bias"], target.ffn)
    out["mlp.down_proj.weight"] = rows(out.get("mlp.down_proj.weight", torch.zeros(width, 0)).T, target.ffn).T
    return out


def empty_attention(frame: Frame, target: Sizes) -> Tensors:
    """Attention of zeros."""
    wide, width, half = frame.head_dim, frame.config.hidden_size, "self_attn."
    out = {f"{half}{one}_proj.weight": torch.zeros(target.groups * wide, width) for one in "kv"}
    out[f"{half}q_proj.weight"] = torch.zeros(target.heads * wide, width)
    out[f"{half}o_proj.weight"] = torch.zeros(width, target.heads * wide)
    if frame.config.qk_norm is not None:
        whole = frame.config.qk_norm == "full"
        out[f"{half}q_norm.weight"] = torch.ones(target.heads * wide if whole else wide)
        out[f"{half}k_norm.weight"] = torch.ones(target.groups * wide if whole else wide)
    return out


def attention(out: Tensors, sizes: Any, frame: Frame, scores: float) -> None:
    """Values as wide as queries; queries and keys in the order in which the engine turns them. In place."""
    wide, half = frame.head_dim, "self_attn."
    for name in (f"{half}v_proj.weight", f"{half}v_proj.bias"):
        if name in out:
            out[name] = widened(out[name], sizes.num_key_value_heads, wide)
    name = f"{half}o_proj.weight"
    out[name] = widened(out[name].T, sizes.num_attention_heads, wide).T
    scale = torch.ones(wide)
    scale[: 2 * frame.pairs] = scores
    order = turned_order(wide, frame.pairs) if frame.family.neighbours and sizes.rotary else torch.arange(wide)
    for one, heads in (("q", sizes.num_attention_heads), ("k", sizes.num_key_value_heads)):
        for name in (f"{half}{one}_proj.weight", f"{half}{one}_proj.bias"):
            if name in out:
                by_head = out[name].reshape(heads, wide, *out[name].shape[1:])
                if one == "q" and sizes.rotary:
                    by_head = by_head * scale.to(by_head.dtype).reshape(1, wide, *[1] * (by_head.ndim - 2))
                out[name] = by_head[:, order].reshape(out[name].shape)


def turned_order(wide: int, pairs: int) -> Tensor:
    """Channels [K] so that those that turn together, i and i + P, stand side by side; the rest follow as they are."""
    turning = torch.stack([torch.arange(pairs), torch.arange(pairs, 2 * pairs)], dim=1).flatten()
    return torch.cat([turning, torch.arange(2 * pairs, wide)])


def widened(tensor: Tensor, heads: int, wide: int) -> Tensor:
    """Rows of heads, each with zeros up to a width."""
    by_head = tensor.reshape(heads, -1, *tensor.shape[1:])
    if by_head.shape[1] == wide:
        return tensor
    missing = torch.zeros(heads, wide - by_head.shape[1], *tensor.shape[1:], dtype=tensor.dtype)
    return torch.cat([by_head, missing], dim=1).reshape(heads * wide, *tensor.shape[1:])


def pad_heads(out: Tensors, target: Sizes, wide: int) -> None:
    """Heads of zeros behind those of a block, up to the file's number. In place."""
    half = "self_attn."
    for one, heads in (("q", target.heads), ("k", target.groups), ("v", target.groups)):
        for name in (f"{half}{one}_proj.weight", f"{half}{one}_proj.bias"):
            if name in out:
                out[name] = rows(out[name], heads * wide)
    name = f"{half}o_proj.weight"
    out[name] = rows(out[name].T, target.heads * wide).T


def widen_norms(out: Tensors, target: Sizes, wide: int) -> None:
    """Norms over all heads at once, whose mean counts the zeros of heads that are added too. In place."""
    for one, heads in (("q", target.heads), ("k", target.groups)):
        name, stored = f"self_attn.{one}_norm.weight", f"self_attn.{one}_proj."
        more = heads * wide / len(out[name])
        out[name] = rows(out[name] * more**-0.5, heads * wide)
        out |= {kind: out[kind] * more**0.5 for kind in (f"{stored}weight", f"{stored}bias") if kind in out}


def rows(tensor: Tensor, count: int) -> Tensor:
    """Rows of zeros behind those of a tensor, up to a count."""
    missing = count - tensor.shape[0]
    return tensor if not missing else torch.cat([tensor, torch.zeros(missing, *tensor.shape[1:], dtype=tensor.dtype)])


def fill(out: Tensors, frame: Frame, target: Sizes) -> None:
    """Norms and biases of zeros that the file must have and the block has not, in place."""
    width, config, wide = frame.config.hidden_size, frame.plain, frame.head_dim
    kinds = ("weight", "bias") if config.norm_bias else ("weight",)
    before = {"input_layernorm": target.groups, "post_attention_layernorm": config.parallel != "shared"}
    after = {"attn_out_layernorm": target.groups, "mlp_out_layernorm": True}
    wanted = (before if config.norm_placement in {"pre", "sandwich"} else {}) | (
        after if config.norm_placement in {"post", "sandwich"} else {}
    )
    for name in (name for name, there in wanted.items() if there):
        for kind in kinds:
            out.setdefault(f"{name}.{kind}", torch.zeros(width))
    if not frame.family.filled:
        return
    sizes = {"q_proj": target.heads * wide, "k_proj": target.groups * wide, "v_proj": target.groups * wide}
    found = {f"self_attn.{name}": size for name, size in sizes.items()} | {"self_attn.o_proj": width}
    found |= {"mlp.up_proj": target.ffn, "mlp.down_proj": width}
    for name, size in found.items():
        out.setdefault(f"{name}.bias", torch.zeros(size))


def packed(out: Tensors) -> Tensors:
    """Queries, keys and values under each other in one tensor."""
    whole = {f"attn_qkv.{kind}": torch.cat([out[f"self_attn.{one}_proj.{kind}"] for one in "qkv"]) for kind in KINDS}
    return {name: tensor for name, tensor in out.items() if name.split(".")[1] not in QKV} | whole
