"""MoDeGPT: lossless where the model is redundant, and what least squares and singular values on the tokens come to."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import raises, tree
from models import TINY, built, canonical, doubled, error, loaded, logits, stepwise, stock
from tinies import CALIBRATION, HELD_OUT, folder, weights
from tinies import compress as compress_by
from torch import Tensor

from microtome import arch, inner, layout
from microtome.columns import columns_of
from microtome.data import Tokens
from microtome.edit import Correct, Rewrite, Select
from microtome.errors import BadInput, UnknownName, UnsupportedModel
from microtome.evaluate import perplexity
from microtome.forecast import preview
from microtome.inner import View
from microtome.methods.modegpt import MoDeGPT, centred
from microtome.space import Kind, Space
from microtome.stats import Moment, Stat

EXACT = 1e-5
SHARED = Path(__file__).parents[3] / "shared"

# one for each of: plain, groups, biases, no out bias, no rotary, partial rotary, parallel, head norms, norms behind
MODELS = ["llama", "llama-biases-wide-heads", "qwen2-tied", "opt-untied-gelu", "gpt2-tied", "phi-tied-gqa", "gpt_neox",
          "phi3-partial-tied", "qwen3-tied", "olmo2", "gemma2", "smollm3-tied"]  # fmt: skip
PAPER: dict[str, Any] = {
    "score": "ridge", "qk": "cr", "values": "stream", "vo_gqa": "paper", "split": "paper", "means": "paper",
    "inputs": "original", "damping": 0.0, "qk_rate": 1.0,
}  # fmt: skip

compress = partial(compress_by, method="modegpt")
each_model = pytest.mark.parametrize("name", MODELS)


def named(options: Mapping[str, Any]) -> str:
    return "paper" if options == PAPER else "-".join(str(one) for one in options.values()) or "default"


# --- a block whose inputs are known, token by token -----------------------------------------------------------------


def sums(z_TN: Tensor) -> Moment:
    """The sums of tokens, in fp64."""
    moment = Moment(z_TN.shape[1])
    moment.upper_NN, moment.sum_N, moment.tokens = (z_TN.T @ z_TN).triu(), z_TN.sum(0), len(z_TN)
    return moment


def tokens(size: int, seed: int, count: int = 300) -> Tensor:
    """Correlated tokens [T, N] with a mean and a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return (mixed * torch.linspace(1.5, 0.1, size) + torch.randn(size, generator=generator)).double()


class Block:
    """A block of a tiny model with random tokens at its sites."""

    def __init__(self, name: str, number: int = 0) -> None:
        config, tensors = canonical(name)
        self.head, self.number = f"model.layers.{number}.", number
        self.tensors = {key: value for key, value in doubled(tensors).items() if key.startswith(self.head)}
        self.stream = tokens(self["self_attn.q_proj.weight"].shape[1], 1)
        self.contexts = tokens(self["self_attn.o_proj.weight"].shape[1], 2)
        self.neurons = tokens(self["mlp.down_proj.weight"].shape[1], 3)
        stats = {
            Stat.ATTENTION: sums(self.stream), Stat.HEADS: sums(self.contexts), Stat.NEURONS: sums(self.neurons),
        }  # fmt: skip
        spaces = inner.spaces_of(config, number, [Kind.FFN, Kind.QK, Kind.VO])
        names = {key.removeprefix(self.head): value for key, value in self.tensors.items()}
        self.view = View(config, number, ("attn", "mlp"), names, spaces, stats, {}, {})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"{self.head}{name}"]

    def bias(self, name: str, size: int) -> Tensor:
        return self.tensors.get(f"{self.head}{name}.bias", torch.zeros(size).double())

    def cut(self, method: MoDeGPT, **widths: int) -> dict[str, Tensor]:
        """The tensors after the cut, without the block's prefix."""
        edits = method.solve(self.view, {f"{self.number}.{name}": wide for name, wide in widths.items()})
        done = inner.narrowed(self.tensors, edits, self.number)
        return {name.removeprefix(self.head): tensor for name, tensor in done.items()}

    def heads(self, space: Space, name: str) -> list[Tensor]:
        """Numbers [T, N] of every head of a space, biases included."""
        weight = self[f"self_attn.{name}.weight"]
        bias, wide = self.bias(f"self_attn.{name}", len(weight)), space.size
        group, groups = int(space.name.rpartition(".")[2]), self.view.sizes.num_key_value_heads
        times = len(weight) // (groups * wide)
        made = (self.stream @ weight.T + bias).unflatten(1, (groups, times, wide))
        return [made[:, group, head] for head in range(times)]


