"""Restoration of the head: fitted to the uncut logits by least squares, then to what they predict.

A tied head has only the final gain, or its adapter, to be fitted with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microtome.calibrate import Stream
from microtome.layout import EMBEDDING, FINAL_NORM, HEAD
from microtome.planner import Opened
from microtome.predictions import Logits, Predictor, States, newton
from microtome.regression import Fit, replace_together, with_ones
from microtome.surgery import Tensors

TOKENS = (8192, 4096)  # that predictions are fitted to, and that are held out


@dataclass(frozen=True, eq=False)
class Ending:
    """Two decoders whose streams have arrived at the final norm, and the rows [.., held out] to look at."""

    dense: Opened
    cut: Opened
    whole: Stream
    small: Stream
    slices: Sequence[tuple[slice, int]]

    def restored(self, tensors: Tensors, ridge: float | None, *, predictions: bool) -> Tensors:
        """The cut head's tensors, fitted to the uncut logits, and then to the predictions if that is wanted."""
        fitted = self.regressed(tensors, ridge)
        capped = self.small.config.logits_softcap is not None or self.whole.config.logits_softcap is not None
        return fitted if capped or not predictions else self.predicted(fitted)

    @property
    def gain_alone(self) -> bool:
        """Whether nothing but the final gain can be fitted."""
        return self.small.config.tie_word_embeddings and not self.small.config.head_adapter

    # --- least squares of logits --------------------------------------------------------------------------------------

    def regressed(self, tensors: Tensors, ridge: float | None) -> Tensors:
        """By ridge regression on the logits."""
        config, whole = self.small.config, self.dense.read("head", torch.float64)
        table = whole[HEAD] if HEAD in whole else self.dense.read("stem", torch.float64)[EMBEDDING]
        zz, yz = self.sums(norm_of(whole), {} if self.gain_alone else norm_of(tensors))
        if not config.tie_word_embeddings:
            wanted = table @ yz
            if (bias := whole.get("lm_head.bias")) is not None:
                wanted = wanted + bias[:, None] * zz[:, -1:]
            return regressed_linear(tensors, "lm_head", zz, wanted, ridge)
        small = self.cut.read("stem", torch.float64)[EMBEDDING]
        gram_RR = small.T @ small
        reach = small.T @ (table @ yz)  # E'^T of the logits, times z
        if config.head_adapter:
            onto = torch.linalg.pinv(gram_RR, hermitian=True) @ reach
            return regressed_linear(tensors, "head_adapter", zz, onto, ridge)
        if FINAL_NORM not in tensors:
            return tensors
        gain = tensors[FINAL_NORM].double() + config.norm_offset
        if (bias := tensors.get("model.norm.bias")) is not None:
            reach = reach - (gram_RR @ bias.double())[:, None] * zz[:, -1:]
        fit = Fit(len(gain), 1, torch.device("cpu"))
        fit.zz = gram_RR * zz[:, :-1, :-1]
        fit.rz = reach.diagonal(dim1=1, dim2=2)[:, None] - gain @ fit.zz[:, None]
        solved = fit.solved(gain[None], ridge)[0] - config.norm_offset
        return tensors | {FINAL_NORM: solved.to(tensors[FINAL_NORM].dtype)}

    def sums(self, final: Tensors, own: Tensors) -> tuple[Tensor, Tensor]:
        """Sums of z z^T [2, F + 1, F + 1] and y z^T [2, D, F + 1] of the final states y uncut and z, 1 cut; fp64, CPU.

        The norms' gains and biases are those given. In fp64, for the head is solved from their difference.
        """
        wide, size = self.small.config.hidden_size + 1, self.whole.config.hidden_size
        zz, yz = (torch.zeros(2, rows, wide, dtype=torch.float64, device=self.small.device) for rows in (wide, size))
        for rows, held in self.slices:
            z = with_ones(end(self.small, rows, own), True).flatten(0, -2).double()
            zz[held] += z.T @ z
            yz[held] += end(self.whole, rows, final).flatten(0, -2).double().T @ z
        return zz.cpu(), yz.cpu()

    # --- predictions --------------------------------------------------------------------------------------------------

    def predicted(self, tensors: Tensors) -> Tensors:
        """By a Newton step on the divergence of the predictions."""
        config = self.small.config
        if self.gain_alone and FINAL_NORM not in tensors:
            return tensors
        name = FINAL_NORM if self.gain_alone else f"{'head_adapter' if config.head_adapter else 'lm_head'}.weight"
        bias = None if self.gain_alone else tensors.get(name.replace("weight", "bias"))
        table = self.cut.read("stem", torch.float32)[EMBEDDING].to(self.small.device) if self.tied else None
        start = tensors[name].to(self.small.device, torch.float32)
        start = start + config.norm_offset if self.gain_alone else start
        start = start if bias is None else torch.cat([start, bias.to(start)[:, None]], 1)
        shift = tensors.get("model.norm.bias") if self.gain_alone else None
        offset = None if shift is None or table is None else table @ shift.to(table)
        if table is not None and (more := tensors.get("lm_head.bias")) is not None:
            offset = more.to(table) if offset is None else offset + more.to(table)
        own = {} if self.gain_alone else norm_of(tensors)
        logits = Logits(table, offset, config.logits_scale)
        parts = (self.states(held, own, ones=bias is not None) for held in (0, 1))
        found = newton(Predictor(logits), start, *parts).to(tensors[name])
        if self.gain_alone:
            return tensors | {name: found - config.norm_offset}
        if bias is None:
            return tensors | {name: found}
        return tensors | {name: found[:, :-1].contiguous(), name.replace("weight", "bias"): found[:, -1].contiguous()}

    @property
    def tied(self) -> bool:
        """Whether the cut head is its embedding."""
        return self.small.config.tie_word_embeddings

    def states(self, held: int, own: Tensors, *, ones: bool) -> States:
        """Final states of both decoders, of tokens drawn by chance."""
        whole = self.dense.read("head", torch.float32)
        table = whole[HEAD] if HEAD in whole else self.dense.read("stem", torch.float32)[EMBEDDING]
        slices = [rows for rows, one in self.slices if one == held]
        tokens = sum(rows.stop - rows.start for rows in slices) * self.small.length
        generator, share = torch.Generator().manual_seed(held), TOKENS[held] / tokens
        mine, theirs = list[Tensor](), list[Tensor]()
        for rows in slices:
            chosen = torch.rand((rows.stop - rows.start, self.small.length), generator=generator) < share
            chosen = chosen.to(self.small.device)
            mine.append(with_ones(end(self.small, rows, own)[chosen].float(), ones))
            theirs.append(end(self.whole, rows, norm_of(whole))[chosen].float())
        bias = whole.get("lm_head.bias")
        device, scale = self.whole.device, self.whole.config.logits_scale
        logits = Logits(table.to(device), None if bias is None else bias.to(device), scale)
        return States(torch.cat(mine), logits, torch.cat(theirs))


