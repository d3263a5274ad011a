"""ONNX: a folder with model.onnx, config.json and the tokenizer.

The graph is written operator by operator from the canonical decoder (`decoder`), not traced: no model is built, weights
pass through one part at a time, and what a trace takes seconds per block for takes milliseconds. Names are those that
ONNX Runtime GenAI, transformers.js and optimum use: `input_ids`, `attention_mask`, `position_ids`,
`past_key_values.N.key` and `.value`; `logits`, `present.N.key` and `.value`. N is the number of the block; a block
without attention has no cache.
"""

import json
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microtome import layout, verdict
from microtome.checkpoint import companions
from microtome.errors import BadInput
from microtome.export.onnx import decoder as decoders
from microtome.export.onnx import genai
from microtome.export.onnx.graph import INLINE, Graph, library
from microtome.export.onnx.session import Session, runtime
from microtome.planner import Opened
from microtome.shards import CONFIG
from microtome.verdict import Verdict

if TYPE_CHECKING:
    from microtome.export import Request

SUMMARY = "a decoder with a cache, for ONNX Runtime, ONNX Runtime GenAI and transformers.js"
EXTRA = "onnx"
QUANTIZE: tuple[str, ...] = ()
SUFFIX = ""

MODEL = "model.onnx"
DATA = "model.onnx.data"
STEPS = 16  # tokens that a verification decodes one by one
TOLERANCE = {torch.float32: 4e-5, torch.float16: 2e-2}


def unfit(opened: Opened) -> str | None:
    """Why the graph cannot say a decoder."""
    return decoders.unfit(opened.config)


def stored_type(opened: Opened, request: "Request") -> torch.dtype:
    """The type of the weights in the file: float32, or float16 where the checkpoint has it or the user asks for it."""
    if request.dtype == torch.bfloat16:
        raise BadInput("ONNX Runtime has no bfloat16 on a CPU: give --dtype float32 or float16.")
    if request.dtype is None and opened.dtype not in TOLERANCE:
        request.say(f"weights are {str(opened.dtype).removeprefix('torch.')}; the file holds them as float32.")
        return torch.float32
    return request.dtype or opened.dtype


def write(opened: Opened, folder: Path, request: "Request") -> list[Path]:
    """Write the folder; more than 64 MB of weights lie in a file of their own beside the graph."""
    library()
    dtype, config, parts = stored_type(opened, request), opened.config, layout.parts(opened.config)
    count = sum(prod(shape) for part in parts for shape in layout.shapes(config, part).values())
    data = folder / DATA if count * dtype.itemsize > INLINE else None

    def read(part: layout.Part) -> dict[str, Tensor]:
        request.report("parts", (parts.index(part) + 1) / len(parts))
        return opened.read(part)

    with Graph(dtype, data) as graph:
        decoders.decoder(graph, config, read)
        graph.save(folder / MODEL)
    fields = {name: value for name, value in opened.fields.items() if name != "auto_map"}
    beside = [written(folder / CONFIG, fields)]
    if genai.even(config):
        beside.append(written(folder / genai.NAME, genai.settings(config, fields, MODEL)))
    else:
        request.say(f"{genai.NAME} is left out: ONNX Runtime GenAI wants caches of one size in every block.")
    for name, path in companions(opened.source).items():
        (folder / name).parent.mkdir(exist_ok=True)
        beside.append(Path(shutil.copyfile(path, folder / name)))
    return [folder / MODEL, *([] if data is None else [data]), *beside]


def written(path: Path, value: object) -> Path:
    """A file of JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def verify(opened: Opened, files: Sequence[Path], request: "Request") -> Verdict:
    """A prompt at once and tokens one by one through the cache, held against our own decoder, which has no cache."""
    engine = f"ONNX Runtime {runtime().__version__}"
    model, config = verdict.reference(opened), opened.config
    steps = max(0, min(STEPS, config.max_position_embeddings - 1))
    ids = verdict.probe(config, max(1, min(verdict.TOKENS, config.max_position_embeddings - steps)))
    prompt = ids.shape[1]
    for _ in range(steps):
        ids = torch.cat((ids, verdict.logits(model, ids)[-1:].argmax(-1, keepdim=True)), dim=1)
    found = stepwise(Session.opened(files[0]), ids, prompt)
    tolerance = TOLERANCE[stored_type(opened, request)]
    return verdict.held(f"{engine}, {steps} of them through the cache", verdict.logits(model, ids), found, tolerance)


def stepwise(session: Session, ids: Tensor, prompt: int) -> Tensor:
    """Logits [T, V] of ids [1, T]: the first `prompt` at once, the others one at a time."""
    found, cache = list[Tensor](), session.empty(1)
    starts = [0, *range(prompt, ids.shape[1])]
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        logits, cache = session.step(ids[:, start:end], cache, start)
        found.append(torch.from_numpy(logits.numpy()[0]))
    return torch.cat(found)
