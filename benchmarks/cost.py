"""What solves, allocation and restoration cost beside the calibration pass, in one run on a random Llama of 111 M.

    python benchmarks/cost.py [--repeats 3]

Width 1024, 8 blocks, 32 rows of 512 tokens, fp32, one thread, process seconds. The calibration pass is the survey of
all four sites of every block (what queries, the output projection, gate and up, and the down projection read), which
every method can share. Ratios are what counts: the machine may be busy. Writes benchmarks/cost.json.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from random_llama import VOCABULARY, random_llama

import microtome
from microtome import passes, planner, probe, survey
from microtome.source import open_source
from microtome.stats import SITES
from microtome_cli import hold_heap

ROWS, LENGTH = 32, 512

ENTRIES: dict[str, dict[str, Any]] = {
    "slicegpt": {"method": "slicegpt"},
    "slicegpt, junctions": {"method": "slicegpt", "options": {"basis": "junction"}},
    "modegpt": {"method": "modegpt"},
    "fasp": {"method": "fasp"},
    "flap": {"method": "flap"},
    "dotresize": {"method": "dotresize"},
    "prunenet": {"method": "prunenet"},
    "magnitude": {"method": "magnitude"},
    "modegpt, auto": {"method": "modegpt", "allocate": "auto"},
    "modegpt, restored": {"method": "modegpt", "restore": True},
    "modegpt, restored, refined once": {"method": "modegpt", "restore": {"refine": 1}},
}


def survey_seconds(folder: Path, ids: torch.Tensor) -> float:
    """One calibration pass over all sites."""
    with open_source(folder) as source:
        found, start = planner.opened(source), time.process_time()
        survey.survey(found, ids, frozenset(SITES), device=torch.device("cpu"), dtype=torch.float32)
        return time.process_time() - start


def clocked(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The function, with the seconds of every call added to the first of `spent`."""

    def called(*args: Any, **more: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **more)
        finally:
            spent[0] += time.process_time() - start

    return called


def stages(folder: Path, ids: torch.Tensor, entry: dict[str, Any]) -> dict[str, float]:
    """Seconds of every stage of one compression, nothing measured."""
    spent, losses, solve = [0.0], probe.losses, passes.allocate.solve
    probe.losses, passes.allocate.solve = clocked(losses, spent), clocked(solve, spent)
    try:
        with tempfile.TemporaryDirectory() as out:
            start = time.process_time()
            found = microtome.compress(
                folder, keep=0.75, data=ids, samples=None, measure=False, out=Path(out) / "out", **entry
            )
            total = time.process_time() - start
    finally:
        probe.losses, passes.allocate.solve = losses, solve
    kept = {name: found.seconds.get(name, 0.0) for name in ("survey", "solve", "restore")}
    return {**kept, "allocation": spent[0], "all": total}


def main() -> None:
    """Interleave everything, so that a busy minute hits all alike."""
    hold_heap()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    time.perf_counter = time.process_time  # the library's own clocks then count this process alone
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    passes_of: list[float] = []
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ENTRIES}
    with tempfile.TemporaryDirectory() as temporary:
        model = random_llama()
        parameters = sum(one.numel() for one in model.parameters())
        model.save_pretrained(temporary)
        del model
        for _ in range(args.repeats):
            passes_of.append(survey_seconds(Path(temporary), ids))
            for name, entry in ENTRIES.items():
                found[name].append(stages(Path(temporary), ids, entry))
                print(name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)
    one = statistics.median(passes_of)
    rows = {
        name: {stage: round(statistics.median(run[stage] for run in runs) / one, 3) for stage in runs[0]}
        for name, runs in found.items()
    }
    record = {
        "command": " ".join(["python", "benchmarks/cost.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "parameters": parameters,
        "calibration_cpu_seconds": one,
        "in_calibration_passes": rows,
        "all": {"calibration": passes_of, **found},
    }
    (Path(__file__).parent / "cost.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
