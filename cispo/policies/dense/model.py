"""Any dense Hugging Face causal language model as a policy on packed tokens.

The base model runs on one row [1, T] of packed documents. Everything but attention works token by token, and
attention is ours: registered with transformers under a name, it takes an `attention.Attention` (packed documents, or a
sampler's cache) from the keyword arguments of the forward pass. So no [T, T] mask exists and nothing crosses from one
document to another.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import AttentionInterface

from cispo.errors import UserError
from cispo.policies.attention import Attention
from cispo.policies.layers import RMSNorm, rotate
from cispo.policies.policy import HFConfig, Place, Policy, PolicyOutput

ATTENTION = "cispo_packed"

_UNSUPPORTED_ATTENTION = ("softcap", "s_aux", "position_bias")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CONVOLUTION_KEYS = ("conv_L_cache", "sconv_kernel_size")
_SCALED_LOGITS = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "granite": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "minicpm3": ("logits_scaling", -1),
}
"""Types whose logits are the head's times a power of an attribute of the config; the same key divides or multiplies."""
_HEAD_STEPS = re.compile(
    r"hidden_states = \w+(\.last_hidden_state|\[0\])|(lm_)?logits = self\.\w+\(hidden_states\[:, slice_indices, :\]\)"
    r"(\.float\(\)|\.contiguous\(\))?|logits = .*final_logit_softcapping|logits = torch\.tanh\(logits\)"
)
"""Steps from hidden states to logits that leave the head a plain product, where no soft cap is configured."""
_LAYERS = ("full_attention", "sliding_attention")
_PLAIN_ATTENTION = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_PLAIN_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_PREFIX = "model."  # of HFPolicy's parameters before transformers' own names
_BUFFER = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention: Attention | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls: query [1, H, T, D], key and value [1, K, T, D], to [1, T, H, D]."""
    asked = [name for name in _UNSUPPORTED_ATTENTION if kwargs.get(name) is not None]
    if attention is None or asked:
        reason = f"uses {asked[0]}" if asked else "does not pass on where documents start"
        raise UserError(f"{type(module).__name__} cannot run on packed tokens: it {reason}")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention.softmax(q, k, v, scaling)[None], None


AttentionInterface.register(ATTENTION, _packed_attention)


def _replace_norms_and_attention(model: nn.Module) -> None:
    """Replaces the modules of `_PLAIN_NORMS` by our RMSNorm, and the forward method of those in `_PLAIN_ATTENTION`.

    A patch of transformers' modules, seen with 5.19. Their norm is seven operations that keep a float32 copy of the
    activations for the backward pass, and their rotation takes four times the operations of ours. Modules of any other
    class are left as they are.
    """
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ in _PLAIN_NORMS:
                assert isinstance(norm.weight, nn.Parameter)
                own = RMSNorm(len(norm.weight), vars(norm)["variance_epsilon"])
                own.weight = norm.weight
                setattr(parent, name, own)
    for module in model.modules():
        if type(module).__name__ in _PLAIN_ATTENTION:
            module.forward = MethodType(_short_attention, module)


def _short_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    *,
    attention: Attention,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`forward` of the modules in `_PLAIN_ATTENTION`, with the rotation in a quarter of their operations."""
    q, k, v = (
        projection(hidden_states[0]).unflatten(-1, (-1, self.head_dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    cos, sin = (table[0, :, None] for table in position_embeddings)
    attended = attention.softmax(rotate(q, cos, sin), rotate(k, cos, sin), v, self.scaling)
    return self.o_proj(attended.flatten(1))[None], None


class HFPolicy(Policy):
    """A dense transformers model."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        """Builds the model with undefined weights. Raises UserError where packing would change its outputs."""
        super().__init__()
        _refuse_unsupported(config)
        self.source_config = config.to_dict()
        self._logit_factor = _logit_factor(config)
        with no_init_weights():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                _without_dropout(config), dtype=dtype, attn_implementation=ATTENTION
            )
        self.model.tie_weights()
        _replace_norms_and_attention(self.model)
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise UserError(_refusal(config, "its output head is not a plain matrix"))
        # A tied head is one tensor under two names: named_parameters() has it once, state_dict() twice.
        own = {name for name, _ in self.model.named_parameters()}
        self._places = {name: Place(_PREFIX + name) if name in own else None for name in self.model.state_dict()}

    @property
    def gradient_checkpointing(self) -> bool:
        return self.model.is_gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        if enabled:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    @property
    def lm_head_weight(self) -> Tensor:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head.weight

    def attend(
        self, tokens: Tensor, positions: Tensor, attention: Attention, routes: Tensor | None = None
    ) -> PolicyOutput:
        assert routes is None, "a dense policy has no experts to replay"
        if not len(tokens):  # transformers' reshapes refuse an empty row
            return PolicyOutput(tokens[:, None] * self.lm_head_weight[:1])
        output = self.model.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, attention=attention
        )
        return PolicyOutput(output.last_hidden_state[0] * self._logit_factor)

    def hf_config(self) -> dict[str, Any]:
        dtype = str(self.lm_head_weight.dtype).removeprefix("torch.")
        return {**self.source_config, "architectures": [type(self.model).__name__], "dtype": dtype}

    def place_of(self, name: str) -> Place | None:
        """Takes the model's own names, with or without the base model's prefix."""
        if _BUFFER.fullmatch(name):
            return None
        name = name if name in self._places else f"{self.model.base_model_prefix}.{name}"
        return self._places.get(name, Place(_PREFIX + name))

    def disk_places(self) -> Iterator[tuple[str, Place]]:
        for name, _ in self.named_parameters():
            yield name.removeprefix(_PREFIX), Place(name)


def build(config: HFConfig, dtype: torch.dtype) -> HFPolicy:
    """A policy with undefined weights on torch's default device. Raises UserError where transformers refuses the config
    or packing would change the model's outputs.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"transformers knows no model_type {kind!r}")
    if config.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config: a policy is trained, and sampled, from a copy in bfloat16 or "
            "float32 whose config.json has none"
        )
    try:
        return HFPolicy(AutoConfig.for_model(**config), dtype)
    except UserError:
        raise
    # transformers' errors for a value of the wrong type or for sizes that do not go together.
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"transformers builds no causal language model from the {kind!r} config: {reason}") from None


def _refusal(config: PretrainedConfig, reason: str) -> str:
    return f"model_type {config.model_type!r} cannot be trained on packed tokens: {reason}"


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The policy that trains must be the one that sampled. Models apply dropout in many ways, all from the config."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key or key == "layerdrop") and isinstance(value, float | int):
            setattr(config, key, type(value)(0))
    return config


def _refuse_unsupported(config: PretrainedConfig) -> None:
    """Raises UserError for models that the packed path would change: other attention kinds, experts, bent logits.

    A sliding window changes nothing in a document that is no longer: `loading.max_positions_of` is the bound.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(_refusal(config, "transformers has no causal language model of this kind"))
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert isinstance(model, type) and issubclass(model, PreTrainedModel)
    if not model._supports_attention_backend or model._is_stateful:
        raise UserError(_refusal(config, "its attention cannot be replaced or it keeps a recurrent state"))
    values = config.to_dict()
    kinds = [kind for kind in values.get("layer_types") or [] if kind not in _LAYERS]
    if kinds:
        raise UserError(_refusal(config, f"it has {kinds[0]!r} layers"))
    for key in _CONVOLUTION_KEYS:
        if values.get(key):
            raise UserError(_refusal(config, f"{key} says that it has convolution layers"))
    for key in _EXPERT_KEYS:
        if (values.get(key) or 0) > 1:
            raise UserError(_refusal(config, f"{key} is {values[key]}, and the balance of experts would be ignored"))
    if values.get("final_logit_softcapping") is not None:
        raise UserError(_refusal(config, "final_logit_softcapping bends its logits"))
    if config.model_type not in _SCALED_LOGITS and (steps := _other_steps(model.forward)):
        raise UserError(_refusal(config, f"its head is not a product alone: {steps[0]}"))


def _other_steps(forward: Callable[..., object]) -> list[str]:
    """Lines of transformers' forward pass between hidden states and loss that `_HEAD_STEPS` does not know.

    A type that scales its hidden states or logits there would get other log-probabilities without an error.
    """
    source = inspect.getsource(forward).partition("loss = None")[0]
    steps = re.findall(
        r"^ *((?:hidden_states|(?:lm_|predict_)?logits)\b[^=\n]*=[^=\n].*?)(?: +#.*)?$", source, re.MULTILINE
    )
    return [step for step in steps if " = " in step and not _HEAD_STEPS.fullmatch(step)]


def _logit_factor(config: PretrainedConfig) -> float:
    """Factor of the logits. Hidden states take it, so that the head is a matrix alone; released factors are powers of
    two, which round nothing.
    """
    attribute, power = _SCALED_LOGITS.get(config.model_type, ("", 0))
    return float(getattr(config, attribute)) ** power if attribute else 1.0
