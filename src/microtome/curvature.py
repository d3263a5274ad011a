"""Curvature of the language-model loss: Hutchinson's estimate of the diagonal of its Hessian.

For signs z drawn at random, z (H z) is the diagonal on average, and its sum over the weights of a matrix the trace of
that matrix's part of H. One product H z is a second pass back through the graph of the gradient, so that the whole
decoder, its gradients and their graph are in memory: this is for small models. Squared gradients (`gradients`) serve
the same end for large ones.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from microtome.calibrate import Progress
from microtome.gradients import Gradients, check_finite, decoder
from microtome.planner import Opened
from microtome.stats import Sample


def curvature(  # noqa: PLR0913
    opened: Opened,
    ids: Tensor,
    sample: Sample,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scratch: Path | None = None,  # noqa: ARG001 - as gradients; the graph cannot lie in a file
    progress: Progress | None = None,
) -> Gradients:
    """Mean gradients, and in place of their squares the curvature along every weight, over the sample's sequences.

    Raises NumericalFailure where the loss, a gradient or a curvature is not finite.
    """
    rows, draw = ids[: sample.sequences, : sample.length], torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # others have one derivative
        model = decoder(opened, device, dtype)
        named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        means = {name: torch.zeros_like(one, requires_grad=False) for name, one in named.items()}
        curved = {name: torch.zeros_like(one, requires_grad=False) for name, one in named.items()}
        total = 0.0
        for number, row in enumerate(rows):
            logits = model(input_ids=row[None].to(device), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[1:].to(device))
            check_finite("the loss", loss, number)
            total += float(loss.detach())
            slopes = torch.autograd.grad(loss, list(named.values()), create_graph=True)
            for name, slope in zip(named, slopes, strict=True):
                check_finite(f"the gradient of {name}", slope, number)
                means[name] += slope.detach() / len(rows)
            for _ in range(sample.probes):
                for name, found in zip(named, probe(slopes, list(named.values()), draw), strict=True):
                    check_finite(f"the curvature of {name}", found, number)
                    curved[name] += found / (sample.probes * len(rows))
            if progress is not None:
                progress("curvature", (number + 1) / len(rows))
    return Gradients(
        sample,
        total / len(rows),
        {name: tensor.cpu() for name, tensor in means.items()},
        {name: tensor.cpu() for name, tensor in curved.items()},
    )


def probe(slopes: Sequence[Tensor], weights: Sequence[Tensor], draw: torch.Generator) -> list[Tensor]:
    """One estimate of the Hessian's diagonal, z (H z), for signs z of all weights at once."""
    signs = [(torch.randint(0, 2, one.shape, generator=draw) * 2 - 1).to(one) for one in weights]
    products = torch.autograd.grad(slopes, weights, signs, retain_graph=True)
    return [sign * product for sign, product in zip(signs, products, strict=True)]
