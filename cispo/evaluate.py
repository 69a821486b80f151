"""Held-out evaluation: the rollouts of training, on prompts that training never sees.

HeldOut (prompts, sampling) --roll_out--> groups --measure--> Share of each estimate --names--> metrics
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cispo.algorithms.advantages import reaches
from cispo.errors import UserError
from cispo.metrics import pass_at_k
from cispo.output.estimates import Share, maj_at_k, share_of
from cispo.recipe.held_out import held_out_of, passes, prefix_of, samples_of, votes
from cispo.recipe.schema import Eval, Recipe
from cispo.recipe.seeds import seed_of
from cispo.recipe.user_code import load_object
from cispo.rollout.prompts import Prompts, Say, prompts_of, warn
from cispo.rollout.renderer import Renderer
from cispo.rollout.rewards import RewardRunner
from cispo.rollout.rollout import RolloutSetup, roll_out
from cispo.types import Prompt, Sampling, Trajectory, TrajectoryGroup

Read = Callable[[str], object]
"""Answer of a completion, None where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One held-out set with its sampling."""

    key: str
    """Recipe key, for errors."""
    prompts: Sequence[Prompt]
    keys: Eval
    prefix: str
    """First part of the names of its metrics: "eval/", or "eval/NAME/" in a list of sets."""
    samples: int
    read: Read | None

    @property
    def name(self) -> str:
        """Name in a list of sets, else ""."""
        return self.prefix.removeprefix("eval/").removesuffix("/")

    def sampling(self, training: Sampling) -> Sampling:
        """The training's sampling with the set's own temperature, top_p and max_tokens.

        A run of probable tokens (rollout.repetition.run_length) is not looked for under another distribution.
        """
        keys, repetition = self.keys, training.repetition
        own = replace(
            training,
            temperature=training.temperature if keys.temperature is None else keys.temperature,
            top_p=keys.top_p,
            max_tokens=keys.max_tokens or training.max_tokens,
        )
        plain = own.top_p == 1 and own.temperature in (0, 1)
        return own if plain else replace(own, repetition=replace(repetition, run_length=0))

    def seed(self, recipe: Recipe) -> int:
        return seed_of(recipe.seed, "eval", *([self.name] if self.name else []))


def held_out_sets(recipe: Recipe, renderer: Renderer, say: Say = warn) -> list[HeldOut]:
    """The recipe's held-out sets, loaded and checked; rows that are too long are left out where they may be."""
    several = isinstance(recipe.eval, list)
    return [
        _loaded(recipe, one, f"eval.{number}" if several else "eval", renderer, say)
        for number, one in enumerate(held_out_of(recipe))
    ]


def _loaded(recipe: Recipe, keys: Eval, key: str, renderer: Renderer, say: Say) -> HeldOut:
    prompts = prompts_of(keys, key, renderer, recipe, say)
    return HeldOut(
        key=key,
        prompts=_fitting(prompts),
        keys=keys,
        prefix=prefix_of(recipe, keys),
        samples=samples_of(recipe, keys),
        read=None if keys.answer is None else _reader(keys.answer, f"{key}.answer"),
    )


def _fitting(prompts: Prompts) -> Sequence[Prompt]:
    if not prompts.too_long:
        return prompts
    long = set(prompts.too_long)
    return [prompt for prompt in prompts if prompt.id not in long]


def _reader(path: str, key: str) -> Read:
    read = load_object(path, key)
    if not callable(read):
        raise UserError(f"{key}: '{path}' is not a function")
    return read


def is_right(trajectory: Trajectory, judge: str) -> bool:
    """Whether the judge, the first reward function that applies to the prompt, gave at least 1, but for rounding."""
    return reaches(trajectory.rewards.get(judge, 0.0), 1.0)


def num_right(group: TrajectoryGroup, judge: str) -> int:
    """Right attempts of the group."""
    return sum(is_right(trajectory, judge) for trajectory in group.trajectories)


def num_judged(group: TrajectoryGroup, judge: str) -> int:
    """Attempts of the group to which the judge gave a number, and not None."""
    return sum(judge in trajectory.rewards for trajectory in group.trajectories)


async def evaluate_set(
    one: HeldOut, setup: RolloutSetup, *, training: Sampling, seed: int
) -> tuple[dict[str, float], list[TrajectoryGroup]]:
    """`evaluate` of a set with its own sampling, and metrics by its name.

    In a list of sets, eval/NAME/avg@k with k = samples takes the place of accuracy, with the ends of its 95 % interval
    in avg@k_low and avg@k_high; all other names are those of `evaluate`.
    """
    sampling, samples = one.sampling(training), one.samples
    metrics, groups = await evaluate(
        one.prompts, setup, samples=samples, sampling=sampling, seed=seed, prefix=one.prefix, read=one.read
    )
    if one.name and f"{one.prefix}accuracy" in metrics:
        del metrics[f"{one.prefix}accuracy"], metrics[f"{one.prefix}accuracy_stderr"]
        average = measures(groups, setup.rewards, samples=samples, read=None)["avg@"]
        names = {"": average.mean, "_low": average.low, "_high": average.high}
        metrics |= {f"{one.prefix}avg@{samples}{end}": value for end, value in names.items() if math.isfinite(value)}
    return metrics, groups


