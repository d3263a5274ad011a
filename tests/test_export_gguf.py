"""GGUF: what is written is read back, by keys and tensors alone and by llama.cpp, and compared with the decoder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exporting
import models
import pytest
import torch
from exporting import VARIANTS, Read
from folders import Ran, raises

from microtome import verdict
from microtome.errors import BadInput, UnsupportedModel
from microtome.export import export
from microtome.export.gguf import engine, family, fold, vocabulary

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
EVERY = [*models.TINY, *VARIANTS]
SAID = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "gpt2-tied": "gpt2", "gpt_neox": "gptneox",
    "gpt_neox-tied-plain": "gptneox", "gpt_neox-sequential": "gptneox", "granite-tied": "llama",
    "granite-biases": "llama", "llama": "llama", "llama-gqa-llama3-tied": "llama", "llama-biases-wide-heads": "llama",
    "mistral": "llama", "mistral-window": "llama", "olmo2": "olmo2", "opt-untied-gelu": "gpt2", "phi": "phi2",
    "phi-tied-gqa": "phi2", "phi3-window": "llama", "phi3-longrope": "llama", "phi3-partial-tied": "llama",
    "phi3-partial-longrope": "llama", "qwen2-tied": "llama", "qwen2-window": "llama", "qwen3-tied": "qwen3",
    "smollm3-all-rotary": "llama", "llama-sliced": "llama", "llama-sliced-tied": "llama", "llama-heads": "llama",
    "llama-neurons": "deci", "llama-ragged": "deci", "llama-sliced-ragged": "deci", "llama-skips": "deci",
    "llama-values": "llama", "granite-ragged": "deci", "phi3-longrope-ragged": "deci", "qwen2-sliced-ragged": "deci",
    "qwen3-ragged": "qwen3", "qwen3-sliced": "qwen3", "qwen3-skips": "qwen3", "gpt2-heads": "gpt2",
    "phi-skips": "phi2", "gpt_neox-skips": "gptneox", "olmo2-heads": "olmo2", "gemma-neurons": "gemma",
    "gemma3_text-skips": "gemma3",
}  # fmt: skip
REFUSED = {
    "gemma-bias": "nearest is gemma: it has no attention out bias",
    "gemma2-no-caps-bias": "nearest is gemma2: .*it caps scores, and this decoder does not",
    "gemma3_text-scaled-bias": "nearest is gemma3: it has no attention out bias",
    "gpt2-untied": "nearest is gpt2: its activation is gelu, and this decoder's relu",
    "olmo2-biases-tied": "nearest is olmo2: it has no attention out bias; its heads side by side",
    "opt-tied": "its activation is gelu, and this decoder's relu",
    "phi-wide-heads": "nearest is phi2: its heads side by side are as wide as the stream, 48",
    "qwen3-bias": "nearest is qwen3: it has no attention out bias",
    "smollm3-tied": "nearest is smollm3: every 4th block keeps its heads unturned, and of this decoder blocks 1",
    "smollm3-window-biases": "blocks 0, 2",
}
WHOLE = 1e-4  # largest difference as a part of the largest logit


def test_every_tiny_model_is_said_or_refused() -> None:
    assert set(SAID) | set(REFUSED) == set(EVERY)
    assert not set(SAID) & set(REFUSED)


def written(name: str, place: Path, **options: Any) -> Path:
    (file,) = export(exporting.folder(name, place), to="gguf", verify=False, **options).files
    return file


def frame_of(name: str) -> fold.Frame:
    config = exporting.decoder(name).config
    chosen = family.chosen(config)
    assert isinstance(chosen, family.Family), chosen
    return fold.framed(chosen, config)


@pytest.mark.parametrize("name", [name for name, said in SAID.items() if said in {"llama", "deci"}])
def test_the_keys_and_tensors_of_a_llama_say_the_decoder(name: str, tmp_path: Path) -> None:
    read = Read(written(name, tmp_path))
    assert read.name == SAID[name]
    ids = engine.ids_for(frame_of(name))
    wanted = verdict.logits(exporting.decoder(name), ids)
    found = read.logits(ids[0]).float()
    assert (wanted - found).abs().max() < WHOLE * max(1.0, wanted.abs().max())
    assert read.key("context_length") >= ids.shape[1]


def run_by_llama_cpp() -> list[Any]:
    """All that are said; those of a family that is tried already are slow."""
    first = {said: name for name, said in reversed(SAID.items())}
    more = {"llama-sliced-ragged", "llama-skips", "phi3-longrope-ragged", "qwen3-skips", "gpt2-heads"}
    quick = {*first.values(), *more}
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in SAID]


@pytest.mark.parametrize("name", run_by_llama_cpp())
def test_llama_cpp_computes_the_decoder(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    file, frame = written(name, tmp_path), frame_of(name)
    assert frame.family.name == SAID[name]
    ids = engine.ids_for(frame)
    found = torch.from_numpy(engine.loaded("logits", file, ids, tmp_path))  # in a process of its own: it may abort
    wanted = verdict.logits(exporting.decoder(name), ids)
    slack = WHOLE if frame.family.activations is family.SILU else 5e-3
    assert (wanted - found).abs().max() < slack * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_say_is_refused_in_words(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        export(exporting.folder(name, tmp_path), to="gguf", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def change(name: str, per_block: dict[int, dict[str, Any]] | None = None, **fields: Any) -> str:
    """Why a tiny decoder with some fields changed is refused."""
    from microtome import surgery

    found = family.chosen(surgery.rebuilt(models.canonical(name)[0], per_block or {}, **fields))
    assert isinstance(found, str)
    return found


def test_refusals_name_a_recipe_that_fits() -> None:
    narrow = exporting.NARROW | {"norm": "rms", "norm_bias": False, "final_norm_bias": False}
    assert "one. Compress with --target gguf." in change("llama", {1: {"residual_mid": 40}})
    assert "(disp). Another method with --target gguf" in change("llama", {1: {"attn_read_size": 40}})
    assert "(modegpt). Compress with --target gguf" in change("llama", {1: {"rotary_subset": True, "rotary_pairs": 3}})
    assert "different widths. Compress with --target gguf" in change("llama", {1: {"head_dim": 6, "rotary_pairs": 3}})
    assert "-m fasp or flap leave the stream" in change("gpt2-tied", **narrow)
    assert "serve different numbers" in change("llama", {1: exporting.heads(2, 3, 80)})


# --- types ----------------------------------------------------------------------------------------------------------


def test_files_are_named_after_what_they_hold(tmp_path: Path) -> None:
    place = exporting.folder("llama-ragged", tmp_path)
    found = export(place, to="gguf", quantize=["q8_0", "BF16", "Q8_0"], verify=False)
    assert [file.name for file in found.files] == ["llama-ragged-Q8_0.gguf", "llama-ragged-BF16.gguf"]
    assert export(place, to="gguf", dtype="float16", verify=False).files == (tmp_path / "llama-ragged-F16.gguf",)
    named = export(place, to="gguf", out=tmp_path / "new" / "my.gguf", verify=False)
    assert named.files == (tmp_path / "new" / "my.gguf",)
    assert named.nbytes == (tmp_path / "new" / "my.gguf").stat().st_size
    assert not list(tmp_path.glob(".*"))


def test_rows_that_fill_no_block_stay_in_16_bits(tmp_path: Path) -> None:
    """Of the model: a stream of 48 and 80 neurons, of which no rows of 32 can be made; heads make 72 to 24."""
    read = Read(written("llama-ragged", tmp_path, quantize=["Q4_0"]))
    assert read.kinds["blk.0.ffn_gate.weight"] == "F16"
    assert read.kinds["blk.2.ffn_down.weight"] == "Q4_0"  # rows of 64
    assert read.kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_values_are_those_of_the_decoder_within_a_step(kind: str, tmp_path: Path) -> None:
    read = Read(written("llama-ragged", tmp_path, quantize=[kind]))
    wanted = exporting.variant("llama-ragged")[1]["model.layers.2.mlp.down_proj.weight"].double()
    found = read.tensors["blk.2.ffn_down.weight"]
    largest = wanted.reshape(48, 2, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(48, 64)
    levels = {"F16": 2**10, "BF16": 2**7, "Q8_0": 127, "Q5_1": 16, "Q5_0": 16, "Q4_1": 8, "Q4_0": 8}[kind]
    assert ((found - wanted).abs() <= 1.01 * largest / levels).all()
    assert not torch.equal(found, wanted)


def test_k_quants_want_llama_cpp_s_own_quantiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = exporting.folder("llama", tmp_path)
    monkeypatch.setattr(engine, "has_quantiser", lambda: False)
    with raises(BadInput, "pip install llama-cpp-python, or put its llama-quantize on the PATH"):
        export(place, to="gguf", quantize=["Q4_K_M"], verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_k_quants(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    place = exporting.folder("llama-ragged", tmp_path)
    found = export(place, to="gguf", quantize=["Q6_K"], verify=False)
    read = Read(found.files[0])
    assert read.keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q6_K
    assert read.kinds["blk.2.ffn_down.weight"] == "Q8_0"  # rows of 64 fill no block of 256
    assert any("fill no block of 256" in note for note in found.notes)
    assert not list(tmp_path.glob(".*"))


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_a_verdict_says_engine_and_difference(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    found = export(exporting.folder("llama-sliced-ragged", tmp_path), to="gguf", verify=True)
    assert found.verdict is not None
    assert found.verdict.passed
    assert found.verdict.engine.startswith("llama.cpp (llama-cpp-python ")
    assert 0 <= found.verdict.numbers["largest_difference"] < WHOLE * found.verdict.numbers["scale"]
    assert json.loads(json.dumps(found.to_json()))["verdict"]["passed"] is True


def test_a_wrong_file_is_removed(tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in another order than llama.cpp turns them: every check of shapes would pass."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    place = exporting.folder("llama", tmp_path)
    monkeypatch.setattr(fold, "turned_order", lambda wide, _pairs: torch.arange(wide))
    refused("not what the checkpoint computes, and was removed: .*differ by", "export", place, "--to", "gguf")


def test_without_an_engine_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed", lambda _package: None)
    place = exporting.folder("llama", tmp_path)
    found = export(place, to="gguf")
    assert found.verdict is None
    assert any("not verified: llama.cpp, which would run the file" in note for note in found.notes)
    with pytest.raises(verdict.Absent, match=r"pip install 'microtome\[gguf\]'"):
        export(place, to="gguf", overwrite=True, verify=True)


def test_a_text_longer_than_a_missing_window_is_not_promised(tmp_path: Path) -> None:
    found = export(exporting.folder("mistral-window", tmp_path), to="gguf", verify=False)
    assert Read(found.files[0]).key("context_length") == 7
    assert any("has no window: the context is 7 tokens" in note for note in found.notes)


# --- tokenizers -----------------------------------------------------------------------------------------------------

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(expression: str) -> dict[str, Any]:
    first = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, BYTES | {"use_regex": False}]}


def tokenizer(place: Path, pre: Any, normalizer: Any = None, **model: Any) -> Path:
    """A folder with a tokenizer.json of seven tokens."""
    vocab = {"<s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5, "<|x|>": 6}
    bpe = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]], "byte_fallback": False} | model
    added = [{"id": 0, "content": "<s>", "special": True}, {"id": 6, "content": "<|x|>", "special": False}]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    whole = {
        "model": bpe, "normalizer": normalizer, "pre_tokenizer": pre, "added_tokens": added,
        "post_processor": {"type": "TemplateProcessing", "single": single},
    }  # fmt: skip
    place.mkdir(exist_ok=True)
    (place / "tokenizer.json").write_text(json.dumps(whole))
    (place / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ x }}"}))
    return place


@pytest.mark.parametrize(
    ("pre", "model", "name"),
    [
        (BYTES, {}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, {}, "smollm"),
        (split(QWEN), {}, "qwen2"),
        (split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), {"ignore_merges": True}, "llama-bpe"),
        (split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), {}, "dbrx"),
    ],
)
def test_how_text_is_cut_has_a_name(pre: Any, model: dict[str, Any], name: str, tmp_path: Path) -> None:
    found = vocabulary.read(tokenizer(tmp_path, pre, **model), {"eos_token_id": [2, 3]}, 9)
    assert (found.model, found.pre, found.merges) == ("gpt2", name, ["a b", "ab c"])
    assert found.tokens == ["<s>", "a", "b", "c", "ab", "abc", "<|x|>", "[PAD7]", "[PAD8]"]
    assert found.kinds == [3, 1, 1, 1, 1, 1, 4, 5, 5]
    assert found.marks == {"bos": 0, "eos": 2}
    assert found.flags == {"add_bos_token": True, "add_eos_token": False}
    assert found.template == "{{ x }}"


def test_an_unknown_cut_is_refused_unless_named(tmp_path: Path) -> None:
    place = tokenizer(tmp_path, split("[a-z]+"))
    with raises(UnsupportedModel, r"no llama.cpp name for \(Split, ByteLevel\). .* -o pre=NAME"):
        vocabulary.read(place, {}, 7)
    assert vocabulary.read(place, {}, 7, "default").pre == "default"


def test_characters_score_by_the_rank_of_their_merge(tmp_path: Path) -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    found = vocabulary.read(tokenizer(tmp_path, None, replace), {}, 7)
    assert found.model == "llama"
    assert found.scores is not None
    assert found.scores[4] > found.scores[5] > found.scores[1]
    assert found.flags["add_space_prefix"] is False
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    assert vocabulary.read(tokenizer(tmp_path, None, prepend), {}, 7).flags["add_space_prefix"] is True


def test_a_folder_without_a_tokenizer_is_written_without(tmp_path: Path) -> None:
    found = export(exporting.folder("llama", tmp_path), to="gguf", verify=False)
    assert Read(found.files[0]).keys["tokenizer.ggml.model"] == "none"
    assert any("no tokenizer is stored, for the folder has none" in note for note in found.notes)


# --- trained models -------------------------------------------------------------------------------------------------

MODELS = Path(__file__).parents[2] / "shared" / "models"


@pytest.mark.real
@pytest.mark.skipif(not MODELS.is_dir(), reason="the trained models are not here")
@pytest.mark.parametrize("name", ["stories-260k", "stories-3m", "babyllama-0.9m"])
def test_trained_models(name: str, tmp_path: Path) -> None:
    found = export(MODELS / name, to="gguf", out=tmp_path)
    assert found.verdict is None or found.verdict.passed
    words = Read(found.files[0])
    assert words.keys["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]


@pytest.mark.real
@pytest.mark.skipif(not MODELS.is_dir(), reason="the trained models are not here")
@pytest.mark.parametrize("name", ["stories-260k", "stories-3m"])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from microtome.loading import tokenizer_of

    (file,) = export(MODELS / name, to="gguf", out=tmp_path, verify=False).files
    text = 'Once upon a time, there was a little girl named Lily. She said: "Café – 12 o\'clock!"\nThe   end.'
    loaded = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    assert loaded.tokenize(text.encode(), add_bos=True) == tokenizer_of(MODELS / name)(text).input_ids
    loaded.close()


@pytest.mark.real
@pytest.mark.skipif(not MODELS.is_dir(), reason="the trained models are not here")
def test_xllamacpp_runs_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    shutil.copytree(MODELS / "stories-260k", tmp_path / "stories")
    release = engine.installed(engine.TOKENS)
    monkeypatch.setattr(engine, "installed", lambda package: release if package == engine.TOKENS else None)
    found = export(tmp_path / "stories", to="gguf", verify=True)
    assert found.verdict is not None
    assert found.verdict.words.startswith("llama.cpp (xllamacpp ")
    assert found.verdict.numbers["same"] == found.verdict.numbers["tokens"] >= 16
    rounded = export(tmp_path / "stories", to="gguf", quantize=["Q8_0"], verify=True)
    assert rounded.verdict is not None
    assert rounded.verdict.numbers["Q8_0_same_argmax"] > 0.9
    for place in (tmp_path / "stories").glob("*token*"):
        place.unlink()
    with raises(verdict.Absent, "xllamacpp loads no file without a tokenizer: pip install llama-cpp-python"):
        export(tmp_path / "stories", to="gguf", verify=True, overwrite=True)
    assert any("not verified" in note for note in export(tmp_path / "stories", to="gguf", overwrite=True).notes)


def test_the_command_line(run: Callable[..., Ran], tmp_path: Path) -> None:
    place = exporting.folder("llama-ragged", tmp_path)
    ran = run("export", place, "--to", "gguf", "--quantize", "q8_0", "--no-verify", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["files"] == [str(tmp_path / "llama-ragged-Q8_0.gguf")]


TEXT = "Hello world, it's 2024 and I'VE 12345 apples!\n\n  The naïve café — 東京 is\tfar...  x=y+1;\r\nEnd  "
CUTS = {
    "gpt-2": BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
    "qwen2": split(QWEN),
    "dbrx": split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")),
}


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_bytes_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    """A BPE on bytes that is trained on the text itself: merges reach over every place where a cut could be wrong."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import tokenizers
    from tokenizers import models as kinds
    from tokenizers import trainers

    made = tokenizers.Tokenizer(kinds.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT.replace(" ", ""), TEXT, "12345 2024 123"], trainer)
    stored = json.loads(made.to_str()) | {"pre_tokenizer": CUTS[name]}
    made = tokenizers.Tokenizer.from_str(json.dumps(stored))
    fields = models.TINY["llama"] | {"vocab_size": made.get_vocab_size()}
    models.built(fields).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(stored))
    (file,) = export(tmp_path / "model", to="gguf", verify=False).files
    assert Read(file).keys["tokenizer.ggml.pre"] == name
    loaded = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    assert loaded.tokenize(TEXT.encode(), add_bos=False) == made.encode(TEXT).ids
    loaded.close()
