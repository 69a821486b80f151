"""Makes the MiniMax-01 family known to vLLM: the entry point `vllm.general_plugins`, which it runs in every process."""

from __future__ import annotations

from functools import cache
from typing import Any

ARCHITECTURES = ("MiniMaxForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM")
MODEL = "cispo.policies.vllm_lightning:LightningForCausalLM"

# Spellings of the original dialect's model_type; transformers knows "minimax" alone.
MODEL_TYPES = ("minimax_m1", "MiniMaxM1", "minimax_text_01", "minimax_text01", "MiniMaxText01")


@cache
def register() -> None:
    """Registers the architectures, lazily, and the configs of the original model types; a second call does nothing."""
    from transformers import AutoConfig, PreTrainedConfig
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL)
    for model_type in MODEL_TYPES:
        # The class keeps every key of config.json as it is; `LightningConfig` gives them their meaning.
        config_class = type("OriginalMiniMaxConfig", (PreTrainedConfig,), {"model_type": model_type})
        AutoConfig.register(model_type, config_class, exist_ok=True)
    if current_platform.is_cpu():
        _keep_linear_weights()


def _keep_linear_weights() -> None:
    """Makes vLLM's linear layers on a CPU multiply with `layer.weight`, so that a weight update reaches them.

    The one monkey patch of the project. vLLM (seen in 0.24 to 0.32) packs each linear weight once, after loading: a
    linear layer's weight is then replaced by an empty tensor and cannot be loaded again; the LM head keeps its weight
    but goes on serving the packed copy of the old one. It ends with the version that packs anew after an update, or
    that lets a layer opt out for both (0.32's `_cpu_skip_gemm_dispatch` covers linear layers only).
    """
    import vllm.model_executor.layers.utils as layers
    from torch.nn.functional import linear

    pack = layers.dispatch_cpu_unquantized_gemm

    def keep(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = linear
        else:
            pack(layer, remove_weight)

    layers.dispatch_cpu_unquantized_gemm = keep
