"""Sums kept for the next method: they depend on the weights, the tokens and the precision, and on no method.

A folder named after these three holds them, one file for every place that was measured.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from microtome.errors import BadInput
from microtome.stats import Influence, Moment


def key(digest: str, ids: Tensor, device: torch.device, dtype: torch.dtype) -> str:
    """A folder name for one model (the digest of its weights), one text and one precision."""
    sha = hashlib.sha256()
    for part in (digest, device.type, str(dtype), str(tuple(ids.shape)), importlib.metadata.version("microtome")):
        sha.update(part.encode() + b"\0")
    sha.update(ids.cpu().numpy().tobytes())
    return sha.hexdigest()[:32]


def read(file: Path) -> Moment | Influence | None:
    """What a file holds; None where there is none that can be read: then it is measured again."""
    if not file.is_file():
        return None
    try:
        return unpacked(safetensors.torch.load_file(file))
    except Exception:  # cut short, or not what was written
        return None


def write(file: Path, value: Moment | Influence) -> None:
    """Keep what was measured, put in place in one step."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        safetensors.torch.save_file(packed(value), partial)
        partial.replace(file)
    except OSError as error:
        place = file.parent.parent
        raise BadInput(f"cannot keep statistics in {place}: {error.strerror}. Give --cache another folder.") from error


def packed(value: Moment | Influence) -> dict[str, Tensor]:
    """As tensors."""
    if isinstance(value, Influence):
        return {"sum": torch.tensor(value.sum, dtype=torch.float64), "tokens": torch.tensor(value.tokens)}
    sums = {"upper_NN": value.upper_NN.cpu().contiguous(), "sum_N": value.sum_N.cpu().contiguous()}
    return {**sums, "tokens": torch.tensor(value.tokens)}


def unpacked(held: Mapping[str, Tensor]) -> Moment | Influence:
    """And back."""
    if "upper_NN" not in held:
        found = Influence()
        found.sum, found.tokens = float(held["sum"]), int(held["tokens"])
        return found
    moment = Moment(0)
    moment.upper_NN, moment.sum_N, moment.tokens = held["upper_NN"], held["sum_N"], int(held["tokens"])
    return moment
