"""The only code that changes weights: folding, centring, changes of basis, shortcuts, and the way back to stock.

Every function takes the canonical tensors of one part and returns new ones; configs change beside them, by functions
that see no tensor, so that a plan knows every size before a weight is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome import layout
from microtome.edit import Correct, Edit, Rewrite
from microtome.errors import BadPlan
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, Part, prefix
from microtome.linalg import factor_deficit, polar
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import change_basis

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """The shape in which a method wants the decoder before it rotates the stream.

    norm: what the norms become ("rms" centres what is written, once, instead of at every read).
    untie: give the head its own weights, with the final norm folded in.
    centre_always: subtract the mean of the embeddings even under an RMSNorm, where it changes the function (SliceGPT's
    release does; `-o centre=release`).
    """

    norm: str
    untie: bool
    centre_always: bool = False


def rebuilt(
    config: MicrotomeConfig, per_block: Mapping[int, Mapping[str, Any]] | None = None, **changes: Any
) -> MicrotomeConfig:
    """A copy of a config with some fields changed, and some only in some blocks."""
    fields = {name: value for name, value in config.to_dict().items() if name in MicrotomeConfig.__annotations__}
    blocks: dict[str, Any] = dict(config.to_dict().get("per_layer_config") or {})
    for block, values in (per_block or {}).items():
        blocks[str(block)] = {**blocks.get(str(block), {}), **values}
    fields |= changes
    different = {
        block: {name: value for name, value in values.items() if value != fields.get(name)}
        for block, values in blocks.items()
    }
    kept = {block: values for block, values in different.items() if values}
    made: dict[str, Any] = {**fields, "per_layer_config": kept or None}
    return MicrotomeConfig(**made)


# --- folding and centring -------------------------------------------------------------------------------------------


def formed_config(config: MicrotomeConfig, form: Form) -> MicrotomeConfig:
    """The config after `formed`: no gains but the final one of a tied model, and a divisor that outlives slicing."""
    biased = config.norm_bias
    tied = config.tie_word_embeddings and not form.untie
    return rebuilt(
        config,
        norm=form.norm,
        norm_gain=False,
        norm_bias=False,
        norm_offset=0.0,
        norm_divisor=config.norm_divisor or config.hidden_size,
        final_norm_gain=config.final_norm_gain and tied,
        final_norm_bias=config.final_norm_bias and tied,
        tie_word_embeddings=tied,
        attention_bias=config.attention_bias or biased,
        mlp_bias=config.mlp_bias or biased,
        head_bias=config.head_bias or (config.final_norm and config.final_norm_bias and not tied),
    )


def formed(tensors: Mapping[str, Tensor], part: Part, config: MicrotomeConfig, form: Form) -> Tensors:
    """The tensors of a part in the wanted form: norms folded into what reads, means taken out of what is written."""
    out = dict(tensors)
    centred = form.norm == "rms" and config.norm == "layer"
    if part == "stem":
        names = [name for name in (EMBEDDING, POSITIONS) if name in out and (centred or form.centre_always)]
        tied = config.tie_word_embeddings and not form.untie
        if names and tied:
            raise BadPlan("a tied embedding cannot be centred: its head would change. Untie it, or keep the LayerNorm.")
        return out | {name: out[name] - out[name].mean(1, keepdim=True) for name in names}
    if part == "head":
        return folded_head(out, config, form)
    head = prefix(int(part))
    for norm, readers in norm_readers(config).items():
        fold(out, f"{head}{norm}", [f"{head}{reader}" for reader in readers], config.norm_offset)
    for name in (f"{head}self_attn.{one}_norm.weight" for one in "qk"):
        if name in out:
            out[name] = out[name] + config.norm_offset
    for writer in ("self_attn.o_proj", "mlp.down_proj") if centred else ():
        for name in (f"{head}{writer}.weight", f"{head}{writer}.bias"):
            if name in out:
                out[name] = out[name] - out[name].mean(0, keepdim=True)
    return out


def norm_readers(config: MicrotomeConfig) -> dict[str, list[str]]:
    """Which linears of a block read through which norm."""
    attention = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    mlp = [f"mlp.{name}" for name in ("gate_proj", "up_proj")]
    if config.parallel == "shared":
        return {"input_layernorm": attention + mlp}
    return {"input_layernorm": attention, "post_attention_layernorm": mlp}


def fold(tensors: Tensors, norm: str, readers: Iterable[str], offset: float) -> None:
    """Move a norm's gain and bias into the linears that read it, in place."""
    gain, bias = tensors.pop(f"{norm}.weight", None), tensors.pop(f"{norm}.bias", None)
    for reader in readers:
        weight = tensors.get(f"{reader}.weight")
        if weight is None:
            continue
        if bias is not None:
            added = weight @ bias
            tensors[f"{reader}.bias"] = tensors[f"{reader}.bias"] + added if f"{reader}.bias" in tensors else added
        if gain is not None:
            tensors[f"{reader}.weight"] = weight * (gain + offset)


