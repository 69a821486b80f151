"""The start of a run: its parts in the metrics, processes before inputs, engines whose first weights follow."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from cispo.engines.choice import settled
from cispo.engines.serving import ServedEngine
from cispo.engines.vllm_engine import VLLMEngine
from cispo.errors import RunError, UserError
from cispo.policies.loading import init_policy, save_policy
from cispo.recipe.load import load_recipe
from cispo.rollout.renderer import renderer_of
from cispo.runtime.ahead import Ahead, can_start, engines_wait, planned
from cispo.runtime.placement import placement_of
from cispo.runtime.start_parts import Parts, StartParts
from cispo.runtime.watchdog import Activity
from cispo.start import num_processes, one_thread
from cispo.types import RepetitionStop, Sampling
from cispo.warmup import demonstration_batches, demonstrations_of
from cispo.weights.publish import publish_weights, weights_folder
from tests.served import sampled, update
from tests.test_vllm_parity import QWEN3, lightning
from tests.test_workers import started, workers

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
SAMPLING = Sampling(max_tokens=20, eos_ids=(), repetition=RepetitionStop(run_length=0))


def test_the_parts_of_a_start_add_up_to_it() -> None:
    start = StartParts()
    for _ in range(2):
        with start.timed("inputs"):
            time.sleep(0.05)
    engines = [
        {"process": 1.0, "import": 2.0, "build": 3.0, "load": 2.5},
        {"process": 4.0, "import": 2.5, "build": 0.5},
    ]
    found = start.metrics({"engine": engines, "critic": []})
    assert found["time/start/inputs"] >= 0.1
    assert found["time/start/inputs"] + found["time/start/other"] == pytest.approx(found["time/start"])
    # Parts of a part do not make a process slower.
    assert found["time/start/engine/process"] == 4.0 and "time/start/engine/load" not in found


def test_a_function_that_fails_is_counted_too() -> None:
    parts = Parts()
    with pytest.raises(ZeroDivisionError):
        parts.counted("division", lambda: 1 / 0)()
    assert parts["division"] >= 0


@pytest.mark.parametrize(
    ("changes", "address", "starts"),
    [([], None, True), (["runtime=local", "learner.ranks=1"], None, False), ([], "10.0.0.1:6379", False)],
)
def test_only_a_cluster_of_this_machine_is_started_ahead(
    changes: list[str], address: str | None, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert can_start(load_recipe(QUICKSTART, changes)) is starts


@pytest.mark.parametrize(("processors", "changes", "wait"), [(2, [], True), (4, [], False), (2, ["sft=null"], False)])
def test_engines_wait_where_a_warm_up_has_no_processor_to_spare(
    processors: int, changes: list[str], wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    recipe = load_recipe(QUICKSTART, [*changes, "device=cpu"])
    assert engines_wait(recipe, num_processes(recipe)) is wait
    placement = placement_of(recipe, available=0)
    names = [one.name for one in planned(recipe, placement, critic=False, settle=settled, engines=True)]
    assert names == ["learner-0", "learner-1", *([] if wait else ["engine-0"])]


def test_a_sync_of_weights_is_split_into_its_parts() -> None:
    for transport in ("shared_memory", "broadcast"):
        group, _ = workers([[], []], transport=transport)
        asyncio.run(started(group))
        first = dict(group.sync_parts)
        expected = {"drain", "gather", "install", "finish"} | ({"join"} if transport == "broadcast" else set())
        assert first.keys() == expected
        asyncio.run(group.sync_weights(2))
        # Those of the last one alone: the group of a broadcast meets once.
        assert group.sync_parts.keys() == expected - {"join"} and group.sync_parts != first


def test_an_error_of_a_start_ahead_is_raised_where_the_processes_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with Ahead(load_recipe(QUICKSTART, []), Activity(), critic=lambda: False, settle=settled) as ahead:
        with pytest.raises((UserError, RunError), match="RAY_TMPDIR /proc/nowhere is not a folder"):
            asyncio.run(ahead.take())


_BAD_INPUT = """
import sys, psutil
from cispo.cli import main
sys.argv = ["cispo", "train", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(end.code, [p.name() for p in psutil.Process().children() if "orphans" not in " ".join(p.cmdline())])
"""


def test_bad_input_leaves_no_process_of_a_start_ahead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _BAD_INPUT, str(QUICKSTART), "data.source=missing.jsonl", f"output_dir={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1] == "2 []", done.stdout
    assert "missing.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupt_during_the_start_ends_it_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cispo.cli", "train", str(QUICKSTART), f"output_dir={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as run:
        server = until(lambda: [p for p in psutil.Process(run.pid).children() if p.name() == "gcs_server"])
        asked = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
        # Fewer than Ray's own start takes.
        assert run.returncode == 130 and time.monotonic() - asked < 5
    assert said.strip() == "cispo: interrupted"
    psutil.wait_procs(server, timeout=15)
    assert not any(process.is_running() for process in server)


def until(find: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    while not (found := find()):
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    "config", [lightning(), pytest.param(QWEN3, marks=pytest.mark.slow)], ids=["lightning", "dense"]
)
def test_an_engine_that_reads_no_weights_samples_those_that_follow(config: dict[str, object], tmp_path: Path) -> None:
    policy = init_policy(config, seed=0)
    save_policy(policy, tmp_path)
    prompts = [[5, 6, 7], [8, 9]]
    completions = []
    for read in (True, False):
        engine = engine_of(tmp_path, read_weights=read)
        try:
            if not read:
                with weights_folder("test") as weights:
                    update(engine, str(publish_weights(policy.to_hf(), weights, 1)), 1)
            completions.append(sampled(engine, prompts, SAMPLING, seed=3))
            assert {"import", "config", "load", "profile", "cache", "warm_up"} <= engine.start_parts.keys()
        finally:
            engine.close()
    for one, other in zip(*completions, strict=True):
        assert one.token_ids == other.token_ids and one.logprobs == other.logprobs


def engine_of(folder: Path, *, read_weights: bool) -> ServedEngine:
    engine = VLLMEngine(
        str(folder), dtype="float32", seed=0, max_context=64, max_sequences=4, read_weights=read_weights
    )
    return ServedEngine(engine)


def test_new_weights_do_not_depend_on_torchs_own_generator() -> None:
    expected = init_policy(lightning(), seed=1).to_hf()
    torch.manual_seed(5)
    found = init_policy(lightning(), seed=1).to_hf()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_demonstrations_are_made_when_they_are_drawn() -> None:
    """In the order that a shuffled list of them would have."""
    recipe = load_recipe(QUICKSTART, ["sft.data.limit=50"])
    assert recipe.sft is not None
    found = demonstrations_of(recipe.sft.data, renderer_of(recipe), recipe)
    assert len(found) == 50 and found[7] is not found[7] and [s.group_id for s in found[3:5]] == [3, 4]
    order = list(range(50))
    random.Random("3/0").shuffle(order)
    batch = next(demonstration_batches(found, batch_size=16, seed=3))
    assert [sample.group_id for sample in batch] == order[:16]
    again = found[order[0]]
    assert torch.equal(batch[0].token_ids, again.token_ids) and torch.equal(batch[0].loss_mask, again.loss_mask)
    assert int(again.loss_mask.sum()) == 12, "four numbers, three commas and the end"


def test_a_drivers_torch_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its processes run, unless the user asks for more. (vLLM replaces torch's function here.)"""
    threads = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for variable, inside in ((None, 1), ("3", 3)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        with one_thread():
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3
