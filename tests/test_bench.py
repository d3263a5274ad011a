"""Side by side: the arithmetic, real work in every engine, one real pair of processes, and what is refused."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import raises
from models import ids, stock
from tinies import compress, folder
from torch import Tensor

import microtome_cli
from microtome import bench, demo, export
from microtome.bench import Report, Workload, hf, llamacpp, process, timing, vllm, work
from microtome.bench import onnx as runtime
from microtome.bench.work import Matrix, Settings
from microtome.errors import BadInput, MicrotomeError, UnknownName, UnsupportedModel
from microtome.loading import load
from microtome.verdict import Absent

SMALL = {"batches": (1,), "prompt": 5, "tokens": 2, "rounds": 2, "threads": 1}
LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
XLLAMACPP = importlib.util.find_spec("xllamacpp") is not None


def greedy(prompt: Tensor, tokens: int) -> Tensor:
    """What transformers' own class makes of a prompt."""
    model, mask = stock("llama"), torch.ones_like(prompt)
    found = model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return found[:, prompt.shape[1] :]


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_rates_and_ratios_are_medians_over_rounds() -> None:
    work = Workload("decode", batch=4, prompt=16, tokens=10)
    found = timing(work, [(2.0, 1.0), (4.0, 1.0), (1.0, 2.0)])
    assert (found.baseline, found.compressed) == (40 / 2.0, 40 / 1.0)
    assert (found.speedup, found.slowest, found.fastest) == (2.0, 0.5, 4.0)
    assert Workload("prefill", 4, 16, 10).count == 64


def test_a_cut_that_is_not_faster_is_explained() -> None:
    fast, slow = Workload("prefill", 1, 8, 2), Workload("decode", 8, 8, 2)
    common: tuple[Any, ...] = (2, "cpu", "float32", 1, (200, 100), (10, 10), 5_000_000, "hf", "transformers 5", 64)
    both = (timing(fast, [(2.0, 1.0)]), timing(slow, [(1.0, 2.0)]))
    first, why = Report(both, *common, uneven=(360, 1000)).remarks()
    assert "1 rounds, 2 threads, cpu, float32, transformers 5; a process without a model holds 5 MB" in first
    assert re.match(r"not faster: decode 2 behind 8, batch 8\. The files shrink 2\.00 times", why)
    assert why.endswith("Widths of 360, 1000 are no multiples of 64, which its kernels work in.")
    assert "Widths" not in Report(both, *common).remarks()[1]
    assert len(Report(both[:1], *common, uneven=(360,)).remarks()) == 1
    assert Report(both[:1], *common, notes=("a fact",)).remarks()[1:] == ["a fact"]


def test_widths_that_the_compressed_model_alone_has() -> None:
    old = {"embedding": Matrix((97, 512), "F32"), "up": Matrix((1000, 512), "F32")}
    new = {"embedding": Matrix((97, 384), "F32"), "up": Matrix((1000, 384), "F32"), "down": Matrix((384, 360), "F32")}
    assert bench.uneven(old, new, 64) == (360,)
    assert bench.uneven(old, new, 256) == (360, 384)
    assert bench.uneven(old, old, 64) == ()


def test_matrices_that_fell_back_to_another_type() -> None:
    stored = {f"up.{block}": Matrix((96, 64), "Q8_0") for block in range(8)} | {"down": Matrix((64, 90), "F16")}
    (one,) = bench.fallen(stored, "Q8_0")
    assert one.startswith("1 of 9 matrices of the compressed file are F16 instead of Q8_0: rows of 90 numbers fill no")
    assert one.endswith("blocks of 32. Cut with --target gguf.")
    (mixed,) = bench.fallen({"a": Matrix((8, 384), "Q5_0"), "b": Matrix((8, 512), "Q4_K")}, "Q4_K_M")
    assert mixed.startswith("1 of 2 matrices of the compressed file are Q5_0 instead of Q4_K_M: rows of 384 numbers")
    assert bench.fallen(stored, "F32") == ()
    assert bench.fallen({"up": stored["up.0"]}, "Q8_0") == ()
    assert bench.listed(range(8)) == "0, 1, 2, 3, 4, 5 and 2 more"


