"""The stream of prompts: equal observations give equal streams, restored or not; dropped prompts stay away."""

from __future__ import annotations

import datetime
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from cispo.errors import UserError
from cispo.recipe.schema import Recipe
from cispo.recipe.seeds import seed_of
from cispo.rollout.prompt_source import PromptSource, Weighting, check_same_prompts, fingerprint, prompt_source_of
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Prompt

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
GROUP = 4


def prompts(n: int, text: str = "") -> list[Prompt]:
    return [Prompt(id=i, messages=({"role": "user", "content": f"{text}{i}"},)) for i in range(n)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A run's calls of its source: takes (a number) and observations (prompt, right of GROUP attempts)."""

    size: int
    keys: dict[str, Any]
    events: Sequence[int | tuple[int, int]] = field(default=())

    def source(self) -> PromptSource:
        return PromptSource(prompts(self.size), **self.keys)


def play(source: PromptSource, events: Sequence[int | tuple[int, int]], *, piece: int = 100) -> list[int]:
    """Ids taken by the takes of `events`; a take is split into pieces of at most `piece`."""
    taken: list[int] = []
    for event in events:
        if isinstance(event, tuple):
            source.observe(event[0], right=event[1], attempts=GROUP)
            continue
        for start in range(0, event, piece):
            taken += [p.id for p in source.take(min(piece, event - start))]
    return taken


@st.composite
def scripts(draw: st.DrawFn, weightings: Sequence[Weighting] = ("uniform", "difficulty")) -> Script:
    size = draw(st.integers(1, 9))
    keys = {
        "seed": draw(st.integers(0, 3)),
        "weighting": draw(st.sampled_from(weightings)),
        "drop_above": draw(st.sampled_from([None, 0.5, 0.75, 1.0])),
        "pass_size": draw(st.integers(1, 12)),
    }
    observation = st.tuples(st.integers(0, size - 1), st.integers(0, GROUP))
    events = draw(st.lists(st.integers(0, 12) | observation, max_size=25))
    return Script(size=size, keys=keys, events=events)


# The order of every run without a curriculum


def test_plain_epochs_have_a_fixed_order():
    ids = [p.id for p in PromptSource(prompts(8), 3).take(20)]
    assert ids == [3, 7, 2, 5, 1, 0, 4, 6, 4, 2, 7, 3, 5, 0, 1, 6, 1, 7, 2, 5]


@given(script=scripts(weightings=["uniform"]))
def test_without_drops_observations_change_nothing(script: Script):
    source = PromptSource(prompts(script.size), script.keys["seed"])
    taken = play(source, script.events)
    assert taken == [p.id for p in PromptSource(prompts(script.size), script.keys["seed"]).take(len(taken))]
    for start in range(0, len(taken), script.size):
        assert max(Counter(taken[start : start + script.size]).values()) == 1
    assert source.metrics() == {} and not source.exhausted


def test_epochs_and_seeds_have_orders_of_their_own():
    source = PromptSource(prompts(50), seed=0)
    first, second = [p.id for p in source.take(50)], [p.id for p in source.take(50)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != [p.id for p in PromptSource(prompts(50), seed=1).take(50)]
    assert [p.id for p in PromptSource(prompts(3), seed=0, shuffle=False).take(7)] == [0, 1, 2, 0, 1, 2, 0]


# Any curriculum


@given(script=scripts(), piece=st.integers(1, 5))
def test_the_same_observations_give_the_same_stream_however_it_is_taken(script: Script, piece: int):
    assert play(script.source(), script.events) == play(script.source(), script.events, piece=piece)


@given(script=scripts(), data=st.data())
def test_a_restored_source_goes_on_as_if_nothing_had_happened(script: Script, data: st.DataObject):
    cut = data.draw(st.integers(0, len(script.events)))
    source, restored = script.source(), script.source()
    play(source, script.events[:cut])
    # The other source has a past of its own, and no trace of it may stay.
    play(restored, script.events[cut:])
    text = json.dumps(source.state_dict())
    restored.load_state_dict(json.loads(text))
    assert json.dumps(restored.state_dict()) == text
    rest = [*script.events[cut:], 2 * script.size]
    assert play(source, rest) == play(restored, rest)
    assert source.metrics() == restored.metrics() and source.exhausted == restored.exhausted


@given(script=scripts())
def test_dropped_prompts_never_come_back(script: Script):
    """Later groups do not bring them back; and a source with every prompt dropped gives none."""
    source, dropped = script.source(), set[int]()
    for event in script.events:
        if isinstance(event, tuple):
            if script.keys["drop_above"] is not None and event[1] >= script.keys["drop_above"] * GROUP:
                dropped.add(event[0])
            play(source, [event])
        else:
            taken = play(source, [event])
            assert not dropped & set(taken)
            assert len(taken) == (event if len(dropped) < script.size else 0)
        assert source.exhausted == (len(dropped) == script.size)
        if script.keys["drop_above"] is not None:
            assert source.metrics()["curriculum/dropped_frac"] == pytest.approx(len(dropped) / script.size)


def test_a_state_of_other_prompts_is_refused():
    state = PromptSource(prompts(5), seed=0).state_dict()
    with pytest.raises(UserError, match="the checkpoint's prompts have size 5, this run's have size 6"):
        PromptSource(prompts(6), seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="seed 0, this run's have seed 1"):
        PromptSource(prompts(5), seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="weighting uniform, this run's have weighting difficulty"):
        PromptSource(prompts(5), seed=0, weighting="difficulty").load_state_dict(state)
    with pytest.raises(UserError, match="digest"):
        PromptSource(prompts(5, "another "), seed=0).load_state_dict(state)


def test_a_state_of_other_answers_is_refused_and_of_an_earlier_version_taken():
    def source(**columns: object) -> PromptSource:
        return PromptSource([replace(p, columns={**columns, "n": p.id}) for p in prompts(3)], seed=0)

    state = json.loads(json.dumps(source(answer="4", day=datetime.date(2024, 1, 1)).state_dict()))
    source(day=datetime.date(2024, 1, 1), answer="4").load_state_dict(state)
    for other in ({"answer": "5", "day": datetime.date(2024, 1, 1)}, {"answer": "4", "day": datetime.date(2024, 1, 2)}):
        with pytest.raises(UserError, match=r"have columns .* \(an answer or another column was changed\)"):
            source(**other).load_state_dict(state)
    del state["columns"]
    source(answer="5").load_state_dict(state)


def test_a_fingerprint_depends_on_nothing_but_the_columns():
    """Neither on an address in a text, nor on the order of a set, nor on depth."""

    def row(value: object) -> list[Prompt]:
        return [Prompt(id=0, messages=(), columns={"a": value})]

    assert fingerprint(row(object())) == fingerprint(row(object()))
    assert fingerprint(row({"b", "a", "c"})) == fingerprint(row({"c", "b", "a"})) != fingerprint(row({"a"}))
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    deep.append(deep)
    assert fingerprint(row(deep))


def test_a_checkpoint_of_another_task_is_refused_before_anything_is_touched(tmp_path: Path):
    recipe, held_out = Recipe(), [Prompt(id=0, messages=(), columns={"answer": "4"})]
    renderer = Renderer(load_tokenizer(CHARS))
    state = {
        "prompts": prompt_source_of(recipe, prompts(3)).state_dict(),
        "held_out": fingerprint(held_out),
        "renderer": renderer.fingerprint,
    }
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "driver.json").write_text(json.dumps(state))
    check_same_prompts(tmp_path, recipe, renderer, prompts(3), held_out)
    with pytest.raises(UserError, match="digest"):
        check_same_prompts(tmp_path, recipe, renderer, prompts(3, "other "), held_out)
    with pytest.raises(UserError, match="was evaluated on other prompts"):
        check_same_prompts(tmp_path, recipe, renderer, prompts(3), [replace(held_out[0], columns={"answer": "5"})])
    templated = load_tokenizer(CHARS)
    templated.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="was trained with another tokenizer or chat template than .* has"):
        check_same_prompts(tmp_path, recipe, Renderer(templated), prompts(3), held_out)
    (tmp_path / "training" / "driver.json").write_text("{}")
    with pytest.raises(UserError, match="driver.json cannot be read"):
        check_same_prompts(tmp_path, recipe, renderer, prompts(3), held_out)


