"""The plan of `bench_study.py`: its runs in their order, and the queue that hands them out until the time is over."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

POLICIES = {
    "lightning_1m": "study",
    "qwen3_next_1m": "study_qwen3_next",
    "lightning_35m": "study_35m",
    "smollm2_135m": "study_smollm2",
}
"""Name -> recipe."""
ARMS = ("cispo", "cispo_masked", "grpo", "dapo", "ppo", "gspo")
"""The first is the reference."""


class Regime(NamedTuple):
    updates: int
    staleness: int

    @classmethod
    def of(cls, text: str) -> Regime:
        """ "16:0" is 16 updates a batch and staleness 0."""
        updates, _, staleness = text.partition(":")
        return cls(int(updates), int(staleness or 0))


STEPS = {Regime(1, 0): 60, Regime(4, 0): 40}
"""Training steps where the recipe's are too few: with fewer updates a policy needs more batches to get anywhere."""


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    policy: str
    arm: str
    updates: int
    staleness: int
    lr: float
    seed: int

    @property
    def regime(self) -> Regime:
        return Regime(self.updates, self.staleness)

    @property
    def name(self) -> str:
        return f"{self.arm}-k{self.updates}-s{self.staleness}-lr{self.lr:g}-seed{self.seed}"

    def file(self, out: Path) -> Path:
        return out / "results" / self.policy / f"{self.name}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Runs of every combination."""

    policies: Sequence[str]
    regimes: Sequence[Regime]
    rates: Sequence[float]
    seeds: Sequence[int]
    arms: Sequence[str] = ARMS


GRIDS: Mapping[str, Sequence[Grid]] = {
    "gpu": (
        Grid(policies=["lightning_35m"], regimes=[Regime(16, 0)], rates=[5e-5, 1e-4], seeds=[0]),
        Grid(policies=["lightning_35m"], regimes=[Regime(4, 8)], rates=[1e-4, 2e-4], seeds=[0]),
        Grid(policies=["smollm2_135m"], regimes=[Regime(16, 0)], rates=[2e-5, 4e-5], seeds=[0]),
        Grid(policies=["smollm2_135m"], regimes=[Regime(4, 8)], rates=[4e-5, 8e-5], seeds=[0]),
        Grid(policies=["lightning_35m"], regimes=[Regime(16, 0)], rates=[5e-5, 1e-4], seeds=[1, 2]),
        Grid(policies=["lightning_35m"], regimes=[Regime(4, 8)], rates=[1e-4, 2e-4], seeds=[1, 2]),
        Grid(policies=["smollm2_135m"], regimes=[Regime(16, 0)], rates=[2e-5, 4e-5], seeds=[1, 2]),
        Grid(policies=["smollm2_135m"], regimes=[Regime(4, 8)], rates=[4e-5, 8e-5], seeds=[1, 2]),
        Grid(policies=["lightning_35m"], regimes=[Regime(16, 0)], rates=[5e-5, 1e-4], seeds=[3, 4]),
        Grid(policies=["lightning_35m"], regimes=[Regime(4, 8)], rates=[1e-4, 2e-4], seeds=[3, 4]),
        Grid(policies=["smollm2_135m"], regimes=[Regime(16, 0)], rates=[2e-5, 4e-5], seeds=[3, 4]),
        Grid(policies=["smollm2_135m"], regimes=[Regime(4, 8)], rates=[4e-5, 8e-5], seeds=[3, 4]),
        Grid(policies=["lightning_35m"], regimes=[Regime(4, 2), Regime(4, 0)], rates=[1e-4, 2e-4], seeds=range(5)),
        Grid(policies=["lightning_35m"], regimes=[Regime(16, 2)], rates=[5e-5, 1e-4], seeds=range(5)),
        Grid(policies=["lightning_35m"], regimes=[Regime(1, 0)], rates=[2e-4, 4e-4], seeds=range(5)),
    ),
    "cpu": (
        Grid(policies=["lightning_1m"], regimes=[Regime(4, 2), Regime(16, 2)], rates=[2e-4, 4e-4], seeds=range(5)),
        Grid(policies=["lightning_1m"], regimes=[Regime(4, 0)], rates=[2e-4, 4e-4], seeds=[3, 4]),
        Grid(policies=["lightning_1m"], regimes=[Regime(1, 0)], rates=[4e-4, 8e-4], seeds=[1, 2, 3, 4]),
        Grid(policies=["qwen3_next_1m"], regimes=[Regime(16, 0)], rates=[1e-4, 2e-4], seeds=range(5)),
        Grid(policies=["qwen3_next_1m"], regimes=[Regime(4, 8)], rates=[2e-4, 4e-4], seeds=range(5)),
    ),
}
"""Lists of runs in the order of their importance, for a machine that may be taken away."""


