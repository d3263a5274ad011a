"""What was done, in a table: for the terminal and for the model card."""

import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from microtome import corpora, methods
from microtome.budget import Sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import EvalResult

    from microtome.evaluate import Perplexity
    from microtome.forecast import Preview
    from microtome.pipeline import Result

Row = tuple[str, str, str, str]
COUNTS = (
    ("decoder", "decoder parameters"),
    ("total", "total parameters"),
    ("stored", "stored parameters (tied once)"),
    ("flops", "FLOPs per token"),
)


def bytes_text(count: int) -> str:
    """Bytes in the unit that a reader expects."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def size_rows(before: Sizes, after: Sizes) -> list[Row]:
    """Parameters, FLOPs and bytes, before and after."""
    rows = [
        (label, f"{getattr(before, name):,}", f"{getattr(after, name):,}", f"{after.ratio(name, before):.4f}")
        for name, label in COUNTS
    ]
    if after.nonzero is not None:
        had = before.stored if before.nonzero is None else before.nonzero
        rows.insert(3, ("of these not zero", f"{had:,}", f"{after.nonzero:,}", f"{after.nonzero / max(had, 1):.4f}"))
    for name, label in (("nbytes", "weights on disk"), ("kv_bytes", "key-value cache per token")):
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and new is not None:
            rows.append((label, bytes_text(old), bytes_text(new), f"{after.ratio(name, before):.4f}"))
    return rows


def perplexity_row(before: "Perplexity | None", after: "Perplexity | None") -> list[Row]:
    """Perplexity before and after, where it was measured."""
    if before is None and after is None:
        return []
    old, new = (f"{one.value:.4g}" if one is not None else "not measured" for one in (before, after))
    ratio = f"{after.value / before.value:.4f}" if before is not None and after is not None else ""
    return [("perplexity", old, new, ratio)]


def result_rows(result: "Result") -> list[Row]:
    """The whole table of a result."""
    return size_rows(result.before, result.after) + perplexity_row(result.perplexity_before, result.perplexity_after)


def form_line(why_not: str | None, model_type: str | None = None, library: str | None = None) -> str:
    """Which class loads the result, with which library beside transformers."""
    if why_not is None:
        kind, also = f" ({model_type})" if model_type else "", f"and {library}" if library else "alone"
        return f"stock checkpoint{kind}: loads with transformers {also}"
    return f"Microtome checkpoint: loads after `import microtome`, or with trust_remote_code ({why_not})"


def lines_after(result: "Result") -> list[str]:
    """Protocol, form and remarks below the table."""
    lines = (
        [f"seconds: {', '.join(f'{name} {value:.1f}' for name, value in result.seconds.items())}"]
        if result.seconds
        else []
    )
    for one in (result.perplexity_after, result.perplexity_before):
        if one is not None:
            lines.insert(0, one.protocol())
            break
    return [*lines, form_line(result.why_not, library=result.library), *zeros_lines(result.after), *result.notes]


def zeros_lines(after: Sizes) -> list[str]:
    """What zeros are worth, where there are any."""
    if after.nonzero is None:
        return []
    share = f"{100 * (1 - after.nonzero / after.stored):.1f} %"
    return [f"{share} of the stored numbers are zero: by themselves they save neither memory, nor bytes, nor time"]


def markdown(rows: list[Row]) -> str:
    """A table for a card."""
    head = ["| | before | after | ratio |", "|---|--:|--:|--:|"]
    return "\n".join([*head, *(f"| {label} | {old} | {new} | {ratio} |" for label, old, new, ratio in rows)])


def preview_rows(preview: "Preview") -> list[Row]:
    """The table of a dry run."""
    return size_rows(preview.before, preview.after)


INNER = {
    "ffn": "neurons",
    "qk": "query-key channels",
    "vo": "value channels",
    "heads": "key-value groups",
    "attn_read": "coordinates that attention reads",
    "attn_write": "coordinates that attention writes",
    "mlp_read": "coordinates that the MLP reads",
    "mlp_write": "coordinates that the MLP writes",
}


def inner_lines(widths: "Mapping[str, int]") -> list[str]:
    """The widths inside the blocks, a line for each kind."""
    found: dict[str, list[int]] = {}
    for name, wide in widths.items():
        block, _, kind = name.partition(".")
        if block.isdigit():
            found.setdefault(INNER.get(kind, f"{kind} halves" if kind else "blocks"), []).append(wide)
    return [
        f"{what}: {kept[0]} in every block" if len(set(kept)) == 1 else f"{what} by block: {' '.join(map(str, kept))}"
        for what, kept in found.items()
    ]


AFTER_IMPORT = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
"""
TEACH = "import microtome  # teaches transformers this architecture; or pass trust_remote_code=True\n"
LOAD = {True: AFTER_IMPORT, False: TEACH + AFTER_IMPORT}


