"""DOTResize: transport against exact solutions, copies that must merge without loss, and its steps in plain numpy."""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import raises, tree
from models import TINY, built, canonical, error, logits, stock
from oracles import Paper
from tinies import CALIBRATION, HELD_OUT, compress, folder, planted
from torch import Tensor

import microtome
from microtome import arch
from microtome.data import Tokens
from microtome.errors import BadInput, NumericalFailure, UnsupportedModel
from microtome.evaluate import perplexity
from microtome.linalg import sinkhorn
from microtome.methods.dotresize import Distances, DOTResize, factored, representatives, transport
from microtome.space import Kind, Space, Symmetry
from microtome.stats import Moment

SHARED = Path(__file__).parents[2].parent / "shared"
SOME = ("llama", "gemma-bias", "gpt2-untied", "gpt_neox", "phi", "phi3-window")
TIED = ("llama-gqa-llama3-tied", "opt-tied")
NEURONS = (
    *(name for name in SOME if name != "gpt2-untied"),
    "gpt2-tied",
    "gemma2",
    "olmo2",
)  # ReLU neurons may be dead
JUNCTION = {"basis": "junction"}
FFN = {"space": "ffn"}

each_model = pytest.mark.parametrize("name", SOME)


def cut(model: Any, out: Path, options: dict[str, Any] | None = None, **chosen: Any) -> microtome.Result:
    return compress(model, out, method="dotresize", options=options or {}, **chosen)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- transport ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [0.03, 0.1, 0.7])
