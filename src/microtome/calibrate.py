"""The stream of hidden states, pushed through the decoder one block at a time.

Only one block's weights, the sums and the hidden states are in memory; the hidden states may live in a memory-mapped
file. The decoder that runs here is the one that ships: `MicrotomeBlock`, built a half at a time.
"""

import copy
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microtome.edit import Rewrite
from microtome.errors import BadInput
from microtome.layout import EMBEDDING, POSITIONS, junction, junctions, prefix, residual_width
from microtome.modeling_microtome import MicrotomeBlock, MicrotomeConfig, MicrotomeNorm, MicrotomeRotary
from microtome.stats import Moment
from microtome.surgery import rebuilt

Progress = Callable[[str, float], None]  # what is being done, and the fraction of it that is
BATCH_TOKENS = 8192
SPILL = 0.4  # of the free memory: hidden states above that go to a file


def free_memory() -> int:
    """Bytes of memory that the machine can still give."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 << 30


def attention_of(config: MicrotomeConfig) -> str:
    """The implementation of attention that a model can run on."""
    return "sdpa" if config.attention_softcap is None else "eager"


def scratch_file(place: Path, nbytes: int) -> Any:
    """A temporary file of that many bytes; OSError where the disk has no room for them.

    It has holes, and a disk that fills up while one is written through the map would end the process.
    """
    if shutil.disk_usage(place).free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file = tempfile.NamedTemporaryFile(dir=place, prefix="microtome-hidden-", suffix=".bin")  # noqa: SIM115
    file.truncate(nbytes)
    return file


def allocated(
    shape: tuple[int, ...], dtype: torch.dtype, scratch: Path | None, what: str = "hidden states"
) -> tuple[Tensor, Any]:
    """An uninitialised tensor in memory, or in a file that goes when the second value is closed (`scratch`: always)."""
    count = int(torch.tensor(shape).prod())
    nbytes = count * dtype.itemsize
    if scratch is None and nbytes <= SPILL * free_memory():
        return torch.empty(shape, dtype=dtype), None
    place = scratch or Path(tempfile.gettempdir())
    try:
        file = scratch_file(place, nbytes)
    except OSError as error:
        fact = f"no room for {nbytes / 1e9:.1f} GB of {what} in {place}: {error.strerror}"
        fewer = ", or take fewer --samples" if what == "hidden states" else ""
        raise BadInput(f"{fact}. Give --scratch another folder{fewer}.") from error
    return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape), file


class Stream:
    """Hidden states [N, T, D] of all calibration rows, always in the coordinates of the uncut model."""

    def __init__(  # noqa: PLR0913
        self,
        config: MicrotomeConfig,
        ids: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path | None = None,
        progress: Progress | None = None,
        passes: int = 1,
    ) -> None:
        self.config, self.ids, self.device, self.dtype = copy.copy(config), ids, device, dtype
        # How attention is computed is an attribute that transformers keeps off the config's own fields.
        setattr(self.config, "_attn_implementation", attention_of(config))  # noqa: B010
        self.passes = passes  # over every half block, for the progress
        self.rows, self.length = ids.shape
        self.batch = max(1, BATCH_TOKENS // self.length)
        widest = max(residual_width(config, number) for number in junctions(config))
        self.hidden, self.file = allocated((self.rows, self.length, widest), dtype, scratch)
        self.progress = progress or (lambda _what, _fraction: None)
        self.done = 0  # row passes through half blocks
        self.norm = MicrotomeNorm(config, config.hidden_size, gain=False, bias=False)
        self.positions = torch.arange(self.length, device=device)[None]
        self.turns = {kind: self.rotary(kind) for kind in set(config.layer_types or [])}
        self.masks = {kind: self.mask(kind) for kind in set(config.layer_types or [])}

    def rotary(self, layer_type: str) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of every position for one kind of block."""
        if self.config.positions != "rotary":
            return None
        nested = layer_type in (self.config.rope_parameters or {})
        turn = MicrotomeRotary(self.config, layer_type if nested else None).to(self.device)
        return turn(torch.zeros(1, dtype=self.dtype, device=self.device), self.positions)

    def mask(self, layer_type: str) -> Tensor | None:
        """None where plain causal attention will do; else what is added to the scores [1, 1, T, T]."""
        window = self.config.sliding_window if layer_type == "sliding_attention" else None
        if self.config.attention_softcap is None and (window is None or window >= self.length):
            return None
        distance = self.positions.T - self.positions
        seen = (distance >= 0) & (distance < (window or self.length))
        return torch.zeros(1, 1, self.length, self.length, dtype=self.dtype, device=self.device).masked_fill(
            ~seen, torch.finfo(self.dtype).min
        )

    def batches(self, halves: int) -> Iterator[slice]:
        """Row slices, reporting how much of the whole way is done after each; embeddings count as one half block."""
        way = self.rows * (1 + 2 * self.passes * self.config.num_hidden_layers)
        for start in range(0, self.rows, self.batch):
            rows = slice(start, min(start + self.batch, self.rows))
            yield rows
            self.done += halves * (rows.stop - rows.start)
            self.progress("calibration", self.done / way)

    def signal(self, hidden: Tensor, *, normed: bool) -> Tensor:
        """What a junction is measured by: the stream behind its norm, or before it (centred under a LayerNorm)."""
        if normed:
            return self.norm(hidden)
        return hidden - hidden.mean(-1, keepdim=True) if self.config.norm == "layer" else hidden

    def start(self, tensors: Mapping[str, Tensor], moment: Moment | None, *, normed: bool) -> None:
        """Fill the stream with embeddings."""
        table = tensors[EMBEDDING]
        for rows in self.batches(1):
            x = table[self.ids[rows]].to(self.device, self.dtype)
            if self.config.embedding_scale != 1.0:
                x = x * self.config.embedding_scale
            if POSITIONS in tensors:
                offset = self.config.position_offset
                x = x + tensors[POSITIONS][offset : offset + self.length].to(self.device, self.dtype)
            self.hidden[rows, :, : x.shape[-1]] = x.to(self.hidden.dtype)
            if moment is not None:
                moment.add(self.signal(x, normed=normed))

    def advance(
        self,
        block: int,
        halves: tuple[str, ...],
        tensors: Mapping[str, Tensor],
        edit: Rewrite | None,
        moment: Moment | None,
        *,
        normed: bool,
    ) -> None:
        """Push the stream past some halves of a block and measure it behind them.

        `tensors` are the block's, written at full width; with an edit its readers are narrow already, and only what the
        edit keeps of the stream is carried on.
        """
        module = self.half(block, halves, tensors, self.config.hidden_size if edit is None else len(edit.shrink))
        shrink, grow = (
            (None, None) if edit is None else (m.to(self.device, self.dtype) for m in (edit.shrink, edit.grow))
        )
        around = self.beside(block)
        for rows in self.batches(len(halves)):
            hidden = self.hidden[rows].to(self.device)
            x = hidden if shrink is None else hidden @ shrink.T
            hidden = hidden if grow is None else x @ grow.T
            if "attn" in halves and module.self_attn is not None:
                hidden = hidden + module.attention_half(x, **around)
            if "mlp" in halves and module.mlp is not None:
                hidden = hidden + module.mlp_half(x)
            self.hidden[rows] = hidden
            if moment is not None:
                moment.add(self.signal(hidden, normed=normed))

    def half(self, block: int, halves: tuple[str, ...], tensors: Mapping[str, Tensor], width: int) -> MicrotomeBlock:
        """The block with only the wanted halves, reading `width` numbers and writing all."""
        wide = self.config.hidden_size
        names = {"attn": "self_attn", "mlp": "mlp"}
        skip = [name for half, name in names.items() if half not in halves]
        sizes = {"residual_in": width, "residual_mid": wide, "residual_out": wide, "skip": skip}
        if halves == ("mlp",):
            sizes |= {"residual_in": wide, "residual_mid": width}
        config = rebuilt(self.config, {block: sizes})
        setattr(config, "_attn_implementation", attention_of(config))  # noqa: B010
        with torch.device("meta"):
            module = MicrotomeBlock(config, block).eval()
        head = prefix(block)
        mine = {name.removeprefix(head): tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        module.load_state_dict(
            {name: tensor for name, tensor in mine.items() if name in module.state_dict()}, assign=True
        )
        return module

    def module(
        self, block: int, tensors: Mapping[str, Tensor], halves: tuple[str, ...], config: MicrotomeConfig | None = None
    ) -> MicrotomeBlock:
        """A block with only some halves, its shortcuts and all, as `config` (by default the stream's own) has it."""
        with torch.device("meta"):
            module = MicrotomeBlock(only_halves(config or self.config, block, halves), block).eval()
        cast = {
            name.removeprefix(prefix(block)): tensor.to(
                self.device, self.dtype if tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in tensors.items()
        }
        module.load_state_dict({name: cast[name] for name in module.state_dict()}, assign=True)
        return module

    def beside(self, block: int) -> dict[str, Any]:
        """What attention in a block needs beside the stream."""
        kind = (self.config.layer_types or [])[block]
        return {"position_embeddings": self.turns[kind], "attention_mask": self.masks[kind]}

    def push(  # noqa: PLR0913
        self,
        block: int,
        tensors: Mapping[str, Tensor],
        halves: tuple[str, ...] = ("attn", "mlp"),
        taps: Mapping[str, Callable[[Tensor], None]] | None = None,
        across: Callable[[Tensor, Tensor], None] | None = None,
        *,
        config: MicrotomeConfig | None = None,
        keep: bool = True,
    ) -> None:
        """Run halves of a block as it is, shortcuts and all, from this place on.

        `taps` are called with what the named linears read, `across` with the stream on both sides. Without `keep` the
        stream stays where it is; `config` may give the block other inner widths than the stream's own.
        """
        module = self.module(block, tensors, halves, config)
        for name, tap in (taps or {}).items():
            if (linear := submodule(module, name)) is not None:
                linear.register_forward_pre_hook(listening(tap))
        wide = residual_width(self.config, junction(self.config, block, "in" if "attn" in halves else "mid"))
        for rows in self.batches(len(halves)):
            x = self.hidden[rows, :, :wide].to(self.device)
            y = run_halves(module, halves, x, self.beside(block))
            if across is not None:
                across(x, y)
            if keep:
                self.hidden[rows, :, : y.shape[-1]] = y

    def close(self) -> None:
        """Give the memory or the file back."""
        self.hidden = torch.empty(0)
        if self.file is not None:
            self.file.close()
            self.file = None


def listening(tap: Callable[[Tensor], None]) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
    """A hook that hands on what a linear reads."""
    return lambda _module, seen: tap(seen[0])


def only_halves(config: MicrotomeConfig, block: int, halves: tuple[str, ...]) -> MicrotomeConfig:
    """The config whose block has no other halves than these, ready to run."""
    left_out = [name for half, name in (("attn", "self_attn"), ("mlp", "mlp")) if half not in halves]
    skipped = getattr(config.per_layer_config[block], "skip", None) or []
    alone = rebuilt(config, {block: {"skip": sorted({*skipped, *left_out})}}) if left_out else copy.copy(config)
    setattr(alone, "_attn_implementation", attention_of(config))  # noqa: B010
    return alone


def submodule(module: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The linear of a block by its name; None where the block has no such half."""
    half, _, linear = name.partition(".")
    owner = getattr(module, half, None)
    return None if owner is None else getattr(owner, linear)


def run_halves(module: MicrotomeBlock, halves: tuple[str, ...], x: Tensor, around: Mapping[str, Any]) -> Tensor:
    """The stream behind one half of a block, or behind the whole block."""
    if set(halves) == {"attn", "mlp"}:
        return module(x, **around)
    if halves == ("attn",):
        carried = module.attn_shortcut(x)
        return carried if module.self_attn is None else carried + module.attention_half(x, **around)
    assert module.mlp_shortcut is not None
    carried = module.mlp_shortcut(x)
    return carried if module.mlp is None else carried + module.mlp_half(x)
