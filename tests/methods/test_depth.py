"""Depth: influences written out, blocks that do nothing go first, and what is left is the decoder without them."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from acceptance import KINDS_OF_MODELS, behaves, keeps_every_byte
from folders import raises
from models import TINY, built, canonical, error, logits, ours, stepwise, stock
from tinies import CALIBRATION, HELD_OUT, compress, folder

from microtome import arch, planner, survey
from microtome.errors import BadInput, BadPlan, UnsupportedModel
from microtome.source import open_source
from microtome.stats import INFLUENCES, Moment, Stat

EXACT = 1e-5
SEQUENTIAL = [name for name in KINDS_OF_MODELS if arch.lower(TINY[name]).parallel == "none"]


def influences(name: str) -> tuple[list[float], dict[tuple[int, str], float]]:
    """1 minus the mean cosine over tokens, of blocks and of halves, by the decoder's own streams."""
    blocks, halves = list[float](), dict[tuple[int, str], float]()
    streams: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _m, x: streams.append(x[0].double()))
        for block in ours(name).model.layers
    ] + [ours(name).model.layers[-1].register_forward_hook(lambda _m, _x, y: streams.append(y.double()))]
    logits(ours(name), CALIBRATION)
    for hook in hooks:
        hook.remove()
    for number, (x, y) in enumerate(pairwise(streams)):
        blocks.append(turned(x, y))
        if canonical(name)[0].parallel == "none":
            mid = x + attended(name, number, x)
            halves |= {(number, "attn"): turned(x, mid), (number, "mlp"): turned(mid, y)}
    return blocks, halves


@torch.no_grad()
def attended(name: str, number: int, x: torch.Tensor) -> torch.Tensor:
    """What attention adds: the block without its other half, minus what came in."""
    model, seen = copy.deepcopy(ours(name)), list[torch.Tensor]()
    model.model.layers[number].mlp = None
    model.model.layers[number].register_forward_hook(lambda _m, _x, y: seen.append(y))
    logits(model, CALIBRATION)
    return seen[0].double() - x


def turned(x: torch.Tensor, y: torch.Tensor) -> float:
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return float(1.0 - cosine.mean())


def trimmed(name: str, left: list[int]) -> Any:
    """Our decoder with only some of its blocks."""
    model = copy.deepcopy(ours(name))
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in left)
    return model


