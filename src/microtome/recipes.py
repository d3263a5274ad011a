"""Recipes: methods in a row, as YAML.

    keep: 0.75                      # of every step that has no dial of its own
    target: gguf                    # widths that an engine can run: vllm, gguf, tp=2, or a list of them
    spend: auto                     # these share it, by what each costs; each (the default): all come to it
    steps:
      - slicegpt: {keep: 0.9}
      - modegpt:
          allocate: influence,temperature=0.1
          options: {score: obs}
      - restore

Everything is checked before a weight is read.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast, get_args, get_type_hints

import yaml

from microtome import methods, passes
from microtome.errors import BadInput, UnknownName
from microtome.order import AnyStep, check_order, word_of
from microtome.passes import Allocation, Step
from microtome.restore import Restore
from microtome.target import Target
from microtome.training import Heal

TOP = ("steps", "keep", "multiple_of", "spend", "target")
DIALS = ("keep", "slice", "multiple_of", "allocate", "options")


def whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """A whole number; with a colon it is no number to the base of sixty, as YAML would have it, but text."""
    text = str(loader.construct_scalar(node))
    return text if ":" in text else loader.construct_yaml_int(node)


class Loader(yaml.SafeLoader):
    """YAML that reads 2:4 as a pattern, and not as 124."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:int": whole,
    }


