"""Published tables, run again under their own protocol, each value beside the one measured.

    python scripts/reproduce.py                                        # the list: every entry and how it stands
    python scripts/reproduce.py --only 'slicegpt-128/opt-125m/*'       # needs the hub, or --models-root
    python scripts/reproduce.py --only '*-small/*' --models-root ../shared/models

The entries are those of benchmarks/published.yaml. An entry compresses a model as its table says, through the public
API, measures what was written, and is within its tolerance or not. What an entry waits for, a method that is not there
yet say, is skipped and named. A failure is one line in the record, and the next entry runs. Records are written after
every entry; a second run skips what is there, unless it failed or its recipe has changed since.
"""

import argparse
import inspect
import json
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

import microtome
from microtome import corpora, methods, running
from microtome.errors import BadInput, MicrotomeError
from microtome.loading import device_of
from microtome.source import open_source

HERE = Path(__file__).resolve().parent
TABLES = HERE.parent / "benchmarks" / "published.yaml"
MODELS = HERE.parent.parent / "shared" / "models"
DENSE = "dense"  # in the place of a method: the model as it is, which shows that the evaluation is the published one
STATUSES = ("verified", "unverified")
IDS = "tokens/"  # token ids lie beside the folder of models, in ../data


@dataclass(frozen=True)
class Entry:
    """One published number and all that is needed to come to it again. Tolerances are relative."""

    id: str
    paper: str
    table: str
    evidence: str
    model: str  # hub id, or the name of a folder under --models-root where `local`
    local: bool
    method: str
    options: dict[str, Any]
    dial: dict[str, Any]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    published: float
    tolerance: float
    why: str
    status: str
    reason: str | None
    parameters: int | None
    parameters_within: int

    def recipe(self) -> dict[str, Any]:
        """What decides the outcome: a record with another recipe is of another run."""
        return {name: value for name, value in asdict(self).items() if name not in {"status", "reason", "why"}}


@dataclass(frozen=True)
class Measured:
    """What came of an entry."""

    value: float
    parameters: int
    protocol: str


@dataclass(frozen=True)
class Setting:
    """Where entries run: device, folder of models, folder that keeps the results (None keeps none)."""

    device: str
    models: Path
    out: Path | None


# --- the tables -----------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Entry]:
    """Every entry of a file of tables, in its order. Raises BadInput with the table that is not as it should be."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read {path}: {' '.join(str(error).split())}.") from error
    tables = found.get("tables") if isinstance(found, dict) else None
    if not isinstance(tables, list) or not tables:
        raise BadInput(f"{path} has no tables. See {TABLES.name} for the form.")
    return [entry for table in tables for entry in expanded(table, path)]


def expanded(table: Mapping[str, Any], path: Path) -> list[Entry]:
    """The entries of one table: a number for each model and dial, null where the paper has none."""
    name = f"table {table.get('id', '(without an id)')!r} of {path}"
    derived = {"id", "model", "dial", "published", "parameters", "local", "parameters_within"}
    needed = {"id", "dials", "values"} | {one.name for one in fields(Entry)} - derived
    if missing := sorted(needed - set(table)):
        raise BadInput(f"{name} lacks {', '.join(missing)}.")
    if unknown := sorted(set(table) - needed - derived):
        raise BadInput(f"{name} has fields that are not known: {', '.join(unknown)}.")
    if table["status"] not in STATUSES:
        raise BadInput(f"{name} has the status {table['status']!r}: it is one of {', '.join(STATUSES)}.")
    common = {one.name: table[one.name] for one in fields(Entry) if one.name in needed}
    found: list[Entry] = []
    for model, row in table["values"].items():
        sizes = table.get("parameters", {}).get(model, [None] * len(row))
        if not len(row) == len(sizes) == len(table["dials"]):
            raise BadInput(f"{name} has {len(table['dials'])} dials, and {len(row)} values for {model}.")
        for dial, value, size in zip(table["dials"], row, sizes, strict=True):
            if value is not None:
                given = {"local": table.get("local", False), "parameters_within": table.get("parameters_within", 0)}
                own = {"id": named(table["id"], model, dial), "model": model, "dial": dial, "published": value}
                found.append(Entry(**(common | given | own), parameters=size))
    return [replace(one, **{part: filled(getattr(one, part), one) for part in ("calibration", "evaluation")})
            for one in found]  # fmt: skip


def named(table: str, model: str, dial: Mapping[str, Any]) -> str:
    """`slicegpt-128/opt-125m/slice=0.25`."""
    return "/".join([table, model.rpartition("/")[2], *(f"{name}={value}" for name, value in dial.items())])


def filled(part: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """The model's name put into the name of its data."""
    data = part["data"]
    return dict(part) | {"data": data and data.replace("{model}", entry.model)}


