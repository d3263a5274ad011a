"""Steps in a row: as by hand through folders, replayed byte for byte, refused in words, and nothing measured twice."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import raises
from models import TINY, built, logits, stock
from safetensors.torch import save_file
from tinies import CALIBRATION, HELD_OUT, compress, folder, spoken, weights

import microtome
from microtome import calibrate, chain, forecast, planner, recipes, survey
from microtome.calibrate import Stream
from microtome.chain import Run
from microtome.edit import Plan
from microtome.errors import BadInput, BadPlan, UnknownName
from microtome.restore import Restore
from microtome.source import open_source
from microtome.stats import Stat
from microtome.survey import Statistics

FILES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
ORIGINAL = {"inputs": "original"}
THREE: dict[str, Any] = {
    "steps": [
        {"slicegpt": {"keep": 0.9, "multiple_of": 8}},
        {"fasp": {"keep": 0.75, "options": {"spaces": "ffn"}}},
        "restore",
    ]
}


def same(one: Path, other: Path) -> None:
    """The same tensors, bit for bit."""
    have, want = weights(one), weights(other)
    assert have.keys() == want.keys()
    assert [name for name in want if not torch.equal(have[name], want[name])] == []


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that streams are pushed past."""
    found: list[int] = []
    push = Stream.push

    def counted(self: Stream, block: int, *args: Any, **more: Any) -> None:
        found.append(block)
        push(self, block, *args, **more)

    monkeypatch.setattr(Stream, "push", counted)
    return found


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt-tied", "phi"])
def test_a_recipe_is_its_steps_by_hand(name: str, tmp_path: Path) -> None:
    """Through a folder, with the second step's widths by its share of the original."""
    result = compress(folder(name), tmp_path / "out", recipe={"steps": THREE["steps"][:2]})
    first = compress(folder(name), tmp_path / "first", keep=0.9, multiple_of=8)
    (second,) = result.plan.then
    widths = dict(second["widths"])
    compress(tmp_path / "first", tmp_path / "hand", method="fasp", options={"spaces": "ffn"}, allocate=widths)
    same(tmp_path / "out", tmp_path / "hand")
    assert first.plan.widths == result.plan.widths


