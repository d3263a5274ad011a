"""The training loop of healing: AdamW with a warm-up and a cosine, the best weights kept, and a state to go on from.

The order of windows depends on the seed and on how many steps were taken, and nothing else is drawn: a run that was
stopped and goes on computes what it would have computed.

Shapes: N windows, T tokens in each, B windows at a time.
"""

import hashlib
import json
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microtome.adapters import Trained
from microtome.calibrate import Progress
from microtome.distillation import Objective
from microtome.errors import BadInput, BadOutput, NumericalFailure, UnknownName

STATE = "state.pt"
HELD_OUT = 64  # windows at most
CHECKS = 10  # looks at the held-out windows in a run
RATES = {"full": 3e-4, "lora": 1e-3}
SLOWER = 3.0  # what the rate is divided by where a run has lost ground
SCALES = 1e-2  # the rate of full where weights are in codes
KINDS = ("auto", "full", "lora")
LOSSES = ("distil", "text")
LEAST, MOST = 1e-12, 1e12  # of a number above 0
ABOVE = (LEAST, MOST, "no number above 0 and up to 1e12")
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("steps", "minutes", "rate", "batch", "accumulate", "temperature"), ABOVE),
    **dict.fromkeys(("rank", "alpha", "clip", "patience"), ABOVE),
    **dict.fromkeys(("text", "warmup"), (0.0, 1.0, "no share: it lies between 0 and 1")),
    **dict.fromkeys(("hidden", "decay"), (0.0, MOST, "no number from 0 to 1e12")),
    "held_out": (LEAST, 1.0 - LEAST, "no share between 0 and 1: that of the windows set aside"),
    "samples": (2, MOST, "too few: at least 2, one of them to choose the best weights by"),
}


@dataclass(frozen=True)
class Heal:
    """Options of healing."""

    train: str = "auto"  # full up to a size (`healing.SMALL`), else lora
    steps: int | None = None  # 300 where no minutes are given
    minutes: float | None = None  # of training; whichever ends first
    rate: float | None = None  # peak learning rate; None: by what is trained
    batch: int = 8  # windows
    accumulate: int = 1  # batches in a step
    loss: str = "distil"  # towards the original; text: the next token alone
    temperature: float = 1.0
    text: float = 0.0  # weight of the next token's loss beside the original's distribution
    hidden: float = 0.0  # weight of the hidden states
    rank: int = 32
    alpha: float | None = None  # None: twice the rank
    targets: tuple[str, ...] = ()  # of lora: last parts of names; none for all linears of the blocks
    embeddings: bool = False  # of full: embeddings and head too
    keep_zeros: bool = True  # of matrices that are sparse
    warmup: float = 0.1  # of the run
    clip: float = 1.0  # norm of the gradient
    decay: float = 0.0  # of the weights
    held_out: float = 0.05  # of the windows, to choose the best weights by
    patience: int = 5  # looks without a new best before it stops; there are 10 in a run
    samples: int = 2048  # windows, in a recipe
    checkpointing: bool = False  # blocks computed twice, for memory
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("train", KINDS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise UnknownName(f"{name} of heal", str(getattr(self, name)), known)
        for name, (low, high, said) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BadInput(f"{name}={value} of heal is {said}.")

    @property
    def limit(self) -> int | None:
        """Steps at most; None where only the minutes count."""
        return 300 if self.steps is None and self.minutes is None else self.steps

    @property
    def taught(self) -> bool:
        """Whether the original is needed."""
        return self.loss == "distil"

    def to_json(self) -> dict[str, Any]:
        """As a plan keeps it."""
        return {**asdict(self), "targets": list(self.targets)}


@dataclass
class History:
    """How a run went; losses are of the held-out windows."""

    losses: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])  # after how many steps
    steps: int = 0
    seconds: float = 0.0  # of training, those of an interrupted run included
    best: int = 0  # steps after which the loss was lowest: these weights are kept
    slower: int = 0  # how often the rate was divided
    early: bool = False  # whether it stopped because nothing got better

    def note(self, loss: float) -> bool:
        """Write down one look; whether it is the best so far."""
        better = not self.losses or loss < min(one for _, one in self.losses)
        self.losses.append((self.steps, loss))
        if better:
            self.best = self.steps
        return better

    @property
    def stale(self) -> int:
        """Looks since the best one."""
        return sum(steps > self.best for steps, _ in self.losses)


