"""Log-probabilities that wait on the device: every token gets its own, through drops, repeats and surplus samples."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cispo.engines.drafts import Draft
from cispo.engines.logprob_table import LogprobTable, Records
from cispo.engines.sampled_tokens import StepTokens
from cispo.engines.vllm_logprobs import PendingLogprobs, RecordingSampler
from cispo.types import RepetitionStop, Sampling


@dataclass
class Output:
    """Output of vLLM's sampler, as far as the recorder reads it."""

    sampled_token_ids: Tensor
    logprobs_tensors: Any
    num_sampled: Tensor


def recording(logprobs: list[list[float]] | None) -> tuple[RecordingSampler, list[Output]]:
    """A recorder over a sampler that gives these log-probabilities, step by step."""
    outputs = []

    def sampler(logits: Tensor, batch: Any) -> Output:
        step = None if logprobs is None else SimpleNamespace(logprobs=torch.tensor(logprobs[len(outputs)])[:, None])
        outputs.append(Output(torch.zeros(len(logits), 1), step, batch.sampled))
        return outputs[-1]

    return RecordingSampler(sampler), outputs


def batch(requests: list[str], positions: list[int], sampled: list[int]) -> Any:
    """`positions` are those of each request's last input token, which stand at the ends of its tokens."""
    return SimpleNamespace(
        req_ids=requests,
        positions=torch.tensor([p for position in positions for p in (position - 1, position)]),
        logits_indices=torch.arange(1, 2 * len(positions), 2),
        sampled=torch.tensor(sampled),
    )


def test_a_sampler_without_logprobs_is_left_alone() -> None:
    recorder, outputs = recording(None)
    assert recorder(torch.zeros(1, 4), batch(["a"], [3], [1])) is outputs[0]
    recorder.send()
    assert not recorder.take().requests


