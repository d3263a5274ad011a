"""The engines that a result is meant for, and the widths that they run: `--target vllm`, `gguf`, `tp=2`.

A rule refuses, a preference only rounds: docs/targets.md has both, with the engines' names. Widths that are chosen keep
to the rules from the start (`stream_step`, `dials`); what a table or a plan gives, and what the source brings along, is
held against them at the end (`check`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from microtome import layout
from microtome.errors import BadInput, BadPlan, UnknownName
from microtome.inner import Dial
from microtome.modeling_microtome import MicrotomeConfig

ENGINES = ("vllm", "gguf")
ROW = 32  # numbers in a block of Q4_0 and Q8_0: other rows stay in fp16
K_ROW = 256  # the same of K-quants
PREFERRED = {"vllm": (128, 64), "gguf": (K_ROW,)}  # multiples, taken where they leave a width so many steps
STEPS = 16
HEAD, WIDEST_HEAD = 8, 256  # FlashAttention: multiples of 8, up to 256
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM's attention on a CPU
MOST_BLOCKS = 512  # of llama.cpp
CHANNELS = ("ffn", "heads", "qk", "vo")
SUBSETS = ("attn_read", "attn_write", "mlp_read", "mlp_write")  # coordinates of the stream, by index


@dataclass(frozen=True)
class Broken:
    """A rule that a decoder breaks: where, by what value, whose rule, and the nearest value that fits."""

    engine: str
    space: str  # "3.ffn", "stream"
    value: object
    rule: str
    nearest: int | None = None
    own: bool = False  # whether the source has that value too

    def __str__(self) -> str:
        near = "" if self.nearest is None else f", and the nearest that fits is {self.nearest}"
        own = ", the source's own," if self.own else ""
        return f"--target {self.engine} does not run {self.space} at {self.value}{own} for {self.rule}{near}"


@dataclass(frozen=True)
class Target:
    """Engines by name, and the numbers of devices that a block is split over; without any there are no rules."""

    engines: tuple[str, ...] = ()
    devices: tuple[int, ...] = ()

    @classmethod
    def parsed(cls, said: "Targets") -> "Target":
        """From "vllm", "gguf,tp=2" or several of these; raises UnknownName or BadInput in one line."""
        if isinstance(said, Target):
            return said
        given = [said] if isinstance(said, str) else list(said or ())
        if odd := [one for one in given if not isinstance(one, str)]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadInput(f"a target is vllm, gguf or tp=N, not {odd[0]!r}.")
        words = [word.strip() for one in given for word in one.split(",")]
        devices = tuple(number_of(word) for word in words if word.startswith("tp="))
        names = [word for word in words if not word.startswith("tp=")]
        if unknown := [name for name in names if name not in ENGINES]:
            raise UnknownName("target", unknown[0], (*ENGINES, "tp=N"))
        return cls().joined(cls(tuple(names), devices))

    def joined(self, other: "Target") -> "Target":
        """Both: a result then keeps to the rules of all."""
        engines = [name for name in ENGINES if name in (*self.engines, *other.engines)]
        return Target(tuple(engines), tuple(sorted({*self.devices, *other.devices})))

    def __bool__(self) -> bool:
        return bool(self.engines or self.devices)

    @property
    def words(self) -> list[str]:
        """As a user would write it."""
        return [*self.engines, *(f"tp={number}" for number in self.devices)]

    def __str__(self) -> str:
        return ", ".join(self.words)

    @property
    def gguf(self) -> bool:
        """Whether it is meant for llama.cpp."""
        return "gguf" in self.engines

    @property
    def vllm(self) -> bool:
        """Whether it is meant for vLLM."""
        return "vllm" in self.engines

    # --- widths that are chosen -------------------------------------------------------------------------------------

    def preferred(self, size: int) -> int:
        """The multiple that the engines like best in a width of this size; 1 where they do not mind."""
        fit = [[one for one in PREFERRED[name] if STEPS * one <= size] for name in self.engines]
        return lcm(*(max(some, default=1) for some in fit))

    def step(self, size: int, unit: int, wished: int, *, asked: bool) -> int:
        """Steps of a width: `unit` is a rule, `wished` is what is rounded to otherwise, `asked` if the user said so."""
        rounded = lcm(unit, wished) if asked else lcm(unit, wished, self.preferred(size))
        return rounded if rounded < size or asked else unit

    def stream_step(self, size: int, multiple: int | None, wished: int) -> int | None:
        """The multiple that widths of the stream are rounded to; `wished` is taken where `multiple` is not given."""
        if not self:
            return multiple
        asked = multiple is not None
        step = self.step(size, ROW if self.gguf else 1, multiple or wished, asked=asked)
        if step >= size:
            raise BadPlan(
                f"--target {self} leaves the stream no width below {size}: it goes in steps of {step}. Cut inside the "
                "blocks, or choose another target."
            )
        return step

    def check_stream(self, method: str, *, split: bool) -> None:
        """Raise BadPlan where a method would give the stream several bases, and the engine has one."""
        if self.gguf and split:
            raise BadPlan(
                f"--target gguf has one width and one basis for the whole stream, and {method} with basis=junction "
                "gives every junction its own: use basis=global."
            )

    def dials(self, config: MicrotomeConfig, dials: Mapping[str, Dial], *, asked: bool, alike: bool) -> dict[str, Dial]:
        """The dials that the engines allow, in steps that they can run; `asked` if the user chose the steps.

        `alike` says whether all blocks get the same widths, and query-key and value channels too.
        """
        if not self:
            return dict(dials)
        kinds = {dial.kind for dial in dials.values()}
        heads = not self.gguf and (not self.vllm or (alike and {"qk", "vo"} <= kinds))
        fitted = [
            self.fitted(config.per_layer_config[dial.block], dial, asked=asked)
            for dial in dials.values()
            if heads or dial.kind not in ("qk", "vo")
        ]
        return {dial.name: dial for dial in fitted if dial is not None}

    def fitted(self, sizes: Any, dial: Dial, *, asked: bool) -> Dial | None:
        """One dial in steps that fit; None where nothing below its size does."""
        if dial.kind not in CHANNELS:  # halves and blocks, and what a half reads and writes of the stream
            first = dial.kind == "attn" and dial.block == 0
            left_out = (self.vllm and dial.kind == "attn") or (self.gguf and (first or dial.kind in SUBSETS))
            return None if left_out else dial
        if dial.kind == "heads":
            steps = (one for one in range(1, dial.size) if self.fit(sizes, range(one, dial.size, one)))
            step, whole = next(steps, dial.size), self.shared(sizes, dial.size)
        elif dial.kind == "ffn":
            each = lcm(*self.devices)
            step = self.step(dial.size, lcm(each, ROW if self.gguf else 1), dial.step, asked=asked)
            whole = dial.size % each == 0
        else:
            step, whole = lcm(dial.step, HEAD if self.vllm else 1), not self.vllm or head_fits(dial.size)
        return replace(dial, step=step, least=step, whole=whole) if step < dial.size else None

    def fit(self, sizes: Any, groups: Iterable[int]) -> bool:
        """Whether each of these numbers of key-value groups can be had in a block."""
        wide = sizes.num_attention_heads // sizes.num_key_value_heads * sizes.v_head_dim
        return all(self.shared(sizes, one) and (not self.gguf or one * wide % ROW == 0) for one in groups)

    def shared(self, sizes: Any, groups: int) -> bool:
        """Whether so many key-value groups, and their heads, can be shared out over the devices."""
        heads = groups * (sizes.num_attention_heads // sizes.num_key_value_heads)
        return all(shares(heads, groups, number) for number in self.devices)

    # --- what comes out ---------------------------------------------------------------------------------------------

    def check(self, config: MicrotomeConfig, source: MicrotomeConfig) -> None:
        """Raise BadPlan where a decoder that was made from `source` breaks a rule."""
        broken = list(self.broken(config, source))
        if broken:
            more = f" ({len(broken) - 1} more places like it)" if len(broken) > 1 else ""
            raise BadPlan(f"{broken[0]}{more}. Choose other widths, another method or another target.")

    def broken(self, config: MicrotomeConfig, source: MicrotomeConfig) -> Iterator[Broken]:
        """Every rule that a decoder breaks, block by block."""
        if self.gguf:
            yield from gguf_whole(config, source)
        first = next((one for one in blocks(config) if not layout.skips(one, "self_attn")), None)
        before = known(source)
        for block, sizes in enumerate(blocks(config)):
            ffn, attention = (not layout.skips(sizes, half) for half in ("mlp", "self_attn"))
            for number in self.devices:
                yield from split_over(number, block, sizes, before, ffn=ffn, attention=attention)
            if self.gguf and ffn and (wide := sizes.intermediate_size) % ROW and wide not in before["ffn"]:
                yield rows_of(f"{block}.ffn", wide, max(before["ffn"]))
            if self.gguf and attention:
                yield from gguf_attention(block, sizes, first, source, before)
            if self.vllm:
                yield from vllm_attention(block, sizes, first, before)

    def notes(self, config: MicrotomeConfig, *, stock: bool) -> list[str]:
        """What a user should know of a decoder that breaks no rule."""
        said: list[str] = []
        some = blocks(config)
        with_attention = [one for one in some if not layout.skips(one, "self_attn")]
        with_ffn = [one for one in some if not layout.skips(one, "mlp")]
        if self.gguf:
            rows = {config.hidden_size, *(one.num_attention_heads * one.v_head_dim for one in with_attention)}
            rows |= {one.intermediate_size for one in with_ffn}
            if odd := sorted(row for row in rows if row % ROW):
                said.append(f"gguf: rows of {listed(odd)} are no multiple of {ROW}, and stay in fp16 when quantised.")
            if odd := sorted(row for row in rows if row % ROW == 0 and row % K_ROW):
                said.append(
                    f"gguf: rows of {listed(odd)} are no multiple of {K_ROW}: K-quants fall back to Q5_0, Q5_1 or Q8_0."
                )
            if len(with_ffn) < len(some):
                said.append("gguf: blocks without a feed-forward half need one of zeros, 32 wide, in the file.")
        if self.vllm:
            heads = sorted({one.head_dim for one in with_attention} - set(CPU_HEADS))
            if heads:
                said.append(
                    f"vllm: its attention on a CPU has no heads of {listed(heads)}, only of {listed(CPU_HEADS)}."
                )
            wide = {one.num_attention_heads * one.head_dim for one in with_attention}
            if stock and config.source_model_type == "qwen2" and wide != {config.hidden_size}:
                said.append(
                    "vllm: its own Qwen2 class takes heads to be hidden_size / heads wide: serve this with "
                    "model_impl=transformers."
                )
        return said


ANY = Target()  # no rules
Targets = str | Iterable[str] | Target | None  # as they are given


def number_of(word: str) -> int:
    """The devices of "tp=2"."""
    text = word.removeprefix("tp=")
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"the target {word} is no number of devices: write tp=2.")
    return int(text)


def listed(values: Iterable[int]) -> str:
    """Numbers in words."""
    return ", ".join(str(value) for value in values)


def blocks(config: MicrotomeConfig) -> list[Any]:
    """The sizes of every block."""
    return [config.per_layer_config[block] for block in range(config.num_hidden_layers)]


def known(source: MicrotomeConfig) -> dict[str, set[int]]:
    """The widths that a source has, by kind."""
    some = blocks(source)
    names = {"ffn": "intermediate_size", "heads": "num_key_value_heads", "qk": "head_dim", "vo": "v_head_dim"}
    return {kind: {getattr(sizes, name) for sizes in some} for kind, name in names.items()}


def shares(heads: int, groups: int, number: int) -> bool:
    """Whether a number of devices can share query heads and key-value groups, or repeat the groups."""
    return heads % number == 0 and (groups % number == 0 or number % groups == 0)


def head_fits(wide: int) -> bool:
    """Whether FlashAttention takes heads of a width."""
    return wide % HEAD == 0 and wide <= WIDEST_HEAD


def nearest(value: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The value up to `most` that fits and is closest; of two the smaller."""
    return min((one for one in range(1, most + 1) if fits(one)), key=lambda one: (abs(one - value), one), default=None)


