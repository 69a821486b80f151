"""reasoning-gym's own verifiers as a reward, prompts with solved examples, and an imperfect teacher for a warm-up.

The rows come from the source "reasoning_gym:TASK". Raw scores are no pass rates: a wrong answer in countdown scores
0.05 and none at all 0.01, and many tasks give partial credit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from random import Random

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset

from cispo.errors import UserError
from cispo.rollout.rows import Row, load_rows

from .time_limit import TimeIsUp, limited

SECONDS = 1.0
"""Limit of the verifier of an answer, as in `time_limit`."""
_LONGEST = 10_000
_HUGE = re.compile(r"[\d.][eE][-+]?\d{5}|\d{10000}", re.ASCII)


def score(
    completion: str, task: str, params: Mapping[str, object], item: dict[str, object], *, partial: bool = False, **_
) -> float:
    """1.0 for a right answer and 0.0 for any other.

    With `partial`, the task's partial credit: its score less the score of no answer (None or an empty one), rescaled to
    [0, 1]. The columns `task`, `params` and `item` are on every row of a "reasoning_gym:TASK" source. An answer that
    the verifier cannot read, or not within `SECONDS`, scores 0.
    """
    verifier = _verifier(task, json.dumps(dict(params), sort_keys=True))
    value = _raw_score(verifier, completion.strip(), item)
    if value == 1.0 or not partial:
        return float(value == 1.0)
    floor = max(_raw_score(verifier, None, item), _raw_score(verifier, "", item))
    return max(0.0, (value - floor) / (1.0 - floor)) if floor < 1.0 else 0.0


def few_shot(
    task: str,
    size: int,
    seed: int,
    question: str = "{question}",
    answer: str = "{answer}",
    shots: int = 4,
    split: str = "train",
    **params: object,
) -> Iterator[Row]:
    """Rows of a split with `messages` that hold `shots` solved training problems before the question.

    The solved problems show a weak model the form of an answer; they are the same for every row and split. `question`
    and `answer` are templates with the columns of "reasoning_gym:TASK".
    """
    source, key = f"reasoning_gym:{task}", "few_shot"
    solved = load_rows(source, "train", {"size": shots, "seed": 0, **params}, None, key) if shots else []
    before: list[dict[str, str]] = []
    for row in solved:
        before.append({"role": "user", "content": question.format_map(row)})
        before.append({"role": "assistant", "content": answer.format_map(row)})
    for row in load_rows(source, split, {"size": size, "seed": seed, **params}, None, key):
        yield {**row, "messages": [*before, {"role": "user", "content": question.format_map(row)}]}


def demonstrations(task: str, size: int, seed: int, noise: float = 0.7, **params: object) -> Iterator[Row]:
    """Rows of the task's training split with a column `completion`; a share `noise` of those is wrong in one character.

    The prompt comes from the recipe's template, as for "reasoning_gym:TASK". Raises UserError for a task without a
    single right answer.
    """
    rows = load_rows(f"reasoning_gym:{task}", "train", {"size": size, "seed": seed, **params}, None, "demonstrations")
    if not isinstance(rows[0]["answer"], str):
        raise UserError(f"demonstrations: reasoning_gym:{task} has no single right answer to show")
    alphabet = sorted({character for row in rows for character in row["answer"]})
    rng = Random(f"teacher {seed}")
    for row in rows:
        wrong = rng.random() < noise
        yield {**row, "completion": _wrong_answer(row, alphabet, rng) if wrong else row["answer"]}


def _wrong_answer(row: Row, alphabet: list[str], rng: Random) -> str:
    """The answer with one character replaced by another that occurs in answers, and no longer right."""
    answer = row["answer"]
    for _ in range(100):
        place = rng.randrange(len(answer))
        candidate = answer[:place] + rng.choice(alphabet) + answer[place + 1 :]
        if score(candidate, row["task"], row["params"], row["item"]) < 1.0:
            return candidate
    raise UserError(f"demonstrations: reasoning_gym:{row['task']} takes any change of the answer {answer!r} for right")


@lru_cache(maxsize=16)
def _verifier(task: str, params: str) -> ProceduralDataset:
    return reasoning_gym.create_dataset(task, **{**json.loads(params), "size": 1, "seed": 0})


def _raw_score(verifier: ProceduralDataset, answer: str | None, item: dict[str, object]) -> float:
    right = item.get("answer")
    if answer is not None and answer != right and _is_beyond_reading(answer, len(str(right))):
        return 0.0
    try:
        return limited(SECONDS, lambda: float(verifier.score_answer(answer, item)))
    # Some verifiers fail on an answer that they cannot read, or run it, instead of scoring it 0.
    except (Exception, SystemExit, TimeIsUp):
        return 0.0


def _is_beyond_reading(answer: str, length: int) -> bool:
    """Whether an answer is much longer than a right one of `length` characters, or has a number of 10^4 digits.

    Verifiers are not linear, and arithmetic with such numbers cannot be interrupted.
    """
    return len(answer) > _LONGEST + 10 * length or _HUGE.search(answer) is not None
