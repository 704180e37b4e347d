"""Options of every trainer on the seam: GRPO's, and which reward means correct and which model is the reference."""

from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class GroupAdvantageConfig(GRPOConfig):
    """Configuration of `GroupAdvantageTrainer`: TRL's `GRPOConfig` with the same defaults, and three more options.

    Parameters:
        correctness_reward (`str`, *optional*):
            Name of the reward function that decides whether a completion is correct. Needed with several reward
            functions.
        correct_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct if that reward is at least this.
        ref_model_name_or_path (`str`, *optional*):
            Reference model. By default the initial policy: the model id or path it was loaded from, a copy of a model
            passed as an instance, the model without its adapter under PEFT.
    """

    correctness_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that decides whether a completion is correct. Needed with several "
            "reward functions."
        },
    )
    correct_threshold: float = field(
        default=0.5, metadata={"help": "A completion is correct if that reward is at least this."}
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model. By default the initial policy: the model id or path it was loaded from, a copy "
            "of a model passed as an instance, the model without its adapter under PEFT."
        },
    )
