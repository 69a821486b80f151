"""The policy of every hybrid family: mixers of tokens and MLPs behind norms, by the records of `HybridConfig`.

    tokens [T] -> embed -> { norm -> mixer -> + ; norm -> mlp -> + } x L -> norm -> hidden [T, d]

    mixer(x [T, d], attention, rotary) -> [T, d]     GQA, MLA, GDN, KDA, ...: everything that crosses tokens is asked
                                                     of `attention` (`policies.attention.Attention`)

A family is a file beside this one: it parses config.json and names the weights. An engine runs this forward pass with
an attention object over its own cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cispo.policies.attention import Attention
from cispo.policies.hybrid.config import (
    DenseMLPConfig,
    GDNConfig,
    GQAConfig,
    HybridConfig,
    KDAConfig,
    LayerConfig,
    LightningMixerConfig,
    MixerConfig,
    MLAConfig,
    MoEConfig,
)
from cispo.policies.hybrid.delta import GDN, KDA
from cispo.policies.hybrid.gqa import GQA
from cispo.policies.hybrid.lightning import Lightning
from cispo.policies.hybrid.mla import MultiHeadLatentAttention
from cispo.policies.hybrid.mtp import Predictor
from cispo.policies.layers import CentredRMSNorm, RMSNorm, SwiGLU
from cispo.policies.moe import SharedMoE
from cispo.policies.policy import Place, Policy, PolicyOutput, RouterOutput, with_memory

FLOAT32 = ("A_log", "dt_bias", "e_score_correction_bias")
"""Weights that stay float32 in a policy of a lower precision: rounded decays cost 0.01 nats a token."""

_OF_THE_SOURCE = ("quantization_config", "torch_dtype")
"""Keys of config.json that describe the weights it came with."""


def norm_of(config: HybridConfig, size: int) -> nn.Module:
    """A norm of the policy's kind."""
    return (CentredRMSNorm if config.centred_norms else RMSNorm)(size, config.norm_eps)


_MIXERS: dict[type[MixerConfig], Callable[..., nn.Module]] = {
    GQAConfig: lambda mixer, config: GQA(config.hidden_size, mixer, lambda size: norm_of(config, size)),
    GDNConfig: lambda mixer, config: GDN(config.hidden_size, mixer),
    KDAConfig: lambda mixer, config: KDA(config.hidden_size, mixer),
    MLAConfig: lambda mixer, config: MultiHeadLatentAttention(config.hidden_size, mixer),
    LightningMixerConfig: lambda mixer, config: Lightning(config.hidden_size, mixer),
}
"""Builds the module of a mixer's record: (record, config of the policy)."""


class HybridLayer(nn.Module):
    """One block: a mixer, then an MLP, each behind a norm and added to the residual."""

    def __init__(self, config: HybridConfig, layer: LayerConfig) -> None:
        super().__init__()
        hidden, mlp = config.hidden_size, layer.mlp
        self.config = layer
        self.input_layernorm = norm_of(config, hidden)
        self.add_module(layer.mixer.name, _MIXERS[type(layer.mixer)](layer.mixer, config))
        self.post_attention_layernorm = norm_of(config, hidden)
        if isinstance(mlp, DenseMLPConfig):
            self.mlp = SwiGLU(hidden, mlp.width)
        else:
            self.mlp = SharedMoE(
                hidden, mlp.width, mlp.routing, shared_width=mlp.shared_width, shared_gate=mlp.shared_gate
            )

    @property
    def mixer(self) -> nn.Module:
        return self.get_submodule(self.config.mixer.name)

    def forward(
        self,
        x: Tensor,
        attention: Attention,
        rotary: tuple[Tensor, Tensor] | None,
        routes: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput | None]:
        """x [T, d] to x [T, d], and the router's decisions where the layer has one; routes [T, k] or None."""
        x = x + self.mixer(self.input_layernorm(x), attention, rotary)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SwiGLU):
            return x + self.mlp(normed), None
        mixture, routed = self.mlp(normed, routes)
        return x + mixture, RouterOutput(routed.probs, routed.chosen)


