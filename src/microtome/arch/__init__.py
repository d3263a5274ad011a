"""Architectures: one table per `model_type`, looked up in this folder.

A table is a module with plain functions and data, and no forward code:

    MODEL_TYPES            the `model_type`s of config.json that it reads (the file is named after the first)
    HANDLED                config fields that `lower` reads
    lower(config)          transformers' config -> fields of the canonical config
    raise_fields(config)   canonical config -> fields of this architecture's own config
    names(config)          canonical tensor name -> where it is stored
    CONTAINERS             other tables whose config can hold the same result when this one's cannot
    tiny()                 small configs for the tests, one per feature
    embedding_scale(width) only where the config implies by its width what embeddings are multiplied by

Nothing else is edited to add one. `lower` fails closed: a config field that neither `HANDLED` nor `IGNORED` names must
have its default, or opening fails with the list. `raise_fields` needs no rules about what a config can say: a result is
stock exactly if lowering the raised config gives the canonical config back.
"""

import copy
import importlib
import pkgutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from microtome.errors import BadCheckpoint, UnsupportedModel
from microtome.layout import EMBEDDING, Part, parts, shapes
from microtome.modeling_microtome import MicrotomeConfig

IGNORED = frozenset({
    *("architectures", "model_type", "transformers_version", "_name_or_path", "auto_map", "dtype", "torch_dtype"),
    *("use_cache", "initializer_range", "pretraining_tp", "attention_dropout", "tokenizer_class", "unsloth_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
    *("return_dict", "output_hidden_states", "output_attentions", "is_decoder", "is_encoder_decoder", "prefix"),
    "task_specific_params",
})  # fmt: skip
ROTARY = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
OWN = "microtome"  # the model_type of our own checkpoints
COPIED = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
PER_BLOCK = frozenset({"rotary"})  # what some architecture's config says block by block
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attention.bias", ".masked_bias")  # stored by old checkpoints


@dataclass(frozen=True)
class Stored:
    """Where a canonical tensor lies: in which stored tensor, in which of its rows (None: all), transposed or not."""

    name: str
    rows: tuple[int, ...] | None = None
    transposed: bool = False


class Architecture(Protocol):
    """The module of one table; see the head of this file."""

    MODEL_TYPES: tuple[str, ...]
    HANDLED: frozenset[str]
    CONTAINERS: tuple[str, ...]

    def lower(self, config: Any) -> dict[str, Any]: ...  # noqa: D102
    def raise_fields(self, config: MicrotomeConfig) -> dict[str, Any]: ...  # noqa: D102
    def names(self, config: MicrotomeConfig) -> dict[str, Stored]: ...  # noqa: D102
    def tiny(self) -> dict[str, Any]: ...  # noqa: D102


def known() -> dict[str, str]:
    """`model_type` to module name, for every table in this folder."""
    found: dict[str, str] = {}
    for module in sorted(one.name for one in pkgutil.iter_modules(__path__) if not one.name.startswith("_")):
        table = importlib.import_module(f"{__name__}.{module}")
        found |= dict.fromkeys(table.MODEL_TYPES, module)
    return found


def find(model_type: str) -> Architecture:
    """The table that reads a `model_type`."""
    tables = known()
    if model_type == OWN:
        return importlib.import_module(f"{__name__}._own")  # type: ignore[return-value]
    if model_type not in tables:
        raise UnsupportedModel(
            f"architecture {model_type!r} is not supported. Supported: {', '.join(sorted(tables))}. "
            "CONTRIBUTING.md shows how to add one."
        )
    return importlib.import_module(f"{__name__}.{tables[model_type]}")  # type: ignore[return-value]


def stock_config(fields: Mapping[str, Any]) -> Any:
    """transformers' config object of a config.json."""
    from transformers import AutoConfig

    kept = {key: value for key, value in fields.items() if key != "auto_map"}
    with refusal(f"transformers refuses this config of {fields.get('model_type')!r}"):
        return AutoConfig.for_model(**copy.deepcopy(kept))  # it rewrites nested fields in place


@contextmanager
def refusal(fact: str) -> Generator[None]:
    """What a config class refuses, as UnsupportedModel in one line; transformers raises many kinds."""
    try:
        yield
    except Exception as error:
        line = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise UnsupportedModel(f"{fact}: {line}") from error


def lower(fields: Mapping[str, Any]) -> MicrotomeConfig:
    """The canonical config of a config.json.

    Raises UnsupportedModel where the architecture is unknown, or where a field that no table reads is not at its
    default (false, where transformers does not know it either).
    """
    table = find(str(fields.get("model_type")))
    if fields.get("model_type") == OWN:
        with refusal("Microtome's decoder refuses this config"):
            own: dict[str, Any] = {name: fields[name] for name in sorted(table.HANDLED) if name in fields}
            return MicrotomeConfig(**own)
    config = stock_config(fields)
    defaults = type(config)()
    allowed = table.HANDLED | IGNORED | ROTARY
    unknown = [
        f"{key}={value!r}"
        for key, value in sorted(fields.items())
        if key not in allowed and value is not None and value != getattr(defaults, key, False)
    ]
    rotary = getattr(config, "rope_parameters", None) or {}
    places = [rotary, *(one for one in rotary.values() if isinstance(one, dict)), fields]  # one for each kind of block
    part = next((one["partial_rotary_factor"] for one in places if one.get("partial_rotary_factor")), 1.0)
    if part != 1.0 and "partial_rotary_factor" not in table.HANDLED:  # these classes of transformers turn whole heads
        unknown.append(f"partial_rotary_factor={part!r}")
    if unknown:
        raise UnsupportedModel(
            f"config.json of this {fields['model_type']} has features Microtome does not know: {', '.join(unknown)}."
        )
    lowered = table.lower(config)
    with refusal(f"Microtome's decoder refuses this config of {fields['model_type']!r}"):
        return MicrotomeConfig(source_model_type=str(fields["model_type"]), **lowered)


def decoder_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the decoder: `fields`, or of a multimodal wrapper's the part that is its text decoder.

    A wrapper's `text_config` may be sparse: what its class fills in is in the result. Raises UnsupportedModel where the
    decoder inside is not one that runs on text alone.
    """
    outer = str(fields.get("model_type"))
    if not isinstance(fields.get("text_config"), dict) or outer in known():
        return dict(fields)
    config = stock_config(fields)
    text = getattr(config, "text_config", None)
    inner = str(getattr(text, "model_type", None))
    if text is None or inner not in known():
        raise UnsupportedModel(
            f"the text decoder inside this {outer} is a {inner!r}, which is not supported. "
            f"Supported: {', '.join(sorted(known()))}. CONTRIBUTING.md shows how to add one."
        )
    found: dict[str, Any] = text.to_diff_dict()  # as a config.json says it
    found.pop("num_image_tokens", None)  # PaliGemma's class notes there what its tower makes
    rotary = getattr(text, "rope_parameters", None) or {}
    if any("mrope_section" in one for one in (rotary, *rotary.values()) if isinstance(one, dict)):
        raise UnsupportedModel(
            f"the text decoder inside this {outer} turns its heads by positions in time, height and width "
            "(mrope_section), which Microtome's decoder cannot. Give a model whose positions are numbers."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"the text decoder inside this {outer} reads an encoder. Give a decoder.")
    tied = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)  # the wrapper holds the head
    return found | {"model_type": inner, "architectures": [causal_class(inner)], "tie_word_embeddings": tied}


def causal_class(model_type: str) -> str:
    """The name of transformers' class with a head for a `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def since(release: str, config: Any) -> None:
    """Refuse a model whose class computes something else in releases of transformers before the one that was tried."""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(release):
        raise UnsupportedModel(
            f"{config.model_type} was tried with transformers {release} and later, and this is "
            f"{transformers.__version__}: pip install -U transformers."
        )


def copied(config: Any, *names: str) -> dict[str, Any]:
    """Fields that mean the same in both configs, for a table's `lower`."""
    return {name: getattr(config, name) for name in (*COPIED, *TOKENS, *names)}


def restated(config: MicrotomeConfig, *names: str) -> dict[str, Any]:
    """Fields that mean the same in both configs, for a table's `raise_fields`."""
    return {name: getattr(config, name) for name in (*COPIED, *names)}


def score_scale(config: MicrotomeConfig) -> float:
    """What scores are multiplied by, for a table whose config always says it."""
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    return width**-0.5 if config.attention_scale is None else config.attention_scale


class NotStock(Exception):
    """Why no config of the architecture can say a result."""


def raise_config(fields: Mapping[str, Any], config: MicrotomeConfig) -> dict[str, Any]:
    """The config.json, in the architecture's own words or a container's, that says a canonical config.

    `fields` is the source's config.json: what is not about sizes or features is kept.

    Raises NotStock with the first reason where no config can say it.
    """
    if differ := sorted(set(config.per_layer_attributes or ()) - PER_BLOCK):
        raise NotStock(f"sizes differ between blocks ({', '.join(differ)})")
    own = str(fields["model_type"])
    if own == OWN:
        raise NotStock("it was made from a Microtome checkpoint")
    unsaid, refused = list[str](), list[str]()
    for model_type in (own, *find(own).CONTAINERS):
        table = find(model_type)
        kept = {key: value for key, value in fields.items() if model_type == own or key not in find(own).HANDLED}
        raised = {**kept, **table.raise_fields(config), "model_type": model_type}
        if model_type != own:
            raised["architectures"] = [
                type(stock_config({"model_type": model_type})).__name__.replace("Config", "ForCausalLM")
            ]
        try:
            again = lower(raised)
        except UnsupportedModel as error:
            refused.append(f"{model_type}: {' '.join(str(error).split())}")
            continue
        wanted, said = canonical_fields(config), canonical_fields(again)
        lost = [f"{name}={wanted[name]!r}" for name in wanted if wanted[name] != said[name]]
        if not lost:
            return raised
        unsaid.append(f"{model_type} cannot say {', '.join(lost)}")
    raise NotStock("; ".join([*unsaid, *refused]))


def canonical_fields(config: MicrotomeConfig) -> dict[str, Any]:
    """The fields that decide what the decoder computes, as plain data."""
    aside = {"source_model_type", "initializer_range", "use_cache", "attention_dropout", *TOKENS}
    said = config.to_dict()  # attributes that differ between blocks cannot be read off the config
    fields = {name: said.get(name) for name in sorted(MicrotomeConfig.__annotations__) if name not in aside}
    blocks = {int(block): dict(values) for block, values in (said.get("per_layer_config") or {}).items() if values}
    return fields | {"per_layer_config": blocks}


# --- tensors --------------------------------------------------------------------------------------------------------


def stored_names(table: Architecture, config: MicrotomeConfig, part: Part) -> dict[str, Stored]:
    """Canonical name to storage for the tensors of one part."""
    return located(table, table.names(config), config, part)


def located(table: Architecture, names: Mapping[str, Stored], config: MicrotomeConfig, part: Part) -> dict[str, Stored]:
    """The same from the names of all parts, which take longer to list than to look up."""
    missing = [name for name in shapes(config, part) if name not in names]
    if missing:
        raise UnsupportedModel(f"the {table.MODEL_TYPES[0]} table has no place for {', '.join(missing)}.")
    return {name: names[name] for name in shapes(config, part)}


def lower_tensors(read: Mapping[str, Tensor], wanted: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Stored tensors to canonical ones."""
    out: dict[str, Tensor] = {}
    for name, place in wanted.items():
        tensor = read[place.name]
        tensor = tensor.T if place.transposed else tensor
        out[name] = tensor if place.rows is None else tensor[list(place.rows)]
    return out


def raise_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Canonical tensors of one part to stored ones; packed tensors are put together again."""
    out: dict[str, Tensor] = {}
    packed: dict[str, list[tuple[tuple[int, ...], Tensor, bool]]] = {}
    for name, place in wanted.items():
        if place.rows is None:
            out[place.name] = tensors[name].T.contiguous() if place.transposed else tensors[name]
        else:
            packed.setdefault(place.name, []).append((place.rows, tensors[name], place.transposed))
    for name, pieces in packed.items():
        rows = torch.tensor([row for piece in pieces for row in piece[0]])
        whole = torch.cat([piece[1] for piece in pieces])[torch.argsort(rows)]
        out[name] = whole.T.contiguous() if pieces[0][2] else whole
    return out


def spelled(stored: Iterable[str], config: MicrotomeConfig, table: Architecture) -> dict[str, str]:
    """The table's names that a checkpoint spells otherwise: saved from the base model, all lack their first word."""
    have, names = set(stored), table.names(config)
    first = names[EMBEDDING].name.partition(".")[0] + "."
    if any(name.startswith(first) for name in have):
        return {}
    short = {place.name: place.name.removeprefix(first) for place in names.values()}
    return {name: other for name, other in short.items() if name != other and other in have}


def check_names(stored: Iterable[str], config: MicrotomeConfig, table: Architecture) -> None:
    """Refuse a checkpoint with a tensor that the table does not know, or without one that it needs."""
    stored = list(stored)
    full = {other: name for name, other in spelled(stored, config, table).items()}
    have = {full.get(name, name) for name in stored if not name.endswith(BUFFERS)}
    names = table.names(config)
    need = {place.name for part in parts(config) for place in located(table, names, config, part).values()}
    if missing := sorted(need - have):
        raise BadCheckpoint(
            f"the checkpoint lacks {len(missing)} tensors of a {config.source_model_type}: {listed(missing)}."
        )
    tied = {place.name for name, place in names.items() if name == "lm_head.weight" and config.tie_word_embeddings}
    if extra := sorted(have - need - tied):
        raise UnsupportedModel(
            f"the checkpoint has {len(extra)} tensors that Microtome does not know: {listed(extra)}."
        )


def listed(names: list[str], most: int = 4) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
