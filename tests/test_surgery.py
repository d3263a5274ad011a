"""Surgery against what it means: the same logits where nothing is lost, and a projected stream where something is.

No data and no method here: bases are drawn at random, which is harder than any that a method would choose.
"""

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    RAGGED,
    SLICED,
    TINY,
    built,
    canonical,
    decoder,
    doubled,
    error,
    formed,
    ids,
    loaded,
    logits,
    lowered,
    ours,
    random_tensors,
    stock,
    stored,
)
from naive import shortcut_matrix
from test_arch import PUBLISHED
from torch import Tensor
from transformers import AutoModelForCausalLM

from microtome import arch, compress, cut, layout, methods, planner, surgery
from microtome.edit import Correct, Rewrite
from microtome.errors import BadPlan, UnsupportedModel
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Kind, Space, Symmetry
from microtome.surgery import Form, Gauge

UNMOVED, MOVED = 1e-5, 1e-3
GAUGES = ("dense", "lowrank", "diagonal")
Basis = Callable[[int, int, int], Tensor]  # size, rank, seed -> columns


def orthonormal(size: int, rank: int, seed: int) -> Tensor:
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise)[0][:, :rank]


def with_ones(size: int, rank: int, seed: int) -> Tensor:
    """Columns whose span has the ones vector, as the uniform vector of the coordinates: what a LayerNorm needs."""
    noise = torch.randn(size, rank - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    span = torch.linalg.qr(torch.cat([torch.ones(size, 1, dtype=torch.float64), noise], 1))[0]
    span[:, 0] = size**-0.5
    mine = torch.linalg.qr(torch.cat([torch.ones(rank, 1, dtype=torch.float64), torch.eye(rank)[:, 1:].double()], 1))[0]
    mine[:, 0] = rank**-0.5
    return span @ mine.T


def test_bases_with_the_ones_vector() -> None:
    basis = with_ones(7, 4, 0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(basis.sum(1), torch.full((7,), (4 / 7) ** 0.5, dtype=torch.float64))


def bare(size: int) -> Space:
    return Space("residual", Kind.RESIDUAL, None, size, Symmetry.ORTHOGONAL, ())


# --- forms ----------------------------------------------------------------------------------------------------------


def forms() -> Iterator[Any]:
    """Every tiny model in every form that its stream can take, and features that no stock model has."""
    for name in SLICED:
        config, tensors = canonical(name)
        for norm in sorted({config.norm, "rms"}):
            for untie in sorted({True, not config.tie_word_embeddings}):
                if norm == config.norm or untie or not config.tie_word_embeddings:
                    yield pytest.param(config, tensors, Form(norm, untie), id=f"{name}, {norm}, {untie}")
    for name in (
        "parallel, one norm, learned", "parallel, two norms", "learned positions", "head norms", "tied", "no gains",
        "skipped halves",
    ):  # fmt: skip
        config = RAGGED[name]
        yield pytest.param(config, random_tensors(config), Form(config.norm, untie=True), id=name)
    for tied in (False, True):
        config = decoder(norm_offset=1.0, tie_word_embeddings=tied, qk_norm="head")
        yield pytest.param(config, random_tensors(config), Form("rms", untie=False), id=f"offset gains, tied {tied}")


@pytest.mark.parametrize(("config", "tensors", "form"), list(forms()))
def test_folding_and_centring_leave_the_logits(config: MicrotomeConfig, tensors: dict[str, Tensor], form: Form) -> None:
    tokens = ids(2, 9, config.vocab_size)
    want = logits(loaded(config, doubled(tensors)), tokens)
    made, folded = formed(config, doubled(tensors), form)
    assert error(logits(loaded(made, folded), tokens), want) <= UNMOVED
    names = {name.rsplit(".", 2)[-2] for name in folded if "layers." in name}
    assert not any(name in names for name in ("input_layernorm", "post_attention_layernorm"))
    assert made.norm == form.norm
    assert (layout.FINAL_NORM in folded) == (made.tie_word_embeddings and config.final_norm_gain)
    assert made.tie_word_embeddings == (config.tie_word_embeddings and not form.untie)
    assert {name: tuple(tensor.shape) for name, tensor in folded.items()} == {
        name: shape for part in layout.parts(made) for name, shape in layout.shapes(made, part).items()
    }


def test_centred_writers_write_no_mean() -> None:
    config, tensors = canonical("opt-untied-gelu")
    _, folded = formed(config, doubled(tensors), Form("rms", True))
    for name, tensor in folded.items():
        if "embed" in name:
            assert tensor.mean(1).abs().max() < 1e-12
        if "o_proj" in name or "down_proj" in name:
            assert tensor.mean(0).abs().max() < 1e-12


def test_the_release_centres_embeddings_of_rms_models_too() -> None:
    """Which changes the function: it is that of transformers' own model with its embeddings centred."""
    config, tensors = canonical("llama")
    made, folded = formed(config, doubled(tensors), Form("rms", True, centre_always=True))
    want = dict(tensors)
    want[layout.EMBEDDING] = want[layout.EMBEDDING] - want[layout.EMBEDDING].mean(1, keepdim=True)
    have = logits(loaded(made, folded), ids())
    assert error(have, logits(loaded(config, want), ids())) <= UNMOVED
    assert error(have, logits(ours("llama"), ids())) > MOVED


@pytest.mark.parametrize("form", [Form("rms", False), Form("layer", False, centre_always=True)])
def test_a_tied_embedding_is_not_centred(form: Form) -> None:
    config, tensors = canonical("opt-tied")
    with pytest.raises(BadPlan, match="a tied embedding cannot be centred"):
        formed(config, tensors, form)


# --- gauges ---------------------------------------------------------------------------------------------------------


def span_of(edit: Rewrite) -> Tensor:
    return edit.grow @ edit.shrink


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(2, 14),
    data=st.data(),
    kind=st.sampled_from(GAUGES),
    seed=st.integers(0, 2**31),
)
def test_every_gauge_represents_the_same_map(size: int, data: st.DataObject, kind: str, seed: int) -> None:
    """Widening, narrowing and equal widths: the shortcut is the map between the two spans, which no gauge changes."""
    wide_in, wide_out = data.draw(st.integers(1, size)), data.draw(st.integers(1, size))
    gauge = Gauge(kind)
    reads = torch.randn(size, wide_out, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 2))
    first = Rewrite.orthogonal(bare(size), orthonormal(size, wide_in, seed))
    second = Rewrite.orthogonal(bare(size), orthonormal(size, wide_out, seed + 1), lambda: reads)
    before, after = cut.gauged(iter([first, second]), gauge)
    for old, new in ((first, before), (second, after)):
        torch.testing.assert_close(span_of(new), span_of(old))
        torch.testing.assert_close(new.seen @ new.shrink, old.seen @ old.shrink)  # what readers make of the stream
        torch.testing.assert_close(new.shrink, new.grow.T)
    form, rank = gauge.between("attn", size, wide_in, wide_out)
    made = {f"s.{name}": tensor for name, tensor in surgery.shortcut(form, rank, before, after).items()}
    shapes = layout.shortcut("s", form, wide_in, wide_out, rank)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes
    meant = shortcut_matrix(form, made, "s", wide_in, wide_out)
    torch.testing.assert_close(after.grow @ meant @ before.shrink, span_of(second) @ span_of(first), atol=1e-7, rtol=0)
    if kind == "lowrank":
        assert rank <= size - max(wide_in, wide_out) if wide_out >= wide_in else rank <= size - wide_out
        deficit = torch.eye(wide_out, wide_in, dtype=torch.float64) - after.shrink @ before.grow
        assert torch.linalg.matrix_rank(deficit, atol=1e-8) <= rank


