"""LLM Surgeon by one Kronecker product and by two: does a nearer curvature choose better, and what does it take?

    python benchmarks/surgeon_rank.py   # stories-3m in ../shared/models; rows that are there stay

Perplexity in fp32 on all evaluation windows of ../shared/data/tokens, nothing restored or healed; calibrated on 32
windows, `--multiple-of 2` where shapes change. Seconds are of the curvature and of all the rest, on a machine that had
other work. Writes benchmarks/surgeon_rank.json.
"""

import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import microtome
from microtome import running
from microtome_cli import hold_heap

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
MODEL = "stories-3m"
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("surgeon", {"keep": 0.8}),
    ("surgeon", {"keep": 0.8, "options": {"damp_a": 0.1, "damp_g": 0.1}}),
    ("surgeon_weights", {"options": {"density": 0.5, "update": "none", "scope": "model"}}),
)
WINDOWS = 32  # of 256 tokens


def measured(method: str, chosen: dict[str, Any], rank: int, out: Path) -> dict[str, Any]:
    """One run."""
    options, ids = {**chosen.get("options", {}), "rank": rank}, SHARED / "data" / "tokens"
    multiple = {"multiple_of": 2} if "keep" in chosen else {}
    start = time.perf_counter()
    done = microtome.compress(
        SHARED / "models" / MODEL, method=method, data=torch.load(ids / f"{MODEL}.calib.pt")[:WINDOWS], out=out,
        measure=False, **multiple, **{**chosen, "options": options},
    )  # fmt: skip
    whole = time.perf_counter() - start
    (found,) = running.evaluate(out, str(ids / f"{MODEL}.eval.pt")).values()
    bend = done.seconds["curvature"]
    return {
        "method": method, "chosen": chosen, "rank": rank, "perplexity": found.value, "protocol": found.protocol(),
        "stored": done.after.decoder, "seconds": {"curvature": round(bend, 1), "rest": round(whole - bend, 1)},
    }  # fmt: skip


def main() -> None:
    """Measure what is not there yet."""
    hold_heap()
    place = HERE / "surgeon_rank.json"
    found: list[dict[str, Any]] = json.loads(place.read_text())["rows"] if place.exists() else []
    there = [(one["method"], one["chosen"], one["rank"]) for one in found]
    with tempfile.TemporaryDirectory() as folder:
        for number, (method, chosen) in enumerate(RUNS):
            for rank in (1, 2):
                if (method, chosen, rank) in there:
                    continue
                found.append(measured(method, chosen, rank, Path(folder) / f"{number}-{rank}"))
                print(found[-1], flush=True)
                made = {
                    "command": "python benchmarks/surgeon_rank.py",
                    "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                    "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
                    "model": MODEL,
                    "rows": found,
                }
                place.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
