"""From prompts to scored groups in three stages, and those groups as JSON.

    P prompts --sample--> P groups of G trajectories --score--> rewards --shape--> length penalty --> Rollouts <--> JSON

`sample` makes attempts of one completion; with tools or an environment, `RolloutSetup.play` takes its place. The two
later stages work on trajectories of any number of turns.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

from cispo.recipe.schema import Recipe
from cispo.rollout.renderer import Renderer
from cispo.rollout.rewards import Attempts, RewardRunner, Scores, text_of
from cispo.types import (
    Completion,
    FinishReason,
    Home,
    Prompt,
    RepetitionStop,
    RoutedExperts,
    Sampling,
    Trajectory,
    TrajectoryGroup,
    Turn,
)

Generate = Callable[[list[list[int]], Sampling, int], Awaitable[list[Completion]]]
"""(prompts as token ids, sampling, seed) -> one completion a prompt, in order."""

GenerateAt = Callable[[list[list[int]], Sampling, int, Sequence[Home]], Awaitable[list[Completion]]]
"""The same with a home for each prompt: all turns of an attempt are sampled at one engine."""

_Json = Mapping[str, Any]


class Play(Protocol):
    """How attempts of several turns come about."""

    async def __call__(
        self, prompts: Sequence[Prompt], generate: Generate, *, group_size: int, sampling: Sampling, seed: int
    ) -> list[TrajectoryGroup]:
        """One group of unscored trajectories a prompt, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSetup:
    """The parts that training and evaluation share."""

    generate: Generate
    renderer: Renderer
    rewards: RewardRunner | None
    """None: every reward is 0."""
    play: Play | None = None
    """None: an attempt is one completion of the rendered prompt."""
    step: int = 0
    """The training step, for reward functions; 0 outside of a training."""
    steps: int = 0
    """Of the training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """A batch of scored groups and its cost."""

    groups: list[TrajectoryGroup]
    dropped: int
    """Groups lost because a reward failed (`reward.on_error: drop_group`)."""
    unscored: int = 0
    """Completions left out of the other groups because no reward function applied to them: all gave None."""
    problems: tuple[str, ...] = ()
    """Errors of tools, environments and agents that ended attempts, one of each group."""
    tokens: int
    """Sampled tokens, those of dropped groups included."""
    seconds_scoring: float
    rounds: int = 1
    """Calls of `roll_out` that were added up."""

    def __add__(self, other: Rollouts) -> Rollouts:
        names = [field.name for field in fields(self)]
        return Rollouts(**{name: getattr(self, name) + getattr(other, name) for name in names})


def sampling_of(recipe: Recipe, renderer: Renderer) -> Sampling:
    """The recipe's sampling parameters, with the tokenizer's end-of-sequence tokens."""
    rollout = recipe.rollout
    return Sampling(
        max_tokens=rollout.max_tokens,
        eos_ids=renderer.eos_ids,
        temperature=rollout.temperature,
        repetition=RepetitionStop(**rollout.repetition.model_dump()),
    )


async def roll_out(
    prompts: Sequence[Prompt],
    setup: RolloutSetup,
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Rollouts:
    """Samples `group_size` attempts at every prompt, scores them and adds the overlong penalty."""
    play = partial(sample, renderer=setup.renderer) if setup.play is None else setup.play
    groups = await play(prompts, setup.generate, group_size=group_size, sampling=sampling, seed=seed)
    sampled = time.perf_counter()
    kept = groups if setup.rewards is None else await score(groups, setup.rewards, step=setup.step, steps=setup.steps)
    scored = time.perf_counter()
    with_rewards = [group for group in kept if group.trajectories]
    return Rollouts(
        groups=shape(with_rewards, max_tokens=sampling.max_tokens, buffer=overlong_buffer, penalty=overlong_factor),
        dropped=len(groups) - len(kept),
        unscored=group_size * len(kept) - sum(len(group.trajectories) for group in kept),
        problems=tuple(group.problem for group in groups if group.problem),
        tokens=sum(t.length for group in groups for t in group.trajectories),
        seconds_scoring=scored - sampled,
    )


async def sample(
    prompts: Sequence[Prompt],
    generate: Generate,
    renderer: Renderer,
    *,
    group_size: int,
    sampling: Sampling,
    seed: int,
) -> list[TrajectoryGroup]:
    """One group of unscored single-turn trajectories (reward 0) a prompt, in order; one call of `generate` for all."""
    prompt_ids = [renderer.with_args(prompt.template_args).render(prompt.messages) for prompt in prompts]
    completions = await generate([ids for ids in prompt_ids for _ in range(group_size)], sampling, seed)
    groups = [completions[i : i + group_size] for i in range(0, len(completions), group_size)]
    return [
        TrajectoryGroup(
            prompt=prompt,
            trajectories=tuple(
                Trajectory(
                    group_id=prompt.id,
                    index=index,
                    turns=(Turn(context_ids=tuple(ids), completion=completion),),
                    text=renderer.decode(completion.token_ids),
                    reward=0.0,
                )
                for index, completion in enumerate(group)
            ),
        )
        for prompt, ids, group in zip(prompts, prompt_ids, groups, strict=True)
    ]


async def score(
    groups: Sequence[TrajectoryGroup], rewards: RewardRunner, *, step: int = 0, steps: int = 0
) -> list[TrajectoryGroup]:
    """The groups with their rewards, without those that `rewards` dropped.

    A completion to which no function applies has no reward, not even 0, and leaves its group.
    """
    attempts = [
        Attempts(
            prompt=g.prompt,
            completions=[t.text for t in g.trajectories],
            facts=[_facts(g.prompt, t, step, steps) for t in g.trajectories],
        )
        for g in groups
    ]
    scored = zip(groups, await rewards.score(attempts), strict=True)
    return [_with_scores(group, scores) for group, scores in scored if scores is not None]


def _facts(prompt: Prompt, t: Trajectory, step: int, steps: int) -> Mapping[str, object]:
    """`reward_function.FACTS` of one attempt."""
    said = t.messages or ({"role": "assistant", "content": t.text},)
    return {
        "prompt": text_of(prompt),
        "messages": [dict(message) for message in prompt.messages],
        "conversation": [dict(message) for message in (*prompt.messages, *said)],
        "status": t.status or t.finish_reason.value,
        "turns": len(t.turns),
        "calls": t.events.get("calls", 0),
        "failed_calls": t.events.get("failed", 0),
        "unreadable": t.events.get("unreadable", 0),
        "turn_rewards": [sum(turn.rewards.values()) for turn in t.turns],
        "finish_reason": t.finish_reason.value,
        "token_ids": list(t.turns[-1].completion.token_ids),
        "truncated": t.turns[-1].completion.finish_reason is FinishReason.LENGTH,
        "step": step,
        "steps": steps,
    }


def _with_scores(group: TrajectoryGroup, scores: Scores) -> TrajectoryGroup:
    trajectories = tuple(
        replace(trajectory, reward=given.total, rewards=given.values, extra=given.extra)
        for trajectory, given in zip(group.trajectories, scores, strict=True)
        if given.values
    )
    return replace(group, trajectories=trajectories)


def shape(groups: Sequence[TrajectoryGroup], *, max_tokens: int, buffer: int, penalty: float) -> list[TrajectoryGroup]:
    """Adds `overlong_penalty` of its longest completion to the reward of every trajectory."""

    def shaped(t: Trajectory) -> Trajectory:
        longest = max(len(turn.completion.token_ids) for turn in t.turns)
        return replace(
            t, reward=t.reward + overlong_penalty(longest, max_tokens=max_tokens, buffer=buffer, penalty=penalty)
        )

    return [replace(group, trajectories=tuple(map(shaped, group.trajectories))) for group in groups]


def overlong_penalty(length: int, *, max_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), at most 0.

    0 up to max_tokens - buffer tokens, then linear, -penalty from max_tokens on. A buffer of 0 switches it off.
    """
    if buffer == 0:
        return 0.0
    over = length - (max_tokens - buffer)
    return -penalty * min(max(over / buffer, 0.0), 1.0)


