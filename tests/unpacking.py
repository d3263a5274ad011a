"""A second reader of packed files, written from docs/pack.md alone: numpy, another linear algebra, none of our code."""

import json
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import constriction
import numpy as np

Array = Any
BITS = {"float16": (10, 31, 15, 8, 8), "bfloat16": (7, 255, 127, 7, 9)}  # mantissa, exponent mask, bias; lower, upper


def value(words: Array, kind: str) -> Array:
    if kind == "float16":
        return words.view(np.float16).astype(np.float64)
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def nearest(numbers: Array, kind: str) -> Array:
    if kind == "float16":
        return numbers.astype(np.float32).astype(np.float16).view(np.uint16)
    bits = numbers.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def read(path: Path) -> dict[str, Array]:
    """The words (uint16) of every tensor under its canonical name, as [rows, columns]."""
    data = path.read_bytes()
    size = struct.unpack_from("<8sIIQ", data)[3]
    header: Any = json.loads(zlib.decompress(data[24 : 24 + size]))
    parts, at = {}, 24 + size
    for name, count, wanted in header["sections"]:
        parts[name] = data[at : at + count]
        assert zlib.crc32(parts[name]) == wanted
        at += count
    assert at == len(data)
    pieces = cut(header)
    last = [max(row_site, column_site) for *_, row_site, column_site in pieces]
    sizes = [(rows[1] - rows[0]) * (columns[1] - columns[0]) for _, rows, columns, *_ in pieces]
    taken, stack = [], [number for number, own in enumerate(last) if own < 0 for _ in range(sizes[number])]
    for site, (_, wide, centred, _) in enumerate(header["sites"]):
        count = (wide - centred) * (wide - centred + 1) // 2
        taken.append(np.array(stack[len(stack) - count :]))
        del stack[len(stack) - count :]
        stack += [number for number, own in enumerate(last) if own == site for _ in range(sizes[number])]
    body = uncoded(parts["body"], len(stack), header) if header["coded"] else np.frombuffer(parts["body"], np.uint16)
    out = {name: np.zeros((rows, columns), np.uint16) for name, rows, columns, *_ in header["tensors"]}
    records = np.cumsum([0, *header["records"]])
    for site in reversed(range(-1, len(taken))):
        mine = [number for number, own in enumerate(last) if own == site]
        body, top = (
            body[: len(body) - sum(sizes[one] for one in mine)],
            body[len(body) - sum(sizes[one] for one in mine) :],
        )
        for number in mine:
            tensor, rows, columns, *_ = pieces[number]
            view = out[header["tensors"][tensor][0]][slice(*rows), slice(*columns)]
            view[:], top = top[: view.size].reshape(view.shape), top[view.size :]
        if site >= 0:
            record = parts["records"][records[site] : records[site + 1]]
            body = np.concatenate([body, behind(site, record, taken[site], pieces, out, header)])
    assert len(body) == 0
    return out


def cut(header: Any) -> list[tuple[int, Any, Any, int, int]]:
    """Tensor, rows, columns, and the sites of both, of every piece."""
    found = []
    for tensor, (_, *sizes, _, _, _, _) in enumerate(header["tensors"]):
        along: Any = [{}, {}]
        for site, (_, wide, _, entries) in enumerate(header["sites"]):
            for _, dim, first in (one for one in entries if one[0] == tensor):
                along[dim][first, first + wide] = site
        ends = [sorted({0, sizes[dim], *(end for both in along[dim] for end in both)}) for dim in (0, 1)]
        found += [
            (tensor, rows, columns, along[0].get(rows, -1), along[1].get(columns, -1))
            for rows in pairwise(ends[0])
            for columns in pairwise(ends[1])
        ]
    return found


def behind(site: int, record: bytes, taken: Array, pieces: Any, out: Any, header: Any) -> Array:
    """The words that the rotation of a site was made of."""
    kind, (_, wide, centred, _) = header["word"], header["sites"][site]
    total = np.zeros((wide, wide))
    for number, (tensor, rows, columns, row_site, column_site) in enumerate(pieces):
        if max(row_site, column_site) == site and row_site != column_site:
            own = value(out[header["tensors"][tensor][0]][slice(*rows), slice(*columns)].copy(), kind)
            own = (own if row_site == site else own.T) / 2.0 ** header["exponents"][number]
            total += own @ own.T
    if centred:
        step = np.full(wide, wide**-0.5) - np.eye(wide)[-1]
        swap = np.eye(wide) - 2 * np.outer(step, step) / (step @ step)
        total = (swap @ total @ swap)[:-1, :-1]
    size = wide - centred
    frame = np.linalg.eigh(total)[1][:, ::-1]
    estimate = ((frame * np.frombuffer(record[: 4 * size], np.float32).astype(float)) @ frame.T)[np.triu_indices(size)]
    exponents = np.array(header["exponents"])[taken]
    found = nearest(estimate * 2.0**exponents, kind)
    return settled(record[4 * size :], found, exponents, header)


def settled(record: bytes, found: Array, exponents: Array, header: Any) -> Array:
    """The rounded estimates, put right by the rest of a record."""
    count, wide, _, checksum = struct.unpack_from("<IIII", record)
    places, number, shift, at = [], 0, 0, -1
    for byte in record[16 : 16 + wide]:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            at += number + 1
            places.append(at)
            number = shift = 0
    assert len(places) == count
    rest = record[16 + wide :]
    others = np.ones(len(found), bool)
    others[places] = False
    if header["exact"]:
        mantissa, mask, bias, *_ = BITS[header["word"]]
        near = found[others]
        kinds = np.clip(((near.astype(int) >> mantissa) & mask) - bias - exponents[others] + 12, 0, 15)
        place = np.where(near < 0x8000, near.astype(int), -(near.astype(int) & 0x7FFF) - 1)
        ans = constriction.stream.stack.AnsCoder(np.frombuffer(rest[2 * count + 16 :], np.uint32).copy())
        for one in range(16):
            scale = 2.0 ** ((rest[2 * count + one] - 64) / 8)
            model = constriction.stream.model.QuantizedLaplace(-4095, 4095, 0.0, scale)
            place[kinds == one] += ans.decode(model, int((kinds == one).sum()))
        found[others] = np.where(place >= 0, place, (-place - 1) | 0x8000)
    found[places] = np.frombuffer(rest[: 2 * count], np.uint16)
    assert zlib.crc32(found.tobytes()) == checksum
    return found


def uncoded(data: bytes, count: int, header: Any) -> Array:
    """The words of a coded body."""
    *_, lower, upper = BITS[header["word"]]
    found, at = [], 0
    for start in range(0, count, 1 << 22):
        size, code = struct.unpack_from("<II", data, at)
        counts = np.frombuffer(zlib.decompress(data[at + 8 : at + 8 + size]), np.int32)
        assert len(counts) == 1 << upper
        at += 8 + size + code
        ans = constriction.stream.stack.AnsCoder(np.frombuffer(data[at - code : at], np.uint32).copy())
        many, model = min(1 << 22, count - start), constriction.stream.model
        first = ans.decode(model.Categorical(counts / counts.sum(), perfect=False), many)
        found.append((first << lower) | ans.decode(model.Uniform(1 << lower), many))
    return np.concatenate(found).astype(np.uint16)
