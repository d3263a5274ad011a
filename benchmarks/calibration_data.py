"""How perplexity on several corpora depends on the corpus of calibration, on small trained models.

    python benchmarks/calibration_data.py                        # about 12 minutes on one core
    python benchmarks/calibration_data.py --models stories-3m --seeds 0

SliceGPT with default options at keep 0.8, calibrated on 128 windows of one corpus, of all six in equal shares, or of
text that the model wrote itself; then measured on 64 windows of a held-out part of each corpus, fp32. A window is 256
tokens, or as long as the model's context where that is shorter. Entries are perplexity over the dense model's, the
geometric mean over seeds, which draw the windows. A corpus of which the tokenizer does not know a fiftieth of the
characters is left out for that model. Documents are joined by a blank line. Reads ../shared/data, writes
benchmarks/calibration_data.json and .md.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from math import exp, fsum, log
from pathlib import Path
from typing import Any

import torch

import microtome
from microtome import data
from microtome.evaluate import perplexity
from microtome.loading import load, tokenizer_of
from microtome.texts import Text
from microtome_cli import hold_heap

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
TEXTS = SHARED / "data"
KEEP, SAMPLES, LIMIT, LENGTH = 0.8, 128, 64, 256
KNOWN = 0.98  # of a corpus' characters, or it is left out for a model


def joined(documents: list[str]) -> str:
    """Documents as one text."""
    return "\n\n".join(documents)


def wikitext(part: str) -> str:
    """WikiText-2, the raw version as published (validation to calibrate on), or the tokenised training part."""
    names = {"train": "wiki.valid.raw", "tokenised": "wiki.train.tokens", "test": "wiki.test.raw"}
    return (TEXTS / "wikitext2" / names[part]).read_text()


def ptb(part: str) -> str:
    """Penn Treebank: validation to calibrate on, test to measure on."""
    return (TEXTS / {"train": "ptb.valid.txt", "test": "ptb.test.txt"}[part]).read_text()


def c4(part: str) -> str:
    """C4: the first 240 documents, or the last 60."""
    lines = (TEXTS / "c4_300.jsonl").read_text().splitlines()
    return joined([json.loads(line)["text"] for line in (lines[:240] if part == "train" else lines[240:])])


def alpaca(part: str) -> str:
    """Alpaca: instruction, input and answer on lines of their own; the first 4,500 items, or the last 500."""
    items = json.loads((TEXTS / "alpaca_5000.json").read_text())
    chosen = items[:4500] if part == "train" else items[4500:]
    return joined(["\n".join(one[key] for key in ("instruction", "input", "output") if one[key]) for one in chosen])


def tinystories(part: str) -> str:
    """TinyStories: training part, validation part."""
    content = (TEXTS / "tinystories" / {"train": "train.txt", "test": "validation.txt"}[part]).read_text()
    return joined([story.strip() for story in content.split("<|endoftext|>") if story.strip()])


def shakespeare(part: str) -> str:
    """Shakespeare: the first nine tenths, or the last tenth."""
    content = (TEXTS / "shakespeare.txt").read_text()
    at = content.find("\n\n", len(content) * 9 // 10)
    return content[:at] if part == "train" else content[at:]


CORPORA: dict[str, Callable[[str], str]] = {
    "wikitext2": wikitext,
    "ptb": ptb,
    "c4": c4,
    "alpaca": alpaca,
    "tinystories": tinystories,
    "shakespeare": shakespeare,
}


def known_share(tokenizer: Any, content: str) -> float:
    """The fraction of characters that the tokenizer has a token for."""
    sample = content[:200_000]
    unknown = {
        one
        for one in set(sample)
        if not (ids := tokenizer(one, add_special_tokens=False)["input_ids"])
        or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids)
    }
    return sum(one not in unknown for one in sample) / len(sample)


def rows_of(model: str, seeds: list[int]) -> list[dict[str, Any]]:
    """The dense model's perplexities, then those of every calibration and seed."""
    folder = SHARED / "models" / model
    tokenizer, dense = tokenizer_of(folder), load(folder, device=torch.device("cpu"), dtype=torch.float32)
    length = min(LENGTH, dense.config.max_position_embeddings)
    shares = {name: known_share(tokenizer, part("test")) for name, part in CORPORA.items()}
    used = {name: part for name, part in CORPORA.items() if shares[name] >= KNOWN}
    tokens = {
        name: data.evaluation(Text(f"{name}, held out", part("test")), tokenizer, length=length, limit=LIMIT)
        for name, part in used.items()
    }
    train = {name: Text(f"{name}, calibration part", part("train")) for name, part in used.items()}
    sources: dict[str, Any] = dict(train)
    if "wikitext2" in used:
        sources["wikitext2, tokenised"] = Text("wikitext2, tokenised training part", wikitext("tokenised"))
    if len(train) > 1:
        sources["all, equal shares"] = dict.fromkeys(train.values(), 1.0)
    sources["self"] = "self"
    shown = {name: round(share, 4) for name, share in shares.items()}
    rows: list[dict[str, Any]] = [
        {"model": model, "calibration": None, "window": length, "characters_known": shown, **measured(dense, tokens)}
    ]
    for name, source in sources.items():
        rows += [row(model, name, source, seed, length, tokens) for seed in seeds]
    return rows


