"""From a row to the messages of its prompt.

row --with_columns--> row --messages_of: template, or column messages or prompt--> system message and turns
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from cispo.errors import UserError
from cispo.rollout.tables import Row
from cispo.types import Message

_POLICY_ROLES = ("assistant", "model", "gpt", "bot", "chatbot", "ai")
"""Names that chat formats give to the policy's turns."""

_SYSTEM_ROLES = ("system", "developer")


def with_columns(row: Row, templates: Mapping[str, str], where: str) -> Row:
    """The row with further columns; a template that is one column's name in braces gives its value as it is."""
    if not templates:
        return row
    return {**row, **{name: _value(template, row, where) for name, template in templates.items()}}


def _value(template: str, row: Row, where: str) -> object:
    name = template[1:-1]
    if template == f"{{{name}}}" and row.get(name) is not None:
        return row[name]
    return _filled(template, row, where)


def messages_of(row: Row, template: str | None, system: str | None, where: str) -> tuple[Message, ...]:
    """The messages of a row's prompt, as `prompts.build_prompts` says; `where` names the row in errors."""
    messages = _turns(row, template, where)
    if system is None or messages[0]["role"] in _SYSTEM_ROLES:
        return messages
    return ({"role": "system", "content": system}, *messages)


def _turns(row: Row, template: str | None, where: str) -> tuple[Message, ...]:
    if template is not None:
        return _user_turn(_filled(template, row, where), where)
    if "messages" in row:
        return _checked_messages(row["messages"], f"{where}: column 'messages'")
    if "prompt" not in row:
        raise UserError(f"{where} has no column 'messages' or 'prompt', and there is no template; {_available(row)}")
    if isinstance(row["prompt"], str):
        return _user_turn(row["prompt"], where)
    return _checked_messages(row["prompt"], f"{where}: column 'prompt'")


def _user_turn(text: str, where: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": whole_text(text, where)},)


class _Template(string.Formatter):
    """Formats as `str.format_map` does, but has no text for null: "None" in a prompt is never meant."""

    def get_field(
        self, field_name: str, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> tuple[object, int | str]:
        value, name = super().get_field(field_name, args, kwargs)
        if value is None:
            raise ValueError(f"column '{field_name}' is null")
        return value, name

    def format_field(self, value: object, format_spec: str) -> str:
        if re.search(r"\d{7}", format_spec):
            raise ValueError(f"the width {format_spec} is too large")
        return format(value, format_spec)


def _filled(template: str, row: Row, where: str) -> str:
    try:
        return _Template().vformat(template, (), row)
    except KeyError as error:
        raise UserError(f"{where} has no column {error}, which the template needs; {_available(row)}") from error
    # The formatting of a column is its own type's code.
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} does not fit the template {template!r}: {error}") from error


def _checked_messages(value: object, where: str) -> tuple[Message, ...]:
    messages = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise UserError(f"{where} must be a list of messages with role and content, not {_shown(value)}")
    for number, message in enumerate(messages):
        _check_message(message, f"{where}: message {number}")
    role = messages[-1]["role"]
    if str(role).strip().lower() in _POLICY_ROLES:
        raise UserError(
            f"{where} ends with the role {role!r}, an answer: the policy would see it. Let the messages end before it; "
            "a reward gets the answer from a column of its own, a demonstration from the column `completion`"
        )
    return messages


def _check_message(message: Message, where: str) -> None:
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise UserError(f"{where} has the role {_shown(role)}, which is no text")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    elif content is None and message.get("tool_calls"):
        texts = []
    else:
        texts = [content]
        if not isinstance(content, str):
            raise UserError(f"{where} has the content {_shown(content)}, which is no text")
    for text in texts:
        if isinstance(text, str):
            whole_text(text, where)


def whole_text(text: str, where: str) -> str:
    """The text. UserError where it has half of a surrogate pair, as JSON's escapes allow: it is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds {text[error.start]!r}, half of a character (a lone surrogate)") from None
    return text


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    # The text of a value is its own type's code.
    except Exception:
        return f"a {type(value).__name__}"


def _available(row: Row) -> str:
    return f"its columns are {', '.join(map(str, row)) or 'none'}"
