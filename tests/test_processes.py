"""Commands end in one line when they are told to, and nothing that they started outlives them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import is_running


pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups")

# A command that starts another one, which starts a third. Each prints its process id.
SCRIPT = r"""
import os, subprocess, sys, time, types
from trl_capo import cli, processes

def leaf(argv):
    print(os.getpid(), flush=True)
    time.sleep(60)

def child(argv):
    subprocess.Popen([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
    leaf(argv)

def parent(argv):
    print(os.getpid(), flush=True)
    children = processes.Children()
    try:
        children.run([sys.executable, __file__, "child"], env=os.environ)
    except BaseException:
        children.stop()
        raise

def stuck(argv):
    processes.GRACE = 1.0
    while True:
        try:
            print(os.getpid(), flush=True)
            time.sleep(60)
        except BaseException:
            pass

def forked(argv):
    if (pid := os.fork()) == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(pid, 15)  # as a data loader ends its workers
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    time.sleep(0.5)
    return 7

name = sys.argv[1]
cli.COMMANDS[name] = ""
sys.modules["trl_capo.scripts." + name] = types.SimpleNamespace(main=globals()[name])
sys.exit(cli.main([name]))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "commands.py").write_text(SCRIPT)
    started = []

    def popen(name, **options):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "commands.py"), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"{[pid for pid in pids if is_running(pid)]} still run"
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_in_one_line(start, sent):
    process = start("leaf", restore_signals=True)
    process.stdout.readline()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + sent
    assert errors.strip() == f"trl-capo leaf: stopped by {sent.name}"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_children_and_grandchildren_end_with_a_command(start, sent):
    process = start("parent")
    pids = [int(process.stdout.readline()) for _ in range(3)]
    process.send_signal(sent)
    process.wait(timeout=30)
    assert process.returncode == 128 + sent
    wait_until_gone(pids)
    assert "parent: stopped by" in (errors := process.stderr.read()) and "Traceback" not in errors


def test_a_child_notices_that_its_parent_was_killed(start):
    process = start("parent")
    pids = [int(process.stdout.readline()) for _ in range(3)]
    process.kill()
    wait_until_gone(pids[:1])
    # The third is the child's own business: it is a plain process without any watch.
    deadline = time.monotonic() + 30
    running = pids[1:]
    while len(running) > 1 and time.monotonic() < deadline:
        running = [pid for pid in running if is_running(pid)]
        time.sleep(0.05)
    assert len(running) <= 1
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def test_a_command_that_does_not_react_is_ended(start):
    process = start("stuck")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors.strip() == "trl-capo stuck: did not stop within 1 s of SIGTERM, so it was ended"


def test_a_signal_to_a_forked_child_is_not_the_parents(start):
    process = start("forked")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (7, "-15\n", "")
