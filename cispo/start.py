"""Start of a run's processes: the first policy, learner ranks, critic ranks and engines, placed by the recipe."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch

from cispo.engines.engine import check_model
from cispo.engines.handle import EngineHandle
from cispo.engines.serving import make_engine
from cispo.errors import UserError
from cispo.files import read_json
from cispo.learner.adapters import Adapters
from cispo.learner.critic import Critic
from cispo.learner.experts import check_expert_axes
from cispo.learner.handle import CriticHandle, LearnerHandle
from cispo.learner.learner import Learner
from cispo.learner.parallel import shards
from cispo.output.checkpoint import check_checkpoint
from cispo.policies.adapter_files import adapter_in, merged_policy
from cispo.policies.hybrid.shares import check_ranks
from cispo.policies.loading import (
    count_parameters,
    init_policy,
    initial_std,
    local_folder,
    max_positions_of,
    save_policy,
    shape_of,
)
from cispo.policies.lora import adapted_layers
from cispo.policies.moe import correction_biases
from cispo.policies.policy import Policy
from cispo.recipe.drafts import asks_heads
from cispo.recipe.schema import Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.renderer import Renderer
from cispo.runtime.actors import Closable, Handle, LocalRuntime, RayRuntime, Resources, Runtime
from cispo.runtime.ahead import Ahead, engines_wait, shared_imports
from cispo.runtime.placement import Placement, pick_device, placement_of
from cispo.runtime.start_parts import StartParts
from cispo.runtime.watchdog import Activity
from cispo.weights.buckets import Transport
from cispo.weights.publish import shared_weights_folder, weights_folder
from cispo.workers import Workers

# More concurrent sequences gain nothing on one engine and cost cache memory.
_MAX_SEQUENCES = 512

# Parameters from which a new policy is drawn on the GPU, if there is one: a CPU draws some 200 million a second.
_LARGE = 500_000_000

# Shorter contexts have two blocks of a hybrid's cache at most, and find next to nothing in it.
_CACHED_CONTEXT = 256


def new_config(recipe: Recipe, renderer: Renderer) -> dict[str, object]:
    """The config of a policy that starts from random weights; its vocabulary is the tokenizer's unless given."""
    assert recipe.policy.config is not None
    return {"vocab_size": len(renderer.tokenizer), **recipe.policy.config}


def policy_folder(recipe: Recipe, renderer: Renderer, folder: Path) -> str:
    """The folder of the first weights, for learner and engines: the recipe's model, or new weights in `folder`."""
    if recipe.policy.model is not None:
        return str(local_folder(recipe.policy.model))
    check_new_policy(recipe, renderer)
    config = new_config(recipe, renderer)
    large = count_parameters(None, config) >= _LARGE
    device = pick_device(recipe.device) if large else torch.device("cpu")
    # An adapter may be merged into the weights that the file holds: they stay as they were drawn.
    dtype = torch.float32 if recipe.policy.lora is not None else getattr(torch, recipe.policy.number_format)
    heads = asks_heads(recipe.rollout.engine_args)
    policy = init_policy(config, seed_of(recipe.seed, "policy"), dtype, device, heads=heads)
    save_policy(policy, folder)
    if device.type == "cuda":
        del policy
        torch.cuda.empty_cache()  # learners and engines share the GPU
    renderer.save(folder)
    return str(folder)


def check_new_policy(recipe: Recipe, renderer: Renderer) -> None:
    """Raises UserError where policy.config describes no policy, or one of a wrong size for machine or recipe."""
    heads, context = asks_heads(recipe.rollout.engine_args), recipe.rollout.max_context
    policy = shape_of(new_config(recipe, renderer), heads=heads)
    check_experts(recipe, policy)
    needed, there = sum(4 * p.numel() for p in policy.parameters()), psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"policy.config describes a policy of {needed / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}"
        )
    if policy.vocab_size < len(renderer.tokenizer):
        raise UserError(
            f"policy.config.vocab_size {policy.vocab_size} is smaller than the tokenizer's {len(renderer.tokenizer)}"
        )
    initial_std(policy)
    if recipe.policy.lora is not None:
        adapted_layers(policy, recipe.policy.lora)
    positions = max_positions_of(policy.hf_config())
    if positions is not None and context > positions:
        raise UserError(f"rollout.max_context {context} is above the {positions} positions of policy.config")


