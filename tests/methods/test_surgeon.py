"""LLM Surgeon: costs and updates written out for tiny models, what is redundant goes first, and shots meet their sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import BRIEF, KINDS_OF_MODELS, behaves, columns_of_group, keeps_every_byte, neuron, parts, with_bias
from folders import raises
from models import TINY, built, canonical, error, logits
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

from microtome import fisher, layout, planner, shots
from microtome.edit import Correct, Plan, Select
from microtome.errors import BadInput
from microtome.methods.surgeon import Surgeon
from microtome.narrow import view_of
from microtome.passes import Allocation, stepped
from microtome.restore import Restore
from microtome.source import open_source
from microtome.sparsity import READS
from microtome.stats import Curvature, Fisher, Sample, Stat
from microtome.survey import Statistics
from microtome.training import Heal

QUICK = {"sequences": 8, "length": 24}
GQA = "llama-gqa-llama3-tied"


def curved(name: str, how: Curvature) -> Statistics:
    with open_source(folder(name)) as source:
        found = planner.opened(source)
        return Statistics(dict(fisher.factors(found, CALIBRATION, how, device=torch.device("cpu"))))


def seen(name: str, method: Surgeon, block: int, halves: tuple[str, ...] = ("attn", "mlp")) -> tuple[Any, Fisher]:
    statistics = curved(name, method.curvature)
    with open_source(folder(name)) as source:
        found = planner.opened(source)
        view = view_of(found, method, block, found.read(block, torch.float64), halves, statistics)
    factors = view.stats[Stat.FISHER]
    assert isinstance(factors, Fisher)
    return view, factors


def damped(matrix: Tensor, damping: float) -> Tensor:
    matrix = matrix.double()
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def with_column(block: dict[str, Tensor], linear: str) -> Tensor:
    """A weight with its bias as one more column."""
    return with_bias(block, linear, slice(None))


def by_hand(name: str, block: int, linear: str, factors: Fisher, damp: float) -> tuple[Tensor, Tensor]:
    """What every row and every column costs, one at a time."""
    w = with_column(parts(name, block), linear)
    a = damped(factors.inputs[READS[linear]][: w.shape[1], : w.shape[1]], damp)
    g = damped(factors.outputs[linear], damp)
    ai, gi = torch.linalg.inv(a), torch.linalg.inv(g)
    rows = [(w[r] @ a @ w[r]) / gi[r, r] / 2 for r in range(w.shape[0])]
    columns = [(w[:, c] @ g @ w[:, c]) / ai[c, c] / 2 for c in range(w.shape[1])]
    return torch.stack(rows), torch.stack(columns)


def test_keep_1_leaves_every_byte(tmp_path: Path) -> None:
    keeps_every_byte("surgeon", tmp_path / "out")


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_runs_loads_and_dry_runs_agree(name: str, tmp_path: Path) -> None:
    behaves("surgeon", name, tmp_path, options=QUICK)


@pytest.mark.parametrize("spaces", ["ffn+qk+vo", "ffn+heads"])
@pytest.mark.parametrize("name", BRIEF)
def test_other_spaces(name: str, spaces: str, tmp_path: Path) -> None:
    result = behaves("surgeon", name, tmp_path, options={**QUICK, "spaces": spaces, "update": "joint"})
    assert {key.partition(".")[2] for key in result.plan.widths} == set(spaces.split("+"))


@pytest.mark.parametrize("update", ["readers", "joint", "sum"])
@pytest.mark.parametrize("name", [GQA, "opt-tied"])
def test_two_products(name: str, update: str, tmp_path: Path) -> None:
    """Runs, loads, dry runs; and what a linear keeps is where the curvature of what is free has no slope."""
    if update == "joint":
        behaves("surgeon", name, tmp_path, options={**QUICK, "rank": 2, "update": update})
    method = Surgeon(sequences=3, rank=2, update=update, spaces="ffn", damp_a=0.05, damp_g=0.02)  # type: ignore[arg-type]
    view, factors = seen(name, method, 1, ("mlp",))
    edits = method.solve(view, {"1.ffn": 70})
    (select,) = (edit for edit in edits if isinstance(edit, Select))
    new = {edit.tensor.removeprefix(layout.prefix(1)): edit.value for edit in edits if isinstance(edit, Correct)}
    old, kept = with_column(parts(name, 1), "mlp.down_proj"), torch.zeros(80, dtype=torch.bool)
    kept[select.indices] = True
    have = torch.zeros_like(old)
    have[:, :80][:, kept] = new["mlp.down_proj.weight"]
    free = torch.cat([kept, torch.ones(old.shape[1] - 80, dtype=torch.bool)])
    if old.shape[1] > 80:
        have[:, 80] = new["mlp.down_proj.bias"]
    inputs, outputs = factors.pairs["mlp.down_proj"]
    slope = sum(damped(g, 0.02) @ (have - old) @ damped(a, 0.05) for a, g in zip(inputs, outputs, strict=True))
    assert isinstance(slope, Tensor)
    assert slope[:, free].abs().max() < 1e-6 * slope.abs().max()
    assert ("mlp.up_proj.weight" in new) == (update != "readers")


@pytest.mark.parametrize("cost", ["sum", "least"])
@pytest.mark.parametrize("name", [GQA, "opt-tied"])
def test_costs_by_hand(name: str, cost: Any) -> None:
    method = Surgeon(cost=cost, sequences=3, damp_a=0.02, damp_g=0.02, spaces="ffn+heads")
    view, factors = seen(name, method, 1)
    worth, put = method.worth(view), {"sum": sum, "least": min}[cost]
    costs = {linear: by_hand(name, 1, linear, factors, 0.02) for linear in factors.outputs}
    writers = [linear for linear in ("mlp.gate_proj", "mlp.up_proj") if linear in costs]
    for number in (0, 33, 79):
        want = put([*(float(costs[linear][0][number]) for linear in writers), float(costs["mlp.down_proj"][1][number])])
        assert float(worth["1.ffn"][number]) == pytest.approx(want, rel=1e-6)
    sizes = view.sizes
    times = sizes.num_attention_heads // sizes.num_key_value_heads
    for number in range(sizes.num_key_value_heads):
        wides = {"q_proj": times * sizes.head_dim, "k_proj": sizes.head_dim, "v_proj": sizes.v_head_dim}
        each = [
            float(costs[f"self_attn.{linear}"][0][number * wide : (number + 1) * wide].sum())
            for linear, wide in wides.items()
        ]
        want = put([*each, float(costs["self_attn.o_proj"][1][columns_of_group(sizes, number)].sum())])
        assert float(worth["1.heads"][number]) == pytest.approx(want, rel=1e-6)


def minimum(w: Tensor, rows: list[int], columns: list[int], a: Tensor, g: Tensor) -> Tensor:
    """W' with zero rows and columns and the least tr(G D A D^T), as one least-squares problem in what stays free."""
    left, right = torch.linalg.cholesky(g).T, torch.linalg.cholesky(a)
    free = torch.ones(w.shape, dtype=torch.bool)
    free[rows], free[:, columns] = False, False
    system = torch.kron(left, right.T)
    target = (left @ w @ right).flatten()
    found = torch.zeros_like(w)
    found[free] = torch.linalg.lstsq(system[:, free.flatten()], target[:, None]).solution[:, 0]
    return found


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_the_joint_update_is_the_optimum(name: str) -> None:
    """Of every matrix of a feed-forward half, against least squares over all its weights that stay."""
    method = Surgeon(sequences=8, update="joint", spaces="ffn", damp_a=0.05, damp_g=0.05)
    view, factors = seen(name, method, 0, ("mlp",))
    edits = method.solve(view, {"0.ffn": 74})
    (select,) = (edit for edit in edits if isinstance(edit, Select))
    kept = select.indices.tolist()
    gone = [number for number in range(80) if number not in kept]
    new = {edit.tensor.removeprefix(layout.prefix(0)): edit.value for edit in edits if isinstance(edit, Correct)}
    for linear in factors.outputs:
        if not linear.startswith("mlp."):
            continue
        w = (
            with_column(parts(name, 0), linear)[:12]
            if linear == "mlp.down_proj"
            else with_column(parts(name, 0), linear)
        )
        a = damped(factors.inputs[READS[linear]][: w.shape[1], : w.shape[1]], 0.05)
        if linear == "mlp.down_proj":  # whatever G is: columns do not ask
            want = minimum(w, [], gone, a, torch.eye(12, dtype=torch.float64))
            have = new[f"{linear}.weight"][:12]
            assert error(have, want[:, kept]) < 1e-6
            if f"{linear}.bias" in new:
                assert error(new[f"{linear}.bias"][:12], want[:, -1]) < 1e-6
        else:  # rows do not ask for A
            g = damped(factors.outputs[linear], 0.05)
            want = minimum(w, gone, [], torch.eye(w.shape[1], dtype=torch.float64), g) if w.shape[1] < 20 else None
            block = minimum(w[:, :6], gone, [], torch.eye(6, dtype=torch.float64), g)
            assert want is None or error(new[f"{linear}.weight"], want[kept]) < 1e-6
            assert error(new[f"{linear}.weight"][:, :6], block[kept]) < 1e-6


