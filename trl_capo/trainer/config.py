"""Options of every trainer on the seam: TRL's, the fast step, what is correct, the reference and the mask by it."""

import math
import warnings
from dataclasses import dataclass, field, fields
from typing import cast

from transformers import TrainingArguments
from trl import GRPOConfig

from trl_capo.errors import UserError
from trl_capo.preflight.batches import check_batches
from trl_capo.preflight.best_metric import default_direction
from trl_capo.preflight.numbers import check_numbers
from trl_capo.preflight.schedule import FilledConfig
from trl_capo.redact import is_secret_name, redact


@dataclass
class FastGRPOConfig(FilledConfig):
    """Configuration of `FastGRPOTrainer`: TRL's `GRPOConfig` with the same defaults, and one more option.

    Parameters:
        repack (`bool`, *optional*, defaults to `True`):
            Drop rows without a gradient, sort the rest by length and trim the padding, as far as that leaves the
            gradient as it is (see `trl_capo.trainer.repack`); otherwise one line says what is not done and why. Passes
            without gradient then take up to twice `per_device_train_batch_size` rows. With `torch_compile`, set
            `pad_to_multiple_of` too, so that there are few widths.
    """

    repack: bool = field(
        default=True,
        metadata={
            "help": "Drop rows without a gradient, sort the rest by length and trim the padding, as far as that "
            "leaves the gradient as it is."
        },
    )

    def __post_init__(self):
        check_numbers(vars(self))
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


