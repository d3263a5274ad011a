"""What bits-back packing is worth on sliced models, beside the gauges that spend the same freedom in the open.

    python benchmarks/pack.py                          # models of ../shared at slices of 20, 25 and 30 %
    python benchmarks/pack.py --models stories-3m --no-wide

Slices are the paper's form (a basis at every junction, the head untied and whole), stored in float16. Perplexity is over
all predicted tokens of the evaluation ids, float32 arithmetic on the stored weights. The wide model is random: it gives
seconds, and nothing of quality. Writes benchmarks/pack.json and .md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import microtome
from microtome import arch, bitsback, data, layout, methods, planner
from microtome.bitsback import coder, sites, turns, words
from microtome.evaluate import perplexity
from microtome.loading import load
from microtome.source import open_source

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
MODELS = ("stories-3m", "wiki-opt-6m", "shakespeare-opt-0.8m")
SLICES = (0.2, 0.25, 0.3)
FORM = {"basis": "junction", "untie": True}
LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
         "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip
OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": True,
       "activation_function": "relu"}  # fmt: skip
PUBLISHED = {  # per cent of the dense model that goes: sliced, and packed by the authors (arXiv:2410.01309, their table)
    "OPT-1.3B": ((2048, 24), (9.53, 14.84, 20.53), (13.77, 18.61, 23.81)),
    "OPT-2.7B": ((2560, 32), (9.19, 15.07, 20.88), (13.84, 19.09, 24.43)),
    "OPT-6.7B": ((4096, 32), (9.29, 15.16, 21.18), (14.07, 19.29, 24.84)),
    "OPT-13B": ((5120, 40), (9.18, 15.27, 21.29), (14.01, 19.51, 24.97)),
    "Llama-2-7B": (None, (9.38, 15.34, 21.45), (14.13, 19.53, 25.09)),
}


def compressed(model: str, slice_: float, out: Path, **options: Any) -> Any:
    """A slice of a shared model in float16."""
    tokens = SHARED / "data" / "tokens"
    return microtome.compress(
        SHARED / "models" / model, data=tokens / f"{model}.calib.pt", samples=None, slice=slice_, out=out,
        options={**FORM, **options}, dtype="float16", measure=False,
    )  # fmt: skip


def measured(folder: Path, model: str) -> tuple[float, str]:
    """Perplexity, and its protocol."""
    loaded = load(folder, device=torch.device("cpu"), dtype=torch.float32)
    file, size = SHARED / "data" / "tokens" / f"{model}.eval.pt", loaded.config.vocab_size
    length = torch.load(file, weights_only=True).shape[1]
    found = perplexity(loaded, data.evaluation(str(file), None, length=length, vocab_size=size, limit=32))
    return found.value, found.protocol()


def row(model: str, slice_: float, scratch: Path) -> dict[str, Any]:
    """One slice: its sizes in every form, and the perplexity before and after."""
    compressed(model, slice_, scratch / "dense", gauge="dense")
    found: dict[str, Any] = {"model": model, "slice": slice_, "files": {}, "seconds": {}}
    for name, options in {
        "packed": {}, "exact": {"exact": True}, "coded": {"coded": True}, "exact, coded": {"exact": True, "coded": True},
        "stream": {"inner": False},
    }.items():  # fmt: skip
        report = bitsback.pack(scratch / "dense", scratch / name, **options)
        found["files"][name] = report.bytes["weights"]
        found["seconds"][name] = sum(report.seconds.values())
        if name == "packed":
            found |= {key: report.bytes[key] for key in ("dense", "formula")} | {"sliced": report.bytes["model"]}
        if name in {"packed", "exact"}:
            found[f"listed, {name}"] = report.words["listed"]
            back = bitsback.unpack(scratch / name, scratch / f"{name}-out")
            found[f"perplexity, {name}"] = measured(scratch / f"{name}-out", model)[0]
            found["seconds"][f"unpack, {name}"] = sum(back.seconds.values())
    found["perplexity, sliced"], found["protocol"] = measured(scratch / "dense", model)
    found["coded alone"] = coded_alone(scratch / "dense")
    for gauge in ("lowrank", "diagonal"):
        compressed(model, slice_, scratch / gauge, gauge=gauge)
        report = bitsback.pack(scratch / gauge, scratch / f"{gauge}.pack")
        found[gauge] = {"model": report.bytes["model"], "packed": report.bytes["weights"]}
    print(json.dumps(found), flush=True)
    return found


def coded_alone(folder: Path) -> int:
    """Bytes of entropy coding without any rotation."""
    with open_source(folder) as source:
        stored = [source.tensor(name) for name in source.names()]
    short = torch.cat([one.reshape(-1) for one in stored if one.dtype == torch.float16])
    return len(bitsback.container.squeezed(short.view(torch.int16), torch.float16))


def slice_of(fields: dict[str, Any], slice_: float, **options: Any) -> Any:
    """The config of a slice, by counting."""
    found: Any = types.SimpleNamespace(fields=fields, config=arch.lower(fields))
    return planner.plan_widths(found, methods.build("slicegpt", {**FORM, **options}), None, slice_, 8).final


def published() -> list[dict[str, Any]]:
    """The arithmetic of published models: per cent that goes, sliced and at the ceilings of what may be turned."""
    rows: list[dict[str, Any]] = []
    for name, (shape, cut, reached) in PUBLISHED.items():
        fields: dict[str, Any] = LLAMA
        if shape:
            wide, blocks = shape
            fields = OPT | {"hidden_size": wide, "ffn_dim": 4 * wide, "word_embed_proj_dim": wide,
                            "num_hidden_layers": blocks, "num_attention_heads": wide // 64}  # fmt: skip
        dense = arch.lower(fields)
        total = layout.count(dense) + (dense.vocab_size * dense.hidden_size if dense.tie_word_embeddings else 0)
        for place, slice_ in enumerate(SLICES):
            gone: dict[str, float] = {}
            for gauge in ("dense", "lowrank", "diagonal"):
                config = slice_of(fields, slice_, signal="residual", gauge=gauge)
                stream, every = sites.cut(config, inner=False), sites.cut(config)
                kept = layout.count(config)
                some = sites.stream_sites(config, lambda *_: True)[:-1] if gauge == "dense" else []
                gone |= {
                    gauge: 100 * (1 - kept / total),
                    f"{gauge}, stream": 100 * (1 - (kept - sites.ceiling(stream)) / total),
                    f"{gauge}, all": 100 * (1 - (kept - sites.ceiling(every)) / total),
                }
                if some:
                    gone["dense, 2 L"] = 100 * (1 - (kept - sum(one.saved for one in some)) / total)
            rows.append({"model": name, "slice": slice_, "published sliced": cut[place],
                         "published packed": reached[place], **gone})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def wide(scratch: Path) -> dict[str, Any]:
    """Seconds of a random slice: width 1024, 8 blocks, 25 %."""
    fields = LLAMA | {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8,
                      "num_attention_heads": 16, "num_key_value_heads": 16}  # fmt: skip
    config, generator = slice_of(fields, 0.25, gauge="dense"), torch.Generator().manual_seed(0)
    shapes = {name: shape for part in layout.parts(config) for name, shape in layout.shapes(config, part).items()}
    folder = scratch / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "float16"}))
    save_file(
        {name: (0.02 * torch.randn(shape, generator=generator)).half() for name, shape in shapes.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    found: dict[str, Any] = {"width": config.residual_in, "blocks": 8}
    for name, options in {"packed": {}, "exact": {"exact": True}, "coded": {"coded": True}}.items():
        start, clock = time.perf_counter(), time.process_time()
        report = bitsback.pack(folder, scratch / "it", overwrite=True, **options)
        packing, used = time.perf_counter() - start, time.process_time() - clock
        start, clock = time.perf_counter(), time.process_time()
        bitsback.unpack(scratch / "it", scratch / "back", overwrite=True)
        found |= {"bytes": report.bytes["model"], "formula": report.bytes["formula"]}
        found[name] = {
            "bytes": report.bytes["weights"], "pack seconds": packing, "pack processor seconds": used,
            "unpack seconds": time.perf_counter() - start, "unpack processor seconds": time.process_time() - clock,
        }  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def restoring(folder: Path) -> dict[str, float]:
    """Bits a word, of all words of a site, that bring a source's own words back where its carrier was canonical.

    The carrier of a junction is turned into its own frame and rounded (the source); packed by a rotation out of random
    words; turned back with the frame that a reader finds, signs given; and the differences are counted.
    """
    with open_source(folder) as source:
        found = planner.opened(source)
        held, _ = bitsback.read(found, None)
    cut = sites.cut(found.config)
    number = next(n for n, site in enumerate(cut.sites) if site.name == "residual.2")
    half = coder.Words(cut, torch.float16, {name: one.view(torch.int16) for name, one in held.items()})
    exponents = tuple(turns.exponent(words.values(half.of(piece), torch.float16)) for piece in cut.pieces)
    carrier = torch.cat(half.carriers(number, exponents), 1)
    size = len(carrier)
    own = turns.frame(turns.gram([carrier], size, centred=False), "it").T @ carrier
    source_words = words.rounded(own, torch.float16)
    drawn = torch.randn(size * (size + 1) // 2, generator=torch.Generator().manual_seed(0))
    vectors, _ = turns.drawn(turns.symmetric(drawn, size))
    member = words.values(
        words.rounded(vectors @ words.values(source_words, torch.float16), torch.float16), torch.float16
    )
    frame = turns.frame(turns.gram([member], size, centred=False), "it")
    back = frame.T @ member
    signs = (back * own).sum(1).sign()[:, None]
    off = words.order(source_words) - words.order(words.rounded(signs * back, torch.float16))
    share = torch.bincount((off - off.min()).reshape(-1)).double() / off.numel()
    bits = float(-(share[share > 0] * share[share > 0].log2()).sum())
    saved = 16 * sum(site.saved for site in cut.sites) / cut.words
    return {"bits a word of a site, to restore": bits, "bits a word that packing saves": saved,
            "exact already": float((off == 0).double().mean())}  # fmt: skip


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown, numbers to the right."""
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if at < 1 else "--:" for at in range(len(head))) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(one) + " |" for one in rows)]) + "\n"