def test_a_plan_meets_its_marginals_and_is_the_best_there_is(entropy: float) -> None:
    """It is optimal where log P + C / entropy is a sum of a number per row and one per column: then nothing is gained."""
    cost = random(9, 6).abs()
    plan = sinkhorn(cost, entropy)
    assert torch.allclose(plan.sum(1), torch.full((9,), 1 / 9, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-12)
    prices = plan.log() + cost / entropy
    assert torch.allclose(prices - prices[:1], (prices - prices[:1])[:, :1].expand(-1, 6), atol=1e-8)


@cache
def cheapest(cost: tuple[tuple[float, ...], ...], room: tuple[int, ...]) -> float:
    """Integer plans, one unit of rows after the other, by brute force; the best vertex of the polytope is one."""
    if not cost:
        return 0.0
    first, *rest = cost
    units = sum(room) // len(cost)
    found = [
        sum(c * n for c, n in zip(first, share, strict=True))
        + cheapest(tuple(rest), tuple(r - n for r, n in zip(room, share, strict=True)))
        for share in itertools.product(*(range(min(r, units) + 1) for r in room))
        if sum(share) == units
    ]
    return min(found, default=float("inf"))


@pytest.mark.parametrize("seed", range(3))
def test_without_entropy_it_is_the_linear_programme(seed: int) -> None:
    cost = random(5, 3, seed=seed).abs()
    have = (sinkhorn(cost, 2e-3, rounds=5000, tolerance=1e-9) * cost).sum().item()
    want = cheapest(tuple(map(tuple, cost.tolist())), (5, 5, 5)) / 15
    assert have == pytest.approx(want, abs=2e-3)


def test_at_full_width_it_is_the_best_permutation() -> None:
    cost = random(5, 5, seed=4).abs()
    plan = sinkhorn(cost, 5e-3, rounds=3000)
    best = min(itertools.permutations(range(5)), key=lambda order: sum(cost[i, j] for i, j in enumerate(order)))
    assert plan.argmax(1).tolist() == list(best)
    assert torch.allclose(plan.max(1).values, torch.full((5,), 0.2, dtype=torch.float64), atol=1e-4)


def test_coordinates_in_another_order_give_the_plan_in_that_order() -> None:
    apart, shuffle = torch.cdist(random(8, 5), random(4, 5, seed=1)), torch.randperm(8)
    for free in (False, True):
        plan = transport(apart, 0.1, free=free)
        assert torch.allclose(transport(apart[shuffle], 0.1, free=free), plan[shuffle], atol=1e-8)
        assert torch.allclose(transport(3 * apart, 0.1, free=free), plan, atol=1e-8), "distances have no unit"


def test_free_mass_goes_to_the_nearest() -> None:
    apart = random(8, 3).abs()
    plan = transport(apart, 1e-3, free=True)
    want = torch.nn.functional.one_hot(apart.argmin(1), 3) / 8
    assert torch.allclose(plan, want.double(), atol=1e-6)


# --- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_distances_are_means_over_tokens(every: int) -> None:
    x = random(50, 6).float()
    sums = Distances(6, "cpu", every, signed=True)
    for some in x.split(7):
        sums.add(some[None])
    picked = x.double()[::every]
    for sign in (1, -1):
        want = (picked[:, :, None] - sign * picked[:, None]).abs().sum(0)
        assert torch.allclose(sums.apart[sign], want, atol=1e-4)
    assert torch.allclose(sums.size_N, picked.abs().sum(0), atol=1e-4)
    assert (sums.seen, sums.tokens) == (len(picked), 50)
    assert torch.allclose(sums.mean_NN, x.double().T @ x.double() / 50, atol=1e-5)
    total = sums.kept(torch.empty(6, 6, dtype=torch.float64))
    total.add_moment(sums)
    assert torch.allclose(total.apart[1], 2 * sums.apart[1])
    assert total.seen == 2 * sums.seen


def test_distances_of_the_second_moment() -> None:
    x, moment = random(40, 5), Moment(5)
    moment.add(x)
    apart, signs, size = DOTResize(cost="l2", signed=True).measured(moment)
    near = (x[:, :, None] - x[:, None]).square().mean(0).sqrt()
    far = (x[:, :, None] + x[:, None]).square().mean(0).sqrt()
    assert torch.allclose(apart, torch.minimum(near, far), atol=1e-5)
    assert torch.equal(signs > 0, near <= far)
    assert torch.allclose(size, x.square().mean(0).sqrt(), atol=1e-6)


def test_the_largest_stay_and_copies_come_last() -> None:
    x = random(6, 30) * torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0, 0.5])[:, None].double()
    x[4] = x[2]
    apart, size = torch.cdist(x, x, p=1.0), x.abs().mean(1)
    size[4] = size[2]
    assert representatives(apart, size, 3).tolist() == [0, 2, 3]
    assert representatives(apart, size, 5).tolist() == [0, 1, 2, 3, 5]
    assert representatives(apart, size, 6).tolist() == list(range(6))


# --- bases ----------------------------------------------------------------------------------------------------------


def junction(size: int, symmetry: Symmetry = Symmetry.ORTHOGONAL) -> Space:
    return Space("residual.3", Kind.RESIDUAL, None, size, symmetry, ())


def seen(x: Tensor, *, signed: bool = False) -> Distances:
    sums = Distances(x.shape[1], "cpu", 1, signed=signed)
    sums.add(x)
    return sums


def test_the_map_averages_and_its_way_back_shares_out() -> None:
    method, sums = DOTResize(), seen(random(200, 10))
    for mass in ("even", "free"):
        method = DOTResize(mass=mass)
        there, back = method.map_of(sums, 7, "here")
        assert torch.allclose(there.sum(0), torch.ones(7, dtype=torch.float64), atol=1e-9), mass
        assert torch.allclose(back.sum(1), torch.ones(10, dtype=torch.float64), atol=2e-5), mass


