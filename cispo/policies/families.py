"""The families of policies: one entry each; the first entry that matches a config.json is its family.

    config.json --family_of--> Family -> build, short_step -> the learner and the torch engine
                                      -> vllm              -> vLLM's registries (`vllm_plugin`), engine start

A new family of hybrids is a file in `hybrid/`, any other a folder beside this file, and an entry in FAMILIES
(docs/families.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from cispo.policies.dense.shapes import Shapes, known_shapes
from cispo.policies.hybrid import deepseek, gqa_moe, kimi_linear, ling, minimax_m2, qwen3_next
from cispo.policies.hybrid.config import HybridConfig
from cispo.policies.hybrid.model import build as build_hybrid
from cispo.policies.hybrid.mtp import with_heads
from cispo.policies.minimax.config import is_lightning_config
from cispo.policies.minimax.model import LightningPolicy
from cispo.policies.minimax.model import build as build_minimax
from cispo.policies.minimax.short_step import LightningStep
from cispo.policies.policy import HFConfig, Policy, no_heads
from cispo.policies.short_step import ShortStep


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMModel:
    """A family's own model inside vLLM, by name: nothing here imports vLLM. Classes are given as "module:Class"."""

    architectures: tuple[str, ...]
    """Names in config.json's `architectures` for which vLLM loads the model."""
    model: str
    """An nn.Module with vLLM's model interface, and `count_cached_states(model_config)` for the size of the cache."""
    configs: Mapping[str, str] = field(default_factory=dict)
    """Config class of each model_type that transformers does not know."""
    parser: str | None = None
    """Parser by which vLLM reads config.json, of the config format `PARSED`; None for vLLM's own reading."""


PARSED = "cispo"
"""Name of our config format in vLLM's registry."""

POLICY_MODEL = VLLMModel(
    architectures=("PolicyForCausalLM",),
    model="cispo.policies.hybrid.vllm_model:PolicyForCausalLM",
    parser="cispo.policies.hybrid.vllm_config:PolicyConfigParser",
)
"""The family's own policy inside vLLM: for every family that `hybrid.model.HybridPolicy` implements."""


class Build(Protocol):
    """Builds a family's policy."""

    def __call__(self, config: HFConfig, folder: Path | None, dtype: torch.dtype, *, heads: bool = False) -> Policy:
        """A policy with undefined weights on torch's default device; `folder` is that of the weights.

        With `heads` its heads of multi-token prediction are modules, else their weights are kept aside. Raises
        UserError where the config has no meaning in the family, or no heads are there.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Policies that share a config, an implementation and names of weights."""

    matches: Callable[[HFConfig], bool]
    """Whether a config.json describes a policy of this family."""
    build: Build
    short_step: Callable[[Policy], ShortStep | None]
    """The policy's step in few operations; None where it has none."""
    vllm: VLLMModel | None = None
    """None where vLLM's own model serves the family."""
    known_shapes: Callable[[HFConfig], Shapes | None] = lambda _: None
    """The weights of a config's policy where they are known without building it, which imports its libraries."""


def _minimax_step(policy: Policy) -> ShortStep:
    assert isinstance(policy, LightningPolicy)
    return LightningStep(policy)


# transformers is imported for dense policies alone: it takes seconds in a new process.
def _build_dense(config: HFConfig, folder: Path | None, dtype: torch.dtype) -> Policy:
    from cispo.policies.dense.model import build

    return build(config, dtype)


def _headless(build_policy: Callable[[HFConfig, Path | None, torch.dtype], Policy]) -> Build:
    """The `Build` of a family without heads of multi-token prediction."""

    def build(config: HFConfig, folder: Path | None, dtype: torch.dtype, *, heads: bool = False) -> Policy:
        if heads:
            raise no_heads(f"policies of model_type {config.get('model_type')!r} have none")
        return build_policy(config, folder, dtype)

    return build


def _dense_step(policy: Policy) -> ShortStep | None:
    from cispo.policies.dense.short_step import short_step

    return short_step(policy)


def _hybrid(matches: Callable[[HFConfig], bool], parse: Callable[[HFConfig], HybridConfig]) -> Family:
    """A family of `HybridPolicy`."""

    def build(config: HFConfig, folder: Path | None, dtype: torch.dtype, *, heads: bool = False) -> Policy:
        parsed = parse(config)
        return build_hybrid(with_heads(parsed) if heads else parsed, dtype)

    return Family(
        matches=matches,
        build=build,
        short_step=lambda policy: None,
        vllm=POLICY_MODEL,
    )


_MINIMAX_M1 = "cispo.policies.minimax.hf_configs:MiniMaxM1Config"
_MINIMAX_TEXT_01 = "cispo.policies.minimax.hf_configs:MiniMaxText01Config"

FAMILIES = {
    # Before "minimax", which is the model_type of MiniMax-M2's first release too.
    "minimax_m2": _hybrid(minimax_m2.matches, minimax_m2.parse),
    "minimax": Family(
        matches=is_lightning_config,
        build=_headless(build_minimax),
        short_step=_minimax_step,
        vllm=VLLMModel(
            architectures=("MiniMaxForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM"),
            model="cispo.policies.minimax.vllm_model:LightningForCausalLM",
            # The original dialect's model types in every spelling; transformers knows "minimax" alone.
            configs={
                "minimax_m1": _MINIMAX_M1,
                "MiniMaxM1": _MINIMAX_M1,
                "minimax_text_01": _MINIMAX_TEXT_01,
                "minimax_text01": _MINIMAX_TEXT_01,
                "MiniMaxText01": _MINIMAX_TEXT_01,
            },
        ),
    ),
    "qwen3_next": _hybrid(qwen3_next.matches, qwen3_next.parse),
    "kimi_linear": _hybrid(kimi_linear.matches, kimi_linear.parse),
    "deepseek": _hybrid(deepseek.matches, deepseek.parse),
    "ling": _hybrid(ling.matches, ling.parse),
    "gqa_moe": _hybrid(gqa_moe.matches, gqa_moe.parse),
    "dense": Family(
        matches=lambda _: True, build=_headless(_build_dense), short_step=_dense_step, known_shapes=known_shapes
    ),
}


def family_of(config: HFConfig) -> Family:
    """The family of a config.json's content; the dense one takes every config that no other does."""
    return next(family for family in FAMILIES.values() if family.matches(config))


def short_step(policy: Policy) -> ShortStep | None:
    """The policy's step in few operations; None where it has none, and on a CPU in another dtype than float32: it would
    round differently."""
    weight = policy.lm_head_weight
    if weight.dtype != torch.float32 and not weight.is_cuda:
        return None
    return family_of(policy.hf_config()).short_step(policy)
