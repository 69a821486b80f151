"""The order in which a run meets its prompts: shuffled epochs or draws by difficulty, and which never come back.

    take(n) -> prompts -> rollouts -> observe(prompt, right, attempts) -> pass rates -> what is taken next

All of it is a function of the seed, the takes and the observations, in their order: the same ones give the same
prompts, and a state restores them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cispo.errors import UserError
from cispo.recipe.schema import Recipe
from cispo.rollout.curriculum import difficulty_weights, effective_number, enough
from cispo.seeds import seed_of
from cispo.types import Prompt

Weighting = Literal["uniform", "difficulty"]

# Positions looked at together: most prompts of a long run may be dropped, and none is worth a Python step.
_WINDOW = 4096


class PassRates:
    """What the last group of every prompt gave, [N] each, and the prompts that are dropped because of it.

    The last group alone: the policy moves, and what an earlier one did on a prompt is no estimate of what it does now.
    """

    def __init__(self, size: int, drop_above: float | None) -> None:
        self.drop_above = drop_above
        self.right = np.zeros(size, dtype=np.int64)
        self.attempts = np.zeros(size, dtype=np.int64)
        self.dropped = np.zeros(size, dtype=bool)
        self.left = size
        """Prompts that are not dropped."""

    def observe(self, index: int, right: int, attempts: int) -> None:
        self.right[index], self.attempts[index] = right, attempts
        if self.drop_above is not None and enough(right, attempts, self.drop_above) and not self.dropped[index]:
            self.dropped[index] = True
            self.left -= 1

    def mean(self) -> float | None:
        """Over the prompts that have had a group, dropped ones included."""
        seen = self.attempts > 0
        return float((self.right[seen] / self.attempts[seen]).mean()) if seen.any() else None

    def state_dict(self) -> dict[str, list[int]]:
        seen = np.flatnonzero(self.attempts)
        return {
            "seen": seen.tolist(),
            "right": self.right[seen].tolist(),
            "attempts": self.attempts[seen].tolist(),
            "dropped": np.flatnonzero(self.dropped).tolist(),
        }

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        for values in (self.right, self.attempts, self.dropped):
            values[:] = 0
        seen = np.array(state["seen"], dtype=np.int64)
        self.right[seen], self.attempts[seen] = state["right"], state["attempts"]
        self.dropped[np.array(state["dropped"], dtype=np.int64)] = True
        self.left = len(self.dropped) - len(state["dropped"])


class Epochs:
    """Every epoch is one shuffle that depends on nothing but the seed and the epoch; dropped prompts are skipped."""

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.position = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, n: int, rates: PassRates) -> list[int]:
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

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class Draws:
    """Passes of `pass_size` draws by difficulty, without replacement inside a pass.

    A pass is an exponential race: prompt i arrives at E_i / w_i with E_i ~ Exp(1) from (seed, pass), and the first ones
    are taken in the order of arrival. That is drawing one by one with chances proportional to the weights of those
    that are left (Efraimidis and Spirakis, 2006). The weights are those at the start of the pass.
    """

    def __init__(self, size: int, seed: int, pass_size: int) -> None:
        self.size, self.seed, self.pass_size = size, seed, pass_size
        self.passes = 0
        """How many were begun."""
        self.pending: list[int] = []
        """What is left of the last one, in order."""

    def take(self, n: int, rates: PassRates) -> list[int]:
        chosen: list[int] = []
        while len(chosen) < n:
            if not self.pending:
                self.pending = self._race(rates)
            index = self.pending.pop(0)
            if not rates.dropped[index]:
                chosen.append(index)
        return chosen

    def _race(self, rates: PassRates) -> list[int]:
        exponentials = np.random.default_rng(seed_of(self.seed, "pass", self.passes)).standard_exponential(self.size)
        self.passes += 1
        left = np.flatnonzero(~rates.dropped)
        arrivals = exponentials[left] / difficulty_weights(rates.right[left], rates.attempts[left])
        count = min(self.pass_size, len(left))
        first = np.argpartition(arrivals, count - 1)[:count]
        return left[first[np.argsort(arrivals[first])]].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "pending": list(self.pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.passes, self.pending = state["passes"], list(state["pending"])


class PromptSource:
    """A stream of prompts: endless, unless `drop_above` takes the last one out of it."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        shuffle: bool = True,
        *,
        drop_above: float | None = None,
        weighting: Weighting = "uniform",
        pass_size: int = 1,
    ) -> None:
        """`prompts[i].id` must be i. `shuffle` is of the uniform order, `pass_size` of the one by difficulty."""
        assert prompts, "load_rows refuses an empty dataset"
        assert all(prompt.id == index for index, prompt in enumerate(prompts)), "an id is a position in the dataset"
        self.prompts, self.seed, self.weighting = prompts, seed, weighting
        self.rates = PassRates(len(prompts), drop_above)
        self._order = (
            Epochs(len(prompts), seed, shuffle) if weighting == "uniform" else Draws(len(prompts), seed, pass_size)
        )

    @property
    def exhausted(self) -> bool:
        """Whether every prompt is dropped."""
        return self.rates.left == 0

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; none once every prompt is dropped."""
        return [] if self.exhausted else [self.prompts[index] for index in self._order.take(n, self.rates)]

    def observe(self, prompt_id: int, *, right: int, attempts: int) -> None:
        """Says how many of a finished group's attempts at a prompt were right. Call it once a group, in a fixed order.

        A prompt whose pass rate, right / attempts of its last group, is at or above `drop_above` is not taken again,
        whatever a group of it that is still on its way will say.
        """
        assert 0 <= right <= attempts and attempts > 0
        self.rates.observe(prompt_id, right, attempts)

    def metrics(self) -> dict[str, float]:
        """Nothing for plain epochs; else curriculum/...

        dropped_frac: share of the prompts that are dropped. pass_rate: mean over the prompts that have had a group, of
        the pass rate in their last one. effective_prompts: `effective_number` of the weights with which the prompts
        that are left are drawn.
        """
        rates = self.rates
        if rates.drop_above is None and self.weighting == "uniform":
            return {}
        metrics = {"curriculum/dropped_frac": 1 - rates.left / len(self.prompts)}
        mean = rates.mean()
        if mean is not None:
            metrics["curriculum/pass_rate"] = mean
        weights = np.ones(rates.left)
        if self.weighting == "difficulty":
            left = ~rates.dropped
            weights = difficulty_weights(rates.right[left], rates.attempts[left])
        metrics["curriculum/effective_prompts"] = effective_number(weights)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON; its size grows with the number of prompts that have had a group."""
        return {**self._identity(), "order": self._order.state_dict(), "rates": self.rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. UserError if it belongs to another dataset, seed or weighting."""
        for name, here in self._identity().items():
            if state[name] != here:
                raise UserError(f"the checkpoint's prompts have {name} {state[name]}, this run's have {name} {here}")
        self._order.load_state_dict(state["order"])
        self.rates.load_state_dict(state["rates"])

    def _identity(self) -> dict[str, Any]:
        return {
            "size": len(self.prompts),
            "seed": self.seed,
            "weighting": self.weighting,
            "digest": self._digest,
        }

    @functools.cached_property
    def _digest(self) -> str:
        """Of all messages: a pass rate must not be carried over to another prompt at the same position."""
        digest = hashlib.blake2b(digest_size=8)
        for prompt in self.prompts:
            # Content that is not JSON counts by its type, since its text may hold an address.
            text = json.dumps(prompt.messages, default=lambda value: type(value).__name__, skipkeys=True)
            digest.update(text.encode())
        return digest.hexdigest()


def prompt_source_of(recipe: Recipe, prompts: Sequence[Prompt]) -> PromptSource:
    """The stream of the training prompts, in the order of the recipe's seed and curriculum."""
    return PromptSource(
        prompts,
        seed_of(recipe.seed, "prompts"),
        drop_above=recipe.curriculum.drop_above,
        weighting=recipe.curriculum.weighting,
        pass_size=recipe.rollout.prompts_per_step,
    )
