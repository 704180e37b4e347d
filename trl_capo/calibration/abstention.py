"""When to answer and when to abstain: a threshold on confidence that keeps a promised precision.

Of the questions whose confidence reaches the threshold, at least a share `precision` is right, with probability
`1 - delta` over the draw of the calibration questions:

    P( precision on new questions >= target ) >= 1 - delta

How: the candidate thresholds are the confidences of the surest 50 questions, then of 1% more each time. From the
surest on, each is tested for "the true precision is below the target" with the exact binomial (Clopper-Pearson) bound,
and the first that cannot be rejected ends the search; the one before it is the answer. Because the order is fixed
beforehand and the search stops at the first failure, all tests may use the full delta (fixed-sequence testing, arXiv
2110.01052).

Assumption: calibration questions and new ones are drawn independently from the same source. One row is one question:
sixteen samples of a question are not sixteen questions. Degenerate case: if already the surest 50 fail, no threshold
is returned, and the answer is to abstain always. Nothing is promised below the lowest threshold that was tested.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from trl_capo.calibration.metrics import paired_rows
from trl_capo.folders import write_json


FIRST = 50  # questions that the highest threshold keeps: fewer prove nothing
STEP = 0.01  # of all questions, from one threshold to the next
FILE_NAME = "abstention.json"


@dataclass(frozen=True)
class Abstention:
    """A threshold on confidence and what it promises.

    Attributes:
        threshold: Answer if the confidence is at least this; None if no threshold reaches the target: never answer.
        precision: The promised share of right answers among those given.
        delta: Probability that the promise fails.
        num_questions: Calibration questions it was chosen on.
        coverage: Share of these that it answers.
        calibration_precision: Share of these answers that are right; NaN if none is given.
        confidence: What the confidence is, e.g. "perplexity_consistency".
        num_samples: Samples of a question that it is made of; None for a confidence of another kind.
        sampling: How these were drawn, which the promise holds for: `temperature`, `max_new_tokens`, `system_prompt`;
            empty where it is not known.
    """

    threshold: float | None
    precision: float
    delta: float
    num_questions: int
    coverage: float
    calibration_precision: float
    confidence: str = ""
    num_samples: int | None = None
    sampling: dict = field(default_factory=dict)

    def answers(self, confidence: ArrayLike) -> np.ndarray:
        """Whether to answer at these confidences, same shape; never at NaN."""
        confidence = np.asarray(confidence, dtype=np.float64)
        return np.zeros(confidence.shape, bool) if self.threshold is None else confidence >= self.threshold

    def save(self, folder: str | Path) -> Path:
        """Write `abstention.json` into a folder, e.g. beside the model, and return its path."""
        path = Path(folder) / FILE_NAME
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Abstention":
        """Read `abstention.json`, or the one in a folder.

        Raises:
            ValueError: If the file is not there or holds something else.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.exists():
            raise ValueError(
                f"{path} does not exist. Choose a threshold first, with choose_threshold(...).save(folder)."
            )
        try:
            content = json.loads(path.read_text())
            if content["calibration_precision"] is None:
                content["calibration_precision"] = float("nan")
            return cls(**content)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not hold a threshold: {error!r}. Choose it again.") from error


def choose_threshold(
    correct: ArrayLike, confidence: ArrayLike, precision: float, *, delta: float = 0.05, name: str = ""
) -> Abstention:
    """The lowest threshold on confidence that keeps a precision with probability `1 - delta`.

    Args:
        correct: Whether the answer to each calibration question is right, 0, 1 or NaN, shape (P,).
        confidence: Its confidence, same shape, higher is surer. Rows with NaN on either side are left out.
        precision: What is promised, in (0, 1).
        delta: Probability that the promise fails, in (0, 1).
        name: What the confidence is; kept with the threshold.

    Returns:
        The threshold and its promise; threshold None if no one reaches it.

    Raises:
        ValueError: If there are fewer than 50 questions, or a level lies outside (0, 1).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> confidence = rng.random(5000)
        >>> chosen = choose_threshold(rng.random(5000) < confidence, confidence, 0.8)  # the oracle answers 0.4
        >>> round(chosen.threshold, 2), round(chosen.coverage, 2)
        (0.65, 0.35)
    """
    from scipy.stats import beta

    for label, level in (("precision", precision), ("delta", delta)):
        if not 0 < level < 1:
            raise ValueError(f"`{label}` must lie in (0, 1), got {level}.")
    correct, confidence, usable = paired_rows(correct, confidence)
    if correct.ndim != 1:
        raise ValueError(f"one row a question, shape (P,): got {correct.shape}. Choose one answer a question first.")
    correct, confidence = correct[usable], confidence[usable]
    if correct.size < FIRST:
        raise ValueError(
            f"at least {FIRST} calibration questions are needed, got {correct.size}. Sample more prompts."
        )
    order = np.argsort(-confidence, kind="stable")
    correct, confidence = correct[order], confidence[order]

    step = max(1, round(STEP * correct.size))
    # A threshold answers all rows of its confidence; two candidates inside one tie are the same threshold.
    kept = np.unique([np.count_nonzero(confidence >= confidence[n - 1]) for n in range(FIRST, correct.size + 1, step)])
    right = np.cumsum(correct)[kept - 1]
    # Clopper-Pearson: the precision at which so many right answers or more would be seen with probability delta.
    bounds = beta.ppf(delta, np.maximum(right, 1), kept - right + 1)
    passed = np.cumprod(np.where(right > 0, bounds, 0) >= precision).sum()
    if passed == 0:
        return Abstention(None, precision, delta, correct.size, 0.0, float("nan"), name)
    n = kept[passed - 1]
    return Abstention(
        float(confidence[n - 1]),
        precision,
        delta,
        correct.size,
        float(n / correct.size),
        float(correct[:n].mean()),
        name,
    )
