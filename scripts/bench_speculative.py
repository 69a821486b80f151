"""Drafts of n-grams in vLLM's engine: tokens a second with and without, and the share of drafts that were right.

    python scripts/bench_speculative.py --model FOLDER [--texts sums,echo] [--sequences 1,8,64] [--tokens 256] [--k 4]

Two engines, each in a process of its own, start at once, one without and one with drafts. They sample in turns: the
same prompts and seeds, exactly `tokens` tokens of every completion. `sums` is a list of solved sums in the manner of
recipes/smollm2_chain_sum.yaml, with which the model goes on; `echo` a paragraph, twice and once more begun. A row is
printed once it is measured: medians of `--calls` calls after a short one that is not counted. "same" is the share of
tokens before the first of a completion that differs: on a GPU both engines draw the same noise, and only rounding parts
them; on a CPU each draws its own. bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from itertools import takewhile
from multiprocessing.connection import Connection
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from cispo.engines.serving import ServedEngine, make_engine
from cispo.types import RepetitionStop, Sampling

PARAGRAPH = (
    "The valley lies between two ranges of hills, and the river that runs through it turns the wheels of seven mills. "
    "In spring the water is high and cold, and the millers open the gates in the morning and close them at night. "
)


class Call(NamedTuple):
    prompts: list[list[int]]
    tokens: int
    temperature: float


class Measured(NamedTuple):
    """A call of an engine."""

    seconds: float
    tokens: list[tuple[int, ...]]
    """Of every completion."""
    drafted: int
    accepted: int


def sums(number: int) -> str:
    """Solved sums and an open one."""
    random = Random(number)
    pairs = [(random.randint(1, 99), random.randint(1, 99)) for _ in range(9)]
    solved = "".join(f"{a} + {b} = ?\n{a} + {b} = {a + b}\n\n" for a, b in pairs[:-1])
    return f"{solved}{pairs[-1][0]} + {pairs[-1][1]} = ?\n"


def echo(number: int) -> str:
    return f"Text {number}, twice, word for word.\n\n{PARAGRAPH}\n\n{PARAGRAPH}\n\n{PARAGRAPH[: 20 + number % 7]}"


TEXTS: dict[str, Callable[[int], str]] = {"sums": sums, "echo": echo}
"""Name of a text -> its prompt of a number."""


def serve(connection: Connection, model: str, drafts: dict[str, object] | None, sequences: int, context: int) -> None:
    """An engine's process: sends None once it has started, then the outcome of every call until it receives None."""
    engine = make_engine(
        "vllm",
        model,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        max_context=context,
        max_sequences=sequences,
        tensor_parallel=1,
        memory=0.3,
        sleeps=False,
        engine_args={} if drafts is None else {"speculative_config": drafts},
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    connection.send(None)
    while (call := connection.recv()) is not None:
        connection.send(measured(engine, call, drafting=drafts is not None))
    engine.close()


def measured(engine: ServedEngine, call: Call, *, drafting: bool) -> Measured:
    rule = Sampling(
        max_tokens=call.tokens, eos_ids=(), temperature=call.temperature, repetition=RepetitionStop(run_length=0)
    )
    before = draft_counts(engine) if drafting else (0, 0)
    begun = time.perf_counter()
    completions = asyncio.run(engine.generate(call.prompts, rule, 0))
    seconds = time.perf_counter() - begun
    after = draft_counts(engine) if drafting else (0, 0)
    drafted, accepted = (now - then for now, then in zip(after, before, strict=True))
    return Measured(seconds, [completion.token_ids for completion in completions], drafted, accepted)


def draft_counts(engine: ServedEngine) -> tuple[int, int]:
    """Drafts proposed and accepted since the start."""
    core: Any = engine.engine
    return core._engine.collective_rpc("draft_counts")[0]


def asked(engine: Connection, call: Call) -> Measured:
    engine.send(call)
    return engine.recv()


def same(first: Measured, second: Measured) -> float:
    """Share of tokens before the first of each completion that differs."""
    pairs = list(zip(first.tokens, second.tokens, strict=True))
    equal = sum(len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))) for a, b in pairs)
    return equal / sum(len(a) for a, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", default="sums,echo")
    parser.add_argument("--sequences", default="1,8,64")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--k", type=int, default=4, help="drafts of a sequence and step")
    parser.add_argument("--ngram", type=int, default=3, help="longest n-gram that is looked up; the shortest has 2")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=1.0)
    given = parser.parse_args()

    numbers = [int(n) for n in given.sequences.split(",")]
    tokenizer = Tokenizer.from_file(f"{given.model}/tokenizer.json")
    prompts = {
        name: [tokenizer.encode(TEXTS[name](n), add_special_tokens=False).ids for n in range(max(numbers))]
        for name in given.texts.split(",")
    }
    context = max(len(prompt) for own in prompts.values() for prompt in own) + given.tokens
    context += given.k + 1  # near a context's end vLLM proposes fewer drafts, and such steps are no CUDA graph
    drafts: dict[str, object] = {"method": "ngram", "num_speculative_tokens": given.k}
    drafts |= {"prompt_lookup_max": given.ngram, "prompt_lookup_min": min(2, given.ngram)}
    begun, spawn = time.perf_counter(), multiprocessing.get_context("spawn")
    engines, processes = list[Connection](), list[Any]()
    for settings in (None, drafts):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, given.model, settings, max(numbers), context), daemon=True)
        process.start()
        theirs.close()
        engines.append(ours)
        processes.append(process)
    for engine in engines:
        engine.recv()
    print(f"engines started in {time.perf_counter() - begun:.1f} s, k = {given.k}", flush=True)
    print("| text | sequences | tokens/s without | with drafts | ratio | accepted | same |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    for text, number in itertools.product(prompts, numbers):
        call = Call(prompts[text][:number], given.tokens, given.temperature)
        for engine in engines:
            asked(engine, call._replace(tokens=min(16, given.tokens)))
        turns = [[asked(engine, call) for engine in engines] for _ in range(given.calls)]
        plain, drafting = (number * given.tokens / statistics.median(t[i].seconds for t in turns) for i in range(2))
        drafted, accepted = (sum(values) for values in zip(*(turn[1][2:] for turn in turns), strict=True))
        row = [text, f"{number}", f"{plain:,.0f}", f"{drafting:,.0f}", f"{drafting / plain:.2f}"]
        row += [f"{accepted / max(drafted, 1):.1%}", f"{same(*turns[0]):.1%}"]
        print(f"| {' | '.join(row)} |", flush=True)
    for engine, process in zip(engines, processes, strict=True):
        engine.send(None)
        process.join()


if __name__ == "__main__":
    main()
