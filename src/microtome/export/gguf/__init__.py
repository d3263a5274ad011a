"""GGUF, the format of llama.cpp and of what is built on it (Ollama, LM Studio): one file with tokenizer and weights.

Written from the canonical decoder, whatever architecture it came from: `family` chooses one that llama.cpp has, `fold`
puts constants into weights and zeros where llama.cpp wants something, `vocabulary` reads the tokenizer, `store` writes.
Blocks of different widths become llama.cpp's `deci`, whose heads and neurons are counted block by block.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from microtome import layout
from microtome.errors import BadInput
from microtome.export.gguf import engine, family, fold, store, vocabulary
from microtome.export.gguf.family import Family
from microtome.export.gguf.fold import Frame
from microtome.planner import Opened
from microtome.verdict import Verdict

if TYPE_CHECKING:
    from microtome.export import Request

SUMMARY = "one file for llama.cpp, Ollama and LM Studio, with the tokenizer; also quantised"
EXTRA = "gguf"
SUFFIX = ".gguf"
QUANTIZE = (*store.PLAIN, *store.BLOCKS, *store.KQUANTS)
OPTIONS = ("pre",)


def unfit(opened: Opened) -> str | None:
    """Why llama.cpp has nothing like it; None where it has."""
    found = family.chosen(opened.config)
    return found if isinstance(found, str) else None


def framed(opened: Opened) -> Frame:
    """The frame of a checkpoint that fits."""
    found = family.chosen(opened.config)
    assert isinstance(found, Family), found
    return fold.framed(found, opened.config)


def vocabulary_of(opened: Opened, request: "Request") -> vocabulary.Vocabulary:
    """The tokens that the file holds."""
    return vocabulary.read(opened.source.folder, opened.fields, opened.config.vocab_size, request.options.get("pre"))


def write(opened: Opened, folder: Path, request: "Request") -> list[Path]:
    """One file for every type; K-quants are made by llama.cpp from a file that is not kept."""
    store.library()
    kinds = [Path(name).stem.rsplit("-", 1)[1] for name in request.files]
    if any(kind in store.KQUANTS for kind in kinds) and not engine.has_quantiser():
        raise BadInput(engine.quantiser_missing())
    frame, words = framed(opened), vocabulary_of(opened, request)
    said(frame, words, kinds, request)
    paths: list[Path] = []
    for name, kind in zip(request.files, kinds, strict=True):
        request.report("writing", len(paths) / len(kinds))
        path = folder / name
        if kind in store.KQUANTS:
            whole = unquantised(opened, frame, words, folder)
            engine.quantised(whole, path, file_type(kind))
        else:
            store.write(opened, frame, words, path, kind)
        paths.append(path)
    request.report("writing", 1.0)
    return paths


def unquantised(opened: Opened, frame: Frame, words: vocabulary.Vocabulary, folder: Path) -> Path:
    """A file in fp32 that is not kept, written once."""
    path = folder / "whole" / "F32.gguf"
    if not path.exists():
        path.parent.mkdir()
        store.write(opened, frame, words, path, "F32")
    return path


def file_type(kind: str) -> int:
    """llama.cpp's number of a type of files."""
    return int(store.library().LlamaFileType[f"MOSTLY_{kind}"])


def said(frame: Frame, words: vocabulary.Vocabulary, kinds: Sequence[str], request: "Request") -> None:
    """What a user should know of the file."""
    config, name = frame.config, frame.family.name
    request.say(f"written as llama.cpp's {name}.")
    if words.note is not None:
        request.say(words.note)
    if (longest := store.context(frame)) < config.max_position_embeddings:
        request.say(
            f"llama.cpp's {name} has no window: the context is {longest} tokens, those of the window, up to which both "
            "agree."
        )
    if frame.family.activations is family.GELU:
        request.say("llama.cpp looks GELU up in a table of 16-bit numbers: logits differ by about a thousandth.")
    if (more := padding(frame)) > 0.005:
        request.say(
            f"zeros stand in for what blocks lack or llama.cpp cannot leave out: {100 * more:.1f} % more numbers."
        )
    if any(one.get("rope_type") == "dynamic" for one in family.rotaries(config)):
        request.say("frequencies that grow with the text (dynamic) stay as they are up to the context that is stored.")
    sizes = {
        config.hidden_size,
        *(one.ffn for one in frame.sizes),
        *(one.heads * frame.head_dim for one in frame.sizes),
    }
    odd, quantised = sorted(size for size in sizes if size % 32), [one for one in kinds if one not in store.PLAIN]
    if quantised and odd:
        request.say(f"rows of {', '.join(map(str, odd))} numbers fill no block of 32, and stay in F16.")
    mixed = sorted(size for size in sizes if size % 256 and size % 32 == 0)
    if mixed and any(kind in store.KQUANTS for kind in kinds):
        told = ", ".join(map(str, mixed))
        request.say(f"rows of {told} numbers fill no block of 256: there K-quants fall back to Q5_0, Q5_1 or Q8_0.")


def padding(frame: Frame) -> float:
    """Numbers in the blocks of the file beyond those of the decoder, as a part of these."""
    config, wide, width = frame.config, frame.head_dim, frame.config.hidden_size
    matrices = 3 if config.mlp_gated else 2
    have = sum(2 * (one.heads + one.groups) * wide * width + matrices * one.ffn * width for one in frame.sizes)
    need = layout.count_blocks(config)
    return have / need - 1.0


# --- verdict --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def verify(opened: Opened, files: Sequence[Path], request: "Request") -> Verdict:
    """The decoder in fp32 through llama.cpp; of files that are rounded also how far they are from it."""
    frame, folder, words = framed(opened), files[0].parent, vocabulary_of(opened, request)
    judge = engine.judge(frame, opened, folder, tokens=words.model != "none")
    exact = next((file for file in files if file.stem.endswith("-F32")), None)
    exact = exact or unquantised(opened, frame, words, folder)
    request.report("verifying", 0.1)
    found = judge.exact(exact)
    for number, file in enumerate(file for file in files if file != exact and found.passed):
        request.report("verifying", (1 + number) / (1 + len(files)))
        found = judge.rounded(found, file, file.stem.rsplit("-", 1)[1])
    return found
