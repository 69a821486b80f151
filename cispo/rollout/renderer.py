"""Between messages and token ids: the one place where text is tokenised.

    messages --render--> prompt ids --engine--> sampled ids --decode--> text for rewards and logs

Sampled tokens are never tokenised again: training uses the ids of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import UserError
from cispo.recipe.schema import Recipe
from cispo.types import Message
from cispo.user_code import is_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Classes fully described by tokenizer.json: loading them by name spares the import of AutoTokenizer (and of torch).
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


class Renderer:
    """Renders with a tokenizer's chat template or, where it has none, by concatenating the messages' contents.

    Example: Renderer(load_tokenizer("recipes/tokenizers/chars")).render([{"role": "user", "content": "2,1>"}])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """UserError when the tokenizer has no end-of-sequence token: no completion would end."""
        self.tokenizer = tokenizer
        self.eos_ids = _eos_ids(tokenizer)
        bos = tokenizer.bos_token_id
        # Some tokenizers add their bos by a flag, others by a post-processor: only an encoded text tells.
        self._prefix = [bos] if isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos] else []

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The prompt as token ids, up to the beginning of the policy's turn."""
        if self.tokenizer.chat_template is not None:
            from jinja2 import TemplateError

            # Any: transformers declares string values alone, though contents may be lists.
            conversation: list[dict[str, Any]] = [dict(message) for message in messages]
            try:
                text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            except TemplateError as error:
                name = self.tokenizer.name_or_path
                raise UserError(f"the chat template of '{name}' refuses a prompt: {error}") from error
            # The template writes the special tokens.
            return self._encode(str(text))
        return self._prefix + self._encode("".join(_content(message) for message in messages))

    def render_demonstration(self, messages: Sequence[Message], completion: str) -> tuple[list[int], list[int]]:
        """(prompt, completion) as token ids; the completion ends with the end-of-sequence token."""
        return self.render(messages), [*self._encode(completion), self.eos_ids[0]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def renderer_of(recipe: Recipe) -> Renderer:
    """The renderer of the policy's tokenizer: policy.tokenizer, else the one of policy.model."""
    folder = recipe.policy.tokenizer or recipe.policy.model
    assert folder is not None
    return Renderer(load_tokenizer(folder))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a model on the hub; UserError when there is none."""
    folder = Path(path)
    if not folder.is_dir() and not is_hub_id(str(path)):
        raise UserError(f"the tokenizer folder '{path}' does not exist")
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"the tokenizer folder '{path}' holds no tokenizer.json")
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


def _class_name(folder: Path) -> object:
    config = folder / "tokenizer_config.json"
    return _read_object(config).get("tokenizer_class", "") if config.exists() else ""


def _eos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence token first, then the others that its folder's generation_config.json names."""
    folder, eos = tokenizer.name_or_path, tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError(f"the tokenizer of '{folder}' has no eos token, so no completion would end")
    generation = Path(folder) / "generation_config.json"
    listed = _read_object(generation).get("eos_token_id") if generation.exists() else None
    others: list[int] = listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else []
    return tuple(dict.fromkeys([eos, *others]))


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _content(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, str):
        raise UserError(f"a message holds {type(content).__name__} where a tokenizer without chat template needs text")
    return content
