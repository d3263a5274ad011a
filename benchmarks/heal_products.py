"""Healing with products in bf16 and in fp32, side by side: what `healing.pays` decides by the processor.

    OMP_NUM_THREADS=1 python benchmarks/heal_products.py [--steps 20] [--repeats 3]

stories-3m cut by modegpt to 0.8, full weights, windows of 256 tokens; CPU seconds of the whole call, the least of the
repeats, in turn. Writes benchmarks/heal_products.json.
"""

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

import microtome
from microtome import healing
from microtome_cli import hold_heap

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
MODEL = SHARED / "models" / "stories-3m"


def healed(folder: Path, steps: int, *, short: bool) -> tuple[float, float]:
    """CPU seconds, and the held-out loss at the end."""
    healing.pays = lambda _device: short
    start = time.process_time()
    done = microtome.heal(
        folder / "cut", data=SHARED / "data" / "tinystories" / "train.txt", length=256, teacher=MODEL,
        options={"steps": steps}, out=folder / "healed", measure=False, overwrite=True,
    )  # fmt: skip
    return time.process_time() - start, done.cure.history.losses[-1][1]


def main() -> None:
    """Both kinds of products, in turn."""
    hold_heap()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    said, pays = parser.parse_args(), healing.pays(torch.device("cpu"))
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ids = SHARED / "data" / "tokens" / "stories-3m.calib.pt"
        microtome.compress(MODEL, method="modegpt", keep=0.8, data=ids, samples=64, measure=False, out=folder / "cut")
        for _ in range(said.repeats):
            for name, short in (("bf16", True), ("fp32", False)):
                seconds, loss = healed(folder, said.steps, short=short)
                least = min(seconds, rows.get(name, {}).get("cpu_seconds", seconds))
                rows[name] = {"cpu_seconds": least, "loss": loss}
                print(name, rows[name], flush=True)
    known = {name: bool(torch.cpu.get_capabilities().get(name)) for name in ("amx_bf16", "avx512_bf16")}
    made = {
        "steps": said.steps,
        "threads": torch.get_num_threads(),
        "chosen": "bf16" if pays else "fp32",
        "ratio": rows["fp32"]["cpu_seconds"] / rows["bf16"]["cpu_seconds"],
        **rows,
        "machine": {"processor": platform.machine(), **known},
        "versions": {name: version(name) for name in ("microtome", "torch")},
    }
    (HERE / "heal_products.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
