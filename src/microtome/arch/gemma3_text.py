"""Gemma 3, text only: Gemma 2 with norms on query and key heads, and a rotary of its own for windowed blocks."""

import copy
from typing import Any

from microtome.arch import copied, gemma2, restated, score_scale, since
from microtome.arch.gemma import check, embedding_scale
from microtome.arch.gemma2 import names
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("gemma3_text",)
CONTAINERS = ()
SAME = gemma2.SAME
HANDLED = (gemma2.HANDLED - {"attn_logit_softcapping"}) | {
    "rope_local_base_freq",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}


def lower(config: Any) -> dict[str, Any]:
    """Gemma3TextConfig to canonical fields."""
    since("5.23", config)
    check(config, config.hidden_activation)
    return copied(config, *SAME) | {
        "hidden_act": config.hidden_activation,
        "norm_eps": config.rms_norm_eps,
        "norm_offset": 1.0,
        "norm_placement": "sandwich",
        "qk_norm": "head",
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "logits_softcap": config.final_logit_softcapping,
        "sliding_window": config.sliding_window,
        "embedding_scale": embedding_scale(config.hidden_size),
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to Gemma3TextConfig's fields."""
    return restated(config, *SAME, "sliding_window") | {
        "hidden_activation": config.hidden_act,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        "query_pre_attn_scalar": round(score_scale(config) ** -2),
        "final_logit_softcapping": config.logits_softcap,
    }


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    caps = {"attn_logit_softcapping", "final_logit_softcapping"}
    base = {key: value for key, value in gemma2.tiny()["gemma2"].items() if key not in caps}
    base |= {"model_type": "gemma3_text", "sliding_window_pattern": 3}
    scaled = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "attention_bias": True}
    return {
        "gemma3_text": base | {"rope_theta": 1e5, "rope_local_base_freq": 100.0},
        "gemma3_text-scaled-bias": base | kinds | {"rope_parameters": scaled, "final_logit_softcapping": 10.0},
    }


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "embedding_scale", "lower", "names", "raise_fields", "tiny"]
