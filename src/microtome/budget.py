"""From one dial to widths: `keep` is the fraction of the blocks' stored numbers, solved for by counting."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from microtome import layout
from microtome.errors import BadInput, BadPlan

if TYPE_CHECKING:
    from microtome.modeling_microtome import MicrotomeConfig

PAPER_MULTIPLE = 8  # SliceGPT's release rounds its widths down to a multiple of this


def friendly(size: int) -> int:
    """The multiple that widths are rounded to: 128 from 2048 on, else the largest power of two up to size / 24."""
    if size >= 2048:
        return 128
    multiple = 1
    while multiple * 2 <= size / 24:
        multiple *= 2
    return multiple


def check_dials(keep: float | None, slice_: float | None) -> None:
    """Refuse both dials, neither, and values outside their range."""
    if (keep is None) == (slice_ is None):
        how = "say how much stays: give" if keep is None else "two dials for one budget: give only one of"
        raise BadInput(f"{how} --keep (fraction of the blocks' parameters) or --slice (fraction of the width).")
    if keep is not None and not 0.0 < keep <= 1.0:
        raise BadInput(f"--keep {keep} is outside (0, 1]: it is the fraction of the blocks' parameters that stays.")
    if slice_ is not None and not 0.0 <= slice_ < 1.0:
        raise BadInput(f"--slice {slice_} is outside [0, 1): it is the fraction of the width that goes.")


def sliced_width(size: int, slice_: float, multiple: int | None) -> int:
    """The paper's width: (1 - slice) n, cut to an integer and rounded down to a multiple of 8."""
    wide = int((1.0 - slice_) * size)
    wide -= wide % (multiple or PAPER_MULTIPLE)
    if wide < 1:
        raise BadPlan(f"--slice {slice_} of width {size} leaves nothing at a multiple of {multiple or PAPER_MULTIPLE}.")
    return wide


def nearest_width(size: int, keep: float, multiple: int | None, count: Callable[[int], int], whole: int) -> int:
    """The friendly width whose stored blocks come closest to `keep` times `whole`; ties go to the smaller."""
    step = multiple or friendly(size)
    if not 1 <= step < size:
        raise BadPlan(f"--multiple-of {step} leaves no width below {size}: choose a smaller multiple.")
    return min(range(step, size, step), key=lambda wide: (abs(count(wide) - keep * whole), wide))


@dataclass(frozen=True)
class Sizes:
    """What a decoder stores and costs. `stored` counts tied weights once; `total` as if each had its own."""

    decoder: int  # numbers in the blocks: what keep refers to
    total: int
    stored: int
    flops: int  # 2 x multiply-adds of all linears for one token, attention over the context not counted
    nbytes: int | None = None  # of the weight files
    kv_bytes: int | None = None  # of key-value cache per token, in the model's dtype
    nonzero: int | None = None  # of the stored numbers, where a method sets some to zero: they still take their place

    def ratio(self, name: str, before: "Sizes") -> float:
        """Of one field, after over before."""
        return getattr(self, name) / max(getattr(before, name) or 1, 1)


def sizes(config: "MicrotomeConfig", *, itemsize: int | None = None) -> Sizes:
    """Sizes by counting, no tensor allocated; with `itemsize` (bytes of a number) also bytes."""
    stored = layout.count(config)
    head = config.vocab_size * (config.embedding_size or config.hidden_size)
    decoder = layout.count_blocks(config)
    matrices = sum(flop_numbers(config, part) for part in layout.parts(config))
    cached = sum(
        one.num_key_value_heads * (one.head_dim + one.v_head_dim)
        for one in (config.per_layer_config[block] for block in range(config.num_hidden_layers))
        if not layout.skips(one, "self_attn")
    )
    return Sizes(
        decoder=decoder,
        total=stored + (head if config.tie_word_embeddings else 0),
        stored=stored,
        flops=2 * (matrices + (head if config.tie_word_embeddings else 0)),
        nbytes=None if itemsize is None else stored * itemsize,
        kv_bytes=None if itemsize is None else cached * itemsize,
    )


def flop_numbers(config: "MicrotomeConfig", part: layout.Part) -> int:
    """Numbers of a part that one token is multiplied with; a low-rank factor is used twice, a table not at all."""
    if part == "stem":
        return 0
    found = 0
    for name, shape in layout.shapes(config, part).items():
        if len(shape) == 2 and not name.endswith("index"):
            twice = name.endswith("shortcut.weight") and is_lowrank(config, part, name)
            found += prod(shape) * (2 if twice else 1)
    return found


def is_lowrank(config: "MicrotomeConfig", part: layout.Part, name: str) -> bool:
    """Whether a shortcut's only tensor is the factor of a symmetric map."""
    half = "attn" if ".attn_shortcut" in name else "mlp"
    return part != "head" and getattr(config.per_layer_config[int(part)], f"{half}_shortcut") == "lowrank"
