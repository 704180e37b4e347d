"""An error of the first process is raised by all of them: those that wait for its answer would wait for ever."""

import pickle
from types import SimpleNamespace

import accelerate
import pytest

from trl_capo.errors import UserError, UserErrors
from trl_capo.ranks import agree


class Unpicklable(Exception):
    def __init__(self, reason, response):
        super().__init__(reason)
        self.response = response


@pytest.fixture
def two_ranks(monkeypatch):
    """Calls `agree` as the first of two processes, then as the second; what each of them returned or raised."""
    sent = []

    def broadcast(objects):
        if sent:
            objects[:] = pickle.loads(sent[0])
        else:
            sent.append(pickle.dumps(objects))

    def run(find):
        sent.clear()
        outcomes = []
        for is_main_process in (True, False):
            state = SimpleNamespace(is_main_process=is_main_process, num_processes=2)
            monkeypatch.setattr(accelerate, "PartialState", lambda state=state: state)
            try:
                outcomes.append(agree(find if is_main_process else None))
            except Exception as error:
                outcomes.append(error)
        return outcomes

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)
    return run


@pytest.mark.parametrize(
    "error",
    [
        UserError("one"),
        UserErrors(["one", 3000 * "two"]),
        PermissionError(13, "Permission denied", "/runs/trl_capo_run.json"),
        KeyError("step"),
        Unpicklable("429 from the Hub", lambda: None),
    ],
    ids=lambda error: type(error).__name__,
)
def test_all_raise_what_the_first_one_raised(two_ranks, error):
    def find():
        raise error

    first, second = two_ranks(find)
    assert first is error
    assert str(error) in str(second)
    assert isinstance(second, RuntimeError if isinstance(error, Unpicklable) else type(error))
    assert getattr(second, "problems", None) == getattr(error, "problems", None)


def test_all_have_what_the_first_one_found(two_ranks):
    assert two_ranks(lambda: {"rows": [1, 2]}) == [{"rows": [1, 2]}, {"rows": [1, 2]}]