def rows_of(space: str, value: int, most: int) -> Broken:
    """A row that no quantised block fits."""
    rule = f"quantised rows are multiples of {ROW}"
    return Broken("gguf", space, value, rule, nearest(value, most, lambda one: one % ROW == 0))


def split_over(
    number: int, block: int, sizes: Any, before: Mapping[str, set[int]], *, ffn: bool, attention: bool
) -> Iterator[Broken]:
    """What a block has that so many devices cannot share."""
    engine, groups = f"tp={number}", sizes.num_key_value_heads
    times = sizes.num_attention_heads // groups
    if attention and not shares(groups * times, groups, number):
        fits = nearest(groups, max(before["heads"]), lambda one: shares(one * times, one, number))
        rule = f"key-value groups and {groups * times} query heads are shared by {number} devices"
        yield Broken(engine, f"{block}.heads", groups, rule, fits, groups in before["heads"])
    wide = sizes.intermediate_size
    if ffn and wide % number:
        fits = nearest(wide, max(before["ffn"]), lambda one: one % number == 0)
        rule = f"neurons are shared by {number} devices"
        yield Broken(engine, f"{block}.ffn", wide, rule, fits, wide in before["ffn"])


def one_width(engine: str, block: int, sizes: Any, first: Any, before: Mapping[str, set[int]]) -> Iterator[Broken]:
    """Heads that are not as wide as their values, or as those of other blocks."""
    wide, values = sizes.head_dim, sizes.v_head_dim
    if values != wide:
        rule = f"values are as wide as queries and keys, {wide}"
        yield Broken(engine, f"{block}.vo", values, rule, wide, values in before["vo"])
    elif wide != first.head_dim:
        rule = f"heads of all blocks are as wide as the first's, {first.head_dim}"
        yield Broken(engine, f"{block}.qk", wide, rule, first.head_dim, wide in before["qk"])