def rollouts_to_json(rollouts: Rollouts) -> dict[str, object]:
    """Plain values for a checkpoint: prompts by their ids, floats exact.

    `Trajectory.extra` must hold JSON values, as the reward worker makes sure.
    """
    plain = {f.name: getattr(rollouts, f.name) for f in fields(Rollouts) if f.name != "groups"}
    groups = [
        {"prompt": group.prompt.id, "trajectories": [asdict(t, dict_factory=_plain) for t in group.trajectories]}
        for group in rollouts.groups
    ]
    return {**plain, "groups": groups}


def _plain(values: list[tuple[str, object]]) -> dict[str, object]:
    """Bytes as base64 text; routed experts that are not recorded, and counts of zero, leave no key."""
    sparse = ("routed_experts", "cached", "accepted")
    kept = [(n, value) for n, value in values if n not in sparse or value not in (None, 0)]
    return {n: base64.b64encode(value).decode() if isinstance(value, bytes) else value for n, value in kept}


def rollouts_from_json(values: _Json, prompts: Sequence[Prompt]) -> Rollouts:
    """The inverse of `rollouts_to_json`; `prompts` are the dataset. Fields that the types do not have are ignored."""
    groups = [
        TrajectoryGroup(prompt=prompts[group["prompt"]], trajectories=tuple(map(_trajectory, group["trajectories"])))
        for group in values["groups"]
    ]
    return Rollouts(**_known(Rollouts, values, groups=groups))


def _trajectory(values: _Json) -> Trajectory:
    return Trajectory(**_known(Trajectory, values, turns=tuple(map(_turn, values["turns"]))))


def _turn(values: _Json) -> Turn:
    # Versions before 0.2 called the context `prompt_ids`: it was the whole prompt.
    context = tuple(values["context_ids"] if "context_ids" in values else values["prompt_ids"])
    return Turn(**_known(Turn, values, context_ids=context, completion=_completion(values["completion"])))


def _completion(values: _Json) -> Completion:
    converted: dict[str, object] = {"finish_reason": FinishReason(values["finish_reason"])}
    if routed := values.get("routed_experts"):
        data = base64.b64decode(routed["data"])
        converted["routed_experts"] = RoutedExperts(**_known(RoutedExperts, routed, data=data))
    return Completion(**_known(Completion, values, **converted))


def _known(kind: type, values: _Json, **converted: object) -> dict[str, Any]:
    """The `values` of the fields that `kind` has, lists as tuples, with the `converted` ones in their place."""
    known = {field.name: values[field.name] for field in fields(kind) if field.name in values}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()} | converted