@settings(max_examples=40, deadline=None)
@given(size=st.integers(3, 12), data=st.data(), kind=st.sampled_from(["dense", "lowrank"]), seed=st.integers(0, 2**31))
def test_centred_gauges_keep_the_uniform_vector(size: int, data: st.DataObject, kind: str, seed: int) -> None:
    """Behind a kept LayerNorm the mean of the coordinates is the mean of the stream, in every basis."""
    wide_in, wide_out = data.draw(st.integers(2, size)), data.draw(st.integers(2, size))
    gauge = Gauge(kind, centred=True)
    first, second = (
        Rewrite.orthogonal(bare(size), with_ones(size, wide, seed + i)) for i, wide in enumerate((wide_in, wide_out))
    )
    before, after = cut.gauged(iter([first, second]), gauge)
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    for edit in (before, after):
        uniform = torch.full((len(edit.shrink),), len(edit.shrink) ** -0.5, dtype=torch.float64)
        torch.testing.assert_close(edit.shrink @ ones, uniform, atol=1e-7, rtol=0)
    form, rank = gauge.between("mlp", size, wide_in, wide_out)
    made = {f"s.{name}": tensor for name, tensor in surgery.shortcut(form, rank, before, after).items()}
    meant = shortcut_matrix(form, made, "s", wide_in, wide_out)
    torch.testing.assert_close(after.grow @ meant @ before.shrink, span_of(second) @ span_of(first), atol=1e-7, rtol=0)


