"""Train the demo model that ships with Microtome, and measure it beside n-gram models.

    python scripts/train_demo.py --minutes 35

Everything is made from `microtome.demo.corpus()` and a seed: a SentencePiece tokenizer, a small Llama, its model card,
and `benchmarks/demo_model.json`. `--minutes` measures this machine's speed and chooses the number of steps; the report
names the command with `--steps` that repeats the run. Floating-point sums differ between machines, so the weights do
too; and another version of Python documents another library.

Shapes: B windows in a batch, T tokens in a window, W windows in a text, N tokens in a text.
"""

import argparse
import io
import json
import math
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from microtome.demo import MODEL, corpus

ROOT = Path(__file__).resolve().parents[1]
SEPARATOR = "\n\n"
VOCABULARY = 2048
BOS = 1
CONTEXT = 512
BATCH = 8
PEAK_RATE = 2e-3
WARMUP = 100
VALIDATION = 0.03  # share of the train documents that only choose the checkpoint


def train_tokenizer(documents: Sequence[str], folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A Llama-like byte-pair tokenizer in both of its formats: tokenizer.model and tokenizer.json.

    It learns from single lines, so that a line break stays a byte token. Unlike Llama's it puts no space before a text:
    most lines of documentation begin with a word, and the two formats disagree on texts that begin with a space.
    """
    written = io.BytesIO()  # a file name would be stored inside the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents for line in text.splitlines() if line),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=BOS,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    write_fast_tokenizer(folder)
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def write_fast_tokenizer(folder: Path) -> None:
    """The tokenizer.json that transformers derives from tokenizer.model, and the tokenizer_config.json beside it."""
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        shutil.copy(folder / "tokenizer.model", source)
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def shape() -> LlamaConfig:
    """The demo model: widths that are multiples of 256, which every quantized format of llama.cpp accepts."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=2,
    )


def windows(ids_N: Tensor, offset: int = 0) -> Tensor:
    """Non-overlapping windows, W x T, from an offset; a shorter rest is left out."""
    count = (len(ids_N) - offset) // CONTEXT
    return ids_N[offset : offset + count * CONTEXT].view(count, CONTEXT)


def batches(
    processor: sentencepiece.SentencePieceProcessor, documents: Sequence[str], dice: random.Random
) -> Iterator[Tensor]:
    """Batches without end, B x T: every epoch shuffles the documents, cuts elsewhere and shuffles the windows.

    Half of the windows begin with the begin-of-sequence token, so that the model reads text with and without it.
    """
    while True:
        order = dice.sample(documents, len(documents))
        ids_N = torch.tensor(processor.encode(SEPARATOR.join(order)))
        ids_WT = windows(ids_N, dice.randrange(CONTEXT)).clone()
        rows = dice.sample(range(len(ids_WT)), len(ids_WT))
        ids_WT[rows[::2], 0] = BOS
        dice.shuffle(rows)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield ids_WT[rows[start : start + BATCH]]


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then half a cosine down to nothing."""
    return PEAK_RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))


def new_model(seed: int) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A fresh model and its optimizer; matrices decay, the scales of the norms do not."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shape())
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    scales = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))


def advance(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids_BT: Tensor, learning_rate: float) -> None:
    """One step of the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def affordable(minutes: float) -> int:
    """How many steps fit in so many minutes, from a few steps of a throwaway model; a tenth is left for the rest."""
    model, optimizer = new_model(0)
    ids_BT = torch.randint(VOCABULARY, (BATCH, CONTEXT))
    for timed in range(6):
        if timed == 1:
            start = time.perf_counter()
        advance(model, optimizer, ids_BT, PEAK_RATE)
    step_seconds = (time.perf_counter() - start) / 5
    print(f"{BATCH * CONTEXT / step_seconds:.0f} tokens/s")
    return max(WARMUP, int(0.9 * 60 * minutes / step_seconds))


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, ids_WT: Tensor) -> float:
    """Nats per predicted token: every token of a window but its first."""
    losses = [model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.item() for ids_BT in ids_WT.split(1)]
    return math.fsum(losses) / len(losses)


