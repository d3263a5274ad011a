"""The one decoder: its ragged features against a naive one, and everything that transformers does with a model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    RAGGED,
    SMALL,
    built,
    decoder,
    dense,
    error,
    from_stock,
    ids,
    loaded,
    logits,
    ours,
    random_tensors,
    stepwise,
    stock,
)
from naive import naive_logits, shortcut_matrix
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from microtome import layout, modeling_microtome
from microtome.modeling_microtome import (
    SHORTCUTS,
    MicrotomeConfig,
    MicrotomeForCausalLM,
    MicrotomeModel,
    MicrotomeShortcut,
)

CLOSE = 1e-5
VOCABULARY = SMALL["vocab_size"]

each_decoder = pytest.mark.parametrize("name", RAGGED)


def tokens_of(name: str, rows: int = 1, length: int = 8) -> Tensor:
    return ids(rows, length, RAGGED[name].vocab_size, seed=len(name))


def known_to_transformers() -> None:
    AutoConfig.register("microtome", MicrotomeConfig, exist_ok=True)
    AutoModel.register(MicrotomeConfig, MicrotomeModel, exist_ok=True)
    AutoModelForCausalLM.register(MicrotomeConfig, MicrotomeForCausalLM, exist_ok=True)


# --- against the naive decoder --------------------------------------------------------------------------------------


@each_decoder
def test_against_a_naive_decoder(name: str) -> None:
    """Without a cache and with one, nothing but the tokens being given: also where the first block has no attention."""
    config, tokens = RAGGED[name], tokens_of(name)
    tensors = random_tensors(config)
    model = loaded(config, tensors)
    want = naive_logits(config, tensors, tokens[0])[None]
    assert want.std() > 1e-2
    assert error(logits(model, tokens), want) <= CLOSE
    assert error(stepwise(model, tokens, [3, 2, 1, 1, 1]), want) <= CLOSE
    model.set_attn_implementation("eager")
    assert error(logits(model, tokens), want) <= CLOSE
    assert error(stepwise(model, tokens, [3, 2, 1, 1, 1]), want) <= CLOSE


def test_soft_caps_choose_eager_attention() -> None:
    for name, wanted in (("scales", "eager"), ("plain", "sdpa")):
        model = loaded(RAGGED[name], random_tensors(RAGGED[name]))
        assert model.config._attn_implementation == wanted
        model.set_attn_implementation("eager")
        model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == model.model.config._attn_implementation == wanted


@each_decoder
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_left_changes_nothing(name: str, attention: str) -> None:
    """A padded row with a cache is the row alone. Masks are sized by a cache, and some blocks have none."""
    config = RAGGED[name]
    if attention == "sdpa" and config.attention_softcap is not None:
        pytest.skip("sdpa has no soft cap: the model takes eager")
    # Eager attention, here as in transformers, gives NaN for a masked row in fp64: fp64's least number is fp32's -inf.
    model = loaded(config, random_tensors(config, dtype=torch.float32 if attention == "eager" else torch.float64))
    model.set_attn_implementation(attention)
    tokens, padding = tokens_of(name, 2, 8), 3
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, found = None, []
    for start, end in ((0, 5), (5, 7), (7, 8)):
        with torch.no_grad():
            out = model(
                input_ids=tokens[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        cache = out.past_key_values
        found.append(out.logits)
    have = torch.cat(found, 1)
    assert error(have[0, padding:], logits(model, tokens[:1, padding:])[0]) <= CLOSE
    assert error(have[1:], logits(model, tokens[1:])) <= CLOSE


@pytest.mark.parametrize(
    "name", ["plain", "heads", "rotary pairs", "skipped halves", "skipped blocks", "windows", "index subsets",
             "parallel, skipped attention", "learned positions", "tied behind an adapter"]
)  # fmt: skip
@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}], ids=str
)
def test_generate(name: str, how: dict[str, Any]) -> None:
    """Greedy tokens are those of the largest logits without a cache, row by row; beams score no worse than greed."""
    config = RAGGED[name]
    model = loaded(config, random_tensors(config))
    tokens, padding, new = tokens_of(name, 2, 6), 2, 6
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :padding] = 0
    have = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **how)
    assert have.shape == (2, 6 + new)
    for row, first in ((0, padding), (1, 0)):
        text = tokens[row : row + 1, first:]
        for _ in range(new):
            text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
        if "num_beams" not in how:
            assert have[row, first:].tolist() == text[0].tolist()
            continue

        def likelihood(text: Tensor, start: int) -> float:
            scores = logits(model, text[None])[0, start - 1 : -1].log_softmax(-1)
            return scores.gather(1, text[start:, None]).sum().item()

        assert likelihood(have[row, first:], 6 - first) >= likelihood(text[0], 6 - first) - 1e-6


@pytest.mark.parametrize(
    "name", ["plain", "rotary pairs", "learned positions", "dense shortcuts", "parallel, two norms"]
)
def test_embeddings_may_be_given(name: str) -> None:
    config, tokens = RAGGED[name], tokens_of(name)
    model = loaded(config, random_tensors(config))
    embedded = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded, use_cache=False).logits, logits(model, tokens))
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(input_ids=tokens, inputs_embeds=embedded)


def own_masks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
    sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """A backend like flash attention or vLLM's, which gets no mask and makes its own from what it is told."""
    assert attention_mask is None
    assert module.is_causal
    times, length = module.num_key_value_groups, query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (sliding_window or length))
    scores = query @ key.repeat_interleave(times, 1).mT * scaling
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(times, 1)).transpose(1, 2), None


