"""Mixed sparsity: saliency between its bounds, densities by rank to the last weight, curvature by finite differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import BRIEF
from folders import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, built, canonical, doubled, error, loaded, logits
from sweeping import BOTH, correlated, damped, moment_of
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

from microtome import curvature, grid, layout, planner, sparsity
from microtome.compensate import Columns, swept
from microtome.errors import BadInput, NumericalFailure, UnknownName
from microtome.forecast import preview
from microtome.methods import mixed
from microtome.methods.mixed import Mixed
from microtome.source import open_source
from microtome.stats import Sample

GQA = "llama-gqa-llama3-tied"


def columns_of(x: Tensor, weight: Tensor) -> Columns:
    """What the sweep shows of a matrix before its first column."""
    hessian = damped(moment_of(x))
    lefts = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(len(hessian))])
    size = len(hessian)
    return Columns(0, size, weight, lefts.sqrt(), hessian.diagonal(), torch.arange(size))


def weight_of(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- saliency -------------------------------------------------------------------------------------------------------


def test_the_saliency_lies_between_its_bounds() -> None:
    """Between w^2 H_cc and twice that; with the whole inverse at the first column."""
    x, weight = correlated(8), weight_of(4, 8)
    hessian = damped(moment_of(x))
    have = mixed.isc(weight, columns_of(x, weight), slice(0, 8))
    alone = weight.square() * hessian.diagonal()
    assert (have > alone).all()
    assert (have <= 2 * alone + 1e-9).all()
    assert torch.allclose(have[:, 0], alone[:, 0] + weight[:, 0].square() / torch.linalg.inv(hessian)[0, 0])


def test_where_inputs_are_unrelated_all_saliencies_agree() -> None:
    """ISC is then 2 w^2 H_cc: the order of optimal brain surgery, and of Wanda in every row."""
    x, weight = torch.diag(torch.tensor([0.5, 3.0, 1.0, 2.0, 7.0])).double(), weight_of(3, 5)
    columns = columns_of(x, weight)
    isc, obs = (one(weight, columns, slice(0, 5)) for one in (mixed.isc, sparsity.obs))
    assert torch.allclose(isc, 2 * weight.square() * columns.energy)
    assert torch.equal(isc.flatten().argsort(), obs.flatten().argsort())
    wanda = weight.abs() * columns.energy.sqrt()
    assert torch.equal(isc.argsort(1), wanda.argsort(1))


def test_the_scale_of_activations_is_of_no_account_but_to_the_release() -> None:
    """The same zeros whatever the inputs are multiplied with; the first power in the release's formula has others."""
    x, weight = correlated(12, seed=4), weight_of(6, 12)

    def zeros(scale: float, score: Any) -> Tensor:
        return swept(weight, moment_of(scale * x), sparsity.by_blocks(36, score)).weight == 0

    assert torch.equal(zeros(1.0, mixed.isc), zeros(1e-3, mixed.isc))
    assert not torch.equal(zeros(1.0, mixed.isc_released), zeros(1e-3, mixed.isc_released))


# --- densities ------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    felt=st.lists(st.floats(0, 10), min_size=1, max_size=9), density=st.floats(0.1, 0.95), alpha=st.floats(0, 0.4),
    data=st.data(),
)  # fmt: skip
def test_densities_rise_with_what_is_felt_and_meet_the_target(
    felt: list[float], density: float, alpha: float, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=len(felt), max_size=len(felt)))
    keys = [(0, str(number)) for number in range(len(felt))]
    known, counted = dict(zip(keys, felt, strict=True)), dict(zip(keys, sizes, strict=True))
    found = mixed.shared(known, counted, density, alpha, exact=True)
    mean = sum(found[key] * counted[key] for key in keys) / sum(sizes)
    assert mean == pytest.approx(density, abs=1e-9)
    ranked = sorted(keys, key=lambda key: known[key])
    assert [found[key] for key in ranked] == sorted(found.values())
    if alpha == 0 or len(set(felt)) == 1:
        assert all(one == pytest.approx(density) for one in found.values())
    counts = Mixed(density=density, alpha=alpha).counted(known, counted)
    assert sum(counts.values()) == sum(sizes) - round(density * sum(sizes))


