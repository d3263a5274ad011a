"""The command line: a signature per verb. It lies beside the package, so that `--help` does not import torch."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import typer

app = typer.Typer(
    name="microtome",
    help="Make trained language models smaller, and hand back a dense model that runs where the original ran.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(wanted: bool) -> None:
    """The version and no more."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"microtome {version('microtome')}")
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Make trained language models smaller, and hand back a dense model that runs where the original ran."""


Model = Annotated[str, typer.Argument(help="Folder or hub id of a trained decoder model.", show_default=False)]
Method = Annotated[str, typer.Option("--method", "-m", help="Method; `microtome list` shows all.")]
Keep = Annotated[float | None, typer.Option(help="Fraction of the blocks' parameters to keep, in (0, 1].")]
Slice = Annotated[
    float | None, typer.Option("--slice", help="The paper's dial instead: fraction of the width to remove.")
]
Options = Annotated[list[str] | None, typer.Option("-o", "--option", help="Method option, name=value; repeatable.")]
Untie = Annotated[bool, typer.Option("--untie", help="Give the head its own weights, as SliceGPT publishes it.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Length = Annotated[int | None, typer.Option(help="Tokens in a window.  [default: the model's, up to 2048]")]
Dtype = Annotated[str, typer.Option(help="Type to store: auto (the source's), float32, float16 or bfloat16.")]
RunDtype = Annotated[str, typer.Option(help="Type to run in: auto is float32 on a CPU.")]
Seed = Annotated[int, typer.Option(help="Of the choice of windows.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Revision = Annotated[str | None, typer.Option(help="Commit, branch or tag on the hub.")]
Multiple = Annotated[int | None, typer.Option("--multiple-of", min=1, help="Round widths to a multiple of this.")]
SOURCES = "A data set (`microtome list`), a file (.txt .jsonl .json .parquet, ids .pt .npy) or a folder"
Data = Annotated[str, typer.Option(help=f"{SOURCES}.")]
Column = Annotated[
    str | None,
    typer.Option(help="Column of a table that holds text or messages; with it --data owner/name is read from the hub."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Recipe = Annotated[Path | None, typer.Option("--recipe", "-r", help="Several methods in a row, as YAML.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change the recipe: keep=0.7, 1.keep=0.9 (step 1), fasp.options.score=l2; repeatable."),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        help="How blocks share the budget: uniform, influence, redundancy, global, auto.  [default: the method's]"
    ),
]
Restored = Annotated[
    bool, typer.Option("--restore/--no-restore", help="Refit what is left to the original, in closed form.")
]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps what is measured, for the next run.")]
Private = Annotated[bool, typer.Option("--private", help="On the hub, for its owners only.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="Keep to widths that an engine can run: vllm, gguf, tp=N; repeatable."),
]


@app.command(short_help="Make MODEL smaller, and measure what that costs.")
def compress(  # noqa: PLR0913, PLR0917 - the signature is the command line
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    method: Method = "slicegpt",
    keep: Keep = None,
    slice_: Slice = None,
    option: Options = None,
    untie: Untie = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{SOURCES}, or self: text that the model writes; repeatable, with a weight as in --data c4=0.5."
            "  [default: wikitext2]",
        ),
    ] = None,
    text_column: Column = None,
    samples: Samples = 128,
    length: Length = None,
    seed: Seed = 0,
    eval_data: Annotated[str | None, typer.Option(help="Text to measure on.  [default: held out from --data]")] = None,
    evaluate_: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure perplexity before and after.")
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    multiple_of: Multiple = None,
    scratch: Annotated[Path | None, typer.Option(help="Folder for hidden states too large for memory.")] = None,
    recipe: Recipe = None,
    set_: Sets = None,
    allocate: Allocate = None,
    restore: Restored = False,
    cache: Cache = None,
    target: Targets = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Replay a result's plan.json.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload the result to the hub too, as owner/name.")] = None,
    private: Private = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model folder at --out, and the files where --push goes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make MODEL smaller and write it to --out, with its loss of quality measured."""
    chosen: dict[str, Any] = {"options": parse_options(option, untie), "keep": keep, "slice": slice_, "method": method}
    chosen |= {"recipe": given_recipe(recipe, set_), "allocate": allocate, "restore": restore, "cache": cache}
    chosen |= {"target": target}
    if plan_file is None:
        check_early(chosen)
    goal = pushed_to(push, private=private, overwrite=overwrite)
    from microtome import hub, mixture, pipeline
    from microtome.checkpoint import parse_size
    from microtome.edit import Plan

    with Bar(quiet=as_json) as bar:
        result = pipeline.compress(
            model,
            **chosen,
            plan=None if plan_file is None else Plan.read(plan_file),
            data=mixture.parsed(data or ["wikitext2"]),
            text_column=text_column,
            out=out,
            samples=samples,
            length=length,
            seed=seed,
            eval_data=eval_data,
            measure=evaluate_,
            device=device,
            dtype=dtype,
            multiple_of=multiple_of,
            overwrite=overwrite,
            max_shard_size=parse_size(max_shard_size),
            revision=revision,
            scratch=scratch,
            command=shlex.join(["microtome", *sys.argv[1:]]),
            progress=bar,
        )
    address = None if goal is None else hub.push(result.folder, goal)
    show_result(result, as_json, address)