def test_keep_is_a_fraction_of_the_original(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", recipe=THREE)
    assert result.after.decoder / result.before.decoder == pytest.approx(0.75, abs=0.02)
    words = "the budget of .* parameters cannot be reached"
    with pytest.raises(BadPlan, match=words):
        compress(folder("llama"), tmp_path / "no", recipe={"steps": [
            {"slicegpt": {"slice": 0.2}}, {"fasp": {"keep": 0.15, "options": {"spaces": "vo"}}},
        ]})  # fmt: skip
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("steps", [THREE, {"keep": 0.8, "steps": [
    {"slicegpt": {"options": {"basis": "junction"}, "allocate": "redundancy"}}, "restore",
]}, {"keep": 0.8, "steps": [{"fasp": {"allocate": "influence"}}]}], ids=["three", "uneven", "influence"])  # fmt: skip
def test_a_plan_replays_byte_for_byte(steps: dict[str, Any], tmp_path: Path) -> None:
    result = compress(folder("llama-gqa-llama3-tied"), tmp_path / "out", recipe=steps)
    plan = Plan.read(tmp_path / "out")
    assert len(plan.then) == len(steps["steps"]) - 1
    again = compress(folder("llama-gqa-llama3-tied"), tmp_path / "again", plan=plan)
    same(tmp_path / "again", tmp_path / "out")
    assert again.plan == result.plan
    read = [json.loads((tmp_path / place / "plan.json").read_text()) for place in ("out", "again")]
    for one in read:
        one["result"] = None
    assert read[0] == read[1]


def test_the_same_twice(tmp_path: Path) -> None:
    for place in ("one", "two"):
        compress(folder("llama"), tmp_path / place, recipe=THREE)
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("name", ["llama", "opt-tied", "phi"])
def test_a_dry_run_is_what_comes_of_it(name: str, tmp_path: Path) -> None:
    for number, chosen in enumerate([
        {"recipe": THREE},
        {"method": "fasp", "keep": 0.8},
        {"method": "fasp", "keep": 0.8, "restore": True},
        {"method": "fasp", "keep": 0.8, "allocate": "influence", "data": CALIBRATION},
        {"method": "fasp", "keep": 0.8, "allocate": "global", "data": CALIBRATION},
    ]):  # fmt: skip
        dry = microtome.preview(folder(name), **chosen)
        wet = compress(folder(name), tmp_path / str(number), **chosen)
        assert dry.after == wet.after
        assert (dry.outcome.why_not is None) == wet.stock
        recorded = [wet.plan.widths, *(step["widths"] for step in wet.plan.then)]
        assert [out.named for out in dry.outcomes] == recorded


def test_widths_that_need_data_are_not_guessed() -> None:
    with pytest.raises(BadInput, match="the widths of step 1, fasp, depend on activations: give --data"):
        microtome.preview(folder("llama"), method="fasp", keep=0.8, allocate="influence")


@pytest.mark.parametrize("second", [{"fasp": {"allocate": "influence"}}, {"modegpt": {"allocate": "auto"}}])
def test_an_even_cut_stands_in_for_what_is_measured_behind_others(second: Any, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"keep": 0.6, "steps": [{"slicegpt": {"keep": 0.9}}, second]}
    dry = microtome.preview(folder("llama"), recipe=recipe, data=CALIBRATION)
    assert any(f"{next(iter(second))} measures its widths behind the steps before it" in note for note in dry.notes)
    wet = compress(folder("llama"), tmp_path / "out", recipe=recipe)
    assert dry.after.decoder == pytest.approx(wet.after.decoder, rel=0.1)
    assert not any("even cut" in note for note in wet.notes)


def test_blocks_that_go_behind_other_steps_are_not_guessed() -> None:
    with pytest.raises(BadInput, match="what depth drops whole behind other steps depends on these"):
        microtome.preview(folder("llama"), recipe={"keep": 0.6, "steps": [{"slicegpt": {"keep": 0.9}}, "depth"]})


def test_steps_without_activations_need_no_text() -> None:
    steps = recipes.steps({"keep": 0.8, "steps": ["magnitude"] * 2})
    assert not chain.needs_data(steps, None)
    assert chain.needs_data([*steps, Restore()], None)
    assert chain.needs_data(recipes.steps({"keep": 0.8, "steps": ["magnitude", "fasp"]}), None)


def test_a_failure_between_steps_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise BadInput("stopped here.")

    monkeypatch.setattr("microtome.restore.restored", fails)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(BadInput, match="stopped here"):
        compress(folder("llama"), tmp_path / "out", recipe=THREE, scratch=tmp_path / "scratch")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_tokenizer_and_a_licence_go_through_all_steps(tmp_path: Path) -> None:
    compress(spoken(), tmp_path / "out", recipe=THREE)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "LICENSE").read_text() == "All of it may be used.\n"
    assert not (tmp_path / "out" / "modeling_other.py").exists()


def test_sixteen_bits_are_wide_between_steps(tmp_path: Path) -> None:
    """The last step rounds, not the others: as close to the recipe in fp32 as one rounding."""
    compress(spoken("llama", torch.bfloat16), tmp_path / "out", recipe={"steps": THREE["steps"][:2]})
    compress(spoken("llama", torch.bfloat16), tmp_path / "wide", recipe={"steps": THREE["steps"][:2]}, dtype="float32")
    have, want = weights(tmp_path / "out"), weights(tmp_path / "wide")
    assert all(torch.equal(have[name], want[name].bfloat16()) for name in want)


# --- our own checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def ragged(tmp_path: Path) -> Path:
    """A result that no stock config can say."""
    table = {"0.ffn": 40, "1.vo": 4, "2.ffn": 60}
    result = compress(folder("llama-gqa-llama3-tied"), tmp_path / "ragged", method="fasp", allocate=table)
    assert not result.stock
    return tmp_path / "ragged"


