"""Supervised warm-up: demonstrations in seeded batches, trained with the learner's own update."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from cispo.types import Sample


def demonstration_batches(samples: Sequence[Sample], *, batch_size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches without end: every demonstration once an epoch, in an order that only the seed decides."""
    epoch = 0
    queue: list[Sample] = []
    while True:
        while len(queue) < batch_size:
            order = list(samples)
            random.Random(f"{seed}/{epoch}").shuffle(order)
            queue += order
            epoch += 1
        yield queue[:batch_size]
        del queue[:batch_size]
