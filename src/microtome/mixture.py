"""The windows that a compression calibrates on and is measured on: of one source, or of several with weights.

A source is a `Spec` of `texts`, or `self`, text that the model writes itself. Of a mixture each source gives a share of
the windows by largest remainder, at least one; they follow each other in an order that the seed draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from microtome import budget, data, sampler
from microtome.calibrate import Progress, free_memory
from microtome.data import Share, Tokens
from microtome.errors import BadInput
from microtome.loading import load
from microtome.planner import Opened
from microtome.running import window_of
from microtome.texts import Spec, is_self, named, parted

Data = Spec | Mapping[Any, float] | Sequence[tuple[Spec, float]]  # the keys of a mapping are Specs

EVAL_WINDOWS = 64  # that compress measures on where the user names no evaluation text
CACHE_BYTES = 2**32  # of keys and values while the model writes: it settles how many rows are written side by side
ROWS = 64
UNMEASURED = "perplexity was not measured: on text that the model wrote it says nothing. Give --eval-data for it."


@dataclass(frozen=True)
class Source:
    """A source and its weight in a mixture."""

    spec: Spec
    weight: float


def parsed(words: Sequence[str]) -> Data:
    """What `--data` says: sources, or `source=weight`; an existing path of the whole name comes first."""
    sources = [_parsed(word) for word in words]
    if len(sources) == 1 and sources[0].weight == 1.0:
        return sources[0].spec
    return [(source.spec, source.weight) for source in sources]


def _parsed(word: str) -> Source:
    head, equals, tail = word.rpartition("=")
    if not equals or _exists(word):
        return Source(word, 1.0)
    try:
        return Source(head, float(tail))
    except ValueError as error:
        fact = f"--data {word}: {tail!r} is no weight, and there is no file or folder of that whole name"
        raise BadInput(f"{fact}. Write --data SOURCE=0.5.") from error


def _exists(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # longer than a name may be
        return False


def weighted(spec: Data) -> list[Source]:
    """The sources of a mixture, those of weight 0 left out; anything else is one source. Raises BadInput."""
    pairs = _pairs(spec)
    if pairs is None:
        return [Source(cast("Spec", spec), 1.0)]
    for one, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise BadInput(f"the weight of {str(one)[:200]} is {weight!r}: give a number from 0 on")
    kept = [Source(one, float(weight)) for one, weight in pairs if weight > 0]
    if not kept:
        raise BadInput("no source of calibration text has a weight above 0")
    return kept


def _pairs(spec: Data) -> list[tuple[Spec, Any]] | None:
    """Sources with weights; None for what is one source."""
    if isinstance(spec, Mapping):
        return list(spec.items())
    if isinstance(spec, list | tuple) and spec:
        items = cast("list[Any]", spec)
        if all(isinstance(item, tuple) and len(cast("tuple[Any, ...]", item)) == 2 for item in items):
            return [(one, weight) for one, weight in items]
    return None


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """How many of the windows each source gives: by largest remainder, the earlier first, and none without any.

    Raises BadInput where there are fewer windows than sources.
    """
    if samples < len(weights):
        raise BadInput(f"{samples} windows cannot be of {len(weights)} sources: take more --samples")
    quotas = [samples * weight / math.fsum(weights) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    rest = sorted(range(len(weights)), key=lambda place: counts[place] - quotas[place])  # stable: the earlier first
    for place in rest[: samples - sum(counts)]:
        counts[place] += 1
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def mixed(parts: Sequence[Tokens], weights: Sequence[float], seed: int) -> Tokens:
    """The windows of all sources in an order that the seed draws. Raises BadInput where they differ in length."""
    lengths = [tokens.ids.shape[1] for tokens in parts]
    if short := [tokens for tokens in parts if tokens.ids.shape[1] < max(lengths)]:
        fact = f"{short[0].source} has windows of {short[0].ids.shape[1]} tokens, the other sources of {max(lengths)}"
        raise BadInput(f"{fact}: all must be as long, take a smaller --length")
    joined_NT = torch.cat([tokens.ids for tokens in parts])
    order_N = torch.randperm(len(joined_NT), generator=torch.Generator().manual_seed(seed))
    source = " + ".join(f"{weight:g} of {tokens.source}" for tokens, weight in zip(parts, weights, strict=True))
    note = "; ".join(tokens.note for tokens in parts if tokens.note)
    kept = tuple(
        Share(tokens.source, weight, tokens.ids.shape[0], tokens.sha256)
        for tokens, weight in zip(parts, weights, strict=True)
    )
    return replace(data.digested(source, joined_NT[order_N], note, None), parts=kept)


def record(tokens: Tokens | None) -> dict[str, Any]:
    """What `plan.json` says of a mixture beyond what it says of every calibration."""
    return {} if tokens is None or not tokens.parts else {"sources": [asdict(part) for part in tokens.parts]}


def remarks(evaluation: Tokens | None, *, measure: bool) -> tuple[str, ...]:
    """What a user should know where perplexity was wanted and there is no text for it."""
    return (UNMEASURED,) if measure and evaluation is None else ()


@dataclass(frozen=True)
class Draw:
    """How windows are made of a source: all that the sources of a compression have in common."""

    found: Opened
    tokenizer: Any
    length: int
    seed: int
    column: str | None
    device: torch.device
    progress: Progress | None = None

    def one(self, spec: Spec, samples: int | None) -> Tokens:
        """Calibration windows of one source."""
        size = self.found.config.vocab_size
        if is_self(spec):
            return self.own(samples)
        common: dict[str, Any] = {"vocab_size": size, "text_column": self.column}
        return data.calibration(spec, self.tokenizer, samples=samples, length=self.length, seed=self.seed, **common)

    def all(self, sources: Sequence[Source], samples: int | None) -> Tokens:
        """Calibration windows of every source by its weight."""
        if len(sources) == 1:
            return self.one(sources[0].spec, samples)
        if samples is None:
            raise BadInput("several sources share the windows by weight: say how many, by --samples")
        weights = [source.weight for source in sources]
        counts = shares(weights, samples)
        return mixed(
            [self.one(one.spec, count) for one, count in zip(sources, counts, strict=True)], weights, self.seed
        )

    def measured(self, spec: Spec, limit: int | None) -> Tokens:
        """Evaluation windows of one source."""
        common: dict[str, Any] = {"vocab_size": self.found.config.vocab_size, "text_column": self.column}
        return data.evaluation(spec, self.tokenizer, length=self.length, limit=limit, **common)

    def own(self, samples: int | None) -> Tokens:
        """Windows that the model writes itself, run as it is measured: in fp32 on a CPU, else in its own type."""
        if samples is None or samples < 1:
            raise BadInput(f"self needs a number of windows to write, at least 1, not {samples}")
        if self.length < 2:
            raise BadInput(f"length must be at least 2 tokens, one to predict the next from, not {self.length}")
        on_cpu = self.device.type == "cpu"
        wide = torch.float32 if on_cpu else None
        nbytes = self.found.nbytes * (2 if on_cpu and self.found.dtype != torch.float32 else 1)
        free = free_memory() if on_cpu else torch.cuda.mem_get_info(self.device)[0]
        each = self.length * int(budget.sizes(self.found.config, itemsize=self.found.dtype.itemsize).kv_bytes or 1)
        if nbytes + each > 0.8 * free:
            fact = f"self: the model must run to write text, and {nbytes / 1e9:.1f} GB do not fit into memory"
            raise BadInput(f"{fact}. Give a text by --data, or use a larger machine.")
        model = load(self.found.source.folder, device=self.device, dtype=wide)
        tell = self.progress
        ids_NT = sampler.sampled(
            model,
            self.tokenizer,
            samples=samples,
            length=self.length,
            seed=self.seed,
            rows=max(1, min(ROWS, CACHE_BYTES // each)),
            progress=None if tell is None else lambda fraction: tell("writing text", fraction),
        )
        source = f"self (written by the model at temperature 1, seed {self.seed})"
        return data.digested(source, ids_NT, "", self.found.config.vocab_size)


def tokens_of(  # noqa: PLR0913
    found: Opened,
    tokenizer: Any,
    spec: Data,
    eval_spec: Spec | None,
    *,
    samples: int | None,
    length: int | None,
    seed: int,
    needed: bool,
    measure: bool,
    device: torch.device,
    column: str | None = None,
    progress: Progress | None = None,
) -> tuple[Tokens | None, Tokens | None]:
    """Calibration and evaluation windows; a text without a test split gives its last tenth to evaluation.

    Of a mixture the first source that is not the model itself is measured on; where there is none, nothing is.
    """
    window = window_of(found.source, length, found.config.max_position_embeddings)
    draw = Draw(found, tokenizer, window, seed, column, device, progress)
    sources = weighted(spec)
    limit = EVAL_WINDOWS if eval_spec is None else None  # what the user named is measured whole
    own_text = next((place for place, one in enumerate(sources) if not is_self(one.spec)), None)
    several = eval_spec is None and len(sources) > 1
    if eval_spec is None and measure and own_text is not None:
        first = sources[own_text]
        parts = parted(first.spec, column, tokenizer=tokenizer)
        if parts is not None:
            sources[own_text], eval_spec = replace(first, spec=parts[0]), parts[1]
        elif named(first.spec, column):
            eval_spec = first.spec  # a known data set: its test split
    calibration = draw.all(sources, samples) if needed else None
    if not measure or (eval_spec is None and own_text is None):
        return calibration, None
    if eval_spec is not None:
        evaluation = draw.measured(eval_spec, limit)
    else:  # only ids were given: measured on themselves, and said so
        assert own_text is not None
        inside = calibration if calibration is not None and not several else draw.one(sources[own_text].spec, samples)
        evaluation = replace(inside, source=f"{inside.source}, the calibration tokens themselves")
    if several:
        said = f"of {len(sources)} sources the first text is measured on, {evaluation.source}"
        evaluation = replace(evaluation, note="; ".join(note for note in (said, evaluation.note) if note))
    return calibration, evaluation


__all__ = ["Data", "Draw", "Source", "mixed", "parsed", "record", "remarks", "shares", "tokens_of", "weighted"]
