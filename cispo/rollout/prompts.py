"""From rows to prompts.

    rows --build_prompts--> prompts --prompt_ids: they fit the context--> prompts --PromptSource--> P prompts a step

The columns of a row fill the prompt's template and reach the reward functions by name.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TypeVar

from cispo.errors import UserError
from cispo.recipe.schema import Data, Recipe
from cispo.rollout.renderer import Renderer
from cispo.rollout.rows import Row, load_rows
from cispo.types import Message, Prompt

Say = Callable[[str], None]
"""Shows a warning, one sentence."""

_POLICY_ROLES = ("assistant", "model", "gpt", "bot", "chatbot", "ai")
"""Names that chat formats give to the policy's turns."""

_CHARACTERS_PER_TOKEN = 1000
"""A text with more characters for each token of the context is not tokenised: it cannot fit, and takes minutes."""

_NAMED_ROWS = 10
"""Most rows that a sentence names."""


Encoded = TypeVar("Encoded", bound=Sized)


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


def prompts_of(data: Data, key: str, renderer: Renderer, recipe: Recipe, say: Say = warn) -> list[Prompt]:
    """The prompts of a recipe section, each short enough for the context."""
    prompts = build_prompts(load_rows(data.source, data.split, data.args, data.limit, key), data.prompt, key)
    prompt_ids(prompts, key, renderer, recipe, say)
    return prompts


def prompt_ids(prompts: Sequence[Prompt], key: str, renderer: Renderer, recipe: Recipe, say: Say) -> list[list[int]]:
    """The rendered prompts. UserError for those that are empty or leave no room in the context for a further token."""
    longest = _CHARACTERS_PER_TOKEN * recipe.rollout.max_context
    texts = renderer.texts([prompt.messages for prompt in prompts], longest, f"{key}: row")
    ids = fitting(texts, renderer.encode_prompt, recipe, key)
    empty = next((row for row, tokens in enumerate(ids) if not tokens), None)
    if empty is not None:
        raise UserError(f"{key}: row {empty} makes an empty prompt")
    warn_of_lacking([text for text in texts if text is not None], f"{key}: {{}} prompts", renderer, say)
    return ids


def fitting(
    texts: Sequence[Encoded | None],
    encode: Callable[[Encoded], list[int]],
    recipe: Recipe,
    key: str,
    *,
    before: Sequence[int] | None = None,
    size_of: Callable[[Encoded], int] = len,
) -> list[list[int]]:
    """The token ids of one text a row, each with `before` tokens in front of it; None is a text that is too long.

    `size_of` a text is in characters. UserError naming the rows that leave no room in the context for a further token.
    """
    context = recipe.rollout.max_context
    most = _CHARACTERS_PER_TOKEN * context
    ids = [None if text is None or size_of(text) > most else encode(text) for text in texts]
    lengths = [most + 1 if tokens is None else len(tokens) for tokens in ids]
    sizes = [length + more for length, more in zip(lengths, before or [0] * len(lengths), strict=True)]
    over = [row for row, size in enumerate(sizes) if size > context - 1]
    if not over:
        return [tokens for tokens in ids if tokens is not None]
    longest = max(over, key=lambda row: sizes[row])
    size = f"over {most:,} characters" if ids[longest] is None else f"{sizes[longest]:,} tokens"
    rows = ", ".join(map(str, over[:_NAMED_ROWS])) + (" ..." if len(over) > _NAMED_ROWS else "")
    raise UserError(
        f"{key}: {len(over):,} of {len(sizes):,} rows are too long: rollout.max_context {context} leaves room for "
        f"{context - 1} tokens, row {longest} has {size} (too long: {rows})"
    )


def warn_of_lacking(texts: Sequence[str], subject: str, renderer: Renderer, say: Say) -> None:
    """Says how many texts hold characters that the tokenizer has no ids for; `subject` has a place for the number."""
    lacking = {character for character in set().union(*texts) if renderer.lacks(character)}
    if lacking:
        count = sum(not lacking.isdisjoint(text) for text in texts)
        some = ", ".join(map(repr, sorted(lacking)[:5])) + (" ..." if len(lacking) > 5 else "")
        unknown = renderer.tokenizer.unk_token
        effect = "they are left out" if unknown is None else f"all of them become {unknown}"
        subject = subject.format(f"{count:,} of {len(texts):,}")
        say(f"{subject} hold characters that the tokenizer lacks ({some}): {effect}")


def build_prompts(rows: Sequence[Row], template: str | None, key: str) -> list[Prompt]:
    """One prompt a row; its id is the row's position.

    The messages are `template` filled with the columns as one user message if there is one, else the column `messages`,
    else the column `prompt` (text or messages). UserError names the column that is missing, null or of the wrong type,
    and the messages that end with the policy's own turn.
    """
    return [
        Prompt(id=index, messages=_messages(row, template, f"{key}: row {index}"), columns=row)
        for index, row in enumerate(rows)
    ]


def _messages(row: Row, template: str | None, where: str) -> tuple[Message, ...]:
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
