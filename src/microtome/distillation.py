"""What a smaller model learns from the original: losses over windows of token ids.

* the divergence KL(original || model) of the next-token distributions, at a temperature t and times t^2, so that its
  gradients keep their size;
* optionally the hidden states behind every block, as squared distances relative to the original's. A cut stream has
  other coordinates than the original's: the linear map between them is fitted in closed form, by ridge regression on
  windows, before anything is trained. Where the streams are already near, the map is left out;
* optionally the cross-entropy of the tokens themselves.

Shapes: B windows, T tokens, S tokens at a time, V vocabulary, N and R widths of the original's stream and the model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from microtome.linalg import damped_cholesky

CHUNK = 2**20  # logits in fp32 at a time: what a core keeps near
RIDGE = 1e-4  # of the maps, relative to the mean of the diagonal
NEAR = 0.5  # of the original's energy: a stream that differs by less has the original's coordinates


class Divergence(torch.autograd.Function):
    """Mean over tokens of KL(softmax(teacher / t) || softmax(student / t)) t^2, nats; gradients for the student only.

    The gradient is made on the way forward, some tokens at a time: no copy of all logits in fp32 is ever held.
    """

    @staticmethod
    def forward(ctx: Any, student_SV: Tensor, teacher_SV: Tensor, temperature: float) -> Tensor:
        """Both logits [S, V] to one number, fp32."""
        tokens, size = student_SV.shape
        step = max(1, CHUNK // size)
        total = torch.zeros((), dtype=torch.float64 if student_SV.device.type == "cpu" else torch.float32)
        total = total.to(student_SV.device)
        gradient_SV = torch.empty_like(student_SV)
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            have = torch.log_softmax(student_SV[rows].float() / temperature, -1)
            want = torch.log_softmax(teacher_SV[rows].float() / temperature, -1)
            share = want.exp()
            total += (share * (want - have)).sum()
            gradient_SV[rows] = have.exp_().sub_(share).mul_(temperature / tokens)
        ctx.save_for_backward(gradient_SV)
        return (total * temperature**2 / tokens).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """The gradient that was made on the way forward."""
        (gradient_SV,) = ctx.saved_tensors
        return gradient_SV * outer[0].to(gradient_SV.dtype), None, None


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float) -> Tensor:
    """Mean divergence over all tokens of a batch; see `Divergence`."""
    value: Any = Divergence.apply(student_BTV.flatten(0, -2), teacher_BTV.flatten(0, -2), temperature)
    return value


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a model on windows. Without a `teacher` it is the cross-entropy of the tokens alone."""

    teacher: Any = None
    temperature: float = 1.0
    text: float = 0.0  # weight of the tokens' cross-entropy; the divergence has the rest
    hidden: float = 0.0  # weight of the hidden states, beside those two
    maps: Sequence[tuple[int, Tensor | None]] = field(default_factory=list[tuple[int, Tensor | None]])

    def __call__(self, model: Any, ids_BT: Tensor) -> Tensor:
        """The loss of a batch, nats per token (and relative squares), with a graph."""
        wanted = self.hidden > 0.0
        made = model(input_ids=ids_BT, use_cache=False, output_hidden_states=wanted)
        if self.teacher is None:
            return self.tokens(made.logits, ids_BT)
        with torch.no_grad():
            told = self.teacher(input_ids=ids_BT, use_cache=False, output_hidden_states=wanted)
        loss = (1.0 - self.text) * divergence(made.logits, told.logits, self.temperature)
        if self.text > 0.0:
            loss = loss + self.text * self.tokens(made.logits, ids_BT)
        if wanted:
            loss = loss + self.hidden * self.states(made.hidden_states, told.hidden_states)
        return loss

    @staticmethod
    def tokens(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        """Mean cross-entropy of every token but a window's first."""
        return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())

    def states(self, made: Sequence[Tensor], told: Sequence[Tensor]) -> Tensor:
        """Mean over blocks of the squared distance of hidden states, relative to what is wanted."""
        found: list[Tensor] = []
        for mine_BTR, (place, onto_NR) in zip(made[1:], self.maps, strict=True):
            wide_BTN = told[place].float()
            want_BTR = wide_BTN if onto_NR is None else wide_BTN @ onto_NR
            found.append((mine_BTR.float() - want_BTR).square().sum() / want_BTR.square().sum())
        return torch.stack(found).mean()


@torch.no_grad()
def maps(model: Any, teacher: Any, ids_NT: Tensor, rows: int) -> list[tuple[int, Tensor | None]]:
    """Per block of the model: which hidden states of the teacher are its target, and the map [N, R] onto its stream.

    Blocks are matched by their relative depth. None is the identity. `rows` windows are run at a time.
    """
    grams: list[Tensor] = []
    crosses: list[Tensor] = []
    energies: list[Tensor] = []
    places: list[int] = []
    for ids_BT in ids_NT.split(rows):
        run = {"input_ids": ids_BT, "use_cache": False, "output_hidden_states": True}
        mine, told = model(**run).hidden_states[1:], teacher(**run).hidden_states[1:]
        places = [max(1, round((place + 1) * len(told) / len(mine))) for place in range(len(mine))]
        for number, (y_BTR, place) in enumerate(zip(mine, places, strict=True)):
            y_SR, x_SN = y_BTR.flatten(0, 1).float(), told[place - 1].flatten(0, 1).float()
            sums = (x_SN.T @ x_SN, x_SN.T @ y_SR, y_SR.square().sum())
            for held, one in zip((grams, crosses, energies), sums, strict=True):
                if len(held) <= number:
                    held.append(torch.zeros_like(one, dtype=torch.float64, device="cpu"))
                held[number] += one.cpu()
    device = ids_NT.device
    return [
        (place, None if near(*sums) else solved(*sums[:2]).to(device))
        for place, *sums in zip(places, grams, crosses, energies, strict=True)
    ]


def near(gram_NN: Tensor, cross_NR: Tensor, energy: Tensor) -> bool:
    """Whether the model's stream has the original's coordinates."""
    if cross_NR.shape[0] != cross_NR.shape[1]:
        return False
    apart = gram_NN.trace() - 2.0 * cross_NR.trace() + energy
    return bool(apart < NEAR * gram_NN.trace())


def solved(gram_NN: Tensor, cross_NR: Tensor) -> Tensor:
    """The ridge regression of the model's stream on the original's [N, R], fp32."""
    return torch.cholesky_solve(cross_NR, damped_cholesky(gram_NN, RIDGE)).float()
