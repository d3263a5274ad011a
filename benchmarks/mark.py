"""The best recipe at keep 0.75 of stories-3m, by the stretch of text that it is calibrated on, and then healed.

    python benchmarks/mark.py [--windows 64:320 --windows 512:768] [--heal 500]

Windows of 256 tokens, numbered from the start of the training text; all evaluation windows, fp32. Stretches of that
text differ (LOG, aa): each row tells the uncut model's perplexity on its own calibration windows. `--heal` trains each
result for so many steps on the whole training text. Writes benchmarks/mark.json, and adds to what is there.
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
from microtome.data import Tokens
from microtome.evaluate import perplexity

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
MODEL = SHARED / "models" / "stories-3m"
EVAL = SHARED / "data" / "tokens" / "stories-3m.eval.pt"
LENGTH = 256


def windows(first: int, last: int) -> torch.Tensor:
    """Token ids [N, T] of some windows of the training text, every story behind the token that begins a text."""
    text = (SHARED / "data" / "tinystories" / "train.txt").read_text(encoding="utf-8")
    tokenizer, ids = AutoTokenizer.from_pretrained(MODEL), list[int]()
    for story in text.split("<|endoftext|>"):
        ids += [tokenizer.bos_token_id, *tokenizer(story.strip(), add_special_tokens=False)["input_ids"]]
        if len(ids) >= last * LENGTH:
            break
    return torch.tensor(ids[first * LENGTH : last * LENGTH]).view(-1, LENGTH)


def run(first: int, last: int, steps: int, folder: Path) -> dict[str, object]:
    """One row of the table."""
    ids, start = windows(first, last), time.process_time()
    found = microtome.compress(
        MODEL, recipe=HERE.parent / "recipes" / "best.yaml", data=ids, samples=None, out=folder / "cut", eval_data=EVAL
    )
    seconds = time.process_time() - start
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert found.perplexity_before is not None
    assert found.perplexity_after is not None
    row: dict[str, object] = {
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
    if steps:
        start = time.process_time()
        healed = microtome.heal(
            folder / "cut", data=SHARED / "data" / "tinystories" / "train.txt", length=LENGTH, teacher=MODEL,
            options={"steps": steps}, out=folder / "healed", eval_data=EVAL,
        )  # fmt: skip
        assert healed.after is not None
        row |= {"healed": healed.after.value, "steps": steps, "heal_seconds": time.process_time() - start}
    return row


def main() -> None:
    """Add the stretches that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", action="append", help="FIRST:LAST; repeatable")
    parser.add_argument("--heal", type=int, default=0, metavar="STEPS")
    said, place = parser.parse_args(), HERE / "mark.json"
    rows = json.loads(place.read_text()) if place.exists() else []
    for stretch in said.windows or ["64:320"]:
        first, last = (int(one) for one in stretch.split(":"))
        with tempfile.TemporaryDirectory() as folder:
            found = run(first, last, said.heal, Path(folder))
        rows = [row for row in rows if row["windows"] != stretch] + [found]
        print(json.dumps(rows[-1], indent=1), flush=True)
        place.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
