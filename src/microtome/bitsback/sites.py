"""Which turns leave a decoder's function as it is, and which words each of them moves.

A site is a set of coordinates that any orthogonal matrix may turn: of the stream (one site for all junctions that the
shortcuts tie to each other), of the columns of a low-rank shortcut, of the value channels of a key-value group, and of
its query-key channels where no rotary turns them. Sites are derived from `layout`, never from an architecture's names.

The places that sites take along the axes cut every tensor into rectangles, the pieces. A piece is final when the last
site that moves it has been turned; pieces that no site moves are the base.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch

from microtome import layout
from microtome.errors import BadPlan
from microtome.modeling_microtome import MicrotomeConfig
from microtome.space import Role, Symmetry

Steady = Callable[[str, int, int], bool]
"""Whether a gain is the same on all coordinates from one to another, or a norm's bias zero there."""

OVERHEAD = 32  # bytes of a site beside its eigenvalues, about


class Lies(NamedTuple):
    """Where coordinate 0 of a site lies: the others follow it along the dimension."""

    tensor: str
    dim: int
    first: int


@dataclass(frozen=True)
class Site:
    """`size` coordinates that may be turned together; where centred, by turns that leave the uniform vector."""

    name: str
    size: int
    centred: bool
    axes: tuple[Lies, ...]

    @property
    def turned(self) -> int:
        """The size t of the rotation."""
        return self.size - self.centred

    @property
    def taken(self) -> int:
        """Words that are taken from the stack to choose the rotation: t (t + 1) / 2."""
        return self.turned * (self.turned + 1) // 2

    @property
    def saved(self) -> int:
        """Words that are saved: t (t - 1) / 2, the dimension of the group; t eigenvalues go into the record."""
        return self.turned * (self.turned - 1) // 2

    @property
    def pays(self) -> bool:
        """Whether what is saved is more than its eigenvalues and its record take."""
        return 2 * (self.taken - 2 * self.turned) > OVERHEAD


class Piece(NamedTuple):
    """A rectangle of a tensor, and the numbers of the sites that turn its rows and its columns (-1: none does)."""

    tensor: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    row_site: int
    column_site: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def words(self) -> int:
        """Numbers in it."""
        return prod(self.shape)

    @property
    def last(self) -> int:
        """The site behind which it is final; -1 for the base."""
        return max(self.row_site, self.column_site)

    def carries(self, site: int) -> bool:
        """Whether the site can be told from it: it is final there, and not turned by it on both sides."""
        return self.last == site and self.row_site != self.column_site


