"""Targets: widths keep to what an engine runs, by the rules stated here once more; what cannot is refused in words."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from folders import Ran, raises
from hypothesis import given
from hypothesis import strategies as st
from models import RAGGED, SLICED, TINY, canonical, decoder
from tinies import CALIBRATION, HELD_OUT, compress, folder

import microtome
from microtome import chain, inner, passes, planner, recipes, sweep
from microtome.edit import Plan
from microtome.errors import BadInput, BadPlan, MicrotomeError, UnknownName
from microtome.inner import Dial
from microtome.modeling_microtome import MicrotomeConfig
from microtome.passes import Allocation
from microtome.pipeline import preview
from microtome.source import open_source
from microtome.space import Kind
from microtome.target import Target

TARGETS = ["vllm", "gguf", "tp=2", "gguf,tp=3", "vllm,tp=2"]
ASKED: dict[str, dict[str, Any]] = {
    "slicegpt": {"method": "slicegpt"},
    "neurons": {"method": "fasp", "options": {"spaces": "ffn"}},
    "fasp": {"method": "fasp"},
    "modegpt": {"method": "modegpt", "options": {"qk_rate": "1"}, "allocate": "uniform"},
    "groups": {"method": "magnitude", "options": {"spaces": "ffn+heads"}},
}


# --- the rules, once more -------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """What an engine sees of a block; zero heads or neurons where a half is missing."""

    heads: int
    groups: int
    key: int
    value: int
    ffn: int


def seen(config: MicrotomeConfig) -> list[Block]:
    found: list[Block] = []
    for block in range(config.num_hidden_layers):
        one = config.per_layer_config[block]
        skip = getattr(one, "skip", None) or []
        heads, groups = (0, 0) if "self_attn" in skip else (one.num_attention_heads, one.num_key_value_heads)
        ffn = 0 if "mlp" in skip else one.intermediate_size
        found.append(Block(heads, groups, one.head_dim, one.v_head_dim, ffn))
    return found


def split_over(number: int, blocks: list[Block]) -> bool:
    """Heads and neurons are shared out; groups are shared out or repeated."""
    return all(
        one.heads % number == 0 and one.ffn % number == 0 and (one.groups % number == 0 or number % one.groups == 0)
        for one in blocks
    )


def on_vllm(blocks: list[Block]) -> bool:
    """Attention everywhere, with one width of heads that FlashAttention takes."""
    widths = {one.key for one in blocks} | {one.value for one in blocks}
    (wide,) = widths if len(widths) == 1 else (1,)
    return all(one.heads for one in blocks) and wide % 8 == 0 and wide <= 256


def in_gguf(wide: int, blocks: list[Block], source: list[Block]) -> bool:
    """Attention first, heads as they were, and every row that is not the source's in whole blocks of numbers."""
    rows = [(wide, 48)]
    rows += [(one.ffn, source[0].ffn) for one in blocks]
    rows += [(one.heads * one.value, source[0].heads * source[0].value) for one in blocks]
    heads = {(one.key, one.value) for one in blocks} == {(one.key, one.value) for one in source}
    return bool(blocks[0].heads) and heads and all(row % 32 == 0 or row == own for row, own in rows)


def runs(target: str, wide: int, blocks: list[Block], source: list[Block]) -> bool:
    """Whether all engines run a decoder whose stream is so wide; all tiny models have 48."""
    found: list[bool] = []
    for word in target.split(","):
        kind, _, number = word.partition("=")
        if kind == "tp":
            found.append(split_over(int(number), blocks))
        else:
            found.append(on_vllm(blocks) if kind == "vllm" else in_gguf(wide, blocks, source))
    return all(found)


def written(place: Path) -> MicrotomeConfig:
    """What the folder says, held against its tensors on the way."""
    with open_source(place) as source:
        return planner.opened(source).config


