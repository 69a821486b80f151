"""The order of a run's prompts: shuffled epochs or draws by difficulty, without the dropped ones.

    take(n) -> prompts -> rollouts -> observe(prompt, right, attempts) -> pass rates -> the next take

The stream is a function of the seed and of the sequence of takes and observations: the same sequence gives the same
prompts, and a saved state continues it.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import functools
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from cispo.errors import UserError
from cispo.files import form_errors, read_json
from cispo.recipe.schema import Recipe
from cispo.rollout.curriculum import difficulty_weights, effective_number, enough
from cispo.rollout.renderer import Renderer
from cispo.seeds import seed_of
from cispo.types import Prompt

Weighting = Literal["uniform", "difficulty"]

# Values outside of JSON with a text that depends on nothing else.
_WITH_TEXT = (bytes, complex, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction)

# Positions examined together by numpy: most prompts of a long run may be dropped, too many for a Python loop.
_WINDOW = 4096


class PassRates:
    """Right attempts and attempts in the last group of every prompt, [N] each, and the prompts dropped for them.

    Only the last group counts: the policy moves, and an earlier policy's pass rate does not estimate today's.
    """

    def __init__(self, size: int, drop_above: float | None) -> None:
        self.drop_above = drop_above
        self.right = np.zeros(size, dtype=np.int64)
        self.attempts = np.zeros(size, dtype=np.int64)
        self.dropped = np.zeros(size, dtype=bool)
        self.left = size
        """Prompts not dropped."""

    def observe(self, index: int, right: int, attempts: int) -> None:
        self.right[index], self.attempts[index] = right, attempts
        if self.drop_above is not None and enough(right, attempts, self.drop_above) and not self.dropped[index]:
            self.dropped[index] = True
            self.left -= 1

    def mean(self) -> float | None:
        """Mean pass rate of the prompts that have had a group, dropped ones included."""
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
    """Every epoch is one shuffle, a function of seed and epoch alone; dropped prompts are skipped."""

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

    def state_dict(self) -> _DrawsState:
        return {"passes": self.passes, "pending": list(self.pending)}

    def load_state_dict(self, state: _DrawsState) -> None:
        self.passes, self.pending = state["passes"], list(state["pending"])


class PromptSource:
    """A stream of prompts, endless unless `drop_above` drops every prompt."""

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
        """`prompts[i].id` must be i. `shuffle` applies to uniform weighting, `pass_size` to weighting by difficulty."""
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
        """Records the right attempts of a finished group. Call it once a group, in a fixed order.

        A prompt with a pass rate, right / attempts, at or above `drop_above` is never taken again; later groups of it
        that were already being sampled do not bring it back.
        """
        assert 0 <= right <= attempts and attempts > 0
        self.rates.observe(prompt_id, right, attempts)

    def metrics(self) -> dict[str, float]:
        """Empty for plain epochs; else curriculum/...

        dropped_frac: share of the prompts that are dropped. pass_rate: mean pass rate in the last group, over the
        prompts that have had one. effective_prompts: `effective_number` of the weights of the remaining prompts.
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

    def state_dict(self) -> dict[str, object]:
        """Plain JSON; its size grows with the number of prompts that have had a group."""
        return {**self._identity, "order": self._order.state_dict(), "rates": self.rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, a `state_dict`. UserError if it belongs to another dataset, seed or weighting."""
        self.check(state)
        self._order.load_state_dict(state["order"])
        self.rates.load_state_dict(state["rates"])

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where `state`, a `state_dict`, belongs to another dataset, seed or weighting."""
        for name, here in self._identity.items():
            # The columns are missing in the states of earlier versions.
            stored = state.get(name, here) if name == "columns" else state[name]
            if stored != here:
                reason = " (an answer or another column was changed)" if name == "columns" else ""
                raise UserError(f"the checkpoint's prompts have {name} {stored}, this run's have {name} {here}{reason}")

    @functools.cached_property
    def _identity(self) -> dict[str, int | str]:
        return {
            "size": len(self.prompts),
            "seed": self.seed,
            "weighting": self.weighting,
            "digest": _digest(prompt.messages for prompt in self.prompts),
            "columns": fingerprint(self.prompts),
        }


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of all columns, the answers among them."""
    return _digest(sorted(prompt.columns.items(), key=lambda item: str(item[0])) for prompt in prompts)


def _digest(rows: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        try:
            text = json.dumps(row, default=_plain, skipkeys=True)
        except (ValueError, RecursionError):  # a value that holds itself, or is nested without end
            text = type(row).__name__
        digest.update(text.encode())
    return digest.hexdigest()


def _plain(value: object) -> object:
    """A value outside of JSON: its text where that is the value's own, else its type: it may hold a memory address."""
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return str(value) if isinstance(value, _WITH_TEXT) else type(value).__name__


def prompt_source_of(recipe: Recipe, prompts: Sequence[Prompt]) -> PromptSource:
    """The stream of the training prompts, ordered by the recipe's seed and curriculum."""
    return PromptSource(
        prompts,
        seed_of(recipe.seed, "prompts"),
        drop_above=recipe.curriculum.drop_above,
        weighting=recipe.curriculum.weighting,
        pass_size=recipe.rollout.prompts_per_step,
    )


def check_same_prompts(
    checkpoint: Path, recipe: Recipe, renderer: Renderer, prompts: Sequence[Prompt], held_out: Sequence[Prompt]
) -> None:
    """Raises UserError where a checkpoint's run was trained on, or evaluated by, other prompts, columns or tokens."""
    file = checkpoint / "training" / "driver.json"
    state = read_json(file)
    with form_errors(file):
        prompt_source_of(recipe, prompts).check(state["prompts"])
        # Earlier versions did not store these two.
        if state.get("held_out", fingerprint(held_out)) != fingerprint(held_out):
            raise UserError(f"{checkpoint} was evaluated on other prompts than those of the recipe's eval section")
        if state.get("renderer", renderer.fingerprint) != renderer.fingerprint:
            name = renderer.tokenizer.name_or_path
            raise UserError(f"{checkpoint} was trained with another tokenizer or chat template than '{name}' has")
