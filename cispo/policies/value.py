"""A value function: a policy's layers with a head that gives one number a token instead of logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cispo.policies.attention import Attention, Documents
from cispo.policies.policy import Policy


class ValueModel(nn.Module):
    """V(s_t) = w . hidden_t + b on a backbone of its own.

    The head starts at zero, so that a new critic predicts 0 everywhere and not noise; it runs in float32.
    """

    def __init__(self, backbone: Policy) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.lm_head_weight.shape[1], 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None = None,
        attention: Attention | None = None,
    ) -> Tensor:
        """tokens and positions [T] int64, cu_seqlens [S + 1] int32, `max_seqlen` as in `Policy.forward`; [T] float32.

        A given `attention` is the pass's instead of that inside the documents of cu_seqlens.

        Entry t is the value of the state after reading tokens up to t; the next token is sampled from that state.
        """
        attention = attention or Documents(cu_seqlens, len(tokens), max_seqlen)
        hidden = self.backbone.attend(tokens, positions, attention).hidden
        return self.head(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))[:, 0]
