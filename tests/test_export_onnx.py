"""ONNX: every decoder in ONNX Runtime is what transformers computes, through the cache, and files are as others read them."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import raises
from models import RAGGED, TINY, error, ids, loaded, logits, ours, random_tensors, stock, stored
from safetensors.torch import load_file, save_file
from tinies import HELD_OUT, compress, folder, spoken
from torch import Tensor

from microtome import demo, export, layout
from microtome.errors import BadInput, BadOutput, NumericalFailure, UnsupportedModel
from microtome.export import onnx as form
from microtome.export.onnx import genai
from microtome.export.onnx.decoder import attentive, decoder, unfit
from microtome.export.onnx.graph import Graph
from microtome.export.onnx.session import Session
from microtome.loading import load
from microtome.modeling_microtome import MicrotomeForCausalLM
from microtome.verdict import Absent

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHARED = Path(__file__).parents[1].parent / "shared"


def written(model: Any, place: Path, dtype: torch.dtype = torch.float32, data: str | None = None) -> Path:
    """The graph of one of our decoders in a file."""
    tensors = dict(model.state_dict())
    with Graph(dtype, None if data is None else place / data) as graph:
        decoder(graph, model.config, lambda part: {name: tensors[name] for name in layout.shapes(model.config, part)})
        graph.save(place / "model.onnx")
    return place / "model.onnx"


def chunked(path: Path, tokens: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """Logits through the cache, so many tokens at a time."""
    session = Session.opened(path, threads=1)
    cache, found, start = session.empty(len(tokens)), [], 0
    for size in chunks:
        out, cache = session.step(tokens[:, start : start + size], cache, start)
        found.append(torch.from_numpy(out.numpy()))
        start += size
    assert start == tokens.shape[1]
    return torch.cat(found, dim=1)


# --- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    tokens = ids(rows=3, length=12)
    path = written(ours(name), tmp_path)
    onnx.checker.check_model(path, full_check=True)
    assert error(chunked(path, tokens, (12,)), logits(stock(name), tokens)) <= 1e-5
    assert error(chunked(path, tokens, (6, 1, 1, 4)), logits(stock(name), tokens)) <= 1e-5


@pytest.mark.parametrize("name", RAGGED)
def test_decoders_that_no_stock_config_says(name: str, tmp_path: Path) -> None:
    model = loaded(RAGGED[name], random_tensors(RAGGED[name], dtype=torch.float32))
    tokens = ids(rows=2, length=11, vocabulary=61)
    path = written(model, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    assert error(chunked(path, tokens, (5, 1, 5)), logits(model, tokens)) <= 1e-5


def test_padding_on_the_left(tmp_path: Path) -> None:
    """Masked places are not seen, positions are what the caller says."""
    tokens, mask = ids(rows=2, length=9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for name in ("llama-gqa-llama3-tied", "opt-tied", "gemma2"):
        session = Session.opened(written(ours(name), tmp_path), threads=1)
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
        feed = {key: session.value(value.numpy()) for key, value in given.items()} | session.empty(2)
        found = torch.from_numpy(session.engine.run_with_ort_values(["logits"], feed)[0].numpy())
        want = logits(stock(name), tokens, attention_mask=mask, position_ids=places)
        assert error(found[0], want[0]) <= 1e-5
        assert error(found[1, 4:], want[1, 4:]) <= 1e-5


def test_long_texts_take_the_far_frequencies(tmp_path: Path) -> None:
    config = ours("phi3-longrope").config
    original = config.rope_parameters["original_max_position_embeddings"]
    assert original < config.max_position_embeddings
    path = written(ours("phi3-longrope"), tmp_path)
    for length in (original, original + 1):
        tokens = ids(rows=1, length=length)
        assert error(chunked(path, tokens, (length,)), logits(stock("phi3-longrope"), tokens)) <= 1e-5


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "gemma2", "gpt2-tied", "olmo2"])
def test_half_precision_keeps_norms_and_softmax_in_fp32(name: str, tmp_path: Path) -> None:
    tokens = ids(rows=2, length=10)
    path = written(ours(name), tmp_path, torch.float16)
    onnx.checker.check_model(path, full_check=True)
    assert error(chunked(path, tokens, (7, 1, 2)), logits(stock(name), tokens)) <= 1e-2
    caches = [one for one in onnx.load(path).graph.input if one.name.startswith("past")]
    assert {one.type.tensor_type.elem_type for one in caches} == {onnx.TensorProto.FLOAT16}


# --- the file -------------------------------------------------------------------------------------------------------


def shapes(values: Any) -> dict[str, list[Any]]:
    return {one.name: [dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in values}


def test_names_and_shapes_are_what_runtimes_expect(tmp_path: Path) -> None:
    """As optimum names them. A block without attention has no cache; heads and widths are each block's own."""
    graph = onnx.load(written(loaded(RAGGED["heads"], random_tensors(RAGGED["heads"])), tmp_path)).graph
    assert shapes(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": ["batch_size", 3, "past_sequence_length", 6],
        "past_key_values.0.value": ["batch_size", 3, "past_sequence_length", 5],
        "past_key_values.1.key": ["batch_size", 1, "past_sequence_length", 8],
        "past_key_values.1.value": ["batch_size", 1, "past_sequence_length", 8],
        "past_key_values.2.key": ["batch_size", 4, "past_sequence_length", 8],
        "past_key_values.2.value": ["batch_size", 4, "past_sequence_length", 3],
    }
    out = shapes(graph.output)
    assert list(out)[:3] == ["logits", "present.0.key", "present.0.value"]
    assert out["logits"] == ["batch_size", "sequence_length", 61]
    assert out["present.2.value"] == ["batch_size", 4, "total_sequence_length", 3]
    skipped = RAGGED["skipped halves"]
    graph = onnx.load(written(loaded(skipped, random_tensors(skipped)), tmp_path)).graph
    assert attentive(skipped) == [1, 2]
    assert sorted(name for name in shapes(graph.input) if name.endswith("key")) == [
        "past_key_values.1.key",
        "past_key_values.2.key",
    ]