def asks_of_layers(recipe: Recipe) -> bool:
    """Whether `check_experts` has anything to check; a dense policy to ask takes two seconds of imports."""
    learner = recipe.learner
    ranks = (learner.expert_parallel, learner.expert_tensor_parallel, recipe.rollout.tensor_parallel)
    replayed = recipe.policy.router_replay != "off"
    return replayed or learner.router_bias_rate > 0 or learner.router_aux_coef > 0 or max(ranks) > 1


def check_experts(recipe: Recipe, policy: Policy) -> None:
    """Raises UserError where the recipe replays, balances or distributes experts that the policy does not have so, or
    engines share a policy that their GPUs do not divide."""
    if not asks_of_layers(recipe):
        return
    if recipe.policy.router_replay != "off" and policy.router_shape[0] == 0:
        raise UserError(f"policy.router_replay {recipe.policy.router_replay}: the policy has no experts to replay")
    learner = recipe.learner
    if learner.router_bias_rate > 0 and not correction_biases(policy):
        raise UserError(f"learner.router_bias_rate {learner.router_bias_rate}: no router of the policy has a bias")
    if learner.router_aux_coef > 0 and policy.router_shape[0] == 0:
        raise UserError(f"learner.router_aux_coef {learner.router_aux_coef}: the policy has no experts to balance")
    check_expert_axes(policy, learner.expert_parallel, learner.expert_tensor_parallel)
    check_ranks(policy, recipe.rollout.tensor_parallel)


def check_vocabulary(policy: str, renderer: Renderer) -> None:
    """Raises UserError where the texts rendered so far hold tokens that the policy's embedding has no row for."""
    size = read_json(Path(policy) / "config.json").get("vocab_size")
    if isinstance(size, int) and renderer.highest_id >= size:
        token = renderer.tokenizer.convert_ids_to_tokens(renderer.highest_id)
        raise UserError(
            f"the tokenizer of '{renderer.tokenizer.name_or_path}' is larger than the vocabulary of the policy in "
            f"{policy}: token {renderer.highest_id} ({token!r}) has no place in {size} rows"
        )


def chosen_policy(recipe: Recipe, checkpoint: str | None) -> str:
    """The policy folder of a command: its checkpoint, else the recipe's model.

    Raises UserError where it holds none, or none with room for the context.
    """
    if checkpoint is None:
        if recipe.policy.model is None:
            raise UserError("the recipe starts from random weights: name a policy with --checkpoint DIR")
        # A folder must hold a policy; anything else is taken for a hub id.
        if Path(recipe.policy.model).exists():
            check_checkpoint(recipe.policy.model)
        folder = local_folder(recipe.policy.model)
        check_model(whole_policy(folder), recipe.rollout.max_context)
        return str(folder)
    folder = check_checkpoint(checkpoint)
    check_model(whole_policy(folder), recipe.rollout.max_context)
    check_same_shape(recipe, folder)
    return str(folder)


def whole_policy(folder: str | Path) -> str:
    """The folder itself, or that of the policy which its adapter belongs to."""
    found = adapter_in(folder)
    return str(folder if found is None else found.base_folder())


def check_adapter(recipe: Recipe, folder: str) -> None:
    """Raises UserError where policy.lora does not fit the policy in a folder, or the adapter there."""
    lora, found = recipe.policy.lora, adapter_in(folder)
    if lora is not None:
        adapted_layers(shape_of(read_json(Path(folder) / "config.json")), lora)
    if found is None:
        return
    if lora is None:
        raise UserError(
            f"{folder} holds an adapter: train it further with policy.lora, or start from both as one "
            "(cispo export --merge)"
        )
    if (found.rank, found.alpha) != (lora.rank, lora.alpha):
        raise UserError(
            f"policy.lora has rank {lora.rank} and alpha {lora.alpha:g}, the adapter in {folder} rank {found.rank} and "
            f"alpha {found.alpha:g}"
        )


@contextlib.contextmanager
def merged_folder(folder: str, dtype: Literal["float32", "bfloat16"]) -> Iterator[str]:
    """The folder itself, or for the block a temporary one of an adapter and its policy in one."""
    found = adapter_in(folder)
    if found is None:
        yield folder
        return
    with weights_folder("merged") as merged:
        save_policy(merged_policy(found, getattr(torch, dtype)), merged)
        yield str(merged)


def check_same_shape(recipe: Recipe, checkpoint: Path) -> None:
    """Raises UserError where a checkpoint is of another model than the recipe's policy.config describes."""
    if recipe.policy.config is None:
        return
    stored = read_json(checkpoint / "config.json")
    for key, wanted in recipe.policy.config.items():
        if key in stored and stored[key] != wanted:
            raise UserError(
                f"checkpoint {checkpoint} is of another model: its {key} is {stored[key]!r}, the recipe's is {wanted!r}"
            )