def regressed_linear(tensors: Tensors, name: str, zz: Tensor, wanted: Tensor, ridge: float | None) -> Tensors:
    """A linear of the head, and its bias if any, fitted to what is wanted of it times (z, 1) [2, O, F + 1]."""
    start = tensors[f"{name}.weight"].double()
    if f"{name}.bias" in tensors:
        start = torch.cat([start, tensors[f"{name}.bias"].double()[:, None]], dim=1)
    features = start.shape[1]
    fit = Fit(features, 1, torch.device("cpu"))
    fit.zz = zz[:, :features, :features]
    fit.rz = wanted[:, :, :features] - start @ fit.zz
    replace_together(tensors, [name], fit, ridge)
    return tensors


def norm_of(head: Tensors) -> Tensors:
    """Gain and bias of the final norm."""
    return {name.removeprefix("model.norm."): one for name, one in head.items() if name.startswith("model.norm.")}


def end(stream: Stream, rows: slice, final: Mapping[str, Tensor]) -> Tensor:
    """The final states [.., T, D] behind the final norm, with the gain and bias that are given."""
    x = stream.hidden[rows, :, : stream.config.hidden_size].to(stream.device)
    z = stream.norm(x) if stream.config.final_norm else x
    if "weight" in final:
        z = z * (final["weight"].to(z) + stream.config.norm_offset)
    return z + final["bias"].to(z) if "bias" in final else z
