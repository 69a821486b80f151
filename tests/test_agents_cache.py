"""Prefix caching over the turns of attempts, through vLLM: exact, and without a mark of earlier batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import torch

from cispo.engines.serving import ServedEngine
from cispo.metrics import agent_metrics
from cispo.policies.loading import init_policy, save_policy
from cispo.recipe.schema import Recipe
from cispo.start import engine_args_of
from cispo.types import Completion, Sampling, Trajectory, Turn
from tests.test_vllm_parity import TOLERANCE, learner_logprobs, lightning, running

TURNS, TOKENS = 3, 40
SAMPLING = Sampling(max_tokens=TOKENS, eos_ids=(39,))
PROMPTS = [[3 + (7 * n + k * k) % 30 for k in range(150)] for n in range(3)]
SAID = [[5, 6, 7 + n] * 30 for n in range(3)]


async def rounds(engine: ServedEngine, cache: str) -> list[tuple[list[list[int]], list[Completion]]]:
    """(prompts, completions) of each turn; each prompt begins with the one before and its reply."""
    prompts, played = [list(ids) for ids in PROMPTS], []
    for turn in range(TURNS):
        completions = await engine.generate(prompts, SAMPLING, 10 + turn, cache=cache)
        played.append((prompts, completions))
        prompts = [[*p, *c.token_ids, *s] for p, c, s in zip(prompts, completions, SAID, strict=True)]
    return played


def cached(played: Sequence[tuple[list[list[int]], list[Completion]]]) -> list[int]:
    return [sum(c.cached for c in completions) for _, completions in played]


def test_rounds_with_a_prefix_cache_repeat_bit_for_bit(tmp_path: Path) -> None:
    policy = init_policy(lightning(), 0)
    save_policy(policy, tmp_path)
    with running(tmp_path, enable_prefix_caching=True) as engine:
        first, second = (asyncio.run(rounds(engine, cache)) for cache in ("1", "2"))
        again = asyncio.run(rounds(engine, "2"))
    # Equal tokens and log-probabilities; a batch finds its own blocks alone, from its second turn on.
    assert first == second and cached(first)[0] == 0 < cached(first)[1] < cached(first)[2]
    assert cached(again)[0] > 0
    for prompts, completions in first:
        found = torch.tensor([x for c in completions for x in c.logprobs])
        difference = (found - learner_logprobs(policy, prompts, completions)).abs().max().item()
        assert difference <= TOLERANCE
    turns = tuple(
        Turn(context_ids=tuple(ids), completion=completions[0], continues=turn > 0)
        for turn, (ids, (_, completions)) in enumerate(zip([PROMPTS[0], SAID[0], SAID[0]], first, strict=True))
    )
    events = {"calls": 0, "failed": 0, "unreadable": 0}
    attempt = Trajectory(group_id=0, index=0, turns=turns, text="", reward=0.0, status="done", events=events)
    share = sum(t.completion.cached for t in turns) / sum(len(prompts[0]) for prompts, _ in first)
    assert agent_metrics([attempt])["agent/cached_frac"] == share > 0.3


def test_the_cache_is_on_for_attempts_of_several_turns() -> None:
    def arguments(context: int = 2048, env: bool = True, **own: object) -> object:
        section = {"env": {"use": "x:Y"}} if env else {}
        recipe = Recipe.model_validate({"rollout": {"max_context": context, "engine_args": own}, **section})
        return engine_args_of(recipe)

    assert arguments() == {"enable_prefix_caching": True} and arguments(env=False) == arguments(128) == {}
    assert arguments(enable_prefix_caching=False, seed=1) == {"enable_prefix_caching": False, "seed": 1}
