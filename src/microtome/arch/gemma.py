"""Gemma 1: gains stored as what exceeds one, and embeddings scaled by the root of the width."""

from typing import Any

from microtome.arch import copied, llama, restated
from microtome.arch.llama import names
from microtome.errors import UnsupportedModel
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("gemma",)
CONTAINERS = ()  # its config takes any width
SAME = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "attention_bias")
HANDLED = llama.HANDLED - {"mlp_bias"} | {"hidden_activation", "use_bidirectional_attention"}


def embedding_scale(width: int) -> float:
    """What transformers multiplies embeddings by, rounded to their type: the config has no field for it."""
    return width**0.5


def check(config: Any, used: str) -> None:
    """Refuse what only embedding models of this family do, and a config of two minds; `used` is its activation."""
    if config.use_bidirectional_attention:
        raise UnsupportedModel(f"this {config.model_type} attends to later tokens (use_bidirectional_attention).")
    for other in (getattr(config, name, None) for name in ("hidden_act", "hidden_activation")):
        if other not in {None, used}:
            raise UnsupportedModel(
                f"config.json of this {config.model_type} names two activations, {used!r} and {other!r}, of which "
                "transformers follows the first. Delete the other."
            )


def lower(config: Any) -> dict[str, Any]:
    """GemmaConfig to canonical fields."""
    check(config, config.hidden_act)
    return copied(config, *SAME) | {
        "norm_eps": config.rms_norm_eps,
        "norm_offset": 1.0,
        "rope_parameters": dict(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
        "embedding_scale": embedding_scale(config.hidden_size),
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to GemmaConfig's fields."""
    return restated(config, *SAME) | {"rms_norm_eps": config.norm_eps, "rope_parameters": config.rope_parameters}


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama.tiny()["llama"] | {
        "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True,
        "hidden_act": "gelu",  # meant as gelu_pytorch_tanh, as published configs have it
        "rms_norm_eps": 1e-3,
    }  # fmt: skip
    return {"gemma": base, "gemma-bias": base | {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"}}


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "embedding_scale", "lower", "names", "raise_fields", "tiny"]
