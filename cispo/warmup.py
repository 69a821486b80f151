"""Supervised warm-up before the first training step.

rows --demonstrations_of--> samples --demonstration_batches--> the learner's own update with -logprob as the loss
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, overload

from cispo.algorithms.losses import NegativeLogLikelihood
from cispo.algorithms.objective import Objective
from cispo.batch.packing import pack_for
from cispo.batch.samples import demonstration
from cispo.errors import UserError
from cispo.learner.heads import prediction_metrics
from cispo.learner.optim import learning_rate
from cispo.output.folder import RunLog
from cispo.output.screen import Screen
from cispo.recipe.schema import Data, Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.messages import whole_text, with_columns
from cispo.rollout.prompts import (
    Say,
    build_prompts,
    fitting,
    rendered,
    system_of,
    template_args_of,
    warn,
    warn_of_lacking,
)
from cispo.rollout.renderer import Renderer
from cispo.rollout.rows import Row, load_rows
from cispo.types import Message, Sample
from cispo.workers import Workers

Turns = Sequence[Message]
"""A demonstration behind its prompt."""

_SFT = Objective(loss=NegativeLogLikelihood())


class Demonstrations(Sequence[Sample]):
    """Samples that are made when they are drawn: the tensors of all would take most of a short start."""

    def __init__(self, taught: Sequence[_Arguments]) -> None:
        self._taught = taught

    def __len__(self) -> int:
        return len(self._taught)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [demonstration(*one) for one in self._taught[index]]
        return demonstration(*self._taught[index])


class _Arguments(NamedTuple):
    """The arguments of `demonstration`."""

    prompt: list[int]
    completion: list[int]
    row: int
    taught: list[bool] | None


def demonstrations_of(data: Data, renderer: Renderer, recipe: Recipe, say: Say = warn) -> Demonstrations:
    """The demonstrations of `sft.data`. Raises UserError naming rows that have no completion or are too long.

    With sft.data.overlong drop, the latter are left out and counted in a warning.
    """
    key, context, drop = "sft.data", recipe.rollout.max_context, data.overlong == "drop"
    rows = load_rows(data.source, data.split, data.args, data.limit, key, config=data.config)
    rows = [with_columns(row, data.columns, f"{key}: row {index}") for index, row in enumerate(rows)]
    completions = [_completion(row, f"{key}: row {index}") for index, row in enumerate(rows)]
    built = build_prompts(rows, data.prompt, key, system=system_of(data, data, recipe))
    renderer = renderer.with_args(template_args_of(data, data, recipe))
    prompts = rendered(built, key, renderer, context, say, numbers=range(len(built)), drop=drop)
    warn_of_lacking(["".join(map(_content, turns)) for turns in completions], f"{key}: {{}} completions", renderer, say)
    # The last token of a demonstration is predicted, not read.
    before = {row: len(prompt) - 1 for row, prompt in enumerate(prompts) if prompt is not None}

    def encode(completions: Sequence[Turns]) -> list[list[int]]:
        if all(len(turns) == 1 for turns in completions):
            return renderer.encode_completions([_content(turns[0]) for turns in completions])
        return [[token for ids, _ in _encoded(turns, renderer) for token in ids] for turns in completions]

    targets = fitting(
        [completions[row] for row in before],
        encode,
        context,
        key,
        before=list(before.values()),
        size_of=lambda turns: sum(map(len, map(_content, turns))),
        numbers=list(before),
        drop=drop,
    )
    samples = [
        _Arguments(prompt, target, row, _taught(completions[row], renderer))
        for row, target in zip(before, targets, strict=True)
        if (prompt := prompts[row]) is not None and target is not None
    ]
    if not samples:
        raise UserError(f"{key}: all {len(rows):,} rows are too long for rollout.max_context {context}")
    if len(samples) < len(rows):
        left = f"{len(rows) - len(samples):,} of {len(rows):,} rows"
        say(f"{key}: {left} leave no room in rollout.max_context {context} and are left out (overlong: drop)")
    return Demonstrations(samples)


def _completion(row: Row, where: str) -> Turns:
    """The column `completion`: text, or messages of which the policy's are taught and the others read."""
    completion = row.get("completion")
    if isinstance(completion, str):
        return ({"role": "assistant", "content": whole_text(completion, where)},)
    if not isinstance(completion, list | tuple) or not completion:
        raise UserError(f"{where} has no text in column 'completion' (it has {', '.join(map(str, row))})")
    for message in completion:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(f"{where}: column 'completion' holds {message!r:.80}, which is no message of text")
        whole_text(message["content"], where)
    if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
        raise UserError(f"{where}: the messages of column 'completion' begin and end with the policy's (assistant)")
    return tuple(completion)


def _content(message: Message) -> str:
    return str(message["content"])


def _encoded(turns: Turns, renderer: Renderer) -> list[tuple[list[int], bool]]:
    """(tokens, whether they are taught) of each turn of the policy and of what it reads in between."""
    parts: list[tuple[list[int], bool]] = []
    for taught, run in itertools.groupby(turns, key=lambda message: message["role"] == "assistant"):
        if taught:
            parts += [(renderer.encode_completion(_content(message)), True) for message in run]
        else:
            parts.append((renderer.extend(list(run), parts[-1][0]), False))
    return parts


def _taught(turns: Turns, renderer: Renderer) -> list[bool] | None:
    """Whether each token is trained on; None where all are."""
    if len(turns) == 1:
        return None
    return [taught for ids, taught in _encoded(turns, renderer) for _ in ids]


def demonstration_batches(samples: Sequence[Sample], *, batch_size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches without end: every demonstration once an epoch, in an order given by the seed."""
    epoch = 0
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            order = list(range(len(samples)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            queue += order
            epoch += 1
        yield [samples[index] for index in queue[:batch_size]]
        del queue[:batch_size]


async def warm_up(recipe: Recipe, workers: Workers, samples: Sequence[Sample], log: RunLog, screen: Screen) -> None:
    """Supervised fine-tuning on demonstrations, then a fresh optimizer. Raises UserError where a gradient diverges."""
    assert recipe.sft is not None
    keys = recipe.sft
    demonstrations = demonstration_batches(samples, batch_size=keys.batch_size, seed=seed_of(recipe.seed, "sft"))
    screen.phase("warm-up", keys.steps)
    for step in range(1, keys.steps + 1):
        batches = pack_for(recipe, next(demonstrations), "token")
        lr = learning_rate(step - 1, steps=keys.steps, peak=keys.lr, warmup=keys.warmup_steps)
        started = time.perf_counter()
        results = await workers.update(batches, _SFT, lr)
        speed = sum(mb.tokens.numel() for of_rank in batches for mb in of_rank) / (time.perf_counter() - started)
        loss = sum(r.batch.loss for r in results)
        if not results[0].taken:
            raise UserError(f"sft: the gradient of step {step} is not finite; sft.lr {keys.lr} is too high")
        predicted = prediction_metrics(r.batch.predictions for r in results)
        values = {"loss": loss, "grad_norm": results[0].grad_norm, "tokens_per_s": speed, **predicted}
        log.metrics(step, {f"sft/{name}": value for name, value in values.items()})
        screen.step(step, {"loss": f"{loss:.3f}", "tokens/s": f"{speed:,.0f}"})
    screen.done()
    await workers.reset_optimizer()
