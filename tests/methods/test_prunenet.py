"""PruneNet: spectra and orders against brute force, planted rows that a policy must find, and what is cut with it."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import raises, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RAGGED, TINY, built, canonical, error, loaded, logits, random_tensors
from safetensors.torch import load_file, save_file
from tinies import HELD_OUT, compress, folder
from torch import Tensor

import microtome
from microtome import arch, methods, policy
from microtome.errors import BadInput, UnknownName, UnsupportedModel
from microtome.methods.prunenet import PruneNet, best_of, leverage
from microtome.policy import Policy, Rewards, Training, best_first, kolmogorov_smirnov, log_likelihood

SHARED = Path(__file__).parents[2].parent / "shared"
SOME = ("llama", "gemma-bias", "gemma2", "gpt2-untied", "gpt_neox", "olmo2", "opt-tied", "phi", "phi3-window")
QUICK = {"hidden": 16, "episodes": 2}
HALF = {"ffn": 40 / 80}

each_model = pytest.mark.parametrize("name", SOME)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut(model: Any, out: Path, options: dict[str, Any] | None = None, **chosen: Any) -> microtome.Result:
    if "allocate" not in chosen:
        chosen = {"keep": 0.8} | chosen
    return compress(model, out, method="prunenet", options=QUICK | (options or {}), **chosen)


def first_matrices(name: str) -> list[Tensor]:
    config, tensors = canonical(name)
    part = "gate_proj" if config.mlp_gated else "up_proj"
    return [tensors[f"model.layers.{block}.mlp.{part}.weight"] for block in range(config.num_hidden_layers)]


# --- spectra --------------------------------------------------------------------------------------------------------


def slowly(first: np.ndarray, second: np.ndarray) -> float:
    """Kolmogorov-Smirnov at every point where a distribution steps."""
    return max(abs((first <= point).mean() - (second <= point).mean()) for point in [*first, *second])


@given(sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), values=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_kolmogorov_smirnov_by_its_definition(sizes: tuple[int, int], values: int, seed: int) -> None:
    """With ties, of which few values have many."""
    noise = np.random.default_rng(seed)
    first = np.sort(noise.integers(0, values, sizes[0])).astype(float)
    second = np.sort(noise.integers(0, values, (3, sizes[1]))).astype(float)
    have = kolmogorov_smirnov(torch.from_numpy(first), torch.from_numpy(second))
    assert have.tolist() == pytest.approx([slowly(first, row) for row in second], abs=1e-15)


@pytest.mark.parametrize(("rows", "columns", "kept"), [(20, 6, 15), (20, 6, 4), (5, 8, 3)])
def test_spectra_by_grams_are_those_of_the_rows_that_stay(rows: int, columns: int, kept: int) -> None:
    matrix = torch.randn(rows, columns, generator=seeded(), dtype=torch.float64)
    gram = matrix.T @ matrix
    orders = torch.stack([torch.randperm(rows, generator=seeded(seed)) for seed in range(4)])
    whole = policy.spectrum(gram, rows)
    assert np.allclose(whole.flip(0), np.linalg.svd(matrix, compute_uv=False), atol=1e-7)
    have = policy.distances(matrix, gram, whole, orders[:, kept:])
    spectra = [np.linalg.svd(matrix[order[:kept]], compute_uv=False) for order in orders]
    assert have.tolist() == pytest.approx([slowly(whole.numpy(), one) for one in spectra], abs=1e-12)
    for one in spectra:  # deleting rows only shrinks singular values
        assert (one <= whole.flip(0).numpy()[: len(one)] + 1e-12).all()
    shuffled = orders.clone()
    shuffled[:, kept:] = orders[:, kept:].flip(1)
    assert torch.allclose(policy.distances(matrix, gram, whole, shuffled[:, kept:]), have), "sets, not orders, count"


def test_rows_of_zeros_leave_the_spectrum() -> None:
    matrix = torch.randn(12, 5, generator=seeded(), dtype=torch.float64)
    matrix[[2, 7, 8]] = 0.0
    gram = matrix.T @ matrix
    gone = torch.tensor([[2, 7, 8], [0, 1, 3]])
    none, some = policy.distances(matrix, gram, policy.spectrum(gram, 12), gone).tolist()
    assert none == 0.0 < some


# --- orders ---------------------------------------------------------------------------------------------------------


def chance(score: list[float], order: tuple[int, ...]) -> float:
    """Plackett-Luce, one draw after the other."""
    left, found = set(range(len(score))), 1.0
    for one in order:
        found *= math.exp(score[one]) / sum(math.exp(score[other]) for other in left)
        left.remove(one)
    return found


def test_probabilities_of_orders_by_enumeration() -> None:
    score = [0.3, -1.0, 1.2, 0.1]
    orders = list(itertools.permutations(range(4)))
    have = log_likelihood(torch.tensor(score, dtype=torch.float64), torch.tensor(orders), 2).exp().tolist()
    assert have == pytest.approx([chance(score, order[:2]) for order in orders])
    assert sum(have) / 2 == pytest.approx(1.0), "each first pair comes with two orders of the rest"


def test_draws_have_these_probabilities() -> None:
    score = torch.tensor([0.5, -0.5, 1.0])
    orders = best_first(score + policy.gumbel((20000, 3), seeded()))
    for pair in itertools.permutations(range(3), 2):
        have = (orders[:, :2] == torch.tensor(pair)).all(1).double().mean().item()
        assert have == pytest.approx(chance(score.tolist(), pair), abs=0.015)


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """F = 4, n = 2: samples with the others' mean as baseline against the exact gradient over all orders."""
    rows = torch.randn(4, 3, generator=seeded(3), dtype=torch.float64) * torch.tensor([[3.0], [1.0], [0.5], [2.0]])
    reward = {
        pair: -slowly(np.linalg.svd(rows, compute_uv=False), np.linalg.svd(rows[list(pair)], compute_uv=False))
        for pair in itertools.combinations(range(4), 2)
    }
    assert len(set(reward.values())) > 1

    def expected(score: list[float]) -> float:
        return sum(chance(score, o) * reward[tuple(sorted(o))] for o in itertools.permutations(range(4), 2))

    score, step = [0.2, -0.3, 0.4, 0.0], 1e-5
    want = [
        (expected([s + step * (i == j) for j, s in enumerate(score)]) - expected(
            [s - step * (i == j) for j, s in enumerate(score)])) / (2 * step)
        for i in range(4)
    ]  # fmt: skip
    leaf = torch.tensor(score, dtype=torch.float64, requires_grad=True)
    order = best_first(leaf.detach() + policy.gumbel((40000, 4), seeded(5)))
    earned = -Rewards({0: 2}).distances(0, rows, order)
    assert earned[:9].tolist() == pytest.approx([reward[tuple(sorted(o[:2].tolist()))] for o in order[:9]])
    groups = earned.reshape(-1, 4)
    policy.surrogate(groups, log_likelihood(leaf, order, 2).reshape(-1, 4)).backward()
    assert leaf.grad is not None
    assert (-leaf.grad).tolist() == pytest.approx(want, abs=0.02 * max(map(abs, want)) + 2e-3)


