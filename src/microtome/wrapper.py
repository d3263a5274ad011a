"""A decoder inside a multimodal wrapper: how its tensors are spelled there, and what besides it writes its stream.

A wrapper is a checkpoint whose config has a `text_config`: a text decoder, towers for images or sound, and a projector
that puts their features among the embeddings, behind whatever those are multiplied by. The decoder is opened as if it
stood alone. What is cut goes back into the wrapper where its projector is known, else it is written alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import arch, surgery
from microtome.edit import Rewrite
from microtome.errors import BadCheckpoint, UnsupportedModel
from microtome.layout import EMBEDDING
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Axis, Role, Space


@dataclass(frozen=True)
class Projector:
    """What of a wrapper writes the stream, and along which dimension; names are those behind a leading `model.`.

    narrow: whether the wrapper's class builds it for any width of the stream. LLaVA's is as wide inside as the stream,
    so a narrower decoder would need fewer of its neurons.
    """

    writers: Mapping[str, int]
    narrow: bool


_LLAVA = {"multi_modal_projector.linear_2.weight": 0, "multi_modal_projector.linear_2.bias": 0}
_CONNECTOR = {"connector.modality_projection.proj.weight": 0}
PROJECTORS = {
    "gemma3": Projector({"multi_modal_projector.mm_input_projection_weight": 1}, narrow=True),
    "idefics3": Projector(_CONNECTOR, narrow=True),
    "internvl": Projector(_LLAVA, narrow=False),
    "llava": Projector(_LLAVA, narrow=False),
    "llava_next": Projector({**_LLAVA, "image_newline": 0}, narrow=False),
    "mistral3": Projector(_LLAVA, narrow=False),
    "smolvlm": Projector(_CONNECTOR, narrow=True),
}


@dataclass(frozen=True, eq=False)
class Wrapper:
    """The checkpoint around a decoder: its config.json, the decoder's names as it spells them, and all other names."""

    fields: Mapping[str, Any]
    spelling: Mapping[str, str]
    carried: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """What the wrapper calls itself."""
        return str(self.fields["model_type"])

    def writers(self) -> dict[str, int]:
        """Stored names of what writes the stream beside the decoder, and the dimension along which it lies there."""
        projector = PROJECTORS.get(self.model_type)
        known = {} if projector is None else projector.writers
        return {name: known[short] for name in self.carried if (short := name.removeprefix("model.")) in known}


def wrapped(
    fields: Mapping[str, Any], stored: Sequence[str], table: arch.Architecture, config: MicrotomeConfig
) -> Wrapper:
    """Find the decoder among the names that a checkpoint stores.

    Its embedding tells where: `language_model.model.` and `model.language_model.` are two spellings of one model.
    Raises BadCheckpoint where no name ends like the embedding's, and UnsupportedModel where several do.
    """
    names = sorted({place.name for place in table.names(config).values()})
    embedding = table.names(config)[EMBEDDING].name
    base = embedding.partition(".")[0] + "."
    short = embedding.removeprefix(base)
    found = [name.removesuffix(short) for name in stored if name.endswith(f".{short}")]
    if not stored:
        found = [base]
    if not found:
        raise BadCheckpoint(
            f"the checkpoint of this {fields['model_type']} has no tensor named like its text decoder's {short}. "
            "Give a checkpoint as transformers saves it."
        )
    if len(found) > 1:
        raise UnsupportedModel(
            f"the checkpoint of this {fields['model_type']} has {len(found)} text decoders: {', '.join(found)}."
        )
    (head,) = found
    outer = head.removesuffix(base) if head.endswith(f".{base}") else ""
    spelling = {
        name: head + name.removeprefix(base) if name.startswith(base) else beside(name, outer, stored) for name in names
    }
    inside = set(spelling.values())
    carried = tuple(name for name in stored if name not in inside and not name.startswith(head))
    return Wrapper(fields, spelling, carried)


def beside(name: str, outer: str, stored: Iterable[str]) -> str:
    """How a wrapper spells what its decoder's class holds beside the decoder: the head."""
    return name if name in stored else outer + name


def decoders_own(wrapper: Wrapper, stored: Iterable[str]) -> list[str]:
    """The stored names of the decoder in the words of its own class; what the table does not know stays as it is."""
    back = {other: name for name, other in wrapper.spelling.items()}
    return [back.get(name, name) for name in stored if name not in wrapper.carried]


def differs(embedding: Tensor, head: Tensor) -> bool:
    """Whether a head that a config calls tied has values of its own; transformers then follows the checkpoint."""
    return embedding.shape != head.shape or not torch.equal(embedding, head)


def rewrap(
    wrapper: Wrapper, stock: Mapping[str, Any], final: MicrotomeConfig, size: int, *, turned: bool, centred: bool
) -> dict[str, Any] | str:
    """The config.json of the wrapper around a decoder that was cut, or why the decoder has to be written alone.

    `stock` is the decoder's own config.json and `final` says the same in canonical fields; `size` is the width of the
    stream before. turned: it has another basis than before. centred: means were taken out of what writes it.
    """
    projector = PROJECTORS.get(wrapper.model_type)
    if turned and projector is None:
        return f"how images enter the stream is known for {', '.join(sorted(PROJECTORS))}, not for {wrapper.model_type}"
    if turned and projector is not None:
        narrower = final.hidden_size != size
        if narrower and not projector.narrow:
            return (
                f"the projector of {wrapper.model_type} is as wide inside as the decoder, so its class cannot build it "
                f"for {final.hidden_size} of {size} numbers"
            )
        if centred:
            return "its norms became RMSNorms, for which the projector is not prepared"
        if wrapper.carried and not wrapper.writers():
            return f"the checkpoint has no {next(iter(projector.writers))}"
    inner = {name: value for name, value in stock.items() if name not in {"dtype", "torch_dtype", "architectures"}}
    whole = {**wrapper.fields, "text_config": inner, "tie_word_embeddings": final.tie_word_embeddings}
    again = arch.lower(arch.decoder_fields(whole))
    if arch.canonical_fields(again) != arch.canonical_fields(final):
        return f"no config of {wrapper.model_type} can say it"
    return whole


def reprojected(tensors: Mapping[str, Tensor], wrapper: Wrapper, first: Rewrite) -> dict[str, Tensor]:
    """What writes the stream beside the decoder, in the basis of its first junction, in working precision."""
    at = first.space.axes[0].at
    axes = tuple(Axis(name, dim, Role.WRITES, at) for name, dim in wrapper.writers().items())
    outside = Space(first.space.name, first.space.kind, None, first.space.size, first.space.symmetry, axes)
    return surgery.apply(tensors, [Rewrite(outside, first.shrink, first.grow, first.read)])