def test_our_own_checkpoint_is_opened_as_it_was_written(ragged: Path, tmp_path: Path) -> None:
    with open_source(ragged) as source:
        found = planner.opened(source)
        assert [found.config.per_layer_config[block].intermediate_size for block in range(3)] == [40, 80, 60]
        assert [found.config.per_layer_config[block].v_head_dim for block in range(3)] == [8, 4, 8]
    result = compress(ragged, tmp_path / "same", keep=1.0)
    same(tmp_path / "same", ragged)
    assert not result.stock
    assert (tmp_path / "same" / "modeling_microtome.py").is_file()
    configs = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "same", ragged)]
    assert configs[0] == configs[1]
    models = [microtome.loading.load(place, device=torch.device("cpu"), dtype=None)
              for place in (tmp_path / "same", ragged)]  # fmt: skip
    assert torch.equal(*(logits(model, HELD_OUT) for model in models))


@pytest.mark.parametrize("chosen", [
    {"method": "fasp", "keep": 0.7}, {"method": "fasp", "keep": 0.7, "restore": True}, {"keep": 0.8},
    {"keep": 0.8, "options": {"basis": "junction"}},
], ids=str)  # fmt: skip
def test_our_own_checkpoint_is_cut_again(ragged: Path, chosen: dict[str, Any], tmp_path: Path) -> None:
    dry = microtome.preview(ragged, **chosen)
    result = compress(ragged, tmp_path / "out", **chosen)
    assert dry.after == result.after
    assert not result.stock
    assert result.after.decoder < result.before.decoder
    assert torch.isfinite(logits(result.load(device="cpu", dtype="float32"), HELD_OUT)).all()


def test_a_sliced_checkpoint_of_our_own_is_cut_and_restored(tmp_path: Path) -> None:
    """Junctions of different widths on both sides: the uncut stream is ragged too."""
    compress(folder("llama"), tmp_path / "sliced", keep=0.9, options={"basis": "junction"}, allocate="redundancy")
    compress(tmp_path / "sliced", tmp_path / "same", keep=1.0, restore=True)
    source, same_ = (
        logits(microtome.loading.load(tmp_path / place, device=torch.device("cpu"), dtype=None), HELD_OUT)
        for place in ("sliced", "same")
    )
    assert (source - same_).abs().max() < 1e-3 * source.abs().max()
    result = compress(tmp_path / "sliced", tmp_path / "out", method="fasp", keep=0.8, restore=True)
    assert torch.isfinite(logits(result.load(device="cpu", dtype="float32"), HELD_OUT)).all()


# --- statistics -----------------------------------------------------------------------------------------------------


def test_a_second_method_measures_nothing(tmp_path: Path, pushes: list[int]) -> None:
    cached = {"cache": tmp_path / "cache", "keep": 0.8, "method": "fasp"}
    compress(folder("llama"), tmp_path / "plain", keep=0.8, method="fasp", options=ORIGINAL)
    pushes.clear()
    compress(folder("llama"), tmp_path / "one", **cached, options=ORIGINAL)
    assert pushes == [0, 1, 2]
    compress(folder("llama"), tmp_path / "two", **cached, options=ORIGINAL | {"score": "l2"})
    assert pushes == [0, 1, 2]
    compress(folder("llama"), tmp_path / "three", **cached, options=ORIGINAL)
    assert pushes == [0, 1, 2]
    same(tmp_path / "one", tmp_path / "plain")
    same(tmp_path / "three", tmp_path / "one")


def test_what_is_missing_is_measured_in_one_pass(tmp_path: Path, pushes: list[int]) -> None:
    chosen = {"cache": tmp_path / "cache", "keep": 0.8, "method": "fasp"}
    compress(folder("llama"), tmp_path / "one", **chosen, options=ORIGINAL | {"spaces": "ffn"})
    pushes.clear()
    compress(folder("llama"), tmp_path / "two", **chosen, options=ORIGINAL)  # value channels are new, neurons are not
    assert pushes == [0, 1, 2]
    compress(folder("llama"), tmp_path / "three", keep=0.8, method="fasp", options=ORIGINAL)
    same(tmp_path / "two", tmp_path / "three")


def test_one_survey_serves_allocation_and_cut(pushes: list[int], tmp_path: Path) -> None:
    """The scores and the widths come of the same sums."""
    compress(folder("llama"), tmp_path / "out", keep=0.8, method="fasp", options=ORIGINAL, allocate="global")
    assert pushes == [0, 1, 2]


