"""DISP-LLM: masks against zeroed weights, gradients against enumeration, and coordinates that nobody needs go first."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import raises, tree
from models import RAGGED, canonical, decoder, doubled, error, loaded, logits, random_tensors, stepwise
from safetensors.torch import save_file
from tinies import CALIBRATION, HELD_OUT, compress, folder, spoken, text, weights
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import microtome
from microtome import arch, inner, layout, masks, planner
from microtome.cut import own_config
from microtome.edit import Plan
from microtome.errors import BadInput, BadPlan, NumericalFailure, UnsupportedModel
from microtome.layout import prefix
from microtome.masks import Size
from microtome.methods.disp import DISP
from microtome.modeling_microtome import MicrotomeConfig
from microtome.source import open_source
from microtome.space import Kind, Role
from microtome.stats import Learning, Masks, Stat

SOME = (
    "llama-gqa-llama3-tied",
    "gemma-bias",
    "gemma2",
    "gpt2-untied",
    "gpt_neox",
    "olmo2",
    "opt-tied",
    "phi",
    "qwen3-tied",
)
QUICK: dict[str, Any] = {"steps": 3, "rate": 0.05}
EXACT = 1e-5
SHARED = Path(__file__).parents[2].parent / "shared"

each_model = pytest.mark.parametrize("name", SOME)


def cut(model: Any, out: Path, options: Mapping[str, Any] | None = None, **chosen: Any) -> microtome.Result:
    if "allocate" not in chosen and "plan" not in chosen:
        chosen = {"keep": 0.6} | chosen
    return compress(model, out, method="disp", options=QUICK | dict(options or {}), **chosen)


def zeroed(config: MicrotomeConfig, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A decoder of the same shape with zeros where a mask has them; `kept` are indices by space."""
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for block in range(config.num_hidden_layers):
        for space in inner.spaces_of(config, block, masks.ORDER).values():
            gone = [one for one in range(space.size) if one not in set(kept[space.name].tolist())]
            for axis in space.axes:
                if axis.tensor in out and (space.kind is not Kind.FFN or axis.role is Role.READS):
                    out[axis.tensor].movedim(axis.dim, 0)[gone] = 0.0
    return out


