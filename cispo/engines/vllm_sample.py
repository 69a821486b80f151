"""vLLM's sampling of one token a request in two launches, its numbers bit for bit.

    logits -> vLLM's processors (only where a request sets any) -> noise: a maximum a block -> close: the rest

vLLM launches eleven small kernels from Python, which costs the host more than the GPU. Here the token's rank, which
`RecordingSampler` does not keep, is left out, and one kernel picks the token, takes its log-probability with vLLM's own
code and counts it. Steps of any other kind go to vLLM's sampler.
"""

# pyright: reportIndexIssue=false
# A kernel is launched as kernel[grid](...); without Triton the checker sees a plain function.

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import _gumbel_sample_kernel
from vllm.v1.worker.gpu.sample.logprob import _topk_log_softmax_kernel
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

# Logits a program of vLLM's kernel of the noise takes, and of a pass of its softmax: the sums' order depends on it.
_BLOCK = 1024


@triton.jit
def _close_kernel(
    tokens,
    logprobs,
    positions,
    num_sampled,
    num_rejected,
    block_tokens,
    block_maxima,
    blocks,
    logits,
    logits_stride,
    input_positions,
    seq_lens,
    idx_mapping,
    prefill_len,
    vocab_size,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: its token out of the blocks', log-probability, position, and counts of vLLM's output."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    maxima = tl.load(block_maxima + row * blocks + block, mask=block < blocks, other=float("-inf"))
    # NaN is the maximum as in torch.argmax, and the index stays inside of the blocks.
    winner = tl.argmax(tl.where(maxima != maxima, float("inf"), maxima), axis=0)
    tl.store(tokens + row, tl.load(block_tokens + row * blocks + winner))
    tl.store(positions + row, tl.load(input_positions + row) + 1)
    finished_prompt = tl.load(seq_lens + row) >= tl.load(prefill_len + tl.load(idx_mapping + row))
    tl.store(num_sampled + row, finished_prompt.to(tl.int32))
    tl.store(num_rejected + row, 0)
    tl.debug_barrier()  # every thread reads the token that one has stored
    _topk_log_softmax_kernel(
        logprobs, logits, logits_stride, tokens, 1, 1, vocab_size, BLOCK_SIZE=BLOCK, TOPK_BLOCK_SIZE=1
    )


class Sampled(NamedTuple):
    """A step's samples, a row a request."""

    output: SamplerOutput
    """Without log-probabilities."""
    positions: Tensor
    """[rows] int64: position of the sampled token in its sequence, prompt included."""
    logprobs: Tensor
    """[rows] float32."""


class _ModelRunner(Protocol):
    sampler: Sampler
    batch_sharder: object | None


class FusedSampler:
    """Samples as vLLM's sampler does, the steps that ask for no more than `Sampled`."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        states = sampler.sampling_states
        self._blocks = -(-states.vocab_size // _BLOCK)
        device = sampler.req_states.device
        # Scratch of one step, overwritten by the next one on the same stream.
        self._tokens = torch.empty(states.max_num_reqs, self._blocks, dtype=torch.int64, device=device)
        self._maxima = torch.empty(states.max_num_reqs, self._blocks, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, runner: _ModelRunner) -> "FusedSampler | None":
        """None where an option of the engine asks for more than tokens and their log-probabilities."""
        sampler = runner.sampler
        if type(sampler) is not Sampler or runner.batch_sharder is not None:
            return None
        more = sampler.compute_nans or sampler.use_fp64_gumbel or sampler.return_sampling_mask
        if more or sampler.trace_replay_state is not None or sampler.logprobs_mode != "processed_logprobs":
            return None
        return cls(sampler)

    def __call__(self, logits: Tensor, batch: InputBatch) -> Sampled | None:
        """None where a request has drafts, or asks for more than the log-probability of the sampled token."""
        rows, vocab_size = len(batch.idx_mapping_np), self._sampler.sampling_states.vocab_size
        if batch.num_draft_tokens or logits.shape != (rows, vocab_size):
            return None
        if self._sampler.get_logprobs_dims(batch.idx_mapping_np) != (0, 0):
            return None
        # Where every request reads one token, the positions are in the order of the logits.
        one_each = batch.num_tokens == rows
        input_positions = batch.positions[:rows] if one_each else batch.positions[batch.logits_indices]
        logits = self._processed(logits, batch, input_positions)
        states = self._sampler.sampling_states
        _gumbel_sample_kernel[(rows, self._blocks)](
            self._tokens,
            self._blocks,
            self._maxima,
            self._blocks,
            None,
            0,
            0,
            None,
            None,
            0,
            logits,
            logits.stride(0),
            batch.expanded_idx_mapping,
            states.seeds.gpu,
            input_positions,
            states.temperature.gpu,
            vocab_size,
            BLOCK_SIZE=_BLOCK,
            IS_DRAFTING=False,
            APPLY_TEMPERATURE=False,
            USE_FP64=False,
            PER_TOKEN_COL=False,
        )
        tokens = torch.empty((rows, 1), dtype=torch.int64, device=logits.device)
        positions = torch.empty_like(input_positions)
        logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
        num_sampled = batch.seq_lens.new_empty(rows)
        num_rejected = batch.seq_lens.new_empty(rows)
        _close_kernel[(rows,)](
            tokens,
            logprobs,
            positions,
            num_sampled,
            num_rejected,
            self._tokens,
            self._maxima,
            self._blocks,
            logits,
            logits.stride(0),
            input_positions,
            batch.seq_lens,
            batch.idx_mapping,
            self._sampler.req_states.prefill_len.gpu,
            vocab_size,
            BLOCKS=1 << (self._blocks - 1).bit_length(),
            BLOCK=_BLOCK,
        )
        return Sampled(SamplerOutput(tokens, None, None, num_sampled, num_rejected), positions, logprobs)

    def _processed(self, logits: Tensor, batch: InputBatch, input_positions: Tensor) -> Tensor:
        """The logits after everything that requests set, in vLLM's order."""
        sampler, rows = self._sampler, batch.idx_mapping_np
        if sampler.needs_logits_processing[rows].any():
            logits = sampler.apply_sampling_params(
                logits,
                batch.expanded_idx_mapping,
                batch.idx_mapping,
                rows,
                input_positions,
                batch.input_ids[batch.logits_indices],
                batch.expanded_local_pos,
                batch.seq_lens_cpu_upper_bound.numpy(),
                skip_top_k_top_p=True,
            )
        top_k, top_p = sampler.sampling_states.get_top_k_top_p(batch.expanded_idx_mapping, rows)
        return apply_top_k_top_p(logits, top_k, top_p)