@dataclass(eq=False)
class Training:
    """One run: a model, what is trained of it, what it learns, from which windows [N, T]."""

    model: Any
    trained: Trained
    objective: Objective
    windows: Tensor
    options: Heal
    rate: float
    autocast: bool = False
    state: Path | None = None  # a folder for the state; None: a run that is stopped is lost
    identity: str = ""  # of model, original and windows
    progress: Progress | None = None

    def __post_init__(self) -> None:
        held = min(HELD_OUT, max(1, round(self.options.held_out * len(self.windows))))
        if len(self.windows) < held + 1:
            raise BadInput(
                f"healing needs at least 2 windows, one of them to choose the best weights by, and has "
                f"{len(self.windows)}: give more text, or a smaller --length."
            )
        self.learned_NT, self.held_NT = self.windows[:-held], self.windows[-held:]
        self.device = next(iter(self.trained.parameters.values())).device
        matrices = [one for one in self.trained.parameters.values() if one.ndim > 1]
        others = [one for one in self.trained.parameters.values() if one.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.options.decay}, {"params": others, "weight_decay": 0.0}]
        fused = self.device.type in {"cpu", "cuda"}
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.99), fused=fused)
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.orders: dict[int, list[int]] = {}
        self.settled = True  # not in the middle of an update

    def run(self, *, resume: bool = False) -> History:
        """Train, leave the best weights in the model, and say how it went.

        A run that is interrupted leaves its state; `resume` goes on from there. Raises BadInput where the state is of
        another run, NumericalFailure where the loss is not finite.
        """
        if resume:
            self.read()
        else:
            self.look()
        since = time.perf_counter() - self.history.seconds
        try:
            while not self.over():
                self.step()
                self.history.seconds = time.perf_counter() - since
                if self.progress is not None:
                    self.progress("healing", min(1.0, self.share()))
                if int(self.share() * CHECKS) > len(self.history.losses) - 1 or self.share() >= 1.0:
                    self.look()
        except KeyboardInterrupt:
            if self.settled:
                self.write()
            raise
        self.trained.put(self.best)
        return self.history

    def over(self) -> bool:
        """Whether the run is at its end."""
        done = self.share() >= 1.0
        self.history.early = not done and self.history.stale >= self.options.patience
        return done or self.history.early

    def share(self) -> float:
        """How much of the run is over, from 0 to 1."""
        steps, minutes = self.options.limit, self.options.minutes
        by_steps = 0.0 if steps is None else self.history.steps / steps
        return max(by_steps, 0.0 if minutes is None else self.history.seconds / (60.0 * minutes))

    def factor(self) -> float:
        """The learning rate's part of its peak: up from a fiftieth, then down along a cosine."""
        share, rise = self.share(), self.options.warmup
        up = 1.0 if rise == 0.0 else min(1.0, 0.02 + share / rise)
        return up * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))

    def batch(self) -> Tensor:
        """The windows of the next step, on the device."""
        count, size = len(self.learned_NT), self.options.batch * self.options.accumulate
        first = self.history.steps * size
        rows = [self.order(place // count)[place % count] for place in range(first, first + size)]
        return self.learned_NT[rows].to(self.device)

    def order(self, epoch: int) -> list[int]:
        """In which order an epoch takes the windows."""
        if epoch not in self.orders:
            self.orders.pop(epoch - 2, None)
            generator = torch.Generator().manual_seed((self.options.seed << 20) + epoch)
            self.orders[epoch] = torch.randperm(len(self.learned_NT), generator=generator).tolist()
        return self.orders[epoch]

    def loss(self, ids_BT: Tensor) -> Tensor:
        """The objective, with products in bf16 where that pays."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.objective(self.model, ids_BT)

    def step(self) -> None:
        """One update of the weights."""
        self.optimizer.zero_grad()
        for ids_BT in self.batch().split(self.options.batch):
            loss = self.loss(ids_BT) / self.options.accumulate
            self.check(float(loss.detach()))
            loss.backward()
        nn.utils.clip_grad_norm_(list(self.trained.parameters.values()), self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.factor() / SLOWER**self.history.slower
        self.settled = False
        self.optimizer.step()
        self.history.steps += 1
        self.settled = True

    def look(self) -> None:
        """Measure the held-out loss, keep the weights if they are the best, and write the state."""
        losses = [self.loss_of(ids_BT) * len(ids_BT) for ids_BT in self.held_NT.split(self.options.batch)]
        if self.history.note(math.fsum(losses) / len(self.held_NT)):
            self.best = self.trained.held()
        elif self.history.losses[-1][1] > self.history.losses[0][1]:
            self.slow_down()
        if self.history.steps:
            self.write()

    def slow_down(self) -> None:
        """Go on from the best weights at a part of the rate: what is worse than at the start was learned too fast."""
        self.trained.put(self.best)
        self.optimizer.state.clear()
        self.history.slower += 1

    @torch.no_grad()
    def loss_of(self, ids_BT: Tensor) -> float:
        """The loss of some held-out windows."""
        found = float(self.loss(ids_BT.to(self.device)))
        self.check(found)
        return found

    def check(self, loss: float) -> None:
        """Say where the loss stopped being a number."""
        if not math.isfinite(loss):
            what = "lower --rate" if self.history.steps else "the model overflows on this text"
            raise NumericalFailure(f"the loss of healing is not finite after {self.history.steps} steps: {what}.")

    def signature(self) -> str:
        """What a state must be of, to go on from it."""
        said = json.dumps([self.options.to_json(), self.rate, self.autocast, self.identity, self.device.type])
        return hashlib.sha256(said.encode()).hexdigest()

    def write(self) -> None:
        """Write the state, in one step; raises BadOutput."""
        if self.state is None:
            return
        held = {
            "signature": self.signature(),
            "history": asdict(self.history),
            "best": self.best,
            "now": self.trained.held(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.state / f".{STATE}.partial"
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            torch.save(held, partial)
            partial.replace(self.state / STATE)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter where the disk is full
            raise BadOutput(f"the state of healing cannot be written to {self.state}: {error}.") from error

    def read(self) -> None:
        """Take up a state; raises BadInput where there is none, or it is of another run."""
        assert self.state is not None
        try:
            held = torch.load(self.state / STATE, map_location="cpu", weights_only=True)
        except Exception as error:  # a file that is not what its name says can raise anything
            raise BadInput(f"there is no state in {self.state} to resume from: leave --resume out.") from error
        if held["signature"] != self.signature():
            raise BadInput(
                f"the state in {self.state} is of another run: give the same model, data and options, or remove it."
            )
        self.history = History(**held["history"])
        self.best = held["best"]
        self.trained.put(held["now"])
        self.optimizer.load_state_dict(held["optimizer"])


@contextmanager
def still(model: Any, *, checkpointing: bool) -> Generator[None]:
    """A model without dropout, whose blocks are computed twice if asked for; transformers does so in training only."""
    model.eval()
    if checkpointing:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                setattr(module, "attention_dropout", 0.0)  # noqa: B010 - a plain attribute, which torch's types deny
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        model.train()
    yield
    model.eval()