def possible(name: str, asked: str) -> Iterator[list[Block]]:
    """Every decoder that a method could make with one width of each kind for all blocks."""
    source = seen(canonical(name)[0])
    (one,) = set(source)
    config = canonical(name)[0]
    heads = range(1, one.groups + 1) if asked == "groups" and config.qk_norm != "full" else [one.groups]
    keys = [*range(2, one.key, 2), one.key] if asked == "modegpt" and config.qk_norm is None else [one.key]
    values = range(1, one.value + 1) if asked in ("modegpt", "fasp") else [one.value]
    neurons = [one.ffn] if asked == "slicegpt" else range(1, one.ffn + 1)
    for groups, key, value, ffn in product(heads, keys, values, neurons):
        yield [Block(groups * one.heads // one.groups, groups, key, value, ffn)]


NAMES = list({(TINY[name]["model_type"], seen(canonical(name)[0])[0]): name for name in TINY}.values())  # of each shape


@cache
def at_hand(name: str) -> planner.Opened:
    with open_source(folder(name)) as source:
        return planner.opened(source)


def settled(name: str, target: str, **asked: Any) -> MicrotomeConfig:
    """What a method makes of a tiny model for a target, by configs alone."""
    found = at_hand(name)
    run = chain.Run(found, None, torch.device("cpu"), torch.float32)
    method, options, spends = asked["method"], asked.get("options", {}), asked.get("allocate")
    allocation = None if spends is None else Allocation.parsed(spends)
    step = passes.stepped(method, options, keep=0.8, allocation=allocation, target=Target.parsed(target))
    return chain.dry(run, [step])[-1].final


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_widths_run_or_nothing_that_could_be_cut_would(name: str, target: str) -> None:
    """Each architecture meets each target, and the methods take turns."""
    turn = list(ASKED)[(NAMES.index(name) + TARGETS.index(target)) % len(ASKED)]
    asked = "neurons" if turn == "slicegpt" and name not in SLICED else turn
    source = canonical(name)[0]
    smaller = (one for one in possible(name, asked) if asked == "slicegpt" or one != seen(source)[:1])
    if any(runs(target, 48, one, seen(source)) for one in smaller):
        found = settled(name, target, **ASKED[asked])
        assert runs(target, found.hidden_size, seen(found), seen(source))
        assert found.to_dict() != source.to_dict()
    else:
        with raises(BadPlan, f"--target .*({target.replace(',', '|')})"):
            settled(name, target, **ASKED[asked])


@pytest.mark.parametrize(
    ("name", "target", "asked"),
    [
        ("llama", "gguf", {"method": "slicegpt"}),
        ("opt-tied", "gguf,tp=2", {"method": "slicegpt"}),
        ("gpt2-tied", "vllm", {"method": "slicegpt", "options": {"basis": "junction"}}),
        ("llama", "gguf,tp=2", {"method": "modegpt"}),
        ("qwen2-tied", "vllm,tp=2", {"method": "modegpt"}),
        ("llama-biases-wide-heads", "vllm", {"method": "modegpt", "options": {"qk_rate": 1}, "allocate": "uniform"}),
        ("gpt_neox", "gguf,tp=2", {"method": "fasp", "keep": 0.8}),
        ("llama", "tp=3", {"method": "flap"}),
        ("phi", "gguf", {"method": "magnitude", "options": {"spaces": "heads"}, "keep": 0.9}),
        ("mistral", "tp=2", {"method": "flap", "allocate": "uniform"}),
        ("llama", "vllm", {"method": "depth"}),
        ("llama", "vllm,tp=2", {"method": "depth", "options": {"unit": "half"}}),
        ("llama", "gguf", {"method": "depth", "options": {"unit": "half"}}),
    ],
)
def test_what_is_written_runs(name: str, target: str, asked: dict[str, Any], tmp_path: Path) -> None:
    made = compress(folder(name), tmp_path / "out", target=target, **{"keep": 0.7, **asked})
    source, have = canonical(name)[0], written(tmp_path / "out")
    assert runs(target, have.hidden_size, seen(have), seen(source))
    assert made.after.decoder < made.before.decoder
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["target"] == target.split(",")
    assert f"- target: {target.replace(',', ', ')}\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("keep", [0.95, 0.85, 0.7])
@pytest.mark.parametrize(
    ("target", "multiple", "wides"),
    [
        ("vllm", None, range(2, 81, 2)), ("gguf", None, [32, 64, 80]), ("tp=3", None, range(6, 79, 6)),
        ("tp=2", 5, range(10, 81, 10)), ("gguf,tp=2", None, [32, 64, 80]), ("tp=2,tp=3", 4, range(12, 73, 12)),
    ],
)  # fmt: skip
def test_no_width_that_runs_is_nearer(target: str, multiple: int | None, wides: Iterable[int], keep: float) -> None:
    """Blocks of the tiny Llama have 4 x 48 x 48 numbers in attention, 3 x 48 for each neuron, and two norms."""
    options = {"spaces": "ffn"}
    found = preview(folder("llama"), method="fasp", options=options, keep=keep, target=target, multiple_of=multiple)
    counts = {wide: 3 * (4 * 48 * 48 + 3 * 48 * wide + 2 * 48) for wide in wides}
    assert found.before.decoder == 3 * (4 * 48 * 48 + 3 * 48 * 80 + 2 * 48)
    want = min(counts, key=lambda wide: (abs(counts[wide] - keep * found.before.decoder), wide))
    assert set(found.outcome.inner.values()) == {want}


@pytest.mark.parametrize(
    ("size", "target", "steps"),
    [(4096, "vllm", 128), (4096, "gguf", 256), (11008, "gguf,tp=3", 768), (2048, "gguf", 128), (1024, "vllm", 64),
     (768, "vllm", 32), (768, "gguf", 32), (192, "gguf", 32), (192, "vllm", 8), (11008, "tp=7", 896), (48, "gguf", 32)],
)  # fmt: skip
def test_steps_of_neurons(size: int, target: str, steps: int) -> None:
    """docs/targets.md: rules are in the steps always, preferences where they leave sixteen widths."""
    config = decoder(intermediate_size=size)
    made = Target.parsed(target).dials(config, inner.dials(config, [Kind.FFN]), asked=False, alike=True)
    assert {dial.step for dial in made.values()} == {steps}


@given(
    size=st.integers(1, 60), step=st.integers(1, 20), whole=st.booleans(), wide=st.floats(0, 64),
)  # fmt: skip
def test_a_dial_comes_as_near_as_it_can(size: int, step: int, whole: bool, wide: float) -> None:
    choices = [*range(step, size, step), *([size] if whole else [])]
    if not choices or step > size:
        return
    dial = Dial("0.ffn", 0, "ffn", size, step, step, whole)
    assert abs(dial.nearest(wide) - wide) == min(abs(one - wide) for one in choices)
    assert dial.nearest(wide) in choices
    assert [dial.wider(one) for one in choices] == [*choices[1:], choices[-1]]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("llama", {"target": "gguf", "method": "slicegpt", "options": {"basis": "junction"}},
         "--target gguf has one width and one basis for the whole stream, and slicegpt .*: use basis=global"),
        ("llama", {"target": "gguf", "method": "fasp", "options": {"spaces": "vo"}},
         "fasp cuts value channels here, and --target gguf leaves none of these to be cut: choose a method or spaces"),
        ("gemma", {"target": "vllm", "method": "fasp"},
         r"--target vllm does not run 0\.qk at 12, the source's own, for heads are multiples of 8 wide, up to 256, and .* 8 "),
        ("mistral", {"target": "tp=2", "method": "fasp"},
         r"run 0\.heads at 3, the source's own, for key-value groups and 6 query heads are shared by 2 devices, and .* 2 "),
        ("llama", {"target": "tp=4", "method": "fasp"}, r"--target tp=4 does not run 0\.heads at 6, .* fits is 4"),
        ("llama", {"target": "tp=3", "method": "slicegpt"}, r"does not run 0\.ffn at 80, the source's own, .* is 78"),
        ("llama", {"target": "gguf", "method": "fasp", "keep": None, "allocate": {"1.ffn": 40}},
         r"--target gguf does not run 1\.ffn at 40 for quantised rows are multiples of 32, and the nearest that fits is 32"),
        ("llama", {"target": "gguf", "method": "magnitude", "options": {"spaces": "heads"}, "keep": None,
                   "allocate": {"2.heads": 3}},
         r"does not run 2\.heads at 3 for quantised rows are multiples of 32, and these heads make 24, .* fits is 4"),
        ("llama", {"target": "gguf", "method": "fasp", "keep": None, "allocate": {"0.vo": 6}},
         r"--target gguf does not run 0\.vo at 6 for values are as wide as queries and keys, 8, and .* fits is 8"),
        ("llama", {"target": "gguf", "method": "depth", "options": {"unit": "half"}, "keep": None,
                   "allocate": {"0.attn": 0}},
         r"--target gguf does not run 0\.attn at 0 for the first block has attention"),
        ("llama", {"target": "vllm", "method": "depth", "options": {"unit": "half"}, "keep": None,
                   "allocate": {"2.attn": 0}}, r"--target vllm does not run 2\.attn at 0 for every block has attention"),
    ],
)  # fmt: skip
def test_refusals(name: str, asked: dict[str, Any], words: str, tmp_path: Path) -> None:
    with raises(BadPlan, words):
        compress(folder(name), tmp_path / "out", **{"keep": 0.8, **asked})
    assert not list(tmp_path.iterdir())


