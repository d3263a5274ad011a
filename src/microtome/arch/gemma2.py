"""Gemma 2: Gemma with norms on both sides of each half, soft caps on scores and logits, and windows on some blocks."""

from typing import Any

from microtome.arch import Stored, copied, llama, restated, score_scale, since
from microtome.arch.gemma import check, embedding_scale
from microtome.arch.llama import renamed
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("gemma2",)
CONTAINERS = ()
SAME = (
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_types", "attention_bias",
)  # fmt: skip
HANDLED = (llama.HANDLED - {"mlp_bias"}) | {
    *SAME, "hidden_activation", "use_bidirectional_attention", "query_pre_attn_scalar", "sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "cache_implementation",
}  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """Gemma2Config to canonical fields."""
    since("5.23", config)
    check(config, config.hidden_activation)
    return copied(config, *SAME) | {
        "hidden_act": config.hidden_activation,
        "norm_eps": config.rms_norm_eps,
        "norm_offset": 1.0,
        "norm_placement": "sandwich",
        "rope_parameters": dict(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logits_softcap": config.final_logit_softcapping,
        "sliding_window": config.sliding_window,
        "embedding_scale": embedding_scale(config.hidden_size),
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to Gemma2Config's fields."""
    return restated(config, *SAME, "sliding_window") | {
        "hidden_activation": config.hidden_act,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
        "query_pre_attn_scalar": round(score_scale(config) ** -2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """Llama's names, but for the norms."""
    return renamed(
        config,
        attn_out_layernorm="post_attention_layernorm",
        post_attention_layernorm="pre_feedforward_layernorm",
        mlp_out_layernorm="post_feedforward_layernorm",
    )


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama.tiny()["llama"] | {
        "model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True,
        "query_pre_attn_scalar": 10, "sliding_window": 7, "rms_norm_eps": 1e-3,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0,
    }  # fmt: skip
    plain = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}
    return {"gemma2": base, "gemma2-no-caps-bias": base | plain | {"hidden_activation": "silu"}}


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "embedding_scale", "lower", "names", "raise_fields", "tiny"]