class HybridPolicy(Policy):
    """A model of any hybrid family: packed tokens in, hidden states and router outputs out."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridLayer(config, layer) for layer in config.layers)
        self.norm = norm_of(config, config.hidden_size)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._experts = {
            number: layer.mlp.routing.num_experts
            for number, layer in enumerate(config.layers)
            if isinstance(layer.mlp, MoEConfig)
        }
        # Last, so that the other weights of a new policy are drawn as without them.
        self.predictors = nn.ModuleList(
            Predictor(config.hidden_size, HybridLayer(config, layer), lambda size: norm_of(config, size))
            for layer in config.predictors
        )

    @property
    def lm_head_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def router_shape(self) -> tuple[int, int]:
        return len(self._experts), max(self._experts.values(), default=0)

    def attend(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routes: Tensor | None = None
    ) -> PolicyOutput:
        rotary = None if self.config.rotary is None else self.config.rotary.table(positions)
        x = self.embed_tokens(tokens)
        router: list[RouterOutput] = []
        for number, layer in enumerate(self.layers):
            replay = None if routes is None or number not in self._experts else routes[:, len(router)]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                outputs = checkpoint(layer, x, attention, rotary, replay, use_reentrant=False, preserve_rng_state=False)
                assert outputs is not None
            else:
                outputs = layer(x, attention, rotary, replay)
            x, decisions = outputs
            if decisions is not None:
                router.append(decisions)
        return PolicyOutput(self.norm(x), tuple(router))

    def predict(
        self, number: int, next_tokens: Tensor, positions: Tensor, hidden: Tensor, attention: Attention
    ) -> Tensor:
        """Hidden states [T, d] of head `number` before its norm; `lm_head_weight` multiplies `predictors[number].norm`
        of them.

        next_tokens and positions [T] int64, positions those of `hidden` [T, d]: the trunk's after its final norm, or
        those that `predict` returned, of the head before or of the same. The embedding gets no gradient.
        """
        rotary = None if self.config.rotary is None else self.config.rotary.table(positions)
        head = self.predictors[number]
        with torch.no_grad():
            embedded = self.embed_tokens(next_tokens)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(head, embedded, hidden, attention, rotary, use_reentrant=False, preserve_rng_state=False)
            assert x is not None
            return x
        return head(embedded, hidden, attention, rotary)

    def hf_config(self) -> dict[str, Any]:
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        kept = {key: value for key, value in self.config.raw.items() if key not in _OF_THE_SOURCE}
        return {**kept, "dtype": dtype}

    def keeps(self, name: str) -> bool:
        return self.config.names.keeps(name)

    def place_of(self, name: str) -> Place | None:
        place = self.config.names.place_of(name)
        tied = self.lm_head is None and place is not None and place.parameter == "lm_head.weight"
        return None if tied else place

    def disk_places(self) -> Iterator[tuple[str, Place]]:
        experts = dict(self._experts)
        for number, layer in enumerate(self.config.predictors, len(self.layers)):
            if isinstance(layer.mlp, MoEConfig):
                experts[number] = layer.mlp.routing.num_experts
        for name, _ in [*self.named_parameters(), *self.named_buffers()]:
            yield from self.config.names.disk_places(name, experts)

    def second_names(self) -> Mapping[str, Sequence[str]]:
        return self.config.names.second_names(len(self.predictors), tied=self.lm_head is None)

    def initial_weight(self, name: str, shape: torch.Size, std: float, generator: torch.Generator) -> Tensor:
        """Norms neutral; decays and their steps as Mamba draws them (arXiv 2312.00752, section 3.6)."""
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty(shape, device=generator.device)
        if leaf == "A_log":
            return empty.uniform_(1, 16, generator=generator).log()
        if leaf == "dt_bias":
            step = empty.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
        if owner.endswith("conv1d"):
            bound = shape[-1] ** -0.5
            return empty.uniform_(-bound, bound, generator=generator)
        if isinstance(self.get_submodule(owner), CentredRMSNorm):
            return empty.zero_()
        return super().initial_weight(name, shape, std, generator)


def build(config: HybridConfig, dtype: torch.dtype) -> HybridPolicy:
    """A policy with undefined weights on torch's default device."""
    device = torch.get_default_device()
    with torch.device("meta"):  # no time spent on torch's own initial weights
        policy = HybridPolicy(config).to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        for module in policy.modules():
            for name in FLOAT32:
                weight = getattr(module, name, None)
                if isinstance(weight, nn.Parameter):
                    setattr(module, name, nn.Parameter(weight.detach().to(exact)))
                elif isinstance(weight, Tensor):
                    setattr(module, name, weight.to(exact))
    return with_memory(policy, device)
