"""Heads of multi-token prediction (MTP): DeepSeek-V3's modules (arXiv 2412.19437, section 2.2).

    h' [T, d] = eh_proj [ enorm(embedding of the next token) ; hnorm(h) ],  one layer -> [T, d] -> norm -> LM head

h are hidden states of the trunk after its final norm, or those of the head before. At a document's position i head n
(from 0) takes token i + 1 + n as the next one and predicts token i + 2 + n. Embedding and LM head are the policy's.

vLLM's own modules drop the embedding at position 0 and, for DeepSeek, read a head's states after its norm in a further
prediction; the paper has neither. Names on disk: deepseek-ai/DeepSeek-V3; vLLM 0.32 models/deepseek_mtp.py and
glm4_moe_mtp.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cispo.policies.attention import Attention
from cispo.policies.hybrid.config import GDNConfig, HybridConfig, KDAConfig, LightningMixerConfig
from cispo.policies.policy import Head, no_heads

_RECURRENT = (GDNConfig, KDAConfig, LightningMixerConfig)


class Predictor(Head):
    """One head. `norm` comes before the LM head's product; what `forward` returns is read by a further prediction."""

    def __init__(self, hidden: int, layer: nn.Module, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.enorm, self.hnorm = norm(hidden), norm(hidden)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = layer
        self.norm = norm(hidden)

    def forward(
        self, embedded: Tensor, hidden: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Embeddings of next tokens and hidden states, [T, d] each, to hidden states [T, d] before `norm`."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        return self.layer(x, attention, rotary)[0]


def with_heads(config: HybridConfig) -> HybridConfig:
    """The config of the same policy with its heads as modules. Raises UserError where it has none that can run."""
    if any(isinstance(layer.mixer, _RECURRENT) for layer in config.layers):
        raise no_heads(
            "this policy's recurrent layers (lightning, delta rule) keep one state a sequence, from which a rejected "
            "draft cannot be taken back"
        )
    if not config.heads:
        raise no_heads("num_nextn_predict_layers is 0 or missing in this policy's config.json, or its family has none")
    return replace(config, runs_heads=True, names=replace(config.names, kept=None, first_head=len(config.layers)))
