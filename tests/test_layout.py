"""Which tensors a decoder stores, and which space every axis belongs to.

The spaces are held against the decoder itself: an element of a space's symmetry group, drawn at random, leaves the
logits alone if every axis that uses the space is declared with its right place and role; with one axis left out of the
change, they move.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    RAGGED,
    SLICED,
    TINY,
    canonical,
    decoder,
    doubled,
    error,
    formed,
    ids,
    loaded,
    logits,
    random_tensors,
)
from torch import Tensor
from torch.func import functional_call

from microtome import layout
from microtome.layout import FREE, HEAD
from microtome.modeling_microtome import MicrotomeConfig, MicrotomeForCausalLM
from microtome.space import Axis, Role, Space, Symmetry, change_basis, mix
from microtome.surgery import Form

UNMOVED, MOVED = 1e-5, 1e-3
CUT = ("shortcut", "_index")  # what only cut decoders store; methods refuse to cut those again
CONFIGS: dict[str, MicrotomeConfig] = {name: canonical(name)[0] for name in TINY} | RAGGED

each_config = pytest.mark.parametrize("name", CONFIGS)


def decoder_shapes(config: MicrotomeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder's own state, tied weights once."""
    with torch.device("meta"):
        model = MicrotomeForCausalLM(config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        assert found.pop(HEAD) == found[layout.EMBEDDING]
    return found


def listed(config: MicrotomeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parts."""
    found: dict[str, tuple[int, ...]] = {}
    for part in layout.parts(config):
        mine = layout.shapes(config, part)
        assert not set(mine) & set(found)
        assert all(name.startswith("model.layers.") == isinstance(part, int) for name in mine)
        assert not isinstance(part, int) or all(name.startswith(f"model.layers.{part}.") for name in mine)
        found |= mine
    return found


@each_config
def test_shapes_are_those_of_the_decoder(name: str) -> None:
    config = CONFIGS[name]
    assert listed(config) == decoder_shapes(config)
    assert layout.count(config) == sum(prod(shape) for shape in decoder_shapes(config).values())
    blocks = {name: shape for name, shape in decoder_shapes(config).items() if name.startswith("model.layers.")}
    assert layout.count_blocks(config) == sum(prod(shape) for shape in blocks.values())


@st.composite
def ragged(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of any decoder: features at random, and every size of every block at random."""
    blocks = draw(st.integers(1, 3))
    width = st.integers(1, 12)
    kind = st.sampled_from(["identity", "dense", "diagonal", "lowrank", "factored"])
    parallel = draw(st.sampled_from(["none", "shared", "separate"]))
    ends = [draw(width) for _ in range(blocks + 1)]
    per_layer: dict[int, dict[str, Any]] = {}
    for block in range(blocks):
        groups = draw(st.integers(1, 3))
        per_layer[block] = {
            "residual_in": ends[block], "residual_mid": draw(width), "residual_out": ends[block + 1],
            "num_key_value_heads": groups, "num_attention_heads": groups * draw(st.integers(1, 3)),
            "head_dim": 2 * draw(st.integers(1, 4)), "v_head_dim": draw(width), "intermediate_size": draw(width),
            "attn_shortcut": draw(kind), "mlp_shortcut": draw(kind),
            "attn_shortcut_rank": draw(st.integers(0, 3)), "mlp_shortcut_rank": draw(st.integers(1, 3)),
            "attention_bias": draw(st.booleans()), "attention_out_bias": draw(st.booleans()),
            "mlp_bias": draw(st.booleans()), "mlp_out_bias": draw(st.booleans()),
            "skip": draw(st.sampled_from([[], ["self_attn"], ["mlp"], ["self_attn", "mlp"]])),
            "rotary_subset": draw(st.booleans()), "rotary_pairs": 1,
        }  # fmt: skip
        for half in ("attn_read", "attn_write", "mlp_read", "mlp_write"):
            if draw(st.booleans()):
                per_layer[block][f"{half}_size"] = 1
    tied = draw(st.booleans())
    return dict(
        per_layer_config=per_layer,
        num_hidden_layers=blocks,
        hidden_size=ends[-1],
        embedding_size=ends[0] + draw(st.integers(0, 2)),
        parallel=parallel,
        rotary_head_dim=8,
        positions=draw(st.sampled_from(["rotary", "learned", "none"])),
        norm_placement=draw(st.sampled_from(["pre", "post", "sandwich"])),
        qk_norm=draw(st.sampled_from([None, "head", "full"])),
        tie_word_embeddings=tied,
        head_adapter=tied or draw(st.booleans()),
        **{
            name: draw(st.booleans())
            for name in (
                "norm_gain",
                "norm_bias",
                "final_norm",
                "final_norm_gain",
                "final_norm_bias",
                "mlp_gated",
                "head_bias",
                "head_adapter_bias",
            )
        },
    )


@settings(max_examples=60, deadline=None)
@given(ragged())
def test_shapes_of_any_decoder(fields: dict[str, Any]) -> None:
    config = decoder(**fields)
    assert listed(config) == decoder_shapes(config)


@pytest.mark.parametrize("name", RAGGED)
def test_every_listed_decoder_runs(name: str) -> None:
    """Shapes that agree with each other may still not fit together."""
    config = RAGGED[name]
    tokens = ids(2, 7, 61)
    model = loaded(config, random_tensors(config))
    have = logits(model, tokens)
    assert have.shape == (2, 7, 61)
    assert have.isfinite().all()
    assert have.std() > 1e-2


# --- coverage -------------------------------------------------------------------------------------------------------


def uncovered(config: MicrotomeConfig) -> set[tuple[str, int]]:
    """Axes of stored tensors that neither a space nor FREE names."""
    everything = {(name, dim) for name, shape in listed(config).items() for dim in range(len(shape))}
    used = {(axis.tensor, axis.dim) for space in layout.spaces(config) for axis in space.axes}
    assert used <= everything
    return everything - used - set(FREE)


@each_config
def test_every_axis_belongs_to_a_space_or_is_free(name: str) -> None:
    assert {axis for axis in uncovered(CONFIGS[name]) if not any(word in axis[0] for word in CUT)} == set()


@pytest.mark.parametrize("name", TINY)
def test_what_is_opened_is_covered_completely(name: str) -> None:
    assert uncovered(canonical(name)[0]) == set()


@pytest.mark.parametrize("name", TINY)
def test_coordinates_of_an_axis(name: str) -> None:
    """Every position of an axis belongs to one coordinate of a kind of space, and none is named twice."""
    config = canonical(name)[0]
    shapes = listed(config)
    for kind in {space.kind for space in layout.spaces(config, split=False)}:
        places: dict[tuple[str, int], list[Tensor]] = {}
        for space in layout.spaces(config, split=False):
            for axis in space.axes if space.kind is kind else ():
                assert len(axis.at) == space.size
                if not (axis.role is Role.SCALES and kind.value == "query-key"):  # head norms serve all groups
                    places.setdefault((axis.tensor, axis.dim), []).append(axis.at.reshape(-1))
        for (tensor, dim), found in places.items():
            assert torch.cat(found).sort().values.tolist() == list(range(shapes[tensor][dim])), (tensor, dim)


# --- changes of basis -----------------------------------------------------------------------------------------------


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def invertible(size: int, generator: torch.Generator) -> Tensor:
    stretch = torch.linspace(0.6, 1.6, size, dtype=torch.float64)
    return orthogonal(size, generator) * stretch @ orthogonal(size, generator)


def permutation(size: int, generator: torch.Generator) -> Tensor:
    """One cycle through all coordinates: none stays."""
    order = torch.randperm(size, generator=generator)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[order.roll(1), order] = 1.0
    return matrix


def centred(size: int, generator: torch.Generator) -> Tensor:
    ones = torch.ones(size, 1, dtype=torch.float64)
    noise = torch.randn(size, size - 1, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(torch.cat([ones, noise], 1))[0]
    turn = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(size - 1, generator))
    return basis @ turn @ basis.T


def pairs(size: int, turning: int, generator: torch.Generator) -> Tensor:
    """A rotation by its own angle of every pair (i, i + turning); anything invertible on the rest."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for pair in range(turning):
        angle = 0.5 + 2.0 * torch.rand((), dtype=torch.float64, generator=generator)
        other = pair + turning
        matrix[pair, pair] = matrix[other, other] = angle.cos()
        matrix[pair, other], matrix[other, pair] = -angle.sin(), angle.sin()
    rest = size - 2 * turning
    if rest:
        matrix[-rest:, -rest:] = invertible(rest, generator)
    return matrix


def signs(size: int, turning: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, (size - turning,), generator=generator).double() * 2 - 1
    drawn[0] = -1.0
    return torch.cat([drawn[:turning], drawn[:turning], drawn[turning:]]).diag()


def element(space: Space, seed: int) -> tuple[Tensor, Tensor]:
    """A random element of the symmetry group, and its inverse."""
    generator = torch.Generator().manual_seed(seed)
    shrink = {
        Symmetry.PERMUTE: lambda: permutation(space.size, generator),
        Symmetry.LINEAR: lambda: invertible(space.size, generator),
        Symmetry.ORTHOGONAL: lambda: orthogonal(space.size, generator),
        Symmetry.CENTRED: lambda: centred(space.size, generator),
        Symmetry.PAIRS: lambda: pairs(space.size, space.pairs, generator),
        Symmetry.SIGNS: lambda: signs(space.size, space.pairs, generator),
    }[space.symmetry]()
    return shrink, torch.linalg.inv(shrink)


class Probe:
    """A decoder whose tensors can be replaced, and its logits."""

    def __init__(self, config: MicrotomeConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors = config, doubled(tensors)
        self.model = loaded(config, self.tensors)
        self.tokens = ids(2, 9, config.vocab_size)
        self.want = self.logits(self.tensors)

    @torch.no_grad()
    def logits(self, tensors: Mapping[str, Tensor]) -> Tensor:
        inputs = {"input_ids": self.tokens, "use_cache": False}
        return functional_call(self.model, dict(tensors), (), inputs, strict=False).logits

    def moved(self, space: Space, seed: int = 0) -> float:
        """How far the logits move under an element of the group."""
        return error(self.logits(change_basis(self.tensors, space, *element(space, seed))), self.want)


def probes() -> Iterator[Any]:
    """Decoders with the residual spaces that they have, as (name, config, tensors, spaces)."""
    for name in TINY:
        config, tensors = canonical(name)
        yield pytest.param(config, tensors, True, id=name)
        if name not in SLICED:
            continue
        yield pytest.param(*formed(config, doubled(tensors), Form(config.norm, untie=True)), True, id=f"{name}, folded")
        if config.norm == "layer":
            yield pytest.param(*formed(config, doubled(tensors), Form("rms", untie=True)), True, id=f"{name}, centred")
    for name, config in RAGGED.items():
        uncut = {layout.residual_width(config, number) for number in layout.junctions(config)} == {config.hidden_size}
        whole = uncut and not any(
            word in key for key in listed(config) for word in ("shortcut", "read_index", "write_index")
        )
        yield pytest.param(config, random_tensors(config), whole, id=name)


each_probe = pytest.mark.parametrize(("config", "tensors", "whole"), list(probes()))


def inner(config: MicrotomeConfig) -> list[Space]:
    return [space for block in range(config.num_hidden_layers) for space in layout.block_spaces(config, block)]


@each_probe
def test_symmetries_leave_the_logits(config: MicrotomeConfig, tensors: dict[str, Tensor], whole: bool) -> None:
    probe = Probe(config, tensors)
    for space in inner(config):
        assert probe.moved(space) <= UNMOVED, space.name
    if whole:
        (stream,) = layout.residual_spaces(config, split=False)
        assert probe.moved(stream) <= UNMOVED
    everything = probe.tensors
    for seed, space in enumerate([*inner(config), *(layout.residual_spaces(config, split=False) if whole else [])]):
        everything = change_basis(everything, space, *element(space, seed))
    assert error(probe.logits(everything), probe.want) <= UNMOVED


def inert(config: MicrotomeConfig, space: Space, axis: Axis) -> bool:
    """Axes that the logits cannot see: a key bias that does not turn adds the same to every score of a query."""
    turning = config.positions == "rotary" and all(
        config.per_layer_config[block].rotary for block in range(config.num_hidden_layers)
    )
    if axis.tensor.endswith("k_proj.bias") and not turning and config.qk_norm is None:
        return True
    same = (element(space, 0)[0] - torch.eye(space.size, dtype=torch.float64)).abs().max() == 0
    return bool(same) or (axis.role is Role.SCALES and space.symmetry is Symmetry.SIGNS)  # signs leave a gain as it is


@each_probe
def test_no_axis_can_be_left_out(config: MicrotomeConfig, tensors: dict[str, Tensor], whole: bool) -> None:
    """Of the first block that has any, and of the stream."""
    probe = Probe(config, tensors)
    block = next(block for block in range(config.num_hidden_layers) if layout.block_spaces(config, block))
    chosen = [space for space in layout.block_spaces(config, block) if space.size > 1 and not space.name.endswith(".1")]
    chosen += layout.residual_spaces(config, split=False) if whole else []
    for space in chosen:
        for axis in space.axes:
            if not inert(config, space, axis):
                fewer = replace(space, axes=tuple(one for one in space.axes if one is not axis))
                assert probe.moved(fewer) > MOVED, (space.name, axis.tensor, axis.dim)


def test_inert_axes_are_inert() -> None:
    """The list above is right: they do not move the logits."""
    config, tensors = canonical("opt-tied")
    probe = Probe(config, tensors)
    found = 0
    for space in layout.block_spaces(config, 1):
        for axis in space.axes:
            if inert(config, space, axis):
                found += 1
                assert probe.moved(replace(space, axes=tuple(one for one in space.axes if one is not axis))) <= UNMOVED
    assert found == config.num_key_value_heads + 1  # the query-key spaces, and that of the heads


def test_a_narrow_group_element_would_be_noticed() -> None:
    """Elements outside the declared groups move the logits: the groups are not declared too small to be true."""
    for name, kinds in {
        "llama": {"query-key": orthogonal, "ffn": orthogonal, "heads": orthogonal},
        "qwen3-bias": {"query-key": lambda size, g: pairs(size, size // 2, g)},
    }.items():
        config, tensors = canonical(name)
        probe = Probe(config, tensors)
        for space in layout.block_spaces(config, 0):
            if space.kind.value in kinds:
                matrix = kinds[space.kind.value](space.size, torch.Generator().manual_seed(0))
                unscaled = replace(space, axes=tuple(one for one in space.axes if one.role is not Role.SCALES))
                changed = change_basis(probe.tensors, unscaled, matrix, torch.linalg.inv(matrix))
                assert error(probe.logits(changed), probe.want) > MOVED, space.name


def test_duals_get_the_inverse_transpose() -> None:
    """Queries and keys meet in a dot product: what stretches one must shrink the other."""
    config, tensors = canonical("opt-tied")  # no rotary, so any invertible matrix will do
    probe = Probe(config, tensors)
    space = next(space for space in layout.block_spaces(config, 0) if space.kind.value == "query-key")
    assert space.symmetry is Symmetry.LINEAR
    shrink = torch.linspace(0.2, 5.0, space.size, dtype=torch.float64).diag()
    grow = torch.linalg.inv(shrink)
    changed = change_basis(probe.tensors, space, shrink, grow)
    rows = slice(0, space.size)
    for name, matrix in (("q_proj", shrink), ("k_proj", grow)):
        for kind in ("weight", "bias"):
            key = f"model.layers.0.self_attn.{name}.{kind}"
            torch.testing.assert_close(changed[key][rows], matrix @ probe.tensors[key][rows])
            assert torch.equal(changed[key][space.size :], probe.tensors[key][space.size :])
    assert error(probe.logits(changed), probe.want) <= UNMOVED
    wrong = replace(space, axes=tuple(replace(axis, role=Role.WRITES) for axis in space.axes))
    assert error(probe.logits(change_basis(probe.tensors, wrong, shrink, grow)), probe.want) > MOVED


def test_a_tied_residual_is_one_space() -> None:
    """The table of a tied model is written and read in one basis: gains permute, and without them it may be rotated."""
    config, tensors = canonical("llama-gqa-llama3-tied")
    probe = Probe(config, tensors)
    (stream,) = layout.residual_spaces(config, split=False)
    assert stream.symmetry is Symmetry.PERMUTE
    assert probe.moved(stream) <= UNMOVED
    kept, folded = formed(config, doubled(tensors), Form("rms", untie=False))
    (stream,) = layout.residual_spaces(kept, split=False)
    with pytest.raises(ValueError, match="residual is scaled by a gain, which only a selection of coordinates keeps"):
        change_basis(folded, stream, *element(replace(stream, symmetry=Symmetry.ORTHOGONAL), 0))
    assert Probe(kept, folded).moved(replace(stream, symmetry=Symmetry.PERMUTE)) <= UNMOVED
    kept.final_norm_gain = False
    bare = {name: tensor for name, tensor in folded.items() if name != layout.FINAL_NORM}
    (stream,) = layout.residual_spaces(kept, split=False)
    assert stream.symmetry is Symmetry.ORTHOGONAL
    assert Probe(kept, bare).moved(stream) <= UNMOVED


def test_indices_stay_indices() -> None:
    config = RAGGED["rotary pairs"]
    tensors = random_tensors(config)
    space = next(space for space in layout.block_spaces(config, 0) if space.name == "0.heads")
    key = "model.layers.0.self_attn.rotary_index"
    assert not torch.equal(tensors[key][0], tensors[key][1])
    changed = change_basis(tensors, space, *element(space, 0))
    assert torch.equal(changed[key], tensors[key].flip(0))
    assert changed[key].dtype == torch.int32


# --- mix ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 5),
    copies=st.integers(1, 3),
    rank=st.integers(1, 5),
    extra=st.integers(0, 3),
    dim=st.integers(0, 2),
    contiguous=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_mix_against_a_loop(  # noqa: PLR0917
    size: int, copies: int, rank: int, extra: int, dim: int, contiguous: bool, seed: int
) -> None:
    """Coordinate c, copy k lies at at[c, k]; all R new coordinates keep the places of the first R, in their order."""
    if extra:
        rank = size
    rank = min(rank, size)
    generator = torch.Generator().manual_seed(seed)
    length = size * copies + extra
    order = torch.arange(length) if contiguous else torch.randperm(length, generator=generator)
    at = order[: size * copies].reshape(size, copies)
    shape = [2, 3, 4]
    shape[dim] = length
    tensor = torch.randn(shape, dtype=torch.float64, generator=generator)
    matrix = torch.randn(rank, size, dtype=torch.float64, generator=generator)
    have = mix(tensor, dim, at, matrix)

    old = tensor.movedim(dim, 0)
    new = {place: old[place] for place in range(length)}
    for copy in range(copies):
        for row in range(size):
            del new[int(at[row, copy])]
        for row in range(rank):
            new[int(at[row, copy])] = sum(matrix[row, c] * old[int(at[c, copy])] for c in range(size))
    want = torch.stack([new[place] for place in sorted(new)]).movedim(0, dim)
    torch.testing.assert_close(have, want)


def test_mix_refuses_to_narrow_part_of_an_axis() -> None:
    with pytest.raises(ValueError, match="cannot narrow 3 of 7 positions"):
        mix(torch.zeros(7, 2), 0, torch.arange(3)[:, None], torch.zeros(2, 3))


def test_gains_follow_a_selection_and_lose_no_sign() -> None:
    config, tensors = canonical("llama")
    (stream,) = layout.residual_spaces(config, split=False)
    keep = torch.tensor([40, 3, 17])
    shrink = torch.eye(48, dtype=torch.float64)[keep] * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    cut = change_basis(tensors, stream, shrink, shrink.T)
    gain = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(cut[gain], tensors[gain][keep].double())
    weight = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(cut[weight], tensors[weight].double()[:, keep] * torch.tensor([1.0, -1.0, 1.0]))
    for wrong in (torch.full((3, 48), 1 / 48, dtype=torch.float64), 2 * shrink, shrink + shrink.roll(1, 1)):
        with pytest.raises(ValueError, match="residual is scaled by a gain"):
            change_basis(tensors, stream, wrong, wrong.T)
