"""Exports: what the formats have in common, the places of results, and the two formats of transformers' own classes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exporting
import models
import pytest
import torch
import transformers
from exporting import VARIANTS
from folders import Ran, raises, tree
from safetensors.torch import load_file
from tinies import spoken

from microtome import export as exports
from microtome import layout, plain, raised, verdict
from microtome.errors import BadOutput, NumericalFailure, UnsupportedModel
from microtome.export import export, stock

LLAMAS = {
    "gemma": "Llama", "granite-tied": "Llama", "granite-biases": "Llama", "llama-biases-wide-heads": "Llama",
    "mistral": "Llama", "mistral-window": "Mistral", "phi3-window": "Mistral", "phi3-longrope": "Llama",
    "qwen2-tied": "Llama", "smollm3-all-rotary": "Llama", "llama-sliced": "Mistral", "llama-sliced-tied": "Mistral",
    "llama-heads": "Llama",
}  # fmt: skip
STOCK = {"llama-sliced": "Mistral", "llama-sliced-tied": "Mistral", "llama-heads": "Llama", "qwen3-sliced": "Qwen3"}
CLOSE = 1e-5  # of the largest logit


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", exports.known())
def test_a_format_has_what_formats_have(name: str) -> None:
    form = exports.find(name)
    assert form.SUMMARY
    assert not form.SUMMARY.endswith(".")
    assert form.SUFFIX == "" or form.SUFFIX.startswith(".")
    assert all(callable(one) for one in (form.unfit, form.write, form.verify))
    assert len({one.lower() for one in form.QUANTIZE}) == len(form.QUANTIZE)
    assert name in Path(__file__).parents[1].joinpath("docs", "export.md").read_text()


def test_every_format_is_listed(run: Callable[..., Ran]) -> None:
    found = json.loads(run("list", "--json").out)["formats"]
    assert {name: about["summary"] for name, about in found.items()} == {
        name: exports.find(name).SUMMARY for name in exports.known()
    }
    assert {"gguf", "llama", "stock"} <= set(found)


# --- constants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*models.TINY, "llama-sliced-tied", "qwen3-sliced", "granite-ragged", "phi-skips"])
def test_a_decoder_without_constants_computes_the_same(name: str) -> None:
    config, tensors = models.canonical(name) if name in models.TINY else exporting.variant(name)
    bare, found = plain.plain_config(config), dict[str, torch.Tensor]()
    for part in layout.parts(config):
        found |= plain.plained({key: tensors[key] for key in layout.shapes(config, part)}, part, config)
    ids = models.ids(length=10)
    wanted = models.logits(exporting.decoder(name), ids)
    assert (models.logits(models.loaded(bare, found), ids) - wanted).abs().max() < CLOSE * wanted.abs().max()
    said = bare.to_dict()
    assert (said["norm_divisor"], said["norm_offset"], said["embedding_scale"]) == (None, 0.0, 1.0)
    assert (said["residual_scale"], said["logits_scale"], said["attention_scale"]) == (1.0, 1.0, None)


# --- transformers' own classes --------------------------------------------------------------------------------------


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return models.logits(transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), ids)


@pytest.mark.parametrize(("form", "name", "kind"), [
    *(("llama", name, kind) for name, kind in LLAMAS.items()), *(("stock", name, kind) for name, kind in STOCK.items()),
])  # fmt: skip
def test_another_class_computes_the_same(form: str, name: str, kind: str, tmp_path: Path) -> None:
    found = export(exporting.folder(name, tmp_path), to=form, verify=False)
    assert found.places == (tmp_path / f"{name}-{form}",)
    said = json.loads((found.places[0] / "config.json").read_text())
    assert said["architectures"] == [f"{kind}ForCausalLM"]
    ids = models.ids(length=40)
    wanted = models.logits(exporting.decoder(name), ids)
    assert (logits_of(found.places[0], ids) - wanted).abs().max() < CLOSE * wanted.abs().max()


@pytest.mark.parametrize("name", ["gpt2-tied", "gemma2", "gpt_neox", "phi3-longrope", "olmo2", "opt-tied"])
def test_a_stock_checkpoint_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    place = exporting.folder(name, tmp_path)
    found = export(place, to="stock", verify=False)
    before, after = (load_file(one / "model.safetensors") for one in (place, found.places[0]))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("form", "name", "words"), [
    ("llama", "qwen3-tied", "llama cannot say qk_norm='head'.* --to gguf says more"),
    ("llama", "gpt2-tied", "norm='layer'"),
    ("llama", "llama-ragged", "sizes differ between blocks"),
    ("llama", "smollm3-tied", "per_layer_config"),
    ("llama", "phi3-partial-tied", "partial_rotary_factor=0.75; "),
    ("stock", "llama-ragged", r"sizes differ between blocks .*trust_remote_code or after `import microtome`"),
    ("stock", "llama-skips", r"per_layer_config=\{0: \{'skip': \['self_attn'\]"),
])  # fmt: skip
def test_what_a_class_cannot_say_is_refused(form: str, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words) as caught:
        export(exporting.folder(name, tmp_path), to=form)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_travels_with_weights_travels_on(tmp_path: Path) -> None:
    found = export(spoken("qwen2-tied"), to="llama", out=tmp_path / "out", dtype="bfloat16", verify=False)
    names = {file.name for file in found.files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= names
    assert "modeling_other.py" not in names
    assert found.nbytes == sum(file.stat().st_size for file in found.files)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_rounded_weights_are_judged_before_they_are_rounded(tmp_path: Path) -> None:
    """Multipliers of Granite go into weights, which 16 bits round again: that is told, and is no fault."""
    found = export(exporting.folder("granite-tied", tmp_path), to="llama", dtype="bfloat16", verify=True)
    assert found.verdict is not None
    assert found.verdict.engine.startswith("transformers ")
    assert found.verdict.numbers["largest_difference"] < CLOSE * found.verdict.numbers["scale"]
    assert 0.0 < found.verdict.numbers["bfloat16_divergence"] < 0.1


def test_wrong_weights_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, honest = exporting.folder("llama", tmp_path), raised.write

    def spoilt(opened: Any, what: Any, folder: Path, dtype: Any) -> list[Path]:
        twice = raised.Raised(what.fields, what.config, lambda part, kind: {
            name: tensor * 2 if name == layout.HEAD else tensor for name, tensor in what.tensors(part, kind).items()
        })  # fmt: skip
        return honest(opened, twice, folder, dtype)

    monkeypatch.setattr(raised, "write", spoilt)
    with pytest.raises(NumericalFailure, match="not what the checkpoint computes, and was removed: transformers"):
        export(place, to="stock")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    assert export(place, to="stock", verify=False).verdict is None


# --- places, and what is refused ------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    place = exporting.folder("llama", tmp_path)
    first = export(place, to="llama", verify=False)
    before = tree(first.places[0])
    with raises(BadOutput, f"{first.places[0]} exists. Choose another output folder, or pass --overwrite."):
        export(place, to="llama")
    assert tree(first.places[0]) == before
    export(place, to="llama", dtype="float16", overwrite=True, verify=False)
    assert tree(first.places[0]) != before
    with pytest.raises(BadOutput, match="is or contains the model that is read"):
        export(place, to="llama", out=place, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(BadOutput, match="is not a model folder, so it is not overwritten"):
        export(place, to="llama", out=tmp_path / "mine", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "llama-llama", "mine"}


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    place, out = exporting.folder("llama", tmp_path), tmp_path / "mine.gguf"
    out.write_text("keep me")
    with pytest.raises(BadOutput, match=r"mine.gguf exists. Choose another output, or pass --overwrite"):
        export(place, to="gguf", out=out)
    assert out.read_text() == "keep me"
    export(place, to="gguf", out=out, overwrite=True, verify=False)
    assert out.read_bytes()[:4] == b"GGUF"


def test_wrong_names_are_refused(tmp_path: Path, refused: Callable[..., None]) -> None:
    place = exporting.folder("llama", tmp_path)
    refused("no format named 'ggfu'. Did you mean 'gguf'[?]", "export", place, "--to", "ggfu")
    refused("no type of gguf named 'Q8'. .*Q8_0", "export", place, "--to", "gguf", "--quantize", "Q8")
    refused("--to stock stores no quantised types", "export", place, "--to", "stock", "--quantize", "Q8_0")
    refused("no option of gguf named 'per'. Did you mean 'pre'", "export", place, "--to", "gguf", "-o", "per=x")
    refused("no option of stock named 'pre'", "export", place, "--to", "stock", "-o", "pre=x")
    refused("no dtype named 'int4'", "export", place, "--to", "stock", "--dtype", "int4")
    refused("no folder .*nowhere", "export", tmp_path / "nowhere", "--to", "stock")
    refused(
        "is one file, and 2 types are asked for",
        *("export", place, "--to", "gguf", "--out", tmp_path / "a.gguf", "--quantize", "Q8_0", "--quantize", "Q4_0"),
    )


def test_a_missing_library_is_one_line(
    tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = exporting.folder("llama", tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"the gguf package, .* is not installed: pip install 'microtome\[gguf\]'", "export", place, "--to", "gguf")


def test_a_full_disk_leaves_nothing(tmp_path: Path, refused: Callable[..., None], monkeypatch: Any) -> None:
    place = exporting.folder("llama", tmp_path)

    def full(*_: object) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stock, "write", full)
    refused("could not write .*No space left on device", "export", place, "--to", "stock")


def test_a_model_too_large_to_run_is_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "free_memory", lambda: 1000)
    place = exporting.folder("llama", tmp_path)
    found = export(place, to="stock")
    assert found.verdict is None
    assert any("not verified: that takes" in note for note in found.notes)
    assert export(place, to="stock", overwrite=True, verify=True).verdict is not None


def test_the_command_line(tmp_path: Path, run: Callable[..., Ran]) -> None:
    place = exporting.folder("qwen2-tied", tmp_path)
    ran = run("export", place, "--to", "llama")
    assert ran.code == 0, ran.err
    assert "written for LlamaForCausalLM.\n" in ran.out
    assert "verified with transformers" in ran.out
    assert f"written to {tmp_path / 'qwen2-tied-llama'}, " in ran.out
    ran = run("export", place, "--to", "llama", "--overwrite", "--no-verify", "--json")
    found = json.loads(ran.out)
    assert (found["format"], found["verdict"]) == ("llama", None)
    assert found["nbytes"] == sum(Path(file).stat().st_size for file in found["files"])


def test_a_verdict_on_what_is_not_finite_fails() -> None:
    wanted = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert verdict.held("engine 1", wanted, wanted + 1e-6).passed
    assert not verdict.held("engine 1", wanted, wanted * 1.01).passed
    assert not verdict.held("engine 1", wanted, wanted * torch.nan).passed
    assert not verdict.informed(verdict.held("engine 1", wanted, wanted), "Q4_0", wanted, wanted * torch.nan).passed


def test_names_of_variants_are_their_own() -> None:
    assert not set(VARIANTS) & set(models.TINY)
