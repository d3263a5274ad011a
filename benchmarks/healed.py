"""Healing of codes: how much do scales alone take back, and does it matter whether weights are healed before?

    python benchmarks/healed.py         # two models in ../shared/models; rows that are there stay

Every model is cut to 0.75 of its blocks (`slicegpt` to 0.9, then neurons by `fasp`), with or without two zeros of every
four weights (`sparsegpt`), rounded to 4 bits with a scale for each row (`gptq`), and healed towards the original: before
the zeros and codes, when all weights learn (`full`), between them, when zeros stay, behind them, when scales, norms and
biases do, or twice. A healing has 200 or 300 steps (`healing` of a row) and the rate that is the default. Calibrated on
64 windows, healed on all windows of calibration, measured in fp32 on all evaluation windows of ../shared/data/tokens.
Writes benchmarks/healed.json.
"""

import json
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import microtome
from microtome import running
from microtome_cli import hold_heap

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
MODELS: dict[str, dict[str, Any]] = {  # and how long each is healed
    "shakespeare-opt-0.8m": {"steps": 300, "batch": 8},
    "stories-3m": {"steps": 200, "batch": 4},
}
CUT: list[Any] = [{"slicegpt": {"keep": 0.9}}, {"fasp": {"keep": 0.75, "options": {"spaces": "ffn"}}}]
ZEROS: list[Any] = [{"sparsegpt": {"options": {"pattern": "2:4"}}}]
CODES: list[Any] = [{"gptq": {"options": {"bits": 4}}}]
LENGTH = 128  # of the windows to heal on, or what the model has learned


def ids(model: str, what: str) -> torch.Tensor:
    """Token ids of calibration or evaluation."""
    return torch.load(SHARED / "data" / "tokens" / f"{model}.{what}.pt")


def compressed(model: str, source: Path, out: Path, steps: list[Any]) -> Path:
    """Some steps over a folder."""
    recipe = {"multiple_of": 8, "steps": steps}
    return microtome.compress(source, recipe=recipe, data=ids(model, "calib")[:64], out=out, measure=False).folder


def healed(model: str, source: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """A folder healed towards the original, and how that went."""
    windows = ids(model, "calib")
    done = microtome.heal(
        source, data=windows, out=out, teacher=SHARED / "models" / model, length=min(LENGTH, windows.shape[1]),
        measure=False, options={**MODELS[model], "patience": 10},
    )  # fmt: skip
    cure = done.cure
    return out, {
        "trained": cure.trained,
        **MODELS[model],
        "steps": cure.history.steps,
        "seconds": round(cure.history.seconds),
    }


def rows(model: str, place: Path) -> Iterator[dict[str, Any]]:
    """Every order of one model."""

    def row(order: str, folder: Path, last: dict[str, Any] | None = None) -> dict[str, Any]:
        (found,) = running.evaluate(folder, str(SHARED / "data" / "tokens" / f"{model}.eval.pt")).values()
        said = {"model": model, "order": order, "perplexity": found.value, "protocol": found.protocol()}
        print(order, found.value, flush=True)
        return said | ({} if last is None else {"healing": last})

    yield row("as it is", SHARED / "models" / model)
    plain = compressed(model, SHARED / "models" / model, place / f"{model}-cut", CUT)
    yield row("cut", plain)
    mended, went = healed(model, plain, place / f"{model}-cut-heal")
    yield row("cut > heal", mended, went)
    for zeros, name in (([], ""), (ZEROS, " > 2:4")):
        for before, source in (("cut", plain), ("cut > heal", mended)):
            order = f"{before}{name} > 4 bits"
            coded = compressed(model, source, place / f"{model}-{order}".replace(" > ", "-"), [*zeros, *CODES])
            yield row(order, coded)
            again, went = healed(model, coded, coded.with_name(f"{coded.name}-heal"))
            yield row(f"{order} > heal", again, went)
    sparse = compressed(model, plain, place / f"{model}-sparse", ZEROS)
    mended, went = healed(model, sparse, place / f"{model}-sparse-heal")  # zeros stay
    yield row("cut > 2:4 > heal", mended, went)
    yield row("cut > 2:4 > heal > 4 bits", compressed(model, mended, place / f"{model}-sparse-heal-coded", CODES))


def write(found: list[dict[str, Any]]) -> None:
    """What is beside this file."""
    made = {
        "command": "python benchmarks/healed.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "protocol": " ".join((__doc__ or "").strip().split("\n\n")[-1].split()),
        "rows": found,
    }
    (HERE / "healed.json").write_text(json.dumps(made, indent=1) + "\n")


def main() -> None:
    """Measure the models that are not there yet."""
    hold_heap()
    place = HERE / "healed.json"
    found = json.loads(place.read_text())["rows"] if place.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            if any(one["model"] == model for one in found):
                continue
            found += list(rows(model, Path(folder)))
            write(found)


if __name__ == "__main__":
    main()
