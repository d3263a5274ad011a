"""PruneNet: learn from the weights alone which feed-forward neurons to keep, by how little a spectrum moves.

Sengupta et al., ICLR 2025 (arXiv:2501.15296). No text is needed: a small policy scores every row of the first
feed-forward matrix W (the gate, where there is one), and is rewarded when the singular values of the rows that it keeps
are distributed like those of all of them, by the Kolmogorov-Smirnov distance. It then serves any ratio, and any model
of the same width.

    P(i_1 .. i_n) = prod_t exp(l_{i_t}) / sum_{i not yet drawn} exp(l_i)      (an order of rows, by their scores l)
    maximise E[-KS(sv(W), sv(W[i_1 .. i_n]))]                                 (all blocks, one policy)

What is done differently from the release, which `faithful` gives back:

* `policy=mlp` has a GELU between its two maps. The release has nothing there, so that its 45 million parameters are a
  linear score of the row, which cannot tell w from -w and so cannot say how long a row is. `policy=linear` is that.
* Orders are drawn with their true probability; the release adds noise to the scores, takes other noise for the
  probability than for the draw, and does not normalise it.
* The reward is -KS less the mean of the other samples' of the same block; the release's is 1 / KS, without a baseline
  and discounted by the block's number. `gamma` lets blocks earn with those behind them (.99 in the paper's text); what
  is kept in one block does not change another's spectrum, so that the default is 0.
* The best rows are kept, not drawn, and the policy is the one whose own ranking was best, not whose draw was.

`scorer` puts something simpler in the policy's place: the length of a row, its leverage w (W^T W)^-1 w^T, the best of
`tries` random sets by KS, or chance. Nothing of the method looks at the up projection, or at what the model computes:
refit with `--restore` where text is at hand.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microtome import inner, policy
from microtome.edit import Edit, Select
from microtome.errors import BadInput, UnsupportedModel
from microtome.inner import View
from microtome.modeling_microtome import MicrotomeConfig
from microtome.policy import Policy, Rows, Training
from microtome.space import Kind
from microtome.stats import Stat

Read = Callable[[int], View]
UNKNOWN_KEEP = 0.8  # what is learnt for where the widths are not known yet
HELD = 1 << 28  # numbers of first matrices that are held while learning; beyond, they are read again
RATES = {True: 1e-3, False: 3e-3}  # learning rates, by `faithful`


@dataclass(frozen=True)
class PruneNet:
    """Options of PruneNet; see the head of this file."""

    scorer: Literal["policy", "row_norm", "leverage", "random", "best_of_n"] = "policy"
    policy: Literal["mlp", "linear"] = "mlp"
    hidden: int = 256
    episodes: int = 20
    samples: int = 4
    lr: float = 0.0
    gamma: float = 0.0
    train_keep: float = 0.0
    tries: int = 64
    seed: int = 0
    faithful: bool = False
    save: str = ""
    load: str = ""

    biased: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    rates: ClassVar[Mapping[Kind, float]] = {}
    needs: ClassVar[frozenset[Stat]] = frozenset()
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.FFN})
    sequential: ClassVar[bool] = False

    def check(self, config: MicrotomeConfig) -> None:
        """Refuse options out of range, a policy of another width, and blocks that cannot share one."""
        right = {
            "hidden": (self.hidden >= 1, "number from 1 on"),
            "episodes": (self.episodes >= 0, "number from 0 on"),
            "samples": (self.samples >= 2, "number from 2 on"),
            "lr": (0 <= self.lr < math.inf, "number from 0 on"),
            "gamma": (0 <= self.gamma <= 1, "number from 0 to 1"),
            "train_keep": (0 <= self.train_keep < 1, "number from 0 on and below 1"),
            "tries": (self.tries >= 1, "number from 1 on"),
        }
        for option, words in ((name, words) for name, (is_right, words) in right.items() if not is_right):
            raise BadInput(f"{option}={getattr(self, option)} of prunenet is no {words}.")
        if (self.save or self.load) and self.scorer != "policy":
            raise BadInput(f"save and load keep a policy, and scorer={self.scorer} has none.")
        if self.save and not Path(self.save).absolute().parent.is_dir():
            raise BadInput(f"there is no folder for save={self.save}: make it first.")
        self.check_shared(config)

    def check_shared(self, config: MicrotomeConfig) -> None:
        """Refuse blocks of different widths, which one policy cannot read; the release's reads all neurons, too."""
        sizes = [config.per_layer_config[block] for block in range(config.num_hidden_layers)]
        wide = {inner.subset_width(config, one, "mlp_read") for one in sizes}
        if self.scorer != "policy":
            return
        if len(wide) > 1 or (self.faithful and len({one.intermediate_size for one in sizes}) > 1):
            raise UnsupportedModel(
                "one policy of prunenet reads all blocks, and those of this model differ in width: use scorer=row_norm."
            )
        if self.load:
            self.held(wide.pop(), sizes[0].intermediate_size)

    def held(self, width: int, neurons: int) -> Policy:
        """The policy in the file `load`."""
        found = policy.read(Path(self.load), width)
        if found.kind == "release" and not self.faithful:
            raise BadInput(f"{self.load} holds a policy of faithful=true: give that too, or load another.")
        if self.faithful and (found.kind != "release" or len(found.parameters["outer"]) != neurons):
            raise BadInput(f"{self.load} holds no policy of faithful=true for {neurons} neurons: load another.")
        return found

    def learn(self, view_of: Read, widths: Mapping[str, int]) -> "_Learned":
        """The method with scores of all blocks, from their weights; `widths` by dial, empty if not known yet."""
        blocks = range(view_of(0).config.num_hidden_layers)
        return self.learned_from(view_of, [block for block in blocks if view_of(block).of_kind(Kind.FFN)], widths)

    def learned_from(self, view_of: Read, blocks: list[int], widths: Mapping[str, int]) -> "_Learned":
        """The same for some blocks."""
        generator = torch.Generator().manual_seed(self.seed)
        kept = {block: self.trained_width(view_of(block), widths) for block in blocks}

        def first(block: int) -> Tensor:
            return first_matrix(view_of(block))

        with policy.learning():
            numbers = sum(first(block).numel() for block in blocks)
            rows = cache(first) if numbers <= HELD else first
            if self.scorer == "policy":
                scores = self.by_policy(rows, kept, generator)
            else:
                scores = {block: self.by_rule(rows(block), kept[block], generator) for block in blocks}
        return _Learned(self, {block: score.detach() for block, score in scores.items()})

    def trained_width(self, view: View, widths: Mapping[str, int]) -> int:
        """How many rows of a block are kept while learning."""
        size = len(first_matrix(view))
        if self.train_keep or not widths:
            return max(1, round((self.train_keep or UNKNOWN_KEEP) * size))
        return widths.get(f"{view.block}.ffn", size)

    def by_policy(self, rows: Rows, kept: Mapping[int, int], generator: torch.Generator) -> dict[int, Tensor]:
        """Scores of a policy that is loaded, or learnt."""
        size, width = rows(next(iter(kept))).shape
        if self.load:
            found = self.held(width, size)
        else:
            how = Training(self.episodes, self.lr or RATES[self.faithful], self.samples, self.gamma)
            narrower = {block: wide for block, wide in kept.items() if wide < len(rows(block))}
            learned = policy.learned_as_released if self.faithful else policy.learned
            kind, hidden = ("release", size) if self.faithful else (self.policy, self.hidden)
            found = learned(Policy.drawn(kind, width, hidden, generator), rows, narrower, how, generator)
        if self.save:
            policy.write(found, Path(self.save))
        if self.faithful:  # the release draws when it cuts, too
            return {block: policy.drawn_order(found, rows(block), generator)[1] for block in kept}
        return {block: found.scores(rows(block)) for block in kept}

    def by_rule(self, rows_FD: Tensor, kept: int, generator: torch.Generator) -> Tensor:
        """Scores [F] without a policy."""
        if self.scorer == "row_norm":
            return rows_FD.norm(dim=1)
        if self.scorer == "leverage":
            return leverage(rows_FD)
        if self.scorer == "random":
            return torch.rand(len(rows_FD), generator=generator)
        return best_of(rows_FD, kept, self.tries, generator)

    def scores(self, view: View) -> dict[str, list[float]]:
        """Scores of one block on its own: `learn` comes first where there are several."""
        return self.learned_from(lambda _block: view, [view.block], {}).scores(view)

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The same for its edits."""
        return self.learned_from(lambda _block: view, [view.block], widths).solve(view, widths)


@dataclass(frozen=True, eq=False)
class _Learned:
    """The method once it has seen all weights."""

    method: PruneNet
    known: Mapping[int, Tensor]  # scores [F] by block

    needs: ClassVar[frozenset[Stat]] = frozenset()
    targets: ClassVar[frozenset[Kind]] = frozenset({Kind.FFN})
    sequential: ClassVar[bool] = False

    def scores(self, view: View) -> dict[str, list[float]]:
        """Scores of the neurons, falling."""
        if not view.of_kind(Kind.FFN):
            return {}
        return {f"{view.block}.ffn": self.known[view.block].sort(descending=True).values.tolist()}

    def solve(self, view: View, widths: Mapping[str, int]) -> list[Edit]:
        """The best neurons."""
        return [
            Select(space, inner.best(self.known[view.block], wide))
            for space in view.of_kind(Kind.FFN)
            if (wide := widths.get(f"{view.block}.ffn")) is not None
        ]


def first_matrix(view: View) -> Tensor:
    """The rows that are chosen from: the gate's, or those of a feed-forward half without one, [F, D]."""
    name = "mlp.gate_proj.weight" if "mlp.gate_proj.weight" in view.weights else "mlp.up_proj.weight"
    return view.weights[name].clone()


def leverage(rows_FD: Tensor) -> Tensor:
    """How much each row adds to what the others span, w (W^T W)^+ w^T, [F]."""
    u_FK, sigma_K, _ = torch.linalg.svd(rows_FD, full_matrices=False)
    return u_FK[:, sigma_K > 1e-6 * sigma_K[0].clamp_min(1e-300)].square().sum(1)


def best_of(rows_FD: Tensor, kept: int, tries: int, generator: torch.Generator) -> Tensor:
    """Random scores [F]: of several, those whose `kept` best rows move the spectrum least."""
    score_SF = torch.rand(tries, len(rows_FD), generator=generator)
    gram_DD = rows_FD.T @ rows_FD
    whole = policy.spectrum(gram_DD, len(rows_FD))
    moved = [
        float(policy.distances(rows_FD, gram_DD, whole, policy.best_first(score_F)[None, kept:])[0])
        for score_F in score_SF
    ]
    return score_SF[moved.index(min(moved))]


METHOD = PruneNet
