"""Conversations become text by a chat template, from every kind of table; what is no text is refused."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast
from words import BOS, ids, tokenizer

from microtome.data import calibration, evaluation
from microtome.errors import BadInput
from microtome.texts import load

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in roles %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [[("system", "w1"), ("user", "w2 w3")], [("user", "w4"), ("assistant", "w5"), ("user", "w6")]]
TEXT = "[system] w1\n[user] w2 w3\n\n\n[user] w4\n[assistant] w5\n[user] w6\n"


def talking() -> PreTrainedTokenizerFast:
    """A tokenizer with a template that takes three roles."""
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", unk_token="<unk>")
    made.chat_template = "{% set roles = ['system', 'user', 'assistant'] %}" + TEMPLATE
    return made


def messages() -> list[dict[str, Any]]:
    return [{"messages": [{"role": role, "content": said} for role, said in turns], "id": 1} for turns in TURNS]


def shared() -> list[dict[str, Any]]:
    """As ShareGPT has it."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"conversations": [{"from": names[role], "value": said} for role, said in turns]} for turns in TURNS]


def parted() -> list[dict[str, Any]]:
    """Contents in parts."""
    halves = [[(role, said.rpartition(" ")) for role, said in turns] for turns in TURNS]
    return [
        {
            "messages": [
                {"role": role, "content": [{"type": "text", "text": part} for part in parts]} for role, parts in row
            ]
        }
        for row in halves
    ]


@pytest.mark.parametrize("form", [messages, shared, parted])
def test_conversations_of_every_form_and_file_are_the_same_text(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = form()
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"messages": None}, {"messages": []}]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        column = None if name != "a.json" else next(iter(rows[0]))
        assert load(tmp_path / name, "train", column, talking()) == (name, TEXT), name
    library = SimpleNamespace(load_dataset=lambda *_, **__: {"train": rows, "test": rows[1:]})
    monkeypatch.setitem(sys.modules, "datasets", library)
    column = next(iter(rows[0]))
    assert load("owner/name", "train", column, talking())[1] == TEXT
    assert load("owner/name", "test", column, talking())[1] == TEXT.split("\n\n")[1].lstrip("\n")


def test_what_the_model_sees_is_the_text_that_was_rendered(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "w1 w2"}]}]))
    plain = talking()
    plain.chat_template = "{% for m in messages %}{{ m.content }} w7{% endfor %}"
    assert evaluation(tmp_path / "a.json", plain, length=4).ids.tolist() == [[BOS, *ids(1, 3), *ids(7, 8)]]


def test_a_column_text_comes_before_a_conversation(tmp_path: Path) -> None:
    rows = [{**row, "text": "w9"} for row in messages()]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert load(tmp_path / "a.json", "train", None)[1] == "w9\n\nw9"
    assert load(tmp_path / "a.json", "train", "messages", talking())[1] == TEXT
    other = [{"dialog": row["messages"], "title": "w3"} for row in messages()]
    (tmp_path / "b.json").write_text(json.dumps(other))
    assert load(tmp_path / "b.json", "train", "dialog", talking())[1] == TEXT
    assert load(tmp_path / "b.json", "train", None)[1] == "w3\n\nw3"


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
@pytest.mark.parametrize("words", [None, tokenizer()], ids=["no tokenizer", "no template"])
def test_without_a_template_there_is_one_line(tmp_path: Path, name: str, words: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(messages()))
    pq.write_table(pa.Table.from_pylist(messages()), tmp_path / "a.parquet")
    place = "item 1" if name == "a.json" else "row 1"
    with pytest.raises(
        BadInput, match=rf"{name} {place} holds a conversation, and the model comes without a chat template: "
    ):
        calibration(tmp_path / name, words)


def turn(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": "w1"} | fields


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([turn(role="tool")], r"item 2: the chat template refuses this conversation \(no tool\)"),
        (
            [turn(), {"speaker": "a", "content": "w1"}],
            r"item 2, message 2 is not of the form \{role, content\} or \{from, value\}",
        ),
        ([turn(content=None)], r"item 2, message 1 has no text: its content is NoneType"),
        (
            [turn(content=[{"type": "image", "image": "x"}])],
            r"message 1 has a part of type 'image': only text can be read",
        ),
        ([turn(content=["w1"])], r"message 1 has a part of type None"),
        ([turn(content=[{"type": "text", "text": 5}])], r"message 1 has a part of type 'text': only text"),
        ([1, 2], r"item 2: column 'messages' holds list, not text"),
        ({"role": "user"}, r"item 2: column 'messages' holds dict, not text"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, said: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([*messages()[:1], {"messages": said}]))
    with pytest.raises(BadInput, match=message) as caught:
        calibration(tmp_path / "a.json", talking())
    assert "\n" not in str(caught.value)
