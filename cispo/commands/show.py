"""`cispo show`: a recipe resolved, its algorithm in words, its processes and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cispo.agents.thinking import describe_thinking, thinking_warnings
from cispo.algorithms import Algorithm
from cispo.algorithms.choice import algorithm_of
from cispo.algorithms.describe import describe, warnings
from cispo.algorithms.losses import Gspo
from cispo.commands.card import CARDS, Planner, card_here
from cispo.engines.choice import EngineChoice, engine_of, settled
from cispo.learner.memory import RankMemory, gib, rank_memory
from cispo.learner.parallel import Mesh, shards
from cispo.learner.traffic import draw, traffic
from cispo.output.screen import new_console, table_of, warn
from cispo.policies.loading import config_of, count_parameters, shape_of
from cispo.policies.lora import adapter_size
from cispo.policies.policy import Policy, heads_of
from cispo.policies.replay import bytes_per_token
from cispo.recipe.drafts import asks_heads
from cispo.recipe.load import dump_yaml, load_recipe
from cispo.recipe.schema import Env, Learner, Recipe
from cispo.rollout.curriculum import describe_curriculum
from cispo.rollout.renderer import renderer_of
from cispo.runtime.placement import gpus_of, pick_device
from cispo.start import check_experts, new_config

# A learner of less memory fits any GPU.
_LARGE = 2**30


def show(path: Path, overrides: Sequence[str]) -> None:
    """`cispo show`: the resolved recipe, the algorithm in words, the process and memory plan."""
    given = load_recipe(path, overrides)
    recipe, engine = settled(given), engine_of(given)
    algorithm = algorithm_of(recipe)
    console = new_console()
    console.print("recipe", style="bold")
    console.print(dump_yaml(recipe))
    console.print("algorithm", style="bold")
    console.print(table_of(describe(algorithm)))
    updates, stale = recipe.algorithm.steps_per_batch, recipe.control.max_staleness
    for sentence in warnings(algorithm, updates_per_batch=updates, max_staleness=stale):
        warn(console, sentence)
    if recipe.env is not None:
        per_sequence = isinstance(algorithm.objective.loss, Gspo)
        for sentence in thinking_warnings(recipe.env, renderer_of(recipe), per_sequence=per_sequence):
            warn(console, sentence)
    rollout = recipe.rollout
    curriculum = describe_curriculum(recipe.curriculum, group_size=rollout.group_size, max_tokens=rollout.max_tokens)
    if curriculum:
        console.print("\ncurriculum", style="bold")
        console.print(table_of(curriculum))
    console.print("\nprocesses and memory", style="bold")
    console.print(table_of(_plan(recipe, algorithm, engine)))
    cards = list(_cards(given, algorithm, on_gpu=pick_device(recipe.device).type == "cuda"))
    if cards:
        console.print(table_of(cards))


def _plan(recipe: Recipe, algorithm: Algorithm, engine: EngineChoice) -> list[tuple[str, str]]:
    rollout, learner = recipe.rollout, recipe.learner
    model = recipe.policy.model
    config = new_config(recipe, renderer_of(recipe)) if model is None else None
    heads = asks_heads(rollout.engine_args)
    parameters = count_parameters(model, config, heads=heads)
    half = recipe.policy.number_format == "bfloat16"
    trained = parameters if recipe.policy.lora is None else _adapter_size(recipe)
    engine_bytes = parameters * (2 if half else 4)
    device = pick_device(recipe.device)
    sharded = shards(learner.shard, ranks=learner.ranks, device=device.type, expert_ranks=learner.expert_ranks)
    adapter = trained if recipe.policy.lora is not None else 0
    reference = algorithm.needs_reference and not adapter
    options = {"dtype": recipe.policy.number_format, "sharded": sharded, "adapter": adapter, "reference": reference}
    memory = rank_memory(_shape(recipe), learner, **options)
    extra = [("critic memory", f"{gib(memory.peak)} a rank, as the learner")] if algorithm.critic else []
    if recipe.policy.lora is not None:
        share = f"{trained:,} trained parameters, {trained / parameters:.2%} of the policy's"
        extra.append(("adapter", f"rank {recipe.policy.lora.rank}, {share}"))
    if algorithm.needs_reference and recipe.policy.lora is not None:
        extra.append(("reference policy", "the policy without its adapter, no memory of its own"))
    elif algorithm.needs_reference:
        share = engine_bytes / learner.ranks if sharded else engine_bytes
        where = "in host memory" if "reference" in learner.offload else "for weights"
        extra.append(("reference policy", f"{gib(share)} a learner rank {where}"))
    if heads:
        extra.append(("heads (MTP)", _heads(recipe)))
    if recipe.policy.router_replay != "off":
        extra.append(("router replay", _replay(recipe)))
    if recipe.env is not None:
        extra.append(("turns", _turns(recipe.env, apart=recipe.control.max_staleness > 0)))
        extra.append(("thinking", describe_thinking(recipe.env, renderer_of(recipe))))
    if device.type == "cuda":
        alone, shared = (gpus_of(recipe, critic=algorithm.critic, shared=s) for s in (False, True))
        extra.append(("GPUs", f"{alone} where each part has its own, {shared} shared (placement {rollout.placement})"))
        extra.append(("engines' caches", f"at most {rollout.gpu_memory:.0%} of a GPU's memory"))
    completions = rollout.prompts_per_step * rollout.group_size
    critic = f", {learner.ranks} critic" if algorithm.critic else ""
    where = "one process" if recipe.runtime == "local" else "Ray actors"
    return [
        ("device", str(device)),
        ("runtime", f"{where}: 1 driver, {learner.ranks} learner{critic}, {rollout.engines} {engine.name} engine"),
        ("engine", f"{engine.name}: {engine.reason}"),
        ("policy", f"{parameters:,} parameters, {recipe.policy.number_format}, LM head in float32"),
        ("learner memory", _rank_memory(memory, learner, sharded=sharded)),
        *_mesh(recipe, sharded=sharded),
        *extra,
        ("engine memory", f"{gib(engine_bytes)} an engine for weights, plus the cache"),
        ("checkpoints", _checkpoint(recipe, parameters, trained, critic=algorithm.critic)),
        (
            "batch",
            f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {completions} completions of at most "
            f"{rollout.max_tokens} tokens, {recipe.algorithm.steps_per_batch} update(s)",
        ),
        ("sampling", _sampling(recipe)),
    ]


def _turns(env: Env, *, apart: bool) -> str:
    used = f"environment or agent {env.use}" if env.use else f"tools {', '.join(env.tools)}"
    together = "in rounds: turn k of all attempts in one call of the engines"
    return f"at most {env.max_turns} an attempt, {used}; {'no attempt waits for another' if apart else together}"


def _rank_memory(memory: RankMemory, learner: Learner, *, sharded: bool) -> str:
    form = f"split over {learner.ranks} ranks" if sharded else "a whole copy"
    layers = "layers recomputed" if learner.recomputes else "layers kept"
    host = f"; {gib(memory.host)} in host memory ({', '.join(learner.offload)})" if memory.host else ""
    return (
        f"about {gib(memory.peak)} a rank: weights and AdamW {gib(memory.state)} ({form}), gradients and gathered "
        f"weights {gib(memory.during_pass)}, activations of {learner.tokens_per_micro_batch:,} tokens "
        f"{gib(memory.activations)} ({layers}){host}"
    )


def _cards(recipe: Recipe, algorithm: Algorithm, *, on_gpu: bool) -> Iterator[tuple[str, str]]:
    """The fullest GPU of the run against the card here, or against usual ones where a GPU might be meant."""
    card = card_here() if on_gpu else None
    planner = Planner(_shape(recipe), algorithm, gpus=torch.cuda.device_count() if on_gpu else 0)
    need = planner.need(recipe, card or CARDS[-1])
    if card is not None:
        yield "memory of a GPU", planner.verdict(recipe, card)
    elif recipe.device == "auto" and need.total - need.cache - need.rest > _LARGE:
        yield "memory of a GPU", planner.smallest(recipe)
    else:
        return
    yield "its parts", ", ".join(f"{name} {gib(size)}" for name, size in need.parts() if size)


def _checkpoint(recipe: Recipe, parameters: int, trained: int, *, critic: bool) -> str:
    """Bytes of a checkpoint on the disk: the policy or its adapter, and the optimizer of what is trained."""
    width = 2 if recipe.policy.number_format == "bfloat16" else 4
    lora, full = recipe.policy.lora is not None, recipe.train.checkpoint == "full"
    moments = 2.125 if recipe.learner.optimizer == "adamw8bit" else 8
    optimizer = trained * (moments + (4 if width < 4 else 0)) if full else 0
    own = (trained if lora else parameters) * width + optimizer
    size = own + (parameters * width + optimizer if critic else 0)
    what = "all state" if full else "weights alone, no optimizer"
    return f"about {gib(size)} each ({what}), {recipe.train.keep} kept beside the best"


def _mesh(recipe: Recipe, *, sharded: bool) -> Iterator[tuple[str, str]]:
    """The learner ranks in groups, and the bytes that one of them sends. Raises UserError for an impossible mesh."""
    learner = recipe.learner
    if learner.ranks == 1:
        return
    policy = _shape(recipe)
    check_experts(recipe, policy)
    axes = learner.context_parallel, learner.expert_parallel, learner.expert_tensor_parallel
    mesh = Mesh(world=learner.ranks, cp=axes[0], ep=axes[1], etp=axes[2])
    if max(axes) > 1:
        yield from (("mesh" if n == 0 else "", f"{name} {text}") for n, (name, text) in enumerate(draw(mesh)))
    width = 2 if recipe.policy.number_format == "bfloat16" else 4
    sent = traffic(policy, mesh, tokens=learner.tokens_per_micro_batch, width=width, sharded=sharded)
    parts = [("weights", sent.weights), ("experts' tokens", sent.experts), ("split documents", sent.context)]
    if any(size for _, size in parts):
        sizes = ", ".join(f"{gib(size)} of {name}" for name, size in parts if size)
        yield (
            "sent by a rank",
            f"at most {sizes} in a layer's forward pass, as much again backward, gradients in float32",
        )


def _adapter_size(recipe: Recipe) -> int:
    assert recipe.policy.lora is not None
    return adapter_size(_shape(recipe), recipe.policy.lora)


def _heads(recipe: Recipe) -> str:
    """Number, size and training of the heads of multi-token prediction."""
    heads = heads_of(_shape(recipe))
    size = sum(p.numel() for head in heads for p in head.parameters())
    trained = "stay as they are beside policy.lora" if recipe.policy.lora is not None else "trained beside the policy"
    return f"{len(heads)}, {size:,} of the parameters, {trained}"


def _replay(recipe: Recipe) -> str:
    """Cost of recording and replaying the experts of a batch. Raises UserError where there are none."""
    policy, rollout = _shape(recipe), recipe.rollout
    check_experts(recipe, policy)
    size = bytes_per_token(policy)
    most = size * rollout.prompts_per_step * rollout.group_size * rollout.max_context
    return f"{size} bytes a token, at most {gib(most)} a batch, and every router's product twice in the learner"


def _shape(recipe: Recipe) -> Policy:
    """The recipe's policy without memory for its weights."""
    model = recipe.policy.model
    config = new_config(recipe, renderer_of(recipe)) if model is None else config_of(model)
    return shape_of(config, heads=asks_heads(recipe.rollout.engine_args))


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