def test_the_papers_rule() -> None:
    """From alpha below to alpha above the density, evenly over the ranks, whatever the matrices' sizes."""
    known = {(0, "a"): 5.0, (0, "b"): 1.0, (1, "a"): 3.0}
    sizes = {(0, "a"): 10, (0, "b"): 1000, (1, "a"): 100}
    found = mixed.shared(known, sizes, 0.6, 0.2, exact=False)
    assert {key: pytest.approx(one) for key, one in found.items()} == {(0, "b"): 0.4, (1, "a"): 0.6, (0, "a"): 0.8}
    assert Mixed(density=0.6, alpha=0.2, budget="matrices").counted(known, sizes) == {
        (0, "a"): 2, (0, "b"): 600, (1, "a"): 40,
    }  # fmt: skip
    by_block = Mixed(density=0.5, alpha=0.1, level="block").counted({**known, (1, "b"): 9.0}, {**sizes, (1, "b"): 100})
    shares = {key: one / ({**sizes, (1, "b"): 100})[key] for key, one in by_block.items()}
    assert shares[1, "a"] == pytest.approx(shares[1, "b"], abs=0.02)
    assert shares[0, "b"] > shares[1, "a"] + 0.1


# --- sensitivities --------------------------------------------------------------------------------------------------


def test_probes_average_to_the_trace() -> None:
    """A small network whose Hessian is taken whole: z (H z) over many signs is its diagonal."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=generator).double(), torch.randn(12, 2, generator=generator).double()
    shapes = [(4, 3), (2, 4)]
    flat = weight_of(1, 20)[0].requires_grad_()

    def loss(flat: Tensor) -> Tensor:
        first, second = (one.view(shape) for one, shape in zip(flat.split([12, 8]), shapes, strict=True))
        return ((x @ first.T).tanh() @ second.T - y).square().mean()

    want: Any = torch.autograd.functional.hessian(loss, flat)
    slopes = torch.autograd.grad(loss(flat), [flat], create_graph=True)
    draw = torch.Generator().manual_seed(1)
    count = 1000
    have = torch.stack([curvature.probe(slopes, [flat], draw)[0] for _ in range(count)]).mean(0)
    spread = (want.square().sum(1) - want.diagonal().square()) / count  # the variance of the mean, by the formula
    assert ((have - want.diagonal()).abs() <= 4 * spread.sqrt()).all()
    assert spread.sqrt().max() < 0.1 * want.diagonal().abs().max()


@pytest.mark.parametrize("name", [GQA, "phi-tied-gqa"])
def test_curvature_by_finite_differences(name: str) -> None:
    """One probe on one sequence: z (g(w + h z) - g(w - h z)) / 2 h, by our decoder under plain autograd."""
    rows, step = CALIBRATION[:1, :10], 1e-4
    with open_source(folder(name)) as source:
        have = curvature.curvature(
            planner.opened(source), rows, Sample(1, 10, 1), device=torch.device("cpu"), dtype=torch.float64
        )
    config, tensors = canonical(name)
    model = loaded(config, doubled(tensors))
    named = {key: one for key, one in model.named_parameters() if key.startswith("model.layers.")}
    draw = torch.Generator().manual_seed(0)
    signs = [(torch.randint(0, 2, one.shape, generator=draw) * 2 - 1).double() for one in named.values()]
    slopes = list[tuple[Tensor, ...]]()
    for move in (step, -2 * step):
        torch._foreach_add_([one.data for one in named.values()], signs, alpha=move)
        losses = torch.nn.functional.cross_entropy(model(input_ids=rows).logits[0, :-1], rows[0, 1:])
        slopes.append(torch.autograd.grad(losses, list(named.values())))
    torch._foreach_add_([one.data for one in named.values()], signs, alpha=step)
    loss = torch.nn.functional.cross_entropy(model(input_ids=rows).logits[0, :-1], rows[0, 1:])
    assert have.loss == pytest.approx(loss.item(), rel=1e-6)
    means = torch.autograd.grad(loss, list(named.values()))
    for (key, sign), mean, above, below in zip(zip(named, signs, strict=True), means, *slopes, strict=True):
        want = sign * (above - below) / (2 * step)
        assert (have.mean_squares[key] - want).abs().max() <= 1e-3 * max(want.abs().max(), 1e-3), key
        assert error(have.means[key], mean) < 1e-4, key


def test_the_blocks_that_are_felt_least_lose_most(tmp_path: Path) -> None:
    """Squared gradients of transformers' own model rank the blocks; the densities follow."""
    model = built(TINY["llama"])
    squares = [0.0, 0.0, 0.0]
    for row in CALIBRATION[:3]:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None]).loss.backward()
        for block in range(3):
            own = (model.model.layers[block].get_submodule(name).weight.grad for name in BOTH)
            squares[block] += sum(float(one.double().square().sum()) for one in own)
    options = {"level": "block", "alpha": 0.2, "sensitivity_of": "matrix", "sequences": 3}
    made = compress(folder("llama"), tmp_path / "out", method="mixed", options=options)
    done, shares, whole = weights(tmp_path / "out"), list[float](), 0
    for block in range(3):
        own = [done[f"{layout.prefix(block)}{name}.weight"] for name in BOTH]
        whole += sum(one.numel() for one in own)
        shares.append(sum(int((one == 0).sum()) for one in own) / sum(one.numel() for one in own))
    ranks = sorted(range(3), key=lambda block: squares[block])
    assert [shares[block] for block in ranks] == pytest.approx([0.7, 0.5, 0.3], abs=0.005)
    assert made.after.nonzero == made.before.stored - whole // 2


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sensitivity"), [(BRIEF[0], "hutchinson"), (BRIEF[1], "fisher"), (BRIEF[2], "fisher")]
)
def test_checkpoints(name: str, sensitivity: str, tmp_path: Path) -> None:
    """Exactly as many zeros as a dry run says, unevenly spread; twice the same bytes."""
    options = {"sensitivity": sensitivity, "probes": 1, "sequences": 2, "length": 10, "density": 0.6}
    made = compress(folder(name), tmp_path / "out", method="mixed", options=options)
    assert made.stock
    assert preview(folder(name), method="mixed", options=options).after == made.after
    again = compress(folder(name), tmp_path / "again", method="mixed", options=options)
    assert (made.folder / "model.safetensors").read_bytes() == (again.folder / "model.safetensors").read_bytes()
    done = [tensor for tensor in weights(tmp_path / "out").values() if tensor.ndim == 2]
    shares = {round(int((one == 0).sum()) / one.numel(), 2) for one in done}
    assert min(shares) == 0.0  # embeddings
    assert len(shares) > 4
    assert torch.isfinite(logits(made.load(), HELD_OUT)).all()


