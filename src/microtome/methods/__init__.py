"""Methods: one file each, looked up in this folder.

A method is a frozen dataclass whose fields are its options, and pure functions. It sees spaces, sums and weights, never
a model, a checkpoint or transformers. `CONTRIBUTING.md` writes one from scratch.

There are three protocols: for the residual stream, for the spaces inside blocks, and for single weights. Two things a
method may have beside its own: `learn(view_of, widths)` is called once before the first block is changed, and returns
the method that has seen the weights of all of them; `sums(size, tokens, device)` makes a Moment that counts more at the
junctions than second moments.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from microtome.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from torch import Tensor

    from microtome.edit import Correct, Edit, Rewrite
    from microtome.inner import View
    from microtome.modeling_microtome import MicrotomeConfig
    from microtome.space import Kind, Space
    from microtome.stats import Moment, Stat
    from microtome.surgery import Form, Gauge


class Method(Protocol):
    """What the pipeline asks of a method that cuts the residual stream."""

    needs: ClassVar["frozenset[Stat]"]
    targets: ClassVar["frozenset[Kind]"]

    @property
    def split(self) -> bool:
        """Whether every junction has a basis of its own, or one serves them all."""
        ...

    @property
    def sequential(self) -> bool:
        """Whether a junction is measured after all before it have been cut ("compressed" inputs), or before any is."""
        ...

    @property
    def normed(self) -> bool:
        """Whether the stream is measured behind its norm, or before it."""
        ...

    @property
    def pooled(self) -> bool:
        """Whether the sums of all junctions may be added up, because only their total is used."""
        ...

    def check(self, config: "MicrotomeConfig") -> None:
        """Raise UnsupportedModel or BadInput where the options do not fit the model."""
        ...

    def form(self, config: "MicrotomeConfig") -> "Form":
        """The form of the decoder that it works on."""
        ...

    def whole_head(self, *, by_slice: bool) -> bool:
        """Whether the last junction keeps its width; `by_slice` if the width came from the paper's dial."""
        ...

    def join(self, config: "MicrotomeConfig", width: int) -> "Gauge | None":
        """How neighbouring bases are joined; None where there is only one."""
        ...

    def solve(
        self, spaces: "Sequence[Space]", stats: "Mapping[str, Moment]", ranks: "Mapping[str, int]"
    ) -> "list[Rewrite]":
        """The edits of junctions (one if bases are split, else all) from their sums; pooled sums are "residual"."""
        ...

    def finish(
        self, tensors: "Mapping[str, Tensor]", rewrites: "Mapping[str, Rewrite]", final: "Moment | None"
    ) -> "list[Edit]":
        """Corrections of a tied head, once every basis is known: `tensors` holds the uncut embedding and final norm."""
        ...


class InnerMethod(Protocol):
    """What the pipeline asks of a method that cuts inside the blocks: neurons, channels of heads, groups, blocks.

    It sees one half of a block at a time (both at once where they read the same stream), as a `View`, and answers with
    edits. A half in which no width changes is not asked for.
    """

    biased: ClassVar[bool]  # whether it gives every output and down projection a bias
    allocation: ClassVar[str]  # how its paper spends a budget over the blocks; "uniform" if it does not
    rates: ClassVar["Mapping[Kind, float]"]  # kinds that give up less than the others: the share of what these lose

    @property
    def needs(self) -> "frozenset[Stat]":
        """What is measured for it."""
        ...

    @property
    def targets(self) -> "frozenset[Kind]":
        """The kinds of spaces that it cuts."""
        ...

    @property
    def sequential(self) -> bool:
        """Whether a half is measured behind everything that is cut before it, or in the uncut model."""
        ...

    def check(self, config: "MicrotomeConfig") -> None:
        """Raise UnsupportedModel or BadInput where the options do not fit the model."""
        ...

    def scores(self, view: "View") -> "dict[str, list[float]]":
        """By dial ("3.ffn"): what each unit of the width is worth, comparable over dials; the lowest go first."""
        ...

    def solve(self, view: "View", widths: "Mapping[str, int]") -> "list[Edit]":
        """The edits that bring the view's spaces to their widths, by dial: Select or Rewrite, then Correct."""
        ...


