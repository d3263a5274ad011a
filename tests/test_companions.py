"""What travels with the weights, what the card says of its terms, and sizes as people write them."""

from pathlib import Path
from typing import Any

import pytest
from folders import INDEX, model, raises, tree
from hypothesis import given
from hypothesis import strategies as st

from microtome.checkpoint import Writer, copy_companions, front_matter, parse_size
from microtome.errors import BadInput
from microtome.source import Source, open_source


def test_companions_travel_and_the_rest_stays(tmp_path: Path) -> None:
    source = model(tmp_path / "source")
    wanted = [
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "qwen.tiktoken"),
        *("generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "license.md"),
        "additional_chat_templates/tools.jinja",
    ]
    unwanted = [
        *(
            "README.md",
            INDEX,
            "pytorch_model.bin",
            "tokenizer.py",
            "tokenization_own.py",
            "modeling_own.py",
            ".gitattributes",
        ),
        *(
            "original/tokenizer.model",
            "onnx/model.onnx",
            "tokenizer.bin",
            "training_args.bin",
            "consolidated.safetensors",
        ),
    ]
    for name in [*wanted, *unwanted]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    with open_source(source) as opened, Writer(tmp_path / "out") as writer:
        assert sorted(copy_companions(opened, writer)) == sorted(wanted)
    assert tree(tmp_path / "out") == {name: name.encode() for name in sorted(wanted)}


@pytest.mark.parametrize(
    ("card", "facts"),
    [
        (None, {}),
        ("# Only prose", {}),
        (
            "---\nlicense: mit\nlanguage:\n- en\n- no\ntags: [x]\n---\n# Card",
            {"license": "mit", "language": ["en", "no"]},
        ),
        ("\ufeff---\r\nlicense: other\r\nlicense_name: own\r\n---\r\n", {"license": "other", "license_name": "own"}),
        ("---\nlanguage: no\nlicense:\n---", {"language": "no"}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system [false]\n---\n", {"license": ["false"]}),
        ("\n---\n\n---\n", {}),
    ],
)
def test_front_matter(tmp_path: Path, card: str | None, facts: dict[str, Any]) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    with open_source(model(tmp_path)) as source:
        assert front_matter(source) == facts


def test_a_card_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    with open_source(model(tmp_path)) as source:
        assert front_matter(source) == {}


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("2GiB", 2 * 1024**3),
        ("1.5 gb", 1_500_000_000),
        (" 64kib ", 65536),
        ("10B", 10),
        ("1TB", 10**12),
        ("9007199254740993", 9007199254740993),
        (7, 7),
    ],
)
def test_sizes(size: str | int, nbytes: int) -> None:
    assert parse_size(size) == nbytes


@pytest.mark.parametrize(
    "size", ["", "GB", "5 bananas", "-5GB", "0", 0, -1, "0.1", "1e9", "5GB5", "nan", "5,0GB", "٣GB"]
)
def test_sizes_that_are_none(size: str | int) -> None:
    with raises(BadInput, "is not a size. Give a number of bytes"):
        parse_size(size)


@given(st.integers(1, 10**15))
def test_plain_numbers_are_themselves(nbytes: int) -> None:
    assert parse_size(nbytes) == parse_size(str(nbytes)) == parse_size(f"{nbytes} B") == nbytes


def test_the_class_is_what_opening_returns(tmp_path: Path) -> None:
    assert isinstance(open_source(str(model(tmp_path))), Source)
