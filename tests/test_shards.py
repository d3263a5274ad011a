"""Faults in a model folder: each is found when it is opened, and told apart from the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import INDEX, SINGLE, entry, model, raises, raw, sharded
from safetensors.torch import save_file

from microtome.errors import BadCheckpoint, MicrotomeError, UnsupportedModel
from microtome.source import open_source


def test_a_folder_without_config(tmp_path: Path) -> None:
    with raises(BadCheckpoint, r"has no config\.json"):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with raises(UnsupportedModel, "holds an adapter. Merge it"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", r"config\.json is not JSON"),
        (b"", r"config\.json is not JSON"),
        (b"\xff\xfe{}", r"config\.json is not JSON"),
        (b"[" * 100_000, r"config\.json is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "has no model_type"),
        (b'{"model_type": 3}', "has no model_type"),
    ],
)
def test_a_broken_config(tmp_path: Path, text: bytes, words: str) -> None:
    (model(tmp_path) / "config.json").write_bytes(text)
    with raises(BadCheckpoint, words):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        (
            [],
            BadCheckpoint,
            r"neither model\.safetensors nor .*index\.json; it holds: config\.json\. Download the weights",
        ),
        (["tf_model.h5"], BadCheckpoint, r"it holds: config\.json, tf_model\.h5"),
        (["training_args.bin"], BadCheckpoint, r"it holds: config\.json\."),
        ([f"{n:02}.txt" for n in range(12)], BadCheckpoint, r"07\.txt, \.\.\.\. Download"),
        (["model-00001-of-00002.safetensors"], BadCheckpoint, r"has model-00001.*Download the missing file"),
        (
            ["pytorch_model.bin"],
            UnsupportedModel,
            r"only pickle weights \(pytorch_model\.bin\).*python -c .*from_pretrained",
        ),
        (["consolidated.00.pth"], UnsupportedModel, r"only pickle weights .*save_pretrained"),
        (["model.pt", "a.gguf"], UnsupportedModel, "only pickle weights"),
        (["model-q4.gguf"], UnsupportedModel, r"only GGUF \(model-q4\.gguf\)"),
    ],
)
def test_weights_that_are_missing_or_of_another_kind(
    tmp_path: Path, files: list[str], kind: type[MicrotomeError], words: str
) -> None:
    (model(tmp_path) / SINGLE).unlink()
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with raises(kind, words):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"quantization_config": {"quant_method": "aqlm", "bits": 2}},
            r"quantization_config \(aqlm, 2 bits\).*dequantised copy",
        ),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"\(mxfp4\): the model is quantised"),
        ({"compression_config": {"format": "pack"}}, "compression_config"),
        ({"quantization": {"group_size": 64, "bits": 8}}, r"quantization \(unnamed method, 8 bits\)"),
        ({"quantization_config": "odd"}, "unnamed method"),
    ],
)
def test_a_config_that_says_quantised(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (model(tmp_path, **config) / SINGLE).unlink()
    with raises(UnsupportedModel, words):
        open_source(tmp_path)


def test_an_empty_quantization_config_is_none(tmp_path: Path) -> None:
    open_source(model(tmp_path, quantization_config=None)).close()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("q.weight", torch.float8_e4m3fn),
        ("q.bias", torch.float8_e5m2),
        ("q.weight", torch.int8),
        ("q.weight", torch.uint8),
        ("q.qweight", torch.int32),
        ("q.weight_packed", torch.int32),
        ("q.SCB", torch.int8),
        ("q.weight", torch.uint32),
    ],
)
def test_types_that_only_quantisation_stores(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    with raises(UnsupportedModel, rf"model\.safetensors stores {name} as \w+: the model is quantised"):
        open_source(model(tmp_path, {name: torch.zeros(4).to(dtype)}))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0"])
def test_narrow_floats_without_a_torch_type(tmp_path: Path, dtype: str) -> None:
    with raises(UnsupportedModel, rf"a as {dtype}: the model is quantised"):
        open_source(raw(tmp_path, {"a": entry(dtype, [4], 0, 4)}, bytes(4)))


def test_a_type_that_is_not_read(tmp_path: Path) -> None:
    with raises(UnsupportedModel, r"stores a as C64\. Give a checkpoint of BF16"):
        open_source(raw(tmp_path, {"a": entry("C64", [1], 0, 8)}, bytes(8)))


@pytest.mark.parametrize(
    "shard", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors"]
)
def test_an_index_that_leaves_the_folder(tmp_path: Path, shard: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with raises(BadCheckpoint, "names a shard outside its folder.*Do not use this checkpoint"):
        open_source(sharded(tmp_path / "m", {"a": shard}, one={"a": torch.ones(1)}))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "two.safetensors"}, r"names two\.safetensors, which is not there"),
        ({"a": "pytorch_model.bin"}, "not a safetensors file"),
        ({"a": 3}, "outside its folder: 3"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, r"places b in one\.safetensors, which does not hold it"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, weight_map: dict[str, Any], words: str) -> None:
    with raises(BadCheckpoint, words):
        open_source(sharded(tmp_path / "m", weight_map, one={"a": torch.ones(1)}))


def test_an_index_that_is_not_json(tmp_path: Path) -> None:
    (sharded(tmp_path / "m", one={"a": torch.ones(1)}) / INDEX).write_text("{")
    with raises(BadCheckpoint, r"index\.json is not JSON"):
        open_source(tmp_path / "m")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {"one": {"a": torch.ones(1)}, "two": {"a": torch.ones(1), "b": torch.ones(1)}}
    with raises(BadCheckpoint, r"holds a twice, in one\.safetensors and in two\.safetensors"):
        open_source(sharded(tmp_path / "m", {"a": "one.safetensors", "b": "two.safetensors"}, **shards))


def test_every_truncation_is_found_at_opening(tmp_path: Path) -> None:
    whole = (model(tmp_path) / SINGLE).read_bytes()
    for size in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with raises(BadCheckpoint, "truncated"):
            open_source(tmp_path)


GOOD = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{nonsense", b"", r"corrupt header \("),
        (b"\xff\xff", b"", "corrupt header"),
        ([], b"", r"corrupt header \(not a JSON object\)"),
        ({}, b"", "without a single tensor"),
        ({"a": 3}, b"", "a lacks a dtype, a shape or offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "a lacks a dtype, a shape or offsets"),
        ({"a": entry("F32", ["2"], 0, 8)}, bytes(8), r"a has the shape \['2'\]"),
        ({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8), "a has the shape"),
        ({"a": entry("F32", [0, 1 << 80], 0, 0)}, b"", "a has the shape"),
        ({"a": entry("F32", [3], 0, 8)}, bytes(8), r"a: 8 bytes are not F32 of shape \[3\]"),
        ({"a": entry("F32", [2], 4, 12)}, bytes(12), r"a begins at byte \d+ instead of"),
        ({"a": entry("F32", [2], -8, 0)}, b"", "a begins at byte"),
        ({"a": GOOD, "b": GOOD}, bytes(8), "b begins at byte"),
        ({"a": GOOD}, bytes(9), "has 1 bytes after its last tensor"),
    ],
)
def test_a_corrupt_header(tmp_path: Path, header: object, data: bytes, words: str) -> None:
    with raises(BadCheckpoint, words):
        open_source(raw(tmp_path, header, data))


def test_a_header_of_absurd_length(tmp_path: Path) -> None:
    with raises(BadCheckpoint, r"corrupt header \(a length of 1,152,921,504,606,846,976 bytes\)"):
        open_source(raw(tmp_path, {"a": GOOD}, bytes(8), length=1 << 60))


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    (model(tmp_path) / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with raises(BadCheckpoint, "Git LFS pointer.*git lfs pull"):
        open_source(tmp_path)