def chosen(entries: Sequence[Entry], pattern: str | None) -> list[Entry]:
    """Entries whose id matches a pattern, all without one. Raises BadInput where none does."""
    found = [one for one in entries if pattern is None or fnmatchcase(one.id, pattern)]
    if not found:
        raise BadInput(f"no entry matches {pattern!r}. An id reads like {entries[0].id}; without --only all are shown.")
    return found


def waiting(entry: Entry) -> str | None:
    """What microtome does not have yet and an entry needs; None where it can run."""
    if entry.evaluation["measure"] != "perplexity":
        return f"waits for evaluation {entry.evaluation['measure']}"
    if entry.method == DENSE:
        return unknown_data(entry.evaluation["data"])
    if entry.method not in methods.known():
        return f"waits for method {entry.method}"
    dials = set(inspect.signature(microtome.compress).parameters)
    if unknown := sorted(set(entry.dial) - dials):
        return f"waits for dial {', '.join(unknown)}"
    return unknown_data(entry.calibration["data"]) or unknown_data(entry.evaluation["data"])


def unknown_data(data: str | None) -> str | None:
    """Whether a data set goes by a name that microtome does not know."""
    if data is None or data in corpora.KNOWN or data.startswith(IDS):
        return None
    return f"waits for data set {data}"


# --- one entry ------------------------------------------------------------------------------------------------------


def measure(entry: Entry, setting: Setting) -> Measured:
    """Compress as the entry says, and measure what was written. fp32 on a CPU, else the type of the protocol."""
    model = place_of(entry, setting)
    if entry.method == DENSE:
        return evaluated(model, entry, setting)
    data = entry.calibration["data"]
    given = {key: entry.calibration[key] for key in ("samples", "length", "seed")}
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        out = Path(folder) / "model" if setting.out is None else setting.out / re.sub(r"[^\w.=-]", "-", entry.id)
        microtome.compress(
            model,
            method=entry.method,
            options=entry.options,
            data=spec_of(data, setting) if data else "wikitext2",
            **given,
            **entry.dial,
            dtype=entry.evaluation["dtype"],
            device=setting.device,
            out=out,
            overwrite=True,
            measure=False,
        )
        return evaluated(str(out), entry, setting)


def evaluated(model: str, entry: Entry, setting: Setting) -> Measured:
    """Perplexity of a model under the entry's protocol, and its stored parameters."""
    wide = "float32" if device_of(setting.device).type == "cpu" else entry.evaluation["dtype"]
    data = spec_of(entry.evaluation["data"], setting)
    (found,) = running.evaluate(
        model, data, length=entry.evaluation["length"], device=setting.device, dtype=wide
    ).values()
    return Measured(found.value, stored(model), found.protocol())


def stored(model: str) -> int:
    """Numbers in the weight files of a folder or hub model, index buffers and masks left out."""
    with open_source(model) as source:
        return sum(
            torch.Size(source.shape(name)).numel() for name in source.names() if source.dtype(name).is_floating_point
        )


def place_of(entry: Entry, setting: Setting) -> str:
    """A folder under the models' root that has the model's id or its last word, else the hub id."""
    for folder in (setting.models / entry.model, setting.models / entry.model.rpartition("/")[2]):
        if folder.is_dir():
            return str(folder)
    if entry.local:
        raise BadInput(f"no folder {entry.model!r} in {setting.models}. Say with --models-root where it lies.")
    return entry.model


def spec_of(data: str, setting: Setting) -> str:
    """A known data set by its name, token ids by their path."""
    return str(setting.models.parent / "data" / data) if data.startswith(IDS) else data


def verdict(entry: Entry, found: Measured) -> str:
    """`within` the tolerance or `outside` it; parameters count too, where they were published."""
    near = abs(found.value - entry.published) <= entry.tolerance * entry.published
    if entry.parameters is not None:
        near &= abs(found.parameters - entry.parameters) <= entry.parameters_within
    return "within" if near else "outside"


