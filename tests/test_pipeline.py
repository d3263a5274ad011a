"""From a folder to a smaller folder: what goes in, what comes out, and that both agree with transformers."""

import dataclasses
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import raises, tree
from huggingface_hub import ModelCard
from models import TINY, built, error, ids, logits, stock
from safetensors.torch import load_file
from tinies import CALIBRATION, HELD_OUT, compress, folder, planted, spoken, text, tokenizer, weights
from torch import Tensor
from torch.nn.functional import cross_entropy

import microtome
from microtome import calibrate, pipeline, running
from microtome.edit import Plan
from microtome.errors import (
    BadCheckpoint,
    BadInput,
    BadOutput,
    BadPlan,
    NumericalFailure,
    UnknownName,
    UnsupportedModel,
)
from microtome.modeling_microtome import MicrotomeForCausalLM

JUNCTION = {"basis": "junction"}
WEIGHTS = "model.safetensors"


def written(tmp_path: Path, content: str, name: str = "text.txt") -> Path:
    (tmp_path / name).write_text(content)
    return tmp_path / name


@torch.no_grad()
def by_hand(model: Any, tokens: Tensor) -> float:
    """Perplexity of all predicted tokens, in fp64."""
    out = model(input_ids=tokens).logits[:, :-1].double()
    return cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


# --- what goes in ---------------------------------------------------------------------------------------------------


def test_a_model_in_memory_gives_what_its_folder_gives(tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "folder", slice=0.3)
    compress(str(folder("llama")), tmp_path / "text", slice=0.3)
    result = compress(stock("llama"), tmp_path / "memory", slice=0.3)
    first, *others = [(tmp_path / place / WEIGHTS).read_bytes() for place in ("folder", "text", "memory")]
    assert all(other == first for other in others)
    assert error(logits(result.load(), HELD_OUT), logits(stock("llama"), HELD_OUT)) > 0.1, "the original is left alone"


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "gpt2-tied", "opt-tied", "phi-tied-gqa"])
def test_a_checkpoint_of_the_base_model_is_read_as_the_whole(name: str, tmp_path: Path) -> None:
    """Its names lack their first word, as those of the published GPT-2 do; what comes out has it."""
    whole, base = stock(name), tmp_path / "base"
    whole.base_model.save_pretrained(base)
    if name == "phi-tied-gqa":  # whose head has a bias, which the base model has not
        with raises(BadCheckpoint, r"lacks 1 tensors of a phi: lm_head\.bias"):
            compress(base, tmp_path / "out", keep=1.0)
        return
    assert not set(weights(base)) & set(weights(folder(name)))
    for dial in ({"keep": 1.0}, {"slice": 0.3}):
        compress(base, tmp_path / "out", overwrite=True, **dial)
        compress(folder(name), tmp_path / "same", overwrite=True, **dial)
        have, want = weights(tmp_path / "out"), weights(tmp_path / "same")
        assert set(have) == set(want)
        assert all(torch.equal(have[key], tensor) for key, tensor in want.items())


def test_packed_tensors_of_another_size_are_named(tmp_path: Path) -> None:
    shutil.copytree(folder("phi3-window"), tmp_path / "source")
    fields = json.loads((tmp_path / "source" / "config.json").read_text()) | {"intermediate_size": 72}
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    with raises(BadInput, r"gate_up_proj\.weight has shape \[160, 48\], and config\.json says \[144, 48\]"):
        compress(tmp_path / "source", tmp_path / "out", keep=1.0)


def test_a_model_and_a_tokenizer_in_memory(tmp_path: Path) -> None:
    model = built(TINY["llama"])
    result = microtome.compress(
        model, tokenizer=tokenizer(), data=[text()], length=24, samples=8, slice=0.3, out=tmp_path / "out"
    )
    assert result.perplexity_after is not None
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids == tokenizer()("abc").input_ids
    with raises(BadInput, "cannot compress a dict: give a folder, a hub id or a transformers model"):
        compress({}, tmp_path / "other", slice=0.3)


def test_ids_from_a_file_are_ids(tmp_path: Path) -> None:
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    compress(folder("llama"), tmp_path / "tensor", slice=0.3)
    compress(folder("llama"), tmp_path / "file", slice=0.3, data=tmp_path / "ids.pt")
    assert (tmp_path / "tensor" / WEIGHTS).read_bytes() == (tmp_path / "file" / WEIGHTS).read_bytes()


