"""The spaces inside blocks: what is narrowed computes what the uncut decoder computes with the rest put to zero."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from models import (
    RAGGED,
    SMALL,
    TINY,
    canonical,
    decoder,
    doubled,
    error,
    ids,
    loaded,
    logits,
    random_tensors,
    stepwise,
)
from naive import naive_logits
from torch import Tensor

from microtome import arch, inner, layout
from microtome.edit import Correct, Edit, Rewrite, Select
from microtome.errors import BadPlan
from microtome.inner import KINDS
from microtome.layout import prefix
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind

TOKENS = ids(rows=2, length=11)
Widths = dict[str, int]


def normed(config: MicrotomeConfig, kind: str) -> bool:
    """Whether a norm over these channels makes masking something else than narrowing."""
    return (kind == "qk" and config.qk_norm is not None) or (kind == "heads" and config.qk_norm == "full")


def drawn_widths(config: MicrotomeConfig, kinds: tuple[str, ...], *, ragged: bool) -> Widths:
    """A width for every space of some kinds; blocks differ if they shall."""
    found: Widths = {}
    for block in range(config.num_hidden_layers):
        sizes, more = config.per_layer_config[block], block if ragged else 0
        wide = {
            "ffn": sizes.intermediate_size // 2 + more,
            "qk": max(2, sizes.head_dim - 2 - 2 * (more % 2)),
            "vo": max(1, sizes.v_head_dim - 3 + more),
            "heads": max(1, sizes.num_key_value_heads - 1),
        }
        found |= {f"{block}.{kind}": wide[kind] for kind in kinds}
    return found


def chosen(config: MicrotomeConfig, widths: Widths, seed: int = 0) -> dict[int, list[Edit]]:
    """A random selection in every space: whole rotary pairs, and as many of them as the plan says."""
    generator = torch.Generator().manual_seed(seed)

    def some(size: int, rank: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:rank].sort().values

    edits: dict[int, list[Edit]] = {block: [] for block in range(config.num_hidden_layers)}
    for name, wide in widths.items():
        block, kind = int(name.split(".")[0]), KINDS[name.split(".")[1]]
        for space in inner.spaces_of(config, block, {kind}).values():
            pairs = space.pairs
            if kind is Kind.QK and pairs:
                left = inner.turning(pairs, space.size, wide)
                first = some(pairs, left)
                rest = some(space.size - 2 * pairs, wide - 2 * left) + 2 * pairs
                indices = torch.cat([first, first + pairs, rest])
            else:
                indices = some(space.size, wide)
            edits[block].append(Select(space, indices))
    return edits


def masked(
    config: MicrotomeConfig, tensors: Mapping[str, Tensor], edits: Mapping[int, list[Edit]]
) -> dict[str, Tensor]:
    """The uncut tensors with zeros where the selections leave something out, from the sizes alone."""
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for block, mine in edits.items():
        sizes, head = config.per_layer_config[block], prefix(block)
        groups, times = sizes.num_key_value_heads, sizes.num_attention_heads // sizes.num_key_value_heads
        columns = out.get(f"{head}self_attn.o_proj.weight", torch.zeros(1, 1)).clone()
        by_head = columns.view(len(columns), groups, times, -1) if len(columns) > 1 else columns
        for edit in mine:
            assert isinstance(edit, Select)
            gone = sorted(set(range(edit.space.size)) - set(edit.indices.tolist()))
            name = edit.space.name.split(".")
            if name[1] == "ffn":
                out[f"{head}mlp.down_proj.weight"][:, gone] = 0.0
            elif name[1] == "vo":
                by_head[:, int(name[2]), :, gone] = 0.0
            elif name[1] == "heads":
                by_head[:, gone] = 0.0
            else:
                for kind in ("weight", "bias"):
                    for one, count in (("q", times), ("k", 1)):
                        key = f"{head}self_attn.{one}_proj.{kind}"
                        if key in out:
                            rows = out[key].view(groups, count, sizes.head_dim, -1)
                            rows[int(name[2])][:, gone] = 0.0
        if len(columns) > 1:
            out[f"{head}self_attn.o_proj.weight"] = columns
    return out


def narrowed(
    config: MicrotomeConfig, tensors: Mapping[str, Tensor], edits: Mapping[int, list[Edit]]
) -> dict[str, Tensor]:
    """All tensors, block by block."""
    out = {name: tensors[name] for part in ("stem", "head") for name in layout.shapes(config, part)}
    for block, mine in edits.items():
        out |= inner.narrowed({name: tensors[name] for name in layout.shapes(config, block)}, mine, block)
    return out


def same(config: MicrotomeConfig, tensors: Mapping[str, Tensor], kinds: tuple[str, ...], *, ragged: bool) -> None:
    """Narrowed is masked, without a cache and with one."""
    widths = drawn_widths(config, kinds, ragged=ragged)
    edits = chosen(config, widths)
    small = inner.narrowed_config(config, widths)
    cut = narrowed(config, tensors, edits)
    for part in layout.parts(small):
        for name, shape in layout.shapes(small, part).items():
            assert cut[name].shape == shape, name
    assert sum(tensor.numel() for tensor in cut.values()) == layout.count(small)
    want = logits(loaded(config, masked(config, tensors, edits)), TOKENS)
    model = loaded(small, cut)
    assert error(logits(model, TOKENS), want) < 1e-5
    assert error(stepwise(model, TOKENS, (6, 1, 3, 1)), want) < 1e-5
    assert error(want, logits(loaded(config, dict(tensors)), TOKENS)) > 1e-3  # the mask says something


@pytest.mark.parametrize("kind", ["ffn", "qk", "vo", "heads"])
@pytest.mark.parametrize("name", TINY)
def test_narrowed_is_masked(name: str, kind: str) -> None:
    config, tensors = canonical(name)
    if normed(config, kind):
        assert not inner.dials(config, {KINDS[kind]})
        return
    if kind == "heads" and config.per_layer_config[0].num_key_value_heads == 1:
        pytest.skip("one group is the fewest")
    same(config, doubled(tensors), (kind,), ragged=True)


@pytest.mark.parametrize("name", TINY)
def test_all_kinds_at_once(name: str) -> None:
    config, tensors = canonical(name)
    kinds = tuple(kind for kind in ("ffn", "qk", "vo", "heads") if not normed(config, kind))
    same(config, doubled(tensors), kinds, ragged=False)


@pytest.mark.parametrize("name", ["rotary pairs", "partial rotary", "heads", "learned positions", "windows", "biases"])
def test_ragged_decoders_are_narrowed_again(name: str) -> None:
    """Blocks that differ already, some with a rotary subset of their own; held against the naive decoder."""
    config = RAGGED[name]
    tensors = random_tensors(config)
    widths = drawn_widths(config, ("ffn", "qk", "vo"), ragged=True)
    edits = chosen(config, widths)
    small, cut = inner.narrowed_config(config, widths), narrowed(config, tensors, edits)
    assert {key: tuple(tensor.shape) for key, tensor in cut.items()} == {
        key: shape for part in layout.parts(small) for key, shape in layout.shapes(small, part).items()
    }
    row = ids(rows=1, length=7, vocabulary=61)[0]
    want = naive_logits(config, masked(config, tensors, edits), row, start=3)
    assert error(naive_logits(small, cut, row, start=3), want) < 1e-10
    assert error(logits(loaded(small, cut), row[None]), naive_logits(small, cut, row)[None]) < 1e-5


def test_the_scale_of_the_scores_stays() -> None:
    config = canonical("llama")[0]
    small = inner.narrowed_config(config, {f"{block}.qk": 4 for block in range(3)})
    assert small.attention_scale == pytest.approx(8**-0.5)
    assert (small.head_dim, small.v_head_dim, small.rotary_head_dim) == (4, 8, 8)


def test_rotary_pairs_stay_in_proportion_and_leave_enough_channels() -> None:
    for size in range(4, 40, 2):
        for pairs in range(1, size // 2 + 1):
            for wide in range(2, size + 1, 2):
                left = inner.turning(pairs, size, wide)
                assert 1 <= left <= pairs
                assert 0 <= wide - 2 * left <= size - 2 * pairs
                assert abs(left - pairs * wide / size) <= 1


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied", "gpt2-untied"])
def test_an_invertible_change_of_values_leaves_the_logits(name: str) -> None:
    config, tensors = canonical(name)
    tensors, edits = doubled(tensors), dict[int, list[Edit]]()
    generator = torch.Generator().manual_seed(5)
    for block in range(config.num_hidden_layers):
        edits[block] = []
        for space in inner.spaces_of(config, block, {Kind.VO}).values():
            matrix = torch.randn(space.size, space.size, generator=generator, dtype=torch.float64)
            edits[block].append(Rewrite(space, matrix, torch.linalg.inv(matrix)))
    have, want = loaded(config, narrowed(config, tensors, edits)), loaded(config, tensors)
    assert error(logits(have, TOKENS), logits(want, TOKENS)) < 1e-5


@pytest.mark.parametrize("fields", [{"positions": "none", "attention_bias": True}, {"positions": "learned"}])
def test_an_invertible_change_of_keys_without_a_rotary_leaves_the_logits(fields: dict[str, Any]) -> None:
    """Queries see the matrix and keys its inverse, biases too; a rank that the products have is enough."""
    config = decoder(**fields)
    tensors, edits = random_tensors(config), dict[int, list[Edit]]()
    generator = torch.Generator().manual_seed(5)
    flat = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q[:, :6]
    for block in range(config.num_hidden_layers):
        edits[block] = []
        for space in inner.spaces_of(config, block, {Kind.QK}).values():
            for axis in space.axes:  # queries of rank 6
                if "q_proj" in axis.tensor:
                    for copy in axis.at.T:
                        tensors[axis.tensor][copy] = flat @ flat.T @ tensors[axis.tensor][copy]
            turn = torch.randn(6, 6, generator=generator, dtype=torch.float64)
            edits[block].append(Rewrite(space, turn @ flat.T, flat @ torch.linalg.inv(turn)))
    small = inner.narrowed_config(config, {f"{block}.qk": 6 for block in edits})
    row = ids(rows=1, length=6, vocabulary=61)[0]
    want = naive_logits(config, tensors, row)
    assert error(naive_logits(small, narrowed(config, tensors, edits), row), want) < 1e-9


def test_a_matrix_on_keys_that_turn_is_refused() -> None:
    config, tensors = canonical("llama")
    edits: list[Edit] = [
        Rewrite(space, torch.eye(8)[:4], torch.eye(8)[:, :4])
        for space in inner.spaces_of(config, 0, {Kind.QK}).values()
    ]
    with pytest.raises(ValueError, match=r"0\.qk\.0 turns with the position: only a selection"):
        inner.narrowed(tensors, edits, 0)


def test_an_axis_that_is_cut_in_part_is_refused() -> None:
    config, tensors = canonical("llama")
    space = inner.spaces_of(config, 0, {Kind.VO})["0.vo.1"]
    with pytest.raises(ValueError, match=r"v_proj\.weight holds 40 coordinates of no space that is cut"):
        inner.narrowed(tensors, [Select(space, torch.arange(4))], 0)


def test_corrections_come_last() -> None:
    config, tensors = canonical("llama")
    space = inner.spaces_of(config, 1, {Kind.FFN})["1.ffn"]
    value = torch.full((48, 3), 7.0)
    name = f"{prefix(1)}mlp.down_proj.weight"
    done = inner.narrowed(tensors, [Correct(name, value), Select(space, torch.tensor([4, 9, 70]))], 1)
    assert torch.equal(done[name], value)
    kept = tensors[f"{prefix(1)}mlp.up_proj.weight"][[4, 9, 70]]
    assert torch.equal(done[f"{prefix(1)}mlp.up_proj.weight"], kept)


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_widths_that_agree_are_stock_where_the_config_can_say_them(name: str) -> None:
    """Neurons can be fewer in every architecture whose config has a field for them."""
    config = canonical(name)[0]
    widths = {f"{block}.ffn": 64 for block in range(config.num_hidden_layers)}
    small = inner.narrowed_config(config, widths)
    assert not small.per_layer_attributes or "intermediate_size" not in small.per_layer_attributes
    raised = arch.raise_config(TINY[name], small)
    assert arch.canonical_fields(arch.lower(raised)) == arch.canonical_fields(small)


def test_widths_that_differ_are_not_stock() -> None:
    small = inner.narrowed_config(canonical("llama")[0], {"0.ffn": 64, "1.ffn": 64})
    assert [small.per_layer_config[block].intermediate_size for block in range(3)] == [64, 64, 80]
    with pytest.raises(arch.NotStock, match="sizes differ between blocks \\(intermediate_size\\)"):
        arch.raise_config(TINY["llama"], small)


@pytest.mark.parametrize("name", TINY)
def test_a_dropped_block_takes_its_fields_along(name: str) -> None:
    """Stock configs without the block, and the logits of the decoder in which that block adds nothing."""
    config, tensors = canonical(name)
    tensors = doubled(tensors)
    small = inner.narrowed_config(config, {"1": 0, "0": 1})
    left = [block for block in range(config.num_hidden_layers) if block != 1]
    assert small.num_hidden_layers == len(left)
    assert small.layer_types == [config.layer_types[block] for block in left]
    assert [small.per_layer_config[new].rotary for new in range(len(left))] == [
        config.per_layer_config[old].rotary for old in left
    ]
    out = {name: tensors[name] for part in ("stem", "head") for name in layout.shapes(config, part)}
    for new, old in enumerate(left):
        for key in layout.shapes(config, old):
            out[prefix(new) + key.removeprefix(prefix(old))] = tensors[key]
    silent = dict(tensors)
    for key in layout.shapes(config, 1):
        if any(word in key for word in ("o_proj", "down_proj", "_out_layernorm.bias")):
            silent[key] = torch.zeros_like(tensors[key])
    if config.norm_placement == "pre" or not config.norm_bias:
        assert error(logits(loaded(small, out), TOKENS), logits(loaded(config, silent), TOKENS)) < 1e-5
    try:
        raised = arch.raise_config(TINY[name], small)
    except arch.NotStock as reason:
        assert "layer" in str(reason) or "rotary" in str(reason)  # noqa: PT017 - a pattern that a config cannot say
    else:
        assert arch.canonical_fields(arch.lower(raised)) == arch.canonical_fields(small)


def test_a_dropped_half_is_skipped() -> None:
    config, tensors = canonical("llama")
    small = inner.narrowed_config(config, {"0.attn": 0, "2.mlp": 0, "1.attn": 1})
    assert [getattr(small.per_layer_config[block], "skip", None) or [] for block in range(3)] == [
        ["self_attn"], [], ["mlp"],
    ]  # fmt: skip
    names = {name for part in layout.parts(small) for name in layout.shapes(small, part)}
    have = logits(loaded(small, {name: tensors[name] for name in names}), TOKENS)
    silent = dict(tensors)
    for name in (f"{prefix(0)}self_attn.o_proj.weight", f"{prefix(2)}mlp.down_proj.weight"):
        silent[name] = torch.zeros_like(tensors[name])
    assert error(have, logits(loaded(config, silent), TOKENS)) < 1e-5


def test_ragged_streams_keep_their_blocks() -> None:
    with pytest.raises(BadPlan, match="a block cannot be left out of a stream with several widths"):
        inner.narrowed_config(RAGGED["dense shortcuts"], {"1": 0})


# --- dials and scores -----------------------------------------------------------------------------------------------


def test_dials_know_their_steps() -> None:
    config = canonical("llama-gqa-llama3-tied")[0]
    dials = inner.dials(config, {Kind.FFN, Kind.QK, Kind.VO, Kind.HEADS, Kind.HALVES, Kind.BLOCKS})
    sizes = {dial.name: (dial.size, dial.step, dial.least) for dial in dials.values() if dial.block == 1}
    assert sizes == {
        "1": (1, 1, 0), "1.attn": (1, 1, 0), "1.mlp": (1, 1, 0),
        "1.ffn": (80, 2, 2), "1.qk": (8, 2, 2), "1.vo": (8, 2, 2), "1.heads": (2, 1, 1),
    }  # fmt: skip
    assert [dials["1.ffn"].nearest(wide) for wide in (0.2, 3.1, 40.9, 78.9, 79.2, 99)] == [2, 4, 40, 78, 80, 80]
    assert {inner.dials(config, {Kind.QK}, 3)["0.qk"].step} == {6}


def test_a_half_that_is_skipped_has_no_dials() -> None:
    dials = inner.dials(RAGGED["skipped halves"], {Kind.FFN, Kind.QK, Kind.VO, Kind.HALVES})
    assert {name for name in dials if name.startswith("0")} == {"0.ffn", "0.mlp"}
    assert {name for name in dials if name.startswith("1")} == {"1.qk", "1.vo", "1.attn"}


def test_the_best_are_the_largest_and_ties_go_to_the_first() -> None:
    assert inner.best(torch.tensor([1.0, 3.0, 3.0, 0.5, 3.0]), 2).tolist() == [1, 2]
    config = decoder(rope_parameters=SMALL["rope_parameters"] | {"partial_rotary_factor": 0.5}, head_dim=8)
    space = inner.spaces_of(config, 0, {Kind.QK})["0.qk.0"]
    assert space.pairs == 2
    score = torch.tensor([1.0, 5.0, 9.0, 1.0, 0.1, 0.4, 0.2, 0.3])  # pairs (0, 2) and (1, 3): 10 and 6
    assert inner.best_channels(space, score, 4, 1).tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize("kind", ["ffn", "qk", "vo", "heads"])
def test_the_cost_of_a_unit_is_what_a_narrower_width_saves(kind: str) -> None:
    config, tensors = canonical("llama-biases-wide-heads")
    own = {name.removeprefix(prefix(1)): tensors[name] for name in layout.shapes(config, 1)}
    spaces = inner.spaces_of(config, 1, {KINDS[kind]})
    view = inner.View(config, 1, ("attn", "mlp"), own, spaces, {}, {}, {})
    size = {"ffn": 80, "heads": config.num_key_value_heads}.get(kind, config.head_dim)
    step = 2 if kind == "qk" else 1
    small = inner.narrowed_config(config, {f"1.{kind}": size - step})
    index = "rotary_index"
    stored = sum(shape[0] * shape[1] for name, shape in layout.shapes(small, 1).items() if name.endswith(index))
    assert step * inner.cost(view, KINDS[kind]) == layout.count(config, 1) - layout.count(small, 1) + stored
