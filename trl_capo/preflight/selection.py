"""What `prompt_selection="informative"` cannot choose from: refused before a model is loaded."""

import hashlib
import json
import math
from typing import Any

from datasets import IterableDataset

from trl_capo.errors import UserError


INSTEAD = "use prompt_selection='uniform'"


def check_prompt_selection(args, train_dataset) -> None:
    """Refuses a dataset that prompts cannot be chosen from.

    Args:
        args: The trainer's configuration; plain `GRPOConfig`s are left alone.
        train_dataset: As given to the trainer.

    Raises:
        UserError: No dataset, a stream, an order to be kept, too few prompts, or prompts that are not text.
    """
    if getattr(args, "prompt_selection", "uniform") == "uniform":
        return
    problem = None
    if isinstance(train_dataset, IterableDataset):
        problem = "cannot look ahead in a stream: load the dataset without streaming"
    elif train_dataset is None or "prompt" not in train_dataset.column_names:
        problem = "chooses among the column 'prompt' of train_dataset, which is missing: add it"
    elif not args.shuffle_dataset:
        problem = "does not keep the order that shuffle_dataset=False asks for: set shuffle_dataset=True"
    if problem:
        raise UserError(f"prompt_selection='informative' {problem}, or {INSTEAD}.")
    check_choice(
        len({prompt_key(prompt) for prompt in train_dataset["prompt"]}),
        len(train_dataset),
        num_prompts=args.generation_batch_size // args.num_generations,
        candidates=args.prompt_candidates,
        exploration=args.prompt_exploration,
    )


def check_choice(distinct: int, rows: int, *, num_prompts: int, candidates: int, exploration: float) -> None:
    """Refuses a generation in which nothing can be chosen.

    Args:
        distinct: Distinct prompts of the dataset.
        rows: Its rows.
        num_prompts: Prompts per generation.
        candidates: Candidates for each of them.
        exploration: Share of them that is drawn uniformly.

    Raises:
        UserError: Says what to change.
    """
    uniform = num_explored(exploration, num_prompts)
    if uniform >= num_prompts:
        raise UserError(
            f"prompt_selection='informative' leaves no prompt to choose: {num_prompts} per generation, {uniform} of "
            f"them drawn uniformly (prompt_exploration={exploration}). Raise generation_batch_size, or lower "
            "num_generations or prompt_exploration."
        )
    if distinct < candidates * num_prompts:
        repeated = f" ({rows} rows, of which {rows - distinct} repeat a prompt)" if rows > distinct else ""
        raise UserError(
            f"prompt_selection='informative' draws {candidates * num_prompts} candidates per generation "
            f"(prompt_candidates={candidates} times {num_prompts} prompts), but train_dataset has {distinct} distinct "
            f"prompts{repeated}: lower prompt_candidates or {INSTEAD}."
        )


def num_explored(exploration: float, num_prompts: int) -> int:
    """How many prompts of a generation are drawn uniformly: a share, rounded up.

    Example:
        >>> num_explored(0.1, 32), num_explored(0.07, 100)
        (4, 7)
    """
    return math.ceil(round(exploration * num_prompts, 9))


def prompt_key(prompt: Any) -> bytes:
    """Sixteen bytes that are the same for the same prompt.

    Raises:
        UserError: The prompt is not text alone.
    """
    try:
        text = json.dumps(prompt, sort_keys=True)
    except TypeError as error:
        raise UserError(
            "prompt_selection='informative' compares prompts by their text, but a prompt holds something else "
            f"({error}): keep images in a column of their own, or {INSTEAD}."
        ) from None
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
