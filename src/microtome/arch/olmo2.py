"""OLMo 2: norms behind each half instead of before it, and one norm over all query heads and one over all key heads."""

from typing import Any

from microtome.arch import Stored, copied, llama, restated
from microtome.arch.llama import renamed
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("olmo2",)
CONTAINERS = ()
SAME = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "attention_bias")
HANDLED = llama.HANDLED - {"mlp_bias"}


def lower(config: Any) -> dict[str, Any]:
    """Olmo2Config to canonical fields."""
    return copied(config, *SAME) | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "norm_placement": "post",
        "qk_norm": "full",
        "rope_parameters": dict(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to Olmo2Config's fields."""
    return restated(config, *SAME, "head_dim") | {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """Llama's names, but for the norms."""
    return renamed(
        config,
        attn_out_layernorm="post_attention_layernorm",
        mlp_out_layernorm="post_feedforward_layernorm",
    )


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama.tiny()["llama"] | {"model_type": "olmo2", "num_key_value_heads": 2, "rms_norm_eps": 1e-3}
    biases = {"attention_bias": True, "head_dim": 12, "tie_word_embeddings": True}
    return {"olmo2": base, "olmo2-biases-tied": base | biases}
