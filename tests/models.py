"""Tiny models with O(1) random weights, biases and gains: in the default initialisation errors hide in zeros."""

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from microtome import arch, layout, surgery
from microtome.errors import UnsupportedModel
from microtome.modeling_microtome import MicrotomeConfig, MicrotomeForCausalLM
from microtome.surgery import Form

TINY: dict[str, dict[str, Any]] = {
    name: fields
    for model_type in sorted(set(arch.known()))
    for name, fields in arch.find(model_type).tiny().items()
    if fields["model_type"] == model_type
}


def rotates(fields: Mapping[str, Any]) -> bool:
    """Whether rotations leave a model; not, where its table wants a later transformers, as beside an engine."""
    try:
        return arch.lower(fields).norm_placement == "pre"
    except UnsupportedModel as error:
        if "was tried with transformers" not in str(error):
            raise
        return False


SLICED = [name for name, fields in TINY.items() if rotates(fields)]


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values that keep every activation near one: matrices by their fan-in, gains about one, biases about a half."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.5 * noise
    if len(shape) == 1:
        return 1.0 + 0.5 * noise
    return noise if "embed" in name else noise * 1.5 * shape[1] ** -0.5


def built(fields: Mapping[str, Any], seed: int = 0, **options: Any) -> PreTrainedModel:
    """transformers' own model of a config.json, in fp32."""
    model = AutoModelForCausalLM.from_config(arch.stock_config(fields), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(name, tuple(parameter.shape), generator))
    return model.eval()


@cache
def stock(name: str) -> PreTrainedModel:
    """transformers' own model of a tiny config; shared by all tests, who leave it alone."""
    return built(TINY[name])


def stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: tied weights once."""
    tensors = dict(model.state_dict())
    head = tensors.pop(layout.HEAD)
    if model.config.tie_word_embeddings:
        return tensors
    return tensors | {"embed_out.weight" if model.config.model_type == "gpt_neox" else layout.HEAD: head}


def lowered(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[MicrotomeConfig, dict[str, Tensor]]:
    """Canonical config and tensors of a checkpoint."""
    config = arch.lower(fields)
    table = arch.find(fields["model_type"])
    out: dict[str, Tensor] = {}
    for part in layout.parts(config):
        out |= arch.lower_tensors(tensors, arch.stored_names(table, config, part))
    return config, out


def loaded(
    config: MicrotomeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> MicrotomeForCausalLM:
    """Our model with exactly these tensors."""
    model = MicrotomeForCausalLM._from_config(copy.deepcopy(config), dtype=dtype or tensors[layout.EMBEDDING].dtype)
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    assert set(missing) <= ({layout.HEAD} if config.tie_word_embeddings else set()), missing
    assert not unexpected, unexpected
    return model.eval()


@cache
def canonical(name: str) -> tuple[MicrotomeConfig, dict[str, Tensor]]:
    """Canonical config and tensors of a tiny model."""
    return lowered(TINY[name], stored(stock(name)))


@cache
def ours(name: str) -> MicrotomeForCausalLM:
    """Our model of a tiny config; shared by all tests, who leave it alone."""
    return loaded(*canonical(name))


def from_stock(model: PreTrainedModel, fields: Mapping[str, Any]) -> MicrotomeForCausalLM:
    """Our model of transformers' own."""
    return loaded(*lowered(fields, stored(model)))


def random_tensors(config: MicrotomeConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random tensors for any canonical config. Index buffers are drawn without repetition from what they may name."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for part in layout.parts(config):
        for name, shape in layout.shapes(config, part).items():
            if not name.endswith("_index"):
                out[name] = drawn(name, shape, generator).to(dtype)
                continue
            sizes = config.per_layer_config[int(part)]
            if name.endswith("rotary_index"):
                limit = (
                    int(config.rotary_head_dim * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)) // 2
                )
            else:
                limit = index_limit(config, sizes, name)
            rows = [torch.randperm(limit, generator=generator)[: shape[-1]].sort().values for _ in range(shape[0])]
            out[name] = (torch.stack(rows) if len(shape) == 2 else rows[0]).int()
    return out


def index_limit(config: MicrotomeConfig, sizes: Any, name: str) -> int:
    """How wide the stream is where an index reads or writes it."""
    parallel = config.parallel != "none"
    if name.endswith("attn_read_index"):
        return sizes.residual_in
    if name.endswith("attn_write_index"):
        return sizes.residual_out if parallel else sizes.residual_mid
    if name.endswith("mlp_read_index"):
        return sizes.residual_in if parallel else sizes.residual_mid
    return sizes.residual_out


