"""A tokenizer whose tokens are words, texts of such words, and what their ids are."""

import functools

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

UNKNOWN, BOS, BLANK = 0, 1, 2
WORDS = 4000  # w0 is token 3, w1 token 4, ...


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens, so is a blank line; <s> goes before a text; the model's context is 8 tokens."""
    vocabulary = {"<unk>": UNKNOWN, "<s>": BOS, "\n\n": BLANK} | {f"w{i}": 3 + i for i in range(WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Steps([Split(" ", "removed"), Split(Regex("\n\n"), "isolated")])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", model_max_length=8)


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def ids(start: int, stop: int) -> list[int]:
    return list(range(3 + start, 3 + stop))


DOCUMENTS = [words(0, 5), words(5, 7), words(7, 20)]
STREAM = [BOS, *ids(0, 5), BLANK, *ids(5, 7), BLANK, *ids(7, 20)]  # 23 tokens
