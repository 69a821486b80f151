"""Attempts of several turns, with tools, an environment, or an agent of the user.

    prompts --open--> attempts: sample, parse, step, extend ... --Status--> groups of trajectories
                      or an agent, which asks the policy as it likes

A turn's prompt is the turn before, prompt and reply, with the tokens of the observation behind it: nothing that was
sampled is tokenised again, unless `env.thinking` or an agent rewrites the history.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cispo.agents.attempt import Attempt
from cispo.agents.contract import Reply, Status, Step
from cispo.agents.conversations import Conversations, Limits, Listener
from cispo.agents.environment import Identity, Observation, rewards_of
from cispo.agents.ledger import Ledger, begin
from cispo.agents.rounds import Apart, Rounds, Sampler
from cispo.agents.session_pool import SessionPool, pool_of
from cispo.agents.session_process import SessionError
from cispo.errors import UserError
from cispo.recipe.schema import Env, Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.prompts import distinct
from cispo.rollout.renderer import Renderer, Tools
from cispo.rollout.rollout import Generate, GenerateAt
from cispo.types import Completion, FinishReason, Home, Message, Prompt, Sampling, Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from cispo.agents.endpoint import Access, Endpoint

_ENDS = {
    FinishReason.LENGTH: Status.LENGTH,
    FinishReason.REPETITION: Status.REPETITION,
    FinishReason.ABORT: Status.FAILED,
}


class Episodes:
    """Plays attempts with the tools, the environment or the agent of a recipe."""

    def __init__(
        self, env: Env, pool: SessionPool, renderer: Renderer, *, max_context: int, apart: bool = False
    ) -> None:
        """`apart`: no attempt waits for another. Raises UserError where a template cannot continue a conversation."""
        self.env, self.pool, self.renderer, self.max_context = env, pool, renderer, max_context
        self.apart = apart
        ready = pool.check()
        self.tools: Tools = ready.tools
        self.agent = ready.agent
        self.listener = Listener(renderer, env.tool_parser)
        self.listener.check(self.tools)
        self.endpoint = _endpoint(renderer) if ready.takes_client else None
        said: Message = {"role": "tool" if self.tools else "user", "content": "?"}
        renderer.extend([said], renderer.eos_ids[:1], self.tools)

    def take_seconds(self) -> float:
        """Seconds that attempts waited for user code since the last call, summed over attempts."""
        seconds, self.pool.seconds = self.pool.seconds, 0.0
        return seconds

    def close(self) -> None:
        """Ends the processes of tools and environment."""
        self.pool.close()
        if self.endpoint is not None:
            self.endpoint.close()

    async def play(
        self,
        prompts: Sequence[Prompt],
        generate: Generate,
        *,
        group_size: int,
        sampling: Sampling,
        seed: int,
        generate_at: GenerateAt | None = None,
    ) -> list[TrajectoryGroup]:
        """One group of unscored trajectories a prompt, in order; with `generate_at`, each attempt at one engine."""
        # In rounds, no earlier batch leaves its mark in the engines' caches: a resumed run repeats bit for bit.
        homes = [Home(cache="" if self.apart else str(seed)) for _ in prompts]

        async def ask(attempts: Sequence[int], ids: list[list[int]], how: Sampling, seed: int) -> list[Completion]:
            if generate_at is None:
                return await generate(ids, how, seed)
            return await generate_at(ids, how, seed, [homes[attempt // group_size] for attempt in attempts])

        sampler: Sampler = (Apart if self.apart else Rounds)(ask, sampling, seed)
        base_url = "" if self.endpoint is None else await self.endpoint.start()
        attempts = [
            self._opened(prompt, number * group_size + index, index, _seed_of(seed, number), sampler, base_url)
            for number, prompt in enumerate(prompts)
            for index in range(group_size)
        ]
        for attempt in attempts:
            sampler.enter(attempt.number)
        try:
            await _each(self._run(attempt, sampler) for attempt in attempts)
        finally:
            sampler.close()
            await asyncio.gather(*(attempt.session.close() for attempt in attempts), return_exceptions=True)
        groups = [attempts[i * group_size : (i + 1) * group_size] for i in range(len(prompts))]
        return [
            TrajectoryGroup(
                prompt=prompt,
                # An attempt that failed before its first reply has no token to train on.
                trajectories=tuple(t for t in map(self._trajectory, group) if t.turns),
                problem=next((attempt.problem for attempt in group if attempt.problem), ""),
            )
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def _opened(self, prompt: Prompt, number: int, index: int, seed: int, sampler: Sampler, base_url: str) -> Attempt:
        ledger = Ledger(self.renderer, self.env.thinking)
        key = "" if self.endpoint is None else self.endpoint.new_key()
        client = {"base_url": base_url, "api_key": key} if key else {}
        attempt = Attempt(
            prompt=prompt,
            number=number,
            index=index,
            session=self.pool.open({**self._columns(prompt), **client}, Identity(seed, index)),
            ledger=ledger,
            place=begin(() if self.agent else self.renderer.render(prompt.messages, self.tools)),
            history=list(prompt.messages),
            replies=[None] * len(prompt.messages),
            key=key,
        )
        if self.agent:

            def sample(ids: Sequence[int], max_tokens: int | None) -> Awaitable[Completion]:
                return sampler.sample(number, ids, max_tokens)

            limits = Limits(self.env.max_turns, self.max_context)
            attempt.conversations = Conversations(ledger, sample, self.listener, limits)
        return attempt

    def _columns(self, prompt: Prompt) -> Mapping[str, object]:
        """Values that the user's code may take by name: of an agent the prompt's messages as well."""
        return {"messages": [dict(m) for m in prompt.messages], **prompt.columns} if self.agent else prompt.columns

    async def _run(self, attempt: Attempt, sampler: Sampler) -> None:
        try:
            if attempt.conversations is not None:
                await self._solve(attempt, attempt.conversations)
            else:
                await self._converse(attempt, sampler)
        finally:
            sampler.leave(attempt.number)
        if attempt.conversations is None:
            await self._settle(attempt)

    async def _solve(self, attempt: Attempt, conversations: Conversations) -> None:
        """An agent owns its loop."""
        with contextlib.closing(conversations), self._served(attempt, conversations) as access:
            try:
                solved = await attempt.session.solve(conversations.begin, conversations.tell)
            except SessionError as error:
                if access is not None and access.refused is not None and not error.timed_out:
                    attempt.status = access.refused
                else:
                    self._failed(attempt, error)
            else:
                attempt.status = Status(solved.status or Status.DONE)
                attempt.rewards[0] = dict(solved.rewards)
        attempt.events = conversations.events
        attempt.messages = list(conversations.said(attempt.prompt.messages))

    @contextlib.contextmanager
    def _served(self, attempt: Attempt, conversations: Conversations) -> Iterator[Access | None]:
        """The endpoint answers requests with the attempt's key."""
        if self.endpoint is None:
            yield None
            return
        session = attempt.session
        access = self.endpoint.open(attempt.key, conversations, session.clock_stands, session.fail)
        try:
            yield access
        finally:
            self.endpoint.end(attempt.key)

    async def _converse(self, attempt: Attempt, sampler: Sampler) -> None:
        """Reply and observation in turn."""
        await self._start(attempt)
        for _ in range(self.env.max_turns):
            if attempt.status is None and len(attempt.place.ids) >= self.max_context:
                attempt.status = Status.CONTEXT
            if attempt.status is not None:
                return
            await self._hear(attempt, await sampler.sample(attempt.number, attempt.place.ids))
        attempt.status = attempt.status or Status.TURNS

    async def _start(self, attempt: Attempt) -> None:
        try:
            opening = _messages(await attempt.session.start())
        except SessionError as error:
            return self._failed(attempt, error)
        if opening:
            # They come before the policy's first reply: a part of the prompt.
            attempt.observe(opening)
            attempt.place = begin(self.renderer.render(attempt.history, self.tools))

    async def _hear(self, attempt: Attempt, completion: Completion) -> None:
        reply = self.listener.hear(completion, self.tools, len(attempt.place.ids))
        attempt.hear(completion, reply)
        if completion.finish_reason in _ENDS:
            attempt.status = _ENDS[completion.finish_reason]
            return
        attempt.events["calls"] += len(reply.calls)
        attempt.events["unreadable"] += bool(reply.problem)
        try:
            step, failed = await attempt.session.step(reply)
        except SessionError as error:
            step, failed = self._told(attempt, reply, error), len(reply.calls)
        attempt.events["failed"] += failed
        if failed and self.env.on_error == "fail":
            attempt.status = attempt.status or Status.FAILED
        elif step is None:
            attempt.status = attempt.status or Status.ANSWERED
        else:
            self._observe(attempt, step)

    def _observe(self, attempt: Attempt, step: Step) -> None:
        attempt.reward(rewards_of(step))
        observed = _messages(step.observation)
        attempt.observe(observed)
        if step.done or not observed:
            attempt.status = Status.DONE if step.done else Status.ANSWERED
            return
        last, prompt = attempt.ledger.sampled[-1], len(attempt.prompt.messages)
        attempt.place = attempt.ledger.follow(last, observed, attempt.history, attempt.replies, self.tools, prompt)

    def _told(self, attempt: Attempt, reply: Reply, error: SessionError) -> Step | None:
        """The error of a tool as its answer; None, and a status, where the attempt cannot go on."""
        if self.env.on_error == "raise" or not reply.calls or self.env.on_error == "fail":
            self._failed(attempt, error)
            return None
        return Step(
            observation=[
                {"role": "tool", "content": f"error: {call.name} {error}", "name": call.name, "tool_call_id": call.id}
                for call in reply.calls
            ]
        )

    def _failed(self, attempt: Attempt, error: SessionError) -> None:
        named = self.env.use or ", ".join(self.env.tools)
        attempt.problem = f"env: {named} {error} (prompt {attempt.prompt.id}, turn {len(attempt.ledger.sampled)})"
        if self.env.on_error == "raise":
            raise UserError(attempt.problem)
        attempt.status = Status.TIMEOUT if error.timed_out else Status.FAILED

    async def _settle(self, attempt: Attempt) -> None:
        """The environment's reward of the whole attempt."""
        if not attempt.ledger.sampled or attempt.status in (Status.TIMEOUT, Status.FAILED):
            return
        try:
            attempt.reward(await attempt.session.reward())
        except SessionError as error:
            self._failed(attempt, error)

    def _trajectory(self, attempt: Attempt) -> Trajectory:
        turns = attempt.turns
        return Trajectory(
            group_id=attempt.prompt.id,
            index=attempt.index,
            turns=turns,
            text=self.renderer.decode(turns[-1].completion.token_ids if turns else ()),
            reward=0.0,
            messages=tuple(attempt.messages),
            status=str(attempt.status),
            events=dict(attempt.events),
        )


