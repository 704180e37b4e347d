"""Checks, before training, the metric that chooses the best checkpoint, stops early or lowers the learning rate.

transformers looks the metric up after the first evaluation, and defaults to the loss. In GRPO and its relatives this
is the mean of the advantages, which is 0 up to rounding, however good the model is.

All names are known in advance, except those that a reward function logs through TRL's `log_metric`. If a function
could do so, only names close to a known one are refused, as misspelt.
"""

import difflib
import dis
import functools
import inspect

from transformers import EarlyStoppingCallback
from trl import GRPOConfig

from trl_capo.errors import UserError


LOWER_IS_BETTER = ("capo/soft_misranking", "capo/frac_unscorable")
HIGHER_IS_BETTER = ("reward", "capo/auc_within", "capo/auc_pooled")
GOOD = "eval_reward or eval_capo/auc_within"

CALIBRATION = (
    *("auc_within", "auc_pooled", "frac_mixed", "frac_all_correct", "frac_all_wrong", "frac_unscorable"),
    *("ppl_correct", "ppl_wrong"),
)
MASK = (
    *("frac_masked_correct", "frac_masked_wrong", "ref_ppl_correct", "ref_ppl_wrong", "ref_ppl_low", "ref_ppl_high"),
    "mask_active",
)
CAPO = ("soft_misranking", "tau")

# TRL's metrics that depend on settings not examined here.
DEPENDENT = ("cispo_clip_ratio", "vespo/", "entropy_coef", "aux_loss", "policy_loss", "tools/", "sampling/")


def default_direction(metric: str | None) -> bool | None:
    """`greater_is_better` if it is unset: False for our metrics that should fall, else None: transformers decides.

    Example:
        >>> default_direction("eval_capo/soft_misranking"), default_direction("eval_reward")
        (False, None)
    """
    return False if metric is not None and metric.endswith(LOWER_IS_BETTER) else None


