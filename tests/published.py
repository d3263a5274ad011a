"""Configs of published models, written by hand from what their authors state, with their parameters (tied once).

More sizes beside those of `test_arch.PUBLISHED`, so that a family is seen small and large. `ALL` is both.
"""

from typing import Any

from test_arch import PUBLISHED

Config = dict[str, Any]


def like(name: str, **fields: Any) -> Config:
    """The config of a smaller or larger sister: the same but for these fields."""
    return PUBLISHED[name][1] | fields


def opt(width: int, blocks: int, heads: int) -> Config:
    """An OPT: its MLP is four times as wide as its stream, and embeddings are not projected."""
    return like("opt-125m", hidden_size=width, ffn_dim=4 * width, word_embed_proj_dim=width,
                num_hidden_layers=blocks, num_attention_heads=heads)  # fmt: skip


def pythia(width: int, blocks: int, heads: int, vocabulary: int) -> Config:
    """A Pythia: its MLP is four times as wide as its stream; the larger ones have a vocabulary padded further."""
    return like("pythia-70m", hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
                num_attention_heads=heads, vocab_size=vocabulary)  # fmt: skip


SISTERS: dict[str, tuple[int, Config]] = {
    "Llama-2-70b-hf": (68_976_648_192, like(
        "Llama-2-7b-hf", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )),
    "Mistral-7B-v0.3": (7_248_023_552, like(
        "Mistral-7B-v0.1", vocab_size=32768, rope_theta=1000000.0, sliding_window=None,
    )),
    "Qwen2.5-7B": (7_615_616_512, like(
        "Qwen2.5-0.5B", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, max_window_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
        max_position_embeddings=131072, sliding_window=131072,
    )),
    "Qwen3-8B": (8_190_735_360, like(
        "Qwen3-0.6B", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, max_window_layers=36,
        num_attention_heads=32, tie_word_embeddings=False,
    )),
    "opt-1.3b": (1_315_758_080, opt(2048, 24, 32)),
    "opt-66b": (65_719_701_504, opt(9216, 64, 72)),
    "gpt2-xl": (1_557_611_200, like("gpt2", n_embd=1600, n_head=25, n_layer=48)),
    "pythia-6.9b": (6_857_302_016, pythia(4096, 32, 32, 50432)),
    "phi-1_5": (1_418_270_720, like(
        "phi-2", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, partial_rotary_factor=0.5,
    )),
    "phi-4": (14_659_507_200, like(
        "Phi-3-mini-4k-instruct", hidden_size=5120, intermediate_size=17920, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=10, vocab_size=100352, max_position_embeddings=16384,
        original_max_position_embeddings=16384, rope_theta=250000.0, sliding_window=None, bos_token_id=100257,
        eos_token_id=100265, pad_token_id=100349,
    )),
    "gemma-7b": (8_537_680_896, like(
        "gemma-2b", hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16,
    )),
    "gemma-2-9b": (9_241_705_984, like(
        "gemma-2-2b", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8,
    )),
    "gemma-3-270m": (268_098_176, like(
        "gemma-3-1b-pt", hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
    )),
    "granite-3.0-8b-base": (8_170_848_256, like(
        "granite-3.0-2b-base", hidden_size=4096, intermediate_size=12800, attention_multiplier=0.0078125,
        logits_scaling=16.0,
    )),
    "OLMo-2-1124-7B": (7_298_617_344, like(
        "OLMo-2-0425-1B", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    )),
}  # fmt: skip
ALL: dict[str, tuple[int, Config]] = PUBLISHED | SISTERS

OPT_350M: Config = opt(1024, 24, 16) | {"do_layer_norm_before": False, "word_embed_proj_dim": 512}
