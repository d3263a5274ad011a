"""Every architecture against transformers' own class, and the way there and back.

Parity is max|difference| <= 1e-5 max|logit| in fp32. The configs are those that each table lists for tests, so a new
table is tested the moment its file exists.
"""

import copy
import math
import re
from typing import Any

import pytest
import torch
from models import TINY, built, canonical, error, from_stock, ids, logits, ours, stepwise, stock, stored
from torch import Tensor
from transformers import AutoModelForCausalLM

from microtome import arch, layout
from microtome.errors import BadCheckpoint, UnsupportedModel
from microtome.surgery import rebuilt

PARITY = 1e-5
ROTARY = [name for name in TINY if canonical(name)[0].positions == "rotary"]

each_model = pytest.mark.parametrize("name", TINY)


def counted(mask: Tensor) -> Tensor:
    """Positions as generate() makes them from a mask."""
    return (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 1)


def padded(side: str, length: int = 14) -> Tensor:
    """A mask of three rows: nothing, a little and a lot of padding on one side."""
    real = torch.tensor([length, length - 3, 5])[:, None]
    place = torch.arange(length)[None]
    return (place < real if side == "right" else place >= length - real).long()


# --- parity ---------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits(name: str, attention: str) -> None:
    theirs, mine = stock(name), ours(name)
    tokens = ids(length=20)
    want = logits(theirs, tokens)
    mine.set_attn_implementation(attention)
    try:
        assert error(logits(mine, tokens), want) <= PARITY
    finally:
        mine.set_attn_implementation("sdpa")


@each_model
def test_random_models_are_not_degenerate(name: str) -> None:
    """Parity means little where logits do not depend on the past: change the first token, and the last logits move."""
    tokens = ids()
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % 90 + 3
    last = canonical(name)[0].sliding_window is None
    moved = (logits(stock(name), changed) - logits(stock(name), tokens)).abs()
    assert moved[:, -1 if last else 6].max() > 1e-2
    assert logits(stock(name), tokens).std() > 0.3


@each_model
def test_logits_with_a_cache(name: str) -> None:
    """A prefill, a chunk, then token by token, past the window of the models that have one."""
    tokens = ids(length=18)
    want = logits(stock(name), tokens)
    assert error(stepwise(ours(name), tokens, [5, 3, *[1] * 10]), want) <= PARITY


@each_model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit", [True, False], ids=["position_ids", "no-position_ids"])
def test_padding(name: str, side: str, explicit: bool) -> None:
    mask, tokens = padded(side), ids(3, 14)
    given = {"position_ids": counted(mask)} if explicit else {}
    real = mask.bool()
    have = logits(ours(name), tokens, attention_mask=mask, **given)[real]
    assert error(have, logits(stock(name), tokens, attention_mask=mask, **given)[real]) <= PARITY
    if explicit or side == "right" or canonical(name)[0].position_from_mask:
        alone = torch.cat([logits(stock(name), row[one][None])[0] for row, one in zip(tokens, real, strict=True)])
        assert error(have, alone) <= PARITY


@each_model
def test_left_padding_with_a_cache(name: str) -> None:
    mask, tokens = padded("left"), ids(3, 14)
    have = stepwise(ours(name), tokens, [9, 2, 1, 1, 1], mask)
    assert error(have[:, 9:], stepwise(stock(name), tokens, [9, 2, 1, 1, 1], mask)[:, 9:]) <= PARITY
    assert error(have[mask.bool()], logits(ours(name), tokens, attention_mask=mask)[mask.bool()]) <= PARITY


@pytest.mark.parametrize("name", ROTARY)
def test_past_the_original_length(name: str) -> None:
    """Rotary models run past max_position_embeddings (64), and past llama3's original context (32)."""
    tokens = ids(1, 90)
    assert error(logits(ours(name), tokens), logits(stock(name), tokens)) <= PARITY


@each_model
@pytest.mark.parametrize(
    "how", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 1, "cache_implementation": "static"}], ids=str
)
def test_generate(name: str, how: dict[str, Any]) -> None:
    """The same tokens as transformers' class, for a batch with padding on the left."""
    mask, tokens = padded("left", 9), ids(3, 9)
    call = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    assert torch.equal(ours(name).generate(tokens, **call), stock(name).generate(tokens, **call))


