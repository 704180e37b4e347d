"""All checks that a trainer makes before it loads a model."""

from trl_capo.preflight.checks import check_launch, check_output_dir, reward_list
from trl_capo.preflight.model import check_engine, check_model, check_others
from trl_capo.preflight.prompts import check_prompts
from trl_capo.preflight.recipe import Method, check_run
from trl_capo.preflight.schedule import FilledConfig


def check_trainer(
    method_class: type[Method], model, reward_funcs, args: FilledConfig, engine: type, given: dict
) -> tuple:
    """Refuses bad input.

    Args:
        method_class: The trainer's class.
        model: As given to the trainer.
        reward_funcs: As given to the trainer.
        args: The trainer's configuration.
        engine: The class that TRL generates with when it uses vLLM.
        given: The trainer's other arguments, by name.

    Returns:
        The model, with its name resolved, and whether the prompts were checked.

    Raises:
        ValueError: One line that says what to change.
    """
    check_launch(args.world_size)
    check_run(method_class, args, reward_funcs, **given)
    check_output_dir(args.output_dir)
    check_engine(args, engine)
    model = check_model(model)
    check_others(args, reward_list(reward_funcs))
    return model, check_prompts(model, args, given)
