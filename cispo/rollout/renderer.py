"""Between messages and token ids: the one place where text is tokenised (`encoding`).

    messages --render--> prompt ids --engine--> sampled ids --decode--> text for rewards and logs

Sampled tokens are never tokenised again: training uses the ids of the engine.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import UserError
from cispo.files import write_json
from cispo.recipe.schema import Recipe
from cispo.recipe.user_code import is_hub_id
from cispo.rollout.encoding import PLAIN_CLASSES, TextEncoder
from cispo.rollout.template import reason_of, render_bounded
from cispo.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, object]]
"""Tools of the policy in JSON schema."""

TemplateArgs = Mapping[str, object]
"""Further arguments of the chat template, such as enable_thinking."""

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_GENERATION = "generation_config.json"


class Renderer:
    """Renders with a tokenizer's chat template or, where it has none, by concatenating the messages' contents.

    Example: Renderer(load_tokenizer("recipes/tokenizers/chars")).render([{"role": "user", "content": "2,1>"}])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> None:
        """`model` is the policy's folder or hub id, where that is not the tokenizer's.

        UserError when the tokenizer has no end-of-sequence token: no completion would end.
        """
        self.tokenizer = tokenizer
        sources = dict.fromkeys(filter(None, [model, tokenizer.name_or_path]))
        configs = [generation_config(source) for source in sources]
        self._generation = next(filter(None, configs), {})
        self.eos_ids = _eos_ids(tokenizer, configs)
        self._encoder = TextEncoder(tokenizer, highest_id=self.eos_ids[0])
        self._template_args: TemplateArgs = {}
        bos = tokenizer.bos_token_id
        # Some tokenizers add their bos by a flag, others by a post-processor: only an encoded text tells.
        self._prefix = [bos] if isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos] else []

    @property
    def highest_id(self) -> int:
        """The highest token id rendered so far: it must be below the policy's vocabulary size."""
        return self._encoder.highest_id

    def with_args(self, args: TemplateArgs) -> Renderer:
        """This renderer with further arguments of its chat template; they share `highest_id`."""
        if args == self._template_args:
            return self
        renderer = copy.copy(self)
        renderer._template_args = args
        # A cached answer about the template holds for its arguments alone.
        for name in [name for name, value in vars(type(self)).items() if isinstance(value, functools.cached_property)]:
            renderer.__dict__.pop(name, None)
        return renderer

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt as token ids, up to the beginning of the policy's turn."""
        return self.encode_prompt(self.text(messages, tools))

    def text(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """The prompt as the text that `encode_prompt` takes. UserError where the chat template fails."""
        return self._templated(messages, tools)

    def extend(self, messages: Sequence[Message], reply: Sequence[int], tools: Tools = ()) -> list[int]:
        """The tokens between a sampled reply and the next one, which answers `messages`.

        `reply` ends with an end-of-sequence token. The tokens are those that the template writes behind the end of the
        policy's turn in a conversation made up for it: nothing that was sampled is tokenised again. Raises UserError
        where the template does not show the policy's turn once messages follow it, or shows no end of it.
        """
        if self.tokenizer.chat_template is None:
            return self._contents(messages)
        before, after = self._made_up(messages, tools)
        if _ANSWER not in before or _ANSWER not in after:
            raise self._discontinuous()
        closed, behind = before[before.rfind(_ANSWER) :], after[after.rfind(_ANSWER) :]
        ends = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.eos_ids]
        place, end = _first(ends, behind)
        # A turn may end with the mark of the role that follows: then the policy's turn alone shows no end.
        if not end or behind[:place].strip() != closed[: _first(ends, closed)[0]].strip():
            raise self._discontinuous()
        # Where another end was sampled, the template's own still closes the turn.
        sampled = str(self.tokenizer.convert_ids_to_tokens(reply[-1]))
        return self.encode_text(behind[place + len(end) if sampled == end else place :])

    def render_history(self, messages: Sequence[Message], tools: Tools = (), plain: int = 0) -> list[int]:
        """A conversation with past replies as token ids; without a template, each reply has its end token.

        The first `plain` messages are a prompt, as `render` has it.
        """
        if self.tokenizer.chat_template is None:
            return self._prefix + self._contents(messages, plain)
        return self.render(messages, tools)

    def keeps_thought(self, messages: Sequence[Message], tools: Tools = ()) -> bool:
        """Whether the template still shows the thought of a reply once `messages` follow it; True without one."""
        if self.tokenizer.chat_template is None:
            return True
        return _THOUGHT in self._made_up(messages, tools)[1]

    def thought_fields(self, thought: str, content: str) -> dict[str, object]:
        """The fields of a message in which the template takes a thought: its own field, else the content."""
        return {"reasoning_content": thought} if self._has_thought_field else {"content": _inline(thought, content)}

    @functools.cached_property
    def _has_thought_field(self) -> bool:
        asked = [{"role": "user", "content": "?"}]
        said = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT}
        return _THOUGHT in self._templated([*asked, said], (), generate=False)

    def _made_up(self, messages: Sequence[Message], tools: Tools) -> tuple[str, str]:
        """Texts of a conversation with one reply, alone and with `messages` behind it."""
        turn = {**_policy_turn(messages), **self.thought_fields(_THOUGHT, _ANSWER)}
        conversation = [{"role": "user", "content": "?"}, turn]
        before = self._templated(conversation, tools, generate=False)
        return before, self._templated([*conversation, *messages], tools)

    def _discontinuous(self) -> UserError:
        return UserError(
            f"the chat template of '{self.tokenizer.name_or_path}' does not continue a conversation: it renders "
            "the policy's turn differently once messages follow it"
        )

    def _contents(self, messages: Sequence[Message], plain: int = 0) -> list[int]:
        """The contents in a row, replies of the policy behind the first `plain` messages with an end token."""
        replies = [n >= plain and message["role"] == "assistant" for n, message in enumerate(messages)]
        ids: list[int] = []
        for reply, run in itertools.groupby(zip(replies, messages, strict=True), lambda pair: pair[0]):
            contents = [_content(message) for _, message in run]
            if reply:
                ids += [token for content in contents for token in self.encode_completion(content)]
            else:
                ids += self.encode_text("".join(contents))
        return ids

    def _templated(self, messages: Sequence[Message], tools: Tools, *, generate: bool = True) -> str:
        try:
            return self._text(messages, tools, generate=generate)
        except UserError:
            raise
        # A template may raise anything.
        except Exception as error:
            raise UserError(f"the chat template of '{self.tokenizer.name_or_path}' {reason_of(error)}") from error

    def texts(
        self,
        conversations: Sequence[Sequence[Message]],
        longest: int,
        where: str,
        numbers: Sequence[int] | None = None,
    ) -> list[str | None]:
        """The texts that `encode_prompt` takes, with a chat template's time and memory bounded.

        None stands for a text of over `longest` characters. UserError names the first conversation that fails as
        `where` N, N being its entry of `numbers`, its position without them.
        """
        numbers = range(len(conversations)) if numbers is None else numbers
        if self.tokenizer.chat_template is not None:
            name = self.tokenizer.name_or_path
            return render_bounded(self._text, conversations, longest=longest, name=name, where=where, numbers=numbers)
        texts: list[str | None] = []
        for messages in conversations:
            try:
                texts.append(self._text(messages))
            except UserError as error:
                raise UserError(f"{where} {numbers[len(texts)]}: {error}") from None
        return texts

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of vocabulary, chat template and end tokens: renderers with an equal one render alike."""
        parts = [self.tokenizer.chat_template, self.eos_ids, sorted(self.tokenizer.get_vocab().items())]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a prompt's text; a template has written the special tokens."""
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_prompt` of each text, faster than one by one."""
        prefix = self._prefix if self.tokenizer.chat_template is None else []
        return [prefix + ids for ids in self._encoder.encode_all(texts)]

    def encode_completions(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_completion` of each text, faster than one by one."""
        return [[*ids, self.eos_ids[0]] for ids in self._encoder.encode_all(texts)]

    def encode_completion(self, text: str) -> list[int]:
        """The token ids of a demonstration, which ends with the end-of-sequence token."""
        return self.encode_completions([text])[0]

    def render_demonstration(self, messages: Sequence[Message], completion: str) -> tuple[list[int], list[int]]:
        """(prompt, completion) as token ids."""
        return self.render(messages), self.encode_completion(completion)

    def decode_reply(self, token_ids: Sequence[int]) -> str:
        """The text of a completion with special tokens, which mark thoughts and calls, but for the one that ends it."""
        own = list(token_ids[:-1]) if token_ids and token_ids[-1] in self.eos_ids else list(token_ids)
        text = self.tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def lacks(self, character: str) -> bool:
        """Whether the tokenizer has no id for a character: it leaves it out, or takes the one of unknown text."""
        ids = self.tokenizer.encode(character, add_special_tokens=False)
        return self.tokenizer.unk_token_id in ids or not (ids or character.isspace())

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer with its chat template, and a generation_config.json with the ends of completions."""
        self.tokenizer.save_pretrained(str(folder))
        own = {"bos_token_id": self.tokenizer.bos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        values = {
            **{k: v for k, v in own.items() if v is not None},
            **self._generation,
            "eos_token_id": [*self.eos_ids],
        }
        write_json(Path(folder) / _GENERATION, values)

    def _text(self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            return "".join(_content(message) for message in messages)
        # Any: transformers declares string values alone, though contents may be lists.
        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        named: dict[str, Any] = {**self._template_args}
        named |= {"tools": [dict(tool) for tool in tools]} if tools else {}
        text = str(
            self.tokenizer.apply_chat_template(conversation, add_generation_prompt=generate, tokenize=False, **named)
        )
        contents = [message.get("content") for message in messages]
        if any(not isinstance(content, str) and content and str(content) in text for content in contents):
            raise TypeError("it takes the content of a message for text, where the prompt has a list of parts")
        return text

    def encode_text(self, text: str) -> list[int]:
        """The token ids of a text within a sequence. Raises UserError for a lone surrogate."""
        return self._encoder.encode(text)


# The policy's turn of a made-up conversation; no template writes such texts itself.
_ANSWER = "an answer of 4711 words"
_THOUGHT = "a thought of 4712 words"


def _first(ends: Sequence[str], text: str) -> tuple[int, str]:
    """Place of the first end in a text, and which one; (length of the text, "") without one."""
    return min(((text.find(end), end) for end in ends if end in text), default=(len(text), ""))


def _inline(thought: str, content: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{content}"


def _policy_turn(messages: Sequence[Message]) -> Message:
    """A turn of the policy that `messages` may follow: with a call for each tool message."""
    calls = [
        {
            "id": message.get("tool_call_id", "call_0"),
            "type": "function",
            "function": {"name": message.get("name", "tool"), "arguments": {}},
        }
        for message in messages
        if message["role"] == "tool"
    ]
    turn = {"role": "assistant", "content": _ANSWER}
    return {**turn, "tool_calls": calls} if calls else turn


def renderer_of(recipe: Recipe) -> Renderer:
    """The renderer of the policy's tokenizer: policy.tokenizer, else the one of policy.model."""
    folder = recipe.policy.tokenizer or recipe.policy.model
    assert folder is not None
    return Renderer(load_tokenizer(folder), recipe.policy.model)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the hub; UserError when there is none."""
    folder = Path(path)
    if not folder.is_dir() and not is_hub_id(str(path)):
        raise UserError(f"the tokenizer folder '{path}' does not exist")
    if folder.is_dir() and not has_tokenizer(folder):
        raise UserError(f"the tokenizer folder '{path}' holds no tokenizer.json")
    for file in folder.iterdir() if folder.is_dir() else []:
        if not file.is_dir() and file.exists() and not file.is_file():
            raise UserError(f"'{file}' is not a regular file")  # a pipe would block for ever
    try:
        if folder.is_dir() and (folder / "tokenizer.json").exists() and _class_name(folder) in PLAIN_CLASSES:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(path))
        from transformers import AutoTokenizer

        # Code in a tokenizer's folder is never run, and the user is not asked.
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    # `tokenizers` raises a bare Exception for a tokenizer.json that it cannot read.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load the tokenizer of '{path}': {reason:.300}") from error


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZER)


def _class_name(folder: Path) -> object:
    config = folder / "tokenizer_config.json"
    return _read_object(config).get("tokenizer_class", "") if config.exists() else ""


def _eos_ids(tokenizer: PreTrainedTokenizerBase, configs: Sequence[Mapping[str, object]]) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence token first, then the others that a `generation_config` names."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError(f"the tokenizer of '{tokenizer.name_or_path}' has no eos token, so no completion would end")
    named = [config.get("eos_token_id") for config in reversed(configs)]
    listed = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys([eos, *(token for token in listed if type(token) is int and token >= 0)]))


def generation_config(source: str) -> dict[str, Any]:
    """The generation_config.json of a folder or of a model on the hub, {} where it has none.

    Without the file, a list of ends in config.json counts, as it does for transformers. A single one does not: most
    files have there the default of the model's class, which may be any token of another tokenizer.
    """
    file = _file_of(source, _GENERATION)
    if file is not None:
        return _read_object(file)
    config = _file_of(source, "config.json")
    eos = _read_object(config).get("eos_token_id") if config is not None else None
    return {"eos_token_id": eos} if isinstance(eos, list) else {}


def _file_of(source: str, name: str) -> Path | None:
    """A file in a folder or of a model on the hub (from its cache, or fetched); None where it does not exist."""
    if Path(source).is_dir() or not is_hub_id(source):
        file = Path(source) / name
        return file if file.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(source, name))
    # OSError: no connection, and not in the cache.
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"'{path}' is not a regular file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _content(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, str):
        raise UserError(f"a message holds {type(content).__name__} where a tokenizer without chat template needs text")
    return content
