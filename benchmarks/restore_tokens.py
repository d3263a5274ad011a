"""How many tokens restoration needs: one cut, restored on more and more windows of the text that a model learned from.

    python benchmarks/restore_tokens.py [--windows 256] [MODEL ...]

fasp at keep 0.8, calibrated on all windows drawn; only restoration sees fewer. All evaluation windows, fp32. With few
tokens the ridge and "leave it as it is", chosen on an eighth of the windows, must keep it from doing harm: `worse` says
where it does all the same. Writes benchmarks/restore_tokens.json, and adds to what is there.
"""

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path

import microtome
from microtome.kept import Kept
from microtome_cli import hold_heap

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
TEXTS = {
    "stories-260k": "tinystories/train.txt",
    "stories-3m": "tinystories/train.txt",
    "babyllama-0.9m": "tinystories/train.txt",
    "wiki-opt-6m": "wikitext2/wiki.train.tokens",
}
LENGTH = 256


def rows(model: str, most: int) -> list[dict[str, object]]:
    """The cut as it is, and restored on 2, 4, 8, ... windows."""
    counts = [2**power for power in range(1, most.bit_length())]
    found, cut = list[dict[str, object]](), math.inf
    with Kept() as kept:
        for count in (0, *counts):
            steps = ["fasp", *([{"restore": {"windows": count}}] if count else [])]
            made = microtome.compress(
                SHARED / "models" / model, recipe={"keep": 0.8, "multiple_of": 2, "steps": steps},
                data=SHARED / "data" / TEXTS[model], samples=most, length=LENGTH, kept=kept,
                eval_data=SHARED / "data" / "tokens" / f"{model}.eval.pt",
            )  # fmt: skip
            assert made.perplexity_before is not None
            assert made.perplexity_after is not None
            cut = cut if count else made.perplexity_after.value
            found.append({
                "model": model,
                "dense": made.perplexity_before.value,
                "windows": count,
                "tokens": count * LENGTH,
                "perplexity": made.perplexity_after.value,
                "worse": made.perplexity_after.value > cut,
                "protocol": made.perplexity_after.protocol(),
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Every model that is named, or all of them."""
    hold_heap()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--windows", type=int, default=256)
    said, place = parser.parse_args(), HERE / "restore_tokens.json"
    found = json.loads(place.read_text())["rows"] if place.exists() else []
    for model in said.models or TEXTS:
        found = [row for row in found if row["model"] != model] + rows(model, said.windows)
        held = {"versions": {name: version(name) for name in ("microtome", "torch")}, "rows": found}
        place.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
