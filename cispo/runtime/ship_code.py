"""Shipping of this process's code to the nodes of a Ray cluster.

    loaded modules - installed packages -> folders and files -> Ray's runtime environment: py_modules

Shipped are CISPO from a checkout, and the modules that a recipe names as module:name, with their imports. Packages that
are installed here must be installed on the nodes.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

from cispo.errors import UserError

# Patterns of a .gitignore that leave .py files alone, without the data and compiled files of a large package folder. No
# pattern may match ".", the name of the folder itself.
_CODE_ONLY = ["?*.*", ".?*", "!*.py"]

# Part of the path of every folder that Ray has unpacked on a node.
_UNPACKED = "_ray_pkg_"


def shipped_code() -> dict[str, list[str]]:
    """Ray's runtime_env with this process's code; empty where a submitted job brings py_modules of its own."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    sources = [str(path) for path in loaded_sources()]
    if not sources or "py_modules" in job or "excludes" in job:
        return {}
    return {"py_modules": sources, "excludes": _CODE_ONLY}


def loaded_sources() -> list[Path]:
    """The package folder or file of every loaded top-level module that is Python and not installed, sorted.

    Without the folders that Ray has unpacked, such as a job's working_dir: they are on every node already.
    """
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name == "__main__" or not file.endswith(".py"):
            continue
        path, parts = Path(file).resolve(), name.split(".")
        # A module of a package with a file of its own may lie elsewhere, as cispo.rewards does in a checkout.
        if len(parts) > 1 and getattr(sys.modules.get(parts[0]), "__file__", None):
            continue
        if path.name == "__init__.py":
            path = path.parent
        # A module a.b.c lies two folders below the package folder that is shipped for it.
        for _ in parts[1:]:
            path = path.parent
        if path.stem == parts[0] and not any(path.is_relative_to(place) for place in installed):
            found.add(path)
    return sorted(path for path in found if _UNPACKED not in str(path))


def check_output_dir(output_dir: str) -> None:
    """Raises UserError where output_dir lies in a job's folder that Ray unpacked, and deletes after the job."""
    if _UNPACKED in str(Path(output_dir).absolute()):
        raise UserError(
            f"output_dir '{output_dir}' lies in the folder that Ray unpacked for this job and deletes after it: give "
            "an absolute path on a file system that the nodes share"
        )
