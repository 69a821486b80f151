"""Drafts in vLLM's engine: tokens a second with and without, and the share of drafts that were right.

    python scripts/bench_speculative.py --model FOLDER [--texts sums,echo] [--sequences 1,8,64] [--tokens 256] [--k 4]
    python scripts/bench_speculative.py --model FOLDER --method mtp [--k 2]      drafts of the policy's own head
    python scripts/bench_speculative.py [--model FOLDER] --method mtp --right 0.8        of a new one's

Two engines, each in a process of its own, start at once, one without and one with drafts. They sample in turns: the
same prompts and seeds, exactly `tokens` tokens of every completion. `sums` is a list of solved sums in the manner of
recipes/smollm2_chain_sum.yaml, with which the model goes on; `echo` a paragraph, twice and once more begun; without a
tokenizer.json there are random tokens instead. With `--right` the weights are new ones of the shapes in
FOLDER/config.json, or of GLM-4-MoE's blocks, 1.4 B: a token is followed by one other with that probability, and the
head knows it, which shows what such a head would bring. A row is printed once it is measured: medians of `--calls`
calls after one that is not counted. "accepted" is the share of all drafts, "same" that of tokens before the first of a
completion that differs: on a GPU both engines draw the same noise, and only rounding parts them; on a CPU each draws
its own. bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from cispo.engines.serving import ServedEngine, make_engine
from cispo.files import read_json
from cispo.policies.loading import init_policy, save_policy
from cispo.policies.policy import HFConfig
from cispo.types import RepetitionStop, Sampling

PARAGRAPH = (
    "The valley lies between two ranges of hills, and the river that runs through it turns the wheels of seven mills. "
    "In spring the water is high and cold, and the millers open the gates in the morning and close them at night. "
)

SHAPE = {
    "model_type": "glm4_moe", "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 16, "num_nextn_predict_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 128, "use_qk_norm": True, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
"""Of `--right` without `--model`."""


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


def folder_with_a_right_head(config: HFConfig, share: float, folder: Path) -> str:
    """Writes a policy of the config's shapes that follows a token by one other with probability `share`, as its head
    does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = init_policy(config, 0, dtype, device, heads=True)
    vocab, hidden = policy.lm_head_weight.shape
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight *= 0.1
        rows = torch.nn.functional.normalize(torch.randn(vocab, hidden, device=device), dim=1)
        policy.get_parameter("embed_tokens.weight").copy_(rows * hidden**0.5)
        sharpness = math.log(vocab * share / (1 - share))
        policy.lm_head_weight[torch.randperm(vocab, device=device)] = (rows * sharpness / hidden**0.5).to(dtype)
        policy.get_parameter("predictors.0.eh_proj.weight")[:, :hidden] += torch.eye(hidden, device=device, dtype=dtype)
    save_policy(policy, folder)
    del policy
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return str(folder)


def prompts_of(model: str, texts: Sequence[str], number: int) -> dict[str, list[list[int]]]:
    """By text; random tokens where the folder has no tokenizer."""
    if not (Path(model) / "tokenizer.json").exists():
        random, vocab = Random(0), read_json(Path(model) / "config.json")["vocab_size"]
        return {"random": [[random.randrange(vocab) for _ in range(200)] for _ in range(number)]}
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    return {
        name: [tokenizer.encode(TEXTS[name](n), add_special_tokens=False).ids for n in range(number)] for name in texts
    }


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
    parser.add_argument("--model", help="folder of a policy")
    parser.add_argument("--texts", default="sums,echo")
    parser.add_argument("--sequences", default="1,8,64")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--k", type=int, default=4, help="drafts of a sequence and step")
    parser.add_argument("--method", choices=["ngram", "mtp"], default="ngram")
    parser.add_argument("--right", type=float, help="with mtp: new weights whose head is right so often, 0 to 1")
    parser.add_argument("--ngram", type=int, default=3, help="longest n-gram that is looked up; the shortest has 2")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=1.0)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if given.right is not None:
            config = SHAPE if given.model is None else read_json(Path(given.model) / "config.json")
            given.model = folder_with_a_right_head(config, given.right, Path(folder))
        elif given.model is None:
            parser.error("--model is needed, but for --right")
        measure(given)


def measure(given: argparse.Namespace) -> None:
    numbers = [int(n) for n in given.sequences.split(",")]
    prompts = prompts_of(given.model, given.texts.split(","), max(numbers))
    context = max(len(prompt) for own in prompts.values() for prompt in own) + given.tokens
    context += given.k + 1  # near a context's end vLLM proposes fewer drafts, and such steps are no CUDA graph
    drafts: dict[str, object] = {"method": given.method, "num_speculative_tokens": given.k}
    if given.method == "ngram":
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
    print(f"engines started in {time.perf_counter() - begun:.1f} s, {given.method}, k = {given.k}", flush=True)
    print("| text | sequences | tokens/s without | with drafts | ratio | accepted | same |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    for text, number in itertools.product(prompts, numbers):
        call = Call(prompts[text][:number], given.tokens, given.temperature)
        for engine in engines:
            asked(engine, call)
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
