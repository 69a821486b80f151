"""Calls that belong together: when one fails, the others end before its error goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def together(*calls: Awaitable[T]) -> list[T]:
    """The results of all calls, or the first error.

    `asyncio.gather` leaves the other calls running: they would meet processes that are being ended because of the
    error, and take that for failures of their own.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