def num_processes(recipe: Recipe, *, learners: bool = True, critic: bool = False, engines: bool = True) -> int:
    """Actors that a run starts."""
    ranks = recipe.learner.ranks * (int(learners) + int(critic))
    return ranks + (recipe.rollout.engines if engines else 0)


def make_runtime(recipe: Recipe, processes: int, activity: Activity, *, engines: bool = True) -> Runtime:
    if recipe.runtime == "local":
        return LocalRuntime()
    return RayRuntime(processes=processes, activity=activity, imports=shared_imports(recipe, engines=engines))


async def start_learners(recipe: Recipe, runtime: Runtime, folder: str, placement: Placement) -> list[LearnerHandle]:
    options = {"adapters": _adapters(recipe), "heads": asks_heads(recipe.rollout.engine_args)}
    build = partial(Learner, folder, recipe.learner, temperature=recipe.rollout.temperature, **options)
    return [LearnerHandle(rank) for rank in await _start_ranks(recipe, runtime, placement, build, "learner")]


async def start_critics(recipe: Recipe, runtime: Runtime, folder: str, placement: Placement) -> list[CriticHandle]:
    build = partial(Critic, folder, recipe.critic, recipe.learner, adapters=_adapters(recipe))
    return [CriticHandle(rank) for rank in await _start_ranks(recipe, runtime, placement, build, "critic")]


def _adapters(recipe: Recipe) -> Adapters | None:
    lora = recipe.policy.lora
    return None if lora is None else Adapters(lora=lora, seed=seed_of(recipe.seed, "adapter"))


async def _start_ranks(
    recipe: Recipe, runtime: Runtime, placement: Placement, build: Callable[..., Closable], name: str
) -> list[Handle]:
    """`learner.ranks` objects, each on its device."""
    resources = [
        Resources(gpus=placement.rank_gpus, bundle=placement.bundle_of_rank(rank))
        for rank in range(recipe.learner.ranks)
    ]
    return await runtime.start_ranks(
        build, name=name, resources=resources, dtype=recipe.policy.number_format, device=placement.device
    )


def engine_args_of(recipe: Recipe) -> Mapping[str, object]:
    """The recipe's arguments for vLLM, with a prefix cache where attempts have several turns.

    In rounds the cache repeats bit for bit: it is emptied at every update, and no batch finds blocks of another
    (`Home.cache`).
    """
    rollout = recipe.rollout
    if recipe.env is None or rollout.kind != "vllm" or rollout.max_context < _CACHED_CONTEXT:
        return rollout.engine_args
    return {"enable_prefix_caching": True, **rollout.engine_args}


def sequences_of(recipe: Recipe, device: Literal["cpu", "cuda"] = "cpu") -> int:
    """Concurrent sequences of one engine on a device."""
    rollout = recipe.rollout
    if rollout.kind == "torch" and device == "cuda":
        return _MAX_SEQUENCES  # it reserves none ahead, and a step takes as long for few as for many
    prompts = rollout.prompts_per_step * (1 + recipe.control.max_staleness)
    return min(math.ceil(prompts / rollout.engines) * rollout.group_size, _MAX_SEQUENCES)


async def start_engine(
    recipe: Recipe, runtime: Runtime, folder: str, placement: Placement, number: int, *, weights_follow: bool = False
) -> EngineHandle:
    """With `weights_follow` the learner's weights arrive before the first prompt, and a GPU is spared the folder's."""
    rollout = recipe.rollout
    engine = await runtime.start(
        make_engine,
        rollout.kind,
        folder,
        name=f"engine-{number}",
        resources=Resources(gpus=placement.engine_gpus, bundle=placement.bundle_of_engine(number)),
        concurrent=True,
        dtype=recipe.policy.number_format,
        max_context=rollout.max_context,
        max_sequences=sequences_of(recipe, placement.device),
        tensor_parallel=rollout.tensor_parallel,
        memory=placement.cache_share,
        sleeps=placement.sleeps,
        engine_args=engine_args_of(recipe),
        record_routes=recipe.policy.router_replay == "rollout",
        read_weights=not (weights_follow and placement.device == "cuda"),
        device=placement.device,
    )
    return EngineHandle(engine)