@each_model
def test_bf16_is_as_close_as_transformers(name: str) -> None:
    tokens = ids(length=20)
    want = logits(stock(name), tokens)
    have = logits(copy.deepcopy(ours(name)).to(torch.bfloat16), tokens).float()
    theirs = logits(copy.deepcopy(stock(name)).to(torch.bfloat16), tokens).float()
    off = (have - want).square().mean().sqrt()
    assert off <= 1.25 * (theirs - want).square().mean().sqrt()
    assert off < 0.1 * want.std()


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequency_scalings(scaling: str) -> None:
    """Below and above the original context, and below again: some scalings remember the longest text that they met."""
    fields = TINY["llama"] | {"rope_parameters": SCALINGS[scaling], "max_position_embeddings": 32}
    theirs = built(fields)
    mine = from_stock(theirs, fields)
    plain = built(TINY["llama"])
    for length in (12, 50, 12):
        tokens = ids(1, length)
        assert error(logits(mine, tokens), logits(theirs, tokens)) <= PARITY
    assert error(logits(theirs, ids(1, 50)), logits(plain, ids(1, 50))) > 1e-3


VARIANTS: dict[str, dict[str, Any]] = {
    "activation": TINY["llama"] | {"hidden_act": "gelu_pytorch_tanh"},
    "one key-value head": TINY["llama"] | {"num_key_value_heads": 1},
    "window on some blocks": TINY["qwen3-bias"]
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "layer_types": TINY["qwen2-tied"]
    | {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "head_dim in qwen2": TINY["qwen2-tied"] | {"head_dim": 12},
    "no gains": TINY["opt-tied"] | {"layer_norm_elementwise_affine": False},
    "no biases": TINY["opt-tied"] | {"enable_bias": False},
    "no final norm": TINY["opt-tied"] | {"_remove_final_layer_norm": True},
    "head_dim left out": {key: value for key, value in TINY["mistral"].items() if key != "head_dim"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_features_beside_the_tables_own_lists(name: str) -> None:
    fields, tokens = VARIANTS[name], ids(length=16)
    theirs = built(fields)
    mine = from_stock(theirs, fields)
    want = logits(theirs, tokens)
    assert error(logits(mine, tokens), want) <= PARITY
    assert error(stepwise(mine, tokens, [3, *[1] * 13]), want) <= PARITY
    assert_same_config(arch.raise_config(fields, arch.lower(fields)), fields)


def assert_same_config(raised: dict[str, Any], fields: dict[str, Any]) -> None:
    """transformers sees the same config; Qwen2's head_dim, which its class reads unnamed, may be spelled out."""
    have, want = arch.stock_config(raised).to_dict(), arch.stock_config(fields).to_dict()
    assert {key: have[key] for key in want} == want
    assert set(have) - set(want) <= {"head_dim"}
    whole = arch.stock_config(fields)
    assert have.get("head_dim") in {want.get("head_dim"), whole.hidden_size // whole.num_attention_heads}


# --- there and back -------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_come_back_byte_for_byte(name: str, dtype: torch.dtype) -> None:
    want = {key: tensor.to(dtype) for key, tensor in stored(stock(name)).items()}
    config, table = canonical(name)[0], arch.find(TINY[name]["model_type"])
    have: dict[str, Tensor] = {}
    for part in layout.parts(config):
        places = arch.stored_names(table, config, part)
        raised = arch.raise_tensors(arch.lower_tensors(want, places), places)
        assert not set(raised) & set(have)
        have |= raised
    assert set(have) == set(want)
    for key, tensor in want.items():
        assert have[key].dtype == dtype
        assert have[key].shape == tensor.shape
        assert torch.equal(have[key].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


def test_packed_and_transposed_tensors_come_back() -> None:
    """Rows of one stored tensor, interleaved, and a transposed one."""
    generator = torch.Generator().manual_seed(0)
    packed, turned = torch.randn(6, 4, generator=generator), torch.randn(4, 5, generator=generator)
    places = {
        "q": arch.Stored("qkv", (0, 3)), "k": arch.Stored("qkv", (1, 4)), "v": arch.Stored("qkv", (5, 2)),
        "up": arch.Stored("c_fc", None, True), "a": arch.Stored("both", (1,), True),
        "b": arch.Stored("both", (0, 2), True),
    }  # fmt: skip
    both = torch.randn(4, 3, generator=generator)
    lowered = arch.lower_tensors({"qkv": packed, "c_fc": turned, "both": both}, places)
    assert torch.equal(lowered["k"], packed[[1, 4]])
    assert torch.equal(lowered["v"], torch.stack([packed[5], packed[2]]))
    assert torch.equal(lowered["up"], turned.T)
    assert torch.equal(lowered["a"], both[:, 1][None])
    raised = arch.raise_tensors(lowered, places)
    assert torch.equal(raised["qkv"], packed)
    assert torch.equal(raised["c_fc"], turned)
    assert torch.equal(raised["both"], both)


@each_model
def test_config_comes_back(name: str) -> None:
    fields = TINY[name]
    before = copy.deepcopy(fields)
    raised = arch.raise_config(fields, arch.lower(fields))
    assert_same_config(raised, fields)
    assert set(fields) <= set(raised)
    assert fields == before  # transformers rewrites nested fields in place


@each_model
def test_config_comes_back_from_what_transformers_writes(name: str) -> None:
    """config.json as save_pretrained writes it, which names every field."""
    written = stock(name).config.to_diff_dict() | {"model_type": TINY[name]["model_type"]}
    assert arch.canonical_fields(arch.lower(written)) == arch.canonical_fields(canonical(name)[0])
    assert_same_config(arch.raise_config(written, arch.lower(written)), written)


def test_a_container_says_what_its_own_config_cannot() -> None:
    """LlamaConfig refuses a width that is no multiple of the heads; MistralConfig holds the same model."""
    fields = TINY["llama"]
    narrow = arch.lower(fields)
    narrow.hidden_size = narrow.residual_in = narrow.residual_mid = narrow.residual_out = narrow.embedding_size = 44
    raised = arch.raise_config(fields, narrow)
    assert raised["model_type"] == "mistral"
    assert raised["architectures"] == ["MistralForCausalLM"]
    model = built(raised, seed=3)
    assert type(model).__name__ == "MistralForCausalLM"
    assert error(logits(from_stock(model, raised), ids()), logits(model, ids())) <= PARITY


def test_what_no_config_can_say_is_named() -> None:
    fields = TINY["opt-tied"]
    narrow = arch.lower(fields)
    narrow.norm_divisor = 48
    with pytest.raises(arch.NotStock, match="opt cannot say norm_divisor=48"):
        arch.raise_config(fields, narrow)


@each_model
def test_parameters_are_counted_as_transformers_counts(name: str) -> None:
    assert layout.count(canonical(name)[0]) == stock(name).num_parameters()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_unknown_architecture() -> None:
    with pytest.raises(UnsupportedModel, match=r"architecture 'mamba' is not supported\. Supported: .*llama, mistral"):
        arch.lower({"model_type": "mamba"})
    with pytest.raises(UnsupportedModel, match="architecture 'None' is not supported"):
        arch.lower({})


UNKNOWN: list[tuple[str, Any]] = [
    ("attention_multiplier", 0.5),
    ("logits_scaling", 8.0),
    ("num_local_experts", 4),
    ("quantization_config", {"quant_method": "gptq"}),
    ("partial_rotary_factor", 0.5),
    ("attn_logit_softcapping", 50.0),
    ("no_rope_layers", [1, 0, 1]),
]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (name, field, value)
        for name, fields in TINY.items()
        for field, value in UNKNOWN
        if field not in arch.find(fields["model_type"]).HANDLED
    ],
)
def test_unknown_fields_are_refused_and_named(name: str, field: str, value: Any) -> None:
    if field in arch.find(TINY[name]["model_type"]).HANDLED:
        return
    with pytest.raises(UnsupportedModel, match=rf"Microtome does not know: {re.escape(f'{field}={value!r}')}\.$"):
        arch.lower(TINY[name] | {field: value})


@each_model
def test_fields_that_change_nothing_are_accepted(name: str) -> None:
    idle = {
        "torch_dtype": "float16",
        "transformers_version": "4.40.0",
        "use_cache": False,
        "_name_or_path": "x",
        "auto_map": {},
    }
    more = {"num_local_experts": None, "architectures": ["X"], "initializer_range": 0.01}
    assert arch.canonical_fields(arch.lower(TINY[name] | idle | more)) == arch.canonical_fields(canonical(name)[0])


@pytest.mark.parametrize("name", ROTARY)
def test_a_rotary_feature_that_transformers_ignores_is_no_feature_of_ours(name: str) -> None:
    """These classes rotate whole heads whatever rope_parameters say of a part: refuse it, or do the same."""
    fields = TINY[name] | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    }
    theirs = built(fields)
    try:
        mine = from_stock(theirs, fields)
    except UnsupportedModel as refusal:
        assert "partial_rotary_factor" in str(refusal)  # noqa: PT017
        return
    assert error(logits(mine, ids()), logits(theirs, ids())) <= PARITY


def test_a_partial_rotary_of_one_kind_of_block_is_refused() -> None:
    fields = copy.deepcopy(TINY["gemma3_text-scaled-bias"])
    fields["rope_parameters"]["sliding_attention"]["partial_rotary_factor"] = 0.5
    with pytest.raises(UnsupportedModel, match=r"does not know: partial_rotary_factor=0\.5\.$"):
        arch.lower(fields)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
def test_gemmas_that_see_later_tokens_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"this {name} attends to later tokens \(use_bidirectional_attention\)"):
        arch.lower(TINY[name] | {"use_bidirectional_attention": True})
    assert arch.lower(TINY[name] | {"use_bidirectional_attention": False})


@pytest.mark.parametrize(
    ("name", "field"), [("gemma", "hidden_activation"), ("gemma2", "hidden_act"), ("gemma3_text", "hidden_act")]
)
def test_gemmas_with_two_activations_are_refused(name: str, field: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"'gelu_pytorch_tanh' and 'silu', of which transformers follows"):
        arch.lower(TINY[name] | {field: "silu"})
    assert arch.lower(TINY[name] | {field: "gelu_pytorch_tanh"})


def test_blocks_that_do_not_rotate_are_told_apart_from_sizes_that_differ() -> None:
    fields = TINY["smollm3-tied"]
    config = arch.lower(fields)
    assert [config.per_layer_config[block].rotary for block in range(3)] == [True, False, True]
    blocks = {0: {"rotary": False}, 1: {"rotary": False}}
    raised = arch.raise_config(fields, rebuilt(config, blocks))
    assert raised["no_rope_layers"] == [0, 0, 1]
    with pytest.raises(arch.NotStock, match=r"sizes differ between blocks \(intermediate_size\)"):
        arch.raise_config(fields, rebuilt(config, {0: {"intermediate_size": 7}}))
    with pytest.raises(arch.NotStock, match="llama cannot say per_layer_config="):
        arch.raise_config(TINY["llama"], rebuilt(arch.lower(TINY["llama"]), blocks))


def test_post_norm_opt_is_refused_in_words() -> None:
    with pytest.raises(UnsupportedModel, match=r"normalises after each half \(do_layer_norm_before=false, as opt-350m"):
        arch.lower(TINY["opt-tied"] | {"do_layer_norm_before": False})


def test_scores_that_gpt2_divides_by_the_block_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"divides scores by the number of the block"):
        arch.lower(TINY["gpt2-tied"] | {"scale_attn_by_inverse_layer_idx": True})


