"""The best recipe at keep 0.75 of stories-3m, by the windows that it is calibrated on, and then healed.

    python benchmarks/mark.py [--windows 512 --windows 64:512] [--heal 600]

Windows of 256 tokens of the training text: so many drawn from all of it, or those of a stretch. Its stories are of two
kinds (LOG, aa), and those of the evaluation of one, which is that of windows 64 to 511; each row tells the uncut model's
perplexity on its calibration windows. All evaluation windows, fp32. `--heal` trains each result for so many steps on the
whole training text. Writes benchmarks/mark.json, and adds to what is there.
"""

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import microtome
from microtome.data import Tokens, calibration, evaluation
from microtome.evaluate import perplexity
from microtome_cli import hold_heap

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
MODEL = SHARED / "models" / "stories-3m"
TRAIN = SHARED / "data" / "tinystories" / "train.txt"
EVAL = SHARED / "data" / "tokens" / "stories-3m.eval.pt"
LENGTH = 256


def windows(said: str) -> Tokens:
    """The calibration windows that are asked for."""
    words = AutoTokenizer.from_pretrained(MODEL)
    if ":" not in said:
        return calibration(TRAIN, words, samples=int(said), length=LENGTH)
    first, last = (int(one) for one in said.split(":"))
    return Tokens(evaluation(TRAIN, words, length=LENGTH, limit=last).ids[first:], TRAIN.name, "")


def run(said: str, steps: int, folder: Path) -> dict[str, object]:
    """One row of the table."""
    drawn, start = windows(said), time.process_time()
    found = microtome.compress(
        MODEL, recipe=HERE.parent / "recipes" / "best.yaml", data=drawn.ids, samples=None, out=folder / "cut",
        eval_data=EVAL,
    )  # fmt: skip
    seconds = time.process_time() - start
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert found.perplexity_before is not None
    assert found.perplexity_after is not None
    row: dict[str, object] = {
        "windows": said,
        "dense_there": perplexity(dense, drawn).value,
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
    hold_heap()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", action="append", metavar="N|FIRST:LAST", help="repeatable")
    parser.add_argument("--heal", type=int, default=0, metavar="STEPS")
    said, place = parser.parse_args(), HERE / "mark.json"
    rows = json.loads(place.read_text()) if place.exists() else []
    for one in said.windows or ["512", "64:512"]:
        with tempfile.TemporaryDirectory() as folder:
            found = run(one, said.heal, Path(folder))
        rows = [row for row in rows if row["windows"] != one] + [found]
        print(json.dumps(found, indent=1), flush=True)
        place.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
