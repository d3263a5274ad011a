"""The one decoder: every architecture is lowered into it, every method works on it, and it ships inside checkpoints.

This file stands alone (it imports only torch, transformers and huggingface_hub), so that a folder that contains it
loads with `trust_remote_code=True`; with `import microtome` no flag is needed. It follows transformers' own habits.

The canonical decoder, in one paragraph. Names are Llama's. Every linear is stored [out, in] and unpacked. A block has
an attention half and an MLP half; each half reads the residual stream through a norm, and adds what it writes to the
stream as the half's shortcut carries it on. Sizes may differ in every block: the widths of the stream where a block
reads it, between its halves and where it leaves it, the heads, the query-key and value widths, the FFN. A shortcut is
the identity, or, where two bases meet, one of four small linear maps. All per-block fields may be overridden through
transformers' `per_layer_config`.

Shape letters: B batch, T positions, D residual width, H query heads, G key-value heads, K query-key width,
U value width, P rotary pairs, R rank.
"""

import copy
from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

FORMAT_VERSION = 1
SHORTCUTS = ("identity", "dense", "diagonal", "lowrank", "factored")
NORMS = ("rms", "layer")
PLACEMENTS = ("pre", "post", "sandwich")
PARALLEL = ("none", "shared", "separate")


@strict
class MicrotomeConfig(PreTrainedConfig):
    """Sizes and features of a canonical decoder.

    Fields marked (block) may differ from block to block through `per_layer_config`; there `skip` lists the halves
    ("self_attn", "mlp") that a block does not have. `hidden_size` is the width where the final norm reads.
    """

    model_type = "microtome"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own form
    attribute_map = {  # noqa: RUF012 - the names that engines ask for, who leave out in silence what they do not find
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logits_softcap",
        "logit_scale": "logits_scale",
    }

    format_version: int = FORMAT_VERSION
    source_model_type: str | None = None  # the architecture that was lowered
    vocab_size: int = 32000
    hidden_size: int = 512
    embedding_size: int | None = None  # columns of the embedding table; the stream starts with the first residual_in
    num_hidden_layers: int = 4
    max_position_embeddings: int = 2048

    # Sizes; each may differ from block to block.
    residual_in: int | None = None
    residual_mid: int | None = None
    residual_out: int | None = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None  # query-key width
    v_head_dim: int | None = None
    intermediate_size: int = 1024

    # shortcuts (block): what carries the stream past each half
    attn_shortcut: str = "identity"
    mlp_shortcut: str = "identity"
    attn_shortcut_rank: int = 0
    mlp_shortcut_rank: int = 0

    # index subsets (block): each half may read and write only some coordinates of the stream; None means all
    attn_read_size: int | None = None
    attn_write_size: int | None = None
    mlp_read_size: int | None = None
    mlp_write_size: int | None = None

    # norms
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_placement: str = "pre"
    norm_divisor: int | None = None  # the mean square divides by this instead of the width (sliced streams)
    norm_offset: float = 0.0  # the gain is offset + weight (Gemma: 1)
    norm_gain: bool = True
    norm_bias: bool = False
    final_norm: bool = True
    final_norm_gain: bool = True
    final_norm_bias: bool = False
    qk_norm: str | None = None  # "head": per head, before the rotary; "full": over all heads at once
    qk_norm_eps: float | None = None

    # attention
    attention_bias: bool = False  # (block) query, key, value
    attention_out_bias: bool = False  # (block)
    attention_scale: float | None = None  # (block) None: head_dim ** -0.5
    attention_softcap: float | None = None
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    layer_types: list[str] | None = None  # "full_attention" or "sliding_attention" per block

    # positions
    positions: str = "rotary"  # "rotary", "learned" or "none"
    rope_parameters: dict | None = None
    rotary_head_dim: int | None = None  # head width that the frequencies were made for
    rotary: bool = True  # (block) False: this block does not rotate
    rotary_pairs: int | None = None  # (block) pairs kept; None: all that the frequencies have
    rotary_subset: bool = False  # (block) True: rotary_index [G, P] names the pairs of each key-value head
    position_offset: int = 0  # rows of the position table before position 0
    position_from_mask: bool = False  # count positions by the attention mask where none are given

    # feed-forward
    mlp_gated: bool = True
    mlp_bias: bool = False  # (block) gate, up
    mlp_out_bias: bool = False  # (block)
    hidden_act: str = "silu"
    parallel: str = "none"  # attention and MLP side by side: "shared" one norm, "separate" two

    # scales and head
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    head_bias: bool = False
    head_adapter: bool = False  # a linear between norm and head, from hidden_size to embedding_size
    head_adapter_bias: bool = False

    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.v_head_dim = self.v_head_dim or self.head_dim
        self.rotary_head_dim = self.rotary_head_dim or self.head_dim
        self.residual_in = self.residual_in or self.hidden_size
        self.residual_mid = self.residual_mid or self.hidden_size
        self.residual_out = self.residual_out or self.hidden_size
        if self.qk_norm is None:
            self.qk_norm_eps = None
        elif self.qk_norm_eps is None:
            self.qk_norm_eps = self.norm_eps
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        if self.positions != "rotary":
            self.rope_parameters = None  # transformers fills in defaults, and holds head widths against them
        if self.embedding_size is None:
            self.embedding_size = self.per_layer_config[0].residual_in

    def validate_rope(self):
        """Hold the frequencies against the head width that they were made for, not what blocks' heads are cut to."""
        parameters = self.rope_parameters or {}
        nested = [one for one in parameters.values() if isinstance(one, dict)]  # one set for each kind of block
        for one in nested or ([parameters] if parameters else []):
            MicrotomeRotary.plain_config(self, one)

    def validate_architecture(self):
        """Refuse what this file cannot run, naming it."""
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version} is newer than this code's {FORMAT_VERSION}: upgrade microtome."
            )
        for field, known in (("norm", NORMS), ("norm_placement", PLACEMENTS), ("parallel", PARALLEL)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {known}.")
        for block in range(self.num_hidden_layers):
            sizes = self.per_layer_config[block]
            if sizes.num_attention_heads % sizes.num_key_value_heads:
                raise ValueError(
                    f"block {block}: {sizes.num_attention_heads} query heads cannot share "
                    f"{sizes.num_key_value_heads} key-value heads evenly."
                )
            for half in (sizes.attn_shortcut, sizes.mlp_shortcut):
                if half not in SHORTCUTS:
                    raise ValueError(f"block {block}: shortcut {half!r} is not one of {SHORTCUTS}.")


class MicrotomeNorm(nn.Module):
    """RMSNorm or LayerNorm over `width` coordinates; the mean square divides by `divisor`, the width before slicing."""

    def __init__(self, config: MicrotomeConfig, width: int, *, gain: bool, bias: bool):
        super().__init__()
        self.centred = config.norm == "layer"
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        self.divisor = config.norm_divisor or width
        self.weight = nn.Parameter(torch.ones(width)) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] to [..., D], computed in fp32."""
        z = hidden_states.float()
        if self.centred:
            z = z - z.mean(-1, keepdim=True)
        z = z * torch.rsqrt(z.pow(2).sum(-1, keepdim=True) / self.divisor + self.eps)
        if self.offset and self.weight is not None:  # Gemma multiplies before it casts
            return (z * (self.offset + self.weight.float())).to(hidden_states.dtype)
        z = z.to(hidden_states.dtype)
        if self.weight is not None:
            z = z * self.weight
        return z if self.bias is None else z + self.bias


def qk_norm(config: MicrotomeConfig, width: int) -> MicrotomeNorm:
    """An RMSNorm with gain over query or key channels; never rescaled by a slice of the stream."""
    norms = copy.copy(config)
    norms.norm, norms.norm_eps, norms.norm_divisor = "rms", config.qk_norm_eps, None
    return MicrotomeNorm(norms, width, gain=True, bias=False)


class MicrotomeShortcut(nn.Module):
    """How the stream passes a half block whose input and output bases differ: x [..., D_in] to [..., D_out].

    identity   x, padded with zeros or cut to the new width
    dense      S x
    diagonal   x * s on the common coordinates, then padded or cut
    lowrank    x - U U^T x, then padded: the symmetric gauge of two subspaces that share most directions
    factored   x padded or cut, minus A B^T x
    """

    def __init__(self, kind: str, width_in: int, width_out: int, rank: int):
        super().__init__()
        self.kind, self.width_in, self.width_out = kind, width_in, width_out
        if kind == "dense":
            self.weight = nn.Parameter(torch.zeros(width_out, width_in))
        elif kind == "diagonal":
            self.weight = nn.Parameter(torch.ones(min(width_in, width_out)))
        elif kind == "lowrank":
            self.weight = nn.Parameter(torch.zeros(width_in, rank))
        elif kind == "factored":
            self.left = nn.Parameter(torch.zeros(width_out, rank))
            self.right = nn.Parameter(torch.zeros(width_in, rank))

    def fit(self, x: Tensor) -> Tensor:
        """Cut or zero-pad the last dimension to the output width."""
        if x.shape[-1] == self.width_out:
            return x
        if x.shape[-1] > self.width_out:
            return x[..., : self.width_out]
        return nn.functional.pad(x, (0, self.width_out - x.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] to [..., D_out]."""
        if self.kind == "dense":
            return nn.functional.linear(x, self.weight)
        if self.kind == "diagonal":
            return self.fit(x[..., : len(self.weight)] * self.weight)
        if self.kind == "lowrank":
            return self.fit(x - (x @ self.weight) @ self.weight.T)
        if self.kind == "factored":
            return self.fit(x) - (x @ self.right) @ self.left.T
        return self.fit(x)


