"""The architecture's own class, wherever its config can say the checkpoint: a plain folder for transformers and vLLM.

A Microtome checkpoint whose blocks are alike comes back to its source's class, or a container of it; a quantised one is
written as numbers, and the decoder of a multimodal wrapper alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from microtome import arch, raised, surgery
from microtome.arch import NotStock
from microtome.layout import Part
from microtome.planner import Opened
from microtome.raised import Raised
from microtome.surgery import Tensors
from microtome.verdict import Verdict

if TYPE_CHECKING:
    from microtome.export import Request

SUMMARY = "the architecture's own class in transformers, where its config can say the checkpoint"
EXTRA = ""
SUFFIX = ""
QUANTIZE: tuple[str, ...] = ()


def unfit(opened: Opened) -> str | None:
    """Why no stock config says it; None where one does."""
    try:
        made(opened)
    except NotStock as reason:
        return (
            f"{raised.unsaid(reason)}. Load it as it is, with trust_remote_code or after `import microtome`; "
            "--to gguf says more."
        )
    return None


def made(opened: Opened) -> Raised:
    """What is written; raises NotStock where no config can say it."""
    if opened.fields["model_type"] != arch.OWN:
        return Raised(dict(opened.fields), opened.config, lambda part, _dtype: opened.read(part))
    source = opened.config.source_model_type
    if source not in arch.known():
        raise NotStock("it does not say which architecture it came from")
    config = raised.one_stream(opened)
    fields = raised.kept(opened, str(source))
    implied = getattr(arch.find(str(source)), "embedding_scale", None)
    offset = arch.lower({"model_type": source}).norm_offset
    standard = surgery.standard_config(config, offset, None if implied is None else implied(config.hidden_size))

    def tensors(part: Part, dtype: torch.dtype) -> Tensors:
        return raised.standardised(opened, part, config, standard, dtype)

    return Raised(arch.raise_config(fields, standard), standard, tensors)


def write(opened: Opened, folder: Path, request: "Request") -> list[Path]:
    """The folder."""
    found = made(opened)
    request.say(f"written for {found.fields['architectures'][0]}.")
    return raised.write(opened, found, folder, request.dtype)


def verify(opened: Opened, files: Sequence[Path], request: "Request") -> Verdict:  # noqa: ARG001 - of every format
    """transformers' class on the folder."""
    return raised.verify(opened, made(opened), files[0].parent)
