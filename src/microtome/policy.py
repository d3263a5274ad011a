"""A policy that ranks the rows of a matrix, and learns by how little the spectrum moves without those that it drops.

Letters: F rows, D columns, H hidden units, S samples, n rows kept. A ranking of rows is an order [F], best first; a
score per row is all that a policy says, and orders are drawn by the Plackett-Luce model: add Gumbel noise, and sort.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from microtome.errors import BadInput

KINDS = ("mlp", "linear", "release")
DISCOUNT = 0.99  # of the release, by the block's number
Rows = Callable[[int], Tensor]  # the rows [F, D] of a block


@dataclass(frozen=True, eq=False)
class Policy:
    """What scores a row w [D], fp32; one set of parameters for all blocks.

    mlp      GELU(x A^T + b) r    with x the row over the root mean square of all entries of its matrix
    linear   x . r
    release  (w A^T + b) r        the logit of the release's alpha, with F hidden units and nothing between the two maps
    """

    kind: str
    parameters: Mapping[str, Tensor]  # outer [H] or [D]; inner [H, D] and bias [H] but for linear

    @classmethod
    def drawn(cls, kind: str, width: int, hidden: int, generator: torch.Generator) -> "Policy":
        """A policy at random, for rows of `width` numbers."""
        if kind == "linear":
            return cls(kind, {"outer": torch.randn(width, generator=generator) * width**-0.5})
        bound = width**-0.5
        if kind == "release":  # a torch linear's own start, and r from U(0, 1)
            inner = (torch.rand(hidden, width, generator=generator) * 2 - 1) * bound
            bias = (torch.rand(hidden, generator=generator) * 2 - 1) * bound
            return cls(kind, {"inner": inner, "bias": bias, "outer": torch.rand(hidden, generator=generator)})
        inner = torch.randn(hidden, width, generator=generator) * bound
        outer = torch.randn(hidden, generator=generator) * hidden**-0.5
        return cls(kind, {"inner": inner, "bias": torch.zeros(hidden), "outer": outer})

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.parameters["outer" if self.kind == "linear" else "inner"].shape[-1]

    def scores(self, rows_FD: Tensor) -> Tensor:
        """The score of every row, [F]; the larger, the likelier it stays."""
        rows_FD, outer = rows_FD.float(), self.parameters["outer"]
        if self.kind != "release":
            rows_FD = rows_FD / rows_FD.square().mean().sqrt().clamp_min(1e-30)
        if self.kind == "linear":
            return rows_FD @ outer
        hidden_FH = rows_FD @ self.parameters["inner"].T + self.parameters["bias"]
        return (hidden_FH if self.kind == "release" else torch.nn.functional.gelu(hidden_FH)) @ outer

    def detached(self) -> "Policy":
        """A copy that no longer learns."""
        return replace(self, parameters={name: value.detach().clone() for name, value in self.parameters.items()})


@dataclass(frozen=True)
class Training:
    """How a policy learns."""

    episodes: int
    lr: float
    samples: int  # orders drawn for every block and episode
    gamma: float  # how much of what later blocks earn counts for a block; 0: only its own reward


@contextmanager
def learning() -> Generator[None]:
    """Gradients, although a cut runs without them."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


# --- spectra --------------------------------------------------------------------------------------------------------


def spectrum(gram_DD: Tensor, rows: int) -> Tensor:
    """Singular values, ascending, of a matrix of `rows` rows by its Gram matrix [..., D, D]."""
    return torch.linalg.eigvalsh(gram_DD).clamp_min(0).sqrt()[..., -min(rows, gram_DD.shape[-1]) :]


def kolmogorov_smirnov(first_A: Tensor, second_SB: Tensor) -> Tensor:
    """The largest distance between the distributions of two samples, [S]; both sorted, ascending."""
    first_SA = first_A.expand(len(second_SB), -1).contiguous()
    points = torch.cat([first_SA, second_SB], 1)
    shares = [
        torch.searchsorted(one.contiguous(), points, right=True).double() / one.shape[1]
        for one in (first_SA, second_SB)
    ]
    return (shares[0] - shares[1]).abs().amax(1)