def sliced(
    config: MicrotomeConfig, tensors: Mapping[str, Tensor], widths: Mapping[int, int], gauge: Gauge | None, basis: Basis
) -> tuple[MicrotomeConfig, dict[str, Tensor], dict[int, Tensor]]:
    """A formed decoder cut to random bases, part by part, and the projector of every junction."""
    spaces = dict(zip(layout.junctions(config), layout.residual_spaces(config, split=True), strict=True))
    edits = [
        Rewrite.orthogonal(space, basis(space.size, widths[number], 0 if gauge is None else number))
        for number, space in spaces.items()
    ]
    projectors = {number: span_of(edit) for number, edit in zip(spaces, edits, strict=True)}
    rewrites = {edit.space.name: edit for edit in (edits if gauge is None else cut.gauged(iter(edits), gauge))}
    narrow, out = surgery.resized_config(config, widths, gauge), {}
    for part in layout.parts(config):
        mine = surgery.apply({name: tensors[name] for name in layout.shapes(config, part)}, rewrites.values())
        if gauge is not None and isinstance(part, int):
            mine |= surgery.shortcuts(narrow, part, rewrites)
        assert {name: tuple(tensor.shape) for name, tensor in mine.items()} == layout.shapes(narrow, part)
        out |= mine
    return narrow, out, projectors


def projected(
    config: MicrotomeConfig, tensors: Mapping[str, Tensor], projectors: Mapping[int, Tensor]
) -> tuple[MicrotomeConfig, dict[str, Tensor]]:
    """What slicing means, at full width: at every junction the stream is projected onto the span that is kept."""
    out = dict(tensors)
    blocks: dict[int, dict[str, Any]] = {}
    for name in (layout.EMBEDDING, layout.POSITIONS):
        if name in out:
            out[name] = out[name] @ projectors[0]
    for block in range(config.num_hidden_layers):
        parallel = config.parallel != "none"
        mid, after = projectors[2 * block + (2 if parallel else 1)], projectors[2 * block + 2]
        head = f"model.layers.{block}."
        for writer, onto in (("self_attn.o_proj", mid), ("mlp.down_proj", after)):
            for name in (f"{head}{writer}.weight", f"{head}{writer}.bias"):
                if name in out:
                    out[name] = onto @ out[name]
        out[f"{head}attn_shortcut.weight"] = mid
        if not parallel:
            out[f"{head}mlp_shortcut.weight"] = after
        blocks[block] = {"attn_shortcut": "dense"} | ({} if parallel else {"mlp_shortcut": "dense"})
    return surgery.rebuilt(config, blocks), out


def start(name: str, norm: str | None = None) -> tuple[MicrotomeConfig, dict[str, Tensor]]:
    """A tiny model in the form in which it is cut: untied, folded, in fp64."""
    config, tensors = canonical(name)
    return formed(config, doubled(tensors), Form(norm or config.norm, untie=True))


RAGGED_WIDTHS = {0: 40, 1: 32, 2: 36, 3: 36, 4: 28, 5: 44, 6: 48}
EVEN_WIDTHS = dict.fromkeys(range(7), 37)


