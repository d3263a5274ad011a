"""The Llama class (Mistral where its config refuses the width): what every engine runs, for decoders of other names.

Constants go into weights, biases that Llama wants and the decoder has not are zeros: Qwen2, Phi-3, Granite, Mistral
and SmolLM3 without windows or unturned heads compute the same as a Llama.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from microtome import arch, layout, plain, raised, surgery
from microtome.arch import NotStock
from microtome.layout import Part
from microtome.modeling_microtome import MicrotomeConfig
from microtome.planner import Opened
from microtome.raised import Raised
from microtome.surgery import Tensors
from microtome.verdict import Verdict

if TYPE_CHECKING:
    from microtome.export import Request

SUMMARY = "the Llama or Mistral class in transformers, for engines that know little else"
EXTRA = ""
SUFFIX = ""
QUANTIZE: tuple[str, ...] = ()


def unfit(opened: Opened) -> str | None:
    """Why neither Llama nor Mistral says it; None where one does."""
    try:
        made(opened)
    except NotStock as reason:
        return f"{raised.unsaid(reason)}. --to gguf says more than Llama does."
    return None


def container(config: MicrotomeConfig) -> MicrotomeConfig:
    """The config without constants, biases on all or none of a half's linears, and no window that is never reached."""
    bare = plain.plain_config(surgery.standard_config(config))
    changes: dict[str, Any] = {
        "attention_out_bias": bare.attention_bias or bare.attention_out_bias,
        "mlp_out_bias": bare.mlp_bias or bare.mlp_out_bias,
    }
    changes |= {"attention_bias": changes["attention_out_bias"], "mlp_bias": changes["mlp_out_bias"]}
    if bare.sliding_window is not None:
        kinds = set(bare.layer_types or [])
        if bare.sliding_window >= bare.max_position_embeddings or kinds == {"full_attention"}:
            changes |= {"sliding_window": None, "layer_types": None}
    if bare.hidden_act == "swish":
        changes["hidden_act"] = "silu"
    return surgery.rebuilt(bare, **changes)


def made(opened: Opened) -> Raised:
    """What is written; raises NotStock where no config can say it."""
    config = raised.one_stream(opened)
    if {"attention_bias", "attention_out_bias", "mlp_bias", "mlp_out_bias"} & set(config.per_layer_attributes or ()):
        raise NotStock("only some of its blocks have biases")
    if not config.final_norm:
        raise NotStock("it has no norm before its head")
    final, standard = container(config), surgery.standard_config(config)

    def tensors(part: Part, dtype: torch.dtype) -> Tensors:
        out = plain.plained(raised.standardised(opened, part, config, standard, dtype), part, standard)
        like = next(iter(out.values()))
        wanted = layout.shapes(final, part).items()
        biases = {name: torch.zeros(shape, dtype=like.dtype) for name, shape in wanted if name not in out}
        return out | biases

    return Raised(arch.raise_config(raised.kept(opened, "llama"), final), final, tensors)


def write(opened: Opened, folder: Path, request: "Request") -> list[Path]:
    """The folder."""
    found = made(opened)
    request.say(f"written for {found.fields['architectures'][0]}.")
    if found.config.hidden_act != "silu":
        request.say(f"its activation is {found.config.hidden_act}: transformers runs that in a Llama, vLLM does not.")
    return raised.write(opened, found, folder, request.dtype)


def verify(opened: Opened, files: Sequence[Path], request: "Request") -> Verdict:  # noqa: ARG001 - of every format
    """transformers' class on the folder."""
    return raised.verify(opened, made(opened), files[0].parent)
