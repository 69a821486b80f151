"""The order of a run's prompts: shuffled epochs or draws by difficulty, of one source or several, without dropped ones.

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cispo.errors import UserError
from cispo.files import form_errors, read_json
from cispo.recipe.schema import Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.curriculum import difficulty_weights, effective_number
from cispo.rollout.prompt_order import Draws, Epochs, Mixture, Order, PassRates, Portion
from cispo.rollout.prompts import Prompts
from cispo.rollout.renderer import Renderer
from cispo.types import Prompt

Weighting = Literal["uniform", "difficulty"]

# Values outside of JSON with a text that depends on nothing else.
_WITH_TEXT = (bytes, complex, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction)


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
        portions: Sequence[Portion] = (),
    ) -> None:
        """`prompts[i].id` must be i. `shuffle` applies to uniform weighting, `pass_size` to weighting by difficulty.

        `portions` are the sources of the prompts, one behind the other; without them all are of one.
        """
        assert len(prompts), "load_rows refuses an empty dataset"
        self._lazy = prompts if isinstance(prompts, Prompts) else None
        if self._lazy is None:
            assert all(prompt.id == index for index, prompt in enumerate(prompts)), "an id is a position in the dataset"
        self.prompts, self.seed, self.weighting = prompts, seed, weighting
        self.rates = PassRates(len(prompts), drop_above, () if self._lazy is None else self._lazy.too_long)

        def order(size: int, seed: int) -> Order:
            return Epochs(size, seed, shuffle) if weighting == "uniform" else Draws(size, seed, pass_size)

        orders = [order(p.stop - p.start, seed_of(seed, "source", p.name)) for p in portions]
        self._order = Mixture(portions, orders, seed) if portions else order(len(prompts), seed)

    @property
    def exhausted(self) -> bool:
        """Whether every prompt is dropped."""
        return self.rates.left == 0

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; none once every prompt is dropped. UserError for one that is too long, unless dropped."""
        chosen: list[Prompt] = []
        while len(chosen) < n and not self.exhausted:
            taken = [self.prompts[index] for index in self._order.take(n - len(chosen), self.rates)]
            for prompt in taken:
                if self._lazy is None or self._lazy.fits(prompt):
                    chosen.append(prompt)
                else:
                    self.rates.leave_out(prompt.id)
        if chosen and len(chosen) < n:
            raise UserError("data: no row is left that fits into rollout.max_context")
        return chosen

    def observe(self, prompt_id: int, *, right: int, attempts: int) -> None:
        """Records the right attempts of a finished group. Call it once a group, in a fixed order.

        A prompt with a pass rate, right / attempts, at or above `drop_above` is never taken again; later groups of it
        that were already being sampled do not bring it back.
        """
        assert 0 <= right <= attempts and attempts > 0
        self.rates.observe(prompt_id, right, attempts)

    def metrics(self) -> dict[str, float]:
        """Empty for plain epochs; else curriculum/... and data/...

        data/overlong: prompts left out for their length so far, where that is asked for.
        dropped_frac: share of the prompts that are dropped. pass_rate: mean pass rate in the last group, over the
        prompts that have had one. effective_prompts: `effective_number` of the weights of the remaining prompts.
        """
        rates = self.rates
        long = int(np.count_nonzero(rates.too_long))
        metrics: dict[str, float] = {} if self._lazy is None or not self._lazy.drops else {"data/overlong": long}
        if rates.drop_above is None and self.weighting == "uniform":
            return metrics
        metrics |= {"curriculum/dropped_frac": 1 - rates.left / (len(self.prompts) - long)}
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
        messages, columns = _Digest(), _Digest()
        # One pass: the rows of a large set are made for it.
        for prompt in self.prompts:
            messages.add(prompt.messages)
            columns.add(_sorted(prompt))
        return {
            "size": len(self.prompts),
            "seed": self.seed,
            "weighting": self.weighting,
            "digest": messages.text,
            "columns": columns.text,
        }


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of all columns, the answers among them."""
    digest = _Digest()
    for prompt in prompts:
        digest.add(_sorted(prompt))
    return digest.text


def _sorted(prompt: Prompt) -> list[tuple[str, object]]:
    return sorted(prompt.columns.items(), key=lambda item: str(item[0]))


class _Digest:
    """Hash of a sequence of values."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, value: object) -> None:
        try:
            text = json.dumps(value, default=_plain, skipkeys=True)
        except (ValueError, RecursionError):  # a value that holds itself, or is nested without end
            text = type(value).__name__
        self._hash.update(text.encode())

    @property
    def text(self) -> str:
        return self._hash.hexdigest()


def _plain(value: object) -> object:
    """A value outside of JSON: its text where that is the value's own, else its type: it may hold a memory address."""
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return str(value) if isinstance(value, _WITH_TEXT) else type(value).__name__


def prompt_source_of(recipe: Recipe, prompts: Sequence[Prompt]) -> PromptSource:
    """The stream of the training prompts, ordered by the recipe's seed and curriculum."""
    sources = recipe.data.sources if recipe.data is not None else []
    parts = prompts.parts if isinstance(prompts, Prompts) and sources else ()
    return PromptSource(
        prompts,
        seed_of(recipe.seed, "prompts"),
        portions=[
            Portion(source.name, part.start, part.start + len(part.rows), source.weight)
            for source, part in zip(sources, parts, strict=bool(parts))
        ],
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
