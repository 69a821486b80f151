"""Contradictions between the keys of a recipe, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from cispo.errors import UserError

if TYPE_CHECKING:
    from cispo.recipe.schema import Recipe


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises UserError on the first contradiction; `where` names the recipe's file."""
    for sentence in _contradictions(recipe):
        raise UserError(f"{where}: {sentence}")


def _contradictions(recipe: Recipe) -> Iterator[str]:
    yield from _of_the_policy(recipe)
    yield from _of_a_batch(recipe)
    yield from _of_the_processes(recipe)
    yield from _of_the_curriculum(recipe)


def _of_the_policy(recipe: Recipe) -> Iterator[str]:
    policy, rollout = recipe.policy, recipe.rollout
    if policy.model is None and policy.config is None:
        yield "policy needs a model (folder or hub id) or a config"
    if policy.model is not None and policy.config is not None:
        yield "policy.model and policy.config exclude each other: start from weights or from a shape"
    if policy.model is None and policy.tokenizer is None:
        yield "policy.tokenizer is needed where there is no policy.model"
    if recipe.policy.lora is not None and recipe.learner.router_bias_rate > 0:
        yield "learner.router_bias_rate moves weights of the policy, which policy.lora leaves as they are"
    if rollout.engine_args.get("load_format", "safetensors") != "safetensors":
        yield "rollout.engine_args.load_format must stay safetensors: other formats can run code when they are loaded"
    if rollout.engine_args.get("trust_remote_code", False):
        yield "rollout.engine_args.trust_remote_code must stay false: it runs code that lies in the model's folder"


def _of_a_batch(recipe: Recipe) -> Iterator[str]:
    rollout, algorithm = recipe.rollout, recipe.algorithm
    completions = rollout.prompts_per_step * rollout.group_size
    if rollout.temperature == 0:
        yield "rollout.temperature must be above 0: greedy completions of a group are all equal"
    if rollout.max_tokens >= rollout.max_context:
        yield (
            f"rollout.max_tokens {rollout.max_tokens} leaves no room for a prompt in max_context {rollout.max_context}"
        )
    if completions < algorithm.updates_per_batch:
        yield (
            f"algorithm.updates_per_batch {algorithm.updates_per_batch} is more than the {completions} completions of "
            "a step"
        )
    if (algorithm.overlong_buffer or 0) > rollout.max_tokens:
        yield (
            f"algorithm.overlong_buffer {algorithm.overlong_buffer} is longer than "
            f"rollout.max_tokens {rollout.max_tokens}"
        )
    if rollout.temperature != 1 and 0 < rollout.repetition.run_length <= rollout.max_tokens:
        yield "rollout.repetition.run_length needs temperature 1 (it looks at the raw probabilities): set it to 0"


def _of_the_processes(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    if recipe.runtime == "local" and recipe.learner.ranks > 1:
        yield f"runtime: local is one process, so learner.ranks must be 1, not {recipe.learner.ranks}"
    if rollout.engine == "torch" and rollout.weight_sync not in ("auto", "shared_memory"):
        yield f"rollout.weight_sync {rollout.weight_sync} needs rollout.engine: vllm"
    if recipe.runtime == "local" and rollout.weight_sync in ("broadcast", "cuda_ipc"):
        yield f"rollout.weight_sync {rollout.weight_sync} needs runtime: ray"
    if recipe.control.max_staleness > 0 and rollout.placement == "sleep":
        yield "control.max_staleness above 0 samples while the learner works, so rollout.placement cannot be sleep"
    if recipe.device == "cpu" and rollout.weight_sync == "cuda_ipc":
        yield "rollout.weight_sync cuda_ipc needs GPUs"
    if recipe.device == "cpu" and rollout.tensor_parallel > 1:
        yield "rollout.tensor_parallel above 1 needs GPUs"


def _of_the_curriculum(recipe: Recipe) -> Iterator[str]:
    keys, rollout = recipe.curriculum, recipe.rollout
    if rollout.group_size == 1 and (keys.drop_above is not None or keys.weighting == "difficulty"):
        key = "curriculum.drop_above" if keys.drop_above is not None else "curriculum.weighting: difficulty"
        yield f"{key} goes by the pass rate of a group, which rollout.group_size 1 makes 0 or 1"
    if not keys.length_stages:
        return
    starts = [start for start, _ in keys.length_stages]
    limits = [tokens for _, tokens in keys.length_stages]
    buffer = recipe.algorithm.overlong_buffer or 0
    if starts[0] != 0:
        yield f"curriculum.length_stages must begin at step 0, not at step {starts[0]}"
    if any(a >= b for a, b in pairwise(starts)):
        yield f"curriculum.length_stages must be in ascending order of their steps, not {', '.join(map(str, starts))}"
    if max(limits) > rollout.max_tokens:
        yield f"curriculum.length_stages has {max(limits)} tokens, rollout.max_tokens allows {rollout.max_tokens}"
    if buffer > min(limits):
        yield (
            f"algorithm.overlong_buffer {buffer} is longer than the {min(limits)} tokens of a stage in "
            "curriculum.length_stages"
        )
