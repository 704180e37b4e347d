"""Options shared by all trainers: TRL's, the fast step, generation, the label, the mask, the choice of prompts."""

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
    """Configuration of `FastGRPOTrainer`: TRL's `GRPOConfig` with the same defaults and two more options.

    Parameters:
        repack (`bool`, *optional*, defaults to `True`):
            Drop rows without a gradient, sort the rest by length and trim the padding, where this leaves the gradient
            unchanged (see `trl_capo.trainer.repack`). A printed line says which steps are skipped and why. Passes
            without gradient take up to twice `per_device_train_batch_size` rows. With `torch_compile`, also set
            `pad_to_multiple_of` to limit the number of distinct widths.
        generation (`str`, *optional*, defaults to `"trl"`):
            What decodes where TRL generates with transformers: `"trl"`, the whole batch until the last completion
            ends, or `"compact"`, which reads a prompt once for all its completions and drops finished ones from the
            batch. The distribution is the same, the random numbers are not (see `trl_capo.trainer.generation`).
    """

    repack: bool = field(
        default=True,
        metadata={
            "help": "Drop rows without a gradient, sort the rest by length and trim the padding, where this leaves "
            "the gradient unchanged."
        },
    )
    generation: str = field(
        default="trl",
        metadata={
            "help": "What decodes without vLLM: 'trl', the whole batch until the last completion ends, or 'compact', "
            "which reads a prompt once for all its completions and drops finished ones. Same distribution.",
            "choices": ["trl", "compact"],
        },
    )

    def __post_init__(self):
        check_numbers(vars(self))
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata.get("choices")
            ours = option.name not in GRPOConfig.__dataclass_fields__  # TRL takes more than its command line offers
            if ours and choices and value not in (*choices, option.default):
                raise UserError(f"{option.name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        set_by_user = self.generation_batch_size, self.steps_per_generation
        if self.greater_is_better is None:
            self.greater_is_better = default_direction(self.metric_for_best_model)
        try:
            super().__post_init__()
        except ValueError:
            check_batches(self, *set_by_user)  # names the options that the user set; other errors stay TRL's
            raise

    def to_dict(self):
        return redact(super().to_dict())  # what trackers record


@dataclass
class GroupAdvantageConfig(FastGRPOConfig):
    """Configuration of `GroupAdvantageTrainer`: `FastGRPOConfig` plus correctness label, reference, mask and prompts.

    Parameters:
        correctness_reward (`str`, *optional*):
            Name of the reward function that decides whether a completion is correct. Required with several reward
            functions, unless the method needs no label (GRPO without a mask). Without a label, no calibration metrics
            are logged.
        correct_threshold (`float`, *optional*, defaults to `0.5`):
            A completion is correct if its correctness reward is at least this value.
        ref_model_name_or_path (`str`, *optional*):
            Reference model. Defaults to the initial policy: reloaded from its id or path, copied from a model passed
            as an instance, or, with PEFT, the model without its adapter.
        ref_model_dtype (`str`, *optional*):
            Precision of the reference's weights, such as `"bfloat16"`, which takes half the memory of float32.
            Defaults to the policy's. Has no effect if the reference is the policy without its adapter.
        mean_logps_from (`str`, *optional*, defaults to `"policy"`):
            Log-probs that score a completion: `"policy"` recomputes them in the trainer; `"sampler"` takes those that
            vLLM, `generation="compact"` or `rollout_func` returned with the completion, which saves a pass. Sampling
            must cover the whole distribution: `top_p=1`, no `top_k`, `min_p` or `repetition_penalty`.
        ref_ppl_mask (`bool`, *optional*, defaults to `False`):
            Drop correct completions that the reference finds surprising and wrong ones that it finds likely. If
            `False` and `beta=0`, no reference model is loaded.
        ref_ppl_low (`float`, *optional*, defaults to `1.05`):
            Drop wrong completions with a reference perplexity below this.
        ref_ppl_high (`float`, *optional*, defaults to `2.5`):
            Drop correct completions with a reference perplexity above this.
        ref_ppl_quantiles (`list[float]`, *optional*):
            Two quantiles in (0, 1), e.g. `0.25 0.75`, that replace the fixed thresholds. They are quantiles of the
            reference perplexity of the first completions in training, estimated once and then frozen. Until then
            nothing is masked.
        ref_ppl_quantiles_by_class (`bool`, *optional*, defaults to `False`):
            Estimate the low threshold from wrong completions and the high one from correct completions, instead of
            both from all completions. The low threshold may then exceed the high one.
        ref_ppl_quantile_samples (`int`, *optional*, defaults to `1024`):
            Number of completions from which the quantiles are estimated.
        prompt_selection (`str`, *optional*, defaults to `"uniform"`):
            Which prompts a generation answers: `"uniform"`, every prompt once an epoch as in TRL, or `"informative"`,
            those whose group is most likely to hold both right and wrong answers (see
            `trl_capo.trainer.prompt_selection`). The training distribution changes.
        prompt_candidates (`int`, *optional*, defaults to `8`):
            With `"informative"`, prompts drawn at random for each one that is kept.
        prompt_exploration (`float`, *optional*, defaults to `0.1`):
            With `"informative"`, the share of each generation's prompts that is drawn uniformly regardless.
    """

    correctness_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that decides whether a completion is correct. Required with "
            "several reward functions, unless the method needs no label."
        },
    )
    correct_threshold: float = field(
        default=0.5, metadata={"help": "A completion is correct if its correctness reward is at least this value."}
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model. Defaults to the initial policy: reloaded from its id or path, copied from a "
            "model passed as an instance, or, with PEFT, the model without its adapter."
        },
    )
    ref_model_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the reference's weights, such as bfloat16, which takes half the memory of float32. "
            "Defaults to the policy's.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    mean_logps_from: str = field(
        default="policy",
        metadata={
            "help": "Log-probs that score a completion: 'policy' recomputes them in the trainer; 'sampler' takes "
            "those that vLLM, compact generation or rollout_func returned, which saves a pass. 'sampler' needs "
            "top_p=1 and no top_k, min_p or repetition_penalty.",
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
        default=1.05, metadata={"help": "Drop wrong completions with a reference perplexity below this."}
    )
    ref_ppl_high: float = field(
        default=2.5, metadata={"help": "Drop correct completions with a reference perplexity above this."}
    )
    ref_ppl_quantiles: list[float] | None = field(
        default=None,
        metadata={
            "help": "Two quantiles in (0, 1), e.g. `0.25 0.75`, that replace the fixed thresholds. They are quantiles "
            "of the reference perplexity of the first completions."
        },
    )
    ref_ppl_quantiles_by_class: bool = field(
        default=False,
        metadata={
            "help": "Estimate the low threshold from wrong completions and the high one from correct completions, "
            "instead of both from all completions."
        },
    )
    ref_ppl_quantile_samples: int = field(
        default=1024, metadata={"help": "Number of completions from which the quantiles are estimated."}
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
        default=8, metadata={"help": "With 'informative', prompts drawn at random for each one that is kept."}
    )
    prompt_exploration: float = field(
        default=0.1, metadata={"help": "With 'informative', the share of each generation that is drawn uniformly."}
    )

    def __post_init__(self):
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
                "sync_ref_model=True has no reference to update: set ref_ppl_mask=True, beta above 0, or "
                "sync_ref_model=False."
            )
        if self.sync_ref_model and self.ref_model_dtype in ("bfloat16", "float16"):
            raise UserError(
                f"ref_model_dtype={self.ref_model_dtype!r} is too coarse for sync_ref_model=True: it rounds away the "
                "updates of the reference. Leave ref_model_dtype unset."
            )
        super().__post_init__()
        self._warn_about_the_mask()

    def _warn_about_the_mask(self) -> None:
        """Warns about settings that run, but under which the thresholds do not mean what they mean in the paper."""
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
                f"temperature={self.temperature}: log-probs are those of the tempered distribution, so the fixed "
                "thresholds ref_ppl_low and ref_ppl_high do not mean what they mean at temperature 1. Use "
                "ref_ppl_quantiles instead.",
                UserWarning,
                stacklevel=4,
            )


def without_secrets(args: TrainingArguments) -> TrainingArguments:
    """A copy of a configuration that is safe to save with a model: secrets are set to None, removed or masked."""
    copy = object.__new__(type(args))
    for name, value in vars(args).items():
        copy.__dict__[name] = None if is_secret_name(name) else redact(value)
    return copy


def checked_config(args: GRPOConfig, config_class: type[GRPOConfig], trainer: str) -> FilledConfig:
    """Checks a trainer's configuration. A plain `GRPOConfig` is accepted if the method adds no options of its own.

    Args:
        args: The configuration that the user passed.
        config_class: The class that the trainer takes.
        trainer: The trainer's name, for the message.

    Returns:
        `args`. A plain `GRPOConfig` gets the defaults of the options that it lacks.

    Raises:
        TypeError: The trainer needs its own configuration class.
    """
    if isinstance(args, GRPOConfig) and config_class in (GRPOConfig, FastGRPOConfig, GroupAdvantageConfig):
        for option in fields(config_class):
            if not hasattr(args, option.name):
                setattr(args, option.name, option.default)
    elif not isinstance(args, config_class):
        raise TypeError(f"{trainer} takes a {config_class.__name__} as args, got {type(args).__name__}.")
    return cast(FilledConfig, args)
