"""What the canonical decoder stores, and which space every axis belongs to.

`shapes` lists the tensors of a part, so that sizes are counted without a model; `spaces` says who writes and who reads
what. A part is "stem" (embeddings), the number of a block, or "head" (final norm, adapter, head). Tests hold both
against the decoder itself, and refuse an axis that belongs to no space.
"""

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microtome.space import Axis, Kind, Role, Space, Symmetry

if TYPE_CHECKING:
    from microtome.modeling_microtome import MicrotomeConfig

Part = int | str
Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "model.embed_tokens.weight"
POSITIONS = "model.embed_positions.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
HALVES = ("attn", "mlp")
INDICES = tuple(f"{half}_{way}_index" for half in HALVES for way in ("read", "write"))


def parts(config: "MicrotomeConfig") -> list[Part]:
    """All parts, in the order in which the stream meets them."""
    return ["stem", *range(config.num_hidden_layers), "head"]


def prefix(block: int) -> str:
    """What the names of a block's tensors begin with."""
    return f"model.layers.{block}."


def skips(sizes: Any, half: str) -> bool:
    """Whether a block (its resolved config) has no such half."""
    return half in (getattr(sizes, "skip", None) or ())


# --- shapes ---------------------------------------------------------------------------------------------------------


def shapes(config: "MicrotomeConfig", part: Part) -> Shapes:
    """Name and shape of every tensor that a part stores; tied weights are stored once, in the stem."""
    if part == "stem":
        stem: Shapes = {EMBEDDING: (config.vocab_size, table_width(config))}
        if config.positions == "learned":
            rows = config.max_position_embeddings + config.position_offset
            stem[POSITIONS] = (rows, config.per_layer_config[0].residual_in)
        return stem
    if part == "head":
        return head_shapes(config)
    sizes = config.per_layer_config[int(part)]
    block = {**attention_shapes(config, sizes), **mlp_shapes(config, sizes), **shortcut_shapes(config, sizes)}
    return {prefix(int(part)) + name: shape for name, shape in block.items()}


def table_width(config: "MicrotomeConfig") -> int:
    """Columns of the embedding table."""
    return config.embedding_size or config.hidden_size


def linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    """Weight and, if it has one, bias of a linear."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name: str, width: int, gain: bool, bias: bool) -> Shapes:
    """Gain and bias of a norm, as far as it has them."""
    return ({f"{name}.weight": (width,)} if gain else {}) | ({f"{name}.bias": (width,)} if bias else {})


def head_shapes(config: "MicrotomeConfig") -> Shapes:
    """Final norm, adapter and head."""
    wide = table_width(config) if config.head_adapter or config.tie_word_embeddings else config.hidden_size
    head: Shapes = {}
    if config.final_norm:
        head |= norm("model.norm", config.hidden_size, config.final_norm_gain, config.final_norm_bias)
    if config.head_adapter:
        head |= linear("head_adapter", table_width(config), config.hidden_size, config.head_adapter_bias)
    head |= linear("lm_head", config.vocab_size, wide, config.head_bias)
    if config.tie_word_embeddings:
        del head[HEAD]
    return head


def attention_shapes(config: "MicrotomeConfig", sizes: Any) -> Shapes:
    """Projections, their norms, the norms around the half, and the index buffers."""
    if skips(sizes, "self_attn"):
        return {}
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    written = sizes.residual_out if config.parallel != "none" else sizes.residual_mid
    read, write = sizes.attn_read_size or sizes.residual_in, sizes.attn_write_size or written
    half = (
        linear("self_attn.q_proj", heads * sizes.head_dim, read, sizes.attention_bias)
        | linear("self_attn.k_proj", groups * sizes.head_dim, read, sizes.attention_bias)
        | linear("self_attn.v_proj", groups * sizes.v_head_dim, read, sizes.attention_bias)
        | linear("self_attn.o_proj", write, heads * sizes.v_head_dim, sizes.attention_out_bias)
    )
    if config.qk_norm is not None:
        whole = config.qk_norm == "full"
        half["self_attn.q_norm.weight"] = (heads * sizes.head_dim if whole else sizes.head_dim,)
        half["self_attn.k_norm.weight"] = (groups * sizes.head_dim if whole else sizes.head_dim,)
    if sizes.rotary_subset:
        half["self_attn.rotary_index"] = (groups, sizes.rotary_pairs)
    if config.norm_placement in ("pre", "sandwich"):
        half |= norm("input_layernorm", sizes.residual_in, config.norm_gain, config.norm_bias)
    if config.norm_placement in ("post", "sandwich"):
        half |= norm("attn_out_layernorm", written, config.norm_gain, config.norm_bias)
    return half | indices(sizes, "attn")


def mlp_shapes(config: "MicrotomeConfig", sizes: Any) -> Shapes:
    """Projections, the norms around the half, and the index buffers."""
    if skips(sizes, "mlp"):
        return {}
    wide = sizes.residual_in if config.parallel != "none" else sizes.residual_mid
    read, write = sizes.mlp_read_size or wide, sizes.mlp_write_size or sizes.residual_out
    names = ("gate_proj", "up_proj") if config.mlp_gated else ("up_proj",)
    half: Shapes = {}
    for name in names:
        half |= linear(f"mlp.{name}", sizes.intermediate_size, read, sizes.mlp_bias)
    half |= linear("mlp.down_proj", write, sizes.intermediate_size, sizes.mlp_out_bias)
    shared = config.parallel == "shared" and not skips(sizes, "self_attn")
    if config.norm_placement in ("pre", "sandwich") and not shared:
        half |= norm("post_attention_layernorm", wide, config.norm_gain, config.norm_bias)
    if config.norm_placement in ("post", "sandwich"):
        half |= norm("mlp_out_layernorm", sizes.residual_out, config.norm_gain, config.norm_bias)
    return half | indices(sizes, "mlp")


def indices(sizes: Any, half: str) -> Shapes:
    """The index buffers of a half that reads or writes a subset of the stream."""
    found = {f"{half}_{way}_index": getattr(sizes, f"{half}_{way}_size") for way in ("read", "write")}
    return {name: (size,) for name, size in found.items() if size is not None}


def shortcut_shapes(config: "MicrotomeConfig", sizes: Any) -> Shapes:
    """What carries the stream past the halves of a block."""
    if config.parallel != "none":
        return shortcut(
            "attn_shortcut", sizes.attn_shortcut, sizes.residual_in, sizes.residual_out, sizes.attn_shortcut_rank
        )
    return shortcut(
        "attn_shortcut", sizes.attn_shortcut, sizes.residual_in, sizes.residual_mid, sizes.attn_shortcut_rank
    ) | shortcut("mlp_shortcut", sizes.mlp_shortcut, sizes.residual_mid, sizes.residual_out, sizes.mlp_shortcut_rank)


def shortcut(name: str, kind: str, wide_in: int, wide_out: int, rank: int) -> Shapes:
    """The tensors of one shortcut; see MicrotomeShortcut."""
    forms: dict[str, Shapes] = {
        "identity": {},
        "dense": {"weight": (wide_out, wide_in)},
        "diagonal": {"weight": (min(wide_out, wide_in),)},
        "lowrank": {"weight": (wide_in, rank)},
        "factored": {"left": (wide_out, rank), "right": (wide_in, rank)},
    }
    return {f"{name}.{tensor}": shape for tensor, shape in forms[kind].items()}


def count(config: "MicrotomeConfig", part: Part | None = None) -> int:
    """Stored numbers of a part, or of the whole decoder; index buffers included, tied weights once."""
    chosen = parts(config) if part is None else [part]
    return sum(prod(shape) for one in chosen for shape in shapes(config, one).values())


def count_blocks(config: "MicrotomeConfig") -> int:
    """Stored numbers of all blocks: what `keep` is a fraction of."""
    return sum(count(config, block) for block in range(config.num_hidden_layers))


# --- spaces ---------------------------------------------------------------------------------------------------------


def span(start: int, size: int, stride: int = 1, copies: int = 1, step: int = 1) -> Tensor:
    """Positions [size, copies]: coordinate c, copy k at start + c * step + k * stride."""
    return start + torch.arange(size)[:, None] * step + torch.arange(copies)[None] * stride


def junction(config: "MicrotomeConfig", block: int, place: str) -> int:
    """Number of the junction (a place where a norm reads the stream): in 2 b, mid 2 b + 1, out 2 b + 2."""
    if place == "mid":
        return 2 * block + (0 if config.parallel != "none" else 1)
    return 2 * block + (2 if place == "out" else 0)


def junctions(config: "MicrotomeConfig") -> list[int]:
    """All junction numbers; parallel blocks have none in the middle."""
    last = 2 * config.num_hidden_layers
    return [number for number in range(last + 1) if config.parallel == "none" or number % 2 == 0]


def residual_width(config: "MicrotomeConfig", number: int) -> int:
    """Width of the stream at a junction."""
    if number == 2 * config.num_hidden_layers:
        return config.hidden_size
    sizes = config.per_layer_config[number // 2]
    return sizes.residual_mid if number % 2 else sizes.residual_in


def even(config: "MicrotomeConfig") -> bool:
    """Whether the stream has one width, and every half passes it on as it is."""
    blocks = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
    widths = {width for sizes in blocks for width in (sizes.residual_in, sizes.residual_mid, sizes.residual_out)}
    kinds = {kind for sizes in blocks for kind in (sizes.attn_shortcut, sizes.mlp_shortcut)}
    return widths == {config.hidden_size} and kinds == {"identity"}


def residual_axes(config: "MicrotomeConfig") -> Iterator[tuple[int, str, int, Role]]:
    """Junction, tensor, dimension and role of every axis that uses the stream."""
    last = 2 * config.num_hidden_layers
    yield 0, EMBEDDING, 1, Role.WRITES
    yield 0, POSITIONS, 1, Role.WRITES
    for block in range(config.num_hidden_layers):
        before, mid, after = (junction(config, block, place) for place in ("in", "mid", "out"))
        attn_out = after if config.parallel != "none" else mid
        head = prefix(block)
        for name in ("q_proj", "k_proj", "v_proj"):
            yield before, f"{head}self_attn.{name}.weight", 1, Role.READS
        for name in ("gate_proj", "up_proj"):
            yield mid, f"{head}mlp.{name}.weight", 1, Role.READS
        for name, where in (("self_attn.o_proj", attn_out), ("mlp.down_proj", after)):
            yield where, f"{head}{name}.weight", 0, Role.WRITES
            yield where, f"{head}{name}.bias", 0, Role.WRITES
        for name, where in (("input_layernorm", before), ("post_attention_layernorm", mid)):
            yield where, f"{head}{name}.weight", 0, Role.SCALES
            yield where, f"{head}{name}.bias", 0, Role.SCALES
        for name, where in (("attn_out_layernorm", attn_out), ("mlp_out_layernorm", after)):
            yield where, f"{head}{name}.weight", 0, Role.SCALES
            yield where, f"{head}{name}.bias", 0, Role.WRITES
    yield last, FINAL_NORM, 0, Role.SCALES
    yield last, "model.norm.bias", 0, Role.SCALES
    yield last, "head_adapter.weight" if config.head_adapter else HEAD, 1, Role.READS


def residual_spaces(config: "MicrotomeConfig", *, split: bool) -> list[Space]:
    """The stream as one space ("residual"), or as one space per junction ("residual.0", ...)."""
    stored = {name for part in parts(config) for name in shapes(config, part)}
    symmetry = Symmetry.ORTHOGONAL if config.norm == "rms" else Symmetry.CENTRED
    if config.norm_gain or config.norm_placement != "pre":
        symmetry = Symmetry.PERMUTE
    found: dict[int, list[Axis]] = {number: [] for number in junctions(config)}
    for number, tensor, dim, role in residual_axes(config):
        if tensor in stored:
            found[number].append(Axis(tensor, dim, role, span(0, residual_width(config, number))))
    if split:
        return [
            Space(f"residual.{number}", Kind.RESIDUAL, None, residual_width(config, number), symmetry, tuple(axes))
            for number, axes in found.items()
        ]
    axes = tuple(axis for some in found.values() for axis in some)
    return [Space("residual", Kind.RESIDUAL, None, config.hidden_size, symmetry, axes)]


def block_spaces(config: "MicrotomeConfig", block: int) -> list[Space]:
    """FFN neurons, query-key and value-output channels of every key-value group, and the groups themselves."""
    sizes = config.per_layer_config[block]
    found: list[Space] = []
    if not skips(sizes, "mlp"):
        ffn, mlp = span(0, sizes.intermediate_size), f"{prefix(block)}mlp."
        writers = [f"{mlp}{name}.{kind}" for name in ("gate_proj", "up_proj") for kind in ("weight", "bias")]
        axes = (
            *(Axis(name, 0, Role.WRITES, ffn) for name in writers),
            Axis(f"{mlp}down_proj.weight", 1, Role.READS, ffn),
        )
        found.append(Space(f"{block}.ffn", Kind.FFN, block, sizes.intermediate_size, Symmetry.PERMUTE, axes))
    if not skips(sizes, "self_attn"):
        for group in range(sizes.num_key_value_heads):
            found += [query_key(config, sizes, block, group), value_output(sizes, block, group)]
        found.append(head_groups(config, sizes, block))
    stored = shapes(config, block)
    return [
        Space(s.name, s.kind, s.block, s.size, s.symmetry, tuple(a for a in s.axes if a.tensor in stored), s.pairs)
        for s in found
    ]


def rotary_pairs(config: "MicrotomeConfig", sizes: Any) -> int:
    """Pairs of query-key channels that turn with the position in this block."""
    if config.positions != "rotary" or not sizes.rotary:
        return 0
    if sizes.rotary_pairs is not None:
        return sizes.rotary_pairs
    factor = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return int(config.rotary_head_dim * factor) // 2


def query_key(config: "MicrotomeConfig", sizes: Any, block: int, group: int) -> Space:
    """The query-key channels of one key-value head and of the query heads that it serves."""
    times, wide = sizes.num_attention_heads // sizes.num_key_value_heads, sizes.head_dim
    queries, keys = span(group * times * wide, wide, wide, times), span(group * wide, wide)
    name = f"{prefix(block)}self_attn."
    axes = [Axis(f"{name}q_proj.{kind}", 0, Role.WRITES, queries) for kind in ("weight", "bias")]
    axes += [Axis(f"{name}k_proj.{kind}", 0, Role.DUAL, keys) for kind in ("weight", "bias")]
    pairs = rotary_pairs(config, sizes)
    symmetry = Symmetry.PAIRS if pairs else Symmetry.LINEAR
    if config.qk_norm is not None:
        symmetry = Symmetry.SIGNS
        shared = config.qk_norm == "head"
        axes.append(Axis(f"{name}q_norm.weight", 0, Role.SCALES, span(0, wide) if shared else queries))
        axes.append(Axis(f"{name}k_norm.weight", 0, Role.SCALES, span(0, wide) if shared else keys))
    return Space(f"{block}.qk.{group}", Kind.QK, block, wide, symmetry, tuple(axes), pairs)


def value_output(sizes: Any, block: int, group: int) -> Space:
    """The value channels of one key-value head, and what the output projection makes of them."""
    times, wide = sizes.num_attention_heads // sizes.num_key_value_heads, sizes.v_head_dim
    values, name = span(group * wide, wide), f"{prefix(block)}self_attn."
    axes = [Axis(f"{name}v_proj.{kind}", 0, Role.WRITES, values) for kind in ("weight", "bias")]
    axes.append(Axis(f"{name}o_proj.weight", 1, Role.READS, span(group * times * wide, wide, wide, times)))
    return Space(f"{block}.vo.{group}", Kind.VO, block, wide, Symmetry.LINEAR, tuple(axes))


def head_groups(config: "MicrotomeConfig", sizes: Any, block: int) -> Space:
    """The key-value groups of a block, each with its query heads; coordinate g is everything of group g."""
    groups, name = sizes.num_key_value_heads, f"{prefix(block)}self_attn."
    times = sizes.num_attention_heads // groups

    def rows(wide: int) -> Tensor:
        return span(0, groups, 1, wide, wide)

    wide_q, wide_k, wide_v = times * sizes.head_dim, sizes.head_dim, sizes.v_head_dim
    axes = [
        Axis(f"{name}{tensor}.{kind}", 0, Role.WRITES, rows(wide))
        for tensor, wide in (("q_proj", wide_q), ("k_proj", wide_k), ("v_proj", wide_v))
        for kind in ("weight", "bias")
    ]
    if config.qk_norm == "full":
        axes += [
            Axis(f"{name}q_norm.weight", 0, Role.SCALES, rows(wide_q)),
            Axis(f"{name}k_norm.weight", 0, Role.SCALES, rows(wide_k)),
        ]
    axes.append(Axis(f"{name}rotary_index", 0, Role.WRITES, rows(1)))
    axes.append(Axis(f"{name}o_proj.weight", 1, Role.READS, rows(times * wide_v)))
    return Space(f"{block}.heads", Kind.HEADS, block, groups, Symmetry.PERMUTE, tuple(axes))


SUBSETS = {
    Kind.ATTN_READ: "attn_read",
    Kind.ATTN_WRITE: "attn_write",
    Kind.MLP_READ: "mlp_read",
    Kind.MLP_WRITE: "mlp_write",
}


def subset_spaces(config: "MicrotomeConfig", block: int) -> list[Space]:
    """The coordinates of the stream that each half of a block reads and writes: all, or those that its index names.

    Other halves and the norms see the whole stream, so these are spaces of a half alone: a coordinate that is left out
    is not gathered, or nothing is added to it.
    """
    stored, head, found = shapes(config, block), prefix(block), list[Space]()
    linears = {
        "attn_read": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_write": ("self_attn.o_proj",),
        "mlp_read": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_write": ("mlp.down_proj",),
    }
    for kind, way in SUBSETS.items():
        reads = way.endswith("read")
        role, dim = (Role.READS, 1) if reads else (Role.WRITES, 0)
        axes = [(f"{head}{name}.weight", dim, role) for name in linears[way]]
        axes += [] if reads else [(f"{head}{linears[way][0]}.bias", 0, role)]
        axes += [(f"{head}{way}_index", 0, Role.WRITES)]
        mine = [one for one in axes if one[0] in stored]
        if mine:
            size = stored[mine[0][0]][dim]
            there = tuple(Axis(tensor, along, how, span(0, size)) for tensor, along, how in mine)
            found.append(Space(f"{block}.{way}", kind, block, size, Symmetry.PERMUTE, there))
    return found


def is_shared(config: "MicrotomeConfig") -> bool:
    """Whether every half reads and writes the whole stream."""
    blocks = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
    return not any(indices(sizes, half) for sizes in blocks for half in HALVES)


def spaces(config: "MicrotomeConfig", *, split: bool = True) -> list[Space]:
    """Every space of the decoder."""
    inner = [space for block in range(config.num_hidden_layers) for space in block_spaces(config, block)]
    return residual_spaces(config, split=split) + inner


FREE: tuple[tuple[str, int], ...] = (
    (EMBEDDING, 0),  # the vocabulary
    (POSITIONS, 0),  # the positions
    (HEAD, 0),
    ("lm_head.bias", 0),
    ("head_adapter.weight", 0),  # the embedding's own basis, which only the tied table uses
    ("head_adapter.bias", 0),
)
