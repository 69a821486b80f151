"""Engines turn prompts into completions, token in, token out, with the log-probability of every sampled token.

    Engine.generate(prompts, sampling, seed) -> [Completion]        one a prompt, in order
    Engine.update_weights(path, version)                            what `publish_weights` wrote

`VLLMEngine` runs vLLM inside this process; `TorchEngine` recomputes everything with the learner's policy, for tests.
When a completion ends: `drafts`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from cispo.policies.base import load_policy
from cispo.rollout.drafts import repeats_pattern, seeded, start_drafts
from cispo.types import Completion, FinishReason, Sampling, UserError
from cispo.weight_sync import TRANSFER_BACKEND, mapped_weights, register_transfer_backend

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams
    from vllm.config import VllmConfig

# Read when vLLM and torch are imported. One process holds the whole engine: the two that vLLM would spawn import it
# again, 20 s. Without compilation the sampler's helpers start 2 s sooner and run as fast.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

# What the engine is told because of the device it runs on.
_DEVICE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "cpu": {"enforce_eager": True},
    "cuda": {"enforce_eager": True},
}


class Engine(Protocol):
    """Samples completions from one version of the policy."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        """Samples one completion a prompt, in order; the same batch and seed give the same tokens.

        Raises UserError on a prompt that leaves no room for a token, naming its index.
        """
        ...

    def update_weights(self, path: str, version: int) -> None:
        """Replaces the weights by a published version."""
        ...

    @property
    def version(self) -> int:
        """Of the weights that the next completion is sampled from; 0 is the model folder's."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; nothing works afterwards."""
        ...


