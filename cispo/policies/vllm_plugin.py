"""Makes the families' own models known to vLLM: the entry point `vllm.general_plugins`, run in every vLLM process."""

from __future__ import annotations

from functools import cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from torch import nn
from transformers import CONFIG_MAPPING

from cispo.policies.families import FAMILIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HEADS = "PolicyHeads"
"""Name of the architecture of a policy's heads of multi-token prediction, as vLLM's model of drafts."""

HEADS_MODEL = "cispo.policies.hybrid.vllm_heads:PolicyHeads"


def drafts_by_heads(config: VllmConfig) -> bool:
    """Whether the engine's drafts are those of heads of multi-token prediction."""
    return config.speculative_config is not None and config.speculative_config.method == "mtp"


@cache
def register() -> None:
    """Registers the families' models, lazily, and their config classes; a second call does nothing."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    for family in FAMILIES.values():
        if family.vllm is None:
            continue
        for architecture in family.vllm.architectures:
            ModelRegistry.register_model(architecture, family.vllm.model)
        for model_type, config in family.vllm.configs.items():
            CONFIG_MAPPING.register(model_type, resolve_name(config), exist_ok=True)
    ModelRegistry.register_model(HEADS, HEADS_MODEL)
    if current_platform.is_cpu():
        _keep_linear_weights()


def _keep_linear_weights() -> None:
    """Makes vLLM's linear layers on a CPU multiply with `layer.weight`, so that a weight update reaches them.

    A patch of vLLM, which packs each linear weight once, after loading (seen in 0.24 to 0.32): a linear layer's weight
    is then replaced by an empty tensor and cannot be loaded again; the LM head keeps its weight but goes on serving the
    packed copy of the old one. It ends with the version that packs anew after an update, or that lets a layer opt out
    for both (0.32's `_cpu_skip_gemm_dispatch` covers linear layers only).

    The project's other patches: `engines.vllm_logprobs` replaces vLLM's samplers, `hybrid.vllm_config` its reading of a
    config of drafts, `policies.dense.model` some of transformers' modules.
    """
    import vllm.model_executor.layers.utils as layers
    from torch.nn.functional import linear

    pack = layers.dispatch_cpu_unquantized_gemm

    def keep(layer: nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            vars(layer)["cpu_linear"] = linear
        else:
            pack(layer, remove_weight)

    layers.dispatch_cpu_unquantized_gemm = keep