# --- type I ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
@pytest.mark.parametrize("means", ["auto", "paper"])
def test_the_down_projection_is_least_squares_on_the_tokens(name: str, means: Any) -> None:
    """With an intercept where there is a bias to hold it."""
    block = Block(name)
    done = block.cut(MoDeGPT(means=means, damping=0.0), ffn=60)
    chosen = [edit for edit in MoDeGPT(means=means).solve(block.view, {"0.ffn": 60}) if isinstance(edit, Select)]
    kept = block.neurons[:, chosen[0].indices]
    old = block.bias("mlp.down_proj", 48)
    want = block.neurons @ block["mlp.down_proj.weight"].T + old
    free = name == "opt-tied" and means == "auto"
    left = torch.cat([kept, torch.ones(len(kept), 1).double()], 1) if free else kept
    fitted = left @ torch.linalg.lstsq(left, want if free else want - old).solution + (0.0 if free else old)
    have = kept @ done["mlp.down_proj.weight"].T + done.get("mlp.down_proj.bias", old)
    assert error(have, fitted) <= 1e-6
    assert error(want, fitted) > 1e-3
    assert torch.equal(done["mlp.up_proj.weight"], block["mlp.up_proj.weight"][chosen[0].indices])


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_neurons_by_leverage(ridge: float) -> None:
    block = Block("llama")
    moment = block.neurons.T @ block.neurons / len(block.neurons)
    damped = moment + ridge * moment.diagonal().mean() * torch.eye(80).double()
    leverage = (moment @ torch.linalg.inv(damped)).diagonal()
    (edit, _) = MoDeGPT(score="ridge", ridge=ridge).solve(block.view, {"0.ffn": 50})
    assert isinstance(edit, Select)
    assert edit.indices.tolist() == sorted(leverage.topk(50).indices.tolist())


def test_the_score_is_what_is_lost_with_a_neuron() -> None:
    """By leaving out one after the other, and refitting to the tokens."""
    block, want = Block("llama"), []
    output = block.neurons @ block["mlp.down_proj.weight"].T
    for gone in range(80):
        left = block.neurons[:, [one for one in range(80) if one != gone]]
        missed = output - left @ torch.linalg.lstsq(left, output).solution
        want.append(missed.pow(2).sum().item() / len(left))
    whole = output.pow(2).sum().item() / len(output) * 3 * 48  # a share of the output's energy, per parameter
    have = MoDeGPT(ridge=1e-12).scores(block.view)["0.ffn"]
    assert have == pytest.approx(sorted((one / whole for one in want), reverse=True), rel=1e-4)


