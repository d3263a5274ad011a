"""Healing: what is learned, what is trained, what is written, and going on where a run was stopped."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from folders import raises, tree
from models import TINY, built, logits
from safetensors.torch import save_file
from test_wrapped import checkpoint
from tinies import CALIBRATION, HELD_OUT, compress, folder, home, weights
from torch import Tensor, nn
from torch.nn.functional import kl_div

import microtome
from microtome import adapters, distillation, healed, healing, planner, training
from microtome.adapters import ADAPTER, Trained
from microtome.distillation import Objective, divergence, maps
from microtome.edit import Plan
from microtome.errors import BadInput, BadOutput, NumericalFailure, UnknownName, UnsupportedModel
from microtome.loading import load
from microtome.source import open_source
from microtome.training import Heal, History, Training

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2] / "shared"
QUICK = {"steps": 6, "batch": 2}
NAMES = ("llama", "gpt2-tied", "opt-tied")  # stock, then two that are ours once they are sliced; gpt2 has Conv1D

PAYS = healing.pays  # which tests replace


def cut(name: str = "llama") -> Path:
    """A sliced tiny model; made once."""
    place = home() / f"heal-{name}"
    if not place.exists():
        compress(folder(name), place, keep=0.8)
    return place


def zeroed(place: Path, pattern: str) -> Path:
    """A tiny llama, half of whose linears' numbers are zero: anywhere, or two of any four in a row."""
    held = weights(folder("llama"))
    generator = torch.Generator().manual_seed(0)
    for name, one in held.items():
        if "proj" not in name:
            continue
        noise = torch.rand(one.shape, generator=generator)
        if pattern == "2:4":
            noise = noise.view(-1, 4).argsort(1).argsort(1).view(one.shape) / 4
        one[noise < 0.5] = 0.0
    folder_of(place, held)
    return place


def folder_of(place: Path, held: dict[str, Tensor]) -> None:
    """A checkpoint of a llama with these weights."""
    place.mkdir()
    (place / "config.json").write_text((folder("llama") / "config.json").read_text())
    save_file({name: one.contiguous() for name, one in held.items()}, place / "model.safetensors", {"format": "pt"})


def heal(model: Path, out: Path, options: dict[str, Any] | None = None, **chosen: Any) -> healed.Healed:
    return microtome.heal(
        model, **{"data": CALIBRATION, "measure": False, "out": out, "options": QUICK | (options or {}), **chosen}
    )


def apart(model: Any, teacher: Any, tokens: Tensor) -> float:
    """Mean divergence of a model's predictions from another's, nats."""
    have, want = (torch.log_softmax(logits(one, tokens).double(), -1).flatten(0, 1) for one in (model, teacher))
    return kl_div(have, want, log_target=True, reduction="batchmean").item()


# --- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK", 40)  # four tokens at a time, and a rest
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 7, 10, generator=generator) for _ in range(2))
    student.requires_grad_()
    value = 3.0 * divergence(student, teacher, temperature)
    (found,) = torch.autograd.grad(value, student)
    have, want = (torch.log_softmax(one.flatten(0, 1) / temperature, -1) for one in (student, teacher))
    wanted = 3.0 * temperature**2 * kl_div(have, want, log_target=True, reduction="batchmean")
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, student)[0])


class States(nn.Module):
    """A model whose hidden states are those of a table, seen through a matrix."""

    def __init__(self, table_LVN: Tensor, onto_NR: Tensor) -> None:
        super().__init__()
        self.table, self.onto = table_LVN, onto_NR

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        states = [one[input_ids] @ self.onto for one in self.table]
        return SimpleNamespace(hidden_states=(states[0], *states), logits=states[0])


def test_maps_between_streams_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4, 30, 8, generator=generator)
    onto = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:, :5]
    teacher, ids = States(table, torch.eye(8)), torch.arange(30).view(3, 10)
    found = maps(States(table[[1, 3]], onto), teacher, ids, rows=2)
    assert [place for place, _ in found] == [2, 4]  # by relative depth
    for _, one in found:
        assert one is not None
        torch.testing.assert_close(one, onto, atol=2e-3, rtol=0)
    near = States(table + 0.01, torch.eye(8))
    assert [one for _, one in maps(near, teacher, ids, rows=3)] == [None] * 4
    turned = maps(States(table, torch.eye(8)[:, [1, 2, 3, 4, 5, 6, 7, 0]]), teacher, ids, rows=3)
    assert all(one is not None for _, one in turned)  # as wide, in other coordinates


