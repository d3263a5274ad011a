"""The tokenizer in the words of a GGUF file: tokens with their kinds, scores or merges, and what is special.

Two kinds are known. One works on characters and marks words by a lower block (SentencePiece's BPE, Llama 2, Gemma); it
merges what scores best, and where only a tokenizer.json is there, a token scores by the rank of its first merge. The
other works on bytes (GPT-2, Llama 3, Qwen); how it cuts text before merging is a regular expression, for which
llama.cpp has names.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microtome.errors import BadCheckpoint, UnsupportedModel

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # of gguf.TokenType
BLOCK = "\u2581"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
)
SPACES = r"|\s+(?!\S)|\s+"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
THREE = "{1,3}"
EXPRESSIONS = {
    WORDS % THREE + SPACES: "dbrx",  # with ignore_merges: llama-bpe
    WORDS % "" + SPACES: "qwen2",
    CASED % ("", "", "") + SPACES: "tekken",
    CASED % (SHORT, SHORT, THREE) + SPACES: "gpt-4o",
}
MARKS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}


@dataclass
class Vocabulary:
    """What is written of a tokenizer; `model` is "none" where there is none that llama.cpp knows."""

    model: str
    tokens: list[str] = field(default_factory=list[str])
    kinds: list[int] = field(default_factory=list[int])
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str | None = None
    flags: dict[str, bool] = field(default_factory=dict[str, bool])  # add_bos_token and the like
    marks: dict[str, int] = field(default_factory=dict[str, int])  # bos, eos, unk, pad
    template: str | None = None
    note: str | None = None


def read(folder: Path, config: Mapping[str, Any], size: int, pre: str | None = None) -> Vocabulary:
    """The tokenizer of a folder, for a table of `size` rows; `pre` is llama.cpp's name of its regular expression.

    Raises UnsupportedModel where it cuts text in a way that llama.cpp may not have.
    """
    settings, stored = loaded(folder / "tokenizer_config.json"), loaded(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        found = pieces(folder / "tokenizer.model", stored)
    elif not stored:
        return Vocabulary("none", note="no tokenizer is stored, for the folder has none: give the engine token ids.")
    elif (kind := str(stored["model"].get("type"))) != "BPE":
        return Vocabulary("none", note=f"no tokenizer is stored: llama.cpp has none like {kind}. Give it token ids.")
    else:
        found = characters(stored) if on_characters(stored) else on_bytes(stored, pre)
    sized(found, size)
    found.flags |= adds(stored, settings)
    found.marks = marks(found, settings, config)
    found.template = template(folder, settings)
    return found


def loaded(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where it is not there."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}.") from error
    return found if isinstance(found, dict) else {}


# --- kinds ----------------------------------------------------------------------------------------------------------


def steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, one after the other."""
    if isinstance(part, dict):
        inner = part.get("normalizers") or part.get("pretokenizers") or part.get("processors") or part.get("decoders")
        for one in inner or [part]:
            yield from steps(one) if one is not part else iter([one])


def on_characters(stored: Mapping[str, Any]) -> bool:
    """Whether words are marked by a lower block, instead of bytes spelled as characters."""
    if any(step.get("type") == "Metaspace" for step in steps(stored.get("pre_tokenizer"))):
        return True
    return any(step.get("type") == "Replace" and step.get("content") == BLOCK for step in steps(stored["normalizer"]))


