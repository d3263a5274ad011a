"""Loading what was written, as a user does: transformers' auto classes, on a device, in a type."""

from pathlib import Path
from typing import Any

import torch

from microtome.errors import BadInput, MicrotomeError, UnknownName, UnsupportedModel, is_out_of_memory

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type that a user named; None for "auto", which keeps the checkpoint's own."""
    if name is None or name == "auto":
        return None
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise UnknownName("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """The device that a user named; "auto" is the first accelerator, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"no device named {name!r}: use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {name}: this machine, or this build of torch, has no CUDA device. Use --device cpu.")
    return device


def register() -> None:
    """Teach transformers' auto classes our decoder; doing it twice is harmless."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from microtome.modeling_microtome import MicrotomeConfig, MicrotomeForCausalLM, MicrotomeModel

    AutoConfig.register("microtome", MicrotomeConfig, exist_ok=True)
    AutoModel.register(MicrotomeConfig, MicrotomeModel, exist_ok=True)
    AutoModelForCausalLM.register(MicrotomeConfig, MicrotomeForCausalLM, exist_ok=True)


def load(
    folder: str | Path, *, device: torch.device, dtype: torch.dtype | None = None, revision: str | None = None
) -> Any:
    """The model of a folder or hub id in evaluation mode; code that a checkpoint ships is not run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    register()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype or "auto", revision=revision or "main", trust_remote_code=False
        )
    except MicrotomeError:
        raise
    except Exception as error:  # transformers raises many kinds; the fact is the same
        if is_out_of_memory(error):
            raise
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModel(f"transformers cannot load {folder}: {line.strip()}") from error
    placed: Any = model
    return placed.to(device).eval()


def tokenizer_of(folder: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub id; None where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), revision=revision or "main", trust_remote_code=False)
    except Exception:
        return None