@dataclass
class GroupAdvantageConfig(FastGRPOConfig):
    """Configuration of `GroupAdvantageTrainer`: `FastGRPOConfig`, what is correct, the reference and the mask by it.

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
        ref_ppl_mask (`bool`, *optional*, defaults to `False`):
            Drop correct completions that the reference finds surprising and wrong ones that it finds likely. If
            `False` and `beta=0`, no reference model is loaded.
        ref_ppl_low (`float`, *optional*, defaults to `1.05`):
            Wrong completions with a lower reference perplexity are dropped.
        ref_ppl_high (`float`, *optional*, defaults to `2.5`):
            Correct completions with a higher reference perplexity are dropped.
        ref_ppl_quantiles (`list[float]`, *optional*):
            Two quantiles in (0, 1), e.g. `0.25 0.75`. The thresholds are then these quantiles of the reference
            perplexity of the first completions of the training, estimated once and frozen; until then nothing is
            masked.
        ref_ppl_quantiles_by_class (`bool`, *optional*, defaults to `False`):
            Take the low threshold from wrong completions and the high one from correct completions, instead of both
            from all. Low may then exceed high.
        ref_ppl_quantile_samples (`int`, *optional*, defaults to `1024`):
            Number of completions from which the quantiles are taken.
        prompt_selection (`str`, *optional*, defaults to `"uniform"`):
            Which prompts a generation answers: `"uniform"`, every prompt once an epoch as in TRL, or `"informative"`,
            those whose group is most likely to hold both right and wrong answers (see
            `trl_capo.trainer.prompt_selection`). The training distribution changes.
        prompt_candidates (`int`, *optional*, defaults to `4`):
            With `"informative"`, prompts drawn at random for each one that is kept.
        prompt_exploration (`float`, *optional*, defaults to `0.1`):
            With `"informative"`, the share of each generation's prompts that is drawn uniformly all the same.
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
    ref_ppl_mask: bool = field(
        default=False,
        metadata={
            "help": "Drop correct completions that the reference finds surprising and wrong ones that it finds "
            "likely. If False and beta=0, no reference model is loaded."
        },
    )
    ref_ppl_low: float = field(
        default=1.05, metadata={"help": "Wrong completions with a lower reference perplexity are dropped."}
    )
    ref_ppl_high: float = field(
        default=2.5, metadata={"help": "Correct completions with a higher reference perplexity are dropped."}
    )
    ref_ppl_quantiles: list[float] | None = field(
        default=None,
        metadata={
            "help": "Two quantiles in (0, 1), e.g. `0.25 0.75`, of the reference perplexity of the first completions, "
            "that replace the fixed thresholds."
        },
    )
    ref_ppl_quantiles_by_class: bool = field(
        default=False,
        metadata={"help": "Low threshold from wrong completions, high one from correct ones, not both from all."},
    )
    ref_ppl_quantile_samples: int = field(
        default=1024, metadata={"help": "Number of completions from which the quantiles are taken."}
    )
    prompt_selection: str = field(
        default="uniform",
        metadata={
            "help": "Which prompts a generation answers: 'uniform', every prompt once an epoch, or 'informative', "
            "those whose group is most likely to hold both right and wrong answers.",
            "choices": ["uniform", "informative"],
        },
    )
    prompt_candidates: int = field(
        default=4, metadata={"help": "With 'informative', prompts drawn at random for each one that is kept."}
    )
    prompt_exploration: float = field(
        default=0.1, metadata={"help": "With 'informative', the share of each generation that is drawn uniformly."}
    )

    def __post_init__(self):
        for name, choices in (
            ("ref_model_dtype", (None, "bfloat16", "float16", "float32")),
            ("mean_logps_from", ("policy", "sampler")),
            ("prompt_selection", ("uniform", "informative")),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(map(str, choices))
                raise UserError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in ("ref_ppl_low", "ref_ppl_high"):
            threshold = getattr(self, name)
            if not (threshold >= 1 and math.isfinite(threshold)):
                raise UserError(f"{name} must be a finite perplexity of at least 1, got {threshold}.")
        quantiles = self.ref_ppl_quantiles
        if quantiles is not None and (len(quantiles) != 2 or not all(0 < quantile < 1 for quantile in quantiles)):
            raise UserError(f"ref_ppl_quantiles must be two numbers in (0, 1), low and high, got {quantiles}.")
        if self.prompt_candidates < 2:
            raise UserError(
                f"prompt_candidates must be at least 2, got {self.prompt_candidates}: with fewer there is no choice."
            )
        if not 0 < self.prompt_exploration <= 1:
            raise UserError(f"prompt_exploration must lie in (0, 1], got {self.prompt_exploration}.")
        if self.ref_ppl_quantile_samples < 2:
            raise UserError(f"ref_ppl_quantile_samples must be at least 2, got {self.ref_ppl_quantile_samples}.")
        if self.ref_ppl_quantiles_by_class and quantiles is None:
            raise UserError("ref_ppl_quantiles_by_class=True needs ref_ppl_quantiles, e.g. [0.25, 0.75].")
        if self.sync_ref_model and not self.ref_ppl_mask and self.beta == 0:
            raise UserError(
                "sync_ref_model=True has no reference to update: set ref_ppl_mask=True or a beta above 0, or leave "
                "sync_ref_model off."
            )
        if self.sync_ref_model and self.ref_model_dtype in ("bfloat16", "float16"):
            raise UserError(
                f"sync_ref_model=True moves the reference by steps that {self.ref_model_dtype} rounds away: leave "
                "ref_model_dtype unset."
            )
        super().__post_init__()
        self._warn_about_the_mask()

    def _warn_about_the_mask(self) -> None:
        """Settings that run but do not mean what the paper's numbers mean."""
        low, high = self.ref_ppl_quantiles or (self.ref_ppl_low, self.ref_ppl_high)
        if self.ref_ppl_mask and not self.ref_ppl_quantiles_by_class and low >= high:
            names = "ref_ppl_quantiles" if self.ref_ppl_quantiles else "ref_ppl_low and ref_ppl_high"
            warnings.warn(
                f"{names} are {low} and {high}: with low >= high every completion between them is dropped, correct or "
                "not.",
                UserWarning,
                stacklevel=4,
            )
        if self.ref_ppl_mask and self.ref_ppl_quantiles is None and self.temperature != 1:
            warnings.warn(
                f"temperature={self.temperature}: log-probs are those of the tempered distribution, so the absolute "
                "thresholds ref_ppl_low and ref_ppl_high do not mean what they mean at temperature 1. Use "
                "ref_ppl_quantiles.",
                UserWarning,
                stacklevel=4,
            )


def without_secrets(args: TrainingArguments) -> TrainingArguments:
    """A copy of a configuration that may be written beside a model: secrets are None, left out, or stars."""
    copy = object.__new__(type(args))
    for name, value in vars(args).items():
        copy.__dict__[name] = None if is_secret_name(name) else redact(value)
    return copy


def checked_config(args: GRPOConfig, config_class: type[GRPOConfig], trainer: str) -> FilledConfig:
    """The configuration of a trainer; a plain `GRPOConfig` will do where no method has options of its own.

    Args:
        args: What the user passed.
        config_class: What the trainer takes.
        trainer: Its name, for the message.

    Returns:
        `args`; a plain `GRPOConfig` has the defaults of the options that it lacks.

    Raises:
        TypeError: The trainer needs a configuration of its own.
    """
    if isinstance(args, GRPOConfig) and config_class in (GRPOConfig, FastGRPOConfig, GroupAdvantageConfig):
        for option in fields(config_class):
            if not hasattr(args, option.name):
                setattr(args, option.name, option.default)
    elif not isinstance(args, config_class):
        raise TypeError(f"{trainer} takes a {config_class.__name__} as args, got {type(args).__name__}.")
    return cast(FilledConfig, args)
