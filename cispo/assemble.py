"""From a recipe to the parts that run it: everything a recipe names is loaded and checked before a process starts."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cispo.runtime.actors import Handle, LocalRuntime, RayRuntime, Runtime, Seat
from cispo.algorithms.choice import ADVANTAGE_KEYS, LOSS_KEYS, Changes, resolve
from cispo.algorithms import ALGORITHMS, Algorithm, Reduction
from cispo.algorithms.advantages import GROUP_RELATIVE
from cispo.algorithms.presets import PRESETS
from cispo.recipe.schema import Data, Recipe
from cispo.curriculum import max_tokens_at
from cispo.learner.critic import Critic
from cispo.learner.learner import Learner
from cispo.user_code import load_object
from cispo.packing import demonstration, pack
from cispo.runtime.placement import Placement, placement_of
from cispo.policies.base import init_policy, local_folder, save_policy
from cispo.engines.serving import make_engine
from cispo.rollout.prompt_source import PromptSource
from cispo.rollout.prompts import build_prompts, load_rows
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.rollout.rewards import RewardFunction, RewardRunner
from cispo.seeds import seed_of
from cispo.types import MicroBatch, Prompt, RepetitionStop, Sample, Sampling
from cispo.errors import UserError
from cispo.runtime.watchdog import Activity
from cispo.weights.buckets import Transport
from cispo.weights.publish import shared_weights_folder, weights_folder
from cispo.workers import Workers

# More sequences than this at once gain nothing on one engine and cost cache memory.
_MAX_SEQUENCES = 512






def updates_per_batch(recipe: Recipe) -> int:
    """Optimizer steps on one batch of rollouts, all epochs together."""
    return recipe.algorithm.updates_per_batch * recipe.algorithm.epochs


def max_tokens_of(recipe: Recipe, step: int) -> int:
    """Most tokens of a completion that is sampled for a training step (the first is 1)."""
    return max_tokens_at(step, stages=recipe.curriculum.length_stages, max_tokens=recipe.rollout.max_tokens)




def renderer_of(recipe: Recipe) -> Renderer:
    folder = recipe.policy.tokenizer or recipe.policy.model
    assert folder is not None
    return Renderer(load_tokenizer(folder))


def sampling_of(recipe: Recipe, renderer: Renderer) -> Sampling:
    rollout = recipe.rollout
    return Sampling(
        max_tokens=rollout.max_tokens,
        eos_ids=renderer.eos_ids,
        temperature=rollout.temperature,
        repetition=RepetitionStop(**rollout.repetition.model_dump()),
    )


def rewards_of(recipe: Recipe, prompts: Sequence[Prompt], activity: Activity | None = None) -> RewardRunner:
    """The reward functions, imported and found to fit the columns of the prompts."""
    assert recipe.reward is not None
    terms = [RewardFunction(fn=term.fn, weight=term.weight, args=term.args) for term in recipe.reward.functions]
    keys = recipe.reward
    runner = RewardRunner(terms, on_error=keys.on_error, timeout=keys.timeout, activity=activity or Activity())
    runner.check(columns=prompts[0].columns)
    return runner


def prompts_of(data: Data, key: str, renderer: Renderer, recipe: Recipe) -> list[Prompt]:
    """A section's prompts, every one of them short enough for the context."""
    prompts = build_prompts(load_rows(data.source, data.split, data.args, data.limit, key), data.prompt, key)
    for prompt in prompts:
        _check_length(len(renderer.render(prompt.messages)), recipe, f"{key}: prompt {prompt.id}")
    return prompts


def prompt_source_of(recipe: Recipe, prompts: Sequence[Prompt]) -> PromptSource:
    """The stream of the training prompts, in the order of the recipe's seed and curriculum."""
    return PromptSource(
        prompts,
        seed_of(recipe.seed, "prompts"),
        drop_above=recipe.curriculum.drop_above,
        weighting=recipe.curriculum.weighting,
        pass_size=recipe.rollout.prompts_per_step,
    )


def _check_length(length: int, recipe: Recipe, what: str) -> None:
    room = recipe.rollout.max_context - 1
    if length > room:
        raise UserError(
            f"{what} has {length} tokens; rollout.max_context {recipe.rollout.max_context} leaves room for {room}"
        )


