"""Perplexity: exp of the mean negative log-likelihood over every token that a window predicts.

Windows do not overlap, and the first token of each is predicted by nothing. Means of per-batch means are not taken, so
the value does not depend on how windows are batched.

Shapes: B windows in a batch, T tokens in each, C of the batch's tokens at a time, V vocabulary.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from microtome.data import Tokens
from microtome.errors import BadInput, NumericalFailure

CHUNK = 2**24  # logits upcast at a time: 64 MiB in fp32, and as much again for their log-softmax
IGNORED = -100  # the target of a window's last token, which predicts nothing: its likelihood counts as 0


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on; `nll` is in nats for each predicted token, `tokens` counts those."""

    value: float
    nll: float
    windows: int
    length: int
    stride: int
    tokens: int
    dtype: str
    source: str
    sha256: str
    seconds: float

    def protocol(self) -> str:
        """What was measured, in one line: two values compare only if their lines are equal."""
        cut = f"{self.windows:,} windows of {self.length}, stride {self.stride}"
        origin = f"{self.source} (sha256 {self.sha256[:12]})"
        return f"ppl over {self.tokens:,} predicted tokens: {cut}, {self.dtype}, {origin}"


def perplexity(
    model: nn.Module,
    tokens: Tokens,
    *,
    batch_tokens: int = 4096,
    progress: Callable[[float], None] | None = None,
) -> Perplexity:
    """Measure a causal language model on windows, whole windows of at most `batch_tokens` tokens (or one) at a time.

    Log-likelihoods are of logits in fp32, their sum is fp64; `progress` is told the fraction done. The model is in
    evaluation mode meanwhile. Raises NumericalFailure where a window's likelihood is not finite.
    """
    total, length = tokens.ids.shape
    if total < 1 or length < 2:
        raise BadInput(f"perplexity needs windows of at least 2 tokens, but {tokens.source} is {[total, length]}")
    start = time.perf_counter()
    dtype, device = _placement(model)
    size = max(1, batch_tokens // length)
    sums: list[float] = []
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, total, size):
                ids_BT = tokens.ids[first : first + size].to(device)
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                sums += _window_sums(logits_BTV, ids_BT, first, tokens.source)
                if progress:
                    progress(len(sums) / total)
    finally:
        model.train(training)
    predicted = total * (length - 1)
    nll = math.fsum(sums) / predicted
    return Perplexity(
        value=math.exp(nll) if nll < 709 else math.inf,  # the largest exponent that fp64 holds
        nll=nll,
        windows=total,
        length=length,
        stride=length,
        tokens=predicted,
        dtype=str(dtype).removeprefix("torch."),
        source=tokens.source,
        sha256=tokens.sha256,
        seconds=time.perf_counter() - start,
    )


def _window_sums(logits_BTV: Tensor, ids_BT: Tensor, first: int, source: str) -> list[float]:
    """The summed NLL of each window, in nats; `first` is the number of the batch's first window."""
    target_BT = ids_BT.roll(-1, dims=1)
    target_BT[:, -1] = IGNORED
    step = max(1, CHUNK // logits_BTV.shape[-1])
    chunks = zip(
        logits_BTV.flatten(0, 1).split(step), target_BT.flatten().to(logits_BTV.device).split(step), strict=True
    )
    nll = [cross_entropy(x_CV.float(), y_C, ignore_index=IGNORED, reduction="none") for x_CV, y_C in chunks]
    nll_BT = torch.cat(nll).view(target_BT.shape).cpu().double()  # one transfer a batch; not every device has fp64
    sums = nll_BT.sum(dim=1).tolist()
    for window, total in enumerate(sums, first):
        if not math.isfinite(total):
            fact = f"the log-likelihood of window {window} (from 0) of {source} is {total}"
            raise NumericalFailure(f"{fact}: the model's logits are not finite, try a wider dtype")
    return sums


def _placement(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype of the first floating parameter or buffer, and the device of the first."""
    tensors = list(itertools.chain(model.parameters(), model.buffers()))
    if not tensors:
        return torch.get_default_dtype(), torch.device("cpu")
    dtype = next((held.dtype for held in tensors if held.is_floating_point()), tensors[0].dtype)
    return dtype, tensors[0].device
