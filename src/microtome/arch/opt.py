"""OPT: LayerNorm, biases everywhere, ReLU, learned positions that start at row 2 of their table."""

from typing import Any

from microtome.arch import Stored, copied, restated
from microtome.errors import UnsupportedModel
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, prefix
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("opt",)
CONTAINERS = ()
HANDLED = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings",
    "num_attention_heads", "ffn_dim", "activation_function", "enable_bias", "layer_norm_elementwise_affine",
    "do_layer_norm_before", "word_embed_proj_dim", "_remove_final_layer_norm", "dropout",
    "activation_dropout", "layerdrop", "init_std",
})  # fmt: skip
BLOCK = {
    "input_layernorm": "self_attn_layer_norm", "post_attention_layernorm": "final_layer_norm",
    "self_attn.q_proj": "self_attn.q_proj", "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj", "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
}  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """OPTConfig to canonical fields."""
    if not config.do_layer_norm_before:
        raise UnsupportedModel(
            "this OPT normalises after each half (do_layer_norm_before=false, as opt-350m does): its residual stream "
            "cannot be rotated. Use another size of OPT."
        )
    if config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedModel(
            f"this OPT projects embeddings of width {config.word_embed_proj_dim} to {config.hidden_size}, "
            "which Microtome does not read."
        )
    affine, bias = config.layer_norm_elementwise_affine, config.enable_bias
    return copied(config, "num_attention_heads") | {
        "intermediate_size": config.ffn_dim,
        "hidden_act": config.activation_function,
        "norm": "layer",
        "norm_eps": 1e-5,  # not in the config: torch's default
        "norm_gain": affine,
        "norm_bias": affine,
        "final_norm": not config._remove_final_layer_norm,  # noqa: SLF001 - OPT's public spelling
        "final_norm_gain": affine,
        "final_norm_bias": affine,
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bias,
        "mlp_out_bias": bias,
        "mlp_gated": False,
        "positions": "learned",
        "position_offset": 2,
        "position_from_mask": True,
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to OPTConfig's fields."""
    return restated(config, "num_attention_heads") | {
        "ffn_dim": config.intermediate_size,
        "activation_function": config.hidden_act,
        "enable_bias": config.attention_bias,
        "layer_norm_elementwise_affine": config.norm_gain,
        "word_embed_proj_dim": config.hidden_size,
        "_remove_final_layer_norm": not config.final_norm,
    }


def names(config: MicrotomeConfig) -> dict[str, Stored]:
    """OPT's spelling of every tensor."""
    decoder = "model.decoder."
    found = {
        EMBEDDING: Stored(f"{decoder}embed_tokens.weight"),
        POSITIONS: Stored(f"{decoder}embed_positions.weight"),
        FINAL_NORM: Stored(f"{decoder}final_layer_norm.weight"),
        "model.norm.bias": Stored(f"{decoder}final_layer_norm.bias"),
        HEAD: Stored(HEAD),
    }
    for block in range(config.num_hidden_layers):
        for ours, theirs in BLOCK.items():
            for kind in ("weight", "bias"):
                found[f"{prefix(block)}{ours}.{kind}"] = Stored(f"{decoder}layers.{block}.{theirs}.{kind}")
    return found


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base: dict[str, Any] = {
        "model_type": "opt", "vocab_size": 97, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 64, "word_embed_proj_dim": 48, "dropout": 0.0,
    }  # fmt: skip
    return {"opt-tied": base, "opt-untied-gelu": base | {"tie_word_embeddings": False, "activation_function": "gelu"}}
