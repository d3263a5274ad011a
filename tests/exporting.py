"""Folders to export, and a reader of GGUF files that shares no code with what writes them."""

import json
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import save_file
from torch import Tensor

from microtome import cut, surgery
from microtome.modeling_microtome import MicrotomeConfig


def heads(groups: int, times: int, ffn: int) -> dict[str, int]:
    """The sizes of a block."""
    return {"num_key_value_heads": groups, "num_attention_heads": groups * times, "intermediate_size": ffn}


def blocks(*sizes: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return dict(enumerate(sizes))


NARROW: dict[str, Any] = {
    "hidden_size": 40, "residual_in": 40, "residual_mid": 40, "residual_out": 40, "embedding_size": 40,
    "norm_divisor": 48, "norm_gain": False,
}  # fmt: skip
RAGGED = blocks(heads(2, 3, 80), heads(1, 3, 48), heads(2, 3, 64))
SKIPS = {0: {"skip": ["self_attn"]}, 1: {"skip": ["mlp"]}}
VARIANTS: dict[str, tuple[str, dict[int, dict[str, Any]], dict[str, Any]]] = {  # what a compression makes of tiny ones
    "llama-sliced": ("llama", {}, NARROW | {"final_norm_gain": False}),
    "llama-sliced-tied": ("llama-gqa-llama3-tied", {}, NARROW),
    "llama-heads": ("llama-gqa-llama3-tied", blocks(*[heads(1, 3, 48)] * 3), {}),
    "llama-neurons": ("llama-biases-wide-heads", {0: {"intermediate_size": 33}, 2: {"intermediate_size": 64}}, {}),
    "llama-ragged": ("llama-gqa-llama3-tied", RAGGED, {}),
    "llama-sliced-ragged": ("llama-gqa-llama3-tied", RAGGED, NARROW),
    "llama-skips": ("llama-biases-wide-heads", SKIPS, {}),
    "llama-values": ("llama", blocks({"v_head_dim": 6}, {"v_head_dim": 3}, {"v_head_dim": 8}), {}),
    "granite-ragged": ("granite-biases", RAGGED, {}),
    "phi3-longrope-ragged": ("phi3-partial-longrope", RAGGED, {}),
    "qwen2-sliced-ragged": ("qwen2-tied", RAGGED, NARROW),
    "qwen3-ragged": ("qwen3-tied", RAGGED, {}),
    "qwen3-sliced": ("qwen3-tied", {}, NARROW),
    "qwen3-skips": ("qwen3-tied", SKIPS, {}),
    "gpt2-heads": ("gpt2-tied", blocks(heads(4, 1, 60), heads(3, 1, 48), heads(6, 1, 80)), {}),
    "phi-skips": ("phi", SKIPS | {2: heads(3, 1, 60)}, {}),
    "gpt_neox-skips": ("gpt_neox", SKIPS | {2: heads(3, 1, 60)}, {}),
    "olmo2-heads": ("olmo2", blocks(heads(1, 3, 60), heads(1, 3, 48), heads(2, 3, 80)), {}),
    "gemma-neurons": ("gemma", blocks({"intermediate_size": 60}, {"intermediate_size": 48}), {}),
    "gemma3_text-skips": ("gemma3_text", SKIPS, {}),
}


def variant(name: str) -> tuple[MicrotomeConfig, dict[str, Tensor]]:
    """Config and tensors of one of VARIANTS, in fp32."""
    base, sizes, changes = VARIANTS[name]
    config = surgery.rebuilt(models.canonical(base)[0], sizes, **changes)
    return config, {key: tensor.float() for key, tensor in models.random_tensors(config).items()}


def folder(name: str, place: Path) -> Path:
    """A folder with the tiny model of a name, or with one of VARIANTS as Microtome stores it."""
    out = place / name
    if name in models.TINY:
        models.stock(name).save_pretrained(out)
        return out
    out.mkdir(parents=True)
    config, tensors = variant(name)
    kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
    (out / "config.json").write_text(json.dumps(cut.own_config(config, "float32")))
    save_file(kept, out / "model.safetensors")
    return out


def decoder(name: str) -> Any:
    """Our decoder of the same."""
    return models.ours(name) if name in models.TINY else models.loaded(*variant(name))


# --- GGUF -----------------------------------------------------------------------------------------------------------


class Read:
    """The keys and tensors of a GGUF file, and what a llama or deci computes of them, written from its keys alone."""

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {one.name: one.tensor_type.name for one in reader.tensors}
        self.tensors = {
            one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy()).double()
            for one in reader.tensors
        }
        self.name = str(self.keys["general.architecture"])

    def key(self, name: str, block: int | None = None) -> Any:
        """A key of the architecture; of one that counts by block, its value there."""
        found = self.keys[f"{self.name}.{name}"]
        return found if block is None or not isinstance(found, list) else found[block]

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.tensors[f"{name}.weight"].T
        return out + self.tensors.get(f"{name}.bias", torch.zeros(1))

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.key("attention.layer_norm_rms_epsilon")
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.tensors[f"{name}.weight"]

    def turn(self, x: Tensor, factors: Tensor) -> Tensor:
        """Neighbouring channels of x [T, H, K] as a complex number, turned by the position over a factor."""
        length, _, wide = x.shape
        angle = self.key("rope.freq_base") ** (-torch.arange(0, wide, 2).double() / wide) / factors
        turns = torch.polar(torch.ones(length, wide // 2).double(), torch.arange(length)[:, None] * angle)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    def factors(self, length: int) -> Tensor:
        """What frequencies are divided by for a text of so many tokens."""
        if "rope_freqs.weight" in self.tensors:
            return self.tensors["rope_freqs.weight"]
        if "rope_factors_long.weight" in self.tensors:
            long = length > self.key("rope.scaling.original_context_length")
            return self.tensors[f"rope_factors_{'long' if long else 'short'}.weight"]
        return torch.ones(self.key("rope.dimension_count") // 2)

    def attention(self, x: Tensor, block: int) -> Tensor:
        length, wide = len(x), self.key("attention.key_length")
        many, groups = self.key("attention.head_count", block), self.key("attention.head_count_kv", block)
        q, k, v = (self.linear(x, f"blk.{block}.attn_{one}").reshape(length, -1, wide) for one in "qkv")
        q, k = (self.turn(one, self.factors(length)) for one in (q, k))
        k, v = (one.repeat_interleave(many // groups, dim=1) for one in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) / wide**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        return self.linear(torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1), f"blk.{block}.attn_output")

    def logits(self, ids: Tensor) -> Tensor:
        """[T, V] of token ids [T]."""
        x = self.tensors["token_embd.weight"][ids]
        for block in range(self.key("block_count")):
            if self.key("attention.head_count", block):
                x = x + self.attention(self.norm(x, f"blk.{block}.attn_norm"), block)
            z = self.norm(x, f"blk.{block}.ffn_norm")
            gate = torch.nn.functional.silu(self.linear(z, f"blk.{block}.ffn_gate"))
            x = x + self.linear(gate * self.linear(z, f"blk.{block}.ffn_up"), f"blk.{block}.ffn_down")
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.norm(x, "output_norm") @ head.T
