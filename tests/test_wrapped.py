"""The text decoder inside a multimodal wrapper: opened as if it stood alone, and put back where that can be done.

The oracle is transformers' own wrapper class, on text and on images that went through its own tower and projector.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import raises, tree
from models import TINY, drawn, error, ids, loaded, logits
from safetensors.torch import load_file, save_file
from tinies import HELD_OUT, compress, home, weights
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from microtome import arch, layout, planner, running, surgery, wrapper
from microtome.edit import Rewrite
from microtome.errors import BadCheckpoint, UnsupportedModel
from microtome.loading import load
from microtome.pipeline import preview
from microtome.source import open_source

PARITY = 1e-5
TURNED = 1e-4  # a rotation in fp32 weights
IMAGE = 5  # the token that stands for a piece of an image
UNTIED = {"untie": True}  # a tied head is exact only with weights of its own
WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")

TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip


def text(name: str, **changes: Any) -> dict[str, Any]:
    return TINY[name] | {"pad_token_id": None} | changes


WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": text("llama-gqa-llama3-tied", tie_word_embeddings=False),
        "vision_config": TOWER | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE, "tie_word_embeddings": False,
    },
    "llava_next": {
        "text_config": text("llama"),
        "vision_config": TOWER | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE, "image_grid_pinpoints": [[8, 8], [8, 16]], "tie_word_embeddings": False,
    },
    "mistral3": {
        "text_config": text("mistral-window"),
        "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": IMAGE, "spatial_merge_size": 1, "tie_word_embeddings": True,
    },
    "internvl": {
        "text_config": text("qwen2-tied"),
        "vision_config": TOWER | {"image_size": [8, 8], "patch_size": [4, 4]},
        "image_token_id": IMAGE, "downsample_ratio": 0.5, "tie_word_embeddings": True,
    },
    "idefics3": {
        "text_config": text("llama"), "vision_config": TOWER | {"image_size": 16},
        "image_token_id": IMAGE, "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": text("llama-gqa-llama3-tied"), "vision_config": TOWER | {"image_size": 16},
        "image_token_id": IMAGE, "scale_factor": 2, "tie_word_embeddings": True,
    },
    "gemma3": {
        "text_config": text("gemma3_text"), "vision_config": TOWER | {"model_type": "siglip_vision_model"},
        "image_token_index": IMAGE, "mm_tokens_per_image": 4,
    },
}  # fmt: skip
TURNABLE = ["llava", "llava_next", "mistral3", "internvl", "idefics3", "smolvlm"]
NARROW = ["idefics3", "smolvlm"]  # whose class builds the projector for any width

each_wrapper = pytest.mark.parametrize("kind", WRAPPERS)


@cache
def original(kind: str) -> PreTrainedModel:
    """transformers' own wrapper with O(1) random weights."""
    config = arch.stock_config(WRAPPERS[kind] | {"model_type": kind})
    model = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(name, tuple(parameter.shape), generator))
    return model.eval()


