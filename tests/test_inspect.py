"""`microtome inspect`: spectra, cosines and neurons against transformers' own forward; sizes and reach by hand."""

import importlib.util
import json
import math
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from folders import Ran, raises
from hypothesis import given
from hypothesis import strategies as some
from models import TINY, built, canonical, loaded, random_tensors, stock
from tinies import CALIBRATION, compress, folder, planted, spoken, text, weights
from torch import Tensor, nn

from microtome import arch, inspection, layout, methods, planner, plots, spectra, tables
from microtome.errors import BadInput, BadOutput, UnknownName
from microtome.inspection import Inspection, inspect
from microtome.source import Source
from microtome.space import Kind
from microtome.spectra import Spectrum
from microtome.surgery import rebuilt

NAMES = ["llama", "gpt2-tied", "opt-tied", "gpt_neox", "phi", "gemma2", "olmo2", "qwen3-tied", "granite-tied"]
MIDDLE = {  # transformers' module that reads the stream between the halves
    "llama": "post_attention_layernorm", "gpt2-tied": "ln_2", "opt-tied": "final_layer_norm",
    "gemma2": "pre_feedforward_layernorm", "qwen3-tied": "post_attention_layernorm",
    "granite-tied": "post_attention_layernorm", "olmo2": "mlp",
}  # fmt: skip
DOWN = {"gpt2-tied": "mlp.c_proj", "opt-tied": "fc2", "gpt_neox": "mlp.dense_4h_to_h", "phi": "mlp.fc2"}
LLAMA_2_7B: dict[str, Any] = {  # as published; its card says 6,738,415,616 parameters
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip


# --- an oracle: transformers' own forward, looked at by hooks -------------------------------------------------------


class Passed(NamedTuple):
    """What goes through transformers' model, fp64: the stream before each block and behind the last, and inside."""

    streams: list[Tensor]
    middles: list[Tensor]
    neurons: list[Tensor]


def blocks_of(model: Any) -> nn.ModuleList:
    return next(
        one
        for one in model.modules()
        if isinstance(one, nn.ModuleList) and len(one) == model.config.get_text_config().num_hidden_layers
    )


@torch.no_grad()
def looked_at(model: Any, name: str) -> Passed:
    seen = Passed([], [], [])
    hooks = []

    def reads(into: list[Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into.append((args[0] if args else kwargs["hidden_states"]).detach().double())

        return hook

    def writes(_module: nn.Module, _args: Any, out: Any) -> None:
        seen.streams.append((out if isinstance(out, Tensor) else out[0]).detach().double())

    blocks = blocks_of(model)
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(reads(seen.streams), with_kwargs=True))
        down = block.get_submodule(DOWN.get(name, "mlp.down_proj"))
        hooks.append(down.register_forward_pre_hook(reads(seen.neurons), with_kwargs=True))
        if name in MIDDLE:
            middle = block.get_submodule(MIDDLE[name])
            hooks.append(middle.register_forward_pre_hook(reads(seen.middles), with_kwargs=True))
    hooks.append(blocks[-1].register_forward_hook(writes))
    try:
        model(input_ids=CALIBRATION, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@cache
def theirs(name: str) -> Passed:
    return looked_at(stock(name), name)


@cache
def mine(name: str) -> Inspection:
    return inspect(folder(name), data=CALIBRATION, device="cpu", method="slicegpt")


def unit(z: Tensor, config: Any) -> Tensor:
    """A norm without gain."""
    if config.norm == "layer":
        return nn.functional.layer_norm(z, z.shape[-1:], eps=config.norm_eps)
    return z / (z.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()


def energies(z: Tensor) -> Tensor:
    """Eigenvalues of E[z z^T], by singular values of the tokens."""
    flat = z.reshape(-1, z.shape[-1])
    values = torch.linalg.svdvals(flat).square() / len(flat)
    return torch.cat([values, values.new_zeros(flat.shape[-1] - len(values))])


def entropy_rank(values: Tensor) -> float:
    p = [value / float(values.sum()) for value in values.tolist() if value > 0]
    return math.exp(-sum(one * math.log(one) for one in p))


def assert_same(found: Spectrum | None, want: Tensor) -> None:
    assert found is not None
    first = float(want[0])
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), want, rtol=1e-4, atol=2e-6 * first)
    assert found.effective_rank == pytest.approx(entropy_rank(want), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_spectra_of_the_stream(name: str) -> None:
    config, seen = canonical(name)[0], theirs(name)
    raw = dict(zip(range(0, 2 * config.num_hidden_layers + 1, 2), seen.streams, strict=True))
    raw |= {2 * block + 1: middle for block, middle in enumerate(seen.middles)}
    junctions = mine(name).junctions
    assert {one.number for one in junctions} == set(raw)
    for one in junctions:
        stream = raw[one.number]
        bare = name == "olmo2" and one.where != "head"  # its halves read the stream as it is
        centred = stream - stream.mean(-1, keepdim=True) if config.norm == "layer" else stream
        assert_same(one.behind_norm, energies(stream if bare else unit(stream, config)))
        assert_same(one.before_norm, energies(centred))


@pytest.mark.parametrize("name", NAMES)
def test_what_blocks_change(name: str) -> None:
    """transformers' last hidden state is behind the final norm; the hook on the last block sees the stream itself."""
    streams = theirs(name).streams
    changes = mine(name).changes
    assert len(changes) == len(streams) - 1 > 1
    for change, x, y in zip(changes, streams, streams[1:], strict=False):
        cosine = nn.functional.cosine_similarity(x, y, dim=-1)
        assert change.cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert change.influence == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
        assert change.angle == pytest.approx(float(cosine.arccos().mean()) / math.pi, abs=1e-5)
        assert change.growth == pytest.approx(float(y.norm(dim=-1).mean() / x.norm(dim=-1).mean()), rel=1e-5)
        assert change.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_neurons(name: str) -> None:
    for found, z in zip(mine(name).neurons, theirs(name).neurons, strict=True):
        assert_same(found.spectrum, energies(z))
        active = z.abs().reshape(-1, z.shape[-1]).mean(0)
        assert found.dead == int((active < 0.01 * active.mean()).sum())
        assert found.size == len(active)


def test_dead_neurons_are_counted(tmp_path: Path) -> None:
    model = built(TINY["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:3] = 0.0
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path, data=CALIBRATION, device="cpu", method="slicegpt").neurons
    want = [one.dead for one in mine("llama").neurons]
    assert want[1] == 0
    assert [one.dead for one in found] == [want[0], 3, *want[2:]]


def test_a_stream_with_a_basis_at_every_junction(tmp_path: Path) -> None:
    """A result in our own format: widths, norms and shortcuts are its own, and its model is the oracle."""
    made = compress(folder("llama"), tmp_path / "cut", keep=0.7, options={"basis": "junction"})
    model, width = made.load("cpu"), TINY["llama"]["hidden_size"]
    assert not made.stock
    seen = looked_at(model, "llama")
    found = inspect(made.folder, data=CALIBRATION, device="cpu", method="slicegpt")
    assert sum(found.parts.values()) == found.sizes.stored == sum(one.numel() for one in weights(made.folder).values())
    assert found.parts["shortcuts"] > 0
    assert "shortcuts" in found.features["blocks"]
    assert "sliced already" in str(found.methods[0].why)
    raw = dict(zip(range(0, len(found.junctions), 2), seen.streams, strict=True))
    raw |= {2 * block + 1: middle for block, middle in enumerate(seen.middles)}
    for one in found.junctions:
        z = raw[one.number]
        assert one.width == z.shape[-1] < width
        assert_same(one.before_norm, energies(z))
        assert_same(one.behind_norm, energies(z / (z.square().sum(-1, keepdim=True) / width + 1e-6).sqrt()))
    for change, block, x, y in zip(found.changes, blocks_of(model), seen.streams, seen.streams[1:], strict=False):
        with torch.no_grad():
            passed = block.mlp_shortcut(block.attn_shortcut(torch.eye(x.shape[-1]))).double()
        cosine = nn.functional.cosine_similarity(x @ passed, y, dim=-1)
        assert change.cosine == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert change.relative == pytest.approx(float((y - x @ passed).norm() / (x @ passed).norm()), rel=1e-4)


# --- spectra of what reads ------------------------------------------------------------------------------------------


def test_spectra_of_what_reads_a_llama() -> None:
    stored = stock("llama").state_dict()
    junctions = mine("llama").junctions
    for block in range(TINY["llama"]["num_hidden_layers"]):
        head = f"model.layers.{block}."
        for number, norm, names in (
            (2 * block, "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (2 * block + 1, "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            stacked = torch.cat([stored[f"{head}{name}.weight"] for name in names]).double()
            want = torch.linalg.svdvals(stacked * stored[f"{head}{norm}.weight"].double()).square()
            assert_same(junctions[number].readers, want)
    last = stored["lm_head.weight"].double() * stored["model.norm.weight"].double()
    assert_same(junctions[-1].readers, torch.linalg.svdvals(last).square())


def test_readers_behind_a_layernorm_see_no_mean() -> None:
    """gpt2 packs and transposes, OPT has a tied head; a direction that a LayerNorm removes has no energy."""
    gpt2 = stock("gpt2-tied").state_dict()
    width = TINY["gpt2-tied"]["n_embd"]
    away = torch.eye(width, dtype=torch.float64) - 1.0 / width
    first = (gpt2["transformer.h.0.attn.c_attn.weight"].double().T * gpt2["transformer.h.0.ln_1.weight"]) @ away
    assert_same(mine("gpt2-tied").junctions[0].readers, torch.linalg.svdvals(first).square())
    opt = stock("opt-tied").state_dict()
    gain = opt["model.decoder.final_layer_norm.weight"].double()
    last = opt["model.decoder.embed_tokens.weight"].double() * gain
    last = last - last.mean(1, keepdim=True)
    assert_same(mine("opt-tied").junctions[-1].readers, torch.linalg.svdvals(last).square())


def test_gains_with_an_offset_and_a_tied_head() -> None:
    stored = stock("gemma2").state_dict()
    gain = 1.0 + stored["model.norm.weight"].double()
    want = torch.linalg.svdvals(stored["model.embed_tokens.weight"].double() * gain).square()
    assert_same(mine("gemma2").junctions[-1].readers, want)


def test_a_block_without_an_mlp_and_one_that_reads_a_part_of_the_stream(tmp_path: Path) -> None:
    """What methods may leave behind: nothing reads at a junction, and some columns of a reader stand for no others."""
    config = rebuilt(canonical("llama")[0], {0: {"attn_read_size": 24}, 1: {"skip": ["mlp"]}})
    tensors = random_tensors(config, dtype=torch.float32)
    loaded(config, tensors).save_pretrained(tmp_path)
    found = inspect(tmp_path, data=CALIBRATION, device="cpu", method="slicegpt")
    head = "model.layers.0."
    whole = torch.zeros(0, config.hidden_size, dtype=torch.float64)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = tensors[f"{head}self_attn.{name}.weight"].double()
        spread = torch.zeros(len(weight), config.hidden_size, dtype=torch.float64)
        for place, column in enumerate(tensors[f"{head}attn_read_index"].tolist()):
            spread[:, column] = weight[:, place]
        whole = torch.cat([whole, spread])
    want = torch.linalg.svdvals(whole * tensors[f"{head}input_layernorm.weight"].double()).square()
    assert_same(found.junctions[0].readers, want)
    assert found.junctions[3].readers is None
    assert found.junctions[3].before_norm == found.junctions[4].before_norm  # nothing happens between the two
    assert (found.neurons[1].size, found.neurons[1].spectrum.components(0.9)) == (0, 0)
    assert "1 without MLP" in found.features["blocks"]
    shown = {row[0]: row for table in tables.tables(found) if "weights" in table.title for row in table.rows}
    assert "nothing reads here" in shown["3"]
    plots.write(found, tmp_path / "figure.png")


# --- effective rank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_a_planted_stream_of_low_rank(name: str, tmp_path: Path) -> None:
    """With a LayerNorm the ones vector is one of the five dimensions, and it is taken out."""
    planted(name, rank=5).save_pretrained(tmp_path)
    rank = 4 if canonical(name)[0].norm == "layer" else 5
    for one in inspect(tmp_path, data=CALIBRATION, device="cpu", method="slicegpt").junctions:
        for spectrum in (one.behind_norm, one.before_norm):
            assert spectrum is not None
            assert 1.0 < spectrum.effective_rank < rank + 0.01
            assert spectrum.components(0.999) <= rank < one.width
            assert spectrum.values[rank] < 1e-5 * spectrum.values[0] < spectrum.values[rank - 1] * 1e5


@given(some.integers(1, 30), some.integers(0, 30), some.floats(1e-6, 1e6))
def test_equal_eigenvalues_count_themselves(many: int, none: int, size: float) -> None:
    found = Spectrum((size,) * many + (0.0,) * none)
    assert found.effective_rank == pytest.approx(many)
    for share in (0.9, 0.95, 0.99, 0.999):
        assert found.components(share) == math.ceil(share * many - 1e-9)
    assert float(found.cumulative[-1]) == pytest.approx(1.0)


def test_a_spectrum_by_hand() -> None:
    found = Spectrum((0.5, 0.25, 0.25))
    assert found.effective_rank == pytest.approx(2**1.5)
    assert [found.components(share) for share in (0.5, 0.6, 0.75, 0.9)] == [1, 2, 2, 3]
    assert found.to_json()["cumulative"] == [0.5, 0.75, 1.0]
    nothing = Spectrum((0.0, 0.0))
    assert (nothing.effective_rank, nothing.components(0.9)) == (0.0, 0)
    assert tables.decay(nothing) == "▁▁"
    assert tables.decay(Spectrum((1.0, 1e-1, 1e-3, 1e-9))) == "█▆▃▁"  # of eight levels for four decades


def test_overflow_names_the_place(tmp_path: Path) -> None:
    from microtome.errors import NumericalFailure

    model = built(TINY["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e38)
    model.save_pretrained(tmp_path)
    with raises(NumericalFailure, "residual.2 are not finite"):
        inspect(tmp_path, data=CALIBRATION, device="cpu", method="slicegpt")


# --- counts ---------------------------------------------------------------------------------------------------------


def config_only(fields: dict[str, Any], place: Path, *names: str) -> Inspection:
    source = Source(place, "published", None, fields, {}, {})
    return inspection.counted(planner.opened(source), names)


def test_a_published_model_by_its_config_alone(tmp_path: Path) -> None:
    """Llama 2 7B: nothing is allocated, and the counts are those of pencil and paper."""
    found = config_only(LLAMA_2_7B, tmp_path, *methods.known())
    assert found.sizes.stored == found.sizes.total == sum(found.parts.values()) == 6_738_415_616
    assert found.sizes.nbytes == 2 * 6_738_415_616
    assert found.sizes.kv_bytes == 2 * 2 * 32 * 4096
    assert found.parts == {
        "embeddings": 32000 * 4096, "attention": 32 * 4 * 4096**2, "MLP": 32 * 3 * 4096 * 11008, "norms": 65 * 4096,
        "head": 32000 * 4096,
    }  # fmt: skip
    told = {one.kind: (one.number, one.sizes, one.multiple, one.stored) for one in found.spaces}
    half = 32 * 2 * 4096**2
    assert told == {
        "residual": (65, (4096,), 128, 6_738_415_616),
        "ffn": (32, (11008,), 128, 32 * 3 * 4096 * 11008),
        "query-key": (1024, (128,), 4, half),
        "value-output": (1024, (128,), 4, half),
        "heads": (32, (32,), 1, 2 * half),
    }
    assert [one.method for one in found.methods] == methods.known()
    assert found.junctions[0].readers is None
    assert found.features["positions"] == "rotary on all of 128 channels, theta 10000, up to 4,096"
    assert found.features["attention"] == "32 heads, width 128"


WORDS = {
    "llama-gqa-llama3-tied": ("grouped", "llama3 scaling", "tied to the embedding"),
    "gemma2": ("before and behind each half", "scores capped", "window of", "gain 1 + weight", "embeddings times"),
    "olmo2": ("behind each half", "normed over all heads"),
    "qwen3-tied": ("normed per head",),
    "phi": ("side by side behind one norm", "LayerNorm", "bias"),
    "gpt_neox": ("side by side, a norm each", "rotary on"),
    "opt-tied": ("learned", "relu", "plain"),
    "smollm3-tied": ("not in",),
    "granite-tied": ("halves times", "logits times"),
}


@pytest.mark.parametrize("name", WORDS)
def test_features_in_words(name: str) -> None:
    said = json.dumps(config_only(TINY[name], Path()).features)
    for words in WORDS[name]:
        assert words in said, said


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_is_counted_whole(name: str, tmp_path: Path) -> None:
    found = config_only(TINY[name], tmp_path)
    assert sum(found.parts.values()) == found.sizes.stored == layout.count(arch.lower(TINY[name]))
    assert {one.kind for one in found.spaces} == {"residual", "ffn", "query-key", "value-output", "heads"}
    json.dumps(found.to_json(), allow_nan=False)


def test_reach_by_brute_force(tmp_path: Path) -> None:
    """Every width that the dial can come to, counted one by one."""
    opened = planner.opened(Source(tmp_path, "tiny", None, TINY["llama"], {}, {}))
    config, method = opened.config, methods.build("slicegpt", {})
    step = 2 ** int(math.log2(config.hidden_size / 24)) if config.hidden_size >= 48 else 1
    shares = [
        layout.count_blocks(
            planner.outcome(TINY["llama"], config, method, dict.fromkeys(layout.junctions(config), wide)).final
        )
        / layout.count_blocks(config)
        for wide in range(step, config.hidden_size, step)
    ]
    found = inspection.reach(opened, "slicegpt")
    assert (found.smallest, found.largest) == (min(shares), max(shares))
    assert found.step == pytest.approx((max(shares) - min(shares)) / (len(shares) - 1))
    assert config.hidden_size % step == 0
    assert found.widths == (step, config.hidden_size - step, step)
    assert (found.targets, found.why, found.stock) == (("residual",), None, True)


def test_reach_of_inner_widths_by_hand(tmp_path: Path) -> None:
    """A method that cuts neurons: a neuron of a gated MLP is three rows of the width."""
    opened = planner.opened(Source(tmp_path, "tiny", None, TINY["llama"], {}, {}))
    width, neurons, blocks = (TINY["llama"][name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    step = next(size for size in (8, 4, 2, 1) if size * 24 <= neurons)
    whole = sum(one.numel() for one in blocks_of(stock("llama")).parameters())
    found = inspection.reach_inside(opened, SimpleNamespace(targets=frozenset({Kind.FFN}), biased=False))
    assert found.smallest == pytest.approx(1 - blocks * 3 * width * (neurons - step) / whole)
    assert found.largest == pytest.approx(1 - 3 * width * step / whole)
    assert found.step == pytest.approx(3 * width * step / whole)
    nothing = inspection.reach_inside(opened, SimpleNamespace(targets=frozenset(), biased=False))
    assert nothing.why == "there is nothing for it to cut in this llama."


def test_a_refusal_is_part_of_the_answer(tmp_path: Path) -> None:
    opened = planner.opened(Source(tmp_path, "tiny", None, TINY["olmo2"], {}, {}))
    found = inspection.reach(opened, "slicegpt")
    assert (found.smallest, found.largest, found.targets) == (None, None, ("residual",))
    assert "slicegpt cannot rotate the residual stream of this olmo2" in str(found.why)
    assert "cannot: slicegpt cannot rotate" in tables.reach_words(found)


# --- as a user sees it ----------------------------------------------------------------------------------------------


def test_text(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text())
    ran = run("inspect", spoken(), "--data", tmp_path / "text.txt", "--samples", 3, "--length", 16)
    assert (ran.code, ran.err) == (0, "")
    heads = f"{TINY['llama']['num_attention_heads']} heads"
    for words in (heads, "decoder parameters", "slicegpt", "block 0 attention", "influence", "█"):
        assert words in ran.out
    assert "text.txt, 3 windows of 16 tokens" in ran.out
    assert "effective: exp of the entropy" in ran.out
    assert max(len(line) for line in ran.out.splitlines() if "─" in line) <= 112


def test_json_is_valid_and_stable(run: Callable[..., Ran], tmp_path: Path) -> None:
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    first, second = (run("inspect", spoken(), "--data", tmp_path / "ids.pt", "--json") for _ in range(2))
    assert first == second
    found = json.loads(first.out, parse_constant=pytest.fail)
    assert found["sizes"]["stored"] == layout.count(canonical("llama")[0])
    assert [one["number"] for one in found["junctions"]] == layout.junctions(canonical("llama")[0])
    for one in found["junctions"]:
        for spectrum in (one["readers"], one["behind_norm"], one["before_norm"]):
            assert len(spectrum["eigenvalues"]) == one["width"]
            assert spectrum["eigenvalues"] == sorted(spectrum["eigenvalues"], reverse=True)
            assert set(spectrum["components"]) == {"0.9", "0.95", "0.99", "0.999"}
    assert found["calibration"]["windows"] == len(CALIBRATION)
    assert any("cannot fill" in note for note in found["notes"]) == (CALIBRATION.numel() < found["neurons"][0]["size"])


def test_without_weights_the_config_is_enough(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    ran = run("inspect", tmp_path, "--no-weights")
    assert (ran.code, ran.err) == (0, "")
    assert "6,738,415,616" in ran.out
    assert "Spectra" not in ran.out
    refused = run("inspect", tmp_path)
    assert (refused.code, refused.out) == (2, "")


@pytest.mark.parametrize("data", [(), ("--data", "ids.pt")])
def test_figure(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(CALIBRATION, "ids.pt")
    before = {one.name for one in tmp_path.iterdir()}
    ran = run("inspect", spoken(), *data, "--png", "figure.png")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("figure: figure.png\n")
    assert {one.name for one in tmp_path.iterdir()} == before | {"figure.png"}
    raw = (tmp_path / "figure.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", raw[16:24]) == (12 * 130, 8.5 * 130)
    assert raw.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_panels_say_what_they_show(name: str) -> None:
    found = mine(name)
    drawn: Any = plots.figure(found)
    panels = {axes.get_title(): axes for axes in drawn.get_axes() if axes.get_title()}
    assert len(panels) == 4
    assert all(axes.get_xlabel() for axes in panels.values())
    decay, rank = panels["Eigenvalue decay: stream behind its norm"], panels["Effective rank of each junction"]
    assert (decay.get_xscale(), decay.get_yscale()) == ("log", "log")
    assert len(decay.lines) == len(found.junctions)
    assert len({line.get_color() for line in decay.lines}) == len(found.junctions)
    drawn_ranks = list(rank.lines[0].get_ydata())
    assert drawn_ranks == [one.behind_norm.effective_rank for one in found.junctions if one.behind_norm]
    bars = panels["What each block changes, and what its neurons span"].patches
    assert [bar.get_height() for bar in bars] == [one.influence for one in found.changes]
    assert f"{name}" in drawn.get_suptitle()
    assert f"{len(CALIBRATION)} windows of 24 tokens" in drawn.get_suptitle()


def test_a_figure_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.png").write_bytes(b"old")

    def full(_self: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", full)
    with raises(BadOutput, r"cannot write the figure .*old\.png: No space left on device\."):
        plots.write(mine("llama"), tmp_path / "old.png")
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"old"]


REFUSALS: dict[str, tuple[type[Any], str, dict[str, Any]]] = {
    "method": (UnknownName, "no method named 'slicegtp'. Did you mean 'slicegpt'", {"method": "slicegtp"}),
    "weights": (BadInput, "--data needs the weights", {"data": CALIBRATION, "weights": False}),
    "revision": (BadInput, "is a folder and has no revision 'main'", {"revision": "main"}),
    "device": (BadInput, "no device named 'toaster'", {"device": "toaster"}),
    "vocabulary": (BadInput, "made with another tokenizer", {"data": CALIBRATION + 1000}),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals(what: str) -> None:
    kind, words, chosen = REFUSALS[what]
    with raises(kind, words):
        inspect(folder("llama"), **chosen)


def test_refused_figures(run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, *arguments: object) -> None:
        ran = run("inspect", spoken(), *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("microtome: ")
        assert ran.err.count("\n") == 1
        assert words in ran.err
        assert list(tmp_path.iterdir()) == []

    refused("there is no folder", "--png", tmp_path / "none" / "a.png")
    refused("is a folder: give --png the name of a file", "--png", tmp_path)
    refused("--png shows spectra", "--no-weights", "--png", tmp_path / "a.png")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    refused("needs matplotlib, which is not installed: pip install matplotlib", "--png", tmp_path / "a.png")


def test_restricted_to_a_method() -> None:
    found = inspect(folder("llama"), method="slicegpt", weights=False)
    assert [one.method for one in found.methods] == ["slicegpt"]


def test_where_junctions_are() -> None:
    config = canonical("llama")[0]
    assert [spectra.where(config, one) for one in (0, 1, 2)] == [
        "block 0 attention",
        "block 0 MLP",
        "block 1 attention",
    ]
    assert spectra.where(config, 2 * config.num_hidden_layers) == "head"
    assert spectra.where(canonical("phi")[0], 2) == "block 1"
