"""Weights that are not finite: found before they are saved, and stopped at the step that would spoil them."""

import math
from collections.abc import Callable

import torch

from trl_capo.errors import UserError


def check_gradient_norm(norm, step: int, args, scaler, last: Callable[[], str | None]) -> None:
    """Stops a training whose gradient is not finite, before the optimizer uses it.

    With float16, a step whose scaled gradient overflows is skipped and the scale halved. That is no fault until the
    scale is below 1.

    Args:
        norm: Norm of the gradients of all ranks, a number or a tensor. None if it is not known.
        step: The optimizer step, counted from 1.
        args: The training's configuration.
        scaler: The scaler of gradients; None without one.
        last: Finds the newest checkpoint; None without one.

    Raises:
        UserError: Names the step and what to change.
    """
    if norm is None or math.isfinite(norm.item() if isinstance(norm, torch.Tensor) else norm):
        return
    if args.fp16 and (scaler is None or not scaler.is_enabled() or scaler.get_scale() >= 1):
        return
    raise UserError(
        f"step {step}: the gradient norm is {float(norm)}, so training stops before it spoils the weights. "
        f"{_advice(args)} {_where(last())}"
    )


def check_parameters(
    model: torch.nn.Module, step: int, args, last: Callable[[], str | None], gather: Callable | None = None
) -> None:
    """Refuses weights with NaN or infinity.

    Args:
        model: The model. Of shards, those of this rank are read.
        step: Optimizer steps so far.
        args: The training's configuration.
        last: Finds the newest checkpoint; None without one.
        gather: Collects a list of all ranks, where each has another part of the weights.

    Raises:
        UserError: Names the first such parameter, the step and what to change.
    """
    bad = first_not_finite(model)
    found = [name for name in gather([bad]) if name] if gather else [bad] if bad else []
    if found:
        raise UserError(
            f"step {step}: {found[0]} holds values that are not finite, so nothing is saved. {_advice(args)} "
            f"{_where(last())}"
        )


@torch.no_grad()
def first_not_finite(model: torch.nn.Module) -> str | None:
    """Name of the first trainable parameter with NaN or infinity; None if all are finite.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> first_not_finite(layer) is None
        True
        >>> _ = torch.nn.init.constant_(layer.bias, float("nan"))
        >>> first_not_finite(layer)
        'bias'
    """
    names, flags = [], []
    for name, parameter in model.named_parameters():
        values = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's ZeRO-3 keeps this rank's part there
        values = values.to_local() if hasattr(values, "to_local") else values
        if parameter.requires_grad and values.is_floating_point():
            names.append(name)
            flags.append(values.isfinite().all())
    if not flags:
        return None
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # the one wait for the device
    return next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), None)


def _advice(args) -> str:
    clip = "" if args.max_grad_norm else " or set max_grad_norm above 0"
    return f"Lower learning_rate (now {args.learning_rate:g}){clip}, and check the reward functions."


def _where(last: str | None) -> str:
    return f"The last finite checkpoint is {last}." if last else "There is no earlier checkpoint."