@pytest.mark.parametrize("widths", [RAGGED_WIDTHS, EVEN_WIDTHS], ids=["ragged", "even"])
@pytest.mark.parametrize("kind", GAUGES)
@pytest.mark.parametrize(
    ("name", "norm"),
    [("llama-biases-wide-heads", "rms"), ("opt-untied-gelu", "rms"), ("qwen3-bias", "rms"), ("opt-tied", "layer")],
)
def test_a_sliced_model_is_a_projected_one(name: str, norm: str, kind: str, widths: dict[int, int]) -> None:
    """Every gauge, stored in its own tensors, gives the logits of the full-width model with a projected stream."""
    if norm == "layer" and kind == "diagonal":
        pytest.skip("slicegpt refuses the diagonal gauge behind a kept LayerNorm")
    config, tensors = start(name, norm)
    basis = with_ones if norm == "layer" else orthonormal
    narrow, out, projectors = sliced(config, tensors, widths, Gauge(kind, centred=norm == "layer"), basis)
    want = logits(loaded(*projected(config, tensors, projectors)), ids())
    have = logits(loaded(narrow, out), ids())
    assert error(have, want) <= UNMOVED
    assert error(have, logits(loaded(config, tensors), ids())) > MOVED  # random bases lose something
    assert layout.count(narrow) == sum(tensor.numel() for tensor in out.values())


@pytest.mark.parametrize("kind", GAUGES)
@pytest.mark.parametrize(("name", "norm"), [("llama", "rms"), ("opt-untied-gelu", "rms"), ("opt-untied-gelu", "layer")])
def test_at_full_width_nothing_is_lost(name: str, norm: str, kind: str) -> None:
    if norm == "layer" and kind == "diagonal":
        pytest.skip("slicegpt refuses the diagonal gauge behind a kept LayerNorm")
    config, tensors = start(name, norm)
    basis = with_ones if norm == "layer" else orthonormal
    narrow, out, _ = sliced(config, tensors, dict.fromkeys(range(7), 48), Gauge(kind, centred=norm == "layer"), basis)
    assert error(logits(loaded(narrow, out), ids()), logits(ours(name), ids())) <= UNMOVED
    assert kind != "lowrank" or not any("shortcut" in key for key in out)


@pytest.mark.parametrize("parallel", ["shared", "separate"])
@pytest.mark.parametrize(
    "kind",
    [
        "dense",
        "lowrank",
    ],
)  # fmt: skip
def test_parallel_blocks_have_one_shortcut(kind: str, parallel: str) -> None:
    config = decoder(parallel=parallel)
    config, tensors = formed(config, random_tensors(config), Form("rms", untie=True))
    narrow, out, projectors = sliced(config, tensors, {0: 20, 2: 18, 4: 22, 6: 22}, Gauge(kind), orthonormal)
    tokens = ids(2, 9, 61)
    want = logits(loaded(*projected(config, tensors, projectors)), tokens)
    assert error(logits(loaded(narrow, out), tokens), want) <= UNMOVED


# --- one basis, and the way back to stock ---------------------------------------------------------------------------


def one_hot(size: int, rank: int, seed: int) -> Tensor:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return torch.eye(size, dtype=torch.float64)[:, order[:rank]]


