"""llama.cpp in a process of its own, for what it cannot load ends the process that tries.

Run by path, so that Microtome itself is not imported: `python -P llama_cpp_process.py TASK IN OUT ARGUMENT...`.

    logits IN OUT IDS       logits [T, V] of token ids (a .npy), in fp32 with an fp32 cache, to a .npy
    greedy IN OUT IDS       the likeliest token after every prefix of the ids [T], to a .npy; with xllamacpp
    quantise IN OUT NUMBER  a file of another type, by its number in llama.cpp
"""

import ctypes
import sys
from typing import Any

import numpy as np


def logits(model: str, out: str, ids: str) -> None:
    """Logits by llama-cpp-python."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    tokens = np.load(ids).tolist()
    engine = llama_cpp.Llama(
        model, n_ctx=len(tokens), n_batch=max(32, len(tokens)), logits_all=True, verbose=False, type_k=0, type_v=0,
        flash_attn=False, n_gpu_layers=0, n_threads=1, n_threads_batch=1,
    )  # fmt: skip
    engine.eval(tokens)
    np.save(out, np.array(engine.scores[: len(tokens)], dtype=np.float32))


def greedy(model: str, out: str, ids: str) -> None:
    """Next tokens by xllamacpp, which leaves out the end of a text and a part of a character: then -1."""
    import xllamacpp as library

    xllamacpp: Any = library
    tokens = np.load(ids).tolist()
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.warmup, settings.n_gpu_layers = len(tokens) + 2, False, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # two that wait for each other may be slow
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    asked = {"n_predict": 1, "temperature": 0.0, "top_k": 1, "logprobs": 1}
    found: list[int] = []
    for end in range(1, len(tokens) + 1):
        said = server.handle_completions({**asked, "prompt": tokens[:end]})
        content = (said["choices"][0].get("logprobs") or {}).get("content") or [{"id": -1}]
        found.append(content[0]["id"])
    np.save(out, np.array(found, dtype=np.int64))


def quantise(model: str, out: str, number: str) -> None:
    """Another type by llama-cpp-python."""
    import llama_cpp as library  # pyright: ignore[reportMissingImports]

    llama_cpp: Any = library
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(number)
    failed = llama_cpp.llama_model_quantize(model.encode(), out.encode(), ctypes.byref(settings))
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


if __name__ == "__main__":
    {"logits": logits, "greedy": greedy, "quantise": quantise}[sys.argv[1]](*sys.argv[2:])
