"""Phi-3, 3.5 and 4: Llama with packed projections, a window, longrope, and in Phi-4-mini a part of each head turned."""

from functools import cache
from typing import Any

from microtome.arch import Stored, copied, restated
from microtome.arch.llama import names as llama_names
from microtome.arch.llama import tiny as llama_tiny
from microtome.errors import UnsupportedModel
from microtome.layout import prefix
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("phi3",)
CONTAINERS = ("mistral",)  # Phi3Config holds longrope's factors against hidden_size, whatever head_dim says
SAME = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "sliding_window")
HANDLED = frozenset({
    *SAME, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "rms_norm_eps", "head_dim", "partial_rotary_factor", "original_max_position_embeddings", "resid_pdrop",
    "embd_pdrop", "full_attn_mod", "interpolate_factor",
})  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """Phi3Config to canonical fields."""
    for name in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini's config, always 1
        if getattr(config, name, 1) not in (None, 1):
            raise UnsupportedModel(f"this phi3 has {name}={getattr(config, name)!r}, which Microtome does not read.")
    return copied(config, *SAME) | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to Phi3Config's fields."""
    return restated(config, *SAME, "head_dim") | {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """Llama's names, but queries, keys and values lie under each other in one tensor, gate and up in another."""
    found = llama_names(config)
    for block in range(config.num_hidden_layers):
        sizes, head = config.per_layer_config[block], prefix(block)
        keys = sizes.num_key_value_heads * sizes.head_dim
        queries, ffn = sizes.num_attention_heads * sizes.head_dim, sizes.intermediate_size
        found |= stacked(f"{head}self_attn.", "qkv_proj", {"q_proj": queries, "k_proj": keys, "v_proj": keys})
        found |= stacked(f"{head}mlp.", "gate_up_proj", {"gate_proj": ffn, "up_proj": ffn})
    return found


def stacked(half: str, packed: str, pieces: dict[str, int]) -> dict[str, Stored]:
    """Where the weights of a half lie that one tensor holds, each with its number of rows."""
    found: dict[str, Stored] = {}
    start = 0
    for name, rows in pieces.items():
        found[f"{half}{name}.weight"] = Stored(f"{half}{packed}.weight", span(start, start + rows))
        start += rows
    return found


@cache
def span(start: int, stop: int) -> tuple[int, ...]:
    """Rows that follow each other; the same for all blocks, and they are many."""
    return tuple(range(start, stop))


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base: dict[str, Any] = {key: value for key, value in llama_tiny()["llama"].items() if key != "head_dim"} | {
        "model_type": "phi3",
        "num_key_value_heads": 3,
        "pad_token_id": 0,
        "original_max_position_embeddings": 64,
    }
    longrope = {
        "rope_type": "longrope", "rope_theta": 1000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    }  # fmt: skip
    three = {key: value[:3] if isinstance(value, list) else value for key, value in longrope.items()}
    return {
        "phi3-window": base | {"sliding_window": 7},
        "phi3-longrope": base | {"rope_parameters": longrope, "original_max_position_embeddings": 32},
        "phi3-partial-tied": base
        | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "num_key_value_heads": 6},
        "phi3-partial-longrope": base
        | {
            "rope_parameters": three | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 32,
            "num_key_value_heads": 2,
        },
    }
