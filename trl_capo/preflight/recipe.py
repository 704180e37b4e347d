"""Checks of a recipe that need neither the model nor this machine, shared by the trainer and `--dry-run`."""

import warnings
from typing import Protocol

from trl_capo.data.rows import check_data
from trl_capo.preflight.best_metric import check_best_metric
from trl_capo.preflight.checks import (
    check_known_names,
    check_sampler_logps,
    check_save_steps,
    find_correctness_reward,
    reward_list,
    reward_names,
)
from trl_capo.preflight.generation import check_generation
from trl_capo.preflight.rewards import check_one_each, repeated_names
from trl_capo.preflight.schedule import FilledConfig, check_enough_prompts, schedule
from trl_capo.preflight.selection import check_prompt_selection


class Method(Protocol):
    """What the checks need from a trainer's class."""

    @staticmethod
    def generations_per_batch(args) -> int: ...

    @classmethod
    def known_losses(cls) -> list[str]: ...

    @classmethod
    def needs_correct(cls, args) -> bool: ...


def check_run(
    method_class: type[Method],
    args: FilledConfig,
    reward_funcs,
    train_dataset,
    eval_dataset=None,
    *,
    reward_processing_classes=None,
    callbacks: list | None = None,
    rollout_func=None,
    environment_factory=None,
    **others,
) -> None:
    """Refuses input that would fail, or be meaningless, in training.

    Args:
        method_class: The trainer's class.
        args: Its configuration, with the launch's number of processes.
        reward_funcs, train_dataset, eval_dataset: As given to the trainer.
        reward_processing_classes, callbacks, rollout_func, environment_factory: As given to the trainer.
        others: The trainer's other arguments, which are not checked.

    Raises:
        ValueError: One line that says what to change.
    """
    num_prompts = len(train_dataset) if hasattr(train_dataset, "__len__") else None
    draws = method_class.generations_per_batch(args)
    check_known_names(args, method_class.known_losses())
    check_generation(args, has_rollout_func=rollout_func is not None)
    check_sampler_logps(args, has_rollout_func=rollout_func is not None)
    check_save_steps(args, schedule(args, num_prompts, draws).steps)
    check_prompt_selection(args, train_dataset)
    functions, names, calibrated = reward_list(reward_funcs), reward_names(reward_funcs), True
    if environment_factory is None:  # an environment brings its own prompts, and perhaps a reward
        check_data(reward_funcs, train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_enough_prompts(args, train_dataset, eval_dataset)
        check_one_each(len(functions), reward_processing_classes, args.reward_weights)
        label = getattr(args, "correctness_reward", None)
        needed = getattr(args, "ref_ppl_mask", False) or method_class.needs_correct(args)
        calibrated = find_correctness_reward(names, label, needed=needed) is not None
    for name in repeated_names(names):
        warnings.warn(
            f"{names.count(name)} reward functions are named {name!r}, so TRL logs them as one. To tell them apart, "
            "give each its own __name__.",
            UserWarning,
            stacklevel=4,
        )
    warning = check_best_metric(
        args,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        reward_funcs=functions,
        rewards=names,
        calibrated=calibrated,
        open_names=rollout_func is not None
        or environment_factory is not None
        or not all(_is_known(kind) for kind in [method_class, *map(_class_of, callbacks or ())]),
    )
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=4)


def _class_of(callback) -> type:
    return callback if isinstance(callback, type) else type(callback)


def _is_known(kind: type) -> bool:
    """Whether a class comes from a known library. The user's own may log other metrics."""
    return kind.__module__.partition(".")[0] in ("trl_capo", "trl", "transformers")
