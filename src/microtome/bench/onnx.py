"""ONNX Runtime on the CPU: the cache is handed over from step to step."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from microtome import export
from microtome.bench.work import Matrix, Place, Settings, Workload, given_file
from microtome.errors import BadInput
from microtome.export.onnx import MODEL
from microtome.export.onnx.graph import library
from microtome.export.onnx.session import Session, runtime
from microtome.loading import device_of

ALIGNED = 16


def version() -> str:
    """Package and version."""
    library()
    return f"onnxruntime {runtime().__version__}"


def placed(model: str, settings: Settings, folder: Path) -> Place:
    """A file, a folder that holds one, or one that is made of a checkpoint."""
    if device_of(settings.device).type != "cpu":
        raise BadInput("--engine onnx runs on the CPU: pass --device cpu.")
    inside = Path(model) / MODEL
    path = given_file(str(inside) if inside.is_file() else model, "onnx", settings)
    if path is None:
        made = export.export(model, to="onnx", out=folder / "out", verify=False, dtype=settings.dtype or "float32")
        return Place(str(made.files[0]), weights(made.files[0]))
    return Place(str(path), weights(path), given=True)


def weights(path: Path) -> int:
    """Bytes of a graph and of the files with its tensors."""
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside(path))


def beside(path: Path) -> set[str]:
    """Names of the files that hold a graph's tensors."""
    return {
        entry.value for tensor in graph(path).initializer for entry in tensor.external_data if entry.key == "location"
    }


def graph(path: Path) -> Any:
    """The graph of a file, without what lies beside it."""
    onnx = library()
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf raises kinds of its own
        raise BadInput(f"{path} is no ONNX file.") from error


def matrices(path: str) -> Mapping[str, Matrix]:
    """What the graph stores; a linear lies there as [in, out]."""
    onnx = library()
    return {
        one.name: Matrix(tuple(one.dims), onnx.TensorProto.DataType.Name(one.data_type).lower())
        for one in graph(Path(path)).initializer
        if len(one.dims) == 2
    }


class Runtime:
    """A session of ONNX Runtime; `dtype` is that of the cache, which is that of the weights."""

    def __init__(self, session: Session) -> None:
        self.session = session
        caches = [one.type for name, one in session.inputs.items() if name.startswith("past")]
        self.dtype = {"tensor(float)": "float32", "tensor(float16)": "float16"}.get(caches[0] if caches else "", "")
        self.vocabulary = int(session.engine.get_outputs()[0].shape[2])

    def seconds(self, work: Workload) -> float:
        """Seconds of one prefill, or of `tokens` greedy steps behind one that is not timed."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (work.batch, work.prompt), generator=generator)
        cache = self.session.empty(work.batch)
        start = time.perf_counter()
        logits, cache = self.session.step(ids, cache, 0)
        if work.kind == "prefill":
            return time.perf_counter() - start
        last = likeliest(logits)
        start = time.perf_counter()
        for number in range(work.tokens):
            logits, cache = self.session.step(last, cache, work.prompt + number)
            last = likeliest(logits)
        return time.perf_counter() - start


def likeliest(logits: Any) -> torch.Tensor:
    """The next token of every text [B, 1]."""
    return torch.from_numpy(logits.numpy()[:, -1:].argmax(-1))


def opened(path: str, settings: Settings) -> Runtime:
    """The file in a session of so many threads."""
    return Runtime(Session.opened(Path(path), settings.threads))
