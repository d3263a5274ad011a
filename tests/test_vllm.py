"""Results in vLLM: log-probabilities and greedy tokens are those of our decoder, on its classes, on its Transformers
backend with the code that a folder ships, and on the class of the plug-in, split over two devices too.

vLLM runs in processes of its own, several folders in each (served.py); here only our decoder runs, and no vLLM is
imported. They need an environment with vLLM in which Microtome is installed: `make test-vllm`.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import RAGGED, SMALL, built, decoder, dense, ids, random_tensors, widths
from safetensors.torch import save_file
from tinies import home
from torch import Tensor

import microtome
from microtome.cut import own_config
from microtome.loading import load
from microtome.modeling_microtome import MicrotomeConfig

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

VOCABULARY, MORE = 61, 6
PROMPTS = [ids(rows=1, length=length, vocabulary=VOCABULARY, seed=length)[0].tolist() for length in (20, 11, 5)]
CALIBRATION = ids(rows=16, length=64, vocabulary=VOCABULARY)
STOCK: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "llama": STOCK | {"model_type": "llama"},
    "mistral": STOCK | {"model_type": "mistral", "sliding_window": None},
    "qwen3": STOCK | {"model_type": "qwen3"},
    "wide": STOCK | {"model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "head_dim": 64},
}
FFN, HEADS = {"spaces": "ffn"}, {"spaces": "heads"}
CLASSES = {  # a stock result, and the class of vLLM that runs it
    "global llama": ("llama", {"method": "slicegpt", "keep": 0.7, "multiple_of": 8}, "LlamaForCausalLM"),
    "global llama at a width for mistral": (
        "llama",
        {"method": "slicegpt", "slice": 0.31, "multiple_of": 2},
        "MistralForCausalLM",
    ),
    "global mistral": ("mistral", {"method": "slicegpt", "keep": 0.7}, "MistralForCausalLM"),
    "global qwen3": ("qwen3", {"method": "slicegpt", "keep": 0.7}, "Qwen3ForCausalLM"),
    "neurons of llama": ("llama", {"method": "fasp", "keep": 0.8, "options": FFN}, "LlamaForCausalLM"),
    "neurons of qwen3": ("qwen3", {"method": "fasp", "keep": 0.8, "options": FFN}, "Qwen3ForCausalLM"),
    "heads of llama": ("llama", {"method": "magnitude", "keep": 0.8, "options": HEADS}, "LlamaForCausalLM"),
    "blocks of llama": ("llama", {"method": "depth", "keep": 0.5}, "LlamaForCausalLM"),
}
CUT = {  # results that no stock class can say
    "junction": {"method": "slicegpt", "keep": 0.7, "options": {"basis": "junction"}},
    "modegpt": {"method": "modegpt", "keep": 0.7},
    "halves": {"method": "depth", "keep": 0.6, "options": {"unit": "half"}},
}
WIDE: dict[str, Any] = SMALL | {"head_dim": 32}  # heads that vLLM's attention has on a CPU
BACKEND: dict[str, MicrotomeConfig] = {  # what --target vllm lets through, and vLLM runs without the plug-in
    name: MicrotomeConfig(**WIDE | fields, per_layer_config=blocks)
    for name, (blocks, fields) in {
        "dense shortcuts": (widths((20, 22, 18), (18, 26, 18), (18, 16, 24), **dense()), {}),
        "neurons": ({0: {"intermediate_size": 8}, 2: {"intermediate_size": 12}}, {}),
        "groups": ({0: {"num_attention_heads": 2, "num_key_value_heads": 1}}, {}),
        "no neurons": ({1: {"skip": ["mlp"]}}, {}),
        "index subsets": ({0: {"attn_read_size": 10, "attn_write_size": 14, "mlp_read_size": 9}}, {}),
        "pairs": ({1: {"rotary_pairs": 4, "rotary_subset": True}}, {}),
        "divisor and scale": ({1: {"attention_scale": 0.3}}, {"norm_divisor": 40}),
        "soft caps": (None, {"attention_softcap": 2.0, "logits_softcap": 3.0}),
        "scaled logits": (None, {"logits_scale": 0.4}),
        "windows": (None, {"sliding_window": 4, "layer_types": ["full_attention", *["sliding_attention"] * 2]}),
    }.items()
}
SPLIT = decoder(  # for two devices: groups that are shared out, and one that is repeated; halves missing; subsets
    {
        0: {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "rotary_pairs": 3, "rotary_subset": True},
        1: {"num_key_value_heads": 1, "v_head_dim": 5, "intermediate_size": 14, "attn_write_size": 11},
        2: {"skip": ["self_attn"], "mlp_read_size": 9},
    },
    attention_bias=True, attention_out_bias=True, mlp_bias=True, mlp_out_bias=True, head_bias=True,
)  # fmt: skip


# --- folders, and what they are held against ------------------------------------------------------------------------


def source(kind: str) -> Path:
    place = home() / f"vllm-{kind}"
    if not place.exists():
        built(SOURCES[kind]).save_pretrained(place)
    return place


def cut(kind: str, out: str, **asked: Any) -> Path:
    place = home() / f"vllm-{out.replace(' ', '-')}"
    microtome.compress(source(kind), out=place, data=CALIBRATION, measure=False, device="cpu", **asked)
    return place


def written(name: str, config: MicrotomeConfig) -> Path:
    """A folder of our format with its code, as results have it."""
    place = home() / f"vllm-own-{name.replace(' ', '-').replace(',', '')}"
    place.mkdir()
    save_file(random_tensors(config, dtype=torch.float32), place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(own_config(config, "float32")))
    shutil.copy(Path(microtome.__file__).with_name("modeling_microtome.py"), place)
    return place


@torch.no_grad()
def ours(place: Path) -> tuple[list[list[float]], list[list[int]]]:
    """Log-probabilities of the prompts' tokens and the likeliest continuations, one prompt at a time, no cache."""
    model = load(place, device=torch.device("cpu"), dtype=torch.float32)

    def scores(tokens: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)

    found = [[row[token].item() for row, token in zip(scores(one), one[1:], strict=False)] for one in PROMPTS]
    texts = [list(one) for one in PROMPTS]
    for one in texts:
        for _ in range(MORE):
            one.append(int(scores(one)[-1].argmax()))
    return found, [one[-MORE:] for one in texts]


