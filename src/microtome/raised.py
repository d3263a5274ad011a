"""A checkpoint written again for one of transformers' own classes, and held against itself there."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import arch, layout, plain, surgery
from microtome.arch import NotStock
from microtome.checkpoint import Writer, copy_companions
from microtome.errors import NumericalFailure
from microtome.layout import Part
from microtome.loading import auto_class, load
from microtome.modeling_microtome import MicrotomeConfig
from microtome.planner import Opened
from microtome.surgery import Tensors
from microtome.verdict import Verdict, held, informed, logits, probe, reference


@dataclass(frozen=True, eq=False)
class Raised:
    """What is written: the config.json, the canonical config that it says, and the tensors of every part of that."""

    fields: Mapping[str, Any]
    config: MicrotomeConfig
    tensors: Callable[[Part, torch.dtype], Tensors]

    @property
    def table(self) -> arch.Architecture:
        """The table of the class."""
        return arch.find(str(self.fields["model_type"]))

    def stored(self, part: Part, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a part under the names of the class, in a type."""
        made = self.tensors(part, dtype)
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in made.items()}
        for name, tensor in cast.items():
            if not torch.isfinite(tensor).all():
                raise NumericalFailure(f"{name} is not finite in {str(dtype)[6:]}: choose --dtype float32.")
        return arch.raise_tensors(cast, arch.stored_names(self.table, self.config, part))


def kept(opened: Opened, model_type: str) -> dict[str, Any]:
    """The source's config.json as far as it is about tokens and training, for a class of another name."""
    names = (*arch.TOKENS, "initializer_range", "attention_dropout")
    fields = {name: opened.fields[name] for name in names if opened.fields.get(name) is not None}
    return {**fields, "model_type": model_type, "architectures": [arch.causal_class(model_type)]}


def one_stream(opened: Opened) -> MicrotomeConfig:
    """The config, its blocks alike where they are; raises NotStock where its stream has several widths or bases."""
    config = plain.shared(opened.config)
    if not layout.even(config) or not layout.is_shared(config):
        raise NotStock("its stream has several widths or bases")
    return config


def standardised(
    opened: Opened, part: Part, config: MicrotomeConfig, standard: MicrotomeConfig, dtype: torch.dtype
) -> Tensors:
    """A part of the checkpoint in the form of transformers' classes, by one type wider than it is stored in."""
    working = torch.float64 if opened.dtype == torch.float32 else torch.float32
    return surgery.standardised(opened.read(part, working), part, config, standard, dtype)


def write(opened: Opened, raised: Raised, folder: Path, dtype: torch.dtype | None) -> list[Path]:
    """The whole folder: weights, config, tokenizer and licence."""
    stored = dtype or opened.dtype
    with Writer(folder, overwrite=True) as writer:
        for part in layout.parts(raised.config):
            for name, tensor in raised.stored(part, stored).items():
                writer.add(name, tensor)
        fields = {name: value for name, value in raised.fields.items() if name not in {"torch_dtype", "auto_map"}}
        writer.write_json("config.json", {**fields, "dtype": str(stored).removeprefix("torch.")})
        copy_companions(opened.source, writer)
    return [folder / name for name in writer.files]


@torch.inference_mode()
def verify(opened: Opened, raised: Raised, folder: Path) -> Verdict:
    """transformers' class on the files; where these are rounded, on the same weights in fp32, and how far they are."""
    name = f"transformers {version('transformers')} ({raised.fields['architectures'][0]})"
    ids = probe(opened.config)
    wanted = logits(reference(opened), ids)
    near = logits(load(folder, device=torch.device("cpu"), dtype=torch.float32), ids)
    found = held(name, wanted, near)
    stored = str(stored_dtype(folder)).removeprefix("torch.")
    if found.passed or stored == "float32":
        return found
    whole: dict[str, Tensor] = {}
    for part in layout.parts(raised.config):
        whole |= raised.stored(part, torch.float32)
    exact = held(name, wanted, logits(twin(raised, whole), ids))
    return informed(exact, stored, wanted, near)


def stored_dtype(folder: Path) -> str:
    """The type that a written config.json names."""
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"])


def twin(raised: Raised, tensors: Mapping[str, Tensor]) -> Any:
    """transformers' model of the same weights before they are rounded."""
    config = arch.stock_config({**raised.fields, "dtype": "float32"})
    with torch.device("meta"):
        made = type(auto_class(config).from_config(config))
    return made.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=torch.float32).eval()


def unsaid(reason: NotStock, most: int = 400) -> str:
    """Why no config says it, not longer than a line or two."""
    text = str(reason).replace(".;", ";").rstrip(".")
    return text if len(text) <= most else f"{text[:most].rsplit(',', 1)[0]} and more"