@app.command(short_help="Show what `compress` would come to; nothing is written.")
def plan(  # noqa: PLR0913, PLR0917
    model: Model,
    method: Method = "slicegpt",
    keep: Keep = None,
    slice_: Slice = None,
    option: Options = None,
    untie: Untie = False,
    samples: Samples = 128,
    length: Length = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    multiple_of: Multiple = None,
    recipe: Recipe = None,
    set_: Sets = None,
    allocate: Allocate = None,
    restore: Restored = False,
    cache: Cache = None,
    target: Targets = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, where widths depend on it (influence, redundancy, global, auto); as for compress."),
    ] = None,
    text_column: Column = None,
    as_json: Json = False,
) -> None:
    """Show the widths, sizes and memory that `compress` would come to; nothing is written."""
    chosen: dict[str, Any] = {"options": parse_options(option, untie), "keep": keep, "slice": slice_, "method": method}
    chosen |= {"recipe": given_recipe(recipe, set_), "allocate": allocate, "restore": restore, "cache": cache}
    chosen |= {"target": target}
    check_early(chosen)
    from microtome import mixture, pipeline, report

    found = pipeline.preview(
        model,
        **chosen,
        data=None if data is None else mixture.parsed(data),
        text_column=text_column,
        samples=samples,
        length=length,
        dtype=dtype,
        multiple_of=multiple_of,
        revision=revision,
    )
    if as_json:
        print_json(found.to_json())
        return
    show_table(report.preview_rows(found))
    widths = sorted({wide for name, wide in found.widths.items() if name.startswith("residual")})
    text = ", ".join(str(one) for one in widths) or "unchanged"
    typer.echo(f"widths of the residual stream: {text}")
    for line in report.inner_lines(found.widths):
        typer.echo(line)
    memory = ", ".join(f"{name} {report.bytes_text(count)}" for name, count in found.memory.items())
    typer.echo(f"memory: {memory}")
    if found.target:
        typer.echo(f"target: {found.target}")
    packing = found.outcome.packing
    typer.echo(report.form_line(found.outcome.why_not, library=None if packing is None else packing.library))
    for note in (*report.zeros_lines(found.after), *found.notes):
        typer.echo(note)


