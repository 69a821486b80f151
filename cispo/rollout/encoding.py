"""Texts to token ids: one at a time, or many at once with all cores.

tokenizer of transformers --> the one of tokenizer.json behind it, if it adds nothing to that: four times as fast
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cispo.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Classes fully described by tokenizer.json: loading them by name spares the import of AutoTokenizer (and of torch).
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")

# Texts that are tokenised at once: a token takes about 100 bytes until its text's ids are read.
_BATCH = 4096
_BATCH_CHARACTERS = 1 << 20


class TextEncoder:
    """Token ids of texts within a sequence, without special tokens of their own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, highest_id: int) -> None:
        self.highest_id = highest_id
        """The highest token id encoded so far."""
        self._tokenizer, self._plain = tokenizer, _plain(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a lone surrogate."""
        _check_characters(text)
        if self._plain is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = self._plain.encode(text, add_special_tokens=False).ids
        self.highest_id = max(self.highest_id, max(ids, default=0))
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in batches that use all cores and leave the GIL to other threads."""
        if self._plain is None or len(texts) < 2:
            return [self.encode(text) for text in texts]
        found: list[list[int]] = []
        for batch in _batches(texts):
            for text in batch:
                _check_characters(text)
            encodings = self._plain.encode_batch_fast(batch, add_special_tokens=False)
            found += [encoding.ids for encoding in encodings]
        self.highest_id = max(self.highest_id, max(map(max, filter(None, found)), default=0))
        return found


def _plain(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of tokenizer.json, if that is all of it."""
    if type(tokenizer).__name__ not in PLAIN_CLASSES or getattr(tokenizer, "split_special_tokens", False):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None or backend.truncation or backend.padding else backend


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a text holds {text[error.start]!r}, half of a character (a lone surrogate)") from None


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in batches of at most `_BATCH` of them, which end with the text that makes `_BATCH_CHARACTERS`."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
