"""SliceGPT: exact where it must be, lossless where the model is redundant, and what the paper's own steps come to."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import raises, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SLICED, TINY, built, canonical, error, ids, logits, stock
from oracles import Paper
from tinies import CALIBRATION, HELD_OUT, compress, folder, planted, weights
from torch import Tensor

from microtome import arch, methods
from microtome.data import Tokens
from microtome.edit import Rewrite
from microtome.errors import BadInput, BadPlan, NumericalFailure, UnknownName, UnsupportedModel
from microtome.evaluate import perplexity
from microtome.layout import EMBEDDING, FINAL_NORM
from microtome.linalg import to_uniform
from microtome.methods.slicegpt import (
    SliceGPT,
    gram,
    overstatement,
    principal_basis,
    regressed_readers,
    tied_adapter,
    tied_gain,
)
from microtome.space import Kind, Space, Symmetry
from microtome.stats import Moment
from microtome.surgery import rebuilt

EXACT = 1e-5
GAUGES = ("lowrank", "diagonal", "dense")
JUNCTION = {"basis": "junction"}

each_model = pytest.mark.parametrize("name", SLICED)


def is_tied(name: str) -> bool:
    """From the config alone: this is asked at collection, which one broken table must not stop."""
    return arch.lower(TINY[name]).tie_word_embeddings


def is_layer(name: str) -> bool:
    return arch.lower(TINY[name]).norm == "layer"


def is_parallel(name: str) -> bool:
    return canonical(name)[0].parallel != "none"


def named(options: dict[str, Any]) -> str:
    return "-".join("untie" if key == "untie" else str(value) for key, value in options.items()) or "default"


# --- nothing is lost where nothing is cut ---------------------------------------------------------------------------


def exact_forms() -> Iterator[Any]:
    """Every form whose rotation at full width leaves the function alone: all but one basis with a tied head."""
    for name in SLICED:
        for untie in ({}, {"untie": True}) if is_tied(name) else ({},):
            free = bool(untie) or not is_tied(name)
            forms: list[dict[str, Any]] = [JUNCTION | {"gauge": gauge} for gauge in GAUGES]
            if free:
                forms += [{}]
            if free and is_layer(name):
                forms += [{"norm": "rms"}, JUNCTION | {"norm": "layer"}]
            for form in forms:
                kept = is_layer(name) and (not free or form.get("norm") == "layer")
                if form.get("gauge") != "diagonal" or not (kept or is_parallel(name)):
                    yield pytest.param(name, form | untie, id=f"{name}-{named(form | untie)}")


@pytest.mark.parametrize(("name", "options"), list(exact_forms()))
def test_rotation_at_full_width_is_exact(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", slice=0.0, options=options)
    assert set(result.plan.widths.values()) == {48}
    have = weights(tmp_path / "out")
    assert not any(torch.equal(tensor, weights(folder(name)).get(key, torch.empty(0))) for key, tensor in have.items()
                   if tensor.ndim == 2 and "shortcut" not in key), "nothing was rotated"  # fmt: skip
    assert error(logits(result.load(), HELD_OUT), logits(stock(name), HELD_OUT)) <= EXACT


@each_model
@pytest.mark.parametrize("options", [{}, JUNCTION | {"untie": True}], ids=named)
def test_keep_1_leaves_every_byte(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", keep=1.0, options=options)
    assert result.stock
    assert result.plan.widths == {}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder(name) / "model.safetensors").read_bytes()
    assert result.after.stored == result.before.stored


@pytest.mark.parametrize("name", ["llama", "opt-untied-gelu", "gpt_neox"])
def test_coordinates_may_be_turned_inside_what_is_kept(name: str, tmp_path: Path) -> None:
    """At random, by seed: other weights, the same function, uncut and cut; LayerNorms keep their ones vector."""
    for dial in ({"slice": 0.0}, {"keep": 0.8}):
        made = [compress(folder(name), tmp_path / "-".join(dial), options={}, **dial)]
        for seed in (0, 1):
            options = {"orientation": "random", "seed": seed}
            made.append(compress(folder(name), tmp_path / f"{'-'.join(dial)}-{seed}", options=options, **dial))
        want = logits(made[0].load(), HELD_OUT)
        assert all(error(logits(one.load(), HELD_OUT), want) <= EXACT for one in made[1:])
        assert {one.after.stored for one in made} == {made[0].after.stored}
        tables = [max(weights(one.folder).values(), key=torch.numel) for one in made]
        assert all(error(one, other) > 0.1 for one, other in itertools.combinations(tables, 2))


# --- planted redundancy ---------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    ("basis", "readers"), [("global", "regressed"), ("global", "transposed"), ("junction", "regressed")]
)
def test_a_redundant_stream_is_sliced_without_loss(name: str, basis: str, readers: str, tmp_path: Path) -> None:
    model = planted(name, rank=24)
    model.save_pretrained(tmp_path / "source")
    options = {"basis": basis, "readers": readers}
    want = logits(model, HELD_OUT)
    result = compress(tmp_path / "source", tmp_path / "out", slice=0.5, options=options)
    assert set(result.plan.widths.values()) == ({24} if basis == "global" else {24, 48})
    assert error(logits(result.load(), HELD_OUT), want) <= 2 * EXACT
    if readers == "transposed":
        harder = compress(tmp_path / "source", tmp_path / "harder", slice=0.6, options=options)
        assert error(logits(harder.load(), HELD_OUT), want) > 0.1, "the plant must be just that large"


@pytest.mark.parametrize("name", ["opt-untied-gelu", "gpt_neox", "gpt_neox-sequential", "phi", "gpt2-untied"])
@pytest.mark.parametrize("options", [{"norm": "rms"}, JUNCTION | {"norm": "layer"}], ids=named)
def test_a_redundant_stream_in_the_other_norm(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = planted(name, rank=24)
    result = compress(model, tmp_path / "out", slice=0.5, options=options)
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= 2 * EXACT


def test_a_redundant_stream_in_every_gauge_with_the_head_sliced_too(tmp_path: Path) -> None:
    for name in ("llama-gqa-llama3-tied", "opt-tied", "gpt_neox", "phi"):
        model = planted(name, rank=24)
        for gauge in ("auto", "lowrank", "dense"):
            options = JUNCTION | {"gauge": gauge, "head": "sliced"}
            result = compress(model, tmp_path / "out", slice=0.5, options=options, overwrite=True)
            assert set(result.plan.widths.values()) == {24}
            assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= 2 * EXACT


# --- only the span of a basis matters -------------------------------------------------------------------------------


def gauges_of(name: str, **options: Any) -> list[str]:
    config = canonical(name)[0]
    kept = SliceGPT(**options).form(config).norm == "layer"
    return [gauge for gauge in GAUGES if gauge != "diagonal" or not (kept or is_parallel(name))]


@pytest.mark.parametrize(
    ("name", "head", "part", "wide"),
    [(name, "full", 0.3, 33) for name in SLICED]
    + [
        (name, "sliced", 0.6, 19)
        for name in ("llama", "llama-gqa-llama3-tied", "opt-tied", "opt-untied-gelu", "gpt_neox", "phi", "phi-tied-gqa")
    ],
)
def test_all_gauges_say_the_same(name: str, head: str, part: float, wide: int, tmp_path: Path) -> None:
    """At a width that shares most directions, and at one below half, where neighbours may share none."""
    outs: list[tuple[Tensor, float]] = []
    for gauge in gauges_of(name, basis="junction"):
        options = JUNCTION | {"gauge": gauge, "head": head}
        result = compress(folder(name), tmp_path / gauge, slice=part, multiple_of=1, options=options)
        assert min(result.plan.widths.values()) == wide
        model = result.load()
        outs.append((logits(model, HELD_OUT), perplexity(model, Tokens(HELD_OUT, "ids", "")).value))
    for have, value in outs[1:]:
        assert error(have, outs[0][0]) <= 2 * EXACT
        assert value == pytest.approx(outs[0][1], rel=1e-4)


def test_auto_stores_least(tmp_path: Path) -> None:
    for part in (0.2, 0.6):
        sizes = {
            gauge: compress(
                folder("llama"),
                tmp_path / f"{gauge}{part}",
                slice=part,
                multiple_of=1,
                options=JUNCTION | {"gauge": gauge},
            ).after.decoder
            for gauge in ("auto", *GAUGES)
        }
        assert sizes["auto"] == min(sizes.values()) < sizes["dense"]


# --- the paper, step by step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["normed", "residual"])
@pytest.mark.parametrize("inputs", ["compressed", "original"])
def test_the_papers_own_steps_come_to_the_same(signal: str, inputs: str, tmp_path: Path) -> None:
    """A 25 % slice of an untied Llama with dense shortcuts, against forty lines that know nothing of the product."""
    options = JUNCTION | {"signal": signal, "inputs": inputs, "gauge": "dense", "readers": "transposed"}
    result = compress(folder("llama"), tmp_path / "out", slice=0.25, multiple_of=4, options=options)
    paper = Paper(stock("llama"), normed=signal == "normed", sequential=inputs == "compressed")
    want = paper.sliced(CALIBRATION, 36)(HELD_OUT)
    assert error(paper.dense(HELD_OUT), logits(stock("llama"), HELD_OUT)) <= EXACT
    assert error(logits(result.load(), HELD_OUT), want) <= 1e-4
    assert error(want, logits(stock("llama"), HELD_OUT)) > 0.1


@pytest.mark.parametrize("ridge", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("basis", ["global", "junction"])
def test_regressed_readers_by_least_squares_on_the_tokens(basis: str, ridge: float, tmp_path: Path) -> None:
    options = {"basis": basis, "ridge": ridge} | ({} if basis == "global" else {"gauge": "dense", "head": "sliced"})
    result = compress(folder("llama"), tmp_path / "out", slice=0.25, multiple_of=4, options=options)
    paper = Paper(stock("llama"), sequential=basis == "junction", one=basis == "global", ridge=ridge, head=False)
    want = paper.sliced(CALIBRATION, 36)(HELD_OUT)
    assert error(logits(result.load(), HELD_OUT), want) <= 1e-4


def test_one_basis_is_that_of_the_sum(tmp_path: Path) -> None:
    for signal in ("normed", "residual"):
        options = {"readers": "transposed", "signal": signal}
        result = compress(folder("llama"), tmp_path / signal, slice=0.25, multiple_of=4, options=options)
        paper = Paper(stock("llama"), normed=signal == "normed", sequential=False, one=True, head=False)
        assert error(logits(result.load(), HELD_OUT), paper.sliced(CALIBRATION, 36)(HELD_OUT)) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "llama-gqa-llama3-tied", "opt-tied", "opt-untied-gelu"])
def test_junctions_behind_sliced_ones_differ_from_those_of_the_dense_model(name: str, tmp_path: Path) -> None:
    places = {inputs: tmp_path / inputs for inputs in ("auto", "compressed", "original")}
    for inputs, place in places.items():
        compress(folder(name), place, slice=0.3, options=JUNCTION | {"inputs": inputs})
    stored = {inputs: (place / "model.safetensors").read_bytes() for inputs, place in places.items()}
    assert stored["auto"] == stored["compressed"] != stored["original"]
    tables = [weights(place)["model.embed_tokens.weight"] for place in places.values()]
    assert torch.equal(tables[1], tables[2]), "before the first junction nothing has been sliced"


# --- what the release does otherwise --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-gqa-llama3-tied", "qwen3-bias"])
def test_centring_under_an_rmsnorm_is_the_release_s_mistake(name: str, tmp_path: Path) -> None:
    """It moves the function although nothing is cut, by just what centring the embedding table does."""
    options = {"centre": "release", "untie": True}
    result = compress(folder(name), tmp_path / "out", slice=0.0, options=options)
    centred = built(TINY[name] | {"tie_word_embeddings": False})
    source = stock(name).state_dict()
    table = source["model.embed_tokens.weight"]
    moved = {"model.embed_tokens.weight": table - table.mean(1, keepdim=True)}
    centred.load_state_dict({**source, "lm_head.weight": source["lm_head.weight"], **moved})
    have = logits(result.load(), HELD_OUT)
    assert error(have, logits(centred, HELD_OUT)) <= EXACT
    assert error(have, logits(stock(name), HELD_OUT)) > 1e-2


def test_centring_under_a_layernorm_is_harmless(tmp_path: Path) -> None:
    for name, untie in (("opt-untied-gelu", False), ("opt-tied", True)):
        options = {"centre": "release", "untie": untie, "norm": "rms"}
        result = compress(folder(name), tmp_path / name, slice=0.0, options=options)
        assert error(logits(result.load(), HELD_OUT), logits(stock(name), HELD_OUT)) <= EXACT


# --- bases ----------------------------------------------------------------------------------------------------------


def samples(size: int, tokens: int, seed: int) -> np.ndarray:
    """Tokens [T, N] with a mean, in whole numbers, whose products fp32 holds exactly."""
    noise = np.random.default_rng(seed)
    return (noise.integers(-20, 21, (tokens, size)) + noise.integers(-9, 10, size)).astype(float)


def moment_of(x_TN: np.ndarray) -> Moment:
    moment = Moment(x_TN.shape[1])
    moment.add(torch.from_numpy(x_TN))
    return moment


def space(size: int, symmetry: Symmetry = Symmetry.ORTHOGONAL) -> Space:
    return Space("residual.3", Kind.RESIDUAL, None, size, symmetry, ())


@given(size=st.integers(2, 24), part=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_basis_spans_the_largest_components(size: int, part: float, seed: int) -> None:
    rank = max(1, round(part * size))
    x_TN = samples(size, 3 * size, seed)
    basis_NR = principal_basis(space(size), moment_of(x_TN), rank).numpy()
    values, vectors = np.linalg.eigh(x_TN.T @ x_TN)
    top_NR = vectors[:, ::-1][:, :rank]
    assert np.allclose(basis_NR.T @ basis_NR, np.eye(rank), atol=1e-10)
    assert np.allclose(basis_NR @ basis_NR.T, top_NR @ top_NR.T, atol=1e-6)
    assert np.isclose(((x_TN @ basis_NR) ** 2).sum(), values[::-1][:rank].sum())


@given(size=st.integers(2, 24), part=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_centred_basis_holds_the_ones_vector_as_the_uniform_one(size: int, part: float, seed: int) -> None:
    rank = max(1, round(part * size))
    x_TN = samples(size, 3 * size, seed)
    basis_NR = principal_basis(space(size, Symmetry.CENTRED), moment_of(x_TN), rank).numpy()
    centred_TN = x_TN - x_TN.mean(1, keepdims=True)
    top_NR = np.linalg.eigh(centred_TN.T @ centred_TN)[1][:, ::-1][:, : rank - 1]
    ones_N = np.full(size, size**-0.5)
    assert np.allclose(basis_NR.T @ basis_NR, np.eye(rank), atol=1e-10)
    assert np.allclose(basis_NR.T @ ones_N, np.full(rank, rank**-0.5), atol=1e-10)
    assert np.allclose(basis_NR @ basis_NR.T, top_NR @ top_NR.T + np.outer(ones_N, ones_N), atol=1e-6)
    z_TR = x_TN @ basis_NR
    assert np.allclose(z_TR - z_TR.mean(1, keepdims=True), centred_TN @ basis_NR, atol=1e-8), "means go with the mean"


def test_the_uniform_reflection() -> None:
    for size in (1, 2, 7):
        turn = to_uniform(size)
        assert torch.allclose(turn @ turn, torch.eye(size, dtype=torch.float64))
        assert torch.allclose(turn[:, -1], torch.full((size,), size**-0.5, dtype=torch.float64))


def test_thin_and_broken_statistics_are_refused() -> None:
    with raises(BadInput, r"7 calibration tokens cannot span 8 directions at residual\.3\. Give more text"):
        principal_basis(space(9), moment_of(samples(9, 7, 0)), 8)
    broken = moment_of(samples(9, 20, 0))
    broken.add(torch.tensor([[torch.inf] * 9]))
    with raises(NumericalFailure, r"activations at residual\.3 are not finite"):
        principal_basis(space(9), broken, 8)


# --- readers --------------------------------------------------------------------------------------------------------


def random_basis(size: int, rank: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed + 1000).standard_normal((size, rank)))[0]


def factor_of(x_TN: np.ndarray, basis_NR: np.ndarray) -> float:
    return float(np.sqrt(((x_TN @ basis_NR) ** 2).sum() / (x_TN**2).sum()))


@given(size=st.integers(2, 16), part=st.floats(0, 1), ridge=st.sampled_from([0.0, 0.1, 2.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_readers_are_regressed(size: int, part: float, ridge: float, seed: int) -> None:
    """With a ridge towards the basis: further rows of the least-squares problem."""
    rank = max(1, round(part * size))
    x_TN, basis_NR = samples(size, 4 * size, seed), random_basis(size, rank, seed)
    z_TR = x_TN @ basis_NR
    weight = np.sqrt(ridge * (z_TR**2).sum() / rank)
    left, right = np.vstack([z_TR, weight * np.eye(rank)]), np.vstack([x_TN, weight * basis_NR.T])
    want_NR = np.linalg.lstsq(left, right)[0].T
    have_NR = regressed_readers(torch.from_numpy(basis_NR), moment_of(x_TN), ridge).numpy()
    assert np.allclose(have_NR, want_NR, atol=1e-6 * np.abs(want_NR).max())


def test_readers_at_the_ends() -> None:
    x_TN = samples(12, 60, 5)
    whole = torch.from_numpy(random_basis(12, 12, 5))
    assert torch.allclose(regressed_readers(whole, moment_of(x_TN), 0.1), whole)
    basis_NR = torch.from_numpy(random_basis(12, 5, 5))
    factor = overstatement(basis_NR, moment_of(x_TN))
    assert float(factor) == pytest.approx(factor_of(x_TN, basis_NR.numpy()))
    assert 0 < factor < 1
    assert torch.allclose(regressed_readers(basis_NR, moment_of(x_TN), 1e9), basis_NR)
    own_NR = principal_basis(space(12), moment_of(x_TN), 5)
    assert torch.allclose(regressed_readers(own_NR, moment_of(x_TN), 0.0), own_NR), "nothing more can be guessed"


# --- tied heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_tied_gain_is_the_best_of_all_gains(biased: bool, seed: int) -> None:
    """Least squares over every token and every word, written out: one row for each logit."""
    noise = np.random.default_rng(seed)
    x_TN, basis_NR, table_VN = samples(7, 40, seed), random_basis(7, 4, seed), noise.standard_normal((11, 7))
    gain_N, bias_N = noise.standard_normal(7), noise.standard_normal(7) * biased
    small_VR, z_TR = table_VN @ basis_NR, x_TN @ basis_NR
    wanted_TV = (gain_N * x_TN + bias_N) @ table_VN.T
    rows = (z_TR[:, None] * small_VR[None]).reshape(-1, 4)
    if biased:
        rows = np.hstack([rows, np.broadcast_to(small_VR, (40, 11, 4)).reshape(-1, 4)])
    want = np.linalg.lstsq(rows, wanted_TV.ravel())[0]
    basis, table, gain = (torch.from_numpy(one) for one in (basis_NR, table_VN, gain_N))
    bias = torch.from_numpy(bias_N) if biased else None
    edits = {edit.tensor: edit.value for edit in tied_gain(basis, gram(table), gain, bias, moment_of(x_TN), 0.8)}
    assert set(edits) == {FINAL_NORM} | ({"model.norm.bias"} if biased else set())
    assert np.allclose(edits[FINAL_NORM], 0.8 * want[:4], atol=1e-8)
    if biased:
        assert np.allclose(edits["model.norm.bias"], want[4:], atol=1e-8)


def test_the_tied_gain_carries_what_the_final_norm_overstates() -> None:
    """Regressed readers are scaled by it, and the head reads through the final gain; a bias is behind the norm."""
    x_TN, basis_NR = samples(12, 60, 3), random_basis(12, 5, 3)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator)
               for name, shape in ((EMBEDDING, (31, 12)), (FINAL_NORM, (12,)), ("model.norm.bias", (12,)))}  # fmt: skip
    rewrites = {f"residual.{number}": Rewrite.orthogonal(space(12), torch.from_numpy(basis_NR)) for number in (0, 1, 2)}
    regressed, transposed = (
        {edit.tensor: edit.value for edit in SliceGPT(readers=readers).finish(tensors, rewrites, moment_of(x_TN))}
        for readers in ("regressed", "transposed")
    )
    factor = factor_of(x_TN, basis_NR)
    assert factor < 0.95
    assert torch.allclose(regressed[FINAL_NORM], transposed[FINAL_NORM] * factor)
    assert torch.equal(regressed["model.norm.bias"], transposed["model.norm.bias"])


@pytest.mark.parametrize("biased", [False, True])
def test_the_tied_adapter_is_the_best_of_all_adapters(biased: bool) -> None:
    noise = np.random.default_rng(0)
    table_VN, gain_N, bias_N = noise.standard_normal((23, 9)), noise.standard_normal(9), noise.standard_normal(9)
    first_NR, last_NR = random_basis(9, 5, 1), random_basis(9, 6, 2)
    small_VR = table_VN @ first_NR
    tensors = [torch.from_numpy(one) for one in (first_NR, last_NR, table_VN.T @ table_VN, gain_N)]
    edits = {e.tensor: e.value for e in tied_adapter(*tensors, torch.from_numpy(bias_N) if biased else None)}
    want = np.linalg.lstsq(small_VR, table_VN * gain_N @ last_NR)[0]
    assert np.allclose(edits.pop("head_adapter.weight"), want, atol=1e-8)
    if biased:
        assert np.allclose(edits.pop("head_adapter.bias"), np.linalg.lstsq(small_VR, table_VN @ bias_N)[0], atol=1e-8)
    assert not edits


def test_the_gram_of_a_table_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microtome.methods.slicegpt.CHUNK", 4)
    table = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gram(table), table.double().T @ table.double())


# --- the same again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("llama-gqa-llama3-tied", {}), ("qwen3-tied", JUNCTION), ("opt-untied-gelu", JUNCTION)],
)
def test_two_runs_give_the_same_bytes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    for run, seed in (("first", 0), ("second", 7)):  # of ids nothing is drawn, so a seed changes nothing
        compress(folder(name), tmp_path / run, keep=0.7, options=options, seed=seed)
    first, second = (
        {file: data for file, data in tree(tmp_path / run).items() if file not in {"plan.json", "README.md"}}
        for run in ("first", "second")
    )
    assert first == second


@pytest.mark.parametrize(("name", "options"), [("mistral", {}), ("opt-tied", {}), ("qwen2-tied", JUNCTION)])
def test_two_loads_agree_bit_for_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", slice=0.3, options=options)
    first = result.load()
    want = logits(first, HELD_OUT)
    assert torch.equal(logits(result.load(), HELD_OUT), want)
    first.save_pretrained(tmp_path / "again")
    again = type(first).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, HELD_OUT), want)
    for part in (result.load, lambda: again):
        assert torch.equal(part().generate(HELD_OUT, max_new_tokens=4, pad_token_id=0)[:, -4:],
                           first.generate(HELD_OUT, max_new_tokens=4, pad_token_id=0)[:, -4:])  # fmt: skip


def test_more_calibration_rows_change_the_result(tmp_path: Path) -> None:
    for rows in (4, 8):
        compress(folder("llama"), tmp_path / str(rows), slice=0.3, samples=rows)
    small, large = (weights(tmp_path / rows)["model.embed_tokens.weight"] for rows in "48")
    assert not torch.equal(small, large)


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"inputs": "compressed"}, "inputs=compressed needs basis=junction"),
    ("llama", {"signal": "residual", "readers": "regressed"}, "readers=regressed needs signal=normed"),
    ("llama", {"ridge": "-1"}, "ridge=-1.0 of slicegpt"),
    ("llama", {"ridge": "nan"}, "ridge=nan of slicegpt"),
    ("llama", {"ridge": "inf"}, "ridge=inf of slicegpt"),
    ("llama", {"gauge": "dense"}, "gauge=dense needs basis=junction: one basis for all"),
    ("llama", {"head": "full"}, "head=full needs basis=junction: one basis for all"),
    ("llama", {"orientation": "random", "basis": "junction"}, "orientation=random needs basis=global: elsewhere the gauge"),
    ("gpt_neox", JUNCTION | {"gauge": "diagonal"}, "pairs the two junctions of a block, and parallel blocks have one"),
    ("llama", {"norm": "layer"}, "norm=layer keeps a LayerNorm, and this model has RMSNorms"),
    ("qwen2-tied", {"centre": "release"}, "centring the embeddings changes a head that is tied to them: add --untie"),
    ("opt-tied", {"norm": "rms"}, "centring the embeddings changes a head that is tied to them: add --untie"),
    ("opt-tied", JUNCTION | {"gauge": "diagonal"}, "gauge=diagonal .* ones vector"),
    ("opt-untied-gelu", JUNCTION | {"gauge": "diagonal", "norm": "layer"}, "gauge=diagonal .* ones vector"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "words"), REFUSED, ids=[f"{n}-{named(o)}" for n, o, _ in REFUSED])
def test_options_that_contradict_each_other_or_the_model(
    name: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with raises(BadInput, words):
        compress(folder(name), tmp_path / "out", slice=0.3, options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(set(TINY) - set(SLICED)))
def test_models_whose_stream_cannot_be_rotated(name: str, tmp_path: Path) -> None:
    words = "cannot rotate the residual stream of this .*it normalises what a half writes"
    with raises(UnsupportedModel, words):
        compress(folder(name), tmp_path / "out", slice=0.3)
    assert not list(tmp_path.iterdir())


def test_streams_that_cannot_be_rotated() -> None:
    config = canonical("llama")[0]
    SliceGPT().check(rebuilt(config, {1: {"rotary": False, "intermediate_size": 7}}))
    with raises(UnsupportedModel, "this model has been sliced already. Start from the original"):
        SliceGPT().check(rebuilt(config, {1: {"attn_shortcut": "dense"}}))
    with raises(UnsupportedModel, "this model has been sliced already. Start from the original"):
        SliceGPT().check(rebuilt(config, {1: {"residual_mid": 40}}))
    with raises(UnsupportedModel, "it normalises what a half writes"):
        SliceGPT().check(rebuilt(config, norm_placement="sandwich"))
    with raises(UnsupportedModel, "this model has been sliced already. Start from the original"):
        SliceGPT().check(rebuilt(config, norm_divisor=64))


def test_what_was_sliced_with_shortcuts_is_not_sliced_again(tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "once", slice=0.3, options=JUNCTION)
    with raises(UnsupportedModel, "this model has been sliced already. Start from the original"):
        compress(tmp_path / "once", tmp_path / "twice", slice=0.3)


def test_what_came_out_stock_can_be_sliced_again(tmp_path: Path) -> None:
    model = planted("qwen2-window", rank=16)
    compress(model, tmp_path / "once", slice=0.5)
    twice = compress(tmp_path / "once", tmp_path / "twice", slice=1 / 3)
    assert set(twice.plan.widths.values()) == {16}
    assert error(logits(twice.load(), HELD_OUT), logits(model, HELD_OUT)) <= 4 * EXACT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gage": "dense"}, r"no option of slicegpt named 'gage'\. Did you mean 'gauge'\? Known: basis, centre, gauge"),
        ({"gauge": "densest"}, r"no value of slicegpt's option gauge named 'densest'\. Did you mean 'dense'\?"),
        ({"basis": "local"}, r"no value of slicegpt's option basis named 'local'\.( Did.*)? Known: global, junction"),
    ],
)
def test_unknown_options_and_values_name_the_nearest(options: dict[str, str], words: str) -> None:
    with raises(UnknownName, words):
        methods.build("slicegpt", options)


def test_an_unknown_method_names_the_nearest() -> None:
    with raises(UnknownName, r"no method named 'slicegtp'\. Did you mean 'slicegpt'\? Known: .*slicegpt"):
        methods.build("slicegtp", {})


def test_options_are_read_from_text() -> None:
    assert methods.build("slicegpt", {"untie": "true", "ridge": "0.5"}) == SliceGPT(untie=True, ridge=0.5)
    assert methods.build("slicegpt", {"untie": "False"}) == SliceGPT()
    for option, value, words in (("untie", "maybe", "takes bool, not 'maybe'"), ("ridge", "x", "takes float, not 'x'")):
        with raises(BadInput, f"option {option} of slicegpt {words}"):
            methods.build("slicegpt", {option: value})


def test_too_few_tokens_for_the_width(tmp_path: Path) -> None:
    with raises(BadInput, r"20 calibration tokens cannot span 32 directions at residual(\.0)?\. Give more text"):
        compress(folder("llama"), tmp_path / "out", slice=0.3, data=ids(2, 10))
    with raises(BadPlan, "--slice 0.9 of width 48 leaves nothing at a multiple of 8"):
        compress(folder("llama"), tmp_path / "out", slice=0.9)
    assert not list(tmp_path.iterdir())