def test_what_each_update_changes() -> None:
    view, _ = seen("opt-tied", Surgeon(sequences=3, spaces="ffn+qk+vo"), 1)
    changed: dict[str, set[str]] = {}
    for update in ("readers", "joint", "sum", "none"):
        method = Surgeon(sequences=3, spaces="ffn+qk+vo", update=update)  # type: ignore[arg-type]
        edits = method.solve(view, {"1.ffn": 60, "1.qk": 6, "1.vo": 6})
        corrected = [edit for edit in edits if isinstance(edit, Correct)]
        changed[update] = {edit.tensor.removeprefix(layout.prefix(1)) for edit in corrected}
        assert all(torch.isfinite(edit.value).all() for edit in corrected)
    both = ("weight", "bias")
    assert changed["none"] == set()
    assert changed["readers"] == {
        f"{name}.{part}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
        for part in both
    }  # fmt: skip
    assert (
        changed["joint"]
        == changed["sum"]
        == {f"{name}.{part}" for name in READS for part in both if "gate" not in name}
    )


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_redundant_neurons_go_without_loss(name: str, tmp_path: Path) -> None:
    """Neurons that nobody reads and that never fire, in every block."""
    model = built(TINY[name])
    blocks = model.model.decoder.layers if name == "opt-tied" else model.model.layers
    for block in blocks:
        up, down = (block.fc1, block.fc2) if name == "opt-tied" else (block.mlp.up_proj, block.mlp.down_proj)
        down.weight.data[:, 40:] = 0.0
        for tensor in up.parameters():
            tensor.data[40:] = 0.0
    model.save_pretrained(tmp_path / "source")
    result = compress(
        tmp_path / "source", tmp_path / "out", method="surgeon", allocate={"ffn": 40}, options={"spaces": "ffn"}
    )
    assert result.stock
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) < 1e-5