@cache
def checkpoint(kind: str) -> Path:
    """A folder as transformers saves the wrapper, with what travels beside it."""
    folder = home() / f"wrapped-{kind}"
    original(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    (folder / "processor_config.json").write_text("{}")
    return folder


def respelled(kind: str, place: Path, **config: Any) -> Path:
    """The same model with the names of its class instead of those of old files."""
    place.mkdir()
    save_file({name: tensor.clone() for name, tensor in own_names(kind).items()}, place / WEIGHTS, {"format": "pt"})
    fields = json.loads((checkpoint(kind) / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(fields | config))
    return place


def own_names(kind: str) -> dict[str, Tensor]:
    """The model's tensors under the names of its class; tied ones once."""
    tensors = dict(original(kind).state_dict())
    if original(kind).config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def pictured(kind: str) -> dict[str, Tensor]:
    """Inputs with an image: text, the tokens that stand for the image, text."""
    generator = torch.Generator().manual_seed(7)
    pieces = {"internvl": 1, "llava_next": 10}.get(kind, 4)  # llava_next: all, its parts, and two ends of lines
    side = 16 if kind in NARROW else 8
    words = ids(1, 18)
    words[words == IMAGE] += 1
    words[:, 4 : 4 + pieces] = IMAGE
    pixels = torch.randn(1, 3, side, side, generator=generator)
    pixels = pixels.repeat(2, 1, 1, 1) if kind == "llava_next" else pixels
    given = {"input_ids": words, "pixel_values": pixels[None] if kind in {*NARROW, "llava_next"} else pixels}
    if kind in {"mistral3", "llava_next"}:
        given["image_sizes"] = torch.tensor([[side, side]])
    if kind == "gemma3":
        given["token_type_ids"] = (words == IMAGE).long()
    return given


@torch.no_grad()
def seen(model: Any, kind: str, **changes: Tensor) -> Tensor:
    """Logits of a wrapper that is shown an image."""
    return model(**pictured(kind) | changes, use_cache=False).logits


def plain(words: Tensor) -> Tensor:
    return torch.where(words == IMAGE, IMAGE + 1, words)


def ours(folder: Path) -> Any:
    """Microtome's decoder of what is inside a wrapper."""
    with open_source(folder) as source:
        found = planner.opened(source)
        tensors = {name: one for part in layout.parts(found.config) for name, one in found.read(part).items()}
    return loaded(found.config, tensors)


# --- opening --------------------------------------------------------------------------------------------------------


@each_wrapper
def test_the_decoder_inside_has_the_wrappers_logits_on_text(kind: str, tmp_path: Path) -> None:
    words = plain(ids(length=20))
    want = logits(original(kind), words)
    assert want.std() > 0.3
    assert error(logits(ours(checkpoint(kind)), words), want) <= PARITY
    assert error(logits(ours(respelled(kind, tmp_path / "new")), words), want) <= PARITY


@pytest.mark.parametrize("kind", WRAPPERS)
def test_images_matter_to_these_tests(kind: str) -> None:
    other = torch.flip(pictured(kind)["pixel_values"], [-1])
    assert (seen(original(kind), kind) - seen(original(kind), kind, pixel_values=other)).abs().max() > 1e-2


def test_what_a_sparse_text_config_leaves_out_is_what_the_wrappers_class_fills_in() -> None:
    """Mistral3's class has defaults of its own for its text; MistralConfig alone would say 4096 and 32000."""
    fields = {"model_type": "mistral3", "text_config": {"model_type": "mistral", "num_hidden_layers": 2}}
    want: Any = transformers.Mistral3Config(text_config={"model_type": "mistral", "num_hidden_layers": 2})
    config = arch.lower(arch.decoder_fields(fields))
    assert config.hidden_size == want.text_config.hidden_size
    assert config.num_hidden_layers == 2
    assert config.tie_word_embeddings == want.tie_word_embeddings


def test_a_head_that_a_config_calls_tied_counts_if_it_is_stored_with_other_values(tmp_path: Path) -> None:
    """As in transformers, which then follows the checkpoint."""
    place = respelled("mistral3", tmp_path / "m")
    tensors = load_file(place / WEIGHTS)
    tensors["lm_head.weight"] = drawn("lm_head.weight", (97, 48), torch.Generator().manual_seed(9))
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    words = plain(ids())
    want = logits(AutoModelForImageTextToText.from_pretrained(place).eval(), words)
    assert error(logits(original("mistral3"), words), want) > 0.1
    assert error(logits(ours(place), words), want) <= PARITY
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    assert error(logits(ours(place), words), logits(original("mistral3"), words)) <= PARITY


def test_a_config_alone_tells_what_will_come_of_a_wrapper() -> None:
    """Of a hub model the weights are not fetched for a plan."""
    with open_source(checkpoint("idefics3")) as source:
        found = planner.opened(replace(source, tensors={}, shards={}))
        whole = planner.opened(source)
    assert found.wrapper is not None
    assert found.wrapper.carried == ()
    assert arch.canonical_fields(found.config) == arch.canonical_fields(whole.config)


# --- refusals -------------------------------------------------------------------------------------------------------


def without(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


def test_a_text_decoder_that_is_no_table_is_refused() -> None:
    fields = {"model_type": "mllama", "text_config": {"hidden_size": 8}}
    with raises(UnsupportedModel, "the text decoder inside this mllama is a 'mllama_text_model', which is not supp"):
        arch.decoder_fields(fields)


def test_positions_in_three_dimensions_are_refused() -> None:
    rotary = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
    fields = WRAPPERS["llava"] | {"model_type": "llava", "text_config": text("llama", rope_parameters=rotary)}
    with raises(UnsupportedModel, r"inside this llava turns its heads by positions in time.*\(mrope_section\)"):
        arch.decoder_fields(fields)


def test_attention_to_later_words_is_refused() -> None:
    """PaliGemma reads its prompt in both directions."""
    fields = {"model_type": "paligemma", "text_config": {"model_type": "gemma"}, "vision_config": {}}
    with raises(UnsupportedModel, "attends to later tokens"):
        arch.lower(arch.decoder_fields(fields))


def test_unknown_fields_of_the_text_are_refused_by_name(tmp_path: Path) -> None:
    place = respelled("llava", tmp_path / "m", text_config=text("llama", cross_attention_layers=[1]))
    with open_source(place) as source, raises(UnsupportedModel, r"of this llama has features .*cross_attention_layers"):
        planner.opened(source)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda t: without(t, "embed_tokens.weight"), BadCheckpoint, r"llava has no tensor named .*embed_tokens\.weight"),
        (lambda t: t | {"audio.embed_tokens.weight": torch.ones(1)}, UnsupportedModel, "has 2 text decoders: "),
        (lambda t: without(t, "norm.weight") | without({}, ""), BadCheckpoint, "lacks .* tensors of a llama"),
        (
            lambda t: t | {"model.language_model.layers.0.lora_A": torch.ones(1)},
            UnsupportedModel,
            r"does not know: model\.language_model\.layers\.0\.lora_A",
        ),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_refused(change: Any, kind: Any, words: str, tmp_path: Path) -> None:
    place = respelled("llava", tmp_path / "m")
    save_file(change(load_file(place / WEIGHTS)), place / WEIGHTS, {"format": "pt"})
    with open_source(place) as source, raises(kind, words):
        planner.opened(source)


def test_sandwich_norms_inside_a_wrapper_are_refused_as_they_are_outside(tmp_path: Path) -> None:
    with raises(UnsupportedModel, "gemma3_text"):
        compress(checkpoint("gemma3"), tmp_path / "out", slice=0.25)
    assert not (tmp_path / "out").exists()


# --- whole wrappers -------------------------------------------------------------------------------------------------


@each_wrapper
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_keep_1_leaves_every_byte(kind: str, spelling: str, tmp_path: Path) -> None:
    source = checkpoint(kind) if spelling == "old" else respelled(kind, tmp_path / "source")
    result = compress(source, tmp_path / "out", keep=1.0)
    have, want = weights(tmp_path / "out"), weights(source)
    assert list(have) == list(want)
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype
        assert torch.equal(have[name], tensor), name
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    ) | {"dtype": "float32"}
    assert result.stock
    assert any(f"a whole {kind}" in note for note in result.notes)


def test_what_is_stored_in_another_type_keeps_it(tmp_path: Path) -> None:
    """A tower in fp32 beside a decoder in bf16; a type that the user names is the decoder's."""
    place = respelled("idefics3", tmp_path / "source")
    tensors = {
        name: tensor if "vision" in name else tensor.bfloat16() for name, tensor in own_names("idefics3").items()
    }
    tensors["model.text_model.norm.weight"] = tensors["model.text_model.norm.weight"].float()
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    compress(place, tmp_path / "same", keep=1.0)
    compress(place, tmp_path / "half", keep=1.0, dtype="float16")
    compress(place, tmp_path / "cut", slice=0.25)
    same, half, cut = (weights(tmp_path / name) for name in ("same", "half", "cut"))
    assert {name: (one.dtype, torch.equal(one, tensors[name])) for name, one in same.items()} == {
        name: (one.dtype, True) for name, one in tensors.items()
    }
    assert {one.dtype for name, one in half.items() if "text_model" in name} == {torch.float16}
    assert all(torch.equal(half[name], tensors[name]) for name in tensors if "vision" in name)
    assert {one.dtype for name, one in cut.items() if "vision" not in name} == {torch.bfloat16}
    assert all(torch.equal(cut[name], tensors[name]) for name in tensors if "vision" in name)


@pytest.mark.parametrize("kind", TURNABLE)
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_a_rotation_at_full_width_leaves_text_and_images(kind: str, spelling: str, tmp_path: Path) -> None:
    source = checkpoint(kind) if spelling == "old" else respelled(kind, tmp_path / "source")
    compress(source, tmp_path / "out", slice=0, options=UNTIED)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    words = plain(ids())
    assert error(logits(again, words), logits(original(kind), words)) <= TURNED
    assert error(seen(again, kind), seen(original(kind), kind)) <= TURNED
    have, want = weights(tmp_path / "out"), weights(source)
    with open_source(source) as opened:
        around = planner.opened(opened).wrapper
    assert around is not None
    still = [name for name in around.carried if name not in around.writers()]
    assert any("vision" in name for name in still)
    assert all(torch.equal(have[name], want[name]) for name in still)
    assert not any(torch.equal(have[name], want[name]) for name in around.writers())


@pytest.mark.parametrize("kind", TURNABLE)
def test_a_projector_left_as_it_was_would_be_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation of the test above: images then come in a basis that nobody reads."""
    monkeypatch.setattr(wrapper, "reprojected", lambda tensors, *_: tensors)
    compress(checkpoint(kind), tmp_path / "out", slice=0, options=UNTIED)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    words = plain(ids())
    assert error(logits(again, words), logits(original(kind), words)) <= TURNED
    assert error(seen(again, kind), seen(original(kind), kind)) > 1e-2


@pytest.mark.parametrize("kind", NARROW)
def test_a_narrow_wrapper_shows_images_to_its_decoder_as_slicing_by_hand_does(kind: str, tmp_path: Path) -> None:
    """The independent way: the uncut wrapper's features and embeddings, in the basis that the result's tables tell."""
    result = compress(checkpoint(kind), tmp_path / "out", slice=0.25)
    assert result.stock
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    wide = again.config.text_config.hidden_size
    assert wide < original(kind).config.text_config.hidden_size
    old = original(kind).model.text_model.embed_tokens.weight.double()
    new = again.model.text_model.embed_tokens.weight.double()
    basis_NR = torch.linalg.lstsq(old, new).solution  # 97 tokens determine 48 rows
    assert (old @ basis_NR - new).abs().max() < 1e-4
    given = pictured(kind)
    features = torch.cat(list(original(kind).model.get_image_features(given["pixel_values"]).pooler_output))
    embedded = original(kind).model.text_model.embed_tokens(given["input_ids"])
    embedded[given["input_ids"] == IMAGE] = features.reshape(-1, embedded.shape[-1])
    mine = ours(tmp_path / "out")
    with torch.no_grad():
        want = mine(inputs_embeds=(embedded.double() @ basis_NR).float(), use_cache=False).logits
    assert error(seen(again, kind), want) <= TURNED
    words = plain(ids())
    assert error(logits(again, words), logits(mine, words)) <= PARITY


def test_a_narrow_wrapper_is_planned_as_it_comes_out(tmp_path: Path) -> None:
    planned = preview(checkpoint("idefics3"), slice=0.25)
    result = compress(checkpoint("idefics3"), tmp_path / "out", slice=0.25)
    assert planned.after == result.after
    assert planned.notes == result.notes
    assert "import AutoModelForImageTextToText, AutoTokenizer" in (tmp_path / "out/README.md").read_text()
    assert result.after.nbytes == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())
    assert result.before.nbytes == sum(tensor.nbytes for tensor in weights(checkpoint("idefics3")).values())
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert tree(tmp_path / "out")[name] == tree(checkpoint("idefics3"))[name]


def test_a_head_that_is_untied_is_spelled_like_the_rest(tmp_path: Path) -> None:
    """Old files keep the head inside the decoder's prefix, new ones beside it; the config says so at both levels."""
    for source, head in (
        (checkpoint("mistral3"), "language_model.lm_head.weight"),
        (respelled("mistral3", tmp_path / "new"), "lm_head.weight"),
    ):
        compress(source, tmp_path / head, slice=0, options=UNTIED)
        compress(source, tmp_path / f"tied-{head}", slice=0)
        config = json.loads((tmp_path / head / "config.json").read_text())
        assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
        assert set(weights(tmp_path / head)) == {head, *weights(source)}
        assert set(weights(tmp_path / f"tied-{head}")) == set(weights(source))


@pytest.mark.parametrize("kind", ["llava", "gemma3", "idefics3"])
def test_neurons_are_cut_inside_any_wrapper(kind: str, tmp_path: Path) -> None:
    """The stream stays as it is, so all else does. The oracle: neurons that write nothing can go without a loss."""
    place = tmp_path / "source"
    tensors, size = weights(checkpoint(kind)), WRAPPERS[kind]["text_config"]["intermediate_size"]
    ours_ = [name for name in tensors if ("language_model" in name or "text_model" in name) and "mlp.down_proj" in name]
    for name in ours_:
        tensors[name][:, size // 2 :] = 0
    assert len(ours_) == 3
    place.mkdir()
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    (place / "config.json").write_bytes((checkpoint(kind) / "config.json").read_bytes())
    result = compress(place, tmp_path / "out", method="fasp", options={"spaces": "ffn"}, keep=0.8)
    assert result.stock
    assert any(f"a whole {kind}" in note for note in result.notes)
    before, after = (AutoModelForImageTextToText.from_pretrained(one).eval() for one in (place, tmp_path / "out"))
    assert size // 2 <= after.config.text_config.intermediate_size < size
    assert error(seen(after, kind), seen(before, kind)) <= TURNED
    assert set(weights(tmp_path / "out")) == set(tensors)


def test_a_permuted_gemma3_shows_images_to_its_decoder(tmp_path: Path) -> None:
    """No method turns its stream yet; its projector is stored transposed, and its gains follow a permutation."""
    with open_source(checkpoint("gemma3")) as source:
        found = planner.opened(source)
        around = found.wrapper
        assert around is not None
        order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
        shrink = torch.eye(48)[order]
        edits = [Rewrite(one, shrink, shrink.T) for one in layout.residual_spaces(found.config, split=True)]
        tensors = {name: source.tensor(name) for name in around.carried}
        moved = wrapper.reprojected({name: tensors[name] for name in around.writers()}, around, edits[0])
        out = {**tensors, **moved}
        for part in layout.parts(found.config):
            cut = surgery.apply(found.read(part), edits)
            stored = arch.raise_tensors(cut, arch.stored_names(found.table, found.config, part))
            out |= {found.stored(name): tensor.contiguous() for name, tensor in stored.items()}
    (tmp_path / "config.json").write_bytes((checkpoint("gemma3") / "config.json").read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, tmp_path / WEIGHTS, {"format": "pt"})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert error(seen(again, "gemma3"), seen(original("gemma3"), "gemma3")) <= PARITY
    assert around.writers() == {"multi_modal_projector.mm_input_projection_weight": 1}


# --- the decoder alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "chosen", "why"),
    [
        ("llava", {"slice": 0.25}, "the projector of llava is as wide inside as the decoder"),
        (
            "idefics3",
            {"slice": 0.25, "options": {"basis": "junction"}},
            "a config of idefics3 holds a stock decoder only",
        ),
    ],
)
def test_what_cannot_go_back_is_written_alone_and_said(kind: str, chosen: Any, why: str, tmp_path: Path) -> None:
    result = compress(checkpoint(kind), tmp_path / "out", **chosen)
    assert any(f"the text decoder of this {kind}, without the rest: {why}" in note for note in result.notes)
    assert not any("vision" in name or "projector" in name for name in weights(tmp_path / "out"))
    assert not (tmp_path / "out/preprocessor_config.json").exists()
    again = result.load("cpu")
    assert torch.isfinite(logits(again, plain(ids()))).all()
    assert type(again).__name__ == ("MistralForCausalLM" if result.stock else "MicrotomeForCausalLM")
    assert again.num_parameters() == result.after.total
    with open_source(tmp_path / "out") as source:
        assert planner.opened(source).wrapper is None  # a result can be read again


def test_an_unknown_wrapper_comes_back_whole_uncut_and_alone_when_turned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(wrapper.PROJECTORS, "idefics3")
    compress(checkpoint("idefics3"), tmp_path / "whole", keep=1.0)
    assert tree(tmp_path / "whole")[WEIGHTS] == tree(checkpoint("idefics3"))[WEIGHTS]
    result = compress(checkpoint("idefics3"), tmp_path / "alone", slice=0)
    assert any("how images enter the stream is known for gemma3" in note for note in result.notes)
    words = plain(ids())
    assert error(logits(result.load("cpu"), words), logits(original("idefics3"), words)) <= TURNED


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_a_recipe_that_starts_by_leaving_a_wrapper_as_it_is(kind: str, tmp_path: Path) -> None:
    """Steps hand the decoder on alone; with nothing cut it computes what the wrapper does, to the last bit."""
    same = {"steps": [{"fasp": {"keep": 1.0}}, {"slicegpt": {"keep": 1.0}}]}
    result = compress(checkpoint(kind), tmp_path / "same", recipe=same)
    assert any(f"the text decoder of this {kind}, without the rest" in note for note in result.notes)
    words = plain(ids())
    assert torch.equal(logits(result.load("cpu"), words), logits(original(kind), words))
    options = {"spaces": "ffn"}
    chained = {"steps": [{"slicegpt": {"keep": 1.0}}, {"fasp": {"keep": 0.8, "options": options}}, "restore"]}
    alone = {"steps": [{"fasp": {"keep": 0.8, "options": options}}, "restore"]}
    after, before = (
        compress(checkpoint(kind), tmp_path / name, recipe=recipe)
        for name, recipe in (("chained", chained), ("alone", alone))
    )
    assert after.after.decoder == before.after.decoder < result.after.decoder
    for name, tensor in weights(tmp_path / "alone").items():
        assert torch.equal(weights(tmp_path / "chained")[name], tensor), name


def test_reasons_are_about_what_is_there() -> None:
    """A projector that the checkpoint lacks, means taken out, and fields that the wrapper's class would not read."""
    with open_source(checkpoint("idefics3")) as source:
        found = planner.opened(source)
    around, config = found.wrapper, found.config
    assert around is not None

    def asked(one: wrapper.Wrapper = around, *, centred: bool = False, **stock: Any) -> Any:
        return wrapper.rewrap(one, {**found.fields, **stock}, config, 48, turned=True, centred=centred)

    assert isinstance(asked(), dict)
    assert "for which the projector is not prepared" in asked(centred=True)
    assert "the checkpoint has no connector.mod" in asked(replace(around, carried=("vision",)))
    assert asked(rms_norm_eps=0.5) == "no config of idefics3 can say it"


# --- measuring ------------------------------------------------------------------------------------------------------


def test_wrappers_are_measured_like_decoders(tmp_path: Path) -> None:
    result = compress(checkpoint("idefics3"), tmp_path / "out", slice=0.25, measure=True, eval_data=HELD_OUT)
    assert result.perplexity_before is not None
    assert result.perplexity_after is not None
    found = running.evaluate(str(checkpoint("idefics3")), HELD_OUT, baseline=str(tmp_path / "out"), device="cpu")
    assert [one.nll for one in found.values()] == [result.perplexity_before.nll, result.perplexity_after.nll]
    mine = logits(ours(checkpoint("idefics3")), HELD_OUT).double().log_softmax(-1)
    nll = -mine[:, :-1].gather(2, HELD_OUT[:, 1:, None]).mean().item()
    assert result.perplexity_before.nll == pytest.approx(nll, rel=1e-5)


def test_loading_finds_the_wrappers_class() -> None:
    assert type(load(checkpoint("llava"), device=CPU)) is type(original("llava"))
    assert type(load(checkpoint("gemma3"), device=CPU)) is type(original("gemma3"))


@pytest.mark.parametrize("kind", ["mistral3", "idefics3"])
def test_a_quantised_wrapper_is_what_it_stands_for(kind: str, tmp_path: Path) -> None:
    """Decoder and tower in fp8 with one scale each; the oracle is the same wrapper, written plain."""
    fields, held, want = json.loads((checkpoint(kind) / "config.json").read_text()), dict[str, Tensor](), {}
    for name, tensor in weights(checkpoint(kind)).items():
        held[name] = want[name] = tensor.bfloat16()
        if name.endswith("_proj.weight"):
            held[name], scale = (50 * tensor).to(torch.float8_e4m3fn), torch.tensor(0.02)
            held[f"{name}_scale_inv"] = scale
            want[name] = (held[name].float() * scale).bfloat16()
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    for place, tensors, more in (("quantised", held, quantised), ("plain", want, {})):
        (tmp_path / place).mkdir()
        save_file(tensors, tmp_path / place / WEIGHTS, {"format": "pt"})
        (tmp_path / place / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"} | more))
        compress(tmp_path / place, tmp_path / f"{place}-cut", slice=0.25 if kind in NARROW else 0)
    assert len(held) > len(want) + 14
    cut = [tree(tmp_path / f"{place}-cut") for place in ("quantised", "plain")]
    assert [cut[0][name] == cut[1][name] for name in ("config.json", WEIGHTS)] == [True, True]
    models = [load(tmp_path / place, device=CPU, dtype=torch.float32) for place in ("quantised", "plain")]
    assert error(seen(models[0], kind), seen(models[1], kind)) == 0