def known_metrics(args: GRPOConfig, rewards: list[str], calibrated: bool) -> list[str]:
    """Names of the metrics that an evaluation logs, without `eval_` and the name of a set.

    Args:
        args: The trainer's configuration.
        rewards: Names of the reward functions.
        calibrated: Whether there is a correctness label, and so the calibration metrics.
    """
    names = ["reward", "reward_std", "frac_reward_zero_std", "entropy", "num_tokens"]
    names += [f"rewards/{name}/{statistic}" for name in rewards for statistic in ("mean", "std")]
    names += [
        f"completions/{name}"
        for name in ("mean_length", "min_length", "max_length", "clipped_ratio")
        + ("mean_terminated_length", "min_terminated_length", "max_terminated_length")
    ]
    names += [f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")]
    names += ["runtime", "samples_per_second", "steps_per_second"]
    if args.beta != 0:
        names.append("kl")
    if calibrated:
        shown = [*CALIBRATION, *(MASK if getattr(args, "ref_ppl_mask", False) else ())]
        names += [f"capo/{name}" for name in (*shown, *(CAPO if hasattr(args, "tau") else ()))]
    return names


def check_best_metric(
    args: GRPOConfig,
    *,
    eval_dataset,
    callbacks: list | None,
    reward_funcs: list,
    rewards: list[str],
    calibrated: bool,
    open_names: bool,
) -> str | None:
    """Refuses a metric that no evaluation will log, or that is meaningless.

    Args:
        args: The trainer's configuration.
        eval_dataset: As given to the trainer.
        callbacks: As given to the trainer.
        reward_funcs: The reward functions.
        rewards: Their names.
        calibrated: Whether there is a correctness label.
        open_names: Whether anything but the reward functions may log metrics that are not known here.

    Returns:
        A warning, or None.

    Raises:
        UserError: Suggests metrics to choose.
    """
    metric = args.metric_for_best_model
    evaluates = _value(args.eval_strategy) != "no"
    users = [
        name
        for name, used in {
            "load_best_model_at_end": args.load_best_model_at_end,
            "save_strategy='best'": _value(args.save_strategy) == "best",
            "EarlyStoppingCallback": any(map(_stops_early, callbacks or ())),
            f"lr_scheduler_type='{_value(args.lr_scheduler_type)}'": _value(args.lr_scheduler_type)
            in ("reduce_lr_on_plateau", "greedy"),
        }.items()
        if used
    ]
    if users and not evaluates:
        raise UserError(
            f"{users[0]} needs evaluations: set eval_strategy to 'steps' or 'epoch', and metric_for_best_model to "
            f"{GOOD}."
        )
    if not evaluates or (metric is None and not users):
        return None
    sets = list(eval_dataset) if isinstance(eval_dataset, dict) else []
    bare = _bare(metric, sets)
    if metric is None or bare is None or bare == "loss":
        user = users[0] if users else "metric_for_best_model"
        if args.beta != 0:
            return (
                f"{user} uses the evaluation loss. With beta={args.beta} this is beta times the divergence from the "
                "reference, which is smallest for the model that has learnt least. A better metric_for_best_model "
                f"is {_with_set(GOOD, sets)}."
            )
        raise UserError(
            f"{user} would use the evaluation loss, which is the mean of "
            f"the advantages: 0 up to rounding, however good the model is. Set metric_for_best_model to "
            f"{_with_set(GOOD, sets)}."
        )
    names = known_metrics(args, rewards, calibrated)
    direction = {**dict.fromkeys(LOWER_IS_BETTER, False), **dict.fromkeys(HIGHER_IS_BETTER[1:], True)}.get(bare)
    if bare in names and direction not in (None, args.greater_is_better):
        raise UserError(
            f"greater_is_better={args.greater_is_better} would choose the worst model: {metric} is better the "
            f"{'higher' if direction else 'lower'} it is. Leave greater_is_better unset, or set it to {direction}."
        )
    prefixed = metric if metric.startswith("eval_") else f"eval_{metric}"
    if not sets:
        available = [f"eval_{name}" for name in names]
    else:
        available = [f"eval_{part}_{name}" for part in sets for name in names]
        if bare in names and prefixed == f"eval_{bare}" and not bare.startswith("capo/"):
            return (
                f"metric_for_best_model={metric!r} is taken from the last evaluation set, {sets[-1]!r}. "
                f"To choose a set, name it: {', '.join(f'eval_{part}_{bare}' for part in sets[:3])}."
            )
    if prefixed in available or bare.startswith(DEPENDENT):
        return None
    may_be_logged = open_names or any(map(may_log_metrics, reward_funcs))
    ours = bare.startswith("capo/") and not open_names
    close = difflib.get_close_matches(prefixed, available, n=3, cutoff=0.6 if ours or not may_be_logged else 0.85)
    if bare in names and sets:
        close = [f"eval_{part}_{bare}" for part in sets[:3]]
    if may_be_logged and not ours and not close:
        return None
    elsewhere = [f"capo/{name}" for name in (*CALIBRATION, *MASK, *CAPO) if f"capo/{name}" not in names]
    why = " with these settings" if bare in elsewhere else ""
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Good choices are {_with_set(GOOD, sets)}."
    raise UserError(f"metric_for_best_model={metric!r} is not logged by any evaluation{why}. {hint}")


def may_log_metrics(function) -> bool:
    """Whether a reward function could call TRL's `log_metric`: it has that parameter, or reads its `**kwargs`.

    Example:
        >>> def constant(completions, **kwargs):
        ...     return [1.0] * len(completions)
        >>> def logs(completions, **kwargs):
        ...     kwargs["log_metric"]("accuracy", 1.0)
        >>> may_log_metrics(constant), may_log_metrics(logs)
        (False, True)
    """
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, str) or not callable(function):
        return False
    if hasattr(function, "config") and hasattr(function, "parameters"):  # a reward model
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    code = code or getattr(inspect.unwrap(type(function).__call__), "__code__", None)
    if code is None:
        return True
    named = code.co_argcount + code.co_kwonlyargcount
    if "log_metric" in code.co_varnames[:named]:
        return True
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    keywords = code.co_varnames[named + bool(code.co_flags & inspect.CO_VARARGS)]
    reads = (i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD"))
    return keywords in code.co_cellvars or any(
        keywords in (argument if isinstance(argument, tuple) else (argument,)) for argument in reads
    )


def _stops_early(callback) -> bool:
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, EarlyStoppingCallback)


def _value(option) -> str:
    return str(getattr(option, "value", option))


def _bare(metric: str | None, sets: list[str]) -> str | None:
    """The metric without `eval_` and the set's name."""
    if metric is None:
        return None
    metric = metric.removeprefix("eval_")
    for part in sorted(map(str, sets), key=len, reverse=True):
        if metric.startswith(f"{part}_"):
            return metric.removeprefix(f"{part}_")
    return metric


def _with_set(names: str, sets: list[str]) -> str:
    return names.replace("eval_", f"eval_{sets[0]}_") if sets else names