def test_a_norm_lets_the_basis_pass_and_the_triangle_follows_it() -> None:
    """RMSN(x Q) U (T^-1 W) = RMSN(x) W for a square T = Q U, and not without the factorisation."""
    x, weight = random(50, 8), random(8, 3, seed=1)
    there, _ = DOTResize().map_of(seen(x), 8, "here")
    basis, upper = factored(there, "here")
    assert torch.allclose(basis.T @ basis, torch.eye(8).double(), atol=1e-12)
    assert torch.allclose(basis @ upper, there, atol=1e-12)
    assert torch.allclose(upper.tril(-1), torch.zeros(8, 8).double(), atol=1e-12)
    assert (upper.diagonal() > 0).all()

    def norm(z: Tensor) -> Tensor:
        return z / z.square().mean(-1, keepdim=True).sqrt()

    want = norm(x) @ weight
    assert torch.allclose(norm(x @ basis) @ upper @ torch.linalg.inv(there) @ weight, want, atol=1e-9)
    assert not torch.allclose(norm(x @ there) @ torch.linalg.inv(there) @ weight, want, atol=1e-3)


@pytest.mark.parametrize("merge", ["transport", "none"])
def test_a_centred_basis_holds_the_ones_vector_as_the_uniform_one(merge: str) -> None:
    x = random(60, 9) + 2.0
    basis, _ = DOTResize(merge=merge).basis_of(junction(9, Symmetry.CENTRED), seen(x), 6)
    assert torch.allclose(basis.T @ basis, torch.eye(6).double(), atol=1e-9)
    assert torch.allclose(basis.T @ torch.full((9,), 9**-0.5).double(), torch.full((6,), 6**-0.5).double(), atol=1e-9)


def test_signs_let_a_coordinate_join_its_negative() -> None:
    x = random(100, 6)
    x[:, 5] = -x[:, 2]
    left = [x - x @ basis @ basis.T for basis in (
        DOTResize(signed=signed).basis_of(junction(6), seen(x, signed=signed), 5)[0] for signed in (True, False)
    )]  # fmt: skip
    assert left[0].abs().max() < 1e-5
    assert left[1].abs().max() > 1e-2


def test_kept_copies_are_refused() -> None:
    x = random(60, 5)
    x[:, 3] = x[:, 1]
    twice = torch.cat([x, x[:, :1]], 1)
    with raises(NumericalFailure, "the transport map of residual.3 is nearly singular"):
        DOTResize().basis_of(junction(6), seen(twice), 5)
    basis, _ = DOTResize().basis_of(junction(5), seen(x), 4)
    assert torch.allclose(x @ basis @ basis.T, x, atol=1e-5), "the one that is a copy is the one to go"


# --- whole models ---------------------------------------------------------------------------------------------------


class Transport(Paper):
    """The same model with bases by transport, in the plainest way."""

    back = False

    def pca(self, z: Tensor, rank: int) -> Tensor:
        x, size = z.numpy(), z.shape[1]
        self.ways = getattr(self, "ways", {})
        if rank == size:
            whole = torch.eye(size).double()
            self.ways[whole.data_ptr()] = whole, whole
            return whole
        kept = sorted(sorted(range(size), key=lambda i: -np.abs(x[:, i]).mean())[:rank])
        cost = np.stack([np.abs(x - x[:, [j]]).mean(0) for j in kept], 1)
        kernel = np.exp(-cost / cost.mean() / 0.1)
        v = np.ones(rank)
        for _ in range(3000):
            u = 1 / size / (kernel @ v)
            v = 1 / rank / (kernel.T @ u)
        plan = u[:, None] * kernel * v
        q, r = np.linalg.qr(rank * plan)
        turn = np.sign(np.diag(r))
        basis = torch.from_numpy(q * turn)
        self.ways[basis.data_ptr()] = basis, torch.from_numpy(size * plan @ (turn[:, None] * r).T)
        return basis

    def reader(self, z: Tensor, basis: Tensor) -> Tensor:  # noqa: ARG002 - Paper's
        return self.ways[basis.data_ptr()][1] if self.back else basis


@pytest.mark.parametrize("dec", ["pinv", "transport"])
@pytest.mark.parametrize("basis", ["global", "junction"])
def test_its_steps_in_plain_numpy_come_to_the_same(basis: str, dec: str, tmp_path: Path) -> None:
    result = cut(folder("llama"), tmp_path / "out", {"basis": basis, "dec": dec}, slice=0.25, multiple_of=4)
    paper = Transport(stock("llama"), sequential=basis == "junction", one=basis == "global", head=basis == "junction")
    paper.back = dec == "transport"
    want = paper.sliced(CALIBRATION, 36)(HELD_OUT)
    assert error(logits(result.load(), HELD_OUT), want) <= 1e-3
    assert error(want, logits(stock("llama"), HELD_OUT)) > 0.1


