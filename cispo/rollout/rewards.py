"""Weighted reward functions, run in worker processes with a time limit.

    Attempts (prompt, G texts) --> worker processes (`cispo.rollout.reward_worker`) --> G Scores, or None: group dropped

`reward_pool` runs them; this file has their columns, sums, failures and counts.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cispo.errors import UserError
from cispo.recipe.schema import Recipe
from cispo.rollout.prompts import distinct
from cispo.rollout.reward_function import FACTS, TRL_FACTS, Attempt, Failure, RewardFunction, Signature, Value
from cispo.rollout.reward_pool import WorkerPool
from cispo.rollout.reward_worker import Job
from cispo.runtime.watchdog import Activity
from cispo.types import Prompt

KEPT_PROBLEMS = 100

_LEAST_WORKERS, _MOST_WORKERS = 2, 64

_LARGEST = 3.4028234663852886e38
"""Of float32, in which the learner computes."""

_ONLY_TRL = (*TRL_FACTS, "environments")
"""Arguments of TRL's reward functions that are not passed to others, and one that is passed to none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """The G decoded completions of one prompt."""

    prompt: Prompt
    completions: Sequence[str]
    facts: Sequence[Mapping[str, object]] = ()
    """`reward_function.FACTS` of each completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One completion's reward.

    Example: Score(total=1.1, values={"exact_match": 1.0, "boxed": 1.0}) for weights 1 and 0.1
    """

    total: float
    """Weighted sum of `values`."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Each function's value, without its weight; one that does not apply is absent."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Values to log, of all functions; the later function's where names repeat."""


Scores = list[Score]
"""[G], in the order of the completions."""


def rewards_of(
    recipe: Recipe, prompts: Mapping[str, Sequence[Prompt]], activity: Activity | None = None
) -> RewardRunner:
    """The recipe's reward functions, imported, and checked against the columns of all prompts, by recipe section."""
    assert recipe.reward is not None
    keys = recipe.reward
    terms = [
        RewardFunction(
            fn=term.fn,
            weight=term.weight,
            args=term.args,
            timeout=term.timeout,
            concurrency=term.concurrency,
            sources=tuple(term.sources),
        )
        for term in keys.functions
    ]
    runner = RewardRunner(
        terms, on_error=keys.on_error, timeout=keys.timeout, workers=num_workers(keys.workers), activity=activity
    )
    try:
        runner.check()
        for section, rows in prompts.items():
            runner.check_rows(rows, section)
    except BaseException:
        runner.close()
        raise
    return runner


def num_workers(workers: int | Literal["auto"]) -> int:
    """`reward.workers` as a number."""
    return min(max(len(os.sched_getaffinity(0)), _LEAST_WORKERS), _MOST_WORKERS) if workers == "auto" else workers


