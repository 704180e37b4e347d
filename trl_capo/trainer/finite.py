"""Finds weights that are not finite before they are saved, and stops at the step that would spoil them."""

import math

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
        self._check_gradient_norm(norm)
        return norm

    def _check_gradient_norm(self, norm: "torch.Tensor | float | None") -> None:
        if norm is None or math.isfinite(float(norm)):
            return
        scaler = self.accelerator.scaler
        # With float16, a step whose scaled gradient overflows is skipped and the scale halved. That is no fault until
        # the scale is below 1.
        if self.args.fp16 and (scaler is None or not scaler.is_enabled() or scaler.get_scale() >= 1):
            return
        raise UserError(
            f"step {self.state.global_step + 1}: the gradient norm is {float(norm)}, so training stops before it "
            f"spoils the weights. {self._advice()}"
        )

    def _generate_and_score_completions(self, inputs):
        self._check_parameters()  # sampling from bad weights would crash with a vaguer error
        try:
            return super()._generate_and_score_completions(inputs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                f"step {self.state.global_step}: the weights are finite, but the probabilities of the next token are "
                f"not, so nothing can be sampled. {self._advice()}"
            ) from error

    def _check_parameters(self, on_all_ranks: bool = True) -> None:
        weights = self.state.global_step, _state_of(self.model)
        bad = first_not_finite(self.model) if weights != self._found_finite else None
        self._found_finite = weights if bad is None else None
        # Gathered also where this rank had read its weights before: another may not have.
        found = [name for name in (gather_object([bad]) if on_all_ranks else [bad]) if name]
        if found:
            raise UserError(
                f"step {self.state.global_step}: {found[0]} has values that are not finite, so nothing is saved. "
                f"{self._advice()}"
            )

    def _advice(self) -> str:
        clip = "" if self.args.max_grad_norm else " or set max_grad_norm above 0"
        what = f"Lower learning_rate (now {self.args.learning_rate:g}){clip}, and check the reward functions."
        if not self.is_world_process_zero():  # whole checkpoints are read for it, so only by one process
            return f"{what} The main process names the last finite checkpoint."
        last = last_complete_checkpoint(self.args.output_dir)
        return f"{what} " + (f"The last finite checkpoint is {last}." if last else "There is no earlier checkpoint.")


def _state_of(model: torch.nn.Module) -> int:
    """A number that changes when a parameter is replaced or changed in place."""
    return hash(tuple((id(parameter), parameter._version) for parameter in model.parameters()))


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
