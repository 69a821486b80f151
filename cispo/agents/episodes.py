"""Attempts of several turns, in rounds: one call of the engines for turn k of all live attempts.

    prompts --open--> attempts --generate, parse, step, extend--> ... --Status--> groups of trajectories

In rounds, the time that tools take changes no sampled token. A turn's prompt is the turn before, prompt and reply, with
the tokens of the observation behind it: nothing that was sampled is tokenised again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cispo.agents.contract import Reply, Status, Step
from cispo.agents.environment import Identity, Observation, rewards_of
from cispo.agents.parsing import Parser, parser_of
from cispo.agents.session_process import RemoteSession, SessionError, SessionPool, pool_of
from cispo.errors import UserError
from cispo.recipe.schema import Env, Recipe
from cispo.rollout.renderer import Renderer, Tools
from cispo.rollout.rollout import Generate
from cispo.seeds import seed_of
from cispo.types import Completion, FinishReason, Message, Prompt, Sampling, Trajectory, TrajectoryGroup, Turn

_ENDS = {
    FinishReason.LENGTH: Status.LENGTH,
    FinishReason.REPETITION: Status.REPETITION,
    FinishReason.ABORT: Status.FAILED,
}


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt in progress."""

    prompt: Prompt
    index: int
    session: RemoteSession
    ids: list[int]
    """Prompt of the next turn."""
    context: list[int]
    """The part of `ids` that no turn holds yet."""
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=lambda: {"calls": 0, "failed": 0, "unreadable": 0})
    status: Status | None = None

    def hear(self, completion: Completion) -> None:
        """Takes the policy's reply as a turn."""
        self.turns.append(Turn(context_ids=tuple(self.context), completion=completion, continues=bool(self.turns)))
        self.ids += completion.token_ids
        self.context = []

    def reward(self, rewards: Mapping[str, float]) -> None:
        """Adds rewards to the last turn."""
        if not rewards:
            return
        last = self.turns[-1]
        names = {**last.rewards, **rewards}
        merged = {name: last.rewards.get(name, 0.0) + rewards.get(name, 0.0) for name in names}
        self.turns[-1] = replace(last, rewards=merged)


