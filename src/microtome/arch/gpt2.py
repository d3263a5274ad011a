"""GPT-2: LayerNorm, learned positions, weights stored [in, out], queries, keys and values packed in one.

Its config has no width of heads of its own, so what is sliced is Microtome's.
"""

from typing import Any

from microtome.arch import TOKENS, Stored
from microtome.errors import UnsupportedModel
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, prefix
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("gpt2",)
CONTAINERS = ()
SIZES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "vocab_size": "vocab_size", "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
HANDLED = frozenset({
    *SIZES.values(), "n_inner", "n_ctx", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",  # the same scores, with more digits
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "n_special", "predict_special_tokens", "output_past",
    "_num_labels", "id2label", "label2id",
})  # fmt: skip
BLOCK = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}


def lower(config: Any) -> dict[str, Any]:
    """GPT2Config to canonical fields."""
    if config.scale_attn_by_inverse_layer_idx:
        raise UnsupportedModel(
            "this gpt2 divides scores by the number of the block (scale_attn_by_inverse_layer_idx=true), "
            "which Microtome does not read."
        )
    biases = ("norm_bias", "final_norm_bias", "attention_bias", "attention_out_bias", "mlp_bias", "mlp_out_bias")
    read = {ours: getattr(config, theirs) for ours, theirs in SIZES.items()}
    return (
        read
        | {name: getattr(config, name) for name in TOKENS}
        | dict.fromkeys(biases, True)
        | {
            "intermediate_size": config.n_inner or 4 * config.n_embd,
            "norm": "layer",
            "attention_scale": None if config.scale_attn_weights else 1.0,
            "mlp_gated": False,
            "positions": "learned",
        }
    )


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to GPT2Config's fields."""
    return {theirs: getattr(config, ours) for ours, theirs in SIZES.items()} | {
        "n_inner": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "scale_attn_weights": config.attention_scale is None,
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """GPT-2's spelling; its linears are stored transposed."""
    body, sizes = "transformer.", config.per_layer_config[0]
    wide = sizes.num_attention_heads * sizes.head_dim
    rows = {one: tuple(range(place * wide, (place + 1) * wide)) for place, one in enumerate("qkv")}
    found = {
        EMBEDDING: Stored(f"{body}wte.weight"),
        POSITIONS: Stored(f"{body}wpe.weight"),
        FINAL_NORM: Stored(f"{body}ln_f.weight"),
        "model.norm.bias": Stored(f"{body}ln_f.bias"),
        HEAD: Stored(HEAD),
    }
    for block in range(config.num_hidden_layers):
        ours, theirs = prefix(block), f"{body}h.{block}."
        for kind in ("weight", "bias"):
            turned = kind == "weight"
            found |= {f"{ours}{mine}.{kind}": Stored(f"{theirs}{name}.{kind}") for mine, name in NORMS.items()}
            for mine, name in BLOCK.items():
                found[f"{ours}{mine}.{kind}"] = Stored(f"{theirs}{name}.{kind}", None, turned)
            for one in "qkv":
                packed = Stored(f"{theirs}attn.c_attn.{kind}", rows[one], turned)
                found[f"{ours}self_attn.{one}_proj.{kind}"] = packed
    return found


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base: dict[str, Any] = {
        "model_type": "gpt2", "vocab_size": 97, "n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 6,
        "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2, "layer_norm_epsilon": 1e-3,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    other = {"n_inner": None, "scale_attn_weights": False, "activation_function": "relu"}
    return {"gpt2-tied": base, "gpt2-untied": base | {"tie_word_embeddings": False} | other}
