"""llama.cpp: through llama-cpp-python's low-level calls, or where only xllamacpp is installed by its server's timings.

Both have batches: so many texts side by side, each with a cache of its own.
"""

import ctypes
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microtome import export
from microtome.bench.work import Engine, Matrix, Place, Settings, Workload, given_file
from microtome.errors import BadInput, UnsupportedModel
from microtome.loading import device_of
from microtome.verdict import absent

ALIGNED = 32
LAYERS_ON_GPU = 999  # all of them
SPARE = 32  # positions beyond what is asked


def version() -> str:
    """Package and version; the low-level one first."""
    for name in ("llama-cpp-python", "xllamacpp"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    raise absent("llama.cpp (llama-cpp-python, or xllamacpp)", "gguf")


def placed(model: str, settings: Settings, folder: Path) -> Place:
    """A file, or one that is made of a checkpoint: in the type to quantise to, else in --dtype, else in fp32."""
    path = given_file(model, "llamacpp", settings)
    if path is not None:
        return Place(str(path), path.stat().st_size, given=True)
    kinds = () if settings.quantize is None else (settings.quantize,)
    folder.mkdir(parents=True, exist_ok=True)
    made = export.export(
        model, to="gguf", out=folder, quantize=kinds, verify=False, dtype=settings.dtype or "float32"
    ).files[0]
    return Place(str(made), made.stat().st_size)


def reader(path: str) -> Any:
    """A file's fields and tensors."""
    try:
        import gguf
    except ImportError as error:
        raise absent("gguf", "gguf") from error
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the library raises many kinds
        raise BadInput(f"{path} is no GGUF file.") from error


def matrices(path: str) -> Mapping[str, Matrix]:
    """What the file stores; rows are what is quantised in blocks."""
    return {
        one.name: Matrix(tuple(int(size) for size in reversed(one.shape)), str(one.tensor_type.name))
        for one in reader(path).tensors
        if len(one.shape) == 2
    }


def file_type(path: str) -> str:
    """What a file says of its types, such as Q8_0 or Q4_K_M."""
    import gguf

    field = reader(path).get_field("general.file_type")
    if field is None:
        return "unknown"
    return gguf.LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def has_words(path: str) -> bool:
    """Whether a file holds a tokenizer."""
    field = reader(path).get_field("tokenizer.ggml.model")
    return field is not None and str(field.contents()) not in {"none", "no_vocab"}


def opened(path: str, settings: Settings) -> Engine:
    """The file in whichever package there is."""
    layers = 0 if device_of(settings.device).type == "cpu" else LAYERS_ON_GPU
    if version().startswith("llama-cpp-python"):
        return Direct(path, settings.threads, layers, repack=settings.repack)
    if not has_words(path):
        raise UnsupportedModel(
            f"{Path(path).name} has no tokenizer, and xllamacpp's server ends without one: give a model with one, or "
            "pip install llama-cpp-python."
        )
    return Served(path, settings.threads, layers, repack=settings.repack)


# --- llama-cpp-python -----------------------------------------------------------------------------------------------


class Direct:
    """A model behind llama.cpp's own functions."""

    def __init__(self, path: str, threads: int, layers: int, *, repack: bool = True) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.lib: Any = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds no reference
        self.lib.llama_log_set(self.quiet, ctypes.c_void_p(0))
        self.lib.llama_backend_init()
        options = self.lib.llama_model_default_params()
        options.n_gpu_layers, options.use_extra_bufts = layers, repack
        self.model = self.lib.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise UnsupportedModel(f"llama.cpp cannot load {path}.")
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model)))
        self.threads, self.dtype = threads, file_type(path)

    def context(self, work: Workload) -> Any:
        """A cache for the texts of a workload; prompts go through at once."""
        options = self.lib.llama_context_default_params()
        options.n_ctx = work.batch * (work.prompt + work.tokens + SPARE)
        options.n_batch = work.batch * work.prompt
        options.n_seq_max, options.n_threads, options.n_threads_batch = work.batch, self.threads, self.threads
        made = self.lib.llama_init_from_model(self.model, options)
        if not made:
            raise BadInput(f"llama.cpp has no memory for {work.text()}: use fewer --batch or a shorter --prompt.")
        return made

    def seconds(self, work: Workload) -> float:
        """Seconds of one prefill, or of `tokens` greedy steps behind one that is not timed."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (work.batch, work.prompt), generator=generator).tolist()
        context, batch = self.context(work), self.lib.llama_batch_init(work.batch * work.prompt, 0, 1)
        try:
            start = time.perf_counter()
            last = self.step(context, batch, ids, 0)
            if work.kind == "prefill":
                return time.perf_counter() - start
            start = time.perf_counter()
            for number in range(work.tokens):
                last = self.step(context, batch, [[one] for one in last], work.prompt + number)
            return time.perf_counter() - start
        finally:
            self.lib.llama_batch_free(batch)
            self.lib.llama_free(context)

    def step(self, context: Any, batch: Any, rows: list[list[int]], past: int) -> list[int]:
        """Run rows of new tokens, and return the likeliest next one of each; only their logits are made."""
        ends: list[int] = []
        batch.n_tokens = 0
        for text, row in enumerate(rows):
            for number, token in enumerate(row):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, past + number
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, text
                batch.logits[at] = number == len(row) - 1
                batch.n_tokens += 1
            ends.append(batch.n_tokens - 1)
        if failed := self.lib.llama_decode(context, batch):
            raise BadInput(f"llama.cpp stopped with {failed}: use fewer --batch or a shorter --prompt.")
        scores = (self.lib.llama_get_logits_ith(context, end) for end in ends)
        return [int(np.ctypeslib.as_array(one, (self.vocabulary,)).argmax()) for one in scores]


# --- xllamacpp ------------------------------------------------------------------------------------------------------


class Served:
    """A model behind xllamacpp's server, asked by as many threads as there are texts; times are the server's own.

    All prompts go through in one batch where they come together. A text that came early decodes beside the prompts of
    the others, so of several decoding times the shortest counts, and of prompts the longest.
    """

    def __init__(self, path: str, threads: int, layers: int, *, repack: bool = True) -> None:
        import xllamacpp

        self.lib, self.path, self.threads, self.layers, self.repack = xllamacpp, path, threads, layers, repack
        self.dtype = file_type(path)
        self.vocabulary = max(shape.shape[0] for name, shape in matrices(path).items() if name == "token_embd.weight")
        self.size, self.server = (0, 0), None

    def ready(self, work: Workload) -> Any:
        """A server with room for a workload; it loads the model again where the last one had less."""
        size = (work.batch, work.prompt + work.tokens + SPARE)
        if self.server is None or size != self.size:
            options = self.lib.CommonParams()
            options.model.path, options.n_gpu_layers, options.warmup = self.path, self.layers, False
            options.n_parallel, options.n_ctx = size[0], size[0] * size[1]
            options.n_batch = max(work.batch * work.prompt, SPARE)
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = self.threads
            options.cache_ram_mib, options.cont_batching, options.verbosity = 0, True, -1
            options.no_extra_bufts = not self.repack
            self.server = None  # before the next one loads, so that only one is in memory
            self.server, self.size = self.lib.Server(options), size
        return self.server

    def seconds(self, work: Workload) -> float:
        """Seconds of one prefill, or of `tokens` greedy steps behind one."""
        server, generator = self.ready(work), torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (work.batch, work.prompt), generator=generator).tolist()
        tokens = 1 if work.kind == "prefill" else work.tokens + 1
        asked = {"n_predict": tokens, "temperature": 0.0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}
        with ThreadPoolExecutor(work.batch) as pool:
            said = list(pool.map(lambda row: server.handle_completions({**asked, "prompt": row}), ids))
        times = [one["timings"] for one in said]
        if work.kind == "prefill":
            return max(float(one["prompt_ms"]) for one in times) / 1000
        return min(float(one["predicted_ms"]) for one in times) / 1000