class Episodes:
    """Plays attempts with the tools or the environment of a recipe."""

    def __init__(self, env: Env, pool: SessionPool, renderer: Renderer, *, max_context: int) -> None:
        """Raises UserError where a chat template cannot continue a conversation."""
        self.env, self.pool, self.renderer, self.max_context = env, pool, renderer, max_context
        self.tools: Tools = pool.check().tools
        self.parse: Parser = parser_of(env.tool_parser, self.tools, renderer.tokenizer, "env.tool_parser")
        said: Message = {"role": "tool" if self.tools else "user", "content": "?"}
        renderer.extend([said], renderer.eos_ids[:1], self.tools)

    def take_seconds(self) -> float:
        """Seconds that attempts waited for user code since the last call, summed over attempts."""
        seconds, self.pool.seconds = self.pool.seconds, 0.0
        return seconds

    def close(self) -> None:
        """Ends the processes of tools and environment."""
        self.pool.close()

    async def play(
        self, prompts: Sequence[Prompt], generate: Generate, *, group_size: int, sampling: Sampling, seed: int
    ) -> list[TrajectoryGroup]:
        """One group of unscored trajectories a prompt, in order."""
        attempts = [
            self._opened(prompt, index, seed_of(seed, "env", number))
            for number, prompt in enumerate(prompts)
            for index in range(group_size)
        ]
        try:
            await _each(self._start(attempt) for attempt in attempts)
            for turn in range(self.env.max_turns):
                live = [attempt for attempt in attempts if self._may_go_on(attempt)]
                if not live:
                    break
                completions = await generate([a.ids for a in live], sampling, seed_of(seed, "turn", turn))
                await _each(self._hear(a, c) for a, c in zip(live, completions, strict=True))
            for attempt in attempts:
                attempt.status = attempt.status or Status.TURNS
            await _each(self._settle(attempt) for attempt in attempts)
        finally:
            await asyncio.gather(*(attempt.session.close() for attempt in attempts), return_exceptions=True)
        trajectories = [self._trajectory(attempt) for attempt in attempts]
        return [
            TrajectoryGroup(
                prompt=prompt,
                # An attempt that failed before its first reply has no token to train on.
                trajectories=tuple(t for t in trajectories[i * group_size : (i + 1) * group_size] if t.turns),
            )
            for i, prompt in enumerate(prompts)
        ]

    def _opened(self, prompt: Prompt, index: int, seed: int) -> Attempt:
        ids = self.renderer.render(prompt.messages, self.tools)
        session = self.pool.open(prompt.columns, Identity(seed, index))
        return Attempt(prompt=prompt, index=index, session=session, ids=ids, context=list(ids))

    async def _start(self, attempt: Attempt) -> None:
        try:
            opening = _messages(await attempt.session.start())
        except SessionError as error:
            return self._failed(attempt, error)
        if opening:
            # They come before the policy's first reply: a part of the prompt.
            attempt.messages += opening
            ids = self.renderer.render([*attempt.prompt.messages, *opening], self.tools)
            attempt.ids, attempt.context = ids, list(ids)

    def _may_go_on(self, attempt: Attempt) -> bool:
        if attempt.status is None and len(attempt.ids) >= self.max_context:
            attempt.status = Status.CONTEXT
        return attempt.status is None

    async def _hear(self, attempt: Attempt, completion: Completion) -> None:
        attempt.hear(completion)
        text = self.renderer.decode(completion.token_ids)
        reply = self.parse(self.renderer.decode_reply(completion.token_ids) if self.env.tool_parser else text)
        attempt.messages.append(_said(reply))
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
            self._observe(attempt, step, completion)

    def _observe(self, attempt: Attempt, step: Step, completion: Completion) -> None:
        attempt.reward(rewards_of(step))
        observed = _messages(step.observation)
        attempt.messages += observed
        if step.done or not observed:
            attempt.status = Status.DONE if step.done else Status.ANSWERED
            return
        attempt.context = self.renderer.extend(observed, completion.token_ids, self.tools)
        attempt.ids += attempt.context

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
        if self.env.on_error == "raise":
            named = self.env.use or ", ".join(self.env.tools)
            raise UserError(f"env: {named} {error} (prompt {attempt.prompt.id}, turn {len(attempt.turns)})")
        attempt.status = Status.TIMEOUT if error.timed_out else Status.FAILED

    async def _settle(self, attempt: Attempt) -> None:
        """The environment's reward of the whole attempt."""
        if not attempt.turns or attempt.status in (Status.TIMEOUT, Status.FAILED):
            return
        try:
            attempt.reward(await attempt.session.reward())
        except SessionError as error:
            self._failed(attempt, error)

    def _trajectory(self, attempt: Attempt) -> Trajectory:
        last = attempt.turns[-1].completion.token_ids if attempt.turns else ()
        return Trajectory(
            group_id=attempt.prompt.id,
            index=attempt.index,
            turns=tuple(attempt.turns),
            text=self.renderer.decode(last),
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
            for prompt in rows:
                lacking = sorted(pool.check().required - prompt.columns.keys())
                if lacking:
                    raise UserError(
                        f"{key}: a tool needs the column '{lacking[0]}', which row {prompt.id} of {section} has not"
                    )
        return Episodes(env, pool, renderer, max_context=recipe.rollout.max_context)
    except BaseException:
        pool.close()
        raise


def _messages(observation: Observation) -> list[Message]:
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}] if observation else []
    return list(observation)


def _said(reply: Reply) -> Message:
    """The policy's reply as a message, for logs and rewards; it is never rendered."""
    thought = {"reasoning_content": reply.thought} if reply.thought else {}
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
        for c in reply.calls
    ]
    return {"role": "assistant", "content": reply.text, **thought, **({"tool_calls": calls} if calls else {})}


async def _each(steps: Iterable[Coroutine[object, object, None]]) -> None:
    """All of the coroutines side by side; the first error ends the others."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
