"""A task with thoughts between tool calls for two cores: walk along a hidden table, and add up digits on the way.

    user "3d?"    <think>30</think> get(d)    tool "r4"      a thought: hops left, and the sum so far without its tens
                  <think>24</think> get(r)    tool "p9"
                  <think>13</think> get(p)    tool "k5"
                  <think>08</think>k                         the key that was reached
    user "sum?"   <think>08</think>8

A user message in the middle of the attempt: a template such as MiniMax-M2's drops the thoughts there, so that the sum
is to be found again from the tools' answers, and with `env.thinking: drop` at every turn.

    problems         {"prompt": "3d?", "answer": "8", "table": "...", "digits": "...", "key": "k"}
    demonstrations   the same conversations by an imperfect teacher, with the thoughts in the history and without them

The splits "train" and "test" are disjoint by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from string import ascii_lowercase

from cispo.agents.contract import Reply, Step
from cispo.rollout.rows import in_split
from cispo.types import Message

_HOPS = 4
_QUESTION = "sum?"


class Errand:
    """The environment of one attempt."""

    def __init__(self, table: str, digits: str, key: str) -> None:
        """`table` and `digits` have the successor and the digit of each letter, in order."""
        self.table, self.digits, self.key = table, digits, key
        self.arrived = False

    def step(self, reply: Reply) -> Step | None:
        if reply.calls:
            answers = [{"role": "tool", "content": self._found(call.arguments.get("key"))} for call in reply.calls]
            return Step(observation=answers)
        if self.arrived or reply.content.strip() != self.key:
            return None
        self.arrived = True
        return Step(observation=_QUESTION)

    def _found(self, key: object) -> str:
        number = ascii_lowercase.find(key) if isinstance(key, str) and len(key) == 1 else -1
        return "!" if number < 0 else self.table[number] + self.digits[number]


def solved(completion: str, answer: str, **_: object) -> float:
    """1.0 where the last reply, behind its thought, is the sum; an attempt that ended at the key has a letter there."""
    return float(completion.rpartition("</think>")[2].strip() == answer)


def problems(size: int, seed: int, split: str = "train") -> Iterator[dict[str, str]]:
    """`size` problems of 1 to 4 hops; the same seed gives the same problems."""
    rng = Random(seed)
    while size > 0:
        table, digits = "".join(rng.choices(ascii_lowercase, k=26)), "".join(rng.choices("0123456789", k=26))
        hops, start = rng.randint(1, _HOPS), rng.choice(ascii_lowercase)
        if in_split(f"{hops}{start}{table}{digits}", split):
            walk = _walk(table, digits, start, hops)
            total = str(sum(digit for _, digit in walk) % 10)
            key = walk[-1][0]
            yield {"prompt": f"{hops}{start}?", "answer": total, "table": table, "digits": digits, "key": key}
            size -= 1


def demonstrations(size: int, seed: int, noise: float = 0.5) -> Iterator[dict[str, object]]:
    """`size` rows of a teacher that takes a wrong sum at a random turn in a share `noise` of its conversations.

    Each conversation gives one row with all of its thoughts, and one for each later turn with the history's thoughts
    removed: one policy then knows the formats of all values of `env.thinking`.
    """
    rng = Random(f"teacher {seed}")
    rows = (row for problem in problems(size, seed) for row in _rows(problem, rng, noise))
    for _, row in zip(range(size), rows, strict=False):
        yield row


def _rows(problem: dict[str, str], rng: Random, noise: float) -> Iterator[dict[str, object]]:
    hops, start = int(problem["prompt"][0]), problem["prompt"][1]
    walk = _walk(problem["table"], problem["digits"], start, hops)
    wrong = rng.randrange(hops + 2) if rng.random() < noise else -1
    asked: Message = {"role": "user", "content": problem["prompt"]}
    whole, bare, replies = list[Message](), [asked], list[str]()
    total = 0
    for number, key in enumerate([start, *(found for found, _ in walk)]):
        if number == wrong:
            total = (total + rng.randint(1, 9)) % 10
        thought = f"{hops - number}{total}"
        call = key if number < hops else None
        replies.append(_reply(thought, "" if call else key, call))
        whole.append({"role": "assistant", "content": replies[-1]})
        if number:
            yield {"prompt": list(bare), "completion": replies[-1]}
        if call is not None:
            found, digit = walk[number]
            said: Message = {"role": "tool", "content": f"{found}{digit}"}
            total = (total + digit) % 10
            bare += [{"role": "assistant", "content": "", "tool_calls": [_call(call)]}, said]
        else:
            said = {"role": "user", "content": _QUESTION}
            bare += [{"role": "assistant", "content": key}, said]
        whole.append(said)
    if wrong == hops + 1:
        total = (total + rng.randint(1, 9)) % 10
    last = _reply(f"0{total}", str(total), None)
    yield {"prompt": list(bare), "completion": last}
    yield {"prompt": [asked], "completion": [*whole, {"role": "assistant", "content": last}]}


def _reply(thought: str, content: str, key: str | None) -> str:
    """A reply behind the `<think>` that the template has written."""
    call = "" if key is None else _CALL.format(key=key)
    return f"{thought}</think>{content}{call}"


_CALL = '<minimax:tool_call><invoke name="get"><parameter name="key">{key}</parameter></invoke></minimax:tool_call>'


def _call(key: str) -> dict[str, object]:
    return {"id": "call_0", "type": "function", "function": {"name": "get", "arguments": {"key": key}}}


def _walk(table: str, digits: str, start: str, hops: int) -> Sequence[tuple[str, int]]:
    """The keys behind `start`, each with the digit found on the way to it."""
    found, key = list[tuple[str, int]](), start
    for _ in range(hops):
        number = ascii_lowercase.index(key)
        key = table[number]
        found.append((key, int(digits[number])))
    return found