def read(place: str | Path) -> dict[str, Any]:
    """The contents of a recipe's file; raises BadInput in one line."""
    try:
        held = yaml.load(Path(place).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise BadInput(f"cannot read the recipe {place}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{place} is not YAML: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(held, dict):
        raise BadInput(f"{place} is no recipe: it has no list of steps.")
    return cast("dict[str, Any]", held)


def steps(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> list[AnyStep]:
    """The steps of a recipe, each checked as far as it can be without a model.

    `overrides` set values by their path, a step by its number from 1 or by its method (the first of that name):
    {"keep": 0.7, "1.keep": 0.9, "modegpt.options.score": "obs"}. Raises BadInput or UnknownName, naming the step.
    """
    held = given(recipe, overrides)
    if unknown := sorted(str(name) for name in set(held) - set(TOP)):
        raise UnknownName("field of a recipe", unknown[0], TOP)
    if held.get("spend", "each") not in ("each", "auto"):
        raise BadInput(f"spend is each (keep is that of every step) or auto (of all together), not {held['spend']!r}.")
    Target.parsed(held.get("target"))  # refused before any step is
    found = [step(number, entry, held) for number, entry in enumerate(listed(held), 1)]
    if not isinstance(first := found[0], Step):
        word = word_of(first)
        raise BadInput(f"step 1 of the recipe, {word}, has nothing to {word}: it comes behind a cut.")
    check_order(found)
    return found


def given(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of a recipe, or of its file, with values set by their path; see `steps`."""
    held = dict(recipe) if isinstance(recipe, Mapping) else read(recipe)
    for path, value in (overrides or {}).items():
        held = changed(held, path, value)
    return held


def listed(held: Mapping[str, Any]) -> list[object]:
    """What a recipe has for its steps."""
    found = held.get("steps")
    if not isinstance(found, list) or not found:
        raise BadInput("a recipe has a list of steps, and this one has none.")
    return cast("list[object]", found)


def named(number: int, entry: object) -> tuple[str, dict[str, Any]]:
    """A step's method and what is said of it."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(cast("dict[object, Any]", entry)) == 1:
        ((name, said),) = cast("dict[object, Any]", entry).items()
        if said is None or isinstance(said, dict):
            return str(name), {str(key): one for key, one in cast("dict[object, Any]", said or {}).items()}
    raise BadInput(f"step {number} of the recipe is no method, nor a method with its settings: {str(entry)[:80]!r}.")


def step(number: int, entry: object, held: Mapping[str, Any]) -> AnyStep:
    """One step of a recipe."""
    name, said = named(number, entry)
    try:
        if name == "restore":
            return Restore(**optional(name, Restore, said))
        return healing(said) if name == "heal" else cut(name, said, held)
    except (BadInput, UnknownName) as error:
        raise BadInput(f"step {number} of the recipe: {error}") from error


def healing(said: Mapping[str, Any]) -> Heal:
    """A step that heals; raises BadInput or UnknownName."""
    return Heal(**optional("heal", Heal, said))


def optional(name: str, kind: type, said: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a step that does not cut, in the types of its fields."""
    known = get_type_hints(kind)
    if unknown := sorted(set(said) - set(known)):
        raise UnknownName(f"option of {name}", unknown[0], known)
    given: dict[str, Any] = {}
    for option, value in said.items():
        wanted = (known[option], *get_args(known[option]))
        if value is not None and str in wanted:  # a word, or a list of words
            words = [value] if isinstance(value, str) else value
            if not isinstance(words, list) or not all(isinstance(one, str) for one in cast("list[object]", words)):
                raise BadInput(f"{option} is a word, or a list of words, not {value!r}.")
            given[option] = value if known[option] is str else tuple(cast("list[str]", words))
            continue
        number = next(one for one in (bool, int, float) if one in wanted)
        given[option] = value if value is None else typed(option, value, number)
    return given


def cut(name: str, said: Mapping[str, Any], held: Mapping[str, Any]) -> Step:
    """A step that cuts, with the dial of the whole recipe where it has none of its own."""
    if name not in methods.known():
        raise UnknownName("method", name, [*methods.known(), "restore", "heal"])
    if unknown := sorted(set(said) - set(DIALS)):
        raise UnknownName(f"setting of {name}", unknown[0], DIALS)
    spends = None if said.get("allocate") is None else Allocation.parsed(said["allocate"])
    single = methods.dial_of(name) is not None  # weights: the widths of the whole recipe do not concern it
    given: dict[str, Any] = {"multiple_of": None if single else held.get("multiple_of"), **said}
    if not {"keep", "slice"} & set(said) and not single and not (spends is not None and spends.is_table):
        given["keep"] = held.get("keep")
    keep, slice_ = (None if given.get(dial) is None else typed(dial, given[dial], float) for dial in ("keep", "slice"))
    passes.check_dials(name, keep, slice_, spends, given["multiple_of"] if single else None)
    shared = held.get("spend") == "auto" and not {"keep", "slice"} & set(said) and keep not in (None, 1.0)
    multiple = None if given["multiple_of"] is None else typed("multiple_of", given["multiple_of"], int)
    if multiple is not None and multiple < 1:
        raise BadInput(f"multiple_of is a whole number from 1 on, not {multiple}.")
    options = given.get("options") or {}
    if not isinstance(options, dict):
        raise BadInput(f"the options of {name} are names with values, not {options!r}.")
    chosen = {str(key): one for key, one in cast("dict[object, Any]", options).items()}
    target = Target.parsed(held.get("target"))
    return passes.stepped(
        name, chosen, keep=keep, slice=slice_, multiple=multiple, allocation=spends, shared=shared, target=target
    )


def typed(name: str, value: object, kind: type) -> Any:
    """A number or a switch as YAML gives it; it takes 1e-3 for a word."""
    try:
        if isinstance(value, bool) == (kind is bool) and isinstance(value, str | int | float):
            made = kind(value)
            if isinstance(value, str) or made == value:
                return made
    except ValueError:
        pass
    what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise BadInput(f"{name} is {what}, not {value!r}.")


def changed(held: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The recipe with one value set; a step goes by its number from 1, or by its method."""
    out: dict[str, Any] = copy.deepcopy(dict(held))
    first, *rest = path.split(".")
    if not rest:
        return {**out, first: value}
    entries = listed(out)
    for number, entry in enumerate(entries, 1):
        name, said = named(number, entry)
        if first in (str(number), name):
            entries[number - 1] = {name: said}
            place: Any = said
            for word in rest[:-1]:
                place = place.setdefault(word, {}) if isinstance(place, dict) else None
            if not isinstance(place, dict) or not all(rest):
                raise BadInput(f"--set {path}: there are no settings at that place of the recipe.")
            place[rest[-1]] = value
            return out
    raise UnknownName("step of the recipe", first, [named(number, entry)[0] for number, entry in enumerate(entries, 1)])


def overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """Paths with values from "path=value"; values are read as YAML. Raises BadInput."""
    found: dict[str, Any] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        if not equals or not path:
            raise BadInput(f"--set {pair} has no value: write --set path=value.")
        try:
            found[path] = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise BadInput(f"--set {pair}: the value is not YAML.") from error
    return found
