"""Names and shapes of a common dense model's weights from its config alone: transformers' models take two seconds to
import.

    config.json --known_shapes--> name -> shape     the four types that differ in their norms and biases alone
                            `---> None              any other type or key, and any value that is not surely right
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cispo.policies.policy import HFConfig

Shapes = Mapping[str, tuple[int, ...]]
"""Name in a checkpoint -> shape of the weight."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_REQUIRED = (*_SIZES, "num_key_value_heads", "tie_word_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True, slots=True)
class _Kind:
    """A model_type, in what it differs from Llama."""

    biases: tuple[str, ...] = ()
    """Projections of the attention that have a bias."""
    norms: tuple[str, ...] = ()
    """Norms over a head."""
    required: tuple[str, ...] = ()
    """Keys whose default is not the one of Llama."""
    layer_types: bool = False
    """Whether the config has that key; transformers warns of it elsewhere."""


_KINDS = {
    "llama": _Kind(),
    "mistral": _Kind(),
    "qwen2": _Kind(biases=("q_proj", "k_proj", "v_proj"), layer_types=True),
    "qwen3": _Kind(norms=("q_norm", "k_norm"), required=("head_dim",), layer_types=True),
}


def known_shapes(config: HFConfig) -> Shapes | None:
    """The weights that a policy of the config takes, as transformers 5.19 builds it; None where that is not certain.

    A config with known shapes is one that `model.build` takes without a word.
    """
    kind = _KINDS.get(config["model_type"]) if isinstance(config.get("model_type"), str) else None
    if kind is None or any(key not in config for key in (*_REQUIRED, *kind.required)):
        return None
    if not all(key in _VALUES and _VALUES[key](value) for key, value in config.items()):
        return None
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    tokens = [config.get(key) or 0 for key in _TOKENS]
    kinds = config.get("layer_types")
    fits = [
        config["hidden_size"] % heads == 0,
        heads % config["num_key_value_heads"] == 0,
        max(tokens) < config["vocab_size"],
        kinds is None or (kind.layer_types and kinds == ["full_attention"] * layers),
    ]
    return dict(_weights(config, kind)) if all(fits) else None


def _weights(config: HFConfig, kind: _Kind) -> Iterator[tuple[str, tuple[int, ...]]]:
    size, width, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or size // heads
    attention = {name: config["num_key_value_heads"] * head for name in ("k_proj", "v_proj")}
    attention["q_proj"] = heads * head
    yield "model.embed_tokens.weight", (config["vocab_size"], size)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name, rows in attention.items():
            yield f"{layer}.self_attn.{name}.weight", (rows, size)
        yield f"{layer}.self_attn.o_proj.weight", (size, heads * head)
        for name in kind.biases:
            yield f"{layer}.self_attn.{name}.bias", (attention[name],)
        for name in kind.norms:
            yield f"{layer}.self_attn.{name}.weight", (head,)
        yield f"{layer}.mlp.gate_proj.weight", (width, size)
        yield f"{layer}.mlp.up_proj.weight", (width, size)
        yield f"{layer}.mlp.down_proj.weight", (size, width)
        yield f"{layer}.input_layernorm.weight", (size,)
        yield f"{layer}.post_attention_layernorm.weight", (size,)
    yield "model.norm.weight", (size,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], size)


Check = Callable[[object], bool]


def _count(value: object) -> bool:
    return type(value) is int and value > 0


def _token(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _share(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def _base(value: object) -> bool:
    return (isinstance(value, float) or type(value) is int) and value > 1


def _rope(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"rope_type", "rope_theta"}:
        return False
    return value["rope_type"] == "default" and _base(value["rope_theta"])


def _is(kind: type) -> Check:
    return lambda value: isinstance(value, kind)


def _equals(*values: object) -> Check:
    """One of the values, of the same type: 1 is not True."""
    return lambda value: any(type(value) is type(one) and value == one for one in values)


_VALUES: Mapping[str, Check] = {
    **dict.fromkeys((*_SIZES, "num_key_value_heads", "max_position_embeddings", "pretraining_tp"), _count),
    "head_dim": lambda value: type(value) is int and value > 0 and value % 2 == 0,  # halves are rotated
    **dict.fromkeys(_TOKENS, _token),
    **dict.fromkeys(("model_type", "transformers_version", "_name_or_path", "_model_name_or_path"), _is(str)),
    "architectures": lambda value: isinstance(value, list) and all(map(_is(str), value)),
    **dict.fromkeys(("dtype", "torch_dtype"), _equals("bfloat16", "float16", "float32")),
    "hidden_act": _equals("silu"),
    **dict.fromkeys(("initializer_range", "rms_norm_eps", "attention_dropout"), _share),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "is_llama_config"), _is(bool)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "rope_interleaved"), _equals(False)),
    "rope_theta": _base,
    "rope_scaling": _equals(None),
    "rope_parameters": _rope,
    "sliding_window": lambda value: value is None or _count(value),
    "max_window_layers": _count,
    "layer_types": lambda value: value is None or isinstance(value, list),
    "transformers.js_config": _is(dict),
    # Values that transformers writes beside those of the model.
    **dict.fromkeys(("output_hidden_states", "output_attentions", "is_encoder_decoder"), _equals(False)),
    "return_dict": _equals(True),
    "chunk_size_feed_forward": _equals(0),
    "problem_type": _equals(None),
    "id2label": _equals({"0": "LABEL_0", "1": "LABEL_1"}),
    "label2id": _equals({"LABEL_0": 0, "LABEL_1": 1}),
}
"""The keys that are known, each with the values for which a policy is built and has the weights of `_weights`."""
