"""Between messages and token ids: the one place where text is tokenised.

    messages --render--> prompt ids --engine--> sampled ids --decode--> text for rewards and logs

Sampled tokens are never tokenised again: training uses the ids of the engine.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import UserError
from cispo.files import write_json
from cispo.recipe.schema import Recipe
from cispo.rollout.template import reason_of, render_bounded
from cispo.types import Message
from cispo.user_code import is_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, object]]
"""Tools of the policy in JSON schema."""

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_GENERATION = "generation_config.json"

# Classes fully described by tokenizer.json: loading them by name spares the import of AutoTokenizer (and of torch).
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


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
        self.highest_id = self.eos_ids[0]
        """The highest token id rendered so far: it must be below the policy's vocabulary size."""
        bos = tokenizer.bos_token_id
        # Some tokenizers add their bos by a flag, others by a post-processor: only an encoded text tells.
        self._prefix = [bos] if isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos] else []

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The prompt as token ids, up to the beginning of the policy's turn."""
        return self.encode_prompt(self._templated(messages, tools))

    def extend(self, messages: Sequence[Message], reply: Sequence[int], tools: Tools = ()) -> list[int]:
        """The tokens between a sampled reply and the next one, which answers `messages`.

        `reply` ends with an end-of-sequence token. The tokens are the difference of two renderings of a conversation
        made up for it, behind the end of the policy's turn: nothing that was sampled is tokenised again. Raises
        UserError where the template does not render a conversation as a prefix of its continuation.
        """
        if self.tokenizer.chat_template is None:
            return self._encode("".join(map(_content, messages)))
        made_up = [{"role": "user", "content": "?"}, _policy_turn(messages)]
        before = self._templated(made_up, tools, generate=False)
        after = self._templated([*made_up, *messages], tools)
        ends = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.eos_ids]
        end = max(ends, key=lambda text: before.rfind(text))
        place = before.rfind(end)
        if place < before.find(_ANSWER) or not after.startswith(before[: place + len(end)]):
            raise UserError(
                f"the chat template of '{self.tokenizer.name_or_path}' does not continue a conversation: it renders "
                "the policy's turn differently once messages follow it"
            )
        # Where another end was sampled, the template's own still closes the turn.
        sampled = str(self.tokenizer.convert_ids_to_tokens(reply[-1]))
        return self._encode(after[place + len(end) if sampled == end else place :])

    def _templated(self, messages: Sequence[Message], tools: Tools, *, generate: bool = True) -> str:
        try:
            return self._text(messages, tools, generate=generate)
        except UserError:
            raise
        # A template may raise anything.
        except Exception as error:
            raise UserError(f"the chat template of '{self.tokenizer.name_or_path}' {reason_of(error)}") from error

    def texts(self, conversations: Sequence[Sequence[Message]], longest: int, where: str) -> list[str | None]:
        """The texts that `encode_prompt` takes, with a chat template's time and memory bounded.

        None stands for a text of over `longest` characters. UserError names the first conversation N that fails as
        `where` N.
        """
        if self.tokenizer.chat_template is not None:
            name = self.tokenizer.name_or_path
            return render_bounded(self._text, conversations, longest=longest, name=name, where=where)
        texts: list[str | None] = []
        for messages in conversations:
            try:
                texts.append(self._text(messages))
            except UserError as error:
                raise UserError(f"{where} {len(texts)}: {error}") from None
        return texts

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of vocabulary, chat template and end tokens: renderers with an equal one render alike."""
        parts = [self.tokenizer.chat_template, self.eos_ids, sorted(self.tokenizer.get_vocab().items())]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a prompt's text; a template has written the special tokens."""
        prefix = self._prefix if self.tokenizer.chat_template is None else []
        return prefix + self._encode(text)

    def encode_completion(self, text: str) -> list[int]:
        """The token ids of a demonstration, which ends with the end-of-sequence token."""
        return [*self._encode(text), self.eos_ids[0]]

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
        named: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        text = str(
            self.tokenizer.apply_chat_template(conversation, add_generation_prompt=generate, tokenize=False, **named)
        )
        contents = [message.get("content") for message in messages]
        if any(not isinstance(content, str) and content and str(content) in text for content in contents):
            raise TypeError("it takes the content of a message for text, where the prompt has a list of parts")
        return text

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a text holds {text[error.start]!r}, half of a character (a lone surrogate)") from None
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.highest_id = max(self.highest_id, max(ids, default=0))
        return ids


# The policy's turn of a made-up conversation; no template writes such a text itself.
_ANSWER = "an answer of 4711 words"


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
        if folder.is_dir() and (folder / "tokenizer.json").exists() and _class_name(folder) in _PLAIN_CLASSES:
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
