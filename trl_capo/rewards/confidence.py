r"""Rewards that score an answer together with the confidence that the completion states.

With correctness c in {0, 1}, from any reward function that grades, and stated confidence q in [0, 1]:

    rlcr              c - (q - c)^2                               -1..1       RLCR (arXiv 2507.16806), the paper's form
    sayself           1 - 2 (c - q)^2                             -1..1       SaySelf (arXiv 2405.20974)
    rewarding_doubt   10 (z + c / 4), z = (score - m) / (M - m)   -10..12.5   Rewarding Doubt (arXiv 2503.02623)

For Rewarding Doubt, p is q clipped to [0.001, 0.999], score is log p for a right answer and log(1 - p) for a wrong
one, m = log(0.001) / 2 and M = log(0.999). Its authors ask for an integer from 0 to 10: the scale is "ten" by default.

RLCR's released code adds three rewards, each with the weight 0.5: `rlcr_format_reward` (1 if the format is right),
`rlcr_accuracy_reward` (c) and `rlcr_brier_reward` (1 - (c - q)^2), all 0 if the format is wrong. Their sum is
1 + 0.5 (paper's form) where the format is right.

All are proper scoring rules in q: the best confidence to state is the probability of being right. (Rewarding Doubt's
clipping makes confidences beyond 0.001 and 0.999 equivalent.) Use them with `scale_rewards="none"`, because dividing
by the group's standard deviation distorts the rule.

Degenerate cases: if the grader cannot tell whether the answer is right, there is no reward (None). Without a readable
confidence, the reward is `missing`: -30 for Rewarding Doubt as in its released code. For the other two the papers do
not say, and -1 is assumed, the worst value of the rule. What counts as RLCR's right format in the released code is
assumed to be `terminal_tags` with "tabc".
"""

from __future__ import annotations

import math
from collections.abc import Callable

from trl_capo.errors import UserError
from trl_capo.models.messages import answer_of
from trl_capo.rewards.accuracy import accuracy_reward
from trl_capo.rewards.stated import check_scale, rlcr_confidence, stated_confidence, terminal_tags


def rlcr_score(correct: float, confidence: float) -> float:
    """RLCR's reward in the paper's form.

    Example:
        >>> rlcr_score(1.0, 0.5), rlcr_score(0.0, 1.0)
        (0.75, -1.0)
    """
    return correct - (confidence - correct) ** 2


def sayself_score(correct: float, confidence: float) -> float:
    """SaySelf's reward.

    Example:
        >>> sayself_score(1.0, 0.5), sayself_score(0.0, 1.0)
        (0.5, -1.0)
    """
    return 1 - 2 * (correct - confidence) ** 2


def rewarding_doubt_score(correct: float, confidence: float) -> float:
    """Rewarding Doubt's reward, a logarithmic rule. `correct` must be 0 or 1.

    Example:
        >>> round(rewarding_doubt_score(1.0, 0.8), 3), round(rewarding_doubt_score(0.0, 0.8), 3)
        (11.857, 5.342)
    """
    p = min(max(confidence, 0.001), 0.999)
    score = math.log(p if correct else 1 - p)
    low, high = math.log(0.001) / 2, math.log(0.999)
    return 10 * ((score - low) / (high - low) + 0.25 * correct)


