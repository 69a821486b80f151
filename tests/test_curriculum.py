"""Curricula: length stages and thresholds as functions, the words of `show`, and whole runs that follow them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.algorithms import ALGORITHMS
from cispo.algorithms.choice import overlong_buffer_of
from cispo.recipe.load import parse_recipe
from cispo.recipe.schema import Curriculum, Recipe
from cispo.rollout.curriculum import (
    describe_curriculum,
    difficulty_weights,
    effective_number,
    enough,
    max_tokens_at,
    max_tokens_of,
)
from cispo.rollout.rollout import overlong_penalty
from tests.test_end_to_end import QUICKSTART, SMALL, VARIED, cispo, metrics


def recipe(**sections: dict) -> Recipe:
    return parse_recipe({"policy": {"config": {}, "tokenizer": "t"}, **sections})


@given(attempts=st.integers(0, 200), data=st.data())
def test_weights_are_the_variance_under_the_prior(attempts: int, data: st.DataObject):
    right = data.draw(st.integers(0, attempts))
    (weight, mirrored) = difficulty_weights(np.array([right, attempts - right]), np.array([attempts, attempts]))
    assert 0 < weight <= 0.25 and weight == pytest.approx(mirrored)
    assert (weight == 0.25) == (2 * right == attempts)


def test_effective_number():
    assert effective_number(np.full(7, 0.1)) == pytest.approx(7)
    assert effective_number(np.array([1.0, 0.0, 0.0])) == 1 and effective_number(np.zeros(0)) == 0


@given(tenths=st.integers(1, 10), groups=st.integers(1, 50))
def test_a_rate_that_equals_the_threshold_is_enough(tenths: int, groups: int):
    """7 of 10 is at 0.7, though 0.1 * 7 is not; one right answer less is below."""
    threshold = float(f"{tenths / 10:.1f}")
    assert enough(tenths * groups, 10 * groups, threshold)
    assert not enough(tenths * groups - 1, 10 * groups, threshold)


def test_max_tokens_at():
    stages = [(0, 512), (100, 1024), (300, 2048)]
    found = {step: max_tokens_at(step, stages=stages, max_tokens=4096) for step in (0, 1, 99, 100, 299, 300, 10**6)}
    assert found == {0: 512, 1: 512, 99: 512, 100: 1024, 299: 1024, 300: 2048, 10**6: 2048}
    assert max_tokens_at(7, stages=[], max_tokens=4096) == 4096


def test_the_overlong_penalty_follows_the_stage():
    """DAPO's share of the stage's length, or the recipe's own tokens in every stage."""
    keys = recipe(rollout={"max_tokens": 1000}, curriculum={"length_stages": [[0, 100], [5, 1000]]})
    share = ALGORITHMS["dapo"].overlong_share
    assert share > 0
    for step, tokens in ((1, 100), (4, 100), (5, 1000)):
        assert max_tokens_of(keys, step) == tokens
        assert overlong_buffer_of(keys, ALGORITHMS["dapo"], tokens) == round(share * tokens)
    own = keys.model_copy(update={"algorithm": keys.algorithm.model_copy(update={"overlong_buffer": 30})})
    assert overlong_buffer_of(own, ALGORITHMS["dapo"], 100) == overlong_buffer_of(own, ALGORITHMS["dapo"], 1000) == 30


def test_describe():
    assert describe_curriculum(Curriculum(), group_size=8, max_tokens=64) == []
    keys = Curriculum(drop_above=0.9, weighting="difficulty", length_stages=[(0, 16), (50, 32)])
    rows = dict(describe_curriculum(keys, group_size=8, max_tokens=64))
    assert "p (1 - p)" in rows["prompts"] and "once 8 of 8 attempts" in rows["dropped"]
    assert rows["longest completion"] == "16 tokens from step 0, 32 tokens from step 50; in evaluations 64"
    assert "once 15 of 16 attempts" in dict(describe_curriculum(keys, group_size=16, max_tokens=64))["dropped"]


def test_a_run_follows_the_stages_and_draws_by_difficulty(tmp_path: Path):
    arguments = [str(QUICKSTART), f"output_dir={tmp_path}", *SMALL, VARIED, "sft.steps=2", "data.limit=20"]
    arguments += ["train.steps=4", "curriculum.length_stages=[[0,2],[2,5],[4,16]]", "curriculum.weighting=difficulty"]
    cispo("train", *arguments, "algorithm.overlong_buffer=2")
    run = tmp_path / "quickstart"
    rows = metrics(run)
    assert [row.get("curriculum/max_tokens") for row in rows] == [None, 2, 5, 5, 16]
    for row in rows[1:]:
        assert row["length/p99"] <= row["curriculum/max_tokens"] and row["grad_norm"] > 0
        assert row["curriculum/pass_rate"] == 0 and row["curriculum/dropped_frac"] == 0
        # A prompt tried in vain has a smaller weight than one not tried.
        assert 18 < row["curriculum/effective_prompts"] < 20
    # After so short a warm-up hardly any completion ends by itself: the limit of the stage shows in training alone.
    longest = [row["length/p99"] for row in rows[1:]]
    assert longest[:3] == [2, 5, 5] and longest[3] > 5 and rows[0]["eval/length"] > 5
    for step, most in enumerate((2, 5, 5, 16), start=1):
        sampled = pq.read_table(run / "samples" / f"train_{step:06d}.parquet").to_pylist()
        for row in sampled:
            assert row["length"] == most if row["finish_reason"] == "length" else row["length"] <= most
            penalty = overlong_penalty(row["length"], max_tokens=most, buffer=2)
            assert row["reward"] == pytest.approx(json.loads(row["rewards"])["varied"] + penalty)


def test_a_run_ends_when_every_prompt_is_dropped(tmp_path: Path):
    """Six prompts, two a step, all of them right: three steps of ten, an evaluation and a checkpoint."""
    right = "reward={functions: [{fn: 'tests.varied_reward:always_right'}]}"
    arguments = [str(QUICKSTART), f"output_dir={tmp_path}", *SMALL, right, "sft=null", "data.limit=6"]
    out = cispo("train", *arguments, "train.steps=10", "curriculum.drop_above=0.9")
    run = tmp_path / "quickstart"
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and "eval/accuracy" in rows[3]
    assert [row["curriculum/dropped_frac"] for row in rows[1:]] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rows[3]["curriculum/pass_rate"] == 1 and rows[3]["curriculum/effective_prompts"] == 0
    assert "step 3 ended the run" in out and "curriculum.drop_above" in out
    assert json.loads((run / "checkpoints" / "step_000003" / "cispo.json").read_text())["updates"] == 0


def test_show_says_what_a_curriculum_does():
    shown = cispo("show", str(QUICKSTART), "curriculum.drop_above=0.9", "curriculum.length_stages=[[0,4],[9,16]]")
    words = " ".join(shown.split())
    assert "once 15 of 16 attempts" in words and "4 tokens from step 0, 16 tokens from step 9" in words
