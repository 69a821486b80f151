"""Trajectories become samples, samples become flat micro-batches; the reduction becomes per-token weights.

    TrajectoryGroup --to_samples--> Sample [L] --pack--> MicroBatch [T] per rank --a pass, unpack--> one [L] a Sample

The loss of a batch is (per_token_loss * loss_weights).sum() over all its micro-batches and ranks. Because the weights
already hold the global denominators, neither the number of micro-batches nor of ranks nor the order of samples can
change the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from cispo.algorithms import Reduction
from cispo.types import MicroBatch, Sample, Trajectory, TrajectoryGroup, Turn

_OPTIONAL = ("old_logprobs", "ref_logprobs", "values", "returns")


def to_samples(group: TrajectoryGroup) -> list[Sample]:
    """One sample a turn, in order: the rendered prompt is context, the completion is trained on."""
    return [_turn_sample(trajectory, turn) for trajectory in group.trajectories for turn in trajectory.turns]


def _turn_sample(trajectory: Trajectory, turn: Turn) -> Sample:
    completion = turn.completion
    prompt = len(turn.prompt_ids)
    mask = torch.zeros(prompt + len(completion.token_ids), dtype=torch.bool)
    mask[prompt:] = True
    return Sample(
        token_ids=torch.tensor((*turn.prompt_ids, *completion.token_ids)),
        loss_mask=mask,
        rollout_logprobs=torch.tensor((*(0.0,) * prompt, *completion.logprobs)),
        versions=torch.tensor((*(0,) * prompt, *completion.versions), dtype=torch.int32),
        group_id=trajectory.group_id,
        index=trajectory.index,
    )


def demonstration(prompt_ids: Sequence[int], completion_ids: Sequence[int], index: int) -> Sample:
    """A sample for supervised fine-tuning: no rollout, advantage 1."""
    mask = torch.zeros(len(prompt_ids) + len(completion_ids), dtype=torch.bool)
    mask[len(prompt_ids) :] = True
    return Sample(
        token_ids=torch.tensor((*prompt_ids, *completion_ids)),
        loss_mask=mask,
        rollout_logprobs=torch.zeros(len(mask)),
        versions=torch.zeros(len(mask), dtype=torch.int32),
        group_id=index,
        index=0,
        advantages=mask.float(),
    )


def reduction_weights(samples: Sequence[Sample], reduction: Reduction, *, max_tokens: int) -> list[float]:
    """The weight of each sample's tokens, so that the weighted sum over the batch is the named reduction.

    token: 1 / tokens. prompt: 1 / (prompts * tokens of the prompt), the form of CISPO's eq. 4. sequence:
    1 / (sequences * tokens of the sequence). sequence_sum: 1 / sequences. constant: 1 / (sequences * max_tokens), Dr.
    GRPO.
    """
    lengths = [sample.num_loss_tokens for sample in samples]
    if reduction == "token":
        return [1 / max(sum(lengths), 1)] * len(samples)
    if reduction == "prompt":
        by_prompt: Counter[int] = Counter()
        for sample, length in zip(samples, lengths, strict=True):
            by_prompt[sample.group_id] += length
        return [1 / (len(by_prompt) * max(by_prompt[sample.group_id], 1)) for sample in samples]
    if reduction == "sequence":
        return [1 / (len(samples) * max(length, 1)) for length in lengths]
    return [1 / (len(samples) * (1 if reduction == "sequence_sum" else max_tokens))] * len(samples)


def pack(
    samples: Sequence[Sample],
    *,
    reduction: Reduction,
    max_tokens: int,
    tokens_per_micro_batch: int,
    ranks: int = 1,
    share_prompts: bool = False,
) -> list[list[MicroBatch]]:
    """Packs a batch for the learner: [ranks][micro-batches], each at most `tokens_per_micro_batch` tokens.

    Samples go to ranks longest first onto the least loaded, and inside a rank into as few micro-batches as their
    order by length allows. A sample longer than the budget has a micro-batch of its own. A rank may get none. With
    `share_prompts` equal prompts of a micro-batch are marked to be read once; they count in full for the budget.
    """
    weights = reduction_weights(samples, reduction, max_tokens=max_tokens)
    order = sorted(
        range(len(samples)), key=lambda i: (-len(samples[i].token_ids), samples[i].group_id, samples[i].index)
    )
    columns: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in order:
        rank = load.index(min(load))
        columns[rank].append(i)
        load[rank] += len(samples[i].token_ids) - 1
    return [
        [
            _flatten([samples[i] for i in bin], [weights[i] for i in bin], bin, share_prompts)
            for bin in _bins(column, samples, tokens_per_micro_batch)
        ]
        for column in columns
    ]


def _bins(column: Sequence[int], samples: Sequence[Sample], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room = 0
    for i in column:
        need = len(samples[i].token_ids) - 1
        if need > room or not bins:
            bins.append([])
            room = budget
        bins[-1].append(i)
        room -= need
    return bins


def _flatten(
    samples: Sequence[Sample], weights: Sequence[float], places: Sequence[int], share_prompts: bool
) -> MicroBatch:
    """Shifts once: position t holds the input token and everything about the token it predicts."""
    lengths = torch.tensor([len(s.token_ids) - 1 for s in samples])
    mask = torch.cat([s.loss_mask[1:] for s in samples])
    per_sample = torch.tensor(weights, dtype=torch.float64).repeat_interleave(lengths)

    def column(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in samples]
        return None if any(v is None for v in values) else torch.cat([v[1:] for v in values])

    advantages = column("advantages")
    distinct, reading = _distinct_tokens(samples) if share_prompts else (None, None)
    return MicroBatch(
        tokens=torch.cat([s.token_ids[:-1] for s in samples]),
        targets=torch.cat([s.token_ids[1:] for s in samples]),
        positions=torch.cat([torch.arange(int(n)) for n in lengths]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        longest=int(lengths.max()),
        loss_mask=mask,
        trained=mask.nonzero()[:, 0],
        rollout_logprobs=torch.cat([s.rollout_logprobs[1:] for s in samples]),
        versions=torch.cat([s.versions[1:] for s in samples]),
        # Passes that only read logprobs or values come before there are advantages.
        advantages=torch.zeros(len(mask)) if advantages is None else advantages,
        loss_weights=torch.where(mask, per_sample, 0.0).float(),
        places=tuple(places),
        distinct=distinct,
        reading=reading,
        **{name: column(name) for name in _OPTIONAL},
    )


def _distinct_tokens(samples: Sequence[Sample]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`distinct` and `reading` of a micro-batch; None where no two prompts are equal.

    What stands before the first token to predict is read alike wherever the same tokens do: attention is causal.
    """
    distinct, reading, known = [], [], dict[tuple[int, ...], Tensor]()
    start = count = 0
    for sample in samples:
        length = len(sample.token_ids) - 1
        # The last token of a prompt predicts the first of each completion: its hidden state is one all the same.
        prompt = tuple(sample.token_ids[:length][: _context(sample)].tolist())
        new = 0 if prompt not in known else len(prompt)
        distinct.append(torch.arange(start + new, start + length))
        rows = torch.arange(count, count + length - new)
        reading.append(torch.cat([known[prompt], rows]) if new else rows)
        known.setdefault(prompt, rows[: len(prompt)])
        start, count = start + length, count + length - new
    return (torch.cat(distinct), torch.cat(reading)) if count < start else (None, None)


def _context(sample: Sample) -> int:
    """Tokens before the first that is trained on."""
    trained = int(sample.loss_mask.int().argmax())
    return trained if sample.loss_mask[trained] else len(sample.loss_mask)


def unpack(columns: Sequence[Sequence[MicroBatch]], values: Sequence[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Per-token values [T] of packed micro-batches as one tensor [L] a sample, in the order that was packed.

    Undoes the shift: what stood beside the token to predict stands at that token; position 0 is 0.
    """
    rows: list[Tensor] = [torch.empty(0)] * count
    for column, results in zip(columns, values, strict=True):
        for mb, result in zip(column, results, strict=True):
            parts = result.split(mb.cu_seqlens.diff().tolist())
            for place, part in zip(mb.places, parts, strict=True):
                rows[place] = torch.cat([part.new_zeros(1), part])
    return rows
