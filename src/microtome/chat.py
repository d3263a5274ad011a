"""Conversations to text, by the chat template of the model's own tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from microtome.errors import BadInput

COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # ShareGPT's words


def rendered(conversation: Sequence[Any], tokenizer: Any | None, place: str) -> str:
    """The text of one conversation, a list of {role, content} or {from, value}; "" for an empty one.

    `place` is the file and the row, for messages. Raises BadInput where the tokenizer has no template, where the
    template refuses the conversation, and where a message is something other than text.
    """
    if not getattr(tokenizer, "chat_template", None):
        fact = f"{place} holds a conversation, and the model comes without a chat template"
        raise BadInput(f"{fact}: render conversations into a column 'text', or choose another by --text-column")
    messages = [_message(turn, f"{place}, message {number}") for number, turn in enumerate(conversation, 1)]
    if not messages:
        return ""
    assert tokenizer is not None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    except Exception as error:  # a template is a program, and says by exceptions what it does not take
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"{place}: the chat template refuses this conversation ({said})") from error


def _message(turn: object, place: str) -> dict[str, str]:
    """One message as templates want it."""
    fields = cast("Mapping[str, object]", turn) if isinstance(turn, Mapping) else {}
    role = fields.get("role", fields.get("from"))
    content = fields.get("content", fields.get("value"))
    if not isinstance(role, str):
        raise BadInput(f"{place} is not of the form {{role, content}} or {{from, value}}")
    return {"role": ROLES.get(role, role), "content": _text(content, place)}


def _text(content: object, place: str) -> str:
    """The text of a message, given whole or in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadInput(f"{place} has no text: its content is {type(content).__name__}")
    parts: list[str] = []
    for part in cast("list[object]", content):
        fields = cast("Mapping[str, object]", part) if isinstance(part, Mapping) else {}
        text = fields.get("text")
        if fields.get("type") != "text" or not isinstance(text, str):
            raise BadInput(f"{place} has a part of type {fields.get('type')!r}: only text can be read")
        parts.append(text)
    return "".join(parts)


__all__ = ["COLUMNS", "rendered"]
