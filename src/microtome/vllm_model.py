"""The decoder as vLLM serves it: our blocks, norms and shortcuts around vLLM's linears, attention and cache.

The stream is [T, D], the tokens of all sequences one after the other. Linears are split over the devices of a tensor
parallel group; norms, shortcuts and indices are whole on each. Heads are padded with zeros to one width for all blocks,
which vLLM's attention has: zeros add nothing to a score, and what they make of a value is cut off again.

Shape letters: T tokens, D residual width, H query heads, G key-value heads, K query-key width, U value width,
P rotary pairs; H and G are those of one device.
"""
# pyright: basic, reportMissingImports=false

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsQuant

from microtome.modeling_microtome import (
    MicrotomeBlock,
    MicrotomeConfig,
    MicrotomeNorm,
    MicrotomeRotary,
    qk_norm,
    repeat_groups,
    rotate,
)
from microtome.vllm_plugin import check, head_width

STACKED = {  # a stored linear is part of one of vLLM's, under this name
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class ServedAttention(nn.Module):
    """Attention of one block by vLLM, on this device's share of the heads."""

    def __init__(self, config: MicrotomeConfig, sizes: Any, block: int) -> None:
        super().__init__()
        engine, prefix = get_current_vllm_config(), f"model.layers.{block}.self_attn"
        heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
        written = sizes.residual_mid if config.parallel == "none" else sizes.residual_out
        self.qkv_proj = QKVParallelLinear(
            sizes.attn_read_size or sizes.residual_in,
            sizes.head_dim,
            heads,
            groups,
            bias=sizes.attention_bias,
            quant_config=engine.quant_config,
            prefix=f"{prefix}.qkv_proj",
            v_head_size=sizes.v_head_dim,
        )
        self.o_proj = RowParallelLinear(
            heads * sizes.v_head_dim,
            sizes.attn_write_size or written,
            bias=sizes.attention_out_bias,
            quant_config=engine.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.heads, self.groups = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.head_dim, self.v_head_dim, self.width = sizes.head_dim, sizes.v_head_dim, head_width(config)
        sliding = (config.layer_types or [])[block] == "sliding_attention"
        self.attn = Attention(
            self.heads,
            self.width,
            sizes.head_dim**-0.5 if sizes.attention_scale is None else sizes.attention_scale,
            num_kv_heads=self.groups,
            cache_config=engine.cache_config,
            quant_config=engine.quant_config,
            logits_soft_cap=config.attention_softcap,
            per_layer_sliding_window=config.sliding_window if sliding else None,
            prefix=f"{prefix}.attn",
        )
        self.q_norm = self.k_norm = None
        self.norms_heads = config.qk_norm == "head"
        if config.qk_norm is not None:
            self.q_norm = qk_norm(config, sizes.head_dim if self.norms_heads else heads * sizes.head_dim)
            self.k_norm = qk_norm(config, sizes.head_dim if self.norms_heads else groups * sizes.head_dim)
        self.rotary = config.positions == "rotary" and sizes.rotary
        self.rotary_pairs: int | None = sizes.rotary_pairs
        self.rotary_index: Tensor | None
        if sizes.rotary_subset:
            self.rotary_index = nn.Buffer(torch.zeros(groups, sizes.rotary_pairs, dtype=torch.int32))
        else:
            self.rotary_index = None
        self.first = get_tensor_model_parallel_rank() * groups // get_tensor_model_parallel_world_size()

    def normed(self, x: Tensor, norm: MicrotomeNorm | None, heads: int) -> Tensor:
        """Queries or keys [T, heads, K] of the linear's output [T, heads * K]."""
        if norm is None:
            return x.view(-1, heads, self.head_dim)
        if self.norms_heads:
            return norm(x.reshape(-1, heads, self.head_dim))
        return norm(x).view(-1, heads, self.head_dim)

    def turned(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries [T, H, K] and keys [T, G, K] by cos, sin [T, P] of all pairs."""
        if self.rotary_index is None:
            pairs = cos.shape[-1] if self.rotary_pairs is None else self.rotary_pairs
            cos, sin = cos[:, None, :pairs], sin[:, None, :pairs]
            return rotate(query, cos, sin), rotate(key, cos, sin)
        mine = self.rotary_index.narrow(0, self.first, self.groups).long()
        cos, sin, times = cos[:, mine], sin[:, mine], self.heads // self.groups  # [T, G, P]
        return rotate(query, repeat_groups(cos, times), repeat_groups(sin, times)), rotate(key, cos, sin)

    def padded(self, x: Tensor) -> Tensor:
        """Heads [T, heads, any] as wide as the cache's, side by side."""
        return nn.functional.pad(x, (0, self.width - x.shape[-1])).flatten(1)

    def forward(self, x: Tensor, position_embeddings: Any = None, **_: Any) -> tuple[Tensor, None]:
        """Normed stream [T, D] to what the half writes."""
        sizes = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.v_head_dim]
        query, key, value = self.qkv_proj(x)[0].split(sizes, dim=-1)
        query, key = self.normed(query, self.q_norm, self.heads), self.normed(key, self.k_norm, self.groups)
        if self.rotary:
            query, key = self.turned(query, key, *position_embeddings)
        value = value.view(-1, self.groups, self.v_head_dim)
        context = self.attn(self.padded(query), self.padded(key), self.padded(value))
        context = context.view(-1, self.heads, self.width)[..., : self.v_head_dim]
        return self.o_proj(context.flatten(1))[0], None


class ServedMLP(nn.Module):
    """The feed-forward half of one block, on this device's share of the neurons."""

    def __init__(self, config: MicrotomeConfig, sizes: Any, block: int) -> None:
        super().__init__()
        quantised, prefix = get_current_vllm_config().quant_config, f"model.layers.{block}.mlp"
        read = sizes.mlp_read_size or (sizes.residual_mid if config.parallel == "none" else sizes.residual_in)
        neurons, bias = sizes.intermediate_size, sizes.mlp_bias
        self.gated = config.mlp_gated
        if self.gated:
            name = f"{prefix}.gate_up_proj"
            self.gate_up_proj = MergedColumnParallelLinear(
                read, [neurons] * 2, bias=bias, quant_config=quantised, prefix=name
            )
        else:
            name = f"{prefix}.up_proj"
            self.up_proj = ColumnParallelLinear(read, neurons, bias=bias, quant_config=quantised, prefix=name)
        self.down_proj = RowParallelLinear(
            neurons,
            sizes.mlp_write_size or sizes.residual_out,
            bias=sizes.mlp_out_bias,
            quant_config=quantised,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Normed stream [T, D] to what the half writes."""
        if not self.gated:
            return self.down_proj(self.act_fn(self.up_proj(x)[0]))[0]
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)[0]


class ServedBlock(MicrotomeBlock):
    """A block whose two halves are vLLM's."""

    def attention(self, config: MicrotomeConfig, sizes: Any, layer_idx: int) -> nn.Module:
        """Attention over vLLM's cache."""
        return ServedAttention(config, sizes, layer_idx)

    def feed_forward(self, config: MicrotomeConfig, sizes: Any, layer_idx: int) -> nn.Module:
        """Linears that may be split and quantised."""
        return ServedMLP(config, sizes, layer_idx)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class ServedModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.width, self.scale, self.offset = (
            config.per_layer_config[0].residual_in,
            config.embedding_scale,
            config.position_offset,
        )
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.embedding_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings + self.offset, self.width)
        self.layers = nn.ModuleList(ServedBlock(config, block) for block in range(config.num_hidden_layers))
        self.norm = None
        if config.final_norm:
            gain, bias = config.final_norm_gain, config.final_norm_bias
            self.norm = MicrotomeNorm(config, config.hidden_size, gain=gain, bias=bias)
        self.kinds: list[str] = config.layer_types
        kinds = sorted(set(self.kinds)) if config.positions == "rotary" else []
        nested = any(kind in (config.rope_parameters or {}) for kind in kinds)
        self.rotary_emb = nn.ModuleDict({kind: MicrotomeRotary(config, kind if nested else None) for kind in kinds})

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids [T] to their rows of the table."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,  # noqa: ARG002 - of pipelines, which this class does not have
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids and positions [T] to the normed stream [T, hidden_size]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x[..., : self.width] * self.scale
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions + self.offset)
        turns = {kind: rotary(x, positions) for kind, rotary in self.rotary_emb.items()}
        for block, kind in zip(self.layers, self.kinds, strict=True):
            x = block(x, position_embeddings=turns.get(kind))
        return x if self.norm is None else self.norm(x)


class MicrotomeForCausalLM(nn.Module, SupportsQuant):
    """The decoder with its language-model head, as vLLM calls it."""

    packed_modules_mapping = {  # noqa: RUF012 - vLLM's own form
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, quantised = vllm_config.model_config.hf_config, vllm_config.quant_config
        check(config, get_tensor_model_parallel_world_size())
        before = f"{prefix}." if prefix else ""
        self.config = config
        self.model = ServedModel(vllm_config=vllm_config, prefix=f"{before}model")
        self.head_adapter = None
        if config.head_adapter:
            self.head_adapter = ReplicatedLinear(
                config.hidden_size,
                config.embedding_size,
                bias=config.head_adapter_bias,
                quant_config=quantised,
                prefix=f"{before}head_adapter",
            )
        narrow = config.head_adapter or config.tie_word_embeddings
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.embedding_size if narrow else config.hidden_size,
            bias=config.head_bias,
            quant_config=quantised,
            prefix=f"{before}lm_head",
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        cap = config.logits_softcap  # vLLM caps first and scales then
        self.logits_processor = LogitsProcessor(
            config.vocab_size, scale=config.logits_scale, soft_cap=None if cap is None else cap / config.logits_scale
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids [T] to their rows of the table."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids and positions [T] to the normed stream [T, hidden_size]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The normed stream [T, hidden_size] to logits [T, V], on the first device."""
        if self.head_adapter is not None:
            hidden_states = self.head_adapter(hidden_states)[0]
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill parameters and indices by their canonical names; returns vLLM's names of what was filled."""
        places: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        done: set[str] = set()
        for name, tensor in weights:
            head, _, tail = name.rpartition(".")
            above, _, linear = head.rpartition(".")
            whole, shard = STACKED.get(linear, (linear, None))
            stacked = f"{above}.{whole}.{tail}"
            place = stacked if stacked in places else name
            loader = getattr(places[place], "weight_loader", default_weight_loader)
            loader(places[place], tensor, *([] if place == name else [shard]))
            done.add(place)
        return done