@pytest.mark.parametrize("harm", ["cut", "empty", "other"])
def test_a_spoilt_file_is_measured_again(harm: str, tmp_path: Path, pushes: list[int]) -> None:
    chosen = {"cache": tmp_path / "cache", "keep": 0.8, "method": "fasp", "options": ORIGINAL}
    compress(folder("llama"), tmp_path / "one", **chosen)
    file = next(iter(tmp_path.glob("cache/*/block-001-neurons.safetensors")))
    whole = file.read_bytes()
    if harm == "other":
        save_file({"odd": torch.zeros(3)}, file)
    else:
        file.write_bytes(whole[: len(whole) // 2] if harm == "cut" else b"")
    pushes.clear()
    compress(folder("llama"), tmp_path / "two", **chosen)
    assert pushes == [0, 1, 2]
    assert file.read_bytes() == whole
    same(tmp_path / "two", tmp_path / "one")


def test_the_stream_is_measured_once_for_all_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Junctions are in the cache by what they are measured by; a spoilt file has all of them measured again."""
    steps: list[int] = []
    advance = Stream.advance
    monkeypatch.setattr(
        Stream, "advance", lambda self, block, *a, **k: (steps.append(block), advance(self, block, *a, **k))
    )
    asked: dict[str, Any] = {"keep": 0.8, "cache": tmp_path / "cache"}

    def run(name: str, **more: Any) -> int:
        steps.clear()
        compress(folder("llama"), tmp_path / name, **asked, **more)
        return len(steps)

    assert run("one") == 6
    assert run("two") == 0
    same(tmp_path / "two", tmp_path / "one")
    assert run("eq-8", options={"readers": "transposed"}) == 0
    assert run("raw", options={"signal": "residual"}) == 6
    assert run("own", options={"basis": "junction"}) == 6
    file = next(iter(tmp_path.glob("cache/*/junction-002-normed-rms.safetensors")))
    file.write_bytes(file.read_bytes()[:-8])
    assert run("again") == 6
    same(tmp_path / "again", tmp_path / "one")


def test_a_folder_is_for_one_model_text_and_precision(tmp_path: Path) -> None:
    def key(place: Path, tokens: torch.Tensor, dtype: torch.dtype) -> str:
        with open_source(place) as source:
            return survey.key(planner.opened(source), tokens, torch.device("cpu"), dtype)

    other = built(TINY["llama"])
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    other.save_pretrained(tmp_path / "other")
    stock("llama").save_pretrained(tmp_path / "again")
    base = (folder("llama"), CALIBRATION, torch.float32)
    assert key(*base) == key(tmp_path / "again", CALIBRATION.clone(), torch.float32)
    others = [key(tmp_path / "other", *base[1:]), key(base[0], HELD_OUT, torch.float32),
              key(base[0], CALIBRATION.flip(0), torch.float32), key(base[0], CALIBRATION, torch.float64),
              key(base[0], CALIBRATION.reshape(24, 8), torch.float32)]  # fmt: skip
    assert len({key(*base), *others}) == 6


def test_sums_come_back_from_their_files(tmp_path: Path) -> None:
    wanted = frozenset({Stat.NEURONS, Stat.INFLUENCE, Stat.ATTENTION})
    with open_source(folder("llama")) as source:
        found = planner.opened(source)
        asked: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
        first = survey.survey(found, CALIBRATION, wanted, **asked, cache=tmp_path)
        again = survey.survey(found, CALIBRATION, wanted, **asked, cache=tmp_path)
    for block in range(3):
        for stat in (Stat.NEURONS, Stat.ATTENTION):
            one, two = first.found[block, stat], again.found[block, stat]
            assert isinstance(one, survey.Moment)
            assert isinstance(two, survey.Moment)
            assert torch.equal(one.mean_NN, two.mean_NN)
            assert torch.equal(one.mean_N, two.mean_N)
            assert one.tokens == two.tokens == CALIBRATION.numel()
    assert first.influences(3) == again.influences(3)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadInput, match=r"cannot keep statistics in .*file.*Give --cache another folder"):
        compress(folder("llama"), tmp_path / "out", method="fasp", keep=0.8, options=ORIGINAL, cache=tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_sums_of_one_model_are_never_another_s() -> None:
    """A step's model is gone when the next but one is opened, and its place in memory may be taken."""
    run = Run(None, None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
    (step,) = recipes.steps({"keep": 0.8, "steps": ["fasp"]})
    assert not isinstance(step, Restore)
    with open_source(folder("llama")) as source:
        first, second = planner.opened(source), planner.opened(source)
        known = run.measure(first, step)(frozenset())
        known.found[0, Stat.INFLUENCE] = survey.Influence()
        assert run.measure(first, step)(frozenset()) is known
        assert run.measure(second, step)(frozenset()).found == {}
        assert list(run.known) == [second]
    assert isinstance(known, Statistics)


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipes_that_ship_are_read(file: Path) -> None:
    assert recipes.steps(file)


def test_there_are_recipes() -> None:
    assert len(FILES) >= 4


def test_a_recipe_s_words() -> None:
    found = recipes.steps({
        "keep": 0.75, "multiple_of": 4,
        "steps": [{"slicegpt": {"keep": "9e-1", "multiple_of": 8}}, "fasp",
                  {"fasp": {"allocate": {"ffn": 0.5}, "options": {"ridge": "1e-3"}}},
                  {"restore": {"ridge": "1e-4", "windows": 8, "head": False}}],
    })  # fmt: skip
    first, second, third, last = found
    assert isinstance(last, Restore)
    assert (first.keep, first.multiple, second.keep, second.multiple, third.keep) == (0.9, 8, 0.75, 4, None)
    assert third.method.ridge == 1e-3
    assert last == Restore(ridge=1e-4, windows=8, head=False)


def test_overrides() -> None:
    changed = recipes.steps(THREE, {"1.keep": 0.95, "fasp.options.score": "l2", "3.ridge": 0.1, "fasp.keep": 0.7})
    assert [changed[0].keep, changed[1].keep, changed[1].method.score] == [0.95, 0.7, "l2"]  # type: ignore[union-attr]
    assert changed[2] == Restore(ridge=0.1)
    assert THREE["steps"][0] == {"slicegpt": {"keep": 0.9, "multiple_of": 8}}  # the recipe itself is left alone
    assert recipes.steps({"steps": ["fasp"]}, {"keep": 0.5})[0].keep == 0.5  # type: ignore[union-attr]
    assert recipes.overrides(["keep=0.5", "1.options.untie=true", "a.b=1,2"]) == {
        "keep": 0.5, "1.options.untie": True, "a.b": "1,2"
    }  # fmt: skip


STEP = {"slicegpt": {"keep": 0.9}}
WRONG: list[tuple[Any, str]] = [
    ({}, "a recipe has a list of steps, and this one has none"),
    ({"steps": []}, "has a list of steps"),
    ({"steps": "fasp"}, "has a list of steps"),
    ({"steps": {"fasp": {}}}, "has a list of steps"),
    ({"steps": [STEP], "kep": 1}, "no field of a recipe named 'kep'. Did you mean 'keep'"),
    ({"steps": [STEP], 3: 1}, "no field of a recipe named '3'"),
    ({"steps": [STEP, 5]}, "step 2 of the recipe is no method, nor a method with its settings: '5'"),
    ({"steps": [STEP, {"fasp": 1}]}, "step 2 of the recipe is no method"),
    ({"steps": [STEP, {"fasp": {}, "flap": {}}]}, "step 2 of the recipe is no method"),
    ({"steps": [STEP, "faps"]}, "step 2 of the recipe: no method named 'faps'. Did you mean"),
    ({"steps": [STEP, {7: {}}]}, "step 2 of the recipe: no method named '7'"),
    ({"steps": [STEP, "fasp"]}, "step 2 of the recipe: say how much stays"),
    ({"steps": [{"slicegpt": {"keep": 0.9, "slice": 0.1}}]}, "step 1 of the recipe: two dials for one budget"),
    ({"steps": [{"slicegpt": {"keep": 1.5}}]}, r"step 1 of the recipe: --keep 1.5 is outside \(0, 1\]"),
    ({"steps": [{"slicegpt": {"keep": "much"}}]}, "step 1 of the recipe: keep is a number, not 'much'"),
    ({"steps": [{"slicegpt": {"keep": True}}]}, "step 1 of the recipe: keep is a number, not True"),
    ({"steps": [{"slicegpt": {"keep": [1]}}]}, r"step 1 of the recipe: keep is a number, not \[1\]"),
    ({"steps": [{"slicegpt": {"keep": 0.9, "multiple_of": 1.5}}]}, "multiple_of is a whole number, not 1.5"),
    ({"steps": [{"slicegpt": {"keep": 0.9, "multiple_of": 0}}]}, "multiple_of is a whole number from 1 on, not 0"),
    ({"steps": [{"slicegpt": {"keep": 0.9, "opts": {}}}]}, "step 1 of the recipe: no setting of slicegpt named 'opts'"),
    ({"steps": [{"slicegpt": {"keep": 0.9, "options": [1]}}]}, "the options of slicegpt are names with values"),
    ({"steps": [{"fasp": {"keep": 0.9, "options": {"rigde": 1}}}]}, "no option of fasp named 'rigde'. Did you mean"),
    ({"steps": [{"fasp": {"keep": 0.9, "options": {"ridge": [1]}}}]}, r"option ridge of fasp takes float, not \[1\]"),
    ({"steps": [{"fasp": {"keep": 0.9, "options": {"score": 1}}}]}, "no value of fasp's option score named '1'"),
    ({"steps": [{"fasp": {"keep": 0.9, "allocate": "influense"}}]}, "step 1 of the recipe: no allocation named"),
    ({"steps": [{"fasp": {"keep": 0.9, "allocate": [1]}}]}, "an allocation is a name or a table of widths"),
    ({"steps": [{"fasp": {"keep": 0.9, "allocate": {"ffn": 0.5}}}]}, "a table of widths leaves no budget"),
    ({"steps": ["restore"]}, "step 1 of the recipe, restore, has nothing to restore: it comes behind a cut"),
    ({"steps": [STEP, {"restore": {"rigde": 1}}]}, "step 2 of the recipe: no option of restore named 'rigde'"),
    ({"steps": [STEP, {"restore": {"ridge": "x"}}]}, "step 2 of the recipe: ridge is a number, not 'x'"),
    ({"steps": [STEP, {"restore": {"windows": 0}}]}, "step 2 of the recipe: windows=0 of restore: at least 2"),
    ({"steps": [STEP, {"restore": {"head": 1}}]}, "step 2 of the recipe: head is true or false, not 1"),
    ({"steps": [STEP, {"restore": {"held_out": 1}}]}, "step 2 of the recipe: held_out=1.0 of restore lies between"),
]


@pytest.mark.parametrize(("recipe", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_a_recipe_that_cannot_be(recipe: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises((BadInput, UnknownName), match=words) as raised:
        compress(folder("llama"), tmp_path / "out", recipe=recipe)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("path", "words"), [
    ("4.keep", "no step of the recipe named '4'"),
    ("flap.keep", "no step of the recipe named 'flap'"),
    ("1.keep.x", "--set 1.keep.x: there are no settings at that place"),
    ("1..x", "--set 1..x: there are no settings at that place"),
    ("kep", "no field of a recipe named 'kep'"),
])  # fmt: skip
def test_an_override_that_has_no_place(path: str, words: str) -> None:
    with pytest.raises((BadInput, UnknownName), match=words):
        recipes.steps(THREE, {path: 0.5})


@pytest.mark.parametrize(("contents", "words"), [
    ("steps: [", r"r.yaml is not YAML: .*"),
    ("- fasp", r"r.yaml is no recipe: it has no list of steps"),
    ("", r"r.yaml is no recipe"),
    (b"\xff\xfe\x00x", r"r.yaml is not YAML"),
    (None, r"cannot read the recipe .*r.yaml: No such file"),
])  # fmt: skip
def test_a_file_that_is_no_recipe(contents: str | bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    if contents is not None:
        file.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(BadInput, match=words) as raised:
        recipes.steps(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("more", [
    {"keep": 0.5}, {"slice": 0.1}, {"options": {"score": "l2"}}, {"allocate": "influence"}, {"restore": True},
    {"multiple_of": 2},
], ids=str)  # fmt: skip
def test_a_recipe_and_a_dial_are_not_mixed(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a recipe has its own dials and options: give no keep"):
        compress(folder("llama"), tmp_path / "out", recipe=THREE, **more)


def in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each temporary file has been made for; no memory is free, and they lie in a folder that is there."""
    made: list[int] = []
    kept = calibrate.scratch_file
    monkeypatch.setattr(calibrate, "scratch_file", lambda place, nbytes: made.append(nbytes) or kept(place, nbytes))
    monkeypatch.setattr(calibrate, "free_memory", lambda: 100)
    monkeypatch.setattr(forecast, "free_memory", lambda: 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return made


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "fasp", "options": ORIGINAL, "cache": "cache"},
        {"method": "fasp", "options": ORIGINAL},
        {"method": "modegpt", "options": ORIGINAL, "allocate": "global"},
        {"method": "flap"},
        {"method": "depth"},
    ],
    ids=str,
)
def test_sums_of_all_blocks_in_a_file_give_the_same_bytes(
    chosen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, or read from the cache; in a folder that is named, or because memory is short."""
    chosen = {"keep": 0.8, **chosen} | ({"cache": tmp_path / "cache"} if "cache" in chosen else {})
    compress(folder("llama"), tmp_path / "memory", **chosen)
    (tmp_path / "scratch").mkdir()
    compress(folder("llama"), tmp_path / "scratched", **chosen, scratch=tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())
    made = in_files(tmp_path, monkeypatch)
    compress(folder("llama"), tmp_path / "short", **chosen)
    assert not list((tmp_path / "temporary").iterdir())
    assert made
    same(tmp_path / "scratched", tmp_path / "memory")
    same(tmp_path / "short", tmp_path / "memory")


def test_the_plan_counts_sums_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASP reads the heads' outputs (48 numbers) and the neurons (80) of three blocks."""
    block = 8 * (48 * 48 + 80 * 80)
    original = {"keep": 0.8, "method": "fasp", "options": ORIGINAL}
    asked = [original, {"keep": 0.8, "method": "fasp"}, {"keep": 0.8}]
    kept = [microtome.preview(folder("llama"), **one).memory for one in asked]
    assert [one["sums"] for one in kept] == [4 * block, block, 8 * (7 + 2) * 48 * 48]
    made = in_files(tmp_path, monkeypatch)
    filed = [microtome.preview(folder("llama"), **one).memory for one in asked]
    assert [one["sums"] for one in filed] == [block, block, 8 * 2 * 48 * 48]
    assert [one.get("sums in a file") for one in filed] == [3 * block, None, 8 * 7 * 48 * 48]
    assert not made
    compress(folder("llama"), tmp_path / "out", **original)
    assert 3 * block in made


def test_a_full_disk_says_what_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = calibrate.scratch_file

    def full(place: Path, nbytes: int) -> Any:
        if nbytes == 3 * 8 * (48 * 48 + 80 * 80):
            raise OSError(errno.ENOSPC, "No space left")
        return kept(place, nbytes)

    monkeypatch.setattr(calibrate, "scratch_file", full)
    (tmp_path / "scratch").mkdir()
    with raises(
        BadInput, r"no room for 0\.0 GB of sums in .*scratch: No space left\. Give --scratch another folder\.$"
    ):
        compress(
            folder("llama"), tmp_path / "out", keep=0.8, method="fasp", options=ORIGINAL, scratch=tmp_path / "scratch"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_memory_is_counted_for_restoration() -> None:
    alone = microtome.preview(folder("llama"), recipe={"steps": THREE["steps"][:2]}).memory
    both = microtome.preview(folder("llama"), recipe=THREE).memory
    assert both["hidden states"] == 2 * alone["hidden states"]  # two streams side by side
    assert both["sums"] >= alone["sums"]


def test_memory_is_counted_for_refinement() -> None:
    recipe = {**THREE, "steps": [*THREE["steps"][:-1], {"restore": {"refine": 1}}]}
    one, many = (microtome.preview(folder("llama"), recipe=recipe, samples=count, length=32).memory for count in (4, 8))
    assert many["refinement"] == 2 * one["refinement"] > 0
    huge = microtome.preview(folder("llama"), recipe=recipe, samples=10_000, length=32).memory
    assert huge["refinement"] == one["refinement"] * 16384 // (4 * 32)  # its curvature is taken from some tokens
    assert "refinement" not in microtome.preview(folder("llama"), recipe=THREE).memory
