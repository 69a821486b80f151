"""vLLM as an engine: in this process, driven step by step, tokens straight from its core.

    submit -> core.add_request      step -> core.get_output -> new tokens of each request -> drafts

Where vLLM's second model runner is in use (GPUs), log-probabilities are recorded on the device and fetched when drafts
end (`recorder`); else they arrive with the tokens.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cispo.engines.drafts import Draft
from cispo.engines.engine import check_model
from cispo.engines.random_stream import seeded
from cispo.engines.vllm_logprobs import LogprobTable
from cispo.engines.vllm_start import start_vllm
from cispo.types import Sampling
from cispo.weights.publish import WeightMessage

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutput

# Steps between looks at recorded log-probabilities where a rule may end a request because of them.
_LOOK_FOR_RULES = 64


@dataclass(slots=True)
class _Submission:
    """Drafts that came together: nobody waits for one of them before all have ended."""

    left: int


@dataclass(slots=True)
class _Request:
    draft: Draft
    id: str
    """vLLM's own."""
    submission: _Submission
    tokens: list[int] = field(default_factory=list)
    """Sampled, and waiting for their log-probabilities."""
    reason: str | None = None
    """Why vLLM ended it."""


class VLLMEngine:
    """vLLM in this process.

    `model` is a folder in checkpoint format. `max_context` bounds prompt and completion together, `max_sequences` how
    many there may be at once, `memory` the share of a GPU's memory that the cache may take; with `sleeps` it can be
    given back. `engine_args` are vLLM's own engine arguments and win over ours. With prefix caching, which is
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
        self.max_context, self.max_sequences = max_context, max_sequences
        self.sampled = 0
        self._requests: dict[str, _Request] = {}
        self._ended = 0
        """Requests that vLLM has ended, and whose last tokens wait for their log-probabilities."""
        self._awaited = False
        """Whether all of a submission is among them."""
        self._looking: list[tuple[_Request, int]] | None = None
        """Whose tokens are to get their log-probabilities, and how many, from what is on its way to the host."""
        self._numbers = itertools.count()
        self._updates = 0
        self._updating = False
        self._steps = 0
        """Since the last look at everybody's."""
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
        records = on_gpu and all(self._engine.collective_rpc("record_logprobs"))
        self._table = LogprobTable(max_context) if records else None
        self._caches = self._engine.vllm_config.cache_config.enable_prefix_caching

    def submit(self, drafts: Sequence[Draft]) -> None:
        from vllm.inputs import tokens_input

        processor, tasks = self._engine.input_processor, self._engine.get_supported_tasks()
        # Drafts that began before an update and keep what was computed then share it with none that begin after it.
        salt = str(self._updates) if self._caches else None
        common = {sampling: _sampling_params(sampling) for sampling in {draft.sampling for draft in drafts}}
        submission = _Submission(len(drafts))
        for draft in drafts:
            params = copy.copy(common[draft.sampling])
            params.max_tokens = draft.limit
            if self._table is not None:
                params.seed = draft.seed
            prompt = tokens_input(list(draft.prompt), cache_salt=salt)
            request = processor.process_inputs(str(next(self._numbers)), prompt, params, supported_tasks=tasks)
            processor.assign_request_id(request)
            self._core.add_request(request)
            self._requests[request.request_id] = _Request(draft, request.request_id, submission)
            if self._table is not None:
                self._table.open(request.request_id, start=len(draft.prompt), limit=draft.limit)

    def step(self) -> list[Draft]:
        complete = self._take(self._core.get_output().outputs)
        if self._table is None:
            return complete
        self._steps += 1
        # A step has gone by since they were sent, so they are there.
        complete = self._see()
        for_rules = self._steps >= _LOOK_FOR_RULES and any(r.draft.counter for r in self._requests.values())
        if self._awaited or for_rules:
            self._look(everybody=for_rules)
            if self._ended == len(self._requests):  # no step is to come
                complete += self._see()
        return complete

    def settle(self) -> list[Draft]:
        from vllm.v1.core.sched.interface import PauseState

        complete, core = [], self._core.engine_core
        if core.batch_queue:
            # Asynchronous scheduling would put another step behind the one on its way.
            core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
            while core.batch_queue:
                complete += self._take(self._core.get_output().outputs)
            core.scheduler.set_pause_state(PauseState.UNPAUSED)
        if self._table is None:
            return complete
        complete += self._see()
        self._look(everybody=True)
        return complete + self._see()

    def drop(self, drafts: Sequence[Draft]) -> None:
        dropped = set(drafts)
        requests = [request for request in self._requests.values() if request.draft in dropped]
        self._core.abort_requests([request.id for request in requests if request.reason is None])
        self._forget(requests)

    def _take(self, outputs: Sequence[EngineCoreOutput]) -> list[Draft]:
        """Adds what a step sampled to the requests; returns drafts that this completes."""
        complete = []
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:  # dropped, or cut by a rule, while this step was under way
                continue
            self.sampled += len(output.new_token_ids)
            reason = None if output.finish_reason is None else str(output.finish_reason)
            if self._table is not None:
                request.tokens += output.new_token_ids
                request.reason = reason
                if reason is not None:
                    self._end(request)
                continue
            logprobs = [] if output.new_logprobs is None else output.new_logprobs.logprobs[:, 0].tolist()
            request.draft.extend(output.new_token_ids, logprobs, reason)
            if request.draft.reason is not None:
                complete.append(request)
                if reason is None:
                    self._core.abort_requests([request.id])
        return self._forget(complete)

    def _look(self, *, everybody: bool) -> None:
        """Sends for the log-probabilities of requests that have ended, or of all: `_see` gives them to their tokens."""
        self._engine.collective_rpc("send_logprobs")
        asking = (r for r in self._requests.values() if r.tokens and (everybody or r.reason is not None))
        self._looking = [(request, len(request.tokens)) for request in asking]
        self._awaited = False
        if everybody:
            self._steps = 0

    def _see(self) -> list[Draft]:
        """Gives tokens the log-probabilities that were sent for; returns the drafts that are complete with them."""
        if self._looking is None:
            return []
        assert self._table is not None
        self._table.add(self._engine.collective_rpc("take_logprobs")[0])
        looking, self._looking = self._looking, None
        complete = []
        for request, count in looking:
            if request.id not in self._requests:  # dropped meanwhile
                continue
            tokens, request.tokens = request.tokens[:count], request.tokens[count:]
            draft, done = request.draft, len(request.draft.tokens)
            # The end is not seen before the last token is.
            reason = None if request.tokens else request.reason
            draft.extend(tokens, self._table.get(request.id, done, done + count), reason)
            if draft.reason is not None:
                complete.append(request)
                if request.reason is None:  # a rule's
                    self._core.abort_requests([request.id])
        return self._forget(complete)

    def _end(self, request: _Request) -> None:
        """vLLM is done with a request, whose last tokens may wait for their log-probabilities."""
        self._ended += 1
        request.submission.left -= 1
        self._awaited |= request.submission.left == 0

    def _forget(self, requests: Sequence[_Request]) -> list[Draft]:
        for request in requests:
            del self._requests[request.id]
            if request.reason is None:  # dropped, or ended by a rule
                self._end(request)
            self._ended -= 1
            if self._table is not None:
                self._table.close(request.id)
        return [request.draft for request in requests]

    def receive_weights(self, message: WeightMessage) -> None:
        if not self._updating:
            self._engine.collective_rpc("start_weight_update")
            self._updating = True
        try:
            self._engine.collective_rpc("update_weights", kwargs={"update_info": {"message": message}})
        except BaseException:
            self._updating = False  # the worker has ended it too
            raise

    def finish_update(self, *, recompute: bool) -> None:
        self._engine.collective_rpc("finish_weight_update")
        self._updating = False
        self._updates += 1
        if recompute:
            self._core.reset_prefix_cache(reset_running_requests=True)

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
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
