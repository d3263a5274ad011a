"""Restoration: least squares against the uncut decoder, in the coordinates that are left."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, built, canonical, error, logits, ours
from tinies import CALIBRATION, HELD_OUT, compress, folder, weights
from torch import Tensor

from microtome import chain, inner, layout, planner, regression, restore
from microtome.checkpoint import Writer
from microtome.cut import Sink
from microtome.edit import Rewrite, Select
from microtome.errors import BadInput
from microtome.layout import prefix
from microtome.lineage import Lineage, Made
from microtome.regression import Fit
from microtome.restore import Restore
from microtome.source import open_source
from microtome.space import Kind

FFN = {"method": "fasp", "options": {"spaces": "ffn"}}


def recipe(*steps: Any) -> dict[str, Any]:
    return {"steps": list(steps)}


def far(have: Tensor, want: Tensor) -> float:
    """Mean squared distance of logits, relative to their spread."""
    return ((have - want).double().pow(2).mean() / want.double().var()).item()


def seen(model: Any, tokens: Tensor, *names: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What some linears read and make of it [T, .], by hooks; fp64."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, out, name=name: found.update(
                {name: (args[0].flatten(0, -2).double(), out.flatten(0, -2).double())}
            )
        )
        for name in names
    ]
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return found


# --- one fit --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.sampled_from([1e-4, 1e-2, 1.0]))
@settings(max_examples=15, deadline=None)
def test_a_fit_is_least_squares_with_ridge_rows(seed: int, ridge: float) -> None:
    """Rows of sqrt(lambda) I, wanting the old weights, under the tokens: the definition, by lstsq."""
    generator = torch.Generator().manual_seed(seed)
    z, y, start = (torch.randn(*shape, generator=generator) for shape in ((50, 6), (50, 4), (4, 6)))
    fit = Fit(6, 4, torch.device("cpu"))
    fit.add(z[:30], y[:30] - z[:30] @ start.T, 0)
    fit.add(z[30:], y[30:] - z[30:] @ start.T, 1)
    weight = math.sqrt(ridge * z.pow(2).sum().item() / 6)
    left = torch.cat([z, weight * torch.eye(6)]).double()
    right = torch.cat([y, weight * start.T]).double()
    want = torch.linalg.lstsq(left, right).solution.T
    assert error(fit.solved(start, ridge), want) < 1e-4
    assert torch.equal(fit.solved(start, math.inf), start.double())


@given(st.integers(0, 999), st.integers(3, 40))
@settings(max_examples=25, deadline=None)
def test_the_ridge_never_makes_windows_worse_that_were_held_out(seed: int, tokens: int) -> None:
    """Few tokens, pure noise as the target: a fit would overfit, and none is an answer."""
    generator = torch.Generator().manual_seed(seed)
    z, r = torch.randn(2, tokens, 8, generator=generator), torch.randn(2, tokens, 3, generator=generator)
    fit = Fit(8, 3, torch.device("cpu"))
    for part in (0, 1):
        fit.add(z[part], r[part], part)
    (ridge,) = fit.best([torch.arange(3)])
    losses = {}
    for one in (*regression.GRID, math.inf):
        if math.isinf(one):
            step = torch.zeros(3, 8)
        else:
            weight = math.sqrt(one * z[0].pow(2).sum().item() / 8)
            left = torch.cat([z[0], weight * torch.eye(8)])
            step = torch.linalg.lstsq(left, torch.cat([r[0], torch.zeros(8, 3)])).solution.T
        losses[one] = (r[1] - z[1] @ step.T).pow(2).sum().item()
    assert losses[ridge] <= losses[math.inf] * (1 + 1e-6)
    assert losses[ridge] == pytest.approx(min(losses.values()), rel=1e-3)


def test_linears_that_read_the_same_have_ridges_of_their_own() -> None:
    """One can be fitted, the other is noise: they are solved as they would be apart."""
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 40, 8, generator=generator), torch.randn(2, 40, 2, generator=generator)
    lost = torch.stack([one @ torch.ones(8, 3) for one in z])
    both, starts = Fit(8, 5, torch.device("cpu")), torch.randn(5, 8, generator=generator)
    apart = [Fit(8, size, torch.device("cpu")) for size in (3, 2)]
    for part in (0, 1):
        both.add(z[part], torch.cat([lost[part], noise[part]], 1), part)
        for fit, wanted in zip(apart, (lost, noise), strict=True):
            fit.add(z[part], wanted[part], part)
    ridges = both.best(torch.arange(5).split([3, 2]))
    assert ridges[0] < ridges[1]
    alone = [fit.solved(start, None) for fit, start in zip(apart, starts.split([3, 2]), strict=True)]
    assert error(both.solved(starts, None, [3, 2]), torch.cat(alone)) < 1e-9


def test_a_degenerate_fit_is_solved() -> None:
    """Fewer tokens than features, and a feature that is always zero."""
    fit = Fit(6, 2, torch.device("cpu"))
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    z[:, 2] = 0.0
    fit.add(z, torch.ones(3, 2), 0)
    fit.add(z, torch.ones(3, 2), 1)
    step = fit.solved(torch.zeros(2, 6), 1e-9)
    assert error(z.double() @ step.T, torch.ones(3, 2)) < 1e-3
    assert step[:, 2].abs().max() == 0.0


# --- nothing to restore ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_an_uncut_model_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    compress(folder(name), tmp_path / "out", keep=1.0, restore=True)
    before, after = weights(folder(name)), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (after[key] - tensor).abs().max() <= 2e-3 * tensor.abs().max(), key
    want = logits(built(TINY[name]), HELD_OUT)
    have = logits(restored_model(tmp_path / "out"), HELD_OUT)
    assert error(have, want) < 2e-4


def restored_model(place: Path) -> Any:
    from microtome.loading import load

    return load(place, device=torch.device("cpu"), dtype=torch.float32)


def test_a_cut_without_loss_is_left_as_it_is(tmp_path: Path) -> None:
    """Neurons that nobody reads are removed; there is nothing to make up for."""
    model = built(TINY["llama"])
    for block in model.model.layers:
        block.mlp.down_proj.weight.data[:, ::2] = 0.0
    model.save_pretrained(tmp_path / "source")
    steps = {"allocate": {"ffn": 40}, **FFN}
    plain = compress(tmp_path / "source", tmp_path / "plain", **steps)
    compress(tmp_path / "source", tmp_path / "out", restore=True, **steps)
    want = logits(model, HELD_OUT)
    assert error(logits(plain.load(device="cpu", dtype="float32"), HELD_OUT), want) < 1e-4
    assert error(logits(restored_model(tmp_path / "out"), HELD_OUT), want) < 3e-4


# --- what it fits ---------------------------------------------------------------------------------------------------


def with_ones(z: Tensor) -> Tensor:
    return torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], dim=1)


def ridged(z: Tensor, y: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Least squares with ridge rows [O, F]."""
    weight = math.sqrt(ridge * z.pow(2).sum().item() / z.shape[1])
    left = torch.cat([z, weight * torch.eye(z.shape[1], dtype=z.dtype)])
    return torch.linalg.lstsq(left, torch.cat([y, weight * start.T])).solution.T


