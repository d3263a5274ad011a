"""FASP: scores and refits by their formulas, over the tokens themselves; what is redundant goes without loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, built, canonical, error, loaded, logits, ours
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

import microtome
from microtome import columns, inner, layout
from microtome.edit import Correct, Select
from microtome.errors import BadInput, UnknownName
from microtome.inner import View
from microtome.layout import prefix
from microtome.linalg import restoration
from microtome.methods import fasp
from microtome.methods.fasp import FASP
from microtome.space import Kind
from microtome.stats import Moment, Stat

SITES = {"ffn": ("mlp.down_proj", Stat.NEURONS), "vo": ("self_attn.o_proj", Stat.HEADS)}


def tokens_of(model: Any, name: str) -> Tensor:
    """What a linear reads of the calibration text [T, N], fp64."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    logits(model, CALIBRATION)
    hook.remove()
    return seen[0].double()


def view_of(name: str, block: int, kind: str) -> tuple[View, Tensor]:
    """What the method sees of a block of the uncut model, and the tokens behind it."""
    config, tensors = canonical(name)
    linear, stat = SITES[kind]
    x = tokens_of(ours(name), f"model.layers.{block}.{linear}")
    moment = Moment(x.shape[1])
    moment.add(x)
    own = {key.removeprefix(prefix(block)): tensors[key].double() for key in layout.shapes(config, block)}
    spaces = inner.spaces_of(config, block, {inner.KINDS[kind]})
    return View(config, block, (inner.half_of(inner.KINDS[kind]),), own, spaces, {stat: moment}, {}, {}), x


