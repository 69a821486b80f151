"""Causes of a difference between sampler and learner, ranked: tokens and weights stay, one thing changes at a time.

    tokens, e (engine), l (learner) --readings with one change--> x --> share that the change explains --> Cause, ranked

r is the plain reading (`readings`): e - r is the engine's part of the gap e - l, l - r the learner's. A change that the
engine makes is found by a small e - x; one that the learner makes, by changing the learner itself. Shares are of the
mean |e - l|; causes are tried one by one, so that shares need not add up to 1.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cispo.algorithms.losses import NegativeLogLikelihood
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack_for
from cispo.commands.readings import (
    by_sample,
    golden_section,
    policy_copy,
    read_alone,
    read_stepwise,
    rope_theta,
)
from cispo.errors import UserError
from cispo.files import read_json
from cispo.policies.loading import load_policy
from cispo.policies.policy import Policy
from cispo.recipe.schema import Recipe
from cispo.types import Sample
from cispo.weights.buckets import tensor_checksum
from cispo.weights.publish import mapped_weights
from cispo.workers import Workers

# Tokens that are read again, prompts included: each reading of a large policy on a CPU takes a while.
_MOST_TOKENS = 6_000

# A cause below this share of the gap is left out; above the other one, no further causes are looked for.
_LEAST_SHARE = 0.02
MOST_OF_IT = 0.5

_STEP = 1e-4
"""Learning rate of the doctor's updates: every weight moves by about so much."""

_SFT = Objective(loss=NegativeLogLikelihood())

_THETAS = (1e3, 1e4, 1e5, 5e5, 6e5, 1e6, 5e6, 1e7)
"""Bases of rotary positions in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One thing that was changed, and the part of the gap that went away with it."""

    name: str
    side: str
    """engine, learner or both."""
    share: float
    """Of the mean gap, in [0, 1]."""
    left: float
    """Mean gap, in nats, that stays."""
    evidence: str = ""
    advice: str = ""
    """Keys to set, or the place to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Fixed tokens and weights with the log-probabilities of both sides, [N] float64 each."""

    samples: Sequence[Sample]
    engine: Tensor
    learner: Tensor
    temperature: float
    model: Path
    """A folder with the policy's config.json."""
    weights: Path
    """The learner's weights, published."""
    before: Path
    """Those of the version before."""
    dtype: str = "float32"
    """Of the policy in engine and learner."""
    plain: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The plain reading."""
    noise: float = 0.0
    """Mean gap, in nats, that float32's rounding makes in this policy; smaller gains have no cause."""

    @property
    def gap(self) -> float:
        return mean_size(self.engine - self.learner)


def first_tokens(samples: Sequence[Sample]) -> list[Sample]:
    """The first samples, of at most _MOST_TOKENS tokens; at least one."""
    kept: list[Sample] = []
    total = 0
    for sample in samples:
        total += len(sample.token_ids)
        if kept and total > _MOST_TOKENS:
            break
        kept.append(sample)
    return kept


async def move_weights(recipe: Recipe, workers: Workers, samples: Sequence[Sample]) -> None:
    """One small optimizer step, so that weights that do not arrive show. Raises UserError without a finite gradient."""
    samples = [replace(sample, advantages=sample.loss_mask.float(), routes=None) for sample in samples]
    results = await workers.update(pack_for(recipe, samples, "token"), _SFT, _STEP)
    if not results[0].taken:
        raise UserError("doctor found: the gradient of the policy is not finite")


async def copy_weights(workers: Workers, folder: Path, name: str) -> Path:
    """A copy of the learner's present weights."""
    published = await workers.publish(workers.version)
    return Path(shutil.copyfile(published, folder / f"{name}.safetensors"))


