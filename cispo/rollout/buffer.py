"""The queue between sampling and learning: the bound on staleness, and the order of batches.

    submit --> [ ticket 7 | ticket 8 | ticket 9 ... ] --> take(P) --> one batch
               each a prompt (or a whole batch) being sampled and scored, with the version it was submitted under

A ticket submitted under version v is trained on under version v + max_staleness at the latest. With max_staleness 0
nothing runs ahead: a batch is one ticket, submitted when it is taken, so a run repeats bit for bit.

The order is first in, first out inside a window: a finished ticket may overtake at most `window` prompts submitted
before it. Without the window the slowest completion would hold up every batch; without its bound, batches would consist
of short completions, and long ones would come late and stale (windowed FIFO of MiniMax's Forge).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

from cispo.rollout.rollout import Rollouts, rollouts_from_json, rollouts_to_json
from cispo.types import Prompt

Produce = Callable[[Sequence[Prompt], int], Coroutine[object, None, Rollouts]]
"""(prompts, number of the ticket) -> their scored groups."""


class FinishedTicket(TypedDict):
    """A finished ticket in a checkpoint."""

    deadline: int
    prompts: list[int]
    rollouts: Mapping[str, object]


class BufferState(TypedDict):
    """A buffer in a checkpoint; prompts are named by their ids."""

    submitted: int
    finished: list[FinishedTicket]
    unfinished: list[list[int]]
    """The prompts of each ticket still being sampled: a resumed run samples them anew."""


@dataclass(slots=True, eq=False)
class Ticket:
    """Prompts that are sampled and scored together."""

    number: int
    """Its place in the order, from the start of the run; its seed is derived from it."""
    prompts: list[Prompt]
    deadline: int
    """The last version that may train on it."""
    result: asyncio.Future[Rollouts]


@dataclass(slots=True, kw_only=True)
class Buffer:
    """Keeps sampling ahead of training, within the bound on staleness."""

    produce: Produce
    next_prompts: Callable[[int], list[Prompt]]
    """The next n prompts of the stream; none once it has ended."""
    batch: int
    """P: prompts that one version trains on."""
    max_staleness: int = 0
    window: int = 0
    """Prompts that a finished one may overtake, at most max_staleness * batch."""
    tickets: list[Ticket] = field(default_factory=list)
    """Submitted and not yet taken, in order."""
    submitted: int = 0
    """Tickets since the start of the run."""

    @property
    def ahead(self) -> int:
        """Prompts submitted beyond the batch being taken.

        max_staleness batches less the window: being overtaken delays a prompt by up to the window.
        """
        return self.max_staleness * self.batch - self.window

    @property
    def waiting(self) -> int:
        """Prompts submitted and not yet taken."""
        return sum(len(t.prompts) for t in self.tickets)

    async def take(self, count: int, *, version: int, left: int) -> Rollouts:
        """The groups of the next `count` prompts, to be trained on under `version`.

        At most `left` prompts are taken from here to the end of the run, this batch included. An exception of sampling
        or scoring is raised as soon as its ticket fails, due or not.
        """
        self._submit(min(count + self.ahead, left) - self.waiting, version)
        # New tickets reach the engines before the driver is busy with finished ones.
        await asyncio.sleep(0)
        taken: list[Ticket] = []
        missing = count
        while missing > 0:
            self._raise_errors()
            ticket = self._next(version, missing)
            if ticket is None:
                running = [t.result for t in self.tickets if not t.result.done()]
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                continue
            self.tickets.remove(ticket)
            taken.append(ticket)
            missing -= len(ticket.prompts)
        results = [t.result.result() for t in sorted(taken, key=lambda t: t.number)]
        return replace(sum(results[1:], results[0]), rounds=1)

    def _submit(self, count: int, version: int) -> None:
        if count <= 0:
            return
        # A synchronous batch is one ticket; ahead of the learner every prompt is a ticket of its own.
        size = count if self.max_staleness == 0 else 1
        prompts = self.next_prompts(count)
        for start in range(0, len(prompts), size):
            self._start(prompts[start : start + size], version + self.max_staleness)

    def _start(self, prompts: list[Prompt], deadline: int) -> None:
        result = asyncio.create_task(self.produce(prompts, self.submitted))
        self._append(prompts, deadline, result)

    def _append(self, prompts: list[Prompt], deadline: int, result: asyncio.Future[Rollouts]) -> None:
        self.tickets.append(Ticket(self.submitted, prompts, deadline, result))
        self.submitted += 1

    def _next(self, version: int, missing: int) -> Ticket | None:
        """The first finished ticket inside the window that leaves enough time for tickets with earlier deadlines."""
        for ticket in self.tickets:
            if ticket.number > self.tickets[0].number + self.window:
                return None
            if ticket.result.done() and self._leaves_time(ticket, version, missing):
                return ticket
        return None

    def _leaves_time(self, ticket: Ticket, version: int, missing: int) -> bool:
        """Whether every ticket with an earlier deadline can still meet it once this one has been taken.

        Always true of the first ticket: deadlines never fall along the order.
        """
        room, due = missing - len(ticket.prompts), 0
        for other in self.tickets:
            if other.deadline < ticket.deadline:
                due += len(other.prompts)
                if due > room + (other.deadline - version) * self.batch:
                    return False
        return True

    def _raise_errors(self) -> None:
        for ticket in self.tickets:
            if ticket.result.done():
                ticket.result.result()

    def state(self) -> BufferState:
        """JSON for a checkpoint: finished groups whole, and the prompts being sampled."""
        return {
            "submitted": self.submitted,
            "finished": [
                {
                    "deadline": t.deadline,
                    "prompts": [p.id for p in t.prompts],
                    "rollouts": rollouts_to_json(t.result.result()),
                }
                for t in self.tickets
                if t.result.done()
            ],
            "unfinished": [[p.id for p in t.prompts] for t in self.tickets if not t.result.done()],
        }

    def restore(self, state: BufferState, *, prompts: Sequence[Prompt], version: int) -> None:
        """Continues from a checkpoint; unfinished tickets are sampled anew, under the weights of `version`."""
        self.submitted = state["submitted"]
        loop = asyncio.get_running_loop()
        for entry in state["finished"]:
            result = loop.create_future()
            result.set_result(rollouts_from_json(entry["rollouts"], prompts))
            self._append([prompts[i] for i in entry["prompts"]], entry["deadline"], result)
        for ids in state["unfinished"]:
            self._start([prompts[i] for i in ids], version + self.max_staleness)

    async def close(self) -> None:
        """Cancels all tickets."""
        for ticket in self.tickets:
            ticket.result.cancel()
        await asyncio.gather(*(t.result for t in self.tickets), return_exceptions=True)
        self.tickets.clear()