def test_hidden_states_where_they_should_be_cost_nothing() -> None:
    table = torch.randn(3, 30, 8, generator=torch.Generator().manual_seed(0))
    onto = torch.eye(8)[:, :4]
    objective = Objective(None, maps=[(1, onto), (2, onto), (3, onto)])
    ids = torch.arange(30).view(3, 10)
    told = States(table, torch.eye(8))(ids).hidden_states
    assert objective.states(States(table, onto)(ids).hidden_states, told).item() < 1e-12
    twice = objective.states(States(2.0 * table, onto)(ids).hidden_states, told)
    assert twice.item() == pytest.approx(1.0)  # as far off as what is wanted is long


# --- what is trained ------------------------------------------------------------------------------------------------


def stirred(trained: Trained) -> None:
    """Adapters that change something."""
    generator = torch.Generator().manual_seed(1)
    trained.put({name: 0.3 * torch.randn(one.shape, generator=generator) for name, one in trained.parameters.items()})


@pytest.mark.parametrize("pattern", ["dense", "half"])
@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_compute_what_the_adapters_do(name: str, pattern: str) -> None:
    model = load(cut(name), device=CPU, dtype=torch.float64)
    if pattern == "half":
        for one in adapters.linears_of(model).values():
            one.weight.data[torch.rand(one.weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = 0.0
    names = [name for name, _ in model.named_parameters()]
    uncut, state = logits(model, HELD_OUT), {name: one.clone() for name, one in model.state_dict().items()}
    trained = adapters.lora(model, rank=3, alpha=6.0, targets=(), keep_zeros=True, seed=0)
    torch.testing.assert_close(logits(model, HELD_OUT), uncut)  # they start as nothing
    stirred(trained)
    want, merged = logits(model, HELD_OUT), trained.merge()
    assert (want - uncut).abs().max() > 0.01
    assert set(merged) <= set(names)
    assert len(trained.masks) == (len(merged) if pattern == "half" else 0)
    fresh = load(cut(name), device=CPU, dtype=torch.float64)
    fresh.load_state_dict(state | merged)
    torch.testing.assert_close(logits(fresh, HELD_OUT), want, atol=1e-9, rtol=1e-9)
    for key, mask in trained.masks.items():
        assert merged[key][~mask].count_nonzero() == 0


def test_targets_name_linears() -> None:
    model = load(cut(), device=CPU)
    assert {name.rsplit(".", 1)[-1] for name in adapters.linears_of(model, ("q_proj", "up_proj"))} == {
        "q_proj",
        "up_proj",
    }
    with raises(UnknownName, "no linear of the blocks named 'q_prok'. Did you mean 'q_proj'"):
        adapters.linears_of(model, ("q_prok",))


def test_lora_trains_adapters_and_nothing_else() -> None:
    model = load(cut(), device=CPU)
    trained = adapters.lora(model, rank=3, alpha=6.0, targets=("q_proj",), keep_zeros=True, seed=0)
    assert trained.parameters
    assert all(
        f".q_proj.lora_{side}.{ADAPTER}." in name for name in trained.parameters for side in name.split("lora_")[1][0]
    )


@pytest.mark.parametrize("name", NAMES)
def test_full_trains_all_but_the_ends(name: str) -> None:
    model = load(cut(name), device=CPU, dtype=torch.float32)
    every = {name for name, _ in model.named_parameters()}
    tables = {name for name, one in model.named_parameters() if len(one) in (97, 98, 66, 64) and one.ndim == 2}
    spared = every - set(adapters.full(model, embeddings=False, keep_zeros=True).parameters)
    assert spared
    assert all("embed" in name or "head" in name or "wte" in name or "wpe" in name for name in spared), spared
    assert tables or spared
    assert set(adapters.full(model, embeddings=True, keep_zeros=True).parameters) == every


def test_without_peft_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with raises(BadInput, r"LoRA needs peft: pip install 'microtome\[heal\]', or train all weights by --train full"):
        heal(cut(), tmp_path / "out", {"train": "lora"})
    assert heal(cut(), tmp_path / "out", {"train": "full"}).cure.train == "full"


# --- a run ----------------------------------------------------------------------------------------------------------


def run(options: Heal, model: nn.Module | None = None, rate: float = 1e-3) -> Training:
    """A run over a sliced tiny model."""
    model = model or load(cut(), device=CPU, dtype=torch.float32)
    trained = adapters.full(model, embeddings=False, keep_zeros=True)
    return Training(model, trained, Objective(load(folder("llama"), device=CPU)), CALIBRATION, options, rate)


def test_the_rate_rises_and_falls() -> None:
    course = run(Heal(steps=100, warmup=0.1))
    factors = []
    for steps in range(101):
        course.history.steps = steps
        factors.append(course.factor())
    peak = factors.index(max(factors))
    assert 8 <= peak <= 12
    assert max(factors) <= 1.0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[0] == pytest.approx(0.02)
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)


def test_every_epoch_takes_every_window_once() -> None:
    course = run(Heal(steps=100, batch=3, accumulate=2, held_out=0.13))
    assert len(course.held_NT) == 1
    count, seen = len(course.learned_NT), []
    for course.history.steps in range(count):  # six epochs of seven windows, in steps of six
        seen += [tuple(row) for row in course.batch().tolist()]
    windows = sorted(tuple(row) for row in course.learned_NT.tolist())
    epochs = [seen[start : start + count] for start in range(0, len(seen), count)]
    assert len(epochs) == 6
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_accumulated_batches_are_one_large_one() -> None:
    found = []
    for batch, accumulate in ((4, 1), (2, 2)):
        course = run(Heal(steps=3, batch=batch, accumulate=accumulate))
        course.step()
        found.append(course.trained.held())
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, atol=1e-5, rtol=1e-4)


