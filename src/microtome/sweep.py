"""Many compressions, one table: methods by keeps by texts by seeds, on one model or several.

    keep: [0.9, 0.8]
    restore: [false, true]          # each entry without and with restoration; recipes say themselves
    data: [wikitext2]
    target: [gguf, tp=2]            # all of these at once
    seeds: [0]
    entries:
      slicegpt: {}
      fasp-neurons: {method: fasp, options: {spaces: ffn}, allocate: influence}
      ours: {steps: [{slicegpt: {keep: 0.95}}, modegpt, restore]}
      half: {method: sparsegpt, options: {density: 0.5}}      # single weights: no width is cut, and no keep concerns it
    then:                                                     # each result as it is, and with these steps behind it
      healed: [{heal: {steps: 200}}]
      4-bit: [{gptq: {options: {bits: 4}}}]

`{model}` in data or eval_data stands for the name of the model's folder. Every run is a row, written when it is done:
a sweep that was stopped goes on where it was. A run that fails is a row with the reason, and does not stop the others.
"""

import csv
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import torch

from microtome import methods, planner, recipes
from microtome.calibrate import Progress
from microtome.data import Tokens
from microtome.edit import Plan
from microtome.errors import BadCheckpoint, BadInput, MicrotomeError, UnknownName, UnsupportedModel
from microtome.evaluate import Perplexity, perplexity
from microtome.kept import Kept
from microtome.loading import device_of, load, tokenizer_of
from microtome.mixture import tokens_of
from microtome.pipeline import compress
from microtome.source import open_source
from microtome.target import Target
from microtome.texts import Spec, parted
from microtome.training import Heal

TOP = (
    "keep", "restore", "data", "eval_data", "seeds", "samples", "length", "text_column", "multiple_of", "target",
    "entries", "then",
)  # fmt: skip
ENTRY = ("method", "options", "allocate", "multiple_of", "steps", "recipe", "restore", "keep")
OLD_KEY = ("model", "entry", "restore", "keep", "data", "seed")  # of every table
KEY = (*OLD_KEY, "then")


@dataclass(frozen=True)
class Row:
    """One run. Sizes are numbers of parameters; perplexity is that of the protocol at the end."""

    model: str
    entry: str
    restore: bool
    keep: float
    data: str
    seed: int
    then: str = ""  # the steps behind it, by their name
    decoder: int | None = None  # in the blocks
    stored: int | None = None  # of the whole model, tied weights once
    decoder_ratio: float | None = None
    dense: float | None = None
    perplexity: float | None = None
    density: float | None = None  # that a method of single weights was asked for
    nonzero: int | None = None  # of the stored numbers, where weights were set to zero
    seconds: float | None = None
    stock: bool | None = None
    error: str = ""
    protocol: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What tells one run from another, as text."""
        return tuple(str(getattr(self, name)) for name in KEY)

    @property
    def cut(self) -> tuple[str, ...]:
        """What runs have in common that differ in what comes behind the cut, restoration too."""
        return tuple(str(getattr(self, name)) for name in KEY if name not in ("restore", "then"))


def read(place: str | Path) -> dict[str, Any]:
    """The contents of a sweep's file, checked; raises BadInput or UnknownName in one line."""
    held = recipes.read(place)
    if unknown := sorted(set(held) - set(TOP)):
        raise UnknownName("field of a sweep", unknown[0], TOP)
    entries = held.get("entries")
    if not isinstance(entries, dict) or not entries:
        raise BadInput(f"{place} has no entries: name at least one method.")
    for name, said in cast("dict[str, Any]", entries).items():
        if not isinstance(said, dict | None):
            raise BadInput(f"entry {name} of the sweep is no mapping of settings.")
        if unknown := sorted(set(cast("dict[str, Any]", said or {})) - set(ENTRY)):
            raise UnknownName(f"setting of the entry {name}", unknown[0], ENTRY)
        asked(name, dict(cast("dict[str, Any]", said or {})), 0.5)  # so that a mistake is found before the first run
    for more, (name, said) in itertools.product(behind(held).values(), cast("dict[str, Any]", entries).items()):
        asked(name, said or {}, 0.5, more)
    Target.parsed(held.get("target"))
    for keep in listed(held, "keep", 1.0 if all(single(*one) for one in entries.items()) else None):
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
            raise BadInput(f"keep {keep!r} of the sweep is outside (0, 1].")
    return held


