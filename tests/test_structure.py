"""The shape of the package, read from its syntax trees: imports point down, and what style.md forbids is absent."""

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import microtome
from microtome import arch, methods

SOURCE = Path(microtome.__file__).parent
FILES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
CLI = SOURCE.with_name("microtome_cli.py")

LAYERS = (  # a module imports only what stands above it in this list; a package's own modules count as one
    ("errors",),
    ("modeling_microtome",),
    ("space", "stats", "linalg"),
    ("cache", "compensate", "grid", "distillation"),
    ("edit", "layout"),
    ("budget",),
    ("arch", "surgery"),
    ("wrapper", "inner", "plain"),
    ("columns", "members", "sparsity", "policy", "allocate", "lineage", "target"),
    ("kronecker",),
    ("pairs",),
    ("methods", "calibrate", "anatomy"),
    ("shards", "corpora", "chat"),
    ("dequantise", "packing"),
    ("source", "texts"),
    ("checkpoint", "data"),
    ("evaluate", "loading", "sampler", "demo", "hub"),
    ("planner", "vllm_plugin"),
    ("gradients", "adapters", "vllm_model", "kept"),
    ("verdict", "cut", "survey", "fisher", "masks", "curvature", "report", "running", "spectra", "training", "coded"),
    ("raised",),
    ("narrow", "bitsback", "export", "mixture", "inspection", "halves", "regression", "predictions"),
    ("refine", "heads", "probe", "bench"),
    ("passes", "restore", "healing"),
    ("order",),
    ("chain",),
    ("recipes", "spend", "shots"),
    ("forecast",),
    ("pipeline", "healed", "tables", "plots"),
    ("sweep",),
)
PURE = ("errors", "space", "linalg", "stats", "compensate", "grid", "edit", "layout", "budget")

each_file = pytest.mark.parametrize("module", FILES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def for_types_only(module: str) -> set[int]:
    """Nodes that stand under `if TYPE_CHECKING`."""
    return {
        id(inner)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imported(module: str) -> Iterator[str]:
    """Full names of what a module imports when it runs, wherever in the file."""
    skipped = for_types_only(module)
    for node in ast.walk(tree(module)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            submodules = {f"{node.module}.{one.name}" for one in node.names} & set(FILES)
            yield from submodules or {node.module}


def part(name: str) -> str:
    """`microtome.arch.llama` to `arch`; the package itself is ""."""
    return [*name.split("."), ""][1]


def ours(module: str) -> set[str]:
    """Parts of the package that a module imports, its own left out."""
    found = {part(name) for name in imported(module) if name.split(".")[0] == "microtome"}
    return found - {part(module)}


@cache
def reach(module: str) -> frozenset[str]:
    """Everything outside the package that a module comes to by its imports."""
    found = {name.split(".")[0] for name in imported(module)} - {"microtome"}
    for name in imported(module):
        if name in FILES and name not in {module, "microtome"}:
            found |= reach(name)
    return frozenset(found)


# --- imports --------------------------------------------------------------------------------------------------------


def level(name: str) -> int:
    return next((number for number, layer in enumerate(LAYERS) if name in layer), -1)


def test_every_module_has_its_place() -> None:
    assert {part(module) for module in FILES} - {""} <= {name for layer in LAYERS for name in layer}


@each_file
def test_imports_point_down(module: str) -> None:
    if module == "microtome":
        assert ours(module) <= {"loading"}
        return
    assert "" not in ours(module), "the package itself is imported by its own module"
    assert {name for name in ours(module) if level(name) >= level(part(module))} == set()


def test_the_decoder_stands_alone() -> None:
    """It ships inside checkpoints, where there is no microtome."""
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    outside = {name.split(".")[0] for name in imported("microtome.modeling_microtome")}
    assert outside <= allowed


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_model(name: str) -> None:
    assert reach(f"microtome.{name}") <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("microtome.methods.")])
def test_methods_see_neither_models_nor_files(name: str) -> None:
    seen = {
        "errors",
        "space",
        "linalg",
        "stats",
        "edit",
        "layout",
        "surgery",
        "inner",
        "columns",
        "members",
        "modeling_microtome",
        "compensate",
        "kronecker",
        "pairs",
        "grid",
        "sparsity",
    }
    seen.add("policy")  # it keeps one in a file where its options say so
    assert ours(name) <= seen
    outside = {one.split(".")[0] for one in imported(name)} - {"microtome"}
    assert outside <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("microtome.arch")])
