"""vLLM's way in: it calls `register` in each of its processes, and then serves our format by a class of its own.

Nothing here needs vLLM. Without the plug-in vLLM runs what its Transformers backend can: docs/vllm.md has both.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from microtome import loading
from microtome.errors import UnsupportedModel
from microtome.layout import skips
from microtome.modeling_microtome import MicrotomeConfig

ARCHITECTURE = "MicrotomeForCausalLM"  # as config.json names it
WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # heads that vLLM's attention has on a CPU and on a GPU
BY_LENGTH = ("dynamic", "longrope")  # frequencies that change as a sequence grows


def register() -> None:
    """Teach transformers' auto classes and vLLM's registry our decoder; without vLLM only the former.

    May be called any number of times, in any process; the class is imported when a model asks for it.
    """
    loading.register()
    if find_spec("vllm") is None:
        return
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports] - an engine, not a dependency

    registry: Any = ModelRegistry
    if ARCHITECTURE not in registry.get_supported_archs():
        registry.register_model(ARCHITECTURE, f"microtome.vllm_model:{ARCHITECTURE}")


def attended(config: MicrotomeConfig) -> list[tuple[int, Any]]:
    """The blocks that have attention: their numbers and sizes."""
    some = ((block, config.per_layer_config[block]) for block in range(config.num_hidden_layers))
    return [(block, sizes) for block, sizes in some if not skips(sizes, "self_attn")]


def head_width(config: MicrotomeConfig) -> int:
    """The width of a head in the key-value cache: one for all blocks, the narrower ones are padded with zeros."""
    widest = max((max(one.head_dim, one.v_head_dim) for _, one in attended(config)), default=WIDTHS[0])
    return next((wide for wide in WIDTHS if wide >= widest), widest)


def check(config: MicrotomeConfig, devices: int) -> None:
    """Raise UnsupportedModel where the class for vLLM cannot run a decoder split over so many devices."""
    if why := next(reasons(config, devices), None):
        raise UnsupportedModel(f"Microtome's class for vLLM does not run this model: {why}.")


def reasons(config: MicrotomeConfig, devices: int) -> Iterator[str]:
    """Everything that stands in the way, with the place and the next step."""
    parameters = config.rope_parameters or {}
    for one in (parameters, *(nested for nested in parameters.values() if isinstance(nested, dict))):
        if one.get("rope_type") in BY_LENGTH:
            yield f"the frequencies of rope_type {one['rope_type']!r} change with the length, and a batch has many"
    blocks = attended(config)
    if not blocks:
        yield "no block has attention, and vLLM keeps account of sequences by its cache"
    if (wide := head_width(config)) > WIDTHS[-1]:
        yield f"heads are {wide} wide, and vLLM's attention has up to {WIDTHS[-1]}"
    if devices > 1 and config.qk_norm == "full":
        yield f"its norm of queries and keys spans all heads, and {devices} devices share them: use one"
    for block, sizes in blocks:
        heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
        if heads % devices or (groups % devices and devices % groups):
            shared = f"{heads} query heads and {groups} key-value heads"
            yield f"{devices} devices cannot share the {shared} of block {block}"
    for block in range(config.num_hidden_layers):
        sizes = config.per_layer_config[block]
        if not skips(sizes, "mlp") and sizes.intermediate_size % devices:
            yield f"{devices} devices cannot share the {sizes.intermediate_size} neurons of block {block}"