# --- engines --------------------------------------------------------------------------------------------------------


def test_transformers_decodes_the_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is real work: the ids that go in are those of greedy generation."""
    model = load(folder("llama"), device=torch.device("cpu"))
    seen: list[Tensor] = []
    forward = model.forward

    def watched(**inputs: Tensor) -> object:
        seen.append(inputs["input_ids"])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", watched)
    assert hf.timed(model, Workload("decode", 2, 7, 5), torch.device("cpu")) > 0
    prompt, *steps = seen
    assert torch.equal(torch.cat(steps, 1), greedy(prompt, 5))


def test_onnx_runtime_decodes_the_likeliest_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    place = runtime.placed(str(folder("llama")), Settings(1), tmp_path)
    assert place.nbytes == Path(place.path).stat().st_size
    engine = runtime.opened(place.path, Settings(1))
    seen: list[tuple[Tensor, int]] = []
    step = engine.session.step

    def watched(_self: object, tokens: Tensor, cache: dict[str, Any], past: int) -> Any:
        seen.append((tokens, past))
        return step(tokens, cache, past)

    monkeypatch.setattr(type(engine.session), "step", watched)
    assert engine.seconds(Workload("decode", 2, 7, 5)) > 0
    (prompt, _), *steps = seen
    assert [past for _, past in steps] == [7, 8, 9, 10, 11]
    assert torch.equal(torch.cat([tokens for tokens, _ in steps], 1), greedy(prompt, 5))
    seen.clear()
    assert engine.seconds(Workload("prefill", 3, 7, 5)) > 0
    assert [tuple(tokens.shape) for tokens, _ in seen] == [(3, 7)]
    assert (engine.dtype, runtime.placed(place.path, Settings(1), tmp_path).given) == ("float32", True)
    shapes = {one.shape for one in runtime.matrices(place.path).values()}
    assert {tuple(reversed(one.shape)) for name, one in stock("llama").named_parameters() if "mlp" in name} <= shapes


def test_tensors_beside_a_graph_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export.find("onnx"), "INLINE", 0)
    place = runtime.placed(str(folder("llama")), Settings(1), tmp_path)
    files = [file for file in Path(place.path).parent.iterdir() if file.name.startswith("model.onnx")]
    assert len(files) == 2
    assert place.nbytes == sum(file.stat().st_size for file in files)
    assert place.nbytes > 4 * sum(one.numel() for one in stock("llama").parameters())
    assert runtime.placed(str(Path(place.path).parent), Settings(1), tmp_path).path == place.path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    place = llamacpp.placed(str(folder("llama")), Settings(1), tmp_path_factory.mktemp("gguf"))
    assert not place.given
    assert place.nbytes == Path(place.path).stat().st_size
    return Path(place.path)


@pytest.mark.skipif(not LLAMA_CPP, reason="no llama-cpp-python")
def test_llama_cpp_decodes_the_likeliest_tokens(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts side by side, each with a cache of its own."""
    engine = llamacpp.Direct(str(gguf_file), 1, 0)
    rows: list[list[list[int]]] = []
    step = engine.step

    def watched(context: Any, batch: Any, given: list[list[int]], past: int) -> list[int]:
        assert past == (0 if not rows else 6 + len(rows))
        rows.append(given)
        return step(context, batch, given, past)

    monkeypatch.setattr(engine, "step", watched)
    assert engine.seconds(Workload("decode", 2, 7, 5)) > 0
    prompt, *steps = rows
    want = greedy(torch.tensor(prompt), 5)
    assert torch.equal(torch.cat([torch.tensor(one) for one in steps], 1), want)
    assert (engine.dtype, engine.vocabulary) == ("F32", 97)
    rows.clear()
    assert engine.seconds(Workload("prefill", 3, 7, 5)) > 0