# --- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", policy.KINDS)
def test_scores_follow_the_rows(kind: str) -> None:
    rows = torch.randn(10, 6, generator=seeded(), dtype=torch.float64)
    one, shuffle = Policy.drawn(kind, 6, 10, seeded(1)), torch.randperm(10, generator=seeded(2))
    assert torch.allclose(one.scores(rows[shuffle]), one.scores(rows)[shuffle], atol=1e-5)
    assert (one.kind, one.width) == (kind, 6)
    if kind != "release":
        assert torch.allclose(one.scores(7 * rows), one.scores(rows), atol=1e-5), "a matrix's scale says nothing"


def test_the_release_s_two_maps_are_one_linear_score() -> None:
    rows = torch.randn(10, 6, generator=seeded(), dtype=torch.float64)
    one = Policy.drawn("release", 6, 10, seeded(1))
    inner, bias, outer = (one.parameters[name].double() for name in ("inner", "bias", "outer"))
    alpha = torch.sigmoid((rows @ inner.T + bias) @ outer)
    assert torch.allclose(torch.sigmoid(one.scores(rows)).double(), alpha, atol=1e-6)
    assert torch.allclose(torch.sigmoid(rows @ (inner.T @ outer) + bias @ outer), alpha, atol=1e-12)


def plant(*, both_signs: bool) -> Tensor:
    """Rows [64, 24] about one direction m: 32 of four times the length of the others.

    The long ones point along m and the short ones against it; or both kinds point both ways.
    """
    generator = seeded(8)
    along = torch.randn(24, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(64, 24, generator=generator, dtype=torch.float64)
    long = torch.arange(64)[:, None] < 32
    signs = torch.where(torch.arange(64)[:, None] % 2 == 0 if both_signs else long, 1.0, -1.0)
    return torch.where(long, 4.0, 1.0) * (signs * along + noise)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "both", "finds"), [
    ("mlp", False, True), ("linear", False, True), ("mlp", True, True), ("linear", True, False),
])  # fmt: skip
def test_a_policy_finds_long_rows(kind: str, both: bool, finds: bool, seed: int) -> None:
    """A linear score knows the sign of a row, and so cannot know its length."""
    rows = plant(both_signs=both)
    start = Policy.drawn(kind, 24, 64, seeded(seed))
    found = policy.learned(start, lambda _block: rows, {0: 32}, Training(60, 0.003, 4, 0.0), seeded(seed + 10))
    share = (best_first(found.scores(rows))[:32] < 32).double().mean().item()
    assert share >= 0.95 if finds else share < 0.75


