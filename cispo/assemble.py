"""From a recipe to the parts that run it: everything a recipe names is loaded and checked before a process starts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cispo.actors import Handle, LocalRuntime, RayRuntime, Runtime
from cispo.algorithms import ALGORITHMS, LOSS_KEYS, Algorithm, Reduction, resolve
from cispo.config import Data, Recipe
from cispo.learner.learner import Learner, UpdateResult
from cispo.learner.parallel import pick_device
from cispo.loading import load_object
from cispo.packing import demonstration, pack
from cispo.policies.base import init_policy, local_folder, save_policy
from cispo.rollout.engine import make_engine
from cispo.rollout.prompts import build_prompts, load_rows
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.rollout.rewards import RewardFunction, RewardRunner
from cispo.types import Completion, MicroBatch, Prompt, RepetitionStop, Sample, Sampling, UserError
from cispo.weight_sync import make_weights_folder, remove_weights_folder

# More sequences than this at once gain nothing on one engine and cost cache memory.
_MAX_SEQUENCES = 512


def seed_of(*identity: int | str) -> int:
    """A seed that depends on what it is for (run seed, purpose, step ...) and never on the order of calls."""
    text = "/".join(str(part) for part in identity)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm with its changes, checked against the group size."""
    keys = recipe.algorithm
    if ":" in keys.name:
        algorithm = load_object(keys.name, "algorithm.name")
        if not isinstance(algorithm, Algorithm):
            raise UserError(f"algorithm.name: {keys.name} is not an Algorithm record but a {type(algorithm).__name__}")
    elif keys.name in ALGORITHMS:
        algorithm = ALGORITHMS[keys.name]
    else:
        raise UserError(f"algorithm.name {keys.name!r} is unknown; there are {', '.join(ALGORITHMS)}, or module:NAME")
    resolved = resolve(
        algorithm,
        settings={key: getattr(keys, key) for key in LOSS_KEYS},
        advantage=keys.advantage,
        reduction=keys.reduction,
        anchor=keys.ratio_anchor,
    )
    if recipe.rollout.group_size == 1 and resolved.advantage.__name__.startswith("group_"):
        raise UserError(
            f"rollout.group_size 1 gives {resolved.advantage.__name__} nothing to compare: every advantage would be 0"
        )
    return resolved


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


def rewards_of(recipe: Recipe, prompts: Sequence[Prompt]) -> RewardRunner:
    """The reward functions, imported and found to fit the columns of the prompts."""
    assert recipe.reward is not None
    terms = [RewardFunction(fn=term.fn, weight=term.weight, args=term.args) for term in recipe.reward.functions]
    runner = RewardRunner(terms, on_error=recipe.reward.on_error, timeout=recipe.reward.timeout)
    runner.check(columns=prompts[0].columns)
    return runner


def prompts_of(data: Data, key: str, renderer: Renderer, recipe: Recipe) -> list[Prompt]:
    """A section's prompts, every one of them short enough for the context."""
    prompts = build_prompts(load_rows(data.source, data.split, data.args, data.limit, key), data.prompt, key)
    for prompt in prompts:
        _check_length(len(renderer.render(prompt.messages)), recipe, f"{key}: prompt {prompt.id}")
    return prompts


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
    """Packs a batch for the recipe's learner ranks: [ranks][micro-batches]."""
    return pack(
        samples,
        reduction=reduction,
        max_tokens=recipe.rollout.max_tokens,
        tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch,
        ranks=recipe.learner.ranks,
    )