async def evaluate(
    prompts: Sequence[Prompt],
    setup: RolloutSetup,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    prefix: str = "eval/",
    read: Read | None = None,
) -> tuple[dict[str, float], list[TrajectoryGroup]]:
    """Samples every prompt `samples` times; `setup` must have rewards.

    eval/accuracy is the share of right completions, with its standard error over prompts; eval/pass@k the chance that
    at least one of k completions is right, eval/maj@k that the most frequent answer of k is, as `read` reads answers,
    for powers of two and k = samples. eval/prompts counts the prompts in the accuracy, eval/dropped those left out
    because a reward failed or the judge gave None to all their completions, eval/unjudged the completions of the others
    to which it gave None: accuracy is over the judged ones, pass@k and maj@k over prompts with all judged.
    """
    assert setup.rewards is not None, "accuracy needs a judge"
    rollouts = await roll_out(prompts, setup, group_size=samples, sampling=sampling, seed=seed)
    counts = _counts(rollouts.groups, setup.rewards)
    metrics: dict[str, float] = {
        f"{prefix}prompts": len(counts),
        f"{prefix}dropped": len(prompts) - len(counts),
        f"{prefix}unjudged": sum(samples - judged for _, judged in counts),
    }
    if not counts:
        return metrics, rollouts.groups
    shares = [right / judged for right, judged in counts]
    accuracy = math.fsum(shares) / len(shares)
    spread = math.fsum((s - accuracy) ** 2 for s in shares) / max(len(shares) - 1, 1)
    trajectories = [t for group in rollouts.groups for t in group.trajectories]
    metrics |= {
        f"{prefix}accuracy": accuracy,
        f"{prefix}accuracy_stderr": math.sqrt(spread / len(shares)),
        f"{prefix}reward": math.fsum(t.reward for t in trajectories) / len(trajectories),
        f"{prefix}length": math.fsum(t.length for t in trajectories) / len(trajectories),
    }
    found = measures(rollouts.groups, setup.rewards, samples=samples, read=read)
    metrics |= {f"{prefix}{name}": share.mean for name, share in found.items() if name != "avg@"}
    return metrics, rollouts.groups


def measures(
    groups: Sequence[TrajectoryGroup], rewards: RewardRunner | None, *, samples: int, read: Read | None
) -> dict[str, Share]:
    """avg@ (over all judged completions), pass@k and maj@k with their intervals over prompts."""
    assert rewards is not None, "accuracy needs a judge"
    counts = _counts(groups, rewards)
    found = {"avg@": share_of([right / judged for right, judged in counts])} if counts else {}
    whole = [right for right, judged in counts if judged == samples]
    if whole:
        found |= {f"pass@{k}": share_of([pass_at_k(right, samples, k) for right in whole]) for k in passes(samples)}
    if read is None:
        return found
    voters = [
        (
            [_answer(read, t.text) for t in group.trajectories],
            [is_right(t, rewards.judge_of(group.prompt.source)) for t in group.trajectories],
        )
        for group in groups
        if num_judged(group, rewards.judge_of(group.prompt.source)) == samples
    ]
    if voters:
        found |= {f"maj@{k}": share_of([maj_at_k(*voter, k) for voter in voters]) for k in votes(samples)}
    return found


def _counts(groups: Sequence[TrajectoryGroup], rewards: RewardRunner) -> list[tuple[int, int]]:
    """(right, judged) completions of each prompt with a judged one."""
    judges = [(group, rewards.judge_of(group.prompt.source)) for group in groups]
    counts = [(num_right(group, judge), num_judged(group, judge)) for group, judge in judges]
    return [(right, judged) for right, judged in counts if judged]


def _answer(read: Read, text: str) -> str | None:
    """The answer as text; where the user's function fails on a completion, that has none."""
    try:
        answer = read(text)
        return None if answer is None else str(answer)
    except Exception:
        return None


def gaps(metrics: Mapping[str, float], rewards: RewardRunner, prefix: str = "eval/") -> str:
    """A sentence on the prompts and completions that the held-out accuracy leaves out, "" where there are none."""
    dropped, unjudged = metrics.get(f"{prefix}dropped", 0), metrics.get(f"{prefix}unjudged", 0)
    parts = [f"{dropped} held-out prompts"] * bool(dropped) + [f"{unjudged} completions of others"] * bool(unjudged)
    if not parts:
        return ""
    reason = f" ({rewards.last_problem})" if rewards.problems else ""
    named = "" if prefix == "eval/" else f" on {prefix.removeprefix('eval/').removesuffix('/')}"
    return (
        f"the held-out accuracy{named} is over {metrics[f'{prefix}prompts']} prompts and leaves out "
        f"{' and '.join(parts)}: a reward failed or gave None{reason}"
    )