@pytest.mark.parametrize("name", SLICED)
def test_a_stock_model_says_what_the_divisor_said(name: str) -> None:
    """A norm over r of n coordinates that divides by n is an ordinary one: in our class, and in transformers' own."""
    config, tensors = canonical(name)
    tied = config.tie_word_embeddings
    config, tensors = formed(config, doubled(tensors), Form(config.norm, untie=False))
    basis = one_hot if tied else with_ones if config.norm == "layer" else orthonormal
    width = 36
    narrow, out, _ = sliced(config, tensors, dict.fromkeys(range(7), width), None, basis)
    assert narrow.norm_divisor == 48
    want = logits(loaded(narrow, out), ids())
    offset = canonical(name)[0].norm_offset
    standard = surgery.standard_config(narrow, offset, planner.implied_scale(TINY[name], narrow))
    made: dict[str, Tensor] = {}
    for part in layout.parts(narrow):
        mine = {key: out[key] for key in layout.shapes(narrow, part)}
        made |= surgery.standardised(mine, part, narrow, standard)
    assert error(logits(loaded(standard, made), ids()), want) <= UNMOVED
    for key, tensor in made.items():
        if key.endswith("layernorm.weight") or (key == layout.FINAL_NORM and not tied):
            assert torch.equal(tensor, torch.full_like(tensor, 1 - offset)), key
    phi = TINY[name]["model_type"] == "phi"  # the one LayerNorm model whose config says any width
    if phi or (config.norm == "rms" and name != "phi3-partial-longrope"):  # of which no stock class is known
        assert standard.norm_eps == pytest.approx(narrow.norm_eps * 48 / width)
        raised = arch.raise_config(TINY[name], standard)
        table = arch.find(raised["model_type"])
        stocked: dict[str, Tensor] = {}
        for part in layout.parts(standard):
            stocked |= arch.raise_tensors(made, arch.stored_names(table, standard, part))
        theirs = AutoModelForCausalLM.from_config(arch.stock_config(raised)).eval()
        missing, unexpected = theirs.load_state_dict(
            {key: tensor.float() for key, tensor in stocked.items()}, strict=False
        )
        assert set(missing) <= ({layout.HEAD} if tied else set())
        assert not unexpected
        assert error(logits(theirs, ids()), want) <= UNMOVED


@pytest.mark.parametrize("tied", [False, True])
def test_offsets_and_embedding_scales_of_an_architecture(tied: bool) -> None:
    """Gains stored as gain - 1, head norms among them, and a scale of the embeddings that the width decides."""
    config = decoder(tie_word_embeddings=tied, norm_offset=1.0, embedding_scale=24**0.5, qk_norm="head")
    tensors = random_tensors(config)
    config, tensors = formed(config, tensors, Form("rms", untie=False))
    narrow, out, _ = sliced(config, tensors, dict.fromkeys(range(7), 18), None, one_hot if tied else orthonormal)
    want = logits(loaded(narrow, out), ids(2, 9, 61))
    standard = surgery.standard_config(narrow, 1.0, 18**0.5)
    assert (standard.norm_offset, standard.embedding_scale) == (1.0, 18**0.5)
    for dtype in (torch.float64, torch.bfloat16):
        made: dict[str, Tensor] = {}
        for part in layout.parts(narrow):
            mine = {key: out[key] for key in layout.shapes(narrow, part)}
            made |= surgery.standardised(mine, part, narrow, standard, dtype)
        ratio = made[layout.EMBEDDING] / out[layout.EMBEDDING]
        rounded = [float(torch.tensor(size**0.5, dtype=dtype)) for size in (24, 18)]
        torch.testing.assert_close(ratio, torch.full_like(ratio, rounded[0] / rounded[1]))
        if dtype == torch.float64:
            assert error(logits(loaded(standard, made), ids(2, 9, 61)), want) <= UNMOVED


def test_norms_that_share_an_epsilon_would_be_off_without_the_rescaling() -> None:
    """The factor on queries and keys is needed: Qwen3's head norms share the epsilon that a slice changes."""
    config, tensors = start("qwen3-bias")
    narrow, out, _ = sliced(config, tensors, dict.fromkeys(range(7), 24), None, orthonormal)
    standard = surgery.standard_config(narrow)
    assert standard.qk_norm_eps == standard.norm_eps == pytest.approx(2 * narrow.norm_eps)
    made: dict[str, Tensor] = {}
    for part in layout.parts(narrow):
        made |= surgery.standardised({key: out[key] for key in layout.shapes(narrow, part)}, part, narrow)
    key = "model.layers.1.self_attn.k_proj."
    torch.testing.assert_close(
        made[f"{key}weight"], 2 * out[f"{key}weight"]
    )  # sqrt(2) from the norm, once more for its own
    torch.testing.assert_close(made[f"{key}bias"], 2**0.5 * out[f"{key}bias"])
    torch.testing.assert_close(
        made["model.layers.1.self_attn.v_proj.weight"], 2**0.5 * out["model.layers.1.self_attn.v_proj.weight"]
    )


