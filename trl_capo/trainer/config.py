"""Options of every trainer on the seam: GRPO's, and what is correct, what the reference is, and what is skipped."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import GRPOConfig

from trl_capo.preflight.batches import check_batches
from trl_capo.preflight.best_metric import default_direction
from trl_capo.redact import is_secret_name, redact


@dataclass
class GroupAdvantageConfig(GRPOConfig):
    """Configuration of `GroupAdvantageTrainer`: TRL's `GRPOConfig` with the same defaults, and a few more options.

    Parameters:
        correctness_reward (`str`, *optional*):
            Name of the reward function that decides whether a completion is correct. Needed with several reward
            functions, unless the method needs no label (GRPO without a mask), which then logs no calibration metrics.
        correct_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct if that reward is at least this.
        ref_model_name_or_path (`str`, *optional*):
            Reference model. By default the initial policy: the model id or path it was loaded from, a copy of a model
            passed as an instance, the model without its adapter under PEFT.
        ref_model_dtype (`str`, *optional*):
            Precision of the reference's weights, such as `"bfloat16"`: half the memory of float32. By default the
            policy's. Without effect where the reference is the policy without its adapter.
        mean_logps_from (`str`, *optional*, defaults to `"policy"`):
            Which log-probs score a completion: `"policy"`, recomputed by the trainer, or `"sampler"`, those that came
            with the completion from vLLM or `rollout_func`, which saves that pass. The sampler must draw from the
            whole distribution: `top_p=1`, no `top_k`, `min_p` or `repetition_penalty`.
        repack (`bool`, *optional*, defaults to `True`):
            Drop rows without a gradient, sort the rest by length and trim the padding, as far as that leaves the
            gradient as it is (see `trl_capo.trainer.repack`); otherwise one line says what is not done and why. Passes without
            gradient then take up to twice `per_device_train_batch_size` rows. With `torch_compile`, set
            `pad_to_multiple_of` too, so that there are few widths.
    """

    correctness_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that decides whether a completion is correct. Needed with several "
            "reward functions, unless the method needs no label."
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
    ref_model_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the reference's weights, such as bfloat16: half the memory of float32. By default "
            "the policy's.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    mean_logps_from: str = field(
        default="policy",
        metadata={
            "help": "Which log-probs score a completion: 'policy', recomputed by the trainer, or 'sampler', those "
            "that came with the completion from vLLM or rollout_func, which saves that pass. Needs top_p 1 and no "
            "top_k, min_p or repetition_penalty.",
            "choices": ["policy", "sampler"],
        },
    )
    repack: bool = field(
        default=True,
        metadata={
            "help": "Drop rows without a gradient, sort the rest by length and trim the padding, as far as that "
            "leaves the gradient as it is."
        },
    )

    def __post_init__(self):
        for name, choices in (
            ("ref_model_dtype", (None, "bfloat16", "float16", "float32")),
            ("mean_logps_from", ("policy", "sampler")),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(map(str, choices))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.sync_ref_model and self.ref_model_dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"sync_ref_model=True moves the reference by steps that {self.ref_model_dtype} rounds away: leave "
                "ref_model_dtype unset."
            )
        set_by_user = self.generation_batch_size, self.steps_per_generation
        if self.greater_is_better is None:
            self.greater_is_better = default_direction(self.metric_for_best_model)
        try:
            super().__post_init__()
        except ValueError:
            check_batches(self, *set_by_user)  # in the options that were set; TRL's error if it is about another thing
            raise

    def __getstate__(self):
        return without_secrets(self).__dict__  # transformers pickles its arguments beside the model

    def to_dict(self):
        return redact(super().to_dict())  # what trackers record


def without_secrets(args: TrainingArguments) -> TrainingArguments:
    """A copy of a configuration that may be written beside a model: secrets are None, left out, or stars."""
    copy = object.__new__(type(args))
    for name, value in vars(args).items():
        copy.__dict__[name] = None if is_secret_name(name) else redact(value)
    return copy