def test_operators_are_of_the_standard_and_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = ours("llama-gqa-llama3-tied")
    made = onnx.load(written(model, tmp_path))
    assert [(one.domain, one.version) for one in made.opset_import] == [("", 21)]
    assert {node.domain for node in made.graph.node} == {""}
    numbers = sum(int(np.prod(one.dims)) for one in made.graph.initializer if one.data_type == onnx.TensorProto.FLOAT)
    parameters = sum(one.numel() for one in model.parameters())
    assert parameters <= numbers <= parameters + 100  # beside weights: scales, frequencies


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "INLINE", 0)
    found = export.export(folder("llama"), to="onnx", out=tmp_path / "out", verify=True)
    assert {file.name for file in found.files} >= {"model.onnx", "model.onnx.data", "config.json"}
    data = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert (tmp_path / "out" / "model.onnx").stat().st_size < data
    outside = [one for one in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
               if one.data_location == onnx.TensorProto.EXTERNAL]  # fmt: skip
    facts = [{one.key: one.value for one in tensor.external_data} for tensor in outside]
    assert {one["location"] for one in facts} == {"model.onnx.data"}
    assert all(int(one["offset"]) % 4096 == 0 for one in facts)
    assert max(int(one["offset"]) + int(one["length"]) for one in facts) == data
    assert error(chunked(tmp_path / "out" / "model.onnx", HELD_OUT, (20, 4)), logits(stock("llama"), HELD_OUT)) <= 1e-5


# --- the verb -------------------------------------------------------------------------------------------------------


