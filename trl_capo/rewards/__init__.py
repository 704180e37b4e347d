"""Reward functions for TRL's trainers: correctness by math-verify or by words."""

from trl_capo.rewards.accuracy import AccuracyReward, accuracy_reward, get_accuracy_reward
from trl_capo.rewards.text import text_reward


__all__ = ["AccuracyReward", "accuracy_reward", "get_accuracy_reward", "text_reward"]
