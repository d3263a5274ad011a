"""A decoder's words put on a stack and taken off it again, one site after the other.

Forward: the base is pushed; then, for every site, words are taken off, a rotation is made of them, and the pieces that
are final behind it are pushed, turned and rounded once. What is left is the body. Backward: the pieces of the last site
are taken off, its rotation is found in them, and the words that it was made of go back on top; and so on to the base.
A packer goes backward too, to see what does not come back, and keeps a record of it for every site.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from microtome.bitsback import turns, words
from microtome.bitsback.sites import Cut, Piece
from microtome.errors import BadCheckpoint, NumericalFailure

Report = Callable[[float], None]
"""Called with how much is done, from 0 to 1."""


@dataclass(frozen=True, eq=False)
class Packed:
    """What a file holds of the words of a decoder."""

    cut: Cut
    dtype: torch.dtype
    exponents: tuple[int, ...]  # by piece: its scale is 2 to this
    body: Tensor  # int16
    records: tuple[bytes, ...]  # by site
    exact: bool


@dataclass
class Stack:
    """Words from the bottom to `top`; the buffer is as long as the stack ever gets."""

    buffer: Tensor
    top: int = 0

    def push(self, one: Tensor) -> None:
        """Put words on top."""
        self.buffer[self.top : self.top + len(one)] = one
        self.top += len(one)

    def pop(self, count: int) -> Tensor:
        """Take the topmost words off, in the order in which they lie."""
        if count > self.top:
            raise BadCheckpoint(f"the stack is {count - self.top:,} words short: this is no packing of these tensors.")
        self.top -= count
        return self.buffer[self.top : self.top + count].clone()


def highest(cut: Cut) -> int:
    """Words of the stack where it is highest."""
    steps = [sum(cut.pieces[number].words for number in cut.final[-1])]
    for number, site in enumerate(cut.sites):
        steps += [-site.taken, sum(cut.pieces[one].words for one in cut.final[number])]
    return max(accumulate(steps))


@dataclass
class Words:
    """The words of all tensors, by name, as matrices of int16."""

    cut: Cut
    dtype: torch.dtype
    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def empty(cls, cut: Cut, dtype: torch.dtype) -> "Words":
        """Room for all of them."""
        return cls(cut, dtype, {name: torch.empty(size, dtype=torch.int16) for name, *size in cut.tensors})

    @classmethod
    def given(cls, cut: Cut, tensors: Mapping[str, Tensor]) -> "Words":
        """Those of tensors [rows, columns] of one type."""
        dtype = next(iter(tensors.values())).dtype
        return cls(cut, dtype, {name: tensor.contiguous().view(torch.int16) for name, tensor in tensors.items()})

    def of(self, piece: Piece) -> Tensor:
        """The words of a piece: a view."""
        return self.held[self.cut.tensors[piece.tensor][0]][slice(*piece.rows), slice(*piece.columns)]

    def carriers(self, site: int, exponents: tuple[int, ...]) -> list[Tensor]:
        """What a site's rotation is told from, [K, columns] each, in fp64, every piece at scale one."""
        found: list[Tensor] = []
        for number in self.cut.final[site]:
            piece = self.cut.pieces[number]
            if piece.carries(site):
                value = words.values(self.of(piece), self.dtype) * 2.0 ** -exponents[number]
                found.append(value if piece.row_site == site else value.T)
        return found

    def gram(self, site: int, exponents: tuple[int, ...]) -> Tensor:
        """C C^T [T, T] of a site's carrier."""
        one = self.cut.sites[site]
        return turns.gram(self.carriers(site, exponents), one.size, centred=one.centred)

    def frame(self, site: int, exponents: tuple[int, ...]) -> Tensor:
        """The frame [T, T] of a site's carrier."""
        return turns.frame(self.gram(site, exponents), self.cut.sites[site].name)

    @property
    def exponents(self) -> tuple[int, ...]:
        """By piece: its scale is 2 to this."""
        return tuple(turns.exponent(words.values(self.of(piece), self.dtype)) for piece in self.cut.pieces)


def spread(popped: list[tuple[int, int]], by_piece: tuple[int, ...]) -> Tensor:
    """A number of the pieces, for every word that was taken off them."""
    counts = torch.tensor([count for _, count in popped])
    return torch.tensor([by_piece[piece] for piece, _ in popped]).repeat_interleave(counts)


def scales(popped: list[tuple[int, int]], exponents: tuple[int, ...]) -> Tensor:
    """Two to the exponent of its piece, in fp64, for every word that was taken off them."""
    counts = torch.tensor([count for _, count in popped])
    powers = torch.tensor([2.0 ** exponents[piece] for piece, _ in popped], dtype=torch.float64)
    return powers.repeat_interleave(counts)


