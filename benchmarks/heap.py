"""The command line with and without `microtome_cli.hold_heap`, in turn: CPU seconds in all and in the kernel, peak memory.

    python benchmarks/heap.py [--repeats 2]

One thread. Restoration of babyllama-0.9m cut by modegpt, refined twice; and 20 steps of healing of stories-3m sliced to
0.8. Writes benchmarks/heap.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
RECIPE = "keep: 0.8\nsteps:\n  - modegpt\n  - restore: {refine: 2}\n"
SIDES = {"held": {}, "given back": {"GLIBC_TUNABLES": ""}}  # set to anything, it is left as it is


def spent(words: list[str], more: dict[str, str]) -> dict[str, float]:
    """What one command takes."""
    env = {name: one for name, one in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.Popen(
        [sys.executable, "-m", "microtome_cli", *words],
        env=env | {"OMP_NUM_THREADS": "1"} | more,
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise SystemExit(run.returncode)
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "kernel": used.ru_stime, "peak_mib": used.ru_maxrss / 1024}


def main() -> None:
    """Both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    said = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place, tokens, text = Path(folder), SHARED / "data" / "tokens", SHARED / "data" / "tinystories" / "train.txt"
        (place / "recipe.yaml").write_text(RECIPE)
        cut = [
            "compress", str(SHARED / "models" / "stories-3m"), "--out", str(place / "cut"), "--keep", "0.8",
            "--data", str(tokens / "stories-3m.calib.pt"), "--samples", "64", "--no-evaluate",
        ]  # fmt: skip
        spent(cut, {})
        commands = {
            "restore": [
                "compress", str(SHARED / "models" / "babyllama-0.9m"), "-r", str(place / "recipe.yaml"),
                "--data", str(tokens / "babyllama-0.9m.calib.pt"), "--samples", "64", "--no-evaluate",
            ],
            "heal": [
                "heal", str(place / "cut"), "--data", str(text), "--length", "256", "--steps", "20", "--no-evaluate",
                "--teacher", str(SHARED / "models" / "stories-3m"),
            ],
        }  # fmt: skip
        for name, words in commands.items():
            runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for _ in range(said.repeats):
                for side, more in SIDES.items():
                    runs[side].append(spent([*words, "--out", str(place / "out"), "--overwrite"], more))
                    print(name, side, runs[side][-1], flush=True)
            found[name] = {
                side: {what: round(statistics.median(run[what] for run in mine), 2) for what in mine[0]}
                for side, mine in runs.items()
            }
    made = {
        "of": found,
        "ratio": {
            name: round(one["given back"]["cpu_seconds"] / one["held"]["cpu_seconds"], 2) for name, one in found.items()
        },
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("microtome", "torch")},
    }
    (HERE / "heap.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