def test_one_threshold_on_the_cost(tmp_path: Path) -> None:
    """The neurons that stay, over all blocks: none of them costs less than one that goes."""
    result = compress(
        folder("llama"), tmp_path / "out", method="surgeon", keep=0.8, multiple_of=1,
        options={"spaces": "ffn", "sequences": 4},
    )  # fmt: skip
    statistics, costs = curved("llama", Curvature(Sample(4))), list[Tensor]()
    for block in range(3):
        factors = statistics.found[block, Stat.FISHER]
        assert isinstance(factors, Fisher)
        each = [by_hand("llama", block, linear, factors, 0.01) for linear in ("mlp.gate_proj", "mlp.up_proj")]
        down = by_hand("llama", block, "mlp.down_proj", factors, 0.01)
        costs.append(each[0][0] + each[1][0] + down[1])
    left = [result.plan.widths[f"{block}.ffn"] for block in range(3)]
    ranked = [cost.sort(descending=True).values for cost in costs]
    kept = torch.cat([one[:wide] for one, wide in zip(ranked, left, strict=True)])
    gone = torch.cat([one[wide:] for one, wide in zip(ranked, left, strict=True)])
    assert gone.numel()
    assert kept.min() >= gone.max()
    stored = sum(len(neuron(parts("llama", 0), 0)[name].flatten()) for name in neuron(parts("llama", 0), 0))
    assert result.before.stored - result.after.stored == stored * gone.numel()  # what is freed is what was counted


def test_per_parameter_is_the_cost_over_what_is_freed() -> None:
    view, _ = seen(GQA, Surgeon(sequences=3), 0)
    plain, divided = (Surgeon(sequences=3, threshold=way).scores(view) for way in ("cost", "parameter"))  # type: ignore[arg-type]
    stored = {"0.ffn": 3 * 48, "0.vo": 2 * 48 + 6 * 48}  # of a neuron; of a channel in both groups and all heads
    for name, each in plain.items():
        assert error(torch.tensor(divided[name]) * stored[name], torch.tensor(each)) < 1e-6