def test_the_last_tenth_of_a_text_is_held_out(tmp_path: Path) -> None:
    """It is what perplexity is measured on, and calibration never sees it."""
    content = text(6000)
    at = content.find("\n\n", int(len(content) * 0.9)) + 2
    common: dict[str, Any] = {"slice": 0.3, "length": 24, "samples": 16, "measure": True}
    runs: dict[str, microtome.Result] = {}
    for run, data in (
        ("whole", content),
        ("other tail", content[:at] + content[at:].swapcase()),
        ("other head", content[:at].swapcase() + content[at:]),
    ):
        runs[run] = compress(spoken(), tmp_path / run, data=written(tmp_path, data, "some.txt"), **common)
    stored = {run: (tmp_path / run / WEIGHTS).read_bytes() for run in runs}
    assert stored["whole"] == stored["other tail"] != stored["other head"]
    before = {run: result.perplexity_before for run, result in runs.items()}
    assert all(value is not None for value in before.values())
    assert before["whole"].value == before["other head"].value != before["other tail"].value  # type: ignore[union-attr]
    calibration = runs["whole"].plan.calibration
    assert calibration["source"] == "some.txt (first 90 %)"
    assert calibration["windows"] == 16
    assert calibration["length"] == 24
    assert before["whole"].source == "some.txt (last 10 %)"  # type: ignore[union-attr]
    tail = tokenizer()(content[at:]).input_ids
    tokens = torch.tensor(tail[: len(tail) // 24 * 24]).view(-1, 24)
    model = transformers.AutoModelForCausalLM.from_pretrained(spoken(), dtype=torch.float32)
    assert before["whole"].value == pytest.approx(by_hand(model, tokens), rel=1e-5)  # type: ignore[union-attr]


def test_a_text_to_measure_on_leaves_the_other_whole(tmp_path: Path) -> None:
    data, held_out = written(tmp_path, text(), "a.txt"), written(tmp_path, text(seed=1), "b.txt")
    common: dict[str, Any] = {"slice": 0.3, "length": 24, "samples": None, "data": data}
    result = compress(spoken(), tmp_path / "out", eval_data=held_out, measure=True, **common)
    assert result.plan.calibration["source"] == "a.txt"
    assert result.perplexity_after is not None
    assert result.perplexity_after.source == "b.txt"
    silent = compress(spoken(), tmp_path / "silent", **common)
    assert silent.plan.calibration["sha256"] == result.plan.calibration["sha256"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "silent" / WEIGHTS).read_bytes()


def test_a_seed_chooses_windows_of_a_text(tmp_path: Path) -> None:
    data = written(tmp_path, text())
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        compress(spoken(), tmp_path / run, data=data, slice=0.3, length=24, samples=8, seed=seed)
    stored = [(tmp_path / run / WEIGHTS).read_bytes() for run in "abc"]
    assert stored[0] == stored[1] != stored[2]


def test_windows_are_as_long_as_the_model_unless_told(tmp_path: Path) -> None:
    data = written(tmp_path, text())
    result = compress(spoken(), tmp_path / "out", data=data, slice=0.3)
    assert result.plan.calibration["length"] == 64
    longer = compress(spoken(), tmp_path / "longer", data=data, slice=0.3, length=100)  # a rotary turns on
    assert longer.plan.calibration["length"] == 100


@pytest.mark.parametrize(
    "act", [compress, lambda model, _out, **chosen: running.evaluate(model, chosen["data"], length=chosen["length"])]
)
def test_learned_positions_end(act: Any, tmp_path: Path) -> None:
    with raises(BadInput, "--length 65 is longer than the 64 positions that this model has learned"):
        act(folder("opt-tied"), tmp_path / "out", slice=0.3, length=65, data=ids(2, 80))
    assert not list(tmp_path.iterdir())


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with raises(BadInput, "the list of texts.* is text, but the model folder has no tokenizer: pass token ids"):
        compress(folder("llama"), tmp_path / "out", data=["abc " * 50], slice=0.3)
    with raises(BadInput, "has no tokenizer: text cannot be turned into tokens"):
        running.generate(folder("llama"), "abc")


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "container"),
    [("llama", "Mistral"), ("llama-gqa-llama3-tied", "Mistral"), ("mistral-window", "Mistral"), ("qwen2-tied", "Qwen2"),
     ("phi", "Phi"), ("phi-tied-gqa", "Phi"), ("phi3-window", "Phi3"), ("phi3-partial-tied", "Phi3"),
     ("qwen2-window", "Qwen2"), ("qwen3-tied", "Qwen3"), ("qwen3-bias", "Qwen3")],
)  # fmt: skip
def test_stock_results_are_transformers_own(name: str, container: str, tmp_path: Path) -> None:
    """48 has 6 heads; 32, which no multiple of 6 is, only fits a config that does not ask for it."""
    result = compress(folder(name), tmp_path / "out", slice=0.3)
    assert result.stock
    assert result.why_not is None
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is getattr(transformers, f"{container}ForCausalLM")
    assert model.config.hidden_size == 32
    assert model.config.architectures == [f"{container}ForCausalLM"]
    assert sorted(weights(tmp_path / "out")) == sorted(weights(folder(name)))
    out = model.generate(HELD_OUT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    greedy = HELD_OUT
    for _ in range(6):
        greedy = torch.cat([greedy, logits(model, greedy)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, greedy)


def test_a_llama_stays_one_where_its_heads_divide_the_width(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", slice=0.3, multiple_of=6)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is transformers.LlamaForCausalLM
    assert (model.config.hidden_size, model.config.head_dim) == (30, 8)
    assert result.stock


def test_qwen3_shares_its_epsilon_with_the_norms_of_its_heads(tmp_path: Path) -> None:
    """1e-3 is large enough to be missed: half the width wants twice the epsilon, and heads that are scaled for it."""
    model = planted("qwen3-bias", rank=24)
    assert model.config.rms_norm_eps == 1e-3
    result = compress(model, tmp_path / "out", slice=0.5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is transformers.Qwen3ForCausalLM
    assert loaded.config.rms_norm_eps == pytest.approx(2e-3)
    assert error(logits(loaded, HELD_OUT), logits(model, HELD_OUT)) <= 2e-5
    assert result.stock


PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, out = torch.load(sys.argv[1]), {}
with torch.no_grad():
    out["stock"] = AutoModelForCausalLM.from_pretrained(sys.argv[2])(input_ids=ids).logits
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=False)
    except ValueError as error:
        out["refused"] = str(error)
    trusted = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
    out["shipped"] = trusted(input_ids=ids).logits
    out["generated"] = trusted.generate(ids, max_new_tokens=3, pad_token_id=0)
    assert not any(name.startswith("microtome") for name in sys.modules), "without Microtome"
    import microtome
    out["imported"] = AutoModelForCausalLM.from_pretrained(sys.argv[3])(input_ids=ids).logits
torch.save(out, sys.argv[4])
"""


def test_loading_without_microtome_with_its_file_and_with_it(tmp_path: Path) -> None:
    mine = compress(folder("llama"), tmp_path / "mine", slice=0.3)
    own = compress(folder("opt-tied"), tmp_path / "own", slice=0.3, options=JUNCTION)
    assert mine.stock
    assert not own.stock
    assert "sizes differ between blocks" in str(own.why_not)
    assert not (tmp_path / "mine" / "modeling_microtome.py").exists()
    torch.save(HELD_OUT, tmp_path / "ids.pt")
    places = [str(tmp_path / name) for name in ("ids.pt", "mine", "own", "logits.pt")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, *places], env=environment, check=True, cwd=tmp_path)
    out = torch.load(tmp_path / "logits.pt")
    assert "trust_remote_code" in out["refused"]
    assert error(out["stock"], logits(mine.load(), HELD_OUT)) <= 1e-5
    own_model = own.load()
    assert type(own_model) is MicrotomeForCausalLM
    want = logits(own_model, HELD_OUT)
    assert error(out["shipped"], want) <= 1e-5
    assert error(out["imported"], want) <= 1e-5
    assert torch.equal(out["generated"], own_model.generate(HELD_OUT, max_new_tokens=3, pad_token_id=0))


@pytest.mark.parametrize("options", [{}, JUNCTION], ids=["stock", "own"])
def test_what_travels_along(options: dict[str, Any], tmp_path: Path) -> None:
    source = tree(spoken())
    compress(spoken(), tmp_path / "out", slice=0.3, options=options)
    out = tree(tmp_path / "out")
    own = {"modeling_microtome.py"} if options else set()
    made = {"config.json", WEIGHTS, "plan.json", "README.md"} | own
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"}
    assert set(out) == made | copied
    assert all(out[name] == source[name] for name in copied)
    assert source["README.md"] not in out["README.md"]
    if own:
        assert (
            out["modeling_microtome.py"] == Path(str(sys.modules["microtome.modeling_microtome"].__file__)).read_bytes()
        )


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16", "bf16"])
def test_the_stored_type(dtype: str, tmp_path: Path) -> None:
    """In the source's type unless told; the arithmetic between is wide, so what differs is one rounding."""
    source = spoken("llama", torch.bfloat16)
    compress(source, tmp_path / "wide", slice=0.3, dtype="float32")
    result = compress(source, tmp_path / "out", slice=0.3, dtype=dtype)
    name = {"auto": "bfloat16", "bf16": "bfloat16"}.get(dtype, dtype)
    have, wide = weights(tmp_path / "out"), weights(tmp_path / "wide")
    assert {tensor.dtype for tensor in have.values()} == {getattr(torch, name)}
    assert all(torch.equal(have[key], wide[key].to(have[key].dtype)) for key in wide)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, name)
    assert result.load(dtype="float32").dtype == torch.float32
    assert result.plan.source["dtype"] == "bfloat16"


@pytest.mark.parametrize(("dials", "options"), [({"slice": 0.3}, {}), ({"slice": 0.3}, JUNCTION), ({"keep": 1.0}, {})])
def test_shards_hold_what_one_file_holds(dials: dict[str, float], options: dict[str, str], tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "one", options=options, **dials)
    result = compress(folder("llama"), tmp_path / "many", options=options, max_shard_size=40_000, **dials)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 40_000 for shard in shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.after.nbytes
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(logits(result.load(), HELD_OUT), logits(microtome.Result.load(result), HELD_OUT))
    again = compress(tmp_path / "many", tmp_path / "again", keep=1.0) if result.stock else None
    assert again is None or weights(tmp_path / "again").keys() == one.keys()


# --- the record -----------------------------------------------------------------------------------------------------


def test_the_plan_goes_there_and_back(tmp_path: Path) -> None:
    options = JUNCTION | {"gauge": "lowrank", "ridge": "0.2"}
    result = compress(spoken(), tmp_path / "out", slice=0.3, options=options, measure=True)
    content = (tmp_path / "out" / "plan.json").read_text()
    assert Plan.from_json(content) == result.plan
    assert Plan.from_json(result.plan.to_json()) == result.plan
    plain = json.loads(content)
    assert plain["method"] == "slicegpt"
    assert (
        plain["options"] | {"basis": "junction", "gauge": "lowrank", "ridge": 0.2, "untie": False} == plain["options"]
    )
    assert (plain["keep"], plain["slice"]) == (None, 0.3)
    assert plain["widths"] == {f"residual.{number}": 32 if number < 6 else 48 for number in range(7)}
    assert plain["source"]["name"] == str(spoken())
    assert plain["source"]["revision"] is None
    assert plain["calibration"] == result.plan.calibration
    assert plain["calibration"] | {"source": "the tensor of ids", "windows": 8, "length": 24} == plain["calibration"]
    assert plain["result"] == json.loads(json.dumps(result.to_json()))
    assert plain["result"]["perplexity"]["after"]["value"] == result.perplexity_after.value  # type: ignore[union-attr]
    with raises(BadPlan, r"plan\.json of version 1 has unknown fields \['colour'\]: upgrade microtome"):
        Plan.from_json(plain | {"colour": "red"})
    with raises(BadPlan, r"plan\.json of version 99 has unknown fields"):
        Plan.from_json(plain | {"version": 99})


def test_one_basis_is_one_width_in_the_plan(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", keep=0.7)
    assert list(result.plan.widths) == ["residual"]
    assert (result.plan.keep, result.plan.slice) == (0.7, None)


def test_the_card_tells_how_it_was_made(tmp_path: Path) -> None:
    command = "microtome compress SOURCE --slice 0.3 --out smaller"
    result = compress(spoken(), tmp_path / "smaller", slice=0.3, measure=True, command=command)
    card = (tmp_path / "smaller" / "README.md").read_text()
    facts = ModelCard(card).data.to_dict()
    assert facts["license"] == "mit"
    assert facts["language"] == ["en"]
    assert facts["library_name"] == "transformers"
    assert {"microtome", "slicegpt"} <= set(facts["tags"])
    assert "base_model" not in facts, "a folder on a disk is nobody's link"
    assert str(spoken().parent) not in card
    before, after = result.perplexity_before, result.perplexity_after
    assert before is not None
    assert after is not None
    for words in (
        "# smaller", command, "method `slicegpt`, slice 0.3", f"{result.before.stored:,} | {result.after.stored:,}",
        f"| perplexity | {before.value:.4g} | {after.value:.4g} |", after.protocol(), "basis=global", "8 windows of 24",
        f"sha256 {result.plan.calibration['sha256'][:12]}", f"digest {result.plan.source['digest'][:12]}",
        "loads with transformers alone", f"transformers {transformers.__version__}", f"torch {torch.__version__}",
    ):  # fmt: skip
        assert words in card, words
    assert "import microtome" not in card
    compress(spoken(), tmp_path / "own", slice=0.3, options=JUNCTION)
    assert "import microtome" in (tmp_path / "own" / "README.md").read_text()


def test_the_card_tells_every_step_of_a_recipe(tmp_path: Path) -> None:
    steps = [{"slicegpt": {"slice": 0.2}}, {"fasp": {"keep": 0.7, "options": {"spaces": "ffn"}}}, "restore", "wanda"]
    compress(spoken(), tmp_path / "out", recipe={"steps": steps})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in 4 steps: `slicegpt`, slice 0.2; `fasp`, keep 0.7; `restore`; `wanda`, density 0.5.\n" in card
    for name, option in (("slicegpt", "basis=global"), ("fasp", "spaces=ffn"), ("restore", "refine=0"),
                         ("wanda", "density=0.5")):  # fmt: skip
        assert re.search(rf"^- options of `{name}`: .*\b{option}\b", card, re.MULTILINE), name
    assert {"slicegpt", "fasp", "restore", "wanda", "structured-pruning"} <= set(ModelCard(card).data.to_dict()["tags"])


def test_the_card_s_program_runs(tmp_path: Path) -> None:
    compress(spoken(), tmp_path / "out", slice=0.3, options=JUNCTION)
    card = (tmp_path / "out" / "README.md").read_text()
    program = card.split("```python\n")[1].split("```")[0].replace('"PATH"', "place")
    scope: dict[str, Any] = {"place": str(tmp_path / "out")}
    exec(program, scope)
    assert type(scope["model"]) is MicrotomeForCausalLM
    assert scope["tokenizer"]("abc").input_ids == tokenizer()("abc").input_ids


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("opt-tied", JUNCTION), ("qwen3-tied", {})])
def test_perplexities_are_those_that_others_measure(name: str, options: dict[str, str], tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", slice=0.3, options=options, eval_data=HELD_OUT, measure=True)
    before, after = result.perplexity_before, result.perplexity_after
    assert before is not None
    assert after is not None
    assert before.value == pytest.approx(by_hand(stock(name), HELD_OUT), rel=1e-5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert after.value == pytest.approx(by_hand(loaded, HELD_OUT), rel=1e-5)
    assert before.protocol() == after.protocol()
    assert after.tokens == 4 * 23


def test_ids_alone_are_measured_on_themselves_and_that_is_said(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", slice=0.3, measure=True)
    assert result.perplexity_before is not None
    assert result.perplexity_before.source == "the tensor of ids, the calibration tokens themselves"
    assert result.perplexity_before.value == pytest.approx(by_hand(stock("llama"), CALIBRATION), rel=1e-5)
    whole = compress(folder("llama"), tmp_path / "whole", keep=1.0, measure=True)
    assert whole.perplexity_before is not None
    assert whole.perplexity_after is not None
    assert whole.perplexity_after.value == whole.perplexity_before.value


def test_nothing_is_needed_to_change_nothing(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", keep=1.0, data="no such text")
    assert result.plan.calibration == {}
    assert "calibration: none was needed" in (tmp_path / "out" / "README.md").read_text()


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}
    compress(folder("llama"), tmp_path / "out", slice=0.3, measure=True,
             progress=lambda what, part: seen.setdefault(what, []).append(part))  # fmt: skip
    assert list(seen)[-2:] == ["perplexity, original", "perplexity, compressed"]
    assert len(seen) > 2
    for parts in seen.values():
        assert parts == sorted(parts)
        assert 0 < parts[0] <= parts[-1] == 1.0


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"readers": "transposed"}, JUNCTION], ids=["global", "pooled", "junction"])
def test_hidden_states_in_a_file_give_the_same_bytes(options: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    compress(folder("llama"), tmp_path / "memory", slice=0.3, options=options)
    compress(folder("llama"), tmp_path / "file", slice=0.3, options=options, scratch=tmp_path / "scratch")
    assert (tmp_path / "memory" / WEIGHTS).read_bytes() == (tmp_path / "file" / WEIGHTS).read_bytes()
    assert not list((tmp_path / "scratch").iterdir())


def test_hidden_states_go_to_a_file_when_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    made: list[str] = []
    kept = calibrate.tempfile.NamedTemporaryFile
    monkeypatch.setattr(
        calibrate.tempfile, "NamedTemporaryFile", lambda **how: made.append(how["prefix"]) or kept(**how)
    )
    monkeypatch.setattr(calibrate, "free_memory", lambda: 1000)
    compress(folder("llama"), tmp_path / "short", slice=0.3)
    assert made == ["microtome-hidden-"] * 2  # the stream, and the sums of all junctions
    monkeypatch.undo()
    compress(folder("llama"), tmp_path / "enough", slice=0.3)
    assert (tmp_path / "short" / WEIGHTS).read_bytes() == (tmp_path / "enough" / WEIGHTS).read_bytes()


def test_what_does_not_fit_is_not_measured_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "free_memory", lambda: 1000)
    result = compress(folder("llama"), tmp_path / "out", slice=0.3, measure=True)
    assert (result.perplexity_before, result.perplexity_after) == (None, None)
    assert "perplexity of the original was not measured" in result.notes[0]
    assert result.notes[0] in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
@pytest.mark.parametrize("options", [{}, JUNCTION], ids=["global", "junction"])
def test_batches_of_another_size_hardly_matter(
    name: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compress(folder(name), tmp_path / "first", slice=0.3, options=options)
    monkeypatch.setattr(calibrate, "BATCH_TOKENS", 50)  # two windows; the first run took all eight
    second = compress(folder(name), tmp_path / "second", slice=0.3, options=options)
    assert error(logits(first.load(), HELD_OUT), logits(second.load(), HELD_OUT)) <= 1e-4


# --- the folder -----------------------------------------------------------------------------------------------------


def test_without_a_place_the_result_lives_as_long_as_it_is_held() -> None:
    result = microtome.compress(folder("llama"), slice=0.3, data=CALIBRATION)
    place = result.folder
    assert type(result.load()) is transformers.MistralForCausalLM
    assert (place / "plan.json").exists()
    del result
    gc.collect()  # a warning here would fail the test
    assert not place.exists()


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "out", slice=0.3)
    before = tree(tmp_path)
    with raises(BadOutput, "out exists. Choose another output folder, or pass --overwrite"):
        compress(folder("llama"), tmp_path / "out", slice=0.5)
    assert tree(tmp_path) == before
    again = compress(folder("llama"), tmp_path / "out", slice=0.5, overwrite=True)
    assert again.load().config.hidden_size == 24
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    shutil.copytree(folder("llama"), tmp_path / "source")
    before = tree(tmp_path)
    with raises(BadOutput, "is or contains the model that is read"):
        compress(tmp_path / "source", tmp_path / "source", slice=0.3, overwrite=True)
    assert tree(tmp_path) == before


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("microtome.cut.finish", fail)
    with pytest.raises(KeyboardInterrupt):
        compress(folder("llama"), tmp_path / "new" / "out", slice=0.3)
    assert not list(tmp_path.iterdir())


# --- numbers that are none ------------------------------------------------------------------------------------------


def spoilt(tmp_path: Path, tensor: str, value: float) -> Path:
    """A model with one bad number, or with a tensor of huge ones."""
    model = built(TINY["llama"])
    with torch.no_grad():
        parameter = model.get_parameter(tensor)
        parameter.copy_(parameter * value) if value > 1 else parameter[0].fill_(value)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("keep", [0.7, 1.0])
def test_a_weight_that_is_no_number_is_named(value: float, keep: float, tmp_path: Path) -> None:
    source = spoilt(tmp_path, "model.layers.1.mlp.down_proj.weight", value)
    with raises(
        NumericalFailure, r"model\.layers\.1\.mlp\.down_proj\.weight in .*model\.safetensors is NaN or infinite"
    ):
        compress(source, tmp_path / "out", keep=keep)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"signal": "residual"}, JUNCTION])
