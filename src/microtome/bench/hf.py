"""transformers: the folder itself, greedy steps with its own cache."""

import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from microtome.bench.work import Matrix, Place, Settings, Workload
from microtome.errors import BadInput
from microtome.loading import device_of, dtype_of, load
from microtome.source import open_source

ALIGNED = 64


def version() -> str:
    """Package and version."""
    return f"transformers {metadata.version('transformers')}"


def placed(model: str, settings: Settings, folder: Path) -> Place:  # noqa: ARG001 - every engine has the whole signature
    """A model folder or hub id, as it is."""
    if Path(model).is_file():
        raise BadInput(f"{model} is a file, and --engine hf takes a model folder or hub id.")
    with open_source(model) as source:
        return Place(model, source.nbytes)


def matrices(path: str) -> Mapping[str, Matrix]:
    """What the folder stores."""
    with open_source(path) as source:
        return {
            name: Matrix(source.shape(name), str(source.dtype(name)).removeprefix("torch."))
            for name in source.names()
            if len(source.shape(name)) == 2
        }


class Transformers:
    """A model of transformers."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")

    def seconds(self, work: Workload) -> float:
        """Seconds of one run."""
        return timed(self.model, work, self.device)


def opened(path: str, settings: Settings) -> Transformers:
    """The model on its device, in fp32 on a CPU unless told."""
    device = device_of(settings.device)
    dtype = dtype_of(settings.dtype) or (torch.float32 if device.type == "cpu" else None)
    return Transformers(load(path, device=device, dtype=dtype), device)


@torch.inference_mode()
def timed(model: Any, work: Workload, device: torch.device) -> float:
    """Seconds of one prefill, or of `tokens` greedy steps behind one that is not timed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (work.batch, work.prompt), generator=generator).to(device)
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    finish()
    if work.kind == "prefill":
        return time.perf_counter() - start
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(work.tokens):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
    finish()
    return time.perf_counter() - start