# Against plain references


@given(script=scripts(weightings=["uniform"]))
def test_epochs_with_drops_against_a_loop_over_every_position(script: Script):
    def positions():
        for epoch in itertools.count():
            order = list(range(script.size))
            random.Random(f"{script.keys['seed']}/{epoch}").shuffle(order)
            yield from order

    stream, dropped, expected = positions(), set[int](), []
    for event in script.events:
        if isinstance(event, tuple):
            if script.keys["drop_above"] is not None and event[1] >= script.keys["drop_above"] * GROUP:
                dropped.add(event[0])
        elif len(dropped) < script.size:
            expected += list(itertools.islice((i for i in stream if i not in dropped), event))
    assert play(script.source(), script.events) == expected


def test_epochs_with_nearly_everything_dropped():
    """More prompts than one window holds; three are left."""
    size = 10_000
    source = PromptSource(prompts(size), seed=5, drop_above=1.0)
    for index in set(range(size)) - {17, 4711, 9999}:
        source.observe(index, right=GROUP, attempts=GROUP)
    orders = []
    for epoch in range(2):
        order = list(range(size))
        random.Random(f"5/{epoch}").shuffle(order)
        orders += [i for i in order if i in (17, 4711, 9999)]
    assert [p.id for p in source.take(1)] + [p.id for p in source.take(5)] == orders


