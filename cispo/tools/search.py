"""A tool that ships: full-text search over a folder of text files, without a server.

    folder --> passages of at most 120 words --> inverted index --BM25--> the best passages as text

A process reads a folder once. Files are read in the order of their names, and of equal scores the earlier passage
wins, so that a query has one answer.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cispo.errors import UserError

_SUFFIXES = (".txt", ".md", ".rst")
_PASSAGE_WORDS = 120
_WORD = re.compile(r"\w+")

_K1 = 1.2
_B = 0.75

_reading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Passage:
    file: str
    """Relative to the folder."""
    text: str


def search(query: str, *, folder: str, top: int = 3) -> str:
    """Searches a collection of texts and returns the passages that fit best.

    Args:
        query: words to look for
    """
    with _reading:
        index = _index_of(folder)
    found = [index.passages[number] for number in index.best(query, top)]
    return "\n\n".join(f"[{p.file}] {p.text}" for p in found) or "nothing found"


class Index:
    """BM25 (Robertson and Zaragoza 2009, eq. 3.15) with the idf of Lucene, log(1 + (N - n + 0.5) / (n + 0.5)), which
    is never negative.

    score(q, d) = sum over words w of q of  idf(w) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|)),  f the count in d
    """

    def __init__(self, passages: list[Passage]) -> None:
        self.passages = passages
        self._places = defaultdict[str, list[tuple[int, int]]](list)
        """Word -> (passage, count)."""
        self._lengths: list[int] = []
        for number, passage in enumerate(passages):
            words = Counter(words_of(passage.text))
            self._lengths.append(words.total())
            for word, count in words.items():
                self._places[word].append((number, count))
        self._mean = sum(self._lengths) / max(len(self._lengths), 1)

    def scores(self, query: str) -> dict[int, float]:
        """Score of each passage that has a word of the query."""
        scores = defaultdict[int, float](float)
        for word, times in Counter(words_of(query)).items():
            places = self._places.get(word, [])
            idf = math.log(1 + (len(self.passages) - len(places) + 0.5) / (len(places) + 0.5))
            for number, count in places:
                norm = _K1 * (1 - _B + _B * self._lengths[number] / self._mean)
                scores[number] += times * idf * count * (_K1 + 1) / (count + norm)
        return scores

    def best(self, query: str, top: int) -> list[int]:
        """Numbers of the `top` passages by falling score."""
        scores = self.scores(query)
        return sorted(scores, key=lambda number: (-scores[number], number))[:top]


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def passages_of(text: str, file: str) -> Iterator[Passage]:
    """Paragraphs, the short ones joined and the long ones cut, to at most 120 words each."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if held and len(held) + len(words) > _PASSAGE_WORDS:
            yield Passage(file, " ".join(held))
            held = []
        held += words
        while len(held) > _PASSAGE_WORDS:
            yield Passage(file, " ".join(held[:_PASSAGE_WORDS]))
            held = held[_PASSAGE_WORDS:]
    if held:
        yield Passage(file, " ".join(held))


@functools.cache
def _index_of(folder: str) -> Index:
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"tools.search: the folder '{folder}' (env.args.folder) does not exist")
    passages: list[Passage] = []
    for file in sorted(f for f in root.rglob("*") if f.suffix in _SUFFIXES and f.is_file()):
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"tools.search: cannot read '{file}': {error.strerror}") from None
        passages += passages_of(text, str(file.relative_to(root)))
    if not passages:
        raise UserError(f"tools.search: the folder '{folder}' has no text in {', '.join(_SUFFIXES)} files")
    return Index(passages)
