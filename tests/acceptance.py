"""What every method that keeps or drops whole coordinates has to pass, and decoders with coordinates zeroed by hand."""

from pathlib import Path
from typing import Any

import torch
from models import canonical, loaded, logits
from tinies import CALIBRATION, HELD_OUT, compress, folder
from torch import Tensor

from microtome.forecast import preview

KINDS_OF_MODELS = (  # every architecture: groups of every size, biases, parallel halves, sandwich and post norms
    "llama-biases-wide-heads", "opt-tied", "gpt2-untied", "gpt_neox", "phi-tied-gqa", "qwen3-bias", "olmo2", "gemma",
    "gemma2", "phi3-partial-longrope", "mistral-window", "qwen2-tied", "smollm3-window-biases", "granite-biases",
    "gemma3_text-scaled-bias",
)  # fmt: skip
BRIEF = ("llama-gqa-llama3-tied", "opt-tied", "phi-tied-gqa")


def keeps_every_byte(method: str, out: Path, **chosen: Any) -> None:
    """At keep 1 the result is the source."""
    result = compress(folder("llama"), out, keep=1.0, method=method, **chosen)
    assert result.stock
    assert (out / "model.safetensors").read_bytes() == (folder("llama") / "model.safetensors").read_bytes()


def behaves(method: str, name: str, out: Path, **chosen: Any) -> Any:
    """The same bytes twice, the same bits in every load, and the size and widths that a dry run said; the result."""
    asked = {"method": method, "keep": 0.7, **chosen}
    first = compress(folder(name), out / "first", **asked)
    again = compress(folder(name), out / "again", **asked)
    stored = [(place / "model.safetensors").read_bytes() for place in (first.folder, again.folder)]
    assert stored[0] == stored[1]
    models = [first.load() for _ in range(2)]
    one, two = (logits(model, HELD_OUT) for model in models)
    assert torch.equal(one, two)
    assert torch.isfinite(one).all()
    dry = preview(folder(name), data=CALIBRATION, **asked)
    assert dict(dry.widths) == first.plan.widths
    assert dry.after.stored == first.after.stored == models[0].num_parameters()
    assert first.after.decoder < first.before.decoder
    return first


# --- by hand --------------------------------------------------------------------------------------------------------


def parts(name: str, block: int, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of one block in fp64, without its prefix."""
    head = f"model.layers.{block}."
    whole = canonical(name)[1] if tensors is None else tensors
    return {key.removeprefix(head): value.double() for key, value in whole.items() if key.startswith(head)}


def neuron(block: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """What belongs to a neuron, by matrix; a bias behind its row."""
    found = {"mlp.down_proj": block["mlp.down_proj.weight"][:, number]}
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        if f"{name}.weight" in block:
            found[name] = with_bias(block, name, slice(number, number + 1))[0]
    return found


def group(block: dict[str, Tensor], sizes: Any, number: int) -> dict[str, Tensor]:
    """What belongs to a key-value group, by matrix: rows [rows, entries], of the output projection columns."""
    times = sizes.num_attention_heads // sizes.num_key_value_heads
    queries = slice(number * times * sizes.head_dim, (number + 1) * times * sizes.head_dim)
    keys = slice(number * sizes.head_dim, (number + 1) * sizes.head_dim)
    values = slice(number * sizes.v_head_dim, (number + 1) * sizes.v_head_dim)
    return {
        "self_attn.q_proj": with_bias(block, "self_attn.q_proj", queries),
        "self_attn.k_proj": with_bias(block, "self_attn.k_proj", keys),
        "self_attn.v_proj": with_bias(block, "self_attn.v_proj", values),
        "self_attn.o_proj": block["self_attn.o_proj.weight"][:, columns_of_group(sizes, number)].T,
    }


def columns_of_group(sizes: Any, number: int) -> slice:
    """What the output projection reads of a key-value group."""
    wide = sizes.num_attention_heads // sizes.num_key_value_heads * sizes.v_head_dim
    return slice(number * wide, (number + 1) * wide)


def with_bias(block: dict[str, Tensor], name: str, rows: slice) -> Tensor:
    found = block[f"{name}.weight"][rows]
    bias = block.get(f"{name}.bias")
    return found if bias is None else torch.cat([found, bias[rows, None]], 1)


def smallest(scores: list[float], count: int) -> set[int]:
    """The indices of the lowest scores; none may be in doubt."""
    ranked = sorted(range(len(scores)), key=lambda index: scores[index])
    assert count == len(scores) or scores[ranked[count]] > scores[ranked[count - 1]], "a tie"
    return set(ranked[:count])


def without(name: str, gone: dict[tuple[int, str], set[int]]) -> Any:
    """The tiny model with the output of neurons, or of key-value groups, taken as zero by whatever reads it."""
    config, stored = canonical(name)
    tensors = dict(stored)
    for (block, kind), numbers in gone.items():
        sizes = config.per_layer_config[block]
        key = f"model.layers.{block}." + ("mlp.down_proj.weight" if kind == "ffn" else "self_attn.o_proj.weight")
        changed = tensors[key].clone()
        for number in numbers:
            changed[:, number if kind == "ffn" else columns_of_group(sizes, number)] = 0.0
        tensors[key] = changed
    return loaded(config, tensors)
