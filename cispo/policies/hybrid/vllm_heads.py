"""The first head of multi-token prediction of a policy as vLLM's model of drafts: the target's modules, over its cache.

    tokens of a step -> PolicyForCausalLM -> hidden [T, d] --sampled tokens--> PolicyHeads -> a draft of each sequence
    a draft and the head's own hidden states, a position further -> PolicyHeads -> the next draft, up to k of them

Nothing is loaded here: the head is a part of the target's policy, so that an update of its weights reaches both. Its
layer of attention is one more in the target's cache. All tokens that are accepted go through it, with the target's
hidden states, which writes over what the head has left there for its own drafts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from cispo.policies.hybrid.model import HybridPolicy
from cispo.policies.hybrid.mtp import Predictor
from cispo.policies.hybrid.vllm_attention import PagedAttention
from cispo.policies.hybrid.vllm_latents import LatentAttention
from cispo.policies.hybrid.vllm_model import TARGET, PolicyForCausalLM, softmax_layer


class PolicyHeads(nn.Module):
    """The model that vLLM loads beside `PolicyForCausalLM`, in the same worker, where drafts of heads are asked for."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        target = vllm_config.compilation_config.static_forward_context[TARGET]
        assert isinstance(target, PolicyForCausalLM) and isinstance(target.policy, HybridPolicy)
        # In a tuple, as the parameters of a submodule would count as this model's.
        self._target, self._policy = (target,), (target.policy,)
        self.plan = target.plan.of_head
        first = len(target.plan.softmax)
        self.attention = nn.ModuleList(
            softmax_layer(self.plan, call, vllm_config, f"model.layers.{number}.attention")
            for number, call in enumerate(self.plan.softmax, first)
        )
        self.model = nn.Module()
        """Takes the target's embedding, which vLLM hands on here."""

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[T, d]; `forward` takes tokens and embeds them itself."""
        return self._target[0].embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        """Hidden states [T, d] before the head's norm: tokens [T] are those behind the positions [T] of `hidden_states`
        [T, d]."""
        layers = cast(Sequence[Attention | LatentAttention], self.attention)
        return self._policy[0].predict(0, input_ids, positions, hidden_states, PagedAttention(self.plan, layers, ()))

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor:
        """[n, V] float32, of what `forward` has returned."""
        head = self._policy[0].predictors[0]
        assert isinstance(head, Predictor)
        return self._target[0].compute_logits(head.norm(hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Reads none: the target has loaded them."""
        return set()
