"""GPTQ: the sweep once more by hand, grids from their definition, what order and groups mean, and what comes out."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Ran, raises
from models import TINY, built, canonical, error, loaded, logits
from sweeping import correlated, damped, moment_of, spent, swept_by_hand, tokens_at
from tinies import CALIBRATION, HELD_OUT, compress, folder, spoken, text, weights
from torch import Tensor

from microtome import arch, layout
from microtome.edit import Quantise
from microtome.errors import BadInput
from microtome.inner import View
from microtome.methods.gptq import GPTQ
from microtome.running import evaluate, generate
from microtome.source import open_source
from microtome.stats import Moment, Stat

SHARED = Path(__file__).parents[2].parent / "shared"
CONFIG = arch.lower(TINY["llama"])
UP = "mlp.up_proj"


def weight_of(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantised(weight: Tensor, x: Tensor | None, **options: Any) -> Quantise:
    """What the method makes of one matrix that reads tokens [T, I], scales in fp64."""
    stats = {}
    if x is not None:
        moment = Moment(weight.shape[1])
        moment.add(x)
        stats = {Stat.MLP: moment}
    view = View(CONFIG, 0, ("mlp",), {f"{UP}.weight": weight}, {}, stats, {}, {}, torch.float64)
    (edit,) = GPTQ(**options).solve(view)
    assert edit.tensor == f"{layout.prefix(0)}{UP}.weight"
    return edit


def grid_of(weight: Tensor, bits: int, *, symmetric: bool) -> tuple[float, int]:
    """Scale and zero of one row's weights, by the paper's release."""
    low, high = min(0.0, weight.min().item()), max(0.0, weight.max().item())
    if symmetric:
        high = max(high, -low)
        return 2 * high / (2**bits - 1), 2 ** (bits - 1)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def nearest(value: float, scale: float, zero: int, bits: int) -> float:
    """On the grid; the largest weight of a symmetric one lies halfway, and goes to an even code."""
    return (min(max(round(value / scale + zero), 0), 2**bits - 1) - zero) * scale


def by_hand(weight: Tensor, x: Tensor, bits: int, group: int, *, symmetric: bool, current: bool) -> Tensor:
    """The sweep weight by weight; the grids of groups from the matrix as it is when the sweep comes to them, or was."""
    grids: dict[tuple[int, int], tuple[float, int]] = {}

    def decide(column: int, live: Tensor, _: Tensor) -> Tensor:
        number, start = column // group, column // group * group
        for row in range(len(weight)):
            if (row, number) not in grids:
                seen = live if current else weight
                grids[row, number] = grid_of(seen[row, start : start + group], bits, symmetric=symmetric)
        return torch.tensor(
            [nearest(live[row, column].item(), *grids[row, number], bits) for row in range(len(weight))],
            dtype=torch.float64,
        )

    return swept_by_hand(weight, damped(moment_of(x)), decide)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "grids"), [(0, "auto"), (4, "auto"), (4, "static"), (6, "current")])
def test_the_sweep_by_hand(group: int, grids: str, symmetric: bool) -> None:
    weight, x = weight_of(5, 12), correlated(12)
    options = {"bits": 3, "group": group, "grids": grids, "symmetric": symmetric}
    current = group > 0 and grids != "static"
    want = by_hand(weight, x, 3, group or 12, symmetric=symmetric, current=current)
    for block in (1, 5, 128):
        assert error(quantised(weight, x, block=block, **options).value, want) < 1e-6


@pytest.mark.parametrize("group", [0, 4])
def test_columns_by_energy_are_columns_in_another_order(group: int) -> None:
    """Permuted by hand, and back; the groups on disk stay those of neighbours."""
    weight, x = weight_of(5, 12), correlated(12) * torch.linspace(0.5, 3.0, 12, dtype=torch.float64)
    order = moment_of(x).diagonal().argsort(descending=True)
    assert order.tolist() != sorted(order.tolist())
    done = quantised(weight, x, bits=3, group=group, order="energy")
    scale, zero = quantised(weight, None, bits=3, group=group, sweep=False).scale, 4
    wide = group or 12

    def decide(place: int, live: Tensor, _: Tensor) -> Tensor:
        own = scale[:, int(order[place]) // wide].tolist()
        return torch.tensor(
            [nearest(live[row, place].item(), own[row], zero, 3) for row in range(5)], dtype=torch.float64
        )

    turned = swept_by_hand(weight[:, order], damped(moment_of(x))[order][:, order], decide)
    want = torch.empty_like(turned)
    want[:, order] = turned
    assert error(done.value, want) < 1e-6
    assert not torch.equal(done.codes, quantised(weight, x, bits=3, group=group, grids="static").codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_two_columns_by_trying_all(bits: int) -> None:
    """The last column makes up for the first as well as any code can."""
    weight, x = weight_of(6, 2), correlated(2)
    hessian, done = damped(moment_of(x)), quantised(weight, x, bits=bits)
    for row in range(6):
        values = [(code - 2 ** (bits - 1)) * done.scale[row, 0] for code in range(2**bits)]
        first = done.value[row, 0]
        assert (first - weight[row, 0]).abs() <= min((one - weight[row, 0]).abs() for one in values) + 1e-12
        pairs = [torch.stack([first, second]) for second in values]
        losses = [spent(weight[row : row + 1], pair[None], hessian).item() for pair in pairs]
        have = spent(weight[row : row + 1], done.value[row : row + 1], hessian).item()
        assert have == pytest.approx(min(losses), rel=1e-6)


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_one_by_one() -> None:
    weight = weight_of(5, 12)
    x = torch.diag(torch.arange(1.0, 13.0, dtype=torch.float64))
    for options in ({"group": 4}, {"symmetric": False}, {"search": True}, {"order": "energy", "group": 4}):
        one = quantised(weight, x, **options)
        other = quantised(weight, None, sweep=False, **options)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.value, other.value)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_takes_the_nearest_value_of_each_group(symmetric: bool) -> None:
    weight = weight_of(4, 12) + 0.3
    done = quantised(weight, None, bits=3, group=6, sweep=False, symmetric=symmetric).value
    for row, column in itertools.product(range(4), range(12)):
        start = column // 6 * 6
        scale, zero = grid_of(weight[row, start : start + 6], 3, symmetric=symmetric)
        assert done[row, column].item() == pytest.approx(nearest(weight[row, column].item(), scale, zero, 3), abs=1e-9)


def test_the_sweep_costs_less_and_more_bits_cost_less() -> None:
    weight, x = weight_of(16, 24), correlated(24)
    hessian = moment_of(x)
    losses = {
        (bits, sweep): spent(weight, quantised(weight, x, bits=bits, sweep=sweep).value, hessian).sum().item()
        for bits, sweep in itertools.product((2, 3, 4, 6, 8), (True, False))
    }
    for bits in (2, 3, 4, 6, 8):
        assert losses[bits, True] < losses[bits, False]
    assert losses[8, True] < losses[6, True] < losses[4, True] < losses[3, True] < losses[2, True]


def test_the_range_that_rounds_best_by_trying_all() -> None:
    weight = weight_of(4, 20)
    weight[:, 3] *= 4
    done = quantised(weight, None, bits=3, sweep=False, search=True)
    narrower = 0
    for row in range(4):
        found = []
        for step in range(80):
            scale, zero = grid_of(weight[row] * (1 - step / 100), 3, symmetric=True)
            values = [nearest(one, scale, zero, 3) for one in weight[row].tolist()]
            found.append((sum(abs(a - b) ** 2.4 for a, b in zip(values, weight[row].tolist(), strict=True)), scale))
        assert done.scale[row, 0].item() == pytest.approx(min(found)[1])
        narrower += min(found)[1] < found[0][1]
    assert narrower > 1


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"group": 4, "order": "energy"}, {"search": True}])
def test_zeros_stay_and_the_others_make_up_for_them(options: dict[str, Any]) -> None:
    weight, x = weight_of(6, 12), correlated(12)
    zero = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    weight[zero] = 0.0
    done = quantised(weight, x, **options)
    assert not done.value[zero].any()
    free = quantised(weight, x, keep_zeros=False, **options)
    assert free.value[zero].any()


def test_scales_are_rounded_before_weights_are() -> None:
    """Codes are nearest on the grid that is stored."""
    weight = weight_of(8, 12)
    view = View(CONFIG, 0, ("mlp",), {f"{UP}.weight": weight}, {}, {}, {}, {}, torch.bfloat16)
    (done,) = GPTQ(bits=8, sweep=False).solve(view)
    assert torch.equal(done.scale, done.scale.bfloat16().double())
    for row in range(8):
        for column in range(12):
            want = nearest(weight[row, column].item(), done.scale[row, 0].item(), 128, 8)
            assert done.value[row, column].item() == pytest.approx(want, abs=1e-12)


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["compressed", "stepwise", "original"])
def test_what_is_measured(inputs: str, tmp_path: Path) -> None:
    """Two linears of the last block, from tokens behind all that is quantised, as far as the option says."""
    options = {"inputs": inputs, "store": "dense", "bits": 3}
    compress(folder("llama"), tmp_path / "out", method="gptq", options=options)
    config, tensors = canonical("llama")
    done, own = weights(tmp_path / "out"), layout.prefix(2)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        before = {key: done.get(key, one) for key, one in tensors.items()}
        if inputs == "compressed":  # the half itself is as it was
            before |= {key: tensors[key] for key in tensors if key.startswith(f"{own}{name.partition('.')[0]}")}
        x = tokens_at(loaded(config, tensors if inputs == "original" else before), own + name, CALIBRATION)
        weight = tensors[f"{own}{name}.weight"].double()
        want = by_hand(weight, x, 3, weight.shape[1], symmetric=True, current=False)
        have = done[f"{own}{name}.weight"]
        assert ((have - want).abs() < 1e-5 * want.abs().max()).float().mean() > 0.99  # fp32 sums may turn a tie


def test_eight_bits_are_nearly_all_of_it(tmp_path: Path) -> None:
    for name in ("llama", "opt-tied"):
        result = compress(folder(name), tmp_path / name, method="gptq", options={"bits": 8})
        want = logits(built(TINY[name]), HELD_OUT)
        assert 1e-4 < error(logits(result.load(), HELD_OUT), want) < 0.05


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for number in range(2):
        compress(folder("llama"), tmp_path / str(number), method="gptq", options={"order": "energy", "group": 16})
    files = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(2)]
    assert files[0] == files[1]


def test_zeros_of_a_sparse_model_stay(tmp_path: Path) -> None:
    recipe = {"steps": [{"sparsegpt": {"options": {"pattern": "2:4"}}}, {"gptq": {"options": {"symmetric": False}}}]}
    compress(folder("llama"), tmp_path / "out", recipe=recipe)
    with open_source(tmp_path / "out") as source:
        names = [name for name in source.names() if ".layers." in name and name.endswith("proj.weight")]
        assert len(names) == 21
        for name in names:
            assert ((source.tensor(name).reshape(-1, 4) == 0).sum(1) >= 2).all(), name


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_behind_a_cut_on_the_command_line(name: str, run: Callable[..., Ran], tmp_path: Path) -> None:
    """A recipe, its dry run, perplexity, and text."""
    (tmp_path / "recipe.yaml").write_text("keep: 0.8\nsteps:\n  - modegpt: {}\n  - gptq: {options: {bits: 4}}\n")
    (tmp_path / "text.txt").write_text(text())
    chosen = ("-r", tmp_path / "recipe.yaml", "--data", tmp_path / "text.txt", "--length", 24, "--samples", 8, "--json")
    dry = run("plan", spoken(name), *chosen)
    wet = run("compress", spoken(name), *chosen, "--out", tmp_path / "out", "--no-evaluate")
    assert (dry.code, wet.code) == (0, 0), dry.err + wet.err
    assert json.loads(dry.out)["after"] == json.loads(wet.out)["after"]
    held = {"length": 24, "limit": 4, "device": "cpu"}
    (value,) = evaluate(tmp_path / "out", str(tmp_path / "text.txt"), **held).values()
    assert value.value > 1.0
    assert generate(tmp_path / "out", "the", tokens=5, device="cpu").startswith("t h e")  # a letter a token


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 1}, "bits=1 of gptq is no number of bits from 2 to 8"),
        ({"bits": 9}, "bits=9 of gptq is no number of bits from 2 to 8"),
        ({"group": -2}, "group=-2 of gptq is the number of columns that share a grid; 0 is a whole row"),
        ({"group": 128}, r"group=128 of gptq does not divide the 48 inputs of .*q_proj: give group=16, or group=0, a"),
        ({"order": "energy", "grids": "current"}, "order=energy of gptq needs grids=static"),
        ({"damping": -1.0}, "damping=-1.0 of gptq"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with raises(BadInput, words):
        compress(folder("llama"), tmp_path / "no", method="gptq", options=options)
    assert not (tmp_path / "no").exists()


def test_a_model_with_odd_widths_has_a_grid_for_each_row() -> None:
    config = arch.lower(TINY["llama"] | {"intermediate_size": 81})
    with raises(BadInput, r"does not divide the 81 inputs of model\.layers\.0\.mlp\.down_proj: give group=0, a grid"):
        GPTQ(group=16).check(config)
    GPTQ(group=-1).check(config)


def test_rounding_needs_no_text(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", method="gptq", options={"sweep": False}, data=None)
    assert result.plan.calibration == {}


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")
@pytest.mark.parametrize("name", ["stories-3m", "wiki-opt-6m"])
def test_trained_models_lose_less_by_the_sweep(name: str, tmp_path: Path) -> None:
    """At 4 bits, on held-out windows; at 8 bits hardly anything."""
    tokens = SHARED / "data" / "tokens"
    held = torch.load(tokens / f"{name}.eval.pt", weights_only=True)[:16]
    torch.save(held, tmp_path / "held.pt")
    found = {}
    for told, options in {"rtn": {"sweep": False}, "gptq": {}, "gptq8": {"bits": 8}}.items():
        common: dict[str, Any] = {"data": tokens / f"{name}.calib.pt", "samples": 32, "dtype": "float32"}
        made = compress(SHARED / "models" / name, tmp_path / told, method="gptq", options=options, **common)
        (found[told],) = evaluate(made.folder, str(tmp_path / "held.pt"), device="cpu").values()
    (dense,) = evaluate(SHARED / "models" / name, str(tmp_path / "held.pt"), device="cpu").values()
    assert dense.value < found["gptq"].value < found["rtn"].value
    assert found["gptq8"].value < 1.01 * dense.value
