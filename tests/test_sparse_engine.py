"""The torch engine with sparse attention: its log-probabilities against the learner's policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cispo.engines.serving import ServedEngine
from cispo.engines.torch_engine import TorchEngine
from cispo.ops.sparse_attention import Index, index_scores
from cispo.policies.attention import Documents
from cispo.policies.loading import init_policy, save_policy
from cispo.types import RepetitionStop, RoutedExperts, Sampling
from cispo.weights.publish import publish_weights
from tests.served import sampled, update
from tests.tiny_hybrids import TINY, VOCAB, draw_weights
from tests.tiny_policies import assert_close, bounds, tokens_of


class Gaps(Documents):
    """One document, which notes how close every selection was: the smallest difference, over layers, of the last index
    score taken and the first one left out, by token; equal scores are no risk, their order is a rule."""

    def __init__(self, tokens: int) -> None:
        super().__init__(bounds([tokens]), tokens)
        self.gaps = torch.full((tokens,), torch.inf)

    def sparse_softmax(self, q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float | None = None) -> Tensor:
        scores = index_scores(index.queries, index.keys, index.weights)
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        ranked = scores.masked_fill(hidden, -torch.inf).sort(descending=True).values
        gap = ranked[:, index.top_k - 1] - ranked[:, index.top_k]
        self.gaps = torch.minimum(self.gaps, torch.where(gap > 0, gap, torch.inf))
        return super().sparse_softmax(q, k, v, index, scale)


def table_of(routed: RoutedExperts) -> Tensor:
    return torch.frombuffer(bytearray(routed.data), dtype=torch.uint8).view(routed.shape).long()


@torch.no_grad()
def test_the_torch_engine_samples_from_the_learners_policy(tmp_path: Path) -> None:
    """Sparse attention that selects 16 keys: 2,000 tokens after two updates, experts replayed, within 2e-5.

    A selection closer than 1e-6 may turn over by rounding, as an expert may, and nothing replays it: a sequence counts
    up to there.
    """
    policies = [init_policy(TINY["deepseek_v32"].hf_config, seed) for seed in range(3)]
    for seed, policy in enumerate(policies):
        draw_weights(policy, seed)
    save_policy(policies[0], tmp_path / "policy")
    sizes: dict[str, Any] = {"max_context": 160, "max_sequences": 12, "record_routes": True}
    engine = ServedEngine(TorchEngine(str(tmp_path / "policy"), dtype="float32", **sizes))
    for version in (1, 2):
        update(engine, str(publish_weights(policies[version].to_hf(), tmp_path, version)), version)
    prompts = [tokens_of(n, VOCAB, seed=n).tolist() for n in (1, 2, 5, 15, 16, 17, 18, 33, 60, 60, 60, 1) * 2]
    sampling = Sampling(max_tokens=90, eos_ids=(), repetition=RepetitionStop(run_length=0))
    policy, compared = policies[2], 0
    for prompt, completion in zip(prompts, sampled(engine, prompts, sampling, seed=0), strict=True):
        tokens = torch.tensor([*prompt, *completion.token_ids])
        assert completion.routed_experts is not None
        routes = torch.full((len(tokens), *completion.routed_experts.shape[1:]), -1)
        routes[:-1] = table_of(completion.routed_experts)
        documents = Gaps(len(tokens))
        hidden = policy.attend(tokens, torch.arange(len(tokens)), documents, routes).hidden
        live = (hidden @ policy.lm_head_weight.T).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[len(prompt) - 1 :, 0]
        close = (documents.gaps < 1e-6).nonzero()
        safe = len(tokens) if not len(close) else int(close[0])
        kept = max(safe - len(prompt) + 1, 0)
        assert_close(torch.tensor(completion.logprobs)[:kept], live[:kept], 2e-5)
        compared += min(kept, len(live))
    assert compared >= 2000
    engine.close()