def folded_head(tensors: Tensors, config: MicrotomeConfig, form: Form) -> Tensors:
    """The head with the final norm folded in; of a tied model the norm stays, for its gain must be refitted."""
    out = dict(tensors)
    if config.tie_word_embeddings and not form.untie:
        if FINAL_NORM in out and config.norm_offset:
            out[FINAL_NORM] = out[FINAL_NORM] + config.norm_offset
        return out
    fold(out, "model.norm", ["lm_head"], config.norm_offset)
    return out


# --- widths of the stream -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """Which shortcut joins two junctions; `kind` is lowrank, diagonal or dense, and a global basis needs none.

    centred: LayerNorms read the stream, so the ones vector must stay the uniform one; a turn of the wider of two bases
    of different widths would pad it with zeros.
    """

    kind: str
    centred: bool = False

    def between(self, half: str, size: int, wide_in: int, wide_out: int) -> tuple[str, int]:
        """Kind and rank of the shortcut past a half, for a stream of `size` before slicing."""
        if self.kind == "lowrank" and not (self.centred and wide_in != wide_out):
            wide = max(wide_in, wide_out)
            rank = min(wide_in, size - wide) if wide_out >= wide_in else min(wide_out, size - wide_out)
            if rank == 0:
                return "identity", 0
            return ("lowrank" if wide_out >= wide_in else "factored"), rank
        if self.kind == "diagonal" and half == "attn":
            return "diagonal", 0
        return "dense", 0


def resized_config(config: MicrotomeConfig, widths: Mapping[int, int], gauge: Gauge | None) -> MicrotomeConfig:
    """The config of a stream cut to `widths` (junction number to width); without a gauge all must be equal."""
    last, size = 2 * config.num_hidden_layers, config.hidden_size
    wide = widths[last]
    first = widths[0]
    changes: dict[str, Any] = {"hidden_size": wide, "embedding_size": first}
    if gauge is None:
        return rebuilt(config, residual_in=first, residual_mid=first, residual_out=first, **changes)
    if gauge.kind == "diagonal" and config.parallel != "none":
        raise BadPlan("a diagonal gauge pairs the two junctions of a block, and parallel blocks have one.")
    blocks: dict[int, dict[str, Any]] = {}
    for block in range(config.num_hidden_layers):
        before, after = widths[2 * block], widths[2 * block + 2]
        mid = widths[2 * block + 1] if config.parallel == "none" else after
        kind_a, rank_a = gauge.between("attn", size, before, mid)
        kind_m, rank_m = gauge.between("mlp", size, mid, after) if config.parallel == "none" else ("identity", 0)
        blocks[block] = {
            "residual_in": before,
            "residual_mid": mid,
            "residual_out": after,
            "attn_shortcut": kind_a,
            "attn_shortcut_rank": rank_a,
            "mlp_shortcut": kind_m,
            "mlp_shortcut_rank": rank_m,
        }
    if config.tie_word_embeddings:
        changes |= {"head_adapter": True, "head_adapter_bias": config.final_norm_bias}
        changes |= {"final_norm_gain": False, "final_norm_bias": False}
    common = blocks[0]
    return rebuilt(config, blocks, **changes, **common)


def gauged(before: Rewrite, after: Rewrite, gauge: Gauge) -> Rewrite:
    """The later of two neighbouring bases, turned inside its span so that the shortcut between them is symmetric."""
    if gauge.kind != "lowrank" or (gauge.centred and len(before.shrink) != len(after.shrink)):
        return after
    narrow = min(len(before.shrink), len(after.shrink))
    return after.rotated(polar(after.shrink @ before.grow[:, :narrow]))


def diagonalised(before: Rewrite, after: Rewrite) -> tuple[Rewrite, Rewrite]:
    """Both bases of a block's attention half, turned so that the shortcut between them is diagonal."""
    u_BB, _, vt_AA = torch.linalg.svd(after.shrink @ before.grow, full_matrices=True)
    return before.rotated(vt_AA), after.rotated(u_BB.T)


def shortcut(kind: str, rank: int, before: Rewrite, after: Rewrite) -> Tensors:
    """The tensors of the shortcut that carries the stream from one basis to the next; see MicrotomeShortcut."""
    dense_BA = after.shrink @ before.grow
    wide, narrow = dense_BA.shape
    if kind == "dense":
        return {"weight": dense_BA}
    if kind == "diagonal":
        return {"weight": dense_BA.diagonal().clone()}
    if kind == "lowrank":
        return {"weight": factor_deficit(dense_BA[:narrow], rank)}
    if kind == "factored":
        deficit = torch.eye(wide, narrow, dtype=dense_BA.dtype) - dense_BA
        u, sigma, vt = torch.linalg.svd(deficit, full_matrices=False)
        return {"left": u[:, :rank] * sigma[:rank], "right": vt[:rank].T.contiguous()}
    return {}


