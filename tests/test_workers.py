"""The pool itself; with the reward as its function it is tested in test_rewards.py."""

import importlib
import sys

import pytest

from trl_capo.workers import DeadlinePool


def imported(name: str) -> bool:
    return name in sys.modules


def needs_a_library() -> None:
    importlib.import_module("no_such_library")


def import_colorsys() -> None:
    importlib.import_module("colorsys")


@pytest.fixture
def make_pool():
    pools = []

    def make(*args, **kwargs):
        pools.append(DeadlinePool(*args, num_workers=1, **kwargs))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


def test_a_worker_prepares_what_it_is_told_and_nothing_else(make_pool):
    names = [("math_verify",), ("colorsys",)]
    assert make_pool(imported).results(names) == [False, False]
    assert make_pool(imported, prepare=import_colorsys).results(names) == [False, True]


def test_a_preparation_that_fails_is_named(make_pool):
    """The items fail with the reason: workers that end at their start look like a machine without memory."""
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        make_pool(needs_a_library, prepare=needs_a_library).results([()])
