"""From prompts to scored groups: render, sample, score, shape.

P prompts -> P * G token sequences -> Completion -> reward functions -> TrajectoryGroup
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields

from cispo.recipe.schema import Recipe
from cispo.rollout.renderer import Renderer
from cispo.rollout.rewards import Attempts, RewardRunner, Score, Scores
from cispo.types import Completion, Prompt, RepetitionStop, Sampling, Trajectory, TrajectoryGroup, Turn

Generate = Callable[[list[list[int]], Sampling, int], Awaitable[list[Completion]]]
"""(prompts as token ids, sampling, seed) -> one completion a prompt, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """A batch of scored groups and what it took to get them."""

    groups: list[TrajectoryGroup]
    dropped: int
    """Groups lost because a reward failed (`reward.on_error: drop_group`)."""
    tokens: int
    """Sampled tokens."""
    seconds_sampling: float
    seconds_scoring: float
    rounds: int = 1
    """Calls of `roll_out` that are in it."""

    def __add__(self, other: Rollouts) -> Rollouts:
        names = [field.name for field in fields(self)]
        return Rollouts(**{name: getattr(self, name) + getattr(other, name) for name in names})


async def roll_out(
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    generate: Generate,
    renderer: Renderer,
    rewards: RewardRunner | None,
    sampling: Sampling,
    seed: int,
    overlong_buffer: int = 0,
    overlong_factor: float = 1.0,
) -> Rollouts:
    """Samples `group_size` completions of every prompt and scores them; without `rewards` every reward is 0."""
    started = time.perf_counter()
    prompt_ids = [renderer.render(p.messages) for p in prompts]
    completions = await generate([ids for ids in prompt_ids for _ in range(group_size)], sampling, seed)
    sampled = time.perf_counter()
    groups = [completions[i : i + group_size] for i in range(0, len(completions), group_size)]
    texts = [[renderer.decode(c.token_ids) for c in group] for group in groups]
    scores: list[Scores | None] = [[Score(total=0.0)] * group_size for _ in prompts]
    if rewards is not None:
        scores = await rewards.score([Attempts(prompt=p, completions=t) for p, t in zip(prompts, texts, strict=True)])
    scored = time.perf_counter()

    def shaping(completion: Completion) -> float:
        return overlong_penalty(
            len(completion.token_ids), max_tokens=sampling.max_tokens, buffer=overlong_buffer, penalty=overlong_factor
        )

    kept = [
        _group(prompt, ids, group, text, score, shaping)
        for prompt, ids, group, text, score in zip(prompts, prompt_ids, groups, texts, scores, strict=True)
        if score is not None
    ]
    return Rollouts(
        groups=kept,
        dropped=len(prompts) - len(kept),
        tokens=sum(len(c.token_ids) for c in completions),
        seconds_sampling=sampled - started,
        seconds_scoring=scored - sampled,
    )


def _group(
    prompt: Prompt,
    prompt_ids: Sequence[int],
    completions: Sequence[Completion],
    texts: Sequence[str],
    scores: Scores,
    shaping: Callable[[Completion], float],
) -> TrajectoryGroup:
    trajectories = [
        Trajectory(
            group_id=prompt.id,
            index=index,
            turns=(Turn(prompt_ids=tuple(prompt_ids), completion=completion),),
            text=text,
            reward=score.total + shaping(completion),
            rewards=score.values,
            extra=score.extra,
        )
        for index, (completion, text, score) in enumerate(zip(completions, texts, scores, strict=True))
    ]
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(trajectories))


def overlong_penalty(length: int, *, max_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, eq. 13), at most 0.

    Nothing up to max_tokens - buffer tokens, then linear, -penalty from max_tokens on. A buffer of 0 is off.
    """
    if buffer == 0:
        return 0.0
    over = length - (max_tokens - buffer)
    return -penalty * min(max(over / buffer, 0.0), 1.0)


def sampling_of(recipe: Recipe, renderer: Renderer) -> Sampling:
    rollout = recipe.rollout
    return Sampling(
        max_tokens=rollout.max_tokens,
        eos_ids=renderer.eos_ids,
        temperature=rollout.temperature,
        repetition=RepetitionStop(**rollout.repetition.model_dump()),
    )