def transport_of(recipe: Recipe, placement: Placement, *, home: bool = True) -> Transport | Literal["shared_memory"]:
    """The transport of weights to the engines; `home`: learners and engines are all on this machine.

    Raises UserError where the recipe's transport does not fit the placement.
    """
    wanted, on_gpu = recipe.rollout.weight_sync, placement.device == "cuda"
    if wanted == "auto":
        if recipe.runtime == "local" and on_gpu:
            return "direct"
        if recipe.rollout.kind == "torch" or (home and not on_gpu):
            return "shared_memory"
        return "cuda_ipc" if placement.shares_gpus else "broadcast"
    if wanted == "cuda_ipc" and not placement.shares_gpus:
        raise UserError("rollout.weight_sync cuda_ipc needs learners and engines that share GPUs (rollout.placement)")
    return wanted


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A block in which the driver's torch has one thread, unless OMP_NUM_THREADS is set.

    Its tensors are small. As many threads as the machine has cores would wait for each other while engines and learners
    have the cores: metrics of 262,144 tokens took 0.3 s with two of them on a busy machine, and 0.04 with one.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    ahead: Ahead | None = None,
    parts: StartParts | None = None,
    weights_follow: bool = False,
    side_by_side: int = 1,
) -> AsyncIterator[tuple[Workers, asyncio.Task[None]]]:
    """Workers with started learners, and the task that starts the engines meanwhile; all end with the block.

    Their processes are those of `ahead`, if it has any. `weights_follow` promises `sync_weights` before any prompt. The
    seconds until there is a cluster, and until the learners are built, are left in `parts`.
    """
    parts = StartParts() if parts is None else parts
    tasks: list[asyncio.Task[None]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        with parts.timed("cluster"):
            started = None if ahead is None else await ahead.take()
            if started is None:
                processes = num_processes(recipe, learners=learners, critic=critic, engines=engines)
                runtime: Runtime = make_runtime(recipe, processes, activity, engines=engines)
                stack.callback(runtime.close)
                gpus = runtime.gpus()
                which = {"critic": critic, "learners": learners, "engines": engines}
                placement = placement_of(recipe, available=gpus, side_by_side=side_by_side, **which)
                await runtime.reserve([placement.rank_bundles, placement.engine_bundles])
            else:
                runtime, placement = started
                stack.callback(runtime.close)
        home, policy = runtime.is_home(), str(Path(policy).absolute())
        # Engines of an adapter start from its policy alone: weights arrive before the first prompt.
        adapter = adapter_in(policy)
        engine_policy = policy if adapter is None else str(adapter.check_base())
        weights = stack.enter_context(
            weights_folder(recipe.name) if home else shared_weights_folder(recipe.name, Path(recipe.output_dir))
        )
        if not home:
            await runtime.check_paths({"output_dir": str(weights), "policy": policy})
        workers = Workers(
            learners=[],
            critics=[],
            engines=[],
            start_engine=partial(
                start_engine, recipe, runtime, engine_policy, placement, weights_follow=weights_follow
            ),
            weights_folder=str(weights),
            group_size=recipe.rollout.group_size,
            transport=transport_of(recipe, placement, home=home),
            verify=recipe.rollout.verify_weights,
            sharded=shards(
                recipe.learner.shard,
                ranks=recipe.learner.ranks,
                device=placement.device,
                expert_ranks=recipe.learner.expert_ranks,
            ),
            sleeps=placement.sleeps,
            tensor_parallel=recipe.rollout.tensor_parallel,
            on_update=recipe.control.on_update,
            # In this process a debugger should see the error of an engine.
            max_restarts=0 if recipe.runtime == "local" else recipe.control.max_restarts,
            say=say,
        )
        activity.details.append(workers.waiting_in)
        try:
            ready = asyncio.Event()
            if not engines_wait(recipe, num_processes(recipe, critic=critic)):
                ready.set()

            async def start_engines() -> None:
                await ready.wait()
                await workers.start_engines(recipe.rollout.engines if engines else 0)

            starting = asyncio.create_task(start_engines())
            tasks.append(starting)
            if recipe.control.watchdog:
                tasks.append(asyncio.create_task(workers.report_progress(activity, every=recipe.control.watchdog / 10)))
            with parts.timed("ranks"):
                if learners:
                    workers.learners = await start_learners(recipe, runtime, policy, placement)
                if critic:
                    workers.critics = await start_critics(recipe, runtime, policy, placement)
            ready.set()
            yield workers, starting
        finally:
            activity.details.remove(workers.waiting_in)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
