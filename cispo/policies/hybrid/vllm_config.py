"""A policy as vLLM sees it: an architecture, a config and a config format of our own.

    config.json --PolicyConfigParser (config format "cispo")--> PolicyConfig, architecture PolicyForCausalLM

With config classes of transformers' or its own, vLLM would take some of the models for others: multi-head latent
attention runs on other backends, Qwen3.5 loads its vision tower, and several fail on a CPU. The shapes here are those
of the cache: as many layers as vLLM's cache has, heads padded as it holds them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from cispo.files import read_json
from cispo.policies.families import PARSED, POLICY_MODEL
from cispo.policies.hybrid.vllm_plan import plan_of
from cispo.policies.loading import max_positions_of
from cispo.policies.policy import HFConfig


class PolicyConfig(PreTrainedConfig):
    """Shapes of a policy's cache, and its config.json in `policy`, as text."""

    model_type = "cispo_policy"

    def __init__(self, policy: str = "{}", **kwargs: Any) -> None:
        self.policy = policy
        super().__init__(**kwargs)

    @property
    def content(self) -> HFConfig:
        """The content of config.json."""
        return json.loads(self.policy)


@register_config_parser(PARSED)
class PolicyConfigParser(ConfigParserBase):
    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: object,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        content = read_json(Path(model) / "config.json")
        plan = plan_of(content, Path(model), torch.float32)
        first = plan.softmax[0]
        layers: dict[str, Any] = {
            "num_hidden_layers": len(plan.softmax) + plan.holders,
            # vLLM counts layers by kind in the first of the two, and sees in the second whether there are states.
            "layers_block_type": ["attention"] * len(plan.softmax) + ["mamba"] * plan.holders,
            "layer_types": ["full_attention"] * len(plan.softmax) + ["linear_attention"] * plan.holders,
            "num_attention_heads": first.heads,
            "num_key_value_heads": first.kv_heads,
            "head_dim": first.head_size,
        }
        sizes: dict[str, Any] = {
            "vocab_size": plan.vocab_size,
            "hidden_size": plan.hidden_size,
            "max_position_embeddings": max_positions_of(content),
        }
        architectures = list(POLICY_MODEL.architectures)
        config = PolicyConfig(architectures=architectures, policy=json.dumps(content), **layers, **sizes)
        return config.to_dict(), config
