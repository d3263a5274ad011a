"""The spaces inside a block: how far each can be narrowed, what the decoder looks like then, and how it is done.

A dial is one width that can be chosen: a block's neurons, the query-key or value channels of its heads (all heads of a
block keep the same number), its key-value groups, one of its halves, or the block itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor

from microtome import layout, surgery
from microtome.edit import Correct, Edit, Quantise, Rewrite, Select
from microtome.errors import BadPlan
from microtome.layout import prefix
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Role, Space, selection
from microtome.stats import Fisher, Influence, Masks, Moment, Stat

Narrowing = Rewrite | Select
NAMES = {Kind.FFN: "ffn", Kind.QK: "qk", Kind.VO: "vo", Kind.HEADS: "heads", **layout.SUBSETS}  # what matrices cut
KINDS = {name: kind for kind, name in NAMES.items()}


@dataclass(frozen=True)
class Dial:
    """A width that can be chosen: multiples of `step` from `least` on, and `size` itself where it may stay `whole`."""

    name: str  # "3.ffn", "3.attn" (a half), "3" (a block)
    block: int
    kind: str  # "ffn", "qk", "vo", "heads", "attn", "mlp", "block"
    size: int
    step: int
    least: int
    whole: bool = True

    @property
    def below(self) -> int:
        """The widest that is cut at all."""
        return (self.size - 1) // self.step * self.step

    def nearest(self, wide: float) -> int:
        """The width that can be had closest to `wide`."""
        if self.whole and wide >= (self.size + self.below) / 2:
            return self.size
        return min(max(round(wide / self.step) * self.step, self.least), self.size if self.whole else self.below)

    def wider(self, wide: int) -> int:
        """The next width, or the widest."""
        return min(wide + self.step, self.size if self.whole else self.below)


@dataclass(frozen=True, eq=False)
class View:
    """What a method sees of one block, or of one of its halves: nothing of it may be changed."""

    config: MicrotomeConfig  # of the whole decoder, before the cut
    block: int
    halves: tuple[str, ...]  # "attn", "mlp"
    weights: Mapping[str, Tensor]  # canonical names without the block's prefix, fp64 or fp32 on the CPU
    spaces: Mapping[str, Space]
    stats: Mapping[Stat, Moment | Influence | Masks | Fisher]
    gradients: Mapping[str, Tensor]  # of the loss, by weight; empty unless the method needs them
    squares: Mapping[str, Tensor]  # means over sequences of squared gradients
    dtype: torch.dtype = torch.float32  # that the result is stored in

    @property
    def sizes(self) -> Any:
        """The block's own config: heads, head widths, neurons."""
        return self.config.per_layer_config[self.block]

    def moment(self, stat: Stat) -> Moment:
        """The sums at one site."""
        found = self.stats[stat]
        assert isinstance(found, Moment)
        return found

    def of_kind(self, kind: Kind) -> list[Space]:
        """The block's spaces of one kind, one for each key-value group where there are several."""
        return [space for space in self.spaces.values() if space.kind is kind]

    def full(self, name: str) -> str:
        """A tensor's canonical name."""
        return prefix(self.block) + name


def half_of(kind: Kind) -> str:
    """The half of a block that a kind of space lies in."""
    return "mlp" if kind in (Kind.FFN, Kind.MLP_READ, Kind.MLP_WRITE) else "attn"


def kinds_of(method: Any, config: MicrotomeConfig) -> frozenset[Kind]:
    """The kinds of spaces that a method cuts in a decoder; it may spare what a norm of queries and keys measures."""
    spared = config.qk_norm is not None and not getattr(method, "through_norms", True)
    return method.targets - {Kind.QK} if spared else method.targets


def spaces_of(config: MicrotomeConfig, block: int, kinds: Iterable[Kind]) -> dict[str, Space]:
    """The spaces of some kinds in a block, by name."""
    found = [*layout.block_spaces(config, block), *layout.subset_spaces(config, block)]
    return {space.name: space for space in found if space.kind in kinds}


def subset_width(config: MicrotomeConfig, sizes: Any, way: str) -> int:
    """How many coordinates of the stream a half of a block reads or writes ("attn_read", ...)."""
    middle = sizes.residual_mid if config.parallel == "none" else None
    stream = {
        "attn_read": sizes.residual_in,
        "attn_write": middle or sizes.residual_out,
        "mlp_read": middle or sizes.residual_in,
        "mlp_write": sizes.residual_out,
    }
    return getattr(sizes, f"{way}_size") or stream[way]


