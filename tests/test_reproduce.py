"""scripts/reproduce.py: the file of published values, what is run of it, and what the record says afterwards."""

import importlib.util
import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from tinies import CALIBRATION, HELD_OUT, folder
from transformers import AutoModelForCausalLM

from microtome import corpora, methods
from microtome.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reproduce: Any = script()
ENTRIES = reproduce.read(reproduce.TABLES)
TABLE: dict[str, Any] = {
    "id": "small",
    "paper": "nobody's",
    "table": "none",
    "evidence": "code",
    "local": True,
    "method": "slicegpt",
    "options": {"basis": "junction"},
    "calibration": {"data": "tokens/{model}.calib.pt", "samples": None, "length": None, "seed": 0},
    "evaluation": {
        "measure": "perplexity",
        "data": "tokens/{model}.eval.pt",
        "length": None,
        "stride": None,
        "dtype": "float32",
    },
    "tolerance": 0.01,
    "why": "nothing is drawn",
    "status": "unverified",
    "reason": "a test",
    "dials": [{"slice": 0.25}, {"slice": 0.5}],
    "values": {"tiny": [10.0, 20.0]},
}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts other tables in the place of the published ones, and gives their entries."""

    def tables(*found: dict[str, Any]) -> Any:
        monkeypatch.setattr(reproduce, "TABLES", tmp_path / "tables.yaml")
        reproduce.TABLES.write_text(yaml.safe_dump({"tables": list(found)}))
        return reproduce.read(reproduce.TABLES)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tables


# --- the published values -------------------------------------------------------------------------------------------


def test_every_entry_is_whole() -> None:
    names = [entry.id for entry in ENTRIES]
    assert len(set(names)) == len(names) > 300
    for entry in ENTRIES:
        assert entry.evidence in {"paper", "code", "secondary"}, entry.id
        assert 1 < entry.published < 100, entry.id
        assert 0 < entry.tolerance <= 0.06, entry.id
        assert entry.why, entry.id
        assert (entry.status == "verified") == (entry.reason is None), entry.id
        assert entry.local == ("/" not in entry.model), entry.id
        assert set(entry.calibration) == {"data", "samples", "length", "seed"}, entry.id
        assert set(entry.evaluation) == {"measure", "data", "length", "stride", "dtype"}, entry.id
        assert entry.evaluation["stride"] == entry.evaluation["length"], entry.id
        assert len(set(entry.dial) - {"allocate"}) == (0 if entry.method == "dense" else 1), entry.id


def test_the_papers_models_are_all_here() -> None:
    """OPT from 125M to 66B, Llama-2 and 3, and Phi-2."""
    sliced = {entry.model.rpartition("/")[2] for entry in ENTRIES if entry.method == "slicegpt"}
    sizes = ("125m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    assert {f"opt-{size}" for size in sizes} <= sliced
    assert {f"Llama-2-{size}-hf" for size in ("7b", "13b", "70b")} | {"Llama-3.1-8B", "phi-2"} <= sliced


def test_more_is_lost_where_more_is_cut() -> None:
    """A misread row would stand out: along the dials of a table, perplexity grows and the score of tasks falls."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for entry in ENTRIES:
        if next(iter(entry.dial), "") in {"slice", "keep", "total_keep"}:
            rows.setdefault((entry.id.partition("/")[0], entry.model), []).append(entry)
    assert len(rows) > 60
    for place, row in rows.items():
        values = [entry.published for entry in row]
        falls = row[0].evaluation["measure"] != "perplexity"
        assert values == sorted(values, reverse=falls), place


def test_options_are_taken_by_their_method() -> None:
    built = [methods.build(entry.method, entry.options) for entry in ENTRIES if entry.method in methods.known()]
    assert len(built) > 100


def test_what_is_called_verified_was_run() -> None:
    """And came out within its tolerance, by the numbers of the record and not by its word."""
    records = {row["id"]: row for row in json.loads((ROOT / "benchmarks" / "reproduce.json").read_text())["rows"]}
    verified = [entry for entry in ENTRIES if entry.status == "verified"]
    assert len(verified) == 25
    for entry in verified:
        row = records[entry.id]
        assert row["recipe"] == entry.recipe(), entry.id
        assert abs(row["measured"] / entry.published - 1) <= entry.tolerance, entry.id
        assert abs(row["parameters"] - entry.parameters) <= entry.parameters_within, entry.id
        assert row["verdict"] == "within", entry.id