def pieces(path: Path, stored: Mapping[str, Any]) -> Vocabulary:
    """A tokenizer.model of SentencePiece, and what tokenizer.json adds to it."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(path))
    found = Vocabulary("llama", scores=[])
    assert found.scores is not None
    for token in range(model.get_piece_size()):
        kind = next((kind for kind, test in tests(model).items() if test(token)), NORMAL)
        found.tokens.append(model.id_to_piece(token))
        found.scores.append(model.get_score(token))
        found.kinds.append(kind)
    found.flags["add_space_prefix"] = prefixed(stored) if stored else True
    add(found, stored)
    return found


def tests(model: Any) -> dict[int, Any]:
    """What SentencePiece says of a token, by its kind here."""
    return {UNKNOWN: model.is_unknown, CONTROL: model.is_control, UNUSED: model.is_unused, BYTE: model.is_byte}


def characters(stored: Mapping[str, Any]) -> Vocabulary:
    """A BPE on characters as tokenizer.json has it."""
    model, ranks = stored["model"], dict[str, int]()
    for rank, (left, right) in enumerate(split_merges(stored)):
        ranks.setdefault(left + right, rank)
    tokens = by_number(model["vocab"])
    byte = {f"<0x{value:02X}>" for value in range(256)} if model.get("byte_fallback") else set[str]()
    found = Vocabulary(
        "llama",
        tokens=tokens,
        kinds=[BYTE if one in byte else UNKNOWN if one == model.get("unk_token") else NORMAL for one in tokens],
        scores=[-float(ranks.get(one, len(ranks))) for one in tokens],
        flags={"add_space_prefix": prefixed(stored)},
    )
    add(found, stored)
    if not byte:
        found.note = "the tokenizer has no bytes to fall back on: llama.cpp fails at characters that it does not know."
    return found


def on_bytes(stored: Mapping[str, Any], pre: str | None) -> Vocabulary:
    """A BPE on bytes as tokenizer.json has it."""
    tokens = by_number(stored["model"]["vocab"])
    found = Vocabulary("gpt2", tokens=tokens, kinds=[NORMAL] * len(tokens))
    found.merges = [" ".join(pair) for pair in split_merges(stored)]
    found.pre = pre or pre_tokenizer(stored)
    add(found, stored)
    return found


def pre_tokenizer(stored: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is cut before merging."""
    whole, ignores = list(steps(stored.get("pre_tokenizer"))), bool(stored["model"].get("ignore_merges"))
    kinds = [(step.get("type"), step.get("use_regex", True)) for step in whole]
    if kinds == [("ByteLevel", True)]:
        return "gpt-2"
    if kinds == [("Digits", True), ("ByteLevel", True)] and whole[0].get("individual_digits"):
        return "smollm"
    if kinds == [("Split", True), ("ByteLevel", False)]:
        pattern: Any = whole[0].get("pattern")
        name = EXPRESSIONS.get(str(pattern.get("Regex")) if isinstance(pattern, dict) else "")
        if name is not None:
            return "llama-bpe" if ignores and name == "dbrx" else name
    told = ", ".join(f"{kind}" for kind, _ in kinds) or "nothing"
    raise UnsupportedModel(
        f"the tokenizer cuts text in a way that Microtome has no llama.cpp name for ({told}). If you know it, give "
        "-o pre=NAME; -o pre=default stores llama.cpp's default, which may cut otherwise."
    )


def by_number(vocab: Mapping[str, int]) -> list[str]:
    """Tokens in the order of their ids, gaps filled."""
    places = {number: token for token, number in vocab.items()}
    return [places.get(number, f"[PAD{number}]") for number in range(max(places, default=-1) + 1)]


def split_merges(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files join them by a space."""
    found = [one.split(" ", 1) if isinstance(one, str) else one for one in stored["model"]["merges"]]
    return [(left, right) for left, right in found]


def prefixed(stored: Mapping[str, Any]) -> bool:
    """Whether a text is tokenised as if a space stood before it."""
    for step in (*steps(stored.get("normalizer")), *steps(stored.get("pre_tokenizer"))):
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            return str(step.get("prepend_scheme", "always")) != "never" and bool(step.get("add_prefix_space", True))
    return False


def add(found: Vocabulary, stored: Mapping[str, Any]) -> None:
    """Added tokens, at their ids."""
    for one in stored.get("added_tokens") or []:
        number, kind = int(one["id"]), CONTROL if one.get("special") else USER
        sized(found, number + 1, cut=False)
        if found.kinds[number] != UNKNOWN:
            found.tokens[number], found.kinds[number] = str(one["content"]), kind


def sized(found: Vocabulary, size: int, *, cut: bool = True) -> None:
    """As many tokens as the table has rows: the rest unused."""
    if cut and len(found.tokens) > size:
        del found.tokens[size:], found.kinds[size:]
        if found.scores is not None:
            del found.scores[size:]
    for number in range(len(found.tokens), size):
        found.tokens.append(f"[PAD{number}]")
        found.kinds.append(UNUSED)
        if found.scores is not None:
            found.scores.append(-1e6)


# --- what is special ------------------------------------------------------------------------------------------------


def adds(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the first and the last token of a text are put in by the tokenizer."""
    for step in steps(stored.get("post_processor")):
        if step.get("type") == "TemplateProcessing":
            single = [next(iter(one)) for one in step.get("single", [])]
            first = single[:1] == ["SpecialToken"]
            return {"add_bos_token": first, "add_eos_token": len(single) > 1 and single[-1:] == ["SpecialToken"]}
    if stored:
        return {"add_bos_token": bool(settings.get("add_bos_token", False))}
    return {"add_bos_token": bool(settings.get("add_bos_token", True))}


def marks(found: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """The ids of special tokens: those that the tokenizer names, else those of the config."""
    numbers = {token: number for number, token in enumerate(found.tokens)}
    said: dict[str, int] = {}
    for name, key in MARKS.items():
        word = settings.get(f"{name}_token")
        word = word.get("content") if isinstance(word, dict) else word
        number = config.get(key)
        number = number[0] if isinstance(number, list) and number else number
        place = numbers.get(word) if isinstance(word, str) else None
        place = place if place is not None else number if isinstance(number, int) else None
        if place is not None and 0 <= place < len(found.tokens):
            said[name] = place
    return said


def template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template, in a file of its own or in the tokenizer's settings."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    found = settings.get("chat_template") or loaded(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        return next((str(one["template"]) for one in found if one.get("name") == "default"), None)
    return str(found) if found else None
