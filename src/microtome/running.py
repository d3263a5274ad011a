"""What people do with a model once it is written: measure it, and let it write."""

from pathlib import Path
from typing import Any

import torch

from microtome import arch, data
from microtome.calibrate import Progress
from microtome.data import Tokens
from microtome.errors import BadInput, UnsupportedModel
from microtome.evaluate import Perplexity, perplexity
from microtome.loading import device_of, dtype_of, load, tokenizer_of
from microtome.source import Source, open_source
from microtome.texts import Spec

DEFAULT_LENGTH = 2048  # of a window, where the model goes that far


def learned_positions(source: Source) -> int | None:
    """How many positions a model can tell apart; None where it computes them, or its architecture is unknown."""
    fields = source.config
    if fields["model_type"] != "microtome":
        try:
            fields = arch.decoder_fields(fields)
        except UnsupportedModel:  # a wrapper around a decoder that transformers alone knows
            return None
        if fields["model_type"] not in arch.known():
            return None
        fields = arch.lower(fields).to_dict()
    return int(fields["max_position_embeddings"]) if fields.get("positions") == "learned" else None


def window_of(source: Source, length: int | None, longest: int) -> int:
    """The length of windows: what the user wants, as far as the model goes, else its own up to 2048."""
    window, known = length if length is not None else min(DEFAULT_LENGTH, longest), learned_positions(source)
    if known is not None and window > known:
        raise BadInput(f"--length {window} is longer than the {known} positions that this model has learned.")
    return window


def evaluate(  # noqa: PLR0913
    model: str | Path,
    spec: Spec = "wikitext2",
    *,
    baseline: str | Path | None = None,
    length: int | None = None,
    limit: int | None = None,
    text_column: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Perplexity]:
    """Perplexity of a model, and of a baseline beside it, on the same windows: those of the model's own tokenizer."""
    target = device_of(device)
    wide = dtype_of(dtype) or (torch.float32 if target.type == "cpu" else None)
    found: dict[str, Perplexity] = {}
    tokens: Tokens | None = None
    for name in (model, *([] if baseline is None else [baseline])):
        with open_source(name) as source:  # for the checks: what compress refuses is refused here
            loaded = load(source.folder, device=target, dtype=wide)
        decoder = loaded.config.get_text_config()
        if tokens is None:
            window, words = window_of(source, length, decoder.max_position_embeddings), tokenizer_of(source.folder)
            common: dict[str, Any] = {"vocab_size": decoder.vocab_size, "text_column": text_column}
            tokens = data.evaluation(spec, words, length=window, limit=limit, **common)
        if tokens.ids.max() >= decoder.vocab_size:
            raise BadInput(f"{name} has a vocabulary of {decoder.vocab_size}, too small for the tokens of {model}.")
        report_to = (lambda fraction, name=name: progress(f"perplexity, {name}", fraction)) if progress else None
        found[str(name)] = perplexity(loaded, tokens, progress=report_to)
        del loaded
    return found


def generate(  # noqa: PLR0913
    model: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
) -> str:
    """The prompt and what the model adds to it."""
    with open_source(model) as source:
        words = tokenizer_of(source.folder)
    if words is None:
        raise BadInput(f"{model} has no tokenizer: text cannot be turned into tokens.")
    loaded = load(source.folder, device=device_of(device), dtype=dtype_of(dtype))
    inputs = words(prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    if inputs.input_ids.shape[1] == 0:
        raise BadInput("the prompt has no tokens: give a word or two.")
    longest, size = learned_positions(source), inputs.input_ids.shape[1]
    if longest is not None and size >= longest:
        raise BadInput(f"the prompt has {size} tokens, and this model has learned {longest} positions: shorten it.")
    tokens = tokens if longest is None else min(tokens, longest - size)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    padding = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
    out = loaded.generate(**inputs, max_new_tokens=tokens, pad_token_id=padding, **sampling)
    return words.decode(out[0], skip_special_tokens=True)
