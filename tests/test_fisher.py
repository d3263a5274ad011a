"""Kronecker factors of the loss's curvature: loops over tokens say the same, and so does Fisher's matrix of one token."""

from pathlib import Path

import pytest
import torch
from folders import raises
from models import TINY, built, canonical, doubled, loaded
from tinies import CALIBRATION, compress, folder
from torch import Tensor

from microtome import fisher, planner
from microtome.errors import NumericalFailure
from microtome.gradients import drawn, gradients
from microtome.source import open_source
from microtome.sparsity import READS
from microtome.stats import Curvature, Fisher, Sample, Stat

NAMES = ["llama-gqa-llama3-tied", "opt-tied", "gemma2", "phi-tied-gqa", "phi3-partial-longrope"]
CPU = torch.device("cpu")


def of(place: Path, how: Curvature, rows: Tensor = CALIBRATION, scratch: Path | None = None) -> list[Fisher]:
    with open_source(place) as source:
        opened = planner.opened(source)
        found = fisher.factors(opened, rows, how, device=CPU, dtype=torch.float64, scratch=scratch)
        return [found[block, Stat.FISHER] for block in range(opened.config.num_hidden_layers)]


def by_loops(name: str, rows: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """A and G of every linear: the whole decoder under autograd, then one token after the other."""
    config, tensors = canonical(name)
    model = loaded(config, doubled(tensors))
    linears = {
        (block, linear): model.get_submodule(f"model.layers.{block}.{linear}")
        for block in range(config.num_hidden_layers)
        for linear in READS
        if f"model.layers.{block}.{linear}.weight" in tensors
    }
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for key, linear in linears.items():
        linear.register_forward_hook(lambda _m, x, y, key=key: seen.update({key: (x[0], y)}))
    sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[1:])
        slopes = torch.autograd.grad(loss, [seen[key][1] for key in linears])
        for key, slope in zip(linears, slopes, strict=True):
            x = seen[key][0].detach()
            a = torch.zeros(x.shape[-1] + 1, x.shape[-1] + 1, dtype=torch.float64)
            g = torch.zeros(slope.shape[-1], slope.shape[-1], dtype=torch.float64)
            for token in range(len(row)):
                z = torch.cat([x[0, token], torch.ones(1)])
                a += torch.outer(z, z)
                g += torch.outer(slope[0, token], slope[0, token])
            old = sums.get(key, (0.0, 0.0))
            sums[key] = (old[0] + a / rows.numel(), old[1] + g / rows.numel())
    return sums


@pytest.mark.parametrize("name", NAMES)
def test_loops_over_tokens_say_the_same(name: str) -> None:
    have = of(folder(name), Curvature(Sample(3, 9)))
    for (block, linear), (a, g) in by_loops(name, CALIBRATION[:3, :9]).items():
        mine = have[block]
        assert (mine.inputs[READS[linear]] - a).abs().max() <= 1e-5 * a.abs().max(), (block, linear)
        assert (mine.outputs[linear] - g).abs().max() <= 1e-5 * g.abs().max(), (block, linear)
    wanted = {linear for _, linear in by_loops(name, CALIBRATION[:1, :3])}
    assert set(have[0].outputs) == wanted


def test_the_matrix_of_one_token() -> None:
    """Two equal tokens, of which the first predicts the second: what block 0 reads is the same vector twice."""
    row = torch.full((1, 2), 7)
    (first, *_) = of(folder("llama"), Curvature(Sample(1)), row)
    with open_source(folder("llama")) as source:
        found = gradients(planner.opened(source), row, Sample(1), device=CPU, dtype=torch.float64).first(0)
    for linear in ("self_attn.v_proj", "self_attn.q_proj"):
        slope = found[f"{linear}.weight"].flatten()
        size = first.inputs[Stat.ATTENTION].shape[0] - 1
        a, g = first.inputs[Stat.ATTENTION][:size, :size].double(), 2.0 * first.outputs[linear].double()
        if linear == "self_attn.v_proj":
            want = torch.outer(slope, slope)
            assert (torch.kron(g, a) - want).abs().max() <= 1e-5 * want.abs().max()
        else:
            assert slope.abs().max() < 1e-9, "one token attends to itself, whatever the query is"