def counted(stream: Tensor, *, normed: bool) -> Tensor:
    """What every token counts where the stream is written: one over its length, as a norm will see it, or one [T, 1]."""
    return 1 / stream.pow(2).mean(1, keepdim=True).sqrt() if normed else torch.ones(len(stream), 1, dtype=stream.dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-biases-wide-heads"])
def test_every_linear_is_the_fit_of_its_target(name: str, normed: bool, tmp_path: Path) -> None:
    """The first block by hooks on both models: readers to the uncut outputs in the kept rows, writers to the stream."""
    ridge, biased = 0.01, "biases" in name
    table = {"0.ffn": 40, "1.ffn": 60, "0.vo": 4}
    cut = compress(folder(name), tmp_path / "cut", method="fasp", allocate=table)
    compress(folder(name), tmp_path / "out",
             recipe=recipe({"fasp": {"allocate": table}}, {"restore": {"ridge": ridge, "head": False, "normed": normed}}))  # fmt: skip
    dense, before, after = ours(name), cut.load(device="cpu", dtype="float32"), restored_model(tmp_path / "out")
    up, down, out = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
    value = "model.layers.0.self_attn.v_proj"
    mine = seen(after, CALIBRATION, up, down, out, value)
    whole = seen(dense, CALIBRATION, up, down, out, value, "model.layers.0", "model.layers.0.post_attention_layernorm")
    parts = {key: tensor.double() for key, tensor in before.state_dict().items()}

    def start(key: str) -> Tensor:
        weight = parts[f"{key}.weight"]
        return torch.cat([weight, parts[f"{key}.bias"][:, None]], 1) if biased else weight

    def made(key: str) -> Tensor:
        linear = after.get_submodule(key)
        return torch.cat([linear.weight, linear.bias[:, None]], 1) if biased else linear.weight

    def features(key: str) -> Tensor:
        return with_ones(mine[key][0]) if biased else mine[key][0]

    parameters = dict(dense.named_parameters())
    for key in (up, value):  # which rows were kept is read off the weights
        rows = [
            int((parameters[f"{key}.weight"].double() - row).abs().sum(1).argmin()) for row in parts[f"{key}.weight"]
        ]
        want = ridged(features(key), whole[key][1][:, rows], start(key), ridge)
        assert error(made(key), want) < 1e-3, key
    embedded = dense.model.embed_tokens.weight[CALIBRATION].flatten(0, 1).double()
    middle = embedded + whole[out][1]
    weight = counted(middle, normed=normed)
    want = ridged(weight * features(out), weight * (middle - embedded), start(out), ridge)
    assert error(made(out), want) < 1e-3
    mine_middle = embedded + mine[out][1]
    behind = middle + whole[down][1]
    weight = counted(behind, normed=normed)
    want = ridged(weight * features(down), weight * (behind - mine_middle), start(down), ridge)
    assert error(made(down), want) < 1e-3


@pytest.mark.parametrize("normed", [False, True])
def test_parallel_halves_are_fitted_together(normed: bool, tmp_path: Path) -> None:
    """Their sum has to come to what the uncut block adds: one regression on both inputs and one intercept."""
    name = next(one for one in TINY if one.startswith("phi") and canonical(one)[0].parallel == "shared")
    table = {"0.ffn": 40, "0.vo": canonical(name)[0].v_head_dim // 2}
    cut = compress(folder(name), tmp_path / "cut", method="fasp", allocate=table)
    compress(folder(name), tmp_path / "out",
             recipe=recipe({"fasp": {"allocate": table}}, {"restore": {"ridge": 0.01, "head": False, "normed": normed}}))  # fmt: skip
    dense, before, after = ours(name), cut.load(device="cpu", dtype="float32"), restored_model(tmp_path / "out")
    down, out = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
    mine, whole = seen(after, CALIBRATION, down, out), seen(dense, CALIBRATION, down, out)
    old, new = ({key: tensor.double() for key, tensor in one.state_dict().items()} for one in (before, after))
    z = with_ones(torch.cat([mine[out][0], mine[down][0]], 1))
    bias = old[f"{out}.bias"] + old[f"{down}.bias"]
    start = torch.cat([old[f"{out}.weight"], old[f"{down}.weight"], bias[:, None]], 1)
    added = whole[out][1] + whole[down][1]
    weight = counted(dense.model.embed_tokens.weight[CALIBRATION].flatten(0, 1).double() + added, normed=normed)
    want = ridged(weight * z, weight * added, start, 0.01)
    bias = new[f"{out}.bias"] + new[f"{down}.bias"]
    have = torch.cat([new[f"{out}.weight"], new[f"{down}.weight"], bias[:, None]], 1)
    assert error(have, want) < 1e-3


def test_rows_follow_selections_rewrites_and_composed_cuts() -> None:
    """Rows of queries, keys and values through two steps, against the same matrices multiplied out."""
    config, tensors = canonical("llama-gqa-llama3-tied")
    generator = torch.Generator().manual_seed(2)
    first: dict[int, list[Any]] = {1: []}
    for space in inner.spaces_of(config, 1, {Kind.VO}).values():
        shrink, grow = (torch.randn(*shape, generator=generator).double() for shape in ((5, 8), (8, 5)))
        first[1].append(Rewrite(space, shrink, grow))
    first[1].append(Select(inner.spaces_of(config, 1, {Kind.FFN})["1.ffn"], torch.arange(0, 80, 2)))
    middle = inner.narrowed_config(config, {"1.vo": 5, "1.ffn": 40})
    second: dict[int, list[Any]] = {0: [Select(inner.spaces_of(
        inner.narrowed_config(middle, {"0": 0}), 0, {Kind.FFN})["0.ffn"], torch.tensor([3, 5, 39]))]}  # fmt: skip
    lineage = Lineage([Made(config, first), Made(middle, {}, blocks=[1, 2]),
                       Made(inner.narrowed_config(middle, {"0": 0}), second)])  # fmt: skip
    assert lineage.path(0) == [1, 1, 0, 0]
    y = torch.randn(80, 7, generator=generator, dtype=torch.float64)
    assert torch.equal(lineage.rows(y, "mlp.up_proj.weight", 0), y[::2][[3, 5, 39]])
    v = torch.randn(16, 7, generator=generator, dtype=torch.float64)
    wanted = torch.cat([edit.shrink @ v[8 * group : 8 * group + 8] for group, edit in enumerate(first[1][:2])])
    assert error(lineage.rows(v, "self_attn.v_proj.weight", 0), wanted) < 1e-12
    assert torch.equal(lineage.rows(v, "self_attn.k_proj.weight", 0), v)
    assert torch.equal(lineage.rows(y, "mlp.up_proj.weight", 1), y)
    edits: dict[int, list[Any]] = {0: [
        Rewrite(space, torch.eye(4, 8), torch.randn(8, 4, generator=generator))
        for space in inner.spaces_of(config, 0, {Kind.QK}).values()
    ]}  # fmt: skip
    keys = Lineage([Made(config, edits)]).rows(v, "self_attn.k_proj.weight", 0)  # keys see the way back
    assert error(keys, torch.cat([e.grow.double().T @ v[8 * g : 8 * g + 8] for g, e in enumerate(edits[0])])) < 1e-12
    assert tensors  # the canonical decoder whose rows these are


def test_the_stream_s_maps_are_composed_and_skip_dropped_blocks() -> None:
    config = canonical("llama")[0]
    maps = {f"residual.{number}": torch.randn(10, 48, generator=torch.Generator().manual_seed(number)).double()
            for number in range(7)}  # fmt: skip
    again = {f"residual.{number}": torch.full((4, 10), 1.0 + number).double() for number in range(5)}
    lineage = Lineage([Made(config, stream=maps), Made(config, blocks=[0, 2]),
                       Made(inner.narrowed_config(config, {"1": 0}), stream=again)])  # fmt: skip
    assert lineage.blocks(2) == [0, 2]
    for number, old in enumerate((0, 1, 4, 5, 6)):  # the junction before the dropped block is that behind it
        assert torch.equal(lineage.stream(number, 2), again[f"residual.{number}"] @ maps[f"residual.{old}"])
    assert Lineage([Made(config)]).stream(3, 3) is None


# --- heads ----------------------------------------------------------------------------------------------------------


def head_tokens(dense: Any, cut: Any) -> tuple[Tensor, Tensor]:
    """Uncut logits and the cut decoder's final states behind its norm [T, .]."""
    states: list[Tensor] = []
    hook = cut.model.norm.register_forward_hook(lambda _m, _a, out: states.append(out.flatten(0, -2).double()))
    logits(cut, CALIBRATION)
    hook.remove()
    return logits(dense, CALIBRATION).flatten(0, -2).double(), states[0]


SLICES = {"slicegpt": {"slice": 0.2}}
HEAD_ONLY = {"restore": {"readers": False, "writers": False, "ridge": 1e-6, "predictions": False}}


@pytest.mark.parametrize("name", ["llama", "opt-untied-gelu", "gpt_neox"])
def test_an_untied_head_is_fitted_to_the_logits(name: str, tmp_path: Path) -> None:
    """By lstsq on the logits themselves, with an intercept where the head has a bias."""
    name = next(one for one in TINY if one.startswith(name) and not canonical(one)[0].tie_word_embeddings)
    compress(folder(name), tmp_path / "cut", recipe=recipe(SLICES))
    compress(folder(name), tmp_path / "out", recipe=recipe(SLICES, HEAD_ONLY))
    cut, out = (canonical_of(tmp_path / place) for place in ("cut", "out"))
    want, z = head_tokens(ours(name), cut)
    bias = cut.lm_head.bias is not None
    best = torch.linalg.lstsq(with_ones(z) if bias else z, want).solution
    ideal = ((with_ones(z) if bias else z) @ best - want).pow(2).sum()
    have = (logits(out, CALIBRATION).flatten(0, -2).double() - want).pow(2).sum()
    plain = (logits(cut, CALIBRATION).flatten(0, -2).double() - want).pow(2).sum()
    assert ideal <= have * (1 + 1e-6)
    assert have <= ideal * 1.01
    assert have < 0.99 * plain


def canonical_of(place: Path) -> Any:
    """Our decoder of a stored checkpoint, whatever it is."""
    from models import loaded

    with open_source(place) as source:
        found = planner.opened(source)
        tensors = {name: tensor for part in layout.parts(found.config) for name, tensor in found.read(part).items()}
    return loaded(found.config, tensors)


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied", "gemma"])
def test_a_tied_gain_is_fitted_to_the_logits(name: str, tmp_path: Path) -> None:
    """One number for each coordinate: a regression of all logits on E' diag(.) z, written out."""
    compress(folder(name), tmp_path / "cut", recipe=recipe(SLICES))
    compress(folder(name), tmp_path / "out", recipe=recipe(SLICES, HEAD_ONLY))
    cut, out = (canonical_of(tmp_path / place) for place in ("cut", "out"))
    assert cut.config.tie_word_embeddings
    want, z = head_tokens(ours(name), cut)
    gain = cut.model.norm.weight.double() + cut.config.norm_offset
    bias = torch.zeros_like(gain) if cut.model.norm.bias is None else cut.model.norm.bias.double()
    table, plain = cut.lm_head.weight.double(), (z - bias) / gain
    some = slice(0, None, 2)  # every logit of half of the tokens is linear in the gain
    design = (table[None] * plain[some, None]).flatten(0, 1)
    wanted = (want - bias @ table.T)[some].flatten()
    gram = (table.T @ table) * (plain.T @ plain)
    ideal = torch.linalg.solve(gram, torch.einsum("tv,vr,tr->r", want - bias @ table.T, table, plain))
    have = out.model.norm.weight.double() + out.config.norm_offset
    assert error(have, ideal) < 2e-3
    least = torch.linalg.lstsq(design, wanted).solution  # the sums above are those of a regression
    assert (design @ least - wanted).pow(2).sum() > 0.9 * (design @ have - wanted).pow(2).sum()
    assert (design @ have - wanted).pow(2).sum() < (design @ gain - wanted).pow(2).sum()


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied"])
def test_a_tied_adapter_is_fitted_to_the_logits(name: str, tmp_path: Path) -> None:
    step = {"slicegpt": {"slice": 0.2, "options": {"basis": "junction"}}}
    compress(folder(name), tmp_path / "cut", recipe=recipe(step))
    compress(folder(name), tmp_path / "out", recipe=recipe(step, HEAD_ONLY))
    cut, out = (canonical_of(tmp_path / place) for place in ("cut", "out"))
    assert cut.head_adapter is not None
    want, z = head_tokens(ours(name), cut)
    z = with_ones(z) if cut.head_adapter.bias is not None else z
    table = cut.lm_head.weight.double()
    onto = table @ torch.linalg.pinv(table)  # what any adapter can reach of the logits
    ideal = (z @ torch.linalg.lstsq(z, want @ onto.T).solution - want).pow(2).sum()
    have = (logits(out, CALIBRATION).flatten(0, -2).double() - want).pow(2).sum()
    plain = (logits(cut, CALIBRATION).flatten(0, -2).double() - want).pow(2).sum()
    assert ideal * 0.999 <= have <= ideal * 1.01
    assert have < plain


# --- all of it ------------------------------------------------------------------------------------------------------

LINEAR = {"restore": {"predictions": False}}  # distances of logits are what it comes closer by
LONG = torch.cat([CALIBRATION, torch.randint(3, 97, (24, 24), generator=torch.Generator().manual_seed(9))])


@pytest.mark.parametrize("name", TINY)
def test_it_comes_closer_on_text_that_it_has_not_seen(name: str, tmp_path: Path) -> None:
    """Every feature: biases, groups, parallel blocks, offsets, sandwich norms, windows, ties."""
    cut = {"fasp": {"keep": 0.75, "options": {"inputs": "original", "ridge": 1e6}}}  # as good as no refit
    compress(folder(name), tmp_path / "cut", recipe=recipe(cut), data=LONG)
    compress(folder(name), tmp_path / "out", recipe=recipe(cut, LINEAR), data=LONG)
    want = logits(built(TINY[name]), HELD_OUT)
    before, after = (far(logits(restored_model(tmp_path / place), HELD_OUT), want) for place in ("cut", "out"))
    assert math.isfinite(after)
    assert after < before
    if canonical(name)[0].norm_placement != "pre":
        kept, made = weights(tmp_path / "cut"), weights(tmp_path / "out")
        writers = [key for key in kept if "down_proj" in key or "o_proj" in key]
        assert writers
        assert all(torch.equal(kept[key], made[key]) for key in writers)


@pytest.mark.parametrize(("name", "basis"), [
    ("llama", "global"), ("opt-tied", "junction"), ("phi", "global"), ("gemma", "junction")
])  # fmt: skip
def test_slices_and_then_neurons_are_restored(name: str, basis: str, tmp_path: Path) -> None:
    """Two composed cuts: targets go through both, of the stream and of the rows."""
    name = next(one for one in TINY if one.startswith(name))
    steps = [{"slicegpt": {"slice": 0.1, "options": {"basis": basis}}},
             {"fasp": {"keep": 0.75, "options": {"spaces": "ffn"}}}]  # fmt: skip
    compress(folder(name), tmp_path / "cut", recipe=recipe(*steps), data=LONG)
    compress(folder(name), tmp_path / "out", recipe=recipe(*steps, LINEAR), data=LONG)
    want = logits(built(TINY[name]), HELD_OUT)
    before, after = (far(logits(restored_model(tmp_path / place), HELD_OUT), want) for place in ("cut", "out"))
    assert after < before


def test_a_dropped_block_is_made_up_for_by_the_one_before(tmp_path: Path) -> None:
    """The last writer before the gap is fitted to the stream behind the gap."""
    config, tensors = canonical("llama")
    small = inner.narrowed_config(config, {"1": 0})
    left = [0, 2]
    with open_source(folder("llama")) as source:
        dense = planner.opened(source)
        with Writer(tmp_path / "cut") as sink:
            out = planner.inner_outcome(dense, DROPS, {"1": 0})
            run = chain.Run(dense, LONG, torch.device("cpu"), torch.float32)
            store = Sink(run.work(dense, out), sink, torch.float32)
            for part in layout.parts(small):
                mine = {name: tensors[renumbered(name, left)] for name in layout.shapes(small, part)}
                store.store(part, mine)
            chain.cut.finish(sink, dense, out, torch.float32)
        with open_source(tmp_path / "cut") as held, Writer(tmp_path / "out") as sink:
            cut = planner.opened(held)
            lineage, options = Lineage([Made(config, blocks=left)]), Restore(head=False)
            same = planner.same(cut, None)
            restore.restored(dense, lineage, options, run.work(cut, same), sink, torch.float32)
            chain.cut.finish(sink, dense, same, torch.float32)
    want = logits(built(TINY["llama"]), HELD_OUT)
    before, after = (far(logits(restored_model(tmp_path / place), HELD_OUT), want) for place in ("cut", "out"))
    assert after < 0.9 * before
    kept, made = weights(tmp_path / "cut"), weights(tmp_path / "out")
    key = f"{prefix(0)}self_attn.o_proj.weight"  # before the gap nothing is lost yet
    assert error(made[key], kept[key]) < 1e-3
    assert error(made[f"{prefix(0)}mlp.down_proj.weight"], kept[f"{prefix(0)}mlp.down_proj.weight"]) > 1e-2


class Drops:
    biased = False


DROPS = Drops()


def renumbered(name: str, left: list[int]) -> str:
    for new, old in reversed(list(enumerate(left))):
        if name.startswith(prefix(new)):
            return prefix(old) + name.removeprefix(prefix(new))
    return name


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"held_out": 0.0}, "held_out=0.0 of restore lies between 0 and 1"),
    ({"ridge": -1.0}, "ridge=-1.0 of restore is no number from 0 on"),
    ({"windows": 1}, "windows=1 of restore: at least 2"),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Restore(**options)


