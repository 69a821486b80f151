"""`cispo show`: a recipe resolved, its algorithm in words, its processes and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cispo.algorithms import Algorithm
from cispo.algorithms.choice import algorithm_of
from cispo.algorithms.describe import describe, warnings
from cispo.output.screen import new_console, table_of, warn
from cispo.policies.loading import count_parameters
from cispo.recipe.load import dump_yaml, load_recipe
from cispo.recipe.schema import Recipe
from cispo.rollout.curriculum import describe_curriculum
from cispo.rollout.renderer import renderer_of
from cispo.runtime.placement import gpus_of, pick_device
from cispo.start import new_config

# Below so many parameters vLLM's fixed cost of a step is most of it (docs/performance.md has the figures).
_SMALL_POLICY = 2_000_000


def show(path: Path, overrides: Sequence[str]) -> None:
    """`cispo show`: the resolved recipe, the algorithm in words, the process and memory plan."""
    recipe = load_recipe(path, overrides)
    algorithm = algorithm_of(recipe)
    console = new_console()
    console.print("recipe", style="bold")
    console.print(dump_yaml(recipe))
    console.print("algorithm", style="bold")
    console.print(table_of(describe(algorithm)))
    updates, stale = recipe.algorithm.steps_per_batch, recipe.control.max_staleness
    for sentence in warnings(algorithm, updates_per_batch=updates, max_staleness=stale):
        warn(console, sentence)
    rollout = recipe.rollout
    curriculum = describe_curriculum(recipe.curriculum, group_size=rollout.group_size, max_tokens=rollout.max_tokens)
    if curriculum:
        console.print("\ncurriculum", style="bold")
        console.print(table_of(curriculum))
    console.print("\nprocesses and memory", style="bold")
    console.print(table_of(_plan(recipe, algorithm)))


def _plan(recipe: Recipe, algorithm: Algorithm) -> list[tuple[str, str]]:
    rollout, learner = recipe.rollout, recipe.learner
    model = recipe.policy.model
    parameters = count_parameters(model, new_config(recipe, renderer_of(recipe)) if model is None else None)
    half = recipe.policy.dtype == "bfloat16"
    # Weights, gradient and two moments in float32; bfloat16 policies keep a float32 master beside the weights.
    learner_bytes = parameters * (16 + 4 if half else 16)
    engine_bytes = parameters * (2 if half else 4)
    extra = [("critic memory", f"{_gib(learner_bytes)} a rank, as the learner")] if algorithm.critic else []
    if algorithm.needs_reference:
        extra.append(("reference policy", f"{_gib(engine_bytes)} a learner rank for weights"))
    device = pick_device(recipe.device)
    if device.type == "cuda":
        alone, shared = (gpus_of(recipe, critic=algorithm.critic, shared=s) for s in (False, True))
        extra.append(("GPUs", f"{alone} where each part has its own, {shared} shared (placement {rollout.placement})"))
        extra.append(("engines' caches", f"at most {rollout.gpu_memory:.0%} of a GPU's memory"))
    elif rollout.engine == "vllm" and parameters < _SMALL_POLICY and not half:
        hint = (
            "so small a policy samples faster on a CPU with rollout.engine=torch; learner.share_prompts=true saves too"
        )
        extra.append(("hint", hint))
    completions = rollout.prompts_per_step * rollout.group_size
    critic = f", {learner.ranks} critic" if algorithm.critic else ""
    where = "one process" if recipe.runtime == "local" else "Ray actors"
    return [
        ("device", str(device)),
        ("runtime", f"{where}: 1 driver, {learner.ranks} learner{critic}, {rollout.engines} {rollout.engine} engine"),
        ("policy", f"{parameters:,} parameters, {recipe.policy.dtype}, LM head in float32"),
        ("learner memory", f"{_gib(learner_bytes)} a rank for weights, gradients and AdamW, plus activations"),
        *extra,
        ("engine memory", f"{_gib(engine_bytes)} an engine for weights, plus the cache"),
        (
            "batch",
            f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {completions} completions of at most "
            f"{rollout.max_tokens} tokens, {recipe.algorithm.steps_per_batch} update(s)",
        ),
        ("sampling", _sampling(recipe)),
    ]


def _sampling(recipe: Recipe) -> str:
    control = recipe.control
    if control.max_staleness == 0:
        return "in turn with learning: every completion is the trained version's"
    updates = {
        "wait": "end before new weights arrive",
        "keep": "go on after new weights with their old keys, values and states",
        "recompute": "go on after new weights with everything recomputed",
        "abort": "begin anew when new weights arrive",
    }
    bound = f"ahead of learning, at most {control.max_staleness} version(s) old"
    return f"{bound}; unfinished completions {updates[control.on_update]}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size > 2**28 else f"{size / 2**20:.1f} MiB"
