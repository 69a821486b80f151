"""`scripts/bench_all.py`: its commands exist, each card has one measurement at a time, and none runs too long."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_all import MEASUREMENTS, ROOT, Measurement, run_all

SCRIPT = """
import os, sys, time
begun = time.monotonic()
time.sleep(float(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], begun, time.monotonic())
sys.exit(int(sys.argv[2]))
"""


def spans(folder: Path) -> dict[str, tuple[set[str], float, float]]:
    """Name -> its cards, beginning and end, of those that ended by themselves."""
    found = {}
    for file in folder.glob("*.log"):
        if words := file.read_text().split():
            found[file.stem] = (set(words[0].split(",")), float(words[1]), float(words[2]))
    return found


def measure(folder: Path, wanted: Sequence[Measurement], **options: Any) -> bool:
    given = {"model": "none", "out": folder, "alone": False, "minutes": 10.0, **options}
    return asyncio.run(run_all(wanted, ["0", "1", "2"], Namespace(**given)))


def test_every_script_is_there() -> None:
    assert len({one.name for one in MEASUREMENTS}) == len(MEASUREMENTS)
    for one in MEASUREMENTS:
        _, script, *arguments = one.words("/models/small", Path("/out"))
        assert (ROOT / script).is_file() and not any("{" in word for word in arguments), one.name


@pytest.mark.parametrize("alone", [False, True])
def test_a_card_has_one_measurement_at_a_time(alone: bool, tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text(SCRIPT)
    needs = {"one": 1, "two": 2, "three": 1, "four": 2, "five": 3}
    wanted = [Measurement(name, f"{script} 0.3 0", cards) for name, cards in needs.items()]
    assert measure(tmp_path, [*wanted, Measurement("large", f"{script} 0 0", 4)], alone=alone)
    found = spans(tmp_path)
    assert {name: len(cards) for name, (cards, _, _) in found.items()} == (dict.fromkeys(needs, 3) if alone else needs)
    pairs = [(a, b) for a in found.values() for b in found.values() if a is not b]
    assert all(a[2] <= b[1] or b[2] <= a[1] for a, b in pairs if a[0] & b[0])
    assert any(a[1] < b[1] < a[2] for a, b in pairs) is not alone


def test_a_failure_and_an_end_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "sleep.py"
    script.write_text(SCRIPT)
    wanted = [
        Measurement("broken", f"{script} 0 7", 1, 0),
        Measurement("endless", f"{script} 60 0", 1, 0),
        Measurement("long", f"{script} 0 0", 1, 5),
    ]
    assert not measure(tmp_path, wanted, minutes=2 / 60)
    said = capsys.readouterr().out
    assert "broken ended with exit code 7" in said and "endless was stopped after 2 s" in said
    assert "long has no time left" in said and spans(tmp_path).keys() == {"broken"}
