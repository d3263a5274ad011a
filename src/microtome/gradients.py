"""Gradients of the language-model loss: what methods of the Taylor and Fisher kind know of a model.

The canonical decoder is built whole, in fp32, and run on a few calibration sequences one at a time: L_i is the mean
next-token cross-entropy of sequence i, g_i its gradient. Kept are, for every weight of every block, the mean of g_i and
the mean of g_i^2 (the diagonal of the empirical Fisher information over sequences).

In memory are the weights three times over, and one sequence's activations.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome import layout
from microtome.calibrate import Progress, attention_of
from microtome.errors import NumericalFailure
from microtome.modeling_microtome import MicrotomeForCausalLM, MicrotomeRotary
from microtome.planner import Opened
from microtome.stats import Sample


@dataclass(frozen=True, eq=False)
class Gradients:
    """Mean gradients and mean squared gradients over sequences, by canonical name, on the CPU."""

    sample: Sample
    loss: float  # mean over the sequences, nats per token
    means: Mapping[str, Tensor]
    mean_squares: Mapping[str, Tensor]

    def first(self, block: int) -> dict[str, Tensor]:
        """The mean gradient of every weight of a block, under its name without the block's prefix."""
        return of_block(self.means, block)

    def squares(self, block: int) -> dict[str, Tensor]:
        """The mean over sequences of the squared gradient of every weight of a block."""
        return of_block(self.mean_squares, block)


def of_block(tensors: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """The tensors of one block, without its prefix."""
    head = layout.prefix(block)
    return {name.removeprefix(head): tensor for name, tensor in tensors.items() if name.startswith(head)}


def gradients(
    opened: Opened,
    ids: Tensor,
    sample: Sample,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Gradients:
    """Run the sample's sequences through the whole decoder and back.

    Raises NumericalFailure where the loss or a gradient is not finite.
    """
    rows = ids[: sample.sequences, : sample.length]
    with torch.inference_mode(False), torch.enable_grad():
        model = decoder(opened, device, dtype)
        named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        means = {name: torch.zeros_like(one, requires_grad=False) for name, one in named.items()}
        mean_squares = {name: torch.zeros_like(one, requires_grad=False) for name, one in named.items()}
        total = 0.0
        for number, row in enumerate(rows):
            loss = next_token_loss(model, row[None].to(device))
            check_finite("the loss", loss, number)
            total += float(loss.detach())
            for name, found in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                check_finite(f"the gradient of {name}", found, number)
                means[name] += found / len(rows)
                mean_squares[name] += found.square() / len(rows)
            if progress is not None:
                progress("gradients", (number + 1) / len(rows))
    return Gradients(
        sample,
        total / len(rows),
        {name: tensor.cpu() for name, tensor in means.items()},
        {name: tensor.cpu() for name, tensor in mean_squares.items()},
    )


def decoder(opened: Opened, device: torch.device, dtype: torch.dtype) -> MicrotomeForCausalLM:
    """The canonical decoder with the weights of a checkpoint; those of the blocks want gradients."""
    config = copy(opened.config)
    # How attention is computed is an attribute that transformers keeps off the config's own fields.
    setattr(config, "_attn_implementation", attention_of(config))  # noqa: B010
    with torch.device("meta"):
        model = MicrotomeForCausalLM(config).eval()
    for part in layout.parts(config):
        tensors = opened.read(part)
        floating = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }
        model.load_state_dict(floating, strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, MicrotomeRotary):  # frequencies are stored nowhere
            module.to_empty(device=device)
            turns, _ = module.frequencies()
            module.inv_freq.copy_(turns)
            module.original_inv_freq.copy_(turns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers."))
    return model


def next_token_loss(model: MicrotomeForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first, from those before it; nats."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def check_finite(what: str, value: Tensor, number: int) -> None:
    """Say what stopped being a number, and on which sequence."""
    if not torch.isfinite(value.detach()).all():
        raise NumericalFailure(
            f"{what} is not finite on calibration sequence {number + 1}: the model overflows there, or its text holds "
            "what it cannot read. Check the weights with `microtome evaluate`, or give other --data."
        )
