"""Random streams of an engine's own; those of the process go on as if there were no engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RandomStream:
    """A CPU random state of the engine's own, swapped in while it samples."""

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside the block torch draws from this stream, afterwards from the process's own."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = torch.get_rng_state()
            torch.set_rng_state(outside)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch inside the block; restores the streams of torch, random and NumPy afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
