"""A task with thoughts between tool calls for two cores: walk along a hidden table, and add up digits on the way.

    user "2d?"       <think>20</think> get(d)    tool "r2"      a thought: hops left, and the sum so far modulo 3
                     <think>12</think> get(r)    tool "p2"
                     <think>01</think>p                         the key that was reached
    user "+1 sum?"   <think>11</think> get(p)    tool "k1"      one hop on, and the sum of all digits
                     <think>02</think>2

With its last thought in the history, a reply adds one digit. A template such as MiniMax-M2's drops the thoughts at the
user message, so that the sum before it is to be found again from the tools' answers; with `env.thinking: drop` each
reply has to add up all of them at once.

    problems         {"prompt": "2d?", "answer": "2", "table": "...", "digits": "...", "key": "p"}
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

_HOPS = 3
_MODULUS = 3
_QUESTION = "+1 sum?"


class Errand:
    """The environment of one attempt."""

    def __init__(self, table: str, digits: str, key: str) -> None:
        """`table` and `digits` have the successor and the digit of each letter, in order; `key` answers the prompt."""
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
    """`size` problems of 1 to 3 hops and one more; the same seed gives the same problems."""
    rng = Random(seed)
    while size > 0:
        table, digits = "".join(rng.choices(ascii_lowercase, k=26)), "".join(rng.choices("012", k=26))
        hops, start = rng.randint(1, _HOPS), rng.choice(ascii_lowercase)
        if in_split(f"{hops}{start}{table}{digits}", split):
            walk = _walk(table, digits, start, hops + 1)
            total = str(sum(digit for _, digit in walk) % _MODULUS)
            key = walk[-2][0]
            yield {"prompt": f"{hops}{start}?", "answer": total, "table": table, "digits": digits, "key": key}
            size -= 1


def demonstrations(size: int, seed: int, noise: float = 0.5) -> Iterator[dict[str, object]]:
    """`size` rows of a teacher that takes a wrong sum at a random turn in a share `noise` of its conversations.

    Each conversation gives a row with all of its thoughts; the part behind the second question, without the thoughts
    before it; and one later reply without any past thought. One policy then knows the history's forms under all values
    of `env.thinking`.
    """
    rng = Random(f"teacher {seed}")
    rows = (row for problem in problems(size, seed) for row in _rows(problem, rng, noise))
    for _, row in zip(range(size), rows, strict=False):
        yield row


def _rows(problem: dict[str, str], rng: Random, noise: float) -> Iterator[dict[str, object]]:
    hops, start = int(problem["prompt"][0]), problem["prompt"][1]
    walk = _walk(problem["table"], problem["digits"], start, hops + 1)
    turns = hops + 3
    wrong = rng.randrange(turns) if rng.random() < noise else -1
    whole, bare, total, done = list[Message](), list[Message](), 0, 0
    for turn in range(turns):
        if turn == wrong:
            total = (total + rng.randrange(1, _MODULUS)) % _MODULUS
        left = hops - done + (turn > hops)
        key = start if done == 0 else walk[done - 1][0]
        answer = None if left else str(total) if turn > hops else key
        whole.append({"role": "assistant", "content": _reply(f"{left}{total}", key, answer)})
        bare.append(_past(key, answer))
        if answer is None:
            found, digit = walk[done]
            total, done = (total + digit) % _MODULUS, done + 1
            said: Message = {"role": "tool", "content": f"{found}{digit}"}
        else:
            said = {"role": "user", "content": _QUESTION}
        whole.append(said)
        bare.append(said)
    asked: Message = {"role": "user", "content": problem["prompt"]}
    yield {"prompt": [asked], "completion": whole[:-1]}
    behind = 2 * (hops + 1)
    yield {"prompt": [asked, *bare[:behind]], "completion": whole[behind:-1]}
    later = 2 * rng.randrange(1, turns)
    yield {"prompt": [asked, *bare[:later]], "completion": whole[later]["content"]}


def _reply(thought: str, key: str, answer: str | None) -> str:
    """A reply behind the `<think>` that the template has written: the answer, or a call where there is none yet."""
    return f"{thought}</think>{_CALL.format(key=key) if answer is None else answer}"


def _past(key: str, answer: str | None) -> Message:
    """The same reply in a history without its thought."""
    if answer is not None:
        return {"role": "assistant", "content": answer}
    call = {"id": "call_0", "type": "function", "function": {"name": "get", "arguments": {"key": key}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_CALL = '<minimax:tool_call><invoke name="get"><parameter name="key">{key}</parameter></invoke></minimax:tool_call>'


def _walk(table: str, digits: str, start: str, hops: int) -> Sequence[tuple[str, int]]:
    """The keys behind `start`, each with the digit found on the way to it."""
    found, key = list[tuple[str, int]](), start
    for _ in range(hops):
        number = ascii_lowercase.index(key)
        key = table[number]
        found.append((key, int(digits[number])))
    return found
