"""Microtome's own checkpoints: the canonical decoder under its own names, so that a result can be cut again."""

from typing import Any

from microtome.arch.llama import names
from microtome.modeling_microtome import MicrotomeConfig

MODEL_TYPES = ("microtome",)
CONTAINERS = ()
HANDLED = frozenset(MicrotomeConfig.__annotations__) | {"per_layer_config"}


def tiny() -> dict[str, Any]:
    """No configs of its own: what the other tables' are cut to are its tests."""
    return {}


__all__ = ["CONTAINERS", "HANDLED", "MODEL_TYPES", "names", "tiny"]
