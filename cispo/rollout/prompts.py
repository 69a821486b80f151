"""From rows to prompts.

    rows --prompts_of--> Prompts --check: they fit the context--> Prompts --PromptSource--> P prompts a step

The columns of a row fill the prompt's template and reach the reward functions by name.
"""

from __future__ import annotations

import bisect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TypeVar, overload

from cispo.errors import UserError
from cispo.recipe.schema import Data, Eval, Recipe, TrainData
from cispo.rollout.messages import messages_of, with_columns
from cispo.rollout.renderer import Renderer, TemplateArgs
from cispo.rollout.rows import load_rows
from cispo.rollout.tables import Row, kinds_of
from cispo.types import Prompt

Say = Callable[[str], None]
"""Shows a warning, one sentence."""

_CHECKED = 20_000
"""Most training prompts that are rendered and tokenised before a run starts: a few seconds."""

_OWN_ARGUMENTS = ("messages", "conversation", "tools", "documents", "tokenize", "chat_template")
"""Names in a chat template that are no free arguments of it."""

_CHARACTERS_PER_TOKEN = 1000
"""A text with more characters for each token of the context is not tokenised: it cannot fit, and takes minutes."""

_NAMED_ROWS = 10
"""Most rows that a sentence names."""


Encoded = TypeVar("Encoded", bound=Sized)


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The prompts of one data source: its rows, and how they become messages."""

    rows: Sequence[Row]
    key: str
    """Recipe key of the source, for errors."""
    source: str = ""
    """Name of the source."""
    template: str | None = None
    system: str | None = None
    args: TemplateArgs = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    """Templates of further columns."""
    drop: bool = False
    """Whether rows that are too long are left out."""
    start: int = 0
    """Id of the first prompt."""

    def prompt(self, row: Row, number: int) -> Prompt:
        """The prompt of row `number`."""
        where = f"{self.key}: row {number}"
        row = with_columns(row, self.columns, where)
        messages = messages_of(row, self.template, self.system, where)
        return Prompt(
            id=self.start + number, messages=messages, columns=row, source=self.source, template_args=self.args
        )


class Prompts(Sequence[Prompt]):
    """The prompts of a recipe section, made from their rows when they are used; an id is a position.

    Up to `_CHECKED` rows are rendered and tokenised at the start; of more, so many evenly spread, and the others when
    they are used (`fits`).
    """

    def __init__(self, parts: Sequence[Part], renderer: Renderer, max_context: int) -> None:
        self.parts, self._renderer, self._max_context = tuple(parts), renderer, max_context
        self._size = sum(len(part.rows) for part in self.parts)
        self.too_long: list[int] = []
        """Ids of prompts known to be too long, of sources that drop those."""
        self.checked = False
        """Whether every prompt is known to fit or not."""

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Prompt]:
        for part in self.parts:
            for number, row in enumerate(part.rows):
                yield part.prompt(row, number)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        part, number = self._place(index % len(self))
        return part.prompt(part.rows[number], number)

    def kinds(self) -> Iterator[Prompt]:
        """Prompts that show, between them, every set of columns of a source, and every column that is null in it."""
        for part in self.parts:
            for number in kinds_of(part.rows):
                yield part.prompt(part.rows[number], number)

    @property
    def drops(self) -> bool:
        """Whether rows that are too long are left out and counted, in one source at least."""
        return any(part.drop for part in self.parts)

    def check(self, say: Say, *, whole: bool = False) -> None:
        """Renders and tokenises the prompts, or a part of a large set unless `whole`.

        UserError for prompts that are empty or, where they are not dropped, leave no room in the context.
        """
        most = self._size if whole else min(self._size, _CHECKED)
        for part in self.parts:
            size = len(part.rows)
            count = -(-most * size // self._size)
            numbers = [i * size // count for i in range(count)]
            some = [part.prompt(row, number) for row, number in zip(_rows_at(part.rows, numbers), numbers, strict=True)]
            renderer = self._renderer.with_args(part.args)
            ids = rendered(some, part.key, renderer, self._max_context, say, numbers=numbers, drop=part.drop)
            over = [part.start + number for number, tokens in zip(numbers, ids, strict=True) if tokens is None]
            if len(over) == size:
                raise UserError(
                    f"{part.key}: all {size:,} rows are too long for rollout.max_context {self._max_context}"
                )
            self.too_long += over
            if part.drop and (over or count < size):
                of = f"{size:,} rows" if count == size else f"{count:,} rows, evenly spread over {size:,},"
                later = "" if count == size else "; the others are checked when they are used"
                say(
                    f"{part.key}: {len(over):,} of {of} leave no room in rollout.max_context {self._max_context} and "
                    f"are left out (overlong: drop){later}"
                )
        self.checked = most == self._size

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt that is about to be used leaves room in the context.

        UserError naming its row where it does not and its source does not drop such rows.
        """
        if self.checked:
            return True  # one that does not is known from the start
        part, number = self._place(prompt.id)
        renderer = self._renderer.with_args(part.args)
        try:
            text = renderer.text(prompt.messages)
        except UserError as error:
            raise UserError(f"{part.key}: row {number}: {error}") from None
        longest = _CHARACTERS_PER_TOKEN * self._max_context
        ids = fitting(
            [text if len(text) <= longest else None],
            renderer.encode_prompts,
            self._max_context,
            part.key,
            numbers=[number],
            drop=part.drop,
        )
        if ids[0] == []:
            raise UserError(f"{part.key}: row {number} makes an empty prompt")
        return ids[0] is not None

    def _place(self, index: int) -> tuple[Part, int]:
        part = self.parts[bisect.bisect_right([part.start for part in self.parts], index) - 1]
        return part, index - part.start


