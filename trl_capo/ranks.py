"""What one process finds out for all of those that were launched together."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar


Answer = TypeVar("Answer")


def agree(find: Callable[[], Answer]) -> Answer:
    """Calls a function in the first process only. Every process returns its result, or raises its error.

    The other processes wait until the first has finished. Without its error they would wait forever.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return find()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found = [find(), None]
        except Exception as error:
            broadcast_object_list([None, _portable(error)])
            raise
    broadcast_object_list(found)
    answer, problem = found
    if problem is not None:
        raise problem
    return answer


def _portable(error: Exception) -> Exception:
    """The error, or its text if it cannot be sent to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever an error's own constructor raises
        return RuntimeError(f"{type(error).__name__}: {error}")
