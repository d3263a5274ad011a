"""Allocators: how one budget is spent over many widths.

Each turns one number t in [0, 1] into a fraction of every width, more for larger t; the t whose decoder has the wanted
number of parameters is found by bisection over exact counts, and single steps of single widths take up the rest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from microtome.errors import BadInput, BadPlan
from microtome.inner import Dial

Widths = dict[str, int]
Fractions = Callable[[float], dict[str, float]]
ALLOCATORS = ("uniform", "influence", "redundancy", "global", "auto")
MOST = 0.8  # of a width that influence and redundancy may take away
TINY = 1e-30  # a share below this is no less: factors stay finite, and every block can be cut in the end


def solve(
    dials: Mapping[str, Dial],
    fractions: Fractions,
    count: Callable[[Widths], int],
    target: float,
    *,
    even: bool = False,
) -> Widths:
    """The widths whose count comes closest to `target`; `even` keeps them as `fractions` says, without single steps.

    Raises BadPlan where even the narrowest widths, or the widest, do not reach it.
    """

    def widths(t: float) -> Widths:
        wanted = fractions(t)
        return {name: dial.nearest(wanted[name] * dial.size) for name, dial in dials.items()}

    known: dict[tuple[int, ...], int] = {}  # a count builds a config, and bisection meets few widths

    def counted(wide: Widths) -> int:
        key = tuple(wide[name] for name in dials)
        if key not in known:
            known[key] = count(wide)
        return known[key]

    lowest, highest = counted(widths(0.0)), counted(widths(1.0))
    check_reach(lowest, target if dials else 0.0)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if counted(widths(middle)) > target:
            high = middle
        else:
            low = middle
        if high - low < 1e-7:
            break
    below, above = widths(low), widths(high)
    if even or highest <= target:
        return min((below, above), key=lambda one: (abs(counted(one) - target), counted(one)))
    return stepped(below, dials, fractions(high), counted, target)


def check_reach(lowest: int, target: float) -> None:
    """Raise BadPlan where the narrowest widths store more than the budget."""
    if lowest > 1.02 * target:
        raise BadPlan(
            f"the budget of {target:,.0f} parameters cannot be reached: with every width at its narrowest "
            f"{lowest:,} remain. Keep more, or cut other spaces too."
        )


def stepped(
    widths: Widths,
    dials: Mapping[str, Dial],
    wanted: Mapping[str, float],
    count: Callable[[Widths], int],
    target: float,
) -> Widths:
    """Widen single dials, those first that were rounded down most, as long as that comes closer to the target."""
    out, have = dict(widths), count(widths)
    order = sorted(dials.values(), key=lambda dial: (out[dial.name] / dial.size - wanted[dial.name], dial.name))
    for dial in order:
        wide = dial.wider(out[dial.name])
        if wide == out[dial.name]:
            continue
        more = {**out, dial.name: wide}
        if abs((made := count(more)) - target) < abs(have - target):
            out, have = more, made
    return out


def uniform(dials: Mapping[str, Dial], rates: Mapping[str, float] | None = None) -> Fractions:
    """The same fraction of every width; a kind with a rate below one gives up that much less."""
    held = rates or {}
    return lambda t: {name: 1.0 - (1.0 - t) * held.get(dial.kind, 1.0) for name, dial in dials.items()}


def influence(
    dials: Mapping[str, Dial], scores: Sequence[float], temperature: float, rates: Mapping[str, float] | None = None
) -> Fractions:
    """MoDeGPT's entropic allocation: the sparsity of block l is min(0.8, c softmax(-s / temperature)_l) (eq. 10-11).

    `scores` are the blocks' influences s; c is what the budget decides.
    """
    if temperature <= 0:
        raise BadInput(f"the temperature of an allocation is a number above 0, not {temperature}.")
    least = min(scores)
    weights = [max(math.exp(-(score - least) / temperature), TINY) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    return capped(dials, shares, rates)


def redundancy(
    dials: Mapping[str, Dial], scores: Sequence[float], base: float, rates: Mapping[str, float] | None = None
) -> Fractions:
    """Dynamic slicing: block l loses SB + (SP - SB) LR_l / mean(LR) of every width, where SB = base SP.

    LR = 1 - (s - min s) / (max s - min s) of the blocks' influences s; SP is what the budget decides.
    """
    if not 0.0 <= base <= 1.0:
        raise BadInput(f"the base of redundancy is a share from 0 to 1 of the mean slice, not {base}.")
    return capped(dials, redundancy_shares(scores, base), rates)


def redundancy_shares(scores: Sequence[float], base: float) -> list[float]:
    """What every block loses, relative to the mean over blocks."""
    low, high = min(scores), max(scores)
    scaled = [1.0 if high == low else 1.0 - (score - low) / (high - low) for score in scores]
    mean = sum(scaled) / len(scaled)
    return [base + (1.0 - base) * one / mean for one in scaled]


def capped(dials: Mapping[str, Dial], shares: Sequence[float], rates: Mapping[str, float] | None) -> Fractions:
    """Each block loses its share times a common factor, at most `MOST`."""
    held, smallest = rates or {}, min(share for share in shares if share > 0)

    def fractions(t: float) -> dict[str, float]:
        factor = math.log1p(MOST / smallest) * (1.0 - t)  # in logs, so that bisection is as fine at small shares
        lost = [min(MOST, share * math.expm1(factor)) for share in shares]
        return {name: 1.0 - lost[dial.block] * held.get(dial.kind, 1.0) for name, dial in dials.items()}

    return fractions


def by_score(dials: Mapping[str, Dial], scores: Mapping[str, Sequence[float]]) -> Fractions:
    """One threshold for all spaces: the coordinates with the lowest scores go, wherever they are.

    `scores` hold one number for every unit of a dial, comparable between dials.
    """
    ranked = sorted((float(score), name) for name in dials for score in scores[name])
    total = len(ranked)

    def fractions(t: float) -> dict[str, float]:
        gone = dict.fromkeys(dials, 0)
        for _, name in ranked[: round((1.0 - t) * total)]:
            gone[name] += 1
        return {name: 1.0 - gone[name] / max(len(scores[name]), 1) for name in dials}

    return fractions


def by_loss(
    dials: Mapping[str, Dial], curves: Mapping[str, Sequence[tuple[float, float]]], costs: Mapping[str, float]
) -> Fractions:
    """Spend the cut where a parameter costs least: `curves` are (fraction kept, loss added) of every dial, measured.

    Between the points the loss is interpolated after it is made convex and falling, so that every step of a width has a
    price, and one threshold on the price spends the budget best. Below the narrowest point nothing is known: no width
    goes there before all others have come to theirs, and then they go together.
    """
    prices: list[tuple[float, float, str, float]] = []
    for name, dial in dials.items():
        lowest: dict[float, float] = {}
        for fraction, loss in curves[name]:
            lowest[fraction] = min(loss, lowest.get(fraction, loss))
        points = convex(sorted({**lowest, 1.0: 0.0}.items()))
        steps = max(1, round(dial.size / dial.step))
        for number in range(steps):
            wide = 1.0 - number / steps
            narrower = wide - 1.0 / steps
            drop = value_at(points, narrower) - value_at(points, wide)
            unknown = 1.0 - narrower if narrower < points[0][0] - 1e-9 else 0.0
            prices.append((unknown, drop / (costs[name] * dial.size / steps), name, 1.0 / steps))
    prices.sort()

    def fractions(t: float) -> dict[str, float]:
        out = dict.fromkeys(dials, 1.0)
        for _, _, name, step in prices[: round((1.0 - t) * len(prices))]:
            out[name] -= step
        return {name: max(value, 0.0) for name, value in out.items()}

    return fractions


def convex(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of a falling curve (fraction, loss), sorted by fraction; noise cannot make it rise."""
    floor = 0.0
    falling: list[tuple[float, float]] = []
    for fraction, loss in reversed(points):  # from the whole width down: a narrower one is never better
        floor = max(floor, loss)
        falling.append((fraction, floor))
    hull: list[tuple[float, float]] = []
    for point in sorted(falling):
        while len(hull) > 1 and crosses(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def crosses(first: tuple[float, float], second: tuple[float, float], third: tuple[float, float]) -> bool:
    """Whether the second of three points lies on or above the line between the others."""
    run, rise = third[0] - first[0], third[1] - first[1]
    return (second[1] - first[1]) * run >= rise * (second[0] - first[0])


def value_at(points: Sequence[tuple[float, float]], fraction: float) -> float:
    """The curve at a fraction; beyond its ends its first and last pieces go on."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if fraction <= x1 or (x1, y1) == points[-1]:
            return y0 + (y1 - y0) * (fraction - x0) / (x1 - x0)
    return points[0][1]


def table(dials: Mapping[str, Dial], given: Mapping[str, Any]) -> Widths:
    """Widths as given: by dial ("3.ffn"), by kind ("ffn") or by block ("3"); fractions up to 1, or numbers."""
    known = {key for dial in dials.values() for key in (dial.name, dial.kind, str(dial.block))}
    if unknown := sorted(set(given) - known):
        raise BadPlan(f"no width is called {unknown[0]!r} here. Known, for instance: {', '.join(sorted(known)[:6])}.")
    out: Widths = {}
    for dial in dials.values():
        value = next((given[key] for key in (dial.name, str(dial.block), dial.kind) if key in given), dial.size)
        out[dial.name] = asked(dial, value)
    return out


def asked(dial: Dial, value: Any) -> int:
    """One width of a table."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value <= dial.size or value == dial.least):
        raise BadPlan(f"{dial.name} is given as {value!r}: a fraction up to 1, or a width up to {dial.size}.")
    if isinstance(value, float) and value <= 1:
        return dial.nearest(value * dial.size)
    if value != int(value) or (dial.kind == "qk" and value % 2):
        raise BadPlan(f"{dial.name} is given as {value!r}: a width is a whole number, and of query-key channels even.")
    return int(value)