@given(script=scripts(weightings=["difficulty"]))
def test_draws_against_one_sort_a_pass(script: Script):
    """Each pass sorts the arrivals of all remaining prompts, with the weights of its first draw."""
    keys, last, dropped = script.keys, dict[int, int](), set[int]()
    expected: list[int] = []
    queue: list[int] = []
    passes = 0
    for event in script.events:
        if isinstance(event, tuple):
            last[event[0]] = event[1]
            if keys["drop_above"] is not None and event[1] >= keys["drop_above"] * GROUP:
                dropped.add(event[0])
            continue
        wanted = len(expected) + event
        while len(expected) < wanted and len(dropped) < script.size:
            if not queue:
                clocks = np.random.default_rng(seed_of(keys["seed"], "pass", passes)).standard_exponential(script.size)
                passes += 1
                rates = [(last[i] + 1) / (GROUP + 2) if i in last else 0.5 for i in range(script.size)]
                left = [i for i in range(script.size) if i not in dropped]
                queue = sorted(left, key=lambda i: clocks[i] / (rates[i] * (1 - rates[i])))[: keys["pass_size"]]
            index = queue.pop(0)
            expected += [index] * (index not in dropped)
    assert play(script.source(), script.events) == expected


def test_the_frequencies_of_draws_are_the_weights():
    """Ordered pairs of 6,000 passes of two draws out of five prompts, by chi-squared against w_i / W * w_j / (W - w_i).

    The bound is the distribution's 1 - 1e-6 quantile: right draws fail one seed in a million, and this seed is fixed.
    Draws with equal chances, or with replacement, must lie beyond it.
    """
    passes = 6000
    source = PromptSource(prompts(5), seed=1, weighting="difficulty", pass_size=2)
    for index, right in enumerate([0, 1, 8, 16]):
        source.observe(index, right=right, attempts=16)
    p = np.array([1 / 18, 2 / 18, 9 / 18, 17 / 18, 1 / 2])
    weights = p * (1 - p)
    ids = np.array([prompt.id for prompt in source.take(2 * passes)]).reshape(passes, 2)
    found = np.zeros((5, 5))
    np.add.at(found, (ids[:, 0], ids[:, 1]), 1)
    assert np.trace(found) == 0, "a prompt came twice in a pass"

    def statistic(w: np.ndarray) -> float:
        chances = w[:, None] * w[None, :] / (w.sum() * (w.sum() - w[:, None]))
        off = ~np.eye(5, dtype=bool)
        assert chances[off].sum() == pytest.approx(1)
        return float(((found - passes * chances)[off] ** 2 / (passes * chances[off])).sum())

    bound = chi2.ppf(1 - 1e-6, df=19)
    assert statistic(weights) < bound < statistic(np.ones(5))
    assert statistic(np.sqrt(weights)) > bound, "the bound could not tell weights from their square roots"


def test_metrics():
    source = PromptSource(prompts(5), seed=0, weighting="difficulty", drop_above=1.0)
    assert source.metrics() == {"curriculum/dropped_frac": 0, "curriculum/effective_prompts": pytest.approx(5)}
    source.observe(0, right=4, attempts=4)
    source.observe(1, right=0, attempts=4)
    source.observe(1, right=1, attempts=4)
    w = np.array([2 / 9, 1 / 4, 1 / 4, 1 / 4])
    assert source.metrics() == {
        "curriculum/dropped_frac": pytest.approx(0.2),
        "curriculum/pass_rate": pytest.approx((1 + 0.25) / 2),
        "curriculum/effective_prompts": pytest.approx(w.sum() ** 2 / (w @ w)),
    }
    uniform = PromptSource(prompts(5), seed=0, drop_above=1.0)
    uniform.observe(3, right=4, attempts=4)
    assert uniform.metrics()["curriculum/effective_prompts"] == 4