@pytest.mark.skipif(not XLLAMACPP, reason="no xllamacpp")
def test_the_server_of_xllamacpp_times_what_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the built-in model, for without a tokenizer the server ends the process."""
    pytest.importorskip("gguf")
    place = llamacpp.placed(str(demo.MODEL), Settings(1), tmp_path)
    assert llamacpp.has_words(place.path)
    engine = llamacpp.Served(place.path, 1, 0)
    assert engine.vocabulary == json.loads((demo.MODEL / "config.json").read_text())["vocab_size"]
    said: list[dict[str, Any]] = []
    ready = engine.ready

    def watched(work: Workload) -> Any:
        server = ready(work)

        def answer(asked: dict[str, Any]) -> Any:
            found = server.handle_completions(asked)
            said.append(found)
            return found

        return SimpleNamespace(handle_completions=answer)

    monkeypatch.setattr(engine, "ready", watched)
    taken = engine.seconds(Workload("decode", 2, 9, 4))
    assert [(one["timings"]["prompt_n"], one["timings"]["predicted_n"]) for one in said] == [(9, 5), (9, 5)]
    assert taken == min(one["timings"]["predicted_ms"] for one in said) / 1000 > 0
    said.clear()
    taken = engine.seconds(Workload("prefill", 2, 9, 4))
    assert [one["timings"]["predicted_n"] for one in said] == [1, 1]
    assert taken == max(one["timings"]["prompt_ms"] for one in said) / 1000 > 0


def test_files_of_llama_cpp(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llamacpp.file_type(str(gguf_file)) == "F32"
    assert not llamacpp.has_words(str(gguf_file))
    stored = llamacpp.matrices(str(gguf_file))
    assert stored["token_embd.weight"] == Matrix((97, stock("llama").config.hidden_size), "F32")
    assert bench.engine_of(gguf_file) == "llamacpp"
    assert llamacpp.placed(str(gguf_file), Settings(1), tmp_path).given
    with raises(BadInput, r"is timed as it is stored: leave out --dtype and --quantize, or give a model folder"):
        llamacpp.placed(str(gguf_file), Settings(1, quantize="Q8_0"), tmp_path)
    with raises(BadInput, r"is no file for --engine onnx: give a model folder, or a \.onnx file"):
        runtime.placed(str(gguf_file), Settings(1), tmp_path)
    with raises(BadInput, r"is a file, and --engine hf takes a model folder"):
        hf.placed(str(gguf_file), Settings(1), tmp_path)
    monkeypatch.setattr(llamacpp, "version", lambda: "xllamacpp 2026")
    with raises(UnsupportedModel, r"has no tokenizer, and xllamacpp's server ends without one"):
        llamacpp.opened(str(gguf_file), Settings(1))
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with raises(BadInput, r"no\.gguf is no GGUF file"):
        llamacpp.matrices(str(tmp_path / "no.gguf"))
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with raises(BadInput, r"no\.onnx is no ONNX file"):
        runtime.matrices(str(tmp_path / "no.onnx"))


def test_vllm_is_asked_for_tokens_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in: how many tokens of which prompts, and that a decode is what comes after the first token."""
    asked: list[tuple[int, list[int]]] = []
    clock = iter(range(0, 1000, 1))

    class Stand:
        def __init__(self, **given: Any) -> None:
            assert given["model"] == "somewhere"
            assert given["dtype"] == "bfloat16"
            assert given["enable_prefix_caching"] is False
            config = SimpleNamespace(dtype=torch.bfloat16, get_vocab_size=lambda: 50)
            self.llm_engine = SimpleNamespace(model_config=config)

        def generate(self, prompts: list[dict[str, list[int]]], params: Any, *, use_tqdm: bool) -> None:
            assert (params.temperature, params.ignore_eos, use_tqdm) == (0.0, True, False)
            asked.append((params.max_tokens, [len(one["prompt_token_ids"]) for one in prompts]))
            for _ in range(params.max_tokens - 1):
                next(clock)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Stand, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(vllm.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = vllm.opened("somewhere", Settings(1, dtype="bf16"))
    assert engine.dtype == "bfloat16"
    assert engine.seconds(Workload("decode", 3, 6, 4)) == 4.0
    assert asked == [(1, [6, 6, 6]), (5, [6, 6, 6])]
    asked.clear()
    assert engine.seconds(Workload("prefill", 2, 6, 4)) == 1.0
    assert asked == [(1, [6, 6])]


# --- both sides -----------------------------------------------------------------------------------------------------


class InProcess:
    """A runner without a process."""

    def __init__(self, engine: str, path: str, settings: Settings) -> None:
        self.engine, self.path, self.settings, self.dtype, self.idle = engine, path, settings, "", 7

    def ready(self) -> None:
        self.engine = work.find(self.engine).opened(self.path, self.settings)
        self.dtype = self.engine.dtype

    def seconds(self, asked: Workload) -> float:
        return self.engine.seconds(asked)

    def peak(self) -> int:
        return process.peak_bytes(torch.device("cpu"))

    def stop(self) -> None:
        """Nothing to end."""


def test_folders_are_exported_for_the_engine_and_go_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File sizes are those of what `export` writes; files that are given come to the same."""
    for package in ("onnxruntime", "gguf"):
        pytest.importorskip(package)
    monkeypatch.setattr(bench, "Runner", InProcess)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = compress(folder("llama"), tmp_path / "small", keep=0.8).folder
    formats = {"onnx": "onnx"} | ({"llamacpp": "gguf"} if LLAMA_CPP else {})
    for engine, form in formats.items():
        found = bench.compare(small, folder("llama"), engine=engine, **SMALL)
        assert [one.workload.kind for one in found.timings] == ["prefill", "decode"]
        assert found.dtype.lower() in {"float32", "f32"}
        made = [export.export(one, to=form, out=tmp_path / f"{engine}{number}", dtype="float32", verify=False).files[0]
                for number, one in enumerate((folder("llama"), small))]  # fmt: skip
        assert found.file_bytes == tuple(file.stat().st_size for file in made)
        again = bench.compare(made[1], made[0], **SMALL)
        assert (again.engine, again.file_bytes, again.uneven) == (engine, found.file_bytes, found.uneven)
    assert not list(tmp_path.glob("microtome-bench-*"))


def test_llama_cpp_is_asked_again_without_kernels_that_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Fragile(InProcess):
        def ready(self) -> None:
            seen.append(self.settings.repack)
            if self.settings.repack:
                raise process.Died("a benchmark process died")
            self.dtype = "Q8_0"

        def seconds(self, asked: Workload) -> float:
            return float(asked.batch)

    monkeypatch.setattr(bench, "Runner", Fragile)
    given = (["a", "b"], Settings(1), [Workload("decode", 2, 3, 4)], 1, None)
    found = bench.asked("llamacpp", *given)
    assert seen == [True, False, False]
    assert found.notes == ("llama.cpp's kernels for this processor ended the process: timed without them.",)
    with raises(process.Died, "a benchmark process died"):
        bench.asked("onnx", *given)


def test_files_of_two_types_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compressed one first."""

    class Typed(InProcess):
        def ready(self) -> None:
            self.dtype = {"baseline": "F32", "compressed": "Q8_0"}[self.path]

        def seconds(self, asked: Workload) -> float:
            return float(asked.batch)

    monkeypatch.setattr(bench, "Runner", Typed)
    work = [Workload("decode", 2, 3, 4)]
    assert bench.asked("llamacpp", ["baseline", "compressed"], Settings(1), work, 1, None).dtype == "Q8_0 beside F32"
    assert bench.asked("llamacpp", ["baseline", "baseline"], Settings(1), work, 1, None).dtype == "F32"


@pytest.mark.skipif(not LLAMA_CPP, reason="no llama-cpp-python")
def test_quantised_files_say_what_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sizes of the model's own config."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(bench, "Runner", InProcess)
    found = bench.compare(folder("llama"), folder("llama"), engine="llamacpp", quantize="Q8_0", **SMALL)
    config = stock("llama").config
    rows = sorted({size for size in (config.hidden_size, config.intermediate_size) if size % 32})
    assert rows, "the tiny model has rows that fill no block"
    assert f"instead of Q8_0: rows of {bench.listed(rows)} numbers fill no blocks of 32" in found.notes[0]
    assert found.dtype == "Q8_0"


def test_two_processes_answer_in_turn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And an engine that is not there is one line."""
    place = str(folder("llama"))
    command = ["bench", place, "--baseline", place, "--batch", "2", "--prompt", "9", "--tokens", "3", "--rounds", "2"]
    monkeypatch.setattr(vllm, "version", absent)
    monkeypatch.setattr("sys.argv", ["microtome", *command, "--threads", "1", "--engine", "hf,vllm", "--json"])
    with pytest.raises(SystemExit) as stopped:
        microtome_cli.main()
    assert stopped.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["refused"] == ["vllm: vLLM is not installed here."]
    (found,) = printed["engines"]
    assert [one["workload"]["kind"] for one in found["timings"]] == ["prefill", "decode"]
    assert all(0 < one["slowest"] <= one["speedup"] <= one["fastest"] for one in found["timings"])
    assert (found["engine"], found["threads"], found["dtype"], found["rounds"]) == ("hf", 1, "float32", 2)
    assert found["file_bytes"][0] == found["file_bytes"][1] > 0
    assert min(found["peak_bytes"]) >= found["idle_bytes"] > 1e7


def absent() -> str:
    raise Absent("vLLM is not installed here.")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder("llama")
    with raises(BadInput, "at least 1"):
        bench.compare(place, place, batches=(0,))
    with pytest.raises(MicrotomeError, match="no folder"):
        bench.compare(tmp_path / "nothing", place)
    with raises(UnknownName, r"no engine named 'llama\.cpp'\. Did you mean 'llamacpp'\? Known: hf, llamacpp, onnx"):
        bench.compare_all(place, place, ["llama.cpp"])
    for chosen in ({"engine": "hf"}, {"engine": "onnx"}):
        with raises(BadInput, "--quantize Q8_0 is for --engine llamacpp: leave it out"):
            bench.compare(place, place, quantize="Q8_0", **chosen)
    with raises(BadInput, "--quantize Q8_0 is for --engine llamacpp: leave it out"):
        bench.compare_all(place, place, ["hf", "onnx"], quantize="Q8_0")
    monkeypatch.setattr(vllm, "version", absent)
    with raises(Absent, "vLLM is not installed here"):
        bench.compare_all(place, place, ["vllm"])
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with raises(Absent, "vLLM is not installed: pip install vllm, in an environment of its own"):
        vllm.version()


def test_tokens_of_the_prompt_are_those_of_the_model() -> None:
    """Every engine draws from the whole vocabulary with the same seed, so that all see the same text."""
    generator = torch.Generator().manual_seed(0)
    want = torch.randint(0, 97, (2, 7), generator=generator)
    seen: list[Tensor] = []

    class Watched:
        config = stock("llama").config

        def __call__(self, **inputs: Tensor) -> Any:
            seen.append(inputs["input_ids"])
            return stock("llama")(**inputs)

    hf.timed(Watched(), Workload("prefill", 2, 7, 1), torch.device("cpu"))
    assert torch.equal(seen[0], want)
    assert not torch.equal(seen[0], ids(rows=2, length=7))
