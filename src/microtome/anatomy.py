"""A decoder in words and counts, from its config alone: features, what its numbers are for, and its spaces."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from microtome import budget, layout, surgery
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Space, Symmetry
from microtome.surgery import Form

SYMMETRIES = {
    Symmetry.PERMUTE: "permutations",
    Symmetry.LINEAR: "any invertible map",
    Symmetry.ORTHOGONAL: "rotations, gains folded",
    Symmetry.CENTRED: "rotations that keep the mean, gains folded",
    Symmetry.PAIRS: "a turn of each rotary pair",
    Symmetry.SIGNS: "signs of rotary pairs",
}
PARTS: tuple[str, ...] = ("embeddings", "attention", "MLP", "norms", "shortcuts", "head")
PARALLEL = {
    "none": "attention then MLP",
    "shared": "attention and MLP side by side behind one norm",
    "separate": "attention and MLP side by side, a norm each",
}
SKIPPED = {"self_attn": "attention", "mlp": "MLP"}
PLACEMENTS = {"pre": "before each half", "post": "behind each half", "sandwich": "before and behind each half"}


@dataclass(frozen=True)
class SpaceKind:
    """All spaces of one kind. A stream is one space at every junction; the others are each block's own."""

    kind: str
    number: int
    sizes: tuple[int, ...]  # that occur, in ascending order
    symmetry: str
    stored: int  # numbers of all tensors that have such an axis
    multiple: int  # that widths are rounded to


def features(config: MicrotomeConfig) -> dict[str, str]:
    """The canonical decoder in words."""
    return {
        "blocks": block_words(config),
        "norms": norm_words(config),
        "positions": position_words(config),
        "attention": attention_words(config),
        "MLP": mlp_words(config),
        "head": head_words(config),
    }


def span(values: Iterable[int]) -> str:
    """One size, or the smallest and the largest."""
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def each(config: MicrotomeConfig, field: str) -> str:
    """A size of the blocks, which may differ from one to the next."""
    return span(getattr(config.per_layer_config[block], field) for block in range(config.num_hidden_layers))


def block_words(config: MicrotomeConfig) -> str:
    """How many blocks, how wide, what is in them, and how the stream passes them."""
    blocks = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
    gone = {name: sum(layout.skips(one, half) for one in blocks) for half, name in SKIPPED.items()}
    kinds = {kind for one in blocks for kind in (one.attn_shortcut, one.mlp_shortcut)} - {"identity"}
    return joined(
        f"{len(blocks)} of width {span(layout.residual_width(config, one) for one in layout.junctions(config))}",
        PARALLEL[config.parallel],
        *(f"{count} without {name}" for name, count in gone.items() if count),
        f"{' and '.join(sorted(kinds))} shortcuts" if kinds else None,
    )


def joined(*words: str | None) -> str:
    """The phrases that there are, separated by commas."""
    return ", ".join(one for one in words if one)


def norm_words(config: MicrotomeConfig) -> str:
    """Kind, place and parameters of the norms."""
    name = "RMSNorm" if config.norm == "rms" else "LayerNorm"
    return joined(
        f"{name} {PLACEMENTS[config.norm_placement]}",
        "and before the head" if config.final_norm else "none before the head",
        f"gain {config.norm_offset:g} + weight" if config.norm_offset else None,
        None if config.norm_gain else "no gain",
        "with bias" if config.norm_bias else None,
        f"epsilon {config.norm_eps:g}",
    )


def position_words(config: MicrotomeConfig) -> str:
    """How positions are told apart."""
    if config.positions != "rotary":
        return {"learned": f"learned, {config.max_position_embeddings:,}", "none": "none"}[config.positions]
    parameters = config.rope_parameters or {}
    kinds = {name: one for name, one in parameters.items() if isinstance(one, dict)} or {"": parameters}
    said = {
        joined(f"theta {one.get('rope_theta', 10000.0):g}", scaled(str(one.get("rope_type", "default"))))
        + (f" ({name.removesuffix('_attention')})" if name else "")
        for name, one in kinds.items()
    }
    blocks = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
    turned = max(2 * layout.rotary_pairs(config, one) for one in blocks)
    without = sum(not one.rotary for one in blocks)
    return joined(
        f"rotary on {'all' if turned == config.head_dim else turned} of {each(config, 'head_dim')} channels",
        *sorted(said),
        f"not in {without} of {len(blocks)} blocks" if without else None,
        f"up to {config.max_position_embeddings:,}",
    )


