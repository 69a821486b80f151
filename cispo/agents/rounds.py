"""Who samples when: all live attempts together, or each for itself.

    attempt --sample(ids)--> Rounds: waits until every live attempt asks --> one call of the engines, in attempt order
                             Apart: one call of the engines a request

In rounds, the time that tools and agents take changes no sampled token. Apart, no attempt waits for another.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cispo.recipe.seeds import seed_of
from cispo.types import Completion, Sampling

AskEngines = Callable[[Sequence[int], list[list[int]], Sampling, int], Awaitable[list[Completion]]]
"""(numbers of attempts, a prompt of each, sampling, seed) -> a completion of each, in order."""


class Sampler(Protocol):
    """The engines, for the attempts of one call of `play`."""

    def enter(self, attempt: int) -> None:
        """The attempt is live: it will ask, or leave."""
        ...

    def leave(self, attempt: int) -> None:
        """The attempt asks no more."""
        ...

    def close(self) -> None:
        """Takes back a call of the engines that is under way."""
        ...

    async def sample(self, attempt: int, ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        """The policy's reply to a prompt, of at most `max_tokens` where that is below the run's limit."""
        ...


@dataclass(slots=True)
class _Request:
    attempt: int
    ids: Sequence[int]
    max_tokens: int
    answer: asyncio.Future[Completion]


class Rounds:
    """One call of the engines for the requests of all live attempts; a round begins when each has one.

    Requests of one attempt come in the order in which it asked. Requests with a limit of their own are sampled behind
    the others, a call a limit, for a call has one.
    """

    def __init__(self, ask: AskEngines, sampling: Sampling, seed: int) -> None:
        self._ask, self._sampling, self._seed = ask, sampling, seed
        self._live: set[int] = set()
        self._waiting: list[_Request] = []
        self._round: asyncio.Task[None] | None = None
        self._number = 0

    def enter(self, attempt: int) -> None:
        self._live.add(attempt)

    def leave(self, attempt: int) -> None:
        self._live.discard(attempt)
        self._waiting = [request for request in self._waiting if request.attempt != attempt]
        self._look()

    async def sample(self, attempt: int, ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        loop = asyncio.get_running_loop()
        most = min(max_tokens or self._sampling.max_tokens, self._sampling.max_tokens)
        request = _Request(attempt, ids, most, loop.create_future())
        self._waiting.append(request)
        self._look()
        return await request.answer

    def close(self) -> None:
        if self._round is not None:
            self._round.cancel()

    def _look(self) -> None:
        if self._round is None and self._complete:
            # Behind the tasks that are ready: an attempt may ask for several replies at once.
            self._round = asyncio.get_running_loop().create_task(self._play())

    @property
    def _complete(self) -> bool:
        return bool(self._waiting) and self._live <= {request.attempt for request in self._waiting}

    async def _play(self) -> None:
        requests, self._waiting = sorted(self._waiting, key=lambda request: request.attempt), []
        seed, self._number = seed_of(self._seed, "turn", self._number), self._number + 1
        try:
            for limit in sorted({request.max_tokens for request in requests}, reverse=True):
                own = [request for request in requests if request.max_tokens == limit]
                whole = limit == self._sampling.max_tokens
                completions = await self._ask(
                    [request.attempt for request in own],
                    [list(request.ids) for request in own],
                    self._sampling if whole else replace(self._sampling, max_tokens=limit),
                    seed if whole else seed_of(seed, "limit", limit),
                )
                for request, completion in zip(own, completions, strict=True):
                    if not request.answer.done():
                        request.answer.set_result(completion)
        except Exception as error:
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(error)
        finally:
            self._round = None
        self._look()


class Apart:
    """A call of the engines a request, at once."""

    def __init__(self, ask: AskEngines, sampling: Sampling, seed: int) -> None:
        self._ask, self._sampling, self._seed = ask, sampling, seed
        self._turns: Counter[int] = Counter()

    def enter(self, attempt: int) -> None:
        pass

    def leave(self, attempt: int) -> None:
        pass

    def close(self) -> None:
        pass

    async def sample(self, attempt: int, ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        seed = seed_of(self._seed, "attempt", attempt, "turn", self._turns[attempt])
        self._turns[attempt] += 1
        most = min(max_tokens or self._sampling.max_tokens, self._sampling.max_tokens)
        [completion] = await self._ask([attempt], [list(ids)], replace(self._sampling, max_tokens=most), seed)
        return completion
