"""Refuses batch sizes that do not divide into groups, naming the options that the user sets."""

import math

from trl import GRPOConfig

from trl_capo.errors import UserError


def check_batches(args: GRPOConfig, generation_batch_size: int | None, steps_per_generation: int | None) -> None:
    """Refuses a generation or an evaluation batch that does not consist of whole groups.

    Args:
        args: The trainer's configuration, whether it passed TRL's own check or failed it.
        generation_batch_size: As the user set it; TRL fills it in.
        steps_per_generation: As the user set it; TRL fills it in.

    Raises:
        UserError: Names the options that were set and the nearest values that fit.
    """
    if not hasattr(args, "distributed_state"):
        return  # TRL's check failed before it reached the batches
    processes = f"{args.world_size} process{'' if args.world_size == 1 else 'es'}"
    rows, num_generations = args.per_device_train_batch_size * args.world_size, args.num_generations
    both = generation_batch_size is not None and steps_per_generation is not None
    if both or not num_generations or num_generations < 1 or rows < 1:
        return  # TRL's own message says what is wrong
    if generation_batch_size is not None:
        unit = math.lcm(rows, num_generations)
        if generation_batch_size % unit != 0:
            raise UserError(
                f"generation_batch_size={generation_batch_size} must be a multiple of {unit}, which both "
                f"per_device_train_batch_size={args.per_device_train_batch_size} x {processes} and "
                f"num_generations={num_generations} divide: use {_nearest(generation_batch_size, unit)}."
            )
    else:
        name = "gradient_accumulation_steps" if steps_per_generation is None else "steps_per_generation"
        steps = args.gradient_accumulation_steps if steps_per_generation is None else steps_per_generation
        completions = rows * steps
        if completions % num_generations != 0:
            size_unit = num_generations // math.gcd(num_generations, args.world_size * steps)
            divisors = [n for n in range(2, completions + 1) if completions % n == 0]
            wanted = num_generations
            fitting = sorted(divisors, key=lambda n: abs(n - wanted))[:2]
            raise UserError(
                f"A generation has per_device_train_batch_size={args.per_device_train_batch_size} x {processes} x "
                f"{name}={steps} = {completions} completions, which num_generations={num_generations} does not "
                f"divide. Set per_device_train_batch_size to {_nearest(args.per_device_train_batch_size, size_unit)}"
                + (f", or num_generations to {_or(sorted(fitting))}." if fitting else ".")
            )
    num_generations = args.num_generations_eval or num_generations
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        return
    if (args.per_device_eval_batch_size * args.world_size) % num_generations != 0:
        unit = num_generations // math.gcd(num_generations, args.world_size)
        option = "num_generations_eval" if args.num_generations_eval else "num_generations"
        raise UserError(
            f"An evaluation batch has per_device_eval_batch_size={args.per_device_eval_batch_size} x {processes} = "
            f"{args.per_device_eval_batch_size * args.world_size} completions, which {option}={num_generations} does "
            f"not divide. Set per_device_eval_batch_size to {_nearest(args.per_device_eval_batch_size, unit)}, or set "
            "num_generations_eval."
        )


def _nearest(value: int, unit: int) -> str:
    """The multiples of `unit` on either side of `value`, for a message.

    Example:
        >>> _nearest(12, 8), _nearest(3, 8)
        ('8 or 16', '8')
    """
    below = value // unit * unit
    return _or([n for n in (below, below + unit) if n > 0])


def _or(values: list[int]) -> str:
    return " or ".join(map(str, values))
