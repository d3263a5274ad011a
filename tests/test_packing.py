"""Codes in words and words in files: by hand, by the library that defines the format, and by who loads them."""

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, built, error, logits, stock
from tinies import CALIBRATION, HELD_OUT, compress, folder, home, weights
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from microtome import arch, packing
from microtome.arch import Stored
from microtome.edit import Quantise
from microtome.errors import BadInput
from microtome.forecast import preview
from microtome.grid import Coding
from microtome.loading import load
from microtome.packing import COMPRESSED, GPTQ, Packing
from microtome.pipeline import Result
from microtome.source import open_source

CPU = torch.device("cpu")
ROUND: dict[str, Any] = {"method": "gptq", "measure": False}
FUSED = "phi3-window"  # queries, keys and values are one matrix
PACKED = ("llama", "opt-tied", FUSED, "gpt_neox")


def numbers(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def quantise(bits: int, group: int = 0, *, symmetric: bool = True, shape: tuple[int, int] = (24, 64)) -> Quantise:
    """Codes, scales and zeros by lot."""
    coding = Coding(bits, group, symmetric)
    groups = coding.groups(shape[1])
    scale = 0.01 + torch.rand(shape[0], groups, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zero = numbers(shape[0], groups, bits, 2)
    middle = torch.full_like(zero, 1 << (bits - 1))
    return Quantise("a.weight", numbers(*shape, bits), scale.half().double(), middle if symmetric else zero, coding)


def parts(edit: Quantise, form: str = COMPRESSED) -> dict[str, Tensor]:
    made = Packing(form, edit.coding, {"a.weight": (edit.codes.shape[0], edit.codes.shape[1])}, ())
    places = {"a.weight": Stored("a.weight")}
    found = made.packed({"a.weight": edit.value, "b": torch.ones(1)}, [edit], places, torch.float32)
    assert torch.equal(found.pop("b"), torch.ones(1))
    assert sum(one.numel() * one.element_size() for one in found.values()) == made.nbytes(*edit.codes.shape, 4)
    return found


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_words_hold_the_bits_of_a_row_one_behind_the_other(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = numbers(rows, columns, bits, seed)
    made = packing.words(codes, bits)
    assert made.shape == (rows, -(-columns * bits // 32))
    for row, have in zip(codes.tolist(), made.tolist(), strict=True):
        whole = sum(code << (bits * place) for place, code in enumerate(row))
        assert [word % (1 << 32) for word in have] == [
            (whole >> (32 * place)) % (1 << 32) for place in range(len(have))
        ]


def test_rows_are_packed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = numbers(7, 20, 3)
    want = packing.words(codes, 3)
    monkeypatch.setattr(packing, "CHUNK", 2)
    assert torch.equal(packing.words(codes, 3), want)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_parts_are_those_of_the_format_s_own_library(bits: int, group: int, symmetric: bool) -> None:
    """Byte for byte, from the values alone, and back to the values."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    edit = quantise(bits, group, symmetric=symmetric)
    have = parts(edit)
    said = Packing(COMPRESSED, edit.coding, {}, ()).fields()["quantization_config"]
    scheme = schemes.QuantizationScheme(**said["config_groups"]["group_0"])
    library = compressors.BaseCompressor.get_value_from_registry(said["format"])
    values = {"weight": edit.value.float(), "weight_scale": edit.scale.float()}
    values["weight_zero_point"] = (edit.zero.int() - (1 << (bits - 1))).to(torch.int8)
    want = library.compress(values, scheme)
    assert {name.removeprefix("a.") for name in have} == set(want)
    for name, tensor in want.items():
        assert torch.equal(have[f"a.{name}"], tensor), name
    again = library.decompress({name.removeprefix("a."): one for name, one in have.items()}, scheme)
    assert torch.equal(again["weight"], edit.value.float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqs_parts_by_hand(bits: int, symmetric: bool) -> None:
    """Words along the inputs, zeros less one a word along the outputs, scales in fp16."""
    edit = quantise(bits, 16, symmetric=symmetric, shape=(16, 64))
    have = parts(edit, GPTQ)
    each, top = 32 // bits, (1 << bits) - 1
    assert (have["a.scales"].dtype, have["a.g_idx"].tolist()) == (torch.float16, [column // 16 for column in range(64)])
    wide = sum(1 << (bits * place) for place in range(each))
    for row in range(16):
        for column in range(0, 64, 7):
            word = have["a.qweight"][column // each, row].item() >> (bits * (column % each)) & top
            lifted = (have["a.qzeros"][column // 16, row // each].item() + wide) % (1 << 32)
            zero = lifted >> (bits * (row % each)) & top
            value = (word - zero) * have["a.scales"][column // 16, row].item()
            assert value == pytest.approx(edit.value[row, column].item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("form", [COMPRESSED, GPTQ])
def test_values_are_codes_less_zero_times_scale(form: str, tmp_path: Path) -> None:
    """One by one; and our own reader finds them again."""
    from safetensors.torch import save_file

    for bits in range(2, 9) if form == COMPRESSED else (2, 4, 8):
        edit = quantise(bits, 16, symmetric=False, shape=(16, 64))
        want = torch.tensor([
            [(edit.codes[i, j].item() - edit.zero[i, j // 16].item()) * edit.scale[i, j // 16].item() for j in range(64)]
            for i in range(16)
        ], dtype=torch.float64)  # fmt: skip
        assert torch.equal(edit.value, want)
        place = tmp_path / str(bits)
        place.mkdir()
        save_file(parts(edit, form), place / "model.safetensors")
        said = Packing(form, edit.coding, {}, ()).fields()
        (place / "config.json").write_text(json.dumps(TINY["llama"] | {"dtype": "float32"} | said))
        with open_source(place) as source:
            assert torch.equal(source.tensor("a.weight"), want.float())


# --- whole models ---------------------------------------------------------------------------------------------------


@cache
def rounded(name: str, **options: Any) -> Result:
    told = "-".join(f"{key}{value}" for key, value in options.items())
    return compress(folder(name), home() / f"packed-{name}-{told}", options=options, **ROUND)


@pytest.mark.parametrize(
    ("name", "symmetric"), [*((name, True) for name in PACKED), ("opt-tied", False), (FUSED, False)]
)
def test_transformers_loads_what_is_packed(name: str, symmetric: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Its class, with the format's own library, has the logits of the same values stored as plain numbers."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    packed, plain = rounded(name, symmetric=symmetric), rounded(name, symmetric=symmetric, store="dense")
    want = logits(load(plain.folder, device=CPU), HELD_OUT)
    model = AutoModelForCausalLM.from_pretrained(packed.folder)
    capfd.readouterr()  # the library shows how far it is
    assert type(model) is type(stock(name))
    assert error(logits(model, HELD_OUT), want) <= 1e-5
    assert torch.equal(logits(packed.load(), HELD_OUT), want)
    assert error(want, logits(stock(name), HELD_OUT)) > 1e-3
    assert packed.after.nbytes is not None
    assert packed.after.nbytes < 0.4 * (plain.after.nbytes or 0)
    assert (packed.after.stored, packed.after.decoder) == (plain.after.stored, plain.after.decoder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"bits": 3, "symmetric": False}) for name in (*PACKED, "gpt2-tied")),
        ("llama", {}), (FUSED, {"group": 8, "bits": 8}), ("llama", {"store": "dense"}), ("llama", {"store": "gptq"}),
    ],
)  # fmt: skip
def test_bytes_are_counted_before_they_are_written(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", options={"sweep": False, **options}, **ROUND)
    dry = preview(folder(name), method="gptq", options=options)
    assert dry.after == result.after
    stored = weights(tmp_path / "out").values()
    assert result.after.nbytes == sum(one.numel() * one.element_size() for one in stored)
    assert result.after.stored == result.before.stored


def test_only_linears_inside_the_blocks_are_packed() -> None:
    before, after = weights(folder("opt-untied-gelu")), weights(rounded("opt-untied-gelu").folder)
    packed = {name.removesuffix("_packed") for name in after if name.endswith("_packed")}
    assert packed == {name for name in before if ".layers." in name and before[name].ndim == 2}
    assert all(torch.equal(after[name], before[name]) for name in set(before) - packed)
    said = json.loads((rounded("opt-untied-gelu").folder / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head"]
    assert said["format"] == "pack-quantized"


@pytest.mark.parametrize("symmetric", [True, False])
def test_our_own_decoder_is_packed_too(symmetric: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With shortcuts, which stay as they are."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    options = {"basis": "junction", "gauge": "dense"}
    cut = compress(folder("llama"), tmp_path / "cut", slice=0.25, options=options)
    assert not cut.stock
    result = compress(cut.folder, tmp_path / "out", options={"symmetric": symmetric}, **ROUND)
    want = logits(result.load(), HELD_OUT)
    assert error(logits(AutoModelForCausalLM.from_pretrained(result.folder), HELD_OUT), want) <= 1e-5
    capfd.readouterr()
    before, after = weights(cut.folder), weights(result.folder)
    assert any("shortcut" in name for name in before)
    assert all(torch.equal(after[name], before[name]) for name in before if "shortcut" in name)


def test_short_floats_are_the_same_packed_and_plain(tmp_path: Path) -> None:
    """Scales are rounded before weights are: codes of a bf16 model stand for the very numbers of a plain result."""
    made = [
        compress(folder("llama"), tmp_path / store, options={"store": store, "bits": 8}, dtype="bfloat16", **ROUND)
        for store in ("compressed-tensors", "dense")
    ]
    with open_source(made[0].folder) as packed, open_source(made[1].folder) as plain:
        assert packed.names() == plain.names()
        assert all(torch.equal(packed.tensor(name), plain.tensor(name)) for name in plain.names())


def test_gptqs_format_holds_the_same_model(tmp_path: Path) -> None:
    """In fp16, as its scales are."""
    model = built(TINY["llama"] | {"intermediate_size": 64})
    options = {"group": 16, "symmetric": False, "sweep": False}
    made = [
        compress(model, tmp_path / store, options=options | {"store": store}, dtype="float16", **ROUND)
        for store in ("gptq", "dense")
    ]
    assert torch.equal(logits(made[0].load(), HELD_OUT), logits(made[1].load(), HELD_OUT))
    said = json.loads((made[0].folder / "config.json").read_text())["quantization_config"]
    assert {name: said[name] for name in ("quant_method", "bits", "group_size", "sym", "desc_act")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False
    }  # fmt: skip
    assert made[0].library == "gptqmodel"
    stored = sum(one.numel() * one.element_size() for one in weights(made[0].folder).values())
    assert made[0].after.nbytes == stored < (made[1].after.nbytes or 0)


# --- what is told, and what is refused ------------------------------------------------------------------------------


def test_reports_tell_what_loads_it() -> None:
    result = rounded("llama", symmetric=True)
    card = (result.folder / "README.md").read_text()
    assert "stock checkpoint: loads with transformers and compressed-tensors" in card
    assert (
        "weights are packed as compressed-tensors, 4 bits, a scale for each row: transformers needs `pip install"
        in card
    )
    dense = rounded("llama", symmetric=True, store="dense")
    assert "loads with transformers alone" in (dense.folder / "README.md").read_text()
    assert dense.library is None


def test_what_no_format_can_say_is_plain(tmp_path: Path) -> None:
    """GPT-2 has its linears transposed: with `auto` a note tells, else it is refused."""
    result = compress(folder("gpt2-tied"), tmp_path / "out", options={"bits": 8, "sweep": False}, **ROUND)
    (note,) = result.notes
    assert note.startswith("quantised weights are stored as plain numbers, no smaller than before: transformer.h.0.")
    assert weights(tmp_path / "out").keys() == weights(folder("gpt2-tied")).keys()
    with raises(
        BadInput, r"store=compressed-tensors: transformer\.h\.0\.attn\.c_attn\.weight is stored transposed, in a"
    ):
        compress(folder("gpt2-tied"), tmp_path / "no", options={"store": "compressed-tensors"}, **ROUND)


def test_what_gptqs_words_cannot_hold(tmp_path: Path) -> None:
    with raises(BadInput, "store=gptq: a word does not hold whole numbers of 3 bits"):
        compress(folder("llama"), tmp_path / "no", options={"store": "gptq", "bits": 3}, **ROUND)
    uneven = arch.lower(TINY["llama"] | {"intermediate_size": 84})
    with pytest.raises(packing.Unsaid, match=r"gate_proj\.weight is 84 x 48, no multiples of 8 numbers a word"):
        packing.planned(GPTQ, Coding(4), arch.find("llama"), uneven, wrapped=False)
    with pytest.raises(packing.Unsaid, match="its loader knows architectures by name"):
        packing.planned(GPTQ, Coding(4), arch.find(arch.OWN), uneven, wrapped=False)
    with pytest.raises(packing.Unsaid, match="inside a multimodal wrapper"):
        packing.planned(COMPRESSED, Coding(4), arch.find("llama"), uneven, wrapped=True)


@pytest.mark.parametrize("later", ["fasp", "restore", "gptq"])
def test_nothing_comes_behind_codes(later: str, tmp_path: Path) -> None:
    step: Any = later if later == "restore" else {later: {} if later == "gptq" else {"keep": 0.9}}
    recipe = {"steps": [{"gptq": {}}, step]}
    with raises(BadInput, f"gptq puts weights in codes, and {later} would change them: put gptq last"):
        compress(folder("llama"), tmp_path / "no", recipe=recipe)


# --- other people's quantisers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"basis": "junction"}])
def test_torchao_takes_what_was_cut(options: dict[str, Any], tmp_path: Path) -> None:
    """Stock or Microtome: int8 weights lie within half a step of what was cut, and the model runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries for a GPU
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    result = compress(folder("llama"), tmp_path / "out", slice=0.25, options=options)
    assert result.stock == (not options)
    plain, model = result.load(), result.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(
            model,
            quantization.Int8WeightOnlyConfig(),
            filter_fn=lambda part, name: isinstance(part, torch.nn.Linear) and ".layers." in name,
        )
        have = logits(model, HELD_OUT)
    for block, other in zip(model.model.layers, plain.model.layers, strict=True):
        values, weight = block.mlp.up_proj.weight.dequantize(), other.mlp.up_proj.weight
        assert (values - weight).abs().max() <= 0.51 * weight.abs().max() / 127
        assert not torch.equal(values, weight)
    assert error(have, logits(plain, HELD_OUT)) < 0.2


@pytest.mark.parametrize("options", [{}, {"basis": "junction"}])
def test_llm_compressor_takes_what_was_cut(options: dict[str, Any], tmp_path: Path) -> None:
    """Stock or Microtome: rounded or by its GPTQ, codes lie near what was cut, and its folder loads as it was saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressor = pytest.importorskip("llmcompressor", reason="llm-compressor has an environment of its own")
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

        result = compress(folder("llama"), tmp_path / "out", slice=0.25, options=options)
        rows_of_8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        said = {"config_groups": {"all": {"targets": ["Linear"], "weights": rows_of_8}}, "ignore": ["lm_head"]}
        plain, model = result.load(), result.load()
        compressor.oneshot(model=model, recipe=QuantizationModifier(**said))
        model.save_pretrained(tmp_path / "rounded")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype=torch.float32).eval()
        have, loaded, want = (logits(one, HELD_OUT) for one in (model, again, plain))
        assert 0.0 < error(have, want) < 0.2
        assert error(loaded, have) < 1e-3
        for block, other in zip(model.model.layers, plain.model.layers, strict=True):
            values, weight = block.mlp.up_proj.weight, other.mlp.up_proj.weight
            step = weight.abs().amax(1, keepdim=True) / 127.5
            assert ((values - weight).abs() <= 1.02 * step).all()
        rows, fitted = DataLoader([{"input_ids": row} for row in CALIBRATION], batch_size=1), result.load()
        compressor.oneshot(model=fitted, dataset=rows, processor=object(), recipe=GPTQModifier(**said))
        assert 0.0 < error(logits(fitted, HELD_OUT), want) < 0.2
