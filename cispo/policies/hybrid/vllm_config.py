"""A policy as vLLM sees it: an architecture, a config and a config format of our own.

    config.json --PolicyConfigParser (config format "cispo")--> PolicyConfig, architecture PolicyForCausalLM

With config classes of transformers' or its own, vLLM would take some of the models for others: multi-head latent
attention runs on other backends, Qwen3.5 loads its vision tower, and several fail on a CPU. The shapes here are those
of the cache: as many layers as vLLM's cache has, heads padded as it holds them, of latents one.

The same folder is the model of drafts where these come from the policy's heads of multi-token prediction: `name_heads`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from vllm.config import SpeculativeConfig
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from cispo.files import read_json
from cispo.policies.families import PARSED, POLICY_MODEL
from cispo.policies.hybrid.vllm_plan import plan_of
from cispo.policies.loading import max_positions_of
from cispo.policies.policy import HFConfig
from cispo.policies.vllm_plugin import HEADS


class PolicyConfig(PreTrainedConfig):
    """Shapes of a policy's cache, under the names that vLLM reads."""

    model_type = "cispo_policy"
    policy: str = "{}"
    """The policy's config.json."""
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    """Layers of the cache."""
    layers_block_type: tuple[str, ...] = ()
    """Kind of each, by which vLLM counts them."""
    layer_types: list[str] | None = None
    """The same once more: vLLM sees here whether there are states."""
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int | None = None

    @property
    def content(self) -> HFConfig:
        """The content of config.json."""
        return json.loads(self.policy)


def cached_heads(config: HFConfig, folder: Path, ranks: int) -> dict[str, int]:
    """The values of `PolicyConfig` that say what an engine of `ranks` caches of a token: vLLM's parser knows no ranks.

    Raises UserError as `plan_of`.
    """
    plan = plan_of(config, folder, torch.float32, ranks)
    whole = plan_of(config, folder, torch.float32)
    key_heads = 1 if plan.keeps_latents else whole.softmax[0].kv_heads
    return {"num_key_value_heads": key_heads, "head_dim": plan.cached_heads[1]}


@register_config_parser(PARSED)
class PolicyConfigParser(ConfigParserBase):
    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: object,
    ) -> tuple[dict[str, object], PreTrainedConfig]:
        content = read_json(Path(model) / "config.json")
        plan = plan_of(content, Path(model), torch.float32)
        softmax, cached = len(plan.softmax), cached_heads(content, Path(model), 1)
        config = PolicyConfig(
            architectures=list(POLICY_MODEL.architectures),
            policy=json.dumps(content),
            vocab_size=plan.vocab_size,
            hidden_size=plan.hidden_size,
            num_hidden_layers=softmax + plan.holders,
            layers_block_type=("attention",) * softmax + ("mamba",) * plan.holders,
            layer_types=["full_attention"] * softmax + ["linear_attention"] * plan.holders,
            num_attention_heads=plan.softmax[0].heads,
            num_key_value_heads=cached["num_key_value_heads"],
            head_dim=cached["head_dim"],
            max_position_embeddings=max_positions_of(content),
        )
        return config.to_dict(), config


_read_drafts = SpeculativeConfig.hf_config_override


def config_of_drafts(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    """vLLM's reading of a config as that of a model of drafts, and of a `PolicyConfig` as that of `vllm_heads`."""
    if not isinstance(hf_config, PolicyConfig):
        return _read_drafts(hf_config)
    layers = {"num_hidden_layers": 1, "layers_block_type": ("attention",), "layer_types": ["full_attention"]}
    hf_config.update({"model_type": "mtp", "architectures": [HEADS], **layers})
    return hf_config


def name_heads() -> None:
    """Lets vLLM take a policy's own folder as a model of drafts, of the architecture `HEADS`.

    A patch of vLLM 0.32, which knows such models by a list of types in its `SpeculativeConfig` and has no way to add
    one. Its workers are sent the config as it was read.
    """
    SpeculativeConfig.hf_config_override = staticmethod(config_of_drafts)
