"""Methods of single weights from the outside: their dial, in recipes and sweeps, as a plan, on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import Ran, raises
from models import canonical, loaded, logits
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights

import microtome
from microtome import methods, order, recipes, sparsity, sweep
from microtome.edit import Plan
from microtome.errors import BadInput

SINGLE = [name for name in methods.known() if methods.dial_of(name) == "density"]
GQA = "llama-gqa-llama3-tied"
BRIEF: dict[str, dict[str, Any]] = {"obs": {"pattern": "2:4"}, "mixed": {"sequences": 1}}


def test_the_folder_has_them() -> None:
    assert {"sparsegpt", "wanda", "obs", "mixed"} <= set(SINGLE)
    assert methods.dial_of("slicegpt") is None


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(
    ("given", "word"), [({"keep": 0.5}, "--keep"), ({"slice": 0.2}, "--slice"), ({"keep": 1.0}, "--keep"),
                        ({"allocate": "influence"}, "--allocate"), ({"multiple_of": 8}, "--multiple-of")]
)  # fmt: skip
def test_the_dials_of_widths_are_refused(name: str, given: dict[str, Any], word: str, tmp_path: Path) -> None:
    words = f"{name} changes single weights and no width: give -o density=..., and no {word}"
    with raises(BadInput, words):
        compress(folder("llama"), tmp_path / "out", method=name, **given)
    settings = {"allocate": "influence", **given} if word == "--allocate" else given
    with raises(BadInput, f"step 1 of the recipe: {words}"):
        recipes.steps({"steps": [{name: settings}]})
    assert not (tmp_path / "out").exists()


def test_a_recipes_own_dials_are_for_widths() -> None:
    """A keep of the whole recipe does not reach a step that has no use for it."""
    one, two = recipes.steps({"keep": 0.8, "multiple_of": 8, "steps": ["modegpt", "sparsegpt"]})
    assert isinstance(one, type(two))
    assert (one.keep, one.multiple, two.keep, two.multiple) == (0.8, 8, None, None)  # type: ignore[union-attr]


@pytest.mark.parametrize("pattern", ["2:4", "'2:4'", "16:32"])
def test_a_pattern_in_yaml_is_no_number_to_the_base_of_sixty(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"steps: [{{wanda: {{options: {{pattern: {pattern}}}}}}}]\nkeep: 0.5\n")
    (step,) = recipes.steps(tmp_path / "recipe.yaml")
    assert step.method.pattern == pattern.strip("'")  # type: ignore[union-attr]
    changed = recipes.steps(tmp_path / "recipe.yaml", recipes.overrides(["wanda.options.pattern=4:8", "keep=1e-1"]))
    assert changed[0].method.pattern == "4:8"  # type: ignore[union-attr]
    assert recipes.overrides(["a=0x10", "b=7", "c=0.5"]) == {"a": 16, "b": 7, "c": 0.5}


def test_restoration_would_undo_it(tmp_path: Path) -> None:
    words = "restore refits whole matrices, and would undo what wanda did to single weights: put restore before wanda"
    with raises(BadInput, words):
        compress(folder("llama"), tmp_path / "out", method="wanda", restore=True)
    for steps in (["wanda", "restore"], [{"fasp": {"keep": 0.8}}, "wanda", "restore"]):
        with raises(BadInput, words):
            recipes.steps({"steps": steps})
    assert len(recipes.steps({"steps": [{"fasp": {"keep": 0.8}}, "restore", "wanda"]})) == 3


@pytest.mark.parametrize("name", SINGLE)
def test_a_plan_is_replayed_byte_for_byte(name: str, tmp_path: Path) -> None:
    made = compress(folder(GQA), tmp_path / "out", method=name, options=BRIEF.get(name, {}))
    plan = Plan.read(tmp_path / "out")
    assert (plan.widths, plan.keep, plan.slice, plan.allocation) == ({}, None, None, None)
    again = compress(folder(GQA), tmp_path / "again", plan=plan)
    files = [(one.folder / "model.safetensors").read_bytes() for one in (made, again)]
    assert files[0] == files[1]
    card = (tmp_path / "out" / "README.md").read_text()
    dial = "pattern 2:4" if name == "obs" else "density 0.5"
    assert f"method `{name}`, {dial}." in card
    assert "by themselves they save neither memory, nor bytes, nor time" in card
    assert "structured-pruning" not in card


@pytest.mark.parametrize(("name", "multiple"), [("llama", 4), ("opt-tied", 4)])
def test_widths_first_then_groups_of_four(name: str, multiple: int, tmp_path: Path) -> None:
    """modegpt, then 2:4: transformers loads the result, and it goes on from a prompt."""
    steps = [{"modegpt": {"keep": 0.8, "multiple_of": multiple}}, {"sparsegpt": {"options": {"pattern": "2:4"}}}]
    made = compress(folder(name), tmp_path / "out", recipe={"steps": steps})
    cut = compress(folder(name), tmp_path / "cut", recipe={"steps": steps[:1]})
    assert (made.after.stored, made.after.decoder) == (cut.after.stored, cut.after.decoder)
    before, after = weights(tmp_path / "cut"), weights(tmp_path / "out")
    changed = [key for key in after if not torch.equal(before[key], after[key])]
    assert len(changed) == len(list(sparsity.shapes(made.load().config)))
    assert all(((after[key].view(-1, 4) != 0).sum(1) == 2).all() for key in changed)
    assert made.after.nonzero == cut.after.stored - sum(after[key].numel() // 2 for key in changed)
    dry = microtome.preview(
        folder(name), recipe={"steps": [{"modegpt": {**steps[0]["modegpt"], "allocate": "uniform"}}, steps[1]]}
    )
    assert dry.after.nonzero is not None
    assert dry.after.nonzero < dry.after.stored
    model = made.load()
    out = model.generate(HELD_OUT[:1, :6], max_new_tokens=5, do_sample=False, pad_token_id=0)
    greedy = HELD_OUT[:1, :6]
    for _ in range(5):
        greedy = torch.cat([greedy, logits(model, greedy)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, greedy)


def test_a_cut_behind_it_keeps_the_zeros_that_it_does_not_refit(tmp_path: Path) -> None:
    """Neurons dropped from a sparse model: rows keep their zeros, and what is not zero is counted."""
    steps = ["wanda", {"random": {"keep": 0.8, "options": {"spaces": "ffn"}}}]
    made = compress(folder("llama"), tmp_path / "out", recipe={"steps": steps})
    stored = weights(tmp_path / "out")
    assert made.after.nonzero == sum(int(one.count_nonzero()) for one in stored.values())
    assert made.after.stored < made.before.stored
    assert all((stored[key] == 0).float().mean() > 0.4 for key in stored if "_proj" in key)
    said = "random changes matrices that wanda has made zeros in: put it before wanda to keep all zeros."
    assert said in made.notes
    for harmless in (steps[::-1], ["wanda", {"depth": {"keep": 0.7}}]):
        assert not order.remarks(recipes.steps({"steps": harmless}))


def test_the_memory_that_it_needs_is_foretold() -> None:
    for name in ("sparsegpt", "wanda"):
        dry = microtome.preview(folder("llama"), method=name, samples=4, length=8)
        assert dry.memory["sums"] >= 8 * canonical("llama")[0].intermediate_size ** 2
        assert dry.memory["hidden states"] == 4 * 32 * canonical("llama")[0].hidden_size
        assert dry.widths == {}


# --- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_row_for_every_density(tmp_path: Path) -> None:
    """No keep concerns them, and none is asked for where there is nothing else."""
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    torch.save(HELD_OUT, tmp_path / "held.pt")
    entries = {
        "wanda": {"options": {"density": 0.7}},
        "magnitude-24": {"method": "wanda", "options": {"score": "magnitude", "pattern": "2:4"}},
    }
    held = {"data": str(tmp_path / "ids.pt"), "eval_data": str(tmp_path / "held.pt"), "entries": entries}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(held))
    rows = sweep.sweep([str(folder("llama"))], sweep.read(tmp_path / "sweep.yaml"), tmp_path / "table.csv")
    assert [(row.entry, row.keep, row.density, row.error) for row in rows] == [
        ("magnitude-24", 1.0, 0.5, ""), ("wanda", 1.0, 0.7, "")
    ] or [(row.entry, row.keep, row.density, row.error) for row in rows] == [
        ("wanda", 1.0, 0.7, ""), ("magnitude-24", 1.0, 0.5, "")
    ]  # fmt: skip
    made = compress(folder("llama"), tmp_path / "one", method="wanda", options={"density": 0.7})
    row = next(row for row in rows if row.entry == "wanda")
    assert (row.nonzero, row.stored, row.decoder_ratio) == (made.after.nonzero, made.before.stored, 1.0)
    with torch.no_grad():
        assert row.perplexity == pytest.approx(made.load()(HELD_OUT, labels=HELD_OUT).loss.exp().item(), rel=1e-4)
    assert sweep.table(tmp_path / "table.csv") == rows
    mixed = {**held, "keep": [0.9, 0.8], "restore": [False, True], "entries": {"wanda": {}, "fasp": {}}}
    asked = [(row.entry, row.keep, row.restore) for row, _ in sweep.runs(["m"], mixed)]
    assert asked == [
        ("wanda", 1.0, False),
        *(("fasp", keep, restore) for keep in (0.9, 0.8) for restore in (False, True)),
    ]
    old = (tmp_path / "table.csv").read_text().replace("density,nonzero,", "")  # of before there were densities
    (tmp_path / "old.csv").write_text("\n".join(line for line in old.splitlines()[:1]) + "\n")
    assert sweep.table(tmp_path / "old.csv") == []
    for said in ({"keep": 0.5}, {"allocate": "influence"}, {"multiple_of": 8}, {"restore": True}):
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**held, "entries": {"wanda": said}}))
        with pytest.raises(BadInput, match=r"wanda changes single weights|restore refits whole matrices"):
            sweep.read(tmp_path / "bad.yaml")


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    torch.save(HELD_OUT, tmp_path / "held.pt")
    return tmp_path


def test_from_the_command_line(run: Callable[..., Ran], place: Path) -> None:
    """Plan, compress with measuring, JSON, and what transformers makes of the folder."""
    chosen = ("-m", "sparsegpt", "-o", "pattern=2:4")
    dry = run("plan", folder("llama"), *chosen)
    assert dry.code == 0, dry.err
    data = ("--data", place / "ids.pt", "--eval-data", place / "held.pt", "--length", 24)
    wet = run("compress", folder("llama"), "--out", place / "out", *chosen, *data)
    assert wet.code == 0, wet.err
    count = sum(int(one.count_nonzero()) for one in weights(place / "out").values())
    for printed in (dry.out, wet.out):
        assert f"{count:,}" in next(line for line in printed.splitlines() if "of these not zero" in line)
        assert "of the stored numbers are zero: by themselves they save neither memory, nor bytes, nor time" in printed
        assert "stock checkpoint" in printed
    assert "widths of the residual stream: unchanged" in dry.out
    again = run("compress", folder("llama"), "--out", place / "again", "--plan", place / "out", *data, "--json")
    told = json.loads(again.out)
    assert (told["after"]["nonzero"], told["after"]["stored"]) == (count, told["before"]["stored"])
    ours = loaded(canonical("llama")[0], weights(place / "out"))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            logits(ours, HELD_OUT)[:, :-1].flatten(0, 1), HELD_OUT[:, 1:].flatten()
        )
    assert told["perplexity"]["after"]["value"] == pytest.approx(losses.exp().item(), rel=1e-4)


def test_mistakes_on_the_command_line(refused: Callable[..., None], place: Path) -> None:
    ask = ("compress", folder("llama"), "--out", place / "out", "--data", place / "ids.pt", "-m", "sparsegpt")
    refused(
        r"sparsegpt changes single weights and no width: give -o density=\.\.\., and no --keep", *ask, "--keep", 0.5
    )
    refused(r"density=1.2 of sparsegpt is outside \(0, 1\]", *ask, "-o", "density=1.2")
    refused("no option of sparsegpt named 'densty'. Did you mean 'density'", *ask, "-o", "densty=0.5")
    refused("put restore before sparsegpt", *ask, "--restore")


def test_a_sweep_on_the_command_line(run: Callable[..., Ran], place: Path) -> None:
    held = {"data": str(place / "ids.pt"), "eval_data": str(place / "held.pt"), "entries": {"wanda": {}}}
    (place / "sweep.yaml").write_text(yaml.safe_dump(held))
    ran = run("sweep", folder("llama"), "-r", place / "sweep.yaml", "--out", place / "table.csv")
    assert ran.code == 0, ran.err
    assert "wanda  density 0.5: " in ran.out
