"""The canonical decoder as an ONNX graph: what `modeling_microtome` computes, operator by operator.

Values are named. Shapes as there: B batch, T new positions, S all positions, D stream, P rotary pairs, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

from microtome.export.onnx.block import (
    ACTIVATIONS,
    Block,
    Seen,
    Tensors,
    biased,
    cache_names,
    capped,
    cast,
    linear,
    norm,
    sliced,
)
from microtome.export.onnx.graph import Graph
from microtome.layout import EMBEDDING, HEAD, POSITIONS, Part, skips
from microtome.modeling_microtome import MicrotomeConfig, MicrotomeRotary


def unfit(config: MicrotomeConfig) -> str | None:
    """Why the graph cannot say a decoder; None where it can."""
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation {config.hidden_act!r} has no translation; known are {', '.join(sorted(ACTIVATIONS))}."
    scaled = config.rope_parameters or {}
    sets = [one for one in scaled.values() if isinstance(one, dict)] or [scaled]
    if any("dynamic" in str(one.get("rope_type")) for one in sets) and config.positions == "rotary":
        return (
            "its rotary frequencies change with the longest text so far (rope_type dynamic), and the cache would hold "
            "keys that were turned by older ones. Give a model with another rope_type."
        )
    return None


def attentive(config: MicrotomeConfig) -> list[int]:
    """The blocks that have attention, and with it a cache."""
    return [
        block for block in range(config.num_hidden_layers) if not skips(config.per_layer_config[block], "self_attn")
    ]


def decoder(g: Graph, config: MicrotomeConfig, read: Callable[[Part], Tensors]) -> None:
    """Put a whole decoder into a graph; `read` gives the canonical tensors of one part at a time."""
    whole = torch.int64
    ids = g.take("input_ids", whole, ("batch_size", "sequence_length"))
    seen_at = g.take("attention_mask", whole, ("batch_size", "total_sequence_length"))
    positions = g.take("position_ids", whole, ("batch_size", "sequence_length"))
    blocks = attentive(config)
    for block in blocks:
        for name, width in zip(cache_names(block)[0], cache_widths(config, block), strict=True):
            g.take(name, g.dtype, ("batch_size", width[0], "past_sequence_length", width[1]))
    stem = read("stem")
    x = embedded(g, config, stem, ids, positions)
    seen = Seen(masks(g, config, blocks, ids, seen_at), turns(g, config, positions))
    for block in range(config.num_hidden_layers):
        x = Block(g, config, block, read(block), seen).through(x)
    logits = headed(g, config, stem, read("head"), x)
    g.give("logits", logits, torch.float32, ("batch_size", "sequence_length", config.vocab_size))
    g.outputs = [g.outputs[-1], *g.outputs[:-1]]  # logits first, as everybody has them


def cache_widths(config: MicrotomeConfig, block: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and width of a block's cached keys and values."""
    sizes: Any = config.per_layer_config[block]
    return (sizes.num_key_value_heads, sizes.head_dim), (sizes.num_key_value_heads, sizes.v_head_dim)


# --- before and behind the blocks -----------------------------------------------------------------------------------


def embedded(g: Graph, config: MicrotomeConfig, stem: Tensors, ids: str, positions: str) -> str:
    """The stream [B, T, D] that enters the first block."""
    x = g.op("Gather", g.weight(EMBEDDING, stem[EMBEDDING]), ids)
    width = config.per_layer_config[0].residual_in
    if width < stem[EMBEDDING].shape[1]:
        x = sliced(g, x, 0, width)
    if config.embedding_scale != 1.0:
        x = g.op("Mul", x, g.number(config.embedding_scale))
    if config.positions == "learned":
        at = g.op("Add", positions, g.number(config.position_offset, torch.int64))
        x = g.op("Add", x, g.op("Gather", g.weight(POSITIONS, stem[POSITIONS]), at))
    return x