def test_steps_are_kept_and_taken_once() -> None:
    recorder, _ = recording([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    for positions, sampled in (([4, 9], [1, 0]), ([5, 10], [1, 1])):
        output = recorder(torch.zeros(2, 4), batch(["a", "b"], positions, sampled))
        assert output.logprobs_tensors is None, "nothing of it goes to the host"
    recorder.send()
    recorder(torch.zeros(2, 4), batch(["a", "b"], [6, 11], [1, 1]))
    records = recorder.take()
    assert records.requests == ["a", "b", "a", "b"] and records.positions.tolist() == [5, 10, 6, 11]
    assert records.logprobs.tolist() == [-1, -2, -3, -4] and records.sampled.tolist() == [True, False, True, True]
    assert not recorder.take().requests, "the third step was not sent"
    recorder.send()
    assert recorder.take().logprobs.tolist() == [-5, -6]


def test_steps_of_the_fused_sampler_are_kept_among_the_others() -> None:
    """A step that it does not know goes to vLLM's sampler; positions of either kind come in order."""
    _, outputs = inner = recording([[-1.0]])

    def fused(logits: Tensor, step: Any) -> tuple[Output, Tensor, Tensor] | None:
        if len(logits) == 1:
            return None
        output = Output(torch.zeros(2, 1), None, step.sampled)
        return output, torch.tensor([7, 8]), torch.tensor([-2.0, -3.0])

    recorder = RecordingSampler(inner[0].sampler, fused)  # type: ignore[arg-type]
    assert recorder(torch.zeros(2, 4), batch(["a", "b"], [6, 7], [1, 0])).logprobs_tensors is None
    assert not outputs, "vLLM's sampler has nothing to do"
    assert recorder(torch.zeros(1, 4), batch(["a"], [7], [1])).logprobs_tensors is None
    recorder.send()
    records = recorder.take()
    assert records.requests == ["a", "b", "a"] and records.positions.tolist() == [7, 8, 8]
    assert records.logprobs.tolist() == [-2, -3, -1] and records.sampled.tolist() == [True, False, True]


def rows(entries: list[tuple[str, int, float, bool]]) -> Records:
    ids, positions, logprobs, sampled = zip(*entries, strict=True)
    return Records(list(ids), np.array(positions), np.array(logprobs, np.float32), np.array(sampled))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_token_gets_its_own(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    prompts = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    truth = {i: [-float(i) - t / 100 for t in range(n)] for i, n in enumerate(lengths)}
    entries = []
    for i, n in enumerate(lengths):
        for t in range(n):
            place = prompts[i] + t
            if data.draw(st.booleans()):  # a part of the prompt, or tokens recomputed after a preemption
                entries.append((f"r{i}", place, 1.0, False))
            if data.draw(st.booleans()):  # sampled, lost to a preemption, and sampled again
                entries.append((f"r{i}", place, 2.0, True))
            entries.append((f"r{i}", place, truth[i][t], True))
        entries.append((f"r{i}", prompts[i] + n, 3.0, True))  # one step too many
    entries.append(("a stranger", 4, 4.0, True))
    # Requests interleave; each one's own rows stay in order.
    turns = {name: data.draw(st.lists(st.integers(0, 9), min_size=40, max_size=40)) for name in {e[0] for e in entries}}
    steps = {name: np.cumsum(turn).tolist() for name, turn in turns.items()}
    order = sorted(range(len(entries)), key=lambda k: steps[entries[k][0]].pop(0))
    table = LogprobTable(max(lengths))
    for name, start, limit in zip(truth, prompts, lengths, strict=True):
        table.open(f"r{name}", start=start, limit=limit)
    cut = data.draw(st.integers(0, len(entries)))
    for part in (order[:cut], order[cut:]):
        if part:
            table.add(rows([entries[k] for k in part]))
    for i, n in enumerate(lengths):
        middle = data.draw(st.integers(0, n))
        values = table.get(f"r{i}", 0, middle) + table.get(f"r{i}", middle, n)
        assert values == pytest.approx(truth[i], abs=1e-6)


def test_a_row_goes_from_one_request_to_the_next() -> None:
    """Nothing of a closed request shows in the one that takes its row, and its late records go nowhere."""
    table = LogprobTable(4)
    for number in range(100):
        name, old = f"r{number}", f"r{number - 3}"
        table.open(name, start=number, limit=1 + number % 4)
        if number >= 3:
            table.close(old)
        late = [(old, number - 3, -7.0, True)] if number >= 3 else []
        with pytest.raises(AssertionError, match="no log-probability"):
            table.get(name, 0, 1)
        table.add(rows([*late, *((name, number + place, -number - place / 8, True) for place in range(6))]))
        for other in range(max(number - 2, 0), number + 1):
            limit = 1 + other % 4
            assert table.get(f"r{other}", 0, limit) == [-other - place / 8 for place in range(limit)]


def test_a_token_that_was_never_recorded_is_an_error() -> None:
    table = LogprobTable(9)
    table.open("a", start=3, limit=4)
    table.add(rows([("a", 3, -0.5, True), ("a", 5, -0.7, True)]))
    assert table.get("a", 0, 1) == [-0.5]
    with pytest.raises(AssertionError, match="no log-probability"):
        table.get("a", 0, 3)


def test_tokens_of_whole_steps_and_of_single_requests_keep_their_order() -> None:
    """Steps of changing requests, single tokens, ends and fetches in between: every request gets its own, in order."""
    generator, sent, recorded = random.Random(0), [], []
    sampling = Sampling(max_tokens=400, eos_ids=(), repetition=RepetitionStop(run_length=0))

    def send() -> None:
        sent[:] = recorded.copy()
        recorded.clear()

    pending = PendingLogprobs(send, lambda: [rows(sent or [("a stranger", 0, 0.0, True)])], 400)
    drafts = {f"r{n}": Draft(prompt=[1] * (1 + n), sampling=sampling, seed=0, limit=400) for n in range(9)}
    pending.open(dict(list(drafts.items())[:6]))
    pending.open(dict(list(drafts.items())[6:]))
    truth: dict[str, list[int]] = {name: [] for name in drafts}

    def token(name: str) -> int:
        truth[name].append(len(truth[name]) * 100 + int(name[1:]))
        recorded.append((name, len(drafts[name].prompt) + len(truth[name]) - 1, -float(truth[name][-1]), True))
        return truth[name][-1]

    def arrive() -> None:
        for name, tokens, logprobs, reason in pending.arrived():
            drafts[name].extend(tokens, logprobs, reason)
            if reason:
                pending.close([name])

    running = list(drafts)
    while running:
        if generator.random() < 0.6:
            for _ in range(generator.randrange(1, 5)):
                pending.add_step(StepTokens(running.copy(), [token(name) for name in running], None, {}))
        name = generator.choice(running)
        ends = len(truth[name]) > 40
        if generator.random() < 0.5:
            pending.add(name, [token(name)], "length" if ends else None)
        else:
            reasons = {running.index(name): "length"} if ends else {}
            pending.add_step(StepTokens(running.copy(), [token(each) for each in running], None, reasons))
        if ends:
            running.remove(name)
        arrive()
        if generator.random() < 0.2:
            pending.fetch(running=True)
        elif pending.fetch_due():
            arrive()
    arrive()
    for name, draft in drafts.items():
        assert draft.reason is not None and draft.tokens == truth[name]
        assert draft.logprobs == [-float(value) for value in truth[name]]