def kept_by(name: str, result: microtome.Result, options: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The best of the logits that the same learning comes to, by space."""
    how = DISP(**QUICK | dict(options or {})).learning
    with open_source(folder(name)) as source:
        opened = planner.opened(source)
        wanted = 0.6 * layout.count_blocks(opened.config)
        found = masks.learned(opened, CALIBRATION, how, wanted, device=torch.device("cpu"), dtype=torch.float32)
    logit = {space: one for held in found.values() for space, one in held.logits.items()}
    widths = result.plan.widths
    return {space: one.topk(widths[space]).indices.sort().values for space, one in logit.items()}


# --- what is written is what was masked -----------------------------------------------------------------------------


@each_model
def test_gathering_and_scattering_is_masking(name: str, tmp_path: Path) -> None:
    """The result against the uncut decoder with zeros in its weights; indices, cache and size on the way."""
    result = cut(folder(name), tmp_path / "out")
    assert not result.stock
    kept, stored = kept_by(name, result), weights(tmp_path / "out")
    assert any(len(one) < 48 for space, one in kept.items() if not space.endswith("ffn"))
    for space, one in kept.items():
        index = stored.get(f"model.layers.{space}_index")
        whole = space.endswith("ffn") or len(one) == 48
        assert (index is None) == whole
        assert index is None or (index.dtype == torch.int32 and index.tolist() == one.tolist())
    config, tensors = canonical(name)
    masked = loaded(config, zeroed(config, tensors, kept))
    have = result.load()
    assert error(logits(have, HELD_OUT), logits(masked, HELD_OUT)) <= EXACT
    assert error(logits(masked, HELD_OUT), logits(loaded(config, tensors), HELD_OUT)) > 1e-2, "nothing was masked"
    assert error(stepwise(have, HELD_OUT, (7, 1, 16)), logits(have, HELD_OUT)) <= EXACT
    again = have.generate(HELD_OUT[:1, :5], max_new_tokens=4, do_sample=False, use_cache=True)
    assert (
        again.tolist() == have.generate(HELD_OUT[:1, :5], max_new_tokens=4, do_sample=False, use_cache=False).tolist()
    )


@pytest.mark.parametrize("name", [*SOME, "phi3-window"])
def test_masks_in_place_are_zeros_in_the_weights(name: str) -> None:
    config, tensors = canonical(name)
    tensors = doubled(tensors)
    generator = torch.Generator().manual_seed(4)
    spaces = masks.spaces_of(config)
    bits = (torch.rand(sum(space.size for space in spaces), generator=generator) < 0.6).double()
    model = loaded(config, tensors)
    want = logits(model, HELD_OUT)
    now: dict[str, Tensor] = {}
    masks.wear(model, now)
    now.update(masks.worn(spaces, torch.ones_like(bits)))
    assert torch.equal(logits(model, HELD_OUT), want)
    now.update(masks.worn(spaces, bits))
    kept = {space: one.nonzero()[:, 0] for space, one in now.items()}
    assert error(logits(model, HELD_OUT), logits(loaded(config, zeroed(config, tensors, kept)), HELD_OUT)) <= 1e-12
    now.update(masks.worn(spaces, bits / 2, twice=True))
    squares = {one.name: set(now[one.name].unique().tolist()) for one in spaces}
    assert all(values == ({0.0, 0.25} if one.endswith("ffn") else {0.0, 0.5}) for one, values in squares.items())


@pytest.mark.parametrize("name", ["llama", "opt-tied", "gpt_neox"])
def test_keep_1_leaves_every_byte(name: str, tmp_path: Path) -> None:
    result = cut(folder(name), tmp_path / "out", keep=1.0)
    assert result.stock
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder(name) / "model.safetensors").read_bytes()


def test_sixteen_bits_keep_their_indices(tmp_path: Path) -> None:
    """An index above 256 has no place in a bfloat16."""
    config = decoder(hidden_size=600, num_attention_heads=4, head_dim=8, num_hidden_layers=1, embedding_size=600)
    tensors = random_tensors(config, dtype=torch.bfloat16)
    source = own_folder(tmp_path / "wide", config, tensors, "bfloat16")
    result = cut(source, tmp_path / "out", {"steps": 1}, data=CALIBRATION % 61, keep=0.5)
    stored = weights(tmp_path / "out")
    found = {name: one for name, one in stored.items() if name.endswith("_index")}
    assert found
    assert all(one.dtype == torch.int32 and one.unique().numel() == one.numel() for one in found.values())
    loaded_ = result.load().state_dict()
    assert all(torch.equal(loaded_[name], one) for name, one in found.items())
    assert stored["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    index = found["model.layers.0.attn_write_index"].long()
    want = tensors["model.layers.0.self_attn.o_proj.weight"][index]
    assert torch.equal(stored["model.layers.0.self_attn.o_proj.weight"], want)


def test_the_file_that_ships_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of the folder's own file, as `trust_remote_code` takes it, and ours; two loads agree bit for bit."""
    result = cut(folder("llama"), tmp_path / "out")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    far = get_class_from_dynamic_module("modeling_microtome.MicrotomeForCausalLM", str(tmp_path / "out"))
    assert far.__module__.startswith("transformers_modules")
    want = logits(result.load(), HELD_OUT)
    assert torch.equal(logits(far.from_pretrained(tmp_path / "out").eval(), HELD_OUT), want)
    assert torch.equal(logits(result.load(), HELD_OUT), want)


# --- gradients ------------------------------------------------------------------------------------------------------


def bent(m: Tensor, cubic: float) -> Tensor:
    """A loss of five bits, quadratic in each of them, and cubic in one."""
    return (
        (m * torch.tensor([0.7, -1.1, 0.4, 2.0, -0.3])).sum() ** 2
        + 0.8 * m[0] * m[1] * m[2]
        - 1.3 * (m[3] - 0.4) ** 2 * m[4] ** 2
        + cubic * m[1] ** 3
    )


def enumerated(logit: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The expected gradient of the estimator over all draws, and the gradient of the expected loss."""
    chance = logit.detach().sigmoid()
    mean = torch.zeros_like(logit)
    exact = logit.clone().requires_grad_()
    total = torch.zeros((), dtype=logit.dtype)
    for bits in itertools.product([0.0, 1.0], repeat=len(logit)):
        m = torch.tensor(bits, dtype=logit.dtype)
        weight = torch.where(m > 0, chance, 1 - chance).prod()
        own = logit.clone().requires_grad_()
        drawn = masks.reinmax(own, 1.0 - m)  # 0 lies below every chance, 1 below none
        assert torch.equal(drawn.detach(), m)
        mean += weight * torch.autograd.grad(loss(drawn), own)[0]
        total = total + torch.where(m > 0, exact.sigmoid(), 1 - exact.sigmoid()).prod() * loss(m)
    return mean, torch.autograd.grad(total, exact)[0]


def test_reinmax_against_enumeration() -> None:
    """Right where the loss is quadratic in every bit; a cubic bit moves it, by what the trapezoid is off."""
    logit = torch.tensor([0.3, -1.2, 2.5, -0.1, 1.0], dtype=torch.float64)
    mean, exact = enumerated(logit, lambda m: bent(m, 0.0))
    assert error(mean, exact) <= 1e-12
    mean, exact = enumerated(logit, lambda m: bent(m, 2.0))
    p = logit[1].sigmoid()
    off = mean - exact
    assert off[1].item() == pytest.approx(
        (p * (1 - p) * (2.0 * 3 / 2 - 2.0)).item()
    )  # (f'(0) + f'(1)) / 2 - (f(1) - f(0))
    assert off[[0, 2, 3, 4]].abs().max() <= 1e-12


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_the_release_s_draw_keeps_by_its_own_chance(logit: float) -> None:
    """One Gumbel is no logistic: P(keep) = 1 - exp(-exp(o)); the grid of uniforms is the whole distribution."""
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    soft = masks.softly(torch.full_like(uniform, logit), uniform)
    assert (soft > 0.5).double().mean().item() == pytest.approx(1 - math.exp(-math.exp(logit)), abs=2e-4)
    middle = -math.log(math.log(2.0))  # the median of a Gumbel
    have = masks.softly(torch.tensor([logit]), torch.tensor([0.5])).item()
    assert have == pytest.approx(1 / (1 + math.exp(-(logit + middle) / 0.4)), rel=1e-5)


def test_the_release_s_two_draws() -> None:
    logit = torch.linspace(-3, 3, 400).requires_grad_()
    soft, hard = masks.drawn(logit, "gumbel", torch.Generator().manual_seed(0))
    assert 0 < soft.detach().min() < soft.detach().max() <= 1
    assert set(hard.detach().unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(soft.detach().round(), hard.detach()), "the size sees another draw"
    assert torch.autograd.grad(hard.sum(), logit)[0].min() >= 0
    same, both = masks.drawn(logit, "reinmax", torch.Generator().manual_seed(0))
    assert same is both


# --- the budget -----------------------------------------------------------------------------------------------------


@each_model
def test_the_size_is_counted(name: str) -> None:
    """Against the shapes of the config that has just these widths."""
    config = canonical(name)[0]
    spaces = masks.spaces_of(config)
    assert [space.kind for space in spaces[:5]] == list(masks.ORDER)
    size, generator = Size.of(config, spaces), torch.Generator().manual_seed(1)
    for _ in range(3):
        wide = [int(torch.randint(1, space.size, (), generator=generator)) for space in spaces]
        narrow = inner.narrowed_config(config, dict(zip((space.name for space in spaces), wide, strict=True)))
        assert size(torch.tensor(wide, dtype=torch.float64)).item() == layout.count_blocks(narrow)


def test_pressure_is_none_at_the_budget() -> None:
    config = canonical("opt-tied")[0]
    size, spaces = Size.of(config, masks.spaces_of(config)), masks.spaces_of(config)
    counts = torch.tensor([space.size / 2 for space in spaces], dtype=torch.float64, requires_grad=True)
    wanted = size(counts.detach()).item()
    for factor in (0.5, 2.0):
        pressed = (size(counts) / (factor * wanted)).log().abs()
        assert pressed.item() == pytest.approx(math.log(2))
        (slope,) = torch.autograd.grad(pressed, counts)
        assert (slope > 0).all() if factor < 1 else (slope < 0).all()
    assert (size(counts) / wanted).log().abs().item() == 0.0


@pytest.mark.parametrize("keep", [0.9, 0.53])
def test_the_budget_is_met_to_a_coordinate(keep: float, tmp_path: Path) -> None:
    result = cut(folder("opt-tied"), tmp_path / "out", keep=keep)
    stored = sum(one.numel() for name, one in weights(tmp_path / "out").items() if name.startswith("model.layers"))
    assert stored == result.after.decoder
    assert abs(stored - keep * result.before.decoder) <= 4 * 48 + 4  # a coordinate that queries, keys and values read


def test_widths_can_be_given(tmp_path: Path) -> None:
    """A table decides the widths; which coordinates stay is learned for its size."""
    result = cut(folder("llama"), tmp_path / "out", allocate={"attn_read": 24, "mlp_write": 0.5, "1.ffn": 40})
    wide = {name: size for name, size in result.plan.widths.items() if name in {"0.attn_read", "1.mlp_write", "1.ffn"}}
    assert wide == {"0.attn_read": 24, "1.mlp_write": 24, "1.ffn": 40}
    even = cut(folder("llama"), tmp_path / "even", allocate="uniform", keep=0.6, multiple_of=8)
    assert {size % 8 for size in even.plan.widths.values()} == {0}
    assert even.plan.widths["0.attn_read"] == even.plan.widths["1.mlp_write"]


# --- coordinates that nobody needs ----------------------------------------------------------------------------------


def spoken_by(model: Any, rows: int = 16, length: int = 20) -> Tensor:
    """A text that the model writes itself, so that what masks take away costs it."""
    generator = torch.Generator().manual_seed(5)
    out = torch.randint(3, 97, (rows, 1), generator=generator)
    for _ in range(length - 1):
        out = torch.cat([out, torch.multinomial(logits(model, out)[:, -1].softmax(-1), 1, generator=generator)], 1)
    return out


def test_what_is_not_used_goes_first(tmp_path: Path) -> None:
    """Three in ten of everything are zero; by chance three in ten of what is cut would be among them."""
    config, tensors = canonical("llama")
    generator = torch.Generator().manual_seed(6)
    kept = {
        space.name: torch.randperm(space.size, generator=generator)[: round(0.7 * space.size)].sort().values
        for space in masks.spaces_of(config)
    }
    planted = {one: tensor.contiguous() for one, tensor in zeroed(config, tensors, kept).items()}
    planted[layout.HEAD] = 4.0 * planted[layout.HEAD]  # what it writes is sure of every word
    source = own_folder(tmp_path / "planted", config, planted)
    own = layout.count_blocks(inner.narrowed_config(config, {one: len(index) for one, index in kept.items()}))
    options = {"steps": 60, "rate": 0.1, "network": "direct", "batch": 4}
    words = spoken_by(loaded(config, planted))
    cut(source, tmp_path / "out", options, keep=own / layout.count_blocks(config), data=words)
    stored = weights(tmp_path / "out")
    for kind in layout.SUBSETS.values():
        gone: set[tuple[int, int]] = set()
        dead: set[tuple[int, int]] = set()
        for block in range(config.num_hidden_layers):
            index = stored[f"{prefix(block)}{kind}_index"].tolist()
            gone |= {(block, one) for one in range(48) if one not in index}
            dead |= {(block, one) for one in range(48) if one not in kept[f"{block}.{kind}"].tolist()}
        assert len(gone) >= 20, kind
        assert len(gone & dead) >= 0.85 * len(gone), kind


def own_folder(place: Path, config: MicrotomeConfig, tensors: Mapping[str, Tensor], dtype: str = "float32") -> Path:
    """A checkpoint of our own."""
    place.mkdir()
    save_file(dict(tensors), place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(own_config(config, dtype)))
    return place


@pytest.mark.parametrize(("network", "estimator", "rate"), [("direct", "reinmax", 0.1), ("hyper", "gumbel", 0.005)])
def test_masks_learn(network: Any, estimator: Any, rate: float) -> None:
    """A text that the model wrote is told better by learned masks than by those of a first step."""
    config, tensors = canonical("llama")
    words = spoken_by(loaded(config, tensors))
    wanted = 0.7 * layout.count_blocks(config)
    spaces = masks.spaces_of(config)
    lost: list[float] = []
    for steps in (1, 40):
        how = Learning(steps, rate, 6.0, 4, 0, network, estimator)
        with open_source(folder("llama")) as source:
            found = masks.learned(planner.opened(source), words, how, wanted, device=torch.device("cpu"), dtype=torch.float32)  # fmt: skip
        logit = torch.cat([found[space.block or 0, Stat.MASKS].logits[space.name] for space in spaces])
        bits = (logit >= logit.sort(descending=True).values[round(0.8 * len(logit))]).float()
        model, now = loaded(config, tensors), masks.worn(spaces, bits)
        masks.wear(model, now)
        with torch.no_grad():
            lost.append(masks.next_token_loss(model, words).item())
    assert lost[1] < lost[0] - 0.1


# --- the same again -------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes_and_a_plan_replays(tmp_path: Path) -> None:
    one, two = (cut(folder("gpt_neox"), tmp_path / out, {"steps": 2}) for out in ("one", "two"))
    assert one.plan.widths == two.plan.widths
    assert tree(tmp_path / "one")["model.safetensors"] == tree(tmp_path / "two")["model.safetensors"]
    compress(folder("gpt_neox"), tmp_path / "again", plan=Plan.read(tmp_path / "one"))
    assert tree(tmp_path / "one")["model.safetensors"] == tree(tmp_path / "again")["model.safetensors"]
    other = cut(folder("gpt_neox"), tmp_path / "other", {"steps": 2, "seed": 1})
    assert other.plan.widths != one.plan.widths


def test_blocks_that_run_twice_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations do not fit, only the stream in front of every block is held."""
    found: list[Tensor] = []
    calls: list[int] = []
    for held in (1 << 40, 0):
        monkeypatch.setattr(masks, "HELD", held)
        with open_source(folder("phi")) as source:
            opened = planner.opened(source)
            model = masks.frozen(opened, torch.device("cpu"), torch.float32, tokens=10)
            calls.append(0)
            model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
            mask = torch.full((48,), 0.9, requires_grad=True)
            masks.wear(model, {"0.attn_read": mask, "1.mlp_write": mask})
            found.append(torch.autograd.grad(masks.next_token_loss(model, CALIBRATION[:2]), mask)[0])
    assert calls == [1, 2]
    assert error(found[1], found[0]) <= 1e-6


def test_every_window_is_seen_before_one_comes_again() -> None:
    how = Learning(7, 1.0, 1.0, 3, 0, "direct", "reinmax")
    drawn = torch.cat(list(masks.batches(7, how, torch.Generator().manual_seed(0)))).tolist()
    assert len(drawn) == 21
    assert [sorted(drawn[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert drawn[:7] != drawn[7:14]


# --- dry runs, recipes, what comes behind ---------------------------------------------------------------------------


def test_a_dry_run_tells_what_it_can(tmp_path: Path) -> None:
    """With a text it learns, as the run does; without, an even cut stands in, and it says so."""
    (tmp_path / "text.txt").write_text(text())
    asked: dict[str, Any] = {"method": "disp", "keep": 0.6, "options": QUICK, "samples": 8, "length": 24}
    dry = microtome.preview(spoken(), data=str(tmp_path / "text.txt"), **asked)
    wet = microtome.compress(spoken(), data=str(tmp_path / "text.txt"), out=tmp_path / "out", measure=False, **asked)
    assert dry.widths == wet.plan.widths
    assert dry.after.stored == wet.after.stored
    assert "the whole model" in dry.memory
    blind = microtome.preview(spoken(), **asked)
    assert any("disp learns its widths: these are those of an even cut" in note for note in blind.notes)
    assert blind.after.decoder == pytest.approx(0.6 * blind.before.decoder, rel=0.03)
    assert len(set(blind.widths.values())) == 2
    recipe = {"steps": [{"fasp": {"keep": 0.9}}, {"disp": {"keep": 0.7, "options": QUICK}}, "restore"]}
    assert any("disp learns" in note for note in microtome.preview(spoken(), recipe=recipe).notes)


RECIPES: dict[str, list[Any]] = {
    "behind neurons, and restored": [{"fasp": {"keep": 0.9, "options": {"spaces": "ffn"}}}, {"disp": {"options": QUICK}}, "restore"],
    "in the principal basis": [{"slicegpt": {"slice": 0.0}}, {"disp": {"options": QUICK}}],
    "behind a slice with shortcuts": [{"slicegpt": {"keep": 0.9, "options": {"basis": "junction"}}}, {"disp": {"options": QUICK}}],
    "behind halves": [{"depth": {"keep": 0.8, "options": {"unit": "half"}}}, {"disp": {"options": QUICK}}],
    "before blocks": [{"disp": {"keep": 0.8, "options": QUICK}}, {"depth": {"keep": 0.4}}, "restore"],
    "twice": [{"disp": {"keep": 0.8, "options": QUICK}}, {"disp": {"options": QUICK}}],
}  # fmt: skip


@pytest.mark.parametrize("steps", RECIPES.values(), ids=RECIPES)
def test_recipes(steps: list[Any], tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", recipe={"keep": 0.6, "steps": steps})
    assert 0.2 < result.after.decoder / result.before.decoder < 0.61
    assert logits(result.load(), HELD_OUT).isfinite().all()
    with open_source(tmp_path / "out") as source:
        config = planner.opened(source).config
    for name, index in weights(tmp_path / "out").items():
        if name.endswith("_index"):
            assert index.tolist() == sorted(set(index.tolist()))
            assert 0 <= int(index.min()) <= int(index.max()) < config.hidden_size


def test_a_second_cut_names_coordinates_of_the_first(tmp_path: Path) -> None:
    first = cut(folder("llama"), tmp_path / "first", keep=0.8)
    cut(tmp_path / "first", tmp_path / "second", keep=0.6)
    one, two = (weights(tmp_path / name) for name in ("first", "second"))
    both = [name for name in one if name.endswith("_index")]
    assert first.plan.widths
    assert both
    assert all(set(two[name].tolist()) <= set(one[name].tolist()) for name in both)
    assert any(len(two[name]) < len(one[name]) for name in both)
    name = next(name for name in both if name.endswith("0.attn_write_index"))
    whole = canonical("llama")[1]["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(two["model.layers.0.self_attn.o_proj.weight"], whole[two[name].long()])


OTHERS: dict[str, dict[str, Any]] = {
    "modegpt": {"keep": 0.7},
    "flap": {"keep": 0.7},
    "llmpruner": {"keep": 0.7},
    "prunenet": {"keep": 0.7, "options": {"scorer": "row_norm"}},
    "wanda": {"options": {"density": 0.5}},
}


@pytest.fixture(scope="module", params=["llama", "phi"])
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result to be cut again."""
    place = tmp_path_factory.mktemp("disp") / "first"
    cut(folder(request.param), place, {"steps": 1}, keep=0.8)
    return place


@pytest.mark.parametrize("other", OTHERS)
def test_other_cuts_behind_it(first: Path, other: str, tmp_path: Path) -> None:
    """What lies inside the blocks is cut as ever: the indices stay what they are."""
    result = compress(first, tmp_path / "out", method=other, **OTHERS[other])
    assert logits(result.load(), HELD_OUT).isfinite().all()
    before, after = weights(first), weights(tmp_path / "out")
    assert all(torch.equal(after[name], one) for name, one in before.items() if name.endswith("_index"))
    assert any(after[name].shape != one.shape or not torch.equal(after[name], one) for name, one in before.items())


def test_what_reads_all_blocks_alike_is_refused_behind_it(first: Path, tmp_path: Path) -> None:
    for chosen in ({"method": "slicegpt", "keep": 0.7}, {"method": "dotresize", "keep": 0.7}, {"slice": 0.25}):
        with raises(BadPlan, "which a new basis would mix: slice the stream first"):
            compress(first, tmp_path / "out", **chosen)
    with raises(UnsupportedModel, "one policy of prunenet reads all blocks, and those of this model differ in width"):
        compress(first, tmp_path / "out", method="prunenet", keep=0.7)
    assert not (tmp_path / "out").exists()


def test_restoration_behind_it_helps(tmp_path: Path) -> None:
    """What is left is refitted to what the uncut decoder computes, in the coordinates that each half sees."""
    want = logits(loaded(*canonical("opt-tied")), CALIBRATION)
    apart = [
        (logits(cut(folder("opt-tied"), tmp_path / str(on), keep=0.85, restore=on).load(), CALIBRATION) - want)
        .pow(2)
        .mean()
        for on in (False, True)
    ]
    assert apart[1] < 0.8 * apart[0]


# --- spaces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index subsets", "index subsets of ragged widths"])
def test_the_order_of_a_subset_is_free(name: str) -> None:
    """Names of coordinates and the columns or rows that belong to them can be shuffled together, and not apart."""
    config = RAGGED[name]
    tensors = random_tensors(config)
    want = logits(loaded(config, tensors), HELD_OUT % 61)
    seen = 0
    for block in range(config.num_hidden_layers):
        for space in layout.subset_spaces(config, block):
            assert space.size == inner.subset_width(
                config, config.per_layer_config[block], space.name.partition(".")[2]
            )
            order, moved, fewer = torch.arange(space.size).roll(1), dict(tensors), dict(tensors)
            for axis in space.axes:
                moved[axis.tensor] = tensors[axis.tensor].index_select(axis.dim, order)
                if not axis.tensor.endswith("_index"):
                    fewer[axis.tensor] = moved[axis.tensor]
            if f"{prefix(block)}{space.name.partition('.')[2]}_index" in tensors and space.size > 1:
                seen += 1
                assert error(logits(loaded(config, moved), HELD_OUT % 61), want) <= 1e-12
                assert error(logits(loaded(config, fewer), HELD_OUT % 61), want) > 1e-3
    assert seen >= 6


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("batch", 0), ("rate", -1.0), ("rate", math.inf), ("penalty", math.nan)]
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with raises(BadInput, f"{option}=.* of disp is no number from [01] on"):
        DISP(**{option: value}).check(canonical("llama")[0])


def test_too_little_text_or_budget_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "train", lambda *_: pytest.fail("nothing is learned before this is known"))
    with raises(BadInput, "a batch of 9 windows cannot be drawn from 8: give more text, or less batch"):
        cut(folder("llama"), tmp_path / "out", {"batch": 9})
    with raises(BadPlan, "the budget of .* parameters cannot be reached: with every width at its narrowest"):
        cut(folder("llama"), tmp_path / "out", keep=0.001)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_is_told(tmp_path: Path) -> None:
    config, tensors = canonical("llama")
    hot = {name: tensor.contiguous() * (1e38 if "lm_head" in name else 1.0) for name, tensor in tensors.items()}
    source = own_folder(tmp_path / "hot", config, hot)
    with raises(NumericalFailure, "the loss is .* in step 1 of learning masks: the model overflows on this text"):
        cut(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wide_enough_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that the model meets as it is teaches nothing."""
    monkeypatch.setattr(masks, "train", lambda *_: pytest.fail("there is nothing to learn"))
    how = DISP().learning
    with open_source(folder("llama")) as source:
        opened = planner.opened(source)
        found = masks.learned(opened, CALIBRATION, how, 1e9, device=torch.device("cpu"), dtype=torch.float32)
    assert all(isinstance(one, Masks) and one.wanted == 1e9 for one in found.values())
    assert len(found) == opened.config.num_hidden_layers


def test_defaults() -> None:
    assert DISP().learning == Learning(1000, 1e-3, 6.0, 1, 0, "hyper", "reinmax")
    assert DISP(estimator="gumbel", network="direct").learning == Learning(1000, 0.05, 16.0, 1, 0, "direct", "gumbel")
    assert arch.OWN == "microtome"