def kept_rows(config: Any, block: int, kind: str, kept: list[Tensor]) -> Tensor:
    """The columns that stay of the reader, in order, from the sizes alone."""
    if kind == "ffn":
        return kept[0]
    sizes = config.per_layer_config[block]
    times, wide = sizes.num_attention_heads // sizes.num_key_value_heads, sizes.v_head_dim
    return torch.cat([head * wide + kept[head // times] for head in range(sizes.num_attention_heads)])


GQA = "llama-gqa-llama3-tied"


@pytest.mark.parametrize("kind", ["ffn", "vo"])
@pytest.mark.parametrize("score", ["wanda", "l2", "obs"])
@pytest.mark.parametrize("name", ["llama", GQA, "opt-tied"])
def test_the_solve_is_the_formula(name: str, score: Any, kind: str) -> None:
    """Scores column by column, added over the heads of a group; a ridge regression with rows for the old weights."""
    ridge, rank = 0.02, {"ffn": 50, "vo": 5}[kind]
    view, x = view_of(name, 1, kind)
    linear = SITES[kind][0]
    weight = view.weights[f"{linear}.weight"]
    damping = ridge * x.pow(2).mean()
    if score == "wanda":
        column = torch.stack([weight[:, j].abs().sum() * x[:, j].norm() for j in range(x.shape[1])])
    elif score == "l2":
        column = torch.stack([weight[:, j].pow(2).sum() * x[:, j].pow(2).sum() for j in range(x.shape[1])])
    else:
        inverse = torch.linalg.inv(x.T @ x / len(x) + damping * torch.eye(x.shape[1]))
        column = weight.pow(2).sum(0) / inverse.diagonal()
    sizes = view.sizes
    times = sizes.num_attention_heads // sizes.num_key_value_heads
    per_group = [column] if kind == "ffn" else column.view(sizes.num_key_value_heads, times, -1).sum(1)
    kept = [one.sort(descending=True).indices[:rank].sort().values for one in per_group]
    edits = FASP(score=score, ridge=ridge).solve(view, {f"1.{kind}": rank})
    chosen = [edit.indices for edit in edits if isinstance(edit, Select)]
    assert [one.tolist() for one in chosen] == [one.tolist() for one in kept]
    (correct,) = (edit for edit in edits if isinstance(edit, Correct))
    rows = kept_rows(view.config, 1, kind, kept)
    left = torch.cat([x[:, rows], (damping * len(x)).sqrt() * torch.eye(len(rows))])
    right = torch.cat([x @ weight.T, (damping * len(x)).sqrt() * weight[:, rows].T])
    assert error(correct.value, torch.linalg.lstsq(left, right).solution.T) < 1e-4
    restored = (x[:, rows] @ correct.value.T - x @ weight.T).pow(2).sum()
    assert restored <= (x[:, rows] @ weight[:, rows].T - x @ weight.T).pow(2).sum()  # never worse than masked


def test_one_restoration_for_all() -> None:
    """Least squares, Nystrom's matrix and the update of optimal brain surgery for several columns are the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 9, generator=generator, dtype=torch.float64) @ torch.randn(9, 9, generator=generator).double()
    weight = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    kept, gone = torch.tensor([0, 2, 3, 6, 8]), torch.tensor([1, 4, 5, 7])
    moment = x.T @ x / len(x)
    have = weight @ restoration(moment, kept, 0.0)
    inverse = torch.linalg.inv(moment)
    surgery = weight[:, kept] - weight[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone][:, kept]
    assert error(have, torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T) < 1e-8
    assert error(have, surgery) < 1e-8
    assert error(weight @ restoration(moment, kept, 1e9), weight[:, kept]) < 1e-6  # a ridge leaves the weights


def test_the_obs_score_is_the_loss_of_one_column() -> None:
    """By fitting the others to each column's absence."""
    view, x = view_of("llama", 0, "ffn")
    weight = view.weights["mlp.down_proj.weight"]
    have = columns.worth(weight, view.moment(Stat.NEURONS), "obs", 1e-9)
    for j in (0, 17, 63):
        others = torch.tensor([i for i in range(80) if i != j])
        fit = torch.linalg.lstsq(x[:, others], x @ weight.T).solution
        loss = (x[:, others] @ fit - x @ weight.T).pow(2).sum() / len(x)
        assert have[j].item() == pytest.approx(loss.item(), rel=1e-3)


def test_whole_groups_keep_their_columns_together() -> None:
    """What is left of a reader when groups go, in the order that the cut gives it."""
    config, tensors = canonical(GQA)
    (space,) = inner.spaces_of(config, 0, {Kind.HEADS}).values()
    rows = columns.left([(space, torch.tensor([1]))])
    assert rows.tolist() == list(range(24, 48))
    weight = tensors[f"{prefix(0)}self_attn.o_proj.weight"]
    done = inner.narrowed(
        {key: tensors[key] for key in layout.shapes(config, 0)}, [Select(space, torch.tensor([1]))], 0
    )
    assert torch.equal(done[f"{prefix(0)}self_attn.o_proj.weight"], weight[:, rows])
    both = columns.left([(space, torch.tensor([0, 1]))])
    assert both.tolist() == list(range(48))


# --- what is redundant ----------------------------------------------------------------------------------------------


def mlp_names(model: Any) -> tuple[list[Any], list[str], str]:
    if model.config.model_type == "opt":
        return list(model.model.decoder.layers), ["fc1"], "fc2"
    return list(model.model.layers), ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"


@pytest.mark.parametrize("plant", ["dead", "twins"])
@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_redundant_neurons_go_without_loss(name: str, plant: str, tmp_path: Path) -> None:
    """Neurons that nobody reads, biases and all; or two that are the same, of which one does the work of both."""
    model = built(TINY[name])
    blocks, ups, down = mlp_names(model)
    for block in blocks:
        if plant == "dead":
            block.get_submodule(down).weight.data[:, 40:] = 0.0
            continue
        for up in ups:
            for tensor in block.get_submodule(up).parameters():
                tensor.data[40:] = tensor.data[:40]
        block.get_submodule(down).weight.data[:, 40:] *= 1e-3  # so that the twins are told apart
    model.save_pretrained(tmp_path / "source")
    result = compress(tmp_path / "source", tmp_path / "out", method="fasp", allocate={"ffn": 40},
                      options={"spaces": "ffn", "ridge": 1e-9})  # fmt: skip
    assert result.stock
    have = logits(result.load(device="cpu", dtype="float32"), HELD_OUT)
    assert error(have, logits(model, HELD_OUT)) < 1e-4
    kept = [key for key in weights(tmp_path / "out") if key.endswith(("fc1.bias", "fc1.weight", "up_proj.weight"))]
    assert kept
    assert all(len(weights(tmp_path / "out")[key]) == 40 for key in kept)


def test_the_first_of_equal_twins_does_the_work_of_both() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], 1)
    weight = torch.tensor([[1.0, 2.0, 3.0, 1.0]], dtype=torch.float64)
    have = weight @ restoration(x.T @ x, torch.tensor([0, 1, 2]), 1e-10)
    assert error(have, torch.tensor([[2.0, 2.0, 3.0]])) < 1e-8


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """A dry run is what comes of it; neurons alone stay stock; it loads, and keep 1 leaves every byte."""
    dry = microtome.preview(folder(name), method="fasp", keep=0.75)
    result = compress(folder(name), tmp_path / "out", method="fasp", keep=0.75)
    assert dry.after == result.after
    assert result.after.decoder == pytest.approx(0.75 * result.before.decoder, rel=0.05)
    kinds = {key.split(".")[1] for key in result.plan.widths}
    assert kinds == {"ffn", "vo"}
    model = result.load(device="cpu", dtype="float32")
    assert torch.isfinite(logits(model, HELD_OUT)).all()
    again = result.load(device="cpu", dtype="float32")
    assert torch.equal(logits(model, HELD_OUT), logits(again, HELD_OUT))


@pytest.mark.parametrize("name", ["llama", "opt-tied", "gpt2-tied"])
def test_neurons_alone_are_stock(name: str, tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", method="fasp", keep=0.75, options={"spaces": "ffn"})
    assert result.stock
    assert type(result.load(device="cpu", dtype="float32")) is type(built(TINY[name]))


def test_keep_1_leaves_every_byte(tmp_path: Path) -> None:
    compress(folder(GQA), tmp_path / "out", method="fasp", keep=1.0)
    before, after = weights(folder(GQA)), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        compress(folder(GQA), tmp_path / place, method="fasp", keep=0.7)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("inputs", ["compressed", "original"])
def test_what_is_measured_is_what_was_cut_before(inputs: str, tmp_path: Path) -> None:
    """The last block's neurons, solved from tokens of the decoder with all before them cut, or with nothing cut."""
    result = compress(folder("llama"), tmp_path / "out", method="fasp", keep=0.7, options={"inputs": inputs})
    config, tensors = canonical("llama")
    cut = weights(tmp_path / "out")
    small = result.load(device="cpu", dtype="float32").config
    block, down = prefix(2), f"{prefix(2)}mlp.down_proj.weight"
    half = dict(cut) | {key: tensors[key] for key in layout.shapes(config, 2) if "mlp" in key}
    before = inner.surgery.rebuilt(small, {2: {"intermediate_size": 80}})
    x = tokens_of(loaded(before, half) if inputs == "compressed" else ours("llama"), "model.layers.2.mlp.down_proj")
    weight = tensors[down].double()
    score = weight.abs().sum(0) * x.norm(dim=0)
    kept = score.sort(descending=True).indices[: len(cut[f"{block}mlp.up_proj.weight"])].sort().values
    assert torch.equal(cut[f"{block}mlp.up_proj.weight"], tensors[f"{block}mlp.up_proj.weight"][kept])
    want = weight @ restoration(x.T @ x, kept, 0.01)
    assert error(cut[down], want) < 1e-4


def test_scores_are_per_number_that_is_saved() -> None:
    """By brute force over all channels: each group's in falling order, added up, over what a channel stores."""
    view, x = view_of(GQA, 1, "vo")
    found = FASP(spaces="vo").scores(view)["1.vo"]
    inverse = torch.linalg.inv(x.T @ x / len(x) + 0.01 * x.pow(2).mean() * torch.eye(48))
    column = view.weights["self_attn.o_proj.weight"].pow(2).sum(0) / inverse.diagonal()
    groups = column.view(2, 3, 8).sum(1).sort(descending=True).values.sum(0)
    stored = 2 * 48 + 6 * 48  # a row of v in both groups, a column of o in all six heads
    assert error(torch.tensor(found), groups / stored) < 1e-4


@pytest.mark.parametrize(("options", "words", "kind"), [
    ({"ridge": -1.0}, "ridge=-1.0 of fasp is no number from 0 on", BadInput),
    ({"ridge": "inf"}, "ridge=inf of fasp is no number", BadInput),
    ({"spaces": "qk"}, "no value of fasp's option spaces named 'qk'", UnknownName),
    ({"rigde": 1}, "no option of fasp named 'rigde'. Did you mean 'ridge'", UnknownName),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        compress(folder("llama"), tmp_path / "out", method="fasp", keep=0.7, options=options)
    assert not (tmp_path / "out").exists()


def test_a_slice_is_no_dial_of_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--slice is the dial of the residual stream, and fasp cuts inside the blocks"):
        compress(folder("llama"), tmp_path / "out", method="fasp", slice=0.3)
    assert fasp.METHOD is FASP
