"""How much of a decoder is in use: spectra of what reads the stream and of what fills it, and what each block changes.

The effective rank of a second moment is exp(-sum p log p), p its eigenvalues over their sum (Roy and Vetterli, 2007,
who take singular values): n equal eigenvalues have effective rank n. Block influence is 1 - cos (ShortGPT, Men et al.,
2024), the angle arccos(cos) / pi (Gromov et al., 2024; their mean is over last tokens, this one over all).

Letters: T tokens, N width of the stream, F neurons of a block, R rows of a weight.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor

from microtome import layout, surgery
from microtome.calibrate import Progress, Stream
from microtome.errors import NumericalFailure
from microtome.layout import EMBEDDING, HEAD
from microtome.modeling_microtome import MicrotomeBlock, MicrotomeConfig, MicrotomeNorm
from microtome.planner import Opened
from microtome.space import Role
from microtome.stats import Moment
from microtome.surgery import Form, Tensors

SHARES = (0.9, 0.95, 0.99, 0.999)  # of the energy, that components are counted for
DEAD = 0.01  # a neuron is dead below this fraction of its block's mean activity
CHUNK = 16384  # rows of a weight at a time


def short(value: float) -> float:
    """Six significant digits: what a report stores."""
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a second moment or Gram matrix, largest first, none negative."""

    values: tuple[float, ...]

    @property
    def total(self) -> float:
        """All energy: the trace."""
        return sum(self.values)

    @property
    def cumulative(self) -> Tensor:
        """Share of the energy in the first 1, 2, ... N components, fp64 [N]; zeros where there is none."""
        return torch.tensor(self.values, dtype=torch.float64).cumsum(0) / (self.total or 1.0)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalised eigenvalues; 0 where there is no energy."""
        if not self.total:
            return 0.0
        p_N = torch.tensor(self.values, dtype=torch.float64) / self.total
        return float(torch.special.entr(p_N).sum().exp())

    def components(self, share: float) -> int:
        """How many components hold this share of the energy; 0 where there is none."""
        if not self.total:
            return 0
        return min(len(self.values), 1 + int((self.cumulative < share - 1e-12).sum()))

    def summary(self) -> dict[str, Any]:
        """Effective rank and counts of components, as plain data."""
        counts = {str(share): self.components(share) for share in SHARES}
        return {"effective_rank": short(self.effective_rank), "components": counts}

    def to_json(self) -> dict[str, Any]:
        """The summary, every eigenvalue and the cumulative energy, to six digits."""
        cumulative = [short(one) for one in self.cumulative.tolist()]
        return {**self.summary(), "eigenvalues": [short(one) for one in self.values], "cumulative": cumulative}


def spectrum(matrix_NN: Tensor, what: str) -> Spectrum:
    """The spectrum of a symmetric positive semi-definite matrix, in fp64 on its device.

    Raises NumericalFailure, naming `what`, if the matrix is not finite.
    """
    if not torch.isfinite(matrix_NN).all():
        raise NumericalFailure(f"{what} is not finite: the model overflows there. Give a checkpoint of finite values.")
    values = torch.linalg.eigvalsh(matrix_NN.double()).flip(0).clamp_min(0.0)
    return Spectrum(tuple(values.tolist()))


@dataclass(frozen=True)
class Junction:
    """A place where the stream is read, with the spectra that were asked for.

    readers: Gram matrix of all weights that read here, gains folded in, as far as they can see the normed stream.
    behind_norm: second moment of what is read, without the gain. before_norm: of the stream (centred under a
    LayerNorm). Where no norm stands, both are the stream.
    """

    number: int
    where: str
    width: int
    readers: Spectrum | None = None
    behind_norm: Spectrum | None = None
    before_norm: Spectrum | None = None


@dataclass(frozen=True)
class Change:
    """What a block does to the stream, over all tokens: x is what its shortcuts carry, y what comes out."""

    block: int
    cosine: float  # mean of cos(x, y)
    angle: float  # mean of arccos(cos(x, y)) / pi
    norm_in: float  # mean of |x|
    norm_out: float  # mean of |y|
    relative: float  # |Y - X| / |X|, Frobenius norms over all tokens

    @property
    def influence(self) -> float:
        """Block influence: 1 - cos."""
        return 1.0 - self.cosine

    @property
    def growth(self) -> float:
        """Norm of the stream behind the block over that before it."""
        return self.norm_out / max(self.norm_in, 1e-300)


@dataclass(frozen=True)
class Neurons:
    """The activations that a block's down projection reads: neurons, and their second moment."""

    block: int
    size: int
    dead: int  # neurons whose mean |activation| is below DEAD times the mean over the block
    spectrum: Spectrum


@dataclass(frozen=True)
class Activity:
    """What a text does in a decoder: by junction its spectra behind and before the norm, and by block the rest."""

    junctions: dict[int, tuple[Spectrum, Spectrum]]
    changes: tuple[Change, ...]
    neurons: tuple[Neurons, ...]


