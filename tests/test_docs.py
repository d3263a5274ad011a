"""What the documents say is so: commands and programs run, names exist, examples of CONTRIBUTING.md pass."""

import importlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer.main
from models import SLICED, TINY, built, error, from_stock, ids, logits, lowered, stepwise, stock, stored
from tinies import HELD_OUT, compress, folder

import microtome
import microtome_cli
from microtome import arch, demo, layout, methods, planner

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("recipes/**/*.md"),
        ROOT / "src" / "microtome" / "demo" / "model" / "README.md",
    ]
}
README, ARCHITECTURE = DOCUMENTS["README.md"], DOCUMENTS["ARCHITECTURE.md"]
SMALL = ["--samples", "6", "--length", "96"]  # for `compress`: enough tokens for all widths of the demo model
HOSTS = {"arxiv.org", "keepachangelog.com", "semver.org"}
PACKAGE = Path(microtome.__file__).parent

each_document = pytest.mark.parametrize("name", DOCUMENTS)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, lines continued by a backslash joined."""
    return [
        code.replace("\\\n", " ") for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def commands(text: str, program: str) -> list[list[str]]:
    """The words of every line in a shell block that begins with a program."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [words[1:] for words in (shlex.split(line, comments=True) for line in lines) if words[:1] == [program]]


def spans(text: str) -> list[str]:
    """What stands between backquotes outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def tables(text: str) -> Iterator[list[str]]:
    """The cells of every table row."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


# --- commands -------------------------------------------------------------------------------------------------------


def options() -> dict[str, set[str]]:
    """The options of every verb of the command line."""
    verbs: Any = typer.main.get_command(microtome_cli.app)
    return {
        name: {"--help"} | {one for parameter in verb.params for one in (*parameter.opts, *parameter.secondary_opts)}
        for name, verb in verbs.commands.items()
    }


def test_options_exist() -> None:
    known = options()
    for name, text in DOCUMENTS.items():
        for words in commands(text, "microtome"):
            assert words[0] in known, (name, words)
            assert {word for word in words if word.startswith("-")} <= known[words[0]], (name, words)
        for span in spans(text):
            if span.startswith("--"):
                assert any(span.split()[0] in some for some in known.values()), (name, span)
            if span.startswith("microtome "):
                assert span.split()[1] in known, (name, span)


def test_the_first_command_comes_early() -> None:
    assert "make demo" in "\n".join(README.splitlines()[:20])
    assert len(README.splitlines()) < 150
    assert len(DOCUMENTS["CONTRIBUTING.md"].splitlines()) < 120


