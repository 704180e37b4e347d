"""After a resume, the options of the new command hold, not those stored in the checkpoint.

The states of the optimizer and scheduler contain the old run's learning rate, its base, weight decay, betas and eps.
After they are loaded, the configured values are put back. An option that did not change keeps its value to the last
bit.
"""

import copy
import json
import re
from typing import Any

import torch


# Options that make a resumed run differ if they change, for the message. New values are always used.
RECORDED = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "max_steps",
    "num_train_epochs",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "seed",
    "data_seed",
    "generation",
    "prompt_selection",
    "prompt_candidates",
    "prompt_exploration",
    "metric_for_best_model",
    "greater_is_better",
)
HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


def recorded_options(args) -> dict[str, Any]:
    """The options that a checkpoint records, as JSON."""
    return json.loads(json.dumps({name: getattr(args, name) for name in RECORDED if hasattr(args, name)}, default=str))


def changed_options(before: dict[str, Any], args) -> dict[str, tuple]:
    """Options that differ from the checkpoint's: name to (old, new) value."""
    now = recorded_options(args)
    return {name: (old, now[name]) for name, old in before.items() if name in now and old != now[name]}


def kind_of_optimizer(optim: str) -> str:
    """A name shared by optimizers that can load each other's state.

    Example:
        >>> kind_of_optimizer("adamw_torch") == kind_of_optimizer("adamw_torch_fused")
        True
        >>> kind_of_optimizer("paged_adamw_8bit") == kind_of_optimizer("adamw_torch")
        False
    """
    same = r"^paged_|_32bit$|(?<=adamw)_bnb|(?<=adamw_torch)_(fused|xla|npu_fused)"
    return re.sub(same, "", optim)


def hyperparameters(optimizer) -> list[dict[str, Any]]:
    """The configured values of each parameter group. Call it before a checkpoint's state is loaded."""
    groups = [{key: group[key] for key in HYPERPARAMETERS if key in group} for group in optimizer.param_groups]
    return copy.deepcopy(groups)


def restore_hyperparameters(optimizer, scheduler, configured: list[dict[str, Any]]) -> None:
    """Replaces a checkpoint's values with the configured ones, and sets the learning rate of the next step.

    Args:
        optimizer: The optimizer, with the checkpoint's state.
        scheduler: The scheduler, with the checkpoint's step count. One that reacts to metrics keeps its reductions.
        configured: The result of `hyperparameters`.
    """
    groups = optimizer.param_groups
    if len(groups) != len(configured):
        return
    rates = []
    for group, values in zip(groups, configured, strict=True):
        old, new = group.get("initial_lr"), values.get("initial_lr")
        rates.append(_scaled(group["lr"], old, new))
        group.update(values)
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def _scaled(rate, old, new):
    return rate if old is None or new is None or not old or old == new else rate * (new / old)
