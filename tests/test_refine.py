"""Refinement of halves: its steps are Gauss-Newton's, and only what helps on unseen tokens is kept."""

from functools import partial
from typing import Any

import pytest
import torch
from models import TINY, canonical, ids, logits, ours, stock
from tinies import HELD_OUT, compress, folder, weights
from torch import Tensor
from torch.nn import functional

from microtome import refine
from microtome.errors import BadInput
from microtome.halves import Attention, FeedForward, Weights
from microtome.refine import Piece, refined

SIZES = {"T": 30, "D": 4, "F": 3, "O": 5}
GATED = partial(FeedForward, act=functional.silu)


def some(seed: int, *, gated: bool) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    rows = [random(SIZES["F"], SIZES["D"]) for _ in range(1 + gated)]
    return (*rows, random(SIZES["O"], SIZES["F"]))


def written(read: Tensor, weights: Weights) -> Tensor:
    """What a feed-forward half writes, said once more."""
    first = functional.silu(read @ weights[0].T)
    return (first * (read @ weights[1].T) if len(weights) == 3 else first) @ weights[-1].T


def tokens(weights: Weights, seed: int, windows: int = 2) -> list[Any]:
    """Pieces of which some weights are the best, and errors of whose tokens do not count alike."""
    generator = torch.Generator().manual_seed(seed)
    read = torch.randn(windows, 1, SIZES["T"], SIZES["D"], generator=generator, dtype=torch.float64)
    weight = torch.rand(windows, 1, SIZES["T"], 1, generator=generator, dtype=torch.float64) + 0.5
    return [partial(Piece, x, written(x, weights), c) for x, c in zip(read, weight, strict=True)]


def far(weights: Weights, pieces: list[Any]) -> float:
    """The sum of squares of what a feed-forward half lacks, written out."""
    return sum(
        ((written(p.read, weights) - p.wanted) * p.weight).square().sum().item() for p in (one() for one in pieces)
    )


# --- halves ---------------------------------------------------------------------------------------------------------


def linear_map(half: Any, weights: Weights, read: Tensor) -> None:
    """Hold tangents and cotangents against autograd's, of the function that `written` is."""
    generator = torch.Generator().manual_seed(11)
    change = tuple(torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in weights)

    def at(*some: Tensor) -> Tensor:
        return half(some, read).written()

    out, tangent = torch.autograd.functional.jvp(at, weights, change)
    error = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    _, pulled = torch.autograd.functional.vjp(at, weights, error)
    point = half(weights, read)
    torch.testing.assert_close(point.tangent(change), tangent, rtol=1e-4, atol=1e-4)
    for asked, seen, want in zip(point.cotangents(error), point.inputs, pulled, strict=True):
        torch.testing.assert_close(asked.flatten(0, -2).T @ seen.flatten(0, -2), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [True, False])
def test_derivatives_of_a_feed_forward_half_are_autograd_s(gated: bool) -> None:
    weights = some(0, gated=gated)
    piece = tokens(weights, 1, 1)[0]()
    torch.testing.assert_close(GATED(weights, piece.read).written(), written(piece.read, weights))
    linear_map(GATED, weights, piece.read)


PLAIN = [name for name in TINY if canonical(name)[0].qk_norm is None and canonical(name)[0].attention_softcap is None]