def test_learning_never_ends_worse_than_it_began() -> None:
    rows = {block: torch.randn(30, 8, generator=seeded(block), dtype=torch.float64) for block in range(2)}
    start, kept = Policy.drawn("mlp", 8, 16, seeded()), {0: 20, 1: 15}

    def lost(one: Policy) -> float:
        return sum(float(Rewards(kept).distances(b, rows[b], best_first(one.scores(rows[b]))[None])) for b in rows)

    for gamma in (0.0, 0.99):
        found = policy.learned(start, rows.__getitem__, kept, Training(8, 0.01, 3, gamma), seeded(1))
        assert lost(found) <= lost(start)
        assert not any(torch.equal(found.parameters[n], start.parameters[n]) for n in ("inner", "outer"))


def test_learning_works_where_gradients_are_off() -> None:
    with torch.inference_mode():
        rows = plant(both_signs=False)
        found = PruneNet(hidden=8, episodes=2).learned_from(lambda _block: View(rows), [0], {"0.ffn": 32})
    assert found.known[0].shape == (64,)
    assert not found.known[0].requires_grad


class View:
    """As much of a view as the method looks at."""

    block = 0

    def __init__(self, rows: Tensor) -> None:
        self.weights = {"mlp.up_proj.weight": rows}


# --- other scorers --------------------------------------------------------------------------------------------------


def test_leverage_is_the_diagonal_of_the_projector() -> None:
    rows = torch.randn(12, 5, generator=seeded(), dtype=torch.float64)
    assert torch.allclose(leverage(rows), (rows @ torch.linalg.pinv(rows)).diagonal())
    flat = rows @ torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert leverage(flat).sum().item() == pytest.approx(3.0)


def test_the_best_of_several_sets_is_the_best() -> None:
    rows = plant(both_signs=True)
    score = torch.rand(20, 64, generator=seeded(4))
    whole = np.linalg.svd(rows, compute_uv=False)
    kept = [rows[best_first(one)[:40].sort().values] for one in score]
    lost = [slowly(whole, np.linalg.svd(one, compute_uv=False)) for one in kept]
    have = best_of(rows, 40, 20, seeded(4))
    assert torch.equal(have, score[int(np.argmin(lost))])


@each_model
def test_the_longest_rows_stay(name: str, tmp_path: Path) -> None:
    cut(folder(name), tmp_path / "out", {"scorer": "row_norm"}, allocate=HALF)
    before, after = first_matrices(name), canonical_of(tmp_path / "out")
    for block, matrix in enumerate(before):
        wide = len(after[block])
        assert wide == len(matrix) // 2
        longest = matrix.norm(dim=1).topk(wide).indices.sort().values
        assert torch.equal(after[block], matrix[longest])


def canonical_of(place: Path) -> list[Tensor]:
    """First matrices of a written folder."""
    from microtome import planner
    from microtome.source import open_source

    with open_source(place) as source:
        found = planner.opened(source)
        part = "gate_proj" if found.config.mlp_gated else "up_proj"
        return [found.read(b)[f"model.layers.{b}.mlp.{part}.weight"] for b in range(found.config.num_hidden_layers)]


# --- cutting --------------------------------------------------------------------------------------------------------


def dead_neurons(name: str, dead: Tensor) -> Any:
    """A tiny model in which the gate (or the only first matrix) of some neurons is zero: they say nothing."""
    model = built(TINY[name])
    stored, config = model.state_dict(), canonical(name)[0]
    part = "mlp.gate_proj." if config.mlp_gated else "mlp.up_proj."
    for key, place in arch.find(TINY[name]["model_type"]).names(config).items():
        if part in key and place.name in stored:
            value = stored[place.name].T if place.transposed else stored[place.name]
            rows = torch.arange(len(value)) if place.rows is None else torch.as_tensor(list(place.rows))
            value[rows[dead]] = 0.0
    return model


