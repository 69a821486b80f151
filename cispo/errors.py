"""Two kinds of failure, two exit codes: bad input (2) and a run that cannot go on (1).

Both cross Ray unchanged and end as one sentence. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad input of the user: one sentence that names the key or file. The CLI prints it and exits with code 2."""


class MissingPackage(UserError):
    """A package of one of CISPO's extras is not installed."""


EXTRAS = {
    "aiolimiter": "judge",
    "math_verify": "math",
    "matplotlib": "report",
    "openai": "judge",
    "reasoning_gym": "gym",
}


def how_to_install(module: str) -> str:
    """The command that brings a module of an extra, in brackets after a space; "" for any other module."""
    return f" (pip install 'cispo[{EXTRAS[module]}]')" if module in EXTRAS else ""


def missing_package(user: str, module: str) -> MissingPackage:
    """The error of `user`, a key, file or command, that needs a module."""
    return MissingPackage(f"{user} needs {module.replace('_', '-')}, which is not installed{how_to_install(module)}")


class RunError(RuntimeError):
    """A run that cannot go on through no fault of its input: one sentence. The CLI prints it and exits with code 1."""


class Diverged(RunError):
    """Numbers of a run are not finite. The same run would end the same way, so no part of it is restarted."""


class ProcessDied(RunError):
    """A process of the run ended by itself, or was killed."""
