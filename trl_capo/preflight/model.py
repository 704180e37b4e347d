"""Checks the model and the generation engine before anything is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager

from trl_capo.errors import UserError
from trl_capo.extras import require
from trl_capo.models.source import check_trainable, model_path


def check_before_data(args, model: str | None, *, another_machine: bool) -> str:
    """Refuses input that is wrong whatever the data.

    Args:
        args: The trainer's configuration.
        model: The name of the model.
        another_machine: Whether the run is planned for another machine, where more may be installed.

    Returns:
        The model's folder or Hub id.

    Raises:
        UserError: One line that says what to change.
    """
    from trl.trainer.grpo_trainer import VLLMGeneration

    from trl_capo.preflight.schedule import check_some_steps

    check_some_steps(args)
    if not another_machine:
        check_engine(args, VLLMGeneration)
    check_others(args, [])
    if model is None:
        raise UserError(
            "model_name_or_path is missing: set it to a model id, a folder or a shipped model such as arithmetic-base."
        )
    return check_model(model)


def check_model(model):
    """The model to train. A name is resolved to a folder or a Hub id; a model is returned unchanged.

    Raises:
        ModelNotFound: The folder is missing or contains no model.
    """
    if not isinstance(model, str):
        return model
    path = model_path(model)
    check_trainable(path)
    return path


def check_others(args, reward_funcs: list) -> None:
    """Refuses a reference or a reward model whose folder is missing, even if the method does not need it.

    Raises:
        ModelNotFound: Names the folder.
    """
    for name in [getattr(args, "ref_model_name_or_path", None), *reward_funcs]:
        check_model(name)


def check_engine(args, engine: type) -> None:
    """Refuses vLLM if it is not installed.

    Args:
        args: The trainer's configuration.
        engine: The class that TRL generates with. Only TRL's own needs vLLM.

    Raises:
        UserError: Says how to install it.
    """
    if not args.use_vllm or not engine.__module__.startswith("trl."):
        return
    try:
        require("vllm")
    except ValueError as error:
        raise UserError(f"use_vllm=True: {error} Or set use_vllm=False to generate with transformers.") from error


@contextmanager
def naming_target_modules(model_args) -> Iterator[None]:
    """Turns PEFT's error about modules that the model does not have into one line that names the option.

    Raises:
        UserError: `lora_target_modules` names none of the model's modules.
    """
    try:
        yield
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        names = model_args.lora_target_modules
        given = " ".join(names) if isinstance(names, list) else names
        raise UserError(
            f"lora_target_modules={given} is not part of the model. Name modules such as q_proj v_proj, or use "
            "all-linear."
        ) from error
