"""The sampler is the learner over turns: every sampled token of six-turn attempts, on both engines and through the
prefix cache, across block boundaries, and with new weights between turns 2 and 3."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.agents.episodes import episodes_of
from cispo.batch.samples import to_samples
from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.policies.loading import init_policy, save_policy
from cispo.policies.policy import Policy
from cispo.recipe.schema import Recipe
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Completion, Prompt, Sample, Sampling, TrajectoryGroup
from cispo.weights.publish import publish_weights, weights_folder
from tests.test_vllm_parity import QWEN3, counting, lightning, running, scheduler

CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
TOLERANCE = 1e-5
"""Largest difference of two float32 log-probabilities; each side is within 3e-6 of float64 on these policies."""
CONTEXT, TURNS = 640, 6
# A tenth of the vocabulary ends a reply: random policies then say some ten tokens a turn.
SAMPLING = Sampling(max_tokens=90, eos_ids=tuple(range(2, 12)))
# The second is longer than two blocks of 128; both cross further boundaries as they grow.
LENGTHS = (110, 270)

Opening = Callable[[Path], contextlib.AbstractContextManager[ServedEngine]]


@contextlib.contextmanager
def on_torch(folder: Path) -> Iterator[ServedEngine]:
    yield ServedEngine(TorchEngine(str(folder), dtype="float32", max_context=CONTEXT, max_sequences=12))


def on_vllm(*, caching: bool, **engine_args: Any) -> Opening:
    return lambda folder: running(folder, enable_prefix_caching=caching, **engine_args)


def prompts(count: int) -> list[Prompt]:
    texts = ["".join(chr(97 + (n * 7 + i * i) % 26) for i in range(LENGTHS[n % 2] + 3 * n)) for n in range(count)]
    return [
        Prompt(id=n, messages=({"role": "user", "content": text},), columns={"target": 99})
        for n, text in enumerate(texts)
    ]


def played(engine: ServedEngine, weights: str, *, count: int) -> list[TrajectoryGroup]:
    """Attempts with `weights` loaded before the third turn."""
    turn = 0

    async def generate(ids: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        nonlocal turn
        turn += 1
        if turn == 3:
            await engine.begin_update("wait")
            engine.load_weights(weights)
            engine.finish_update(1)
        return await engine.generate(ids, sampling, seed)

    env = {"use": "tests.agent_code:Counter", "max_turns": TURNS, "workers": 1}
    recipe = Recipe.model_validate({"env": env, "rollout": {"max_context": CONTEXT}})
    episodes = episodes_of(recipe, Renderer(load_tokenizer(CHARS)), {})
    assert episodes is not None
    with contextlib.closing(episodes):
        return asyncio.run(episodes.play(prompts(count), generate, group_size=3, sampling=SAMPLING, seed=5))


def logprobs(policy: Policy, samples: Sequence[Sample]) -> torch.Tensor:
    """Of each token under those before it, 0 for the first of a sample; all samples packed."""
    lengths = [len(s.token_ids) for s in samples]
    tokens = torch.cat([s.token_ids for s in samples])
    positions = torch.cat([torch.arange(length) for length in lengths])
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    with torch.no_grad():
        hidden = policy(tokens, positions, starts).hidden
        rows = (hidden @ policy.lm_head_weight.T).log_softmax(-1)
    found = torch.cat([torch.zeros(1), rows[:-1].gather(1, tokens[1:, None]).squeeze(1)])
    found[starts[:-1].long()] = 0.0
    return found


def check(
    config: Mapping[str, object], opening: Opening, folder: Path, *, cached: bool = False, count: int = 2
) -> None:
    """Each token against the policy that sampled it: turns 1 and 2 by the first one, later turns by the second."""
    config = {**config, "vocab_size": len(load_tokenizer(CHARS))}
    policies = [init_policy(config, seed) for seed in range(2)]
    save_policy(policies[0], folder)
    with weights_folder("turns") as weights, opening(folder) as engine:
        published = str(publish_weights(policies[1].to_hf(), weights, 1))
        hits = None
        if cached:
            hits = counting(scheduler(engine).kv_cache_manager, "get_computed_blocks", lambda found: found[1])
        groups = played(engine, published, count=count)
    attempts = [t for group in groups for t in group.trajectories]
    for t in attempts:
        assert [set(turn.completion.versions) for turn in t.turns] == [{0}, {0}, {1}, {1}, {1}, {1}][: len(t.turns)]
    assert sum(len(t.turns) == TURNS for t in attempts) >= len(attempts) // 2
    samples = [s for group in groups for s in to_samples(group)]
    assert len(samples) == len(attempts), "turns are merged"
    assert max(len(s.token_ids) for s in samples) > 2 * 128 + 64
    mask = torch.cat([s.loss_mask for s in samples])
    version = torch.cat([s.versions for s in samples])
    ours = torch.stack([logprobs(policy, samples) for policy in policies])
    learner = ours.gather(0, version[None].long()).squeeze(0)[mask]
    sampler = torch.cat([s.rollout_logprobs for s in samples])[mask]
    assert len(learner) > 120 and learner.isfinite().all() and sampler.isfinite().all()
    assert float((learner - sampler).abs().max()) <= TOLERANCE
    # The two policies differ by far more than the tolerance: a turn under the wrong weights would show.
    assert float((ours[0] - ours[1])[mask].abs().mean()) > 1e-2
    assert hits is None or hits[0] >= 128 * len(attempts)


@pytest.mark.parametrize("config", [lightning(), pytest.param(QWEN3, marks=pytest.mark.slow)], ids=["hybrid", "dense"])
def test_the_torch_engine(config: Mapping[str, object], tmp_path: Path):
    check(config, on_torch, tmp_path)


def test_vllm_with_its_prefix_cache(tmp_path: Path):
    check(lightning(), on_vllm(caching=True), tmp_path, cached=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine_args", [{}, {"max_num_batched_tokens": 64}], ids=["whole", "chunked"])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("config", [lightning(), QWEN3], ids=["hybrid", "dense"])
def test_vllm_in_every_mode(config: Mapping[str, object], caching: bool, engine_args: dict[str, int], tmp_path: Path):
    check(config, on_vllm(caching=caching, **engine_args), tmp_path, cached=caching, count=8)