class VLLMEngine:
    """vLLM in this process, driven step by step.

    `model` is a folder in checkpoint format. `max_context` bounds prompt and completion together, `max_sequences` how
    many run at once (the others wait). `engine_args` are vLLM's own engine arguments and win over ours. With prefix
    caching, which is off by default, what earlier calls left in the cache changes the last bits of a log-probability.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_context: int,
        max_sequences: int,
        tensor_parallel: int = 1,
        seed: int,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        _check_context(model, max_context)
        self._max_context = max_context
        self._version = 0
        arguments = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_context,
            "max_num_seqs": max_sequences,
            "max_num_batched_tokens": max(max_context, 4096),
            "tensor_parallel_size": tensor_parallel,
            "seed": seed,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "mamba_cache_dtype": "float32",
            "hf_overrides": {"head_dtype": "float32"},
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        with warnings.catch_warnings(), seeded(seed):
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's, while it scans torch
            self._engine = _start(arguments | dict(engine_args or {}))

    @property
    def version(self) -> int:
        return self._version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        from vllm import RequestOutput
        from vllm.inputs import tokens_input
        from vllm.logprobs import FlatLogprobs

        drafts = start_drafts(prompts, sampling, self._max_context)
        params = _sampling_params(sampling, streaming=any(draft.counter for draft in drafts))
        for index, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
            params.max_tokens = draft.limit
            self._engine.add_request(str(index), tokens_input(list(prompt)), params)
        # Seed the process: on a CPU a per-request seed ends vLLM's engine when a prompt is prefilled in parts.
        with seeded(seed):
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    assert isinstance(output, RequestOutput)
                    draft, piece = drafts[int(output.request_id)], output.outputs[0]
                    assert isinstance(piece.logprobs, FlatLogprobs)
                    draft.extend(piece.token_ids, piece.logprobs.logprobs, piece.finish_reason)
                    if draft.reason is FinishReason.REPETITION and not output.finished:
                        self._engine.abort_request([output.request_id])
        return [draft.completion(self._version) for draft in drafts]

    def update_weights(self, path: str, version: int) -> None:
        self._engine.collective_rpc("start_weight_update")
        self._engine.collective_rpc("update_weights", kwargs={"update_info": {"path": str(path)}})
        self._engine.collective_rpc("finish_weight_update")
        emptied = self._engine.reset_prefix_cache()
        assert emptied, "weights change between two calls of generate, when no request holds a block"
        self._version = version

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        del self._engine


def _check_context(model: str, max_context: int) -> None:
    config = Path(model) / "config.json"
    if not config.is_file():
        raise UserError(f"{model} holds no policy: config.json is missing")
    positions = json.loads(config.read_text()).get("max_position_embeddings")
    if positions and max_context > positions:
        raise UserError(f"max_context {max_context} is above the {positions} positions that the policy in {model} has")


def _start(arguments: Mapping[str, Any]) -> LLMEngine:
    """Builds the engine; imports vLLM, which reads the environment, and takes about 9 s in a new process."""
    import torch._dynamo

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch._dynamo.config.disable = True  # the environment is read once, perhaps before now
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # says that a CPU has no Triton

    from vllm import EngineArgs, LLMEngine, ModelRegistry
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    from cispo.policies.vllm_lightning import LightningForCausalLM
    from cispo.policies.vllm_plugin import ARCHITECTURES, register

    device = current_platform.device_type
    if device == "cpu" and arguments["tensor_parallel_size"] > 1:
        raise UserError("tensor_parallel above 1 needs GPUs")
    register()
    for architecture in ARCHITECTURES:
        # The class itself: to look at the lazy one, vLLM starts a process of its own, 8 s on a new machine.
        ModelRegistry.register_model(architecture, LightningForCausalLM)
    register_transfer_backend()
    transfer = WeightTransferConfig(backend=TRANSFER_BACKEND)
    unknown = arguments.keys() - {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown:
        raise UserError(f"rollout.engine_args: vLLM's engine has no argument {min(unknown)!r}")
    settings = EngineArgs(**{"weight_transfer_config": transfer, **_DEVICE_ARGUMENTS[device], **arguments})
    try:
        config = settings.create_engine_config()
    except ValueError as error:
        raise UserError(f"vLLM refuses {arguments['model']}: {_reason(error)}") from error
    if device == "cpu":
        _fit_cpu(config)
    return LLMEngine.from_vllm_config(config, disable_log_stats=settings.disable_log_stats)


def _reason(error: ValueError) -> str:
    """The first complaint, on one line, with the argument that it is about."""
    from pydantic import ValidationError

    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        text = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
    return " ".join(text.split())


def _fit_cpu(config: VllmConfig) -> None:
    """Sizes the cache for this model; UserError where vLLM's attention on a CPU cannot run it."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    model, sizes = config.model_config, CPUAttentionBackend.get_supported_head_sizes()
    if not model.use_mla and model.get_head_size() not in sizes:
        raise UserError(f"head_dim {model.get_head_size()} cannot be sampled on a CPU, which takes one of {sizes}")
    if config.cache_config.kv_cache_memory_bytes is None:
        config.cache_config.kv_cache_memory_bytes = _cache_bytes(config)


def _cache_bytes(config: VllmConfig) -> int:
    """Memory for `max_num_seqs` sequences of full length, at most a quarter of what the machine has free.

    A page holds one block of keys and values of a softmax layer, or the state of one sequence in a linear layer, which
    vLLM pads to whole blocks. Short of pages, vLLM preempts sequences and recomputes them.
    """
    import psutil
    from vllm.model_executor.models import ModelRegistry
    from vllm.utils.torch_utils import get_dtype_size

    model, parallel = config.model_config, config.parallel_config
    softmax = model.get_num_layers_by_block_type(parallel, "attention")
    linear = model.get_num_layers(parallel) - softmax
    block = config.cache_config.block_size
    token_bytes = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * get_dtype_size(model.dtype)
    if linear:
        policy: Any = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)[0]
        shapes = policy.get_mamba_state_shape_from_config(config)
        dtypes = policy.get_mamba_state_dtype_from_config(config)
        state = sum(math.prod(s) * get_dtype_size(d) for s, d in zip(shapes, dtypes, strict=True))
        block *= math.ceil(state / (block * token_bytes))
        # vLLM puts layers of a kind into groups of one size and pads the last group.
        group = min(softmax, linear) or linear
        softmax, linear = (math.ceil(layers / group) * group for layers in (softmax, linear))
    # With prefix caching a sequence keeps the states of up to three blocks.
    states = linear * (3 if config.cache_config.enable_prefix_caching else 1)
    pages = softmax * math.ceil(model.max_model_len / block) + states
    needed = (config.scheduler_config.max_num_seqs + 1) * pages * block * token_bytes
    return min(needed, psutil.virtual_memory().available // 4)


def _sampling_params(sampling: Sampling, streaming: bool) -> SamplingParams:
    """vLLM's form of `sampling`, with the log-probability of the sampled token alone."""
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    rule = sampling.repetition
    pattern = RepetitionDetectionParams(max_pattern_size=rule.pattern_size, min_count=rule.pattern_count)
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        stop_token_ids=list(sampling.eos_ids),
        ignore_eos=True,  # those ids and no other
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if streaming else RequestOutputKind.FINAL_ONLY,
        repetition_detection=pattern if rule.pattern_size else None,
        skip_clone=True,
    )


