"""Llama 1, 2, 3, 3.1 and 3.2: the canonical decoder's own names."""

from typing import Any

from microtome.arch import Stored, copied, restated
from microtome.layout import HEAD, parts, shapes
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("llama",)
CONTAINERS = ("mistral",)  # LlamaConfig wants hidden_size to be a multiple of the heads, MistralConfig does not
SAME = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "mlp_bias")
HANDLED = frozenset({
    *SAME, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "rms_norm_eps", "attention_bias",
})  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """LlamaConfig to canonical fields."""
    return copied(config, *SAME) | {
        "norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.attention_bias,
        "mlp_out_bias": config.mlp_bias,
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to LlamaConfig's fields."""
    return restated(config, *SAME, "attention_bias") | {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """Every canonical tensor under its own name."""
    found = {name: Stored(name) for part in parts(config) for name in shapes(config, part)}
    return found | {HEAD: Stored(HEAD)}


def renamed(config: MicrotomeConfig, **words: str) -> dict[str, Stored]:
    """Every canonical tensor under its own name, some words of which are others."""
    return {name: Stored(".".join(words.get(word, word) for word in name.split("."))) for name in names(config)}


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    return {
        "llama": base | {"num_key_value_heads": 6},
        "llama-gqa-llama3-tied": base | {"rope_parameters": llama3, "tie_word_embeddings": True},
        "llama-biases-wide-heads": base
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rms_norm_eps": 1e-3},
    }
