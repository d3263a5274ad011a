"""A GGUF file written tensor by tensor: header first, from shapes alone, then one part of the decoder at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome import layout
from microtome.checkpoint import front_matter
from microtome.errors import NumericalFailure
from microtome.export.gguf.family import rotaries
from microtome.export.gguf.fold import Frame, Frequencies, converted, frequencies
from microtome.export.gguf.vocabulary import Vocabulary
from microtome.layout import EMBEDDING, HEAD, Part
from microtome.planner import Opened
from microtome.verdict import absent

PLAIN = ("F32", "F16", "BF16")
BLOCKS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # quantised here, in blocks of 32 numbers of a row
KQUANTS = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
HEADS = ("token_embd.weight", "output.weight")  # never below 8 bits
EXACT = ("position_embd.weight", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def library() -> Any:
    """The gguf package."""
    try:
        import gguf
    except ImportError as error:
        raise absent("the gguf package, which writes GGUF files,", "gguf") from error
    return gguf


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of one tensor in a file of a type: vectors in F32; rows that no block fits in F16."""
    if len(shape) == 1 or name in EXACT:
        return "F32"
    if kind in PLAIN:
        return kind
    kind = "Q8_0" if name in HEADS else kind
    return "F16" if shape[-1] % 32 else kind


def write(opened: Opened, frame: Frame, words: Vocabulary, path: Path, kind: str) -> None:
    """One file of a type."""
    gguf = library()
    turns = frequencies(frame)
    writer: Any = gguf.GGUFWriter(path, frame.family.name)
    try:
        describe(writer, opened, frame, turns, kind)
        spell(writer, words)
        for name, shape in shapes(opened, frame, turns):
            stored = gguf.GGMLQuantizationType[kind_of(name, shape, kind)]
            if stored.name in {"F32", "F16"}:
                size, dtype = torch.Size(shape).numel() * (4 if stored.name == "F32" else 2), f"float{stored.name[1:]}"
                writer.add_tensor_info(name, shape, numpy_type(dtype), size)
            else:
                rows = gguf.quants.quant_shape_to_byte_shape(shape, stored)
                size = torch.Size(rows).numel()
                writer.add_tensor_info(name, rows, numpy_type("uint8"), size, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors(opened, frame, turns):
            writer.write_tensor_data(encoded(name, tensor, kind_of(name, tuple(tensor.shape), kind)))
    finally:
        writer.close()


def numpy_type(name: str) -> Any:
    """A numpy type by name."""
    import numpy as np

    return np.dtype(name)


def encoded(name: str, tensor: Tensor, kind: str) -> Any:
    """The numbers of a tensor in a type, as numpy holds them."""
    gguf = library()
    if kind in DTYPES and not torch.isfinite(tensor.to(DTYPES[kind])).all():
        raise NumericalFailure(f"{name} is not finite in {kind}: store it with --dtype float32 or bfloat16.")
    numbers = tensor.to(torch.float32).contiguous().numpy()
    if kind == "F16":
        return numbers.astype("float16")
    return numbers if kind == "F32" else gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind])


# --- tensors --------------------------------------------------------------------------------------------------------


def tensors(opened: Opened, frame: Frame, turns: Frequencies) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file in fp32, in their order."""
    yield from rotary(turns)
    for part in layout.parts(frame.config):
        read = opened.read(part, torch.float32)
        if needs_head(frame, part):
            read[HEAD] = opened.read("stem", torch.float32)[EMBEDDING] * frame.config.embedding_scale
        yield from converted(read, part, frame, turns.scores)


def shapes(opened: Opened, frame: Frame, turns: Frequencies) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of all tensors of a file, in their order, without a weight being read."""
    yield from ((name, tuple(tensor.shape)) for name, tensor in rotary(turns))
    for part in layout.parts(frame.config):
        with torch.device("meta"):
            empty = {name: torch.empty(shape) for name, shape in layout.shapes(opened.config, part).items()}
            if needs_head(frame, part):
                empty[HEAD] = torch.empty(layout.shapes(opened.config, "stem")[EMBEDDING])
            yield from ((name, tuple(one.shape)) for name, one in converted(empty, part, frame, turns.scores))


def needs_head(frame: Frame, part: Part) -> bool:
    """Whether a tied head has to be written a second time."""
    return part == "head" and frame.config.tie_word_embeddings and not frame.tied


def rotary(turns: Frequencies) -> Iterator[tuple[str, Tensor]]:
    """What frequencies are divided by."""
    if turns.factors is not None and turns.long is not None:
        yield "rope_factors_long.weight", turns.long.float()
        yield "rope_factors_short.weight", turns.factors.float()
    elif turns.factors is not None:
        yield "rope_freqs.weight", turns.factors.float()


