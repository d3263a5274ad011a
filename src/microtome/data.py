"""Text to windows of token ids: the same input, options and seed give the same bytes.

Text becomes one stream (documents joined by a blank line, special tokens added once), cut into contiguous windows.
Where a text says itself that a document ends (`<|endoftext|>`), the next begins with the tokenizer's special tokens.
Evaluation keeps them in order. Calibration draws some at random; of a text too large to tokenise whole it draws
stretches first. Ids that were tokenised elsewhere are taken as they are.

Shapes: N windows, T tokens in each, S tokens in a stream.
"""

import hashlib
import re
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from microtome.errors import BadInput
from microtome.texts import SEPARATOR, Spec, load

WHOLE = 2**22  # characters tokenised as one text: a fast tokenizer holds about 500 bytes for each token
STRETCH = 8  # characters for each token of a window: about two windows of English, so 128 come from some 64 places
MARGIN = (
    32  # characters for each token of the `limit` windows that `evaluation` tokenises before it tries the whole text
)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Windows of token ids, int64 [N, T], and where they come from.

    `source` is what the user named; `sha256` is over shape and ids; `note` says what was shortened, "" if nothing was.
    `parts` are the sources of a mixture.
    """

    ids: Tensor
    source: str
    sha256: str
    note: str = ""
    parts: tuple["Share", ...] = ()

    @property
    def count(self) -> int:
        """The number of tokens."""
        return self.ids.numel()


@dataclass(frozen=True)
class Share:
    """One source of a mixture: the weight that was asked for, and the windows that came of it."""

    source: str
    weight: float
    windows: int
    sha256: str


def calibration(  # noqa: PLR0913 - the options of one act, all by name
    spec: Spec,
    tokenizer: Any | None,
    *,
    samples: int | None = 128,
    length: int | None = 2048,
    seed: int = 0,
    vocab_size: int | None = None,
    text_column: str | None = None,
) -> Tokens:
    """Draw `samples` windows of `length` tokens without replacement, and keep them in the order drawn.

    `spec` is a file, a folder, a known data set (its train split), a list of texts, or ids [N, T]. From ids nothing is
    drawn: the first `samples` rows and `length` columns are taken, all if None. Raises BadInput or UnknownName.
    """
    _check_sizes(length, samples=samples)
    if not 0 <= seed < 2**63:
        raise BadInput(f"seed must lie between 0 and 2**63 - 1, not {seed}")
    source, content = load(spec, "train", text_column, tokenizer)
    if isinstance(content, Tensor):
        return _given(source, content, samples, length, vocab_size)
    length = _check_text(source, tokenizer, length)
    generator = torch.Generator().manual_seed(seed)
    stream_S = _sampled(content, tokenizer, None if samples is None else samples * length, length, generator)
    window_NT, note = _windows(source, stream_S, length)
    total = len(window_NT)
    if samples is not None and total < samples and not note:
        note = f"{source} has {total} windows of {length} tokens, fewer than the {samples} asked for: all are used"
    drawn = torch.randperm(total, generator=generator)[:samples]
    return digested(source, window_NT[drawn], note, vocab_size)


def evaluation(
    spec: Spec,
    tokenizer: Any | None,
    *,
    length: int | None = 2048,
    vocab_size: int | None = None,
    limit: int | None = None,
    text_column: str | None = None,
) -> Tokens:
    """Cut the whole text into windows of `length` tokens that do not overlap, in order; the tail is dropped.

    `spec` is as for `calibration`, but a known data set gives its test split. `limit` keeps the first windows only.
    Raises BadInput or UnknownName.
    """
    _check_sizes(length, limit=limit)
    source, content = load(spec, "test", text_column, tokenizer)
    if isinstance(content, Tensor):
        return _given(source, content, limit, length, vocab_size)
    length = _check_text(source, tokenizer, length)
    head = content if limit is None else content[: limit * length * MARGIN]
    stream_S = _encode(tokenizer, head)
    if limit is not None and len(head) < len(content) and len(stream_S) < (limit + 1) * length:
        stream_S = _encode(tokenizer, content)  # the cut must lie well behind the last window that is kept
    window_NT, note = _windows(source, stream_S, length)
    return digested(source, window_NT[:limit], note, vocab_size)


def _check_sizes(length: int | None, **counts: int | None) -> None:
    if length is not None and length < 2:
        raise BadInput(f"length must be at least 2 tokens, one to predict the next from, not {length}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise BadInput(f"{name} must be at least 1, not {count}")


def _check_text(source: str, tokenizer: Any | None, length: int | None) -> int:
    if tokenizer is None:
        raise BadInput(f"{source} is text, but the model folder has no tokenizer: pass token ids, a .pt or .npy file")
    if length is None:
        raise BadInput(
            f"{source} is text: say how many tokens make a window (only token ids have a length of their own)"
        )
    return length


def _encode(tokenizer: Any, text: str, *, special: bool = True) -> Tensor:
    """The ids of a text, [S]; each document behind a separator begins as a text of its own does."""
    # Texts are longer than the model's context on purpose: verbose=False keeps the tokenizer from warning about it.
    flags = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
    first, *others = _documents(tokenizer, text)
    ids: list[int] = []
    if first or not others:
        ids += tokenizer(first, add_special_tokens=special, **flags)["input_ids"]
    if others:
        ids += chain.from_iterable(tokenizer(others, add_special_tokens=True, **flags)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def _documents(tokenizer: Any, text: str) -> list[str]:
    """At least one document: the whole text where it has no separator, or the tokenizer has a token for that.

    The first is empty where the text begins with a separator. A tokenizer without special tokens reads a blank line.
    """
    if SEPARATOR not in text or tokenizer.convert_tokens_to_ids(SEPARATOR) not in {None, tokenizer.unk_token_id}:
        return [text]
    first, *others = (part.strip() for part in text.split(SEPARATOR))
    others = [part for part in others if part]
    return [first, *others] if tokenizer("")["input_ids"] else ["\n\n".join([first, *others] if first else others)]


def _sampled(text: str, tokenizer: Any, wanted: int | None, length: int, generator: torch.Generator) -> Tensor:
    """The stream of the whole text; of a large one, stretches in random order until there are `wanted` tokens."""
    if wanted is None or len(text) <= WHOLE:
        return _encode(tokenizer, text)
    size = max(STRETCH * length, 4096)
    starts = range(0, len(text), size)
    streams: list[Tensor] = []
    for place in torch.randperm(len(starts), generator=generator).tolist():
        streams.append(_encode(tokenizer, text[starts[place] : starts[place] + size], special=not streams))
        wanted -= len(streams[-1])
        if wanted <= 0:
            break
    return torch.cat(streams)


def _windows(source: str, stream_S: Tensor, length: int) -> tuple[Tensor, str]:
    """All contiguous windows, and a note; a stream shorter than a window is one shorter window."""
    size = len(stream_S)
    if size < 2:
        raise BadInput(
            f"the text of {source} makes {size} token(s): at least 2 are needed, to predict one from another"
        )
    if size < length:
        return stream_S[
            None
        ], f"{source} has {size} tokens, fewer than a window of {length}: it is one window of {size}"
    return stream_S[: size // length * length].view(-1, length), ""


def _given(source: str, ids: Tensor, rows: int | None, length: int | None, vocab_size: int | None) -> Tokens:
    """The first `rows` rows and `length` columns of ids that were tokenised elsewhere."""
    if not re.fullmatch(r"torch\.u?int\d+", str(ids.dtype)):
        raise BadInput(f"token ids are integers, but {source} holds {str(ids.dtype).removeprefix('torch.')}")
    if ids.ndim != 2 or not ids.shape[0] or ids.shape[1] < 2:
        raise BadInput(f"token ids are [N, T], at least 1 window of 2 tokens, but {source} has shape {list(ids.shape)}")
    kept_NT = ids[:rows, :length].to(device="cpu", dtype=torch.int64, copy=True)
    note = ""
    if kept_NT.shape != ids.shape:
        note = f"of {source}, {list(ids.shape)}, the first {list(kept_NT.shape)} are used"
    return digested(source, kept_NT, note, vocab_size)


def digested(source: str, ids_NT: Tensor, note: str, vocab_size: int | None) -> Tokens:
    """Windows with their digest, after a look at the ids. Raises BadInput for ids that the model does not have."""
    least, most = int(ids_NT.min()), int(ids_NT.max())
    if least < 0:
        raise BadInput(f"the smallest token id of {source} is {least}: ids count from 0")
    if vocab_size is not None and most >= vocab_size:
        fact = f"the largest token id of {source} is {most}, but the model's vocabulary has {vocab_size} entries"
        raise BadInput(f"{fact}: it was made with another tokenizer")
    ids_NT = ids_NT.contiguous()
    digest = hashlib.sha256(f"{ids_NT.shape[0]}x{ids_NT.shape[1]}:".encode())
    digest.update(ids_NT.numpy().astype("<i8").tobytes())
    return Tokens(ids_NT, source, digest.hexdigest(), note)
