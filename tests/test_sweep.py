"""Sweeps: every run a row, written when it is done; failures are rows; a stopped sweep goes on."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import raises
from tinies import CALIBRATION, HELD_OUT, compress, folder

import microtome_cli
from microtome import chain, pipeline, sweep
from microtome.errors import BadInput, UnknownName


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    for name, ids in (("calibration", CALIBRATION), ("held_out", HELD_OUT)):
        torch.save(ids, tmp_path / f"{name}.pt")
    return {
        "keep": [0.8, 0.6],
        "restore": [False, True],
        "data": str(tmp_path / "calibration.pt"),
        "eval_data": str(tmp_path / "held_out.pt"),
        "entries": {
            "slicegpt": {"restore": False},
            "neurons": {"method": "fasp", "options": {"spaces": "ffn"}},
            "both": {"steps": [{"slicegpt": {"keep": 0.9}}, "fasp", "restore"]},
        },
    }


def written(place: Path, held: dict[str, Any]) -> Path:
    place.write_text(yaml.safe_dump(held, sort_keys=False))
    return place


def test_the_page_about_sweeps_names_every_field(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "sweep.md").read_text()
    example = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "sweep.yaml").write_text(example)
    assert sweep.read(tmp_path / "sweep.yaml")["seeds"] == [0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(word.strip("`, ") for row in rows for word in row.split(",")) == sorted(sweep.TOP)


def test_a_row_is_what_compress_says(asked: dict[str, Any], tmp_path: Path) -> None:
    held = sweep.read(written(tmp_path / "sweep.yaml", asked))
    rows = sweep.sweep([str(folder("llama"))], held, tmp_path / "table.csv")
    assert [(row.entry, row.restore, row.keep) for row in rows] == [
        ("slicegpt", False, 0.8), ("slicegpt", False, 0.6), ("neurons", False, 0.8), ("neurons", True, 0.8),
        ("neurons", False, 0.6), ("neurons", True, 0.6), ("both", False, 0.8), ("both", False, 0.6),
    ]  # fmt: skip
    assert not any(row.error for row in rows)
    assert len({row.protocol for row in rows}) == len({row.dense for row in rows}) == 1
    made = compress(folder("llama"), tmp_path / "one", method="fasp", options={"spaces": "ffn"}, keep=0.6)
    row = rows[4]
    assert (row.decoder, row.stored, row.stock) == (made.after.decoder, made.after.stored, made.stock)
    assert row.decoder_ratio == made.after.decoder / made.before.decoder
    with torch.no_grad():
        losses = made.load()(HELD_OUT, labels=HELD_OUT).loss
    assert row.perplexity == pytest.approx(losses.exp().item(), rel=1e-4)
    assert sweep.table(tmp_path / "table.csv") == rows


def test_a_seed_reaches_what_draws(asked: dict[str, Any], tmp_path: Path) -> None:
    entries = {"random": {}, "fixed": {"method": "random", "options": {"seed": 5}}, "fasp": {}}
    held = asked | {"entries": entries, "keep": 0.8, "restore": False, "seeds": [0, 5]}
    rows = {
        (row.entry, row.seed): row.perplexity for row in sweep.sweep([str(folder("llama"))], held, tmp_path / "t.csv")
    }
    assert rows["random", 0] != rows["random", 5] == rows["fixed", 0] == rows["fixed", 5]
    assert rows["fasp", 0] == rows["fasp", 5], "the ids are the same"


def test_a_stopped_sweep_goes_on(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, out, made = asked | {"entries": {"slicegpt": {}}}, tmp_path / "table.csv", sweep.compress
    count = 0

    def stopping(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return made(*given, **named)

    monkeypatch.setattr(sweep, "compress", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep([str(folder("llama"))], held, out)
    first = sweep.table(out)
    assert len(first) == 2
    rows = sweep.sweep([str(folder("llama"))], held, out)
    assert rows[:2] == first
    assert (len(rows), count) == (4, 5)


def test_every_result_with_other_steps_behind_it(asked: dict[str, Any], tmp_path: Path) -> None:
    """Rows of their own, with the same base: 8 bits leave the perplexity nearly where it was, three do not."""
    pytest.importorskip("compressed_tensors")
    entries = {"magnitude": {}, "half": {"method": "wanda", "options": {"density": 0.5}}}
    bits = {f"{bits}-bit": [{"gptq": {"options": {"bits": bits, "group": 0}}}] for bits in (8, 3)}
    rows = sweep.sweep(
        [str(folder("llama"))], asked | {"entries": entries, "keep": 0.8, "then": bits}, tmp_path / "table.csv"
    )
    assert not [row.error for row in rows if row.error]
    found = {(row.entry, row.restore, row.then): row.perplexity or 0.0 for row in rows}
    assert len(found) == len(rows) == 9
    for entry, restore in {key[:2] for key in found}:
        plain, eight, three = (found[entry, restore, then] for then in ("", "8-bit", "3-bit"))
        assert abs(eight / plain - 1) < 0.01
        assert abs(three / plain - 1) > abs(eight / plain - 1)
    again = sweep.table(tmp_path / "table.csv")
    assert {row.key for row in again} == {row.key for row in rows}


def test_what_comes_with_other_steps_behind_it_is_made_once(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step runs once, and the rows are those of runs that share nothing, widths, zeros and form too."""
    pytest.importorskip("compressed_tensors")
    heal, bits = {"heal": {"steps": 3, "batch": 1}}, {"gptq": {"options": {"bits": 4, "group": 0}}}
    entries = {
        "both": {"steps": [{"slicegpt": {"keep": 0.9}}, "fasp", "restore"]},
        "one": {"recipe": str(written(tmp_path / "one.yaml", {"spend": "auto", "steps": ["slicegpt", "fasp", "restore"]}))},
        "half": {"method": "wanda", "options": {"density": 0.5}},
    }  # fmt: skip
    held = asked | {"entries": entries, "keep": 0.8, "then": {"healed": [heal], "4-bit": [bits], "all": [heal, bits]}}
    made, one = list[tuple[str, ...]](), chain.one

    def noted(run: chain.Run, steps: Any, opened: Any, lineage: Any, done: list[Any], *rest: Any, **more: Any) -> None:
        if run.kept is not None:
            made.append(tuple(str(step) for step in steps[: len(done) + 1]))
        one(run, steps, opened, lineage, done, *rest, **more)

    monkeypatch.setattr(chain, "one", noted)
    rows = sweep.sweep([str(folder("llama"))], held, tmp_path / "shared.csv")
    assert not [row.error for row in rows if row.error]
    assert len(made) == len(set(made))
    assert len(made) in (6 + 5 + 4, 6 + 6 + 4)  # one budget may leave out a step

    def alone(*given: Any, **named: Any) -> Any:
        return pipeline.compress(*given, **(named | {"kept": None}))

    monkeypatch.setattr(sweep, "compress", alone)
    apart = sweep.sweep([str(folder("llama"))], held, tmp_path / "apart.csv")
    for row, other in zip(rows, apart, strict=True):
        assert replace(row, seconds=None, perplexity=None) == replace(other, seconds=None, perplexity=None)
        assert row.perplexity == pytest.approx(other.perplexity, rel=1e-6)