def card(result: "Result", facts: dict[str, Any], command: str | None) -> str:
    """README.md of a result: metadata, table, what was done with what, and how to load it."""
    from huggingface_hub import ModelCardData

    plan = result.plan
    name = str(plan.source.get("name"))
    hub_id = name if plan.source.get("revision") else None
    first = {field: getattr(plan, field) for field in ("method", "options", "keep", "slice")}
    steps: list[dict[str, Any]] = [first, *plan.then]
    structured = any(step["keep"] is not None or step["slice"] is not None for step in steps)
    metadata = ModelCardData(
        base_model=hub_id,
        base_model_relation=("quantized" if result.library else "finetune") if hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(
            dict.fromkeys(
                ["microtome", "compressed", *["structured-pruning"] * structured, *(step["method"] for step in steps)]
            )
        ),
        model_name=result.folder.name,
        eval_results=evaluated(result.perplexity_after),
        **facts,
    )
    made = f"method {done(first)}" if len(steps) == 1 else f"in {len(steps)} steps: {'; '.join(map(done, steps))}"
    options = [
        f"- options{named}: " + ", ".join(f"{key}={value}" for key, value in step["options"].items())
        for step in steps
        for named in [f" of `{step['method']}`" if len(steps) > 1 else ""]
    ]
    text = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {result.folder.name}\n",
        f"`{name.rstrip('/').rsplit('/', 1)[-1]}` made smaller by Microtome: {made}.\n",
        markdown(result_rows(result)) + "\n",
        "\n".join(f"- {line}" for line in lines_after(result) if not line.startswith("seconds")) + "\n",
        f"## How it was made\n\n```sh\n{command or 'microtome.compress(...), from Python'}\n```\n",
        *([f"- target: {', '.join(plan.target)}"] if plan.target else []),
        *options,
        f"- {calibration_line(plan.calibration)}\n- {source_line(plan.source)}",
        f"- versions: {', '.join(f'{one} {version(one)}' for one in ('microtome', 'torch', 'transformers'))}",
        "- `plan.json` holds the same as data.\n",
        f"## Use\n\n```python\n{LOAD[result.stock].replace('AutoModelForCausalLM', result.auto_class)}```\n",
        "Perplexity is only comparable under the same protocol. The licence of the original model applies.\n",
    ]
    return "\n".join(text)


def done(step: dict[str, Any]) -> str:
    """A step as a plan keeps it, in words; its size is that of all steps so far."""
    dial = methods.dial_of(step["method"]) if step["method"] not in {"restore", "heal"} else None
    if dial is not None:
        size = methods.build(step["method"], step["options"]).told
    elif step["keep"] is not None:
        size = f"keep {step['keep']:.4g}"
    else:
        size = "" if step["slice"] is None else f"slice {step['slice']:.4g}"
    return f"`{step['method']}`" + (f", {size}" if size else "")


def evaluated(found: "Perplexity | None") -> "list[EvalResult] | None":
    """A perplexity as the hub's metadata has it, with its protocol; None where nothing was measured."""
    if found is None:
        return None
    from huggingface_hub import EvalResult

    name = found.source.partition(" (")[0]
    known, split = corpora.KNOWN.get(name), re.search(r"\((train|test)\b", found.source)
    protocol = ("windows", "length", "stride", "tokens", "dtype", "sha256")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=known.repo if known else name if corpora.is_id(name) else "text",
            dataset_name=found.source,
            dataset_split=split[1] if split else None,
            dataset_revision=known.revision if known else None,
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=found.value,
            metric_args={field: getattr(found, field) for field in protocol},
        )
    ]


def remeasured(text: str, name: str, found: "Perplexity | None") -> str:
    """A card whose title and metadata are of a model made from the one that it was written for."""
    from huggingface_hub import ModelCard

    card: Any = ModelCard(text)
    card.text = re.sub(r"^# .*$", lambda _: f"# {name}", card.text, count=1, flags=re.MULTILINE)
    card.data.model_name, card.data.eval_results = name, evaluated(found)
    return str(card)


def calibration_line(calibration: dict[str, Any]) -> str:
    """What the model was calibrated on."""
    if not calibration:
        return "calibration: none was needed"
    return (
        f"calibration: {calibration['source']}, {calibration['windows']} windows of {calibration['length']} tokens "
        f"(sha256 {str(calibration['sha256'])[:12]})"
    )


def source_line(source: dict[str, Any]) -> str:
    """What was compressed."""
    revision = f", revision {source['revision']}" if source.get("revision") else ""
    name = str(source.get("name")).rstrip("/").rsplit("/", 1)[-1]
    return f"source: {name}{revision}, digest {str(source.get('digest'))[:12]}"
