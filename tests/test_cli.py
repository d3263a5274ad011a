"""The command line: every verb, and every mistake in one line with exit code 2 and nothing left behind."""

import builtins
import copy
import ctypes
import decimal
import errno
import heapq
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import Ran, entry, raw, sharded, tree
from models import TINY, built, error, logits
from safetensors.torch import load_file, save_file
from tinies import CALIBRATION, HELD_OUT, folder, spoken, text
from typer.testing import CliRunner

import microtome_cli
from microtome import demo, running
from microtome.edit import Plan

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub, and none waits for it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where tests work: ids to calibrate and to measure on, and a text."""
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    torch.save(HELD_OUT, tmp_path / "held.pt")
    (tmp_path / "text.txt").write_text(text())
    return tmp_path


def compress(model: object, place: Path, *more: object) -> list[object]:
    data = () if "--data" in more else ("--data", place / "ids.pt")
    return ["compress", model, "--out", place / "out", *data, "--no-evaluate", *more]


SLICE = ("--slice", 0.3)


# --- verbs ----------------------------------------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_transformers() -> None:
    """In a process of its own: the script's module, the help of a verb, and then a look at what came along."""
    program = (
        "import sys, microtome_cli\n"
        "sys.argv = ['microtome', *sys.argv[1:]]\n"
        "try: microtome_cli.main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'microtome', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for verb, word in (((), "compress"), (("compress",), "--slice")):
        done = subprocess.run(
            [sys.executable, "-c", program, *verb, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
        assert done.stderr == ""


def test_the_installed_script_runs() -> None:
    script = Path(sys.executable).with_name("microtome")
    if not script.exists():
        pytest.skip("not installed")
    done = subprocess.run([script, "frobnicate"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "microtome: No such command 'frobnicate'. See `microtome --help`.\n"


def test_every_verb_has_help() -> None:
    runner = CliRunner()
    assert runner.invoke(microtome_cli.app, ["--help"]).exit_code == 0
    for verb in ("compress", "plan", "evaluate", "generate", "list", "demo"):
        found = runner.invoke(microtome_cli.app, [verb, "--help"])
        assert found.exit_code == 0
        assert verb in found.output


def test_compress(place: Path, run: Callable[..., Ran]) -> None:
    arguments = ["compress", spoken(), "--out", place / "out", *SLICE, "--data", place / "ids.pt"]
    ran = run(*arguments, "--eval-data", place / "held.pt")
    assert ran.code == 0
    assert ran.err == ""
    for words in ("decoder parameters", "perplexity", "4 windows of 24", "loads with transformers alone"):
        assert words in ran.out
    assert ran.out.endswith(f"written to {place / 'out'}\n")
    assert type(transformers.AutoModelForCausalLM.from_pretrained(place / "out")) is transformers.MistralForCausalLM
    card = (place / "out" / "README.md").read_text()
    assert f"microtome compress {spoken()} --out {place / 'out'} --slice 0.3" in card


def test_compress_json(place: Path, run: Callable[..., Ran]) -> None:
    options = ["-o", "basis=junction", "--option", "gauge=dense", "--untie"]
    name = spoken("llama-gqa-llama3-tied")
    ran = run("compress", name, "--out", place / "out", *SLICE, "--data", place / "text.txt", "--length", 24,
              "--samples", 16, "--seed", 3, "--dtype", "bfloat16", "--max-shard-size", "30KB", *options, "--json")  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    plan = json.loads((place / "out" / "plan.json").read_text())
    assert found == plan["result"]
    assert not found["stock"]
    assert found["perplexity"]["after"]["source"] == "text.txt (last 10 %)"
    assert found["after"]["nbytes"] == 2 * found["after"]["stored"]
    assert plan["options"]["untie"] is True
    assert plan["options"]["gauge"] == "dense"
    assert plan["calibration"] | {"windows": 16, "length": 24} == plan["calibration"]
    assert len(list((place / "out").glob("*.safetensors"))) > 1
    assert Plan.from_json(plan).slice == 0.3


def test_compress_again_over_it(place: Path, run: Callable[..., Ran]) -> None:
    assert run(*compress(folder("llama"), place, *SLICE)).code == 0
    first = tree(place / "out")
    assert run(*compress(folder("llama"), place, "--slice", 0.5, "--overwrite")).code == 0
    assert tree(place / "out").keys() == first.keys()
    assert (place / "out" / WEIGHTS).read_bytes() != first[WEIGHTS]


def test_plan_says_what_compress_will_do(place: Path, run: Callable[..., Ran]) -> None:
    dials = ["--keep", 0.7, "-o", "basis=junction"]
    before = tree(place)
    dry = json.loads(run("plan", folder("qwen2-tied"), *dials, "--json").out)
    shown = run("plan", folder("qwen2-tied"), *dials)
    assert tree(place) == before
    wet = json.loads(run(*compress(folder("qwen2-tied"), place, *dials, "--json")).out)
    assert dry["after"] == wet["after"]
    assert dry["before"] == wet["before"]
    assert dry["stock"] == wet["stock"]
    widths = json.loads((place / "out" / "plan.json").read_text())["widths"]
    assert dry["widths"] == widths
    assert f"widths of the residual stream: {widths['residual.0']}\n" in shown.out
    for words in ("decoder parameters", "memory: one block", "Microtome checkpoint", f"{wet['after']['stored']:,}"):
        assert words in shown.out
    whole = run("plan", folder("llama"), "--keep", 1).out
    assert re.search(r"stored parameters .* 1\.0000", whole)
    assert "unchanged" in whole


def test_evaluate(place: Path, run: Callable[..., Ran]) -> None:
    name, other = folder("llama"), folder("mistral")
    ran = run("evaluate", name, "--data", place / "held.pt", "--baseline", other, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert list(found) == [str(name), str(other)]
    assert found[str(name)]["windows"] == 4
    shown = run("evaluate", name, "--data", place / "held.pt", "--limit", 2, "--length", 16)
    assert "2 windows of 16, stride 16, float32, held.pt" in shown.out
    assert f"{running.evaluate(name, HELD_OUT[:2, :16])[str(name)].value:.4f}  {name}\n" in shown.out


def test_several_sources_with_weights_and_a_column(place: Path, run: Callable[..., Ran]) -> None:
    (place / "b.jsonl").write_text(json.dumps({"body": text(seed=1), "title": "a"}))
    data = (
        "--data",
        f"{place / 'text.txt'}=3",
        "--data",
        place / "b.jsonl",
        "--data",
        "self=0.5",
        "--text-column",
        "body",
    )
    small = (*SLICE, "--samples", 9, "--length", 24)
    ran = run("compress", spoken(), "--out", place / "out", *data, *small)
    assert (ran.code, ran.err) == (0, "")
    assert "of 3 sources the first text is measured on, text.txt (last 10 %)" in ran.out
    sources = json.loads((place / "out" / "plan.json").read_text())["calibration"]["sources"]
    assert [(one["source"].split(" (")[0], one["weight"], one["windows"]) for one in sources] == [
        ("text.txt", 3.0, 6),
        ("b.jsonl", 1.0, 2),
        ("self", 0.5, 1),
    ]
    found = run("evaluate", spoken(), "--data", place / "b.jsonl", "--text-column", "body", "--length", 24, "--json")
    assert json.loads(found.out)[str(spoken())]["source"] == "b.jsonl"
    refused = run("evaluate", spoken(), "--data", place / "b.jsonl", "--text-column", "tail")
    assert (refused.code, "named 'tail'" in refused.err) == (2, True)
    assert "says nothing: measure on other text than self" in run("evaluate", spoken(), "--data", "self").err


def test_generate(place: Path, run: Callable[..., Ran]) -> None:
    ran = run("generate", spoken(), "abc", "--tokens", 4)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == running.generate(spoken(), "abc", tokens=4) + "\n"
    hot = ["generate", spoken(), "abc", "--tokens", 9, "--temperature", 3]
    assert run(*hot, "--seed", 1).out == run(*hot, "--seed", 1).out != run(*hot, "--seed", 2).out
    assert place.exists()


def test_list(run: Callable[..., Ran]) -> None:
    found = json.loads(run("list", "--json").out)
    assert set(found) == {"methods", "architectures", "data", "formats"}
    assert set(found["architectures"]) >= {"llama", "mistral", "opt", "qwen2", "qwen3"}
    assert found["data"] == ["alpaca", "c4", "ptb", "self", "wikitext2"]
    options = found["methods"]["slicegpt"]["options"]
    assert options["basis"] == {"default": "global", "values": ["global", "junction"]}
    assert options["untie"]["default"] is False
    shown = run("list").out
    for words in (
        "slicegpt: rotate the residual stream",
        "-o basis=global",
        "-o untie=false",
        "llama, mistral",
        "    c4                        English web pages",
        "owner/name on the hub with --text-column",
    ):
        assert words in shown


@pytest.mark.skipif(not (demo.MODEL / WEIGHTS).exists(), reason="the demo model is not there")
def test_demo(place: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    train = [str(module.__doc__) for module in (heapq, pickle, random, statistics)]
    monkeypatch.setattr(demo, "corpus", lambda: (train, [str(decimal.__doc__), str(copy.__doc__)]))  # read in test_demo
    for _ in range(2):  # it may be run again
        ran = run("demo", "--out", place / "out", "--keep", 0.8, "--json")
        assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["stock"]
    assert found["after"]["decoder"] / found["before"]["decoder"] == pytest.approx(0.8, abs=0.03)
    assert found["perplexity"]["after"]["value"] > found["perplexity"]["before"]["value"]
    assert "held-out part" in found["perplexity"]["after"]["source"]
    assert "microtome demo" in (place / "out" / "README.md").read_text()


def test_a_bar_for_people_and_silence_for_programs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with microtome_cli.Bar(quiet=False) as bar:
        bar("block 1 of 3", 0.5)
        bar("block 1 of 3", 1.0)
        assert list(bar.tasks) == ["block 1 of 3"]
    assert "block 1 of 3" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with microtome_cli.Bar(quiet=True) as bar:
        bar("block 1 of 3", 0.5)
    assert sys.stderr.getvalue() == ""
    assert capfd.readouterr() == ("", "")


# --- nothing of a checkpoint is executed ----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "other"])
def test_nothing_of_a_checkpoint_is_executed(model_type: str, place: Path, run: Callable[..., Ran]) -> None:
    """Code for the config, the model, the tokenizer and for generating; every verb leaves all of it alone."""
    source, sentinel = place / "source", place / "executed"
    shutil.copytree(spoken(), source)
    trap = f"open({str(sentinel)!r}, 'w').close()\n"
    (source / "custom_generate").mkdir()
    for name in ("configuration_other.py", "modeling_other.py", "tokenization_other.py", "custom_generate/generate.py"):
        (source / name).write_text(trap)
    autos = {
        "AutoConfig": "configuration_other.C",
        "AutoModelForCausalLM": "modeling_other.M",
        "AutoModel": "modeling_other.B",
    }
    tokenizers = {"AutoTokenizer": ["tokenization_other.T", "tokenization_other.T"]}
    for name, changes in (
        ("config.json", {"model_type": model_type, "auto_map": autos | tokenizers}),
        ("tokenizer_config.json", {"auto_map": tokenizers, "tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        path = source / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    codes = [
        run(*arguments).code
        for arguments in (
            ["compress", source, "--out", place / "out", *SLICE, "--data", place / "text.txt", "--length", 24],
            ["plan", source, *SLICE],
            ["evaluate", source, "--data", place / "text.txt", "--length", 24],
            ["generate", source, "abc", "--tokens", 2],
        )
    ]
    assert codes == ([0] * 4 if model_type == "llama" else [2] * 4)
    assert not sentinel.exists()
    if model_type == "llama":
        config = json.loads((place / "out" / "config.json").read_text())
        assert not list((place / "out").rglob("*.py"))
        assert "other" not in json.dumps(config.get("auto_map", {})), "what was left behind must not be named"


# --- mistakes in what is typed --------------------------------------------------------------------------------------

TYPED: dict[str, tuple[list[object], str]] = {
    "no dial": ([], "say how much stays: give --keep .* or --slice"),
    "both dials": (["--keep", 0.8, "--slice", 0.2], "two dials for one budget: give only one"),
    "keep 0": (["--keep", 0], r"--keep 0\.0 is outside \(0, 1\]"),
    "keep 1.5": (["--keep", 1.5], r"--keep 1\.5 is outside \(0, 1\]"),
    "keep -1": (["--keep", -1], r"--keep -1\.0 is outside \(0, 1\]"),
    "slice 1": (["--slice", 1], r"--slice 1\.0 is outside \[0, 1\)"),
    "keep is text": (["--keep", "most"], r"Invalid value for '--keep'.*See `microtome compress --help`"),
    "method": ([*SLICE, "-m", "slicegtp"], r"no method named 'slicegtp'\. Did you mean 'slicegpt'\? Known: .*slicegpt"),
    "option": ([*SLICE, "-o", "gage=dense"], r"no option of slicegpt named 'gage'\. Did you mean 'gauge'\? Known: basis, "),
    "value": ([*SLICE, "-o", "gauge=densest"], r"option gauge named 'densest'\. Did you mean 'dense'\? Known: auto, dense"),
    "no value": ([*SLICE, "-o", "untie"], "-o untie has no value: write -o name=value"),
    "number": ([*SLICE, "-o", "ridge=much"], "option ridge of slicegpt takes float, not 'much'"),
    "contradiction": ([*SLICE, "-o", "gauge=dense"], "gauge=dense needs basis=junction"),
    "flag": ([*SLICE, "--untied"], r"No such option: --untied.*--untie.*See `microtome compress --help`"),
    "dtype": ([*SLICE, "--dtype", "float61"], r"no dtype named 'float61'\. Did you mean 'float16'\?"),
    "device": ([*SLICE, "--device", "gpu"], "no device named 'gpu': use auto, cpu, cuda or cuda:N"),
    "size": ([*SLICE, "--max-shard-size", "5XB"], "'5XB' is not a size. Give a number of bytes"),
    "samples": ([*SLICE, "--samples", 0], "Invalid value for '--samples'"),
    "length": ([*SLICE, "--length", 1], "length must be at least 2 tokens"),
    "seed": ([*SLICE, "--seed", -1], "seed must lie between 0 and"),
    "multiple": (["--keep", 0.8, "--multiple-of", 64], "--multiple-of 64 leaves no width below 48: choose a smaller multiple"),
    "width": (["--slice", 0.95], r"--slice 0\.95 of width 48 leaves nothing at a multiple of 8"),
    "revision": ([*SLICE, "--revision", "main"], "is a folder and has no revision 'main'"),
    "data": ([*SLICE, "--data", "nowhere.txt"], "no file or folder 'nowhere.txt'. Data sets known by name: alpaca, c4"),
    "weight": ([*SLICE, "--data", "c4=0,5"], "--data c4=0,5: '0,5' is no weight, and there is no file or folder of that"),
    "negative weight": ([*SLICE, "--data", "c4=-1"], r"the weight of c4 is -1\.0: give a number from 0 on"),
    "hub": ([*SLICE, "--data", "owner/name"], "for the data set owner/name on the hub, name its column by --text-column"),
    "data set": ([*SLICE, "--data", "wikitext3"], r"no data set named 'wikitext3'\. Did you mean 'wikitext2'\?"),
    "text": ([*SLICE, "--data", "TEXT"], "text.txt.* is text, but the model folder has no tokenizer: pass token ids"),
    "scratch": ([*SLICE, "--scratch", "/dev/null/none"], "sums in /dev/null/none: Not a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", TYPED)
def test_what_is_typed_wrong(case: str, place: Path, refused: Callable[..., None]) -> None:
    arguments, words = TYPED[case]
    refused(
        words, *compress(folder("llama"), place, *(place / "text.txt" if one == "TEXT" else one for one in arguments))
    )


def test_verbs_and_arguments(place: Path, refused: Callable[..., None], run: Callable[..., Ran]) -> None:
    refused(r"No such command 'comprss'\. Did you mean 'compress'\? See `microtome --help`", "comprss")
    refused("Missing .*model.*See `microtome compress --help`", "compress", "--out", place / "out")
    refused("Missing option '--out'", "compress", folder("llama"), *SLICE)
    assert run() == run("--help")


@pytest.mark.parametrize("verb", ["compress", "plan", "evaluate", "generate"])
def test_a_model_that_is_not_there(
    verb: str, place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(model: object) -> list[object]:
        rest = {
            "compress": compress(model, place, *SLICE)[2:],
            "plan": SLICE,
            "evaluate": ["--data", place / "held.pt"],
            "generate": ["abc"],
        }
        return [verb, model, *rest[verb]]

    shutil.copytree(folder("llama"), place / "tiny-llama")
    refused(
        "no folder '.*/tiny-lama'. Did you mean '.*/tiny-llama'\\? Give an existing model folder",
        *arguments(place / "tiny-lama"),
    )
    refused("ids.pt is a file. Give the folder that holds it", *arguments(place / "ids.pt"))
    refused(
        "no folder named 'owner/tiny-llama', and the hub could not be reached .*hf download",
        *arguments("owner/tiny-llama"),
    )
    monkeypatch.chdir(place)
    (place / "tiny-llama").rename(place / "tiny-lima")
    refused("no folder named 'tiny-lime', and .*Did you mean 'tiny-lima'\\?", *arguments("tiny-lime"))


# --- mistakes in what is read ---------------------------------------------------------------------------------------


def changed(source: Path, **fields: object) -> None:
    config = json.loads((source / "config.json").read_text())
    kept = {key: value for key, value in (config | fields).items() if value is not None}
    (source / "config.json").write_text(json.dumps(kept))


def restored(source: Path, **tensors: torch.Tensor | None) -> None:
    """Store other tensors: some replaced or added, those that are None left out."""
    held = load_file(source / WEIGHTS)
    for name, tensor in tensors.items():
        held[name.replace("__", ".")] = tensor  # type: ignore[assignment]
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, source / WEIGHTS)


def split_up(
    source: Path, weight_map: Callable[[dict[str, str]], dict[str, str]], keep: tuple[str, ...] = ("a", "b")
) -> None:
    """Two shards, an index as `weight_map` makes it, and only the shards in `keep`."""
    held = load_file(source / WEIGHTS)
    names = sorted(held)
    halves = {"a": names[:9], "b": names[9:]}
    sharded(source.parent / "shards", **{half: {name: held[name] for name in names} for half, names in halves.items()})
    (source / WEIGHTS).unlink()
    for half in keep:
        shutil.copy(source.parent / "shards" / f"{half}.safetensors", source)
    index = json.loads((source.parent / "shards" / f"{WEIGHTS}.index.json").read_text())
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map(index["weight_map"])}))


def cut_off(source: Path) -> None:
    path = source / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(source: Path) -> None:
    torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()


def overlapping(source: Path) -> None:
    entries = {"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)}
    (source / WEIGHTS).write_bytes((raw(source.parent / "raw", entries, b"\0" * 24) / WEIGHTS).read_bytes())


READ: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (lambda s: changed(s, model_type="mamba"), "architecture 'mamba' is not supported. Supported: .*llama, mistral"),
    "feature": (lambda s: changed(s, clip_qkv=8.0), r"features (that )?Microtome does not know: clip_qkv=8\.0"),
    "no model type": (lambda s: changed(s, model_type=None), r"config\.json has no model_type"),
    "config refused": (lambda s: changed(s, hidden_act=7), "transformers refuses this config of 'llama'"),
    "config is no JSON": (lambda s: (s / "config.json").write_text("{"), r"config\.json is not JSON"),
    "no config": (lambda s: (s / "config.json").unlink(), r"has no config\.json"),
    "sizes": (lambda s: changed(s, intermediate_size=84), r"mlp\.gate_proj\.weight has shape \[80, 48\], and config\.json says \[84, 48\]"),
    "missing tensor": (lambda s: restored(s, model__norm__weight=None), r"lacks 1 tensors of a llama: model\.norm\.weight"),
    "more blocks": (lambda s: changed(s, num_hidden_layers=2), r"has 9 tensors that Microtome does not know: model\.layers\.2\.input"),
    "missing shard": (lambda s: split_up(s, lambda index: index, keep=("a",)), r"index\.json names b\.safetensors, which is not there"),
    "outside": (lambda s: split_up(s, lambda index: index | {sorted(index)[0]: "../a.safetensors"}), r"names a shard outside its folder: '\.\./a\.saf"),
    "wrong index": (lambda s: split_up(s, lambda index: dict.fromkeys(index, "a.safetensors")), r"places .* in a\.safetensors, which does not hold it"),
    "truncated": (cut_off, r"model\.safetensors is truncated: it has [\d,]+ of [\d,]+ bytes"),
    "corrupt": (lambda s: (s / WEIGHTS).write_bytes(struct.pack("<Q", 5) + b"junk!"), r"model\.safetensors has a corrupt header"),
    "overlap": (overlapping, r"model\.safetensors has a corrupt header \(b begins at byte"),
    "empty": (lambda s: (s / WEIGHTS).write_bytes(b""), r"model\.safetensors is truncated"),
    "no weights": (lambda s: (s / WEIGHTS).unlink(), r"has neither model\.safetensors nor .*Download the weights"),
    "pickle": (pickled, r"holds only pickle weights \(pytorch_model\.bin\), which can run code.*convert: python -c"),
    "quantised": (lambda s: changed(s, quantization_config={"quant_method": "aqlm", "bits": 4}), r"\(aqlm, 4 bits\): the model is quantised"),
    "packed": (lambda s: restored(s, model__layers__0__mlp__up_proj__weight=torch.zeros(80, 12, dtype=torch.uint8)), "as U8: the model is quantised"),
    "NaN": (lambda s: restored(s, model__norm__weight=torch.full((48,), torch.nan)), r"model\.norm\.weight in .*model\.safetensors is NaN or infinite in 48 of 48"),
}  # fmt: skip


@pytest.fixture
def source(place: Path) -> Path:
    """A model to be broken."""
    shutil.copytree(folder("llama"), place / "source")
    return place / "source"


@pytest.mark.parametrize("case", READ)
def test_what_is_read_is_wrong(case: str, source: Path, place: Path, refused: Callable[..., None]) -> None:
    spoil, words = READ[case]
    spoil(source)
    refused(words, *compress(source, place, *SLICE))
    if case not in {"NaN"}:
        refused(words, "plan", source, *SLICE)


@pytest.mark.parametrize(
    "case", ["missing shard", "outside", "truncated", "corrupt", "no weights", "pickle", "quantised"]
)
def test_evaluate_and_generate_refuse_the_same(case: str, place: Path, refused: Callable[..., None]) -> None:
    shutil.copytree(spoken(), place / "source")
    spoil, words = READ[case]
    spoil(place / "source")
    refused(words, "evaluate", place / "source", "--data", place / "held.pt")
    refused(words, "generate", place / "source", "abc")


def test_models_that_overflow(place: Path, refused: Callable[..., None]) -> None:
    model = built(TINY["llama"])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e38)
    model.save_pretrained(place / "huge")
    refused(r"activations leave block 1 not finite \(residual\.3\)", *compress(place / "huge", place, *SLICE))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-38)
        model.lm_head.weight.mul_(1e38)
    model.save_pretrained(place / "loud")
    refused(
        "log-likelihood of window 0 .*held.pt is (nan|inf)", "evaluate", place / "loud", "--data", place / "held.pt"
    )


IDS: dict[str, tuple[Any, str]] = {
    "too large": (torch.full((8, 24), 97), "the largest token id of bad.pt is 97, but the model's vocabulary has 97 entries"),
    "negative": (torch.full((8, 24), -1), "the smallest token id of bad.pt is -1: ids count from 0"),
    "too few": (torch.ones(1, 31, dtype=torch.int64), r"31 calibration tokens cannot span 32 directions at residual.*raise --samples"),
    "floats": (torch.ones(8, 24), "token ids are integers, but bad.pt holds float32"),
    "flat": (torch.ones(8, dtype=torch.int64), r"token ids are \[N, T\]"),
    "a dict": ({"ids": 1}, "bad.pt holds dict, not one dense tensor of token ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", IDS)
def test_tokens_that_cannot_be_used(case: str, place: Path, refused: Callable[..., None]) -> None:
    held, words = IDS[case]
    torch.save(held, place / "bad.pt")
    refused(words, *compress(folder("llama"), place, *SLICE, "--data", place / "bad.pt"))
    if case != "too few":
        refused(words, "evaluate", folder("llama"), "--data", place / "bad.pt")


def test_texts_that_cannot_be_used(place: Path, refused: Callable[..., None]) -> None:
    (place / "empty.txt").write_text(" \n")
    (place / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (place / "pickle.pt").write_bytes(b"\x80\x04c__main__\nevil\n.")
    for name, words in (
        ("empty.txt", "is empty: there is no text in it"),
        ("bytes.txt", "is not UTF-8 text"),
        ("pickle.pt", "cannot read .*pickle.pt as one tensor of token ids"),
    ):
        refused(words, *compress(spoken(), place, *SLICE, "--data", place / name))
    refused("--length 65 is longer than the 64 positions", *compress(folder("opt-tied"), place, *SLICE, "--length", 65))
    refused(
        "--length 65 is longer than the 64 positions",
        "evaluate",
        folder("opt-tied"),
        "--length",
        65,
        "--data",
        place / "held.pt",
    )
    refused("has no tokenizer", "generate", folder("llama"), "abc")


# --- mistakes in where it goes --------------------------------------------------------------------------------------


def test_an_output_that_exists(place: Path, refused: Callable[..., None], source: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("years of work")
    refused("out exists. Choose another output folder, or pass --overwrite", *compress(source, place, *SLICE))
    refused("out is not a model folder, so it is not overwritten", *compress(source, place, *SLICE, "--overwrite"))
    shutil.rmtree(place / "out")
    (place / "out").write_text("a file")
    refused("out is a file. Choose another output folder", *compress(source, place, *SLICE, "--overwrite"))
    arguments = ["compress", source, *SLICE, "--data", place / "ids.pt", "--overwrite", "--out"]
    refused("is or contains the model that is read", *arguments, source)
    refused("is or contains the model that is read", *arguments, place)
    refused("so .* cannot be made", *arguments, place / "ids.pt" / "below")


def test_a_disk_that_is_full_before_anything_is_written(
    place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    refused(
        "the disk of .*out is full: [\\d,]+ bytes are needed, 1,234 are free", *compress(folder("llama"), place, *SLICE)
    )


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_while_weights_are_written(
    place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"the beginning")
        raise FULL

    monkeypatch.setattr("microtome.checkpoint.save_file", fail)
    refused("the disk of .*out is full", *compress(folder("llama"), place, *SLICE))
    refused("the disk of .*out is full", *compress(folder("llama"), place, *SLICE, "--max-shard-size", "20KB"))


@pytest.mark.parametrize("name", ["config.json", "plan.json", "README.md", "tokenizer.json"])
def test_a_disk_that_fills_while_a_small_file_is_written(
    name: str, place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = io.open

    def fail(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if str(file).endswith(name) and ".partial-" in str(file) and set(mode) & set("wax+"):
            raise FULL
        return kept(file, mode, *rest, **more)

    monkeypatch.setattr(io, "open", fail)
    monkeypatch.setattr(builtins, "open", fail)
    refused("the disk of .*out is full", *compress(spoken(), place, *SLICE))


def test_a_disk_that_fills_at_the_very_end(
    place: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is complete by then; only its perplexity is missing from the record, which stays as it was."""
    kept = Path.write_text

    def fail(path: Path, *rest: Any, **more: Any) -> int:
        if path.name.endswith(".partial"):
            raise FULL
        return kept(path, *rest, **more)

    monkeypatch.setattr(Path, "write_text", fail)
    ran = run("compress", folder("llama"), "--out", place / "out", *SLICE, "--data", place / "ids.pt")
    assert ran.code == 2
    assert re.fullmatch(
        r"microtome: .*out is complete, but its perplexity could not be added to plan\.json .*\n", ran.err
    )
    assert json.loads((place / "out" / "plan.json").read_text())["result"]["perplexity"]["after"] is None
    assert not [path for path in (place / "out").iterdir() if path.name.startswith(".")]
    assert error(logits(transformers.AutoModelForCausalLM.from_pretrained(place / "out"), HELD_OUT),
                 logits(transformers.AutoModelForCausalLM.from_pretrained(place / "out"), HELD_OUT)) == 0  # fmt: skip


def test_no_room_for_hidden_states(place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "scratch").mkdir()
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    monkeypatch.setattr("microtome.checkpoint.Writer.require", lambda *_: None)
    refused(
        "no room for .* of sums in .*scratch",
        *compress(folder("llama"), place, *SLICE, "--scratch", place / "scratch"),
    )


# --- out of memory --------------------------------------------------------------------------------------------------

SHORT: dict[str, Exception] = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation."),
    "python": MemoryError(),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize(
    "where", ["microtome.calibrate.Stream.advance", "microtome.stats.Moment.add", "microtome.source.Source.tensor",
              "microtome.checkpoint.Writer.add", "microtome.linalg.torch.linalg.eigh"],
)  # fmt: skip
def test_out_of_memory(
    kind: str, where: str, place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SHORT[kind]

    monkeypatch.setattr(where, fail)
    words = "out of memory. Use fewer --samples, a smaller --length, --scratch FOLDER"
    refused(words, *compress(folder("llama"), place, *SLICE))


@pytest.mark.parametrize("kind", SHORT)
@pytest.mark.parametrize("where", ["from_pretrained", "forward"])
def test_out_of_memory_while_measuring(
    kind: str, where: str, place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SHORT[kind]

    monkeypatch.setattr(transformers.LlamaForCausalLM, where, fail)
    refused("out of memory", "evaluate", folder("llama"), "--data", place / "held.pt")
    refused("out of memory", "generate", spoken(), "abc")


def test_a_bug_is_a_traceback_and_no_excuse(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("microtome.calibrate.Stream.advance", fail)
    monkeypatch.setattr(sys, "argv", ["microtome", *(str(word) for word in compress(folder("llama"), place, *SLICE))])
    with pytest.raises(ZeroDivisionError):
        microtome_cli.main()
    assert not (place / "out").exists()


FAULTS = """
import ctypes, resource
import microtome_cli

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
microtome_cli.hold_heap()
for round in range(11):
    held = [libc.malloc(24 * 2**20) for _ in range(3)]
    for one in held:
        libc.memset(one, 0, 24 * 2**20)
    for one in held:
        libc.free(one)
    if round == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="mallopt is glibc's")
@pytest.mark.parametrize(("more", "held"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_what_is_freed_is_kept_for_the_next(more: dict[str, str], *, held: bool) -> None:
    own = {name: one for name, one in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=own | more, capture_output=True, text=True, check=True)
    assert (int(ran.stdout) < 1000) == held


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_stopped_from_outside(
    by: signal.Signals, place: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        signal.raise_signal(by)

    monkeypatch.setattr("microtome.calibrate.Stream.advance", fail)
    ran = run(*compress(folder("llama"), place, *SLICE))
    assert ran == Ran(130, "", "microtome: stopped; nothing was left behind.\n")
    assert not (place / "out").exists()