@app.command(short_help="Measure the perplexity of MODEL.")
def evaluate(  # noqa: PLR0913, PLR0917
    model: Model,
    data: Data = "wikitext2",
    text_column: Column = None,
    baseline: Annotated[
        str | None, typer.Option(help="Another model to measure beside it, under the same protocol.")
    ] = None,
    length: Length = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure the first windows only.")] = None,
    device: Device = "auto",
    dtype: RunDtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL, and state the protocol."""
    from dataclasses import asdict

    from microtome import running

    with Bar(quiet=as_json) as bar:
        found = running.evaluate(
            model,
            data,
            baseline=baseline,
            length=length,
            limit=limit,
            text_column=text_column,
            device=device,
            dtype=dtype,
            progress=bar,
        )
    if as_json:
        print_json({name: asdict(value) for name, value in found.items()})
        return
    for name, value in found.items():
        typer.echo(f"{value.value:.4f}  {name}")
    typer.echo(next(iter(found.values())).protocol())


@app.command(short_help="Train a compressed MODEL to be more like its original.")
def heal(  # noqa: PLR0913, PLR0917
    model: Annotated[str, typer.Argument(help="Folder of a compressed model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    data: Annotated[
        list[str], typer.Option(help=f"{SOURCES}; repeatable, with a weight as for compress.", show_default=False)
    ],
    teacher: Annotated[
        str | None, typer.Option(help="The original, a folder or hub id.  [default: the one that plan.json names]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.  [default: 300 without --minutes]")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to train; whichever ends first.")] = None,
    train: Annotated[
        str, typer.Option(help="full: all weights but embeddings; lora: adapters; auto: full up to 100 M numbers.")
    ] = "auto",
    rate: Annotated[float | None, typer.Option(help="Peak learning rate.  [default: 3e-4 full, 1e-3 lora]")] = None,
    batch: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.")] = 1,
    loss: Annotated[str, typer.Option(help="distil: towards the original; text: the next token alone.")] = "distil",
    option: Annotated[
        list[str] | None,
        typer.Option("-o", "--option", help="Further setting, name=value (docs/heal.md); repeatable."),
    ] = None,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros/--fill-zeros", help="Of sparse matrices; else they become dense.")
    ] = True,
    samples: Annotated[int, typer.Option(min=2, help="Windows to learn from.")] = 2048,
    length: Length = None,
    seed: Annotated[int, typer.Option(help="Of windows, their order, and adapters.")] = 0,
    text_column: Column = None,
    eval_data: Annotated[str | None, typer.Option(help="Text to measure on.  [default: held out from --data]")] = None,
    evaluate_: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure perplexity before and after.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for the state of the run.  [default: OUT.partial]")
    ] = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a compressed MODEL to be more like its original, and write it to --out in the same shapes and form."""
    from microtome import healed, mixture, recipes

    said: dict[str, Any] = dict(recipes.overrides(option or []))
    said |= {"steps": steps, "minutes": minutes, "train": train, "rate": rate, "batch": batch, "loss": loss}
    said |= {"accumulate": accumulate, "keep_zeros": keep_zeros, "samples": samples, "seed": seed}
    chosen = recipes.healing(said)
    try:
        with Bar(quiet=as_json) as bar:
            result = healed.heal(
                model,
                data=mixture.parsed(data),
                out=out,
                teacher=teacher,
                options=chosen,
                length=length,
                eval_data=eval_data,
                text_column=text_column,
                measure=evaluate_,
                device=device,
                overwrite=overwrite,
                resume=resume,
                scratch=scratch,
                command=shlex.join(["microtome", *sys.argv[1:]]),
                progress=bar,
            )
    except KeyboardInterrupt:
        state = healed.state_of(out, scratch)
        if not (state / healed.STATE).exists():
            raise
        typer.echo(f"microtome: stopped; {state} keeps the run: the same command with --resume goes on.", err=True)
        raise typer.Exit(STOPPED_WITH_STATE) from None
    if as_json:
        print_json(result.to_json())
        return
    for line in result.lines():
        typer.echo(line)
    typer.echo(f"written to {result.folder}")


@app.command(short_help="Let MODEL go on from PROMPT.")
def generate(  # noqa: PLR0913, PLR0917
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Type to run in: auto is the stored one.")] = "auto",
) -> None:
    """Let MODEL go on from PROMPT."""
    from microtome import running

    typer.echo(
        running.generate(model, prompt, tokens=tokens, temperature=temperature, seed=seed, device=device, dtype=dtype)
    )


@app.command(short_help="Time MODEL beside --baseline, in one or several engines.")
def bench(  # noqa: PLR0913, PLR0917
    model: Model,
    baseline: Annotated[str, typer.Option(help="The model to compare with.", show_default=False)],
    engine: Annotated[
        list[str] | None,
        typer.Option(help="hf, llamacpp, onnx, vllm; repeatable.  [default: hf, or what a .gguf or .onnx file is for]"),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeatable.  [default: 1, 8]")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each process.")] = None,
    device: Device = "auto",
    dtype: RunDtype = "auto",
    quantize: Annotated[str | None, typer.Option(help="Type of llama.cpp to time in, such as Q8_0.")] = None,
    as_json: Json = False,
) -> None:
    """Time MODEL beside --baseline, in turn: prefill and decode, speed-ups with their range, memory, file sizes."""
    from microtome import bench, report

    names = [one for given in engine or [] for one in given.split(",") if one] or [bench.engine_of(model)]
    with Bar(quiet=as_json) as bar:
        found, refused = bench.compare_all(
            model,
            baseline,
            list(dict.fromkeys(names)),
            batches=batch or (1, 8),
            prompt=prompt,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            device=device,
            dtype=dtype,
            quantize=quantize,
            progress=bar,
        )
    if as_json:
        print_json({"engines": [one.to_json() for one in found], "refused": refused})
        return
    for one in found:
        sizes = [
            (name, report.bytes_text(old), report.bytes_text(new), f"{old / max(new, 1):.2f}")
            for name, (old, new) in (("weights on disk", one.file_bytes), ("peak memory", one.peak_bytes))
        ]
        show_table(one.rows() + sizes, ("", "baseline", "compressed", "times better"), title=one.engine)
        for line in one.remarks():
            typer.echo(line)
    for line in refused:
        typer.echo(line)


