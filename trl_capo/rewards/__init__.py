"""Reward functions for TRL's trainers: correctness by math-verify or by words, and stated confidence."""

from trl_capo.rewards.accuracy import AccuracyReward, accuracy_reward, get_accuracy_reward
from trl_capo.rewards.confidence import (
    StatedConfidenceReward,
    get_rewarding_doubt_reward,
    get_rlcr_reward,
    get_sayself_reward,
    rewarding_doubt_reward,
    rlcr_accuracy_reward,
    rlcr_brier_reward,
    rlcr_format_reward,
    rlcr_reward,
    sayself_reward,
)
from trl_capo.rewards.stated import rlcr_confidence, stated_confidence
from trl_capo.rewards.text import text_reward


__all__ = [
    "AccuracyReward",
    "StatedConfidenceReward",
    "accuracy_reward",
    "get_accuracy_reward",
    "get_rewarding_doubt_reward",
    "get_rlcr_reward",
    "get_sayself_reward",
    "rewarding_doubt_reward",
    "rlcr_accuracy_reward",
    "rlcr_brier_reward",
    "rlcr_confidence",
    "rlcr_format_reward",
    "rlcr_reward",
    "sayself_reward",
    "stated_confidence",
    "text_reward",
]