@pytest.mark.parametrize("name", ["plain", "windows", "heads", "rotary pairs"])
def test_backends_that_make_their_own_masks(name: str) -> None:
    AttentionInterface.register("own_masks", own_masks)
    config, tokens = RAGGED[name], tokens_of(name)
    model = loaded(config, random_tensors(config))
    want = logits(model, tokens)
    model.set_attn_implementation("own_masks")
    assert error(logits(model, tokens), want) <= CLOSE


# --- a cut decoder is a masked full one -----------------------------------------------------------------------------


def both(full: MicrotomeConfig, masked: dict[str, Tensor], cut: MicrotomeConfig, sliced: dict[str, Tensor]) -> None:
    """The masked full model and the cut one agree, without a cache and step by step."""
    tokens = ids(2, 9, full.vocab_size)
    want = logits(loaded(full, masked), tokens)
    narrow = loaded(cut, sliced)
    assert error(logits(narrow, tokens), want) <= CLOSE
    assert error(stepwise(narrow, tokens, [4, 1, 2, 1, 1]), want) <= CLOSE


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.reshape(heads, -1, *tensor.shape[1:])


@pytest.mark.parametrize("first_of_all", [False, True], ids=["subsets", "leading pairs"])
@pytest.mark.parametrize("bias", [False, True])
def test_narrow_query_key_channels(first_of_all: bool, bias: bool) -> None:
    """Rotary pairs that are zero in queries and keys can be dropped: every group may keep its own."""
    full = decoder(attention_bias=bias)
    tensors = random_tensors(full)
    kept = [[0, 1, 2], [0, 1, 2]] if first_of_all else [[0, 2, 3], [1, 2, 3]]
    masked, sliced = dict(tensors), dict(tensors)
    for name in ("q_proj", "k_proj"):
        for kind in ("weight", "bias") if bias else ("weight",):
            key = f"model.layers.1.self_attn.{name}.{kind}"
            heads = split_heads(tensors[key], 4 if name == "q_proj" else 2)
            gone, narrow = heads.clone(), []
            for head in range(len(heads)):
                pairs = kept[head // (len(heads) // 2)]
                channels = pairs + [pair + 4 for pair in pairs]
                gone[head, [c for c in range(8) if c not in channels]] = 0.0
                narrow.append(heads[head, channels])
            masked[key], sliced[key] = gone.reshape(tensors[key].shape), torch.cat(narrow)
    sizes = {"head_dim": 6, "rotary_pairs": 3, "attention_scale": 8**-0.5, "rotary_subset": not first_of_all}
    if not first_of_all:
        sliced["model.layers.1.self_attn.rotary_index"] = torch.tensor(kept, dtype=torch.int32)
    both(full, masked, decoder({1: sizes}), sliced) if not bias else both(
        full, masked, decoder({1: sizes}, attention_bias=True), sliced
    )


def test_narrow_values() -> None:
    full = decoder(attention_bias=True)
    tensors = random_tensors(full)
    kept = [[0, 3, 4, 7, 5], [1, 2, 6, 5, 0]]
    masked, sliced = dict(tensors), dict(tensors)
    key = "model.layers.2.self_attn.{}".format
    for kind in ("weight", "bias"):
        heads = split_heads(tensors[key(f"v_proj.{kind}")], 2)
        gone = torch.zeros_like(heads)
        for group in range(2):
            gone[group, kept[group]] = heads[group, kept[group]]
        masked[key(f"v_proj.{kind}")] = gone.flatten(0, 1)
        sliced[key(f"v_proj.{kind}")] = torch.cat([heads[group, kept[group]] for group in range(2)])
    out = tensors[key("o_proj.weight")].reshape(24, 4, 8)
    sliced[key("o_proj.weight")] = torch.cat([out[:, head, kept[head // 2]] for head in range(4)], 1)
    both(full, masked, decoder({2: {"v_head_dim": 5}}, attention_bias=True), sliced)


@pytest.mark.parametrize("sizes", [{"head_dim": 6, "rotary_pairs": 3}, {"v_head_dim": 5}], ids=["keys", "values"])
def test_uneven_heads_take_the_fast_path_and_come_to_the_same(
    sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(config := decoder(dict.fromkeys(range(3), sizes)), random_tensors(config))
    seen: list[set[int]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        seen.append({one.shape[-1] for one in (query, key, value)})
        return attend(query, key, value, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    tokens = ids(vocabulary=config.vocab_size)
    fast = logits(model, tokens)
    assert seen
    assert all(len(sizes) == 1 for sizes in seen)
    seen.clear()
    with torch.no_grad():
        model(tokens[:, :1])
    assert all(len(sizes) == 2 for sizes in seen)  # one query is not worth a copy of all keys
    model.set_attn_implementation("eager")
    assert error(fast, logits(model, tokens)) < 1e-5


def test_fewer_heads_and_neurons() -> None:
    """Heads and neurons whose output is read by zeros can be dropped."""
    full = decoder()
    tensors = random_tensors(full)
    masked, sliced = dict(tensors), dict(tensors)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.1.mlp."
    out = tensors[f"{attention}o_proj.weight"].clone()
    out[:, 16:] = 0.0
    masked[f"{attention}o_proj.weight"], sliced[f"{attention}o_proj.weight"] = out, out[:, :16]
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        sliced[f"{attention}{name}.weight"] = tensors[f"{attention}{name}.weight"][:rows]
    down, kept = tensors[f"{mlp}down_proj.weight"].clone(), [1, 4, 5, 11, 19]
    down[:, [c for c in range(20) if c not in kept]] = 0.0
    masked[f"{mlp}down_proj.weight"], sliced[f"{mlp}down_proj.weight"] = down, down[:, kept]
    for name in ("gate_proj", "up_proj"):
        sliced[f"{mlp}{name}.weight"] = tensors[f"{mlp}{name}.weight"][kept]
    small = {0: {"num_attention_heads": 2, "num_key_value_heads": 1}, 1: {"intermediate_size": 5}}
    both(full, masked, decoder(small), sliced)


def test_index_subsets() -> None:
    """A half that reads and writes some coordinates has zero columns and rows; its norm sees them all."""
    full = decoder()
    tensors = random_tensors(full)
    masked, sliced = dict(tensors), dict(tensors)
    read = {"attn": [5, 0, 7, 23, 11], "mlp": [2, 3, 21, 22]}
    write = {"attn": [9, 1, 2, 3, 20, 17], "mlp": [23, 0, 12]}
    for half, readers, writer in (
        ("attn", [f"self_attn.{one}_proj" for one in "qkv"], "self_attn.o_proj"),
        ("mlp", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    ):
        for name in readers:
            key = f"model.layers.1.{name}.weight"
            masked[key], sliced[key] = torch.zeros_like(tensors[key]), tensors[key][:, read[half]]
            masked[key][:, read[half]] = tensors[key][:, read[half]]
        key = f"model.layers.1.{writer}.weight"
        masked[key], sliced[key] = torch.zeros_like(tensors[key]), tensors[key][write[half]]
        masked[key][write[half]] = tensors[key][write[half]]
        sliced[f"model.layers.1.{half}_read_index"] = torch.tensor(read[half], dtype=torch.int32)
        sliced[f"model.layers.1.{half}_write_index"] = torch.tensor(write[half], dtype=torch.int32)
    sizes = {f"{half}_read_size": len(read[half]) for half in read} | {
        f"{half}_write_size": len(write[half]) for half in write
    }
    both(full, masked, decoder({1: sizes}), sliced)


@pytest.mark.parametrize(("half", "writer"), [("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")])
@pytest.mark.parametrize("block", [0, 1])
def test_skipped_halves(half: str, writer: str, block: int) -> None:
    """A skipped half is one that writes zeros."""
    full, cut = decoder(), decoder({block: {"skip": [half]}})
    tensors = random_tensors(full)
    masked = tensors | {
        f"model.layers.{block}.{writer}.weight": torch.zeros_like(tensors[f"model.layers.{block}.{writer}.weight"])
    }
    stored = {name for part in layout.parts(cut) for name in layout.shapes(cut, part)}
    both(full, masked, cut, {name: tensor for name, tensor in tensors.items() if name in stored})


# --- shortcuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHORTCUTS)
@pytest.mark.parametrize(("wide_in", "wide_out"), [(6, 6), (6, 9), (9, 6)])
def test_shortcuts_are_the_matrices_that_they_mean(kind: str, wide_in: int, wide_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shortcut = MicrotomeShortcut(kind, wide_in, wide_out, 2).double()
    for parameter in shortcut.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    tensors = {f"s.{name}": tensor for name, tensor in shortcut.state_dict().items()}
    x = torch.randn(2, 3, wide_in, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(shortcut(x), x @ shortcut_matrix(kind, tensors, "s", wide_in, wide_out).T)


@pytest.mark.parametrize("name", [name for name in RAGGED if "shortcut" in name])
def test_any_shortcut_is_a_dense_one(name: str) -> None:
    """The same model with every shortcut written out as a matrix."""
    config = RAGGED[name]
    tensors = random_tensors(config)
    full = {name: tensor for name, tensor in tensors.items() if "shortcut" not in name}
    blocks: dict[int, dict[str, Any]] = {}
    for block in range(config.num_hidden_layers):
        sizes, head = config.per_layer_config[block], f"model.layers.{block}."
        around = sizes.residual_in, sizes.residual_mid, sizes.residual_out
        for half, wide_in, wide_out in (("attn", *around[:2]), ("mlp", *around[1:])):
            kind = getattr(sizes, f"{half}_shortcut")
            full[f"{head}{half}_shortcut.weight"] = shortcut_matrix(
                kind, tensors, f"{head}{half}_shortcut", wide_in, wide_out
            )
        blocks[block] = dict(zip(("residual_in", "residual_mid", "residual_out"), around, strict=True)) | dense()
    written_out = decoder(blocks, embedding_size=config.embedding_size)
    tokens = tokens_of(name, 2)
    assert error(logits(loaded(config, tensors), tokens), logits(loaded(written_out, full), tokens)) <= CLOSE


# --- saving and loading ---------------------------------------------------------------------------------------------

SAVED = [
    "plain", "heads", "rotary pairs", "index subsets of ragged widths", "skipped halves", "lowrank shortcuts",
    "factored shortcuts", "tied", "tied behind an adapter", "learned positions", "windows", "sandwich norms",
]  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_loads_of_what_was_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    known_to_transformers()
    config, tokens = RAGGED[name], tokens_of(name, 2)
    model = loaded(config, random_tensors(config, dtype=dtype))
    want = logits(model, tokens)
    model.save_pretrained(tmp_path / "one")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert type(first) is MicrotomeForCausalLM
    assert first.dtype == dtype
    assert torch.equal(logits(first, tokens), want)
    first.save_pretrained(tmp_path / "two")
    second = MicrotomeForCausalLM.from_pretrained(tmp_path / "two").eval()
    assert torch.equal(logits(second, tokens), want)
    assert second.config.to_dict() | {"_name_or_path": ""} == first.config.to_dict() | {"_name_or_path": ""}
    assert {k: v.shape for k, v in second.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for key, tensor in model.state_dict().items():
        assert second.state_dict()[key].dtype == tensor.dtype, key
        assert torch.equal(second.state_dict()[key], tensor), key
    with safe_open(tmp_path / "two" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {key for part in layout.parts(config) for key in layout.shapes(config, part)}
    assert (layout.HEAD in names) != config.tie_word_embeddings
    if config.tie_word_embeddings:
        assert second.lm_head.weight is second.model.embed_tokens.weight
    body = AutoModel.from_pretrained(tmp_path / "one").eval()
    with torch.no_grad():
        states = body(input_ids=tokens, use_cache=False).last_hidden_state
        assert torch.equal(model.head(states), want)


def test_the_config_survives_json() -> None:
    for name, config in RAGGED.items():
        again = MicrotomeConfig(**json.loads(config.to_json_string(use_diff=False)))
        for block in range(config.num_hidden_layers):
            mine, other = config.per_layer_config[block], again.per_layer_config[block]
            assert {field: getattr(mine, field) for field in MicrotomeConfig.__annotations__} == {
                field: getattr(other, field) for field in MicrotomeConfig.__annotations__
            }, name
            assert layout.skips(mine, "mlp") == layout.skips(other, "mlp")
            assert layout.skips(mine, "self_attn") == layout.skips(other, "self_attn")


def test_nothing_counts_as_missing(tmp_path: Path) -> None:
    """Not the frequencies, which are not stored, and no buffer."""
    name = "rotary pairs"
    model = loaded(RAGGED[name], random_tensors(RAGGED[name], dtype=torch.float32))
    model.save_pretrained(tmp_path)
    _, info = MicrotomeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_accelerate_places_the_blocks(tmp_path: Path) -> None:
    name = "index subsets of ragged widths"
    config, tokens = RAGGED[name], tokens_of(name)
    model = loaded(config, random_tensors(config, dtype=torch.float32))
    model.save_pretrained(tmp_path)
    for place in ("cpu", "auto", {"": "cpu"}):
        placed = MicrotomeForCausalLM.from_pretrained(tmp_path, device_map=place).eval()
        assert torch.equal(logits(placed, tokens), logits(model, tokens))


def test_accelerate_reads_blocks_from_the_disk(tmp_path: Path) -> None:
    """Some blocks stay on the disk and come in one by one."""
    name = "skipped halves"
    config, tokens = RAGGED[name], tokens_of(name)
    model = loaded(config, random_tensors(config, dtype=torch.float32))
    model.save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    placed = MicrotomeForCausalLM.from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "off")
    assert torch.equal(logits(placed.eval(), tokens), logits(model, tokens))


def test_accelerate_keeps_blocks_whole(tmp_path: Path) -> None:
    """A block split between devices would carry its stream through a copy in the middle."""
    name = "skipped halves"
    config, tokens = RAGGED[name], tokens_of(name)
    model = loaded(config, random_tensors(config, dtype=torch.float32))
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    placed = MicrotomeForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=tmp_path / "off"
    )
    assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(place.startswith("model.layers.") and place.count(".") > 2 for place in placed.hf_device_map)
    assert torch.equal(logits(placed.eval(), tokens), logits(model, tokens))


STRANGER = """
import sys
sys.modules["microtome"] = None  # an editable install must not help
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    tokens, want = (torch.load(f"{folder}/{name}.pt") for name in ("tokens", "want"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, want)
    text = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 12)
print("equal", len(sys.argv) - 1)
"""


def test_a_folder_loads_where_microtome_is_not_installed(tmp_path: Path) -> None:
    """The decoder's file in the folder and `auto_map` suffice, from another directory and without our package."""
    names = ["rotary pairs", "tied behind an adapter"]
    for name in names:
        config, tokens = RAGGED[name], tokens_of(name, 2)
        model = loaded(config, random_tensors(config, dtype=torch.float32))
        folder = tmp_path / name.replace(" ", "-")
        model.save_pretrained(folder)
        assert not (folder / "modeling_microtome.py").exists()
        shutil.copy(modeling_microtome.__file__, folder)
        fields = json.loads((folder / "config.json").read_text())
        fields["auto_map"] = {
            "AutoConfig": "modeling_microtome.MicrotomeConfig",
            "AutoModel": "modeling_microtome.MicrotomeModel",
            "AutoModelForCausalLM": "modeling_microtome.MicrotomeForCausalLM",
        }
        (folder / "config.json").write_text(json.dumps(fields))
        torch.save(tokens, folder / "tokens.pt")
        torch.save(logits(model, tokens), folder / "want.pt")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *(str(tmp_path / name.replace(" ", "-")) for name in names)],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal 2", done.stderr[-2000:]


# --- what transformers does with a model ----------------------------------------------------------------------------


def test_hidden_states_and_attentions_are_those_of_transformers() -> None:
    tokens = ids()
    theirs, mine = built(canonical_fields("llama-biases-wide-heads"), attn_implementation="eager"), None
    mine = from_stock(theirs, canonical_fields("llama-biases-wide-heads"))
    mine.set_attn_implementation("eager")
    with torch.no_grad():
        want = theirs(input_ids=tokens, output_hidden_states=True, output_attentions=True)
        have = mine(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    for field in ("hidden_states", "attentions"):
        assert len(have[field]) == len(want[field])
        for one, other in zip(have[field], want[field], strict=True):
            assert error(one, other) <= CLOSE


def canonical_fields(name: str) -> dict[str, Any]:
    from models import TINY

    return TINY[name]


def test_hidden_states_of_ragged_widths() -> None:
    config = RAGGED["dense shortcuts"]
    model = loaded(config, random_tensors(config))
    with torch.no_grad():
        out = model(input_ids=tokens_of("dense shortcuts"), output_hidden_states=True)
    assert [state.shape[-1] for state in out.hidden_states] == [20, 18, 18, 24]
    assert torch.equal(model.head(out.hidden_states[-1]), out.logits)  # the last one is behind the final norm


def test_fewer_logits_on_request() -> None:
    tokens = ids()
    with torch.no_grad():
        model, want = ours("llama"), logits(ours("llama"), tokens)
        assert error(model(input_ids=tokens, logits_to_keep=3).logits, want[:, -3:]) <= CLOSE
        assert error(model(input_ids=tokens, logits_to_keep=torch.tensor([1, 4])).logits, want[:, [1, 4]]) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "opt-tied", "qwen3-bias"])
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    tokens = ids()
    labels = tokens.clone()
    labels[0, :5] = -100
    theirs, mine = stock(name), ours(name)
    naive = cross_entropy(logits(theirs, tokens)[:, :-1].reshape(-1, 97), labels[:, 1:].reshape(-1), ignore_index=-100)
    for model in (theirs, mine):
        model.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        assert abs(loss.item() - naive.item()) <= 1e-5 * naive.item()
        loss.backward()
    try:
        have, want = mine.model.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad
        assert error(have, want) <= 1e-4
        assert {key for key, p in mine.named_parameters() if p.grad is None} == set()
    finally:
        theirs.zero_grad()
        mine.zero_grad()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["heads", "factored shortcuts", "skipped halves", "parallel, ragged"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients(name: str, reentrant: bool) -> None:
    config, tokens = RAGGED[name], tokens_of(name)
    model = loaded(config, random_tensors(config)).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    want = gradients()
    calls: list[int] = []
    for block, layer in enumerate(model.model.layers):
        (layer.mlp or layer.self_attn).register_forward_pre_hook(lambda *_, block=block: calls.append(block))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    have = gradients()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]  # every block ran again on the way back
    for key, gradient in want.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(have[key], gradient)


@pytest.mark.parametrize("name", ["rotary pairs", "index subsets of ragged widths", "windows"])
def test_a_compiler_sees_one_graph(name: str) -> None:
    """Traced whole, without Python left in it; the kernels that a backend would make are another test's."""
    torch._dynamo.reset()
    config, tokens = RAGGED[name], tokens_of(name, 2)
    model = loaded(config, random_tensors(config, dtype=torch.float32))
    want = logits(model, tokens)
    assert error(logits(torch.compile(model, backend="eager", fullgraph=True), tokens), want) <= CLOSE
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_logits() -> None:
    torch._dynamo.reset()
    name = "index subsets of ragged widths"
    config, tokens = RAGGED[name], tokens_of(name, 2)
    model = loaded(config, random_tensors(config, dtype=torch.float32))
    want = logits(model, tokens)
    assert error(logits(torch.compile(model), tokens), want) <= 1e-4
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft() -> None:
    """LoRA finds the linears by their names, trains, and merges back into them."""
    peft = pytest.importorskip("peft")
    name = "rotary pairs"
    config, tokens = RAGGED[name], tokens_of(name, 2)
    model = loaded(config, random_tensors(config, dtype=torch.float32))
    before = logits(model, tokens)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    want = logits(adapted, tokens)
    assert error(want, before) > 1e-3
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    merged = adapted.merge_and_unload()
    assert type(merged) is MicrotomeForCausalLM
    assert error(logits(merged, tokens), want) <= CLOSE


def test_low_precision_norms_are_computed_in_fp32() -> None:
    """A bf16 sum of squares over many coordinates would be off by percents."""
    from microtome.modeling_microtome import MicrotomeNorm

    config = decoder(hidden_size=4096, num_attention_heads=4, norm_eps=1e-6)
    x = 100 * torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = MicrotomeNorm(config, 4096, gain=False, bias=False)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), want.bfloat16())
    halved = MicrotomeNorm(
        decoder(hidden_size=4096, num_attention_heads=4, norm_divisor=8192), 4096, gain=False, bias=False
    )
    assert error(halved(x.float()), want * 2**0.5) <= 1e-5


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"format_version 2 is newer than this code's 1: upgrade microtome"):
        decoder(format_version=2)
    model = loaded(RAGGED["plain"], random_tensors(RAGGED["plain"], dtype=torch.float32))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    fields = json.loads(text) | {"format_version": 7}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Exception, match="format_version 7 is newer"):
        MicrotomeForCausalLM.from_pretrained(tmp_path)


def test_the_format_version_is_always_written() -> None:
    """Also by to_diff_dict, which leaves out defaults: a reader of the future must be able to tell."""
    assert json.loads(RAGGED["plain"].to_json_string())["format_version"] == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"norm": "group"}, "norm='group' is not one of"),
        ({"norm_placement": "none"}, "norm_placement='none' is not one of"),
        ({"parallel": "maybe"}, "parallel='maybe' is not one of"),
        ({"num_key_value_heads": 3}, "block 0: 4 query heads cannot share 3 key-value heads evenly"),
        ({"mlp_shortcut": "sparse"}, "block 0: shortcut 'sparse' is not one of"),
        ({"per_layer_config": {1: {"attn_shortcut": "sparse"}}}, "block 1: shortcut 'sparse' is not one of"),
    ],
)
def test_what_the_decoder_cannot_run_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        decoder(**fields)