@dataclass(slots=True, kw_only=True)
class Workers:
    """The learner ranks and the engines, with the verbs of the training loop."""

    learners: list[Handle]
    engines: list[Handle]
    weights_folder: str
    group_size: int

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Shares the prompts over the engines; a group stays together, where prefix caching can share its prompt."""
        groups = math.ceil(len(prompts) / self.group_size)
        share = math.ceil(groups / len(self.engines)) * self.group_size
        parts = [prompts[i : i + share] for i in range(0, len(prompts), share)]
        answers = await asyncio.gather(
            *(
                engine.call("generate", part, sampling, seed_of(seed, number))
                for number, (engine, part) in enumerate(zip(self.engines, parts, strict=False))
            )
        )
        return [completion for answer in answers for completion in answer]

    async def update(
        self, columns: Sequence[Sequence[MicroBatch]], algorithm: Algorithm, lr: float
    ) -> list[UpdateResult]:
        """One optimizer step: rank r trains on columns[r]."""
        return await asyncio.gather(
            *(
                learner.call("update", column, algorithm.loss, dict(algorithm.settings), lr=lr, anchor=algorithm.anchor)
                for learner, column in zip(self.learners, columns, strict=True)
            )
        )

    async def logprobs(self, columns: Sequence[Sequence[MicroBatch]]) -> list[list[Any]]:
        return await asyncio.gather(
            *(learner.call("logprobs", c) for learner, c in zip(self.learners, columns, strict=True))
        )

    async def reset_optimizer(self) -> None:
        await asyncio.gather(*(learner.call("reset_optimizer") for learner in self.learners))

    async def sync_weights(self, version: int) -> None:
        """Puts the learner's weights into every engine; returns when they sample with them."""
        path = await self.learners[0].call("publish", self.weights_folder, version)
        await asyncio.gather(*(engine.call("update_weights", path, version) for engine in self.engines))

    async def save(self, folder: Path) -> None:
        await self.learners[0].call("save", str(folder))


def make_runtime(recipe: Recipe, *, learners: bool = True, engines: bool = True) -> Runtime:
    if recipe.runtime == "local":
        return LocalRuntime()
    processes = (recipe.learner.ranks if learners else 0) + (recipe.rollout.engines if engines else 0)
    return RayRuntime(processes=processes)


def _device(recipe: Recipe) -> tuple[Literal["cpu", "cuda"], int]:
    """(device of the workers, GPUs of each learner rank)."""
    on_gpu = pick_device(recipe.device).type == "cuda"
    return ("cuda", 1) if on_gpu else ("cpu", 0)


async def start_learners(recipe: Recipe, runtime: Runtime, folder: str) -> list[Handle]:
    device, gpus = _device(recipe)
    return await runtime.start_ranks(
        Learner,
        folder,
        recipe.learner,
        name="learner",
        ranks=recipe.learner.ranks,
        gpus=gpus,
        dtype=recipe.policy.dtype,
        device=device,
        temperature=recipe.rollout.temperature,
    )


async def start_engines(recipe: Recipe, runtime: Runtime, folder: str) -> list[Handle]:
    rollout = recipe.rollout
    _, gpus = _device(recipe)
    sequences = math.ceil(rollout.prompts_per_step / rollout.engines) * rollout.group_size
    return await asyncio.gather(
        *(
            runtime.start(
                make_engine,
                rollout.engine,
                folder,
                name=f"engine-{number}",
                gpus=gpus * rollout.tensor_parallel,
                dtype=recipe.policy.dtype,
                max_context=rollout.max_context,
                max_sequences=min(sequences, _MAX_SEQUENCES),
                tensor_parallel=rollout.tensor_parallel,
                engine_args=rollout.engine_args,
            )
            for number in range(rollout.engines)
        )
    )


@contextlib.asynccontextmanager
async def running_workers(
    recipe: Recipe, policy: str, *, engines: bool = True, learners: bool = True
) -> AsyncIterator[tuple[Workers, asyncio.Task[list]]]:
    """Learners, and engines that start in the background meanwhile; all of them end with the block."""
    runtime = make_runtime(recipe, learners=learners, engines=engines)
    starting: asyncio.Task[list] | None = None
    shared = make_weights_folder(recipe.name)
    try:
        group_size = recipe.rollout.group_size
        workers = Workers(learners=[], engines=[], weights_folder=str(shared), group_size=group_size)
        starting = asyncio.create_task(start_engines(recipe, runtime, policy) if engines else _none())
        if learners:
            workers.learners = await start_learners(recipe, runtime, policy)
        yield workers, starting
    finally:
        if starting is not None:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await starting
        runtime.close()
        remove_weights_folder(shared)


async def _none() -> list:
    return []
