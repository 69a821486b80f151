"""Where rollouts wait for the learner: how far sampling may run ahead, and in which order its results are taken.

    submit --> [ ticket 7 | ticket 8 | ticket 9 ... ] --> take(P) --> one batch
               each a prompt (or a whole batch) being sampled and scored, with the version it was submitted under

A ticket that is submitted under version v is trained on under version v + max_staleness at the latest. With
max_staleness 0 nothing runs ahead: a batch is one ticket, submitted when it is asked for, so a run repeats bit for bit.

Order is first in, first out inside a window: a finished ticket may overtake at most `window` prompts that were
submitted before it. Without the window the slowest completion holds everybody up; without its bound the batches would
be made of what is quick to sample, and long completions would come late and stale (windowed FIFO in MiniMax's Forge).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cispo.rollout.rollout import Rollouts
from cispo.rollout.stored import rollouts_from_json, rollouts_to_json
from cispo.types import Prompt

Produce = Callable[[Sequence[Prompt], int], Coroutine[Any, Any, Rollouts]]
"""(prompts, number of the ticket) -> their scored groups."""


@dataclass(slots=True, eq=False)
class Ticket:
    """Prompts that are sampled and scored together."""

    number: int
    """Since the start of the run: its place in the order; seeds come from it."""
    prompts: list[Prompt]
    deadline: int
    """The last version that may train on it."""
    result: asyncio.Future[Rollouts]


@dataclass(slots=True, kw_only=True)
class Buffer:
    """Keeps sampling ahead of training, within the bound on staleness."""

    produce: Produce
    next_prompts: Callable[[int], list[Prompt]]
    """Takes so many prompts from the stream, or none once it has ended."""
    batch: int
    """P: the prompts that one version trains on."""
    max_staleness: int = 0
    window: int = 0
    """How many prompts a finished one may overtake, at most max_staleness * batch."""
    tickets: list[Ticket] = field(default_factory=list)
    """Submitted and not yet taken, in order."""
    submitted: int = 0
    """Tickets since the start of the run."""

    @property
    def ahead(self) -> int:
        """Prompts that are sampled beyond those that are asked for.

        max_staleness batches less the window: a prompt that is overtaken is trained on that much later.
        """
        return self.max_staleness * self.batch - self.window

    @property
    def waiting(self) -> int:
        """Prompts that are submitted and not yet taken."""
        return sum(len(t.prompts) for t in self.tickets)

    async def take(self, count: int, *, version: int, left: int) -> Rollouts:
        """The next `count` prompts' groups, to be trained on under `version`; `left` prompts may be taken in all.

        Raises what sampling or scoring raised, also of a ticket that is not due yet.
        """
        self._submit(min(count + self.ahead, left) - self.waiting, version)
        # What was submitted is on its way to the engines before the driver is busy with what is finished already.
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
        # A synchronous batch is sampled as a whole; ahead of the learner every prompt goes its own way.
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
        """The first finished ticket inside the window that leaves enough time for what is due earlier."""
        for ticket in self.tickets:
            if ticket.number > self.tickets[0].number + self.window:
                return None
            if ticket.result.done() and self._leaves_time(ticket, version, missing):
                return ticket
        return None

    def _leaves_time(self, ticket: Ticket, version: int, missing: int) -> bool:
        """Whether all that is due earlier can still be trained on in time once this ticket has taken its place.

        The first ticket always does: deadlines never fall along the order.
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

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: finished groups whole, and which prompts were being sampled."""
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

    def restore(self, state: Mapping[str, Any], *, prompts: Sequence[Prompt], version: int) -> None:
        """Goes on from a checkpoint: what was unfinished is sampled anew, under the weights of `version`."""
        self.submitted = state["submitted"]
        loop = asyncio.get_running_loop()
        for entry in state["finished"]:
            result = loop.create_future()
            result.set_result(rollouts_from_json(entry["rollouts"], prompts))
            self._append([prompts[i] for i in entry["prompts"]], entry["deadline"], result)
        for ids in state["unfinished"]:
            self._start([prompts[i] for i in ids], version + self.max_staleness)

    async def close(self) -> None:
        """Gives up what is still being sampled."""
        for ticket in self.tickets:
            ticket.result.cancel()
        await asyncio.gather(*(t.result for t in self.tickets), return_exceptions=True)
        self.tickets.clear()
