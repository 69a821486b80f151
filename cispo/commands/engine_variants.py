"""Engines started anew with one setting changed, for a gap that no reading explains (`attribution`).

    recipe --variants--> recipes with one change --start, sample, read plainly--> gap of each engine --> Cause

The weights stay, and prompts and seed; the tokens are those that the changed engine samples.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cispo.commands.attribution import MOST_OF_IT, Case, Cause, exact_policy, mean_size, ranked, share_of
from cispo.commands.readings import policy_copy, read_alone
from cispo.recipe.schema import Recipe
from cispo.runtime.placement import pick_device
from cispo.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A recipe with one setting of the engine changed."""

    name: str
    recipe: Recipe
    advice: str


SampleWith = Callable[[Recipe, Path, Sequence[Sequence[int]]], Awaitable[list[Sample]]]
"""Samples of prompts by engines of a recipe that start from a model folder."""


def variants(recipe: Recipe) -> list[Variant]:
    """The changes that this recipe's engine can have."""
    rollout = recipe.rollout

    def changed(**keys: object) -> Recipe:
        return recipe.model_copy(update={"rollout": rollout.model_copy(update=keys)})

    def argued(name: str, key: str, value: object) -> Variant:
        arguments = {**rollout.engine_args, key: value}
        advice = f"rollout.engine_args: {{{key}: {str(value).lower()}}}"
        return Variant(name=name, recipe=changed(engine_args=arguments), advice=advice)

    found = [
        Variant(
            name="batch size",
            recipe=changed(prompts_per_step=1, group_size=1),
            advice="fewer sequences at a time (rollout.engine_args: {max_num_seqs: ...}), or a kernel that does not "
            "depend on them",
        )
    ]
    if rollout.kind != "vllm":
        return found
    if rollout.engine_args.get("enable_prefix_caching"):
        found.append(argued("prefix cache", "enable_prefix_caching", False))
    found.append(argued("prompts read in parts", "enable_chunked_prefill", False))
    if pick_device(recipe.device).type == "cuda":
        found.append(argued("CUDA graphs", "enforce_eager", True))
        found.append(argued("attention backend", "attention_backend", "TRITON_ATTN"))
    return found


async def variant_causes(recipe: Recipe, case: Case, known: Sequence[Cause], sample: SampleWith) -> list[Cause]:
    """The ranked causes with `known` ones among them: where none explains most of the gap, variants are tried."""
    error = mean_size(case.engine - case.plain)
    explained = max((cause.share for cause in known if cause.side), default=0.0)
    if explained >= MOST_OF_IT or error <= case.noise:
        return list(known)
    prompts = [s.token_ids[: int(s.loss_mask.int().argmax())].tolist() for s in case.samples]
    causes = [cause for cause in known if cause.side]
    for variant in variants(recipe):
        with policy_copy(case.weights, case.model) as folder, exact_policy(case) as policy:
            samples = await sample(variant.recipe, folder, prompts)
            plain = read_alone(policy, samples, temperature=case.temperature)
        engine = torch.cat([s.rollout_logprobs[s.loss_mask] for s in samples]).double()
        left = mean_size(engine - plain)
        evidence = "another engine with this change samples with a smaller gap"
        share = share_of(case, error - left)
        causes.append(
            Cause(name=variant.name, side="engine", share=share, left=left, evidence=evidence, advice=variant.advice)
        )
    return ranked(causes, case)