def friendly_channels(size: int) -> int:
    """The multiple that head widths are rounded to."""
    return 8 if size >= 64 else 4 if size >= 32 else 2


def dials(config: MicrotomeConfig, kinds: Iterable[Kind], multiple: int | None = None) -> dict[str, Dial]:
    """Every width of the inner spaces that can be chosen.

    Channels that a head norm divides by together are no dial, for it would divide the rest by less: query-key channels
    where queries and keys are normed, and groups where that is done over all heads at once.
    """
    from microtome.budget import friendly

    found: dict[str, Dial] = {}
    normed = {Kind.QK: config.qk_norm is not None, Kind.HEADS: config.qk_norm == "full"}
    kinds = frozenset(kind for kind in kinds if not normed.get(kind, False))
    for block in range(config.num_hidden_layers):
        sizes = config.per_layer_config[block]
        if Kind.BLOCKS in kinds:
            found[str(block)] = Dial(str(block), block, "block", 1, 1, 0)
        for half, module in (("attn", "self_attn"), ("mlp", "mlp")):
            if Kind.HALVES in kinds and not layout.skips(sizes, module):
                found[f"{block}.{half}"] = Dial(f"{block}.{half}", block, half, 1, 1, 0)
        for kind in sorted(kinds, key=list(Kind).index):
            if kind not in NAMES or layout.skips(sizes, {"mlp": "mlp", "attn": "self_attn"}[half_of(kind)]):
                continue
            size, step = {
                Kind.FFN: (sizes.intermediate_size, multiple or friendly(sizes.intermediate_size)),
                Kind.QK: (sizes.head_dim, lcm(2, multiple or friendly_channels(sizes.head_dim))),
                Kind.VO: (sizes.v_head_dim, multiple or friendly_channels(sizes.v_head_dim)),
                Kind.HEADS: (sizes.num_key_value_heads, 1),
                **{one: (subset_width(config, sizes, way), multiple or 1) for one, way in layout.SUBSETS.items()},
            }[kind]
            name = f"{block}.{NAMES[kind]}"
            found[name] = Dial(name, block, NAMES[kind], size, step, min(step, size))
    return found


# --- configs --------------------------------------------------------------------------------------------------------


def narrowed_config(config: MicrotomeConfig, widths: Mapping[str, int], *, biased: bool = False) -> MicrotomeConfig:
    """The config with inner widths by dial; `biased` gives every output projection a bias.

    Where all blocks agree on a field it is one field of the config, as stock models have it.
    """
    changes: dict[int, dict[str, Any]] = {block: {} for block in range(config.num_hidden_layers)}
    for name, wide in widths.items():
        block, _, kind = name.partition(".")
        if kind:
            mine, made = changes[int(block)], change(config, int(block), kind, wide)
            both = {"skip": sorted({*mine["skip"], *made["skip"]})} if "skip" in mine and "skip" in made else {}
            mine |= made | both
    if biased:
        for one in changes.values():
            one |= {"attention_out_bias": True, "mlp_out_bias": True}
    return without_blocks(unified(config, changes), dropped(widths))


def dropped(widths: Mapping[str, int]) -> list[int]:
    """The blocks that are left out altogether."""
    return [int(name) for name, wide in widths.items() if name.isdigit() and not wide]


def change(config: MicrotomeConfig, block: int, kind: str, wide: int) -> dict[str, Any]:
    """The fields of one block that a width decides."""
    sizes = config.per_layer_config[block]
    if kind in ("ffn", "vo"):
        return {{"ffn": "intermediate_size", "vo": "v_head_dim"}[kind]: wide}
    if kind == "heads":
        times = sizes.num_attention_heads // sizes.num_key_value_heads
        return {"num_key_value_heads": wide, "num_attention_heads": times * wide}
    if kind in layout.SUBSETS.values():
        return {} if wide == subset_width(config, sizes, kind) else {f"{kind}_size": wide}
    if kind in ("attn", "mlp"):
        name = {"attn": "self_attn", "mlp": "mlp"}[kind]
        return {} if wide else {"skip": sorted({*(getattr(sizes, "skip", None) or []), name})}
    if kind != "qk":
        raise ValueError(f"no inner space is called {kind}")
    if wide == sizes.head_dim:
        return {}
    scale = sizes.head_dim**-0.5 if sizes.attention_scale is None else sizes.attention_scale
    found: dict[str, Any] = {"head_dim": wide, "attention_scale": scale}
    if pairs := layout.rotary_pairs(config, sizes):
        found |= {"rotary_pairs": turning(pairs, sizes.head_dim, wide), "rotary_subset": True}
    return found