class TorchEngine:
    """The learner's policy, recomputed from the first token at every step: small, slow, for tests."""

    def __init__(self, model: str, *, dtype: str, max_context: int) -> None:
        _check_context(model, max_context)
        self._policy = load_policy(model, dtype=getattr(torch, dtype)).eval()
        self._max_context = max_context
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        drafts = start_drafts(prompts, sampling, self._max_context)
        with torch.no_grad(), seeded(seed):
            while active := [i for i, draft in enumerate(drafts) if draft.reason is None]:
                logits = self._logits([[*prompts[i], *drafts[i].tokens] for i in active])
                for i, token, logprob in zip(active, *_sample(logits, sampling), strict=True):
                    tokens = [*drafts[i].tokens, token]
                    drafts[i].extend([token], [logprob], _finish_reason(tokens, drafts[i].limit, sampling))
        return [draft.completion(self._version) for draft in drafts]

    def _logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Of the token after each sequence, [S, V] float32."""
        lengths = torch.tensor([len(s) for s in sequences])
        ends = lengths.cumsum(0)
        tokens = torch.tensor([t for s in sequences for t in s])
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        hidden = self._policy(tokens, positions, torch.cat([ends.new_zeros(1), ends]).int()).hidden
        return hidden[ends - 1].float() @ self._policy.lm_head_weight.float().T

    def update_weights(self, path: str, version: int) -> None:
        self._policy.load_hf(mapped_weights(path))
        self._version = version

    def close(self) -> None:
        del self._policy


def _finish_reason(tokens: Sequence[int], limit: int, sampling: Sampling) -> FinishReason | None:
    """Why the last token ends the completion, in vLLM's order of precedence."""
    if tokens[-1] in sampling.eos_ids:
        return FinishReason.STOP
    if len(tokens) >= limit:
        return FinishReason.LENGTH
    if repeats_pattern(tokens, sampling.repetition):
        return FinishReason.REPETITION
    return None


def _sample(logits: Tensor, sampling: Sampling) -> tuple[list[int], list[float]]:
    """One token a row of logits [S, V] and its log-probability in the distribution it was drawn from (greedy: raw)."""
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1, keepdim=True)
    else:
        logprobs = _truncate(logits / sampling.temperature, sampling).log_softmax(-1)
        tokens = logprobs.exp().multinomial(1)
    return tokens.flatten().tolist(), logprobs.gather(-1, tokens).flatten().tolist()


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Masks what min_p, top_k and top_p leave out, in vLLM's order."""
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        smallest = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < smallest, -math.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(-1)
        beyond = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        beyond[:, -1] = False
        logits = logits.masked_fill(beyond.scatter(-1, places, beyond), -math.inf)
    return logits


def make_engine(
    kind: Literal["vllm", "torch"],
    model: str,
    *,
    dtype: str,
    max_context: int,
    max_sequences: int,
    tensor_parallel: int,
    engine_args: Mapping[str, Any],
) -> Engine:
    """The engine that a recipe's rollout.engine names."""
    if kind == "torch":
        return TorchEngine(model, dtype=dtype, max_context=max_context)
    return VLLMEngine(
        model,
        dtype=dtype,
        max_context=max_context,
        max_sequences=max_sequences,
        tensor_parallel=tensor_parallel,
        seed=0,  # every call of generate seeds for itself
        engine_args=engine_args,
    )