# --- forward --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def packed(
    cut: Cut, tensors: Mapping[str, Tensor], *, tolerance: float | None = 2.0**-8, progress: Report | None = None
) -> tuple[Packed, Words]:
    """Words of 16 bits packed, and the words that come out again; tensors are [rows, columns], of one type.

    Words come back within `tolerance` times the scale of their piece, which is its root mean square or up to half of
    it, or exactly where it is None.
    """
    dtype = next(iter(tensors.values())).dtype
    held = Words.given(cut, tensors)
    exponents = held.exponents
    report, popped, count = progress or (lambda _fraction: None), cut.popped(), len(cut.sites)
    stack, taken, eigen = Stack(torch.empty(highest(cut), dtype=torch.int16)), list[Tensor](), list[Tensor]()
    turned, needed = dict[int, Tensor](), last_uses(cut)
    for number in range(-1, count):
        if number >= 0:
            site = cut.sites[number]
            taken.append(stack.pop(site.taken))
            upper_W = words.values(taken[-1], dtype) / scales(popped[number], exponents)
            drawn_TT, values_T = turns.drawn(turns.symmetric(upper_W, site.turned))
            frame_TT = held.frame(number, exponents)
            turned[number] = turns.turn(frame_TT, drawn_TT, site.size, centred=site.centred)
            eigen.append(values_T)
        for one in cut.final[number]:
            piece = cut.pieces[one]
            stack.push(final(held.of(piece), piece, turned, cut, dtype).reshape(-1))
        for done in needed.get(number, []):
            del turned[done]
        report((number + 1) / (2 * count or 1))
    del held
    body = stack.buffer[: stack.top].clone()

    def note(site: int, found: words.Expected) -> Tensor:
        allowed = None if tolerance is None else tolerance * found.scales
        made, out = words.record(eigen[site], found, taken[site], allowed)
        records[site] = made
        return out

    records = [b""] * count
    whole = Packed(cut, dtype, exponents, body, (), tolerance is None)
    out = backward(whole, stack, eigen, note, lambda fraction: report(0.5 + fraction / 2))
    return Packed(cut, dtype, exponents, body, tuple(records), tolerance is None), out


@torch.inference_mode()
def degenerate(cut: Cut, tensors: Mapping[str, Tensor]) -> list[str]:
    """The sites whose rotations could not be told from the weights; turns of other sites do not change that."""
    held, found = Words.given(cut, tensors), list[str]()
    exponents = held.exponents
    for number, site in enumerate(cut.sites):
        try:
            turns.check_distinct(torch.linalg.eigvalsh(held.gram(number, exponents)).flip(0), site.name)
        except NumericalFailure:
            found.append(site.name)
    return found


def last_uses(cut: Cut) -> dict[int, list[int]]:
    """By site, which sites' rotations no later piece asks for."""
    last: dict[int, int] = {}
    for piece in cut.pieces:
        for site in (piece.row_site, piece.column_site):
            last[site] = max(last.get(site, -1), piece.last)
    found: dict[int, list[int]] = {}
    for site, number in last.items():
        if site >= 0:
            found.setdefault(number, []).append(site)
    return found


def final(own: Tensor, piece: Piece, turned: Mapping[int, Tensor], cut: Cut, dtype: torch.dtype) -> Tensor:
    """The words of a piece, turned by its sites and rounded once."""
    if piece.last < 0:
        return own
    value = words.values(own, dtype)
    if piece.row_site >= 0:
        value = turned[piece.row_site] @ value
    if piece.column_site >= 0:
        value = value @ turned[piece.column_site].T
    out = words.rounded(value, dtype)
    if not torch.isfinite(out.view(dtype)).all():
        raise NumericalFailure(
            f"{cut.tensors[piece.tensor][0]} leaves the range of {str(dtype).removeprefix('torch.')} when "
            f"{cut.sites[piece.last].name} is turned: pack it as bfloat16."
        )
    return out


# --- backward -------------------------------------------------------------------------------------------------------


def backward(
    whole: Packed, stack: Stack, eigen: list[Tensor], settle: Callable[[int, words.Expected], Tensor], report: Report
) -> Words:
    """All words, from a stack that is the body; `settle` says what a site's words really are."""
    cut, dtype = whole.cut, whole.dtype
    out, popped = Words.empty(cut, dtype), cut.popped()
    for number in reversed(range(-1, len(cut.sites))):
        for one in reversed(cut.final[number]):
            view = out.of(cut.pieces[one])
            view[:] = stack.pop(view.numel()).reshape(view.shape)
        if number >= 0:
            numbers = turns.recovered(out.frame(number, whole.exponents), eigen[number].float())
            by_word = scales(popped[number], whole.exponents)
            found = words.Expected(numbers * by_word, by_word, spread(popped[number], whole.exponents), dtype)
            stack.push(settle(number, found))
        report(1 - (number + 1) / (len(cut.sites) + 1))
    if stack.top:
        raise BadCheckpoint(f"{stack.top:,} words are left on the stack: this is no packing of these tensors.")
    return out


@torch.inference_mode()
def unpacked(whole: Packed, progress: Report | None = None) -> dict[str, Tensor]:
    """The tensors [rows, columns] again. Raises BadCheckpoint where they are not those that were packed."""
    sites = whole.cut.sites
    wanted = whole.cut.words - whole.cut.saved
    if len(whole.body) != wanted:
        raise BadCheckpoint(f"the body has {len(whole.body):,} words instead of {wanted:,}: the file is damaged.")
    stack = Stack(torch.empty(highest(whole.cut), dtype=torch.int16))
    stack.push(whole.body)
    eigen = [words.eigenvalues(data, one.turned, one.name) for data, one in zip(whole.records, sites, strict=True)]

    def settle(site: int, found: words.Expected) -> Tensor:
        one = sites[site]
        return words.replayed(whole.records[site], found, one.turned, exact=whole.exact, name=one.name)

    out = backward(whole, stack, eigen, settle, progress or (lambda _fraction: None))
    return {name: tensor.view(whole.dtype) for name, tensor in out.held.items()}
