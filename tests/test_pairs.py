"""Two Kronecker products: fitted to Fisher's matrix written out, and asked what the constrained problem says by force."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import canonical, doubled, error, loaded
from test_fisher import of
from test_kronecker import COLUMNS, ROWS, mask, spd, weight
from tinies import CALIBRATION, folder
from torch import Tensor

from microtome import fisher, pairs
from microtome.kronecker import Metric
from microtome.pairs import Pair
from microtome.sparsity import READS
from microtome.stats import Curvature, Sample

NONE = torch.empty(0, dtype=torch.long)


def tokens(seed: int = 0, count: int = 40) -> tuple[Tensor, Tensor]:
    """What a linear reads and what comes back, the second large where the first is."""
    generator = torch.Generator().manual_seed(seed)
    z, g = (torch.randn(count, size, generator=generator) for size in (5, 4))
    return z, g * z[:, :4].abs() * torch.rand(count, 1, generator=generator)


def full(z: Tensor, g: Tensor) -> Tensor:
    """Fisher's matrix E[(g x z)(g x z)^T], fp64."""
    each = torch.einsum("to,ti->toi", g.double(), z.double()).flatten(1)
    return each.T @ each / len(each)


def together(inputs: Tensor, outputs: Tensor) -> Tensor:
    return torch.kron(outputs[0], inputs[0]) + torch.kron(outputs[1], inputs[1])


