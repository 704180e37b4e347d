"""Valid ranges of numeric options, TRL's and ours: outside them, training crashes or is meaningless.

Imports nothing heavy, so that the command line can check them before TRL is imported.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from trl_capo.errors import UserError


RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda number: number >= 1,
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("generation_batch_size", "steps_per_generation", "num_generations_eval", "num_iterations"),
            *("max_completion_length", "max_prompt_tokens", "ref_model_sync_steps", "lora_r", "ddp_timeout"),
            *("vllm_tensor_parallel_size", "pad_to_multiple_of"),
        ),
    ),
    "at least 2": (lambda number: number >= 2, ("num_generations",)),
    "at least -1": (lambda number: number >= -1, ("top_k",)),
    "at least 0": (
        lambda number: number >= 0,
        ("save_steps", "eval_steps", "logging_steps", "dataloader_num_workers", "split_seed"),
    ),
    "a finite number of at least 0": (
        lambda number: 0 <= number < math.inf,
        ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"),
    ),
    "a finite number above 0": (lambda number: 0 < number < math.inf, ("temperature", "repetition_penalty")),
    "finite": (math.isfinite, ("num_train_epochs", "beta")),
    "at least 0 and below 1": (lambda number: 0 <= number < 1, ("adam_beta1", "adam_beta2")),
    "from 0 to 1": (lambda number: 0 <= number <= 1, ("top_p", "min_p", "top_entropy_quantile", "lora_dropout")),
    "above 0 and at most 1": (lambda number: 0 < number <= 1, ("vllm_gpu_memory_utilization",)),
    "from 0 to 4294967295": (lambda number: 0 <= number < 2**32, ("seed",)),
}
RANGE_OF = {name: (words, allows) for words, (allows, names) in RANGES.items() for name in names}


def number_problem(name: str, value: Any) -> str | None:
    """The range that a number violates, in words; None if it is valid or not a number.

    Example:
        >>> number_problem("learning_rate", "-1"), number_problem("learning_rate", 1e-6)
        ('a finite number of at least 0', None)
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    words, allows = RANGE_OF.get(name, ("a number", lambda number: True))
    return None if allows(number) and not math.isnan(number) else words


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuses a number outside its option's range.

    Raises:
        UserError: Names the first such option.
    """
    for name in RANGE_OF:
        if problem := number_problem(name, options.get(name)):
            raise UserError(f"{name} must be {problem}, got {options[name]}.")
