"""Makes the MiniMax-01 family known to vLLM: the entry point `vllm.general_plugins`, which it runs in every process."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

ARCHITECTURES = ("MiniMaxForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM")
MODEL = "cispo.policies.minimax.vllm_model:LightningForCausalLM"


class MiniMaxM1Config(PreTrainedConfig):
    """Every key of config.json as it is: `LightningConfig` gives them their meaning."""

    model_type = "minimax_m1"


class MiniMaxText01Config(PreTrainedConfig):
    """The same for MiniMax-Text-01."""

    model_type = "minimax_text_01"


# The original dialect's model types, as they are spelled; transformers knows "minimax" alone.
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "minimax_m1": MiniMaxM1Config,
    "MiniMaxM1": MiniMaxM1Config,
    "minimax_text_01": MiniMaxText01Config,
    "minimax_text01": MiniMaxText01Config,
    "MiniMaxText01": MiniMaxText01Config,
}


@cache
def register() -> None:
    """Registers the architectures, lazily, and the configs of the original model types; a second call does nothing."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL)
    for model_type, config in CONFIGS.items():
        CONFIG_MAPPING.register(model_type, config, exist_ok=True)
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
