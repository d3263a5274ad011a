"""Healing of what is in codes: these stay, scales learn, and what is written computes what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import raises
from models import TINY, built, error, logits
from safetensors.torch import save_file
from tinies import HELD_OUT, compress, folder, home, weights
from torch import Tensor

import microtome
from microtome import coded, forecast, healed, healing, planner, recipes
from microtome.edit import Plan
from microtome.errors import BadInput, UnsupportedModel
from microtome.loading import load
from microtome.source import open_source

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[1] / "recipes" / "slice-sparse-4bit.yaml"
QUICK = {"steps": 12, "batch": 2, "loss": "text"}
SCALES = ("_scale", ".scales")
CODES = ("_packed", "_zero_point", "_shape", "qweight", "qzeros", "g_idx")
FORMS: dict[str, dict[str, Any]] = {
    "rows": {},
    "groups": {"group": 8, "symmetric": False},
    "gptq": {"store": "gptq", "group": 16, "symmetric": False},
}


def rounded(form: str, dtype: str = "float32") -> Path:
    """A tiny llama in codes of 4 bits; made once."""
    place = home() / f"coded-{form}-{dtype}"
    if not place.exists():
        model = built(TINY["llama"] | {"intermediate_size": 64})
        model.save_pretrained(home() / "coded-plain")
        options = FORMS[form] | {"sweep": False}
        compress(home() / "coded-plain", place, method="gptq", options=options, dtype=dtype)
    return place


def heal(model: Path, out: Path, options: dict[str, Any] | None = None, **chosen: Any) -> healed.Healed:
    return microtome.heal(
        model, **{"data": counted(8, 0), "measure": False, "out": out, "options": QUICK | (options or {}), **chosen}
    )


def counted(rows: int, seed: int) -> Tensor:
    """Windows in which every token is the one before it and one more: there is something to learn."""
    first = torch.randint(3, 90, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return 3 + (first + torch.arange(24)) % 90


# --- everything in a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_sliced_sparse_rounded_and_healed(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The recipe that ships: two of any four in a row are zero, codes are of 4 bits, text is predicted better."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    healing_step = {"5.steps": 20, "5.batch": 4, "5.loss": "text", "5.rate": "3e-2"}
    held = recipes.given(RECIPE, healing_step)
    common: dict[str, Any] = {"data": counted(24, 0), "measure": True, "eval_data": counted(6, 1), "samples": 24}
    before = compress(folder(name), tmp_path / "before", recipe=held | {"steps": held["steps"][:4]}, **common)
    after = compress(folder(name), tmp_path / "after", recipe=held, **common)
    assert before.perplexity_after is not None
    assert after.perplexity_after is not None
    assert after.perplexity_after.value < 0.98 * before.perplexity_after.value
    seen = forecast.preview(folder(name), recipe=held)
    assert (seen.after.stored, seen.after.nbytes) == (after.after.stored, after.after.nbytes)
    old, new = weights(before.folder), weights(after.folder)
    assert {key: (one.shape, one.dtype) for key, one in old.items()} == {
        key: (one.shape, one.dtype) for key, one in new.items()
    }
    with open_source(after.folder) as source:
        assert source.quantised is not None
        assert len(source.quantised.tensors) == (21 if name == "llama" else 18)
        for matrix in source.quantised.tensors:
            value = source.tensor(matrix)
            assert int(value.view(-1, 4).count_nonzero(1).max()) <= 2
            assert max(len(row.unique()) for row in value) <= 16
            assert torch.equal(new[f"{matrix}_packed"], old[f"{matrix}_packed"])
        assert after.after.nonzero == sum(int(source.tensor(one).count_nonzero()) for one in source.names())
    ours, theirs = after.load(), AutoModelForCausalLM.from_pretrained(after.folder)
    assert error(logits(theirs, HELD_OUT), logits(ours, HELD_OUT)) <= 1e-5
    written = theirs.generate(HELD_OUT[:1, :4], max_new_tokens=5, do_sample=False, eos_token_id=None)
    capfd.readouterr()  # the library shows how far it is
    assert written.shape == (1, 9)
    assert torch.equal(written, ours.generate(HELD_OUT[:1, :4], max_new_tokens=5, do_sample=False, eos_token_id=None))
    assert any("matrices kept their codes and learned scales" in note for note in after.notes)


def test_its_plan_does_it_again(tmp_path: Path) -> None:
    held = recipes.given(RECIPE, {"5.steps": 4, "5.batch": 2})
    compress(folder("llama"), tmp_path / "one", recipe=held)
    plan = Plan.read(tmp_path / "one")
    assert [step["method"] for step in plan.then] == ["fasp", "sparsegpt", "gptq", "heal"]
    compress(folder("llama"), tmp_path / "other", plan=plan)
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- a folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "dtype"), [("rows", "float32"), ("rows", "bfloat16"), ("groups", "float32"), ("gptq", "float32")]
)
def test_codes_stay_and_what_is_written_was_trained(form: str, dtype: str, tmp_path: Path) -> None:
    """The loss of the best look is that of the folder: scales were rounded as the file rounds them all along."""
    place = rounded(form, dtype)
    done = heal(place, tmp_path / "out")
    old, new = weights(place), weights(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name: one.dtype for name, one in old.items()} == {name: one.dtype for name, one in new.items()}
    assert not any(name.endswith(CODES) for name in changed)
    assert {name for name in old if name.endswith(SCALES)} <= changed
    assert all(name.endswith(SCALES) or "norm" in name for name in changed)
    assert (
        done.cure.trained == sum(old[name].numel() for name in old if name.endswith(SCALES) or "layernorm" in name) + 48
    )
    assert done.cure.coded == 21
    assert all((new[name] > 0).all() for name in new if name.endswith(SCALES))
    assert (tmp_path / "out" / "config.json").read_bytes() == (place / "config.json").read_bytes()
    losses = dict(done.cure.history.losses)
    assert losses[done.cure.history.best] < losses[0]
    if dtype == "float32":  # norms of a shorter model are rounded when they are written
        assert losses[done.cure.history.best] == pytest.approx(nll(load(tmp_path / "out", device=CPU)), rel=1e-4)
    assert losses[0] == pytest.approx(nll(values(place)), rel=1e-4)
    with open_source(tmp_path / "out") as source:
        assert done.cure.nonzero == sum(int(source.tensor(name).count_nonzero()) for name in source.names())


def nll(model: Any) -> float:
    """What a model loses on the window that is set aside, nats per token."""
    ids = counted(8, 0)[-1:]
    return torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1], ids[0, 1:]).item()


def values(place: Path) -> Any:
    """The model of a folder with weights (code - zero) * scale in fp32, unpacked by hand where scales are shorter."""
    model = load(place, device=CPU, dtype=torch.float32)
    stored = weights(place)
    for name, module in model.named_modules():
        if f"{name}.weight_packed" in stored:
            words, scale = stored[f"{name}.weight_packed"].long() & 0xFFFFFFFF, stored[f"{name}.weight_scale"].float()
            codes = torch.stack([(words >> (4 * place)) & 15 for place in range(8)], -1).flatten(1)
            if scale.shape[1] == 1 and f"{name}.weight_zero_point" not in stored:
                module.weight.data = (codes[:, : module.in_features] - 8).float() * scale
    return model


def test_scales_learn_by_the_sum_of_what_their_weights_would() -> None:
    """d loss / d log s = sum over a group of (d loss / d w) w: by autograd of the plain weights."""
    place = rounded("groups")
    plain, trained = (load(place, device=CPU, dtype=torch.float32) for _ in range(2))
    with open_source(place) as source:
        found = planner.opened(source)
        held = coded.opened(source, trained, healing.homes_of(found, trained))
    for model in (plain, trained):
        model.requires_grad_()
        model(input_ids=HELD_OUT, labels=HELD_OUT).loss.backward()
    parameters = dict(trained.named_parameters())
    for name, one in held.items():
        linear: Any = plain.get_submodule(name.removesuffix(f".{coded.PLACE}"))
        product = (linear.weight.grad * linear.weight.detach()).view(*one.scaled.start.shape, -1).sum(2)
        assert parameters[name].shape == product.shape == (linear.out_features, linear.in_features // 8)
        assert error(parameters[name].grad, product) < 1e-4


def test_embeddings_learn_if_they_are_asked_to(tmp_path: Path) -> None:
    heal(rounded("rows"), tmp_path / "out", {"embeddings": True})
    old, new = weights(rounded("rows")), weights(tmp_path / "out")
    assert not torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith(CODES))


def test_codes_of_others_are_healed(tmp_path: Path) -> None:
    """Columns of a group scattered (act-order), zero points less one, scales [G, O]: GPTQ as others write it."""
    place = tmp_path / "scattered"
    place.mkdir()
    stored = weights(rounded("gptq"))
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith("g_idx")]:
        stored[name] = stored[name][torch.randperm(len(stored[name]), generator=generator)].contiguous()
    save_file(stored, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_bytes((rounded("gptq") / "config.json").read_bytes())
    done = heal(place, tmp_path / "out")
    losses = dict(done.cure.history.losses)
    assert losses[done.cure.history.best] < losses[0]
    for steps, where in ((0, place), (done.cure.history.best, tmp_path / "out")):
        assert losses[steps] == pytest.approx(nll(load(where, device=CPU)), rel=1e-4)


def test_levels_times_scales_are_the_weight(tmp_path: Path) -> None:
    """Of every format whose codes lie in words: as it is read, and as training begins with it."""
    generator = torch.Generator().manual_seed(0)
    words = {"model.a.qweight": (32, 2), "model.a.qzeros": (4, 2)}
    stored = {
        name: torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int() for name, shape in words.items()
    }
    stored["model.a.scales"] = (0.1 + torch.rand(4, 16, generator=generator)).half()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
    (tmp_path / "config.json").write_text(json.dumps(TINY["llama"] | {"dtype": "float32", "quantization_config": said}))
    for place in (tmp_path, *map(rounded, FORMS)):
        with open_source(place) as source:
            assert source.quantised is not None
            for name in source.quantised.tensors:
                one = coded.read(source, name)
                start = one.scaled.right_inverse(torch.empty(0))
                assert torch.equal(one.scaled(start), source.tensor(name)), (place, name)
                assert torch.equal(one.scales(start), source.stored(one.stored))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    options = {"steps": 10, "batch": 3, "patience": 10}
    for name in ("whole", "twice"):
        heal(rounded("rows"), tmp_path / name, options)

    def stop(what: str, fraction: float) -> None:
        if what == "healing" and fraction >= 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(rounded("rows"), tmp_path / "parts", options, progress=stop)
    heal(rounded("rows"), tmp_path / "parts", options, resume=True)
    one = weights(tmp_path / "whole")
    for other in (weights(tmp_path / "twice"), weights(tmp_path / "parts")):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_hopeless_run_stops_and_changes_nothing(tmp_path: Path) -> None:
    options = {"steps": 40, "rate": 0.5, "warmup": 0.0, "patience": 3}
    done = heal(rounded("rows"), tmp_path / "out", options | {"loss": "distil"}, teacher=home() / "coded-plain")
    assert done.cure.history.early
    assert done.cure.history.best == 0
    old, new = weights(rounded("rows")), weights(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old)


# --- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "lora"}, "is in codes, which adapters cannot be added to: train=full trains its scales"),
        ({"keep_zeros": False}, "is in codes, which stay as they are, zeros too: heal it with keep_zeros=true"),
    ],
)
def test_what_codes_cannot_follow(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with raises(BadInput, f"coded-rows-float32 {words}"):
        heal(rounded("rows"), tmp_path / "out", options)
    steps: Any = [{"gptq": {}}, {"heal": options}]
    with raises(BadInput, f"what gptq has made {words}"):
        compress(folder("llama"), tmp_path / "out", recipe={"steps": steps})
    assert not list(tmp_path.iterdir())


def test_plain_numbers_have_no_scales_to_learn(tmp_path: Path) -> None:
    """Where the format cannot say a result, or was not asked to, healing would leave the grid: said before a run."""
    steps: list[Any] = [{"gptq": {"options": {"store": "dense"}}}, "heal"]
    for run in (lambda: compress(folder("llama"), tmp_path / "out", recipe={"steps": steps}),
                lambda: forecast.preview(folder("llama"), recipe={"steps": steps})):  # fmt: skip
        with raises(BadInput, r"gptq stores plain numbers here \(store=dense\), and healing would take them off their"):
            run()
    with raises(
        BadInput, r"gptq stores plain numbers here \(transformer\.h\.0.* is stored transposed, .*: put heal in"
    ):
        compress(folder("gpt2-tied"), tmp_path / "out", recipe={"steps": [{"gptq": {}}, "heal"]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("later", ["restore", "fasp"])
def test_nothing_but_healing_comes_behind_healed_codes(later: str, tmp_path: Path) -> None:
    step: Any = later if later == "restore" else {later: {"keep": 0.9}}
    with raises(
        BadInput,
        f"gptq puts weights in codes, and {later} would change them: put gptq last; only heal may follow it",
    ):
        compress(folder("llama"), tmp_path / "no", recipe={"steps": [{"gptq": {}}, "heal", step]})


def test_codes_of_what_is_no_linear(tmp_path: Path) -> None:
    stored, name = weights(rounded("rows")), "model.embed_tokens"
    down = "model.layers.0.mlp.down_proj"
    wide = stored[f"{down}.weight_packed"]
    stored.pop(f"{name}.weight")
    stored |= {
        f"{name}.weight_packed": torch.zeros(97, 6, dtype=wide.dtype),
        f"{name}.weight_scale": torch.ones(97, 1),
        f"{name}.weight_shape": torch.tensor([97, 48]),
    }
    (tmp_path / "odd").mkdir()
    save_file(stored, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    (tmp_path / "odd" / "config.json").write_bytes((rounded("rows") / "config.json").read_bytes())
    with raises(UnsupportedModel, r"odd has model\.embed_tokens\.weight in codes, which is no linear: it cannot be"):
        heal(tmp_path / "odd", tmp_path / "out", {"loss": "text"})