def test_tables_have_no_forward_code(name: str) -> None:
    assert not ours(name) & {"methods", "surgery", "calibrate"}
    if name != "microtome.arch":
        assert {one.split(".")[0] for one in imported(name)} <= {"microtome", *sys.stdlib_module_names}
    functions = {node.name for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)}
    assert "forward" not in functions


def test_only_the_command_line_imports_the_pipeline() -> None:
    assert {module for module in FILES if "pipeline" in ours(module)} <= {"microtome.__main__", "microtome.sweep"}


@each_file
def test_only_a_few_modules_import_transformers(module: str) -> None:
    """The table and the loader at the edges, and the decoder itself, also as an engine serves it."""
    if "transformers" in {name.split(".")[0] for name in imported(module)}:
        decoders = {"microtome.modeling_microtome", "microtome.vllm_model"}
        assert module in {*decoders, "microtome.arch", "microtome.loading"}


HELP = """
import sys
import microtome_cli
for words in ([], *([name] for name in {names})):
    try:
        microtome_cli.app([*words, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, words
heavy = {{"torch", "transformers", "numpy", "microtome", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.skipif(not CLI.exists(), reason="there is no command line yet")
def test_help_imports_nothing_slow() -> None:
    import microtome_cli

    names = [one.name or one.callback.__name__ for one in microtome_cli.app.registered_commands if one.callback]
    assert "compress" in names
    command = [sys.executable, "-c", HELP.format(names=names)]
    done = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Usage:") == len(names) + 1


# --- habits ---------------------------------------------------------------------------------------------------------


@each_file
def test_files_are_short(module: str) -> None:
    if module != "microtome.modeling_microtome":  # one long file, as transformers has them
        assert len(FILES[module].read_text().splitlines()) <= 400


@each_file
def test_forbidden_words(module: str) -> None:
    """No relative imports, no hasattr, nothing printed, no module or name that says nothing."""
    for node in ast.walk(tree(module)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"hasattr", "print", "eval", "exec"}, (module, node.lineno)
        if isinstance(node, ast.FunctionDef) and module != "microtome.modeling_microtome":
            assert not node.name.startswith("get_"), node.name
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith(("Manager", "Helper", "Utils")), node.name
    assert not {"utils", "helpers", "common", "misc"} & set(module.split("."))


@each_file
def test_nothing_happens_at_import(module: str) -> None:
    """Top-level statements define and import; the package's own `register()` is the one effect that an import has."""
    for node in tree(module).body:
        if isinstance(node, ast.Expr):
            effect = ast.unparse(node) == "register()" and module == "microtome"
            assert effect or isinstance(node.value, ast.Constant), (module, ast.unparse(node))
        else:
            assert not isinstance(node, ast.For | ast.While | ast.With | ast.Delete), (module, node.lineno)


@each_file
def test_every_file_says_what_it_is(module: str) -> None:
    said = ast.get_docstring(tree(module))
    assert said, module
    assert said.splitlines()[0].endswith((".", ":")) or len(said.splitlines()) > 1, module


# --- registries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.known())
def test_a_method_is_one_frozen_dataclass(name: str) -> None:
    module = importlib.import_module(f"microtome.methods.{name}")
    public = [one for one in classes(module) if not one.__name__.startswith("_") and dataclasses.is_dataclass(one)]
    assert public == [module.METHOD]
    assert module.METHOD.__dataclass_params__.frozen
    assert all(one.default is not dataclasses.MISSING for one in dataclasses.fields(module.METHOD))
    assert methods.build(name, {}) == module.METHOD()
    assert methods.find(name) is module.METHOD
    assert module.METHOD.targets
    assert module.METHOD.targets
    assert [base.__name__ for base in module.METHOD.__mro__[1:]] == ["object"]


def classes(module: ModuleType) -> list[type]:
    """Classes that a module defines."""
    found = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("file", sorted(set(arch.known().values())))
def test_a_table_has_what_tables_have(file: str) -> None:
    table = importlib.import_module(f"microtome.arch.{file}")
    assert table.MODEL_TYPES[0] == file
    assert set(table.CONTAINERS) <= set(arch.known())
    assert isinstance(table.HANDLED, frozenset)
    for name, fields in table.tiny().items():
        assert fields["model_type"] in table.MODEL_TYPES, name
        assert arch.lower(fields).source_model_type == fields["model_type"]
    assert classes(table) == []


def test_names_of_tiny_models_are_unique() -> None:
    names = [
        name for file in set(arch.known().values()) for name in importlib.import_module(f"microtome.arch.{file}").tiny()
    ]
    assert len(names) == len(set(names))
