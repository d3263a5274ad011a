"""Loading what was written, as a user does: transformers' auto classes, on a device, in a type."""

from pathlib import Path
from typing import Any

import torch

from microtome.errors import BadInput, MicrotomeError, UnknownName, UnsupportedModel, is_out_of_memory
from microtome.source import open_source

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


def auto_class(config: Any) -> Any:
    """The auto class that makes a model with a head for text of a config: a decoder alone, or in a wrapper."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto

    wrappers = {
        AutoModelForImageTextToText: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForMultimodalLM: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return next((one for one, known in wrappers.items() if type(config) in known), AutoModelForCausalLM)


def linear_classes() -> tuple[type, ...]:
    """The modules that multiply by a weight: torch's Linear, and the Conv1D of GPT-2, which stores it transposed."""
    from transformers.pytorch_utils import Conv1D

    return (torch.nn.Linear, Conv1D)


def dequantised(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model of a quantised folder without the library that made it; None where that is no folder."""
    from transformers import AutoConfig

    if not folder.is_dir():
        return None
    with open_source(folder) as source:
        assert source.quantised is not None
        config = AutoConfig.for_model(**source.config)
        tensors = {name: source.tensor(name) for name in source.names()}
    with torch.device("meta"):
        made = type(auto_class(config).from_config(config))
    return made.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype or source.quantised.dtype)


def load(
    folder: str | Path, *, device: torch.device, dtype: torch.dtype | None = None, revision: str | None = None
) -> Any:
    """The model of a folder or hub id in evaluation mode; code that a checkpoint ships is not run."""
    from transformers import AutoConfig
    from transformers.utils import logging

    register()
    logging.disable_progress_bar()
    common: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(folder), **common)
        model = dequantised(Path(folder), dtype) if getattr(config, "quantization_config", None) else None
        if model is None:
            model = auto_class(config).from_pretrained(str(folder), dtype=dtype or "auto", **common)
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
