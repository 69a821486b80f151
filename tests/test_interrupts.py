"""Signals to a run: to stop after the step, to stop at once, to save and go on; and an output without a reader.

`scripts/inject_faults.py` sends them to real runs on Ray.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cispo.runtime.interrupts import kept_handlers
from tests.test_bad_input import recipe  # noqa: F401 (fixture)

ROOT = Path(__file__).parents[1]

# A loop of steps of 0.1 s, as the controller's. Each line of the script is a signal to itself before a step.
PROGRAM = """
import asyncio, os, signal, sys
from cispo.runtime import interrupts
interrupts._LEAVE_SECONDS = 3.0
interrupts.heed_signals()
script = {script!r}

async def run(orders):
    seen = 0
    try:
        with orders.in_steps():
            for step in range(1, 30):
                for number in script.get(step, ()):
                    os.kill(os.getpid(), number)
                await asyncio.sleep(0.1)
                if orders.saves_asked != seen:
                    seen = orders.saves_asked
                    print("saved", step)
                if orders.requested:
                    print("ended after", step)
                    return
        print("went on to the end")
    except asyncio.CancelledError:
        print("cancelled")
        raise

orders = interrupts.Interrupts(lambda sentence: print("said", sentence))
try:
    orders.run(run(orders))
except KeyboardInterrupt:
    print("interrupted")
"""


def heed_terminal() -> None:
    """Undoes the `nohup` of a program that runs the tests."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def outcome(script: dict[int, tuple[int, ...]], before: Callable[[], object] = heed_terminal) -> list[str]:
    code = PROGRAM.format(script={step: tuple(map(int, numbers)) for step, numbers in script.items()})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=before
    )
    assert done.stderr == "" and done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("said")]


STOP = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOP, ids=lambda number: number.name)
def test_an_order_to_stop_ends_the_run_after_its_step(number: signal.Signals) -> None:
    assert outcome({3: (number,)}) == ["ended after 3", "interrupted"]


def test_signals_that_come_together_are_one_order() -> None:
    """`timeout` signals its child and then the group; a closed terminal sends SIGHUP twice, systemd two signals."""
    assert outcome({3: (signal.SIGTERM, signal.SIGTERM)}) == ["ended after 3", "interrupted"]
    assert outcome({3: (signal.SIGTERM, signal.SIGHUP)}) == ["ended after 3", "interrupted"]


def test_a_second_order_ends_the_run_at_once() -> None:
    code = PROGRAM.replace("await asyncio.sleep(0.1)", "await asyncio.sleep(0.1 if step < 3 else 60)")
    code = code.format(script={3: (int(signal.SIGTERM),)})
    run = subprocess.Popen(
        [sys.executable, "-uc", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heed_terminal
    )
    assert run.stdout is not None and run.stdout.readline().startswith("said interrupted: finishing the step")
    # Later than signals that come together.
    time.sleep(0.7)
    run.send_signal(signal.SIGHUP)
    rest, _ = run.communicate(timeout=50)
    assert rest.splitlines() == ["cancelled", "interrupted"] and run.returncode == 0


def test_an_order_to_save_lets_the_run_go_on() -> None:
    lines = outcome({3: (signal.SIGUSR1,), 6: (signal.SIGUSR1,)})
    assert lines == ["saved 3", "saved 6", "went on to the end"]


def test_under_nohup_the_end_of_a_terminal_is_ignored() -> None:
    assert outcome({3: (signal.SIGHUP,)}, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) == [
        "went on to the end"
    ]


def test_handlers_that_a_library_replaces_are_set_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with kept_handlers():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("shell", "shown"),
    [
        ("{command} | head -1", 1),
        ("{command} >/dev/full 2>&1", 0),
        pytest.param("{command} <&- >&- 2>&-", 0, marks=pytest.mark.slow),
        pytest.param("{command} 2>&1 | sleep 0", 0, marks=pytest.mark.slow),
    ],
    ids=["head", "full-disk", "closed", "gone"],
)
def test_a_run_whose_output_cannot_be_written_goes_on(
    recipe: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    shell: str,
    shown: int,
) -> None:
    command = f"{sys.executable} -m cispo.cli train {recipe()}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell.format(command=command)}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == shown
    run = tmp_path / "runs" / "bad"
    assert (run / "checkpoints" / "step_000001" / "cispo.json").exists() and (run / "learning_curve.png").exists()


def test_an_answer_that_cannot_be_written_is_an_error(recipe: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    command = f"{sys.executable} -m cispo.cli show {recipe()} >/dev/full"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "cispo: the output cannot be written: No space left on device\n"


def test_a_machine_without_room_is_said_in_a_sentence(recipe: Callable[..., Path], tmp_path: Path) -> None:  # noqa: F811
    """No file may grow: Python has no temporary folder."""
    done = subprocess.run(
        [sys.executable, "-m", "cispo.cli", "train", str(recipe())],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert (done.returncode, done.stdout) == (1, "") and len(done.stderr.splitlines()) == 1
    assert re.match("cispo: .*(usable temporary directory|cannot write /)", done.stderr)


def test_a_name_with_brackets_and_codes_is_shown_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    from cispo.output.screen import Screen, new_console, visible, warn

    screen = Screen(label="[red]arm")
    screen.print(" in /tmp/[/y] :cat:", title="[bold]name")
    screen.warn("[link=x]cut[/link] \x1b[2J")
    screen.phase("[/]", 2)
    screen.step(2, {"loss": "[/b]"})
    warn(new_console(), "[/]")
    new_console().print("[/x]", visible("a\x1b[31m\tb\n"))
    lines = capfd.readouterr().out.splitlines()
    assert lines[:2] == ["[red]arm: [bold]name in /tmp/[/y] :cat:", "[red]arm: warning: [link=x]cut[/link] \\x1b[2J"]
    assert lines[2].startswith("[red]arm: [/] 2/2  loss [/b]")
    assert lines[3] == "warning: [/]" and lines[4].startswith("[/x] a\\x1b[31m")