# --- what waits -----------------------------------------------------------------------------------------------------


def test_what_microtome_lacks_is_waited_for(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry, _) = tables(TABLE)
    assert reproduce.waiting(entry) is None
    other = replace(entry, method="of-tomorrow", dial={"of_old": 0.5})
    assert reproduce.waiting(other) == "waits for method of-tomorrow"
    monkeypatch.setattr(methods, "known", lambda: ["of-tomorrow", "slicegpt"])
    assert reproduce.waiting(other) == "waits for dial of_old"
    assert reproduce.waiting(replace(other, dial={"keep": 0.5})) is None
    for part in ("calibration", "evaluation"):
        elsewhere = replace(entry, **{part: getattr(entry, part) | {"data": "all-books"}})
        assert reproduce.waiting(elsewhere) == "waits for data set all-books"
        assert reproduce.waiting(replace(entry, **{part: getattr(entry, part) | {"data": "wikitext2"}})) is None
    tasks = replace(entry, evaluation=entry.evaluation | {"measure": "taste"})
    assert reproduce.waiting(tasks) == "waits for evaluation taste"
    assert "wikitext2" in corpora.KNOWN


# --- verdicts and records -------------------------------------------------------------------------------------------


def found(value: float, parameters: int = 100) -> Any:
    return reproduce.Measured(value, parameters, "a protocol")


def test_verdicts(tables: Any) -> None:
    (entry, _) = tables(TABLE)
    for value, want in ((10.0, "within"), (10.09, "within"), (9.91, "within"), (10.11, "outside"), (9.89, "outside")):
        assert reproduce.verdict(entry, found(value)) == want, value
    sized = replace(entry, parameters=100, parameters_within=2)
    for size, want in ((100, "within"), (98, "within"), (102, "within"), (97, "outside"), (103, "outside")):
        assert reproduce.verdict(sized, found(10.0, size)) == want, size