@app.command(short_help="Show sizes, spaces, what methods could cut, and spectra.")
def inspect(  # noqa: PLR0913, PLR0917
    model: Model,
    data: Annotated[str | None, typer.Option(help="Text to run through it; as for compress.  [default: none]")] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Show the reach of this method only.  [default: all]")
    ] = None,
    samples: Samples = 128,
    length: Length = None,
    text_column: Column = None,
    seed: Seed = 0,
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Read the weights, for spectra; else only the config.")
    ] = True,
    device: Device = "auto",
    revision: Revision = None,
    png: Annotated[Path | None, typer.Option(help="Draw a figure into this file; needs matplotlib.")] = None,
    as_json: Json = False,
) -> None:
    """Show sizes, spaces, what methods could cut, and spectra of MODEL; with --data also of the text in it."""
    from microtome import inspection, plots, tables

    if png is not None:
        plots.check(png, weights=weights)
    with Bar(quiet=as_json) as bar:
        found = inspection.inspect(
            model,
            data=data,
            samples=samples,
            length=length,
            text_column=text_column,
            seed=seed,
            device=device,
            revision=revision,
            method=method,
            weights=weights,
            progress=bar,
        )
    if png is not None:
        plots.write(found, png)
    if as_json:
        print_json(found.to_json())
        return
    typer.echo(f"{found.name}: {found.architecture}, {found.dtype}")
    for table in tables.tables(found):
        show_table(table.rows, table.columns, title=table.title, left=table.words)
    for line in tables.legend(found):
        typer.echo(line)
    if png is not None:
        typer.echo(f"figure: {png}")