# --- shots ----------------------------------------------------------------------------------------------------------


def test_shots_meet_their_sizes_and_are_replayed(tmp_path: Path) -> None:
    options = {"shots": 3, "sequences": 4, "spaces": "ffn"}
    asked: dict[str, Any] = {"method": "surgeon", "keep": 0.7, "multiple_of": 1, "options": options}
    result = compress(folder("llama"), tmp_path / "out", **asked)
    plan = Plan.read(tmp_path / "out")
    steps = [{"keep": plan.keep, "widths": plan.widths, "options": plan.options}, *plan.then]
    assert [step["keep"] for step in steps] == pytest.approx([0.9, 0.8, 0.7])
    assert all(step["options"]["shots"] == 1 for step in steps)
    config = canonical("llama")[0]
    for step in steps:
        gone = sum(80 - wide for wide in step["widths"].values())
        left = layout.count_blocks(config) - 3 * config.hidden_size * gone
        assert left / layout.count_blocks(config) == pytest.approx(step["keep"], abs=0.005)
    assert result.after.decoder / result.before.decoder == pytest.approx(0.7, abs=0.005)
    compress(folder("llama"), tmp_path / "again", plan=plan)
    one, two = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.equal(one[key], two[key]) for key in one)
    single = compress(folder("llama"), tmp_path / "single", **asked | {"options": options | {"shots": 1}})
    assert single.after.stored == result.after.stored
    assert plan.then[-1]["widths"] != single.plan.widths, "measured again"


def test_how_shots_are_written_out() -> None:
    before = stepped("slicegpt", {}, keep=0.9)
    step = stepped("surgeon", {"shots": 2, "correct": 5}, keep=0.5)
    found = shots.fired([before, step, Restore()])
    assert [getattr(one, "keep", None) for one in found] == [0.9, 0.7, None, 0.5, None]
    assert isinstance(found[2], Heal)
    assert (found[2].steps, found[2].loss, found[2].train) == (5, "text", "lora")
    assert isinstance(found[4], Restore)
    whole = stepped("surgeon", {"shots": 3}, keep=1.0)
    assert len(shots.fired([whole])) == 1


def test_corrections_between_shots(tmp_path: Path) -> None:
    """Healing takes its place between shots, the size is met, and a replay comes to the same bytes."""
    options = {"shots": 2, "correct": 2, "sequences": 4, "spaces": "ffn"}
    result = compress(folder("llama"), tmp_path / "out", method="surgeon", keep=0.8, multiple_of=1, options=options)
    assert [step["method"] for step in result.plan.then] == ["heal", "surgeon"]
    assert result.plan.then[0]["options"]["steps"] == 2
    assert result.after.decoder / result.before.decoder == pytest.approx(0.8, abs=0.005)
    compress(folder("llama"), tmp_path / "again", plan=Plan.read(tmp_path / "out"))
    one, two = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("options", "words"), [
    ({"damp_a": -1.0}, "damp_a=-1.0 of surgeon is no number from 0 on"),
    ({"damp_g": "inf"}, "damp_g=inf of surgeon is no number from 0 on"),
    ({"shots": 0}, "shots=0 of surgeon: at least one"),
    ({"rank": 3}, "rank=3 of surgeon is 1 or 2: three products have no basis in which all are diagonal"),
    ({"rank": 2, "damping": "release"}, "rank=2 of surgeon has one damping in costs and inverses: give damping=same"),
    ({"correct": -1}, "correct=-1 of surgeon is a number of training steps between shots"),
    ({"sequences": 3}, "72 calibration tokens cannot span the 80 directions of a Kronecker factor of model.layers.0.mlp"),
    ({"sequences": 0}, "gradients need at least 1 sequence, not 0"),
    ({"length": 1}, "gradients need sequences of at least 2 tokens, not 1"),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with raises(BadInput, words):
        compress(folder("llama"), tmp_path / "out", method="surgeon", keep=0.7, options=options)
    assert not (tmp_path / "out").exists()


def test_shots_need_a_size() -> None:
    table = stepped("surgeon", {"shots": 2}, allocation=Allocation("table", table={"ffn": 40}))
    with raises(
        BadInput, "2 shots of surgeon need a keep of their own, which a table of widths does not give: one shot"
    ):
        shots.fired([table])