def scaled(kind: str) -> str | None:
    """A scaling of the frequencies, if there is one."""
    return None if kind == "default" else f"{kind} scaling"


def attention_words(config: MicrotomeConfig) -> str:
    """Heads and everything that is special about them."""
    heads, groups = each(config, "num_attention_heads"), each(config, "num_key_value_heads")
    shared = f"{heads} query heads on {groups} key-value head{'' if groups == '1' else 's'}"
    narrow, values = each(config, "head_dim"), each(config, "v_head_dim")
    kinds = config.layer_types or []
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    return joined(
        f"{heads} heads" if heads == groups else f"{shared} ({'multi-query' if groups == '1' else 'grouped'})",
        f"width {narrow}" + ("" if values == narrow else f", values {values}"),
        "biases" if config.attention_bias else None,
        "output bias" if config.attention_out_bias else None,
        {"head": "queries and keys normed per head", "full": "queries and keys normed over all heads"}.get(
            config.qk_norm or ""
        ),
        f"scale {config.attention_scale:g}" if config.attention_scale is not None else None,
        f"scores capped at {config.attention_softcap:g}" if config.attention_softcap is not None else None,
        f"window of {config.sliding_window:,} in {sliding} of {len(kinds)} blocks" if sliding else None,
    )


def mlp_words(config: MicrotomeConfig) -> str:
    """Width, gate and biases."""
    return joined(
        f"{each(config, 'intermediate_size')} neurons",
        config.hidden_act,
        "gated" if config.mlp_gated else "plain",
        "biases" if config.mlp_bias else None,
        "output bias" if config.mlp_out_bias else None,
    )


def head_words(config: MicrotomeConfig) -> str:
    """Vocabulary, tying, and the scales."""
    scales = {"embeddings": config.embedding_scale, "halves": config.residual_scale, "logits": config.logits_scale}
    return joined(
        f"vocabulary {config.vocab_size:,}",
        "tied to the embedding" if config.tie_word_embeddings else "own weights",
        "bias" if config.head_bias else None,
        *(f"{name} times {value:.4g}" for name, value in scales.items() if value != 1.0),
        f"logits capped at {config.logits_softcap:g}" if config.logits_softcap is not None else None,
    )


def parts(config: MicrotomeConfig) -> dict[str, int]:
    """Stored numbers by what they are for; a tied head stores none."""
    found = dict.fromkeys(PARTS, 0)
    for part in layout.parts(config):
        for name, shape in layout.shapes(config, part).items():
            found[use(name)] += prod(shape)
    return {what: count for what, count in found.items() if count or what != "shortcuts"}


def use(name: str) -> str:
    """What a canonical tensor is for."""
    marks = {
        "embed_": "embeddings",
        "self_attn.": "attention",
        ".mlp.": "MLP",
        "norm": "norms",
        "_shortcut": "shortcuts",
    }
    return next((what for mark, what in marks.items() if mark in name), "head")


def space_kinds(config: MicrotomeConfig) -> tuple[SpaceKind, ...]:
    """Every kind of space, the stream first."""
    shapes = {name: shape for part in layout.parts(config) for name, shape in layout.shapes(config, part).items()}
    free = surgery.formed_config(config, Form(norm=config.norm, untie=True))
    turned = layout.residual_spaces(free, split=False)[0].symmetry  # once its gains are folded
    groups: dict[Kind, list[Space]] = {}
    for space in layout.spaces(config):
        groups.setdefault(space.kind, []).append(space)
    found: list[SpaceKind] = []
    for kind, members in groups.items():
        tensors = {axis.tensor for space in members for axis in space.axes}
        symmetries = {turned} if kind is Kind.RESIDUAL else {space.symmetry for space in members}
        sizes = tuple(sorted({space.size for space in members}))
        words = " or ".join(sorted(SYMMETRIES[one] for one in symmetries))
        stored = sum(prod(shapes[name]) for name in tensors)
        found.append(SpaceKind(str(kind), len(members), sizes, words, stored, budget.friendly(sizes[-1])))
    return tuple(found)
