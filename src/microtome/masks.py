"""Masks learned by training: which coordinates each half of a block reads and writes, and which neurons it has.

The canonical decoder is built whole and frozen. In every step all masks are drawn, one bit for every coordinate of the
spaces, and multiply what the halves read and write and what the down projections read; the loss on some calibration
windows, and how far the size is from what is wanted, teach the logits that the bits are drawn from.

In memory are the weights once, the logits' network with its optimiser, and the activations of a batch: where those are
more than `HELD` bytes, only the stream in front of every block is kept, and blocks run again on the way back.

Letters: S masks (spaces), N coordinates of all of them one behind the other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microtome import inner, layout
from microtome.calibrate import Progress
from microtome.errors import BadInput, NumericalFailure
from microtome.gradients import decoder
from microtome.modeling_microtome import MicrotomeConfig, MicrotomeForCausalLM
from microtome.planner import Opened
from microtome.space import Kind, Space
from microtome.stats import Learning, Masks, Stat

OFFSET = 3.0  # added to every logit: masks begin almost whole
TEMPERATURE = 0.4  # of soft masks
CODE, HIDDEN = 32, 64  # of the hypernetwork: numbers of a mask's own vector, units of the GRU in each direction
DECAY, CLIP = 0.05, 1.0  # AdamW's weight decay; the largest norm of a step's gradient
HELD = 2 << 30
ORDER = (Kind.ATTN_READ, Kind.ATTN_WRITE, Kind.MLP_READ, Kind.FFN, Kind.MLP_WRITE)


def learned(  # noqa: PLR0913
    opened: Opened,
    ids: Tensor,
    how: Learning,
    wanted: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> dict[tuple[int, Stat], Masks]:
    """The logits of every block's masks, learned so that the blocks store about `wanted` numbers.

    Raises BadInput where there are fewer windows than a batch takes, NumericalFailure where a loss or a gradient is not
    finite.
    """
    if len(ids) < how.batch:
        raise BadInput(
            f"a batch of {how.batch} windows cannot be drawn from {len(ids)}: give more text, or less batch."
        )
    spaces = spaces_of(opened.config)
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator().manual_seed(how.seed)
        network = networks(how.network, [space.size for space in spaces], generator).to(device)
        if wanted < layout.count_blocks(opened.config):
            train(opened, ids, how, wanted, network, generator, dtype, progress)
        logit_N = (OFFSET + network()).detach().float().cpu()
    split = dict(zip((space.name for space in spaces), logit_N.split([space.size for space in spaces]), strict=True))
    blocks = range(opened.config.num_hidden_layers)
    return {
        (block, Stat.MASKS): Masks(
            {name: one.clone() for name, one in split.items() if name.startswith(f"{block}.")}, how, wanted
        )
        for block in blocks
    }


def spaces_of(config: MicrotomeConfig) -> list[Space]:
    """All spaces that have a mask: block by block, in the order of the paper."""
    found: list[Space] = []
    for block in range(config.num_hidden_layers):
        found += sorted(inner.spaces_of(config, block, ORDER).values(), key=lambda space: ORDER.index(space.kind))
    return found


def train(  # noqa: PLR0913, PLR0917
    opened: Opened,
    ids: Tensor,
    how: Learning,
    wanted: float,
    network: nn.Module,
    generator: torch.Generator,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Teach the network, in place."""
    spaces, device = spaces_of(opened.config), next(network.parameters()).device
    model = frozen(opened, device, dtype, tokens=how.batch * ids.shape[1])
    now: dict[str, Tensor] = {}
    wear(model, now)
    size, widths = Size.of(opened.config, spaces), [space.size for space in spaces]
    twice = how.estimator == "gumbel" and opened.config.mlp_gated
    optimiser = torch.optim.AdamW(network.parameters(), lr=how.rate, weight_decay=DECAY)
    for number, rows in enumerate(batches(len(ids), how, generator)):
        mask_N, counted_N = drawn(OFFSET + network(), how.estimator, generator)
        now.update(worn(spaces, mask_N.to(dtype), twice=twice))
        counts_S = torch.stack([one.sum(dtype=torch.float64) for one in counted_N.split(widths)])
        loss = next_token_loss(model, ids[rows].to(device))
        total = loss + how.penalty * (size(counts_S) / wanted).log().abs()
        optimiser.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        check_finite(float(loss.detach()), float(norm), number + 1)
        optimiser.step()
        if progress is not None:
            progress("masks", (number + 1) / how.steps)


