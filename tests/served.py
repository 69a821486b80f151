"""Single calls and updates of an engine, for tests without overlap."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cispo.engines.serving import ServedEngine
from cispo.types import Completion, Sampling


def sampled(
    engine: ServedEngine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    limits: Sequence[int] | None = None,
) -> list[Completion]:
    return asyncio.run(engine.generate(prompts, sampling, seed, limits))


def update(engine: ServedEngine, path: str, version: int) -> None:
    """Puts published weights into an idle engine."""
    asyncio.run(engine.begin_update("wait"))
    engine.load_weights(path)
    engine.finish_update(version)