def test_a_table_names_no_block_that_is_protected(tmp_path: Path) -> None:
    protected = {"method": "depth", "options": {"protect_first": 1}}
    with raises(BadPlan, "no width is called '0' here"):
        compress(folder("llama"), tmp_path / "out", **protected, allocate={"0": 0}, target="tp=2")


def test_a_copy_is_held_against_the_rules_too(tmp_path: Path) -> None:
    with raises(BadPlan, r"--target tp=3 does not run 0\.ffn at 80, the source's own, for neurons are shared by 3"):
        compress(folder("llama"), tmp_path / "out", keep=1.0, target="tp=3")
    assert compress(folder("llama"), tmp_path / "out", keep=1.0, target="tp=2").after.ratio("decoder", preview(
        folder("llama"), keep=1.0).before) == 1.0  # fmt: skip


@pytest.mark.parametrize(
    ("decoder_name", "target", "words"),
    [
        ("dense shortcuts", "gguf", "does not run stream at several for a GGUF file has one width and one basis"),
        ("index subsets", "gguf", "does not run stream at several"),
        ("skipped halves", "gguf", r"0\.attn at 0 for the first block has attention"),
        ("skipped halves", "vllm", r"0\.attn at 0 for every block has attention"),
        ("heads", "gguf", r"0\.vo at 5 for values are as wide as queries and keys, 6"),
        ("partial rotary", "gguf", r"0\.heads at 2 for quantised rows are multiples of 32, and these heads make 36"),
        ("rotary pairs", "vllm", r"0\.vo at 8, .* for values are as wide as queries and keys, 6"),
    ],
)
def test_decoders_of_no_stock_architecture(decoder_name: str, target: str, words: str) -> None:
    with raises(BadPlan, words):
        Target.parsed(target).check(RAGGED[decoder_name], decoder())
    Target.parsed("gguf,vllm,tp=2").check(decoder(), decoder())


