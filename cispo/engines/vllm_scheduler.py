"""vLLM's scheduler with a short way for steps in which every running request decodes one token.

    schedule            steady? -> counters of the batch, blocks where a request needs one       else vLLM's own
    update_from_output  of such a step -> tokens appended, stops of the few that may have one    else vLLM's own

vLLM asks about every request in every step: blocks, budgets, encoders, drafts, grammars, and an object for the token;
at 512 sequences that is half of a step's time on the host (docs/performance.md). Where none is admitted and each needs
one token the answers are known. Both ways leave requests, queues, blocks and hashes alike: either may follow the other
from step to step. Whatever is not known to be steady goes vLLM's way whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop, remove_all
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager, SingleTypeKVCacheManager
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from cispo.engines.sampled_tokens import StepTokens
from cispo.engines.vllm_steady import Integers, SteadyBatch, SteadyOutput, SteadyStep, integers
from cispo.policies.vllm_slots import StateManager


class SteadyScheduler(Scheduler):
    """vLLM's scheduler for steps one after the other, and the common part of both."""

    _asynchronous = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch: SteadyBatch | None = None
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._paged = [manager for manager in managers if type(manager) is not StateManager]
        """Managers of groups whose requests need a block every `block_size` tokens."""
        self._copies_states = any(isinstance(manager, MambaManager) for manager in self._paged)
        """Whether a prefix cache keeps states: one more block a state, the one before last given back."""
        self._hashed = self.hash_block_size if self.kv_cache_manager.enable_caching else 0
        """Tokens of a block in the prefix cache; 0 without it."""
        self._may_be_steady = self._plain() and all(map(self._known, managers))

    def _plain(self) -> bool:
        """Whether the engine is set up for decoding alone: nothing here has a part in a step."""
        return self.num_sampled_tokens_per_step == 1 and not any(
            (
                self.connector,
                self.ec_connector,
                self.aux_output_connector,
                self.log_stats,
                self.enable_kv_cache_events,
                self.kv_metrics_collector,
                self.finished_req_ids_dict is not None,
                self.vllm_config.speculative_config,
                self.num_lookahead_tokens,
                self.prefix_replay_tokens,
                self.use_pp,
                self.is_encoder_decoder,
                self.is_mm_encoder_only,
                self.return_sampling_mask,
                self.defer_block_free,
                self.dcp_world_size * self.pcp_world_size > 1,
            )
        )

    def _known(self, manager: SingleTypeKVCacheManager) -> bool:
        """Whether a decoding request changes the manager's books at the ends of blocks alone."""
        if self._hashed and manager.block_size != self._hashed:
            return False
        if type(manager) is MambaManager:
            copies = manager.mamba_cache_mode == "align" and not manager.has_prefill_checkpoint_blocks
            return bool(self._hashed) and copies and not manager.num_speculative_blocks
        return type(manager) is FullAttentionManager or (type(manager) is StateManager and not self._hashed)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._batch = None if throttle_prefills else self._steady_batch()
        if self._batch is None:
            return super().schedule(throttle_prefills)
        return self._schedule_steady(self._batch)

    def _steady_batch(self) -> SteadyBatch | None:
        """The batch of the next step, None where that is not steady."""
        admits = len(self.running) + self.num_waiting_for_streaming_input < self.max_num_active_reqs
        waiting = admits and (self.waiting or self.kv_holding_waiting)
        if not self._may_be_steady or waiting or self._pause_state != PauseState.UNPAUSED:
            return None
        batch = self._batch
        if batch is not None and batch.step == self.current_step:
            batch = self._left(batch)
        else:
            batch = self._new_batch()
        if batch is None or batch.step >= batch.last:
            return None
        needed = np.count_nonzero(batch.computed >= batch.room) * len(self._paged)
        # Short of blocks vLLM preempts a request.
        return batch if needed <= self.kv_cache_manager.block_pool.get_num_free_blocks() else None

    def _left(self, batch: SteadyBatch) -> SteadyBatch | None:
        """The batch of the last step without requests that have ended since."""
        if batch.requests == self.running:
            return batch
        rows = [row for row, request in enumerate(batch.requests) if request.status == RequestStatus.RUNNING]
        if not rows or [batch.requests[row] for row in rows] != self.running:
            return self._new_batch()
        part = batch.part(rows)
        self._scheduled_together(part.ids)
        return part

    def _new_batch(self) -> SteadyBatch | None:
        requests = self.running.copy()
        budget = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        if not 0 < len(requests) <= budget or not all(map(self._decodes, requests)):
            return None
        ids = [request.request_id for request in requests]
        if not self.use_v2_model_runner and not self.prev_step_scheduled_req_ids.issuperset(ids):
            return None  # vLLM's first model runner is sent all tokens of a request that missed a step
        self._scheduled_together(ids)
        return SteadyBatch.of(requests, self._room(ids), longest=self.max_model_len, step=self.current_step)

    def _scheduled_together(self, ids: Sequence[str]) -> None:
        """Notes which requests the next step schedules, where vLLM does."""
        if not self.use_v2_model_runner:
            self.prev_step_scheduled_req_ids.clear()
            self.prev_step_scheduled_req_ids.update(ids)

    def _decodes(self, request: Request) -> bool:
        """Whether the next step samples one token of the request and does nothing else for it."""
        return (
            request.num_tokens + request.num_output_placeholders - request.num_computed_tokens == 1
            and request.prefill_stats is None
            and not request.is_prefill_chunk
            and not request.spec_token_ids
            and not request.num_stale_output_tokens
            and not request.mm_features
            and not request.resumable
            and not request.client_index
            and request.structured_output_request is None
            and request.sampling_params is not None
            and request.sampling_params.num_logprobs is not None
            and request.next_decode_eligible_step <= self.current_step + 1
        )

    def _room(self, ids: Sequence[str]) -> Integers:
        """[ids] Tokens for which every group has blocks."""
        return integers(
            min((len(m.req_to_blocks[i]) * m.block_size for m in self._paged), default=self.max_model_len) for i in ids
        )

    def _new_blocks(self, batch: SteadyBatch) -> list[tuple[list[int], ...] | None]:
        """As `KVCacheManager.allocate_slots` of one token for each request: [rows] numbers of new blocks by group."""
        full = batch.computed >= batch.room
        asked = full
        if self._hashed:
            # A block is cached once its last token is known, up to two steps after that was scheduled, and the state
            # before it is given back a step later. Requests just read may hold states of their prompts.
            fresh = self._copies_states and batch.step < batch.first + 3
            asked = full | ((batch.computed + 1) % self._hashed < 4) | fresh
        found: list[tuple[list[int], ...] | None] = [None] * len(batch.ids)
        for row in np.flatnonzero(asked).tolist():
            found[row] = self._allocated(batch.requests[row], full=bool(full[row]))
        grown = np.flatnonzero(full).tolist()
        if grown:
            batch.room[grown] = self._room([batch.ids[row] for row in grown])
        return found

    def _allocated(self, request: Request, *, full: bool) -> tuple[list[int], ...] | None:
        """Numbers of a request's new blocks by group, None without any; `full` says whether it needs one."""
        if self._copies_states:
            blocks = self.kv_cache_manager.allocate_slots(request, 1)
            assert blocks is not None, "a free block was counted for every request that needs one"
            return blocks.get_block_ids(allow_none=True)
        # What is left of `allocate_slots` where no running request gives a block back.
        coordinator, tokens, added = self.kv_cache_manager.coordinator, request.num_computed_tokens + 1, ()
        if full:
            added = coordinator.allocate_new_blocks(request.request_id, tokens, tokens)
        if self._hashed and request.num_tokens % self._hashed == 0:
            coordinator.cache_blocks(request, min(tokens, request.num_tokens))
        return tuple([block.block_id for block in group] for group in added) or None

    def _schedule_steady(self, batch: SteadyBatch) -> SchedulerOutput:
        """As `Scheduler.schedule` where each request of the batch decodes and none is admitted."""
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        blocks = self._new_blocks(batch)
        self.prefill_capacity_bound = self.get_request_counts()[1] > len(self.deferred_waiting)
        self.kv_cache_manager.take_boundary_state_offloads()
        output = SteadyOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=batch.ids.copy(),
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=blocks,
                num_computed_tokens=batch.computed.tolist(),
                num_output_tokens=(batch.computed + 1 - batch.prompts).tolist(),
            ),
            num_scheduled_tokens=dict.fromkeys(batch.ids, 1),
            total_num_scheduled_tokens=len(batch.ids),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
            ec_manager_metadata=self.encoder_cache_manager.get_manager_metadata(),
            steady=SteadyStep(batch, batch.computed),
        )
        self.finished_req_ids, self.reset_preempted_req_ids = set(), set()
        self._count_scheduled(batch.requests)
        batch.computed = batch.computed + 1
        batch.step = self.current_step
        return output

    def _count_scheduled(self, requests: Sequence[Request]) -> None:
        """As `Scheduler._update_after_schedule`."""
        for request in requests:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step = scheduler_output.steady if isinstance(scheduler_output, SteadyOutput) else None
        rows = None if step is None else self._running_rows(step, model_runner_output)
        if step is None or rows is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        return self._update_steady(step, rows, model_runner_output)

    def _running_rows(self, step: SteadyStep, output: ModelRunnerOutput) -> list[int] | None:
        """Rows of a step whose requests have not ended since; None where anything else has happened."""
        statuses = [request.status for request in step.batch.requests]
        rows = list(range(len(statuses)))
        if statuses.count(RequestStatus.RUNNING) < len(statuses):
            if any(status < RequestStatus.RUNNING or status == RequestStatus.PREEMPTED for status in statuses):
                return None
            rows = [row for row, status in enumerate(statuses) if status == RequestStatus.RUNNING]
        other = (
            output.pooler_output
            or output.num_nans_in_logits
            or output.kv_connector_output
            or output.ec_connector_output
            or any(output.prompt_logprobs_dict.values())
            or output.prompt_token_id_logprobs_dict
            or (output.logprobs is not None and output.logprobs.cu_num_generated_tokens is not None)
            or self.grammar_compile_error_reqs
            or self.encoder_cache_mismatch_reqs
            or any(request.num_stale_output_tokens for request in step.batch.requests)
            or set(map(len, output.sampled_token_ids)) != {1}
        )
        return None if other else rows

    def _update_steady(
        self, step: SteadyStep, rows: Sequence[int], output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As `Scheduler.update_from_output` where each of `rows` has sampled a token."""
        batch, whole = step.batch, len(rows) == len(step.batch.ids)
        requests = batch.requests if whole else [batch.requests[row] for row in rows]
        ids = batch.ids if whole else [batch.ids[row] for row in rows]
        # vLLM's first model runner has an order of its own.
        places = range(len(ids)) if output.req_ids == ids else [output.req_id_to_index[i] for i in ids]
        tokens = [output.sampled_token_ids[place][0] for place in places]
        logprobs = None if output.logprobs is None else output.logprobs.logprobs[list(places), 0].tolist()
        self._append(requests, tokens)
        computed, limits = (step.computed, batch.limits) if whole else (step.computed[rows], batch.limits[rows])
        checked = np.flatnonzero(computed + 2 >= limits).tolist()
        if batch.watched:
            checked += [place for place, row in enumerate(rows) if row in batch.watched]
        if not batch.stops.isdisjoint(tokens):
            checked += [place for place, token in enumerate(tokens) if token in batch.stops]
        if self._hashed:
            for place in np.flatnonzero((computed + 2) % self._hashed == 0).tolist():
                requests[place].update_block_hashes()
        ended = [place for place in sorted(set(checked)) if check_stop(requests[place], self.max_model_len)]
        if self._hashed and self._asynchronous:
            for place in np.flatnonzero((computed + 1) % self._hashed == 0).tolist():
                self.kv_cache_manager.cache_blocks(requests[place], int(computed[place]) + 1)
        reasons = {}
        for place in ended:
            reasons[place] = str(requests[place].get_finished_reason())
            self._free_request(requests[place])
        if ended:
            self.running = remove_all(self.running, {requests[place] for place in ended})
        if not ids:
            return {}
        # Typed as a list of objects; `VLLMEngine` alone reads it.
        taken: Any = StepTokens(ids, tokens, logprobs, reasons)
        return {0: EngineCoreOutputs(outputs=taken)}

    def _append(self, requests: Sequence[Request], tokens: Sequence[int]) -> None:
        """As `Scheduler._update_request_with_output`, hashes and stops left out."""
        for request, token in zip(requests, tokens, strict=True):
            request.num_in_flight_tokens -= 1
            request._output_token_ids.append(token)
            request._all_token_ids.append(token)


class SteadyAsyncScheduler(SteadyScheduler, AsyncScheduler):
    """vLLM's scheduler for steps that are scheduled before the tokens of the last are known."""

    _asynchronous = True

    def _count_scheduled(self, requests: Sequence[Request]) -> None:
        if not self.use_v2_model_runner:
            for request in requests:
                request.num_computed_tokens += 1
                request.num_in_flight_tokens += 1
                request.num_output_placeholders += 1
            return
        eligible = self.current_step + self.decode_stagger
        for request in requests:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders += 1
            request.next_decode_eligible_step = eligible

    def _append(self, requests: Sequence[Request], tokens: Sequence[int]) -> None:
        for request, token in zip(requests, tokens, strict=True):
            request.num_in_flight_tokens -= 1
            request.num_output_placeholders -= 1
            request._output_token_ids.append(token)
            request._all_token_ids.append(token)
