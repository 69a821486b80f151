"""Weights in buckets: they arrive bit for bit, in an engine and through a broadcast; damage is noticed."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.policies.loading import init_policy, save_policy
from cispo.weights.buckets import BucketMessage, WeightReceiver, WeightSender, checksum, merged, plan_buckets
from tests.served import sampled
from tests.test_vllm_parity import QWEN3, RAGGED, SAMPLING, difference, lightning, model_parameters

CPU = torch.device("cpu")


def random_state(shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    return {f"w{i}": torch.randn(shape, generator=generator).to(dtypes[i % 3]) for i, shape in enumerate(shapes)}


def sent(sender: WeightSender, receiver: WeightReceiver, check: bool = True) -> dict[str, Tensor]:
    arrived = {}
    for number in range(len(sender.buckets)):
        message = sender.stage(number, "direct", check=check)
        arrived |= {name: tensor.clone() for name, tensor in receiver.receive(message)}
    return arrived


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=12),
    limit=st.sampled_from([1, 300, 5000, 1 << 20]),
)
def test_what_is_packed_arrives(shapes: list[tuple[int, ...]], limit: int) -> None:
    state = random_state(shapes)
    sender = WeightSender(state, bucket_bytes=limit)
    assert [slot.name for bucket in sender.buckets for slot in bucket.slots] == list(state)
    for bucket in sender.buckets:
        assert len(bucket.slots) == 1 or sum(slot.bytes for slot in bucket.slots) <= limit
    arrived = sent(sender, WeightReceiver(CPU))
    assert arrived.keys() == state.keys()
    assert all(torch.equal(arrived[name], state[name]) for name in state)


def test_a_bucket_holds_the_values_of_the_moment_and_views_are_packed_dense() -> None:
    whole = torch.arange(24.0).view(4, 6)
    sender = WeightSender({"part": whole.T[1:3], "whole": whole})
    whole += 1
    arrived = sent(sender, WeightReceiver(CPU))
    assert torch.equal(arrived["part"], whole.T[1:3]) and torch.equal(arrived["whole"], whole)


def test_damage_is_noticed() -> None:
    sender = WeightSender(random_state([(64, 64), (4096,)]))
    message = sender.stage(0, "direct", check=True)
    assert message.buffer is not None
    whole = checksum(message.buffer)
    message.buffer[100] ^= 1
    assert checksum(message.buffer) != whole
    with pytest.raises(RuntimeError, match="arrived damaged"):
        list(WeightReceiver(CPU).receive(message))
    message.buffer[100] ^= 1
    list(WeightReceiver(CPU).receive(message))
    rows = message.buffer.view(-1, 4096)
    rows[[0, 1]] = rows[[1, 0]]
    assert checksum(message.buffer) != whole, "rows in another order are damage too"


def test_messages_of_several_ranks_become_one() -> None:
    bucket = plan_buckets({"w": torch.zeros(3)})[0]
    ranks = [BucketMessage(bucket=bucket, handles={f"gpu{i}": (i,)}, checksum=7) for i in range(2)]
    assert merged(ranks) == replace(ranks[0], handles={"gpu0": (0,), "gpu1": (1,)})


def test_a_broadcast_reaches_every_rank() -> None:
    """Three threads as three processes: a group of its own needs no default group."""
    state = random_state([(5, 7), (300,), (2, 2, 2)])
    sender = WeightSender(state, bucket_bytes=600)
    address = sender.open_group("127.0.0.1", 3)
    received: list[dict[str, Tensor]] = [{}, {}]

    def receive(place: int) -> None:
        receiver = WeightReceiver(CPU)
        receiver.join_group(address, place + 1, 3)
        for bucket in sender.buckets:
            weights = receiver.receive(BucketMessage(bucket=bucket))
            received[place] |= {name: tensor.clone() for name, tensor in weights}

    threads = [threading.Thread(target=receive, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    sender.join_group()
    for number in range(len(sender.buckets)):
        sender.stage(number, "broadcast")
        sender.broadcast(number)
    for thread in threads:
        thread.join(timeout=60)
    assert len(sender.buckets) > 1
    for arrived in received:
        assert arrived.keys() == state.keys() and all(torch.equal(arrived[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["lightning", pytest.param("dense", marks=pytest.mark.slow)])
def test_an_engine_takes_buckets(kind: str, tmp_path: Path) -> None:
    config = lightning() if kind == "lightning" else QWEN3
    first, second = (init_policy(config, seed) for seed in range(2))
    save_policy(first, tmp_path)
    vllm = VLLMEngine(str(tmp_path), dtype="float32", max_context=640, max_sequences=12, seed=0)
    engine = ServedEngine(vllm)
    try:
        sender = WeightSender(second.to_hf(), bucket_bytes=100_000)
        numbers = range(len(sender.buckets))
        assert len(numbers) > 3
        before = model_parameters(engine)
        with pytest.raises(AssertionError, match="begin_update comes first"):
            engine.receive_weights(sender.stage(0, "direct"))
        asyncio.run(engine.begin_update("wait"))
        engine.receive_weights(sender.stage(0, "direct", check=True))
        bad = sender.stage(1, "direct", check=True)
        assert bad.buffer is not None
        bad.buffer[5] ^= 1
        with pytest.raises(RuntimeError, match="damaged"):
            engine.receive_weights(bad)
        with pytest.raises(RuntimeError, match="damaged"):  # weights of two versions
            sampled(engine, RAGGED[:1], SAMPLING, 0)
        for number in numbers:
            engine.receive_weights(sender.stage(number, "direct", check=True))
        engine.finish_update(3)
        assert engine.version == 3 and any(not torch.equal(before[n], t) for n, t in model_parameters(engine).items())
        assert difference(engine, second, RAGGED[:8]) <= 1e-5
        # Without the last bucket, and then the last bucket alone.
        for part in (numbers[:-1], numbers[-1:]):
            asyncio.run(engine.begin_update("wait"))
            for number in part:
                engine.receive_weights(sender.stage(number, "direct"))
            with pytest.raises(AssertionError, match="the weights lack"):
                engine.finish_update(4)
            with pytest.raises(AssertionError, match="the weights lack"):
                sampled(engine, RAGGED[:1], SAMPLING, 0)
        assert engine.version == 3
    finally:
        engine.close()