def test_layer_norms_of_phis_heads_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"LayerNorm on queries and keys \(qk_layernorm=true\)"):
        arch.lower(TINY["phi"] | {"qk_layernorm": True})


def test_projected_embeddings_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="projects embeddings of width 24 to 48"):
        arch.lower(TINY["opt-tied"] | {"word_embed_proj_dim": 24})


def test_a_config_that_transformers_refuses() -> None:
    with pytest.raises(UnsupportedModel, match="transformers refuses this config of 'llama'"):
        arch.lower(TINY["llama"] | {"hidden_size": "wide"})
    with pytest.raises(UnsupportedModel, match="transformers refuses this config of 'llama'"):
        arch.lower(TINY["llama"] | {"hidden_size": 50})


@each_model
def test_missing_and_extra_tensors_are_named(name: str) -> None:
    config, table = canonical(name)[0], arch.find(TINY[name]["model_type"])
    have = list(stored(stock(name)))
    arch.check_names(have, config, table)
    head = table.names(config)[layout.HEAD].name
    arch.check_names([*have, head, "model.layers.0.self_attn.rotary_emb.inv_freq"], config, table)
    gone = have[3]
    with pytest.raises(BadCheckpoint, match=re.escape(f"lacks 1 tensors of a {config.source_model_type}: {gone}.")):
        arch.check_names([one for one in have if one != gone], config, table)
    with pytest.raises(UnsupportedModel, match=r"has 1 tensors .*does not know: model\.layers\.0\.lora_A\."):
        arch.check_names([*have, "model.layers.0.lora_A"], config, table)
    with pytest.raises(BadCheckpoint, match=r"and [0-9]+ more"):
        arch.check_names([], config, table)