class RewardRunner:
    """Scores groups with the recipe's reward functions.

    `errors` and `timeouts` count failed groups, `seconds` adds up the time spent in `score`, and `problems` holds the
    sentences of the last failures. Call `close` at the end.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        on_error: Literal["raise", "drop_group"] = "raise",
        timeout: float = 10.0,
        workers: int = 2,
        key: str = "reward.functions",
        activity: Activity | None = None,
    ) -> None:
        """`timeout` is in seconds for one call; `key` is the recipe key of the functions, for error sentences.

        `activity` receives the groups being scored.
        """
        assert functions and workers > 0 and timeout > 0
        self.functions = tuple(functions)
        self.names = _names([function.fn for function in functions])
        self.on_error = on_error
        self.errors = 0
        self.timeouts = 0
        self.seconds = 0.0
        self.problems: list[str] = []
        self._key = key
        self._activity = activity or Activity()
        self._pool = WorkerPool(self.functions, timeout=timeout, workers=workers, key=key, give_up=self._count)

    def check(self, columns: Collection[str] | None = None) -> None:
        """Imports every function in a worker, so that errors come before the run.

        UserError when a function does not import, is no reward function, or needs a column outside of `columns`.
        """
        self._pool.check()
        if columns is not None:
            self._check_columns(columns, "the dataset", "")

    def check_rows(self, prompts: Sequence[Prompt], section: str) -> None:
        """UserError naming the first row that lacks a column that a function needs, or has null there."""
        self.check()
        for prompt in distinct(prompts):
            self._check_columns(prompt.columns, f"row {prompt.id} of {section}", prompt.source)
            self._check_nulls(prompt.columns, f"row {prompt.id} of {section}", prompt.source)
            if not any(function.applies(prompt.source) for function in self.functions):
                named = f"the source '{prompt.source}'" if prompt.source else "prompts without a source's name"
                raise UserError(f"{self._key}: no function applies to {named} ({section}): each is for other sources")

    @property
    def last_problem(self) -> str:
        """The sentence of the last failure, "" before the first."""
        return self.problems[-1] if self.problems else ""

    @property
    def code(self) -> list[str]:
        """Hashes of the files that define the functions, "" for a function without a file."""
        return [signature.code for signature in self._pool.signatures]

    def compare(self, code: Sequence[str] | None, say: Callable[[str], None]) -> None:
        """Warns of functions that are defined by another file than the one with the hash in `code`."""
        changed = [
            f.fn for f, now, then in zip(self.functions, self.code, code or self.code, strict=False) if now != then
        ]
        if changed:
            say(f"the code of the reward {', '.join(changed)} was changed since the run was last saved")

    async def score(self, groups: Sequence[Attempts]) -> list[Scores | None]:
        """The scores of each group; None for a group dropped because a function failed on it.

        With `on_error="raise"`, UserError naming function, prompt and error at the first failure.
        """
        started = time.perf_counter()
        await self._pool.ready()
        for group in groups:
            self._check_columns(group.prompt.columns, f"prompt {group.prompt.id}", group.prompt.source)
        outcomes = await asyncio.gather(*map(self._score_group, groups))
        self.seconds += time.perf_counter() - started
        for group, outcome in zip(groups, outcomes, strict=True):
            if isinstance(outcome, Failure):
                self._account(outcome, group.prompt)
        return [None if isinstance(outcome, Failure) else outcome for outcome in outcomes]

    def close(self) -> None:
        """Ends all workers; if the runner is used again, it starts new ones."""
        self._pool.close()

    def _account(self, failure: Failure, prompt: Prompt) -> None:
        self._count(failure, prompt.id)
        if self.on_error == "raise":
            raise UserError(self.problems[-1])

    def _count(self, failure: Failure, prompt_id: int) -> None:
        self.timeouts += failure.timed_out
        self.errors += not failure.timed_out
        place = f"prompt {prompt_id}" + (f", completion {failure.completion}" if failure.completion >= 0 else "")
        where = f" ({failure.where})" if failure.where else ""
        problem = f"reward {self.functions[failure.function].fn} {failure.problem} on {place}{where}"
        self.problems = [*self.problems, problem][-KEPT_PROBLEMS:]

    def judge_of(self, source: str) -> str:
        """Name of the function that decides on right and wrong: the first that applies to a source."""
        names = (name for name, f in zip(self.names, self.functions, strict=True) if f.applies(source))
        return next(names, self.names[0])

    def _signatures_for(self, source: str) -> list[tuple[RewardFunction, Signature]]:
        pairs = zip(self.functions, self._pool.signatures, strict=True)
        return [(function, signature) for function, signature in pairs if function.applies(source)]

    def _check_columns(self, columns: Collection[str], owner: str, source: str) -> None:
        for function, signature in self._signatures_for(source):
            for name in sorted(signature.required - set(columns) - set(FACTS)):
                has = ", ".join(map(str, columns)) or "none"
                hint = "; TRL passes it, CISPO does not" if name in _ONLY_TRL else ""
                raise UserError(f"reward {function.fn} needs a column '{name}', but {owner} has {has}{hint}")

    def _check_nulls(self, columns: Mapping[str, object], owner: str, source: str) -> None:
        for function, signature in self._signatures_for(source):
            for name in sorted(signature.required & columns.keys()):
                if columns[name] is None:
                    raise UserError(
                        f"reward {function.fn} needs a column '{name}', which is null in {owner} (a parameter with a "
                        "default may be null)"
                    )

    async def _score_group(self, group: Attempts) -> Scores | Failure:
        with self._activity.doing(f"rewards of prompt {group.prompt.id}"):
            return await self._score(group)

    async def _score(self, group: Attempts) -> Scores | Failure:
        taken = [i for i, function in enumerate(self.functions) if function.applies(group.prompt.source)]
        jobs = [self._job(group, functions) for functions in self._pool.jobs(taken)]
        replies = await asyncio.gather(*map(self._pool.run, jobs))
        failures = [reply.failure for reply in replies if reply.failure is not None]
        if failures:
            return min(failures, key=lambda failure: failure.function)
        by_function: dict[int, list[Value]] = {}
        for job, reply in zip(jobs, replies, strict=True):
            by_function |= zip(job.functions, reply.values, strict=True)
        # A function of other sources does not apply.
        absent: list[Value] = [(None, {})] * len(group.completions)
        values = [by_function.get(i, absent) for i in range(len(self.functions))]
        scores = [self._total([of_function[g] for of_function in values]) for g in range(len(group.completions))]
        large = next((g for g, score in enumerate(scores) if not abs(score.total) <= _LARGEST), None)
        return scores if large is None else self._too_large(scores[large], large)

    def _too_large(self, score: Score, completion: int) -> Failure:
        terms = [abs(f.weight * score.values.get(n, 0.0)) for f, n in zip(self.functions, self.names, strict=True)]
        function = terms.index(max(terms))
        value, weight = score.values[self.names[function]], self.functions[function].weight
        return Failure(function, completion, f"returned {value:g}, with the weight {weight:g} more than float32 holds,")

    def _total(self, values: Sequence[Value]) -> Score:
        named = {name: value for name, (value, _) in zip(self.names, values, strict=True) if value is not None}
        weights = {name: function.weight for name, function in zip(self.names, self.functions, strict=True)}
        extra = {name: value for _, logged in values for name, value in logged.items()}
        return Score(total=sum((weights[n] * value for n, value in named.items()), 0.0), values=named, extra=extra)

    def _job(self, group: Attempts, functions: Sequence[int]) -> Job:
        taken = [self._pool.signatures[i].columns for i in functions]
        columns = {
            name: value
            for name, value in group.prompt.columns.items()
            if any(columns is None or name in columns for columns in taken)
        }
        prompt = _prompt_of(group.prompt) if any(self._pool.signatures[i].lists for i in functions) else None
        asked = any(self._pool.signatures[i].facts for i in functions)
        facts = pickle.dumps([dict(own) for own in group.facts]) if asked and group.facts else b""
        attempt = Attempt(tuple(group.completions), _pickled(columns, prompt, group.prompt.id), facts)
        return Job(self._pool.next_job(), group.prompt.id, tuple(functions), attempt)


def _prompt_of(prompt: Prompt) -> object:
    """A prompt as TRL passes it: its messages where the dataset has messages, else its text."""
    given = (prompt.columns.get("messages"), prompt.columns.get("prompt"))
    if any(isinstance(value, list | tuple) and tuple(value) == prompt.messages for value in given):
        return [dict(message) for message in prompt.messages]
    return text_of(prompt)


def text_of(prompt: Prompt) -> str:
    """The contents of a prompt's messages, in a row."""
    return "".join(str(message["content"]) for message in prompt.messages)


def _pickled(columns: Mapping[str, object], prompt: object, number: int) -> bytes:
    try:
        return pickle.dumps((columns, prompt), protocol=pickle.HIGHEST_PROTOCOL)
    # The pickling of a column is its own class's code.
    except Exception as error:
        name = next((name for name, value in columns.items() if not _can_be_sent(value)), "?")
        raise UserError(
            f"prompt {number} has a column that cannot be sent to a process: '{name}': {type(error).__name__}: {error}"
        ) from error


def _can_be_sent(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    """The name of each function's value: its own; module:name where names repeat; numbered where that repeats."""
    short = [path.rpartition(":")[2] for path in paths]
    names = [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]
    return tuple(f"{n}#{names[:i].count(n) + 1}" if names.count(n) > 1 else n for i, n in enumerate(names))
