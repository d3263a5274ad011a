"""The canonical decoder once more, from its definition: one sequence, one head and one position at a time, in fp64.

Written to be obviously right and to share nothing with the decoder under test but names of tensors and fields.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = {"silu": functional.silu, "relu": functional.relu, "gelu": functional.gelu}


def naive_logits(config: Any, tensors: Mapping[str, Tensor], row: Tensor, start: int = 0) -> Tensor:
    """Logits [T, V] of one row of tokens [T] whose first stands at position `start`."""
    tensors = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    first = config.per_layer_config[0].residual_in
    table = tensors["model.embed_tokens.weight"]
    x = table[row][:, :first] * config.embedding_scale
    if config.positions == "learned":
        x = x + tensors["model.embed_positions.weight"][torch.arange(len(row)) + start + config.position_offset]
    for block in range(config.num_hidden_layers):
        head = f"model.layers.{block}."
        mine = {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}
        x = naive_block(config, config.per_layer_config[block], config.layer_types[block], mine, x, start)
    if config.final_norm:
        x = naive_norm(config, tensors, "model.norm", x)
    if config.head_adapter:
        x = affine(tensors, "head_adapter", x)
    head = table if config.tie_word_embeddings else tensors["lm_head.weight"]
    x = (x @ head.T + tensors.get("lm_head.bias", 0.0)) * config.logits_scale
    return x if config.logits_softcap is None else config.logits_softcap * torch.tanh(x / config.logits_softcap)


def affine(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ tensors[f"{name}.weight"].T
    return out + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else out


def naive_norm(config: Any, tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    gain, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    out = []
    for row in x:
        z = row - row.sum() / len(row) if config.norm == "layer" else row
        z = z / math.sqrt((z * z).sum().item() / (config.norm_divisor or len(z)) + config.norm_eps)
        z = z if gain is None else z * (gain + config.norm_offset)
        out.append(z if bias is None else z + bias)
    return torch.stack(out)


def shortcut_matrix(kind: str, tensors: Mapping[str, Tensor], name: str, wide_in: int, wide_out: int) -> Tensor:
    """The matrix [out, in] that a shortcut means."""
    eye = torch.eye(wide_out, wide_in, dtype=torch.float64)
    if kind == "dense":
        return tensors[f"{name}.weight"]
    if kind == "diagonal":
        scale = tensors[f"{name}.weight"]
        return torch.stack([row * scale[i] if i < len(scale) else row * 0 for i, row in enumerate(eye)])
    if kind == "lowrank":
        factor = tensors[f"{name}.weight"]
        return eye @ (torch.eye(wide_in, dtype=torch.float64) - factor @ factor.T)
    if kind == "factored":
        return eye - tensors[f"{name}.left"] @ tensors[f"{name}.right"].T
    return eye


def naive_block(config: Any, sizes: Any, kind: str, tensors: Mapping[str, Tensor], x: Tensor, start: int) -> Tensor:
    skip = set(sizes.skip) if sizes is not config else set()
    wide_in, wide_out = sizes.residual_in, sizes.residual_out
    mid = sizes.residual_mid if config.parallel == "none" else wide_out
    carried = x @ shortcut_matrix(sizes.attn_shortcut, tensors, "attn_shortcut", wide_in, mid).T
    attended = naive_attention_half(config, sizes, kind, tensors, x, start, mid) if "self_attn" not in skip else 0.0
    if config.parallel != "none":
        shared = config.parallel == "shared" and "self_attn" not in skip
        norm = "input_layernorm" if shared else "post_attention_layernorm"
        fed = naive_mlp_half(config, sizes, tensors, x, norm) if "mlp" not in skip else 0.0
        return carried + attended + fed
    x = carried + attended
    carried = x @ shortcut_matrix(sizes.mlp_shortcut, tensors, "mlp_shortcut", mid, wide_out).T
    if "mlp" in skip:
        return carried
    return carried + naive_mlp_half(config, sizes, tensors, x, "post_attention_layernorm")


def naive_attention_half(  # noqa: PLR0917
    config: Any, sizes: Any, kind: str, tensors: Mapping[str, Tensor], x: Tensor, start: int, wide_out: int
) -> Tensor:
    z = naive_norm(config, tensors, "input_layernorm", x) if config.norm_placement in {"pre", "sandwich"} else x
    if "attn_read_index" in tensors:
        z = z[:, tensors["attn_read_index"].long()]
    z = naive_attention(config, sizes, kind, tensors, z, start)
    return written(config, tensors, z, "attn", wide_out)


def naive_mlp_half(config: Any, sizes: Any, tensors: Mapping[str, Tensor], x: Tensor, norm: str) -> Tensor:
    z = naive_norm(config, tensors, norm, x) if config.norm_placement in {"pre", "sandwich"} else x
    if "mlp_read_index" in tensors:
        z = z[:, tensors["mlp_read_index"].long()]
    act = ACTIVATIONS[config.hidden_act]
    up = affine(tensors, "mlp.up_proj", z)
    up = act(affine(tensors, "mlp.gate_proj", z)) * up if config.mlp_gated else act(up)
    return written(config, tensors, affine(tensors, "mlp.down_proj", up), "mlp", sizes.residual_out)


def written(config: Any, tensors: Mapping[str, Tensor], z: Tensor, half: str, wide_out: int) -> Tensor:
    """What a half wrote at its places, behind its norm and scaled."""
    if f"{half}_write_index" in tensors:
        whole = torch.zeros(len(z), wide_out, dtype=z.dtype)
        for column, place in enumerate(tensors[f"{half}_write_index"].tolist()):
            whole[:, place] = z[:, column]
        z = whole
    if config.norm_placement in {"post", "sandwich"}:
        z = naive_norm(config, tensors, f"{half}_out_layernorm", z)
    return z * config.residual_scale


def naive_attention(config: Any, sizes: Any, kind: str, tensors: Mapping[str, Tensor], z: Tensor, start: int) -> Tensor:
    length, heads, groups = len(z), sizes.num_attention_heads, sizes.num_key_value_heads
    query, key = (normed_heads(config, tensors, one, z, count) for one, count in (("q", heads), ("k", groups)))
    value = affine(tensors, "self_attn.v_proj", z).reshape(length, groups, -1)
    scale = sizes.head_dim**-0.5 if sizes.attention_scale is None else sizes.attention_scale
    context = torch.zeros(length, heads, sizes.v_head_dim, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // groups)
        turned_q = [turned(config, sizes, tensors, query[t, head], start + t, group) for t in range(length)]
        turned_k = [turned(config, sizes, tensors, key[t, group], start + t, group) for t in range(length)]
        for t in range(length):
            window = config.sliding_window if kind == "sliding_attention" else length
            seen = range(max(0, t - window + 1), t + 1)
            scores = torch.stack([turned_q[t] @ turned_k[s] * scale for s in seen])
            if config.attention_softcap is not None:
                scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
            weights = (scores - scores.max()).exp()
            context[t, head] = (weights / weights.sum()) @ value[list(seen), group]
    return affine(tensors, "self_attn.o_proj", context.reshape(length, -1))


def normed_heads(config: Any, tensors: Mapping[str, Tensor], one: str, z: Tensor, count: int) -> Tensor:
    """Queries or keys [T, count, K], normed where the model norms them."""
    z = affine(tensors, f"self_attn.{one}_proj", z)
    gain = tensors.get(f"self_attn.{one}_norm.weight")
    if gain is None:
        return z.reshape(len(z), count, -1)
    if config.qk_norm == "head":
        z = z.reshape(len(z), count, -1)
    mean = (z * z).mean(-1, keepdim=True)
    return (z / (mean + config.qk_norm_eps).sqrt() * (gain + config.norm_offset)).reshape(len(z), count, -1)


def turned(config: Any, sizes: Any, tensors: Mapping[str, Tensor], z: Tensor, position: int, group: int) -> Tensor:
    """One query or key [K] turned by its position: pairs are complex numbers."""
    if config.positions != "rotary" or not sizes.rotary:
        return z
    parameters = config.rope_parameters
    dim = int(config.rotary_head_dim * parameters.get("partial_rotary_factor", 1.0))
    if "self_attn.rotary_index" in tensors:
        chosen = tensors["self_attn.rotary_index"][group].tolist()
    else:
        chosen = list(range(dim // 2 if sizes.rotary_pairs is None else sizes.rotary_pairs))
    out = z.clone()
    for place, pair in enumerate(chosen):
        angle = position * parameters["rope_theta"] ** (-2 * pair / dim)
        number = complex(z[place], z[place + len(chosen)]) * complex(math.cos(angle), math.sin(angle))
        out[place], out[place + len(chosen)] = number.real, number.imag
    return out