def test_the_error_falls_with_the_width() -> None:
    block, errors = Block("opt-untied-gelu"), []
    want = block.neurons @ block["mlp.down_proj.weight"].T + block["mlp.down_proj.bias"]
    for wide in (8, 24, 40, 56, 72, 79):
        done = block.cut(method := MoDeGPT(damping=0.0), ffn=wide)
        select = next(one for one in method.solve(block.view, {"0.ffn": wide}) if isinstance(one, Select))
        have = block.neurons[:, select.indices] @ done["mlp.down_proj.weight"].T + done["mlp.down_proj.bias"]
        errors.append((have - want).pow(2).sum().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


# --- type II --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-biases-wide-heads", "phi", "opt-tied"])
def test_channels_by_the_energy_of_queries_and_keys(name: str) -> None:
    """Computed from every token's queries and keys; whole pairs where a rotary turns them."""
    block = Block(name)
    wide = block.view.sizes.head_dim
    edits = MoDeGPT(qk="cr", spaces="qk").solve(block.view, {"0.qk": wide // 2})
    assert len(edits) == block.view.sizes.num_key_value_heads
    for edit in edits:
        assert isinstance(edit, Select)
        pairs = edit.space.pairs
        query = torch.stack(block.heads(edit.space, "q_proj")).pow(2).mean(1).sum(0)
        key = block.heads(edit.space, "k_proj")[0].pow(2).mean(0)
        still = [(query[one] * key[one]).item() for one in range(2 * pairs, wide)]
        turned = [
            ((query[one] + query[one + pairs]) * (key[one] + key[one + pairs])).item() for one in range(pairs)
        ]  # fmt: skip
        left = inner.turning(pairs, wide, wide // 2)
        best = sorted(sorted(range(pairs), key=lambda one, by=turned: -by[one])[:left])
        rest = sorted(sorted(range(len(still)), key=lambda one, by=still: -by[one])[: wide // 2 - 2 * left])
        want = best + [one + pairs for one in best] + [one + 2 * pairs for one in rest]
        assert edit.indices.tolist() == want


@pytest.mark.parametrize("name", ["opt-tied", "gpt2-tied"])
def test_scores_without_a_rotary_have_the_best_low_rank(name: str) -> None:
    """Of all scores between tokens, each query's about its mean, which softmax does not see."""
    block = Block(name)
    rewrites = MoDeGPT().solve(block.view, {"0.qk": 4})
    done = block.cut(MoDeGPT(), qk=4)
    for number, edit in enumerate(rewrites):
        assert isinstance(edit, Rewrite)
        (query,), (key,) = (block.heads(edit.space, one) for one in ("q_proj", "k_proj"))
        scores = query @ (key - key.mean(0)).T
        singular = torch.linalg.svdvals(scores)
        rows = slice(4 * number, 4 * number + 4)
        short_q, short_k = (
            block.stream @ done[f"self_attn.{one}.weight"][rows].T + done[f"self_attn.{one}.bias"][rows]
            for one in ("q_proj", "k_proj")
        )
        have = short_q @ (short_k - short_k.mean(0)).T
        assert (have - scores).pow(2).sum().item() == pytest.approx(singular[4:].pow(2).sum().item(), rel=1e-6)
        assert short_q.pow(2).mean(0).tolist() == pytest.approx(
            (short_k - short_k.mean(0)).pow(2).mean(0).tolist(), rel=1e-6
        )


def test_groups_share_one_map_of_keys() -> None:
    """A block without a rotary of a model with groups: the scores of all query heads of a group together."""
    config, _ = canonical("smollm3-tied")
    number = next(one for one in range(config.num_hidden_layers) if not config.per_layer_config[one].rotary)
    done = Block("smollm3-tied", number)
    for edit in MoDeGPT(spaces="qk").solve(done.view, {f"{number}.qk": 2}):
        assert isinstance(edit, Rewrite)
        queries, (key,) = done.heads(edit.space, "q_proj"), done.heads(edit.space, "k_proj")
        scores = torch.cat(queries) @ (key - key.mean(0)).T
        have = torch.cat(queries) @ edit.shrink.T @ edit.grow.T @ (key - key.mean(0)).T
        lost = torch.linalg.svdvals(scores)[2:].pow(2).sum().item()
        assert (have - scores).pow(2).sum().item() == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "mistral", "gemma"])
def test_what_is_cut_is_as_if_it_were_zero(name: str, tmp_path: Path) -> None:
    """Each group turns with the frequencies that it kept, also with a cache; the scores' scale stays."""
    result = compress(folder(name), tmp_path / "out", options={"spaces": "qk"}, allocate={"qk": 0.5})
    (config, _), have, model = canonical(name), weights(tmp_path / "out"), built(TINY[name])
    stored, places = model.state_dict(), arch.find(TINY[name]["model_type"]).names(config)
    for block in range(config.num_hidden_layers):
        index = have[f"model.layers.{block}.self_attn.rotary_index"].tolist()
        for kept, space in zip(index, inner.spaces_of(config, block, [Kind.QK]).values(), strict=True):
            gone = [pair for pair in range(space.pairs) if pair not in kept]
            assert len(gone) == space.pairs - len(kept) > 0
            axis = next(axis for axis in space.axes if axis.tensor.endswith("q_proj.weight"))
            stored[places[axis.tensor].name][axis.at[gone + [one + space.pairs for one in gone]].flatten()] = 0.0
    want = logits(model, HELD_OUT)
    assert error(logits(result.load(), HELD_OUT), want) <= EXACT
    assert error(stepwise(result.load(), HELD_OUT, [5, 1, 18]), want) <= EXACT
    assert error(logits(stock(name), HELD_OUT), want) > 1e-2


# --- type III -------------------------------------------------------------------------------------------------------


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)


@pytest.mark.parametrize("name", ["llama", "llama-gqa-llama3-tied", "gemma"])
@pytest.mark.parametrize("split", ["balanced", "paper"])
def test_values_are_truncated_as_the_direct_svd(name: str, split: Any) -> None:
    """Of C^1/2 W_v [W_o of all heads of the group], with the root of the stream's moment that the code avoids."""
    block, rank = Block(name), block_rank(name)
    stacked = MoDeGPT(values="stream", split=split).solve(block.view, {"0.vo": rank})
    paper = MoDeGPT(values="stream", vo_gqa="paper").solve(block.view, {"0.vo": rank})
    half = root(block.stream.T @ block.stream / len(block.stream))
    for edit, other in zip(stacked, paper, strict=True):
        assert isinstance(edit, Rewrite)
        assert isinstance(other, Rewrite)
        group, wide = int(edit.space.name.rpartition(".")[2]), edit.space.size
        value = half @ block["self_attn.v_proj.weight"][group * wide : (group + 1) * wide].T
        out = torch.cat([block["self_attn.o_proj.weight"][:, at].T for at in columns_of(edit.space).T], 1)
        left, singular, right = torch.linalg.svd(value @ out, full_matrices=False)
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        have = value @ edit.shrink.T @ edit.grow.T @ out
        assert error(have, best) <= 1e-8
        if split == "paper":
            assert (edit.grow.T @ out).pow(2).sum(1).tolist() == pytest.approx([1.0] * rank)
        left, singular, right = torch.linalg.svd(value, full_matrices=False)
        if name != "llama":
            alone = left[:, :rank] * singular[:rank] @ right[:rank] @ out
            assert error(value @ other.shrink.T @ other.grow.T @ out, alone) <= 1e-8
            assert (alone - value @ out).norm() > (have - value @ out).norm()


def block_rank(name: str) -> int:
    return canonical(name)[0].per_layer_config[0].v_head_dim // 2


@pytest.mark.parametrize("name", ["opt-tied", "granite-biases"])
@pytest.mark.parametrize("options", [{"means": "paper"}, {"means": "auto"}, {"means": "all"}], ids=named)
def test_a_value_bias_moves_into_the_output_bias(name: str, options: dict[str, Any]) -> None:
    """Attention weights sum to one: what values have in common is written to the stream in full, however few stay."""
    block = Block(name)
    done = block.cut(MoDeGPT(values="stream", **options), vo=2)
    times = block.view.sizes.num_attention_heads // block.view.sizes.num_key_value_heads

    def written(tensors: Mapping[str, Tensor], wide: int, stream: Tensor) -> Tensor:
        """What the half writes where all attention is on a token with this normed stream [D]."""
        value = tensors["self_attn.v_proj.weight"] @ stream + tensors["self_attn.v_proj.bias"]
        spread = value.unflatten(0, (-1, wide)).repeat_interleave(times, 0).flatten()
        return tensors["self_attn.o_proj.weight"] @ spread + tensors["self_attn.o_proj.bias"]

    old = {name.removeprefix(block.head): tensor for name, tensor in block.tensors.items()}
    at = torch.zeros(48).double() if options["means"] == "paper" else block.stream.mean(0)
    wide = block.view.sizes.v_head_dim
    assert error(written(done, 2, at), written(old, wide, at)) <= 1e-10
    assert error(written(done, 2, block.stream[0]), written(old, wide, block.stream[0])) > 1e-2


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "qwen2-tied", "opt-tied"])
def test_the_output_projection_is_least_squares_on_the_contexts(name: str) -> None:
    """Of all heads at once, with an intercept where there is a bias."""
    block = Block(name)
    method, old = MoDeGPT(damping=0.0), block.bias("self_attn.o_proj", 48)
    edits, done = method.solve(block.view, {"0.vo": 4}), block.cut(method, vo=4)
    want = block.contexts @ block["self_attn.o_proj.weight"].T + old
    pieces = {int(at[0]): block.contexts[:, at] @ edit.shrink.T
              for edit in edits if isinstance(edit, Rewrite) for at in columns_of(edit.space).T}  # fmt: skip
    left = torch.cat([pieces[first] for first in sorted(pieces)], 1)
    have = left @ done["self_attn.o_proj.weight"].T + done.get("self_attn.o_proj.bias", old)
    free = torch.cat([left, torch.ones(len(left), 1).double()], 1) if name == "opt-tied" else left
    assert error(have, free @ torch.linalg.lstsq(free, want).solution) <= 1e-6
    assert error(have, want) > 1e-3


# --- both halves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, PAPER], ids=named)
def test_a_rotation_of_the_stream_changes_nothing(options: dict[str, Any]) -> None:
    """Inner channels do not know the basis of the stream: the same are kept, and mixed alike."""
    plain, turned = Block("opt-tied"), Block("opt-tied")
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(5)).double()).Q
    readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    names = {name: value @ turn.T if name.removesuffix(".weight") in readers else value
             for name, value in plain.view.weights.items()}  # fmt: skip
    names["mlp.down_proj.weight"] = turn @ names["mlp.down_proj.weight"]
    names["self_attn.o_proj.weight"] = turn @ names["self_attn.o_proj.weight"]
    stats = {**turned.view.stats, Stat.ATTENTION: sums(plain.stream @ turn.T)}
    widths = {"0.ffn": 40, "0.qk": 4, "0.vo": 4}
    ones = MoDeGPT(**options).solve(plain.view, widths)
    others = MoDeGPT(**options).solve(replace(turned.view, weights=names, stats=stats), widths)
    for one, other in zip(ones, others, strict=True):
        if isinstance(one, Select) and isinstance(other, Select):
            assert torch.equal(one.indices, other.indices)
        elif isinstance(one, Rewrite) and isinstance(other, Rewrite):
            assert error(other.grow @ other.shrink, one.grow @ one.shrink) <= 1e-6
        else:
            assert isinstance(one, Correct)
            assert isinstance(other, Correct)
            if one.tensor.endswith("down_proj.weight"):
                assert error(other.value, turn @ one.value) <= 1e-6