def rearranged(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix whose products of vectors are Kronecker products."""
    return matrix.view(rows, columns, rows, columns).permute(0, 2, 1, 3).reshape(rows * rows, columns * columns)


def by_force(w: Tensor, gone: Tensor, hessian: Tensor) -> tuple[Tensor, float]:
    """The least change that makes the weights of a mask zero, by eliminating those that are free."""
    q, n = gone.flatten().nonzero()[:, 0], (~gone).flatten().nonzero()[:, 0]
    change = -w.flatten()
    change[n] = torch.linalg.solve(hessian[n][:, n], hessian[n][:, q] @ w.flatten()[q])
    return (w.flatten() + change).view_as(w), float(change @ hessian @ change / 2)


def pair(damp_a: float = 0.0, damp_g: float = 0.0) -> Pair:
    inputs, outputs = (torch.stack([spd(size, seed), spd(size, seed + 7)]) for size, seed in ((COLUMNS, 1), (ROWS, 2)))
    outputs[1] *= 0.3
    return Pair.of(inputs, outputs, damp_a, damp_g)


# --- fitted -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999))
def test_two_are_nearer_than_one_and_no_nearer_than_can_be(seed: int) -> None:
    """Between the best single product and the best two of any sign, both by singular values (Eckart and Young)."""
    z, g = tokens(seed)
    inputs, outputs = pairs.fitted(z, g)
    values = torch.linalg.svdvals(rearranged(full(z, g), 4, 5))
    apart = float((together(inputs, outputs) - full(z, g)).square().sum())
    assert float(values[2:].square().sum()) * (1 - 1e-5) <= apart
    assert apart < float(values[1:].square().sum())
    for one in (*inputs, *outputs):
        assert float(torch.linalg.eigvalsh(one).min()) >= -1e-6 * float(one.abs().max())


def test_every_sweep_comes_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    z, g = tokens(3)
    found = []
    for sweeps in (0, 1, 2, 4, 16):
        monkeypatch.setattr(pairs, "SWEEPS", sweeps)
        found.append(float((together(*pairs.fitted(z, g)) - full(z, g)).square().sum()))
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.01 * found[-1]


def populations() -> tuple[Tensor, Tensor]:
    """Tokens of two kinds, within each of which everything meets everything: Fisher's matrix is two products."""
    generator = torch.Generator().manual_seed(4)
    kinds = []
    for size in (1.0, 0.1):
        a, b = torch.randn(8, 5, generator=generator), size * torch.randn(7, 4, generator=generator)
        kinds.append((a.repeat_interleave(7, 0), b.repeat(8, 1)))
    return torch.cat([one for one, _ in kinds]), torch.cat([one for _, one in kinds])


def test_what_is_two_products_is_found() -> None:
    z, g = populations()
    assert error(together(*pairs.fitted(z, g)), full(z, g)) < 1e-3
    single = torch.kron(g.double().T @ g.double() / len(g), z.double().T @ z.double() / len(z))
    assert error(single, full(z, g)) > 0.1


def test_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a mean loss are tiny: their fourth powers would be no numbers in fp32."""
    z, g = tokens(1)
    want = together(*pairs.fitted(z, g))
    monkeypatch.setattr(pairs, "CHUNK", 7)
    tiny = together(*pairs.fitted(1e3 * z, 1e-9 * g))
    assert error(tiny / 1e-12, want) < 1e-5


def test_nothing_comes_of_nothing() -> None:
    z, g = tokens(1)
    inputs, outputs = pairs.fitted(z, torch.zeros_like(g))
    assert together(inputs, outputs).count_nonzero() == 0
    assert isinstance(pairs.paired(inputs, outputs, 0.01, 0.01), Metric)
    one = pairs.paired(torch.stack([spd(5, 1), torch.zeros(5, 5)]), torch.stack([spd(4, 2), spd(4, 3)]), 0.01, 0.01)
    assert isinstance(one, Metric)
    w = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(one.rows(w), Metric.of(spd(5, 1), spd(4, 2), 0.01, 0.01, "same").rows(w)) < 1e-12


# --- costs and updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damp", [0.0, 0.05])
@pytest.mark.parametrize(
    ("rows", "columns"), [([2], []), ([], [7]), ([0, 3], []), ([], [1, 8, 9]), ([1, 5], [0, 4, 6])]
)
def test_rows_and_columns(rows: list[int], columns: list[int], damp: float) -> None:
    w, one = weight(), pair(damp, 2 * damp)
    want, loss = by_force(w, mask(rows, columns), together(one.inputs, one.outputs))
    have = one.without(w, torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long))
    assert error(have, want) < 1e-9
    assert (have[mask(rows, columns)] == 0).all()
    if len(rows) + len(columns) == 1:
        assert float(one.rows(w)[rows] if rows else one.columns(w)[columns]) == pytest.approx(loss)
    assert one.without(w, NONE, NONE) is w
    assert one.without(w, torch.arange(ROWS), NONE).count_nonzero() == 0


def test_damping_is_relative_to_each_factor() -> None:
    plain, damped = pair(), pair(0.1, 0.2)
    for before, after, damp in ((plain.inputs, damped.inputs, 0.1), (plain.outputs, damped.outputs, 0.2)):
        for one, other in zip(before, after, strict=True):
            assert error(other, one + damp * one.diagonal().mean() * torch.eye(len(one), dtype=one.dtype)) < 1e-12


def test_single_weights() -> None:
    w, one = weight(), pair()
    hessian, costs = together(one.inputs, one.outputs), one.elements(w)
    for place in ((0, 0), (3, 7), (5, 9)):
        gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        gone[place] = True
        want, loss = by_force(w, gone, hessian)
        assert float(costs[place]) == pytest.approx(loss)
        assert error(one.without_elements(w, gone, 100), want) < 1e-8
    many = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.4
    want, loss = by_force(w, many, hessian)
    assert error(one.without_elements(w, many, 100), want) < 1e-8
    apart = one.without_elements(w, many, 4)
    assert (apart[many] == 0).all()
    change = (apart - w).flatten()
    assert loss < float(change @ hessian @ change / 2)
    assert torch.equal(one.without_elements(w, torch.zeros_like(many), 4), w)


def test_the_same_product_twice_is_one() -> None:
    """Costs double, what makes up for a loss stays."""
    a, g, w, gone = spd(COLUMNS, 1), spd(ROWS, 2), weight(), torch.tensor([0, 4])
    one, two = Metric.of(a, g, 0.1, 0.1, "same"), Pair.of(torch.stack([a, a]), torch.stack([g, g]), 0.1, 0.1)
    for what in ("rows", "columns", "elements"):
        assert error(getattr(two, what)(w), 2.0 * getattr(one, what)(w)) < 1e-9
    assert error(two.without(w, gone, gone), one.without(w, gone, gone)) < 1e-9
    many = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.4
    assert error(two.without_elements(w, many, 7), one.without_elements(w, many, 7)) < 1e-9


def test_what_is_dead_costs_nothing() -> None:
    one = pair()
    inputs, outputs = one.inputs.clone(), one.outputs.clone()
    inputs[:, 4], inputs[:, :, 4], outputs[:, 1], outputs[:, :, 1] = 0.0, 0.0, 0.0, 0.0
    dead, w = Pair.of(inputs, outputs, 0.01, 0.01), weight()
    assert (dead.columns(w) == 0).nonzero().flatten().tolist() == [4]
    assert (dead.rows(w) == 0).nonzero().flatten().tolist() == [1]
    assert torch.isfinite(dead.without(w, torch.tensor([0]), torch.tensor([1]))).all()


def test_under_the_whole_matrix_two_products_lose_less() -> None:
    """Columns go; the loss is that of Fisher's matrix itself, whose own optimum is the bound."""
    z, g = populations()
    w = torch.randn(4, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    gone, hessian = torch.tensor([0, 3]), full(z, g) + 1e-9 * torch.eye(20, dtype=torch.float64)
    struck = torch.zeros(4, 5, dtype=torch.bool)
    struck[:, gone] = True
    one = Metric.of(z.T @ z / len(z), g.T @ g / len(g), 1e-6, 1e-6, "same")
    two = Pair.of(*pairs.fitted(z, g), 1e-6, 1e-6)
    _, least = by_force(w, struck, hessian)
    losses = [
        float((have - w).flatten() @ hessian @ (have - w).flatten() / 2)
        for have in (two.without(w, NONE, gone), one.without(w, NONE, gone))
    ]
    assert losses[0] == pytest.approx(least, rel=1e-2)
    assert losses[1] > 1.1 * least


# --- from a decoder -----------------------------------------------------------------------------------------------------


def by_autograd(name: str, rows: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """What every linear reads, and the gradients in what it writes, of all tokens [T, N]: one decoder under autograd."""
    config, tensors = canonical(name)
    model = loaded(config, doubled(tensors))
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for block in range(config.num_hidden_layers):
        for linear in READS:
            if f"model.layers.{block}.{linear}.weight" in tensors:
                module = model.get_submodule(f"model.layers.{block}.{linear}")
                module.register_forward_hook(
                    lambda m, x, y, key=(block, linear): seen.update({key: (with_one(x[0], m.bias), y)})
                )
    found: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[1:])
        slopes = torch.autograd.grad(loss, [y for _, y in seen.values()])
        for key, slope in zip(seen, slopes, strict=True):
            found.setdefault(key, []).append((seen[key][0][0].detach(), slope[0]))
    return {key: (torch.cat([z for z, _ in both]), torch.cat([g for _, g in both])) for key, both in found.items()}


def with_one(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else torch.cat([x, torch.ones_like(x[..., :1])], -1)


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied"])
def test_a_decoder_s_products_are_nearer_to_fisher_s_matrix(name: str) -> None:
    """Of every linear, over all its tokens, by sums over pairs of these: nearer than the product that is the default."""
    one, two = (of(folder(name), Curvature(Sample(3, 9), rank=rank)) for rank in (1, 2))
    config = canonical(name)[0]
    for (block, linear), (z, g) in by_autograd(name, CALIBRATION[:3, :9]).items():
        inputs, outputs = (each.double() for each in two[block].pairs[linear])
        wide = z.shape[1]
        assert inputs.shape == (2, wide, wide)
        a, b = one[block].inputs[READS[linear]][:wide, :wide].double(), one[block].outputs[linear].double()
        size = float(((z @ z.T) * (g @ g.T)).square().mean())
        near = [apart(each, z, g) / size for each in ([(a, b)], list(zip(inputs, outputs, strict=True)))]
        assert near[1] < near[0], (block, linear)
    taken = sum(each.numel() for both in two[0].pairs.values() for each in both)
    assert fisher.numbers(config, 0, 2) == taken
    assert not two[0].inputs


def apart(products: list[tuple[Tensor, Tensor]], z: Tensor, g: Tensor) -> float:
    """The squared distance of sums of products from Fisher's matrix of some tokens, less nothing."""
    size = float(((z @ z.T) * (g @ g.T)).square().mean())
    cross = sum(float((((z @ a) * z).sum(1) * ((g @ b) * g).sum(1)).mean()) for a, b in products)
    own = sum(float((a * c).sum() * (b * d).sum()) for a, b in products for c, d in products)
    return size - 2.0 * cross + own


def test_a_file_holds_the_same(tmp_path: Path) -> None:
    how = Curvature(Sample(4), rank=2)
    plain, filed = of(folder("opt-tied"), how), of(folder("opt-tied"), how, scratch=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(filed)  # of the factors; those of tokens are gone
    for one, other in zip(plain, filed, strict=True):
        assert other.file is not None
        for name, both in one.pairs.items():
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(both, other.pairs[name], strict=True))