def test_a_run_goes_on_after_failures_and_is_taken_up_again(tables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    waits = TABLE | {"id": "later", "method": "of-tomorrow"}
    entries = tables(waits, TABLE)
    setting, records, saved, ran = reproduce.Setting("cpu", Path(), None), {}, [], []

    def runner(entry: Any, _: Any) -> Any:
        ran.append(entry.id)
        if entry.dial == {"slice": 0.25} and len(ran) == 1:
            raise RuntimeError("no luck\nand a second line")
        return found(20.1)

    def go() -> str:
        reproduce.run(entries, setting, records, lambda: saved.append(len(records)), runner)
        return capsys.readouterr().out

    first, second = "small/tiny/slice=0.25", "small/tiny/slice=0.5"
    told = go()
    assert f"{first}: failed: RuntimeError: no luck\n" in told
    assert "later/tiny/slice=0.25: waits for method of-tomorrow\n" in told
    assert (ran, saved) == ([first, second], [1, 2])
    assert records[second]["verdict"] == "within"
    assert records[second]["deviation"] == pytest.approx(0.005)
    told = go()
    assert f"{second}: within, recorded before" in told
    assert ran == [first, second, first]
    assert records[first]["verdict"] == "outside"
    assert json.loads(json.dumps(records))[first]["recipe"] == entries[2].recipe()
    go()
    assert len(ran) == 3
    entries[3] = replace(entries[3], options={"basis": "global"})
    go()
    assert ran[3:] == [second]


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_list_names_every_entry(tables: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tables(TABLE | {"status": "verified", "reason": None}, TABLE | {"id": "later", "method": "of-tomorrow"},
           TABLE | {"id": "far", "values": {"tiny": [None, 30.5]}})  # fmt: skip
    assert reproduce.main(["--list"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["small/tiny/slice=0.25", "10", "not run here"],
        ["small/tiny/slice=0.5", "20", "not run here"],
        ["later/tiny/slice=0.25", "10", "waits for method of-tomorrow"],
        ["later/tiny/slice=0.5", "20", "waits for method of-tomorrow"],
        ["far/tiny/slice=0.5", "30.5", "unverified: a test"],
    ]
    assert reproduce.main(["--list", "--only", "far/*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_mistakes_are_one_line(tables: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables(TABLE)

    def refused(words: str, *arguments: str) -> None:
        assert reproduce.main(arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("reproduce: ")
        assert words in err

    refused("no entry matches 'smal'. An id reads like small/tiny/slice=0.25", "--only", "smal")
    refused("no folder missing to write out.json to", "--only", "*", "--json", "missing/out.json")
    (tmp_path / "other.json").write_text("[1]")
    refused("other.json holds no records of this script", "--only", "*", "--json", "other.json")
    refused("device", "--only", "*", "--device", "abacus")
    for change, words in (
        ({"status": "perhaps"}, "has the status 'perhaps': it is one of verified, unverified"),
        ({"statsu": 1}, "has fields that are not known: statsu"),
        ({"values": {"tiny": [1.0]}}, "has 2 dials, and 1 values for tiny"),
    ):
        with pytest.raises(BadInput, match="table 'small'"):
            tables(TABLE | change)
        refused(words, "--list")
    with pytest.raises(BadInput, match=r"table 'small' of .* lacks tolerance, why\.$"):
        tables({key: value for key, value in TABLE.items() if key not in {"tolerance", "why"}})
    reproduce.TABLES.write_text("tables: [")
    refused("cannot read", "--list")
    reproduce.TABLES.write_text("rows: []")
    refused("has no tables", "--list")


def loss(place: Path) -> float:
    """transformers' own mean over predicted tokens; windows are of one length."""
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        return model(HELD_OUT, labels=HELD_OUT).loss.exp().item()


def test_from_end_to_end(tables: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dense model, a slice of it, one that is not there: measured as transformers does, recorded, and kept."""
    shutil.copytree(folder("llama"), tmp_path / "models" / "tiny")
    (tmp_path / "data" / "tokens").mkdir(parents=True)
    for kind, tokens in (("calib", CALIBRATION), ("eval", HELD_OUT)):
        torch.save(tokens, tmp_path / "data" / "tokens" / f"tiny.{kind}.pt")
    want = loss(tmp_path / "models" / "tiny")
    dense = {"id": "dense", "method": "dense", "options": {}, "dials": [{}], "values": {"tiny": [want]}}
    cut = {"dials": [{"slice": 0.5}], "values": {"tiny": [want], "gone": [5.0]}}
    entries = {entry.id: entry for entry in tables(TABLE | dense, TABLE | cut)}
    code = reproduce.main(["--only", "*", "--models-root", str(tmp_path / "models"), "--out", str(tmp_path / "kept")])
    told = capsys.readouterr().out
    assert code == 1
    record = json.loads((tmp_path / "reproduce.json").read_text())
    rows = {row["id"]: row for row in record["rows"]}
    assert set(record["versions"]) == {"microtome", "torch", "transformers"}
    assert rows["dense/tiny"]["verdict"] == "within"
    sliced = rows["small/tiny/slice=0.5"]
    assert "error" not in sliced, sliced
    (kept,) = (tmp_path / "kept").iterdir()
    assert sliced["measured"] == pytest.approx(loss(kept), rel=1e-4)
    assert sliced["measured"] > 1.01 * want
    assert sliced["verdict"] == "outside"
    assert sliced["parameters"] == AutoModelForCausalLM.from_pretrained(kept).num_parameters()
    assert "4 windows of 24, stride 24, float32" in sliced["protocol"]
    assert sliced["recipe"] == {
        name: value for name, value in asdict(entries[sliced["id"]]).items() if name not in {"status", "reason", "why"}
    }
    assert "small/gone/slice=0.5: failed: no folder 'gone' in" in told
    assert rows["small/gone/slice=0.5"]["verdict"] == "failed"
    assert set(sliced["recipe"]) | {"status", "reason", "why"} == {one.name for one in fields(reproduce.Entry)}
