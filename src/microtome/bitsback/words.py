"""16-bit words: their values, their order, and what a record says of those that do not come back by themselves.

A record holds the eigenvalues of a site; a list of words, by place; in exact mode what every other word is off by,
counted in representable numbers; and a checksum.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microtome.errors import BadCheckpoint, UnsupportedModel

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}  # relative to a scale: four units in its last place
GUARD = 2.0**-28  # relative to a word's scale: what is so near to another rounding is listed, whatever computes it
FAR = 4095  # differences beyond are listed
CLASSES = 16  # of words by their binary exponent below their scale, each with a model of its own
HEAD = struct.Struct("<IIII")  # words listed, bytes of their places, 32-bit words of the coder, checksum


def library() -> Any:
    """The entropy coder's streams."""
    try:
        import constriction
    except ImportError as error:
        raise UnsupportedModel(
            "packing needs the entropy coder constriction: pip install 'microtome[pack]'."
        ) from error
    coder: Any = constriction
    return coder.stream


def values(words: Tensor, dtype: torch.dtype) -> Tensor:
    """What words (int16) stand for, in fp64."""
    return words.view(dtype).double()


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest words (int16); by way of fp32, as hardware does."""
    return numbers.float().to(dtype).view(torch.int16)


def order(words: Tensor) -> Tensor:
    """A whole number for every word, in the order of what they stand for; neighbours differ by one."""
    wide = words.to(torch.int32)
    return torch.where(wide >= 0, wide, -(wide & 0x7FFF) - 1)


def unorder(numbers: Tensor) -> Tensor:
    """The words of such numbers."""
    return torch.where(numbers >= 0, numbers, (-(numbers + 1)) | -0x8000).to(torch.int16)


def classes(words: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """By word, how its binary exponent stands to its scale: 0 far below, CLASSES - 1 well above."""
    wide = words.to(torch.int32)
    own = ((wide >> 10) & 31) - 15 if dtype is torch.float16 else ((wide >> 7) & 255) - 127
    return (own - exponents.to(torch.int32) + CLASSES - 4).clamp(0, CLASSES - 1)


# --- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Expected:
    """What a decoder comes to for the words of a site before it looks at the list: the same on every machine."""

    numbers: Tensor  # [W] fp64, recovered, times their scales
    scales: Tensor  # [W] fp64, powers of two
    exponents: Tensor  # [W], theirs
    dtype: torch.dtype

    @property
    def words(self) -> Tensor:
        """The nearest words."""
        return rounded(self.numbers, self.dtype)

    @property
    def unsure(self) -> Tensor:
        """Where another machine's last bits might round otherwise."""
        guard = GUARD * self.scales
        return rounded(self.numbers - guard, self.dtype) != rounded(self.numbers + guard, self.dtype)


