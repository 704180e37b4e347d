"""Finds weights that are not finite before they are saved, and stops at the step that would spoil them."""

import math
from collections.abc import Callable

import torch
from accelerate.utils import gather_object

from trl_capo.errors import UserError
from trl_capo.trainer.checkpoints import last_complete_checkpoint
from trl_capo.trainer.publishing import PublishingGRPOTrainer


class FiniteGRPOTrainer(PublishingGRPOTrainer):
    """Stock GRPO that stops with a one-line error if weights are not finite, or too large to sample from."""

    _found_finite: object = None  # the weights that were last checked and found finite

    def _get_grad_norm(self, model, grad_norm=None):
        # Called before each optimizer step, whether gradients are clipped or not.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        check_gradient_norm(norm, step, self.args, scaler, self._last_checkpoint)
        return norm

    def _generate_and_score_completions(self, inputs):
        self._check_parameters()  # sampling from bad weights would crash with a vaguer error
        try:
            return super()._generate_and_score_completions(inputs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                f"step {self.state.global_step}: the weights are finite, but the probabilities of the next token are "
                f"not, so nothing can be sampled. {_advice(self.args)} {_where(self._last_checkpoint())}"
            ) from error

    def _check_parameters(self, on_all_ranks: bool = True) -> None:
        weights = self.state.global_step, _state_of(self.model)
        bad = first_not_finite(self.model) if weights != self._found_finite else None
        self._found_finite = weights if bad is None else None
        # Gather even if this rank has already checked these weights: another may not have.
        gather = gather_object if on_all_ranks else None
        check_parameters(bad, self.state.global_step, self.args, self._last_checkpoint, gather)

    def _last_checkpoint(self) -> str | None:
        # This reads whole checkpoints, so only one process does it; the other processes' messages omit it.
        return last_complete_checkpoint(self.args.output_dir) if self.is_world_process_zero() else ""


def _state_of(model: torch.nn.Module) -> int:
    """A number that changes when a parameter is replaced or changed in place."""
    return hash(tuple((id(parameter), parameter._version) for parameter in model.parameters()))


def check_gradient_norm(norm, step: int, args, scaler, last: Callable[[], str | None]) -> None:
    """Stops a training whose gradient is not finite, before the optimizer uses it.

    With float16, a step whose scaled gradient overflows is skipped and the scale is halved. That is normal until the
    scale falls below 1.

    Args:
        norm: Norm of the gradients over all ranks, a number or a tensor; None if unknown.
        step: The optimizer step, counted from 1.
        args: The training's configuration.
        scaler: The gradient scaler, or None.
        last: Returns the newest checkpoint, None if there is none, or "" if this process does not look.

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
    bad: str | None, step: int, args, last: Callable[[], str | None], gather: Callable | None = None
) -> None:
    """Refuses weights with NaN or infinity.

    Args:
        bad: The first such parameter on this rank, from `first_not_finite`.
        step: Optimizer steps so far.
        args: The training's configuration.
        last: Returns the newest checkpoint, None if there is none, or "" if this process does not look.
        gather: Concatenates the ranks' lists; None checks this rank alone.

    Raises:
        UserError: Names the first such parameter, the step and what to change.
    """
    found = [name for name in gather([bad]) if name] if gather else [bad] if bad else []
    if found:
        raise UserError(
            f"step {step}: {found[0]} has values that are not finite, so nothing is saved. {_advice(args)} "
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
        values = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed ZeRO-3 keeps this rank's shard here
        values = values.to_local() if hasattr(values, "to_local") else values
        if parameter.requires_grad and values.is_floating_point():
            names.append(name)
            flags.append(values.isfinite().all())
    if not flags:
        return None
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # the only wait for the device
    return next((name for name, is_finite in zip(names, finite, strict=True) if not is_finite), None)


def _advice(args) -> str:
    clip = "" if args.max_grad_norm else " or set max_grad_norm above 0"
    return f"Lower learning_rate (now {args.learning_rate:g}){clip}, and check the reward functions."


def _where(last: str | None) -> str:
    if last == "":
        return "The main process names the last finite checkpoint."
    return f"The last finite checkpoint is {last}." if last else "There is no earlier checkpoint."
