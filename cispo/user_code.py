"""Import of user code named "module:name": rewards, datasets, environments, algorithms."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from cispo.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
"""Where `rewards/` lies when CISPO runs from a checkout."""


def load_object(path: str, key: str) -> Any:
    """The object that `path` ("module:name", or "module:Class.name") names.

    The current directory and the project's root are searched after everything that is installed. `key` is the recipe
    key that holds `path`. UserError when it does not parse, does not import, or has no such name.
    """
    module_name, _, names = path.partition(":")
    if not module_name or not names:
        raise UserError(f"{key}: '{path}' is not of the form module:name")
    found: Any = _import_module(module_name, path, key)
    for name in names.split("."):
        if not hasattr(found, name):
            raise UserError(f"{key}: '{path}': {_describe(found)} has no '{name}'{_suggest(name, dir(found))}")
        found = getattr(found, name)
    return found


def _import_module(name: str, path: str, key: str) -> ModuleType:
    importlib.invalidate_caches()
    _extend_search_path(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            reason = f"there is no module '{error.name}' on the Python path or in the current directory ({Path.cwd()})"
        else:
            reason = f"it needs the module '{error.name}', which is not installed"
        raise UserError(f"{key}: cannot import '{path}': {reason}") from error
    # Importing runs the user's code: whatever it raises is the reason to report.
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: cannot import '{path}': {type(error).__name__}: {error}") from error


def _extend_search_path(module_name: str) -> None:
    """Append the directories that a console script leaves out of sys.path, once, and only when they are needed."""
    top = module_name.partition(".")[0]
    if top in sys.modules or importlib.util.find_spec(top) is not None:
        return
    for directory in (str(Path.cwd()), str(PROJECT_ROOT)):
        if directory not in sys.path:
            sys.path.append(directory)


def _describe(found: Any) -> str:
    if isinstance(found, ModuleType):
        return f"module '{found.__name__}' ({getattr(found, '__file__', None) or 'built in'})"
    return f"'{found.__name__ if hasattr(found, '__name__') else type(found).__name__}'"


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=3)
    return f", did you mean {' or '.join(close)}?" if close else ""


def is_hub_id(source: str) -> bool:
    """Whether `source` can be "owner/name" on the Hugging Face hub, and not a misspelt local path.

    The hub client retries for a minute before it gives up, so a path below a folder that exists is never asked for.
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not Path(source).parent.is_dir()
