"""vLLM's plug-in without vLLM: what is declared, that it may be called again, and what its class refuses."""

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from folders import raises
from models import RAGGED, decoder
from transformers import AutoConfig

from microtome import vllm_plugin
from microtome.errors import UnsupportedModel
from microtome.modeling_microtome import MicrotomeConfig

ROOT = Path(__file__).resolve().parents[1]


class Registry:
    """vLLM's, as far as a plug-in calls it."""

    def __init__(self) -> None:
        self.models = {"LlamaForCausalLM": "vllm.model_executor.models.llama:LlamaForCausalLM"}
        self.calls = 0

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, model_arch: str, model_cls: str) -> None:
        self.calls += 1
        self.models[model_arch] = model_cls


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = ModuleType("vllm")
    made.__spec__ = importlib.util.spec_from_loader("vllm", None)
    found = made.ModelRegistry = Registry()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "vllm", made)
    return found


# --- registration ---------------------------------------------------------------------------------------------------


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (place,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = place.partition(":")
    assert getattr(importlib.import_module(module), name) is vllm_plugin.register


def test_it_registers_once_however_often_it_is_called(registry: Registry) -> None:
    for _ in range(3):
        vllm_plugin.register()
    assert registry.calls == 1
    module, _, name = registry.models["MicrotomeForCausalLM"].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert f"class {name}(" in Path(spec.origin).read_text()
    assert AutoConfig.for_model("microtome").model_type == "microtome"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_does_nothing_to_it() -> None:
    vllm_plugin.register()
    assert "vllm" not in sys.modules
    assert "microtome.vllm_model" not in sys.modules


def test_vllm_is_imported_only_when_it_calls() -> None:
    """In each of its processes the module is imported; and no other module of ours knows it."""
    code = "import sys, microtome.vllm_plugin\nassert not {'vllm', 'microtome.vllm_model'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what its class runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RAGGED)
def test_every_decoder_of_the_tests_is_taken(name: str) -> None:
    """They are run in tests/test_vllm.py."""
    vllm_plugin.check(RAGGED[name], devices=1)


@pytest.mark.parametrize(
    ("widths", "want"),
    [
        ([(8, 8)], 32),
        ([(32, 20)], 32),
        ([(33, 8)], 64),
        ([(44, 72), (8, 8)], 80),
        ([(128, 128)], 128),
        ([(130, 1)], 160),
    ],
)
def test_heads_are_padded_to_a_width_that_attention_has(widths: list[tuple[int, int]], want: int) -> None:
    """The widest query, key or value of all blocks decides."""
    blocks = {block: {"head_dim": key, "v_head_dim": value} for block, (key, value) in enumerate(widths)}
    config = decoder(blocks, num_hidden_layers=len(widths), rotary_head_dim=2)
    assert vllm_plugin.head_width(config) == want


@pytest.mark.parametrize(
    ("config", "devices", "words"),
    [
        (decoder({1: {"num_attention_heads": 3, "num_key_value_heads": 3}}), 2,
         "2 devices cannot share the 3 query heads and 3 key-value heads of block 1"),
        (decoder(num_attention_heads=12, num_key_value_heads=3), 2, "share the 12 query heads and 3 key-value heads of block 0"),
        (decoder({2: {"intermediate_size": 7}}), 2, "2 devices cannot share the 7 neurons of block 2"),
        (RAGGED["full head norms"], 2, "its norm of queries and keys spans all heads, and 2 devices share them: use one"),
        (decoder(head_dim=288), 1, "heads are 288 wide, and vLLM's attention has up to 256"),
        (decoder(rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}), 1,
         "the frequencies of rope_type 'dynamic' change with the length, and a batch has many"),
        (decoder({block: {"skip": ["self_attn"]} for block in range(3)}), 1, "no block has attention"),
    ],
)  # fmt: skip
def test_refusals(config: MicrotomeConfig, devices: int, words: str) -> None:
    with raises(UnsupportedModel, f"Microtome's class for vLLM does not run this model: .*{words}"):
        vllm_plugin.check(config, devices)


@pytest.mark.parametrize(("groups", "devices"), [(4, 2), (2, 2), (1, 2), (2, 4), (4, 4)])
def test_groups_are_shared_out_or_repeated(groups: int, devices: int) -> None:
    vllm_plugin.check(decoder(num_attention_heads=8, num_key_value_heads=groups, intermediate_size=20), devices)


# --- names that engines ask for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "fields"),
    [
        ("attn_logit_softcapping", {"attention_softcap": 2.5}),
        ("final_logit_softcapping", {"logits_softcap": 3.5}),
        ("logit_scale", {"logits_scale": 0.25}),
    ],
)
def test_a_generic_backend_finds_caps_and_scales(theirs: str, fields: dict[str, Any]) -> None:
    """vLLM's Transformers backend reads these names, and where they are missing leaves the cap or the scale out."""
    config = decoder(**fields)
    assert getattr(config, theirs) == next(iter(fields.values()))
    assert theirs not in config.to_dict(), "a file says a thing once"
    assert MicrotomeConfig(**config.to_dict()).to_dict() == config.to_dict()
