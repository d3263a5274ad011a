"""SmolLM3: Llama with blocks that do not rotate, and a window that such blocks may have."""

from typing import Any

from microtome.arch import copied, llama, restated
from microtome.arch.llama import names
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("smollm3",)
CONTAINERS = ()  # its config takes any width
SAME = (
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "layer_types", "sliding_window",
    "attention_bias", "mlp_bias",
)  # fmt: skip
HANDLED = llama.HANDLED | {
    *SAME, "use_sliding_window", "no_rope_layers", "no_rope_layer_interval",
    "max_window_layers",  # published, and read by nobody
}  # fmt: skip


def lower(config: Any) -> dict[str, Any]:
    """SmolLM3Config to canonical fields."""
    still = [block for block in range(config.num_hidden_layers) if not config.no_rope_layers[block]]
    return copied(config, *SAME) | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "attention_out_bias": config.attention_bias,
        "mlp_out_bias": config.mlp_bias,
        "per_layer_config": {block: {"rotary": False} for block in still} or None,
    }


def raise_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """Canonical config to SmolLM3Config's fields."""
    return restated(config, *SAME, "head_dim") | {
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": config.rope_parameters,
        "use_sliding_window": config.sliding_window is not None,
        "no_rope_layers": [int(config.per_layer_config[block].rotary) for block in range(config.num_hidden_layers)],
    }


def tiny() -> dict[str, Any]:
    """Small configs that between them use every feature."""
    base = llama.tiny()["llama"] | {"model_type": "smollm3", "num_key_value_heads": 2, "pad_token_id": 0}
    window = {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [0, 1, 0]}
    return {
        "smollm3-tied": base | {"tie_word_embeddings": True, "no_rope_layer_interval": 2},
        "smollm3-window-biases": base | window | {"attention_bias": True, "mlp_bias": True},
        "smollm3-all-rotary": base | {"no_rope_layers": [1, 1, 1]},
    }


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "lower", "names", "raise_fields", "tiny"]
