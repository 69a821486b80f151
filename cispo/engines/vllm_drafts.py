"""Tokens of a step with drafts: each position samples its own token, and a draft counts while it equals that token.

    logits of a sequence's last token and its k drafts -> k + 1 samples -> the run up to the first that is no draft

A draft is one certain token: what followed an n-gram before, or the most likely one to a head of multi-token prediction
(`hybrid.vllm_heads`). To accept it with the policy's probability and to draw from the rest otherwise,
which is rejection sampling (arXiv 2211.17192), is then the same as to sample as if there were no draft and to compare:
every token has the policy's distribution, and the log-probability of its own row of logits. vLLM's second model runner
draws by (seed, position), so that there the tokens are also those of an engine without drafts.

vLLM 0.32's own samplers do not do: on a CPU its `expand_kernel` leaves temperature, top-p and top-k of the rows with a
draft unset, its first runner leaves min_p out for them, and the second's rejection sampling draws other noise.
"""

# pyright: reportIndexIssue=false
# A kernel is launched as kernel[grid](...); without Triton the checker sees a plain function.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.outputs import SamplerOutput as FirstOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as FirstSampler
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import gather_draft_sampled, get_max_chunk_logits

# What vLLM's first runner takes for "no token" in a row of samples.
_NONE = -1


class DraftCounts(NamedTuple):
    """Drafts since the start."""

    drafted: int
    accepted: int


class Record(Protocol):
    """`RecordingSampler.record`: requests, positions, log-probabilities and whether a row counts, a row a sample."""

    def __call__(self, requests: Sequence[str], positions: Tensor, logprobs: Tensor, sampled: Tensor) -> None: ...


@triton.jit
def _runs_kernel(
    by_sequence,
    lengths,
    rejected,
    counted,
    accepted,
    tokens,
    drafts,
    bounds,
    seq_lens,
    slots,
    prefill_len,
    width,
    PLACES: tl.constexpr,
):
    """One program a sequence."""
    row = tl.program_id(0)
    place = tl.arange(0, PLACES)
    start = tl.load(bounds + row)
    rows = tl.load(bounds + row + 1) - start
    inside = place < rows
    followed = place + 1 < rows
    token = tl.load(tokens + start + place, mask=inside, other=0)
    draft = tl.load(drafts + start + place + 1, mask=followed, other=-1)
    right = followed & (token == draft)
    length = tl.min(tl.where(right, PLACES, place), axis=0) + 1
    unfinished = tl.load(seq_lens + row) < tl.load(prefill_len + tl.load(slots + row))
    length = tl.where(unfinished, 0, length)
    tl.store(by_sequence + row * width + place, token, mask=inside)
    tl.store(counted + start + place, (place < length).to(tl.int32), mask=inside)
    tl.store(lengths + row, length)
    tl.store(rejected + row, tl.where(unfinished, 0, rows - length))
    tl.atomic_add(accepted, tl.maximum(length - 1, 0))


class Runs(NamedTuple):
    """The samples that count."""

    by_sequence: Tensor
    """[sequences, width] int64: the samples, undefined behind a run."""
    lengths: Tensor
    """[sequences] int32: of the runs; 0 where the prompt goes on."""
    rejected: Tensor
    """[sequences] int32: the other rows of the logits, 0 where the prompt goes on."""
    counted: Tensor
    """[rows] int32: 1 within a run, else 0."""


def find_runs(
    tokens: Tensor, drafts: Tensor, batch: InputBatch, prefill_len: Tensor, width: int, accepted: Tensor
) -> Runs:
    """The runs of a step's samples.

    tokens [rows] int64: the sample of each row of logits; drafts [rows]: the token that a row has read, a draft but for
    the first of a sequence, negative where it may not be accepted; `width`: the most rows of a sequence. The accepted
    drafts are added to `accepted` [1] int32.
    """
    sequences = len(batch.idx_mapping)
    lengths = batch.seq_lens.new_empty(sequences)
    runs = Runs(tokens.new_empty(sequences, width), lengths, torch.empty_like(lengths), lengths.new_empty(len(tokens)))
    _runs_kernel[(sequences,)](
        *runs,
        accepted,
        tokens,
        drafts,
        batch.cu_num_logits,
        batch.seq_lens,
        batch.idx_mapping,
        prefill_len,
        width,
        PLACES=triton.next_power_of_2(width),
    )
    return runs


