"""Mistral: Llama with a window, and a config that accepts any width."""

from typing import Any

from microtome.arch import copied, restated
from microtome.arch.llama import names
from microtome.arch.llama import tiny as llama_tiny
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("mistral",)
CONTAINERS = ()
SAME = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "sliding_window")
HANDLED = frozenset({
    *SAME, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "rms_norm_eps",
})  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """MistralConfig to canonical fields."""
    return copied(config, *SAME) | {"norm_eps": config.rms_norm_eps, "rope_parameters": dict(config.rope_parameters)}


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to MistralConfig's fields."""
    return restated(config, *SAME) | {"rms_norm_eps": config.norm_eps, "rope_parameters": config.rope_parameters}


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama_tiny()["llama"] | {"model_type": "mistral", "num_key_value_heads": 3}
    return {"mistral": base | {"sliding_window": None}, "mistral-window": base | {"sliding_window": 7}}


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "lower", "names", "raise_fields", "tiny"]
