"""Which numbers of a model are trained, and what its stored weights are afterwards: low-rank adapters, or all of them.

`lora` puts an adapter of peft beside every linear of the blocks; the weights that are written are the sums. `full`
trains all that is not an embedding or the head. A matrix that is sparse keeps its zeros: of an adapter only what falls
on the other places counts, in training as in the result.

Shapes: O outputs and I inputs of a linear; a Conv1D of transformers stores its weight transposed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from microtome.errors import BadInput, UnknownName, UnsupportedModel
from microtome.loading import linear_classes

SPARSE = 0.1  # of a matrix: with a larger share of exact zeros it keeps them
ADAPTER = "heal"  # peft's name for one set of adapters
MISSING = "LoRA needs peft: pip install 'microtome[heal]', or train all weights by --train full."


@dataclass(frozen=True, eq=False)
class Trained:
    """What is trained of a model, by name, and how the model's own weights come of it."""

    parameters: dict[str, nn.Parameter]
    merge: Callable[[], dict[str, Tensor]]  # every weight that may have changed, by its name in the model
    masks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # True where a sparse matrix may change

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(one.numel() for one in self.parameters.values())

    @torch.no_grad()
    def held(self) -> dict[str, Tensor]:
        """A copy of what is trained, on the CPU."""
        return {name: one.detach().to("cpu", copy=True) for name, one in self.parameters.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set what is trained."""
        for name, one in self.parameters.items():
            one.copy_(values[name])


def decoder_of(model: Any) -> Any:
    """The text decoder of a model, without its head."""
    return model.get_decoder()


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The name of a text decoder's list of blocks within the model, and the list.

    Raises UnsupportedModel where there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    decoder = decoder_of(model)
    inside = {id(one) for one in decoder.modules()}
    for name, module in model.named_modules():
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UnsupportedModel(f"a {type(model).__name__} has no list of {count} blocks: it cannot be healed.")


def linears_of(model: Any, targets: tuple[str, ...] = ()) -> dict[str, Any]:
    """The linears of the blocks by name; `targets` are last parts of names, none for all.

    Raises UnknownName for a target that no linear has.
    """
    prefix, blocks = blocks_of(model)
    found = {
        f"{prefix}.{name}": module for name, module in blocks.named_modules() if isinstance(module, linear_classes())
    }
    last = {name.rsplit(".", 1)[-1] for name in found}
    for target in targets:
        if target not in last:
            raise UnknownName("linear of the blocks", target, last)
    return {name: one for name, one in found.items() if not targets or name.rsplit(".", 1)[-1] in targets}


def masks_of(linears: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where sparse weights may change, by the name of the weight."""
    found: dict[str, Tensor] = {}
    for name, module in linears.items():
        mask = module.weight.detach() != 0
        if mask.numel() - int(mask.sum()) > SPARSE * mask.numel():
            found[f"{name}.weight"] = mask
    return found


def full(model: Any, *, embeddings: bool, keep_zeros: bool) -> Trained:
    """Train all weights of the decoder, embeddings and head only if asked for."""
    around = model.config.get_text_config() is not model.config
    scope = {id(one) for one in decoder_of(model).parameters()} if around else None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    spared = set() if embeddings else {id(one) for end in ends if end is not None for one in end.parameters()}
    spared |= positions(model) if not embeddings else set()
    chosen: dict[str, nn.Parameter] = {}
    for name, one in model.named_parameters():
        wanted = one.is_floating_point() and id(one) not in spared and (scope is None or id(one) in scope)
        one.requires_grad_(wanted)
        if wanted:
            chosen[name] = one
    linears = {name: one for name, one in linears_of(model).items() if f"{name}.weight" in chosen}  # not those in codes
    masks = masks_of(linears) if keep_zeros else {}
    for name, mask in masks.items():
        chosen[name].register_hook(lambda found, mask=mask: found * mask)
    return Trained(chosen, lambda: {name: one.detach() for name, one in chosen.items()}, masks)


def positions(model: Any) -> set[int]:
    """Learned positions, which are embeddings too."""
    tables = (one for one in decoder_of(model).modules() if isinstance(one, nn.Embedding))
    return {id(one) for table in tables for one in table.parameters()}


def lora(model: Any, *, rank: int, alpha: float, targets: tuple[str, ...], keep_zeros: bool, seed: int) -> Trained:
    """Put adapters beside the linears of the blocks; the model computes with them from now on.

    Raises BadInput where peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise BadInput(MISSING) from error
    linears = linears_of(model, targets)
    masks = masks_of(linears) if keep_zeros else {}
    turned = [name for name, one in linears.items() if not isinstance(one, nn.Linear)]
    if turned and len(turned) < len(linears):
        raise UnsupportedModel(f"the blocks mix Linear and Conv1D ({turned[0]}): train all weights by --train full.")
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "fan_in_fan_out": bool(turned)}
    config = peft.LoraConfig(target_modules=list(linears), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    layers = {name: model.get_submodule(name) for name in linears}
    for name, layer in layers.items():
        if (mask := masks.get(f"{name}.weight")) is not None:
            layer.register_forward_hook(sparse(mask))
    chosen = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for one in chosen.values():
        one.data = one.data.to(torch.promote_types(one.dtype, torch.float32))  # also where the model is shorter

    @torch.no_grad()
    def merge() -> dict[str, Tensor]:
        found = {f"{name}.weight": layer.base_layer.weight + change(layer) for name, layer in layers.items()}
        return {name: one * masks[name] if name in masks else one for name, one in found.items()}

    return Trained(chosen, merge, masks)


def change(layer: Any) -> Tensor:
    """What an adapter adds to its weight, in the weight's own shape; with a graph."""
    added_OI = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight * layer.scaling[ADAPTER]
    return added_OI.T if layer.fan_in_fan_out else added_OI


def sparse(mask: Tensor) -> Callable[..., Tensor]:
    """A hook by which an adapter changes only what is not zero."""

    def computed(layer: Any, read: tuple[Tensor, ...], _: Tensor) -> Tensor:
        base = layer.base_layer
        weight = base.weight + change(layer) * mask
        return linear(read[0], weight.T if layer.fan_in_fan_out else weight, base.bias)

    return computed
