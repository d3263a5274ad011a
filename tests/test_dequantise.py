"""Quantised checkpoints, packed here number by number as their formats say, and read back.

Every oracle is a list of whole numbers with its scales, multiplied out in Python; transformers' own fp8 code is one more.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import raises
from models import TINY, error, ids, logits, stock, stored
from safetensors.torch import save_file
from tinies import HELD_OUT, compress, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from microtome import dequantise, planner, running, shards
from microtome.errors import BadCheckpoint, NumericalFailure, UnsupportedModel
from microtome.loading import load
from microtome.pipeline import preview
from microtome.source import open_source

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
Stored = dict[str, Tensor]


# --- formats, by hand -----------------------------------------------------------------------------------------------


def numbers(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def scales(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.005 + 0.02 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def words(values: list[int], bits: int) -> list[int]:
    """Unsigned numbers one behind the other in signed 32-bit words, the first in the lowest bits."""
    each, out = 32 // bits, []
    for start in range(0, len(values), each):
        word = sum(value << (bits * place) for place, value in enumerate(values[start : start + each]))
        out.append(word - (1 << 32) if word >= 1 << 31 else word)
    return out


def packed(values: Tensor, bits: int) -> Tensor:
    """Words [R, ceil(C bits / 32)] of whole numbers [R, C]."""
    return torch.tensor([words(row, bits) for row in values.tolist()], dtype=torch.int32)


def product(values: Tensor, zero: Callable[[int, int], int], scale: Callable[[int, int], float]) -> Tensor:
    """Every number less its zero point, times its scale, in fp64."""
    rows = [
        [(value - zero(i, j)) * scale(i, j) for j, value in enumerate(row)] for i, row in enumerate(values.tolist())
    ]
    return torch.tensor(rows, dtype=torch.float64)


def nothing(_row: int, _column: int) -> int:
    return 0


def block_fp8(
    weight: Tensor, block: tuple[int, int] | None = (16, 32), kind: torch.dtype = torch.float8_e4m3fn
) -> tuple[Stored, Tensor]:
    rows, columns = weight.shape
    high, wide = block or (rows, columns)
    q = (20 * weight).to(kind)
    s = scales((-(-rows // high), -(-columns // wide)), 1)
    s = s if block else s.reshape(())
    of = (lambda i, j: float(s[i // high, j // wide])) if block else (lambda _i, _j: float(s))
    return {".weight": q, ".weight_scale_inv": s}, product(q.double(), nothing, of)


def gptq(weight: Tensor, bits: int = 4, form: str = "gptq", *, shuffled: bool = False) -> tuple[Stored, Tensor]:
    outputs, inputs = weight.shape
    size = 16
    q, s = numbers((outputs, inputs), 0, 1 << bits, 2), scales((inputs // size, outputs), 3, torch.float16)
    z = numbers((inputs // size, outputs), 1, 1 << bits, 4)
    group = torch.arange(inputs) // size
    if shuffled:
        group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(5))]
    parts = {
        ".qweight": packed(q, bits).T.contiguous(),
        ".qzeros": packed(z - int(form == "gptq"), bits),
        ".scales": s,
        ".g_idx": group.int(),
    }
    return parts, product(q, lambda i, j: int(z[group[j], i]), lambda i, j: float(s[group[j], i]))


def awq(weight: Tensor) -> tuple[Stored, Tensor]:
    outputs, inputs = weight.shape
    size, order = 16, [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight columns lies in which four bits
    q, z = numbers((inputs, outputs), 0, 16, 6), numbers((inputs // size, outputs), 0, 16, 7)
    s = scales((inputs // size, outputs), 8, torch.float16)

    def turned(values: Tensor) -> Tensor:
        return packed(torch.stack([values[:, 8 * (j // 8) + order[j % 8]] for j in range(values.shape[1])], 1), 4)

    want = product(q.T, lambda i, j: int(z[j // size, i]), lambda i, j: float(s[j // size, i]))
    return {".qweight": turned(q), ".qzeros": turned(z), ".scales": s}, want


def rows_packed(weight: Tensor, bits: int = 4, size: int | None = 16, *, zero: bool = False) -> tuple[Stored, Tensor]:
    """compressed-tensors' pack-quantized; without `size` one scale for each row."""
    outputs, inputs = weight.shape
    size = size or inputs
    half = 1 << (bits - 1)
    q, s = numbers((outputs, inputs), -half, half, 9), scales((outputs, inputs // size), 10, torch.bfloat16)
    z = numbers((outputs, inputs // size), -half, half, 11) if zero else torch.zeros(outputs, inputs // size).long()
    parts = {
        ".weight_packed": packed(q + half, bits),
        ".weight_scale": s,
        ".weight_shape": torch.tensor([outputs, inputs]),
    }
    if zero:
        parts[".weight_zero_point"] = packed((z + half).T, bits).T.contiguous()
    return parts, product(q, lambda i, j: int(z[i, j // size]), lambda i, j: float(s[i, j // size]))


def one_by_one(weight: Tensor, how: str) -> tuple[Stored, Tensor]:
    """compressed-tensors' float-quantized and int-quantized, by tensor, row, group of columns or block."""
    rows, columns = weight.shape
    grid = {
        "tensor": (1, 1),
        "row": (rows, 1),
        "group": (rows, columns // 16),
        "block": (-(-rows // 16), -(-columns // 16)),
    }
    s = scales(grid[how], 12, torch.bfloat16)
    high, wide = -(-rows // s.shape[0]) if how != "block" else 16, -(-columns // s.shape[1]) if how != "block" else 16
    stored_scale = s.reshape(1) if how == "tensor" else s
    of = lambda i, j: float(s[i // high, j // wide])  # noqa: E731
    if how in {"tensor", "block"}:
        q = (20 * weight).to(torch.float8_e4m3fn)
        return {".weight": q, ".weight_scale": stored_scale}, product(q.double(), nothing, of)
    q, z = numbers((rows, columns), -128, 128, 13), numbers((rows, s.shape[1]), -9, 9, 14)
    parts = {".weight": q.to(torch.int8), ".weight_scale": s, ".weight_zero_point": z.to(torch.int8)}
    return parts, product(q, lambda i, j: int(z[i, j // wide]), of)


def four_bits(weight: Tensor, kind: str = "nf4", *, nested: bool = False) -> tuple[Stored, Tensor]:
    size, count = 64, weight.numel()
    code = torch.linspace(-1, 1, 16) ** 3
    q = numbers((count,), 0, 16, 15).tolist()
    blocks = -(-count // size)
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(weight.shape),
    }  # fmt: skip
    parts: Stored = {
        ".weight": torch.tensor([[16 * a + b] for a, b in zip(q[::2], q[1::2], strict=True)], dtype=torch.uint8),
        ".weight.quant_map": code,
    }
    if nested:
        table, levels, top = scales((256,), 16), numbers((blocks,), 0, 256, 17), scales((-(-blocks // 8),), 18)
        parts |= {
            ".weight.absmax": levels.to(torch.uint8),
            ".weight.nested_absmax": 30 * top,
            ".weight.nested_quant_map": table,
        }
        state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = [
            float(table[level]) * 30 * float(top[place // 8]) + 0.25 for place, level in enumerate(levels.tolist())
        ]
    else:
        absmax = scales((blocks,), 19).tolist()
        parts[".weight.absmax"] = torch.tensor(absmax)
    said = list(json.dumps(state).encode())
    parts[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(said, dtype=torch.uint8)
    want = [float(code[number]) * absmax[place // size] for place, number in enumerate(q)]
    return parts, torch.tensor(want, dtype=torch.float64).reshape(weight.shape)


def eight_bits(weight: Tensor) -> tuple[Stored, Tensor]:
    q, s = numbers(tuple(weight.shape), -127, 128, 20), scales((len(weight),), 21)
    parts = {".weight": q.to(torch.int8), ".SCB": s, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, product(q, nothing, lambda i, _j: float(s[i]) / 127)


def groups(**said: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": said}}}


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32], "activation_scheme": "dynamic"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[Stored, Tensor]]]] = {
    "fp8": (FP8, block_fp8),
    "fp8 e5m2": (FP8, lambda w: block_fp8(w, kind=torch.float8_e5m2)),
    "fp8 ragged": (FP8 | {"weight_block_size": [20, 36]}, lambda w: block_fp8(w, (20, 36))),
    "fp8 one scale": (FP8 | {"weight_block_size": None}, lambda w: block_fp8(w, None)),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq),
    "gptq act order": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, shuffled=True)),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8}, lambda w: gptq(w, 8)),
    "gptq 2 bits v2": (
        {"quant_method": "gptq", "bits": 2, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, 2, "gptq_v2")
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "packed rows": (groups(num_bits=4, type="int"), rows_packed),
    "packed rows, zero points": (groups(num_bits=4, type="int"), lambda w: rows_packed(w, zero=True)),
    "packed rows, 8 bits": (groups(num_bits=8, type="int"), lambda w: rows_packed(w, 8, None)),
    "packed rows, 2 bits": (groups(num_bits=2, type="int"), lambda w: rows_packed(w, 2, zero=True)),
    "float by tensor": (groups(num_bits=8, type="float"), lambda w: one_by_one(w, "tensor")),
    "float by block": (groups(block_structure=[16, 16]), lambda w: one_by_one(w, "block")),
    "int by row": (groups(num_bits=8, type="int"), lambda w: one_by_one(w, "row")),
    "int by group": (groups(num_bits=8, type="int"), lambda w: one_by_one(w, "group")),
    "nf4": (BNB, four_bits),
    "fp4, nested": (BNB, lambda w: four_bits(w, "fp4", nested=True)),
    "int8": ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, eight_bits),
}  # fmt: skip


def quantised(name: str, tensors: Stored) -> tuple[Stored, Stored]:
    """A checkpoint's linears in a format, and what they stand for, in bf16; the rest is plain in both."""
    make = FORMATS[name][1]
    held, want = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        if not key.endswith("proj.weight"):
            held[key] = want[key] = tensor.bfloat16()
            continue
        parts, numbers_ = make(tensor)
        held |= {key.removesuffix(".weight") + ending: part.contiguous() for ending, part in parts.items()}
        want[key] = numbers_.bfloat16()
    return held, want


def written(place: Path, tensors: Stored, **config: Any) -> Path:
    place.mkdir(parents=True)
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    fields = TINY["llama"] | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(fields | config))
    return place


def small(place: Path, name: str, **changes: Tensor | None) -> Path:
    """One quantised weight, with some parts changed or left out (None)."""
    facts, make = FORMATS[name]
    parts = {f"a{ending}": part.contiguous() for ending, part in make(torch.ones(32, 64))[0].items()}
    parts |= {f"a.{key}": value for key, value in changes.items() if value is not None}
    gone = {f"a.{key}" for key, value in changes.items() if value is None}
    kept = {key: value for key, value in parts.items() if key not in gone}
    return written(place, kept, quantization_config=facts)


# --- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(32, 64), (80, 48)])
def test_a_weight_is_the_numbers_that_its_format_says(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    facts, make = FORMATS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts, want = make(weight)
    tensors = {f"a{ending}": part.contiguous() for ending, part in parts.items()}
    tensors |= {"a.input_scale": torch.ones(1), "b.weight": torch.ones(3)}
    with open_source(written(tmp_path / "m", tensors, quantization_config=facts, dtype="float32")) as source:
        assert source.names() == ("a.weight", "b.weight")
        assert (source.shape("a.weight"), source.dtype("a.weight")) == (shape, torch.float32)
        torch.testing.assert_close(source.tensor("a.weight").double(), want, rtol=1e-6, atol=1e-9)
        assert torch.equal(source.tensor("b.weight"), torch.ones(3))
        assert "a.input_scale" not in source
        assert "quantization_config" not in source.config
        with raises(BadCheckpoint, "no tensor named 'a.input_scale'"):
            source.tensor("a.input_scale")
    assert source.digest() == open_source(source.folder).digest()


def test_fp8_comes_out_as_from_transformers(tmp_path: Path) -> None:
    """Bit for bit, with scales in fp32, as exponents in a type of their own, and as exponents in plain bytes."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    exponents = numbers((4, 3), 110, 130, 1).to(torch.uint8)
    for number, scale in enumerate([scales((4, 3), 1), exponents.view(torch.float8_e8m0fnu), exponents]):
        place = small(tmp_path / str(number), "fp8", weight=weight, weight_scale_inv=scale)
        oracle: Any = Fp8Dequantize(None)
        with open_source(place) as source:
            assert torch.equal(source.tensor("a.weight"), oracle._dequantize_one(weight, scale, torch.bfloat16))


@pytest.mark.parametrize("said", [{}, {"g_idx": None}])
def test_without_an_index_groups_follow_one_another(said: dict[str, None], tmp_path: Path) -> None:
    with open_source(small(tmp_path / "m", "gptq", **said)) as source:
        torch.testing.assert_close(source.tensor("a.weight"), gptq(torch.ones(32, 64))[1].bfloat16(), rtol=0, atol=0)


def test_every_format_that_is_announced_is_read() -> None:
    assert tuple(dequantise.FORMATS) == shards.DEQUANTISED
    assert {facts["quant_method"] for facts, _ in FORMATS.values()} == set(shards.DEQUANTISED)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": None}, torch.bfloat16),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
    ],
)
def test_the_type_is_what_the_model_was_trained_in(config: dict[str, Any], dtype: torch.dtype) -> None:
    assert dequantise.result_type(config) == dtype


# --- from end to end ------------------------------------------------------------------------------------------------


@cache
def plain_tensors() -> Stored:
    return {name: tensor for name, tensor in stored(stock("llama")).items()}  # noqa: C416 - a copy


@pytest.mark.parametrize("name", ["fp8", "gptq", "awq", "packed rows", "nf4"])
def test_a_quantised_model_is_cut_as_what_it_stands_for(name: str, tmp_path: Path) -> None:
    """The oracle is the same model, written plain."""
    held, want = quantised(name, plain_tensors())
    source = written(tmp_path / "quantised", held, quantization_config=FORMATS[name][0])
    plain = written(tmp_path / "plain", want)
    for chosen in ({"slice": 0.25}, {"keep": 1.0}):
        out = tmp_path / next(iter(chosen))
        result = compress(source, out, **chosen)
        compress(plain, tmp_path / "expected", overwrite=True, **chosen)
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
        assert json.loads((out / "config.json").read_text()) == json.loads(
            (tmp_path / "expected/config.json").read_text()
        )
        method = FORMATS[name][0]["quant_method"]
        assert f"the source was dequantised from {method} to bfloat16" in result.notes[0]
        assert result.before.nbytes == sum(tensor.nbytes for tensor in held.values())
        assert preview(source, **chosen).after == preview(plain, **chosen).after == result.after
    assert all(torch.equal(tensor, want[key]) for key, tensor in weights(tmp_path / "keep").items())


@pytest.mark.parametrize("name", ["fp8", "gptq"])
def test_a_quantised_model_is_measured_without_its_library(name: str, tmp_path: Path) -> None:
    held, want = quantised(name, plain_tensors())
    source = written(tmp_path / "quantised", held, quantization_config=FORMATS[name][0])
    plain = written(tmp_path / "plain", want)
    assert error(logits(load(source, device=CPU), ids()), logits(load(plain, device=CPU), ids())) == 0
    assert next(AutoModelForCausalLM.from_pretrained(plain).parameters()).dtype == torch.bfloat16
    found = running.evaluate(str(source), HELD_OUT, baseline=str(plain), device="cpu")
    assert len({one.nll for one in found.values()}) == 1
    result = compress(source, tmp_path / "out", slice=0.25, measure=True, eval_data=HELD_OUT)
    assert result.perplexity_before is not None
    assert result.perplexity_before.nll == next(iter(found.values())).nll


def test_memory_is_reckoned_for_what_a_quantised_model_becomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for twice the files, and not for four bytes a number."""
    held, _ = quantised("gptq", plain_tensors())
    source = written(tmp_path / "quantised", held, quantization_config=FORMATS["gptq"][0])
    files, count = sum(tensor.nbytes for tensor in held.values()), sum(one.numel() for one in plain_tensors().values())
    room = 2.0 * 2 * 0.7 * count
    assert 2 * files < room < 4 * count
    monkeypatch.setattr("microtome.pipeline.free_memory", lambda: room / 0.8)
    result = compress(source, tmp_path / "out", slice=0.34, measure=True, eval_data=HELD_OUT)
    assert result.perplexity_before is None
    assert result.perplexity_after is not None
    assert any("perplexity of the original was not measured: it does not fit" in note for note in result.notes)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["aqlm", "mxfp4", "hqq", "modelopt", "quip"])
def test_other_methods_are_refused_with_what_to_do(method: str, tmp_path: Path) -> None:
    place = written(tmp_path / "m", {"a.weight": torch.ones(2)}, quantization_config={"quant_method": method})
    words_ = (
        rf"quantization_config \({method}\): the model is quantised. Give the checkpoint that it was quantised from, or a "
        "dequantised copy; awq, bitsandbytes, compressed-tensors, fp8, gptq are read as they are"
    )
    with raises(UnsupportedModel, words_):
        open_source(place)


E2 = {"a.weight": torch.ones(2)}
NVFP4 = {"weight_global_scale": torch.ones(1)}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor | None], str]] = {
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, {}, "its checkpoint_format is 'marlin'; gptq and gptq_v2 are"),
    "3 bits": ("gptq", {"bits": 3}, {"g_idx": None}, r"a\.qweight has 3 bits a number; 2, 4 and 8 are read"),
    "gemv": ("awq", {"version": "gemv"}, {}, "its version is 'gemv' with 4 bits; gemm with 4 is read"),
    "rotated": ("packed rows", {"transform_config": {"r1": {}}}, {}, "it has a transform_config"),
    "sparse": ("packed rows", {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "it has a sparsity_config"),
    "nvfp4": ("packed rows", {}, NVFP4, r"a is in a format with two levels of scales \(nvfp4\)"),
    "mxfp8": (
        "float by tensor", {}, {"weight_scale": torch.ones(1, dtype=torch.uint8)}, r"scales of a\.weight are exponents"
    ),
    "odd bits": (
        "packed rows", {}, {"weight_packed": torch.ones(32, 6, dtype=torch.int32)}, r"a\.weight_packed is not 2 to 8 b"
    ),
    "GPU order": ("int8", {}, {"weight_format": torch.tensor(1, dtype=torch.uint8)}, "lies in an order of a GPU's own"),
    "no scales": ("fp8", {}, {"weight_scale_inv": None}, r"a\.weight is stored as float8_e4m3fn without what fp8 sto"),
    "no zero points": ("packed rows", {}, {"weight_scale": None}, r"a\.weight_packed is stored as int32 without what"),
    "scaled twice": ("fp8", {}, {"weight": torch.ones(32, 64)}, r"a\.weight has scales and is no fp8"),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_that_are_not_read_are_refused(case: str, tmp_path: Path) -> None:
    name, facts, parts, words_ = VARIANTS[case]
    place = small(tmp_path / "m", name, **parts)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = FORMATS[name][0] | facts
    (place / "config.json").write_text(json.dumps(config))
    with raises(
        UnsupportedModel, rf"cannot be dequantised: .*{words_}.*Give the checkpoint that it was quantised from"
    ):
        open_source(place)


@pytest.mark.parametrize(
    ("name", "parts", "words_"),
    [
        ("gptq", {"qzeros": None}, r"the quantised checkpoint lacks a\.qzeros\. Download it again"),
        ("awq", {"scales": None}, r"lacks a\.scales"),
        ("fp8", {"weight": None}, r"lacks a\.weight\."),
        ("packed rows", {"weight_shape": None}, r"lacks a\.weight_shape"),
        ("gptq", {"weight": torch.ones(32, 64)}, r"holds a\.weight twice, quantised and plain"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    name: str, parts: dict[str, Tensor | None], words_: str, tmp_path: Path
) -> None:
    with raises(BadCheckpoint, words_):
        open_source(small(tmp_path / "m", name, **parts))


def test_a_config_that_calls_plain_weights_quantised_is_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "m", plain_tensors(), quantization_config={"quant_method": "gptq", "bits": 4})
    with raises(
        BadCheckpoint, r"config\.json says gptq, and no tensor is stored that way. Remove its quantization_con"
    ):
        open_source(place)


def test_a_grid_of_another_size_is_refused_when_it_is_read(tmp_path: Path) -> None:
    with (
        open_source(small(tmp_path / "m", "fp8", weight_scale_inv=torch.ones(3, 2))) as source,
        raises(BadCheckpoint, r"scales of shape \[3, 2\] do not fit a weight of shape \[32, 64\] in blocks of 16 x 32"),
    ):
        source.tensor("a.weight")


def test_scales_that_are_not_finite_are_found(tmp_path: Path) -> None:
    held, _ = quantised("fp8", plain_tensors())
    key = next(key for key in held if key.endswith("scale_inv"))
    held[key] = torch.full_like(held[key], torch.nan)
    place = written(tmp_path / "m", held, quantization_config=FP8)
    with open_source(place) as source:
        found = planner.opened(source)
        with raises(NumericalFailure, r"proj\.weight in .*model\.safetensors is NaN or infinite in [\d,]+ of"):
            for block in range(3):
                found.read(block)