def test_a_folder_with_all_that_travels(run: Any, tmp_path: Path) -> None:
    ran = run("export", spoken(), "--to", "onnx", "--out", tmp_path / "out", "--verify", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["verdict"]["passed"]
    assert found["verdict"]["words"].startswith("ONNX Runtime")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert not {"modeling_other.py", "training_args.bin", "README.md"} & names
    assert {Path(file).name for file in found["files"]} == names
    assert found["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    again = run("export", spoken(), "--to", "onnx", "--out", tmp_path / "out", "--overwrite", "--no-verify")
    assert (again.code, "verified" in again.out) == (0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_settings_of_genai_are_those_of_the_graph(tmp_path: Path) -> None:
    """Where its one size of cache is every block's; else a line says that the file is left out."""
    found = export.export(folder("llama-gqa-llama3-tied"), to="onnx", out=tmp_path / "even", verify=False)
    said = json.loads((tmp_path / "even" / "genai_config.json").read_text())["model"]
    inputs = shapes(onnx.load(tmp_path / "even" / "model.onnx").graph.input)
    blocks = range(said["decoder"]["num_hidden_layers"])
    names = [said["decoder"]["inputs"][f"past_{kind}_names"] % block for block in blocks for kind in ("key", "value")]
    assert sorted([*names, "input_ids", "attention_mask", "position_ids"]) == sorted(inputs)
    size = [said["decoder"]["num_key_value_heads"], said["decoder"]["head_size"]]
    assert all([inputs[name][1], inputs[name][3]] == size for name in names)
    outputs = shapes(onnx.load(tmp_path / "even" / "model.onnx").graph.output)
    assert {said["decoder"]["outputs"]["present_value_names"] % block for block in blocks} <= set(outputs)
    assert said["vocab_size"] == outputs["logits"][2]
    assert not any("genai" in note for note in found.notes)
    assert not genai.even(RAGGED["heads"])
    assert not genai.even(RAGGED["skipped halves"])
    config = RAGGED["skipped halves"]
    MicrotomeForCausalLM.save_pretrained(loaded(config, random_tensors(config, dtype=torch.float32)), tmp_path / "own")
    found = export.export(tmp_path / "own", to="onnx", out=tmp_path / "uneven", verify=True)
    assert "genai_config.json is left out: ONNX Runtime GenAI wants caches of one size in every block." in found.notes
    assert not (tmp_path / "uneven" / "genai_config.json").exists()


def test_genai_goes_on_as_transformers_does(tmp_path: Path) -> None:
    library = pytest.importorskip("onnxruntime_genai")
    export.export(demo.MODEL, to="onnx", out=tmp_path / "out", dtype="float32", verify=False)
    engine = library.Model(str(tmp_path / "out"))
    chosen = library.GeneratorParams(engine)
    chosen.set_search_options(max_length=30, min_length=30)
    generator = library.Generator(engine, chosen)
    prompt = ids(rows=1, length=8)
    generator.append_tokens(prompt[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    model = load(demo.MODEL, device=torch.device("cpu"), dtype=torch.float32)
    want = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=22, min_new_tokens=22, do_sample=False
    )
    assert [int(one) for one in generator.get_sequence(0)] == want[0].tolist()


@pytest.mark.parametrize("keep", [0.8, "own"])
def test_compressed_models(keep: Any, tmp_path: Path) -> None:
    """A stock result, and one of our own class with a basis at every junction."""
    chosen = {"keep": 0.8} if keep != "own" else {"keep": 0.7, "options": {"basis": "junction"}}
    result = compress(folder("llama"), tmp_path / "small", **chosen)
    assert result.stock == (keep != "own")
    found = export.export(tmp_path / "small", to="onnx", verify=True)
    assert found.places == (tmp_path / "small-onnx",)
    assert "auto_map" not in json.loads((tmp_path / "small-onnx" / "config.json").read_text())
    path = tmp_path / "small-onnx" / "model.onnx"
    assert error(chunked(path, HELD_OUT, (20, 3, 1)), logits(result.load(), HELD_OUT)) <= 1e-5


def test_types(tmp_path: Path, refused: Any) -> None:
    half = spoken("llama", torch.bfloat16)
    found = export.export(half, to="onnx", out=tmp_path / "single", verify=True)
    assert "weights are bfloat16; the file holds them as float32." in found.notes
    assert export.export(half, to="onnx", out=tmp_path / "half", dtype="float16", verify=True).nbytes < found.nbytes
    refused(r"no bfloat16 on a CPU: give --dtype float32 or float16",
            "export", folder("llama"), "--to", "onnx", "--dtype", "bf16", "--out", tmp_path / "no")  # fmt: skip
    refused(r"--to onnx stores no quantised types: leave out --quantize Q8_0",
            "export", folder("llama"), "--to", "onnx", "--quantize", "Q8_0", "--out", tmp_path / "no")  # fmt: skip


def test_a_file_that_computes_something_else_is_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bias of one block, a thousandth of its size."""
    write = form.write

    def wrong(opened: Any, place: Path, request: Any) -> list[Path]:
        tensors = load_file(opened.source.folder / "model.safetensors")
        for name, tensor in tensors.items():
            if "layers.1.mlp.down_proj" in name:
                tensors[name] = tensor * 1.001
        other = tmp_path / "other"
        other.mkdir()
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        (other / "config.json").write_text((opened.source.folder / "config.json").read_text())
        with export.open_source(other) as source:
            return write(export.planner.opened(source), place, request)

    monkeypatch.setattr(form, "write", wrong)
    with raises(NumericalFailure, "is not what the checkpoint computes, and was removed"):
        export.export(folder("llama"), to="onnx", out=tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    assert "rope_type dynamic" in str(unfit(changed("llama", rope_parameters={"rope_type": "dynamic"})))
    assert unfit(ours("llama").config) is None
    stretched = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    place = tmp_path / "dynamic"
    place.mkdir()
    fields = json.loads((folder("llama") / "config.json").read_text()) | {"rope_parameters": stretched}
    (place / "config.json").write_text(json.dumps(fields))
    save_file(stored(stock("llama")), place / "model.safetensors", metadata={"format": "pt"})
    with raises(UnsupportedModel, r"--to onnx cannot say .*longest text so far \(rope_type dynamic\)"):
        export.export(place, to="onnx")
    assert "activation 'mish' has no translation" in str(unfit(changed("llama", hidden_act="mish")))
    (tmp_path / "full").mkdir()
    with raises(BadOutput, "exists. Choose another output folder, or pass --overwrite"):
        export.export(folder("llama"), to="onnx", out=tmp_path / "full")
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with raises(BadInput, "ONNX Runtime cannot load .*no.onnx"):
        Session.opened(tmp_path / "no.onnx")


def changed(name: str, **fields: Any) -> Any:
    config = type(ours(name).config)(**ours(name).config.to_dict())
    for field, value in fields.items():
        setattr(config, field, value)
    return config


def test_missing_libraries_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = export.export(folder("llama"), to="onnx", out=tmp_path / "out")
    assert found.verdict is None
    assert found.notes == ("not verified: onnxruntime is not installed: pip install 'microtome[onnx]'.",)
    with raises(Absent, r"onnxruntime is not installed: pip install 'microtome\[onnx\]'"):
        export.export(folder("llama"), to="onnx", out=tmp_path / "other", verify=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with raises(Absent, r"onnx is not installed: pip install 'microtome\[onnx\]'"):
        export.export(folder("llama"), to="onnx", out=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_program_of_the_document_goes_on_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    export.export(demo.MODEL, to="onnx", out="smaller-onnx", dtype="float32", verify=False)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/onnx.md", "exec"), names)
    model = load(demo.MODEL, device=torch.device("cpu"), dtype=torch.float32)
    prompt = torch.tensor([names["tokenizer"]("The list").input_ids])
    want = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert names["text"] == want[0].tolist()
    assert capsys.readouterr().out.strip() == names["tokenizer"].decode(want[0]).strip()


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")
def test_a_trained_model_goes_on_as_in_transformers(tmp_path: Path) -> None:
    """Greedy text of a cut model, token by token through the cache, beside transformers' own generate."""
    calibration = torch.load(SHARED / "data" / "tokens" / "stories-3m.calib.pt", weights_only=True)[:16]
    compress(SHARED / "models" / "stories-3m", tmp_path / "small", keep=0.8, data=calibration, dtype="float32")
    found = export.export(tmp_path / "small", to="onnx", verify=True)
    assert found.verdict is not None
    assert found.verdict.numbers["same_argmax"] == 1.0
    model = load(tmp_path / "small", device=torch.device("cpu"), dtype=torch.float32)
    prompt = calibration[:1, :20]
    want = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    session = Session.opened(found.files[0], threads=1)
    cache, text, new = session.empty(1), prompt, prompt
    for _ in range(40):
        out, cache = session.step(new, cache, text.shape[1] - new.shape[1])
        new = torch.from_numpy(out.numpy()[:, -1:].argmax(-1))
        text = torch.cat((text, new), dim=1)
    assert torch.equal(text, want)