def test_scores_of_attention_are_what_is_lost() -> None:
    """Of values: the share of the groups' output energy in their truncation. All fall, and none is below zero."""
    block = Block("llama")
    scores = MoDeGPT().scores(block.view)
    assert {name: len(units) for name, units in scores.items()} == {"0.ffn": 80, "0.vo": 8, "0.qk": 8}
    for units in scores.values():
        assert units == sorted(units, reverse=True)
        assert min(units) >= 0.0
    lost, whole = 0.0, 0.0
    for space in block.view.of_kind(Kind.VO):
        (at,) = columns_of(space).T
        output = block.contexts[:, at] @ block["self_attn.o_proj.weight"][:, at].T
        lost += torch.linalg.svdvals(output)[5:].pow(2).sum().item() / len(output)
        whole += output.pow(2).sum().item() / len(output)
    assert sum(scores["0.vo"]) * 2 * 48 * 6 == pytest.approx(1.0)
    assert sum(scores["0.vo"][5:]) * 2 * 48 * 6 == pytest.approx(lost / whole, rel=1e-6)


def test_sums_about_the_mean() -> None:
    z = tokens(6, 4)
    assert error(centred(sums(z)).mean_NN, (z - z.mean(0)).T @ (z - z.mean(0)) / len(z)) <= 1e-10