@each_model
@pytest.mark.parametrize("options", [{"untie": "true"}, JUNCTION], ids=str)
def test_at_full_width_nothing_is_lost(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = cut(folder(name), tmp_path / "out", options, slice=0.0)
    assert set(result.plan.widths.values()) == {48}
    assert error(logits(result.load(), HELD_OUT), logits(stock(name), HELD_OUT)) <= 1e-4


def pairs() -> Tensor:
    """Coordinates 2 i and 2 i + 1 are the same, [48, 24]."""
    return torch.eye(24).repeat_interleave(2, 0)


@pytest.mark.parametrize("name", [*SOME, *TIED])
@pytest.mark.parametrize("options", [{}, JUNCTION], ids=str)
def test_copied_coordinates_are_merged_without_loss(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = planted(name, 24, span=pairs())
    want = logits(model, HELD_OUT)
    result = cut(model, tmp_path / "out", options, slice=0.5)
    assert error(logits(result.load(), HELD_OUT), want) <= 1e-4
    if options:
        return
    dropped = cut(model, tmp_path / "none", {"merge": "none"}, slice=0.5)
    assert error(logits(dropped.load(), HELD_OUT), want) > 0.1, "half of each pair is less than both"


def copied_neurons(name: str, which: Tensor) -> Any:
    """A tiny model in which neuron i of every feed-forward half is written as neuron `which[i]` is."""
    model = built(TINY[name])
    stored, config = model.state_dict(), canonical(name)[0]
    for key, place in arch.find(TINY[name]["model_type"]).names(config).items():
        if any(part in key for part in ("mlp.gate_proj.", "mlp.up_proj.")) and place.name in stored:
            value = stored[place.name].T if place.transposed else stored[place.name]
            rows = torch.arange(len(value)) if place.rows is None else torch.as_tensor(list(place.rows))
            value[rows] = value[rows[which]]
    return model


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("mass", ["even", "free"])
def test_copied_neurons_are_merged_without_loss(name: str, mass: str, tmp_path: Path) -> None:
    """As pairs; with free mass any number of copies of each will do."""
    size = canonical(name)[0].intermediate_size
    which = torch.arange(size) // 2 if mass == "even" else torch.arange(size) % (size // 2)
    if mass == "free":
        which[size // 2 :] = torch.randint(size // 2, (size // 2,), generator=torch.Generator().manual_seed(0))
    model = copied_neurons(name, which)
    options = FFN | {"entropy": 0.002, "mass": mass}
    result = cut(model, tmp_path / "out", options, allocate={"ffn": size // 2})
    assert set(result.plan.widths.values()) == {size // 2}
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= 1e-3
    if mass == "free":
        return
    dropped = cut(model, tmp_path / "none", options | {"merge": "none"}, allocate={"ffn": size // 2})
    assert error(logits(dropped.load(), HELD_OUT), logits(model, HELD_OUT)) > 1e-2


@pytest.mark.parametrize("options", [{}, JUNCTION, FFN], ids=str)
def test_keep_1_leaves_every_byte(options: dict[str, Any], tmp_path: Path) -> None:
    result = cut(folder("opt-tied"), tmp_path / "out", options, keep=1.0)
    assert result.plan.widths == {}
    want = (folder("opt-tied") / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == want


@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "phi", *TIED])
@pytest.mark.parametrize("options", [{}, JUNCTION, FFN], ids=str)
def test_a_dry_run_is_what_comes_of_it(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    dry = microtome.preview(folder(name), method="dotresize", keep=0.8, options=options)
    wet = cut(folder(name), tmp_path / "out", options, keep=0.8)
    names = set(dry.widths) if options else {"residual"}
    assert set(wet.plan.widths) == names
    assert (set(dry.widths.values()), dry.after.stored) == (set(wet.plan.widths.values()), wet.after.stored)
    assert wet.stock == (dry.outcome.stock is not None)
    model = wet.load()
    assert torch.equal(logits(model, HELD_OUT), logits(wet.load(), HELD_OUT))


EVERY: list[dict[str, Any]] = [
    {}, JUNCTION, FFN, FFN | {"mass": "free"}, {"dec": "regressed"}, {"dec": "transport"}, {"signed": "true"},
    {"merge": "none"}, {"untie": "true"}, JUNCTION | {"dec": "regressed"}, {"tokens": "50"},
]  # fmt: skip


def test_two_runs_give_the_same_bytes_and_options_other_ones(tmp_path: Path) -> None:
    found: list[bytes] = []
    for number, options in enumerate(EVERY):
        for run in range(2 if number < 3 else 1):
            cut(folder("llama-gqa-llama3-tied"), tmp_path / f"{number}.{run}", options, keep=0.8)
        found.append(tree(tmp_path / f"{number}.0")["model.safetensors"])
        if number < 3:
            assert tree(tmp_path / f"{number}.1")["model.safetensors"] == found[-1]
    assert len(set(found)) == len(EVERY)


def test_a_budget_may_be_spent_over_all_blocks(tmp_path: Path) -> None:
    result = cut(folder("llama"), tmp_path / "out", FFN, keep=0.8, allocate="global")
    assert set(result.plan.widths) == {"0.ffn", "1.ffn", "2.ffn"}


def test_what_it_refuses(tmp_path: Path) -> None:
    with raises(UnsupportedModel, "dotresize cannot change the basis of the stream of this olmo2"):
        cut(folder("olmo2"), tmp_path / "out", keep=0.8)
    cut(folder("llama"), tmp_path / "sliced", JUNCTION, keep=0.8)
    with raises(UnsupportedModel, "this model has been sliced already. Use space=ffn"):
        cut(tmp_path / "sliced", tmp_path / "out", keep=0.8)
    config = canonical("llama")[0]
    for options, words in (
        ({"entropy": 0.0}, "entropy=0.0 of dotresize is no number"),
        ({"entropy": float("nan")}, "entropy=nan of dotresize is no number"),
        ({"tokens": 0}, "tokens=0 of dotresize is no number"),
        (FFN | {"cost": "l1"}, "cost=l1 of dotresize is for the residual stream"),
        (FFN | {"signed": True}, "signed=true of dotresize is for the residual stream"),
        (FFN | {"basis": "junction"}, "basis=junction of dotresize is for the residual stream"),
        (FFN | {"dec": "transport"}, "dec=transport of dotresize is for the residual stream"),
        (FFN | {"untie": True}, "untie=true of dotresize is for the residual stream"),
    ):
        with raises(BadInput, words):
            DOTResize(**options).check(config)
    assert not (tmp_path / "out").exists()


# --- trained models -------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")
def test_on_a_trained_model_merging_beats_dropping_and_components_beat_both(tmp_path: Path) -> None:
    calibration, held_out = (
        torch.load(SHARED / "data" / "tokens" / f"stories-3m.{kind}.pt", weights_only=True)[:16]
        for kind in ("calib", "eval")
    )
    found: dict[str, float] = {}
    for name, method, options in (
        ("merged", "dotresize", {}),
        ("dropped", "dotresize", {"merge": "none"}),
        ("components", "slicegpt", {"readers": "transposed"}),
    ):
        result = compress(SHARED / "models" / "stories-3m", tmp_path / name, method=method, keep=0.8, data=calibration,
                          samples=None, length=calibration.shape[1], options=options, dtype="float32")  # fmt: skip
        found[name] = perplexity(result.load(), Tokens(held_out, "ids", "")).value
    assert found["components"] < found["merged"] < found["dropped"]
