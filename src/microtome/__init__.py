"""Microtome makes trained language models smaller by deleting rows and columns of their weight matrices.

    import microtome
    result = microtome.compress("path/to/model", keep=0.8, data="text.jsonl", out="smaller")

The one effect that importing it has: transformers' auto classes learn to load what Microtome writes.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from microtome.loading import register

if TYPE_CHECKING:
    from microtome.evaluate import Perplexity, perplexity
    from microtome.healed import Healed, heal
    from microtome.hub import push
    from microtome.pipeline import Preview, Result, compress, preview

try:
    __version__ = version("microtome")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

_HOMES = {
    "compress": "pipeline", "preview": "pipeline", "Result": "pipeline", "Preview": "pipeline",
    "perplexity": "evaluate", "Perplexity": "evaluate", "heal": "healed", "Healed": "healed",
    "push": "hub",
}  # fmt: skip

register()


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'microtome' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"microtome.{_HOMES[name]}"), name)


__all__ = [
    "Healed", "Perplexity", "Preview", "Result", "__version__", "compress", "heal", "perplexity", "preview", "push",
]  # fmt: skip