class StatedConfidenceReward:
    """A reward function for TRL's trainers that scores correctness and stated confidence together.

    Args:
        name: The name in TRL's metrics.
        score: The reward of (correctness, confidence).
        missing: The reward of a completion without a readable confidence.
        scale: "unit", "ten" or "percent": the scale on which the model states it.
        correctness: A reward function that returns 1.0, 0.0 or None for each completion.
    """

    def __init__(
        self,
        name: str,
        score: Callable[[float, float], float],
        *,
        missing: float,
        scale: str = "unit",
        correctness: Callable = accuracy_reward,
    ):
        check_scale(scale)
        if not math.isfinite(missing):
            raise UserError(f"missing must be a finite number, got {missing!r}.")
        self.__name__, self.score, self.missing = name, score, missing
        self.scale, self.correctness = scale, correctness

    def __call__(self, completions: list, log_extra: Callable[[str, list], None] | None = None, **kwargs) -> list:
        """Scores completions.

        Args:
            completions: Texts or conversations, as TRL gives them.
            log_extra: Receives the column `stated_confidence`. TRL's trainers pass it.
            **kwargs: What the grader needs, for example `solution`.

        Returns:
            A reward for each completion; None where the grader has none.
        """
        graded = self.correctness(completions=conversations(completions), log_extra=log_extra, **kwargs)
        stated = [stated_confidence(answer_of(completion), scale=self.scale) for completion in completions]
        if log_extra is not None:
            log_extra("stated_confidence", stated)
        return [self._reward(correct, q) for correct, q in zip(graded, stated, strict=True)]

    def _reward(self, correct: float | None, confidence: float) -> float | None:
        if correct is None or math.isnan(correct):
            return None
        return self.missing if math.isnan(confidence) else self.score(correct, confidence)


def conversations(completions: list) -> list[list[dict[str, str]]]:
    """Completions as conversations, so that a grader for conversations also takes the texts of plain prompts."""
    return [
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        for completion in completions
    ]


def get_rlcr_reward(
    scale: str = "unit", missing: float = -1.0, correctness: Callable = accuracy_reward
) -> StatedConfidenceReward:
    """RLCR's reward in the paper's form; for the arguments see `StatedConfidenceReward`.

    Example:
        >>> def always_right(completions, **kwargs):
        ...     return [1.0] * len(completions)
        >>> get_rlcr_reward(correctness=always_right)(["7 <confidence>0.5</confidence>", "7"])
        [0.75, -1.0]
    """
    return StatedConfidenceReward("rlcr_reward", rlcr_score, missing=missing, scale=scale, correctness=correctness)


def get_sayself_reward(
    scale: str = "unit", missing: float = -1.0, correctness: Callable = accuracy_reward
) -> StatedConfidenceReward:
    """SaySelf's reward; for the arguments see `StatedConfidenceReward`."""
    return StatedConfidenceReward(
        "sayself_reward", sayself_score, missing=missing, scale=scale, correctness=correctness
    )


def get_rewarding_doubt_reward(
    scale: str = "ten", missing: float = -30.0, correctness: Callable = accuracy_reward
) -> StatedConfidenceReward:
    """Rewarding Doubt's reward; for the arguments see `StatedConfidenceReward`."""
    return StatedConfidenceReward(
        "rewarding_doubt_reward", rewarding_doubt_score, missing=missing, scale=scale, correctness=correctness
    )


rlcr_reward = get_rlcr_reward()
sayself_reward = get_sayself_reward()
rewarding_doubt_reward = get_rewarding_doubt_reward()


def rlcr_format_reward(completions: list, **kwargs) -> list[float]:
    """RLCR's released reward for the format "tabc": 1.0 or 0.0. Weight 0.5."""
    return [float(terminal_tags(answer_of(completion), "tabc") is not None) for completion in completions]


def rlcr_accuracy_reward(completions: list, **kwargs) -> list[float | None]:
    """RLCR's released reward for correctness: 0.0 if the format is wrong. Weight 0.5."""
    graded = accuracy_reward(completions=conversations(completions), **kwargs)
    formats = rlcr_format_reward(completions)
    return [correct if correct is None else correct * ok for correct, ok in zip(graded, formats, strict=True)]


def rlcr_brier_reward(completions: list, log_extra: Callable | None = None, **kwargs) -> list[float | None]:
    """RLCR's released reward for the confidence, with its lenient reader: 0.0 if the format is wrong. Weight 0.5."""
    graded = accuracy_reward(completions=conversations(completions), **kwargs)
    stated = [rlcr_confidence(answer_of(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("stated_confidence", stated)
    formats = rlcr_format_reward(completions)
    return [
        correct if correct is None else ok * (1 - (correct - q) ** 2)
        for correct, q, ok in zip(graded, stated, formats, strict=True)
    ]