async def find_causes(
    recipe: Recipe,
    workers: Workers,
    model: Path,
    folder: Path,
    *,
    samples: Sequence[Sample],
    sample: Callable[[Sequence[Sequence[int]]], Awaitable[list[Sample]]],
) -> tuple[Case, list[Cause]]:
    """The tokens and the ranked causes, after one more update of the weights, from tokens that are sampled under them.

    `samples` were sampled last: their prompts are sampled again by `sample`, and the update is made on them. `model`
    is the folder that learner and engines started from, `folder` takes copies of the weights.
    """
    few = first_tokens(samples)
    before = await copy_weights(workers, folder, "before")
    sums_before = [await engine.weight_checksums() for engine in workers.engines]
    await move_weights(recipe, workers, few)
    await workers.sync_weights(workers.version + 1)
    weights = await copy_weights(workers, folder, "weights")
    sums = [await engine.weight_checksums() for engine in workers.engines]
    fixed = await sample([s.token_ids[: int(s.loss_mask.int().argmax())].tolist() for s in few])

    async def learner(samples: Sequence[Sample], **keys: object) -> Tensor:
        """The learner's own log-probabilities, with keys of the section `learner` changed."""
        changed = recipe.model_copy(update={"learner": recipe.learner.model_copy(update=keys)})
        batches = pack_for(changed, samples, "token")
        return by_sample(batches, await workers.logprobs(batches), samples)

    case = Case(
        samples=fixed,
        engine=torch.cat([s.rollout_logprobs[s.loss_mask] for s in fixed]).double(),
        learner=await learner(fixed),
        temperature=recipe.rollout.temperature or 1.0,
        model=model,
        weights=weights,
        before=before,
        dtype=recipe.policy.number_format,
    )
    with exact_policy(case) as policy:
        plain = read_alone(policy, fixed, temperature=case.temperature)
    with _policy(case) as policy:
        noise = 4 * mean_size(read_alone(policy, fixed, temperature=case.temperature) - plain)
    case = replace(case, plain=plain, noise=noise)
    evidence = [stale_weights(*pair, weights) for pair in zip(sums_before, sums, strict=True) if pair[1]]
    causes = [*engine_causes(case, "; ".join(dict.fromkeys(evidence)))]
    causes += await learner_causes(case, learner, shares=recipe.learner.share_prompts)
    if max(cause.share for cause in causes) < MOST_OF_IT:
        causes += rope_causes(case)
    if recipe.policy.router_replay == "off" and fixed[0].routes is not None:
        bare = await learner([replace(s, routes=None) for s in fixed])
        causes.append(_router_cause(case, bare, max(cause.share for cause in causes)))
    if case.dtype == "bfloat16":
        causes.append(_rounding_cause(case))
    return case, ranked(causes, case)


def engine_causes(case: Case, checksums: str) -> Iterator[Cause]:
    """Changes that the engine may have made, by readings that make them; `checksums` is what was found of weights."""
    error = mean_size(case.engine - case.plain)

    def cause(reading: Tensor, name: str, advice: str, evidence: str = "") -> Cause:
        left = mean_size(case.engine - reading)
        share = share_of(case, error - left)
        return Cause(name=name, side="engine", share=share, left=left, advice=advice, evidence=evidence)

    with _policy(case) as policy:
        stepwise = read_stepwise(policy, case.samples, temperature=case.temperature)
        yield cause(
            stepwise,
            "chunks against recurrence",
            "the forms in chunks (learner) and token by token (engine) differ: the doctor's first table "
            "tells which is wrong on this machine",
        )
        rounded = read_stepwise(policy, case.samples, temperature=case.temperature, state=torch.bfloat16)
        if not torch.equal(rounded, stepwise):
            yield cause(
                rounded,
                "recurrent states in bfloat16",
                "rollout.engine_args: {mamba_cache_dtype: float32, mamba_ssm_cache_dtype: float32}",
            )
        head = read_alone(policy, case.samples, temperature=case.temperature, head=torch.bfloat16)
        yield cause(head, "LM head in bfloat16", "rollout.engine_args: {hf_overrides: {head_dtype: float32}}")
    if case.dtype == "float32":
        with _policy(case, dtype=torch.bfloat16) as policy:
            low = read_alone(policy, case.samples, temperature=case.temperature)
        advice = "no dtype in rollout.engine_args: the policy's is policy.dtype"
        yield cause(low, "the whole engine in bfloat16", advice)
    with _policy(case, weights=case.before) as policy:
        last = read_alone(policy, case.samples, temperature=case.temperature)
    first = load_policy(case.model).eval()
    start = read_alone(first, case.samples, temperature=case.temperature)
    stale = min(last, start, key=lambda reading: mean_size(case.engine - reading))
    advice = "updates do not reach the engine: rollout.verify_weights: true, then another rollout.weight_sync"
    yield cause(stale, "stale weights", advice, checksums)


def rope_causes(case: Case) -> Iterator[Cause]:
    """The base of rotary positions that fits the engine best, if the config's own is not it."""
    own = rope_theta(read_json(case.model / "config.json"))
    if own is None:
        return

    def left(log_theta: float) -> float:
        with _policy(case, changes={"rope_theta": math.exp(log_theta)}) as policy:
            return mean_size(case.engine - read_alone(policy, case.samples, temperature=case.temperature))

    found = {theta: left(math.log(theta)) for theta in _THETAS if theta != own}
    theta = min(found, key=lambda theta: found[theta])
    error, best = mean_size(case.engine - case.plain), (math.log(theta), found[theta])
    if best[1] >= error:
        return
    best = golden_section(left, best[0] - 1.4, best[0] + 1.4, best)
    yield Cause(
        name="base of the rotary positions",
        side="engine",
        share=share_of(case, error - best[1]),
        left=best[1],
        evidence=f"config.json has rope_theta {own:g}, the engine's tokens fit {math.exp(best[0]):.3g}",
        advice="rope_theta reaches the engine under another key: rollout.engine_args: {hf_overrides: ...}",
    )


