"""LLM-Pruner: importance written out, what it promises about the loss, and blocks that are left alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import BRIEF, KINDS_OF_MODELS, behaves, group, keeps_every_byte, neuron, parts, smallest, without
from folders import raises
from models import TINY, built, canonical, error, logits, lowered, stored
from tinies import CALIBRATION, HELD_OUT, compress, folder
from torch import Tensor

from microtome import inner, planner
from microtome.errors import BadInput, BadPlan
from microtome.gradients import Gradients, gradients
from microtome.inner import View
from microtome.methods.llmpruner import LLMPruner
from microtome.source import open_source
from microtome.space import Kind
from microtome.stats import Sample

EXACT = 1e-5
FIRST = {"ffn": ("mlp.gate_proj", "mlp.up_proj"), "heads": ("self_attn.k_proj",)}


def gradients_of(place: Path, sample: Sample, dtype: torch.dtype = torch.float32) -> Gradients:
    with open_source(place) as source:
        return gradients(planner.opened(source), CALIBRATION, sample, device=torch.device("cpu"), dtype=dtype)


def naive(members: list[dict[str, Tensor]], element: str, reduce: str, kind: str) -> float:
    """The worth of a group from its weights, gradients and squared gradients, each by matrix."""
    each: dict[str, float] = {}
    for name in members[0]:
        w, g, h = (one[name] if one[name].ndim == 2 else one[name][None] for one in members)
        salience = {
            "param_first": w * g, "param_second": w * w * h, "param_mix": w * g - w * w * h / 2, "vectorize": w * g,
        }[element]  # fmt: skip
        each[name] = float(salience.sum(1).abs().sum() if element == "vectorize" else salience.abs().sum())
    if reduce == "first":
        return each[next(name for name in FIRST[kind] if name in each)]
    if reduce == "prod":
        return float(torch.tensor(list(each.values()), dtype=torch.float64).prod())
    return {"sum": sum, "max": max}[reduce](each.values())


def test_keep_1_leaves_every_byte(tmp_path: Path) -> None:
    keeps_every_byte("llmpruner", tmp_path / "out")


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_runs_loads_and_dry_runs_agree(name: str, tmp_path: Path) -> None:
    behaves("llmpruner", name, tmp_path, options={"sequences": 2})


@pytest.mark.parametrize("name", BRIEF)
def test_a_global_budget(name: str, tmp_path: Path) -> None:
    result = behaves("llmpruner", name, tmp_path, options={"sequences": 2}, allocate="global")
    assert len({wide for space, wide in result.plan.widths.items() if space.endswith("ffn")}) > 1


@pytest.mark.parametrize(
    ("element", "reduce"),
    [
        ("param_first", "sum"),
        ("param_second", "sum"),
        ("param_mix", "max"),
        ("vectorize", "prod"),
        ("param_first", "first"),
    ],
)
@pytest.mark.parametrize("name", BRIEF)
def test_by_hand(name: str, element: str, reduce: str, tmp_path: Path) -> None:
    config, sizes = canonical(name)[0], canonical(name)[0].per_layer_config[0]
    found, groups = gradients_of(folder(name), Sample(3, 12)), sizes.num_key_value_heads
    gone: dict[tuple[int, str], set[int]] = {}
    for block in range(config.num_hidden_layers):
        three = [
            parts(name, block),
            parts(name, block, dict(found.means)),
            parts(name, block, dict(found.mean_squares)),
        ]
        scores = [naive([neuron(one, number) for one in three], element, reduce, "ffn") for number in range(80)]
        gone[block, "ffn"] = smallest(scores, 24)
        scores = [
            naive([group(one, sizes, number) for one in three], element, reduce, "heads") for number in range(groups)
        ]
        gone[block, "heads"] = smallest(scores, 1)
    result = compress(
        folder(name), tmp_path / "out", method="llmpruner", allocate={"ffn": 56, "heads": groups - 1},
        options={"element": element, "reduce": reduce, "sequences": 3, "length": 12},
    )  # fmt: skip
    assert error(logits(result.load(), HELD_OUT), logits(without(name, gone), HELD_OUT)) <= EXACT


def loss(model: Any, tokens: Tensor) -> float:
    """Mean cross-entropy, fp64 logits."""
    return float(
        torch.nn.functional.cross_entropy(logits(model, tokens).double()[:, :-1].transpose(1, 2), tokens[:, 1:])
    )


def test_the_score_is_the_change_of_the_loss(tmp_path: Path) -> None:
    """Neurons that say little: what the loss does without one is its score.

    A ReLU neuron as a whole is linear in its row and in its column, so both have the same sum of w g; `max` takes it once.
    """
    model = built(TINY["opt-tied"]).double()
    factors = 2e-4 * (1.0 + torch.rand(80, generator=torch.Generator().manual_seed(0)).double() * 9)
    for block in model.model.decoder.layers:
        block.fc2.weight.data *= factors
    model.save_pretrained(tmp_path / "source")
    found = gradients_of(tmp_path / "source", Sample(len(CALIBRATION)), torch.float64)
    config = canonical("opt-tied")[0]
    weights = parts("opt-tied", 1, lowered(TINY["opt-tied"], stored(model))[1])
    spaces = inner.spaces_of(config, 1, [Kind.FFN])
    view = View(config, 1, ("mlp",), weights, spaces, {}, found.first(1), found.squares(1))
    scores = LLMPruner(element="vectorize", reduce="max").worth(view)["1.ffn"]
    before, column, changes = loss(model, CALIBRATION), model.model.decoder.layers[1].fc2.weight.data, list[float]()
    for number in range(80):
        saved = column[:, number].clone()
        column[:, number] = 0.0
        changes.append(abs(loss(model, CALIBRATION) - before))
        column[:, number] = saved
    assert scores.tolist() == pytest.approx(changes, rel=0.1, abs=1e-6)
    ranks = torch.stack([scores.argsort().argsort(), torch.tensor(changes).argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.95


def test_dead_neurons_go_without_loss(tmp_path: Path) -> None:
    model = built(TINY["llama"])
    for number, block in enumerate(model.model.layers):
        block.mlp.down_proj.weight.data[:, number : number + 32] = 0.0
        block.mlp.up_proj.weight.data[number : number + 32] = 0.0
    want = logits(model, HELD_OUT)
    for element in ("param_first", "param_second", "param_mix", "vectorize"):
        result = compress(
            model, tmp_path / element, method="llmpruner", allocate={"ffn": 48}, options={"element": element}
        )
        assert error(logits(result.load(), HELD_OUT), want) <= EXACT


def test_blocks_at_the_ends_are_protected(tmp_path: Path) -> None:
    options = {"protect_first": 1, "protect_last": "1"}
    result = compress(folder("llama"), tmp_path / "out", keep=0.85, method="llmpruner", options=options)
    assert set(result.plan.widths) == {"1.ffn", "1.heads"}
    assert result.after.decoder / result.before.decoder == pytest.approx(0.85, abs=0.03)
    with raises(BadPlan, r"cannot be reached"):
        compress(folder("llama"), tmp_path / "no", keep=0.5, method="llmpruner", options=options)
    with raises(BadInput, r"protect_first=1 and protect_last=2 of llmpruner leave none of 3 blocks to cut"):
        compress(folder("llama"), tmp_path / "no", keep=0.7, method="llmpruner", options=options | {"protect_last": 2})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequences": 0}, r"gradients need at least 1 sequence, not 0"),
        ({"length": 1}, r"sequences of at least 2 tokens, not 1"),
        ({"length": -3}, r"sequences of at least 2 tokens, not -3"),
    ],
)
def test_samples_that_are_none(options: dict[str, int], words: str, tmp_path: Path) -> None:
    with raises(BadInput, words):
        compress(folder("llama"), tmp_path / "out", keep=0.7, method="llmpruner", options=options)
