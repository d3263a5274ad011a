"""Qwen2 and Qwen2.5: Llama with biases on query, key and value, and a window on some blocks."""

from typing import Any

from microtome.arch import copied, restated
from microtome.arch.llama import names
from microtome.arch.llama import tiny as llama_tiny
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("qwen2",)
CONTAINERS = ()
SAME = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "layer_types",
    "sliding_window",
)
HANDLED = frozenset({
    *SAME, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "rms_norm_eps", "head_dim", "use_sliding_window", "max_window_layers",
})  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """Qwen2Config to canonical fields."""
    return copied(config, *SAME) | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": True,
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to Qwen2Config's fields."""
    return restated(config, *SAME, "head_dim") | {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
        "use_sliding_window": config.sliding_window is not None,
    }


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama_tiny()["llama"] | {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": False}
    return {"qwen2-tied": base, "qwen2-window": base | window}


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "lower", "names", "raise_fields", "tiny"]