def demonstrations_of(data: Data, renderer: Renderer, recipe: Recipe) -> list[Sample]:
    """The demonstrations of the supervised warm-up."""
    key = "sft.data"
    rows = load_rows(data.source, data.split, data.args, data.limit, key)
    samples = []
    for index, (row, prompt) in enumerate(zip(rows, build_prompts(rows, data.prompt, key), strict=True)):
        if not isinstance(row.get("completion"), str):
            raise UserError(f"{key}: row {index} has no text in column 'completion' (it has {', '.join(row)})")
        prompt_ids, completion_ids = renderer.render_demonstration(prompt.messages, row["completion"])
        _check_length(len(prompt_ids) + len(completion_ids) - 1, recipe, f"{key}: row {index}")
        samples.append(demonstration(prompt_ids, completion_ids, index))
    return samples


def new_config(recipe: Recipe, renderer: Renderer) -> dict[str, Any]:
    """The config of a policy that starts from random weights; its vocabulary is the tokenizer's unless given."""
    assert recipe.policy.config is not None
    return {"vocab_size": len(renderer.tokenizer), **recipe.policy.config}


def policy_folder(recipe: Recipe, renderer: Renderer, folder: Path) -> str:
    """Where learner and engines load the first weights from: the recipe's model, or new weights in `folder`."""
    if recipe.policy.model is not None:
        return str(local_folder(recipe.policy.model))
    policy = init_policy(new_config(recipe, renderer), seed=seed_of(recipe.seed, "policy"))
    if policy.vocab_size < len(renderer.tokenizer):
        raise UserError(
            f"policy.config.vocab_size {policy.vocab_size} is smaller than the tokenizer's {len(renderer.tokenizer)}"
        )
    save_policy(policy, folder)
    return str(folder)


def check_same_shape(recipe: Recipe, checkpoint: Path) -> None:
    """Raises UserError where a checkpoint is of another model than the recipe's policy.config describes."""
    if recipe.policy.config is None:
        return
    stored = json.loads((checkpoint / "config.json").read_text())
    for key, wanted in recipe.policy.config.items():
        if key in stored and stored[key] != wanted:
            raise UserError(
                f"checkpoint {checkpoint} is of another model: its {key} is {stored[key]!r}, the recipe's is {wanted!r}"
            )


def pack_for(recipe: Recipe, samples: Sequence[Sample], reduction: Reduction) -> list[list[MicroBatch]]:
    """Packs a batch for the recipe's learner ranks: [ranks][micro-batches].

    The constant reduction divides by rollout.max_tokens in every length stage: a token weighs the same in all of them.
    """
    return pack(
        samples,
        reduction=reduction,
        max_tokens=recipe.rollout.max_tokens,
        tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch,
        ranks=recipe.learner.ranks,
        share_prompts=recipe.learner.share_prompts,
    )


def num_processes(recipe: Recipe, *, learners: bool = True, critic: bool = False, engines: bool = True) -> int:
    """Actors that a run starts."""
    ranks = recipe.learner.ranks * (int(learners) + int(critic))
    return ranks + (recipe.rollout.engines if engines else 0)


def make_runtime(recipe: Recipe, processes: int, activity: Activity) -> Runtime:
    return LocalRuntime() if recipe.runtime == "local" else RayRuntime(processes=processes, activity=activity)


async def start_learners(recipe: Recipe, runtime: Runtime, folder: str, placement: Placement) -> list[Handle]:
    temperature = recipe.rollout.temperature
    return await _start_ranks(
        recipe, runtime, placement, Learner, folder, recipe.learner, name="learner", temperature=temperature
    )


async def start_critics(recipe: Recipe, runtime: Runtime, folder: str, placement: Placement) -> list[Handle]:
    return await _start_ranks(recipe, runtime, placement, Critic, folder, recipe.critic, recipe.learner, name="critic")