# --- metadata -------------------------------------------------------------------------------------------------------


def describe(writer: Any, opened: Opened, frame: Frame, turns: Frequencies, kind: str) -> None:
    """Sizes and constants, and where the model comes from."""
    gguf, config, sizes, wide = library(), frame.plain, frame.sizes, frame.head_dim
    writer.add_type(gguf.GGUFType.MODEL)
    about(writer, opened)
    types = {"F32": "ALL_F32"}
    writer.add_file_type(int(gguf.LlamaFileType[types.get(kind, f"MOSTLY_{kind}")]))
    if kind not in PLAIN:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context(frame))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    ragged = frame.family.ragged
    writer.add_head_count([one.heads for one in sizes] if ragged else sizes[0].heads)
    writer.add_head_count_kv([one.groups for one in sizes] if ragged else sizes[0].groups)
    writer.add_feed_forward_length([one.ffn for one in sizes] if ragged else sizes[0].ffn)
    writer.add_key_length(wide)
    writer.add_value_length(wide)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if "separate" in frame.family.parallel:
        writer.add_parallel_residual(config.parallel == "separate")
    caps(writer, frame)
    if config.positions == "rotary":
        rope(writer, frame, turns)


def caps(writer: Any, frame: Frame) -> None:
    """Soft caps and windows."""
    config = frame.plain
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logits_softcap is not None:
        writer.add_final_logit_softcapping(config.logits_softcap)
    if frame.family.windows and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([one == "sliding_attention" for one in config.layer_types or []])


def rope(writer: Any, frame: Frame, turns: Frequencies) -> None:
    """How heads turn."""
    gguf = library()
    writer.add_rope_dimension_count(2 * frame.pairs if frame.family.partial else frame.head_dim)
    writer.add_rope_freq_base(turns.theta)
    if turns.original is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(turns.original)
        return
    if frame.family.factors:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        return
    nested = {key: one for key, one in (frame.config.rope_parameters or {}).items() if isinstance(one, dict)}
    whole = nested.get("full_attention") or rotaries(frame.config)[0]
    writer.add_rope_freq_base(float(whole.get("rope_theta", 10000.0)))
    if whole.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(whole["factor"]))
    if "sliding_attention" in nested:
        writer.add_rope_freq_base_swa(float(nested["sliding_attention"]["rope_theta"]))


def context(frame: Frame) -> int:
    """The longest text: what lies within the window, where llama.cpp has none."""
    config = frame.config
    windowed = "sliding_attention" in (config.layer_types or []) and not frame.family.windows
    longest = int(config.max_position_embeddings)
    return min(longest, int(config.sliding_window or longest)) if windowed else longest


def about(writer: Any, opened: Opened) -> None:
    """Name, licence, languages and base model, as far as the folder tells."""
    facts, plan = front_matter(opened.source), opened.source.folder / "plan.json"
    writer.add_name(Path(opened.source.name).name or opened.source.name)
    if isinstance(facts.get("license"), str):
        writer.add_license(facts["license"])
    for key, add in (("license_name", writer.add_license_name), ("license_link", writer.add_license_link)):
        if isinstance(facts.get(key), str):
            add(facts[key])
    languages = facts.get("language")
    if languages:
        writer.add_languages([languages] if isinstance(languages, str) else [str(one) for one in languages])
    try:
        source: Any = json.loads(plan.read_text(encoding="utf-8")).get("source", {}) if plan.is_file() else {}
    except (OSError, ValueError, AttributeError):
        source = {}
    name = source.get("name") if isinstance(source, dict) else None
    if isinstance(name, str) and name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(name).name)


def spell(writer: Any, words: Vocabulary) -> None:
    """The tokenizer."""
    writer.add_tokenizer_model(words.model)
    if words.model == "none":
        return
    if words.pre is not None or words.model == "llama":
        writer.add_tokenizer_pre(words.pre or "default")
    writer.add_token_list([one.encode() for one in words.tokens])
    writer.add_token_types(words.kinds)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    for name, value in words.flags.items():
        {"add_bos_token": writer.add_add_bos_token, "add_eos_token": writer.add_add_eos_token,
         "add_space_prefix": writer.add_add_space_prefix}[name](value)  # fmt: skip
    adders = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }  # fmt: skip
    for name, value in words.marks.items():
        adders[name](value)
    if words.template is not None:
        writer.add_chat_template(words.template)
