"""What an engine made of an exported file, held against the checkpoint itself.

The checkpoint is run by our own decoder in fp32 on a CPU, whatever it is stored in and whatever the engine is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from microtome import layout
from microtome.calibrate import attention_of
from microtome.errors import BadInput
from microtome.layout import EMBEDDING, HEAD
from microtome.modeling_microtome import MicrotomeConfig, MicrotomeForCausalLM
from microtome.planner import Opened

TOLERANCE = 1e-4  # largest difference of logits, as a part of the largest logit
TOKENS = 32  # of the probe


class Absent(BadInput):
    """A library or an engine that is not installed."""


def absent(what: str, extra: str) -> Absent:
    """The one line for a library that is not there."""
    return Absent(f"{what} is not installed: pip install 'microtome[{extra}]'.")


@dataclass(frozen=True)
class Verdict:
    """Whether an engine (with its version) computes what the checkpoint does, in words and in numbers."""

    engine: str
    passed: bool
    words: str
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])


def probe(config: MicrotomeConfig, length: int = TOKENS, seed: int = 0) -> Tensor:
    """Token ids [1, T] to run an engine on: random ones, without the first three, which are often special."""
    length = min(length, config.max_position_embeddings)
    low = min(3, config.vocab_size - 1)
    return torch.randint(low, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def reference(opened: Opened) -> MicrotomeForCausalLM:
    """The checkpoint in our own decoder, in fp32 on the CPU."""
    tensors: dict[str, Tensor] = {}
    for part in layout.parts(opened.config):
        tensors |= opened.read(part, torch.float32)
    return decoder(opened.config, tensors)


def decoder(config: MicrotomeConfig, tensors: Mapping[str, Tensor]) -> MicrotomeForCausalLM:
    """Our decoder with these canonical tensors, which it keeps."""
    made: Any = MicrotomeForCausalLM(config)
    made.set_attn_implementation(attention_of(config))
    missing, unexpected = made.load_state_dict(dict(tensors), strict=False, assign=True)
    assert set(missing) <= ({HEAD} if config.tie_word_embeddings else set()), missing
    assert not unexpected, unexpected
    if config.tie_word_embeddings:
        made.lm_head.weight = made.model.embed_tokens.weight
        assert made.lm_head.weight.shape == tensors[EMBEDDING].shape
    return made.eval()


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits [T, V] of token ids [1, T], in fp32, without a cache."""
    return model(input_ids=ids, use_cache=False).logits[0].float()


def held(engine: str, wanted: Tensor, found: Tensor, tolerance: float = TOLERANCE) -> Verdict:
    """The verdict on an engine's logits [T, V], beside those of the checkpoint."""
    largest, scale = (wanted - found).abs().max().item(), wanted.abs().max().item()
    same = (wanted.argmax(-1) == found.argmax(-1)).float().mean().item()
    passed = bool(found.isfinite().all()) and largest <= tolerance * max(1.0, scale)
    words = (
        f"{engine}: logits of {len(wanted)} tokens differ by {largest:.1e} at most, where the largest is {scale:.3g}; "
        f"{100 * same:.0f} % of likeliest tokens agree"
    )
    return Verdict(engine, passed, words, {"largest_difference": largest, "scale": scale, "same_argmax": same})


def informed(verdict: Verdict, kind: str, wanted: Tensor, near: Tensor) -> Verdict:
    """A verdict with what rounding to a type costs, which is no reason to fail unless it comes out not finite.

    `wanted` and `near` are logits [T, V]; the divergence is KL(wanted, near), a mean over tokens.
    """
    first, second = wanted.double().log_softmax(-1), near.double().log_softmax(-1)
    loss = (first.exp() * (first - second)).sum(-1).mean().item()
    same = (wanted.argmax(-1) == near.argmax(-1)).float().mean().item()
    words = f"{verdict.words}; {kind}: {abs(loss):.1e} nats of divergence, {100 * same:.0f} % of likeliest tokens agree"
    numbers = {**verdict.numbers, f"{kind}_divergence": loss, f"{kind}_same_argmax": same}
    return replace(verdict, words=words, numbers=numbers, passed=verdict.passed and bool(near.isfinite().all()))
