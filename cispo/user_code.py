"""Import of user code named "module:name": rewards, datasets, environments, algorithms."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from cispo.errors import UserError

_SHIPPED = "rewards"
"""Package of the shipped rewards in recipes. It is installed as cispo.rewards, so that a user may have one as well."""
_CHECKOUT = Path(__file__).resolve().parents[1]


def load_object(path: str, key: str) -> Any:
    """The object that `path` ("module:name", or "module:Class.name") names.

    The current directory is searched after everything that is installed, and the shipped rewards after it. `key` is the
    recipe key that holds `path`. Raises UserError when it does not parse, does not import, or has no such name.
    """
    module_name, _, names = path.partition(":")
    if not module_name or not names:
        raise UserError(f"{key}: '{path}' is not of the form module:name")
    found: object = _import_module(module_name, path, key)
    for name in names.split("."):
        if not hasattr(found, name):
            raise UserError(f"{key}: '{path}': {_describe(found)} has no '{name}'{_suggest(name, dir(found))}")
        found = getattr(found, name)
    return found


def _import_module(name: str, path: str, key: str) -> ModuleType:
    importlib.invalidate_caches()
    _search_current_directory(name.partition(".")[0])
    try:
        return _import_own_or_shipped(name)
    except ModuleNotFoundError as error:
        if _is_absent(name, error):
            reason = f"there is no module '{error.name}' on the Python path or in the current directory ({Path.cwd()})"
        else:
            reason = f"it needs the module '{error.name}', which is not installed"
        raise UserError(f"{key}: cannot import '{path}': {reason}") from error
    # The import runs the user's code, so any exception is possible.
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: cannot import '{path}': {type(error).__name__}: {error}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """The user's line that led to an error, as " (file, line N)"; "" where Python names it itself."""
    installed = ("<", __file__, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(installed)]
    if isinstance(error, SyntaxError) or not frames:
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _import_own_or_shipped(name: str) -> ModuleType:
    """The user's module `name`, else the shipped one under its own name: `rewards.gym` as `cispo.rewards.gym`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.partition(".")[0] != _SHIPPED or not _is_absent(name, error):
            raise
        own = error
    try:
        return importlib.import_module(f"cispo.{name}")
    except ModuleNotFoundError as error:
        raise own if _is_absent(f"cispo.{name}", error) else error from None


def _is_absent(name: str, error: ModuleNotFoundError) -> bool:
    """Whether `name` or a package above it was not found, and not a module that it imports."""
    return error.name is not None and (name == error.name or name.startswith(error.name + "."))


def _search_current_directory(package: str) -> None:
    """Adds the current directory, which a console script leaves out, to sys.path if `package` lies there.

    It comes last, but before a checkout of CISPO that is on the path: the user's `rewards` wins over the shipped one.
    """
    here = str(Path.cwd())
    if here in sys.path or PathFinder.find_spec(package, [here]) is None:
        return
    if package == _SHIPPED or (package not in sys.modules and importlib.util.find_spec(package) is None):
        checkout = (i for i, folder in enumerate(sys.path) if folder and Path(folder).resolve() == _CHECKOUT)
        sys.path.insert(next(checkout, len(sys.path)), here)


def _describe(found: object) -> str:
    if isinstance(found, ModuleType):
        return f"module '{found.__name__}' ({getattr(found, '__file__', None) or 'built in'})"
    return f"'{getattr(found, '__name__', type(found).__name__)}'"


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=3)
    return f", did you mean {' or '.join(close)}?" if close else ""


def is_hub_id(source: str) -> bool:
    """Whether `source` can be "owner/name" on the Hugging Face hub, and not a misspelt local path.

    The hub client retries for a minute before it gives up, so a path below an existing folder is never asked for.
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not Path(source).parent.is_dir()