class SecondRejectionSampler:
    """In the place of vLLM's `RejectionSampler` in its second model runner. Log-probabilities go to `record`."""

    def __init__(self, sampler: Sampler, drafts: int, record: Record) -> None:
        """`drafts` is the most of a sequence and step."""
        self._sampler, self._width, self._record = sampler, drafts + 1, record
        self._drafted = 0
        self._accepted = torch.zeros(1, dtype=torch.int32, device=sampler.req_states.device)

    def __call__(
        self, logits: Tensor, batch: InputBatch, draft_logits: Tensor | None, invalid_drafts: Tensor | None
    ) -> SamplerOutput:
        """`draft_logits` are None, as drafts are not sampled, and so is `invalid_drafts` without a grammar."""
        assert draft_logits is None and invalid_drafts is None, "drafts are certain and no grammar constrains them"
        prefill_len = self._sampler.req_states.prefill_len.gpu
        drafts, positions = gather_draft_sampled(
            batch.input_ids,
            batch.positions,
            batch.logits_indices,
            batch.expanded_idx_mapping,
            batch.expanded_local_pos,
            prefill_len,
        )
        tokens, logprobs = self._sampled(logits, batch, drafts, positions)
        runs = find_runs(tokens, drafts, batch, prefill_len, self._width, self._accepted)
        self._drafted += batch.num_draft_tokens
        rows = (batch.cu_num_logits_np[1:] - batch.cu_num_logits_np[:-1]).tolist()
        requests = [name for name, count in zip(batch.req_ids, rows, strict=True) for _ in range(count)]
        self._record(requests, positions + 1, logprobs, runs.counted)
        return SamplerOutput(runs.by_sequence, None, None, runs.lengths, runs.rejected)

    def _sampled(self, logits: Tensor, batch: InputBatch, drafts: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [rows] int64 and their log-probabilities [rows] float32, in parts that bound the memory, as vLLM's."""
        tokens, logprobs = [], []
        chunk = get_max_chunk_logits(logits.shape[1])
        for start in range(0, len(logits), chunk):
            part = slice(start, start + chunk)
            sampled, processed = self._sampler.sample(
                logits[part],
                batch.expanded_idx_mapping[part],
                batch.idx_mapping,
                batch.idx_mapping_np,
                positions[part],
                drafts[part],
                batch.expanded_local_pos[part],
                batch.seq_lens_cpu_upper_bound.numpy(),
                return_logprobs=True,
            )
            tokens.append(sampled)
            logprobs.append(compute_token_logprobs(processed, sampled[:, None])[:, 0])
        return (tokens[0], logprobs[0]) if len(tokens) == 1 else (torch.cat(tokens), torch.cat(logprobs))

    def counts(self) -> DraftCounts:
        """Waits for the device."""
        return DraftCounts(self._drafted, int(self._accepted))


class FirstRejectionSampler:
    """In the place of vLLM's `RejectionSampler` in its first model runner, that of CPUs.

    Samples the first row of every sequence, then the second of those whose draft was right, and so on, each time as
    vLLM samples a step without drafts.
    """

    def __init__(self, sampler: FirstSampler) -> None:
        self._sampler = sampler
        self._drafted = self._accepted = 0

    def __call__(
        self, metadata: SpecDecodeMetadata, draft_probs: Tensor | None, logits: Tensor, sampling: SamplingMetadata
    ) -> FirstOutput:
        assert draft_probs is None, "drafts are certain"
        drafted = torch.tensor(metadata.num_draft_tokens, device=logits.device)
        starts, first_drafts = _starts(drafted + 1), _starts(drafted)
        going = torch.ones_like(drafted, dtype=torch.bool)
        tokens, logprobs = list[Tensor](), list[Tensor]()
        for place in range(metadata.max_spec_len + 1):
            # The row of a sequence that has ended its run is any of its own; the sample is dropped.
            output = self._sampler(logits[starts + drafted.clamp(max=place)], sampling)
            sampled = output.sampled_token_ids[:, 0]
            tokens.append(torch.where(going, sampled, _NONE))
            if output.logprobs_tensors is not None:
                logprobs.append(output.logprobs_tensors.logprobs[:, 0])
            going = going & (drafted > place)
            if metadata.draft_token_ids.numel():
                places = (first_drafts + place).clamp(max=metadata.draft_token_ids.numel() - 1)
                going = going & (metadata.draft_token_ids[places] == sampled)
            if not going.any():
                break
        by_sequence = torch.stack(tokens, 1)
        self._drafted += sum(metadata.num_draft_tokens)
        self._accepted += int((by_sequence[:, 1:] != _NONE).sum())
        return FirstOutput(by_sequence, _as_vllms(by_sequence, logprobs))

    def counts(self) -> DraftCounts:
        return DraftCounts(self._drafted, self._accepted)


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _as_vllms(tokens: Tensor, logprobs: Sequence[Tensor]) -> LogprobsTensors | None:
    """Log-probabilities by place as vLLM's rows, sequence after sequence, ranks left out; None where none is asked."""
    if not logprobs:
        return None
    flat = tokens.clamp(min=0).flatten()
    return LogprobsTensors(flat[:, None], torch.stack(list(logprobs), 1).flatten()[:, None], torch.zeros_like(flat))


def keep_lengths_apart(proposer: object) -> None:
    """Lets a head's drafts behind its first see their own sequence's length; other proposers stay as they are.

    A patch of vLLM 0.32's first model runner, which for each of them adds one to the sequences' lengths and to the
    host's bound on these. On a CPU both are one tensor, so that a draft would see rows of the cache that nobody wrote.
    """
    if not isinstance(proposer, EagleProposer):
        return
    propose = proposer.propose

    def with_own_lengths(*args: Any, common_attn_metadata: CommonAttentionMetadata, **named: Any) -> Tensor:
        own = replace(common_attn_metadata, seq_lens=common_attn_metadata.seq_lens.clone())
        return propose(*args, common_attn_metadata=own, **named)

    vars(proposer)["propose"] = with_own_lengths
