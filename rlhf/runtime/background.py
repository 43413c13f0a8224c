"""Calls that run beside the main thread, in threads that never hold up the end of the process.

``concurrent.futures.ThreadPoolExecutor`` joins its threads when the interpreter leaves: a call that waits for a server
would keep a run that was stopped alive until the server answers. In return a call here must not be inside of torch when
the interpreter leaves, which would abort the process: it sends, waits and reads, and tensors are made elsewhere.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Calls = SimpleQueue[Callable[[], None] | None]


class Background(Executor):
    """At most ``most`` daemon threads, started as they are needed; calls begin in the order in which they were given.

    The threads end with this object, and with the process whatever they are doing.
    """

    def __init__(self, most: int, name: str) -> None:
        self._calls: Calls = SimpleQueue()
        self._most, self._name = most, name
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, self._calls.put, None)

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The call's result to come."""
        future: Future[T] = Future()
        self._calls.put(partial(_answer, future, partial(call, *args, **kwargs)))
        if len(self._threads) < self._most:
            name = f"{self._name}-{len(self._threads)}"
            self._threads.append(threading.Thread(target=_work, args=(self._calls,), name=name, daemon=True))
            self._threads[-1].start()
        return future


def _work(calls: Calls) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # else it would keep what it returned until the next one comes
    calls.put(None)  # for the next thread


def _answer(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