@app.command(short_help="Compress by many methods and sizes, into one table.")
def sweep(
    models: Annotated[list[str], typer.Argument(help="Folders or hub ids.", show_default=False)],
    recipe: Annotated[
        Path, typer.Option("-r", "--recipe", help="YAML: what to vary (docs/sweep.md).", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Table to write, .csv or .parquet; gone on with if there.")] = Path(
        "sweep.csv"
    ),
    cache: Annotated[Path | None, typer.Option(help="Folder for statistics, kept.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compress MODELS by many methods, keeps, texts and seeds, and write one table."""
    from dataclasses import asdict

    from microtome import sweep

    held = sweep.read(recipe)
    with Bar(quiet=as_json) as bar:
        rows = sweep.sweep(models, held, out, device=device, cache=cache, progress=bar)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for row in rows:
        told = row.error or f"{row.perplexity:.4g} (dense {row.dense:.4g}) at {row.decoder_ratio:.3f} of the blocks"
        dial = f"keep {row.keep}" if row.density is None or row.keep != 1.0 else f"density {row.density:g}"
        entry = f"{row.entry}{' restored' if row.restore else ''}{f' then {row.then}' if row.then else ''}"
        typer.echo(f"{row.model}  {entry}  {dial}: {told}")
    typer.echo(f"written to {out}")


@app.command(short_help="Write MODEL in the format of another engine.")
def export(  # noqa: PLR0913, PLR0917
    model: Annotated[str, typer.Argument(help="Folder or hub id, compressed or not.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="Format; `microtome list` shows all.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder or file to write.  [default: beside MODEL, named after it]")
    ] = None,
    quantize: Annotated[
        list[str] | None, typer.Option("--quantize", help="Type to quantise to, such as Q8_0; repeatable.")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Run the result in its engine.  [default: where it is installed]"),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="Of the format, name=value (docs/export.md); repeatable.")
    ] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write MODEL in the format of another engine, and hold what the engine computes against MODEL itself."""
    from microtome import export

    with Bar(quiet=as_json) as bar:
        found = export.export(
            model,
            to=to,
            out=out,
            quantize=quantize or (),
            verify=verify,
            dtype=dtype,
            overwrite=overwrite,
            options=parse_options(option, untie=False),
            progress=bar,
            revision=revision,
        )
    if as_json:
        print_json(found.to_json())
        return
    for line in found.lines():
        typer.echo(line)


@app.command(short_help="Upload a model FOLDER to the hub.")
def push(
    folder: Annotated[Path, typer.Argument(help="Model folder, as written here.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Where it goes on the hub: owner/name.", show_default=False)],
    private: Private = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it is not there.  [default: the main one]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model FOLDER to the hub, from where it loads by its name; the token is HF_TOKEN or a login's."""
    from microtome import hub

    address = hub.push(folder, repo, private=private, revision=revision, overwrite=overwrite)
    if as_json:
        print_json({"repo": repo, "revision": revision, "pushed": address})
        return
    typer.echo(f"pushed to {address}")


@app.command(short_help="Write MODEL to one smaller file.")
def pack(  # noqa: PLR0913, PLR0917
    model: Annotated[str, typer.Argument(help="Folder of a model in float16 or bfloat16.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File to write.", show_default=False)],
    exact: Annotated[bool, typer.Option("--exact", help="Every stored word comes back as it was.")] = False,
    coded: Annotated[bool, typer.Option("--coded", help="Entropy-code what is left, too.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="Without --exact: what words may be off by.  [default: 2^-8, bfloat16 2^-5]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Round to float16 or bfloat16 first; auto does not.")] = "auto",
    inner: Annotated[bool, typer.Option("--inner/--stream", help="Turn heads too, or the stream alone.")] = True,
    leave: Annotated[list[str] | None, typer.Option(help="A site that is not turned; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write MODEL to one smaller file: bits that choose among models of the same function are not stored."""
    from microtome import bitsback
    from microtome.loading import dtype_of

    with Bar(quiet=as_json) as bar:
        report = bitsback.pack(
            model,
            out,
            exact=exact,
            coded=coded,
            tolerance=tolerance,
            dtype=dtype_of(dtype),
            inner=inner,
            leave=leave or (),
            overwrite=overwrite,
            progress=bar,
        )
    show_packed(report, as_json, f"written to {report.file}")


@app.command(short_help="Write the model in FILE as an ordinary folder.")
def unpack(
    file: Annotated[Path, typer.Argument(help="File that `microtome pack` wrote.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write the model in FILE as an ordinary folder, checked against its checksums."""
    from microtome import bitsback
    from microtome.checkpoint import parse_size

    with Bar(quiet=as_json) as bar:
        report = bitsback.unpack(
            file, out, overwrite=overwrite, max_shard_size=parse_size(max_shard_size), progress=bar
        )
    show_packed(report, as_json, f"written to {report.folder}")


@app.command(name="list", short_help="Show methods, architectures, data sets and formats.")
def list_(as_json: Json = False) -> None:
    """Show the methods with their options, the architectures, the data sets and the formats."""
    from microtome import arch, corpora, export, methods

    known: dict[str, dict[str, Any]] = {
        name: {"summary": methods.summary(name), "options": methods.described(methods.find(name))}
        for name in methods.known()
    }
    formats = {name: export.find(name) for name in export.known()}
    if as_json:
        found: dict[str, Any] = {"methods": known, "architectures": sorted(arch.known())}
        about = {name: {"summary": one.SUMMARY, "quantize": list(one.QUANTIZE)} for name, one in formats.items()}
        print_json(found | {"data": sorted([*corpora.KNOWN, "self"]), "formats": about})
        return
    for name, facts in known.items():
        typer.echo(f"{name}: {facts['summary'].split(': ', 1)[-1]}")
        for option, about in facts["options"].items():
            values = "|".join(about["values"]) if isinstance(about["values"], list) else about["values"]
            setting = f"{option}={show(about['default'])}"
            typer.echo(f"    -o {setting:<22} {values}")
    typer.echo(f"architectures: {', '.join(sorted(arch.known()))}")
    typer.echo("data: a file or folder, owner/name on the hub with --text-column, or one of")
    for name, one in corpora.KNOWN.items():
        typer.echo(f"    {name:<25} {one.about}")
    typer.echo(f"    {'self':<25} text that the model writes itself, for calibration only")
    typer.echo("formats of export:")
    for name, form in formats.items():
        typer.echo(f"    {name:<25} {form.SUMMARY}")


@app.command(short_help="Compress the built-in model, for a first look.")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("demo-out"),
    keep: Annotated[float, typer.Option(help="Fraction of the blocks' parameters to keep.")] = 0.8,
    as_json: Json = False,
) -> None:
    """Compress the built-in model: calibrate on one part of Python's documentation, measure on the other."""
    from microtome import demo, pipeline
    from microtome.texts import Text

    train, held_out = demo.corpus()
    with Bar(quiet=as_json) as bar:
        result = pipeline.compress(
            demo.MODEL,
            keep=keep,
            data=Text("Python's documentation, training part", "\n\n".join(train)),
            eval_data=Text("Python's documentation, held-out part", "\n\n".join(held_out)),
            out=out,
            overwrite=True,
            command="microtome demo",
            progress=bar,
        )
    show_result(result, as_json)


# --- the terminal ---------------------------------------------------------------------------------------------------


def parse_options(pairs: list[str] | None, untie: bool) -> dict[str, Any]:
    """`-o name=value` to a dict."""
    from microtome.errors import BadInput

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise BadInput(f"-o {pair} has no value: write -o name=value.")
        found[name] = value
    return found | ({"untie": True} if untie else {})


def given_recipe(file: Path | None, pairs: list[str] | None) -> dict[str, Any] | None:
    """The contents of a recipe's file with `--set path=value` applied."""
    if file is None:
        if pairs:
            from microtome.errors import BadInput

            raise BadInput(f"--set {pairs[0]} changes a recipe: give --recipe FILE with it.")
        return None
    from microtome import recipes

    return recipes.given(file, recipes.overrides(pairs or []))


def check_early(chosen: dict[str, Any]) -> None:
    """Refuse a wrong dial, method or option before anything slow is imported or opened."""
    from microtome import methods
    from microtome.target import Target

    Target.parsed(chosen["target"])
    if chosen.get("recipe") is not None:
        return
    methods.check_dials(chosen["method"], chosen["keep"], chosen["slice"])
    methods.build(chosen["method"], chosen["options"])


def show(value: Any) -> str:
    """An option's default as a user would type it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def print_json(value: Any) -> None:
    """JSON on standard output, and nothing else."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(
    rows: Sequence[tuple[str, ...]],
    names: tuple[str, ...] = ("", "before", "after", "ratio"),
    *,
    title: str = "",
    left: frozenset[str] = frozenset(),
) -> None:
    """Two things in columns; numbers stand to the right, columns named in `left` are words and may break."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", show_header=any(names))
    for name in names:
        words = not name or name in left
        table.add_column(name, justify="left" if words else "right", no_wrap=name not in left)
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 110)).print(table)  # a pipe has no width


def pushed_to(repo: str | None, *, private: bool, overwrite: bool) -> Any:
    """Where a result goes on the hub, asked before anything slow; None where it goes nowhere."""
    if repo is None:
        if private:
            from microtome.errors import BadInput

            raise BadInput("--private is of a repository on the hub: give --push owner/name with it.")
        return None
    from microtome import hub

    return hub.destination(repo, private=private, overwrite=overwrite)


def show_result(result: Any, as_json: bool, address: str | None = None) -> None:
    """What came of a compression, and where it was pushed to."""
    if as_json:
        print_json(result.to_json() | ({} if address is None else {"pushed": address}))
        return
    from microtome import report

    show_table(report.result_rows(result))
    for line in report.lines_after(result):
        typer.echo(line)
    typer.echo(f"written to {result.folder}")
    if address is not None:
        typer.echo(f"pushed to {address}")


def show_packed(report: Any, as_json: bool, last: str) -> None:
    """What came of packing or unpacking."""
    if as_json:
        print_json(report.to_json())
        return
    show_table(report.rows(), ("", "bytes", "of the model"))
    for line in report.lines():
        typer.echo(line)
    typer.echo(last)


class Bar:
    """Progress on standard error with an estimate of the time left; silent when it is not a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet or not sys.stderr.isatty()
        self.bar: Any = None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
        return self

    def __call__(self, what: str, fraction: float) -> None:
        """Show how far one stage is."""
        if self.bar is None:
            return
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=1.0)
        self.bar.update(self.tasks[what], completed=fraction)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


STOPPED = 130  # what a shell expects after Ctrl-C
STOPPED_WITH_STATE = -STOPPED  # the same for a verb that has said itself what it leaves
USAGE_ERROR = typer.BadParameter.__mro__[1]  # of a wrong option, argument or verb; typer does not export it
NO_MEMORY = (
    "out of memory. Use fewer --samples, a smaller --length, --scratch FOLDER for hidden states, or --device cpu."
)


def fail(message: str) -> int:
    """One line on standard error, and the exit code of a user's mistake."""
    typer.echo(f"microtome: {' '.join(message.split())}", err=True)
    return 2


def explained(error: Any) -> str | None:
    """What the user got wrong or the machine lacks, in one line; None for anything else, which is a bug."""
    if isinstance(error, USAGE_ERROR):
        where = error.ctx.command_path if error.ctx else "microtome"
        line = error.format_message().rstrip(".")
        return f"{line}{'' if line.endswith('?') else '.'} See `{where} --help`."
    from microtome.errors import MicrotomeError, is_out_of_memory

    if isinstance(error, MicrotomeError):
        return str(error)
    return NO_MEMORY if is_out_of_memory(error) else None


HEAP = {-1: 2**31 - 1, -3: 2**25}  # mallopt's trim and mmap thresholds, in bytes: the most that glibc takes


def hold_heap() -> None:
    """Let glibc keep what is freed: given back, it costs a page fault for every 4 KiB of the next tensor.

    Tensors beyond 32 MiB are given back all the same. Other systems, and thresholds that the user has set, stay as they
    are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    import ctypes

    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for threshold, most in HEAP.items():
            mallopt(threshold, most)


def main() -> None:
    """Run the command line; a mistake is one line and exit code 2. Told to end, it cleans up as after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hold_heap()
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="microtome", standalone_mode=False) or 0
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        code = fail(line)
    if code == STOPPED:
        typer.echo("microtome: stopped; nothing was left behind.", err=True)
    sys.exit(STOPPED if code == STOPPED_WITH_STATE else code)


if __name__ == "__main__":
    main()
