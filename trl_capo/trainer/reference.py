"""Chooses the reference model: the policy as it was when training began, or one that the user names."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from trl.trainer import grpo_trainer

from trl_capo.errors import UserError
from trl_capo.models.source import model_path
from trl_capo.trainer.config import GroupAdvantageConfig


def reference_source(
    model: PreTrainedModel | str, args: GroupAdvantageConfig, policy_is_peft: bool
) -> PreTrainedModel | str | None:
    """What to build the reference model from: a model, an id or path, or None for TRL's own choice."""
    if args.ref_model_name_or_path is not None:
        if policy_is_peft:
            raise UserError(
                "ref_model_name_or_path cannot be used with PEFT, where the reference is the model without its "
                "adapter. Leave it unset, or merge the adapter and train without PEFT."
            )
        return model_path(args.ref_model_name_or_path)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if policy_is_peft or isinstance(model, str) or zero3:
        return None
    # TRL would reload an instance from the path in its config, which may be missing or hold other weights.
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    reference.__dict__.pop("forward", None)  # an earlier trainer's patch, which would still run the policy
    return reference


def make_room_for_reference_adapter(model: PreTrainedModel) -> None:
    """TRL copies the adapter "default" to "ref", and fails if "default" is missing or "ref" exists."""
    if "default" not in model.peft_config:
        raise UserError(
            f"The reference of a PEFT model is a copy of its adapter 'default', but this one has "
            f"{', '.join(model.peft_config)}. Load the adapter under that name (adapter_name='default'), or set "
            "ref_ppl_mask=False."
        )
    if "ref" in model.peft_config:  # left by an earlier trainer; the new reference is the current adapter
        model.delete_adapter("ref")


@contextmanager
def reference_from(
    source: "PreTrainedModel | str | None", dtype: str | None, policy_is_loaded: bool
) -> Iterator[None]:
    """Makes TRL's constructor load `source` as the reference model, in `dtype` if one is given.

    TRL loads the policy (unless it is an instance) and then the reference through one function. What it does with the
    reference afterwards (dropout, precision of the head, sharding, moving average) does not change.
    """
    if source is None and dtype is None:
        yield
        return
    load = grpo_trainer.create_model_from_path
    pending_policy = [] if policy_is_loaded else [True]

    def load_policy_then_source(model_id, **kwargs):
        if pending_policy and pending_policy.pop():
            return load(model_id, **kwargs)
        if isinstance(source, PreTrainedModel):
            return source if dtype is None else source.to(getattr(torch, dtype))
        if dtype is not None:
            kwargs["dtype"] = dtype
        if source is None:
            return load(model_id, **kwargs)
        return load(source, **{**kwargs, "revision": None})  # the revision belongs to the policy

    grpo_trainer.create_model_from_path = load_policy_then_source  # type: ignore[assignment]
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load