# --- a run ----------------------------------------------------------------------------------------------------------


def run(
    entries: Sequence[Entry],
    setting: Setting,
    records: dict[str, dict[str, Any]],
    save: Callable[[], None],
    runner: Callable[[Entry, Setting], Measured] = measure,
) -> None:
    """Run what neither waits nor is recorded; `records` (id to record) is added to, and saved after every entry."""
    for entry in entries:
        if word := waiting(entry):
            print(f"{entry.id}: {word}")
        elif done(entry, records.get(entry.id)):
            print(f"{entry.id}: {records[entry.id]['verdict']}, recorded before")
        else:
            records[entry.id] = recorded(entry, setting, runner)
            save()
            print(f"{entry.id}: {told(records[entry.id])}", flush=True)


def done(entry: Entry, record: Mapping[str, Any] | None) -> bool:
    """Whether a record is of this recipe and did not fail."""
    return record is not None and record["verdict"] != "failed" and record["recipe"] == entry.recipe()


def recorded(entry: Entry, setting: Setting, runner: Callable[[Entry, Setting], Measured]) -> dict[str, Any]:
    """The record of one run; what goes wrong is one line of it."""
    start = time.perf_counter()
    facts: dict[str, Any] = {"id": entry.id, "recipe": entry.recipe(), "device": str(device_of(setting.device))}
    try:
        found = runner(entry, setting)
    except Exception as error:  # of any library: the other entries still run
        line = next(iter(str(error).splitlines()), "")
        text = line if isinstance(error, MicrotomeError) else f"{type(error).__name__}: {line}"
        return facts | {"verdict": "failed", "error": text}
    return facts | {
        "published": entry.published,
        "measured": found.value,
        "deviation": found.value / entry.published - 1,
        "tolerance": entry.tolerance,
        "parameters": found.parameters,
        "protocol": found.protocol,
        "verdict": verdict(entry, found),
        "seconds": round(time.perf_counter() - start, 1),
    }


def told(record: Mapping[str, Any]) -> str:
    """A record in one line."""
    if record["verdict"] == "failed":
        return f"failed: {record['error']}"
    numbers = f"published {record['published']:g}, measured {record['measured']:.4g} ({record['deviation']:+.2%})"
    return f"{record['verdict']}: {numbers}, {record['parameters']:,} parameters"


def standing(entry: Entry, records: Mapping[str, Mapping[str, Any]]) -> str:
    """How an entry stands: by the record, by what it waits for, or as the table says."""
    record = records.get(entry.id)
    if record is not None and record["recipe"] == entry.recipe():
        return told(record)
    return waiting(entry) or (f"unverified: {entry.reason}" if entry.reason else "not run here")


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Records by id; none where there is no file yet."""
    if not path.exists():
        return {}
    try:
        return {record["id"]: record for record in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} holds no records of this script. Give another file with --json.") from error


def write(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """All records, and what they were made with; the file is replaced in one step."""
    content = {
        "command": shlex.join(["python", "scripts/reproduce.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "rows": list(records.values()),
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 2 for a mistake, 1 where an entry failed or is outside its tolerance, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the entries and run nothing")
    parser.add_argument("--only", metavar="PATTERN", help="run entries with such ids, as in '*/opt-125m/*'; '*' is all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="folder that keeps the compressed models; else they are deleted")
    parser.add_argument("--json", type=Path, default=Path("reproduce.json"), help="records, read and written")
    parser.add_argument(
        "--models-root", type=Path, default=MODELS, help="folder of model folders, tried before the hub"
    )
    args = parser.parse_args(words)
    try:
        entries, records = chosen(read(TABLES), args.only), load(args.json)
        if args.list or args.only is None:
            for entry in entries:
                print(f"{entry.id:48} {entry.published:>8g}  {standing(entry, records)}")
            return 0
        device_of(args.device)
        if not args.json.parent.is_dir():
            raise BadInput(f"no folder {args.json.parent} to write {args.json.name} to.")
        run(entries, Setting(args.device, args.models_root, args.out), records, lambda: write(args.json, records))
    except (MicrotomeError, OSError) as error:
        print(f"reproduce: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return int(any(records[one.id]["verdict"] != "within" for one in entries if one.id in records))


if __name__ == "__main__":
    sys.exit(main())