class WeightMethod(Protocol):
    """What the pipeline asks of a method that changes single weights and no shape: zeros, or fewer bits.

    Only the linears inside the blocks are touched. It sees a half of a block at a time, or one reader after the other
    (`stepwise`), as a `View`; `--keep` has no meaning for it, its dial is one of its options. Its `targets` are
    {Kind.WEIGHTS}.
    """

    dial: ClassVar[str]  # the option that says how much is changed, for messages
    targets: ClassVar["frozenset[Kind]"]

    @property
    def needs(self) -> "frozenset[Stat]":
        """Where what linears read is measured: ATTENTION, HEADS, MLP, NEURONS; and GRADIENT."""
        ...

    @property
    def sequential(self) -> bool:
        """Whether a half is measured behind everything that is changed before it, or in the model as it was."""
        ...

    @property
    def stepwise(self) -> bool:
        """Whether linears are also measured behind those of their own half that come before them."""
        ...

    @property
    def idle(self) -> bool:
        """Whether the options leave every weight as it is."""
        ...

    @property
    def told(self) -> str:
        """The dial and its value, in words: "density 0.5"."""
        ...

    def check(self, config: "MicrotomeConfig") -> None:
        """Raise UnsupportedModel or BadInput where the options do not fit the model."""
        ...

    def zeros(self, config: "MicrotomeConfig") -> int:
        """How many weights it sets to zero; 0 if zeros are not what it is after."""
        ...

    def solve(self, view: "View") -> "list[Correct]":
        """New values of the linears of a view whose inputs are measured."""
        ...


def known() -> list[str]:
    """Names of all methods in this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find(name: str) -> type[Any]:
    """The dataclass of the method with that name."""
    if name not in known():
        raise UnknownName("method", name, known())
    return importlib.import_module(f"{__name__}.{name}").METHOD


def summary(name: str) -> str:
    """The first line of the method's docstring."""
    return (importlib.import_module(f"{__name__}.{name}").__doc__ or "").strip().splitlines()[0]


def build(name: str, options: Mapping[str, Any]) -> Any:
    """The method with options given as text ("0.5", "true") or as values.

    Raises UnknownName for an option that it does not have, BadInput for a value that the option does not take.
    """
    method = find(name)
    hints = get_type_hints(method)
    names = [one.name for one in fields(method)]
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in names:
            raise UnknownName(f"option of {name}", option, names or ["(it has none)"])
        values[option] = parsed(name, option, value, hints[option])
    return method(**values)


def dial_of(name: str) -> str | None:
    """The option that is the dial of a method of single weights; None for methods with `keep`."""
    return getattr(find(name), "dial", None)


def check_dials(name: str, keep: float | None, slice_: float | None, **others: Any) -> None:
    """Refuse both dials, neither, and values outside their range; for a method of single weights, any of them."""
    from microtome import budget

    dial = dial_of(name)
    if dial is None:
        budget.check_dials(keep, slice_)
        return
    given = {"--keep": keep, "--slice": slice_} | {f"--{other.replace('_', '-')}": it for other, it in others.items()}
    if wrong := [word for word, value in given.items() if value is not None]:
        raise BadInput(f"{name} changes single weights and no width: give -o {dial}=..., and no {wrong[0]}.")


def parsed(method: str, option: str, value: Any, hint: Any) -> Any:
    """One option's value in the type that its field declares."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        if value not in allowed:
            raise UnknownName(f"value of {method}'s option {option}", str(value), [str(one) for one in allowed])
        return value
    if type(value) is hint or (hint is float and type(value) is int):
        return hint(value)
    try:
        if hint is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return hint(value.strip())  # a list, or a switch for a number, has no strip
    except (AttributeError, KeyError, ValueError) as error:
        raise BadInput(f"option {option} of {method} takes {hint.__name__}, not {value!r}.") from error


def described(method: type[Any]) -> dict[str, dict[str, Any]]:
    """Default and allowed values of every option."""
    hints = get_type_hints(method)
    return {
        one.name: {
            "default": None if one.default is MISSING else one.default,
            "values": list(get_args(hints[one.name]))
            if get_origin(hints[one.name]) is Literal
            else hints[one.name].__name__,
        }
        for one in fields(method)
    }
