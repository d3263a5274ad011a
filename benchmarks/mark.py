"""The best recipe without gradients at keep 0.75 of stories-3m, by the stretch of text that it is calibrated on.

    python benchmarks/mark.py [--windows 64:320 --windows 512:768]

Windows of 256 tokens, numbered from the start of the training text; all evaluation windows, fp32. Stretches of that
text differ (LOG, aa): each row tells the uncut model's perplexity on its own calibration windows. Writes
benchmarks/mark.json, and adds to what is there.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import microtome
from microtome.data import Tokens
from microtome.evaluate import perplexity

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
MODEL = SHARED / "models" / "stories-3m"
LENGTH = 256


def windows(first: int, last: int) -> torch.Tensor:
    """Token ids [N, T] of some windows of the training text."""
    text = (SHARED / "data" / "tinystories" / "train.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(MODEL)(text[: 8 * last * LENGTH])["input_ids"]
    return torch.tensor(ids[first * LENGTH : last * LENGTH]).view(-1, LENGTH)


def run(first: int, last: int) -> dict[str, object]:
    """One row of the table."""
    ids, start = windows(first, last), time.process_time()
    found = microtome.compress(
        MODEL, recipe=HERE.parent / "recipes" / "best.yaml", data=ids, samples=None,
        eval_data=SHARED / "data" / "tokens" / "stories-3m.eval.pt",
    )  # fmt: skip
    seconds = time.process_time() - start
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert found.perplexity_before is not None
    assert found.perplexity_after is not None
    return {
        "windows": f"{first}:{last}",
        "dense_there": perplexity(dense, Tokens(ids, "train.txt", "")).value,
        "keep": found.after.decoder / found.before.decoder,
        "dense": found.perplexity_before.value,
        "perplexity": found.perplexity_after.value,
        "protocol": found.perplexity_after.protocol(),
        "cpu_seconds": seconds,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
    }


def main() -> None:
    """Add the stretches that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", action="append", help="FIRST:LAST; repeatable")
    place = HERE / "mark.json"
    rows = json.loads(place.read_text()) if place.exists() else []
    for stretch in parser.parse_args().windows or ["64:320"]:
        first, last = (int(one) for one in stretch.split(":"))
        rows = [row for row in rows if row["windows"] != stretch] + [run(first, last)]
        print(json.dumps(rows[-1], indent=1), flush=True)
        place.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
