"""Model folders for tests, whole and broken, and the one way in which they may be refused."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from microtome.errors import MicrotomeError

CONFIG = {"model_type": "llama", "hidden_size": 4}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 4, generator=generator),
        "attention.bias": torch.ones(1, 3, 3, dtype=torch.uint8),
        "norm.weight": torch.randn(4, generator=generator).bfloat16(),
        "half.weight": torch.randn(3, 5, generator=generator).half(),
        "scale": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
        "position_ids": torch.arange(3),
    }


def model(folder: Path, weights: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors() if weights is None else weights, folder / SINGLE, metadata={"format": "pt"})
    return folder


def sharded(folder: Path, weight_map: dict[str, Any] | None = None, **shards: dict[str, Tensor]) -> Path:
    """A folder of shards `one.safetensors`, ...; the index is right unless `weight_map` says otherwise."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, weights in shards.items():
        save_file(weights, folder / f"{name}.safetensors")
    right = {name: f"{shard}.safetensors" for shard, weights in shards.items() for name in weights}
    (folder / INDEX).write_text(json.dumps({"weight_map": right if weight_map is None else weight_map}))
    return folder


def raw(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A folder whose only weight file has this header, well formed or not."""
    model(folder)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return folder


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


class Ran(NamedTuple):
    """What the console script came to."""

    code: int
    out: str
    err: str


def raises(kind: type[MicrotomeError], words: str) -> "pytest.RaisesExc[MicrotomeError]":
    def one_line_of_that_kind(error: BaseException) -> bool:
        return type(error) is kind and "\n" not in str(error)

    return pytest.raises(kind, match=words, check=one_line_of_that_kind)
