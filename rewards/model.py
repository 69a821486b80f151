"""A reward model: a sequence classifier of Hugging Face, in this process on the CPU or behind a server of vLLM.

    conversation (prompt and completion) --chat template--> text --> classifier --> logit of `label`

In this process each text is read alone, without padding: the exact form. A classifier of size belongs on a GPU of its
own: `vllm serve MODEL --runner pooling`, and `base_url` here.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cispo.rollout.reward_clock import waiting

_READING = asyncio.Lock()


async def classifier(
    completions: Sequence[str],
    conversation: Sequence[Sequence[Mapping[str, object]]],
    *,
    model: str,
    base_url: str | None = None,
    label: int = -1,
    probability: bool = False,
    **_: object,
) -> list[float]:
    """The logit of `label` for each completion of a prompt, or its `probability` (softmax; sigmoid of a single label).

    `model` is a folder or hub id; its weights are read once, which is no part of `reward.timeout`. With `base_url`
    ("http://host:8000") the texts go to vLLM's pooling endpoint of that model, and are tokenised here.
    """
    with waiting():
        async with _READING:
            tokenizer = await asyncio.to_thread(_tokenizer, model)
            network = None if base_url is not None else await asyncio.to_thread(_network, model)
    assert len(conversation) == len(completions)
    ids = [_ids(tokenizer, messages) for messages in conversation]
    if base_url is not None:
        logits = await _served(base_url, model, ids)
    else:
        assert network is not None
        # One at a time: each uses the threads that the process has.
        async with _READING:
            logits = [await asyncio.to_thread(_logits, network, each) for each in ids]
    return [_probability(row, label) if probability else row[label] for row in logits]


def _ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]]) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode("".join(str(message["content"]) for message in messages))
    # Any: transformers types a conversation by text values alone.
    said: Any = [dict(message) for message in messages]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    return tokenizer.encode(str(text), add_special_tokens=False)


@functools.cache
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


@functools.cache
def _network(model: str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(model, trust_remote_code=False).float().eval()


def _logits(network: PreTrainedModel, ids: list[int]) -> list[float]:
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids])).logits[0].double().tolist()


async def _served(base_url: str, model: str, ids: list[list[int]]) -> list[list[float]]:
    """Logits of vLLM's pooling endpoint; raises httpx.HTTPError where it answers none."""
    async with httpx.AsyncClient(base_url=base_url, timeout=None) as client:
        body = {"model": model, "input": ids, "task": "classify", "use_activation": False}
        reply = await client.post("/pooling", json=body)
        reply.raise_for_status()
        return [row["data"] for row in sorted(reply.json()["data"], key=lambda row: row["index"])]


def _probability(logits: Sequence[float], label: int) -> float:
    if len(logits) == 1:
        return 1 / (1 + math.exp(-logits[0]))
    most = max(logits)
    weights = [math.exp(value - most) for value in logits]
    return weights[label] / sum(weights)