def record(
    eigenvalues_T: Tensor, found: Expected, wanted_W: Tensor, tolerance_W: Tensor | None
) -> tuple[bytes, Tensor]:
    """The record of a site, and the words that a decoder makes of it.

    `wanted_W` are the true words; with a `tolerance_W` what is nearer stays as it comes, without one all are exact.
    """
    words = found.words
    listed, off = found.unsure, order(wanted_W) - order(words)
    if tolerance_W is None:
        listed |= off.abs() > FAR
    else:
        listed |= (values(words, found.dtype) - values(wanted_W, found.dtype)).abs() > tolerance_W
    places = listed.nonzero()[:, 0]
    coded = b"" if tolerance_W is not None else coded_differences(off[~listed], words[~listed], found, ~listed)
    out = words.clone()
    if tolerance_W is None:
        out = wanted_W
    else:
        out[places] = wanted_W[places]
    steps = varints(torch.diff(places, prepend=torch.tensor([-1])) - 1)
    head = HEAD.pack(len(places), len(steps), max(len(coded) - CLASSES, 0) // 4, checksum(out))
    # All of a record is little-endian, as are the machines that this runs on.
    parts = (eigenvalues_T.float().numpy().tobytes(), head, steps, wanted_W[places].numpy().tobytes(), coded)
    return b"".join(parts), out


def replayed(data: bytes, found: Expected, size: int, *, exact: bool, name: str) -> Tensor:
    """The words of a site by its record. Raises BadCheckpoint where they are not those that were packed."""
    count, wide, coded, wanted = HEAD.unpack_from(data, 4 * size)
    at = 4 * size + HEAD.size
    places = unvarints(data[at : at + wide])
    out, listed = found.words, torch.zeros(len(found.numbers), dtype=torch.bool)
    if len(places) != count or len(data) != at + wide + 2 * count + 4 * coded + (CLASSES if exact else 0):
        raise broken(name)
    places = (places + 1).cumsum(0) - 1
    if count and int(places[-1]) >= len(listed):
        raise broken(name)
    listed[places] = True
    if exact:
        near = out[~listed]
        try:
            off = differences(data[at + wide + 2 * count :], near, found, ~listed)
        except (ValueError, AssertionError) as error:  # what the coder says of a code that is none
            raise broken(name) from error
        out[~listed] = unorder(order(near) + off)
    out[places] = torch.frombuffer(bytearray(data[at + wide :][: 2 * count] or b"\0\0"), dtype=torch.int16)[:count]
    if checksum(out) != wanted:
        raise broken(name)
    return out


def broken(name: str) -> BadCheckpoint:
    """That the words of a site did not come back."""
    return BadCheckpoint(
        f"the words behind {name} do not come back as they were packed: the file is damaged, or this machine's linear "
        "algebra is too different. Unpack it where it was packed, or pack the model again."
    )


def eigenvalues(data: bytes, size: int, name: str) -> Tensor:
    """The eigenvalues [T] at the head of a record."""
    if len(data) < 4 * size + HEAD.size:
        raise broken(name)
    return torch.frombuffer(bytearray(data[: 4 * size]), dtype=torch.float32)


def checksum(words: Tensor) -> int:
    """CRC-32 of words, little-endian."""
    return zlib.crc32(words.contiguous().numpy().data)


def varints(numbers: Tensor) -> bytes:
    """Numbers in groups of seven bits, the lowest first, the highest bit set in all but the last."""
    out = bytearray()
    for number in numbers.tolist():
        rest = number
        while rest > 127:
            out.append(rest & 127 | 128)
            rest >>= 7
        out.append(rest)
    return bytes(out)


def unvarints(data: bytes) -> Tensor:
    """The numbers again."""
    found, number, shift = list[int](), 0, 0
    for byte in data:
        number |= (byte & 127) << shift
        shift = shift + 7 if byte & 128 else 0
        if not shift:
            found.append(number)
            number = 0
    return torch.tensor(found, dtype=torch.int64)


# --- entropy coding -------------------------------------------------------------------------------------------------


def spread(code: int) -> float:
    """The scale of a Laplace distribution by its code, eight steps to a factor of two."""
    return 2.0 ** ((code - 64) / 8)


def coded_differences(off: Tensor, words: Tensor, found: Expected, chosen: Tensor) -> bytes:
    """A code for the scale of every class, then all differences by an ANS coder, class 0 on top."""
    stream = library()
    kind, coder, codes = (
        classes(words, found.exponents[chosen], found.dtype),
        stream.stack.AnsCoder(),
        bytearray(CLASSES),
    )
    for number in reversed(range(CLASSES)):
        mine = off[kind == number]
        if len(mine):
            mean = max(float(mine.double().abs().mean()), 2.0**-6)
            codes[number] = min(max(round(8 * math.log2(mean)) + 64, 0), 255)
            model = stream.model.QuantizedLaplace(-FAR, FAR, 0.0, spread(codes[number]))
            coder.encode_reverse(mine.to(torch.int32).numpy(), model)
    return bytes(codes) + coder.get_compressed().tobytes()


def differences(data: bytes, words: Tensor, found: Expected, chosen: Tensor) -> Tensor:
    """The differences again, int32, in the order of the words."""
    import numpy as np

    stream = library()
    kind = classes(words, found.exponents[chosen], found.dtype)
    coder = stream.stack.AnsCoder(np.frombuffer(data, dtype=np.uint32, offset=CLASSES).copy())
    off = torch.zeros(len(words), dtype=torch.int32)
    for number in range(CLASSES):
        mine = kind == number
        if count := int(mine.sum()):
            model = stream.model.QuantizedLaplace(-FAR, FAR, 0.0, spread(data[number]))
            off[mine] = torch.from_numpy(coder.decode(model, count))
    return off
