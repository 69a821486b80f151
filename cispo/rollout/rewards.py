"""Weighted reward functions, run in worker processes with a time limit.

    Attempts (prompt, G texts) --> worker processes (`cispo.rollout.reward_worker`) --> G Scores, or None: group dropped

Plain functions run in a pool of workers, one group at a time each. Async functions of all groups run side by side on
the event loop of one further worker. A worker that a function kills, or in which one exceeds its time, is replaced.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cispo.errors import UserError
from cispo.recipe.schema import Recipe
from cispo.rollout.prompts import distinct
from cispo.rollout.reward_function import FACTS, TRL_FACTS, Attempt, Failure, Signature, Value
from cispo.rollout.reward_process import WorkerDied, WorkerProcess
from cispo.rollout.reward_worker import START_SECONDS, Job, Reply, Setup
from cispo.runtime.watchdog import Activity
from cispo.types import Prompt
from cispo.user_code import given

KEPT_PROBLEMS = 100

_LEAST_WORKERS, _MOST_WORKERS = 2, 64

_LARGEST = 3.4028234663852886e38
"""Of float32, in which the learner computes."""

_ONLY_TRL = (*TRL_FACTS, "environments")
"""Arguments of TRL's reward functions that are not passed to others, and one that is passed to none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A term of the reward.

    Example: RewardFunction(fn="rewards.numeric:numeric", weight=0.5, args={"tolerance": 1e-3})
    """

    fn: str
    weight: float = 1.0
    args: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments; they take precedence over dataset columns of the same name."""
    timeout: float | None = None
    """Seconds of one call; None: the runner's."""
    concurrency: int | None = None
    """Most calls at a time; None: no bound of its own."""
    sources: tuple[str, ...] = ()
    """Names of the prompts' sources that it applies to; all without one."""

    def applies(self, source: str) -> bool:
        return not self.sources or source in self.sources


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
        self._timeout = timeout
        self._workers = workers
        self._key = key
        self._activity = activity or Activity()
        self._signatures: tuple[Signature, ...] = ()
        self._job_ids = itertools.count()
        self._processes: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._shared: WorkerProcess | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots: asyncio.Semaphore
        self._starting: asyncio.Lock
        self._one_suspect: asyncio.Lock
        self._turns: Mapping[int, asyncio.Semaphore] = {}

    def check(self, columns: Collection[str] | None = None) -> None:
        """Imports every function in a worker, so that errors come before the run.

        UserError when a function does not import, is no reward function, or needs a column outside of `columns`.
        """
        if not self._signatures:
            self._idle.append(self._start_now(asynchronous=False))
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
        return [signature.code for signature in self._signatures]

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
        self._bind()
        async with self._starting:
            if not self._signatures:
                await asyncio.to_thread(self.check)
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
        for worker in self._processes:
            worker.kill()
        self._processes.clear()
        self._idle.clear()

    def _bind(self) -> None:
        """Moves to the running event loop: locks and jobs belong to the old one, only idle workers move along."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        for worker in self._processes.difference(self._idle):
            worker.kill()
        self._loop = loop
        self._slots = asyncio.Semaphore(self._workers)
        self._starting = asyncio.Lock()
        self._one_suspect = asyncio.Lock()
        bounds = {i: f.concurrency for i, f in enumerate(self.functions) if f.concurrency is not None}
        self._turns = {i: asyncio.Semaphore(most) for i, most in bounds.items()}

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
        pairs = zip(self.functions, self._signatures, strict=True)
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
        plain = [i for i in taken if not self._signatures[i].asynchronous]
        # A function with a bound of its own is a job of its own.
        bounded = [i for i in plain if i in self._turns]
        plain = [i for i in plain if i not in self._turns]
        others = [i for i in taken if self._signatures[i].asynchronous]
        replies = await asyncio.gather(
            *([self._run_plain(self._job(group, plain))] if plain else []),
            *(self._run_in_turn(self._job(group, [i])) for i in bounded),
            *([self._run_async(self._job(group, others))] if others else []),
        )
        failures = [reply.failure for reply in replies if reply.failure is not None]
        if failures:
            return min(failures, key=lambda failure: failure.function)
        values = [value for reply in replies for value in reply.values]
        by_function = dict(zip(plain + bounded + others, values, strict=True))
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
        taken = [self._signatures[i].columns for i in functions]
        columns = {
            name: value
            for name, value in group.prompt.columns.items()
            if any(columns is None or name in columns for columns in taken)
        }
        prompt = _prompt_of(group.prompt) if any(self._signatures[i].lists for i in functions) else None
        asked = any(self._signatures[i].facts for i in functions)
        facts = pickle.dumps([dict(own) for own in group.facts]) if asked and group.facts else b""
        attempt = Attempt(tuple(group.completions), _pickled(columns, prompt, group.prompt.id), facts)
        return Job(next(self._job_ids), group.prompt.id, tuple(functions), attempt)

    async def _run_plain(self, job: Job) -> Reply:
        """The job's values; a call of a shipped function that ends its process gives 0 for its completion."""
        async with self._slots:
            while True:
                reply = await self._run_in_a_worker(job)
                failure = reply.failure
                if failure is None or not failure.fatal or failure.completion < 0:
                    return reply
                if not self._signatures[failure.function].shipped:
                    return reply
                self._count(failure, job.prompt_id)
                given_up = job.group.given_up | {(failure.function, failure.completion)}
                job = replace(job, id=next(self._job_ids), group=replace(job.group, given_up=given_up))

    async def _run_in_turn(self, job: Job) -> Reply:
        async with self._turns[job.functions[0]]:
            return await self._run_plain(job)

    async def _run_in_a_worker(self, job: Job) -> Reply:
        worker = self._idle.pop() if self._idle else await self._start(asynchronous=False)
        try:
            return await self._run_alone(worker, job)
        except _Killed:
            worker = await self._start(asynchronous=False)
            return await self._run_alone(worker, job, again=True)
        finally:
            if worker.alive:
                self._idle.append(worker)

    async def _run_async(self, job: Job) -> Reply:
        async with self._starting:
            if self._shared is None or not self._shared.alive:
                self._shared = await self._start(asynchronous=True)
            worker = self._shared
        try:
            return await worker.run(job)
        except WorkerDied as death:
            if death.suspects == 1 and not death.killed:
                return Reply(job.id, [], death.failure(job))
        # The process ran other jobs as well, or was killed from outside. Alone in a process, one after the other, only
        # the guilty job fails.
        async with self._one_suspect:
            worker = await self._start(asynchronous=True)
            try:
                return await self._run_alone(worker, job, again=True)
            finally:
                worker.kill()

    async def _run_alone(self, worker: WorkerProcess, job: Job, *, again: bool = False) -> Reply:
        """The job in a worker that runs nothing else, so that a death is this job's failure.

        Raises _Killed where the worker was killed from outside. If that happens `again`, the job is to blame.
        """
        try:
            return await worker.run(job)
        except WorkerDied as death:
            if death.killed and not again:
                raise _Killed from None
            return Reply(job.id, [], death.failure(job))
        except asyncio.CancelledError:
            # The worker is still busy with a job without a reader.
            worker.kill()
            raise

    async def _start(self, *, asynchronous: bool) -> WorkerProcess:
        return await asyncio.to_thread(self._start_now, asynchronous=asynchronous)

    def _start_now(self, *, asynchronous: bool) -> WorkerProcess:
        functions = tuple((f.fn, f.args, f"{self._key}.{i}.fn") for i, f in enumerate(self.functions))
        setup = Setup(
            functions,
            limits=tuple(f.timeout or self._timeout for f in self.functions),
            asynchronous=asynchronous,
            concurrency=tuple(f.concurrency for f in self.functions),
            given=given([f.fn for f in self.functions]),
        )
        try:
            worker = self._started(setup)
        except _Killed:
            worker = self._started(setup, again=True)
        self._signatures = worker.signatures
        self._processes = {worker, *(process for process in self._processes if process.alive)}
        return worker

    def _started(self, setup: Setup, *, again: bool = False) -> WorkerProcess:
        """A worker; raises _Killed as `_run_alone` does, for a death during the import."""
        try:
            return WorkerProcess(setup)
        except WorkerDied as death:
            if death.killed and not again:
                raise _Killed from None
            names = ", ".join(function.fn for function in self.functions)
            raise UserError(f"{self._key}: importing {names} {death.how(START_SECONDS)}") from None


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


class _Killed(Exception):
    """A worker got SIGKILL from outside: from a user, or from a system out of memory."""


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    """The name of each function's value: its own; module:name where names repeat; numbered where that repeats."""
    short = [path.rpartition(":")[2] for path in paths]
    names = [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]
    return tuple(f"{n}#{names[:i].count(n) + 1}" if names.count(n) > 1 else n for i, n in enumerate(names))
