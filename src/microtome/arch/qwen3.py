"""Qwen3: Llama with an RMSNorm on every query and key head, which shares its epsilon with the norms of the stream."""

from typing import Any

from microtome.arch import copied, restated
from microtome.arch.llama import names
from microtome.arch.llama import tiny as llama_tiny
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("qwen3",)
CONTAINERS = ()
SAME = (
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "layer_types",
    "sliding_window", "attention_bias",
)  # fmt: skip
HANDLED = frozenset({
    *SAME, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "rms_norm_eps", "use_sliding_window", "max_window_layers",
})  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """Qwen3Config to canonical fields."""
    return copied(config, *SAME) | {
        "norm_eps": config.rms_norm_eps,
        "qk_norm": "head",
        "rope_parameters": dict(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to Qwen3Config's fields."""
    return restated(config, *SAME) | {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
        "use_sliding_window": config.sliding_window is not None,
    }


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama_tiny()["llama"] | {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rms_norm_eps": 1e-3,
    }
    return {"qwen3-tied": base | {"tie_word_embeddings": True}, "qwen3-bias": base | {"attention_bias": True}}


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "lower", "names", "raise_fields", "tiny"]
