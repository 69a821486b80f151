"""Import of user code named "module:name": rewards, datasets, environments, algorithms."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import pickle
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from cispo.errors import UserError, how_to_install

_SHIPPED = ("rewards", "tools")
"""Packages of the shipped rewards and tools in recipes. They are installed as cispo.rewards and cispo.tools, so that a
user may have ones as well."""
_CHECKOUT = Path(__file__).resolve().parents[2]


Given = tuple[tuple[str, bytes], ...]
"""(path, pickle by value) of objects that a script or notebook has handed over."""

_GIVEN: dict[str, tuple[bytes, object]] = {}


def load_object(path: str, key: str) -> Any:
    """The object that `path` ("module:name", or "module:Class.name") names.

    The current directory is searched after everything that is installed, and the shipped ones after it. `key` is the
    recipe key that holds `path`. Raises UserError when it does not parse, does not import, or has no such name.
    """
    if path in _GIVEN:
        return _GIVEN[path][1]
    module_name, _, names = path.partition(":")
    if module_name == "__main__":
        raise UserError(f"{key}: '{path}' is defined in a script or notebook: start or resume the run from there")
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
            top = (error.name or "").partition(".")[0]
            reason = f"it needs the module '{error.name}', which is not installed{how_to_install(top)}"
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
        if name.partition(".")[0] not in _SHIPPED or not _is_absent(name, error):
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
    if package in _SHIPPED or (package not in sys.modules and importlib.util.find_spec(package) is None):
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


def give(found: object, key: str) -> str:
    """The path by which recipes name an object that Python code hands over, such as a reward function.

    One that a fresh process can import is named by its module. Any other, of a script, a notebook or a function's body,
    is pickled by value and known to this process and its reward processes alone. Raises UserError where it cannot be
    pickled.
    """
    named: object = found
    while isinstance(named, functools.partial):
        named = named.func
    module = getattr(named, "__module__", None) or "__main__"
    names = getattr(found, "__qualname__", None)
    if names is not None and _is_importable(found, module, names):
        return f"{module}:{names}"
    import cloudpickle

    path = f"__main__:{getattr(named, '__name__', type(named).__name__)}"
    try:
        _GIVEN[path] = (cloudpickle.dumps(found), found)
    # The pickling of an object is its own class's code.
    except Exception as error:
        raise UserError(f"{key}: {path} cannot be sent to a process: {type(error).__name__}: {error}") from None
    return path


def given(paths: Sequence[str]) -> Given:
    """The objects among `paths` that were handed over, for a process that is to know them."""
    return tuple((path, _GIVEN[path][0]) for path in paths if path in _GIVEN)


def take_given(objects: Given) -> None:
    """Makes the objects of another process known here. Raises UserError where one cannot be rebuilt."""
    for path, pickled in objects:
        try:
            _GIVEN[path] = (pickled, pickle.loads(pickled))
        except Exception as error:
            raise UserError(f"{path} cannot be rebuilt in a process: {type(error).__name__}: {error}") from None


def _is_importable(found: object, module: str, names: str) -> bool:
    there: object = sys.modules.get(module)
    if module == "__main__" or getattr(there, "__spec__", None) is None:
        return False
    for name in names.split("."):
        there = getattr(there, name, None)
    return there is found