def test_one_window_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="restoration needs at least 2 windows, one to choose the ridge on, not 1"):
        compress(folder("llama"), tmp_path / "out", method="fasp", keep=0.8, restore=True, data=CALIBRATION[:1])
    assert not (tmp_path / "out").exists()


def test_windows_that_are_not_asked_for_are_not_read(tmp_path: Path) -> None:
    """With `windows`, later ones change nothing; most of two held out leaves one to fit."""
    steps = recipe({"fasp": {"allocate": {"ffn": 0.5}, "options": {"inputs": "original"}}},
                   {"restore": {"windows": 4, "held_out": 0.9}})  # fmt: skip
    compress(folder("llama"), tmp_path / "out", recipe=steps)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out").values())


# --- a trained model ------------------------------------------------------------------------------------------------

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared")
@pytest.mark.parametrize("method", ["slicegpt", "fasp"])
def test_a_trained_model_is_better_restored(method: str, tmp_path: Path) -> None:
    from microtome.data import Tokens
    from microtome.evaluate import perplexity

    tokens = {kind: torch.load(SHARED / "data" / "tokens" / f"stories-260k.{kind}.pt", weights_only=True)
              for kind in ("calib", "eval")}  # fmt: skip
    found: list[float] = []
    for restored in (False, True):
        out = tmp_path / str(restored)
        compress(SHARED / "models" / "stories-260k", out, method=method, keep=0.75, restore=restored,
                 data=tokens["calib"], samples=None, length=tokens["calib"].shape[1])  # fmt: skip
        found.append(perplexity(restored_model(out), Tokens(tokens["eval"], "stories", "")).value)
    assert math.isfinite(found[1])
    assert found[1] < found[0]