def test_activations_that_overflow_name_the_block(options: dict[str, str], tmp_path: Path) -> None:
    source = spoilt(tmp_path, "model.layers.1.mlp.down_proj.weight", 3e37)
    with raises(NumericalFailure, r"activations leave block 1 not finite \(residual\.4\): the model overflows there"):
        compress(source, tmp_path / "out", slice=0.3, options=options)
    assert not (tmp_path / "out").exists()


def test_a_type_too_small_for_the_result_is_named(tmp_path: Path) -> None:
    source = spoilt(tmp_path, "lm_head.weight", 1e6)
    with raises(NumericalFailure, r"lm_head\.weight is not finite in float16: choose --dtype float32"):
        compress(source, tmp_path / "out", slice=0.3, dtype="float16")
    assert not (tmp_path / "out").exists()


# --- the other verbs ------------------------------------------------------------------------------------------------


def test_evaluate_is_what_others_measure(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", slice=0.3)
    found = running.evaluate(result.folder, HELD_OUT, baseline=folder("llama"))
    assert list(found) == [str(tmp_path / "out"), str(folder("llama"))]
    mine, base = found.values()
    assert base.value == pytest.approx(by_hand(stock("llama"), HELD_OUT), rel=1e-5)
    assert mine.value == pytest.approx(by_hand(result.load(), HELD_OUT), rel=1e-5)
    assert mine.protocol() == base.protocol()
    first = running.evaluate(folder("llama"), HELD_OUT, limit=1)
    assert first[str(folder("llama"))].value == pytest.approx(by_hand(stock("llama"), HELD_OUT[:1]), rel=1e-5)
    half = running.evaluate(folder("llama"), HELD_OUT, dtype="bfloat16")
    assert half[str(folder("llama"))].dtype == "bfloat16"


def test_evaluate_reads_a_text_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path, text(2000))
    (found,) = running.evaluate(spoken(), str(path), length=32).values()
    stream = tokenizer()(path.read_text()).input_ids
    tokens = torch.tensor(stream[: len(stream) // 32 * 32]).view(-1, 32)
    model = transformers.AutoModelForCausalLM.from_pretrained(spoken(), dtype=torch.float32)
    assert found.value == pytest.approx(by_hand(model, tokens), rel=1e-5)
    assert found.windows == len(tokens)


def test_a_baseline_must_know_the_tokens(tmp_path: Path) -> None:
    small = built(TINY["llama"] | {"vocab_size": 40})
    small.save_pretrained(tmp_path / "small")
    with raises(BadInput, "small has a vocabulary of 40, too small for the tokens of"):
        running.evaluate(folder("llama"), HELD_OUT, baseline=tmp_path / "small")


def test_generate_goes_on_from_the_prompt(tmp_path: Path) -> None:
    for place in (spoken(), compress(spoken(), tmp_path / "out", slice=0.3, options=JUNCTION).folder):
        out = running.generate(place, "abc", tokens=5)
        model = transformers.AutoModelForCausalLM.from_pretrained(place)
        tokens = torch.tensor([tokenizer()("abc").input_ids])
        for _ in range(5):
            tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], 1)
        assert out == tokenizer().decode(tokens[0], skip_special_tokens=True)
        hot = [running.generate(place, "abc", tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
        assert hot[0] == hot[1] != hot[2]
    with raises(BadInput, "the prompt has no tokens: give a word or two"):
        running.generate(spoken(), "")


@pytest.mark.parametrize("own", [False, True])
def test_generate_stops_where_learned_positions_end(own: bool, tmp_path: Path) -> None:
    source = spoken("opt-tied")
    place = compress(source, tmp_path / "out", slice=0.3).folder if own else source
    assert running.generate(place, "abc" * 20, tokens=80).startswith(running.generate(place, "abc" * 20, tokens=4))
    with raises(BadInput, "the prompt has 66 tokens, and this model has learned 64 positions: shorten it"):
        running.generate(place, "abc" * 22)


@pytest.mark.parametrize("act", [running.evaluate, lambda model, _: running.generate(model, "abc")])
def test_what_cannot_be_loaded_is_refused_in_the_words_of_compress(act: Any, tmp_path: Path) -> None:
    """Evaluating reads the same folders, so it refuses the same ones, and asks no hub about a misspelt path."""
    with raises(BadInput, "no folder '.*/nowhere'. Give an existing model folder, or a hub id"):
        act(str(tmp_path / "nowhere"), HELD_OUT)
    shutil.copytree(spoken(), tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with raises(UnsupportedModel, "holds only pickle weights .* convert"):
        act(tmp_path / "pickled", HELD_OUT)
    quantised = written(tmp_path, "", "x").parent / "quantised"
    shutil.copytree(spoken(), quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "aqlm", "bits": 4}})
    )
    with raises(UnsupportedModel, "the model is quantised"):
        act(quantised, HELD_OUT)


