"""Tiny checkpoints on disk with a tokenizer and a text, and models whose stream is redundant on purpose."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from models import TINY, built, canonical, ids, stock
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import microtome
from microtome import arch
from microtome.layout import EMBEDDING, FINAL_NORM, POSITIONS

transformers.utils.logging.disable_progress_bar()

CALIBRATION = ids(rows=8, length=24)
HELD_OUT = ids(rows=4, length=24, seed=2)
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-()[]+*/=<>_#%&@$\n"


@cache
def home() -> Path:
    """A folder that goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="microtome-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def folder(name: str) -> Path:
    """A checkpoint of a tiny model without a tokenizer, as transformers writes it."""
    stock(name).save_pretrained(home() / name)
    return home() / name


@cache
def spoken(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint with everything that travels with one, and some things that do not."""
    place = home() / f"{name}-spoken-{str(dtype)[6:]}"
    built(TINY[name]).to(dtype).save_pretrained(place)
    tokenizer().save_pretrained(place)
    (place / "LICENSE").write_text("All of it may be used.\n")
    (place / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# A card that is not copied\n")
    (place / "modeling_other.py").write_text("raise SystemExit\n")
    (place / "training_args.bin").write_bytes(b"pickle")
    return place


def tokenizer() -> PreTrainedTokenizerFast:
    """A letter a token."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    assert len(words) <= 97
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def text(size: int = 4000, seed: int = 0) -> str:
    """Documents of random words."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 26, (size,), generator=generator).tolist()
    out = "".join(" " if place % 6 == 5 else LETTERS[letter] for place, letter in enumerate(letters))
    return "\n\n".join(out[start : start + 98].strip() for start in range(0, size, 98))


def compress(model: Any, out: Path, **chosen: Any) -> microtome.Result:
    """Compress on the calibration ids, without measuring unless told."""
    return microtome.compress(model, **{"data": CALIBRATION, "measure": False, "out": out, **chosen})


def weights(place: Path) -> dict[str, Tensor]:
    """Every stored tensor of a folder."""
    return {name: tensor for file in sorted(place.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def planted(name: str, rank: int, seed: int = 3, span: Tensor | None = None) -> Any:
    """A tiny model whose residual stream lies in `rank` of its dimensions, ones vector included under a LayerNorm.

    They are random, or what the columns `span` [N, rank] span, which then must hold the ones vector.

    All that writes the stream is projected. The final gain is constant, so that a tied head can stay in the subspace.
    """
    model = built(TINY[name])
    size = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    span_NR = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    if canonical(name)[0].norm == "layer":
        span_NR[:, 0] = 1.0
    basis_NR = torch.linalg.qr(span_NR if span is None else span.double()).Q
    onto_NN = basis_NR @ basis_NR.T
    stored = model.state_dict()
    for key, place in arch.find(TINY[name]["model_type"]).names(canonical(name)[0]).items():
        if place.name not in stored:
            continue
        value = stored[place.name].T if place.transposed else stored[place.name]
        if key in (EMBEDDING, POSITIONS):
            value.copy_(value.double() @ onto_NN)
        elif "o_proj" in key or "down_proj" in key:
            value.copy_(onto_NN @ value.double())
        elif key == FINAL_NORM:
            value.fill_(1.3)
    return model