def test_the_best_weights_are_kept_and_a_hopeless_run_stops() -> None:
    course = run(Heal(steps=40, batch=2, patience=3, warmup=0.0), rate=3.0)
    before = course.trained.held()
    history = course.run()
    assert history.early
    assert history.steps < 40
    assert history.best == 0
    assert all(loss > history.losses[0][1] for _, loss in history.losses[1:])
    assert all(torch.equal(one, before[name]) for name, one in course.trained.held().items())


def test_a_run_that_loses_ground_goes_on_from_its_best_weights_and_slower() -> None:
    course = run(Heal(steps=60, batch=2, patience=10, warmup=0.0), rate=0.3)
    history = course.run()
    first, *others = [loss for _, loss in history.losses]
    assert others[0] > first
    assert 1 <= history.slower < 10
    assert history.slower == sum(loss > first for loss in others)
    assert min(others) < first
    assert course.optimizer.param_groups[0]["lr"] <= 0.3 / 3**history.slower


def test_a_loss_that_is_no_number_is_an_error() -> None:
    course = run(Heal(steps=10, batch=2, warmup=0.0))
    next(iter(course.trained.parameters.values())).data.fill_(math.nan)
    with raises(NumericalFailure, "the loss of healing is not finite after 0 steps: the model overflows on this text"):
        course.run()


def test_minutes_end_a_run() -> None:
    course = run(Heal(minutes=1.0, batch=2))
    course.history = History([(0, 1.0)], steps=7, seconds=59.0)
    assert not course.over()
    course.history.seconds = 60.0
    assert course.over()
    assert not course.history.early


# --- a folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train"), [("llama", "lora"), ("llama", "full"), ("gpt2-tied", "lora"), ("opt-tied", "full")]
)
def test_a_healed_folder_is_like_the_one_before_and_nearer_to_the_original(
    name: str, train: str, tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    done = heal(cut(name), out, {"train": train, "steps": 24, "rate": 1e-3, "patience": 10})
    old, new = weights(cut(name)), weights(out)
    assert {key: (one.shape, one.dtype) for key, one in old.items()} == {
        key: (one.shape, one.dtype) for key, one in new.items()
    }
    assert any(not torch.equal(old[key], new[key]) for key in old)
    assert (out / "config.json").read_bytes() == (cut(name) / "config.json").read_bytes()
    assert set(tree(out)) == set(tree(cut(name)))
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]
    teacher = load(folder(name), device=CPU)
    before, after = (load(place, device=CPU) for place in (cut(name), out))
    losses = dict(done.cure.history.losses)
    held = CALIBRATION[-1:]  # the windows set aside
    assert losses[done.cure.history.best] == pytest.approx(apart(after, teacher, held), rel=1e-4)
    assert losses[0] == pytest.approx(apart(before, teacher, held), rel=1e-4)
    assert apart(after, teacher, CALIBRATION[:-1]) < apart(before, teacher, CALIBRATION[:-1])
    if name == "llama":
        assert transformers.MistralForCausalLM.from_pretrained(out).config.hidden_size < 48  # no file of ours beside it


