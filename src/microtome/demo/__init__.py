"""A small trained model and its text, so that everything can be tried without a network.

The model is a Llama of a few million parameters that ``scripts/train_demo.py`` trained on the train part of `corpus`.
The text is the documentation of Python's own standard library, which every interpreter carries with it.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from microtome.errors import BadInput

MODEL = Path(__file__).parent / "model"

HELD_OUT = 0.08
SHORTEST = 60  # characters: below it a docstring is a label ("See base class.") rather than a text
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "ensurepip", "__pycache__"}
)


def corpus() -> tuple[list[str], list[str]]:
    """Train documents and held-out documents, from the standard library of the running interpreter.

    A document is one docstring of a module, class or function, or one topic of `help()`. Which part it falls in depends
    on nothing but its first line, so a text, or two editions of it, is on the same side in every version of Python. A
    held-out document half of whose long lines also stand in a train document is dropped: the library repeats itself.

    Raises BadInput where the interpreter has no readable sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = list(dict.fromkeys(text for path in sources(root) for text in texts(path)))
    if not documents:
        raise BadInput(
            f"no documentation under {root}: this Python has no readable sources. Install them, or name a text."
        )
    train = [text for text in documents if not is_held_out(text)]
    seen = {line for text in train for line in long_lines(text)}
    return train, [text for text in documents if is_held_out(text) and not repeats(text, seen)]


def sources(root: Path) -> Iterator[Path]:
    """The library's own modules below a folder, in the order of their names, tests and installed packages left out."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted(paths, key=lambda path: path.as_posix()):
        if SKIPPED.isdisjoint(path.parts):
            yield root / path


def texts(path: Path) -> Iterator[str]:
    """The documents of one module, its own docstring first; none where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stray backslash in a source is no concern of the caller
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    found = list(topics(tree)) if path.parts[-2:] == ("pydoc_data", "topics.py") else list(docstrings(tree))
    for text in found:
        clean = "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines())
        if len(clean) >= SHORTEST:
            yield clean


def docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstring of a module and of every class and function in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""


def topics(tree: ast.Module) -> Iterator[str]:
    """The pages of `help()`: the values of the one dictionary in pydoc_data/topics.py."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (str(ast.literal_eval(value)) for value in node.values)


def is_held_out(text: str) -> bool:
    """Whether the SHA-256 of the text's first line, read as a fraction of one, is below the held-out share."""
    digest = hashlib.sha256(text.partition("\n")[0].encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def long_lines(text: str) -> list[str]:
    """The lines that say something: forty characters or more."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 40]


def repeats(text: str, seen: set[str]) -> bool:
    """Whether half or more of the long lines of a text were seen elsewhere."""
    lines = long_lines(text)
    return bool(lines) and 2 * sum(line in seen for line in lines) >= len(lines)
