"""Property tests explore with new examples on a desk and repeat the same ones in CI; what takes long starts first."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Whole runs on Ray: minutes each.
_LONG = ("test_resume.py", "test_end_to_end.py", "test_compare.py", "test_cluster.py")
# They count the sandboxes of this machine, or start some.
_TOGETHER = {"test_sandbox.py": "sandboxes", "test_code_reward.py": "sandboxes"}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders files, and keeps the tests of one in one process where pytest-xdist shares them out (scripts/test.sh)."""
    items.sort(key=lambda item: item.path.name not in _LONG)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_TOGETHER.get(item.path.name, item.path.name)))