class LearnerReading(Protocol):
    """The learner's log-probabilities [N] of samples, with keys of its section changed."""

    def __call__(self, samples: Sequence[Sample], **keys: object) -> Awaitable[Tensor]: ...


async def learner_causes(case: Case, learner: LearnerReading, *, shares: bool) -> list[Cause]:
    """Changes of the learner itself: one sequence a micro-batch, and where it `shares` prompts, each read anew."""
    error = mean_size(case.learner - case.plain)

    def cause(reading: Tensor, name: str, advice: str, evidence: str = "") -> Cause:
        share = share_of(case, error - mean_size(reading - case.plain))
        left = mean_size(case.engine - reading)
        return Cause(name=name, side="learner", share=share, left=left, advice=advice, evidence=evidence)

    alone = await learner(case.samples, tokens_per_micro_batch=1, share_prompts=False)
    advice = "learner.tokens_per_micro_batch: 1 until it is mended: a document sees its neighbours"
    found = [cause(alone, "packed documents", advice, "a sequence is read otherwise beside others than alone")]
    if shares:
        whole = await learner(case.samples, share_prompts=False)
        found.append(cause(whole, "shared prompts", "learner.share_prompts: false"))
    return found


def _router_cause(case: Case, bare: Tensor, explained: float) -> Cause:
    """Experts that the learner's routers choose otherwise; a choice that another cause turned over is not its own."""
    gap = mean_size(case.engine - bare)
    gain = max(gap - case.gap, 0.0)
    share = gain / gap if gain > case.noise else 0.0
    return Cause(
        name="router choice",
        side="both",
        share=share * (1 - explained),
        left=case.gap,
        evidence=f"{share:.0%} of a gap of {gap:.1e} goes away with the engine's experts",
        advice="policy.router_replay: rollout",
    )


def _rounding_cause(case: Case) -> Cause:
    """The part of bfloat16 itself: two correct readings in it, in chunks and token by token, differ too."""
    with _policy(case, dtype=torch.bfloat16) as policy:
        chunks = read_alone(policy, case.samples, temperature=case.temperature)
        stepwise = read_stepwise(policy, case.samples, temperature=case.temperature)
    size = mean_size(chunks - stepwise)
    return Cause(
        name="rounding to bfloat16",
        side="both",
        share=share_of(case, min(size, case.gap)),
        left=max(case.gap - size, 0.0),
        evidence=f"two correct readings in bfloat16 differ by {size:.1e}",
        advice="policy.dtype: float32; or algorithm.correction: tis, which weighs it",
    )


def stale_weights(before: Mapping[str, int], after: Mapping[str, int], weights: Path) -> str:
    """The engine's checksums against the learner's, or without common names, against those before the update."""
    own = {name: tensor_checksum(tensor) for name, tensor in mapped_weights(weights)}
    if own.keys() <= after.keys():
        wrong = [name for name in own if own[name] != after[name]]
        return f"checksums of {len(wrong)} of {len(own)} weights are not the learner's"
    same = sum(before.get(name) == value for name, value in after.items())
    return f"checksums of {same} of {len(after)} weights did not change with the update"


def ranked(causes: Sequence[Cause], case: Case) -> list[Cause]:
    """The causes that explain something, the largest share first, then what is left."""
    found = sorted((c for c in causes if c.share >= _LEAST_SHARE), key=lambda cause: -cause.share)
    rest = 1 - max((cause.share for cause in found), default=0.0)
    name = "rounding, in another order of sums" if rest * case.gap <= case.noise else "not explained"
    left = [Cause(name=name, side="", share=rest, left=rest * case.gap)]
    return found + left if rest >= _LEAST_SHARE or not found else found


def share_of(case: Case, gain: float) -> float:
    return 0.0 if gain <= case.noise else min(gain / case.gap, 1.0)


def mean_size(gap: Tensor) -> float:
    return float(gap.abs().mean())


@contextmanager
def exact_policy(case: Case) -> Iterator[Policy]:
    """The policy of the plain reading."""
    with _policy(case, dtype=torch.float64) as policy:
        yield policy


@contextmanager
def _policy(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
    changes: Mapping[str, object] | None = None,
) -> Iterator[Policy]:
    """The policy of the case on the CPU, with one thing changed."""
    with policy_copy(weights or case.weights, case.model, changes) as folder:
        yield load_policy(folder, dtype=dtype).eval()
