"""The parts that both sides of `bench_step.py` share: a job, its prompts and reward, the seconds of a step."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from typing import NamedTuple


class Seconds(NamedTuple):
    """Durations of one step."""

    step: float
    generation: float
    learning: float
    processor: float
    """Processor time of the step, which a busy machine does not stretch."""
    sync: float = math.nan
    """Transfer of the weights to the engines, part of the generation; TRL does not report it."""
    mismatch: float = math.nan
    """Mean |sampler - learner| log-probability of the sampled tokens; on a CPU, TRL does not report it."""


class Clock:
    """Wall-clock and processor time since its creation."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self, generation: float, learning: float) -> Seconds:
        step = time.perf_counter() - self.wall
        return Seconds(step, generation, learning, time.process_time() - self.processor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The work of one side."""

    model: str
    """Folder with the first weights and a tokenizer."""
    device: str
    prompts: int
    group: int
    lengths: tuple[int, ...]
    """Tokens of each completion of a step, [prompts * group]."""
    steps: int
    lr: float
    folder: str
    """For files of a side."""
    memory: float
    """Share of a GPU's memory for the engine."""
    peer_batch: int
    """Completions of one forward pass of TRL's trainer."""
    engines: int
    """Of ours, on a GPU; each a process beside the learner's."""
    engine: str = "vllm"
    """Of ours: rollout.engine."""
    share_prompts: bool = False
    """Of ours: learner.share_prompts."""

    @property
    def context(self) -> int:
        """Longest prompt, about 14 tokens, and completion."""
        return max(self.lengths) + 32


def problems(size: int) -> list[dict[str, str]]:
    """Prompts of 9 to 13 characters."""
    rng = random.Random(0)
    return [{"prompt": f"count {rng.randint(1, 10 ** rng.randint(1, 5))}: "} for _ in range(size)]


def digit_share(completion: str, **_: object) -> float:
    """The share of digits: it varies from one random completion to the next."""
    return sum(c.isdigit() for c in completion) / max(len(completion), 1)
