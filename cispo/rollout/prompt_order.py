"""Orders of prompts, each a stream of positions with a state to resume from: epochs, draws by difficulty, a mixture.

PassRates (right attempts, dropped ones) --take(n, rates)--> n positions that are not dropped
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from cispo.recipe.seeds import seed_of
from cispo.rollout.curriculum import difficulty_weights, enough

# Positions examined together by numpy: most prompts of a long run may be dropped, too many for a Python loop.
_WINDOW = 4096


class Standing(Protocol):
    """Pass rates of the prompts that an order draws from, [N] each."""

    right: NDArray[np.int64]
    attempts: NDArray[np.int64]
    dropped: NDArray[np.bool_]
    """Whether a prompt is never to be taken again."""


@dataclass(slots=True)
class _Share:
    """The pass rates of one source, as views."""

    right: NDArray[np.int64]
    attempts: NDArray[np.int64]
    dropped: NDArray[np.bool_]


class PassRates:
    """Right attempts and attempts in the last group of every prompt, [N] each, and the prompts dropped for them.

    Only the last group counts: the policy moves, and an earlier policy's pass rate does not estimate today's. Prompts
    that are too long for the context are dropped as well, and counted apart.
    """

    def __init__(self, size: int, drop_above: float | None, too_long: Sequence[int] = ()) -> None:
        self.drop_above = drop_above
        self.right = np.zeros(size, dtype=np.int64)
        self.attempts = np.zeros(size, dtype=np.int64)
        self.dropped = np.zeros(size, dtype=bool)
        self.too_long = np.zeros(size, dtype=bool)
        self.left = size
        """Prompts not dropped."""
        for index in too_long:
            self.leave_out(index)

    def observe(self, index: int, right: int, attempts: int) -> None:
        self.right[index], self.attempts[index] = right, attempts
        if self.drop_above is not None and enough(right, attempts, self.drop_above):
            self._drop(index)

    def leave_out(self, index: int) -> None:
        """Drops a prompt that is too long."""
        self.too_long[index] = True
        self._drop(index)

    def _drop(self, index: int) -> None:
        self.left -= not self.dropped[index]
        self.dropped[index] = True

    def mean(self) -> float | None:
        """Mean pass rate of the prompts that have had a group, dropped ones included."""
        seen = self.attempts > 0
        return float((self.right[seen] / self.attempts[seen]).mean()) if seen.any() else None

    def state_dict(self) -> dict[str, list[int]]:
        seen = np.flatnonzero(self.attempts)
        long = np.flatnonzero(self.too_long).tolist()
        return {
            "seen": seen.tolist(),
            "right": self.right[seen].tolist(),
            "attempts": self.attempts[seen].tolist(),
            "dropped": np.flatnonzero(self.dropped & ~self.too_long).tolist(),
            **({"too_long": long} if long else {}),
        }

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        for values in (self.right, self.attempts):
            values[:] = 0
        # Those known to be too long stay dropped.
        self.dropped[:] = self.too_long
        self.too_long[np.array(state.get("too_long", []), dtype=np.int64)] = True
        seen = np.array(state["seen"], dtype=np.int64)
        self.right[seen], self.attempts[seen] = state["right"], state["attempts"]
        self.dropped[np.array(state["dropped"], dtype=np.int64)] = True
        self.dropped |= self.too_long
        self.left = int(np.count_nonzero(~self.dropped))


class Order(Protocol):
    """A stream of positions."""

    def take(self, n: int, rates: Standing) -> list[int]:
        """The next n positions that are not dropped, of which there must be one."""
        ...

    def state_dict(self) -> Mapping[str, object]: ...

    def load_state_dict(self, state: Any) -> None: ...


class Epochs:
    """Every epoch is one shuffle, a function of seed and epoch alone; dropped prompts are skipped."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.position = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, n: int, rates: Standing) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < n:
            epoch, offset = divmod(self.position, self.size)
            window = self._order_of(epoch)[offset : offset + _WINDOW]
            found = np.flatnonzero(~rates.dropped[window])[: n - len(chosen)]
            chosen += window[found].tolist()
            self.position += int(found[-1]) + 1 if len(chosen) == n else len(window)
        return chosen

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            order = list(range(self.size))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, np.array(order, dtype=np.int64)
        return self._order

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class _DrawsState(TypedDict):
    passes: int
    pending: list[int]