def test_without_alpha_every_matrix_has_the_density(tmp_path: Path) -> None:
    compress(folder("llama"), tmp_path / "out", method="mixed", options={"alpha": 0})
    done = weights(tmp_path / "out")
    assert all(int((done[key] == 0).sum()) == done[key].numel() // 2 for key in done if "_proj" in key)
    compress(folder("llama"), tmp_path / "obs", method="mixed", options={"alpha": 0, "saliency": "obs"})
    compress(folder("llama"), tmp_path / "sparsegpt", method="sparsegpt")
    one, other = weights(tmp_path / "obs"), weights(tmp_path / "sparsegpt")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_zeros_survive_rounding(tmp_path: Path) -> None:
    """Rows whose weights are all on one side of zero too: their grid reaches down to it."""
    model = built(TINY["llama"])
    for block in model.model.layers:
        block.mlp.up_proj.weight.data.abs_().add_(0.5)
    model.save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", method="mixed", options={"bits": 4, "alpha": 0})
    before, after = weights(tmp_path / "source"), weights(tmp_path / "out")
    for key in (key for key in after if "_proj" in key):
        assert (after[key] == 0).sum() >= after[key].numel() // 2
        on = grid.round_to(grid.fit(before[key].double(), 4), after[key].double())
        assert torch.allclose(on, after[key].double(), atol=1e-6)


def test_at_density_1_every_byte_is_the_same(tmp_path: Path) -> None:
    compress(folder(GQA), tmp_path / "out", method="mixed", options={"density": 1})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder(GQA) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("options", "words", "kind"), [
    ({"density": 0}, r"density=0.0 of mixed is outside \(0, 1\]", BadInput),
    ({"alpha": 1}, r"alpha=1.0 of mixed is outside \[0, 1\)", BadInput),
    ({"sensitivity": "hutchinson", "probes": 0}, "probes=0 of mixed: sensitivity=hutchinson needs at least 1", BadInput),
    ({"sequences": 0}, "gradients need at least 1 sequence, not 0", BadInput),
    ({"saliency": "best"}, "no value of mixed's option saliency named 'best'", UnknownName),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str, kind: Any, tmp_path: Path) -> None:
    with raises(kind, words):
        compress(folder("llama"), tmp_path / "out", method="mixed", options=options)
    assert not (tmp_path / "out").exists()


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    model = built(TINY["llama"])
    model.model.layers[2].mlp.up_proj.weight.data *= 1e30
    model.model.layers[2].mlp.gate_proj.weight.data *= 1e30
    model.save_pretrained(tmp_path / "source")
    with raises(NumericalFailure, "is not finite on calibration sequence 1"):
        compress(tmp_path / "source", tmp_path / "out", method="mixed")
    assert not (tmp_path / "out").exists()
