"""Refuses bad input before any training time is spent, with one message that says what to change."""

import math
import os
import tempfile
from typing import cast

import torch
from transformers import PreTrainedConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl.trainer.utils import get_callable_name, get_config_model_id

from trl_capo.errors import UserError
from trl_capo.preflight.schedule import FilledConfig


def steps_between_generations(args: FilledConfig) -> int:
    """Optimizer steps after which a generation is used up, so that training can be resumed exactly.

    A generation feeds `steps_per_generation x num_iterations` micro-steps, and an optimizer step takes
    `gradient_accumulation_steps` of them. This is the first number of optimizer steps at which both end. It ignores
    that the last step of an epoch may take fewer; checkpoints record whether they lie within a generation.
    """
    generate_every = args.steps_per_generation * args.num_iterations
    return generate_every // math.gcd(generate_every, args.gradient_accumulation_steps)


def check_save_steps(args: FilledConfig, num_steps: float = math.inf) -> None:
    """Refuses checkpoints in the middle of a generation, from which training cannot resume exactly.

    Checkpoints do not contain the completions of a generation. The checkpoint that transformers writes after the last
    step may lie anywhere; resuming from it with a higher `max_steps` warns.

    Args:
        args: The trainer's configuration.
        num_steps: Optimizer steps of the run. A checkpoint that it would never reach is not refused.

    Raises:
        UserError: `save_steps` (`eval_steps` if the best model is saved) is not a multiple of the optimizer steps
            between two generations.
    """
    name = {"steps": "save_steps", "best": "eval_steps"}.get(args.save_strategy)
    steps = getattr(args, name) if name else None
    if not steps or (steps < 1 and math.isinf(num_steps)):
        return
    interval = steps_between_generations(args)
    whole_steps = int(steps) if steps >= 1 else math.ceil(num_steps * steps)
    if whole_steps < num_steps and whole_steps % interval != 0:
        nearest = max(interval, round(whole_steps / interval) * interval)
        raise UserError(
            f"{name}={steps} would write checkpoints in the middle of a generation, from which training cannot resume "
            f"exactly. New completions are generated every {interval} optimizer steps: set {name}={nearest}, or "
            f"another multiple of {interval}."
        )


