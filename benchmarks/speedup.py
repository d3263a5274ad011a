"""How much faster a cut model runs: a random Llama of 111 M parameters beside its cut, by `microtome bench`.

    python benchmarks/speedup.py [--threads 2] [--rounds 5] [--keep 0.75]

Weights are random: only shapes matter here. Both models run in turn, each in its own process; speed-ups are ratios within
a round. Writes benchmarks/speedup.json.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from random_llama import VOCABULARY, random_llama

import microtome
from microtome import bench


def main() -> None:
    """Make the pair, time it, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=float, default=0.75)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        dense, small = Path(temporary) / "dense", Path(temporary) / "small"
        random_llama().save_pretrained(dense)
        ids = torch.randint(0, VOCABULARY, (8, 256))
        cut = microtome.compress(dense, keep=args.keep, data=ids, samples=None, measure=False, out=small)
        found = bench.compare(
            small, dense, batches=(1, 8), prompt=128, tokens=32, rounds=args.rounds, threads=args.threads
        )
    for row in found.rows():
        print(*row, sep="  ")
    record = {
        "command": " ".join(["python", "benchmarks/speedup.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "stored": [cut.before.stored, cut.after.stored],
        "flops": [cut.before.flops, cut.after.flops],
        **found.to_json(),
    }
    (Path(__file__).parent / "speedup.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
