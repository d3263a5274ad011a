"""vLLM: the folder itself, where the package is installed; eager or compiled is its own choice."""

import importlib
import importlib.util
import os
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from microtome.bench import hf
from microtome.bench.work import Matrix, Place, Settings, Workload
from microtome.errors import UnsupportedModel
from microtome.loading import SHORT
from microtome.verdict import Absent

ALIGNED = 64


def version() -> str:
    """Package and version; builds for a CPU are published under another name."""
    if importlib.util.find_spec("vllm") is None:
        raise Absent("vLLM is not installed: pip install vllm, in an environment of its own.")
    names = metadata.packages_distributions().get("vllm", ["vllm"])
    return f"{names[0]} {metadata.version(names[0])}"


def placed(model: str, settings: Settings, folder: Path) -> Place:
    """A model folder or hub id, as it is."""
    return hf.placed(model, settings, folder)


def matrices(path: str) -> Mapping[str, Matrix]:
    """What the folder stores."""
    return hf.matrices(path)


class Vllm:
    """A model in vLLM, without its cache of prompts."""

    def __init__(self, path: str, settings: Settings) -> None:
        self.library: Any = importlib.import_module("vllm")  # no dependency, so nothing that a checker could read
        self.engine = self.library.LLM(
            model=path,
            dtype=SHORT.get(settings.dtype or "", settings.dtype or "auto"),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        config = self.engine.llm_engine.model_config
        self.dtype, self.vocabulary = str(config.dtype).removeprefix("torch."), int(config.get_vocab_size())

    def seconds(self, work: Workload) -> float:
        """Seconds until the first token, or of `tokens` more."""
        first = self.generation(work, 1)
        return first if work.kind == "prefill" else self.generation(work, work.tokens + 1) - first

    def generation(self, work: Workload, tokens: int) -> float:
        """Seconds of one call that makes so many tokens of every text."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (work.batch, work.prompt), generator=generator).tolist()
        asked = self.library.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self.engine.generate([{"prompt_token_ids": row} for row in ids], asked, use_tqdm=False)
        return time.perf_counter() - start


def opened(path: str, settings: Settings) -> Vllm:
    """The model in this process: a child of it would have children of its own, which this one may not have."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    try:
        return Vllm(path, settings)
    except Exception as error:  # vLLM raises many kinds
        raise UnsupportedModel(f"vLLM cannot load {path}: {' '.join(str(error).split())[:300]}") from error