def page(found: dict[str, Any]) -> str:
    """The tables."""
    text = [f"# Packing\n\nMade by `{found['command']}`: {found['machine']}.\n"]
    if found["rows"]:
        text.append(
            "Bytes of the weights over those of the slice (a basis at every junction, head untied and whole, float16).\n"
        )
        cells: list[tuple[str, ...]] = []
        for one in found["rows"]:
            sizes = (one["formula"], *(one["files"][name] for name in ("packed", "exact", "stream")), one["coded alone"],
                     one["files"]["coded"], one["files"]["exact, coded"])  # fmt: skip
            gauges = (
                one["lowrank"]["model"],
                one["lowrank"]["packed"],
                one["diagonal"]["model"],
                one["diagonal"]["packed"],
            )
            cells.append((
                f"{one['model']}, {one['slice']:.0%}", f"{one['dense'] / one['sliced']:.3f}",
                *(f"{size / one['sliced']:.3f}" for size in (*sizes, *gauges)),
            ))  # fmt: skip
        head = ("model, slice", "model before, as stored", "ceiling", "packed", "exact", "stream alone", "coded, unturned",
                "packed, coded", "exact, coded", "low-rank gauge", "packed", "diagonal gauge", "packed")  # fmt: skip
        text.append(table(head, cells))
        text.append(
            "Perplexity; the words that are listed because they would be off by more than the tolerance; seconds.\n"
        )
        text.append(table(
            ("model, slice", "sliced", "unpacked", "unpacked, exact", "words listed", "pack s", "unpack s"),
            [(f"{one['model']}, {one['slice']:.0%}", *(f"{one[f'perplexity, {name}']:.4f}" for name in ("sliced", "packed", "exact")),
              f"{one['listed, packed']:,}", f"{one['seconds']['packed']:.1f}", f"{one['seconds']['unpack, packed']:.1f}")
             for one in found["rows"]],
        ))  # fmt: skip
        text += sorted({f"{one['protocol']}\n" for one in found["rows"]})
        for name, one in found["restoring"].items():
            text.append(
                f"To give back the words of a canonical source, and not only one of its turns, {name} would need "
                f"{one['bits a word of a site, to restore']:.2f} bits for every word of a site; packing saves "
                f"{one['bits a word that packing saves']:.2f} bits a word.\n"
            )
    text.append("Published models by counting: per cent of the dense model that goes.\n")
    names = ("published sliced", "dense", "published packed", "dense, 2 L", "dense, all", "lowrank", "lowrank, all",
             "diagonal", "diagonal, all")  # fmt: skip
    head = ("model, slice", "slice, published", "slice, here", "packed, published", "ceiling of 2 L turns",
            "of all turns", "low-rank gauge", "with all turns", "diagonal gauge", "with all turns")  # fmt: skip
    text.append(
        table(
            head,
            [
                (f"{one['model']}, {one['slice']:.0%}", *(f"{one[name]:.2f}" for name in names))
                for one in found["published"]
            ],
        )
    )
    if found["wide"]:
        one = found["wide"]
        text.append(f"Seconds of a random slice of width {one['width']}, {one['blocks']} blocks, {one['bytes'] / 1e6:.0f} MB; "
                    "per GB in brackets.\n")  # fmt: skip
        giga = one["bytes"] / 1e9
        text.append(table(
            ("mode", "bytes of the slice's", "pack s", "of the processor", "unpack s", "of the processor"),
            [(name, f"{one[name]['bytes'] / one['bytes']:.4f}",
              *(f"{one[name][key]:.1f} ({one[name][key] / giga:.0f})" for key in (
                  "pack seconds", "pack processor seconds", "unpack seconds", "unpack processor seconds")))
             for name in ("packed", "exact", "coded")],
        ))  # fmt: skip
    return "\n".join(text)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--no-wide", action="store_true")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    restored: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            for slice_ in SLICES:
                place = Path(folder) / f"{model}-{slice_}"
                place.mkdir()
                rows.append(row(model, slice_, place))
            restored[model] = restoring(Path(folder) / f"{model}-0.25" / "dense")
        random = None if arguments.no_wide else wide(Path(folder))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "constriction"))
    found = {
        "command": " ".join(["python benchmarks/pack.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores of {platform.machine()} that were busy with other work, "
        f"{torch.get_num_threads()} thread; Python {platform.python_version()}, {libraries}",
        "rows": rows, "restoring": restored, "published": published(), "wide": random,
    }  # fmt: skip
    (HERE / "pack.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "pack.md").write_text(page(found))


if __name__ == "__main__":
    main()
