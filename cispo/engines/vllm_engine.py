"""vLLM as an engine: in this process, driven step by step, tokens straight from its core.

    submit -> core.add_request      step -> core.get_output -> new tokens of each request -> drafts

With vLLM's second model runner (GPUs), log-probabilities are recorded on the device and fetched when drafts end
(`vllm_logprobs`); otherwise they arrive with the tokens.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import nn

from cispo.engines.drafts import Draft
from cispo.engines.engine import check_model
from cispo.engines.random_stream import seeded
from cispo.engines.sampled_tokens import SampledTokens, StepTokens
from cispo.engines.vllm_logprobs import PendingLogprobs
from cispo.engines.vllm_routes import RouteTable
from cispo.engines.vllm_start import start_vllm
from cispo.runtime.start_parts import Parts
from cispo.types import Sampling
from cispo.weights.buckets import tensor_checksum
from cispo.weights.publish import WeightMessage

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutput


class VLLMEngine:
    """vLLM in this process.

    `model` is a folder in checkpoint format. `max_context` bounds prompt and completion together, `max_sequences` the
    sequences at a time, `memory` the share of a GPU's memory that the cache may take; with `sleeps` it can be given
    back. `engine_args` are vLLM's own engine arguments and win over ours. With prefix caching, which is off by default,
    blocks that earlier calls left in the cache change the last bits of a log-probability. With `record_routes`
    completions carry the experts of their tokens. Without `read_weights` the weights are undefined until an update.
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
        engine_args: Mapping[str, object] | None = None,
        record_routes: bool = False,
        read_weights: bool = True,
    ) -> None:
        check_model(model, max_context)
        self.max_context, self.max_sequences = max_context, max_sequences
        self.sampled = 0
        self._requests: dict[str, Draft] = {}
        """By vLLM's internal id."""
        self._numbers = itertools.count()
        self._updates = 0
        self._updating = False
        """Whether vLLM has been told of an update that is not finished."""
        arguments: dict[str, object] = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": max_context,
            "max_num_seqs": max_sequences,
            "max_num_batched_tokens": max(max_context, 4096),
            "tensor_parallel_size": tensor_parallel,
            "seed": seed,
            "skip_tokenizer_init": True,
            "load_format": "safetensors" if read_weights else "dummy",
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
            arguments |= dict(engine_args or {})
            self.start_parts = Parts()
            """Seconds of the start by its parts."""
            self._engine = start_vllm(arguments, memory=memory, record_routes=record_routes, parts=self.start_parts)
        from vllm.v1.engine.core_client import InprocClient

        core = self._engine.engine_core
        assert isinstance(core, InprocClient), "vLLM's core runs in this process"
        self._core = core
        # A worker on a CPU has no such method: its sampler returns log-probabilities with the tokens.
        on_gpu = self._engine.vllm_config.device_config.device_type == "cuda"
        records = on_gpu and all(self._engine.collective_rpc("record_logprobs"))
        self._drafts = self._engine.vllm_config.speculative_config is not None
        if self._drafts:
            self._engine.collective_rpc("sample_drafts")
        self._pending = self._recorded() if records else None
        self._routes = self._recorded_routes() if record_routes else None
        self._caches = self._engine.vllm_config.cache_config.enable_prefix_caching

    def _recorded(self) -> PendingLogprobs:
        rpc = self._engine.collective_rpc
        return PendingLogprobs(lambda: rpc("send_logprobs"), lambda: rpc("take_logprobs"), self.max_context)

    def _recorded_routes(self) -> RouteTable:
        rpc = self._engine.collective_rpc
        rpc("record_routes")
        caches = self._engine.vllm_config.cache_config.enable_prefix_caching
        sizes = {"rows": self.max_sequences, "width": self.max_context}
        return RouteTable(lambda: rpc("take_routes"), **sizes, caches=caches)

    def submit(self, drafts: Sequence[Draft]) -> None:
        from vllm.inputs import tokens_input

        processor, tasks = self._engine.input_processor, self._engine.get_supported_tasks()
        common = {sampling: _sampling_params(sampling) for sampling in {draft.sampling for draft in drafts}}
        requests: dict[str, Draft] = {}
        for draft in drafts:
            params = copy.copy(common[draft.sampling])
            params.max_tokens = draft.limit
            if self._pending is not None:  # vLLM's second model runner draws each request from a stream of its own
                params.seed = draft.seed
            # Drafts that keep their cache through an update share it with none that begin after it.
            salt = f"{self._updates} {draft.cache}".rstrip() if self._caches else None
            prompt = tokens_input(list(draft.prompt), cache_salt=salt)
            request = processor.process_inputs(str(next(self._numbers)), prompt, params, supported_tasks=tasks)
            processor.assign_request_id(request)
            self._core.add_request(request)
            requests[request.request_id] = draft
        self._requests |= requests
        if self._pending is not None:
            self._pending.open(requests)
        if self._routes is not None:
            for request, draft in requests.items():
                self._routes.open(request, draft.prompt, self._updates)

    def step(self) -> list[Draft]:
        complete = self._take(self._core.get_output().outputs)
        if self._pending is None:
            return complete
        complete += self._extend(self._pending.arrived())  # a step after the fetch began: there is no wait
        if self._pending.fetch_due():
            complete += self._extend(self._pending.arrived())
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
        if self._pending is not None:
            complete += self._extend(self._pending.arrived())
            self._pending.fetch(running=True)
            complete += self._extend(self._pending.arrived())
        return complete

    def drop(self, drafts: Sequence[Draft]) -> None:
        dropped = set(drafts)
        requests = [request for request, draft in self._requests.items() if draft in dropped]
        self._core.abort_requests(requests)  # vLLM ignores those that have ended
        self._forget(requests)

    def _take(self, outputs: Sequence[EngineCoreOutput] | StepTokens) -> list[Draft]:
        """Adds the tokens of a step to their requests; returns the drafts completed by them."""
        if isinstance(outputs, StepTokens):
            return self._take_step(outputs)
        # Others were dropped, or ended by a rule, while this step was under way.
        outputs = [output for output in outputs if output.request_id in self._requests]
        self.sampled += sum(len(output.new_token_ids) for output in outputs)
        for output in outputs if self._caches else ():
            if output.prefill_stats is not None:
                self._requests[output.request_id].cached = output.prefill_stats.num_cached_tokens
        for output in outputs if self._drafts else ():
            self._requests[output.request_id].accepted += max(len(output.new_token_ids) - 1, 0)
        if self._pending is None:
            return self._extend(map(_sampled_tokens, outputs))
        for output in outputs:
            self._pending.add(output.request_id, output.new_token_ids, _reason(output))
        return []

    def _take_step(self, step: StepTokens) -> list[Draft]:
        """As `_take`, for a step whose requests all decode."""
        step = step.only(self._requests)
        self.sampled += len(step.tokens)
        if self._pending is None:
            return self._extend(step.split())
        self._pending.add_step(step)
        return []

    def _extend(self, sampled: Iterable[SampledTokens]) -> list[Draft]:
        """Extends drafts by tokens with log-probabilities; returns those that are complete."""
        complete = []
        for request, tokens, logprobs, reason in sampled:
            draft = self._requests[request]
            draft.extend(tokens, logprobs, reason)
            if draft.reason is not None:
                complete.append(request)
                if reason is None:  # ended by a rule
                    self._core.abort_requests([request])
        if self._routes is not None and complete:
            self._routes.update()
            for request in complete:
                draft = self._requests[request]
                draft.routed_experts = self._routes.get(request, draft.tokens)
        return self._forget(complete)

    def _forget(self, requests: Sequence[str]) -> list[Draft]:
        if self._pending is not None:
            self._pending.close(requests)
        if self._routes is not None:
            for request in requests:
                self._routes.close(request)
        return [self._requests.pop(request) for request in requests]

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

    def weight_checksums(self) -> dict[str, int]:
        """Checksum of each of the model's parameters; of several workers, under the name and the worker's number."""
        by_worker = self._engine.collective_rpc(_checksums)
        if len(by_worker) == 1:
            return by_worker[0]
        return {f"{name}/{n}": value for n, own in enumerate(by_worker) for name, value in own.items()}

    def join_broadcast(self, address: str, first_rank: int, world: int) -> None:
        info = {"address": address, "first_rank": first_rank, "world": world}
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def sleep(self) -> None:
        self._engine.sleep(1)

    def wake(self) -> None:
        self._engine.wake_up()

    def close(self) -> None:
        self._core.shutdown()
        del self._core, self._engine, self._pending, self._routes


class _Worker(Protocol):
    """vLLM's worker, as far as checksums need it."""

    def get_model(self) -> nn.Module: ...


def _checksums(worker: _Worker) -> dict[str, int]:
    """Runs in each worker."""
    return {name: tensor_checksum(weight) for name, weight in worker.get_model().named_parameters()}


def _reason(output: EngineCoreOutput) -> str | None:
    return None if output.finish_reason is None else str(output.finish_reason)


def _sampled_tokens(output: EngineCoreOutput) -> SampledTokens:
    """Tokens of a step with the log-probabilities that came along."""
    logprobs = [] if output.new_logprobs is None else output.new_logprobs.logprobs[:, 0].tolist()
    return SampledTokens(output.request_id, output.new_token_ids, logprobs, _reason(output))


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