async def _start_ranks(
    recipe: Recipe,
    runtime: Runtime,
    placement: Placement,
    build: Callable[..., Any],
    *args: Any,
    name: str,
    **kwargs: Any,
) -> list[Handle]:
    """As many ranks as the learner has, each on its device."""
    ranks, dtype = recipe.learner.ranks, recipe.policy.dtype
    seats = [Seat(gpus=placement.rank_gpus, bundle=placement.bundle_of_rank(rank)) for rank in range(ranks)]
    return await runtime.start_ranks(
        build, *args, name=name, seats=seats, dtype=dtype, device=placement.device, **kwargs
    )


async def start_engine(recipe: Recipe, runtime: Runtime, folder: str, placement: Placement, number: int) -> Handle:
    rollout = recipe.rollout
    prompts = rollout.prompts_per_step * (1 + recipe.control.max_staleness)
    sequences = math.ceil(prompts / rollout.engines) * rollout.group_size
    return await runtime.start(
        make_engine,
        rollout.engine,
        folder,
        name=f"engine-{number}",
        seat=Seat(gpus=placement.engine_gpus, bundle=placement.bundle_of_engine(number)),
        concurrent=True,
        dtype=recipe.policy.dtype,
        max_context=rollout.max_context,
        max_sequences=min(sequences, _MAX_SEQUENCES),
        tensor_parallel=rollout.tensor_parallel,
        memory=placement.cache_share,
        sleeps=placement.sleeps,
        engine_args=rollout.engine_args,
    )


def transport_of(recipe: Recipe, placement: Placement, *, home: bool = True) -> Transport | Literal["shared_memory"]:
    """How weights reach the engines; `home` says that learners and engines are all on this machine.

    Raises UserError where the recipe's way does not fit the placement.
    """
    wanted, on_gpu = recipe.rollout.weight_sync, placement.device == "cuda"
    if wanted == "auto":
        if recipe.rollout.engine == "torch" or (home and not on_gpu):
            return "shared_memory"
        if recipe.runtime == "local":
            return "direct"
        return "cuda_ipc" if placement.shares_gpus else "broadcast"
    if wanted == "cuda_ipc" and not placement.shares_gpus:
        raise UserError("rollout.weight_sync cuda_ipc needs learners and engines that share GPUs (rollout.placement)")
    return wanted


@contextlib.asynccontextmanager
async def running_workers(
    recipe: Recipe,
    policy: str,
    *,
    activity: Activity,
    say: Callable[[str], None] = print,
    engines: bool = True,
    learners: bool = True,
    critic: bool = False,
) -> AsyncIterator[tuple[Workers, asyncio.Task[None]]]:
    """Learners, and the task in which engines start meanwhile; all of them end with the block."""
    runtime = make_runtime(recipe, num_processes(recipe, learners=learners, critic=critic, engines=engines), activity)
    tasks: list[asyncio.Task[None]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(runtime.close)
        placement = placement_of(recipe, available=runtime.gpus(), critic=critic, learners=learners, engines=engines)
        await runtime.reserve([placement.rank_bundles, placement.engine_bundles])
        home, policy = runtime.is_home(), str(Path(policy).absolute())
        weights = stack.enter_context(
            weights_folder(recipe.name) if home else shared_weights_folder(recipe.name, Path(recipe.output_dir))
        )
        if not home:
            await runtime.check_paths({"output_dir": str(weights), "policy": policy})
        workers = Workers(
            learners=[],
            critics=[],
            engines=[],
            start_engine=partial(start_engine, recipe, runtime, policy, placement),
            weights_folder=str(weights),
            group_size=recipe.rollout.group_size,
            transport=transport_of(recipe, placement, home=home),
            verify=recipe.rollout.verify_weights,
            sleeps=placement.sleeps,
            tensor_parallel=recipe.rollout.tensor_parallel,
            on_update=recipe.control.on_update,
            # In this process a debugger should see what an engine dies of.
            max_restarts=0 if recipe.runtime == "local" else recipe.control.max_restarts,
            say=say,
        )
        try:
            starting = asyncio.create_task(workers.start_engines(recipe.rollout.engines if engines else 0))
            tasks.append(starting)
            if recipe.control.watchdog:
                tasks.append(asyncio.create_task(workers.report_progress(activity, every=recipe.control.watchdog / 10)))
            if learners:
                workers.learners = await start_learners(recipe, runtime, policy, placement)
            if critic:
                workers.critics = await start_critics(recipe, runtime, policy, placement)
            yield workers, starting
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
