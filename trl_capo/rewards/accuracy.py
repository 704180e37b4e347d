r"""TRL's `accuracy_reward`, computed by worker processes with a deadline for each item.

`accuracy_reward` has the same inputs and outputs as TRL's, except if grading fails: every worker calls math-verify as
TRL does (`trl_capo.grading`), on one completion at a time. Its metrics keep the name `rewards/accuracy_reward/mean`. A
completion with tools has several messages; the model's last one counts.

Why: TRL grades completions one by one while the GPU waits. Math-verify's own timeouts are signals. They work in the
main thread only (elsewhere TRL turns them off), and only after a computation in C has ended: one
`\boxed{\frac{3^{2500000}+1}{7^{1250000}+2}}` blocks the run for 11 seconds where 5 are allowed. Here it blocks one
worker, at most until the deadline. `AccuracyReward.start` accepts completions without waiting: grading while the GPU
works costs no time.

Assumes that a reward depends on the text and the solution alone: repeated pairs are graded once.

Degenerate cases: if math-verify times out on an item, the item misses the deadline, or its worker dies, it has no
reward (None), because nobody knows whether it is right. A warning says so. TRL gives 0.0 at its timeouts. If workers
cannot be started (in a daemonic process, or on Windows), the caller grades in this process, without a deadline.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable

from trl_capo.errors import one_line
from trl_capo.grading import grade_pair, load_math_verify
from trl_capo.rewards.text import answers_and_golds
from trl_capo.workers import DeadlinePool, Failure, can_start_workers


# One completion's reward and the columns `gold_parsed` and `answer_parsed`, or the reason why it has none.
Grade = tuple[float | None, str, str] | Failure


def shorten_record(record: logging.LogRecord) -> bool:
    """A logging filter that shortens math-verify's warnings, because they repeat the whole completion."""
    record.msg, record.args = one_line(record.getMessage(), 300), ()
    return True


for _name in ("parser", "grader", "metric"):  # a logger's filters do not see its children's records
    logging.getLogger(f"math_verify.{_name}").addFilter(shorten_record)


class AccuracyReward:
    """A reward function for TRL's trainers; see `get_accuracy_reward`. Its workers start when first needed."""

    __name__ = "accuracy_reward"  # TRL names the metrics after it

    def __init__(self, num_workers: int | None = None, deadline: float = 30.0, normalize_operators: bool = False):
        self.workers = DeadlinePool(
            functools.partial(_grade, normalize_operators=normalize_operators), num_workers, deadline, load_math_verify
        )
        self.normalize_operators = normalize_operators

    def __reduce__(self):
        # TRL's asynchronous trainers send reward functions to another process, which needs workers of its own.
        return get_accuracy_reward, (self.workers.num_workers, self.workers.deadline, self.normalize_operators)

    def __call__(
        self,
        completions: list[list[dict[str, str]]],
        solution: list[str],
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        """Grades completions, whether or not `start` has seen them.

        Args:
            completions: Conversations; the last message of the assistant is graded.
            solution: Gold answer of each completion.
            log_extra: Receives the columns `solution`, `gold_parsed` and `answer_parsed`. TRL's trainers pass it.
            **kwargs: Whatever else TRL's trainers pass; not used.

        Returns:
            1.0 or 0.0 for each completion; None where the gold answer cannot be parsed or grading failed.
        """
        items = answers_and_golds(completions, solution)
        if can_start_workers():
            results = self.workers.results(items)
        else:
            results = [self.workers.function(*item) for item in items]
        grades = [
            (None, f"[{result.value}]", f"[{result.value}]") if isinstance(result, Failure) else result
            for result in results
        ]
        failed = sum(isinstance(result, Failure) for result in results)
        if failed:
            warnings.warn(
                f"accuracy_reward: {failed} of {len(grades)} completions count as neither right nor wrong because "
                f"math-verify timed out, missed the deadline of {self.workers.deadline:g} s, or crashed.",
                stacklevel=2,
            )
        if log_extra is not None:
            log_extra("solution", list(solution))
            log_extra("gold_parsed", [gold for _, gold, _ in grades])
            log_extra("answer_parsed", [answer for _, _, answer in grades])
        return [reward for reward, _, _ in grades]

    def start(self, completions: list[list[dict[str, str]]], solution: list[str], **kwargs) -> None:
        """Starts grading and returns immediately. The call with these completions waits for the unfinished ones.

        Drops completions of an earlier `start` whose rewards nobody has requested.

        Args:
            completions: As in the call.
            solution: As in the call.
            **kwargs: Not used.
        """
        if can_start_workers():
            self.workers.start(answers_and_golds(completions, solution))

    def stop(self) -> None:
        """Ends the workers and drops their work. The next use starts new ones. At exit this happens by itself."""
        self.workers.stop()


def _grade(text: str, solution: str, normalize_operators: bool = False) -> Grade:
    """Runs in a worker's main thread, so that math-verify's timeouts work."""
    found = grade_pair(text, solution, normalize_operators)
    if found.failure is not None:
        return found.failure
    if not found.gold:
        return None, "[unparseable]", "[skipped]"
    return found.reward, str(found.gold), str(found.answer) if found.answer else "[unparseable]"


def get_accuracy_reward(
    num_workers: int | None = None, deadline: float = 30.0, normalize_operators: bool = False
) -> AccuracyReward:
    r"""`accuracy_reward` with its own workers and deadline.

    Args:
        num_workers: Number of worker processes, started at the first use. None means one for each core that this
            process may use, divided among the ranks on the machine, at most 16.
        deadline: Seconds that one completion may take before its worker is killed and it has no reward.
            Math-verify's own timeouts, of two parses and a comparison, add up to 25.
        normalize_operators: Repair `\frac13`, `2\sqrt3` and `\boxed 7` in completions, which otherwise count as wrong.

    Returns:
        A reward function for TRL's trainers.

    Example:
        >>> reward = get_accuracy_reward(num_workers=1)
        >>> completions = [[{"role": "assistant", "content": r"It is \boxed{\frac{2}{6}}"}]] * 2
        >>> reward(completions, [r"$\frac{1}{3}$", "$3$"])
        [1.0, 0.0]
    """
    return AccuracyReward(num_workers, deadline, normalize_operators)


accuracy_reward = get_accuracy_reward()