@pytest.mark.parametrize(("pattern", "train"), [("half", "lora"), ("2:4", "full")])
def test_zeros_stay_zero(pattern: str, train: str, tmp_path: Path) -> None:
    place = zeroed(tmp_path / "sparse", pattern)
    options = {"train": train, "rate": 1e-2}
    done = heal(place, tmp_path / "kept", options, teacher=folder("llama"))
    old, new = weights(place), weights(tmp_path / "kept")
    linears = [name for name in old if "proj" in name]
    assert done.cure.sparse == len(linears)
    assert done.cure.nonzero == sum(int(one.count_nonzero()) for one in new.values())
    for name in linears:
        assert new[name][old[name] == 0].count_nonzero() == 0
    assert any(not torch.equal(old[name], new[name]) for name in linears)
    filled = heal(place, tmp_path / "filled", options | {"keep_zeros": False}, teacher=folder("llama"))
    assert filled.cure.nonzero > done.cure.nonzero


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(train: str, tmp_path: Path) -> None:
    options = {"train": train, "steps": 10, "rate": 1e-3, "batch": 3, "hidden": 0.5, "patience": 10}
    heal(cut(), tmp_path / "whole", options)

    def stop(what: str, fraction: float) -> None:
        if what == "healing" and fraction >= 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(cut(), tmp_path / "parts", options, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.partial", "whole"]
    with raises(BadOutput, "parts.partial holds the state of a run that was stopped: go on by --resume, or remove it"):
        heal(cut(), tmp_path / "parts", options)
    with raises(BadInput, "parts.partial is of another run: give the same model, data and options"):
        heal(cut(), tmp_path / "parts", options | {"seed": 1}, resume=True)
    done = heal(cut(), tmp_path / "parts", options, resume=True)
    assert done.cure.history.steps == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama"])
def test_blocks_computed_twice_come_to_the_same(name: str, tmp_path: Path) -> None:
    """Transformers does so in training mode only, where GPT-2 has dropout."""
    for place, checkpointing in (("once", False), ("twice", True)):
        heal(cut(name), tmp_path / place, {"steps": 3, "checkpointing": checkpointing, "rate": 1e-3})
    once, twice = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert any(not torch.equal(one, weights(cut(name))[key]) for key, one in once.items())
    for key, one in once.items():
        torch.testing.assert_close(twice[key], one, atol=1e-5, rtol=1e-4)


def test_products_in_bf16_are_near_those_in_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exactly = heal(cut(), tmp_path / "fp32", {"steps": 2, "train": "full"})
    monkeypatch.setattr(healing, "pays", lambda _: True)
    nearly = heal(cut(), tmp_path / "bf16", {"steps": 2, "train": "full"})
    one, other = (dict(done.cure.history.losses)[2] for done in (exactly, nearly))
    assert one != other
    assert one == pytest.approx(other, rel=0.1)
    assert {value.dtype for value in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("known", "pays"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False)]
)
def test_products_in_bf16_want_instructions_for_them(
    known: dict[str, bool], pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert PAYS(torch.device("cpu")) == pays


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        heal(cut(), tmp_path / name, {"train": "lora"})
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_done_is_on_record(tmp_path: Path) -> None:
    done = heal(cut(), tmp_path / "out", {"steps": 4}, measure=True, eval_data=HELD_OUT, command="microtome heal x")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    told = plan["result"]["healing"]
    assert told["history"]["steps"] == 4
    assert told["data"]["windows"] == len(CALIBRATION)
    assert told["teacher"]["name"] == str(folder("llama"))
    assert done.original is not None
    assert told["perplexity"]["original"]["value"] == done.original.value
    assert {one["sha256"] for one in told["perplexity"].values()} == {done.original.sha256}
    card = (tmp_path / "out" / "README.md").read_text()
    before = (cut() / "README.md").read_text()
    assert card.partition("\n# out\n")[2].startswith(before.partition(f"\n# {cut().name}\n")[2].rstrip("\n"))
    assert "## Healed" in card
    assert "microtome heal x" in card
    assert f"original {done.original.value:.4g}" in card
    again = Plan.read(tmp_path / "out")
    assert [one["method"] for one in again.then] == ["heal"]


def test_text_alone_needs_no_original(tmp_path: Path) -> None:
    done = heal(folder("llama"), tmp_path / "out", {"loss": "text", "train": "full", "rate": 1e-3})
    assert done.record["teacher"] is None
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["method"] == "heal"
    model = load(folder("llama"), device=CPU)
    held = CALIBRATION[-1:]
    nll = torch.nn.functional.cross_entropy(logits(model, held)[0, :-1], held[0, 1:]).item()
    assert done.cure.history.losses[0][1] == pytest.approx(nll, rel=1e-4)


def test_names_that_lack_the_first_word_find_their_home(tmp_path: Path) -> None:
    folder_of(tmp_path / "base", {name.removeprefix("model."): one for name, one in weights(folder("llama")).items()})
    with open_source(tmp_path / "base") as source:
        homes = healing.homes_of(planner.opened(source), built(TINY["llama"]))
    assert homes["layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("kind", ["llava", "idefics3"])  # llava is stored under the old names of its decoder
def test_the_decoder_in_a_wrapper_is_healed_and_nothing_else(kind: str, tmp_path: Path) -> None:
    place = checkpoint(kind)
    heal(place, tmp_path / "out", {"loss": "text", "rate": 1e-3, "train": "full"})
    old, new = weights(place), weights(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name for name in old if ".layers." in name and "vision" not in name} <= changed
    assert all("language_model" in name or "text_model" in name for name in changed)
    assert not any("embed" in name for name in changed)
    assert (tmp_path / "out" / "config.json").read_bytes() == (place / "config.json").read_bytes()


# --- recipes --------------------------------------------------------------------------------------------------------


def test_a_recipe_heals_and_its_plan_does_it_again(tmp_path: Path) -> None:
    recipe = {"keep": 0.8, "steps": ["slicegpt", {"heal": {"steps": 5, "batch": 2, "train": "full", "rate": "1e-3"}}]}
    done = compress(folder("llama"), tmp_path / "one", recipe=recipe)
    assert any(note.startswith("healed: 5 steps") for note in done.notes)
    seen = microtome.preview(folder("llama"), recipe=recipe)
    assert seen.after.stored == done.after.stored
    assert seen.memory["healing"] > 4 * seen.before.stored
    compress(folder("llama"), tmp_path / "other", plan=Plan.read(tmp_path / "one"))
    one, other, plain = (weights(place) for place in (tmp_path / "one", tmp_path / "other", cut()))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in plain.items()}
    heal(cut(), tmp_path / "after", {"steps": 5, "train": "full", "rate": 1e-3})
    after = weights(tmp_path / "after")  # the same steps on the folder that the cut alone writes
    assert all(torch.equal(one[name], after[name]) for name in one)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"heal": {"step": 3}}, "step 2 of the recipe: no option of heal named 'step'. Did you mean 'steps'"),
        ({"heal": {"steps": 0}}, "steps=0 of heal is no number above 0"),
        ({"heal": {"train": "fll"}}, "no train of heal named 'fll'. Did you mean 'full'"),
        ({"heal": {"targets": [3]}}, "targets is a word, or a list of words"),
        ({"heal": {"text": 2}}, "text=2.0 of heal is no share: it lies between 0 and 1"),
    ],
)
def test_wrong_steps_are_refused(step: Any, words: str, tmp_path: Path) -> None:
    with raises(BadInput, words):
        compress(folder("llama"), tmp_path / "out", recipe={"keep": 0.8, "steps": ["slicegpt", step]})
    assert not list(tmp_path.iterdir())