@dataclass(frozen=True)
class Cut:
    """Tensors (name, rows, columns; a vector is one column) cut by sites, in the order in which they are turned."""

    tensors: tuple[tuple[str, int, int], ...]
    sites: tuple[Site, ...]

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All rectangles, in order of tensor, row and column. Raises BadPlan where two sites claim one place."""
        numbers = {name: number for number, (name, _, _) in enumerate(self.tensors)}
        claims: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}
        for site, one in enumerate(self.sites):
            for tensor, dim, first in one.axes:
                claims.setdefault((numbers[tensor], dim), {})[first] = (first + one.size, site)
        found: list[Piece] = []
        for number, (name, *sizes) in enumerate(self.tensors):
            rows, columns = (stretches(claims.get((number, dim), {}), sizes[dim], name) for dim in (0, 1))
            found += [Piece(number, row, col, a, b) for *row, a in rows for *col, b in columns]  # type: ignore[misc]
        return tuple(found)

    @cached_property
    def final(self) -> dict[int, list[int]]:
        """By site (-1: the base) the numbers of the pieces that are pushed behind it."""
        found: dict[int, list[int]] = {number: [] for number in range(-1, len(self.sites))}
        for number, piece in enumerate(self.pieces):
            found[piece.last].append(number)
        return found

    def columns(self, site: int) -> int:
        """Numbers that the carrier of a site has for each of its coordinates."""
        pieces = (self.pieces[number] for number in self.final[site])
        return sum(one.words for one in pieces if one.carries(site)) // self.sites[site].size

    def popped(self) -> list[list[tuple[int, int]]]:
        """By site, which pieces' words it takes off the stack, and how many of each, bottom first.

        Raises BadPlan where the stack has fewer words than a site needs.
        """
        stack = [(number, self.pieces[number].words) for number in self.final[-1]]
        found: list[list[tuple[int, int]]] = []
        for number, site in enumerate(self.sites):
            missing, mine = site.taken, list[tuple[int, int]]()
            while missing:
                if not stack:
                    raise BadPlan(
                        f"the stack has {site.taken - missing:,} of {site.taken:,} words that {site.name} needs: "
                        f"leave it out, with --leave {site.name}."
                    )
                piece, have = stack.pop()
                used = min(have, missing)
                mine.insert(0, (piece, used))
                missing -= used
                if have > used:
                    stack.append((piece, have - used))
            found.append(mine)
            stack += [(one, self.pieces[one].words) for one in self.final[number]]
        return found

    @property
    def words(self) -> int:
        """Numbers in all tensors."""
        return sum(rows * columns for _, rows, columns in self.tensors)

    @property
    def saved(self) -> int:
        """Words that the stack ends up without: what all sites take."""
        return sum(site.taken for site in self.sites)


def stretches(claims: Mapping[int, tuple[int, int]], size: int, name: str) -> list[tuple[int, int, int]]:
    """From, to and site (-1: none) along one axis, by what sites claim of it (from: to and site)."""
    found: list[tuple[int, int, int]] = []
    at = 0
    for first, (stop, site) in sorted(claims.items()):
        if first < at or stop > size:
            raise BadPlan(f"sites overlap on {name}, or leave it: this is no packing of it.")
        found += [(at, first, -1)] if first > at else []
        found.append((first, stop, site))
        at = stop
    return [*found, (at, size, -1)] if at < size else found


# --- which turns there are ------------------------------------------------------------------------------------------


class Tie(NamedTuple):
    """Two junctions whose first `joined` coordinates turn alike; the first `fixed` ones not at all."""

    before: int
    after: int
    joined: int
    fixed: int


def ties(config: MicrotomeConfig) -> Iterator[Tie]:
    """What every shortcut, and a tied table, ask of the turns of the junctions that they join."""
    for _, kind, before, after in halves(config):
        common = min(layout.residual_width(config, before), layout.residual_width(config, after))
        yield Tie(before, after, 0 if kind in ("dense", "diagonal") else common, common if kind == "diagonal" else 0)
    last = 2 * config.num_hidden_layers
    if config.tie_word_embeddings and not config.head_adapter:
        wide, first = config.hidden_size, layout.residual_width(config, 0)
        even = wide == first == layout.table_width(config)
        yield Tie(0, last, min(wide, first), 0 if even else max(wide, first))


def halves(config: MicrotomeConfig) -> Iterator[tuple[str, str, int, int]]:
    """Name, kind and both junctions of every shortcut."""
    for block in range(config.num_hidden_layers):
        sizes: Any = config.per_layer_config[block]
        places = [layout.junction(config, block, place) for place in ("in", "mid", "out")]
        if config.parallel != "none":
            yield f"{layout.prefix(block)}attn_shortcut", sizes.attn_shortcut, places[0], places[2]
        else:
            yield f"{layout.prefix(block)}attn_shortcut", sizes.attn_shortcut, places[0], places[1]
            yield f"{layout.prefix(block)}mlp_shortcut", sizes.mlp_shortcut, places[1], places[2]


def stream_axes(config: MicrotomeConfig) -> dict[int, list[tuple[str, int, Role]]]:
    """By junction: tensor, dimension and role of all that uses its coordinates, shortcuts and a tied adapter too."""
    stored = {name for part in layout.parts(config) for name in layout.shapes(config, part)}
    found: dict[int, list[tuple[str, int, Role]]] = {number: [] for number in layout.junctions(config)}
    for number, tensor, dim, role in layout.residual_axes(config):
        found[number].append((tensor, dim, role))
    for name, kind, before, after in halves(config):
        uses = {
            "dense": ((after, "weight", 0), (before, "weight", 1)),
            "lowrank": ((before, "weight", 0),),
            "factored": ((after, "left", 0), (before, "right", 0)),
        }
        for number, tensor, dim in uses.get(kind, ()):
            found[number].append((f"{name}.{tensor}", dim, Role.READS))
    if config.tie_word_embeddings and config.head_adapter:  # what it makes meets the table
        found[0] += [("head_adapter.weight", 0, Role.DUAL), ("head_adapter.bias", 0, Role.DUAL)]
    return {number: [one for one in axes if one[0] in stored] for number, axes in found.items()}


def connected(numbers: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The numbers in groups that pairs join, in order."""
    group = {number: number for number in numbers}
    for a, b in pairs:
        old, new = group[b], group[a]
        group = {number: new if own == old else own for number, own in group.items()}
    found: dict[int, list[int]] = {}
    for number in numbers:
        found.setdefault(group[number], []).append(number)
    return list(found.values())


def stream_sites(config: MicrotomeConfig, steady: Steady) -> list[Site]:
    """The sites of the stream: for every stretch of coordinates, the junctions that are tied along it."""
    if not layout.is_shared(config):
        return []  # halves that read single coordinates by their number
    every, axes, found = list(ties(config)), stream_axes(config), list[Site]()
    centred = config.norm == "layer"
    for group in connected(layout.junctions(config), [(one.before, one.after) for one in every if one.joined]):
        mine = [one for one in every if one.before in group or one.after in group]
        wide = {number: layout.residual_width(config, number) for number in group}
        points = {
            0,
            *wide.values(),
            *(one.joined for one in mine),
            *(min(one.fixed, max(wide.values())) for one in mine),
        }
        for first, stop in pairwise(sorted(points)):
            there = [number for number in group if wide[number] >= stop]
            joined = [(one.before, one.after) for one in mine if one.joined >= stop]
            for members in connected(there, joined):
                fixed = any(one.fixed > first and {one.before, one.after} & set(members) for one in mine)
                uses = [use for number in members for use in axes[number]]
                gains = [tensor for tensor, _, role in uses if role is Role.SCALES]
                if fixed or not all(steady(tensor, first, stop) for tensor in gains):
                    continue
                name = "residual" if len(members) == len(axes) else f"residual.{members[0]}"
                whole = stop - first == min(wide[number] for number in members)
                lies = dict.fromkeys(Lies(tensor, dim, first) for tensor, dim, role in uses if role is not Role.SCALES)
                found.append(Site(name if whole else f"{name}.{first}", stop - first, centred, tuple(lies)))
    return found