def listed(held: Mapping[str, Any], name: str, default: Any = None) -> list[Any]:
    """A field that is one value or several."""
    value = held.get(name, default)
    if value is None:
        raise BadInput(f"the sweep says nothing of {name!r}.")
    return list(cast("list[Any]", value)) if isinstance(value, list) else [value]


def behind(held: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The steps that every entry is repeated with, by name."""
    said = held.get("then") or {}
    if not isinstance(said, dict) or not all(isinstance(one, list) for one in cast("dict[str, Any]", said).values()):
        raise BadInput(f"then of a sweep is a mapping of names to lists of steps, not {said!r}.")
    return {str(name): list(cast("list[Any]", one)) for name, one in cast("dict[str, Any]", said).items()}


def single(name: str, said: Mapping[str, Any] | None) -> bool:
    """Whether an entry changes single weights, so that no `keep` concerns it."""
    said = said or {}
    return not {"steps", "recipe"} & set(said) and methods.dial_of(str(said.get("method", name))) is not None


def asked(name: str, said: Mapping[str, Any], keep: float, then: Sequence[Any] = ()) -> dict[str, Any]:
    """An entry as arguments of `compress`, a recipe if other steps come behind it; raises what is wrong with either."""
    if "steps" in said or "recipe" in said:
        held = recipes.read(said["recipe"]) if "recipe" in said else {"steps": said["steps"]}
        held = {**rounded(said), **held, "keep": keep}
        return checked({**held, "steps": [*recipes.listed(held), *then]})
    method, alone = str(said.get("method", name)), single(name, said)
    told = ("options", "allocate") if not alone else [key for key in said if key not in ("method", "restore")]
    step = {method: {key: said[key] for key in told if key in said}}
    again = ["restore"] if said.get("restore") is True and (alone or then) else []
    recipe = checked({"steps": [step, *again, *then]} | ({} if alone else {"keep": keep} | rounded(said)))
    if then:
        return recipe
    options = {"method": method, "options": dict(said.get("options") or {})}
    return options if alone else options | {"keep": keep, "allocate": said.get("allocate")} | rounded(said)


def rounded(said: Mapping[str, Any]) -> dict[str, Any]:
    """The multiple that an entry's widths are rounded to, if it says one."""
    return {} if said.get("multiple_of") is None else {"multiple_of": said["multiple_of"]}


def checked(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without a mistake, as an argument of `compress`."""
    recipes.steps(recipe)
    return {"recipe": recipe}


def runs(models: Sequence[str], held: Mapping[str, Any]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every run that is asked for, and the arguments for it."""
    entries = cast("dict[str, Any]", held["entries"])
    spaces = (models, listed(held, "data", "wikitext2"), listed(held, "seeds", 0), keeps(held, entries))
    for model, data, seed, (name, keep) in itertools.product(*spaces):
        said = dict(cast("dict[str, Any]", entries[name] or {}))
        if "keep" in said and keep not in listed(said, "keep"):
            continue
        alone = single(name, said)
        whole = "steps" in said or "recipe" in said or alone
        said = ({} if alone else {"multiple_of": held.get("multiple_of")}) | said
        said = said if "steps" in said or "recipe" in said else seeded(name, said, int(seed))
        restores = [False] if whole else listed(said, "restore", listed(held, "restore", False))
        for restore, (then, more) in itertools.product(restores, {"": [], **behind(held)}.items()):
            given = asked(name, said if whole else {**said, "restore": restore}, float(keep), more)
            given |= {"target": held.get("target")} | ({} if "recipe" in given or whole else {"restore": restore})
            yield Row(model, name, bool(restore), float(keep), str(data), int(seed), then), given


def seeded(name: str, said: dict[str, Any], seed: int) -> dict[str, Any]:
    """An entry of one method, with the run's seed where that draws something and the entry names no seed."""
    draws = any(one.name == "seed" for one in fields(methods.find(str(said.get("method", name)))))
    return {**said, "options": {"seed": seed, **(said.get("options") or {})}} if draws else said


def keeps(held: Mapping[str, Any], entries: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Every entry with every keep; those that change single weights once, with all of their widths."""
    return [
        (name, keep)
        for name, said in entries.items()
        for keep in ([1.0] if single(name, said) else listed(held, "keep"))
    ]


def sweep(
    models: Sequence[str],
    held: Mapping[str, Any],
    out: Path,
    *,
    device: str = "auto",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Carry out every run that `out` (.csv or .parquet) does not hold yet, and return all rows."""
    if out.suffix not in (".csv", ".parquet"):
        raise BadInput(f"{out} is no table: name it .csv or .parquet.")
    done = {row.key: row for row in table(out)}
    todo = list(runs(models, held))
    for model in dict.fromkeys(row.model for row, _given in todo if row.key not in done):
        with suppress(BadCheckpoint, UnsupportedModel), open_source(model):
            pass  # a name that is wrong is said now, not in every row; what is wrong inside a folder is a row
    with tempfile.TemporaryDirectory(prefix="microtome-sweep-") as scratch:
        texts, number = Texts(held, device), 0
        for _, runs_alike in itertools.groupby(todo, key=lambda run: run[0].cut):
            group = list(runs_alike)
            with Kept() as kept:
                for row, given in group:
                    if row.key not in done:
                        shared = kept if len(group) > 1 else None
                        done[row.key] = carried_out(row, given, texts, cache or Path(scratch), device, shared)
                        write(out, list(done.values()))
                    number += 1
                    if progress is not None:
                        progress("sweep", number / len(todo))
    return list(done.values())


class Texts:
    """Calibration and evaluation windows, and the dense perplexity, of every model, text and seed: made once."""

    def __init__(self, held: Mapping[str, Any], device: str) -> None:
        self.held, self.device = held, device
        self.known: dict[tuple[str, str, int], tuple[Tokens | None, Tokens | None]] = {}
        self.dense: dict[tuple[str, str], Perplexity] = {}
        self.folder: dict[str, Path] = {}  # where a model lies, which may be a hub id

    def of(self, row: Row) -> tuple[Tokens, Tokens]:
        """The windows of one run."""
        key = (row.model, row.data, row.seed)
        if key not in self.known:
            with open_source(row.model) as source:
                self.folder[row.model] = source.folder
                self.known[key] = tokens_of(
                    planner.opened(source),
                    tokenizer_of(source.folder),
                    row.data.format(model=Path(row.model).name),
                    None if (text := self.held.get("eval_data")) is None else text.format(model=Path(row.model).name),
                    samples=self.held.get("samples", 128),
                    length=self.held.get("length"),
                    seed=row.seed,
                    needed=True,
                    measure=True,
                    device=device_of(self.device),
                    column=self.held.get("text_column"),
                )
        calibration, evaluation = self.known[key]
        if calibration is None or evaluation is None:
            raise BadInput(f"{row.data} gives nothing to measure on: name eval_data in the sweep.")
        return calibration, evaluation

    def given(self, row: Row, calibration: Tokens, *, heals: bool) -> dict[str, Any]:
        """The text of one run as arguments of `compress`: windows, but all that is not measured on where steps heal."""
        if not heals and not behind(self.held):
            return {"data": calibration.ids, "samples": None, "measure": False}
        said = {name: self.held[name] for name in ("samples", "length", "text_column") if name in self.held}
        data: Spec = row.data.format(model=Path(row.model).name)
        if self.held.get("eval_data") is None:
            words = tokenizer_of(self.folder[row.model])
            parts = parted(data, self.held.get("text_column"), tokenizer=words)
            data = data if parts is None else parts[0]
        return {"data": data, "seed": row.seed, "measure": False} | said

    def before(self, row: Row, evaluation: Tokens) -> Perplexity:
        """The uncut model's perplexity."""
        key = (row.model, evaluation.sha256)
        if key not in self.dense:
            self.dense[key] = self.measured(self.folder[row.model], evaluation)
        return self.dense[key]

    def measured(self, folder: Path, evaluation: Tokens) -> Perplexity:
        """The perplexity of a folder, in fp32 on a CPU, else in its own type."""
        where = device_of(self.device)
        return perplexity(load(folder, device=where, dtype=torch.float32 if where.type == "cpu" else None), evaluation)


def carried_out(
    row: Row, given: Mapping[str, Any], texts: Texts, cache: Path, device: str, kept: Kept | None = None
) -> Row:
    """One run; a failure is a row too."""
    start = time.perf_counter()
    try:
        calibration, evaluation = texts.of(row)
        heals = "recipe" in given and any(isinstance(step, Heal) for step in recipes.steps(given["recipe"]))
        text = texts.given(row, calibration, heals=heals)
        made = compress(row.model, **text, cache=cache, device=device, kept=kept, **given)
        seconds = time.perf_counter() - start + (0.0 if kept is None else kept.saved)
        before, after = texts.before(row, evaluation), texts.measured(made.folder, evaluation)
    except (MicrotomeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Row(**{name: getattr(row, name) for name in KEY}, error=reason[:300])
    return Row(
        **{name: getattr(row, name) for name in KEY},
        decoder=made.after.decoder,
        stored=made.after.stored,
        decoder_ratio=made.after.ratio("decoder", made.before),
        density=density(made.plan),
        nonzero=made.after.nonzero,
        dense=before.value,
        perplexity=after.value,
        seconds=round(seconds, 2),
        stock=made.stock,
        protocol=after.protocol(),
    )


def density(plan: Plan) -> float | None:
    """The density that the last step of single weights was asked for."""
    steps = [(plan.method, plan.options), *((step["method"], step["options"]) for step in plan.then)]
    built = [methods.build(*step) for step in steps if step[0] not in {"restore", "heal"}]
    return next((one.share for one in reversed(built) if getattr(one, "share", None) is not None), None)


# --- the table ------------------------------------------------------------------------------------------------------


def table(place: Path) -> list[Row]:
    """The rows of a table that is there already."""
    if not place.is_file():
        return []
    try:
        if place.suffix == ".parquet":
            import pyarrow.parquet as pq

            return [Row(**row) for row in pq.read_table(place).to_pylist()]
        with place.open(newline="", encoding="utf-8") as file:
            return [typed(row) for row in csv.DictReader(file)]
    except Exception as error:  # of another sweep, or no table at all
        raise BadInput(f"cannot go on with {place}: it is not a table of this sweep ({error}).") from error


def typed(row: Mapping[str, str]) -> Row:
    """A row of a CSV file."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(Row).items():
        kinds, text = list(get_args(hint)) or [hint], row[name] if name in OLD_KEY else row.get(name) or ""
        values[name] = None if not text and len(kinds) > 1 else text == "True" if bool in kinds else kinds[0](text)
    return Row(**values)


def write(place: Path, rows: Sequence[Row]) -> None:
    """The whole table, put in place in one step."""
    partial = place.with_name(f".{place.name}.partial")
    try:
        if place.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), partial)
        else:
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [one.name for one in fields(Row)])
                writer.writeheader()
                writer.writerows(
                    {key: "" if value is None else value for key, value in asdict(row).items()} for row in rows
                )
        partial.replace(place)
    except ImportError as error:
        raise BadInput(f"writing {place.name} needs pyarrow: pip install pyarrow, or name it .csv.") from error
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise BadInput(f"cannot write {place}: {error.strerror}.") from error
