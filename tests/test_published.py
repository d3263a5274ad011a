"""`microtome plan` on published models at full size, without their weights.

A folder has a real config.json and a real safetensors header; the tensors behind it are a hole in a sparse file.
transformers' own class, built on the meta device, says what is right: of the original, and of the planned result.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import stored
from published import ALL, OPT_350M, opt
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import microtome_cli
from microtome import arch, pipeline
from microtome.modeling_microtome import MicrotomeForCausalLM
from microtome.pipeline import Preview
from microtome.source import Source

REFUSED = {"olmo2", "gemma2", "gemma3_text"}  # a norm behind each half fixes the basis of the stream
CUT = [name for name, (_, fields) in ALL.items() if fields["model_type"] not in REFUSED]
WHOLE = [name for name in ALL if name not in CUT]


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    seen: list[Preview]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """`microtome plan` with these arguments, in this process; a tensor that is read fails the test."""

    def read(_: Source, name: str) -> None:
        pytest.fail(f"plan read {name}")

    def plan(folder: Path, *words: str) -> Ran:
        seen: list[Preview] = []
        preview = pipeline.preview

        def noted(*given: Any, **named: Any) -> Preview:
            seen.append(preview(*given, **named))
            return seen[-1]

        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "preview", noted)
            patched.setattr(Source, "tensor", read)
            patched.setattr(sys, "argv", ["microtome", "plan", str(folder), *words, "--json"])
            capfd.readouterr()
            with pytest.raises(SystemExit) as stopped:
                microtome_cli.main()
        return Ran(int(stopped.value.code or 0), *capfd.readouterr(), seen)

    return plan


def on_meta(fields: dict[str, Any]) -> PreTrainedModel:
    """transformers' own model of a config.json, without a number allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(arch.stock_config(fields))


def hollow(folder: Path, fields: dict[str, Any]) -> PreTrainedModel:
    """A folder with the config and the header of a bf16 checkpoint; its model on the meta device."""
    model, header, end = on_meta(fields), {}, 0
    for name, tensor in stored(model).items():
        place = [end, end + 2 * tensor.numel()]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(fields))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return model


def sizes(model: nn.Module, config: Any) -> dict[str, int | None]:
    """What `plan` says of a model, from its modules and its config's fields."""
    found = {id(parameter): (name, parameter.numel()) for name, parameter in model.named_parameters()}
    weights = [getattr(one, "weight", None) for one in model.modules() if not isinstance(one, nn.Embedding)]
    heads = config.num_attention_heads
    wide = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return {
        "decoder": sum(size for name, size in found.values() if ".layers." in name or ".h." in name),
        "stored": sum(size for _, size in found.values()),
        "total": sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False)),
        "flops": 2 * sum(weight.numel() for weight in weights if weight is not None and weight.ndim == 2),
        "nbytes": 2 * sum(size for _, size in found.values()),
        "kv_bytes": 2 * 2 * config.num_hidden_layers * groups * wide,
        "nonzero": None,  # no method here sets a weight to zero
    }


def test_every_architecture_is_here() -> None:
    assert {fields["model_type"] for _, fields in ALL.values()} >= set(arch.known())


@pytest.mark.parametrize("name", CUT)
def test_plan_is_right_to_the_parameter(name: str, plan: Any, tmp_path: Path) -> None:
    total, fields = ALL[name]
    model, large = hollow(tmp_path, fields), total > 2e10  # a search over the widths of many blocks takes seconds
    ran = plan(tmp_path, *(("--slice", "0.25") if large else ("--keep", "0.75")))
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["before"] == sizes(model, model.config)
    assert told["before"]["stored"] == total
    assert large or 0.74 < told["after"]["decoder"] / told["before"]["decoder"] < 0.76
    (seen,) = ran.seen
    assert told["stock"] == (seen.outcome.stock is not None)
    if told["stock"]:
        result: nn.Module = on_meta(seen.outcome.stock)
    else:
        with torch.device("meta"):
            result = MicrotomeForCausalLM(seen.outcome.final)
    assert told["after"] == sizes(result, result.config)
    assert set(told["widths"].values()) == {result.config.hidden_size}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_sliced_is_refused_and_still_counted(name: str, plan: Any, tmp_path: Path) -> None:
    total, fields = ALL[name]
    model = hollow(tmp_path, fields)
    ran = plan(tmp_path, "--keep", "0.75")
    assert (ran.code, ran.out) == (2, "")
    words = f"microtome: slicegpt cannot rotate the residual stream of this {fields['model_type']}: it normalises"
    assert ran.err.splitlines()[-1].startswith(words)
    ran = plan(tmp_path, "--keep", "1.0")
    told = json.loads(ran.out)
    assert told["before"] == told["after"] == sizes(model, model.config)
    assert told["before"]["stored"] == total
    assert told["widths"] == {}


RELEASE = [f"-o{one}" for one in ("basis=junction", "signal=residual", "gauge=dense", "centre=release", "untie=true")]


@pytest.mark.parametrize(("name", "wanted"), [("opt-125m", 147_250_880), ("phi-2", 2_391_772_160)])
def test_the_release_s_sizes(name: str, wanted: int, plan: Any, tmp_path: Path) -> None:
    """What the tests of SliceGPT's release expect at 20 %, shortcuts and untied head included."""
    hollow(tmp_path, ALL[name][1])
    ran = plan(tmp_path, "--slice", "0.2", *RELEASE)
    assert json.loads(ran.out)["after"]["stored"] == wanted


@pytest.mark.parametrize(
    ("name", "rates"),
    [("opt-1.3b", (9.53, 14.84, 20.53)), ("opt-6.7b", (9.29, 15.16, 21.18)), ("Llama-2-7b-hf", (9.38, 15.34, 21.45))],
)
def test_the_release_s_rates(name: str, rates: tuple[float, ...], plan: Any, tmp_path: Path) -> None:
    """Per cent removed at 20, 25 and 30 %: the SliceGPT column of arXiv:2410.01309.

    Its base is the model with norms folded into what reads: without their parameters, and with a bias of the head
    where a norm has one.
    """
    fields = ALL[name][1] if name in ALL else opt(4096, 32, 32)
    model = hollow(tmp_path, fields)
    norms = {one: parameter.numel() for one, parameter in model.named_parameters() if "norm" in one}
    bias = fields["vocab_size"] if any(one.endswith("bias") for one in norms) else 0
    for part, rate in zip((0.2, 0.25, 0.3), rates, strict=True):
        told = json.loads(plan(tmp_path, "--slice", str(part), *RELEASE).out)
        folded = told["before"]["total"] - sum(norms.values()) + bias
        assert 100 * (1 - told["after"]["total"] / folded) == pytest.approx(rate, abs=0.005)


def test_a_norm_behind_each_half_of_an_opt_is_refused(plan: Any, tmp_path: Path) -> None:
    """opt-350m, the one OPT of another build: its embeddings are projected as well."""
    hollow(tmp_path, OPT_350M)
    ran = plan(tmp_path, "--keep", "0.75")
    assert (ran.code, ran.out) == (2, "")
    assert "normalises after each half (do_layer_norm_before=false, as opt-350m" in ran.err.splitlines()[-1]


def test_a_hollow_folder_takes_no_disk(tmp_path: Path) -> None:
    """138 GB by name."""
    total, fields = ALL["Llama-2-70b-hf"]
    hollow(tmp_path, fields)
    file = (tmp_path / "model.safetensors").stat()
    assert file.st_size > 2 * total
    assert file.st_blocks * 512 < 2**20