def inner_sites(config: MicrotomeConfig) -> Iterator[Site]:
    """Columns of low-rank shortcuts, and the channels of heads that any invertible matrix could change."""
    for name, kind, _, _ in halves(config):
        block, short = name.removeprefix("model.layers.").split(".")
        sizes: Any = config.per_layer_config[int(block)]
        tensors = {"lowrank": ("weight",), "factored": ("left", "right")}.get(kind, ())
        if tensors:
            lies = tuple(Lies(f"{name}.{tensor}", 1, 0) for tensor in tensors)
            yield Site(f"{block}.{short}", getattr(sizes, f"{short}_rank"), False, lies)
    for block in range(config.num_hidden_layers):
        for space in layout.block_spaces(config, block):
            if space.symmetry is not Symmetry.LINEAR:
                continue
            steps = torch.arange(space.size)[:, None]
            assert all(bool((axis.at == axis.at[:1] + steps).all()) for axis in space.axes), space.name
            lies = tuple(Lies(axis.tensor, axis.dim, int(first)) for axis in space.axes for first in axis.at[0])
            yield Site(space.name, space.size, False, lies)


def ordered(stream: Sequence[Site], inner: Sequence[Site]) -> list[Site]:
    """The stream's sites in order, each inner one as soon as no later site of the stream moves its tensors."""
    last = {lie.tensor: number for number, site in enumerate(stream) for lie in site.axes}
    placed = [((number, 0), site) for number, site in enumerate(stream)]
    placed += [((max((last.get(lie.tensor, -1) for lie in site.axes), default=-1), 1), site) for site in inner]
    return [site for _, site in sorted(placed, key=lambda one: one[0])]


def cut(
    config: MicrotomeConfig,
    steady: Steady = lambda _tensor, _first, _stop: True,
    *,
    inner: bool = True,
    leave: Sequence[str] = (),
    floats: Callable[[str], bool] = lambda name: not name.endswith("index"),
) -> Cut:
    """The tensors of a decoder, and the sites that pay, in the order in which they are turned.

    `floats` says which tensors hold 16-bit words; the others are outside. The first site leaves as many coordinates
    alone as the base is short of words. A site that its own words cannot tell (fewer columns than coordinates) goes.
    """
    shapes = {name: shape for part in layout.parts(config) for name, shape in layout.shapes(config, part).items()}
    tensors = tuple((name, shape[0], prod(shape[1:])) for name, shape in shapes.items() if floats(name))
    stream = [one for one in stream_sites(config, steady) if one.pays and one.name not in leave]
    others = [one for one in inner_sites(config) if inner and one.pays and one.name not in leave]
    sites = ordered(stream, others)
    while sites:
        found = Cut(tensors, tuple(sites))
        bad = [number for number, site in enumerate(sites) if found.columns(number) < site.size]
        if not bad:
            return started(found)
        del sites[bad[0]]
    return Cut(tensors, ())


def started(found: Cut) -> Cut:
    """The same with a first site that is small enough for the base to hold the words that it takes."""
    first, *others = found.sites
    names = {lie.tensor for lie in first.axes}  # only their pieces depend on its size
    mine = tuple(one for one in found.tensors if one[0] in names)
    beside = [replace(site, axes=tuple(lie for lie in site.axes if lie.tensor in names)) for site in others]
    numbers = {number for number, one in enumerate(found.tensors) if one[0] not in names}
    base = (found.pieces[number] for number in found.final[-1])
    apart = sum(one.words for one in base if one.tensor in numbers)

    def lacks(size: int) -> bool:
        smaller = replace(first, size=size)
        made = Cut(mine, (smaller, *(site for site in beside if site.axes)))
        return apart + sum(made.pieces[number].words for number in made.final[-1]) < smaller.taken

    low, high = 0, first.size  # bisection: fewer coordinates take fewer words and leave more
    if not lacks(high):
        return found
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lacks(middle) else (middle, high)
    smaller = replace(first, size=low)
    if low and smaller.pays:
        return Cut(found.tensors, (smaller, *others))
    return started(Cut(found.tensors, tuple(others))) if others else Cut(found.tensors, ())


def ceiling(found: Cut) -> int:
    """Words that no packing by these sites can do better than: the dimensions of their groups."""
    return sum(site.saved for site in found.sites)