def run(name: str, folders: list[Path], plugin: bool = True, devices: int = 1, **options: Any) -> dict[str, Any]:
    """What vLLM says of each folder, by its name."""
    job, answer = home() / f"{name}-job.json", home() / f"{name}-answer.json"
    parallel = {"tensor_parallel_size": devices, "distributed_executor_backend": "mp"} if devices > 1 else {}
    asked = {"dtype": "float32", "trust_remote_code": not plugin} | parallel | options
    said = {"folders": [str(one) for one in folders], "prompts": PROMPTS, "more": MORE, "answer": str(answer)}
    job.write_text(json.dumps(said | {"options": asked}))
    env = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home() / "hf"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    env |= {} if plugin else {"VLLM_PLUGINS": "none"}
    command = [sys.executable, str(Path(__file__).with_name("served.py")), str(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(one).name: said for one, said in json.loads(answer.read_text()).items()}


def same(said: dict[str, Any], place: Path, within: float = 1e-4, *, texts: bool = True) -> None:
    """Log-probabilities near ours, and tokens equal."""
    assert "error" not in said, said["error"]
    want, continued = ours(place)
    for have, scores in zip(said["logprobs"], want, strict=True):
        assert have == pytest.approx(scores, rel=0, abs=within)
    assert said["tokens"] == continued or not texts


# --- vLLM's own classes ---------------------------------------------------------------------------------------------


@cache
def on_its_own() -> dict[str, Any]:
    return run("stock", [cut(kind, name, **asked) for name, (kind, asked, _) in CLASSES.items()], plugin=False)


@pytest.mark.parametrize("name", CLASSES)
def test_stock_results_run_on_its_own_classes(name: str) -> None:
    said = on_its_own()[f"vllm-{name.replace(' ', '-')}"]
    same(said, home() / f"vllm-{name.replace(' ', '-')}")
    assert said["class"] == CLASSES[name][2]


# --- the Transformers backend ---------------------------------------------------------------------------------------


@cache
def on_the_backend() -> dict[str, Any]:
    places = [written(f"backend {name}", config) for name, config in BACKEND.items()]
    return run("backend", [cut("llama", "backend junction", **CUT["junction"]), *places], plugin=False)


@pytest.mark.parametrize("name", ["junction", *BACKEND])
def test_our_format_runs_without_the_plug_in(name: str) -> None:
    place = home() / f"vllm-{'' if name == 'junction' else 'own-'}backend-{name.replace(' ', '-')}"
    said = on_the_backend()[place.name]
    same(said, place)
    assert said["class"] == "TransformersForCausalLM"


def test_a_block_without_attention_needs_the_plug_in() -> None:
    config = MicrotomeConfig(**WIDE, per_layer_config={1: {"skip": ["self_attn"]}})
    said = run("refused", [written("refused", config)], plugin=False)
    assert "does not dispatch through the Transformers attention interface" in said["vllm-own-refused"]["error"]


# --- the plug-in ----------------------------------------------------------------------------------------------------


@cache
def on_the_plug_in() -> dict[str, Any]:
    places = [written(name, config) for name, config in RAGGED.items()]
    return run("plugin", [*(cut("llama", name, **asked) for name, asked in CUT.items()), *places])


@pytest.mark.parametrize("name", [*CUT, *RAGGED])
def test_every_decoder_runs_on_the_plug_in(name: str) -> None:
    place = home() / f"vllm-{'' if name in CUT else 'own-'}{name.replace(' ', '-').replace(',', '')}"
    said = on_the_plug_in()[place.name]
    same(said, place)
    assert said["class"] == "MicrotomeForCausalLM"


def test_two_devices() -> None:
    place = written("split", SPLIT)
    same(run("two", [place], devices=2)[place.name], place)


def test_what_it_cannot_run_is_refused_in_one_line() -> None:
    config = decoder(rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    place = written("dynamic", config)
    words = "Microtome's class for vLLM does not run this model: the frequencies of rope_type 'dynamic'"
    assert words in run("dynamic", [place])[place.name]["error"]


@pytest.mark.parametrize("basis", ["global", "junction"])
def test_codes(basis: str) -> None:
    """On a CPU vLLM multiplies by 4-bit codes in 16 bits only, so that 1e-4 is out of reach; it has no 8-bit codes."""
    first = cut("wide", f"wide {basis}", method="slicegpt", keep=0.6, multiple_of=128, options={"basis": basis})
    place = first.with_name(f"{first.name}-codes")
    asked: dict[str, Any] = {"method": "gptq", "options": {"bits": 4, "group": 128}}
    microtome.compress(first, out=place, data=CALIBRATION, measure=False, device="cpu", **asked)
    said = run(f"codes-{basis}", [place], dtype="float16")[place.name]
    assert "error" not in said, said["error"]
    same(said, place, within=0.05, texts=False)
    assert load(place, device=torch.device("cpu")).config.model_type == (
        "microtome" if basis == "junction" else "llama"
    )