# --- published models -----------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "torch_dtype": "bfloat16"}
LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "pythia-70m": (70_426_624, {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    }),
    "gpt2": (124_439_808, {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    }),
    "phi-2": (2_779_683_840, {
        "_name_or_path": "microsoft/phi-2", "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "hidden_act": "gelu_new", "hidden_size": 2560,
        "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05, "model_type": "phi",
        "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
        "vocab_size": 51200,
    }),
    "Phi-3-mini-4k-instruct": (3_821_079_552, {
        "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1,
        "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 32064,
    }),
    "Llama-2-7b-hf": (6_738_415_616, LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "Llama-3.1-8B": (8_030_261_248, LLAMA | {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
    }),
    "Llama-3.2-1B": (1_235_814_400, LLAMA | {
        "attention_bias": False, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": [128001, 128008],
    }),
    "Mistral-7B-v0.1": (7_241_732_096, {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    }),
    "Qwen2.5-0.5B": (494_032_768, {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen3-0.6B": (596_049_920, {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "SmolLM3-3B": (3_075_098_624, {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
        "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": False, "use_sliding_window": False,
        "vocab_size": 128256,
    }),
    "granite-3.0-2b-base": (2_533_531_648, {
        "model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.1, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 4096,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49155,
    }),
    "OLMo-2-0425-1B": (1_484_916_736, {
        "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352,
    }),
    "gemma-2b": (2_506_172_416, {
        "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256,
        "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2048,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
        "torch_dtype": "bfloat16", "vocab_size": 256000,
    }),
    "gemma-2-2b": (2_614_341_888, {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000,
    }),
    "gemma-3-1b-pt": (999_885_952, {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    }),
    "opt-125m": (125_239_296, {
        "_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
        "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
        "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>",
        "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_by_their_config(name: str) -> None:
    """Counted without a number allocated, by us and by transformers; the totals are those of the model cards."""
    total, fields = PUBLISHED[name]
    config = arch.lower(fields)
    assert layout.count(config) == total
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(arch.stock_config(fields)).num_parameters() == total
    before = copy.deepcopy(fields)
    assert_same_config(arch.raise_config(fields, config), fields)
    assert fields == before


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.2-1B", "Qwen2.5-0.5B"])
def test_published_frequencies(name: str) -> None:
    """The angles that a position turns by: theta ** (-2 i / head_dim), and llama3's three ranges."""
    from microtome.modeling_microtome import MicrotomeRotary

    fields = PUBLISHED[name][1]
    config = arch.lower(fields)
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    want = []
    for pair in range(head_dim // 2):
        angle = fields["rope_theta"] ** (-2 * pair / head_dim)
        if scaling := fields.get("rope_scaling"):
            turns = scaling["original_max_position_embeddings"] * angle / (2 * math.pi)
            low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
            mix = min(max((turns - low) / (high - low), 0.0), 1.0)
            angle = mix * angle + (1 - mix) * angle / factor
        want.append(angle)
    torch.testing.assert_close(MicrotomeRotary(config).inv_freq, torch.tensor(want), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_table_that_was_not_tried_with_this_release_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 came out 150 % off on 5.15.0, without a word."""
    assert arch.lower(TINY[name]).source_model_type == name
    monkeypatch.setattr("transformers.__version__", "5.22.1")
    with pytest.raises(
        UnsupportedModel, match=rf"{name} was tried with transformers 5\.23 and later, and this is 5\.22\.1"
    ):
        arch.lower(TINY[name])