def test_more_blocks_than_llama_cpp_loads() -> None:
    config = decoder(num_hidden_layers=513)
    with raises(BadPlan, "does not run blocks at 513, the source's own, for llama.cpp loads up to 512"):
        Target.parsed("gguf").check(config, config)


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("vlm", UnknownName, "no target named 'vlm'. Did you mean 'vllm'. Known: gguf, tp=N, vllm"),
        ("", UnknownName, "no target named ''"),
        ("tp=0", BadInput, "the target tp=0 is no number of devices: write tp=2"),
        ("tp=two", BadInput, "the target tp=two is no number of devices"),
        (["gguf", 3], BadInput, "a target is vllm, gguf or tp=N, not 3"),
    ],
)
def test_words_that_are_no_target(target: Any, kind: type[MicrotomeError], words: str, tmp_path: Path) -> None:
    with raises(kind, re.escape(words).replace(r"'vllm'\.", "'vllm'.")):
        compress(folder("llama"), tmp_path / "out", keep=0.8, target=target)
    with raises(kind, words[:12]):
        recipes.steps({"keep": 0.8, "target": target, "steps": ["fasp"]})
    assert not list(tmp_path.iterdir())


@given(st.lists(st.sampled_from(["vllm", "gguf", "tp=2", "tp=3"])), st.lists(st.sampled_from(["gguf", "tp=3"])))
def test_targets_add_up(some: list[str], others: list[str]) -> None:
    together = Target.parsed(some).joined(Target.parsed(others))
    assert together == Target.parsed([*others, *some])
    assert sorted(together.words) == sorted({*some, *others})
    assert not some or together == Target.parsed([",".join([*some, *others])])
    assert bool(together) == bool(some or others)


# --- plans, recipes, sweeps -----------------------------------------------------------------------------------------


def test_a_plan_keeps_its_target_and_may_be_held_against_another(tmp_path: Path) -> None:
    made = compress(folder("llama"), tmp_path / "a", method="fasp", keep=0.8, target=["gguf", "tp=2"])
    again = compress(folder("llama"), tmp_path / "b", plan=Plan.read(tmp_path / "a"))
    assert again.plan.target == ["gguf", "tp=2"]
    assert again.plan.widths == made.plan.widths
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
    plain = compress(folder("llama"), tmp_path / "c", method="fasp", options={"spaces": "ffn"}, keep=0.9)
    assert plain.plan.target == []
    wide = plain.plan.widths["0.ffn"]
    assert wide % 32
    with raises(BadPlan, rf"--target gguf does not run 0\.ffn at {wide} for quantised rows are multiples of 32"):
        compress(folder("llama"), tmp_path / "d", plan=Plan.read(tmp_path / "c"), target="gguf")
    assert not (tmp_path / "d").exists()


