"""FLAP: the metric written out, means restored to the last digit, and one threshold over standardised scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from acceptance import BRIEF, KINDS_OF_MODELS, behaves, columns_of_group, keeps_every_byte, smallest
from models import TINY, built, canonical, error, loaded, logits, lowered, ours, stored
from tinies import CALIBRATION, HELD_OUT, compress, folder
from torch import Tensor

EXACT = 1e-5
READERS = {"ffn": "mlp.down_proj", "heads": "self_attn.o_proj"}


@torch.no_grad()
def read_by(model: Any, tokens: Tensor) -> dict[tuple[int, str], np.ndarray]:
    """What the down and output projection of every block read [tokens, C]."""
    seen: dict[tuple[int, str], np.ndarray] = {}
    hooks: list[Any] = []
    for number, block in enumerate(model.model.layers):
        for kind, name in READERS.items():
            if (owner := getattr(block, name.partition(".")[0])) is not None:
                linear = getattr(owner, name.partition(".")[2])
                keep = lambda _m, x, key=(number, kind): seen.update({key: x[0].double().flatten(0, 1).numpy()})  # noqa: E731
                hooks.append(linear.register_forward_pre_hook(keep))
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return seen


def fluctuation(weight: np.ndarray, x: np.ndarray, metric: str) -> np.ndarray:
    """The metric of every column, by the tokens."""
    variance = ((x - x.mean(0)) ** 2).mean(0)
    return {
        "wifv": variance * (weight**2).sum(0),
        "ifv": variance,
        "wifn": np.abs(weight).mean(0) * np.sqrt((x**2).mean(0)),
    }[metric]


def weight_of(tensors: Mapping[str, Tensor], block: int, kind: str) -> np.ndarray:
    return tensors[f"model.layers.{block}.{READERS[kind]}.weight"].double().numpy()


def test_keep_1_leaves_every_byte(tmp_path: Path) -> None:
    keeps_every_byte("flap", tmp_path / "out")


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_runs_loads_and_dry_runs_agree(name: str, tmp_path: Path) -> None:
    behaves("flap", name, tmp_path)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_other_inputs_and_allocations(inputs: str, tmp_path: Path) -> None:
    behaves("flap", "phi-tied-gqa", tmp_path, options={"inputs": inputs}, allocate="uniform")


@pytest.mark.parametrize("name", BRIEF)
@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
def test_by_hand(name: str, metric: str, tmp_path: Path) -> None:
    """What is cut and the bias that makes up for it, from the tokens themselves, in the whole model with zeros."""
    config, tensors = canonical(name)
    seen, sizes = read_by(ours(name), CALIBRATION), config.per_layer_config[0]
    groups, changed, biases = sizes.num_key_value_heads, dict(tensors), dict[tuple[int, str], Tensor]()
    for block, kind in seen:
        weight, x = weight_of(tensors, block, kind), seen[block, kind]
        score = fluctuation(weight, x, metric)
        lost = np.zeros(len(score), dtype=bool)
        if kind == "ffn":
            lost[list(smallest(score.tolist(), 32))] = True
        else:
            means = [float(score[columns_of_group(sizes, number)].mean()) for number in range(groups)]
            (worst,) = smallest(means, 1)
            lost[columns_of_group(sizes, worst)] = True
        key = f"model.layers.{block}.{READERS[kind]}"
        changed[f"{key}.weight"] = torch.from_numpy(np.where(lost, 0.0, weight)).float()
        biases[block, kind] = torch.from_numpy(weight[:, lost] @ x.mean(0)[lost])
    result = compress(
        folder(name), tmp_path / "out", method="flap", options={"metric": metric},
        allocate={"ffn": 48, "heads": groups - 1},
    )  # fmt: skip
    want = loaded(config, changed)
    hooks = [
        getattr(getattr(want.model.layers[block], READERS[kind].partition(".")[0]), READERS[kind].partition(".")[2])
        .register_forward_hook(lambda _m, _x, y, bias=bias: y + bias.float())
        for (block, kind), bias in biases.items()
    ]  # fmt: skip
    assert error(logits(result.load(), HELD_OUT), logits(want, HELD_OUT)) <= EXACT
    for hook in hooks:
        hook.remove()
    assert error(logits(result.load(), HELD_OUT), logits(want, HELD_OUT)) > 1e-3, "the bias must matter"


@pytest.mark.parametrize("name", ["opt-tied", "gpt_neox-sequential", "llama"])
@pytest.mark.parametrize("kind", READERS)
def test_the_mean_of_the_output_is_restored(name: str, kind: str, tmp_path: Path) -> None:
    """In the first block, where the projection that is cut reads what it always read."""
    whole, wide = ours(name), {"ffn": 24, "heads": 3}[kind]
    result = compress(folder(name), tmp_path / "out", method="flap", options={"spaces": kind}, allocate={kind: wide})
    model, owner, linear = result.load(), *READERS[kind].split(".")
    cut = loaded(*lowered(model.config.to_dict(), stored(model))) if result.stock else model
    outputs: list[np.ndarray] = []
    for one in (whole, cut):
        made = getattr(getattr(one.model.layers[0], owner), linear)
        with torch.no_grad():
            outputs.append(made(torch.from_numpy(read_by(one, CALIBRATION)[0, kind]).float()).numpy())
    assert np.abs(outputs[0].mean(0) - outputs[1].mean(0)).max() <= EXACT * np.abs(outputs[0]).max()
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01 * np.abs(outputs[0]).max()


def test_neurons_that_never_change_go_without_loss(tmp_path: Path) -> None:
    """Nothing but a bias feeds them: their mean is all that they say."""
    model = built(TINY["opt-tied"])
    for block in model.model.decoder.layers:
        block.fc1.weight.data[10:42] = 0.0
        block.fc1.bias.data[10:42] = 1.5
    want = logits(model, HELD_OUT)
    for compensate, lossless in ((True, True), (False, False)):
        result = compress(
            model, tmp_path / str(compensate), method="flap", allocate={"ffn": 48}, options={"compensate": compensate}
        )
        assert (error(logits(result.load(), HELD_OUT), want) <= EXACT) is lossless


def test_one_threshold_over_all_blocks(tmp_path: Path) -> None:
    """Scores of every projection have mean 0 and deviation 1; the lowest of all go, wherever they are."""
    name = "llama"
    tensors, seen = canonical(name)[1], read_by(ours(name), CALIBRATION)
    scores: dict[tuple[int, int], float] = {}
    for block in range(3):
        score = fluctuation(weight_of(tensors, block, "ffn"), seen[block, "ffn"], "wifv")
        scores |= {(block, number): one for number, one in enumerate((score - score.mean()) / score.std())}
    options = {"spaces": "ffn", "compensate": False}
    result = compress(folder(name), tmp_path / "out", method="flap", keep=0.8, options=options, multiple_of=1)
    gone = {block: 80 - result.plan.widths[f"{block}.ffn"] for block in range(3)}
    ranked = sorted(scores, key=lambda key: scores[key])[: sum(gone.values())]
    assert len(set(gone.values())) > 1
    for block, count in gone.items():
        assert abs(count - sum(one == block for one, _ in ranked)) <= 1


def test_groups_are_the_mean_of_their_columns_squared_or_not() -> None:
    from microtome.inner import View, spaces_of
    from microtome.methods.flap import FLAP
    from microtome.space import Kind
    from microtome.stats import Moment, Stat

    config, tensors = canonical("llama-gqa-llama3-tied")
    sizes, x = config.per_layer_config[0], read_by(ours("llama-gqa-llama3-tied"), CALIBRATION)[0, "heads"]
    moment, names = Moment(x.shape[1]), {key.removeprefix("model.layers.0."): value for key, value in tensors.items()}
    moment.add(torch.from_numpy(x))
    view = View(config, 0, ("attn",), names, spaces_of(config, 0, [Kind.HEADS]), {Stat.HEADS: moment}, {}, {})
    score = fluctuation(weight_of(tensors, 0, "heads"), x, "wifv")
    for squared in (False, True):
        own = score**2 if squared else score
        own = (own - own.mean()) / own.std()
        want = [own[columns_of_group(sizes, number)].mean() for number in range(2)]
        assert FLAP(squared=squared).scores(view)["0.heads"] == pytest.approx(want, rel=1e-4)


def test_biases_are_given_to_a_decoder_without(tmp_path: Path) -> None:
    with_bias = compress(folder("llama"), tmp_path / "with", method="flap", keep=0.8, allocate="uniform")
    without = compress(
        folder("llama"),
        tmp_path / "without",
        method="flap",
        keep=0.8,
        allocate="uniform",
        options={"compensate": False},
    )
    assert without.stock
    assert not with_bias.stock
    assert with_bias.load().model.layers[0].mlp.down_proj.bias is not None
