"""What a recipe cannot ask for at once, each with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cispo.errors import UserError

if TYPE_CHECKING:
    from cispo.recipe.schema import Recipe


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raises UserError on the first pair of keys that contradict each other."""
    rollout, policy, algorithm = recipe.rollout, recipe.policy, recipe.algorithm
    problems = [
        (policy.model is None and policy.config is None, "policy needs a model (folder or hub id) or a config"),
        (
            policy.model is not None and policy.config is not None,
            "policy.model and policy.config exclude each other: start from weights or from a shape",
        ),
        (
            policy.model is None and policy.tokenizer is None,
            "policy.tokenizer is needed where there is no policy.model",
        ),
        (
            rollout.top_p != 1 or rollout.top_k != 0 or rollout.min_p != 0,
            "rollout.top_p, top_k and min_p must stay 1, 0 and 0: truncated sampling makes the importance ratio wrong",
        ),
        (rollout.temperature == 0, "rollout.temperature must be above 0: greedy completions of a group are all equal"),
        (
            rollout.max_tokens >= rollout.max_context,
            f"rollout.max_tokens {rollout.max_tokens} leaves no room for a prompt in max_context {rollout.max_context}",
        ),
        (
            rollout.prompts_per_step * rollout.group_size < algorithm.updates_per_batch,
            f"algorithm.updates_per_batch {algorithm.updates_per_batch} is more than the "
            f"{rollout.prompts_per_step * rollout.group_size} completions of a step",
        ),
        (
            (algorithm.overlong_buffer or 0) > rollout.max_tokens,
            f"algorithm.overlong_buffer {algorithm.overlong_buffer} is longer than "
            f"rollout.max_tokens {rollout.max_tokens}",
        ),
        (
            rollout.temperature != 1 and 0 < rollout.repetition.run_length <= rollout.max_tokens,
            "rollout.repetition.run_length needs temperature 1 (it looks at the raw probabilities): set it to 0",
        ),
        (
            recipe.runtime == "local" and recipe.learner.ranks > 1,
            f"runtime: local is one process, so learner.ranks must be 1, not {recipe.learner.ranks}",
        ),
        (
            rollout.engine == "torch" and rollout.weight_sync not in ("auto", "shared_memory"),
            f"rollout.weight_sync {rollout.weight_sync} needs rollout.engine: vllm",
        ),
        (
            recipe.runtime == "local" and rollout.weight_sync in ("broadcast", "cuda_ipc"),
            f"rollout.weight_sync {rollout.weight_sync} needs runtime: ray",
        ),
        (
            recipe.control.max_staleness > 0 and rollout.placement == "sleep",
            "control.max_staleness above 0 samples while the learner works, so rollout.placement cannot be sleep",
        ),
        (recipe.device == "cpu" and rollout.weight_sync == "cuda_ipc", "rollout.weight_sync cuda_ipc needs GPUs"),
        (
            rollout.engine_args.get("load_format", "safetensors") != "safetensors",
            "rollout.engine_args.load_format must stay safetensors: other formats can run code when they are loaded",
        ),
        (
            bool(rollout.engine_args.get("trust_remote_code", False)),
            "rollout.engine_args.trust_remote_code must stay false: it runs code that lies in the model's folder",
        ),
        (recipe.device == "cpu" and rollout.tensor_parallel > 1, "rollout.tensor_parallel above 1 needs GPUs"),
        *_of_the_curriculum(recipe),
    ]
    for wrong, sentence in problems:
        if wrong:
            raise UserError(f"{where}: {sentence}")


def _of_the_curriculum(recipe: Recipe) -> list[tuple[bool, str]]:
    keys, rollout = recipe.curriculum, recipe.rollout
    starts = [start for start, _ in keys.length_stages]
    limits = [tokens for _, tokens in keys.length_stages] or [rollout.max_tokens]
    buffer = recipe.algorithm.overlong_buffer or 0
    key = "curriculum.drop_above" if keys.drop_above is not None else "curriculum.weighting: difficulty"
    return [
        (
            rollout.group_size == 1 and (keys.drop_above is not None or keys.weighting == "difficulty"),
            f"{key} goes by the pass rate of a group, which rollout.group_size 1 makes 0 or 1",
        ),
        (
            bool(starts) and starts[0] != 0,
            f"curriculum.length_stages must begin at step 0, not at step {starts[0] if starts else 0}",
        ),
        (
            any(a >= b for a, b in zip(starts, starts[1:], strict=False)),
            f"curriculum.length_stages must be in ascending order of their steps, not {', '.join(map(str, starts))}",
        ),
        (
            max(limits) > rollout.max_tokens,
            f"curriculum.length_stages has {max(limits)} tokens, rollout.max_tokens allows {rollout.max_tokens}",
        ),
        (
            # Without stages, the same is said of rollout.max_tokens.
            bool(starts) and buffer > min(limits),
            f"algorithm.overlong_buffer {buffer} is longer than the {min(limits)} tokens of a stage in "
            "curriculum.length_stages",
        ),
    ]
