"""Recipes, allocation, restoration and the cache on the command line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import Ran
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights

RECIPE = """\
keep: 0.8
steps:
  - slicegpt: {slice: 0.1}
  - fasp: {options: {spaces: ffn}}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where tests work: ids to calibrate on, and a recipe."""
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    torch.save(HELD_OUT, tmp_path / "held.pt")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def words(place: Path, *more: object) -> list[object]:
    return [
        "compress", folder("llama"), "--out", place / "out", "--data", place / "ids.pt", "--no-evaluate", "--length", 24,
        *more,
    ]  # fmt: skip


def same(one: Path, other: Path) -> None:
    have, want = weights(one), weights(other)
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_a_recipe_with_overrides(run: Callable[..., Ran], place: Path) -> None:
    ran = run(*words(place, "-r", place / "recipe.yaml", "--set", "fasp.options.score=l2", "--set", "2.keep=7e-1"))
    assert ran.code == 0, ran.err
    steps = [{"slicegpt": {"slice": 0.1}}, {"fasp": {"keep": 0.7, "options": {"spaces": "ffn", "score": "l2"}}}]
    compress(folder("llama"), place / "api", recipe={"steps": steps})
    same(place / "out", place / "api")
    plan = json.loads((place / "out" / "plan.json").read_text())
    assert (plan["method"], plan["slice"], plan["then"][0]["keep"]) == ("slicegpt", 0.1, 0.7)
    ran = run(*words(place, "--plan", place / "out", "--overwrite"))
    assert ran.code == 0, ran.err
    same(place / "out", place / "api")


def test_allocation_restoration_and_cache(run: Callable[..., Ran], place: Path) -> None:
    more = ("-m", "fasp", "--keep", 0.8, "--allocate", "influence,temperature=0.2", "--restore",
            "--cache", place / "cache", "-o", "inputs=original")  # fmt: skip
    ran = run(*words(place, *more))
    assert ran.code == 0, ran.err
    compress(folder("llama"), place / "api", method="fasp", keep=0.8, allocate="influence,temperature=0.2",
             restore=True, options={"inputs": "original"})  # fmt: skip
    same(place / "out", place / "api")
    assert len(list(place.glob("cache/*/block-*.safetensors"))) == 9  # three sites of three blocks
    assert json.loads((place / "out" / "plan.json").read_text())["then"][0]["method"] == "restore"


def test_restoration_can_be_left_out(run: Callable[..., Ran], place: Path) -> None:
    assert run(*words(place, "-m", "fasp", "--keep", 0.8, "--no-restore")).code == 0
    assert json.loads((place / "out" / "plan.json").read_text())["then"] == []


def test_plan_shows_what_compress_makes(run: Callable[..., Ran], place: Path) -> None:
    for chosen in (("-r", place / "recipe.yaml", "--set", "keep=0.7"),
                   ("-m", "fasp", "--keep", 0.8, "--allocate", "influence", "--data", place / "ids.pt", "--length", 24),
                   ("-m", "fasp", "--keep", 0.8, "--restore")):  # fmt: skip
        dry = run("plan", folder("llama"), *chosen, "--json")
        assert dry.code == 0, dry.err
        more = chosen if "--data" in chosen else (*chosen, "--data", place / "ids.pt", "--length", 24)
        wet = run("compress", folder("llama"), "--out", place / "out", "--no-evaluate", "--overwrite", *more, "--json")
        assert wet.code == 0, wet.err
        assert json.loads(dry.out)["after"] == json.loads(wet.out)["after"]
    shown = run("plan", folder("llama"), "-r", place / "recipe.yaml").out
    assert "widths of the residual stream: 40\n" in shown
    assert re.search(r"neurons: \d+ in every block", shown)


RECIPE_ERRORS = [
    ("steps: [faps]", (), "step 1 of the recipe: no method named 'faps'"),
    ("steps: [{slicegpt: {keep: 0.9}}, {fasp: {keep: 2}}]", (), "step 2 of the recipe: --keep 2.0 is outside"),
    ("steps: [restore]", (), "step 1 of the recipe, restore, has nothing to restore"),
    ("steps: [", (), "recipe.yaml is not YAML"),
    ("keep: 0.5", (), "a recipe has a list of steps"),
    (RECIPE, ("--set", "keep"), "--set keep has no value: write --set path=value"),
    (RECIPE, ("--set", "keep=["), r"--set keep=\[: the value is not YAML"),
    (RECIPE, ("--set", "9.keep=0.5"), "no step of the recipe named '9'"),
    (RECIPE, ("--keep", 0.5), "a recipe has its own dials and options: give no keep"),
    (RECIPE, ("--restore",), "a recipe has its own dials"),
    (RECIPE, ("--allocate", "influence"), "a recipe has its own dials"),
    (RECIPE, ("--multiple-of", 4), "a recipe has its own dials"),
    (RECIPE, ("-o", "untie=true"), "a recipe has its own dials"),
]


@pytest.mark.parametrize("verb", ["compress", "plan"])
@pytest.mark.parametrize(("contents", "more", "said"), RECIPE_ERRORS, ids=[said[:30] for *_, said in RECIPE_ERRORS])
def test_a_recipe_that_cannot_be(
    contents: str, more: tuple[object, ...], said: str, verb: str, refused: Callable[..., None], place: Path
) -> None:
    (place / "recipe.yaml").write_text(contents)
    start = words(place) if verb == "compress" else ["plan", folder("llama")]
    refused(said, *start, "-r", place / "recipe.yaml", *more)


def test_flags_that_cannot_be(refused: Callable[..., None], place: Path) -> None:
    fasp = ("-m", "fasp", "--keep", 0.8)
    refused("cannot read the recipe .*none.yaml: No such file", *words(place, "-r", place / "none.yaml"))
    refused("--set keep=0.5 changes a recipe: give --recipe FILE", *words(place, *fasp, "--set", "keep=0.5"))
    refused("no allocation named 'influense'. Did you mean", *words(place, *fasp, "--allocate", "influense"))
    refused("no setting of the allocation influence named 'tmp'", *words(place, *fasp, "--allocate", "influence,tmp=1"))
    refused("redundancy gives the stream several widths: that needs -o basis=junction",
            *words(place, "--keep", 0.8, "--allocate", "redundancy"))  # fmt: skip
    refused("the widths of step 1, fasp, depend on activations: give --data",
            "plan", folder("llama"), *fasp, "--allocate", "influence")  # fmt: skip
    refused("cannot keep statistics in .*ids.pt", *words(place, *fasp, "-o", "inputs=original",
                                                         "--cache", place / "ids.pt"))  # fmt: skip
