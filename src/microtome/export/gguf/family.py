"""The architectures of llama.cpp that a canonical decoder can be written as, and why it cannot.

A family is data: what llama.cpp's code of that name computes. A decoder is held against it after the constants that can
be folded into weights are gone, and zeros stand in for what it lacks: blocks of one width where a family has only one,
biases where it wants some. Families are tried in order.

Facts as of llama.cpp in llama-cpp-python 0.3.36, `src/models/*.cpp`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from microtome import layout
from microtome.modeling_microtome import MicrotomeConfig

MOST_BLOCKS = 512
PADDED_FFN = 32  # neurons of zeros where a block has none: llama.cpp forgets such a block's residual
BIASES = ("attention_bias", "attention_out_bias", "mlp_bias", "mlp_out_bias")
GELU = frozenset({"gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"})
SILU = frozenset({"silu", "swish"})


@dataclass(frozen=True)
class Family:
    """What llama.cpp computes under a name.

    biases: those it can add; filled: those that must be in the file. ragged: blocks may differ in heads, groups and
    neurons, and lack attention. neighbours: channels 2 i and 2 i + 1 turn together, instead of i and i + P. factors:
    any frequencies, from a tensor. partial: only the first channels of a head turn. square: heads times their width is
    the width of the stream. packed: queries, keys and values in one tensor. tied: the head is the embedding's table
    (True), or a tensor of its own (False), or either. scaled: it multiplies embeddings by the root of the width. still:
    every so-manieth block does not turn its heads. narrow: counts of blocks for which scores are divided by the root of
    the stream's width over the heads.
    """

    name: str
    norm: str = "rms"
    placement: str = "pre"
    parallel: tuple[str, ...] = ("none",)
    qk_norm: str | None = None
    activations: frozenset[str] = SILU
    gated: bool = True
    positions: str = "rotary"
    biases: tuple[str, ...] = BIASES
    filled: tuple[str, ...] = ()
    ragged: bool = False
    neighbours: bool = False
    factors: bool = False
    partial: bool = False
    square: bool = False
    packed: bool = False
    tied: bool | None = None
    scaled: bool = False
    windows: bool = False
    still: int = 0
    attention_cap: bool = False
    logits_cap: bool = False
    head_bias: bool = False
    narrow: int = 0

    @property
    def tolerance(self) -> float:
        """Largest difference of logits as a part of the largest: GELU is looked up in a table of 16-bit numbers."""
        return 1e-4 if self.activations is SILU else 2e-2


QUERIES = ("attention_bias",)
LAYERS: dict[str, Any] = {"norm": "layer", "gated": False, "activations": GELU, "filled": BIASES, "square": True}
GEMMA: dict[str, Any] = {"activations": GELU, "biases": QUERIES, "scaled": True}
SANDWICH: dict[str, Any] = {**GEMMA, "placement": "sandwich", "windows": True, "logits_cap": True}

FAMILIES = (
    Family("llama", neighbours=True, factors=True),
    Family("deci", neighbours=True, factors=True, ragged=True),
    Family("qwen3", qk_norm="head", biases=QUERIES),
    Family("smollm3", neighbours=True, biases=QUERIES, still=4),
    Family("olmo2", placement="post", qk_norm="full", biases=QUERIES, square=True, tied=False),
    Family("gemma", **GEMMA, tied=True),
    Family("gemma2", **SANDWICH, tied=True, attention_cap=True, narrow=46),
    Family("gemma3", **SANDWICH, qk_norm="head", narrow=62),
    Family("gpt2", **LAYERS, positions="learned", packed=True),
    Family("phi2", **LAYERS, parallel=("shared",), partial=True, tied=False, head_bias=True),
    Family("gptneox", **LAYERS, parallel=("separate", "none"), partial=True, packed=True, tied=False),
)


def chosen(config: MicrotomeConfig) -> Family | str:
    """The first family that can say a decoder, else why the nearest cannot."""
    for reason in (*anywhere(config), *heads_anywhere(config)):
        return reason
    found = {family: list(reasons(family, config)) for family in FAMILIES}
    for family, wrong in found.items():
        if not wrong:
            return family
    origin = str(config.source_model_type).replace("_", "")
    named = {family: len(family.name) if origin.startswith(family.name) else 0 for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: (-named[family], len(found[family])))
    return f"llama.cpp has no architecture like it. The nearest is {nearest.name}: {'; '.join(found[nearest])}."


def blocks(config: MicrotomeConfig) -> list[Any]:
    """The sizes of every block."""
    return [config.per_layer_config[block] for block in range(config.num_hidden_layers)]


def with_attention(config: MicrotomeConfig) -> list[Any]:
    """The sizes of the blocks that have attention."""
    return [sizes for sizes in blocks(config) if not layout.skips(sizes, "self_attn")]


def anywhere(config: MicrotomeConfig) -> Iterator[str]:
    """What no architecture of llama.cpp has."""
    if not layout.even(config) or config.head_adapter:
        yield "its stream has several widths or bases, and a GGUF file one. Compress with --target gguf."
    if not layout.is_shared(config):
        yield "its halves read and write coordinates of their own (disp). Another method with --target gguf will fit."
    if not with_attention(config):
        yield "no block has attention. Keep one."
    if not config.final_norm:
        yield "it has no norm before its head."
    if config.num_hidden_layers > MOST_BLOCKS:
        yield f"llama.cpp loads up to {MOST_BLOCKS} blocks, and it has {config.num_hidden_layers}: -m depth cuts some."


def heads_anywhere(config: MicrotomeConfig) -> Iterator[str]:
    """What heads have in no architecture of llama.cpp."""
    some = with_attention(config)
    if any(sizes.rotary_subset for sizes in some):
        yield "its heads turn with frequencies of their own (modegpt). Compress with --target gguf."
    if len({(sizes.head_dim, sizes.rotary_pairs) for sizes in some}) > 1:
        yield "queries of different blocks have different widths. Compress with --target gguf."
    if any(sizes.v_head_dim > sizes.head_dim for sizes in some):
        yield "values are wider than queries. Compress with --target gguf."
    if any(sizes.head_dim % 2 for sizes in some):
        yield "heads have an odd number of channels. Compress with --target gguf."
    if len({sizes.num_attention_heads // sizes.num_key_value_heads for sizes in some}) > 1:
        yield "key-value heads of different blocks serve different numbers of heads."


def reasons(family: Family, config: MicrotomeConfig) -> Iterator[str]:
    """What a family does not compute of a decoder."""
    words = {"rms": "RMSNorms", "layer": "LayerNorms"}
    if config.norm != family.norm:
        sliced = " of a sliced stream (-m fasp or flap leave the stream)" if config.norm_divisor is not None else ""
        yield f"it has {words[family.norm]}, and this decoder {words[config.norm]}{sliced}"
    elif config.norm == "rms" and (config.norm_bias or config.final_norm_bias):
        yield "its RMSNorms have no bias"
    if config.norm_placement != family.placement:
        yield f"its norms stand {family.placement}, and this decoder's {config.norm_placement}"
    if config.parallel not in family.parallel:
        yield f"its halves are {' or '.join(family.parallel)} parallel, and this decoder's {config.parallel}"
    if config.qk_norm != family.qk_norm:
        yield f"norms of queries and keys are {family.qk_norm}, and this decoder's {config.qk_norm}"
    if config.hidden_act not in family.activations:
        yield f"its activation is {min(family.activations)}, and this decoder's {config.hidden_act}"
    if config.mlp_gated != family.gated:
        yield f"its feed-forward halves are {'gated' if family.gated else 'not gated'}"
    if config.positions != family.positions:
        yield f"its positions are {family.positions}, and this decoder's {config.positions}"
    yield from head_reasons(family, config)
    yield from block_reasons(family, config)


def head_reasons(family: Family, config: MicrotomeConfig) -> Iterator[str]:
    """What a family does not compute of embeddings and head."""
    if config.attention_softcap is not None and not family.attention_cap:
        yield "it does not cap scores"
    if config.attention_softcap is None and family.attention_cap:
        yield "it caps scores, and this decoder does not"
    if config.logits_softcap is not None and not family.logits_cap:
        yield "it does not cap logits"
    if config.head_bias and not family.head_bias:
        yield "its head has no bias"
    if family.tied and not config.tie_word_embeddings:
        yield "its head is its embedding, and this decoder's is not"
    if config.position_offset and family.positions != "learned":
        yield "its positions have no offset"


def block_reasons(family: Family, config: MicrotomeConfig) -> Iterator[str]:
    """What a family does not compute of the blocks."""
    for name in BIASES:
        if name not in family.biases and any(getattr(sizes, name) for sizes in blocks(config)):
            yield f"it has no {name.replace('_', ' ')}"
    if family.square and not 0 < most_groups(config) <= full_groups(config):
        yield f"its heads side by side are as wide as the stream, {config.hidden_size}"
    if family.name == "llama" and not alike(config):
        yield "its blocks are all alike"
    if not family.windows and not one_rotary(config):
        yield "all its blocks turn with the same frequencies"
    still = {block for block, one in enumerate(blocks(config)) if not one.rotary}
    wanted = set(range(family.still - 1, config.num_hidden_layers, family.still)) if family.still else set[int]()
    if config.positions == "rotary" and still != wanted:
        told = f"every {family.still}th block keeps" if family.still else "none of its blocks keep"
        yield f"{told} its heads unturned, and of this decoder blocks {', '.join(map(str, sorted(still))) or 'none'}"
    if config.positions == "rotary":
        yield from rotary_reasons(family, config)


def rotary_reasons(family: Family, config: MicrotomeConfig) -> Iterator[str]:
    """What a family does not compute of the rotation of heads."""
    sizes = with_attention(config)[0]
    turned = 2 * layout.rotary_pairs(config, sizes)
    if turned != sizes.head_dim and not (family.partial or family.factors):
        yield f"it turns whole heads, and this decoder {turned} of {sizes.head_dim} channels"
    kinds = {one.get("rope_type", "default") for one in rotaries(config)}
    if not family.factors and (odd := sorted(kinds - {"default", "linear", "dynamic"})):
        yield f"it has no {odd[0]} scaling of frequencies"


def rotaries(config: MicrotomeConfig) -> list[dict[str, Any]]:
    """The rope parameters of every kind of block."""
    parameters = dict(config.rope_parameters or {})
    nested = [dict(one) for one in parameters.values() if isinstance(one, dict)]
    return nested or [parameters]


def one_rotary(config: MicrotomeConfig) -> bool:
    """Whether all kinds of blocks have the same frequencies."""
    found = rotaries(config)
    return all(one == found[0] for one in found)


def alike(config: MicrotomeConfig) -> bool:
    """Whether all blocks have the same sizes and both halves."""
    some = blocks(config)
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = {tuple(getattr(one, name) for name in names) for one in some}
    return len(sizes) == 1 and not any(layout.skips(one, half) for one in some for half in ("self_attn", "mlp"))


def most_groups(config: MicrotomeConfig) -> int:
    """The key-value heads of the block that has most."""
    return max(one.num_key_value_heads for one in with_attention(config))


def full_groups(config: MicrotomeConfig) -> int:
    """The key-value heads with which the heads side by side are as wide as the stream; 0 where none are."""
    one = with_attention(config)[0]
    each = one.num_attention_heads // one.num_key_value_heads * one.head_dim
    return 0 if config.hidden_size % each else config.hidden_size // each


@dataclass(frozen=True)
class Sizes:
    """What a block has in the file."""

    heads: int
    groups: int
    ffn: int


def written(family: Family, config: MicrotomeConfig) -> list[Sizes]:
    """The sizes of every block in the file, where zeros may stand in for what a block lacks.

    Those of a ragged family are its own, but for what llama.cpp cannot lack.
    """
    some, present = blocks(config), with_attention(config)
    times = present[0].num_attention_heads // present[0].num_key_value_heads
    found: list[Sizes] = []
    for block, one in enumerate(some):
        groups = 0 if layout.skips(one, "self_attn") else one.num_key_value_heads
        groups = max(groups, 1 if block == 0 else 0)  # llama.cpp reads the width of heads off the first block
        ffn = PADDED_FFN if layout.skips(one, "mlp") else one.intermediate_size
        found.append(Sizes(times * groups, groups, ffn))
    if family.ragged:
        return found
    groups, ffn = max(one.groups for one in found), max(one.ffn for one in found)
    groups = full_groups(config) if family.square else groups
    return [Sizes(times * groups, groups, ffn)] * len(found)
