"""The demo model and its text: the same everywhere, disjoint, complete, and better than counting words."""

import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from microtome import demo
from microtome.errors import BadInput

WINDOW = 256
AWKWARD = [
    "",
    " ",
    "  two spaces first",
    "trailing  \n",
    "tabs\tand\r\nreturns",
    "naïve 日本語 😀",
    "    >>> x[1:-1]\n    'abc'",
]


@pytest.fixture(scope="module")
def parts():
    return demo.corpus()


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(demo.MODEL / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.MODEL)


def fingerprint(parts):
    return sha256(json.dumps(parts).encode()).hexdigest()


def test_corpus_is_the_same_in_another_process(parts):
    code = f"""if True:
        import hashlib, json, sys, types
        sys.modules["microtome"] = package = types.ModuleType("microtome")  # without torch: seconds faster
        package.__path__ = [{str(Path(demo.__file__).parents[1])!r}]
        from microtome.demo import corpus
        assert "torch" not in sys.modules
        print(hashlib.sha256(json.dumps(corpus()).encode()).hexdigest())
    """
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(parts)


def test_parts_are_disjoint_and_without_repetition(parts):
    train, held_out = parts
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)
    assert not set(train) & set(held_out)
    assert min(map(len, train + held_out)) >= demo.SHORTEST


def test_held_out_part_is_a_sane_share(parts):
    train, held_out = (sum(map(len, part)) for part in parts)
    assert train > 1_000_000
    assert 0.04 < held_out / (train + held_out) < 0.14


def test_few_held_out_lines_stand_in_the_train_part(parts):
    seen = {line for text in parts[0] for line in demo.long_lines(text)}
    lines = [line for text in parts[1] for line in demo.long_lines(text)]
    assert sum(line in seen for line in lines) < 0.06 * len(lines)


def test_corpus_holds_a_known_docstring_and_a_known_topic(parts):
    texts = parts[0] + parts[1]
    assert any(text.startswith("Heap queue algorithm") for text in texts)
    assert any(text.startswith('The "if" statement\n****') for text in texts)


def test_unreadable_and_foreign_files_are_left_out(tmp_path, monkeypatch):
    text = "A docstring that is long enough to be a document, with a stray \\d in it."
    kept = {"good.py": f'"""{text}"""', "async.py": f'async def f():\n    """Also: {text}"""'}
    left_out = {
        "broken.py": f'"""{text}"""\n(',
        "binary.py": "\0",
        "label.py": '"""Too short."""',
        "site-packages/other.py": f'"""Foreign: {text}"""',
        "email/test/test_it.py": f'"""Test: {text}"""',
    }
    for name, source in (kept | left_out).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9 ' + text.encode() + b'"""')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    train, held_out = demo.corpus()
    assert sorted(train + held_out) == [text, f"Also: {text}"]


def test_python_without_sources_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(BadInput, match="no readable sources"):
        demo.corpus()


def test_folder_is_complete_and_small():
    names = {path.name for path in demo.MODEL.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (demo.MODEL / "model.safetensors").stat().st_size <= 8_000_000
    assert json.loads((demo.MODEL / "config.json").read_text())["dtype"] == "float16"


def test_tokenizer_agrees_with_sentencepiece_and_goes_back(parts, pieces, tokenizer):
    texts = [text for text in parts[1] if "<s>" not in text and "</s>" not in text]
    for text in [*AWKWARD, *texts]:
        ids = tokenizer(text).input_ids
        assert ids == [pieces.bos_id(), *pieces.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_stand_where_llama_has_them(pieces, tokenizer):
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == pieces.vocab_size()


def test_model_predicts_better_than_a_unigram(parts, pieces):
    train, held_out = (pieces.encode("\n\n".join(part)) for part in parts)
    ids_WT = torch.tensor(held_out[: 8 * WINDOW]).view(8, WINDOW)
    counts = Counter(train)
    counts_V = torch.tensor([counts[token] + 1 for token in range(pieces.vocab_size())])
    unigram = -(counts_V / counts_V.sum()).log()[ids_WT[:, 1:]].mean()
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32).eval()
    with torch.inference_mode():
        loss = model(input_ids=ids_WT, labels=ids_WT).loss
    assert loss < unigram - 1


def test_report_is_of_this_model():
    report = json.loads((Path(__file__).parents[1] / "benchmarks" / "demo_model.json").read_text())
    perplexity = report["perplexity"]
    assert report["weights_bytes"] == (demo.MODEL / "model.safetensors").stat().st_size
    assert perplexity["model"] < 0.9 * perplexity["trigram"] < perplexity["unigram"]
    card = (demo.MODEL / "README.md").read_text()
    assert all(f"{value:.2f}" in card for value in perplexity.values())
