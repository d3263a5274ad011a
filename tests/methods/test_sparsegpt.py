"""SparseGPT: the sweep once more from tokens and by hand; what is measured, what is left alone, what comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import KINDS_OF_MODELS
from folders import raises
from models import TINY, built, canonical, error, loaded, logits, ours, stock
from sweeping import BOTH, correlated, damped, moment_of, spent, swept_by_hand, tokens_at
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

from microtome import grid, layout
from microtome.compensate import swept
from microtome.errors import BadInput, NumericalFailure, UnknownName
from microtome.forecast import preview
from microtome.methods.sparsegpt import SparseGPT

GQA = "llama-gqa-llama3-tied"


def by_hand(weight: Tensor, x: Tensor, density: float = 0.5, block: int = 128) -> Tensor:
    """A matrix of at most `block` columns: the cheapest weights of all its rows go, then the sweep."""
    assert weight.shape[1] <= block
    hessian = damped(moment_of(x))
    lefts = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(len(hessian))])
    cost = weight.square() / lefts
    gone = cost.flatten().argsort(stable=True)[: weight.numel() - round(density * weight.numel())]
    zero = torch.zeros(weight.numel(), dtype=torch.bool)
    zero[gone] = True
    zero = zero.view_as(weight)
    return swept_by_hand(weight, hessian, lambda c, live, _: live[:, c].masked_fill(zero[:, c], 0.0))


@pytest.mark.parametrize("inputs", ["compressed", "stepwise", "original"])
def test_the_sweep_from_what_is_measured(inputs: str, tmp_path: Path) -> None:
    """Two linears of the last block: from tokens behind all that is sparse, as far as the option says."""
    compress(folder("llama"), tmp_path / "out", method="sparsegpt", options={"inputs": inputs})
    config, tensors = canonical("llama")
    done = weights(tmp_path / "out")
    own = layout.prefix(2)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        half = name.partition(".")[0]
        before = {key: done.get(key, one) for key, one in tensors.items()}
        if inputs == "compressed":  # the half itself is dense still
            before |= {key: tensors[key] for key in tensors if key.startswith(f"{own}{half}")}
        model = ours("llama") if inputs == "original" else loaded(config, before)
        x = tokens_at(model, own + name, CALIBRATION)
        want = by_hand(tensors[f"{own}{name}.weight"].double(), x)
        assert torch.equal(done[f"{own}{name}.weight"] == 0, want == 0)
        assert error(done[f"{own}{name}.weight"], want) < 1e-4


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Half of every linear's weights are zero, nothing else is touched, and the form of the source is kept."""
    dry = preview(folder(name), method="sparsegpt")
    result = compress(folder(name), tmp_path / "out", method="sparsegpt")
    assert dry.after == result.after
    assert result.stock
    assert result.plan.widths == {}
    inside = [tensor for key, tensor in canonical(name)[1].items() if key.split(".")[-3:-1] and key.split(".")[0] == "model"
              and any(key.endswith(f"{linear}.weight") for linear in BOTH)]  # fmt: skip
    assert result.before.nonzero == result.before.stored
    assert result.after.nonzero == result.before.stored - sum(one.numel() // 2 for one in inside)
    assert (result.after.stored, result.after.nbytes) == (result.before.stored, result.before.nbytes)
    before, after = weights(folder(name)), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    same = [key for key in before if torch.equal(before[key], after[key])]
    assert len(before) - len(same) == sum((after[key] == 0).sum() >= after[key].numel() // 2 for key in after)
    assert all(before[key].ndim == 2 for key in set(before) - set(same))
    model = result.load()
    assert type(model) is type(stock(name))
    assert torch.equal(logits(model, HELD_OUT), logits(result.load(), HELD_OUT))
    assert torch.isfinite(logits(model, HELD_OUT)).all()


@pytest.mark.parametrize(("name", "pattern"), [(GQA, (2, 4)), ("opt-tied", (2, 4)), ("phi3-partial-longrope", (1, 4))])
def test_groups_hold_as_many_as_the_pattern_says(name: str, pattern: tuple[int, int], tmp_path: Path) -> None:
    kept, size = pattern
    options = {"pattern": f"{kept}:{size}"}
    result = compress(folder(name), tmp_path / "out", method="sparsegpt", options=options)
    assert preview(folder(name), method="sparsegpt", options=options).after == result.after
    before, after = weights(folder(name)), weights(tmp_path / "out")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed
    for key in changed:
        assert ((after[key].reshape(-1, size) != 0).sum(1) == kept).all(), key


def test_an_input_that_is_there_twice_is_not_missed() -> None:
    """Of every two equal inputs the first goes and the second does the work of both: half is zero without loss."""
    x, weight = correlated(6, tokens=40), torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).double()
    x = x.repeat_interleave(2, dim=1)
    weight = weight.repeat_interleave(2, dim=1) * torch.tensor([0.3, 0.7]).double().repeat(6)
    done = swept(weight, moment_of(x), SparseGPT().chooser(weight), damping=1e-9).weight
    assert int((done == 0).sum()) == 30
    assert error(x @ done.T, x @ weight.T) < 1e-4


def test_at_density_1_every_byte_is_the_same(tmp_path: Path) -> None:
    result = compress(folder(GQA), tmp_path / "out", method="sparsegpt", options={"density": 1.0})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder(GQA) / "model.safetensors").read_bytes()
    assert (result.after.nonzero, result.plan.calibration) == (None, {})


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for place in ("one", "two"):
        compress(folder(GQA), tmp_path / place, method="sparsegpt")
        files.append((tmp_path / place / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_denser_is_nearer(tmp_path: Path) -> None:
    want = logits(stock("llama"), HELD_OUT)
    off = []
    for density in (0.9, 0.7, 0.5, 0.3):
        made = compress(folder("llama"), tmp_path / str(density), method="sparsegpt", options={"density": density})
        off.append((logits(made.load(), HELD_OUT) - want).square().mean().item())
    assert off == sorted(off)


@pytest.mark.parametrize(("bits", "group"), [(3, 0), (4, 8)])
def test_bits_in_the_same_sweep(bits: int, group: int, tmp_path: Path) -> None:
    """What is stored lies on the grids of the dense rows, and what was to be zero still is."""
    options = {"bits": bits, "group": group}
    result = compress(folder("llama"), tmp_path / "out", method="sparsegpt", options=options)
    before, after = weights(folder("llama")), weights(tmp_path / "out")
    for key in after:
        if not key.endswith("_proj.weight"):
            continue
        assert (after[key] == 0).sum() >= after[key].numel() // 2
        wide = group or before[key].shape[1]
        for piece, made in zip(before[key].double().split(wide, 1), after[key].split(wide, 1), strict=True):
            on = grid.round_to(grid.fit(piece, bits), made.double())
            assert torch.allclose(on, made.double(), atol=1e-6)
            assert max(len(set(row.tolist())) for row in made) <= 2**bits
    assert result.after.nonzero is not None
    assert result.after.nonzero <= preview(folder("llama"), method="sparsegpt", options=options).after.nonzero
    alone = compress(folder("llama"), tmp_path / "alone", method="sparsegpt", options={"density": 1.0, "bits": 8})
    want = logits(stock("llama"), HELD_OUT)
    assert error(logits(alone.load(), HELD_OUT), want) < 0.05
    assert alone.after.nonzero is None  # zeros are not what it is after


def test_short_floats_stay_short(tmp_path: Path) -> None:
    built(TINY["llama"]).bfloat16().save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", method="sparsegpt")
    before, after = weights(tmp_path / "source"), weights(tmp_path / "out")
    assert {one.dtype for one in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[key], after[key]) for key in before if "_proj" not in key)
    assert all(int((after[key] == 0).sum()) == after[key].numel() // 2 for key in before if "_proj" in key)


def test_blocks_of_columns_change_the_choice_and_not_the_sweep(tmp_path: Path) -> None:
    """In blocks of 8 every 8 columns lose their half; the loss in H is that of the zeros all the same."""
    x, weight = correlated(16), torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).double()
    done = swept(weight, moment_of(x), SparseGPT(block=8).chooser(weight), block=8)
    assert [int((piece == 0).sum()) for piece in done.weight.split(8, dim=1)] == [24, 24]
    assert torch.allclose(done.loss, spent(weight, done.weight, damped(moment_of(x))), rtol=1e-8)
    compress(folder("llama"), tmp_path / "out", method="sparsegpt", options={"block": 8})
    key = f"{layout.prefix(1)}mlp.down_proj.weight"
    assert all(int((piece == 0).sum()) == piece.numel() // 2 for piece in weights(tmp_path / "out")[key].split(8, 1))


@pytest.mark.parametrize(("options", "words", "kind"), [
    ({"density": 0}, r"density=0.0 of sparsegpt is outside \(0, 1\]", BadInput),
    ({"density": 1.5}, r"density=1.5 of sparsegpt is outside \(0, 1\]", BadInput),
    ({"density": "nan"}, r"density=nan of sparsegpt is outside \(0, 1\]", BadInput),
    ({"pattern": "2:4", "density": 0.7}, "pattern=2:4 of sparsegpt is a density of 0.5, not 0.7: give one", BadInput),
    ({"pattern": "4:2"}, "pattern=4:2 of sparsegpt is no N:M", BadInput),
    ({"pattern": "2:3"}, "mlp.down_proj.weight reads 80 numbers, which groups of 3 do not divide", BadInput),
    ({"pattern": "2:4", "block": 6}, "block=6 of sparsegpt is no multiple of 4, as pattern=2:4 needs", BadInput),
    ({"block": 0}, "block=0 of sparsegpt is no number of columns", BadInput),
    ({"damping": -1}, "damping=-1.0 of sparsegpt is no number from 0 on", BadInput),
    ({"bits": 1}, "bits=1 is no number of bits from 2 to 16", BadInput),
    ({"group": 8}, "group=8 of sparsegpt is the number of columns that share a grid: it needs bits", BadInput),
    ({"inputs": "raw"}, "no value of sparsegpt's option inputs named 'raw'", UnknownName),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str, kind: Any, tmp_path: Path) -> None:
    with raises(kind, words):
        compress(folder("llama"), tmp_path / "out", method="sparsegpt", options=options)
    assert not (tmp_path / "out").exists()


def test_too_few_tokens_for_a_factor(tmp_path: Path) -> None:
    with raises(BadInput, "24 calibration tokens cannot span 48 directions at attention of block 0"):
        compress(folder("llama"), tmp_path / "out", method="sparsegpt", data=CALIBRATION[:1])
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow(tmp_path: Path) -> None:
    model = built(TINY["llama"])
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30
    model.model.layers[1].mlp.gate_proj.weight.data *= 1e30
    model.save_pretrained(tmp_path / "source")
    with raises(NumericalFailure, r"activations in block 1 are not finite \(what mlp.down_proj reads\)"):
        compress(tmp_path / "source", tmp_path / "out", method="sparsegpt")
