"""What a cut costs beside one plain forward pass, all measured in one run on a random Llama of 111 M parameters.

    python benchmarks/speed.py [--threads 2] [--repeats 3]

Width 1024, 8 blocks, 32 rows of 512 tokens, fp32. The forward pass is transformers' own, head included, on the same
rows in the same batches; eigen-decompositions are timed by themselves and subtracted. Ratios are what counts: the
machine may be busy. Writes benchmarks/speed.json.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from random_llama import VOCABULARY, random_llama
from transformers import AutoModelForCausalLM

import microtome
from microtome.calibrate import BATCH_TOKENS
from microtome.linalg import eigh_descending
from microtome_cli import hold_heap

ROWS, LENGTH = 32, 512
VARIANTS: dict[str, dict[str, Any]] = {
    "global (survey and cut)": {"options": {}, "decompositions": 1},
    "global, pooled sums": {"options": {"readers": "transposed"}, "decompositions": 1},
    "junction (one pass)": {"options": {"basis": "junction"}, "decompositions": 17},
}


def forward(folder: Path, ids: torch.Tensor) -> float:
    """Process seconds of one plain pass over all rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    start = time.process_time()
    with torch.inference_mode():
        for rows in ids.split(max(1, BATCH_TOKENS // LENGTH)):
            model(rows, use_cache=False)
    return time.process_time() - start


def decomposition(size: int) -> float:
    """Process seconds of one symmetric eigen-decomposition in fp64."""
    x = torch.randn(4 * size, size, dtype=torch.float64)
    start = time.process_time()
    eigh_descending(x.T @ x, "a random moment")
    return time.process_time() - start


def compression(folder: Path, ids: torch.Tensor, options: dict[str, Any]) -> float:
    """Process seconds from opening the folder to the written result, nothing measured."""
    with tempfile.TemporaryDirectory() as out:
        start = time.process_time()
        microtome.compress(
            folder, keep=0.75, data=ids, samples=None, options=options, measure=False, out=Path(out) / "out"
        )
        return time.process_time() - start


def main() -> None:
    """Interleave everything, so that a busy minute hits all alike."""
    hold_heap()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    seconds: dict[str, list[float]] = {name: [] for name in ("forward", "decomposition", *VARIANTS)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = random_llama()
        parameters = sum(one.numel() for one in model.parameters())
        model.save_pretrained(folder)
        del model
        for _ in range(args.repeats):
            seconds["forward"].append(forward(folder, ids))
            seconds["decomposition"].append(decomposition(1024))
            for name, variant in VARIANTS.items():
                seconds[name].append(compression(folder, ids, variant["options"]))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rows = {
        name: {
            "cpu_seconds": middle[name],
            "of_one_forward_pass": (middle[name] - variant["decompositions"] * middle["decomposition"])
            / middle["forward"],
        }
        for name, variant in VARIANTS.items()
    }
    record = {
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "parameters": parameters,
        "forward_cpu_seconds": middle["forward"],
        "decomposition_cpu_seconds": middle["decomposition"],
        "variants": rows,
        "all": seconds,
    }
    (Path(__file__).parent / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({**rows, "forward": middle["forward"], "decomposition": middle["decomposition"]}, indent=1))


if __name__ == "__main__":
    main()