def where(config: MicrotomeConfig, number: int) -> str:
    """A junction in words."""
    if number == 2 * config.num_hidden_layers:
        return "head"
    if config.parallel != "none":
        return f"block {number // 2}"
    return f"block {number // 2} {'MLP' if number % 2 else 'attention'}"


def is_normed(config: MicrotomeConfig, number: int) -> bool:
    """Whether a norm stands between the stream and what reads it at a junction."""
    if number == 2 * config.num_hidden_layers:
        return config.final_norm
    return config.norm_placement != "post"


# --- weights --------------------------------------------------------------------------------------------------------


def gram(weight_RN: Tensor) -> Tensor:
    """W^T W [N, N] in fp64, some rows at a time."""
    total_NN = torch.zeros(weight_RN.shape[1], weight_RN.shape[1], dtype=torch.float64)
    for rows in weight_RN.split(CHUNK):
        total_NN += rows.double().T @ rows.double()
    return total_NN


def readers(config: MicrotomeConfig) -> dict[int, list[str]]:
    """By junction, the weights that read there."""
    found: dict[int, list[str]] = {}
    for number, tensor, _dim, role in layout.residual_axes(config):
        if role is Role.READS:
            found.setdefault(number, []).append(tensor)
    return found


def readers_of(found: Opened, part: layout.Part) -> Tensors:
    """The tensors of a block or the head in fp32, gains folded; a tied head as a copy of the embedding."""
    config = found.config
    tensors = found.read(part, torch.float32)
    if part == "head" and config.tie_word_embeddings:
        tensors[HEAD] = found.read("stem", torch.float32)[EMBEDDING]
    for number, names in readers(config).items():
        width = layout.residual_width(config, number)
        tensors |= {name: spread(tensors, name, width) for name in names if name in tensors}
    return surgery.formed(tensors, part, config, Form(norm=config.norm, untie=True))


def spread(tensors: Tensors, name: str, width: int) -> Tensor:
    """A weight that reads the stream, with zeros where its half reads only a subset of the coordinates."""
    half = "attn" if ".self_attn." in name else "mlp"
    index = tensors.get(f"{name.rsplit('.', 3)[0]}.{half}_read_index")
    if index is None:
        return tensors[name]
    whole = tensors[name].new_zeros(len(tensors[name]), width)
    whole[:, index.long()] = tensors[name]
    return whole


@torch.inference_mode()
def reader_spectra(found: Opened, progress: Progress | None = None) -> dict[int, Spectrum]:
    """By junction, the spectrum of the stacked weights that read there; one block in memory at a time.

    What follows a LayerNorm never sees the mean of the stream, so that direction is taken out of its readers.
    """
    config = found.config
    spectra: dict[int, Spectrum] = {}
    parts = layout.parts(config)[1:]
    for done, part in enumerate(parts, start=1):
        tensors = readers_of(found, part)
        for number, names in readers(config).items():
            mine = [tensors[name] for name in names if name in tensors]
            if not mine:
                continue
            if config.norm == "layer" and is_normed(config, number):
                mine = [weight - weight.mean(1, keepdim=True) for weight in mine]
            total_NN = sum((gram(weight) for weight in mine[1:]), start=gram(mine[0]))
            spectra[number] = spectrum(total_NN, f"what reads at residual.{number}")
        if progress is not None:
            progress("weights", done / len(parts))
    return spectra


# --- activations ----------------------------------------------------------------------------------------------------


