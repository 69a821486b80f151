"""matplotlib, of the extra `report`, for pictures in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cispo.errors import missing_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(user: str, *, size: tuple[float, float] = (6.4, 4.8)) -> Figure:
    """A figure of `size` inches. Raises MissingPackage, naming `user`, where matplotlib is not installed.

    Without pyplot, which would keep it, may open a window, and has a backend that is the notebook's.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_package(user, (error.name or "matplotlib").partition(".")[0]) from error
    return Figure(figsize=size, layout="constrained")