@pytest.mark.parametrize("name", ["llama", "opt-untied-gelu", "qwen3-bias"])
def test_one_basis_is_a_projected_stream(name: str) -> None:
    config, tensors = start(name)
    basis = with_ones if config.norm == "layer" else orthonormal
    narrow, out, projectors = sliced(config, tensors, dict.fromkeys(range(7), 30), None, basis)
    assert narrow.hidden_size == narrow.embedding_size == 30
    assert not narrow.is_heterogeneous
    want = logits(loaded(*projected(config, tensors, projectors)), ids())
    assert error(logits(loaded(narrow, out), ids()), want) <= UNMOVED


def test_readers_may_see_something_else_than_is_carried() -> None:
    """`read` reaches readers only: it is a reader of its own at full width."""
    config, tensors = start("llama")
    space = layout.residual_spaces(config, split=True)[2]
    basis, read = orthonormal(48, 30, 0), orthonormal(48, 30, 1)
    edit = Rewrite.orthogonal(space, basis, lambda: read)
    have = surgery.apply(tensors, [edit])
    head = "model.layers.1.self_attn."
    torch.testing.assert_close(have[f"{head}q_proj.weight"], tensors[f"{head}q_proj.weight"] @ read)
    writer = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(have[writer], basis.T @ tensors[writer])
    assert have[f"{head}o_proj.weight"] is tensors[f"{head}o_proj.weight"]
    assert surgery.apply(tensors, [Correct(writer, basis)])[writer] is basis
    with pytest.raises(BadPlan, match=r"residual\.4.*shrink .*do not fit"):
        Rewrite.orthogonal(layout.residual_spaces(config, split=True)[4], orthonormal(47, 30, 0))


# --- sizes ----------------------------------------------------------------------------------------------------------


def planned(fields: dict[str, Any], slice_: float, **options: Any) -> planner.Outcome:
    """What `microtome plan` would say, from a config.json alone."""
    found: Any = SimpleNamespace(fields=fields, config=arch.lower(fields))
    return planner.plan_widths(found, methods.build("slicegpt", options), None, slice_, None)


RELEASE = {"basis": "junction", "signal": "residual", "readers": "transposed", "untie": True}


def test_opt_125m_as_the_release_slices_it() -> None:
    """SliceGPT's release on OPT-125M at a 20 % slice: counted there, counted by hand here, and no weight allocated."""
    size, width, ffn, words, blocks = 768, 608, 3072, 50272, 12
    table = words * width + (2048 + 2) * width
    attention = 3 * (size * width + size) + width * size + width
    mlp = ffn * width + ffn + width * ffn + width
    shortcuts = 2 * width * width
    last = (size - width) * width + (size - width) * ffn + (size - width)  # its last junction stays whole
    head = words * size + words
    by_hand = table + blocks * (attention + mlp + shortcuts) + last + head
    assert by_hand == 147_250_880

    out = planned(PUBLISHED["opt-125m"][1], 0.2, gauge="dense", **RELEASE)
    assert set(out.widths.values()) == {608, 768}
    assert out.widths[24] == 768
    assert out.cut.head_bias
    assert not any("norm" in name for part in layout.parts(out.cut) for name in layout.shapes(out.cut, part))
    assert layout.count(out.cut) == by_hand
    assert layout.count(out.final) == by_hand
    assert out.why_not


@pytest.mark.parametrize(("gauge", "low", "high"), [("lowrank", 0.775, 0.785), ("dense", 0.845, 0.846)])
def test_llama_2_7b_as_design_says(gauge: str, low: float, high: float) -> None:
    """What a 25 % slice keeps of the decoder's linear parameters: shortcuts take a third of it back, or less than half
    of that third."""
    fields = PUBLISHED["Llama-2-7b-hf"][1]
    config = arch.lower(fields)
    out = planned(fields, 0.25, gauge=gauge, **RELEASE)
    assert set(out.widths.values()) == {3072, 4096}
    linear = sum(
        prod(shape) for block in range(32) for name, shape in layout.shapes(config, block).items() if "proj" in name
    )
    kept = layout.count_blocks(out.cut) / linear
    assert low <= kept <= high
    rank = 4096 - 3072
    per_block = 2 * (3072 * rank if gauge == "lowrank" else 3072**2) + 0.75 * linear / 32
    last = (4096 - 3072) * (11008 + (0 if gauge == "lowrank" else 3072)) - (3072 * rank if gauge == "lowrank" else 0)
    assert layout.count_blocks(out.cut) == 32 * per_block + last