def prompts_of(data: Data, key: str, renderer: Renderer, recipe: Recipe, say: Say = warn) -> Prompts:
    """The prompts of a recipe section, each short enough for the context, or to be left out for its length."""
    several = data.sources if isinstance(data, TrainData) else []
    places = [(source, f"{key}.sources.{number}") for number, source in enumerate(several)] or [(data, key)]
    parts: list[Part] = []
    for source, place in places:
        rows = load_rows(source.source, source.split, source.args, source.limit, place, config=source.config)
        start = parts[-1].start + len(parts[-1].rows) if parts else 0
        parts.append(_part_of(source, data, place, rows, start, renderer, recipe))
    prompts = Prompts(parts, renderer, recipe.rollout.max_context)
    prompts.check(say, whole=isinstance(data, Eval))
    return prompts


def _part_of(
    source: Data, data: Data, key: str, rows: Sequence[Row], start: int, renderer: Renderer, recipe: Recipe
) -> Part:
    """A source's own settings, else those of its section, else those of `data`."""
    args = template_args_of(source, data, recipe)
    _check_template_args(args, renderer, key)
    return Part(
        rows=rows,
        key=key,
        source=getattr(source, "name", None) or "",
        template=data.prompt if source.prompt is None else source.prompt,
        system=system_of(source, data, recipe),
        args=args,
        columns={**data.columns, **source.columns},
        drop="drop" in (source.overlong, data.overlong),
        start=start,
    )


def system_of(source: Data, section: Data, recipe: Recipe) -> str | None:
    """The system message of a source: its own, else its section's, else that of the training prompts."""
    given = (source.system, section.system, recipe.data.system if recipe.data else None)
    return next((text for text in given if text is not None), None) or None


def template_args_of(source: Data, section: Data, recipe: Recipe) -> TemplateArgs:
    """The chat template's arguments for a source, found as `system_of` finds its message."""
    given = (source.template_args, section.template_args, recipe.data.template_args if recipe.data else None)
    return next((args for args in given if args is not None), {})


def _check_template_args(args: TemplateArgs, renderer: Renderer, key: str) -> None:
    """Raises UserError for an argument that the chat template does not look at."""
    template, name = renderer.tokenizer.chat_template, renderer.tokenizer.name_or_path
    if args and template is None:
        raise UserError(f"{key}.template_args: the tokenizer of '{name}' has no chat template")
    for argument in args:
        if argument in _OWN_ARGUMENTS or not re.search(rf"\b{re.escape(argument)}\b", str(template)):
            raise UserError(
                f"{key}.template_args: the chat template of '{name}' has no variable '{argument}' "
                f"({key}.template_args={{}} leaves the recipe's arguments out)"
            )