class Draws:
    """Passes of `pass_size` draws by difficulty, without replacement inside a pass.

    A pass is an exponential race: prompt i arrives at E_i / w_i with E_i ~ Exp(1) from (seed, pass), and the first
    `pass_size` are taken in the order of arrival. This equals drawing one by one with probabilities proportional to
    the weights of the remaining prompts (Efraimidis and Spirakis, 2006). The weights are those at the pass's start.
    """

    def __init__(self, size: int, seed: int, pass_size: int) -> None:
        self.size, self.seed, self.pass_size = size, seed, pass_size
        self.passes = 0
        """Passes begun."""
        self.pending: list[int] = []
        """The rest of the last pass, in order."""

    def take(self, n: int, rates: Standing) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < n:
            if not self.pending:
                self.pending = self._race(rates)
            index = self.pending.pop(0)
            if not rates.dropped[index]:
                chosen.append(index)
        return chosen

    def _race(self, rates: Standing) -> list[int]:
        exponentials = np.random.default_rng(seed_of(self.seed, "pass", self.passes)).standard_exponential(self.size)
        self.passes += 1
        left = np.flatnonzero(~rates.dropped)
        arrivals = exponentials[left] / difficulty_weights(rates.right[left], rates.attempts[left])
        count = min(self.pass_size, len(left))
        first = np.argpartition(arrivals, count - 1)[:count]
        return left[first[np.argsort(arrivals[first])]].tolist()

    def state_dict(self) -> _DrawsState:
        return {"passes": self.passes, "pending": list(self.pending)}

    def load_state_dict(self, state: _DrawsState) -> None:
        self.passes, self.pending = state["passes"], list(state["pending"])


@dataclass(frozen=True, slots=True)
class Portion:
    """A source in a mixture: the prompts from `start` to `stop`, with their weight."""

    name: str
    start: int
    stop: int
    weight: float


class Mixture:
    """Draws a source for each prompt, with probabilities by weight, and takes the next prompt of its own order.

    Draw k is a function of (seed, k) and of the sources that have prompts left, so that no pass of one source ends the
    others', as it does in `datasets.interleave_datasets`, and a saved state is a number for each source.
    """

    def __init__(self, portions: Sequence[Portion], orders: Sequence[Order], seed: int) -> None:
        self.portions, self.orders, self.seed = portions, orders, seed
        self.draws = 0

    def take(self, n: int, rates: Standing) -> list[int]:
        shares = [
            _Share(rates.right[p.start : p.stop], rates.attempts[p.start : p.stop], rates.dropped[p.start : p.stop])
            for p in self.portions
        ]
        chosen: list[int] = []
        weights = np.array([0.0 if s.dropped.all() else p.weight for s, p in zip(shares, self.portions, strict=True)])
        bounds = weights.cumsum() / weights.sum()
        for _ in range(n):
            number = int(np.searchsorted(bounds, self._uniform(), side="right"))
            [position] = self.orders[number].take(1, shares[number])
            chosen.append(self.portions[number].start + position)
            self.draws += 1
        return chosen

    def _uniform(self) -> float:
        """In [0, 1), from (seed, draw)."""
        return seed_of(self.seed, "source", self.draws) / 2**56

    def state_dict(self) -> dict[str, object]:
        return {"draws": self.draws, "orders": [order.state_dict() for order in self.orders]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.draws = state["draws"]
        for order, own in zip(self.orders, state["orders"], strict=True):
            order.load_state_dict(own)
