"""Random selection: fair, repeatable, and coordinates that are gone are as if nobody read them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from acceptance import BRIEF, KINDS_OF_MODELS, behaves, columns_of_group, keeps_every_byte, without
from folders import raises
from models import canonical, error, loaded, logits
from tinies import HELD_OUT, compress, folder, weights

from microtome import arch, inner, layout, methods
from microtome.errors import BadInput, UnknownName
from microtome.methods.random import Random
from microtome.space import Kind

EXACT = 1e-5


def test_keep_1_leaves_every_byte(tmp_path: Path) -> None:
    keeps_every_byte("random", tmp_path / "out")


@pytest.mark.parametrize("name", KINDS_OF_MODELS)
def test_runs_loads_and_dry_runs_agree(name: str, tmp_path: Path) -> None:
    behaves("random", name, tmp_path)


@pytest.mark.parametrize("name", BRIEF)
def test_global_budgets_by_lot(name: str, tmp_path: Path) -> None:
    result = behaves("random", name, tmp_path, allocate="global")
    assert len({wide for space, wide in result.plan.widths.items() if space.endswith("ffn")}) > 1


def test_seeds(tmp_path: Path) -> None:
    stored = [
        (compress(folder("llama"), tmp_path / str(number), keep=0.7, method="random", options={"seed": seed}).folder
         / "model.safetensors").read_bytes()
        for number, seed in enumerate(("3", 3, 4))
    ]  # fmt: skip
    assert stored[0] == stored[1] != stored[2]
    with raises(BadInput, r"option seed of random takes int, not 'x'"):
        methods.build("random", {"seed": "x"})
    with raises(UnknownName, r"no value of random's option spaces named 'fnn'. Did you mean 'ffn'"):
        methods.build("random", {"spaces": "fnn"})


def kept(name: str, out: Path, block: int, key: str, columns: bool = False) -> list[int]:
    """Which rows, or columns, of a tensor a result still has, found by their values."""
    config, tensors = canonical(name)
    full = f"model.layers.{block}.{key}.weight"
    stored = arch.find(config.source_model_type).names(config)[full].name
    have, whole = weights(out)[stored if stored in weights(out) else full], tensors[full]
    have, whole = (have.T, whole.T) if columns else (have, whole)
    return [next(row for row in range(len(whole)) if torch.equal(whole[row], one)) for one in have]


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "opt-tied", "qwen3-bias", "gemma2", "phi-tied-gqa"])
def test_what_is_gone_is_as_if_nobody_read_it(name: str, tmp_path: Path) -> None:
    """Columns that were left out are found by their values, and zeroed by hand in the whole model."""
    config, sizes = canonical(name)[0], canonical(name)[0].per_layer_config[0]
    groups = sizes.num_key_value_heads
    result = compress(folder(name), tmp_path / "out", method="random", allocate={"ffn": 40, "heads": groups - 1})
    gone: dict[tuple[int, str], set[int]] = {}
    for block in range(config.num_hidden_layers):
        neurons = kept(name, result.folder, block, "mlp.down_proj", columns=True)
        columns = kept(name, result.folder, block, "self_attn.o_proj", columns=True)
        assert len(set(neurons)) == 40
        assert neurons == kept(name, result.folder, block, "mlp.up_proj")
        gone[block, "ffn"] = set(range(80)) - set(neurons)
        wide = range(sizes.num_attention_heads * sizes.v_head_dim)
        left = [one for one in range(groups) if set(wide[columns_of_group(sizes, one)]) <= set(columns)]
        assert len(left) == groups - 1
        assert len(columns) == sum(len(wide[columns_of_group(sizes, one)]) for one in left)
        gone[block, "heads"] = set(range(groups)) - set(left)
    assert len({tuple(sorted(one)) for (_, kind), one in gone.items() if kind == "ffn"}) == config.num_hidden_layers
    assert error(logits(result.load(), HELD_OUT), logits(without(name, gone), HELD_OUT)) <= EXACT


@pytest.mark.parametrize("name", ["llama-gqa-llama3-tied", "llama-biases-wide-heads", "phi-tied-gqa", "opt-tied"])
def test_channels_go_in_whole_pairs(name: str, tmp_path: Path) -> None:
    """Scores of the narrowed heads are those of the whole ones with the lost channels of the queries at zero."""
    config, tensors = canonical(name)
    sizes, size = config.per_layer_config[0], config.per_layer_config[0].head_dim
    times, wide = sizes.num_attention_heads // sizes.num_key_value_heads, size - 4
    result = compress(folder(name), tmp_path / "out", method="random", options={"spaces": "qk"}, allocate={"qk": wide})
    changed = dict(tensors)
    for block in range(config.num_hidden_layers):
        left = kept(name, result.folder, block, "self_attn.k_proj")
        assert len(left) == wide * sizes.num_key_value_heads
        pairs = layout.rotary_pairs(config, sizes)
        for kind in ("weight", "bias"):
            key = f"model.layers.{block}.self_attn.q_proj.{kind}"
            if key not in tensors:
                continue
            changed[key] = tensors[key].clone()
            for head in range(sizes.num_attention_heads):
                mine = {row - head // times * size for row in left if row // size == head // times}
                assert all((one + pairs) % (2 * pairs) in mine for one in mine if one < 2 * pairs)
                for channel in set(range(size)) - mine:
                    changed[key][head * size + channel] = 0.0
    assert error(logits(result.load(), HELD_OUT), logits(loaded(config, changed), HELD_OUT)) <= EXACT


@pytest.mark.parametrize("spaces", ["ffn", "heads", "vo", "qk", "ffn+vo", "ffn+qk+vo"])
def test_only_the_named_spaces_are_cut(spaces: str, tmp_path: Path) -> None:
    for name in ("llama-gqa-llama3-tied", "phi-tied-gqa"):
        keep = 0.6 if "ffn" in spaces else 0.95
        options = {"spaces": spaces}
        result = compress(folder(name), tmp_path / name, method="random", keep=keep, options=options, multiple_of=1)
        assert {space.partition(".")[2] for space in result.plan.widths} == set(spaces.split("+"))
        assert torch.isfinite(logits(result.load(), HELD_OUT)).all()


def test_the_draw_is_fair_and_depends_on_the_space_only() -> None:
    config = canonical("llama")[0]
    every, ffn = (inner.spaces_of(config, 1, kinds) for kinds in ({Kind.FFN, Kind.QK}, {Kind.FFN}))
    seen: Any = lambda spaces: SimpleNamespace(spaces=spaces)  # noqa: E731
    draws = [Random(seed).drawn(seen(ffn))["1.ffn"] for seed in range(400)]
    times = torch.stack([draw.argsort().argsort() < 40 for draw in draws]).sum(0)
    assert (times - 200).abs().max() < 5 * 10, "each of 80 neurons is among 40 in half of all draws"
    assert torch.equal(Random(7).drawn(seen(every))["1.ffn"], draws[7])
    assert not torch.equal(Random(7).drawn(seen(inner.spaces_of(config, 2, {Kind.FFN})))["2.ffn"], draws[7])