def test_the_lowrank_gauge_stores_least_above_two_thirds() -> None:
    """r (n - r) twice against r^2 + r: the crossing that design.md names, found by counting."""
    config = decoder(num_hidden_layers=2, hidden_size=48, num_attention_heads=4)
    counts = {
        kind: {
            wide: layout.count_blocks(surgery.resized_config(config, dict.fromkeys(range(5), wide), Gauge(kind)))
            for wide in (24, 31, 34, 47)
        }
        for kind in GAUGES
    }
    assert counts["lowrank"][47] < counts["diagonal"][47] < counts["dense"][47]
    assert counts["lowrank"][34] < counts["diagonal"][34]
    assert counts["lowrank"][31] > counts["diagonal"][31]
    for wide in (24, 31, 34, 47):
        assert counts["lowrank"][wide] - counts["dense"][wide] == 4 * (wide * min(wide, 48 - wide) - wide * wide)
        assert counts["diagonal"][wide] - counts["dense"][wide] == 2 * (wide - wide * wide)


def test_a_tied_model_gets_an_adapter_between_two_bases() -> None:
    fields = TINY["llama-gqa-llama3-tied"]
    out = planned(fields, 0.25, basis="junction")
    head = layout.shapes(out.cut, "head")
    assert head == {"head_adapter.weight": (out.widths[0], out.widths[6])}
    assert layout.HEAD not in {name for part in layout.parts(out.cut) for name in layout.shapes(out.cut, part)}


def test_rebuilt_configs_keep_what_is_not_changed() -> None:
    for config in RAGGED.values():
        again = surgery.rebuilt(config)
        assert again.to_dict() == config.to_dict()
        assert again.per_layer_attributes == config.per_layer_attributes
    changed = surgery.rebuilt(RAGGED["heads"], {1: {"intermediate_size": 3}}, norm_eps=0.5)
    assert changed.per_layer_config[1].intermediate_size == 3
    assert changed.per_layer_config[1].num_attention_heads == 2
    assert changed.per_layer_config[0].intermediate_size == 20
    assert changed.norm_eps == 0.5


def test_canonical_tensors_of_a_stock_model_are_its_own() -> None:
    """The helper that these tests lean on reads what transformers wrote."""
    config, tensors = lowered(TINY["llama"], stored(stock("llama")))
    assert arch.canonical_fields(config) == arch.canonical_fields(canonical("llama")[0])
    assert torch.equal(tensors[layout.EMBEDDING], stock("llama").get_input_embeddings().weight)


# --- models that nobody has published -------------------------------------------------------------------------------


def test_folding_where_there_is_no_final_norm() -> None:
    fields = TINY["opt-untied-gelu"] | {"_remove_final_layer_norm": True}
    config, tensors = lowered(fields, stored(built(fields)))
    made, folded = formed(config, doubled(tensors), Form("layer", untie=True))
    assert error(logits(loaded(made, folded), ids()), logits(loaded(config, doubled(tensors)), ids())) <= UNMOVED


def test_the_way_back_to_stock_where_there_is_no_final_norm() -> None:
    config = decoder(final_norm=False)
    config, tensors = formed(config, random_tensors(config), Form("rms", untie=True))
    narrow, out, _ = sliced(config, tensors, dict.fromkeys(range(7), 18), None, orthonormal)
    made: dict[str, Tensor] = {}
    for part in layout.parts(narrow):
        made |= surgery.standardised({key: out[key] for key in layout.shapes(narrow, part)}, part, narrow)
    tokens = ids(2, 9, 61)
    want = logits(loaded(narrow, out), tokens)
    assert error(logits(loaded(surgery.standard_config(narrow), made), tokens), want) <= UNMOVED


def test_a_tied_head_without_a_final_gain(tmp_path: Path) -> None:
    fields = TINY["opt-tied"] | {"layer_norm_elementwise_affine": False}
    model = built(fields)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="no gain that a tied head could be refitted with"):
        compress(tmp_path / "model", slice=0.0, options={"basis": "junction"}, data=ids(8, 24), out=tmp_path / "out")
