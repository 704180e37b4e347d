"""The mathematics of CAPO and GRPO as pure functions of `(P, G)` tensors, under one documented name."""

from trl_capo.methods.advantages import (
    NORMALIZATIONS,
    cross_prompt_advantages,
    pairwise_logistic_advantages,
    reward_only_advantages,
    soft_misranking,
)
from trl_capo.trainer.mask import reference_perplexity_mask


__all__ = [
    "NORMALIZATIONS",
    "cross_prompt_advantages",
    "pairwise_logistic_advantages",
    "reference_perplexity_mask",
    "reward_only_advantages",
    "soft_misranking",
]