class Seen:
    """Sums over the tokens that pass one block."""

    def __init__(self, stream: Stream, block: int) -> None:
        self.stream, self.block = stream, block
        self.moments: dict[int, tuple[Moment, Moment]] = {}
        sizes = stream.config.per_layer_config[block]
        self.neurons = Moment(0 if layout.skips(sizes, "mlp") else sizes.intermediate_size, stream.device)
        self.active_F = torch.zeros_like(self.neurons.sum_N)
        self.change_6 = torch.zeros(6, dtype=torch.float64, device=stream.device)
        self.tokens = 0

    def at(self, number: int, hidden: Tensor) -> None:
        """Count the stream [..., N] at a junction."""
        config, size, device = self.stream.config, hidden.shape[-1], self.stream.device
        if number not in self.moments:
            self.moments[number] = Moment(size, device), Moment(size, device)
        behind, before = self.moments[number]
        read = hidden
        if is_normed(config, number):
            read = MicrotomeNorm(config, size, gain=False, bias=False)(hidden)
            hidden = hidden - hidden.mean(-1, keepdim=True) if config.norm == "layer" else hidden
        behind.add(read)
        before.add(hidden)

    def activations(self, z: Tensor) -> None:
        """Count what the down projection reads, [..., F]."""
        self.neurons.add(z)
        self.active_F += z.reshape(-1, z.shape[-1]).abs().sum(0, dtype=torch.float64)

    def passed(self, x: Tensor, y: Tensor) -> None:
        """Count the stream before and behind the block, [..., N]."""
        x, y = x.float(), y.float()
        xx, xy, yy, dd = (one.sum(-1, dtype=torch.float64) for one in (x * x, x * y, y * y, (y - x).square()))
        cosine = (xy / (xx * yy).sqrt().clamp_min(1e-300)).clamp(-1.0, 1.0)
        each = (cosine, cosine.arccos() / pi, xx.sqrt(), yy.sqrt(), dd, xx)
        self.change_6 += torch.stack([one.sum() for one in each])
        self.tokens += cosine.numel()

    def spectra(self) -> Iterator[tuple[int, tuple[Spectrum, Spectrum]]]:
        """Junction numbers with their spectra behind and before the norm."""
        for number, (behind, before) in self.moments.items():
            name = f"residual.{number}"
            behind.check(name, 0)
            before.check(name, 0)
            yield number, (moment_spectrum(behind, name), moment_spectrum(before, name))

    def change(self) -> Change:
        """The means over all tokens."""
        *means, difference, energy = self.change_6.tolist()
        cosine, angle, norm_in, norm_out = (one / max(self.tokens, 1) for one in means)
        return Change(self.block, cosine, angle, norm_in, norm_out, (difference / max(energy, 1e-300)) ** 0.5)

    def dead(self) -> Neurons:
        """Neurons that hardly ever fire, and the spectrum of all."""
        name = f"the neurons of block {self.block}"
        self.neurons.check(name, 0)
        dead = int((self.active_F < DEAD * self.active_F.mean()).sum())
        return Neurons(self.block, len(self.active_F), dead, moment_spectrum(self.neurons, name))


def moment_spectrum(moment: Moment, what: str) -> Spectrum:
    """The spectrum of E[z z^T], where the sums are."""
    return spectrum(moment.sum_NN / max(moment.tokens, 1), what)


def whole_block(stream: Stream, block: int, tensors: Tensors) -> MicrotomeBlock:
    """A block at the widths that it has, on the stream's device."""
    config = copy.copy(stream.config)
    implementation = "sdpa" if config.attention_softcap is None else "eager"
    setattr(config, "_attn_implementation", implementation)  # noqa: B010 - transformers keeps it off the fields
    with torch.device("meta"):
        module = MicrotomeBlock(config, block).eval()
    cast = {
        name.removeprefix(layout.prefix(block)): tensor.to(
            stream.device, stream.dtype if tensor.is_floating_point() else tensor.dtype
        )
        for name, tensor in tensors.items()
    }
    module.load_state_dict(cast, assign=True)
    return module


def carried(module: MicrotomeBlock, x: Tensor) -> Tensor:
    """The stream as the shortcuts bring it past a block, in the basis behind it; hooks see nothing of it."""
    x = module.attn_shortcut.forward(x)
    return x if module.mlp_shortcut is None else module.mlp_shortcut.forward(x)


def push(stream: Stream, tensors: Tensors, seen: Seen) -> None:
    """Push the stream past a whole block, and count what happens on the way."""
    block, config = seen.block, stream.config
    module = whole_block(stream, block, tensors)
    if module.mlp is not None:
        module.mlp.down_proj.register_forward_pre_hook(lambda _linear, inputs: seen.activations(inputs[0]))
    if module.mlp_shortcut is not None:  # what it carries is the stream between the halves
        module.mlp_shortcut.register_forward_pre_hook(lambda _map, inputs: seen.at(2 * block + 1, inputs[0]))
    kind = (config.layer_types or [])[block]
    around = {"position_embeddings": stream.turns[kind], "attention_mask": stream.masks[kind]}
    wide = layout.residual_width(config, 2 * block)
    for rows in stream.batches(2):
        x = stream.hidden[rows, :, :wide].to(stream.device)
        seen.at(2 * block, x)
        y = module(x, **around)
        seen.passed(carried(module, x), y)
        if block + 1 == config.num_hidden_layers:
            seen.at(2 * block + 2, y)
        stream.hidden[rows, :, : y.shape[-1]] = y


@torch.inference_mode()
def activity(
    found: Opened, ids: Tensor, *, device: torch.device, dtype: torch.dtype, progress: Progress | None = None
) -> Activity:
    """Push token ids [rows, T] through the decoder, one block in memory at a time, and measure every junction.

    Raises NumericalFailure where activations overflow.
    """
    config = found.config
    stream = Stream(config, ids, device=device, dtype=dtype, progress=progress)
    junctions: dict[int, tuple[Spectrum, Spectrum]] = {}
    changes: list[Change] = []
    neurons: list[Neurons] = []
    try:
        stream.start(found.read("stem"), None, normed=True)
        for block in range(config.num_hidden_layers):
            seen = Seen(stream, block)
            push(stream, found.read(block), seen)
            junctions |= dict(seen.spectra())
            changes.append(seen.change())
            neurons.append(seen.dead())
    finally:
        stream.close()
    return Activity(junctions, tuple(changes), tuple(neurons))