def test_the_mean_loss_of_a_bias() -> None:
    """Summed over tokens, what comes back to a linear's output is the gradient of its bias."""
    row = CALIBRATION[:1, :2]
    blocks = of(folder("opt-tied"), Curvature(Sample(1)), row)
    with open_source(folder("opt-tied")) as source:
        found = gradients(planner.opened(source), row, Sample(1), device=CPU, dtype=torch.float64)
    slope = found.first(2)["mlp.down_proj.bias"]  # behind the last block only the first token counts
    want = torch.outer(slope, slope) / 2
    assert (blocks[2].outputs["mlp.down_proj"] - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied", "phi-tied-gqa"])
def test_what_they_take_is_counted(name: str) -> None:
    for block, one in enumerate(of(folder(name), Curvature(Sample(1, 4)))):
        taken = sum(tensor.numel() for tensor in (*one.inputs.values(), *one.outputs.values()))
        assert fisher.numbers(canonical(name)[0], block) == taken


def test_a_file_holds_the_same(tmp_path: Path) -> None:
    how = Curvature(Sample(4))
    for one, other in zip(of(folder("llama"), how), of(folder("llama"), how, scratch=tmp_path), strict=True):
        assert other.file is not None
        assert one.file is None
        assert all(torch.equal(one.outputs[name], other.outputs[name]) for name in one.outputs)
        assert all(torch.equal(one.inputs[stat], other.inputs[stat]) for stat in one.inputs)
    with open_source(folder("llama")) as source:
        opened = planner.opened(source)
        plain, filed = (gradients(opened, CALIBRATION, Sample(2), device=CPU, scratch=at) for at in (None, tmp_path))
    assert all(torch.equal(plain.means[key], filed.means[key]) for key in plain.means)
    assert all(torch.equal(plain.mean_squares[key], filed.mean_squares[key]) for key in plain.means)


def test_labels_are_drawn_as_the_model_predicts() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).double().expand(40000, 4)
    found = drawn(logits, torch.Generator().manual_seed(0))
    share = torch.bincount(found, minlength=4).double() / len(found)
    assert (share - logits[0].softmax(-1)).abs().max() < 0.01
    never = torch.tensor([[0.0, -1e9, 0.0]]).expand(1000, 3)
    assert not (drawn(never, torch.Generator().manual_seed(1)) == 1).any()


def test_draws_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (
        of(folder("llama"), Curvature(Sample(2), "model", seed))[0].outputs["mlp.down_proj"] for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("by", ["factors", "second", "mix"])
def test_squares_that_are_not_finite_are_named(by: str, tmp_path: Path) -> None:
    """Gradients of 1e25 are numbers in fp32, and their squares are not."""
    model = built(TINY["llama"])
    model.lm_head.weight.data.mul_(1e25)
    model.save_pretrained(tmp_path / "model")
    with raises(NumericalFailure, r"the squared gradients of .*model\.layers\.\d\..* are not finite"):
        if by == "factors":
            with open_source(tmp_path / "model") as source:
                fisher.factors(planner.opened(source), CALIBRATION, Curvature(Sample(2)), device=CPU)
        else:
            compress(
                tmp_path / "model", tmp_path / "out", method="llmpruner", keep=0.7, options={"element": f"param_{by}"}
            )
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """The norm of zeros has a slope of 1 / sqrt(eps) in every norm; eps is as small as fp32 has it."""
    model = built(TINY["llama"])
    model.config.rms_norm_eps = 1e-44
    model.model.embed_tokens.weight.data.zero_()
    for block in model.model.layers:
        block.mlp.down_proj.weight.data.zero_()
        block.self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(tmp_path)
    with (
        open_source(tmp_path) as source,
        raises(NumericalFailure, r"what model\.layers\.\d\.[\w.]+ writes is not finite on calibration sequence 1"),
    ):
        fisher.factors(planner.opened(source), CALIBRATION, Curvature(Sample(2)), device=CPU)