def test_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[0] for text in DOCUMENTS.values() for words in commands(text, "make")]
    targets += [span.split()[1] for text in DOCUMENTS.values() for span in spans(text) if span.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
        assert recipe, target
        assert target != "demo" or "microtome demo\n" in recipe[1]


def paragraphs() -> list[str]:
    """A text: the documents themselves."""
    return [paragraph for text in DOCUMENTS.values() for paragraph in text.split("\n\n") if len(paragraph) > 200]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the text that the documents name; no network."""
    rows = [json.dumps({"text": paragraph}) for paragraph in paragraphs()]
    (tmp_path / "text.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """A command line in this process, on the built-in model and few tokens; what it printed."""
    words = [str(demo.MODEL) if word == "MODEL" else word for word in words]
    words += SMALL if words[0] == "compress" else ["--limit", "2"] if words[0] == "evaluate" else []
    words += ["--tokens", "4"] if words[0] == "generate" else []
    words += [*SMALL[2:], "--samples", "4", "--steps", "2"] if words[0] == "heal" else []
    monkeypatch.setattr(sys, "argv", ["microtome", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        microtome_cli.main()
    printed = capsys.readouterr()
    assert not stopped.value.code, printed.err
    return printed.out


@pytest.mark.parametrize("name", [name for name, text in DOCUMENTS.items() if commands(text, "microtome")])
def test_commands_run(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands(DOCUMENTS[name], "microtome"):
        printed = run(words, monkeypatch, capsys)
        assert printed.strip(), words
        if "--out" in words:
            out = place / words[words.index("--out") + 1]
            assert out.is_file() or (out / "config.json").is_file()


def test_the_demo_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What `make demo` runs, on another and shorter text: the real one takes seconds to collect."""
    monkeypatch.setattr(demo, "corpus", lambda: (paragraphs()[:20], paragraphs()[-8:]))
    assert "stock checkpoint" in run(["demo"], monkeypatch, capsys)
    assert (place / "demo-out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "name", [name for name, text in DOCUMENTS.items() if name != "CONTRIBUTING.md" and blocks(text, "python")]
)
def test_programs_run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for the number of windows."""
    made = microtome.compress
    monkeypatch.setitem(
        vars(microtome), "compress", lambda *given, **named: made(*given, samples=3, length=96, **named)
    )
    for code in blocks(DOCUMENTS[name], "python"):
        names: dict[str, Any] = {}
        exec(compile(code, name, "exec"), names)
        assert torch.isfinite(logits(names["model"], ids())).all()
    assert list(place.glob("smaller*/config.json"))


# --- names ----------------------------------------------------------------------------------------------------------


@each_document
def test_links_and_files_exist(name: str) -> None:
    text, above = DOCUMENTS[name], (ROOT / name).parent
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            assert (above / target.partition("#")[0]).exists(), target
    for span in spans(text):
        file, _, test = span.split()[0].partition("::")
        if re.fullmatch(r"(src|tests|docs|benchmarks|scripts)/[\w./-]*", file):
            assert (ROOT / file).exists(), span
            assert not test or re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), span
        elif re.fullmatch(r"test_\w+", span):
            assert any(f"def {span}(" in path.read_text() for path in ROOT.glob("tests/**/*.py")), span


@each_document
def test_no_place_but_public_ones_is_named(name: str) -> None:
    """Neither a folder of somebody's machine nor a host that a reader would not look for."""
    text = DOCUMENTS[name]
    assert set(re.findall(r"https?://([^/\s)]+)", text)) <= HOSTS
    assert set(re.findall(r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|io|co|dev)\b", text)) <= HOSTS
    assert re.findall(r"(?:^|[\s`(\"'=])(/\w[\w.-]*/[\w./-]*)", text) == []


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if not name.startswith("src")])
def test_lines_fit(name: str) -> None:
    long = [line for line in DOCUMENTS[name].splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []


def defaults(name: str) -> dict[str, Any]:
    """The options of a method, and what they are unless told."""
    return {one.name: one.default for one in fields(methods.find(name))}


def test_every_method_is_told() -> None:
    for name in methods.known():
        assert f"docs/methods/{name}.md" in DOCUMENTS
        assert any(f"`{name}`" in row[0] for row in tables(README.partition("## Methods")[2]))
        page = DOCUMENTS[f"docs/methods/{name}.md"]
        for option in defaults(name):
            assert re.search(rf"`{option}\b", page), option


@pytest.mark.parametrize("name", methods.known())
def test_options_of_a_method_are_those_of_its_page(name: str) -> None:
    """Every option in a row of its own, with its default and all its values; no row for an option that is not there."""
    section = DOCUMENTS[f"docs/methods/{name}.md"].partition("## Options")[2].partition("\n## ")[0]
    told = {row[0].strip("`"): " ".join(row[1:]) for row in tables(section) if row[0].startswith("`")}
    hints, wanted = get_type_hints(methods.find(name)), defaults(name)
    assert set(told) == set(wanted)
    for option, default in wanted.items():
        values = {str(value).lower() for value in (default, *get_args(hints[option])) if isinstance(value, str | float)}
        assert all(f"`{value}`" in told[option] for value in values if value), option


def test_options_in_commands_are_taken() -> None:
    for text in DOCUMENTS.values():
        for words in commands(text, "microtome"):
            pairs = [following for word, following in pairwise(words) if word in {"-o", "--option"}]
            chosen = next((after for word, after in pairwise(words) if word in {"-m", "--method"}), "slicegpt")
            methods.build(chosen, dict(pair.split("=") for pair in pairs))
        for word in (word for span in spans(text) for word in span.split()):
            option, equals, value = word.partition("=")
            if equals and option in defaults("slicegpt"):
                methods.build("slicegpt", {option: value})


def test_every_architecture_is_told() -> None:
    rows = [row for row in tables(README) if len(row) == 3 and row[0].startswith("`")]
    told = {name: row[-1] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(arch.known()) <= set(told)
    for name, config in TINY.items():
        if name not in SLICED:
            assert told[config["model_type"]].startswith("none: `slicegpt` refuses it"), name
            continue
        out = planned(config, 0.2)
        if name == "llama-biases-wide-heads":  # biases, which Mistral has not, at a width that LlamaConfig refuses
            assert re.search(r"mistral cannot say.*refuses this config", str(out.why_not), re.DOTALL)
        elif name == "phi3-partial-longrope":
            assert re.search(r"refuses this config of 'phi3'.*mistral: .*partial_rotary_factor", str(out.why_not))
        else:
            assert (out.stock is not None) == told[config["model_type"]].startswith("stock"), name


def planned(config: dict[str, Any], slice_: float, **options: str) -> planner.Outcome:
    """What would come of a config.json."""
    found: Any = SimpleNamespace(fields=config, config=arch.lower(config))
    return planner.plan_widths(found, methods.build("slicegpt", options), None, slice_, None)


def test_every_module_is_on_the_map() -> None:
    """And nothing else is."""
    section = ARCHITECTURE.partition("## Modules")[2].partition("\n#")[0]
    told = {span for row in list(tables(section))[1:] for span in re.findall(r"`([\w/]+)`", row[0])}
    there = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if path.suffix in {"", ".py"}}
    assert told == {name for name in there if not name.startswith("__")} | {"microtome_cli"}


def test_the_glossary_has_no_word_that_the_code_has_not() -> None:
    section = ARCHITECTURE.partition("## Glossary")[2]
    code = " ".join(path.read_text() for path in PACKAGE.rglob("*.py")).lower()
    words = [word for row in list(tables(section))[1:] for word in row[0].split(", ")]
    assert len(words) == len(set(words)) >= 25
    assert [word for word in words if not re.search(rf"\b{word}(?:s|d|ed)?\b", code)] == []


# --- numbers --------------------------------------------------------------------------------------------------------


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON file."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_numbers_of_marked_tables_come_from_benchmarks() -> None:
    """To the digits printed; parameters may be in millions."""
    files = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks").glob("*.json"))]
    known = [number for file in files for number in numbers(file)]
    known += [number / 1e6 for number in known]
    found = re.findall(r"<!-- table:\w+ -->\n(.*?)<!-- /table -->", "".join(DOCUMENTS.values()), re.DOTALL)
    assert found
    for table in found:
        for row in list(tables(table))[1:]:
            for told in re.findall(r"(?<![\w.-])\d+\.\d+", " ".join(row[1:])):
                digits = len(told.partition(".")[2])
                assert any(f"{number:.{digits}f}" == told for number in known), (row[0], told)


def test_versions_that_are_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [f"python{project['requires-python']}", *project["dependencies"]]
    told = dict(re.findall(r"\b(Python|torch|transformers) (\d[\d.]*\d) or later", README))
    assert set(told) == {"Python", "torch", "transformers"}
    for name, version in told.items():
        assert any(one.startswith(f"{name.lower()}>={version}") for one in needed), name


LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_sizes_of_published_slices_are_counted() -> None:
    """The table of docs/methods/slicegpt.md: stored parameters over the dense model's, head and last junction whole."""
    dense = layout.count(arch.lower(LLAMA_2_7B))
    rows = [row for row in tables(DOCUMENTS["docs/methods/slicegpt.md"]) if re.fullmatch(r"\d+ %", row[0])]
    assert len(rows) == 4
    for row in rows:
        for gauge, told in zip(("dense", "lowrank"), row[3:], strict=True):
            out = planned(LLAMA_2_7B, int(row[0][:-2]) / 100, basis="junction", signal="residual", gauge=gauge)
            assert f"{layout.count(out.final) / dense:.3f}" == told, row


# --- the examples of CONTRIBUTING.md --------------------------------------------------------------------------------


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts an example of CONTRIBUTING.md beside the real files of its folder, and takes it away again."""
    text, added = DOCUMENTS["CONTRIBUTING.md"], []

    def add(package: Any) -> str:
        family = package.__name__.rpartition(".")[2]
        found = re.findall(
            rf"<!-- example: src/microtome/{family}/(\w+)\.py -->\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL
        )
        assert len(found) == 1
        name, code = found[0]
        assert not (PACKAGE / family / f"{name}.py").exists(), f"{name} is there by now: choose another example"
        (tmp_path / family).mkdir()
        (tmp_path / family / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / family)])
        importlib.invalidate_caches()
        added.append((package, name))
        return name

    yield add
    for package, name in added:
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)


def test_the_table_of_contributing(example: Any, tmp_path: Path) -> None:
    """Parity, with and without a cache; there and back byte for byte; and a stock result."""
    table = arch.find(example(arch))
    assert table.MODEL_TYPES[0] in arch.known()
    for name, source in table.tiny().items():
        model, tokens = built(source), ids(length=20)
        ours, want = from_stock(model, source), logits(model, tokens)
        assert error(logits(ours, tokens), want) <= 1e-5
        assert error(stepwise(ours, tokens, [7, *[1] * 13]), want) <= 1e-5
        config, tensors = lowered(source, stored(model))
        assert layout.count(config) == model.num_parameters()
        places = {
            key: place for part in layout.parts(config) for key, place in arch.stored_names(table, config, part).items()
        }
        raised = arch.raise_tensors(tensors, places)
        assert set(raised) == set(stored(model))
        assert all(torch.equal(raised[key], tensor) for key, tensor in stored(model).items())
        again = arch.raise_config(source, config)
        assert arch.stock_config(again).to_dict() == arch.stock_config(source).to_dict()
        whole = compress(model, tmp_path / f"{name}-whole", slice=0.0)
        assert whole.stock
        assert error(logits(whole.load(), HELD_OUT), logits(model, HELD_OUT)) <= 1e-5
        result = compress(model, tmp_path / name, keep=0.8)
        assert result.load().config.model_type == table.MODEL_TYPES[0]


def test_the_method_of_contributing(example: Any, tmp_path: Path) -> None:
    """Quiet neurons go without loss, twice the same, better than by lot, and what makes no sense is refused."""
    name = example(methods)
    assert name in methods.known()
    model = built(TINY["llama"])
    for block in model.model.layers:
        block.mlp.up_proj.weight.data[8:40] = 0.0
    want = logits(model, HELD_OUT)
    quiet = compress(model, tmp_path / "quiet", allocate={"ffn": 48}, method=name)
    assert error(logits(quiet.load(), HELD_OUT), want) <= 1e-5
    asked: dict[str, Any] = {"keep": 0.8, "method": name}
    cut = [compress(folder("llama"), tmp_path / f"cut{number}", **asked) for number in range(2)]
    assert all(result.stock for result in cut)
    files = [(result.folder / "model.safetensors").read_bytes() for result in cut]
    assert files[0] == files[1]
    lot = compress(folder("llama"), tmp_path / "lot", keep=0.8, method="random", options={"spaces": "ffn"})
    assert lot.after.stored == cut[0].after.stored
    want = logits(stock("llama"), HELD_OUT)
    assert distance(cut[0], want) < distance(lot, want)
    uneven = compress(folder("llama"), tmp_path / "uneven", **asked, allocate="global")
    assert len(set(uneven.plan.widths.values())) > 1
    with pytest.raises(microtome.errors.BadInput, match=r"power=-1.0 of energy is no number above 0"):
        compress(folder("llama"), tmp_path / "no", **asked, options={"power": "-1"})


def distance(result: microtome.Result, want: torch.Tensor) -> float:
    """Mean square of what the logits are off."""
    return (logits(result.load(), HELD_OUT) - want).square().mean().item()