def test_keep_1_leaves_every_byte(tmp_path: Path) -> None:
    keeps_every_byte("depth", tmp_path / "out")


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_the_block_that_turns_least_is_left_out(name: str, tmp_path: Path) -> None:
    result = behaves("depth", name, tmp_path, keep=0.7)
    scores, _ = influences(name)
    gone = scores.index(min(scores))
    left = [number for number in range(3) if number != gone]
    assert [number for number in range(3) if result.plan.widths[str(number)]] == left
    assert result.stock
    have = logits(result.load(), HELD_OUT)
    assert error(have, logits(trimmed(name, left), HELD_OUT)) <= EXACT
    assert error(stepwise(result.load(), HELD_OUT, [7, *[1] * 17]), have) <= EXACT


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_halves(name: str, tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", keep=0.75, method="depth", options={"unit": "half"})
    _, scores = influences(name)
    numbers = {
        (block, half): sum(
            value.numel()
            for key, value in canonical(name)[1].items()
            if key.startswith(f"model.layers.{block}.{module}.")
        )
        for block in range(3)
        for half, module in (("attn", "self_attn"), ("mlp", "mlp"))
    }
    gone = {tuple(dial.split(".")) for dial, wide in result.plan.widths.items() if not wide}
    ranked = sorted(scores, key=lambda key: scores[key] / numbers[key])
    assert gone == {(str(block), half) for block, half in ranked[: len(gone)]}
    assert gone
    want = copy.deepcopy(ours(name))
    for block, half in gone:
        setattr(want.model.layers[int(block)], {"attn": "self_attn", "mlp": "mlp"}[half], None)
    assert not result.stock
    assert error(logits(result.load(), HELD_OUT), logits(want, HELD_OUT)) <= EXACT
    whole = logits(result.load(), HELD_OUT)
    assert error(stepwise(result.load(), HELD_OUT, [7, *[1] * 17]), whole) <= EXACT


def idle(block: int, *halves: str) -> Any:
    """A Llama of which some halves add nothing."""
    model = built(TINY["llama"])
    for half in halves:
        linear = {"attn": model.model.layers[block].self_attn.o_proj, "mlp": model.model.layers[block].mlp.down_proj}
        linear[half].weight.data.zero_()
    return model


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_that_does_nothing_goes_without_loss(block: int, tmp_path: Path) -> None:
    model = idle(block, "attn", "mlp")
    result = compress(model, tmp_path / "out", keep=0.67, method="depth")
    assert result.plan.widths == {str(number): int(number != block) for number in range(3)}
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= EXACT
    assert result.load().config.num_hidden_layers == 2


@pytest.mark.parametrize("half", ["attn", "mlp"])
def test_a_half_that_does_nothing_goes_without_loss(half: str, tmp_path: Path) -> None:
    model = idle(1, half)
    result = compress(model, tmp_path / "out", keep=0.85, method="depth", options={"unit": "half"})
    assert [dial for dial, wide in result.plan.widths.items() if not wide] == [f"1.{half}"]
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= EXACT


def test_blocks_at_the_ends_are_protected(tmp_path: Path) -> None:
    model = idle(0, "attn", "mlp")
    result = compress(model, tmp_path / "out", keep=0.67, method="depth", options={"protect_first": 1})
    assert result.plan.widths in ({"1": 0, "2": 1}, {"1": 1, "2": 0})
    one = {"protect_first": "1", "protect_last": 1}
    assert compress(model, tmp_path / "one", keep=0.67, method="depth", options=one).plan.widths == {"1": 0}
    with raises(BadPlan, r"cannot be reached: with every width at its narrowest"):
        compress(model, tmp_path / "no", keep=0.4, method="depth", options=one)
    with raises(BadInput, r"protect_first=2 and protect_last=1 of depth leave none of 3 blocks to cut"):
        compress(model, tmp_path / "no", keep=0.6, method="depth", options={"protect_first": 2, "protect_last": 1})
    with raises(BadInput, r"protect_first=-1 and protect_last=0 of depth are numbers of blocks"):
        compress(model, tmp_path / "no", keep=0.6, method="depth", options={"protect_first": -1})


def test_a_table_names_the_blocks(tmp_path: Path) -> None:
    result = compress(folder("llama"), tmp_path / "out", method="depth", allocate={"1": 0})
    assert error(logits(result.load(), HELD_OUT), logits(trimmed("llama", [0, 2]), HELD_OUT)) <= EXACT


def test_what_cannot_be_dropped_is_said(tmp_path: Path) -> None:
    with raises(UnsupportedModel, r"the halves of this phi read the stream side by side: depth takes unit=block"):
        compress(folder("phi"), tmp_path / "out", keep=0.7, method="depth", options={"unit": "half"})
    for allocation in ("uniform", "influence", "redundancy"):
        with raises(BadInput, rf"the allocation {allocation} gives every width a share, and depth can only drop"):
            compress(folder("llama"), tmp_path / "out", keep=0.7, method="depth", allocate=allocation)
    assert not (tmp_path / "out").exists()


def test_no_block_left_is_refused(tmp_path: Path) -> None:
    with raises(BadPlan, r"no block is left"):
        compress(folder("llama"), tmp_path / "out", keep=0.05, method="depth")
    with raises(BadPlan, r"no block is left"):
        compress(folder("llama"), tmp_path / "out", method="depth", allocate={"block": 0})


def test_a_plan_is_replayed(tmp_path: Path) -> None:
    first = compress(folder("llama"), tmp_path / "first", keep=0.67, method="depth")
    again = compress(folder("llama"), tmp_path / "again", plan=first.plan, data=CALIBRATION)
    stored = [(one.folder / "model.safetensors").read_bytes() for one in (first, again)]
    assert stored[0] == stored[1]
    assert error(logits(again.load(), HELD_OUT), logits(stock("llama"), HELD_OUT)) > 0.01


def test_blocks_and_halves_are_measured_together_as_alone() -> None:
    every = frozenset({*INFLUENCES, Stat.NEURONS, Stat.HEADS})
    asked: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    with open_source(folder("llama")) as source:
        opened = planner.opened(source)
        together = survey.survey(opened, CALIBRATION, every, **asked).found
        alone = {stat: survey.survey(opened, CALIBRATION, frozenset({stat}), **asked).found for stat in every}
    for (block, stat), value in together.items():
        other = alone[stat][block, stat]
        if isinstance(value, Moment):
            assert torch.equal(value.sum_NN, other.sum_NN)
        else:
            assert value.mean == other.mean
    assert len(together) == 3 * len(every)
