"""The best recipe at keep 0.75 of stories-3m, by the number of windows it is calibrated on, and then healed.

    python benchmarks/mark.py [--samples 256 --samples 512] [--heal 500]

Windows of 256 tokens drawn from the whole training text; all evaluation windows, fp32. `--heal` trains each result for
so many steps on that text. Writes benchmarks/mark.json, and adds to what is there.
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

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
MODEL = SHARED / "models" / "stories-3m"
TRAIN = SHARED / "data" / "tinystories" / "train.txt"
EVAL = SHARED / "data" / "tokens" / "stories-3m.eval.pt"
LENGTH = 256


def run(samples: int, steps: int, folder: Path) -> dict[str, object]:
    """One row of the table."""
    start = time.process_time()
    found = microtome.compress(
        MODEL, recipe=HERE.parent / "recipes" / "best.yaml", data=TRAIN, samples=samples, length=LENGTH,
        out=folder / "cut", eval_data=EVAL,
    )  # fmt: skip
    seconds = time.process_time() - start
    assert found.perplexity_before is not None
    assert found.perplexity_after is not None
    row: dict[str, object] = {
        "samples": samples,
        "keep": found.after.decoder / found.before.decoder,
        "dense": found.perplexity_before.value,
        "perplexity": found.perplexity_after.value,
        "protocol": found.perplexity_after.protocol(),
        "cpu_seconds": seconds,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
    }
    if steps:
        print(json.dumps(row, indent=1), flush=True)
        start = time.process_time()
        healed = microtome.heal(
            folder / "cut", data=TRAIN, length=LENGTH, teacher=MODEL, options={"steps": steps}, out=folder / "healed",
            eval_data=EVAL,
        )  # fmt: skip
        assert healed.after is not None
        row |= {"healed": healed.after.value, "steps": steps, "heal_seconds": time.process_time() - start}
    return row


def main() -> None:
    """Add the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", action="append", type=int, help="windows to calibrate on; repeatable")
    parser.add_argument("--heal", type=int, default=0, metavar="STEPS")
    said, place = parser.parse_args(), HERE / "mark.json"
    rows = json.loads(place.read_text()) if place.exists() else []
    for samples in said.samples or [512]:
        with tempfile.TemporaryDirectory() as folder:
            found = run(samples, said.heal, Path(folder))
        rows = [row for row in rows if row["samples"] != samples] + [found]
        print(json.dumps(found, indent=1), flush=True)
        place.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
