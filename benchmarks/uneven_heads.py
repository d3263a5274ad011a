"""Attention whose queries and values differ in width, as it comes and filled up with zeros to one width.

    python benchmarks/uneven_heads.py

fp32, one thread, process milliseconds, the least of several interleaved repeats; forward alone, and with the way back.
Writes benchmarks/uneven_heads.json.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SHAPES = ((8, 8, 256, 8, 4), (8, 8, 256, 6, 8), (8, 6, 256, 32, 20), (8, 6, 256, 20, 32), (1, 16, 512, 64, 48), (1, 32, 2048, 96, 128))  # fmt: skip
REPEATS = 10


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As it comes."""
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def even(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """At one width."""
    size, scale = max(query.shape[-1], value.shape[-1]), query.shape[-1] ** -0.5
    heads = [pad(one, (0, size - one.shape[-1])) for one in (query, key, value)]
    return scaled_dot_product_attention(*heads, is_causal=True, scale=scale)[..., : value.shape[-1]]


def milliseconds(attend: Callable[..., Tensor], inputs: Sequence[Tensor], *, back: bool) -> float:
    """Of one call."""
    start = time.process_time()
    with torch.set_grad_enabled(back):
        found = attend(*inputs)
    if back:
        found.sum().backward()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    """Every shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for batch, heads, length, wide, value_wide in SHAPES:
        sizes = (wide, wide, value_wide)
        inputs = [torch.randn(batch, heads, length, size, requires_grad=True) for size in sizes]
        spent: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for name, attend in (("plain", plain), ("even", even)):
                spent.setdefault(name, []).append(milliseconds(attend, inputs, back=False))
                spent.setdefault(f"{name}, and back", []).append(milliseconds(attend, inputs, back=True))
        least = {name: round(min(found), 2) for name, found in spent.items()}
        ratios = {"faster": least["plain"] / least["even"]}
        ratios["faster, and back"] = least["plain, and back"] / least["even, and back"]
        shape = {"batch": batch, "heads": heads, "tokens": length, "query": wide, "value": value_wide}
        rows.append({**shape, **least, **{name: round(one, 2) for name, one in ratios.items()}})
        print(rows[-1], flush=True)
    record = {"machine": platform.machine(), "torch": torch.__version__, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
