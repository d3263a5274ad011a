"""Granite 3: Llama with scales on the embedding, on what a half writes, on the scores and on the logits."""

from typing import Any

from microtome.arch import copied, llama, restated, score_scale
from microtome.arch.llama import names
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("granite",)
CONTAINERS = ()  # its config takes any width
SAME = (
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "attention_bias", "mlp_bias",
)  # fmt: skip
HANDLED = llama.HANDLED | {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}


def lower(config: Any) -> dict[str, Any]:
    """GraniteConfig to canonical fields."""
    return copied(config, *SAME) | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
        "mlp_out_bias": config.mlp_bias,
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attention_scale": float(config.attention_multiplier),
        "logits_scale": 1 / config.logits_scaling,
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to GraniteConfig's fields."""
    divisor = 1 / config.logits_scale
    neat = round(divisor, 12)  # 1 / (1 / 49.0) is not 49.0
    return restated(config, *SAME, "head_dim") | {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": score_scale(config),
        "logits_scaling": neat if 1 / neat == config.logits_scale else divisor,
    }


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama.tiny()["llama"] | {"model_type": "granite", "num_key_value_heads": 2}
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.25}
    biases = {"attention_bias": True, "mlp_bias": True, "head_dim": 12}
    return {
        "granite-tied": base | scales | {"logits_scaling": 0.49, "tie_word_embeddings": True},
        "granite-biases": base | scales | biases | {"logits_scaling": 2},
    }


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "lower", "names", "raise_fields", "tiny"]