def test_results_are_healed_behind_single_weights_too(asked: dict[str, Any], tmp_path: Path) -> None:
    """The density is that of the method in front, which healing leaves."""
    entries = {"half": {"method": "wanda", "options": {"density": 0.5}}}
    then = {"healed": [{"heal": {"steps": 2, "batch": 1}}]}
    rows = sweep.sweep([str(folder("llama"))], asked | {"entries": entries, "then": then}, tmp_path / "table.csv")
    assert {(row.error, row.density) for row in rows} == {("", 0.5)}
    assert {row.then for row in rows} == {"", "healed"}


def test_a_failure_is_a_row(asked: dict[str, Any], tmp_path: Path) -> None:
    held = asked | {"entries": {"slicegpt": {}}, "keep": 0.8, "restore": False}
    rows = sweep.sweep([str(folder("gemma2")), str(folder("llama"))], held, tmp_path / "table.csv")
    assert "cannot rotate the residual stream" in rows[0].error
    assert rows[0].perplexity is None
    assert rows[1].perplexity is not None
    assert sweep.table(tmp_path / "table.csv") == rows


def test_parquet(asked: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    held = asked | {"entries": {"slicegpt": {}}, "keep": 0.8, "restore": False}
    rows = sweep.sweep([str(folder("llama"))], held, tmp_path / "table.parquet")
    assert sweep.table(tmp_path / "table.parquet") == rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entries": {}}, "has no entries"),
        ({"entries": {"slicegtp": {}}}, "no method named 'slicegtp'. Did you mean 'slicegpt'"),
        ({"entries": {"slicegpt": {"kep": 1}}}, "no setting of the entry slicegpt named 'kep'"),
        ({"entries": {"slicegpt": {"options": {"basis": "x"}}}}, "no value of slicegpt's option basis"),
        ({"entries": {"x": {"steps": ["restore"]}}}, "nothing to restore"),
        ({"keep": 1.5}, r"keep 1.5 of the sweep is outside \(0, 1\]"),
        ({"then": ["heal"]}, "mapping of names to lists of steps"),
        ({"then": {"healed": [{"heal": {"stesp": 3}}]}}, "no option of heal named 'stesp'. Did you mean 'steps'"),
        ({"keeps": 0.5}, "no field of a sweep named 'keeps'. Did you mean 'keep'"),
    ],
)
def test_mistakes_are_found_before_the_first_run(
    change: dict[str, Any], words: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((BadInput, UnknownName), match=words):
        sweep.read(written(tmp_path / "sweep.yaml", asked | change))


def test_tables_of_no_kind_and_of_others(asked: dict[str, Any], tmp_path: Path) -> None:
    with raises(BadInput, "is no table: name it .csv or .parquet"):
        sweep.sweep([str(folder("llama"))], asked, tmp_path / "table.txt")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with raises(BadInput, "it is not a table of this sweep"):
        sweep.sweep([str(folder("llama"))], asked, tmp_path / "other.csv")


def test_the_command_line(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = asked | {"entries": {"slicegpt": {}}, "keep": 0.8, "restore": False}
    place, out = written(tmp_path / "sweep.yaml", held), tmp_path / "table.csv"
    words = ["sweep", str(folder("llama")), "-r", str(place), "--out", str(out)]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["microtome", *words, *more])
        with pytest.raises(SystemExit) as stopped:
            microtome_cli.main()
        assert not stopped.value.code
    printed = capsys.readouterr().out
    assert "slicegpt  keep 0.8:" in printed
    assert json.loads(printed[printed.index("[\n") :])[0]["entry"] == "slicegpt"


def test_a_model_that_is_not_there_is_said_before_the_first_run(asked: dict[str, Any], tmp_path: Path) -> None:
    held = sweep.read(written(tmp_path / "sweep.yaml", asked))
    with raises(BadInput, "no folder"):
        sweep.sweep([str(folder("llama")), str(tmp_path / "none")], held, tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()


def test_a_damaged_model_is_a_row(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    held = asked | {"entries": {"slicegpt": {}}, "keep": 0.8, "restore": False}
    rows = sweep.sweep([str(tmp_path / "damaged"), str(folder("llama"))], held, tmp_path / "table.csv")
    assert [bool(row.error) for row in rows] == [True, False]