def tasks_of(
    policies: Sequence[str],
    regimes: Sequence[Regime],
    arms: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[Task]:
    """Every run of the study: seed after seed, then regime after regime."""
    return [
        Task(policy, arm, *regime, lr, seed)
        for seed in seeds
        for regime in regimes
        for policy in policies
        for lr in rates
        for arm in arms
    ]


def tasks_of_grids(grids: Sequence[Grid]) -> list[Task]:
    """The runs of one grid after another, each once."""
    lists = (tasks_of(grid.policies, grid.regimes, grid.arms, grid.rates, grid.seeds) for grid in grids)
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def warm_folder(out: Path, policy: str, start: int) -> Path:
    return out / "warm" / f"{policy}-{start}"


class Order(NamedTuple):
    policy: str
    start: int
    task: Task | None
    """None is the warm-up."""

    @property
    def kind(self) -> tuple[str, int, bool]:
        """Orders of one kind take about as long."""
        if self.task is None:
            return self.policy, 0, False
        return self.policy, self.task.updates, self.task.arm == "ppo"


class Queue:
    """The orders of a study, handed out to slots (threads) until the time is over."""

    def __init__(self, out: Path, tasks: Sequence[Task], *, starts: int, deadline: float, expect: float) -> None:
        self.out, self.starts, self.deadline, self.expect = out, starts, deadline, expect
        self.waiting = [task for task in tasks if not task.file(out).exists()]
        self.warming: set[tuple[str, int]] = set()
        self.longest: dict[tuple[str, int, bool], float] = {}
        self.lock = threading.Lock()

    def start_of(self, task: Task) -> int:
        return task.seed % self.starts if self.starts else task.seed

    def next(self, now: float) -> Order | str:
        """The next order, warm-ups first; "wait" while one is made, "end" where nothing is left or fits the time."""
        with self.lock:
            keys = list(dict.fromkeys((task.policy, self.start_of(task)) for task in self.waiting))
            missing = {key for key in keys if not warm_folder(self.out, *key).exists()}
            ready = [task for task in self.waiting if (task.policy, self.start_of(task)) not in missing]
            orders = [Order(*key, None) for key in keys if key in missing - self.warming]
            orders += [Order(task.policy, self.start_of(task), task) for task in ready]
            for order in orders:
                if now + self.longest.get(order.kind, self.expect) > self.deadline:
                    continue
                if order.task is None:
                    self.warming.add((order.policy, order.start))
                else:
                    self.waiting.remove(order.task)
                return order
            return "wait" if missing & self.warming else "end"

    def ended(self, order: Order, seconds: float) -> None:
        with self.lock:
            self.longest[order.kind] = max(seconds, self.longest.get(order.kind, 0.0))

    def failed(self, order: Order) -> None:
        """A warm-up that broke takes the runs from it along."""
        if order.task is None:
            with self.lock:
                gone = order.policy, order.start
                self.waiting = [task for task in self.waiting if (task.policy, self.start_of(task)) != gone]


# Any: the JSON of a result file.
def load(out: Path) -> Iterator[tuple[Task, Mapping[str, Any]]]:
    """The runs that ended, of every folder below DIR/results."""
    for file in sorted((out / "results").rglob("*.json")):
        found = json.loads(file.read_text())
        yield Task(**found["task"]), found
