"""Train a reference Llama that is wider than the small models at hand, to see which method wins where there is width.

    python scripts/train_reference.py english.jsonl.xz --out reference-384 --width 384 --minutes 60

One file of documents, a JSON object with a `text` a line, is enough: a byte-pair tokenizer is trained on it, one
document in a hundred is held out, and the rest is read in shuffled windows. `--width 640` is about 60 million
parameters, some ten minutes on a large GPU; `--width 384` about 15, an hour or so on two CPU cores with bf16 products.
Beside the folder lie `OUT.calib.pt` (windows that were trained on) and `OUT.eval.pt` (windows that were not), for the
table of `benchmarks/reference.yaml`, and `OUT/training.json` tells how it went.

Shapes: B windows in a batch, T tokens in a window, W windows, N tokens in a text.
"""

import argparse
import json
import lzma
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
WARMUP = 100
HEAD_DIM = 64
SHAPES = {256: (6, 4, 2, 704), 384: (8, 6, 2, 1024), 640: (12, 10, 5, 1792), 768: (12, 12, 4, 2048)}
CALIBRATION, EVALUATION = 512, 64  # windows


def documents(path: Path) -> list[str]:
    """Texts of a .jsonl file, packed or not."""
    packed = path.read_bytes()
    plain = lzma.decompress(packed) if path.suffix == ".xz" else packed
    return [json.loads(line)["text"] for line in plain.decode().split("\n") if line]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level byte pairs, learnt from the documents; the separator is token 0."""
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE())
    learnt.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    learnt.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    learnt.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learnt, bos_token=SEPARATOR, eos_token=SEPARATOR)


def encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids of all texts in a row, each behind a separator; N."""
    pieces = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for piece in pieces for token in (0, *piece.ids)], dtype=torch.int32)


def windows(ids_N: Tensor, offset: int = 0) -> Tensor:
    """Non-overlapping windows, W x T, from an offset; a shorter rest is left out."""
    count = (len(ids_N) - offset) // CONTEXT
    return ids_N[offset : offset + count * CONTEXT].view(count, CONTEXT)


def batches(ids_N: Tensor, size: int, dice: random.Random) -> Iterator[Tensor]:
    """Batches without end, B x T: every epoch cuts elsewhere and shuffles the windows."""
    while True:
        ids_WT = windows(ids_N, dice.randrange(CONTEXT))
        order = dice.sample(range(len(ids_WT)), len(ids_WT))
        for start in range(0, len(order) - size + 1, size):
            yield ids_WT[order[start : start + size]].long()


def shape(width: int) -> LlamaConfig:
    """A Llama with grouped queries and tied embeddings."""
    blocks, heads, groups, neurons = SHAPES[width]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def rate(peak: float, share: float, step: int) -> float:
    """Learning rate: warm-up, a plateau, and a fall to nothing over the last two fifths of the time."""
    return peak * min(1.0, (step + 1) / WARMUP, max(0.0, (1.0 - share) / 0.4))


def new_model(width: int, seed: int, device: str) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A fresh model and its optimizer; matrices decay, the scales of the norms do not."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(shape(width)).to(device)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    scales = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def loss_of(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
    """Mean nats per predicted token; products in bf16, weights and losses in fp32."""
    with torch.autocast(ids_BT.device.type, torch.bfloat16):
        return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, stream: Iterator[Tensor], chosen) -> int:
    """Train until the time, or the number of steps, is over; returns the steps."""
    start, step, share = time.perf_counter(), 0, 0.0
    device = model.device
    run = torch.compile(loss_of) if chosen.compile else loss_of
    while share < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = rate(chosen.rate, share, step)
        loss = run(model, next(stream).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        spent = time.perf_counter() - start
        share = step / chosen.steps if chosen.steps else spent / (60 * chosen.minutes)
        if step % 100 == 0:
            speed = step * chosen.batch * CONTEXT / spent
            print(f"step {step}, {share:.0%}: {loss.item():.3f} nats, {speed:.0f} tokens/s", flush=True)
    return step


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, ids_WT: Tensor) -> float:
    """Over every token of a window but its first, fp32."""
    losses = [model(input_ids=row, labels=row, use_cache=False).loss.item() for row in ids_WT.long().split(1)]
    return math.exp(math.fsum(losses) / len(losses))


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Train a reference Llama.")
    parser.add_argument("text", type=Path, help="documents: .jsonl or .jsonl.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--width", type=int, choices=sorted(SHAPES), default=640)
    parser.add_argument("--minutes", type=float, default=10, help="time to train for")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    return parser.parse_args()


def main() -> None:
    """Train, save, measure, report."""
    chosen = options()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    texts = documents(chosen.text)
    tokenizer = train_tokenizer(texts)
    held = len(texts) // 100
    train_N, held_N = encoded(tokenizer, texts[held:]), encoded(tokenizer, texts[:held])
    print(f"{len(train_N):,} tokens to learn from, {len(held_N):,} held out", flush=True)
    dice = random.Random(chosen.seed)
    model, optimizer = new_model(chosen.width, chosen.seed, chosen.device)
    start = time.perf_counter()
    steps = train(model, optimizer, batches(train_N, chosen.batch, dice), chosen)
    minutes = (time.perf_counter() - start) / 60
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.to("cpu").save_pretrained(chosen.out)
    tokenizer.save_pretrained(chosen.out)
    calib_WT = windows(train_N)
    rows = dice.sample(range(len(calib_WT)), CALIBRATION)
    eval_WT = windows(held_N)[:EVALUATION]
    torch.save(calib_WT[rows].long(), chosen.out.with_name(chosen.out.name + ".calib.pt"))
    torch.save(eval_WT.long(), chosen.out.with_name(chosen.out.name + ".eval.pt"))
    report = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.system()} {platform.machine()}, {chosen.device}",
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": {"train": len(train_N), "held_out": len(held_N), "read": steps * chosen.batch * CONTEXT},
        "training_minutes": round(minutes, 1),
        "perplexity": {"held_out": round(perplexity(model, eval_WT), 3)},
    }
    (chosen.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
