"""CISPO: RL post-training for lightning-attention and mixture-of-experts language models.

import cispo
run = cispo.train("quickstart", rewards=[f], train={"steps": 20})
"""

import os.path
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cispo.api import TrainedRun, compare, evaluate, export, generate, sft, show, train

__version__ = "0.1.0"
__all__ = ["TrainedRun", "__version__", "compare", "evaluate", "export", "generate", "sft", "show", "train"]

# The packages cispo.rewards and cispo.recipes: a wheel has them in this folder, a checkout beside it.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "rewards")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _of_api(name: str) -> property:
    def get(_: ModuleType) -> object:
        from cispo import api

        return getattr(api, name)

    # The import system sets a submodule as an attribute of its package.
    return property(get, lambda *_: None)


class _Package(ModuleType):
    """Imports nothing before it is asked for a function. `evaluate` and `compare` are functions of this package and
    names of modules in it: attribute access gives the function, `from cispo.evaluate import ...` the module."""

    TrainedRun = _of_api("TrainedRun")
    train = _of_api("train")
    sft = _of_api("sft")
    evaluate = _of_api("evaluate")
    generate = _of_api("generate")
    compare = _of_api("compare")
    show = _of_api("show")
    export = _of_api("export")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