def check_finite(loss: float, norm: float, step: int) -> None:
    """Say in which step the loss, or the norm of its gradient, stopped being a number."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise NumericalFailure(
            f"the loss is {loss:.3g} and the norm of its gradient {norm:.3g} in step {step} of learning masks: the "
            "model overflows on this text. Check the weights with `microtome evaluate`, or give other --data."
        )


def frozen(opened: Opened, device: torch.device, dtype: torch.dtype, *, tokens: int) -> MicrotomeForCausalLM:
    """The whole decoder with weights that want no gradient; blocks run twice where activations need it."""
    model = decoder(opened, device, dtype).requires_grad_(False)
    if activations(opened.config, tokens) * dtype.itemsize > HELD:
        for block in model.model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def activations(config: MicrotomeConfig, tokens: int) -> int:
    """About how many numbers the way back through all blocks needs of the way there."""
    each = 0
    for block in range(config.num_hidden_layers):
        sizes = config.per_layer_config[block]
        heads = 2 * sizes.num_attention_heads * (sizes.head_dim + sizes.v_head_dim)
        each += 12 * sizes.residual_in + 5 * sizes.intermediate_size + heads
    return each * tokens


def next_token_loss(model: MicrotomeForCausalLM, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of every token but a window's first, nats."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def batches(rows: int, how: Learning, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of windows, a batch for every step: all of them in a new order before any comes again."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(how.steps):
        if len(left) < how.batch:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[: how.batch]
        left = left[how.batch :]


# --- masks in place -------------------------------------------------------------------------------------------------


def worn(spaces: Sequence[Space], mask_N: Tensor, *, twice: bool = False) -> dict[str, Tensor]:
    """Masks by space; with `twice` those of neurons count in the gate and beside it."""
    pieces = mask_N.split([space.size for space in spaces])
    return {
        space.name: one * one if twice and space.kind is Kind.FFN else one
        for space, one in zip(spaces, pieces, strict=True)
    }


def wear(model: MicrotomeForCausalLM, now: Mapping[str, Tensor]) -> None:
    """Multiply what halves read and write, and what down projections read, by the masks that `now` holds by space."""

    def masked(name: str, x: Tensor) -> Tensor:
        return x * now[name] if name in now else x

    def reads(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _m, seen: (masked(name, seen[0]), *seen[1:]))

    def written(name: str, out: Any) -> Any:
        return (masked(name, out[0]), *out[1:]) if isinstance(out, tuple) else masked(name, out)

    for name, module in model.named_modules():
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        if half := {"self_attn": "attn", "mlp": "mlp"}.get(rest):
            reads(module, f"{block}.{half}_read")
            module.register_forward_hook(lambda _m, _seen, out, name=f"{block}.{half}_write": written(name, out))
        elif rest == "mlp.down_proj":
            reads(module, f"{block}.ffn")


def drawn(logit_N: Tensor, estimator: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks [N] for the loss and for the size: bits with the gradient of ReinMax, or the release's two draws."""
    if estimator == "reinmax":
        bits_N = reinmax(logit_N, torch.rand(len(logit_N), generator=generator).to(logit_N))
        return bits_N, bits_N
    soft_N, other_N = (softly(logit_N, torch.rand(len(logit_N), generator=generator).to(logit_N)) for _ in range(2))
    return soft_N, other_N + (other_N.round() - other_N).detach()


def reinmax(logit_N: Tensor, uniform_N: Tensor) -> Tensor:
    """Bits [N] that are 1 with probability sigmoid(logit), where a uniform number lies below it.

    Their gradient is dL/dm (1 - P(m)) / 2: with p = P(1) and m drawn, E = p (1 - p) (L'(1) + L'(0)) / 2, the
    trapezoid of L(1) - L(0), exact where L is quadratic in the bit.
    """
    chance_N = logit_N.detach().sigmoid()
    bits_N = (uniform_N < chance_N).to(logit_N)
    slope_N = torch.where(bits_N > 0, 1.0 - chance_N, chance_N) / 2
    return bits_N + slope_N * (logit_N - logit_N.detach())


