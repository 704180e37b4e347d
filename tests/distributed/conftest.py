"""Two launches for all tests of several processes: starting Python takes longer than most of what they then do."""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


def environment_of(repository: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repository), "ACCELERATE_USE_CPU": "true"}


def launch(commands: list[list[str]], environment: dict[str, str]) -> None:
    """Runs all at once; when one fails, the others, which may wait for it for ever, are ended."""
    errors = [tempfile.TemporaryFile("w+") for _ in commands]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file)
        for command, file in zip(commands, errors, strict=True)
    ]
    deadline = time.monotonic() + 600
    try:
        while any(process.poll() is None for process in processes) and not any(
            process.poll() for process in processes
        ):
            assert time.monotonic() < deadline, (
                "not done after 600 s: the processes wait for each other, or for a core"
            )
            time.sleep(0.05)
    finally:
        for process in processes:
            process.terminate()  # a launcher then ends its workers
    for process, file in zip(processes, errors, strict=True):
        process.wait(timeout=60)
        file.seek(0)
        assert process.returncode == 0, file.read()[:3000]  # what a launcher says about it comes last


def what_ranks_saw(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def host_command(repository: Path, rank: int, address: str, port: int) -> list[str]:
    """One host's launcher, with one process of two. The configuration is the recipe's, so that it is tested too."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(repository / "recipes/accelerate_configs/fsdp2.yaml")]
    command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    return [*command, "--main_process_ip", address, "--main_process_port", str(port)]


def worker(repository: Path, model: str, folder: Path, *jobs: str) -> list[str]:
    return [str(repository / "tests/distributed/worker.py"), model, str(folder), *jobs]


@pytest.fixture(scope="session")
def one_host(tiny_model, tmp_path_factory, repository) -> list[dict]:
    """What the ranks of one launcher with two processes saw, by job of `worker.py`; DDP."""
    folder = tmp_path_factory.mktemp("one-host")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    jobs = ("two_ranks", "fast_step_ddp", "layouts_ddp", "compact_ddp", "manifest")
    command += worker(repository, tiny_model, folder, *jobs)
    launch([command], environment_of(repository))
    return what_ranks_saw(folder)


@pytest.fixture(scope="session")
def two_hosts(tiny_model, tmp_path_factory, repository) -> list[dict]:
    """What the ranks of two launchers with one process each saw; DDP, then FSDP2. Each has a folder of its own."""
    folder = tmp_path_factory.mktemp("two-hosts")
    port = free_port()
    jobs = ("layouts_ddp", "resume", "layouts_fsdp2", "fast_step_fsdp2", "compact_fsdp2")
    commands = [
        host_command(repository, rank, "127.0.0.1", port) + worker(repository, tiny_model, folder, *jobs)
        for rank in range(2)
    ]
    launch(commands, {**environment_of(repository), "GLOO_SOCKET_IFNAME": "lo"})
    return what_ranks_saw(folder)


@pytest.fixture(scope="session")
def two_networks(tiny_model, tmp_path_factory, repository) -> list[dict]:
    """As `two_hosts`, but the hosts have a name, an address and a network interface of their own (Linux)."""
    namespaces = "unshare --user --map-root-user --net --uts --pid --fork --kill-child --mount-proc".split()
    try:
        allowed = subprocess.run([*namespaces, "ip", "link", "add", "v0", "type", "veth"], capture_output=True)
    except OSError:
        pytest.skip("no unshare")
    if allowed.returncode != 0:
        pytest.skip(f"network namespaces are not allowed here: {allowed.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("two-networks")
    hosts = [
        shlex.join(
            host_command(repository, rank, "10.77.0.1", 29500) + worker(repository, tiny_model, folder, "layouts_ddp")
        )
        for rank in range(2)
    ]
    script = str(repository / "tests/distributed/two_namespaces.sh")
    launch([[*namespaces, "sh", script, *hosts]], environment_of(repository))
    return what_ranks_saw(folder)