def distinct(prompts: Sequence[Prompt]) -> Iterable[Prompt]:
    """Prompts whose columns stand for those of all: `Prompts.kinds`, or all of a plain list."""
    return prompts.kinds() if isinstance(prompts, Prompts) else prompts


def _rows_at(rows: Sequence[Row], numbers: Sequence[int]) -> Iterable[Row]:
    return rows if len(numbers) == len(rows) else (rows[number] for number in numbers)


def prompt_ids(prompts: Sequence[Prompt], key: str, renderer: Renderer, recipe: Recipe, say: Say) -> list[list[int]]:
    """The rendered prompts. UserError for those that are empty or leave no room in the context for a further token."""
    ids = rendered(prompts, key, renderer, recipe.rollout.max_context, say, numbers=range(len(prompts)), drop=False)
    return [tokens for tokens in ids if tokens is not None]


def rendered(
    prompts: Sequence[Prompt],
    key: str,
    renderer: Renderer,
    max_context: int,
    say: Say,
    *,
    numbers: Sequence[int],
    drop: bool,
) -> list[list[int] | None]:
    """The rendered prompts of the rows `numbers`, None for those that are too long and dropped."""
    longest = _CHARACTERS_PER_TOKEN * max_context
    texts = renderer.texts([prompt.messages for prompt in prompts], longest, f"{key}: row", numbers)
    ids = fitting(texts, renderer.encode_prompts, max_context, key, numbers=numbers, drop=drop)
    empty = next((number for number, tokens in zip(numbers, ids, strict=True) if tokens == []), None)
    if empty is not None:
        raise UserError(f"{key}: row {empty} makes an empty prompt")
    warn_of_lacking([text for text in texts if text is not None], f"{key}: {{}} prompts", renderer, say)
    return ids


def fitting(
    texts: Sequence[Encoded | None],
    encode: Callable[[Sequence[Encoded]], list[list[int]]],
    context: int,
    key: str,
    *,
    before: Sequence[int] | None = None,
    size_of: Callable[[Encoded], int] = len,
    numbers: Sequence[int] | None = None,
    drop: bool = False,
) -> list[list[int] | None]:
    """The token ids of one text a row, each with `before` tokens in front of it; None is a text that is too long.

    `encode` gets the texts that are short enough to be tokenised, all at once. `numbers` are the rows' for errors,
    `size_of` a text is in characters. UserError naming the rows that leave no room in the `context` for a further
    token; with `drop`, None in their place.
    """
    numbers = range(len(texts)) if numbers is None else numbers
    most = _CHARACTERS_PER_TOKEN * context
    short = [text is not None and size_of(text) <= most for text in texts]
    encoded = iter(encode([text for text, use in zip(texts, short, strict=True) if use and text is not None]))
    ids = [next(encoded) if use else None for use in short]
    lengths = [most + 1 if tokens is None else len(tokens) for tokens in ids]
    sizes = [length + more for length, more in zip(lengths, before or [0] * len(lengths), strict=True)]
    over = [row for row, size in enumerate(sizes) if size > context - 1]
    if drop:
        return [None if size > context - 1 else tokens for size, tokens in zip(sizes, ids, strict=True)]
    if not over:
        return ids
    longest = max(over, key=lambda row: sizes[row])
    size = f"over {most:,} characters" if ids[longest] is None else f"{sizes[longest]:,} tokens"
    rows = ", ".join(str(numbers[row]) for row in over[:_NAMED_ROWS]) + (" ..." if len(over) > _NAMED_ROWS else "")
    raise UserError(
        f"{key}: {len(over):,} of {len(sizes):,} rows are too long: rollout.max_context {context} leaves room for "
        f"{context - 1} tokens, row {numbers[longest]} has {size} (too long: {rows})"
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


def build_prompts(rows: Sequence[Row], template: str | None, key: str, *, system: str | None = None) -> list[Prompt]:
    """One prompt a row; its id is the row's position.

    The messages are `template` filled with the columns as one user message if there is one, else the column `messages`,
    else the column `prompt` (text or messages), behind the `system` message where the row has none. UserError names the
    column that is missing, null or of the wrong type, and the messages that end with the policy's own turn.
    """
    part = Part(rows=rows, key=key, template=template, system=system)
    return [part.prompt(row, number) for number, row in enumerate(rows)]
