"""Stop a command cleanly, together with every process that it started.

- SIGTERM and SIGHUP end a command as Ctrl-C does: it cleans up and prints one line that says what happened. If the
  main thread does not react in time (because a collective waits for a lost process, or a call into C takes long), the
  process ends anyway.
- A helper process ends with its parent, even if the parent was killed. It checks its parent's id once a second, which
  works in every thread and on every system.
- `Children.run` runs a command in its own session, so that all its processes can be ended together.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


GRACE = 30.0  # seconds between a signal and the end of a process that does not react
PARENT = "TRL_CAPO_PARENT"  # id of the process that a command belongs to
# `accelerate launch` and torchrun set these in the processes that they start.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class Stopped(KeyboardInterrupt):
    """A signal told this process to stop. Code that lets Ctrl-C through also lets this through.

    Attributes:
        signal: The signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


@contextmanager
def stopping_on_signals(name: str) -> Iterator[None]:
    """Raise `Stopped` in the main thread at SIGTERM and SIGHUP, and watch the parent if this process has an owner.

    Args:
        name: The command's name, for the line printed if the process must be killed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise Stopped(number)

    numbers = [getattr(signal, sent) for sent in ("SIGTERM", "SIGHUP") if hasattr(signal, sent)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, stop) for number in numbers}
    inbox, outbox = socket.socketpair()
    outbox.setblocking(False)
    woken = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
    _forget_after_fork(numbers)
    owner = os.environ.pop(PARENT, None)
    parent = int(owner) if owner else os.getppid() if any(map(os.environ.get, LAUNCHED)) else None
    watch = threading.Thread(target=_watch, args=(name, inbox, numbers, parent), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        with suppress(OSError):
            outbox.send(b"\0")
        watch.join()
        inbox.close()
        outbox.close()


_handled: set[int] = set()


def _forget_after_fork(numbers: Sequence[int]) -> None:
    """Detach a forked child from the signal socket, because its own end would look like the parent's."""
    if not _handled:
        os.register_at_fork(after_in_child=_reset)
    _handled.update(numbers)


def _reset() -> None:
    for number in _handled:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _watch(name: str, inbox: socket.socket, numbers: Sequence[int], parent: int | None) -> None:
    """Runs in a thread, because Python's own handlers wait until the main thread returns from C."""
    deadline, number = None, 0
    while True:
        wait = 1.0 if parent is not None or deadline is not None else None
        if select.select([inbox], [], [], wait)[0]:
            received = inbox.recv(64)
            if not received or 0 in received:
                return
            if deadline is None and (known := [sent for sent in received if sent in numbers]):
                deadline, number = time.monotonic() + GRACE, known[0]
        if deadline is not None and time.monotonic() > deadline:
            shown = signal.Signals(number).name
            sys.stderr.write(f"trl-capo {name}: did not stop within {GRACE:g} s of {shown}, so it was ended\n")
            sys.stderr.flush()
            os._exit(128 + number)
        if parent is not None and os.getppid() != parent:
            parent = None
            os.kill(os.getpid(), signal.SIGTERM)


class Children:
    """Commands that run for this process, started from any of its threads.

    Attributes:
        stopped: If true, no further command starts.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, command: Sequence[str], **options) -> int:
        """Run a command and wait for it to finish.

        Args:
            command: The program and its arguments.
            options: Options of `subprocess.Popen`. `env` is required.

        Returns:
            The exit code. After `stop`, the command does not start and the exit code is that of SIGTERM.
        """
        options["env"] = {**options["env"], PARENT: str(os.getpid())}
        with self._lock:
            if self.stopped:
                return -signal.SIGTERM
            # The child gets its own session: only this process sees Ctrl-C, and it then ends all child processes.
            child = subprocess.Popen(command, start_new_session=True, **options)
            self._running.add(child)
        code = child.wait()  # if interrupted, `stop` still knows the child
        with self._lock:
            self._running.discard(child)
        if code != 0:
            _end_group(child.pid, signal.SIGKILL)  # what it left behind
        return code

    def stop(self, grace: float = GRACE + 5.0) -> None:
        """Ask every child to end, kill those that do not, and start no more.

        Args:
            grace: Seconds that each child has to end by itself.
        """
        with self._lock:
            self.stopped = True
            children = list(self._running)
        for child in children:
            _end_group(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        for child in children:
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            _end_group(child.pid, signal.SIGKILL)


def _end_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)