def test_there_must_be_something_to_heal(tmp_path: Path) -> None:
    with raises(BadInput, "step 1 of the recipe, heal, has nothing to heal: it comes behind a cut"):
        compress(folder("llama"), tmp_path / "out", recipe={"keep": 0.8, "steps": ["heal", "slicegpt"]})


# --- refusals -------------------------------------------------------------------------------------------------------


def quantised(place: Path) -> Path:
    """A checkpoint that calls itself quantised, and is."""
    held = {name: one.clone() for name, one in weights(folder("llama")).items()}
    for name in [name for name in held if "proj" in name]:
        held[name] = held[name].to(torch.float8_e4m3fn)
        held[f"{name}_scale_inv"] = torch.ones(1, 1)
    folder_of(place, held)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = folder("llama")
    odd = built(TINY["llama"] | {"vocab_size": 101})
    odd.save_pretrained(home() / "heal-odd")
    with raises(BadInput, "has no plan.json that names its original: give it by --teacher, or learn from text alone"):
        heal(plain, out)
    with raises(BadInput, "heal-odd has a vocabulary of 101, and .* one of 97: give the model that it was made from"):
        heal(plain, out, teacher=home() / "heal-odd")
    with raises(BadInput, "healing needs at least 2 windows, one of them to choose the best weights by, and has 1"):
        heal(cut(), out, data=CALIBRATION[:1])
    with raises(BadInput, "there is no state in .*out.partial to resume from: leave --resume out"):
        heal(cut(), out, resume=True)
    with raises(
        UnsupportedModel, "is quantised, and training would leave its grid: of fp8 no scales are trained, only of codes"
    ):
        heal(quantised(home() / "heal-fp8"), out, teacher=plain)
    with raises(BadInput, "no folder 'nowhere/at/all'"):
        heal(plain, out, teacher="nowhere/at/all")
    assert not list(tmp_path.iterdir())