def attention_of(name: str) -> tuple[Any, Weights, Tensor]:
    """The attention of the decoder's last block and what it reads and makes of it; fp64."""
    model, seen = ours(name), dict[str, Any]()
    attn = model.model.layers[-1].self_attn
    hook = attn.register_forward_hook(
        lambda _m, args, kwargs, out: seen.update(kwargs, read=args[0], out=out[0]), with_kwargs=True
    )
    logits(model, HELD_OUT[:2])
    hook.remove()
    read, biased = seen["read"].double(), attn.v_proj.bias is not None
    rows = [one.weight.double() for one in (attn.q_proj, attn.k_proj, attn.v_proj)]
    if biased:
        read = torch.cat([read, torch.ones(*read.shape[:-1], 1, dtype=torch.float64)], -1)
        rows = [torch.cat([row, one.bias.double()[:, None]], 1)
                for row, one in zip(rows, (attn.q_proj, attn.k_proj, attn.v_proj), strict=True)]  # fmt: skip
    mask = seen.get("attention_mask")
    around = {"position_embeddings": seen.get("position_embeddings"), "attention_mask": mask}
    if mask is not None and mask.dtype == torch.bool:
        around["attention_mask"] = torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(torch.float64).min)
    plain = seen["out"].double() - (0.0 if attn.o_proj.bias is None else attn.o_proj.bias.double())
    return partial(Attention, module=attn, around=around), (*(one.detach() for one in rows), attn.o_proj.weight.double()), (
        torch.stack([read, torch.zeros_like(read)])[0], plain.detach()
    )  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_attention_is_the_decoder_s_and_its_derivatives_are_autograd_s(name: str) -> None:
    half, weights, (read, out) = attention_of(name)
    torch.testing.assert_close(half(weights, read.detach()).written(), out, rtol=1e-4, atol=1e-5)
    linear_map(half, tuple(one.detach() for one in weights), read.detach())


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_a_step_is_the_least_squares_solution_of_the_linearised_half(
    gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "ITERATIONS", 500)
    monkeypatch.setattr(refine, "ENOUGH", 1e-20)
    pieces, start = tokens(some(1, gated=gated), 1), some(2, gated=gated)
    change = refine.step(GATED, pieces, start, 1e-9, 0)
    columns, wanted = list[Tensor](), list[Tensor]()
    for piece in (make() for make in pieces):
        slopes: Any = torch.autograd.functional.jacobian(
            lambda *w, piece=piece: (written(piece.read, w) * piece.weight).flatten(), start
        )
        columns.append(torch.cat([one.flatten(1) for one in slopes], dim=1))
        wanted.append(((piece.wanted - written(piece.read, start)) * piece.weight).flatten())
    matrix, missing = torch.cat(columns), torch.cat(wanted)
    best = torch.linalg.lstsq(matrix, missing[:, None], driver="gelsd").solution[:, 0]
    # Rows may be scaled against columns without effect: what the change does is unique, the change itself is not.
    have = matrix @ torch.cat([one.flatten() for one in change])
    torch.testing.assert_close(have, matrix @ best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_weights_that_exist_are_found(gated: bool) -> None:
    truth = some(3, gated=gated)
    start = tuple(one + 0.1 * two for one, two in zip(truth, some(4, gated=gated), strict=True))
    fitted, unseen = tokens(truth, 5, 12), tokens(truth, 6, 3)
    found = refined(GATED, fitted, unseen, start, 8)
    assert far(found, unseen) < 1e-3 * far(start, unseen)


def test_heads_that_exist_are_found() -> None:
    """Queries and keys are known by their scores only; what is written is compared."""
    half, truth, (read, _) = attention_of("llama-gqa-llama3-tied")
    truth = tuple(one.detach() for one in truth)
    generator = torch.Generator().manual_seed(5)
    start = tuple(one + 0.2 * one.std() * torch.randn(one.shape, generator=generator).double() for one in truth)

    def pieces(rows: int) -> list[Any]:
        x = torch.randn(rows, *read.shape[1:], generator=generator, dtype=torch.float64)
        return [
            partial(Piece, one[None], half(truth, one[None]).written(), torch.ones(1, len(one), 1).double())
            for one in x
        ]

    fitted, unseen = pieces(24), pieces(4)
    found = refined(half, fitted, unseen, start, 8)
    assert refine.error(half, unseen, found) < 0.02 * refine.error(half, unseen, start)


def test_what_does_not_help_on_unseen_tokens_is_not_done() -> None:
    start = some(7, gated=True)
    wrong = [partial(Piece, p.read, p.wanted + 0.01, p.weight) for p in (one() for one in tokens(start, 10))]
    found = refined(GATED, tokens(some(8, gated=True), 9), wrong, start, 3)  # the unseen tokens want next to nothing
    assert all(torch.equal(one, two) for one, two in zip(found, start, strict=True))


def test_where_nothing_is_missing_nothing_is_done() -> None:
    start = some(7, gated=True)
    assert refined(GATED, tokens(some(8, gated=True), 9), tokens(start, 10), start, 3) is start


def test_the_curvature_is_that_of_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pieces as it takes, another draw at every step."""
    monkeypatch.setattr(refine, "CURVATURE", 3 * SIZES["T"])
    pieces = tokens(some(1, gated=True), 1, 12)
    reads = [make().read for make in pieces]

    def places(number: int) -> list[int]:
        return [next(n for n, x in enumerate(reads) if x is p.read) for p in refine.drawn(pieces, number)]

    assert [len(set(places(number))) for number in range(4)] == [3] * 4
    assert len({tuple(places(number)) for number in range(4)}) > 1
    assert places(2) == places(2)


# --- decoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied"])
def test_a_restored_decoder_comes_closer_refined(name: str, tmp_path: Any) -> None:
    """With and without a gate, with and without biases, on the tokens that it was fitted to."""
    text = ids(rows=48, length=24)
    want = logits(stock(name), text)
    off: list[float] = []
    for steps in (0, 2):
        made = compress(
            folder(name), tmp_path / str(steps), method="fasp", keep=0.75,
            restore={"refine": steps, "predictions": False}, data=text, samples=None,
        )  # fmt: skip
        off.append((logits(made.load(), text) - want).square().mean().item())
        assert torch.isfinite(logits(made.load(), HELD_OUT)).all()
    assert off[1] < off[0]


def test_an_uncut_model_is_not_refined(tmp_path: Any) -> None:
    compress(folder("llama"), tmp_path / "out", keep=1.0, restore={"refine": 2})
    before, after = weights(folder("llama")), weights(tmp_path / "out")
    assert all((after[key] - one).abs().max() <= 2e-3 * one.abs().max() for key, one in before.items())


def test_heads_with_norms_keep_their_linear_fits(tmp_path: Any) -> None:
    """Their derivatives are not said here: attention is left alone, the feed-forward half is refined."""
    name = next(
        one for one in TINY if canonical(one)[0].qk_norm is not None and canonical(one)[0].norm_placement == "pre"
    )
    cut: dict[str, Any] = {"method": "fasp", "keep": 0.75, "data": ids(rows=48, length=24), "samples": None}
    made = []
    for steps in (0, 1):
        compress(folder(name), tmp_path / str(steps), restore={"refine": steps}, **cut)
        made.append(weights(tmp_path / str(steps)))
    first = [key for key in made[0] if ".0." in key and "self_attn" in key]
    assert first
    assert all(torch.equal(made[0][key], made[1][key]) for key in first)
    assert any(not torch.equal(made[0][key], made[1][key]) for key in made[0] if ".0.mlp" in key)


def test_steps_are_a_number(tmp_path: Any) -> None:
    with pytest.raises(BadInput, match="refine=-1 of restore is no number of steps"):
        compress(folder("llama"), tmp_path / "out", method="fasp", keep=0.8, restore={"refine": -1})
