"""When to answer and when to abstain: a threshold on confidence that keeps a promised precision.

Among questions whose confidence reaches the threshold, at least a share `precision` is answered right. This holds with
probability `1 - delta` over the draw of the calibration questions:

    P( precision on new questions >= target ) >= 1 - delta

How: each candidate threshold keeps the most confident n questions. For each candidate, an exact binomial test
(Clopper-Pearson) checks whether its true precision can still be below the target. The fallback procedure (Wiens, 2003)
tests candidates from the most confident one down. It divides delta over at most four *starts*. A candidate is tested
at the level passed on by the one before it, plus its own share if it is a start. It passes its level on if it succeeds
and loses it if it fails. The threshold is the lowest candidate that succeeds.

The starts keep 10%, 25%, 40% and 50% of the questions, but at least 50, and at least as many as could pass if all were
right (`log(level) / log(precision)`). If starts coincide because there are few questions, fewer starts are used.
Several starts are needed because the most confident answers are not always the most accurate: a single start among
them would end the search.

Why the promise holds: order, starts and shares depend only on the number of questions, the target and delta, never on
which answers are right. Let the candidates below the target be t1 < t2 < ... (the true hypotheses). A first wrong pass
at tk means that the one before it failed and lost its level, so tk was tested at no more than the shares of the starts
after t(k-1) and up to tk. These shares add up to at most delta over all k, so by the union bound some wrong candidate
passes with probability at most delta, however the tests depend on each other. `benchmarks/abstention.py` measures it.

Assumption: calibration questions and new questions are drawn independently from the same source. One row is one
question: sixteen samples of a question are not sixteen questions. Questions with equal confidence are kept or dropped
together. Degenerate case: if no candidate passes, there is no threshold, and the model always abstains. The row that
sets a threshold counts with the rows above it, which can move the level by at most one row in n.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from trl_capo.calibration.metrics import paired_rows
from trl_capo.errors import UserError
from trl_capo.files import write_json


FIRST = 50  # minimum number of questions that the highest threshold keeps: fewer prove nothing
STARTS = (0.1, 0.5, 0.4, 0.25)  # shares of all questions, the most important first
STEP = 0.01  # share of all questions between two thresholds
FILE_NAME = "abstention.json"


@dataclass(frozen=True)
class Abstention:
    """A threshold on confidence and what it promises.

    Attributes:
        threshold: Answer if the confidence is at least this. None if no threshold reaches the target: never answer.
        precision: The promised share of right answers among those given.
        delta: Probability that the promise fails.
        num_questions: Number of calibration questions.
        coverage: Share of the calibration questions that are answered.
        calibration_precision: Share of these answers that are right; NaN if none is given.
        confidence: Name of the confidence, e.g. "perplexity_consistency".
        num_samples: Samples per question that the confidence uses; None for other kinds of confidence.
        sampling: The sampling settings that the promise holds for: `temperature`, `max_new_tokens`, `system_prompt`
            and, if any were given, `chat_template_kwargs`. Empty if unknown.
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
        """Whether to answer at these confidences, same shape. Always false at NaN."""
        confidence = np.asarray(confidence, dtype=np.float64)
        return np.zeros(confidence.shape, bool) if self.threshold is None else confidence >= self.threshold

    def save(self, folder: str | Path) -> Path:
        """Write `abstention.json` into a folder, e.g. that of the model, and return its path."""
        path = Path(folder) / FILE_NAME
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Abstention":
        """Read `abstention.json`, or the one in a folder.

        Raises:
            UserError: The file is missing or has other content. The message names the key and its value.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.exists():
            raise UserError(
                f"{path} does not exist. Choose a threshold first, with choose_threshold(...).save(folder)."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            _check_content(content)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} does not contain a threshold: {error}. Choose one with trl-capo abstain."
            ) from error
        if content["calibration_precision"] is None:
            content["calibration_precision"] = math.nan
        return cls(**content)


def _check_content(content) -> None:
    """Refuse content that `save` cannot write. Other JSON may have NaN, text for numbers, or other keys."""

    def number(value, low=-math.inf, high=math.inf) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}, not an object with the key 'threshold'")
    known = {attribute.name for attribute in fields(Abstention)}
    required = known - {"confidence", "num_samples", "sampling"}
    if missing := sorted(required - set(content)):
        raise ValueError(f"the key {missing[0]!r} is missing")
    if unknown := sorted(set(content) - known):
        raise ValueError(f"the key {unknown[0]!r} is unknown, so another version may have written it")
    never = content["threshold"] is None
    sampling = content.get("sampling", {})
    drawn = sampling if isinstance(sampling, dict) else {}
    fit = {
        "threshold": never or number(content["threshold"]),
        "precision": number(content["precision"]) and 0 < content["precision"] < 1,
        "delta": number(content["delta"]) and 0 < content["delta"] < 1,
        "num_questions": type(content["num_questions"]) is int and content["num_questions"] >= 1,
        "coverage": number(content["coverage"], 0, 1),
        "calibration_precision": number(content["calibration_precision"], 0, 1)
        or (never and content["calibration_precision"] is None),
        "confidence": isinstance(content.get("confidence", ""), str),
        "num_samples": content.get("num_samples") is None
        or (type(content["num_samples"]) is int and content["num_samples"] >= 1),
        "sampling": isinstance(sampling, dict)
        and (drawn.get("temperature") is None or (number(drawn["temperature"]) and drawn["temperature"] > 0))
        and (
            drawn.get("max_new_tokens") is None
            or (type(drawn["max_new_tokens"]) is int and drawn["max_new_tokens"] >= 1)
        )
        and isinstance(drawn.get("system_prompt"), str | None)
        and isinstance(drawn.get("chat_template_kwargs"), dict | None),
    }
    for name, good in fit.items():
        if not good:
            raise ValueError(f"{name!r} is {content[name]!r}")


def choose_threshold(
    correct: ArrayLike, confidence: ArrayLike, precision: float, *, delta: float = 0.05, name: str = ""
) -> Abstention:
    """The lowest threshold on confidence that keeps a precision with probability `1 - delta`.

    Args:
        correct: Whether the answer to each calibration question is right, 0, 1 or NaN, shape (P,).
        confidence: Its confidence, same shape; higher means more confident. Rows with a NaN in either are left out.
        precision: The precision to promise, in (0, 1).
        delta: Probability that the promise fails, in (0, 1).
        name: Name of the confidence, stored with the threshold.

    Returns:
        The threshold and its promise; `threshold` is None if no candidate reaches the target.

    Raises:
        UserError: There are fewer than 50 questions, or a level lies outside (0, 1).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> confidence = rng.random(5000)
        >>> chosen = choose_threshold(rng.random(5000) < confidence, confidence, 0.8)  # the oracle answers 0.4
        >>> bool(0.6 < chosen.threshold < 0.7), bool(0.3 < chosen.coverage < 0.4)
        (True, True)
    """
    for label, level in (("precision", precision), ("delta", delta)):
        if not 0 < level < 1:
            raise UserError(f"`{label}` must lie in (0, 1), got {level}.")
    correct, confidence = _most_confident_first(correct, confidence)
    n = _lowest_pass(correct, confidence, precision, delta)
    if n == 0:
        return Abstention(None, precision, delta, correct.size, 0.0, float("nan"), name)
    return Abstention(
        float(confidence[n - 1]),
        precision,
        delta,
        correct.size,
        float(n / correct.size),
        float(correct[:n].mean()),
        name,
    )


def starts(num_questions: int, precision: float, delta: float) -> list[int]:
    """How many questions each start keeps, ascending; each gets an equal share of delta.

    Example:
        >>> starts(4000, 0.9, 0.05), starts(300, 0.99, 0.05)
        ([400, 1000, 1600, 2000], [299])
    """
    for count in range(len(STARTS), 0, -1):
        least = max(FIRST, math.ceil(math.log(delta / count) / math.log(precision)))
        found = sorted({max(least, math.ceil(share * num_questions)) for share in STARTS[:count]})
        if count == 1 or (len(found) == count and found[-1] <= num_questions):
            return found
    raise AssertionError("count == 1 returns")


def reach(correct: ArrayLike, confidence: ArrayLike, precision: float, *, delta: float = 0.05) -> tuple[float, float]:
    """What calibration can promise if `choose_threshold` finds no threshold.

    Args:
        correct: See `choose_threshold`.
        confidence: See `choose_threshold`.
        precision: The target that was missed.
        delta: Probability that the promise fails.

    Returns:
        The highest precision, to 0.001, for which these questions yield a threshold; NaN if there is none. Use it as a
        guide for the next attempt: if you pick a target because it succeeded, you lose the promise. Also about how
        many questions from the same source would make the target succeed four times in five; infinite if no start is
        observed to be that precise.
    """
    from scipy.stats import norm

    correct, confidence = _most_confident_first(correct, confidence)
    passes = (p for p in np.arange(999, 0, -1) / 1000 if _lowest_pass(correct, confidence, float(p), delta))
    best = float(next(passes, math.nan))
    # A search may start at these candidates; every other candidate needs one of them to pass first.
    counts = sorted({max(FIRST, math.ceil(share * correct.size)) for share in STARTS})
    kept = _kept(confidence, counts)
    seen = np.cumsum(correct)[kept - 1] / kept
    kept, seen = kept[seen > precision], seen[seen > precision]
    if kept.size == 0:
        return best, math.inf
    level = delta / len(STARTS)
    noise = norm.isf(level) * math.sqrt(precision * (1 - precision)) + norm.ppf(0.8) * np.sqrt(seen * (1 - seen))
    least = max(FIRST, math.log(level) / math.log(precision))
    needed = np.maximum((noise / (seen - precision)) ** 2, least) * correct.size / kept
    return best, float(np.ceil(needed.min()))


def advice(correct: ArrayLike, confidence: ArrayLike, missed: Abstention) -> str:
    """Advice if `choose_threshold` found nothing: the precision within reach, and the questions the target needs."""
    best, needed = reach(correct, confidence, missed.precision, delta=missed.delta)
    story = [
        f"No threshold is right {missed.precision:.6g} of the time with probability {1 - missed.delta:.0%} on "
        f"{missed.num_questions} questions, so the model should always abstain."
    ]
    if not math.isnan(best):
        story.append(f"The best precision within reach is about {best:.3f}.")
    if math.isinf(needed):
        story.append("No part of the answers was that precise here, so more questions would hardly help.")
    else:
        story.append(f"For {missed.precision:.6g}, calibrate on about {needed:,.0f} questions.")
    return " ".join(story)


def _most_confident_first(correct: ArrayLike, confidence: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    correct, confidence, usable = paired_rows(correct, confidence)
    if correct.ndim != 1:
        raise UserError(
            f"`correct` must have one row per question, shape (P,), got {correct.shape}. Choose one answer for each."
        )
    correct, confidence = correct[usable], confidence[usable]
    if correct.size < FIRST:
        raise UserError(f"at least {FIRST} calibration questions are needed, got {correct.size}. Sample more prompts.")
    order = np.argsort(-confidence, kind="stable")
    return correct[order], confidence[order]


def _kept(confidence: np.ndarray, counts) -> np.ndarray:
    """For each count, the number of questions at least as confident as the last one counted: ties stay together."""
    return np.searchsorted(-confidence, -confidence[np.asarray(counts) - 1], side="right")


def _lowest_pass(correct: np.ndarray, confidence: np.ndarray, precision: float, delta: float) -> int:
    """Number of questions that the lowest passing threshold keeps; 0 if none passes."""
    from scipy.stats import binom

    begin = [n for n in starts(correct.size, precision, delta) if n <= correct.size]
    if not begin:
        return 0
    step = max(1, round(STEP * correct.size))
    counts = sorted({*begin, *range(begin[0], correct.size + 1, step)})
    kept = _kept(confidence, counts)
    # The probability of at least this number of right answers if the true precision were the target.
    p_values = binom.sf(np.cumsum(correct)[kept - 1] - 1, kept, precision)
    level, lowest = 0.0, 0
    for count, n, p_value in zip(counts, kept, p_values, strict=True):
        level += delta / len(begin) * (count in begin)
        if level > 0 and p_value <= level:
            lowest = int(n)
        else:
            level = 0.0
    return lowest
