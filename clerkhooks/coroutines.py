"""Runs coroutines where nobody else's event loop is in the way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
THREADS = 64


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """
    What *coroutine* gives, from an event loop of its own.

    asyncio runs one loop a thread. Where gevent has made greenlets of threads, all of them are one, so there the loop
    is given a real one: one of 64, apart from the few with which gevent itself looks up names.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return asyncio.run(coroutine)
    result: R = _threads().apply(copy_context().run, (asyncio.run, coroutine))
    return result


@cache
def _threads() -> Any:
    from gevent.threadpool import ThreadPool

    return ThreadPool(THREADS)


def to_sync(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """A plain function that does what the async *function* does."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return run(function(*args, **kwargs))

    return call