def test_an_original_that_moved_or_changed_is_told(tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder_of(tmp_path / "dense", weights(folder("llama")))
    compress(tmp_path / "dense", made, keep=0.8)
    config = tmp_path / "dense" / "config.json"
    config.write_text(config.read_text() + "\n")
    with raises(BadInput, "dense has other weights than .*made was made from: give it by --teacher"):
        heal(made, tmp_path / "out")
    (tmp_path / "dense").rename(tmp_path / "away")
    with raises(BadInput, "the original of .*made, .*dense, is no folder here: give it by --teacher"):
        heal(made, tmp_path / "out")


def test_what_exists_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    heal(cut(), out, {"steps": 1})
    before = tree(out)
    with raises(BadOutput, "out exists. Choose another output folder, or pass --overwrite"):
        heal(cut(), out)
    assert tree(out) == before
    heal(cut(), out, {"steps": 2}, overwrite=True)
    assert tree(out) != before


def test_options_are_checked() -> None:
    with raises(UnknownName, "no loss of heal named 'distill'. Did you mean 'distil'"):
        Heal(loss="distill")
    with raises(BadInput, "held_out=1.0 of heal is no share between 0 and 1"):
        Heal(held_out=1.0)
    assert Heal().limit == 300
    assert Heal(minutes=2.0).limit is None


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import microtome_cli

    torch.save(CALIBRATION, tmp_path / "ids.pt")
    words = ["heal", cut(), "--out", tmp_path / "out", "--data", tmp_path / "ids.pt", "--steps", 4, "--batch", 2]
    words += ["--no-evaluate", "-o", "temperature=2", "-o", "targets=[q_proj]", "--train", "lora"]

    def ran(*more: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["microtome", *map(str, words), *map(str, more)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            microtome_cli.main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    code, out, error = ran("-o", "temperatur=2")
    assert (code, out) == (2, "")
    assert error.startswith("microtome: no option of heal named 'temperatur'. Did you mean 'temperature'")
    true_step = Training.step

    def step(self: Training) -> None:
        if self.history.steps == 2:
            raise KeyboardInterrupt
        true_step(self)

    monkeypatch.setattr(Training, "step", step)
    code, out, error = ran()
    state = tmp_path / "out.partial"
    said = f"microtome: stopped; {state} keeps the run: the same command with --resume goes on.\n"
    assert (code, out, error) == (130, "", said)
    assert (state / training.STATE).is_file()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Training, "step", true_step)
    code, out, error = ran("--resume", "--json")
    assert (code, error) == (0, "")
    told = json.loads(out)
    assert told["options"]["temperature"] == 2.0
    assert told["options"]["targets"] == ["q_proj"]
    assert told["history"]["steps"] == 4
    assert not state.exists()


# --- trained models -------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_thirty_steps_help_a_trained_model(tmp_path: Path) -> None:
    dense, ids = SHARED / "models" / "stories-3m", SHARED / "data" / "tokens"
    calibration, held = (torch.load(ids / f"stories-3m.{name}.pt") for name in ("calib", "eval"))
    compress(dense, tmp_path / "cut", data=calibration[:32], keep=0.75)
    options = {"steps": 30, "batch": 4, "rate": 1e-3}
    done = heal(
        tmp_path / "cut", tmp_path / "out", options, data=calibration, eval_data=held[:16], measure=True, length=64
    )
    assert done.before is not None
    assert done.after is not None
    assert done.after.value < 0.85 * done.before.value
