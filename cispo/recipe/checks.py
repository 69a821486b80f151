"""Contradictions between the keys of a recipe, each with its reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from cispo.errors import UserError
from cispo.recipe.held_out import held_out_metrics, held_out_of

if TYPE_CHECKING:
    from cispo.recipe.schema import Learner, Recipe


_QUANTISED = ("quantization", "quantization_config")

_DRAFT_COUNTS = {
    "ngram": ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"),
    "mtp": ("num_speculative_tokens",),
}
"""Keys of `speculative_config` beside its method; vLLM takes the larger n-gram where the smaller one is not given."""


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises UserError on the first contradiction; `where` names the recipe's file."""
    for sentence in _contradictions(recipe):
        raise UserError(f"{where}: {sentence}")


def _contradictions(recipe: Recipe) -> Iterator[str]:
    yield from _of_the_policy(recipe)
    yield from _of_the_data(recipe)
    yield from _of_the_held_out(recipe)
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
    yield from _of_the_memory(recipe)
    if recipe.policy.lora is not None and recipe.learner.router_bias_rate > 0:
        yield "learner.router_bias_rate moves weights of the policy, which policy.lora leaves as they are"
    if rollout.engine_args.get("load_format", "safetensors") != "safetensors":
        yield "rollout.engine_args.load_format must stay safetensors: other formats can run code when they are loaded"
    if rollout.engine_args.get("trust_remote_code", False):
        yield "rollout.engine_args.trust_remote_code must stay false: it runs code that lies in the model's folder"
    yield from _of_the_drafts(recipe)
    for key, given in (("", rollout.engine_args), ("hf_overrides.", rollout.engine_args.get("hf_overrides"))):
        quantised = next((k for k in _QUANTISED if isinstance(given, dict) and given.get(k) is not None), None)
        if quantised is not None:
            yield (
                f"rollout.engine_args.{key}{quantised} must stay unset: updates bring the policy's own weights, which "
                "a quantised engine (fp8, int8 ...) cannot take"
            )


def _of_the_drafts(recipe: Recipe) -> Iterator[str]:
    key, given = "rollout.engine_args.speculative_config", recipe.rollout.engine_args.get("speculative_config")
    if given is None:
        return
    counts = _DRAFT_COUNTS.get(str(given.get("method"))) if isinstance(given, dict) else None
    if not isinstance(given, dict) or counts is None:
        yield (
            f"{key}.method must be ngram or mtp: other drafts (EAGLE, a draft model) need weights that no update brings"
        )
        return
    unknown = sorted(given.keys() - {"method", *counts})
    if unknown:
        yield f"{key}.{unknown[0]} must stay unset: drafts of method {given['method']} have {', '.join(counts)}"
    for name in counts:
        value = given.get(name)
        if name in given and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield f"{key}.{name} = {value!r}: a whole number from 1 on is needed"
    for name in counts[:2]:
        if name not in given:
            yield f"key {key}.{name} is missing"
    if given.get("prompt_lookup_min", 1) > given.get("prompt_lookup_max", 1):
        yield f"{key}.prompt_lookup_min {given['prompt_lookup_min']} is above prompt_lookup_max"
    if recipe.rollout.engine == "torch":
        yield f"{key} is for vLLM: rollout.engine torch makes no drafts"
    if recipe.policy.router_replay == "rollout":
        yield (
            f"{key} and policy.router_replay exclude each other: the experts that an engine records would be those of "
            "rejected drafts too"
        )


def _of_the_memory(recipe: Recipe) -> Iterator[str]:
    learner = recipe.learner
    if "activations" in learner.offload and learner.gradient_checkpointing is False:
        yield "learner.offload: activations moves the inputs of recomputed layers: set learner.gradient_checkpointing"
    if "reference" in learner.offload and recipe.policy.lora is not None:
        yield "learner.offload: reference moves nothing with policy.lora: the reference is the policy without adapter"
    first, second = learner.betas
    if learner.optimizer == "adamw8bit" and first**2 >= second:
        yield (
            f"learner.optimizer: adamw8bit needs betas[0]^2 below betas[1], which bounds a rounded step: "
            f"{first:g}^2 is not below {second:g}"
        )


def _of_the_data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data is not None and not data.sources and "source" not in data.model_fields_set:
        yield "key data.source is missing"
    if data is not None and data.sources:
        own = [key for key in ("source", "split", "args", "limit", "config") if getattr(data, key) != _default(key)]
        if own:
            yield f"data.{own[0]} belongs to one source: with data.sources, each has its own"
        yield from _twice([source.name for source in data.sources], "data.sources")
    if recipe.env is not None:
        others = [*(data.sources if data is not None else ()), *held_out_of(recipe)]
        own = next((one for one in others if one.template_args is not None), None)
        if own is not None:
            yield "with env, template_args stand in data alone: they hold for every turn of every prompt"
    names = {source.name for source in data.sources} if data is not None else set()
    names |= {one.name for one in held_out_of(recipe) if one.name is not None}
    for number, term in enumerate(recipe.reward.functions if recipe.reward else ()):
        unknown = [name for name in term.sources if name not in names]
        if unknown:
            there = ", ".join(sorted(names)) or "none has a name"
            yield f"reward.functions.{number}.sources: '{unknown[0]}' is no name in data.sources or eval ({there})"


def _default(key: str) -> object:
    from cispo.recipe.schema import TrainData

    return TrainData.model_fields[key].get_default()


def _twice(names: Sequence[str], key: str) -> Iterator[str]:
    again = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if again is not None:
        yield f"{key}: two are named '{again}'"


def _of_the_held_out(recipe: Recipe) -> Iterator[str]:
    sets = held_out_of(recipe)
    if isinstance(recipe.eval, list):
        for number, one in enumerate(sets):
            if one.name is None:
                yield f"key eval.{number}.name is missing: each set of a list needs one"
        yield from _twice([one.name or "" for one in sets], "eval")
    for number, one in enumerate(sets):
        key = f"eval.{number}" if isinstance(recipe.eval, list) else "eval"
        if one.max_tokens is not None and one.max_tokens >= recipe.rollout.max_context:
            yield (
                f"{key}.max_tokens {one.max_tokens} leaves no room for a prompt in rollout.max_context "
                f"{recipe.rollout.max_context}"
            )
    if recipe.train.best is None or not sets:
        return
    possible = held_out_metrics(recipe)
    if recipe.train.best not in possible:
        near = difflib.get_close_matches(recipe.train.best, possible, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(possible)}"
        yield f"train.best: no evaluation of this recipe gives '{recipe.train.best}'; {hint}"


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
    yield from _of_the_mesh(recipe.learner)
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


def _of_the_mesh(learner: Learner) -> Iterator[str]:
    if learner.ranks % learner.context_parallel:
        yield f"learner.context_parallel {learner.context_parallel} does not divide learner.ranks {learner.ranks}"
    if learner.expert_ranks == 1:
        return
    ep, etp = learner.expert_parallel, learner.expert_tensor_parallel
    if learner.ranks % learner.expert_ranks:
        yield (
            f"learner.expert_parallel {ep} x learner.expert_tensor_parallel {etp} does not divide learner.ranks "
            f"{learner.ranks}"
        )
    if learner.shard is False:
        key = f"expert_parallel {ep}" if ep > 1 else f"expert_tensor_parallel {etp}"
        yield f"learner.{key} gives ranks different weights, which learner.shard: false excludes"


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