def measured(model: Any, tokens: dict[str, data.Tokens]) -> dict[str, Any]:
    """Perplexity on every corpus, with its protocol."""
    found = {name: perplexity(model, one) for name, one in tokens.items()}
    return {
        "perplexity": {name: one.value for name, one in found.items()},
        "protocol": {name: one.protocol() for name, one in found.items()},
    }


def row(model: str, name: str, source: Any, seed: int, length: int, tokens: dict[str, data.Tokens]) -> dict[str, Any]:
    """One compression, measured on every corpus."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        result = microtome.compress(
            SHARED / "models" / model,
            keep=KEEP,
            data=source,
            samples=SAMPLES,
            length=length,
            seed=seed,
            measure=False,
            dtype="float32",
            out=Path(place) / "out",
        )
        found = {
            "model": model,
            "calibration": name,
            "seed": seed,
            "stored": result.after.stored,
            "dense_stored": result.before.stored,
            "record": result.plan.calibration,
            **measured(result.load("cpu"), tokens),
        }
    found["seconds"] = round(time.perf_counter() - start, 1)
    values = "  ".join(f"{corpus} {value:.2f}" for corpus, value in found["perplexity"].items())
    print(f"{model:22} {name:22} seed {seed}  {values}", flush=True)
    return found


def geometric(values: list[float]) -> float:
    """The geometric mean."""
    return exp(fsum(log(value) for value in values) / len(values))


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table a model."""
    out = [
        (
            "Perplexity over the dense model's on held-out text (lower is better), by the corpus of calibration: SliceGPT, "
            f"default options, keep {KEEP}, {SAMPLES} windows. Made by `python benchmarks/calibration_data.py`."
        )
    ]
    for model in dict.fromkeys(one["model"] for one in rows):
        dense, *mine = [one for one in rows if one["model"] == model]
        corpora = list(dense["perplexity"])
        seeds = sorted({one["seed"] for one in mine})
        stored = f"{mine[0]['stored'] / 1e6:.3f} M of {mine[0]['dense_stored'] / 1e6:.3f} M stored parameters"
        out.append(
            f"\n## {model}\n\n{stored}; windows of {dense['window']}, {LIMIT} at most of each corpus, seeds {seeds}."
        )
        if left := [name for name in CORPORA if name not in corpora]:
            out.append(f"Left out, for the tokenizer lacks their characters: {', '.join(left)}.")
        out.append("\n| calibrated on | " + " | ".join(corpora) + " | geometric mean |")
        out.append("|---|" + "--:|" * (len(corpora) + 1))
        cells = " | ".join(f"{dense['perplexity'][name]:.2f}" for name in corpora)
        out.append(f"| dense, perplexity itself | {cells} | |")
        spread = 1.0
        for name in dict.fromkeys(one["calibration"] for one in mine):
            same = [one for one in mine if one["calibration"] == name]
            ratios: list[float] = []
            for corpus in corpora:
                each = [one["perplexity"][corpus] / dense["perplexity"][corpus] for one in same]
                ratios.append(geometric(each))
                spread = max(spread, max(each) / min(each))
            cells = " | ".join(
                f"**{x:.3f}**" if name == corpus else f"{x:.3f}" for x, corpus in zip(ratios, corpora, strict=True)
            )
            out.append(f"| {name} | {cells} | {geometric(ratios):.3f} |")
        if len(seeds) > 1:
            out.append(f"\nSeeds differ by {spread - 1:.1%} at most.")
    return "\n".join(out) + "\n"


def main() -> None:
    """Run the table."""
    hold_heap()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["wiki-opt-6m", "stories-3m", "babyllama-0.9m", "shakespeare-opt-0.8m"]
    parser.add_argument("--models", nargs="*", default=models)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=HERE / "calibration_data.json")
    args = parser.parse_args()
    rows = [one for model in args.models for one in rows_of(model, args.seeds)]
    record = {
        "command": " ".join(["python", "benchmarks/calibration_data.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("microtome", "torch", "transformers")},
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