def ids(rows: int = 2, length: int = 12, vocabulary: int = 97, seed: int = 1) -> Tensor:
    """Random tokens; 0 to 2 are left out, so that no model meets its special tokens."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    """Logits without a cache."""
    return model(input_ids=tokens, use_cache=False, **inputs).logits


@torch.no_grad()
def stepwise(model: Any, tokens: Tensor, chunks: Iterable[int], mask: Tensor | None = None) -> Tensor:
    """Logits with a cache, in chunks of these many tokens, nothing but the tokens and the mask being given."""
    cache_, found, start = None, [], 0
    for size in chunks:
        seen = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        out = model(input_ids=tokens[:, start : start + size], past_key_values=cache_, use_cache=True, **seen)
        cache_ = out.past_key_values
        found.append(out.logits)
        start += size
    assert start == tokens.shape[1]
    return torch.cat(found, dim=1)


def error(have: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value that is wanted."""
    assert have.shape == want.shape, (have.shape, want.shape)
    return ((have.double() - want.double()).abs().max() / want.double().abs().max()).item()


def formed(
    config: MicrotomeConfig, tensors: Mapping[str, Tensor], form: Form
) -> tuple[MicrotomeConfig, dict[str, Tensor]]:
    """A decoder in another form, part by part as the pipeline does it."""
    out: dict[str, Tensor] = {}
    for part in layout.parts(config):
        mine = {name: tensors[name] for name in layout.shapes(config, part)}
        if part == "head" and config.tie_word_embeddings and form.untie:
            mine[layout.HEAD] = tensors[layout.EMBEDDING]
        out |= surgery.formed(mine, part, config, form)
    return surgery.formed_config(config, form), out


def doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp64, index buffers as they are."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


# --- decoders that no stock architecture has ------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 20, "max_position_embeddings": 32, "norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
LEARNED: dict[str, Any] = {
    "positions": "learned", "position_offset": 2, "norm": "layer", "norm_bias": True, "final_norm_bias": True,
    "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "mlp_out_bias": True, "mlp_gated": False,
    "hidden_act": "relu", "rope_parameters": None,
}  # fmt: skip


def widths(*each: tuple[int, int, int], **more: Any) -> dict[int, dict[str, Any]]:
    """Per-block widths of the stream, and what else every block has."""
    names = ("residual_in", "residual_mid", "residual_out")
    return {block: dict(zip(names, some, strict=True)) | more for block, some in enumerate(each)}


def dense(size: int | None = None) -> dict[str, Any]:
    return {"attn_shortcut": "dense", "mlp_shortcut": "dense"} | ({} if size is None else {"intermediate_size": size})


def decoder(per_layer_config: dict[int, dict[str, Any]] | None = None, **fields: Any) -> MicrotomeConfig:
    return MicrotomeConfig(**SMALL | fields, per_layer_config=per_layer_config)


