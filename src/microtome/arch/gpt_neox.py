"""GPT-NeoX and Pythia: LayerNorm, both halves side by side with a norm each, one packed query_key_value, head by head.

A part of every head turns. Its config has no width of heads of its own, so what is sliced is Microtome's.
"""

from typing import Any

from microtome.arch import Stored, copied, restated
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD, prefix
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("gpt_neox",)
CONTAINERS = ()
SAME = ("intermediate_size", "num_attention_heads", "hidden_act", "attention_bias")
HANDLED = frozenset({
    *SAME, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "layer_norm_eps", "use_parallel_residual", "rotary_pct", "rotary_emb_base", "partial_rotary_factor",
    "hidden_dropout", "classifier_dropout",
})  # fmt: skip
BLOCK = {
    "input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.o_proj": "attention.dense", "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
}  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """GPTNeoXConfig to canonical fields."""
    return copied(config, *SAME) | {
        "norm": "layer",
        "norm_eps": config.layer_norm_eps,
        "norm_bias": True,
        "final_norm_bias": True,
        "rope_parameters": dict(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
        "mlp_bias": True,
        "mlp_out_bias": True,
        "mlp_gated": False,
        "parallel": "separate" if config.use_parallel_residual else "none",
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to GPTNeoXConfig's fields."""
    return restated(config, *SAME) | {
        "layer_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
        "use_parallel_residual": config.parallel != "none",
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """GPT-NeoX's spelling; of query_key_value every head has its queries, its keys and its values, in that order."""
    body, wide = "gpt_neox.", config.per_layer_config[0].head_dim
    rows = {
        one: tuple((3 * head + place) * wide + row for head in range(config.num_attention_heads) for row in range(wide))
        for place, one in enumerate("qkv")
    }
    found = {
        EMBEDDING: Stored(f"{body}embed_in.weight"),
        FINAL_NORM: Stored(f"{body}final_layer_norm.weight"),
        "model.norm.bias": Stored(f"{body}final_layer_norm.bias"),
        HEAD: Stored("embed_out.weight"),
    }
    for block in range(config.num_hidden_layers):
        ours, theirs = prefix(block), f"{body}layers.{block}."
        for kind in ("weight", "bias"):
            found |= {f"{ours}{mine}.{kind}": Stored(f"{theirs}{name}.{kind}") for mine, name in BLOCK.items()}
            for one in "qkv":
                packed = Stored(f"{theirs}attention.query_key_value.{kind}", rows[one])
                found[f"{ours}self_attn.{one}_proj.{kind}"] = packed
    return found


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base: dict[str, Any] = {
        "model_type": "gpt_neox", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 64, "rotary_pct": 0.25, "layer_norm_eps": 1e-3,
    }  # fmt: skip
    turned = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
    return {
        "gpt_neox": base,
        "gpt_neox-tied-plain": base | {"tie_word_embeddings": True, "attention_bias": False, "rotary_pct": 1.0},
        "gpt_neox-sequential": base | {"use_parallel_residual": False, "rope_parameters": turned},
    }