def distances(rows_FD: Tensor, gram_DD: Tensor, whole: Tensor, dropped_SM: Tensor) -> Tensor:
    """How far the spectrum moves without the rows `dropped` [S, M], [S]: the kept rows' Gram is G - W_drop^T W_drop."""
    gone_SMD = rows_FD[dropped_SM]
    return kolmogorov_smirnov(whole, spectrum(gram_DD - gone_SMD.mT @ gone_SMD, len(rows_FD) - dropped_SM.shape[1]))


# --- orders ---------------------------------------------------------------------------------------------------------


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel noise."""
    return -torch.empty(shape).exponential_(generator=generator).clamp_min(1e-30).log()


def best_first(score_F: Tensor) -> Tensor:
    """The order [..., F] of falling scores; ties go to the smaller index."""
    return torch.argsort(score_F, dim=-1, descending=True, stable=True)


def log_likelihood(score_F: Tensor, order_SF: Tensor, kept: int) -> Tensor:
    """Log-probability [S] under Plackett-Luce that these `kept` rows are drawn first, in this order."""
    drawn_SF = score_F[order_SF]
    left_SF = drawn_SF.flip(1).logcumsumexp(1).flip(1)  # over what is not chosen yet
    return (drawn_SF - left_SF)[:, :kept].sum(1)


# --- learning -------------------------------------------------------------------------------------------------------


class Rewards:
    """How well sets of rows keep the spectra of the blocks; grams and spectra of the whole matrices are kept."""

    def __init__(self, kept: Mapping[int, int]) -> None:
        self.kept = kept
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def distances(self, block: int, rows_FD: Tensor, order_SF: Tensor) -> Tensor:
        """The distance of every order's first rows, [S]."""
        if block not in self.known:
            gram_DD = rows_FD.T @ rows_FD
            self.known[block] = gram_DD, spectrum(gram_DD, len(rows_FD))
        return distances(rows_FD, *self.known[block], order_SF[:, self.kept[block] :])


def learned(
    policy: Policy, rows_of: Rows, kept: Mapping[int, int], how: Training, generator: torch.Generator
) -> Policy:
    """The policy after policy-gradient steps, one per episode: the one whose ranking kept `kept` rows per block best.

    The gradient of E[-R log P] with R = -KS less the mean of the other samples' rewards. Blocks are visited from the
    last one, so that what comes behind a block is known when it is reached.
    """
    rewards = Rewards(kept)
    with learning():
        parameters = {name: value.clone().requires_grad_() for name, value in policy.parameters.items()}
        policy = replace(policy, parameters=parameters)
        best, least = policy.detached(), float("inf")
        optimiser = torch.optim.AdamW(list(parameters.values()), lr=how.lr)
        for _ in range(how.episodes):
            optimiser.zero_grad()
            before, lost, behind_S = policy.detached(), 0.0, torch.zeros(how.samples, dtype=torch.float64)
            for block in sorted(kept, reverse=True):
                rows_FD = rows_of(block)
                score_F = policy.scores(rows_FD)
                score_F = (score_F - score_F.mean()) / score_F.std().clamp_min(1e-6)  # else draws soon all agree
                noise_SF = gumbel((how.samples, len(rows_FD)), generator)
                plain = score_F.detach()
                order = best_first(torch.cat([plain[None], plain + noise_SF]))  # the ranking itself, and the samples
                distance = rewards.distances(block, rows_FD, order)
                lost += float(distance[0])
                behind_S = how.gamma * behind_S - distance[1:]
                surrogate(behind_S, log_likelihood(score_F, order[1:], kept[block])).backward()
            if lost <= least:
                best, least = before, lost
            optimiser.step()
    return best