def masks(g: Graph, config: MicrotomeConfig, blocks: list[int], ids: str, seen_at: str) -> dict[str, str]:
    """What is added to the scores of every kind of block [B, 1, T, S]: zero, or the least number."""
    if not blocks:
        return {}
    zero, one = g.number(0, torch.int64), g.number(1, torch.int64)
    new, whole = (g.op("Squeeze", g.op("Shape", name, start=1, end=2)) for name in (ids, seen_at))
    asks = g.op("Unsqueeze", g.op("Range", g.op("Sub", whole, new), whole, one), g.ints(1))  # [T, 1]
    keys = g.op("Unsqueeze", g.op("Range", zero, whole, one), g.ints(0))  # [1, S]
    real = g.op("Unsqueeze", g.op("Cast", seen_at, to=g.kind(torch.bool)), g.ints(1, 2))
    past = g.op("LessOrEqual", keys, asks)
    least = g.number(torch.finfo(g.dtype).min)
    found: dict[str, str] = {}
    for kind in sorted({(config.layer_types or [])[block] for block in blocks}):
        allowed = past
        if kind == "sliding_attention" and config.sliding_window is not None:
            first = g.op("Sub", asks, g.number(config.sliding_window, torch.int64))
            allowed = g.op("And", past, g.op("Greater", keys, first))
        found[kind] = g.op("Where", g.op("And", allowed, real), g.number(0.0), least)
    return found


def turns(g: Graph, config: MicrotomeConfig, positions: str) -> dict[str, tuple[str, str]]:
    """Cosine and sine [B, T, P] of every kind of block that turns its heads."""
    if config.positions != "rotary":
        return {}
    kinds = config.layer_types or []
    nested = any(key in kinds for key in config.rope_parameters or {})
    at = g.op("Unsqueeze", g.op("Cast", positions, to=g.kind(torch.float32)), g.ints(-1))
    found: dict[str, tuple[str, str]] = {}
    for kind in sorted(set(kinds)):
        if found and not nested:
            found[kind] = next(iter(found.values()))
            continue
        rotary = MicrotomeRotary(config, kind if nested else None)
        angles = g.op("Mul", at, frequencies(g, rotary, positions, f"inv_freq.{kind}"))
        waves = [g.op(wave, angles) for wave in ("Cos", "Sin")]
        if rotary.attention_scaling != 1.0:
            waves = [g.op("Mul", one, g.number(rotary.attention_scaling, torch.float32)) for one in waves]
        found[kind] = (cast(g, waves[0]), cast(g, waves[1]))
    return found


def frequencies(g: Graph, rotary: MicrotomeRotary, positions: str, name: str) -> str:
    """Angle per position of every pair [P]; longrope has two sets, and takes the second for positions far out."""
    short = g.constant(name, rotary.inv_freq)
    if rotary.rope_type != "longrope":
        return short
    parameters: Any = rotary.config.rope_parameters
    original = int(parameters["original_max_position_embeddings"])
    rotary(torch.zeros(1), torch.full((1, 1), original))  # the first position that is far out
    far = g.op("GreaterOrEqual", g.op("ReduceMax", positions, keepdims=0), g.number(original, torch.int64))
    return g.op("Where", far, g.constant(f"{name}.far", rotary.inv_freq), short)


def headed(g: Graph, config: MicrotomeConfig, stem: Tensors, head: Tensors, x: str) -> str:
    """Logits [B, T, V] in fp32 of the stream that leaves the last block."""
    if config.final_norm:
        x = norm(g, config, head, "model.norm", x, config.hidden_size)
    if config.head_adapter:
        x = linear(g, head, "head_adapter", x)
    if config.tie_word_embeddings:  # one table in the file; a runtime turns it once, when it loads
        x = g.op("MatMul", x, g.op("Transpose", g.weight(EMBEDDING, stem[EMBEDDING]), perm=[1, 0]))
        x = biased(g, head, "lm_head", x)
    else:
        assert HEAD in head, "an untied head is stored"
        x = linear(g, head, "lm_head", x)
    x = cast(g, x, torch.float32)
    if config.logits_scale != 1.0:
        x = g.op("Mul", x, g.number(config.logits_scale, torch.float32))
    return x if config.logits_softcap is None else capped(g, x, config.logits_softcap, torch.float32)