class MicrotomeRotary(nn.Module):
    """Cosines and sines [B, T, P] of every position, by any of transformers' frequency scalings."""

    def __init__(self, config: MicrotomeConfig, layer_type: str | None = None):
        super().__init__()
        parameters = config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        if layer_type is not None:
            parameters = parameters[layer_type]
        self.config = self.plain_config(config, parameters)
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = parameters.get("rope_type", "default")
        inv_freq, self.attention_scaling = self.frequencies()
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def plain_config(config: MicrotomeConfig, parameters: dict) -> PreTrainedConfig:
        """What the frequency functions read: a handful of fields, which a block's narrowed head_dim must not reach."""
        return PreTrainedConfig(
            hidden_size=config.rotary_head_dim,
            num_attention_heads=1,
            head_dim=config.rotary_head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(parameters),
        )

    def frequencies(self) -> tuple[Tensor, float]:
        """Angle per position of every pair [P], theta ** (-2 i / dim) unless scaled, and a factor on both waves."""
        if self.rope_type != "default":
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        parameters = self.config.rope_parameters
        dim = int(self.config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Position ids [B, T] to cosine and sine [B, T, P] in x's dtype."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 P coordinates of x [B, heads, T, K] by cos, sin [B, 1 or heads, T, P]; pairs: (i, i + P)."""
    pairs = cos.shape[-1]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def repeat_groups(x: Tensor, times: int) -> Tensor:
    """Repeat each key-value head [B, G, T, K] for its query heads, [B, G * times, T, K]."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: context [B, T, H, U] and weights [B, H, T, S]."""
    key = repeat_groups(key, module.num_key_value_groups)
    value = repeat_groups(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class MicrotomeAttention(nn.Module):
    """Grouped-query attention; query-key and value widths may differ, and the rotary may keep a subset of pairs."""

    def __init__(self, config: MicrotomeConfig, sizes: MicrotomeConfig, layer_idx: int):
        super().__init__()
        self.config = config  # the whole model's: a later set_attn_implementation must be seen here
        self.layer_idx = layer_idx
        self.heads, self.groups = sizes.num_attention_heads, sizes.num_key_value_heads
        self.head_dim, self.v_head_dim = sizes.head_dim, sizes.v_head_dim
        self.num_key_value_groups = self.heads // self.groups
        self.scaling = self.head_dim**-0.5 if sizes.attention_scale is None else sizes.attention_scale
        self.softcap = config.attention_softcap
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.rotary = config.positions == "rotary" and sizes.rotary

        read = sizes.attn_read_size or sizes.residual_in
        written = sizes.residual_out if config.parallel != "none" else sizes.residual_mid
        bias = sizes.attention_bias
        self.q_proj = nn.Linear(read, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(read, self.groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(read, self.groups * self.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(
            self.heads * self.v_head_dim, sizes.attn_write_size or written, bias=sizes.attention_out_bias
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            whole = config.qk_norm == "full"
            self.q_norm = qk_norm(config, self.heads * self.head_dim if whole else self.head_dim)
            self.k_norm = qk_norm(config, self.groups * self.head_dim if whole else self.head_dim)
        if sizes.rotary_subset:
            self.rotary_index = nn.Buffer(torch.zeros(self.groups, sizes.rotary_pairs, dtype=torch.int32))
        else:
            self.rotary_index = None
        self.rotary_pairs = sizes.rotary_pairs

    def project(self, linear: nn.Linear, norm: MicrotomeNorm | None, x: Tensor, heads: int) -> Tensor:
        """Queries or keys [B, heads, T, K], normed where the model norms them."""
        z = linear(x)
        if norm is not None and self.config.qk_norm == "full":
            z = norm(z)
        z = z.view(*x.shape[:-1], heads, self.head_dim)
        if norm is not None and self.config.qk_norm == "head":
            z = norm(z)
        return z.transpose(1, 2)

    def turn(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys; with a subset, every key-value head has its own frequencies."""
        cos, sin = position_embeddings
        if self.rotary_index is None:
            pairs = self.rotary_pairs if self.rotary_pairs is not None else cos.shape[-1]
            cos, sin = cos[:, None, :, :pairs], sin[:, None, :, :pairs]
            return rotate(query, cos, sin), rotate(key, cos, sin)
        index = self.rotary_index.long()
        cos, sin = cos[..., index].transpose(1, 2), sin[..., index].transpose(1, 2)  # [B, G, T, P]
        times = self.num_key_value_groups
        return rotate(query, repeat_groups(cos, times), repeat_groups(sin, times)), rotate(key, cos, sin)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Normed stream [B, T, D] to what the half writes, and the attention weights where they exist."""
        shape = hidden_states.shape[:-1]
        query = self.project(self.q_proj, self.q_norm, hidden_states, self.heads)
        key = self.project(self.k_proj, self.k_norm, hidden_states, self.groups)
        value = self.v_proj(hidden_states).view(*shape, self.groups, self.v_head_dim).transpose(1, 2)
        if self.rotary:
            query, key = self.turn(query, key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        heads = self.even(query, key, value)
        context, weights = attend(
            self,
            *heads,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if heads[2] is not value:  # other backends may return the heads side by side
            context = context[..., : self.v_head_dim]
        return self.o_proj(context.reshape(*shape, -1).contiguous()), weights

    def even(self, *heads: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values filled up with zeros to one width where torch's kernel for CPUs wants that.

        Its fast path, two to four times as fast, is for such only. A single query does not pay for the copies.
        """
        size = max(self.head_dim, self.v_head_dim)
        if (
            self.head_dim == self.v_head_dim
            or heads[0].shape[2] == 1
            or heads[0].device.type != "cpu"
            or self.config._attn_implementation != "sdpa"
        ):
            return heads
        return tuple(nn.functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in heads)


class MicrotomeMLP(nn.Module):
    """The feed-forward half: gated (down(act(gate) * up)) or plain (down(act(up)))."""

    def __init__(self, config: MicrotomeConfig, sizes: MicrotomeConfig):
        super().__init__()
        read = sizes.mlp_read_size or (sizes.residual_in if config.parallel != "none" else sizes.residual_mid)
        ffn = sizes.intermediate_size
        self.gate_proj = nn.Linear(read, ffn, bias=sizes.mlp_bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(read, ffn, bias=sizes.mlp_bias)
        self.down_proj = nn.Linear(ffn, sizes.mlp_write_size or sizes.residual_out, bias=sizes.mlp_out_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Normed stream [B, T, D] to what the half writes."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MicrotomeBlock(GradientCheckpointingLayer):
    """One transformer block; `attention_half` and `mlp_half` return what a half writes, without its shortcut."""

    def __init__(self, config: MicrotomeConfig, layer_idx: int):
        super().__init__()
        sizes = config.per_layer_config[layer_idx]
        skip = getattr(sizes, "skip", None) or []
        wide_in, wide_mid, wide_out = sizes.residual_in, sizes.residual_mid, sizes.residual_out
        self.parallel = config.parallel
        self.residual_scale = config.residual_scale
        self.layer_type = config.layer_types[layer_idx]
        before, after = config.norm_placement in ("pre", "sandwich"), config.norm_placement in ("post", "sandwich")

        def norm(width: int) -> MicrotomeNorm:
            return MicrotomeNorm(config, width, gain=config.norm_gain, bias=config.norm_bias)

        self.self_attn = self.input_layernorm = self.attn_out_layernorm = None
        if "self_attn" not in skip:
            self.self_attn = self.attention(config, sizes, layer_idx)
            self.input_layernorm = norm(wide_in) if before else None
            self.attn_out_layernorm = norm(wide_mid if self.parallel == "none" else wide_out) if after else None
        self.mlp = self.post_attention_layernorm = self.mlp_out_layernorm = None
        if "mlp" not in skip:
            self.mlp = self.feed_forward(config, sizes, layer_idx)
            shared = self.parallel == "shared" and self.self_attn is not None
            self.post_attention_layernorm = (
                norm(wide_in if self.parallel != "none" else wide_mid) if before and not shared else None
            )
            self.mlp_out_layernorm = norm(wide_out) if after else None

        if self.parallel == "none":
            self.attn_shortcut = MicrotomeShortcut(sizes.attn_shortcut, wide_in, wide_mid, sizes.attn_shortcut_rank)
            self.mlp_shortcut = MicrotomeShortcut(sizes.mlp_shortcut, wide_mid, wide_out, sizes.mlp_shortcut_rank)
        else:
            self.attn_shortcut = MicrotomeShortcut(sizes.attn_shortcut, wide_in, wide_out, sizes.attn_shortcut_rank)
            self.mlp_shortcut = None
        self.written = {"attn": wide_mid if self.parallel == "none" else wide_out, "mlp": wide_out}
        for half, present in (("attn", self.self_attn is not None), ("mlp", self.mlp is not None)):
            for way in ("read", "write"):
                size = getattr(sizes, f"{half}_{way}_size") if present else None
                index = None if size is None else nn.Buffer(torch.zeros(size, dtype=torch.int32))
                setattr(self, f"{half}_{way}_index", index)

    def attention(self, config: MicrotomeConfig, sizes: MicrotomeConfig, layer_idx: int) -> "MicrotomeAttention":
        """The linears of attention; engines with linears of their own put those in their place."""
        return MicrotomeAttention(config, sizes, layer_idx)

    def feed_forward(self, config: MicrotomeConfig, sizes: MicrotomeConfig, layer_idx: int) -> "MicrotomeMLP":  # noqa: ARG002
        """The linears of the MLP; engines with linears of their own put those in their place."""
        return MicrotomeMLP(config, sizes)

    def gather(self, x: Tensor, half: str) -> Tensor:
        """The coordinates that a half reads."""
        index = getattr(self, f"{half}_read_index")
        return x if index is None else x.index_select(-1, index.long())

    def scatter(self, x: Tensor, half: str) -> Tensor:
        """What a half wrote, at its places in the whole stream."""
        index = getattr(self, f"{half}_write_index")
        if index is None:
            return x
        return x.new_zeros(*x.shape[:-1], self.written[half]).index_copy(-1, index.long(), x)

    def read(self, x: Tensor, half: str) -> Tensor:
        """What the linears of a half read of the stream."""
        shared = half == "attn" or (self.parallel == "shared" and self.self_attn is not None)
        norm = self.input_layernorm if shared else self.post_attention_layernorm
        return self.gather(x if norm is None else norm(x), half)

    def attention_half(self, x: Tensor, **kwargs) -> Tensor:
        """What attention adds to the stream x [B, T, residual_in]."""
        z, _ = self.self_attn(self.read(x, "attn"), **kwargs)
        z = self.scatter(z, "attn")
        z = z if self.attn_out_layernorm is None else self.attn_out_layernorm(z)
        return z if self.residual_scale == 1.0 else z * self.residual_scale

    def mlp_half(self, x: Tensor) -> Tensor:
        """What the MLP adds to the stream x [B, T, residual_mid], or residual_in in parallel blocks."""
        z = self.scatter(self.mlp(self.read(x, "mlp")), "mlp")
        z = z if self.mlp_out_layernorm is None else self.mlp_out_layernorm(z)
        return z if self.residual_scale == 1.0 else z * self.residual_scale

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """The stream [B, T, residual_in] to [B, T, residual_out]."""
        x = hidden_states
        kwargs.pop("use_cache", None)
        if self.parallel != "none":
            out = self.attn_shortcut(x)
            out = out if self.self_attn is None else out + self.attention_half(x, **kwargs)
            return out if self.mlp is None else out + self.mlp_half(x)
        carried = self.attn_shortcut(x)
        x = carried if self.self_attn is None else carried + self.attention_half(x, **kwargs)
        carried = self.mlp_shortcut(x)
        return carried if self.mlp is None else carried + self.mlp_half(x)


class MicrotomePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every class below."""

    config_class = MicrotomeConfig
    config: MicrotomeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MicrotomeBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MicrotomeBlock, "attentions": MicrotomeAttention}  # noqa: RUF012

    def get_correct_attn_implementation(self, *args, **kwargs) -> str:
        """What was asked for, but "eager" instead of "sdpa" where scores have a soft cap, which sdpa cannot."""
        found = super().get_correct_attn_implementation(*args, **kwargs)
        return "eager" if found == "sdpa" and self.config.attention_softcap is not None else found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """transformers' defaults, and what it cannot know: frequencies are not stored, and are made again on load."""
        super()._init_weights(module)
        if isinstance(module, MicrotomeRotary):
            frequencies, _ = module.frequencies()
            init.copy_(module.inv_freq, frequencies)
            init.copy_(module.original_inv_freq, frequencies)
        elif isinstance(module, MicrotomeNorm):
            if module.weight is not None:
                init.constant_(module.weight, 1.0 - module.offset)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, MicrotomeShortcut):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class MicrotomeModel(MicrotomePreTrainedModel):
    """Embedding, blocks and final norm."""

    config_class = MicrotomeConfig
    config: MicrotomeConfig

    def __init__(self, config: MicrotomeConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.width = config.per_layer_config[0].residual_in
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, self.padding_idx)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings + config.position_offset, self.width)
        self.layers = nn.ModuleList(MicrotomeBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = None
        if config.final_norm:
            self.norm = MicrotomeNorm(
                config, config.hidden_size, gain=config.final_norm_gain, bias=config.final_norm_bias
            )
        nested = [key for key in (config.rope_parameters or {}) if key in config.layer_types]
        self.rotary_emb = nn.ModuleDict()
        if config.positions == "rotary":
            for layer_type in sorted(set(config.layer_types)):
                self.rotary_emb[layer_type] = MicrotomeRotary(config, layer_type if nested else None)
                if not nested:
                    break
        # The first block with attention of every kind of block: only its cache counts what was seen.
        self.counters: dict[str, int] = {}
        for i, block in enumerate(self.layers):
            if block.self_attn is not None:
                self.counters.setdefault(block.layer_type, i)
        self.counter = min(self.counters.values(), default=0)
        self.gradient_checkpointing = False
        self.post_init()

    def positions(self, embeds: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
        """Position ids [1 or B, T] where the caller gave none."""
        length = embeds.shape[1]
        if self.config.position_from_mask and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            counted = attention_mask.long().cumsum(1) * attention_mask - 1
            return counted[:, past : past + length].long()
        return torch.arange(past, past + length, device=embeds.device)[None]

    def masks(self, attention_mask: Tensor | dict | None, **seen) -> dict[str, Tensor | None]:
        """What is added to the scores, for every kind of block; `generate` may have made them already."""
        if isinstance(attention_mask, dict):
            return attention_mask
        made = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: made[kind](config=self.config, attention_mask=attention_mask, layer_idx=block, **seen)
            for kind, block in self.counters.items()
        }

    def embed(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        """The stream [B, T, residual_in] from looked-up embeddings [B, T, embedding_size]."""
        x = embeds[..., : self.width]
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device=x.device)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids + self.config.position_offset)
        return x

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Token ids [B, T] to the normed stream [B, T, hidden_size]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length(self.counter)
            position_ids = self.positions(embeds, attention_mask, past)
        hidden_states = self.embed(embeds, position_ids)

        masks = self.masks(
            attention_mask, inputs_embeds=hidden_states, past_key_values=past_key_values, position_ids=position_ids
        )
        turns = {kind: rotary(hidden_states, position_ids) for kind, rotary in self.rotary_emb.items()}
        common = next(iter(turns.values()), None)

        for block in self.layers:
            hidden_states = block(
                hidden_states,
                attention_mask=masks.get(block.layer_type),
                position_embeddings=turns.get(block.layer_type, common),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class MicrotomeForCausalLM(MicrotomePreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    config_class = MicrotomeConfig
    config: MicrotomeConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MicrotomeConfig):
        super().__init__(config)
        self.model = MicrotomeModel(config)
        self.vocab_size = config.vocab_size
        self.head_adapter = None
        if config.head_adapter:
            self.head_adapter = nn.Linear(config.hidden_size, config.embedding_size, bias=config.head_adapter_bias)
        width = config.embedding_size if config.head_adapter or config.tie_word_embeddings else config.hidden_size
        self.lm_head = nn.Linear(width, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def head(self, hidden_states: Tensor) -> Tensor:
        """The normed stream [..., hidden_size] to logits [..., V]."""
        if self.head_adapter is not None:
            hidden_states = self.head_adapter(hidden_states)
        logits = self.lm_head(hidden_states)
        if self.config.logits_scale != 1.0:
            logits = logits * self.config.logits_scale
        if self.config.logits_softcap is not None:
            logits = torch.tanh(logits / self.config.logits_softcap) * self.config.logits_softcap
        return logits

    def create_masks_for_generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids=None,
        **_,
    ) -> dict[str, Tensor | None]:
        """The masks of all blocks, which `generate` makes outside of a compiled forward."""
        return self.model.masks(
            attention_mask, inputs_embeds=inputs_embeds, past_key_values=past_key_values, position_ids=position_ids
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Token ids [B, T] to logits [B, T, V], and the loss where labels are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MicrotomeConfig", "MicrotomeForCausalLM", "MicrotomeModel", "MicrotomePreTrainedModel"]