def vllm_attention(block: int, sizes: Any, first: Any, before: Mapping[str, set[int]]) -> Iterator[Broken]:
    """What vLLM does not run of a block's attention."""
    if layout.skips(sizes, "self_attn"):
        yield Broken("vllm", f"{block}.attn", 0, "every block has attention")
        return
    yield from one_width("vllm", block, sizes, first, before)
    if not head_fits(wide := sizes.head_dim):
        rule = f"heads are multiples of {HEAD} wide, up to {WIDEST_HEAD}"
        yield Broken(
            "vllm", f"{block}.qk", wide, rule, nearest(wide, max(before["qk"]), head_fits), wide in before["qk"]
        )


def gguf_attention(
    block: int, sizes: Any, first: Any, source: MicrotomeConfig, before: Mapping[str, set[int]]
) -> Iterator[Broken]:
    """What llama.cpp does not run of a block's attention."""
    yield from one_width("gguf", block, sizes, first, before)
    if sizes.rotary_subset:
        whole = max(before["qk"])
        rule = "all heads turn with the same frequencies"
        yield Broken("gguf", f"{block}.qk", sizes.head_dim, rule, whole, sizes.head_dim in before["qk"])
    row = sizes.num_attention_heads * sizes.v_head_dim
    if row % ROW and row not in {one.num_attention_heads * one.v_head_dim for one in blocks(source)}:
        groups, each = sizes.num_key_value_heads, row // sizes.num_key_value_heads
        rule = f"quantised rows are multiples of {ROW}, and these heads make {row}"
        fits = nearest(groups, max(before["heads"]), lambda one: one * each % ROW == 0)
        yield Broken("gguf", f"{block}.heads", groups, rule, fits)


def gguf_whole(config: MicrotomeConfig, source: MicrotomeConfig) -> Iterator[Broken]:
    """What llama.cpp does not run of a decoder as a whole."""
    wide = config.hidden_size
    subsets = any(getattr(sizes, f"{name}_size") is not None for sizes in blocks(config) for name in SUBSETS)
    if not layout.even(config) or subsets:
        rule = "a GGUF file has one width and one basis for the whole stream: use basis=global"
        yield Broken("gguf", "stream", "several", rule, None, not layout.even(source))
    elif wide % ROW and wide != source.hidden_size:
        yield rows_of("stream", wide, source.hidden_size)
    if layout.skips(config.per_layer_config[0], "self_attn"):
        yield Broken("gguf", "0.attn", 0, "the first block has attention")
    if config.num_hidden_layers > MOST_BLOCKS:
        rule = f"llama.cpp loads up to {MOST_BLOCKS}"
        yield Broken("gguf", "blocks", config.num_hidden_layers, rule, MOST_BLOCKS, own=True)