def episodes_of(recipe: Recipe, renderer: Renderer, prompts: Mapping[str, Sequence[Prompt]]) -> Episodes | None:
    """The recipe's episodes; None without an `env` section. Raises UserError naming the key.

    `prompts` by recipe section must have the columns that the tools need.
    """
    env = recipe.env
    if env is None:
        return None
    if bool(env.tools) == (env.use is not None):
        raise UserError("env: give either `tools` or `use`")
    key = "env.tools" if env.use is None else "env.use"
    pool = pool_of(env.tools or [env.use or ""], env.args, key, timeout=env.timeout, workers=env.workers)
    try:
        for section, rows in prompts.items():
            for prompt in distinct(rows):
                lacking = sorted(pool.check().required - prompt.columns.keys())
                if lacking:
                    who = "the agent" if pool.check().agent else "a tool"
                    raise UserError(
                        f"{key}: {who} needs the column '{lacking[0]}', which row {prompt.id} of {section} has not"
                    )
        # checks.py: one set of arguments for all prompts of a recipe with turns.
        args = (recipe.data.template_args if recipe.data else None) or {}
        apart = recipe.control.max_staleness > 0
        return Episodes(env, pool, renderer.with_args(args), max_context=recipe.rollout.max_context, apart=apart)
    except BaseException:
        pool.close()
        raise


def _endpoint(renderer: Renderer) -> Endpoint:
    # With a library of its own, which few recipes need.
    from cispo.agents.endpoint import Endpoint

    return Endpoint(renderer)


def _seed_of(seed: int, group: int) -> int:
    """The seed of a group's environments: numpy takes 32 bits, and C libraries a signed integer."""
    return seed_of(seed, "env", group) % 2**31


def _messages(observation: Observation) -> list[Message]:
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}] if observation else []
    return list(observation)


async def _each(steps: Iterable[Coroutine[object, object, None]]) -> None:
    """All of the coroutines side by side; the first error ends the others."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
