"""The same decoder without constants: what one architecture multiplies by lies in the weights of any.

Folded are the divisor and the offset of norms, missing gains, and the scales of embeddings, scores, halves and logits.
Every weight is multiplied at most once, so that the cast back rounds once. What a norm is multiplied by stays in its
gain; `surgery.standardised` is the form with gains of one, for files that store gains in 16 bits.

An RMSNorm over r numbers that divides by n is the usual one times sqrt(n / r), with epsilon times n / r.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from microtome import layout
from microtome.layout import EMBEDDING, FINAL_NORM, Part, prefix
from microtome.modeling_microtome import MicrotomeConfig
from microtome.surgery import Tensors, rebuilt


def shared(config: MicrotomeConfig) -> MicrotomeConfig:
    """The same config with what all blocks have in common said once."""
    blocks = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
    names = [name for name in config.per_layer_attributes or () if name != "skip"]
    values = {name: getattr(blocks[0], name) for name in names}
    same = {name: value for name, value in values.items() if all(getattr(one, name) == value for one in blocks)}
    return rebuilt(config, **same) if same else config


def stretch(config: MicrotomeConfig) -> float:
    """The divisor of the norms as a multiple of the width that they read."""
    return (config.norm_divisor or config.hidden_size) / config.hidden_size


def plain_config(config: MicrotomeConfig) -> MicrotomeConfig:
    """The config of the same function after `plained`, for a stream of one width."""
    eps, biased = config.norm_eps * stretch(config), config.norm == "layer" or config.norm_bias
    blocks = {block: {"attention_scale": None} for block in range(config.num_hidden_layers)}
    return rebuilt(
        config,
        blocks,
        norm_divisor=None,
        norm_offset=0.0,
        norm_eps=eps,
        norm_gain=True,
        norm_bias=biased,
        final_norm_gain=config.final_norm,
        final_norm_bias=config.final_norm and (biased or config.final_norm_bias),
        qk_norm_eps=None if config.qk_norm is None else eps,
        attention_scale=None,
        embedding_scale=1.0,
        residual_scale=1.0,
        logits_scale=1.0,
    )


def plained(tensors: Mapping[str, Tensor], part: Part, config: MicrotomeConfig) -> Tensors:
    """The canonical tensors of a part with all constants folded in, computed in fp64, in the type that they have."""
    plain = plain_config(config)
    out = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    like = next(one.dtype for one in [*tensors.values(), torch.ones(1)] if one.is_floating_point())
    if part == "stem":
        out[EMBEDDING] = out[EMBEDDING] * config.embedding_scale
    else:
        fill_norms(out, part, config, plain)
        factors = head_factors(config) if part == "head" else block_factors(config, plain, int(part))
        for name, factor in factors.items():
            if name in out and factor != 1.0:
                out[name] = out[name] * factor
    return {name: tensor.to(like) if tensor.is_floating_point() else tensor for name, tensor in out.items()}


def fill_norms(tensors: Tensors, part: Part, config: MicrotomeConfig, plain: MicrotomeConfig) -> None:
    """Gains with their offset, ones and zeros where a norm has no gain or bias, in place."""
    for name, shape in layout.shapes(plain, part).items():
        if name.endswith("norm.weight"):
            ones = torch.full(shape, 1.0 - config.norm_offset, dtype=torch.float64)
            tensors[name] = tensors.get(name, ones) + config.norm_offset
        elif name.endswith("norm.bias") and name not in tensors:
            tensors[name] = torch.zeros(shape, dtype=torch.float64)


def head_factors(config: MicrotomeConfig) -> dict[str, float]:
    """What the last norm takes over: of a tied head also what its table was multiplied by."""
    logits = config.logits_scale / (config.embedding_scale if config.tie_word_embeddings else 1.0)
    found = {"lm_head.bias": config.logits_scale}
    if not config.final_norm:
        return found | {layout.HEAD: logits}
    return found | {FINAL_NORM: logits * stretch(config) ** 0.5, "model.norm.bias": logits}


def block_factors(config: MicrotomeConfig, plain: MicrotomeConfig, block: int) -> dict[str, float]:
    """What the tensors of a block are multiplied by."""
    sizes, half = config.per_layer_config[block], "self_attn."
    root: float = stretch(config) ** 0.5
    before = {f"{name}.weight": root for name in ("input_layernorm", "post_attention_layernorm")}
    scores: float = 1.0 if sizes.attention_scale is None else sizes.attention_scale * sizes.head_dim**0.5
    if config.qk_norm is None:
        found = before | {f"{half}q_proj.{kind}": scores for kind in ("weight", "bias")}
    else:  # the norm would undo a scale before it, but for its epsilon
        eps: float = (plain.norm_eps / (config.qk_norm_eps or plain.norm_eps)) ** 0.5
        found = before | {f"{half}{one}_proj.{kind}": eps for one in "qk" for kind in ("weight", "bias")}
        found[f"{half}q_norm.weight"] = scores
    writers = (
        ["self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias"]
        if config.norm_placement == "pre"
        else [f"{half_}_out_layernorm.{kind}" for half_ in ("attn", "mlp") for kind in ("weight", "bias")]
    )
    after = 1.0 if config.norm_placement == "pre" else root
    found |= {name: config.residual_scale * (after if name.endswith("norm.weight") else 1.0) for name in writers}
    return {prefix(block) + name: factor for name, factor in found.items()}