RAGGED: dict[str, MicrotomeConfig] = {
    "plain": decoder(),
    "identity shortcuts": decoder(widths((20, 22, 18), (18, 26, 18), (18, 24, 24)), embedding_size=28),
    "dense shortcuts": decoder(widths((20, 22, 18), (18, 26, 18), (18, 16, 24), **dense())),
    "diagonal shortcuts": decoder(
        widths((20, 22, 18), (18, 26, 18), (18, 16, 24), attn_shortcut="diagonal", mlp_shortcut="diagonal")
    ),
    "lowrank shortcuts": decoder(
        widths((18, 18, 20), (20, 22, 22), (22, 22, 24), attn_shortcut="lowrank", mlp_shortcut="lowrank",
               attn_shortcut_rank=5, mlp_shortcut_rank=2)
    ),
    "factored shortcuts": decoder(
        widths((22, 20, 24), (24, 18, 18), (18, 26, 24), attn_shortcut="factored", mlp_shortcut="factored",
               attn_shortcut_rank=3, mlp_shortcut_rank=4)
    ),
    "one shortcut of each kind": decoder({
        0: {"attn_shortcut": "dense", "mlp_shortcut": "lowrank", "mlp_shortcut_rank": 3},
        1: {"attn_shortcut": "diagonal", "mlp_shortcut": "identity"},
        2: {"attn_shortcut": "factored", "attn_shortcut_rank": 2, "mlp_shortcut": "dense"},
    }),
    "heads": decoder({
        0: {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6, "v_head_dim": 5, "rotary_pairs": 3},
        1: {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 7, "attention_scale": 0.2},
        2: {"num_key_value_heads": 4, "v_head_dim": 3},
    }),
    "rotary pairs": decoder({
        0: {"head_dim": 6, "rotary_pairs": 3, "rotary_subset": True, "attention_scale": 8**-0.5},
        1: {"head_dim": 7, "rotary_pairs": 2},
        2: {"rotary": False, "head_dim": 5},
    }, rotary_head_dim=8),
    "partial rotary": decoder(
        {1: {"head_dim": 6, "rotary_pairs": 2, "rotary_subset": True}},
        rope_parameters=SMALL["rope_parameters"] | {"partial_rotary_factor": 0.75}, rotary_head_dim=8, head_dim=9,
    ),
    "index subsets": decoder({
        0: {"attn_read_size": 10, "attn_write_size": 14, "mlp_read_size": 9},
        1: {"mlp_read_size": 23, "mlp_write_size": 1},
        2: {"attn_write_size": 24, "attn_read_size": 24},
    }),
    "index subsets of ragged widths": decoder(
        {block: some | {"attn_read_size": 10, "attn_write_size": 11, "mlp_read_size": 12, "mlp_write_size": 13}
         for block, some in widths((20, 22, 18), (18, 26, 18), (18, 16, 24), **dense()).items()}
    ),
    "skipped halves": decoder({0: {"skip": ["self_attn"]}, 1: {"skip": ["mlp"]}, 2: {"skip": []}}),
    "skipped blocks": decoder({0: {"skip": ["self_attn", "mlp"]}, 2: {"skip": ["mlp", "self_attn"]}}),
    "parallel, one norm": decoder(parallel="shared"),
    "parallel, one norm, learned": decoder(parallel="shared", **LEARNED),
    "parallel, two norms": decoder(parallel="separate", norm_bias=True, norm="layer"),
    "parallel, ragged": decoder(
        {block: {"residual_in": before, "residual_out": after, "attn_shortcut": "dense"}
         for block, (before, after) in enumerate([(20, 26), (26, 18), (18, 24)])}, parallel="separate"
    ),
    "parallel, skipped attention": decoder({1: {"skip": ["self_attn"]}, 2: {"skip": ["mlp"]}}, parallel="shared"),
    "parallel sandwich": decoder(parallel="shared", norm_placement="sandwich"),
    "parallel sandwich, ragged": decoder(
        {block: {"residual_in": before, "residual_mid": 8, "residual_out": after, "attn_shortcut": "dense",
                 "attn_write_size": 9}
         for block, (before, after) in enumerate([(20, 26), (26, 18), (18, 24)])},
        parallel="separate", norm_placement="sandwich",
    ),
    "post norms": decoder(norm_placement="post"),
    "sandwich norms": decoder(norm_placement="sandwich", norm_offset=1.0),
    "sandwich layer norms": decoder(norm_placement="sandwich", norm="layer", norm_bias=True, final_norm_bias=True),
    "head norms": decoder(qk_norm="head", qk_norm_eps=0.1),
    "full head norms": decoder(qk_norm="full", attention_bias=True),
    "no gains": decoder(norm_gain=False, final_norm_gain=False, norm_divisor=40),
    "no final norm": decoder(final_norm=False),
    "learned positions": decoder(**LEARNED),
    "no positions": decoder(positions="none"),
    "biases": decoder({1: {"attention_bias": False, "mlp_bias": False}}, head_bias=True, attention_bias=True,
                      attention_out_bias=True, mlp_bias=True, mlp_out_bias=True),
    "tied": decoder(tie_word_embeddings=True),
    "tied behind an adapter": decoder(
        widths((20, 22, 18), (18, 26, 18), (18, 16, 24), **dense()), tie_word_embeddings=True, embedding_size=20,
        head_adapter=True, head_adapter_bias=True, final_norm_gain=False,
    ),
    "windows": decoder(
        sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "scales": decoder(
        embedding_scale=2.0, residual_scale=0.7, logits_scale=0.3, logits_softcap=5.0, attention_softcap=2.0
    ),
}  # fmt: skip