def check_launch(world_size: int) -> None:
    """Refuses processes that were launched together but do not know of each other.

    This happens with `accelerate launch` on a machine without a GPU, unless the run is told to use the CPU: every
    process would do the whole job alone and write to the same directory.

    Args:
        world_size: Number of processes that this one knows of.

    Raises:
        UserError: The launcher started several processes, but this one sees only itself.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and world_size == 1:
        raise UserError(
            f"{launched} processes were launched, but each would do the whole job alone. Without a GPU, set "
            "use_cpu=True (or the environment variable ACCELERATE_USE_CPU=true)."
        )


def check_same_checkpoint(steps: list[int | None]) -> None:
    """Refuses to resume if the processes see different checkpoints, as happens when hosts do not share a disk.

    One would resume and another start over, and they would wait for each other forever.

    Args:
        steps: For each process, the optimizer steps of the checkpoint that it would resume from, or None.

    Raises:
        UserError: They differ.

    Example:
        >>> check_same_checkpoint([40, 40])
    """
    if len(set(steps)) > 1:
        seen = ", ".join(f"process {i} {'none' if step is None else f'step {step}'}" for i, step in enumerate(steps))
        raise UserError(
            f"The processes see different checkpoints to resume from ({seen}). Put output_dir on a disk that all "
            "hosts share, or copy the newest checkpoint to each of them."
        )


def check_sampler_logps(args: FilledConfig, has_rollout_func: bool) -> None:
    """Refuses to score completions by a sampler's log-probs if it has none, or draws from another distribution.

    Args:
        args: A configuration with `mean_logps_from`; a plain `GRPOConfig` is not checked.
        has_rollout_func: Whether completions come from the user's own function.

    Raises:
        UserError: `mean_logps_from="sampler"`, but TRL has transformers generate, or sampling is truncated or
            penalized.
    """
    if getattr(args, "mean_logps_from", "policy") != "sampler":
        return
    if not (args.use_vllm or has_rollout_func or getattr(args, "generation", "trl") == "compact"):
        raise UserError(
            "mean_logps_from='sampler' needs a sampler that returns log-probs: set use_vllm=True or "
            "generation='compact', pass a rollout_func, or set mean_logps_from='policy'."
        )
    overrides = args.generation_kwargs if isinstance(args.generation_kwargs, dict) else {}
    neutral = {
        "top_p": (1.0, None),
        "top_k": (0, -1, None),
        "min_p": (0.0, None),
        "repetition_penalty": (1.0, None),
        "presence_penalty": (0.0, None),
        "frequency_penalty": (0.0, None),
        "vllm_structured_outputs_regex": (None,),
        "temperature": (args.temperature,),
    }
    harmless = {"seed", "stop", "stop_token_ids", "max_tokens", "include_stop_str_in_output", "detokenize"}
    for name in [*neutral, *(overrides.keys() - neutral.keys() - harmless)]:
        value = overrides.get(name, getattr(args, name, None))
        if value not in neutral.get(name, ()):
            wanted = f"{name}={neutral[name][0]}" if name in neutral else f"no {name} in generation_kwargs"
            raise UserError(
                f"mean_logps_from='sampler' needs {wanted}, got {value}: otherwise the sampler draws from another "
                "distribution than the policy's. Change it, or set mean_logps_from='policy'."
            )


def check_known_names(args: FilledConfig, losses: list[str]) -> None:
    """Refuses a loss that the trainer cannot compute, and a tracker that transformers does not know.

    Args:
        args: The trainer's configuration.
        losses: Values of `loss_type` that the trainer accepts; empty if unknown.

    Raises:
        UserError: Lists the accepted values.
    """
    if losses and args.loss_type not in losses:
        raise UserError(f"loss_type={args.loss_type!r} must be one of {', '.join(losses)}.")
    trackers = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in trackers:
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            raise UserError(f"report_to={name!r} must be one of none, {', '.join(INTEGRATION_TO_CALLBACK)}.")


def check_output_dir(output_dir: str) -> None:
    """Refuses an output directory that cannot be created or written.

    Raises:
        UserError: Gives the operating system's reason.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir={output_dir!r} cannot be written ({error.strerror}). Choose another directory."
        ) from error


def reward_list(reward_funcs) -> list:
    """The reward functions as a list; TRL takes one, several or none."""
    if reward_funcs is None:
        return []
    return reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]


def reward_names(reward_funcs) -> list[str]:
    """The names that TRL will give the reward functions."""
    functions = reward_list(reward_funcs)
    models = {
        id(f): get_config_model_id(cast(PreTrainedConfig, f.config))
        for f in functions
        if isinstance(f, torch.nn.Module)
    }
    ids = [f if isinstance(f, str) else models.get(id(f)) for f in functions]
    return [
        get_callable_name(function) if model_id is None else model_id.split("/")[-1]
        for function, model_id in zip(functions, ids, strict=True)
    ]


def find_correctness_reward(names: list[str], wanted: str | None, needed: bool = True) -> int | None:
    """Index of the reward function that decides whether a completion is correct.

    Args:
        names: Names of the reward functions.
        wanted: The option `correctness_reward`; may be None if there is one function.
        needed: Whether the method needs the label; if not, it may be missing.

    Returns:
        The index; None if there is no label and none is needed.

    Raises:
        UserError: The option is missing with several functions, names none of them, or names two.

    Example:
        >>> find_correctness_reward(["format_reward", "accuracy_reward"], "accuracy_reward")
        1
        >>> find_correctness_reward(["format_reward", "accuracy_reward"], None, needed=False) is None
        True
    """
    if wanted is None and len(names) > 1:
        if not needed:
            return None
        raise UserError(
            "With several reward functions, set correctness_reward to the one that decides whether a completion is "
            f"correct: one of {', '.join(names)}."
        )
    if wanted is None:
        return 0
    if wanted not in names:
        raise UserError(f"correctness_reward={wanted!r} must be one of the reward functions: {', '.join(names)}.")
    if names.count(wanted) > 1:
        raise UserError(
            f"correctness_reward={wanted!r} is the name of {names.count(wanted)} reward functions. Give each its "
            f"own name before you pass them, for example: my_reward.__name__ = '{wanted}_1'."
        )
    return names.index(wanted)
