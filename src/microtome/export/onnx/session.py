"""A decoder in ONNX Runtime, its cache handed over from step to step as the file's inputs and outputs name it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microtome.errors import BadInput
from microtome.verdict import absent

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
TEXT = ("input_ids", "attention_mask", "position_ids")
QUIET = 3  # errors only


def runtime() -> Any:
    """The package `onnxruntime`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise absent("onnxruntime", "onnx") from error
    return onnxruntime


@dataclass(frozen=True, eq=False)
class Session:
    """A loaded file: its inputs by name, and the names of its outputs."""

    engine: Any
    inputs: dict[str, Any]
    outputs: list[str]

    @classmethod
    def opened(cls, path: Path, threads: int | None = None) -> "Session":
        """Load a file on the CPU. Raises BadInput where it is no decoder with a cache, or none at all."""
        library = runtime()
        options = library.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = QUIET
        try:
            engine = library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises many kinds
            raise BadInput(f"ONNX Runtime cannot load {path}: {' '.join(str(error).split())[:300]}") from error
        inputs = {one.name: one for one in engine.get_inputs()}
        outputs = [one.name for one in engine.get_outputs()]
        odd = [name for name in inputs if name not in TEXT and not name.startswith("past_key_values.")]
        if "input_ids" not in inputs or outputs[:1] != ["logits"] or odd:
            raise BadInput(
                f"{path} is no decoder as `microtome export` writes it: it wants {', '.join(odd) or 'no input_ids'}, "
                f"and gives {outputs[0] if outputs else 'nothing'} first."
            )
        return cls(engine, inputs, outputs)

    def empty(self, batch: int) -> dict[str, Any]:
        """A cache of nothing, for so many texts."""
        return {
            name: self.value(np.zeros((batch, one.shape[1], 0, one.shape[3]), NUMPY[one.type]))
            for name, one in self.inputs.items()
            if name not in TEXT
        }

    def value(self, array: Any) -> Any:
        """An array as the engine wants it."""
        return runtime().OrtValue.ortvalue_from_numpy(array)

    def step(self, ids: Tensor, cache: dict[str, Any], past: int) -> tuple[Any, dict[str, Any]]:
        """Logits of ids [B, T] that stand behind `past` others, and the cache that holds them too.

        Logits stay with the engine until `.numpy()` is asked of them.
        """
        batch, length = ids.shape
        text = {
            "input_ids": ids,
            "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
            "position_ids": torch.arange(past, past + length).expand(batch, length).contiguous(),
        }
        feed = {name: self.value(text[name].numpy()) for name in TEXT if name in self.inputs}
        logits, *present = self.engine.run_with_ort_values(self.outputs, feed | cache)
        names = [name.replace("present.", "past_key_values.", 1) for name in self.outputs[1:]]
        return logits, dict(zip(names, present, strict=True))