def train_model(
    processor: sentencepiece.SentencePieceProcessor, documents: Sequence[str], steps: int, seed: int
) -> LlamaForCausalLM:
    """The model at its best step, by its loss on a slice of the train documents that it does not learn from."""
    dice = random.Random(seed)
    order = dice.sample(documents, len(documents))
    slice_size = int(VALIDATION * len(order))
    check_WT = windows(torch.tensor(processor.encode(SEPARATOR.join(order[:slice_size]))))
    stream = batches(processor, order[slice_size:], dice)
    model, optimizer = new_model(seed)
    best, kept = math.inf, model.state_dict()
    for step in range(steps):
        advance(model, optimizer, next(stream), rate(step, steps))
        if (step + 1) % max(1, steps // 16) == 0 or step + 1 == steps:
            loss = mean_loss(model, check_WT)
            print(f"step {step + 1}/{steps}: {math.exp(loss):.2f} on the slice", flush=True)
            if loss < best:
                best, kept = loss, {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(kept)
    return model


def ngram_loss(train: Sequence[int], text: Sequence[int], order: int) -> float:
    """Nats per token of an n-gram model with interpolated modified Kneser-Ney smoothing, where `mean_loss` predicts.

    Chen and Goodman 1998, section 3: lower orders count the distinct tokens seen to the left, three discounts per order
    follow from the counts of counts (equation 26), and the lowest order falls back to the uniform distribution.
    """
    tables = [level_of(counts) for counts in counts_by_order(train, order)]
    total = 0.0
    predicted = [i for i in range(len(text) // CONTEXT * CONTEXT) if i % CONTEXT]
    for i in predicted:
        chance = 1 / VOCABULARY
        for size, (counts, discounts, follow) in enumerate(tables, start=1):
            context = tuple(text[max(0, i - size + 1) : i])
            if context not in follow:
                break
            seen, spread = follow[context]
            count = counts[(*context, text[i])]
            chance = (count - discounts[min(count, 3)]) / seen + spread / seen * chance
        total -= math.log(chance)
    return total / len(predicted)


def counts_by_order(train: Sequence[int], order: int) -> list[Counter]:
    """Counts of n-grams from one token up: occurrences at the highest order, distinct left neighbours below it."""
    occurrences = Counter(zip(*(train[start:] for start in range(order)), strict=False))
    levels = [occurrences]
    for _ in range(order - 1):
        levels.insert(0, Counter(gram[1:] for gram in levels[0]))
    return levels


def level_of(counts: Counter) -> tuple[Counter, list[float], dict[tuple[int, ...], tuple[int, float]]]:
    """One order: its counts, the discounts of the counts 0, 1, 2 and 3 or more, and for each context its count and its
    discounted mass.
    """
    frequency = Counter(counts.values())
    y = frequency[1] / (frequency[1] + 2 * frequency[2]) if frequency[1] else 0.0
    discounts = [0.0, *(n - (n + 1) * y * frequency[n + 1] / max(1, frequency[n]) for n in (1, 2, 3))]
    follow: dict[tuple[int, ...], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for gram, count in counts.items():
        seen, spread = follow[gram[:-1]]
        follow[gram[:-1]] = seen + count, spread + discounts[min(count, 3)]
    return counts, discounts, dict(follow)


def measure(processor: sentencepiece.SentencePieceProcessor, folder: Path, parts: tuple[list[str], list[str]]) -> dict:
    """Perplexities over the held-out part of the saved model and of n-gram models counted on the whole train part."""
    train, held_out = (processor.encode(SEPARATOR.join(part)) for part in parts)
    ids_WT = windows(torch.tensor(held_out))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    perplexity = {
        "model": math.exp(mean_loss(model, ids_WT)),
        "five-gram": math.exp(ngram_loss(train, held_out, 5)),
        "trigram": math.exp(ngram_loss(train, held_out, 3)),
        "unigram": math.exp(ngram_loss(train, held_out, 1)),
    }
    return {
        "perplexity": {name: round(value, 3) for name, value in perplexity.items()},
        "tokens": {"train": len(train), "held_out": len(held_out), "predicted": ids_WT.numel() - len(ids_WT)},
        "documents": {"train": len(parts[0]), "held_out": len(parts[1])},
        "parameters": model.num_parameters(),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
    }


def card(report: dict) -> str:
    """The model card."""
    perplexity, tokens = report["perplexity"], report["tokens"]
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Microtome's demo model

A Llama of {report["parameters"] / 1e6:.1f} million parameters that has read one book: the documentation of Python's
standard library. It ships with Microtome so that compression can be tried, and tested, without a network. It writes
sentences that look like docstrings and knows nothing; use it for nothing else.

| shape | |
|---|---|
| blocks | 6 |
| width, width of the MLP | 256, 512 |
| heads, key-value heads | 8, 2 |
| vocabulary | {VOCABULARY}, SentencePiece BPE with byte fallback; embeddings tied |
| context | {CONTEXT} |
| weights | float16, {report["weights_bytes"] / 1e6:.1f} MB |

## Text

The docstrings in the sources of the standard library of Python {report["versions"]["python"]} and the pages of its
`help()`: {tokens["train"]:,} tokens to learn from and {tokens["held_out"]:,} held out. `microtome.demo.corpus()` reads
the same text from the running interpreter. Documents are joined by an empty line; no end-of-sequence token was learnt.
That documentation is copyright the Python Software Foundation and its contributors, under the PSF License Version 2;
parts of the library carry licences of their own, which Python's documentation lists.

## Perplexity

On the held-out documents, in windows of {CONTEXT} tokens, beside n-gram models counted on the same train part
(modified Kneser-Ney):

| | perplexity per token |
|---|---|
| this model | {perplexity["model"]:.2f} |
| five-gram | {perplexity["five-gram"]:.2f} |
| trigram | {perplexity["trigram"]:.2f} |
| unigram | {perplexity["unigram"]:.2f} |

The numbers come from `benchmarks/demo_model.json`; `{report["command"]}` makes the model again.
"""


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Train the demo model that ships with Microtome.")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument(
        "--report", type=Path, default=ROOT / "benchmarks" / "demo_model.json", help="file of the numbers"
    )
    parser.add_argument("--minutes", type=float, default=35, help="time to train for")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, save, measure, report."""
    chosen = options()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(chosen.threads)
    chosen.out.mkdir(parents=True, exist_ok=True)
    parts = corpus()
    processor = train_tokenizer(parts[0], chosen.out)
    start = time.perf_counter()
    steps = chosen.steps or affordable(chosen.minutes)
    model = train_model(processor, parts[0], steps, chosen.seed)
    minutes = (time.perf_counter() - start) / 60
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=2, max_new_tokens=64)
    model.to(torch.float16).save_pretrained(chosen.out)
    (chosen.out / "model.safetensors").chmod(0o644)
    report = {
        "command": f"python scripts/train_demo.py --seed {chosen.seed} --threads {chosen.threads} --steps {steps}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentencepiece": sentencepiece.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, {chosen.threads} CPU thread(s)",
        "seed": chosen.seed,
        "steps": steps,
        "tokens_per_step": BATCH * CONTEXT,
        "training_minutes": round(minutes, 1),
        **measure(processor, chosen.out, parts),
    }
    chosen.report.parent.mkdir(parents=True, exist_ok=True)
    chosen.report.write_text(json.dumps(report, indent=2) + "\n")
    (chosen.out / "README.md").write_text(card(report))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
