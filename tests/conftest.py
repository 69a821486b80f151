"""Property tests explore with new examples on a desk and repeat the same ones in CI; what takes long starts first."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Without limits on time, which a busy machine would break.
settings.register_profile("desk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")

# Whole runs on Ray: minutes each.
_LONG = ("test_resume.py", "test_end_to_end.py", "test_compare.py", "test_cluster.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture
def no_other_sandboxes() -> Iterator[None]:
    """For tests that count the sandboxes of this machine, or start some: one at a time, in any process."""
    with (Path(tempfile.gettempdir()) / f"cispo-test-sandboxes-{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