@each_model
@pytest.mark.parametrize("scorer", ["row_norm", "leverage"])
def test_dead_neurons_go_without_loss(name: str, scorer: str, tmp_path: Path) -> None:
    size = len(first_matrices(name)[0])
    model = dead_neurons(name, torch.randperm(size, generator=seeded())[: size // 2])
    result = cut(model, tmp_path / "out", {"scorer": scorer}, allocate=HALF)
    assert set(result.plan.widths.values()) == {size // 2}
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= 1e-5
    alive = cut(folder(name), tmp_path / "alive", {"scorer": scorer}, allocate=HALF)
    assert error(logits(alive.load(), HELD_OUT), logits(model, HELD_OUT)) > 1e-2


def test_a_policy_learns_to_drop_dead_neurons(tmp_path: Path) -> None:
    model = dead_neurons("llama", torch.arange(0, 80, 4))
    result = cut(model, tmp_path / "out", {"hidden": 64, "episodes": 150}, allocate={"ffn": 60})
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_keep_1_leaves_every_byte(name: str, tmp_path: Path) -> None:
    result = cut(folder(name), tmp_path / "out", keep=1.0)
    assert result.plan.widths == {}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder(name) / "model.safetensors").read_bytes()


@each_model
def test_a_dry_run_is_what_comes_of_it(name: str, tmp_path: Path) -> None:
    dry = microtome.preview(folder(name), method="prunenet", keep=0.8, options=QUICK)
    wet = cut(folder(name), tmp_path / "out")
    assert (dry.widths, dry.after.stored) == (wet.plan.widths, wet.after.stored)
    assert wet.stock, "one ratio in all blocks is a stock checkpoint"
    model = wet.load()
    assert sum(one.numel() for one in model.parameters()) == wet.after.stored


SCORERS: list[dict[str, Any]] = [{}, {"policy": "linear"}, {"faithful": "true"}, {"scorer": "random"}, {"scorer": "best_of_n", "tries": 3}]  # fmt: skip


@pytest.mark.parametrize("options", SCORERS, ids=str)
def test_two_runs_give_the_same_bytes_and_seeds_others(options: dict[str, Any], tmp_path: Path) -> None:
    for out, seed in (("one", "5"), ("two", "5"), ("other", "6")):
        cut(folder("llama"), tmp_path / out, options | {"seed": seed})
    files = {out: tree(tmp_path / out)["model.safetensors"] for out in ("one", "two", "other")}
    assert files["one"] == files["two"] != files["other"]


def test_two_loads_agree_bit_for_bit(tmp_path: Path) -> None:
    result = cut(folder("opt-tied"), tmp_path / "out")
    assert torch.equal(logits(result.load(), HELD_OUT), logits(result.load(), HELD_OUT))


def test_a_budget_may_be_spent_over_all_blocks(tmp_path: Path) -> None:
    for scorer in ("policy", "row_norm"):
        result = cut(folder("llama"), tmp_path / scorer, {"scorer": scorer}, keep=0.8, allocate="global")
        assert set(result.plan.widths) == {"0.ffn", "1.ffn", "2.ffn"}
        assert result.after.stored < result.before.stored


def test_blocks_may_differ_in_neurons_and_lack_them(tmp_path: Path) -> None:
    cut(folder("llama"), tmp_path / "first", {"scorer": "row_norm"}, allocate={"0": 40, "1": 48})
    again = cut(tmp_path / "first", tmp_path / "second", keep=0.9)
    assert again.after.stored < again.before.stored
    config = RAGGED["skipped halves"]
    loaded(config, random_tensors(config, dtype=torch.float32)).save_pretrained(tmp_path / "skipped")
    result = cut(tmp_path / "skipped", tmp_path / "third")
    assert set(result.plan.widths) == {"0.ffn", "2.ffn"}


# --- policies in files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SCORERS[:3], ids=str)
def test_a_policy_serves_other_ratios_and_models(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "policy.safetensors"
    cut(folder("llama"), tmp_path / "one", options | {"save": str(file)})
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.name]
    before = file.read_bytes()
    kind = {"mlp": "mlp", "linear": "linear"}[options.get("policy", "mlp")] if "faithful" not in options else "release"
    assert policy.read(file, 48).kind == kind
    if "faithful" not in options:  # which draws anew
        cut(folder("llama"), tmp_path / "same", options | {"load": str(file)})
        assert tree(tmp_path / "same")["model.safetensors"] == tree(tmp_path / "one")["model.safetensors"]
    other = cut(folder("opt-tied"), tmp_path / "other", options | {"load": str(file)}, keep=0.9)
    assert other.after.stored < other.before.stored
    assert file.read_bytes() == before


def test_the_loaded_policy_decides(tmp_path: Path) -> None:
    """A policy along the longest row's direction keeps what that says."""
    outer = torch.randn(48, generator=seeded())
    save_file({"outer": outer}, tmp_path / "mine", metadata={"kind": "linear"})
    cut(folder("llama"), tmp_path / "out", {"load": str(tmp_path / "mine")}, allocate=HALF)
    for before, after in zip(first_matrices("llama"), canonical_of(tmp_path / "out"), strict=True):
        assert torch.equal(after, before[(before @ outer).topk(40).indices.sort().values])


def test_policies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file, out = tmp_path / "policy.safetensors", tmp_path / "out"
    policy.write(Policy.drawn("mlp", 12, 4, seeded()), file)
    with raises(BadInput, "scores rows of 12 numbers, and this model's have 48"):
        cut(folder("llama"), out, {"load": str(file)})
    policy.write(Policy.drawn("release", 48, 80, seeded()), file)
    with raises(BadInput, "holds a policy of faithful=true: give that too"):
        cut(folder("llama"), out, {"load": str(file)})
    with raises(BadInput, "no policy of faithful=true for 192 neurons"):
        cut(folder("gpt2-untied"), out, {"load": str(file), "faithful": "true"})
    with raises(BadInput, "cannot read the policy .*nowhere"):
        cut(folder("llama"), out, {"load": str(tmp_path / "nowhere")})
    file.write_bytes(b"no tensors")
    with raises(BadInput, "cannot read the policy"):
        cut(folder("llama"), out, {"load": str(file)})
    for kind, tensors in (("", {"outer": torch.ones(48)}), ("mlp", {"outer": torch.ones(48)}), ("linear", {"outer": torch.ones(2, 48)})):  # fmt: skip
        save_file(tensors, file, metadata={"kind": kind})
        with raises(BadInput, "holds no policy"):
            cut(folder("llama"), out, {"load": str(file)})
    with raises(BadInput, "there is no folder for save="):
        cut(folder("llama"), out, {"save": str(tmp_path / "no" / "policy")})
    with raises(BadInput, "cannot keep the policy in .* Give save another file"):
        cut(folder("llama"), out, {"save": str(tmp_path)})
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


@pytest.mark.parametrize(
    ("option", "value"),
    [("hidden", 0), ("episodes", -1), ("samples", 1), ("lr", -1.0), ("lr", math.nan), ("gamma", 1.5),
     ("train_keep", 1.0), ("tries", 0)],
)  # fmt: skip
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with raises(BadInput, f"{option}=.* of prunenet is no number from [01-9]"):
        PruneNet(**{option: value}).check(canonical("llama")[0])


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with raises(BadInput, "keep a policy, and scorer=random has none"):
        PruneNet(scorer="random", save="somewhere").check(canonical("llama")[0])
    with pytest.raises(UnknownName, match="no value of prunenet's option scorer named 'norm'"):
        methods.build("prunenet", {"scorer": "norm"})
    cut(folder("llama"), tmp_path / "ragged", {"scorer": "row_norm"}, allocate={"0": 40})
    with raises(UnsupportedModel, "those of this model differ in width: use scorer=row_norm"):
        cut(tmp_path / "ragged", tmp_path / "out", {"faithful": "true"})
    assert not (tmp_path / "out").exists()


def test_a_file_is_as_it_was_saved(tmp_path: Path) -> None:
    one = Policy.drawn("mlp", 6, 5, seeded())
    policy.write(one, tmp_path / "policy")
    assert {name: value.tolist() for name, value in load_file(tmp_path / "policy").items()} == {
        name: value.tolist() for name, value in one.parameters.items()
    }


# --- trained models -------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")
def test_a_trained_model_s_spectra_move_less_than_by_chance() -> None:
    from safetensors.torch import load_file

    tensors = load_file(SHARED / "models" / "stories-3m" / "model.safetensors")
    rows = {block: tensors[f"model.layers.{block}.mlp.gate_proj.weight"].double() for block in range(6)}
    kept = dict.fromkeys(rows, 368)
    start = Policy.drawn("mlp", 192, 256, seeded(1))
    found = policy.learned(start, rows.__getitem__, kept, Training(20, 0.003, 4, 0.0), seeded(2))
    rewards = Rewards(kept)

    def lost(score: dict[int, Tensor]) -> float:
        return sum(float(rewards.distances(block, rows[block], best_first(score[block])[None])) for block in rows) / 6

    chance = [lost({block: torch.rand(512, generator=seeded(7 * s + block)) for block in rows}) for s in range(5)]
    assert lost({block: found.scores(rows[block]) for block in rows}) < sum(chance) / 5
    assert lost({block: rows[block].norm(dim=1) for block in rows}) < min(chance)