@pytest.mark.parametrize(
    ("chosen", "kind", "words"),
    [
        ({"dtype": "float61"}, UnknownName, r"no dtype named 'float61'\. Did you mean 'float16'\? Known: auto, bf"),
        ({"device": "gpu"}, BadInput, "no device named 'gpu': use auto, cpu, cuda or cuda:N"),
        ({"method": "slicegtp"}, UnknownName, r"no method named 'slicegtp'\. Did you mean 'slicegpt'"),
        ({"samples": 0}, BadInput, "samples must be at least 1, not 0"),
        ({"length": 1}, BadInput, "length must be at least 2 tokens"),
        ({"max_shard_size": 0}, BadInput, "max_shard_size is 0. Give a positive number of bytes"),
        ({"data": torch.full((8, 24), 97)}, BadInput, "largest token id of the tensor of ids is 97, but the model's voc"),
        ({"data": "wikitext3"}, UnknownName, r"no data set named 'wikitext3'\. Did you mean 'wikitext2'"),
        ({"multiple_of": 64}, BadPlan, "leaves nothing at a multiple of 64"),
        ({"revision": "main"}, BadInput, "is a folder and has no revision 'main'"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used(chosen: dict[str, Any], kind: type[Any], words: str, tmp_path: Path) -> None:
    with raises(kind, words):
        compress(folder("llama"), tmp_path / "out", slice=0.3, **chosen)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with raises(BadInput, "--device cuda: this machine, or this build of torch, has no CUDA device. Use --device cpu"):
        compress(folder("llama"), tmp_path / "out", slice=0.3, device="cuda")


# --- plans replay ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"basis": "junction", "untie": True}], ids=["global", "junction"])
def test_a_plan_replays_to_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"data": HELD_OUT, "measure": False}
    first = compress(folder("llama"), keep=0.7, options=options, out=tmp_path / "a", **chosen)
    again = compress(folder("llama"), plan=Plan.read(tmp_path / "a"), out=tmp_path / "b", **chosen)
    assert again.plan == first.plan
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_plan_is_strict(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"data": HELD_OUT, "measure": False, "out": tmp_path / "b"}
    compress(folder("llama"), keep=0.7, options={"basis": "junction"}, **(chosen | {"out": tmp_path / "a"}))
    plan = Plan.read(tmp_path / "a" / "plan.json")
    with pytest.raises(BadPlan, match="made for other weights"):
        compress(folder("mistral"), plan=plan, **chosen)
    for widths in ({**plan.widths, "residual.9": 8}, dict(list(plan.widths.items())[1:])):
        with pytest.raises(BadPlan, match=r"missing or unknown spaces \['residual\.[09]'\]"):
            compress(folder("llama"), plan=dataclasses.replace(plan, widths=widths), **chosen)
    with pytest.raises(BadPlan, match="widths outside 1 to 48"):
        compress(folder("llama"), plan=dataclasses.replace(plan, widths=dict.fromkeys(plan.widths, 49)), **chosen)
    with pytest.raises(BadInput, match="a plan has its own dial"):
        compress(folder("llama"), plan=plan, keep=0.5, **chosen)
    with pytest.raises(BadPlan, match="cannot read the plan"):
        Plan.read(tmp_path / "nowhere")
    assert not (tmp_path / "b").exists()


def test_a_dry_run_of_a_hub_model_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("owner/name", None)
        asked.extend(allow_patterns)
        place = tmp_path / ("a" * 40)
        place.mkdir(exist_ok=True)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            if (folder("llama") / name).exists() and name in allow_patterns:
                shutil.copyfile(folder("llama") / name, place / name)
        return str(place)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = pipeline.preview("owner/name", keep=0.7)
    near = pipeline.preview(folder("llama"), keep=0.7)
    assert "config.json" in asked
    assert not any("safetensors" in pattern and "index" not in pattern for pattern in asked)
    assert (found.outcome.widths, found.after) == (near.outcome.widths, near.after)
    assert found.before.stored == near.before.stored