def softly(logit_N: Tensor, uniform_N: Tensor) -> Tensor:
    """The release's soft mask [N]: sigmoid((logit + Gumbel) / temperature)."""
    gumbel_N = -(-uniform_N.clamp_min(1e-20).log()).clamp_min(1e-20).log()
    return ((logit_N + gumbel_N) / TEMPERATURE).sigmoid()


# --- what masks store -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Size:
    """What the blocks store, as a function of how many coordinates every mask keeps: 1, n_i, and n_i n_j, weighted."""

    constant: float
    singles: Tensor
    pairs: tuple[tuple[int, int, float], ...]

    @classmethod
    def of(cls, config: MicrotomeConfig, spaces: Sequence[Space]) -> "Size":
        """Counted from the shapes of all tensors, and an index for every subset that has none yet."""
        places = {(axis.tensor, axis.dim): number for number, space in enumerate(spaces) for axis in space.axes}
        constant, singles, pairs = 0.0, torch.zeros(len(spaces), dtype=torch.float64), dict[tuple[int, int], float]()
        for block in range(config.num_hidden_layers):
            for name, shape in layout.shapes(config, block).items():
                masked = [places[name, dim] for dim in range(len(shape)) if (name, dim) in places]
                rest = prod(wide for dim, wide in enumerate(shape) if (name, dim) not in places)
                if len(masked) == 2:
                    pairs[masked[0], masked[1]] = pairs.get((masked[0], masked[1]), 0.0) + rest
                elif masked:
                    singles[masked[0]] += rest
                else:
                    constant += rest
        for number, space in enumerate(spaces):
            if space.kind in layout.SUBSETS and not any(axis.tensor.endswith("_index") for axis in space.axes):
                singles[number] += 1
        return cls(constant, singles, tuple((i, j, value) for (i, j), value in pairs.items()))

    def __call__(self, counts_S: Tensor) -> Tensor:
        """Numbers stored, fp64, for counts [S]."""
        first, second = (torch.tensor([pair[end] for pair in self.pairs], device=counts_S.device) for end in (0, 1))
        weight = torch.tensor([pair[2] for pair in self.pairs], dtype=torch.float64, device=counts_S.device)
        together = (weight * counts_S[first] * counts_S[second]).sum() if self.pairs else 0.0
        return self.constant + (self.singles.to(counts_S) * counts_S).sum() + together


# --- where logits come from -----------------------------------------------------------------------------------------


def networks(name: str, sizes: Sequence[int], generator: torch.Generator) -> nn.Module:
    """What makes the logits of masks of these sizes."""
    return Hypernetwork(sizes, generator) if name == "hyper" else Direct(sum(sizes))


class Direct(nn.Module):
    """A logit of its own for every coordinate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.logit_N = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        """All logits [N]."""
        return self.logit_N


class Hypernetwork(nn.Module):
    """Logits that masks have in common: vectors of the masks, fixed, through a GRU both ways, and a matrix each."""

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        wide = 2 * HIDDEN
        self.code = nn.Buffer(torch.randn(len(sizes), 1, CODE, generator=generator))
        self.gru = nn.GRU(CODE, HIDDEN, bidirectional=True, device="meta").to_empty(device="cpu")
        self.norm = nn.LayerNorm(wide)
        self.matrix_NH = nn.Parameter(uniform((sum(sizes), wide), wide, generator))
        self.at_N = nn.Buffer(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))
        with torch.no_grad():
            for parameter in self.gru.parameters():
                parameter.copy_(uniform(tuple(parameter.shape), HIDDEN, generator))

    def forward(self) -> Tensor:
        """All logits [N]."""
        seen_SH = nn.functional.gelu(self.norm(self.gru(self.code)[0][:, 0]))
        return (self.matrix_NH * seen_SH[self.at_N]).sum(-1)


def uniform(shape: tuple[int, ...], wide: int, generator: torch.Generator) -> Tensor:
    """Torch's own start of a linear that reads `wide` numbers, and of a GRU with `wide` units."""
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * wide**-0.5
