"""vLLM as an engine: in this process, driven step by step, tokens straight from its core.

    generate:  core.add_request ... while unfinished: core.step -> new tokens of each request -> drafts

Where vLLM's second model runner is in use (GPUs), log-probabilities are recorded on the device and fetched at the end
(`recorder`); else they arrive with the tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cispo.rollout.drafts import Draft, seeded, start_drafts
from cispo.rollout.engine import check_model
from cispo.rollout.recorder import LogprobTable
from cispo.rollout.vllm_start import start_vllm
from cispo.types import Completion, FinishReason, Sampling
from cispo.weight_sync import FileMessage, WeightMessage

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutput

# Steps between looks at recorded log-probabilities where a rule may end a completion because of them.
_LOOK_EVERY = 64


@dataclass(slots=True)
class _Request:
    draft: Draft
    id: str
    """vLLM's own."""
    tokens: list[int] = field(default_factory=list)
    """Sampled, and waiting for their log-probabilities."""
    reason: str | None = None


class VLLMEngine:
    """vLLM in this process.

    `model` is a folder in checkpoint format. `max_context` bounds prompt and completion together, `max_sequences` how
    many run at once (the others wait), `memory` the share of a GPU's memory that the cache may take; with `sleeps` it
    can be given back. `engine_args` are vLLM's own engine arguments and win over ours. With prefix caching, which is
    off by default, what earlier calls left in the cache changes the last bits of a log-probability.
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
        memory: float = 0.5,
        sleeps: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model, max_context)
        self._max_context = max_context
        self._version = 0
        self._updating = False
        arguments = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_context,
            "max_num_seqs": max_sequences,
            "max_num_batched_tokens": max(max_context, 4096),
            "tensor_parallel_size": tensor_parallel,
            "seed": seed,
            "skip_tokenizer_init": True,
            "load_format": "safetensors",
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
            "mamba_cache_dtype": "float32",
            "hf_overrides": {"head_dtype": "float32"},
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "enable_sleep_mode": sleeps,
        }
        with warnings.catch_warnings(), seeded(seed):
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's, while it scans torch
            self._engine = start_vllm(arguments | dict(engine_args or {}), memory=memory)
        self._core: Any = self._engine.engine_core
        # A worker on a CPU has no such method: its sampler reports as it goes.
        on_gpu = self._engine.vllm_config.device_config.device_type == "cuda"
        self._records = on_gpu and all(self._engine.collective_rpc("record_logprobs"))

    @property
    def version(self) -> int:
        return self._version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int, limits: Sequence[int] | None = None
    ) -> list[Completion]:
        drafts = start_drafts(prompts, sampling, self._max_context, limits)
        # Seed the process: on a CPU a per-request seed ends vLLM's engine when a prompt is prefilled in parts.
        with seeded(seed):
            requests = self._add(prompts, drafts, sampling, seed)
            rows = {request.id: row for row, request in enumerate(requests)}
            table = None
            if self._records:
                table = LogprobTable(rows, [len(p) for p in prompts], [d.limit for d in drafts])
            looks = any(draft.counter for draft in drafts)
            unfinished, steps = len(requests), 0
            while unfinished:
                for output in self._core.get_output().outputs:
                    request = requests[rows[output.request_id]]
                    unfinished -= self._extend(request, output, later=table is not None)
                steps += 1
                if table is not None and looks and steps % _LOOK_EVERY == 0:
                    unfinished -= self._look(requests, table)
            # With asynchronous scheduling a step that nobody needs may still be on its way.
            while self._core.engine_core.batch_queue:
                self._core.get_output()
            if table is not None:
                self._look(requests, table)
        return [draft.completion(self._version) for draft in drafts]

    def _add(
        self, prompts: Sequence[Sequence[int]], drafts: Sequence[Draft], sampling: Sampling, seed: int
    ) -> list[_Request]:
        from vllm.inputs import tokens_input

        processor, tasks, requests = self._engine.input_processor, self._engine.get_supported_tasks(), []
        common = _sampling_params(sampling)
        for index, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
            params = copy.copy(common)
            params.max_tokens = draft.limit
            if self._records:
                params.seed = (seed + index * 0x9E3779B97F4A7C15) % 2**63
            request = processor.process_inputs(str(index), tokens_input(list(prompt)), params, supported_tasks=tasks)
            processor.assign_request_id(request)
            self._core.add_request(request)
            requests.append(_Request(draft, request.request_id))
        return requests

    def _extend(self, request: _Request, output: EngineCoreOutput, later: bool) -> bool:
        """Adds a request's new tokens; True where that ends it. `later`: their log-probabilities are being recorded."""
        if request.reason is not None:  # cut before, while this step was under way
            return False
        reason = None if output.finish_reason is None else str(output.finish_reason)
        if later:
            request.tokens += output.new_token_ids
            request.reason = reason
            return reason is not None
        logprobs = [] if output.new_logprobs is None else output.new_logprobs.logprobs[:, 0].tolist()
        request.draft.extend(output.new_token_ids, logprobs, reason)
        request.reason = request.draft.reason
        if request.reason is FinishReason.REPETITION and reason is None:
            self._core.abort_requests([request.id])
        return request.reason is not None

    def _look(self, requests: Sequence[_Request], table: LogprobTable) -> int:
        """Gives waiting tokens their log-probabilities; returns how many requests a rule ends because of them."""
        table.add(self._engine.collective_rpc("take_logprobs")[0])
        ended = 0
        for row, request in enumerate(requests):
            if not request.tokens:
                continue
            tokens, request.tokens = request.tokens, []
            done = len(request.draft.tokens)
            request.draft.extend(tokens, table.get(row, done, done + len(tokens)), request.reason)
            if request.reason is None and request.draft.reason is not None:
                request.reason = request.draft.reason
                self._core.abort_requests([request.id])
                ended += 1
        return ended

    def update_weights(self, path: str, version: int) -> None:
        self.receive_weights(FileMessage(str(path)))
        self.finish_update(version)

    def receive_weights(self, message: WeightMessage) -> None:
        """Takes a whole version or one of its buckets; `finish_update` follows the last."""
        if not self._updating:
            self._engine.collective_rpc("start_weight_update")
            self._updating = True
        try:
            self._engine.collective_rpc("update_weights", kwargs={"update_info": {"message": message}})
        except BaseException:
            self._updating = False  # the worker has ended it too
            raise

    def finish_update(self, version: int) -> None:
        """Ends an update. Raises AssertionError where a parameter has not arrived."""
        self._engine.collective_rpc("finish_weight_update")
        self._updating = False
        emptied = self._engine.reset_prefix_cache()
        assert emptied, "weights change between two calls of generate, when no request holds a block"
        self._version = version

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        """Enters the group over which the learner sends weights; its workers take the ranks from the first."""
        info = {"address": address, "first_rank": first_rank, "world": world}
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def sleep(self) -> None:
        self._engine.sleep(1)

    def wake(self) -> None:
        self._engine.wake_up()

    def close(self) -> None:
        self._core.shutdown()
        del self._core, self._engine


def _sampling_params(sampling: Sampling) -> SamplingParams:
    """vLLM's form of `sampling`, with the log-probability of the sampled token alone."""
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams

    rule = sampling.repetition
    pattern = RepetitionDetectionParams(max_pattern_size=rule.pattern_size, min_count=rule.pattern_count)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        stop_token_ids=list(sampling.eos_ids),
        ignore_eos=True,  # those ids and no other
        logprobs=0,
        detokenize=False,
        repetition_detection=pattern if rule.pattern_size else None,
        skip_clone=True,
    )
