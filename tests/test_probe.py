"""Probing: what is measured side by side is what one cut model at a time says, and budgets follow it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import raises
from models import TINY, built, logits, stock
from tinies import CALIBRATION, compress, folder

from microtome import forecast, inner, layout, methods, planner, probe, survey
from microtome.errors import BadInput
from microtome.source import open_source
from microtome.space import Kind

ASKED = {"method": "fasp", "options": {"inputs": "original"}}


def probed(
    name: str, **options: Any
) -> tuple[dict[str, inner.Dial], dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Dials, what each costs where it was measured, and the numbers that a unit stores."""
    method = methods.build("fasp", {"inputs": "original", **options})
    with open_source(folder(name)) as source:
        found = planner.opened(source)
        here = {"device": torch.device("cpu"), "dtype": torch.float32}
        statistics = survey.survey(found, CALIBRATION, method.needs, **here)
        dials = inner.dials(found.config, method.targets, 2)
        measured = probe.losses(found, method, dials, statistics, CALIBRATION, biased=False, **here)
        return dials, measured, probe.costs(found, dials, biased=False)


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied", "gpt_neox", "gemma2", "granite-tied"])
def test_losses_are_those_of_models_cut_one_width_at_a_time(name: str, tmp_path: Path) -> None:
    """The divergence of transformers' and the written models' own predictions."""
    dials, measured, costs = probed(name)
    assert set(measured) == set(dials)
    ids = CALIBRATION[: max(1, probe.TOKENS // CALIBRATION.shape[1])]
    want = torch.log_softmax(logits(stock(name), ids).double(), -1)
    whole = layout.count_blocks(planned(name))
    for dial in list(dials.values())[:: max(1, len(dials) // 3)]:
        part, loss = measured[dial.name][-1]  # the narrowest
        wide = round(part * dial.size)
        assert 0 < wide < dial.size
        made = compress(folder(name), tmp_path / dial.name, allocate={dial.name: wide}, multiple_of=2, **ASKED)
        have = torch.log_softmax(logits(made.load(), ids).double(), -1)
        divergence = float((want.exp() * (want - have)).sum(-1).mean())
        assert loss == pytest.approx(divergence, rel=0.02, abs=1e-5)
        assert (dial.size - wide) * costs[dial.name] == whole - made.after.decoder


def test_windows_come_from_all_over_the_text() -> None:
    ids = torch.arange(100)[:, None].expand(100, 256)
    assert probe.spread(ids)[:, 0].tolist() == [0, 12, 25, 37, 50, 62, 75, 87]  # 2,048 tokens
    assert torch.equal(probe.spread(CALIBRATION), CALIBRATION)


def planned(name: str) -> Any:
    with open_source(folder(name)) as source:
        return planner.opened(source).config


def test_curves_go_through_what_was_measured() -> None:
    found = dict(probe.curves({"0.ffn": [(0.5, 0.3), (0.25, 1.3)]}, {"0.ffn": [4.0, 1.0, 2.0, 3.0]})["0.ffn"])
    assert found[1.0] == 0.0
    assert found[0.75] == pytest.approx(0.1)  # the lowest of (1 + 2)
    assert found[0.5] == pytest.approx(0.3)
    assert found[0.25] == pytest.approx(1.3)
    assert min(found) == 0.25  # narrower than measured, nothing is known


def test_a_budget_is_spent_where_it_costs_nothing(tmp_path: Path) -> None:
    """Neurons of one block that nobody reads go first, and nothing else does."""
    model, place = built(TINY["llama"]), tmp_path / "source"
    model.state_dict()["model.layers.1.mlp.down_proj.weight"][:, 20:] = 0.0
    model.save_pretrained(place)
    made = compress(
        place, tmp_path / "out", method="fasp", options={"spaces": "ffn"}, keep=0.9, allocate="auto", multiple_of=2
    )
    widths = made.plan.widths
    assert widths["1.ffn"] < min(wide for dial, wide in widths.items() if dial != "1.ffn")


INNER = [name for name in methods.known() if not {Kind.RESIDUAL, Kind.WEIGHTS} & methods.build(name, {}).targets]


@pytest.mark.parametrize("name", [name for name in INNER if name != "depth"])
def test_every_method_can_be_probed(name: str, tmp_path: Path) -> None:
    """Sizes are met, and the widths are those of a plan with the same text."""
    asked: dict[str, Any] = {"method": name, "keep": 0.8, "allocate": "auto", "multiple_of": 2}
    made = compress(folder("llama-gqa-llama3-tied"), tmp_path / "out", **asked)
    assert made.after.ratio("decoder", made.before) == pytest.approx(0.8, abs=0.04)
    dry = forecast.preview(folder("llama-gqa-llama3-tied"), data=CALIBRATION, **asked)
    assert dry.widths == made.plan.widths
    assert torch.isfinite(logits(made.load(), CALIBRATION)).all()


def test_what_is_dropped_whole_has_no_price_by_the_part(tmp_path: Path) -> None:
    with raises(BadInput, "depth can only drop what it cuts whole: give --allocate global"):
        compress(folder("llama"), tmp_path / "out", method="depth", keep=0.8, allocate="auto")
