"""The model of the timings: a random Llama of 111 M parameters. Only its shapes matter."""

from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 4096


def random_llama() -> LlamaForCausalLM:
    """Width 1024, 8 blocks, as torch's seed has it."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=8,
            num_attention_heads=16,
            max_position_embeddings=2048,
        )
    )