def surrogate(reward_S: Tensor, likelihood_S: Tensor) -> Tensor:
    """What has the gradient of -E[R], over samples [..., S]; the baseline is the mean of the others' rewards."""
    others_S = (reward_S.sum(-1, keepdim=True) - reward_S) / (reward_S.shape[-1] - 1)
    return -((reward_S - others_S).to(likelihood_S.dtype) * likelihood_S).mean()


def noisy(policy: Policy, rows_FD: Tensor, generator: torch.Generator) -> Tensor:
    """The release's log k, [F]: k = sigmoid(logit(eps) + logit(alpha)), with fresh uniform eps."""
    uniform_F = torch.rand(len(rows_FD), generator=generator).clamp(1e-7, 1 - 1e-7)
    return torch.nn.functional.logsigmoid(torch.logit(uniform_F) + policy.scores(rows_FD))


def drawn_order(policy: Policy, rows_FD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A draw without replacement with weights k: the order [F], and the scores whose order it is."""
    score_F = noisy(policy, rows_FD, generator) + gumbel((len(rows_FD),), generator)
    return best_first(score_F), score_F


def learned_as_released(
    policy: Policy, rows_of: Rows, kept: Mapping[int, int], how: Training, generator: torch.Generator
) -> Policy:
    """The release's learning: reward 1 / KS without a baseline, discounted by the block's number, un-normalised log k.

    All blocks are drawn, then the optimiser steps once per block, with log k of new noise. The policy whose episode had
    the largest sum of rewards is kept. Where KS is 0, on which the release fails, it counts as half its smallest step.
    """
    rewards = Rewards(kept)
    with learning():
        parameters = {name: value.clone().requires_grad_() for name, value in policy.parameters.items()}
        policy = replace(policy, parameters=parameters)
        best, most = policy.detached(), -float("inf")
        optimiser = torch.optim.AdamW(list(parameters.values()), lr=how.lr)
        for _ in range(how.episodes):
            drawn: dict[int, tuple[Tensor, float]] = {}
            for block in sorted(kept):
                rows_FD = rows_of(block)
                with torch.no_grad():
                    order_F = drawn_order(policy, rows_FD, generator)[0]
                distance = float(rewards.distances(block, rows_FD, order_F[None])[0])
                drawn[block] = order_F[: kept[block]], 1.0 / max(distance, 0.5 / rows_FD.shape[1])
            for block, (chosen, reward) in drawn.items():
                optimiser.zero_grad()
                chance = noisy(policy, rows_of(block), generator)[chosen].sum()
                (-(DISCOUNT**block) * reward * chance).backward()
                optimiser.step()
            if (total := sum(reward for _, reward in drawn.values())) > most:
                best, most = policy.detached(), total
    return best


# --- files ----------------------------------------------------------------------------------------------------------


def write(policy: Policy, path: Path) -> None:
    """Keep a policy in a safetensors file, put in place in one step."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        tensors = {name: value.contiguous() for name, value in policy.parameters.items()}
        partial.write_bytes(safetensors.torch.save(tensors, metadata={"kind": policy.kind}))  # readable as any file
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise BadInput(f"cannot keep the policy in {path}: {error}. Give save another file.") from error


def read(path: Path, width: int) -> Policy:
    """A policy from a file, for rows of `width` numbers; raises BadInput where it is none, or for other rows."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("kind", "")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"cannot read the policy {path}: {error}. Give load a file that save has written.") from error
    ranks = {"outer": 1} if kind == "linear" else {"bias": 1, "inner": 2, "outer": 1}
    if kind not in KINDS or {name: value.ndim for name, value in tensors.items()} != ranks:
        raise BadInput(f"{path} holds no policy. Give load a file that save has written.")
    found = Policy(kind, tensors)
    if found.width != width:
        raise BadInput(
            f"the policy {path} scores rows of {found.width} numbers, and this model's have {width}: "
            "a policy serves models of one width."
        )
    return found