def shortcuts(config: MicrotomeConfig, block: int, rewrites: Mapping[str, Rewrite]) -> Tensors:
    """The shortcut tensors of a block, by the cut config, from the final bases of its junctions."""
    sizes, out = config.per_layer_config[block], {}
    parallel = config.parallel != "none"
    places = [("attn", 2 * block, 2 * block + (2 if parallel else 1))]
    places += [] if parallel else [("mlp", 2 * block + 1, 2 * block + 2)]
    for half, before, after in places:
        kind, rank = getattr(sizes, f"{half}_shortcut"), getattr(sizes, f"{half}_shortcut_rank")
        if kind == "identity" and f"residual.{before}" not in rewrites:
            continue
        made = shortcut(kind, rank, rewrites[f"residual.{before}"], rewrites[f"residual.{after}"])
        out |= {f"{prefix(block)}{half}_shortcut.{name}": value for name, value in made.items()}
    return out


# --- applying -------------------------------------------------------------------------------------------------------


def apply(tensors: Mapping[str, Tensor], edits: Iterable[Edit]) -> Tensors:
    """The tensors of a part after the edits that touch it, in their working precision."""
    out = dict(tensors)
    for edit in edits:
        if isinstance(edit, Rewrite):
            touched = {axis.tensor for axis in edit.space.axes} & set(out)
            if touched:
                work = out[next(iter(touched))].dtype
                out = change_basis(out, edit.space, edit.shrink.to(work), edit.seen.to(work))
        elif isinstance(edit, Correct):
            out[edit.tensor] = edit.value
    return out


def corrections(edits: Iterable[Edit], part: Part, config: MicrotomeConfig) -> list[Correct]:
    """The corrections whose tensor belongs to a part."""
    mine = layout.shapes(config, part)
    return [edit for edit in edits if isinstance(edit, Correct) and edit.tensor in mine]


# --- the way back to stock ------------------------------------------------------------------------------------------


def standard_config(
    config: MicrotomeConfig, offset: float = 0.0, embedding_scale: float | None = None
) -> MicrotomeConfig:
    """The config of the same function without a norm divisor, with gains where stock models have them.

    A norm over r of n coordinates that divides by n is the ordinary norm times sqrt(n / r), its epsilon times n / r.
    `offset` and `embedding_scale` are those of the architecture at this width; None leaves the scale as it is.
    """
    if config.norm_divisor is None or config.norm_divisor == config.hidden_size:
        stretch = 1.0
    else:
        stretch = config.norm_divisor / config.hidden_size
    biased = config.norm == "layer"
    shared = config.qk_norm is not None and config.qk_norm_eps == config.norm_eps
    eps = config.norm_eps * stretch
    return rebuilt(
        config,
        norm_divisor=None,
        norm_eps=eps,
        norm_offset=offset,
        qk_norm_eps=eps if shared else config.qk_norm_eps,
        norm_gain=True,
        norm_bias=biased,
        final_norm_gain=True,
        final_norm_bias=biased,
        embedding_scale=config.embedding_scale if embedding_scale is None else embedding_scale,
    )


def rescale(config: MicrotomeConfig, standard: MicrotomeConfig, dtype: torch.dtype) -> float:
    """What embeddings are multiplied by when their scale changes; both scales are rounded to the type they run in."""
    old, new = (torch.tensor(one.embedding_scale, dtype=dtype).item() for one in (config, standard))
    return old / new


def stretched(
    tensors: Mapping[str, Tensor], part: Part, config: MicrotomeConfig, standard: MicrotomeConfig
) -> list[str]:
    """Which tensors of a block or of the head take over the factor of the norms before them, once for each mention."""
    if part == "head":
        return [FINAL_NORM if FINAL_NORM in tensors else HEAD] if config.final_norm else []
    found = [f"{one}.weight" for readers in norm_readers(config).values() for one in readers]
    if standard.qk_norm_eps != config.qk_norm_eps:  # the head norms share the epsilon: scale what they norm
        found += [f"self_attn.{one}_proj.{kind}" for one in "qk" for kind in ("weight", "bias")]
    return [name for name in (prefix(int(part)) + one for one in found) if name in tensors]


def standardised(
    tensors: Mapping[str, Tensor],
    part: Part,
    config: MicrotomeConfig,
    standard: MicrotomeConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """The tensors under `standard`, made by `standard_config`, to be stored in `dtype`.

    Gains are exactly one, and their factor lies in the weights that read: a gain of sqrt(n / r) stored in 16 bits would
    be off by the same relative error in every block; folded, it costs one rounding of each weight, which the cast makes
    anyway. Of a tied model the final gain also takes back what the embeddings were multiplied by.
    """
    out, standard = dict(tensors), standard or standard_config(config)
    factor, embeddings = (standard.norm_eps / config.norm_eps) ** 0.5, rescale(config, standard, dtype)
    if part == "stem":
        return out | {EMBEDDING: out[EMBEDDING] * embeddings}
    for name in stretched(out, part, config, standard):
        out[name] = out[name] * factor
    like = next(iter(out.values())) if out else torch.ones(1)
    for name, shape in layout.shapes(standard, part).items():
        if name not in out:
            out[name] = torch.full(shape, float(name.endswith("norm.weight")), dtype=like.dtype)
        if part == "head" and standard.tie_word_embeddings and name.startswith("model.norm."):
            out[name] = out[name] / embeddings
        if name.endswith("norm.weight"):
            out[name] = out[name] + (config.norm_offset - standard.norm_offset)
    return out
