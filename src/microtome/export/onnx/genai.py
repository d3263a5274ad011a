"""What ONNX Runtime GenAI reads beside a graph: sizes of the cache, names of inputs and outputs, special tokens."""

from collections.abc import Mapping
from typing import Any

from microtome.export.onnx.decoder import attentive, cache_widths
from microtome.modeling_microtome import MicrotomeConfig

NAME = "genai_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
TYPE = "llama"  # to GenAI a plain decoder; what the graph computes is not looked at


def even(config: MicrotomeConfig) -> bool:
    """Whether every block has a cache, and all of one size, which is what GenAI makes."""
    blocks = attentive(config)
    sizes = {size for block in blocks for size in cache_widths(config, block)}
    return len(blocks) == config.num_hidden_layers and len(sizes) == 1


def settings(config: MicrotomeConfig, fields: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The file for a graph of an even decoder; special tokens as config.json has them, greedy search."""
    groups, width = cache_widths(config, 0)[0]
    tokens: dict[str, Any] = {name: fields[name] for name in TOKENS if fields.get(name) not in (None, [])}
    last = tokens.setdefault("eos_token_id", 0)
    tokens.setdefault("pad_token_id", last[0] if isinstance(last, list) else last)
    decoder = {
        "filename": model,
        "head_size": width,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.per_layer_config[0].num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": groups,
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"provider_options": []},
    }
    longest = config.max_position_embeddings
    made = {"type": TYPE, "context_length": longest, "vocab_size": config.vocab_size, "decoder": decoder, **tokens}
    return {"model": made, "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": False}}
