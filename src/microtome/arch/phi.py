"""Phi-1, 1.5 and 2: LayerNorm, both halves side by side behind one norm, biases everywhere, the head's included."""

from typing import Any

from microtome.arch import Stored, copied, restated
from microtome.errors import UnsupportedModel
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD, prefix
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("phi",)
CONTAINERS = ()
SAME = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act")
HANDLED = frozenset({
    *SAME, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "layer_norm_eps", "head_dim", "partial_rotary_factor", "qk_layernorm", "resid_pdrop", "embd_pdrop",
})  # fmt: skip
BLOCK = {
    "input_layernorm": "input_layernorm", "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj", "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2",
}  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """PhiConfig to canonical fields."""
    if config.qk_layernorm:
        raise UnsupportedModel(
            "this phi puts a LayerNorm on queries and keys (qk_layernorm=true): Microtome knows RMSNorms there only."
        )
    biases = ("norm_bias", "final_norm_bias", "attention_bias", "attention_out_bias", "mlp_bias", "mlp_out_bias")
    return (
        copied(config, *SAME)
        | dict.fromkeys((*biases, "head_bias"), True)
        | {
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "norm": "layer",
            "norm_eps": config.layer_norm_eps,
            "rope_parameters": dict(config.rope_parameters),
            "mlp_gated": False,
            "parallel": "shared",
        }
    )


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to PhiConfig's fields."""
    return restated(config, *SAME, "head_dim") | {
        "layer_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """Phi's spelling of every tensor."""
    found = {
        EMBEDDING: Stored(EMBEDDING),
        FINAL_NORM: Stored("model.final_layernorm.weight"),
        "model.norm.bias": Stored("model.final_layernorm.bias"),
        HEAD: Stored(HEAD),
        "lm_head.bias": Stored("lm_head.bias"),
    }
    for block in range(config.num_hidden_layers):
        for ours, theirs in BLOCK.items():
            for kind in ("weight", "bias"):
                found[f"{prefix(block)}{ours}.{kind}"] = Stored(f"{prefix(block)}{theirs}.{kind}")
    return found


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base: dict[str, Any] = {
        "model_type": "phi", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 64, "layer_norm_eps": 1e-3,
    }  # fmt: skip
    tied = {"tie_word_embeddings": True, "num_key_value_heads": 2, "partial_rotary_factor": 0.75}
    return {"phi": base, "phi-tied-gqa": base | tied, "phi-wide-heads": base | {"head_dim": 12}}
