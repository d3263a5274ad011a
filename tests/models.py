"""Tiny models with O(1) random weights, biases and gains: in the library's default initialisation errors hide in zeros."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from microtome import arch, layout
from microtome.modeling_microtome import MicrotomeConfig, MicrotomeForCausalLM

TINY: dict[str, dict[str, Any]] = {
    name: fields
    for model_type in sorted(set(arch.known()))
    for name, fields in arch.find(model_type).tiny().items()
    if fields["model_type"] == model_type
}


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
    if model.config.tie_word_embeddings:
        del tensors[layout.HEAD]
    return tensors


def lowered(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[MicrotomeConfig, dict[str, Tensor]]:
    """Canonical config and tensors of a checkpoint."""
    config = arch.lower(fields)
    table = arch.find(fields["model_type"])
    out: dict[str, Tensor] = {}
    for part in layout.parts(config):
        out |= arch.lower_tensors(tensors, arch.stored_names(table, config, part))
    return config, out


def loaded(config: MicrotomeConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> MicrotomeForCausalLM:
    """Our model with exactly these tensors."""
    model = MicrotomeForCausalLM(config)
    model = model.to(dtype or tensors[layout.EMBEDDING].dtype)
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
                limit = int(config.rotary_head_dim * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)) // 2
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
