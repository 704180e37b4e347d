"""`.ci/install-torch` with an interpreter that only writes down what it was told: which builds of torch it tries."""

import os
import shutil
import subprocess

import pytest


pytestmark = pytest.mark.skipif(
    shutil.which("nvidia-smi") is not None, reason="with a driver pip's own choice is taken"
)

INTERPRETER = """#!/bin/sh
echo "$@" >> "$RECORD"
case "$1" in -c) echo "$VERSION"; exit;; esac
for word in $FAILS; do case "$*" in *"$word"*) echo "no $word" >&2; exit 1;; esac; done
"""
OWN, CPU, UV = "-m pip install --quiet torch==2.13.0", "-m pip install --quiet torch==2.13.0+cpu", "-m uv pip install"


def install(folder, repository, fails: str, origin: str = "file", system: str = "Linux x86_64", version=""):
    folder = folder / "a folder"
    folder.mkdir()
    for name, text in {"python": INTERPRETER, "uname": f"#!/bin/sh\necho {system}\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    record = folder / "record"
    run = subprocess.run(
        [repository / ".ci/install-torch", folder / "python", "torch==2.13.0", origin],
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "RECORD": str(record),
            "FAILS": fails,
            "VERSION": version,
        },
        capture_output=True,
        text=True,
    )
    calls = [line for line in record.read_text().splitlines() if "install" in line]
    return run, calls


@pytest.mark.parametrize(
    ("fails", "last"),
    [
        ("nothing", CPU),
        ("+cpu", UV),
        ("+cpu --torch-backend", OWN),
        ("+cpu uv", OWN),
    ],
)
def test_the_first_build_that_can_be_had_is_taken(tmp_path, repository, fails, last):
    run, calls = install(tmp_path, repository, fails)
    assert run.returncode == 0, run.stderr
    assert calls[-1].startswith(last) and (last != OWN or calls[-1] == OWN)
    said = [line for line in run.stdout.splitlines() if "about 3 GB" in line]
    assert len(said) == (last == OWN)
    assert all("TORCH=" in line and "PYTHON=python3.11" in line for line in said)


def test_all_errors_are_shown_where_no_build_can_be_had(tmp_path, repository):
    run, calls = install(tmp_path, repository, "torch")
    assert run.returncode == 1 and len(calls) == 4
    assert "no torch" in run.stderr and "PIP_FIND_LINKS" in run.stderr


@pytest.mark.parametrize(
    ("origin", "system"), [("command line", "Linux x86_64"), ("file", "Darwin arm64"), ("file", "Linux aarch64")]
)
def test_elsewhere_the_requirement_is_taken_as_it_is(tmp_path, repository, origin, system):
    run, calls = install(tmp_path, repository, "+cpu", origin, system)
    assert run.returncode == 0 and calls == [OWN]


def test_what_is_there_is_kept(tmp_path, repository):
    run, calls = install(tmp_path, repository, "nothing", version="2.12.0")
    assert run.returncode == 0 and calls == [] and "torch 2.12.0 is already installed" in run.stdout
