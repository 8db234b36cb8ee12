"""Runs coroutines where nobody else's event loop is in the way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import wraps
from typing import Any, TypeVar

R = TypeVar("R")


def run(coroutine: Coroutine[Any, Any, R], threads: Any = None) -> R:
    """
    What *coroutine* gives, from an event loop of its own.

    asyncio runs one loop a thread. Where gevent has made greenlets of threads, all of them are one, so there the loop
    is given a real one: of *threads*, a pool of gevent's, or else one of the few with which gevent itself looks up names.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return asyncio.run(coroutine)
    import gevent

    pool = gevent.get_hub().threadpool if threads is None else threads  # an idle pool counts as false
    outcome: tuple[R, None] | tuple[None, BaseException] = pool.apply(copy_context().run, (_attempt, coroutine))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _attempt(coroutine: Coroutine[Any, Any, R]) -> tuple[R, None] | tuple[None, BaseException]:
    # gevent writes a traceback, text and all, of what a thread of its pool raises.
    try:
        return asyncio.run(coroutine), None
    except BaseException as error:  # noqa: BLE001  # it is raised where somebody waits
        return None, error


def make_async_to_sync(limit: int) -> Callable[[Callable[..., Coroutine[Any, Any, Any]]], Callable[..., Any]]:
    """
    Make Flask's ``async_to_sync`` for gevent: at most *limit* async functions run at a time, each in a thread of its own.

    They have a pool for themselves, so that nobody else's look-up waits until they are done. To be called in the process and
    the thread that serves.
    """
    from gevent.threadpool import ThreadPool

    threads = ThreadPool(limit)

    def async_to_sync(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return run(function(*args, **kwargs), threads)

        return call

    return async_to_sync