# --- whole models ---------------------------------------------------------------------------------------------------


def planted(name: str, *, mixed: bool) -> Any:
    """A decoder with a neuron twice and eight dead, values of half rank, and queries of which half do nothing.

    Where no rotary turns them, the queries are of half rank if they may be `mixed`.
    """
    config, tensors = canonical(name)
    tensors = {key: value.clone() for key, value in tensors.items()}
    generator = torch.Generator().manual_seed(7)
    for number in range(config.num_hidden_layers):
        head = layout.prefix(number)
        for key in (f"{head}mlp.{one}_proj.{part}" for one in ("gate", "up") for part in ("weight", "bias")):
            if key in tensors:
                tensors[key][1], tensors[key][8:16] = tensors[key][0], 0.0
        for space in inner.spaces_of(config, number, [Kind.QK, Kind.VO]).values():
            flatten(tensors, space, generator, mixed=mixed)
    return loaded(config, tensors)


def flatten(tensors: dict[str, Tensor], space: Space, generator: torch.Generator, *, mixed: bool) -> None:
    """Make half the channels of a head redundant, in place; a value bias may leave the span if an output bias exists."""
    half, rest = space.size // 2, space.size - 2 * space.pairs
    left = inner.turning(space.pairs, space.size, half)
    span = torch.randn(space.size, half, generator=generator) / half**0.5
    onto = span @ torch.linalg.pinv(span)
    if space.kind is Kind.QK and (space.pairs or not mixed):
        pairs = torch.randperm(space.pairs, generator=generator)[:left]
        still = torch.randperm(rest, generator=generator)[: half - 2 * left] + 2 * space.pairs
        onto = torch.zeros(space.size)
        onto[torch.cat([pairs, pairs + space.pairs, still])] = 1.0
        onto = onto.diag()
    writer = "q_proj" if space.kind is Kind.QK else "v_proj"
    free = space.kind is Kind.VO and any(key.endswith("o_proj.bias") for key in tensors)
    for axis in space.axes:
        if writer in axis.tensor and not (free and axis.tensor.endswith("bias")):
            for at in axis.at.T:
                tensors[axis.tensor][at] = (onto @ tensors[axis.tensor][at].reshape(space.size, -1)).reshape(
                    tensors[axis.tensor][at].shape
                )