def turning(pairs: int, size: int, wide: int) -> int:
    """How many rotary pairs stay when `wide` of `size` query-key channels do: in proportion."""
    fewest = max(1, -(-(wide - size + 2 * pairs) // 2))  # there are only so many channels that do not turn
    return min(pairs, max(fewest, round(pairs * wide / size)), wide // 2)


def unified(config: MicrotomeConfig, changes: Mapping[int, Mapping[str, Any]]) -> MicrotomeConfig:
    """The config with fields changed block by block; what all blocks agree on becomes one field."""
    blocks = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
    names = {name for one in changes.values() for name in one} - {"skip"}
    shared: dict[str, Any] = {}
    own: dict[int, dict[str, Any]] = {
        block: {"skip": one["skip"]} if "skip" in one else {} for block, one in changes.items()
    }
    for name in sorted(names):
        values = [changes.get(block, {}).get(name, getattr(sizes, name)) for block, sizes in enumerate(blocks)]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
        for block, value in enumerate(values):
            own.setdefault(block, {})[name] = value
    return surgery.rebuilt(config, own, **shared)


def without_blocks(config: MicrotomeConfig, blocks: Iterable[int]) -> MicrotomeConfig:
    """The config of a decoder that lacks some blocks; those behind them move up."""
    gone = set(blocks)
    if not gone:
        return config
    if not layout.even(config):
        raise BadPlan(
            "a block cannot be left out of a stream with several widths: drop blocks before the stream is cut."
        )
    left = [block for block in range(config.num_hidden_layers) if block not in gone]
    said = config.to_dict().get("per_layer_config") or {}
    kinds = config.layer_types or []
    moved = {str(new): said[str(old)] for new, old in enumerate(left) if str(old) in said}
    fields = {name: value for name, value in config.to_dict().items() if name in MicrotomeConfig.__annotations__}
    fields |= {"num_hidden_layers": len(left), "layer_types": [kinds[old] for old in left]}
    made: dict[str, Any] = {**fields, "per_layer_config": moved or None}
    return MicrotomeConfig(**made)


# --- tensors --------------------------------------------------------------------------------------------------------


def narrowed(tensors: Mapping[str, Tensor], edits: Iterable[Edit], block: int) -> surgery.Tensors:
    """The tensors of a block after its inner spaces are narrowed, then after its corrections.

    Spaces that share an axis (the key-value groups of a block) are narrowed together.
    """
    edits, out = list(edits), dict(tensors)
    for kind in NAMES:
        mine = [edit for edit in edits if isinstance(edit, Rewrite | Select) and edit.space.kind is kind]
        index = rotary_index(tensors, mine, prefix(block)) if kind is Kind.QK else {}
        axes = dict.fromkeys((axis.tensor, axis.dim) for edit in mine for axis in edit.space.axes)
        if kind is Kind.HEADS and mine:
            axes[f"{prefix(block)}self_attn.rotary_index", 0] = None  # it may have come with the query-key channels
        for name, dim in axes:
            if name in out:
                out[name] = narrowed_axis(out[name], name, dim, mine)
        out |= index | subset_index(tensors, mine, prefix(block))
    return out | {edit.tensor: edit.value for edit in edits if isinstance(edit, Correct | Quantise)}


def narrowed_axis(tensor: Tensor, name: str, dim: int, edits: Iterable[Narrowing]) -> Tensor:
    """One axis of a tensor with every space that lies on it narrowed; spaces keep their order along it.

    A gain that several spaces share (head norms) is cut once, which needs them to agree.
    """
    moved, edits = tensor.movedim(dim, 0), list(edits)
    if edits[0].space.kind is Kind.HEADS:  # coordinates are groups, copies their rows
        (edit,) = edits
        assert isinstance(edit, Select)  # the groups' channels may have been narrowed before
        return moved.unflatten(0, (edit.space.size, -1))[edit.indices].flatten(0, 1).movedim(0, dim)
    pieces: dict[int, Tensor] = {}
    seen = torch.zeros(len(moved), dtype=torch.bool)
    for edit in edits:
        for axis in edit.space.axes:
            if (axis.tensor, axis.dim) != (name, dim):
                continue
            for copy in range(axis.at.shape[1]):
                at = axis.at[:, copy]
                made = narrowed_rows(moved[at], edit, axis.role)
                first = int(at[0])
                if first in pieces and not torch.equal(pieces[first], made):
                    raise ValueError(f"the spaces on {name} disagree about what stays")
                pieces[first] = made
                seen[at] = True
    if not seen.all():
        raise ValueError(f"{name} holds {int((~seen).sum())} coordinates of no space that is cut")
    return torch.cat([pieces[first] for first in sorted(pieces)]).movedim(0, dim)


def narrowed_rows(rows: Tensor, edit: Narrowing, role: Role) -> Tensor:
    """The N rows [N, ...] of one space, narrowed to R."""
    if isinstance(edit, Select) and (role in (Role.WRITES, Role.SCALES, Role.DUAL) or edit.read is None):
        return rows[edit.indices]
    if isinstance(edit, Select):
        assert edit.read is not None
        matrix_RN = edit.read.T
    elif role is Role.SCALES:
        matrix_RN = selection(edit.space, edit.shrink)
    else:
        matrix_RN = edit.shrink if role is Role.WRITES else edit.seen.T
    return (matrix_RN.to(rows) @ rows.reshape(len(rows), -1)).reshape(len(matrix_RN), *rows.shape[1:])


def rotary_index(tensors: Mapping[str, Tensor], edits: Iterable[Narrowing], head: str) -> surgery.Tensors:
    """Which frequencies every key-value group of a block still turns with, int32 [G, P]."""
    old, rows = tensors.get(f"{head}self_attn.rotary_index"), dict[int, Tensor]()
    for edit in edits:
        pairs, group = edit.space.pairs, int(edit.space.name.rpartition(".")[2])
        if not pairs:
            return {}
        if isinstance(edit, Rewrite):
            raise ValueError(f"{edit.space.name} turns with the position: only a selection of pairs keeps that")  # noqa: TRY004 - wrong for this space
        mine = edit.indices[edit.indices < pairs]
        rows[group] = mine if old is None else old[group].long()[mine]
    return {f"{head}self_attn.rotary_index": torch.stack([rows[one] for one in sorted(rows)]).int()} if rows else {}


def subset_index(tensors: Mapping[str, Tensor], edits: Iterable[Narrowing], head: str) -> surgery.Tensors:
    """Which coordinates of the stream a half reads or writes, int32 [R], where it saw all of them before."""
    found: surgery.Tensors = {}
    for edit in edits:
        name = f"{head}{layout.SUBSETS.get(edit.space.kind)}_index"
        if edit.space.kind in layout.SUBSETS and name not in tensors:
            assert isinstance(edit, Select)  # an index names coordinates, it does not mix them
            found[name] = edit.indices.int()
    return found


def best(score_N: Tensor, rank: int) -> Tensor:
    """The indices of the `rank` largest scores, in order of index; ties go to the smaller index."""
    return torch.sort(torch.argsort(score_N, descending=True, stable=True)[:rank]).values


def best_channels(space: Space, score_N: Tensor, rank: int, pairs_left: int) -> Tensor:
    """The same for query-key channels: `pairs_left` whole rotary pairs, by the sum of their scores, and the best rest.

    Order: first halves of the pairs, second halves, channels that do not turn.
    """
    if not space.pairs:
        return best(score_N, rank)
    firsts, seconds, rest = score_N.split([space.pairs, space.pairs, space.size - 2 * space.pairs])
    turned = best(firsts + seconds, pairs_left)
    still = best(rest, rank - 2 * pairs_left) + 2 * space.pairs
    return torch.cat([turned, turned + space.pairs, still])


def cost(view: View, kind: Kind) -> int:
    """The numbers that one unit of a kind's dial stores, all groups of the block together."""
    return sum(
        axis.at.shape[1] * (view.weights[name].numel() // view.weights[name].shape[axis.dim])
        for space in view.of_kind(kind)
        for axis in space.axes
        if (name := axis.tensor.removeprefix(prefix(view.block))) in view.weights
    )
