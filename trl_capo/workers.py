r"""Worker processes with a deadline for each item. They grade completions in training and in evaluation.

Math-verify's own timeouts are signals. They work in the main thread only, and only after a computation in C has ended:
one `\boxed{\frac{3^{2500000}+1}{7^{1250000}+2}}` blocks its process for 11 seconds where 5 are allowed. Here it blocks
one worker, at most until the deadline. `DeadlinePool.start` accepts items without waiting.

Assumes that a result depends on the item alone: repeated items are processed once.

Degenerate cases: an item that misses the deadline is `TIMEOUT`; an item whose worker dies is `CRASHED`. If workers
cannot be started (see `can_start_workers`: in a daemonic process, or on Windows), the caller does the work itself,
without a deadline.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from enum import Enum
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool


MAX_WORKERS = 16


class Failure(Enum):
    """Stands in for a missing result."""

    TIMEOUT = "timeout"
    CRASHED = "crashed"


class DeadlinePool:
    """Calls a function on items, `function(*item)`, in worker processes that start when first needed.

    Args:
        function: The function that a worker calls on an item, in its main thread. Must be picklable.
        num_workers: Number of workers. None means one for each core that this process may use, divided among the ranks
            on the machine, at most 16.
        deadline: Seconds that one item may take before its worker is killed.
        prepare: Called in each new worker before its first item, without a deadline, for imports that take long. Must
            be picklable. If it fails, the items still run, and each reports what is missing.

    Raises:
        ValueError: The number of workers or the deadline is too small.
    """

    def __init__(
        self,
        function: Callable,
        num_workers: int | None = None,
        deadline: float = 30.0,
        prepare: Callable[[], object] | None = None,
    ):
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, or None for one per core, got {num_workers}.")
        if not deadline > 0:
            raise ValueError(f"deadline must be a positive number of seconds, got {deadline}.")
        self.function = function
        self.num_workers = num_workers
        self.deadline = deadline
        self.prepare = prepare
        self._pool: ProcessPool | None = None
        self._stop_pool: Callable[[], None] = lambda: None
        self._pending: dict[str, ProcessFuture] = {}
        self._lock = threading.RLock()
        _pools.add(self)

    def results(self, items: Sequence[tuple]) -> list[Any]:
        """The result of each item, or a `Failure`. Works whether or not `start` has seen the item."""
        keys = [repr(item) for item in items]  # not every item can be hashed
        with self._lock:
            try:
                result_of = self._collect(dict(zip(keys, items, strict=True)))
            except BaseException:  # Ctrl-C, or an error in the function: nobody will ask for the rest
                self.stop()
                raise
        return [result_of[key] for key in keys]

    def start(self, items: Sequence[tuple]) -> None:
        """Starts work on the items and returns immediately. `results` waits for the unfinished ones.

        Drops items of an earlier `start` whose results nobody has requested.
        """
        with self._lock:
            if self._pending:
                # Do not cancel: pebble kills the worker of a cancelled item, which may already run the next one.
                self.stop()
            self._submit({repr(item): item for item in items})

    def stop(self) -> None:
        """Ends the workers and drops their work. The next use starts new ones. At exit this happens by itself."""
        with self._lock:
            self._stop_pool()
            self._pool = None
            self._pending.clear()

    def _submit(self, items: dict[str, tuple]) -> None:
        for key, item in items.items():
            if key in self._pending:
                continue
            # One item per task, though a task costs 0.1 ms, because pebble's deadline applies to a whole task.
            self._pending[key] = self._running_pool().schedule(self.function, item, timeout=self.deadline)

    def _collect(self, items: dict[str, tuple]) -> dict[str, Any]:
        from concurrent.futures.process import BrokenProcessPool

        from pebble import ProcessExpired

        results = {}
        for _ in range(2):
            self._submit({key: item for key, item in items.items() if key not in results})
            futures = {key: self._pending.pop(key) for key in items if key in self._pending}
            waiting: set[Future] = set(futures.values())
            # A pool breaks if a worker is killed while all are idle, and may then forget futures.
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
        """Resets the pool after a fork: the workers, their work and a lock held by a thread belong to the parent."""
        self._pool, self._pending = None, {}
        self._stop_pool = lambda: None
        self._lock = threading.RLock()

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and self._pool.active:
            return self._pool
        from loky.backend.context import get_context
        from pebble import ProcessPool

        self.stop()
        # A fork of this process would inherit its threads and its CUDA context. Loky starts a new interpreter. Unlike
        # multiprocessing, it does not import the running script: if that lacks `if __name__ == "__main__"`, each
        # worker would train as well.
        self._pool = ProcessPool(
            self.num_workers or _default_workers(),
            initializer=_prepare_worker,
            initargs=(self.prepare,),
            context=get_context("loky"),
        )
        # Unlike atexit, this also runs when a multiprocessing process ends. Such a process waits for its children
        # before it runs atexit, and would never finish.
        self._stop_pool = Finalize(self, _stop, args=(self._pool,), exitpriority=100)
        return self._pool


_pools: weakref.WeakSet[DeadlinePool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _prepare_worker(prepare: Callable[[], object] | None) -> None:
    """Runs in a new worker before its first item, so no deadline applies."""
    # Pebble ends a worker with SIGTERM. A Python handler would not run while the worker is in C.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if prepare is not None:
        with suppress(Exception):  # the pool would end without a reason
            prepare()


def can_start_workers() -> bool:
    return os.name == "posix" and not multiprocessing.current_process().daemon


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_workers() -> int:
    """Number of cores, divided among the ranks on this machine."""
    return max(1, min(MAX_WORKERS, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()