@each_model
@pytest.mark.parametrize("options", [{}, {"values": "stream"}, PAPER], ids=named)
def test_what_is_redundant_goes_without_loss(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = planted(name, mixed=options.get("qk") != "cr")
    sizes = model.config.per_layer_config[0]
    widths = {"ffn": sizes.intermediate_size - 9, "vo": sizes.v_head_dim // 2}
    if model.config.qk_norm is None:
        widths["qk"] = sizes.head_dim // 2
    exact = {"ridge": 1e-7, "damping": 0.0} | options
    result = compress(model, tmp_path / "out", options=exact, allocate=widths, multiple_of=1)
    assert {dial.partition(".")[2]: wide for dial, wide in result.plan.widths.items()} == widths
    assert error(logits(result.load(), HELD_OUT), logits(model, HELD_OUT)) <= 10 * EXACT


@pytest.mark.parametrize("name", ["llama", "opt-untied-gelu"])
def test_the_plant_is_just_that_large(name: str, tmp_path: Path) -> None:
    model = planted(name, mixed=True)
    widths = {"ffn": 80 - 9, "vo": 4, "qk": 4}
    for dial, wide in widths.items():
        exact = {"ridge": 1e-7, "damping": 0.0, "spaces": dial}
        harder = compress(model, tmp_path / dial, options=exact, allocate={dial: wide - 2}, multiple_of=1)
        assert error(logits(harder.load(), HELD_OUT), logits(model, HELD_OUT)) > 100 * EXACT


@each_model
def test_keep_1_leaves_every_byte(name: str, tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", keep=1.0)
    assert result.plan.widths == {}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder(name) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "options"), [("llama-gqa-llama3-tied", {}), ("opt-tied", {}), ("qwen2-tied", PAPER)])
def test_runs_loads_and_previews_agree(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"method": "modegpt", "keep": 0.8, "options": options}
    first, second = (compress(folder(name), tmp_path / one, **chosen) for one in ("a", "b"))
    ones, others = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert ones["model.safetensors"] == others["model.safetensors"]
    assert first.plan.widths == second.plan.widths
    assert first.plan.allocation is not None
    assert first.plan.allocation["name"] == "influence"
    assert torch.equal(logits(first.load(), HELD_OUT), logits(first.load(), HELD_OUT))
    dry = preview(folder(name), data=CALIBRATION, **chosen)
    assert dry.widths == first.plan.widths
    assert (dry.after.stored, dry.after.decoder) == (first.after.stored, first.after.decoder)
    assert first.after.decoder / first.before.decoder == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("name", ["llama", "opt-tied"])
def test_a_budget_over_all_blocks(name: str, tmp_path: Path) -> None:
    result = compress(folder(name), tmp_path / "out", keep=0.8, allocate="global")
    assert result.after.decoder / result.before.decoder == pytest.approx(0.8, abs=0.03)
    assert len(set(result.plan.widths.values())) > 2
    assert torch.isfinite(logits(result.load(), HELD_OUT)).all()


def test_biases_can_be_added(tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"allocate": {"ffn": 0.8, "vo": 0.5}}
    result = compress(folder("llama"), tmp_path / "out", options={"means": "all"}, **chosen)
    have = weights(tmp_path / "out")
    for block in range(result.load().config.num_hidden_layers):
        assert have[f"model.layers.{block}.mlp.down_proj.bias"].abs().max() > 0
        assert have[f"model.layers.{block}.self_attn.o_proj.bias"].abs().max() > 0
    plain = compress(folder("llama"), tmp_path / "plain", **chosen)
    assert result.after.stored - plain.after.stored == 2 * 48 * result.load().config.num_hidden_layers


def test_spared_and_left_out_widths() -> None:
    chosen: dict[str, Any] = {"method": "modegpt", "keep": 0.8, "allocate": "uniform", "data": None}
    spared = preview(folder("llama"), options={"qk_rate": 0.0}, **chosen).widths
    assert {wide for dial, wide in spared.items() if dial.endswith("qk")} == {8}
    assert {wide for dial, wide in spared.items() if dial.endswith("vo")} != {8}
    some = preview(folder("llama"), options={"spaces": "ffn, vo"}, **chosen).widths
    assert {dial.partition(".")[2] for dial in some} == {"ffn", "vo"}
    normed = preview(folder("qwen3-tied"), **chosen).widths
    assert {dial.partition(".")[2] for dial in normed} == {"ffn", "vo"}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"spaces": "ffn,heads"}, UnknownName, "no space of modegpt named 'heads'.*Known: all, ffn, qk, vo"),
        ({"ridge": -1.0}, BadInput, "ridge=-1.0 of modegpt is no number from 0 on"),
        ({"damping": float("nan")}, BadInput, "damping=nan of modegpt is no number from 0 on"),
        ({"qk_rate": 1.5}, BadInput, "qk_rate=1.5 of modegpt is no share from 0 to 1"),
        ({"spaces": "qk"}, UnsupportedModel, "this qwen3 norms its queries and keys, .*spaces=ffn,vo"),
    ],
)
def test_refused_in_words(options: dict[str, Any], kind: Any, words: str, tmp_path: Path) -> None:
    with raises(kind, words):
        compress(folder("qwen3-tied"), tmp_path / "out", keep=0.8, options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="the trained models are not here")
@pytest.mark.parametrize("name", ["stories-260k", "shakespeare-opt-0.8m"])
def test_better_than_random_on_a_trained_model(name: str, tmp_path: Path) -> None:
    data, held = (torch.load(SHARED / "data" / "tokens" / f"{name}.{one}.pt")[:32] for one in ("calib", "eval"))

    def measured(method: str, **options: Any) -> float:
        model = SHARED / "models" / name
        result = compress(model, tmp_path / method, method=method, keep=0.8, data=data, options=options)
        return perplexity(result.load(dtype="float32"), Tokens(held, "ids", "")).value

    assert measured("modegpt") < 0.8 * measured("random", spaces="ffn+qk+vo")
