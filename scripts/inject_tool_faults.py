"""Broken tools and environments: attempts of several turns are played with them, and with sound ones beside them.

    scripts/inject_tool_faults.py --times 10                    every fault, a table at the end
    scripts/inject_tool_faults.py exits loops-in-c --times 3    two of them

A trial plays eight attempts in two processes of user code, half of the trials with tools and half with an environment.
Some attempts meet a fault of `tool_faults.FAULTS` at a random turn (an environment also as it is made, starts, is asked
for its reward, or closes); the others must end as they do undisturbed. A trial counts as a hang where it takes over
--limit seconds, attempts as lost where they have no end, as disturbed where a sound one differs, and processes as
orphans where they are alive after the processes of user code were ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import psutil
from tool_faults import FAULTS

from cispo.agents.contract import Status
from cispo.agents.episodes import Episodes, episodes_of
from cispo.recipe.schema import Recipe
from cispo.rollout.renderer import Renderer, load_tokenizer
from cispo.types import Completion, FinishReason, Prompt, Sampling, Trajectory

MARK = "CISPO_TOOL_FAULT_TRIAL"
CHARS = Path(__file__).parents[1] / "recipes" / "tokenizers" / "chars"
TURNS, PROMPTS, GROUP = 4, 2, 4
PLACES = ("step", "step", "step", "__init__", "start", "reward", "close")
SAMPLING = Sampling(max_tokens=40, eos_ids=(2,))


class Policy:
    """Replies by a script: what it says follows from the attempt's own past, so that no neighbour can change it.

    An attempt's number n0, n1, ... is in its past: an environment says it first, with tools the policy does. Attempts
    of `victims` break at a later turn with a chance of one half.
    """

    def __init__(self, renderer: Renderer, kind: str, seed: int, victims: set[int], *, tools: bool) -> None:
        self.renderer, self.kind, self.seed, self.victims, self.tools = renderer, kind, seed, victims, tools
        self.turn = 0

    async def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        said = [self._said(number, ids) for number, ids in enumerate(prompts)]
        self.turn += 1
        return [self._completion(text) for text in said]

    def _said(self, number: int, ids: Sequence[int]) -> str:
        if self.tools and self.turn == 0:
            return self._counting(f"n{number % GROUP}")
        past = self.renderer.decode(ids)
        draw = random.Random(f"{self.seed} {past[:200]} {len(past)}")
        if any(f"n{victim}" in past for victim in self.victims) and draw.random() < 0.5:
            return f"[broken {self.kind}]" if self.tools else "break"
        return self._counting(f"w{draw.randrange(100)}")

    def _counting(self, word: str) -> str:
        return f"[count {word}]" if self.tools else word

    def _completion(self, text: str) -> Completion:
        ids = tuple(self.renderer.encode_completion(text))
        count = len(ids)
        return Completion(
            token_ids=ids, logprobs=(-0.5,) * count, finish_reason=FinishReason.STOP, versions=(1,) * count
        )


@dataclass(frozen=True)
class Result:
    fault: str
    statuses: Counter[str]
    problems: list[str]
    """Each begins with hang, lost, disturbed or orphans."""
    seconds: float


@contextlib.contextmanager
def playing(renderer: Renderer, *, tools: bool, timeout: float) -> Iterator[Episodes]:
    used = {"tools": ["tool_faults:count", "tool_faults:broken"]} if tools else {"use": "tool_faults:Broken"}
    env = {**used, "timeout": timeout, "workers": 2, "max_turns": TURNS}
    recipe = Recipe.model_validate({"env": env, "rollout": {"max_context": 100_000}})
    episodes = episodes_of(recipe, renderer, {})
    assert episodes is not None
    with contextlib.closing(episodes):
        yield episodes


async def play(
    episodes: Episodes, kind: str, seed: int, *, tools: bool, where: str, victims: set[int], limit: float
) -> list[Trajectory] | None:
    """The attempts of all prompts in order; None for a hang."""
    columns = {"kind": kind, "where": where, "victim": min(victims, default=-1)}
    prompts = [
        Prompt(id=n, messages=({"role": "user", "content": f"go {n}"},), columns=columns) for n in range(PROMPTS)
    ]
    policy = Policy(episodes.renderer, kind, seed, victims, tools=tools)
    playing = episodes.play(prompts, policy.generate, group_size=GROUP, sampling=SAMPLING, seed=seed)
    try:
        groups = await asyncio.wait_for(playing, limit)
    except TimeoutError:
        return None
    return [t for group in groups for t in group.trajectories]


def try_once(renderer: Renderer, kind: str, seed: int, *, timeout: float, limit: float) -> Result:
    """One trial: a batch without faults, one with them, and another one without in the same processes."""
    draw = random.Random(f"{kind} {seed}")
    tools = seed % 2 == 0
    where = "step" if tools else draw.choice(PLACES)
    victims = set(draw.sample(range(GROUP), draw.randint(1, 2)))
    mark, started = uuid.uuid4().hex, time.monotonic()
    os.environ[MARK] = mark
    problems, statuses = list[str](), Counter[str]()
    with playing(renderer, tools=tools, timeout=timeout) as episodes:

        async def before_with_and_after() -> list[list[Trajectory] | None]:
            plays = [("", set[int]()), (where, victims), ("", set[int]())]
            common = {"tools": tools, "limit": limit}
            return [await play(episodes, kind, seed, where=w, victims=v, **common) for w, v in plays]

        sound, found, again = asyncio.run(before_with_and_after())
    if sound is None or found is None or again is None:
        problems.append("hang")
    else:
        statuses.update(t.status for t in found)
        problems += losses(found, where, victims)
        named = {(t.group_id, t.index): t for t in found}
        for t in sound:
            other = named.get((t.group_id, t.index))
            if t.index not in victims and t != other:
                problems.append(f"disturbed: attempt {t.group_id}/{t.index}: {first_difference(t, other)}")
        if again != sound:
            problems.append("disturbed: the next batch")
    if left := marked(mark):
        problems.append(f"orphans: {left}")
    return Result(kind, statuses, problems, time.monotonic() - started)


def first_difference(sound: Trajectory, other: Trajectory | None) -> str:
    """The first message in which an attempt differs from itself undisturbed."""
    said = [str(m["content"]) for m in other.messages] if other is not None else []
    expected = [str(m["content"]) for m in sound.messages]
    for one, two in zip_longest(expected, said, fillvalue="nothing"):
        if one != two:
            return f"{two!r:.100} where {one!r:.40} is expected"
    return "its tokens or its end"


def losses(found: Sequence[Trajectory], where: str, victims: set[int]) -> list[str]:
    """Attempts without an end. An environment that could not begin leaves its attempt without a token, which its group
    then lacks."""
    begun = {(p, i) for p in range(PROMPTS) for i in range(GROUP)}
    if where in ("__init__", "start"):
        begun -= {(p, min(victims)) for p in range(PROMPTS)}
    absent = begun - {(t.group_id, t.index) for t in found}
    ends = {str(status) for status in Status}
    return [f"lost: {sorted(absent)}"] * bool(absent) + [f"lost: {t.status}" for t in found if t.status not in ends]


def marked(mark: str) -> list[str]:
    """Command lines of the trial's processes that are alive 2 s later, but for this one; kills them."""
    deadline = time.monotonic() + 2.0
    while True:
        alive = [p for p in psutil.process_iter() if p.pid != os.getpid() and _has(p, mark)]
        if not alive or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    names = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:60])
            process.kill()
    return names


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def table(results: Sequence[Result]) -> str:
    lines = ["| fault | trials | ends of the attempts | hangs | lost | disturbed | orphans | seconds, longest |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(r.fault for r in results):
        own = [r for r in results if r.fault == kind]
        ends = sum((r.statuses for r in own), Counter[str]())
        said = ", ".join(f"{count} {status}" for status, count in sorted(ends.items()))
        counts = [
            sum(any(p.startswith(word) for p in r.problems) for r in own)
            for word in ("hang", "lost", "disturbed", "orphans")
        ]
        seconds = max(r.seconds for r in own)
        lines.append(f"| {kind} | {len(own)} | {said} | " + " | ".join(map(str, counts)) + f" | {seconds:.1f} |")
    return "\n".join(lines)


@contextlib.contextmanager
def floods_go_nowhere() -> Iterator[None]:
    """Processes of user code write to the stdout of this one."""
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)
        os.close(nowhere)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--times", type=int, default=10, help="trials of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=2.0, help="env.timeout, seconds a call")
    parser.add_argument("--limit", type=float, default=120, help="seconds after which a trial is a hang")
    args = parser.parse_args()
    if unknown := [name for name in args.faults if name not in FAULTS]:
        parser.error(f"{unknown[0]!r} is no fault: there are {', '.join(FAULTS)}")
    renderer, results = Renderer(load_tokenizer(CHARS)), []
    for number in range(args.times):
        for kind in args.faults or FAULTS:
            with floods_go_nowhere():
                seed = args.seed + number
                results.append(try_once(renderer, kind, seed, timeout=args.timeout, limit=args.limit))
            said = "; ".join(results[-1].problems) or "ok"
            print(f"{kind} {seed}: {results[-1].seconds:.1f} s, {dict(results[-1].statuses)}, {said}", flush=True)
    print(table(results))
    sys.exit(any(r.problems for r in results))


if __name__ == "__main__":
    main()