def test_a_later_step_may_mend_what_the_source_breaks(tmp_path: Path) -> None:
    heads = {"magnitude": {"options": {"spaces": "heads"}, "keep": 0.6}}
    recipe = {"keep": 0.8, "target": "tp=2", "steps": ["fasp", heads]}
    compress(folder("mistral"), tmp_path / "out", recipe=recipe)
    assert split_over(2, seen(written(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["target"] == ["tp=2"]
    with raises(BadPlan, r"0\.heads at 3"):
        compress(folder("mistral"), tmp_path / "other", recipe=recipe | {"steps": ["fasp", "restore"]})
    recipe |= {"steps": [{"magnitude": {"keep": 0.7}}]}
    assert microtome.preview(folder("mistral"), recipe=recipe, target="tp=1").target.words == ["tp=1", "tp=2"]


def test_a_sweep_has_one_target(tmp_path: Path) -> None:
    for name, ids in (("calibration", CALIBRATION), ("held_out", HELD_OUT)):
        torch.save(ids, tmp_path / f"{name}.pt")
    held: dict[str, Any] = {
        "keep": 0.8, "target": "gguf", "data": str(tmp_path / "calibration.pt"),
        "eval_data": str(tmp_path / "held_out.pt"),
        "entries": {
            "fasp": {}, "random": {"options": {"spaces": "qk"}}, "both": {"steps": [{"fasp": {"keep": 0.9}}, "fasp"]},
        },
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(held))
    read = sweep.read(tmp_path / "sweep.yaml")
    both, fasp, random = sweep.sweep([str(folder("llama"))], read, tmp_path / "table.csv")
    for row, neurons in ((fasp, {32, 64}), (both, {32, 64})):
        assert row.decoder in {3 * (4 * 48 * 48 + 3 * 48 * wide + 2 * 48) for wide in neurons}
    assert "--target gguf leaves none of these to be cut" in random.error
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(held | {"target": "onnx"}))
    with raises(UnknownName, "no target named 'onnx'"):
        sweep.read(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("target", "config", "words"),
    [
        ("gguf", {}, ["rows of 20, 24 are no multiple of 32, and stay in fp16", "rows of 32 are no multiple of 256"]),
        ("gguf", {"per_layer_config": {1: {"skip": ["mlp"]}}}, ["without a feed-forward half need one of zeros"]),
        ("vllm", {}, ["attention on a CPU has no heads of 8, only of 32, 64"]),
        ("vllm", {"head_dim": 64}, []),
        ("vllm", {"head_dim": 64, "source_model_type": "qwen2"}, ["Qwen2 .* model_impl=transformers"]),
        ("tp=2", {}, []),
    ],
)
def test_notes(target: str, config: dict[str, Any], words: list[str]) -> None:
    said = Target.parsed(target).notes(decoder(**config), stock=True)
    for one in words:
        assert any(re.search(one, line) for line in said), said
    assert words or not said


def test_the_command_line(run: Callable[..., Ran], refused: Callable[..., None], tmp_path: Path) -> None:
    ran = run("plan", folder("llama"), "--keep", 0.8, "-m", "fasp", "--target", "gguf", "--target", "tp=2")
    assert ran.code == 0, ran.err
    assert "target: gguf, tp=2\n" in ran.out
    assert "neurons: 64 in every block" in ran.out
    ran = run("plan", folder("llama"), "--keep", 0.8, "--target", "gguf,tp=2", "--json")
    assert json.loads(ran.out)["target"] == ["gguf", "tp=2"]
    refused("no target named 'ggml'", "plan", folder("llama"), "--keep", 0.8, "--target", "ggml")
    torch.save(CALIBRATION, tmp_path / "ids.pt")
    words = ("--data", tmp_path / "ids.pt", "--no-evaluate", "--out", tmp_path / "out", "--target", "tp=4")
    refused(r"--target tp=4 does not run 0\.heads at 6", "compress", folder("llama"), "--keep", 0.8, *words)
