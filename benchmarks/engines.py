"""Whether a cut model is faster and smaller where it is used: transformers, ONNX Runtime and llama.cpp.

    python benchmarks/engines.py [--threads 1] [--rounds 5] [--quick]

A random Llama of 111 M parameters beside its cuts by a quarter, one of the stream (slicegpt) and one of the neurons
(magnitude), in widths that are multiples of 256. Weights are random: only shapes matter here. Both models run in turn,
each in its own process; speed-ups are ratios within a round. Writes benchmarks/engines.json and .md.
"""

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from random_llama import VOCABULARY, random_llama

import microtome
from microtome import bench

HERE = Path(__file__).parent
RUNS: tuple[tuple[str, str | None], ...] = (
    ("hf", None),
    ("onnx", None),
    ("llamacpp", None),
    ("llamacpp", "Q8_0"),
    ("llamacpp", "Q4_K_M"),
)
CUTS: dict[str, dict[str, Any]] = {
    "stream": {"slice": 0.25, "multiple_of": 256},
    "neurons": {"method": "magnitude", "options": {"spaces": "ffn"}, "keep": 0.75, "multiple_of": 256},
}
PACKAGES = ("microtome", "torch", "transformers", "onnxruntime", "llama-cpp-python", "xllamacpp")
INTRODUCTION = """# The same cut in three engines

Made by `{command}`: a random Llama of 111 M parameters beside two cuts of it,
{stream} and
{neurons}. Both models run in turn, each in a process of its own, with
{threads} thread on a shared machine; a speed-up is the median over {rounds} rounds of the ratio within a round, with its range.
Prompts are 64 tokens, 12 are decoded. llama.cpp runs the model in fp32, Q8_0 and Q4_K_M. Tokens per second and versions
are in benchmarks/engines.json.
"""


def installed() -> dict[str, str]:
    """Versions of what is there."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def timed(small: Path, dense: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The reports of all engines on one pair."""
    rows: list[dict[str, Any]] = []
    for engine, quantize in RUNS[: 1 if args.quick else None]:
        found = bench.compare(
            small,
            dense,
            engine=engine,
            quantize=quantize,
            batches=(1,),
            prompt=64,
            tokens=2 if args.quick else 12,
            rounds=args.rounds,
            threads=args.threads,
            dtype="auto" if quantize else "float32",
        )
        rows.append({"quantize": quantize, **found.to_json()})
        print(engine, quantize, *found.rows(), *found.remarks(), found.file_bytes, sep="\n  ", flush=True)
    return rows


def table(record: dict[str, Any]) -> str:
    """Speed-ups and sizes, as a document."""
    cuts = record["cuts"]
    head = {
        name: f"{one['what']} ({one['stored'][1] / one['stored'][0]:.3f} of the parameters)"
        for name, one in cuts.items()
    }
    out = INTRODUCTION.format(
        command=record["command"], threads=record["threads"], rounds=record["rounds"],
        stream=head["stream"], neurons=head["neurons"],
    )  # fmt: skip
    for name, one in cuts.items():
        works = [timing["workload"] for timing in one["engines"][0]["timings"]]
        titles = [f"{work['kind']}, batch {work['batch']}" for work in works]
        out += f"\n## {name}\n\n| engine | {' | '.join(titles)} | file, MB | memory, MB |\n"
        out += f"|---|{'--:|' * (len(titles) + 2)}\n"
        for row in one["engines"]:
            speeds = [f"{t['speedup']:.2f} ({t['slowest']:.2f} to {t['fastest']:.2f})" for t in row["timings"]]
            old, new = (size / 1e6 for size in row["file_bytes"])
            peaks = [(peak - row["idle_bytes"]) / 1e6 for peak in row["peak_bytes"]]
            label = row["engine"] + (f" {row['quantize']}" if row["quantize"] else " fp32")
            out += f"| {label} | {' | '.join(speeds)} | {old:.0f} to {new:.0f} | {peaks[0]:.0f} to {peaks[1]:.0f} |\n"
    return out + "\nMemory is the process's peak beyond what it holds before a model is loaded.\n"


def main() -> None:
    """Make the models, time them, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="transformers only, few tokens, nothing written")
    args = parser.parse_args()
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/engines.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "versions": installed(),
        "threads": args.threads,
        "rounds": args.rounds,
        "cuts": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        dense = Path(temporary) / "dense"
        random_llama().save_pretrained(dense)
        ids = torch.randint(0, VOCABULARY, (8, 256))
        for name, chosen in CUTS.items():
            small = Path(temporary) / name
            cut = microtome.compress(dense, data=ids, samples=None, measure=False, out=small, **chosen)
            assert cut.stock
            config = json.loads((small / "config.json").read_text())
            what = f"width {config['hidden_size']} of 1024" if name == "stream" else (
                f"{config['intermediate_size']} of 2816 neurons")  # fmt: skip
            record["cuts"][name] = {
                "what": what,
                "stored": [cut.before.stored, cut.after.stored],
                "flops": [cut.before.flops, cut.after.flops],
                "engines": timed(small, dense, args),
            }
    if args.quick:
        return
    (HERE / "engines.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "engines.md").write_text(table(record))


if __name__ == "__main__":
    main()
