r"""Worker processes that work under a deadline an item: what grades completions in training and in evaluation.

Math-verify's own timeouts are signals: they work in a main thread only, and not before a computation in C has ended,
so that one `\boxed{\frac{3^{2500000}+1}{7^{1250000}+2}}` holds its process for 11 seconds where 5 are allowed. Here it
holds one worker, at most until the deadline. `DeadlinePool.start` takes items without waiting.

Assumes that a result depends on the item alone: items that repeat are worked on once.

Degenerate cases: an item that misses the deadline is `TIMEOUT`, one whose worker dies `CRASHED`. Where workers cannot
be started (`can_start_workers`: in a daemonic process, on Windows) the caller does the work itself, without a
deadline.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from enum import Enum
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool


MAX_WORKERS = 16


class Failure(Enum):
    """In place of a result."""

    TIMEOUT = "timeout"
    CRASHED = "crashed"


class DeadlinePool:
    """Calls a function on items, `function(*item)`, in worker processes that start when first needed.

    Args:
        function: What a worker does with an item, in its main thread; picklable.
        num_workers: None: one for each core that this process may use, divided among the ranks of the machine, at most
            16.
        deadline: Seconds that one item may take before its worker is killed.

    Raises:
        ValueError: If there is no worker or no time.
    """

    def __init__(self, function: Callable, num_workers: int | None = None, deadline: float = 30.0):
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, or None for one a core, got {num_workers}.")
        if not deadline > 0:
            raise ValueError(f"deadline must be a positive number of seconds, got {deadline}.")
        self.function = function
        self.num_workers = num_workers
        self.deadline = deadline
        self._pool: ProcessPool | None = None
        self._stop_pool: Callable[[], None] = lambda: None
        self._pending: dict[str, ProcessFuture] = {}
        self._lock = threading.RLock()
        _pools.add(self)

    def results(self, items: Sequence[tuple]) -> list[Any]:
        """The result of each item, or why there is none, whether or not `start` has seen it."""
        keys = [repr(item) for item in items]  # not every item can be hashed
        with self._lock:
            try:
                result_of = self._collect(dict(zip(keys, items, strict=True)))
            except BaseException:  # Ctrl-C, or what the function raised: nobody will ask for the rest
                self.stop()
                raise
        return [result_of[key] for key in keys]

    def start(self, items: Sequence[tuple]) -> None:
        """Begins to work and returns at once. The call that asks for these items waits for what is left.

        Drops what an earlier `start` began and no call has asked for.
        """
        with self._lock:
            if self._pending:
                # Not by cancelling: pebble ends the worker of a cancelled item, which may be on the next one by then.
                self.stop()
            self._submit({repr(item): item for item in items})

    def stop(self) -> None:
        """Ends the workers and drops their work. The next use starts new ones; Python's exit needs no call of it."""
        with self._lock:
            self._stop_pool()
            self._pool = None
            self._pending.clear()

    def _submit(self, items: dict[str, tuple]) -> None:
        for key, item in items.items():
            if key in self._pending:
                continue
            # One item a task, though a task costs 0.1 ms: the deadline is pebble's, and pebble's is the task's.
            self._pending[key] = self._running_pool().schedule(self.function, item, timeout=self.deadline)

    def _collect(self, items: dict[str, tuple]) -> dict[str, Any]:
        from concurrent.futures.process import BrokenProcessPool

        from pebble import ProcessExpired

        results = {}
        for _ in range(2):
            self._submit({key: item for key, item in items.items() if key not in results})
            futures = {key: self._pending.pop(key) for key in items if key in self._pending}
            waiting: set[Future] = set(futures.values())
            # A pool breaks if a worker is killed while none has work, and may then forget futures.
            while waiting and self._pool is not None and self._pool.active:
                _, waiting = wait(waiting, timeout=1.0)
            for key, future in futures.items():
                if not future.done():
                    continue
                try:
                    results[key] = future.result()
                except TimeoutError:
                    results[key] = Failure.TIMEOUT
                except ProcessExpired:
                    results[key] = Failure.CRASHED
                except BrokenProcessPool:
                    pass
            if len(results) == len(items):
                return results
            self.stop()
        raise RuntimeError(
            "the worker processes end before they have done anything. The machine may be out of memory or processes."
        )

    def _forget(self) -> None:
        """After a fork: workers, their work and a lock that a thread held belong to the parent."""
        self._pool, self._pending = None, {}
        self._stop_pool = lambda: None
        self._lock = threading.RLock()

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and self._pool.active:
            return self._pool
        from loky.backend.context import get_context
        from pebble import ProcessPool

        self.stop()
        # A fork of this process would inherit its threads and its CUDA context. Loky starts a new interpreter that,
        # unlike one of multiprocessing, does not import the running script: without `if __name__ == "__main__"`, each
        # worker would train as well.
        self._pool = ProcessPool(
            self.num_workers or _default_workers(), initializer=_prepare_worker, context=get_context("loky")
        )
        # Unlike atexit, this also runs at the end of a process of multiprocessing, which waits for its children first
        # and would do so for ever.
        self._stop_pool = Finalize(self, _stop, args=(self._pool,), exitpriority=100)
        return self._pool


_pools: weakref.WeakSet[DeadlinePool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _prepare_worker() -> None:
    """Runs in a new worker, before its first item and so outside of any deadline."""
    # Pebble ends a worker with SIGTERM, which its handler in Python does not hear while it is in C.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import math_verify  # noqa: F401 - half a second, once


def can_start_workers() -> bool:
    return os.name == "posix" and not multiprocessing.current_process().daemon


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_workers() -> int:
    """The cores of this process, shared with the other ranks of the machine."""
    return max(1, min(MAX_WORKERS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()
