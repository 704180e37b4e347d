"""GSPO (arXiv 2507.18071): GRPO with one importance ratio for the whole sequence, normalised by its length.

    r_i = (pi(o_i) / pi_old(o_i)) ^ (1 / |o_i|) = exp(s_i - s_i_old),    s = mean token log-prob

and PPO's clipped objective on r_i with GRPO's advantage. TRL implements all of it; the defaults here are the published
settings. On-policy (one optimizer step per generation), the ratio is 1 and GSPO equals GRPO.

CAPO can be combined with it, because the gradient of r_i at pi_old is that of the score that CAPO ranks. In a
`CAPOConfig`, set `importance_sampling_level="sequence"`, the two clip bounds and the mini-batches below.
"""

import warnings
from dataclasses import dataclass, field

from trl_capo.methods.grpo import GRPO
from trl_capo.trainer.config import GroupAdvantageConfig


@dataclass
class GSPOConfig(GroupAdvantageConfig):
    """Configuration of `GSPOTrainer`: `GroupAdvantageConfig` with GSPO's defaults, as in TRL's documentation.

    Parameters:
        importance_sampling_level (`str`, *optional*, defaults to `"sequence"`):
            One ratio per completion.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            Mean over each sequence. Losses that divide by all tokens of a batch give long sequences more weight.
        epsilon (`float`, *optional*, defaults to `3e-4`):
            The ratio is clipped below 1 - epsilon. It is small because a mean over tokens moves far less than one
            token.
        epsilon_high (`float`, *optional*, defaults to `4e-4`):
            The ratio is clipped above 1 + epsilon_high.
        steps_per_generation (`int`, *optional*, defaults to `4`, or the value implied by `generation_batch_size`):
            Mini-batches per generation. With one, nothing is ever clipped.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Mini-batches per optimizer step, as in TRL's reproduction.
    """

    importance_sampling_level: str = field(default="sequence", metadata={"help": "One ratio per completion."})
    loss_type: str = field(default="grpo", metadata={"help": "Mean over each sequence."})
    epsilon: float = field(default=3e-4, metadata={"help": "The ratio is clipped below 1 - epsilon."})
    epsilon_high: float | None = field(default=4e-4, metadata={"help": "The ratio is clipped above 1 + epsilon_high."})
    steps_per_generation: int | None = field(  # type: ignore[assignment] # until the constructor has filled it in
        default=None, metadata={"help": "Mini-batches per generation: 4, unless generation_batch_size is set."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Mini-batches per optimizer step."})

    def __post_init__(self):
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = 4
        super().__post_init__()
        if self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0:
            warnings.warn(
                "every optimizer step uses whole generations, so all ratios are 1 and GSPO equals GRPO. Set "
                "steps_per_generation above gradient_accumulation_steps, for example 4 and 1.",
                UserWarning,
                stacklevel=3,
            )


class GSPOTrainer(GRPO):
    """GRPO through the seam, with GSPO's configuration; takes a `GSPOConfig`."""

    config_class = GSPOConfig
    _tag_names = ["trl", "trl-capo", "gspo"]
    _name = "GSPO"
    _paper = {"title": "Group Sequence Policy Optimization", "id": "2507.18071"}
