"""Work for several processes: forked, so that a child has what its parent has, and ended with it however that ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Task = TypeVar("Task")
Done = TypeVar("Done")


def cores() -> int:
    """Return how many processes are worth starting."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def in_order(
    function: Callable[[Task], Done], tasks: Iterable[Task], *, processes: int | None = None
) -> Iterator[Done]:
    """Yield `function(task)` for every task, in their order; at most two tasks a process wait, so memory stays flat.

    With one process, or one task, this process does the work. `function` may be a closure: children are forked.
    """
    count = cores() if processes is None else processes
    waiting = iter(tasks)
    first = next(waiting, None)
    second = next(waiting, None) if first is not None and count > 1 else None
    if first is None:
        return
    if second is None:
        yield function(first)
        yield from map(function, waiting)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, _become_child, (os.getpid(), function)) as pool:
        with _signals_kept():  # the first call forks
            running: list[Future[Done]] = [pool.submit(_in_child, first), pool.submit(_in_child, second)]
        try:
            for task in waiting:
                if len(running) >= 2 * count:
                    yield running.pop(0).result()
                running.append(pool.submit(_in_child, task))
            for one in running:
                yield one.result()
        finally:  # nobody waits for them where the work was broken off
            for one in running:
                one.cancel()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep what tells this process to end until the block is left.

    Python calls functions of its own after a fork (logging's, for one) and ignores what is raised in them: a Ctrl-C
    that arrives meanwhile would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {sign: signal.signal(sign, lambda number, _: came.append(number)) for sign in _ENDING}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
        if came:
            signal.raise_signal(came[0])


_ENDING = (signal.SIGINT, signal.SIGTERM)
_function: Callable[[Any], Any] | None = None


def _become_child(parent: int, function: Callable[[Any], Any]) -> None:
    global _function
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them: the parent decides, and waits for them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()  # what the parent made is not looked through again: its pages stay shared
    gc.set_threshold(100_000)  # rows hold no cycles, and looking for them takes a tenth of the time
    _function = function


def _in_child(task: Any) -> Any:
    assert _function is not None
    return _function(task)
