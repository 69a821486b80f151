"""The automatic choices of a recipe, made once and early: everything behind `settled` sees the values of the run.

policy.dtype, learner.gradient_checkpointing: auto  --placement.formatted-->  by the device
rollout.engine: auto                                --engine_of----------->  vllm, or torch (a small policy, a CPU)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from cispo.errors import UserError
from cispo.policies.costs import layer_parameters
from cispo.policies.loading import config_of, shape_of
from cispo.recipe.schema import Recipe, Rollout
from cispo.runtime.placement import formatted, pick_device
from cispo.runtime.ray_address import cluster_is_named

Device = Literal["cpu", "cuda"]

SMALL = 5_000_000
"""Parameters of the layers up to which the torch engine samples faster on a CPU (docs/performance.md)."""

# The count leaves the vocabulary out, and a config may name tokens by id: any size that holds them will do.
_VOCABULARY = {"vocab_size": 1 << 20}


class EngineChoice(NamedTuple):
    """The engine of a run, and the reason for it as the end of a sentence."""

    name: Literal["vllm", "torch"]
    reason: str


def settled(recipe: Recipe, device: Device | None = None) -> Recipe:
    """The recipe with its automatic choices made for a device, by default this machine's for the recipe."""
    device = device or _device(recipe)
    engine = engine_of(recipe, device).name
    recipe = formatted(recipe, device)
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"engine": engine})})


def prepare(recipe: Mapping[str, object], model: str | None) -> None:
    """`serving.prepare` for the recipe's engine on a CPU; the recipe as JSON's types."""
    from cispo.engines import serving

    chosen = settled(Recipe.model_validate(recipe), "cpu")
    serving.prepare(chosen.rollout.kind, chosen.policy.number_format, model)


def engine_of(recipe: Recipe, device: Device | None = None) -> EngineChoice:
    """vLLM, but for `rollout.engine: auto` with a small policy on a CPU: there its fixed cost of a step is most of it.

    config.json alone is read; a model that is not in a local folder is left to vLLM.
    """
    if recipe.rollout.engine != "auto":
        return EngineChoice(recipe.rollout.engine, "the recipe names it")
    if (device or _device(recipe)) == "cuda":
        return EngineChoice("vllm", "the policy runs on a GPU")
    if recipe.device == "auto" and recipe.runtime == "ray" and cluster_is_named():
        return EngineChoice("vllm", "the cluster of RAY_ADDRESS may have GPUs (device: cpu says that it has none)")
    key = next(_of_vllm(recipe.rollout), None)
    if key is not None:
        return EngineChoice("vllm", f"{key} is vLLM's")
    if formatted(recipe, "cpu").policy.dtype == "bfloat16":
        return EngineChoice("vllm", "policy.dtype is bfloat16: the torch engine was measured in float32 alone")
    size = _size(recipe)
    if size is None:
        return EngineChoice("vllm", "the size of the policy is not known before it is loaded")
    small = size <= SMALL
    relation = "at most" if small else "more than"
    return EngineChoice("torch" if small else "vllm", f"{size:,} parameters in layers, {relation} {SMALL:,}, on a CPU")


def _of_vllm(rollout: Rollout) -> Iterator[str]:
    """Keys with a value that the torch engine does not have."""
    if rollout.engine_args:
        yield "rollout.engine_args"
    if rollout.tensor_parallel > 1:
        yield "rollout.tensor_parallel"
    if rollout.weight_sync not in ("auto", "shared_memory"):
        yield f"rollout.weight_sync {rollout.weight_sync}"


def _size(recipe: Recipe) -> int | None:
    """Parameters of the policy's layers; None where nothing is known of them, or the config is no policy's."""
    model, config = recipe.policy.model, recipe.policy.config
    try:
        if model is not None:
            # No hub is asked for a choice.
            config = config_of(model) if (Path(model) / "config.json").is_file() else None
        # A config that is refused is refused again, and by name, where the policy is built.
        return None if config is None else layer_parameters(shape_of({**_VOCABULARY, **config}))
    except UserError:
        return None


def _device(recipe: Recipe) -> Device:
    return "cuda" if pick_device(recipe.device).type == "cuda" else "cpu"
