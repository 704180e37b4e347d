"""Check rows before use. The trainer, `trl-capo train`, `evaluate` and `data check` share these checks."""

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from trl_capo.data.golds import gold_problem, problems
from trl_capo.errors import UserError
from trl_capo.models.messages import text_of


# TRL's trainer passes these to reward functions. A column with such a name is an error or is silently replaced.
RESERVED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
EXAMPLES = 3


def check_data(reward_funcs: Any, **datasets: Any) -> None:
    """Refuses datasets that the trainer or the accuracy reward cannot read. Streams are checked by `checked_stream`.

    Args:
        reward_funcs: As given to the trainer.
        datasets: `train_dataset` and `eval_dataset`, as given to the trainer.

    Raises:
        UserError: See `check_prompts` and `check_gold`.
    """
    graded = graded_by_math(reward_funcs)
    for name, dataset in datasets.items():
        parts = {f"{name}[{part!r}]": rows for part, rows in dataset.items()} if isinstance(dataset, dict) else {}
        for label, rows in (parts or {name: dataset}).items():
            if isinstance(rows, Dataset):
                check_prompts(rows, label)
                if graded:
                    check_gold(rows, label)


def graded_by_math(reward_funcs: Any) -> bool:
    """Whether a reward function reads gold answers with math-verify."""
    from trl.rewards import accuracy_reward, reasoning_accuracy_reward

    from trl_capo.rewards import AccuracyReward

    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    return any(
        function in (accuracy_reward, reasoning_accuracy_reward) or isinstance(function, AccuracyReward)
        for function in functions
    )


def check_prompts(dataset: Dataset, name: str) -> None:
    """Refuses a dataset without prompts, or with prompts that cannot be asked.

    Raises:
        UserError: There is no row or no column `prompt`, a prompt is bad (see `prompt_problem`), plain and
            conversational prompts are mixed, or a column has a name that TRL needs.
    """
    if len(dataset) == 0:
        raise UserError(f"{name} has no rows.")
    check_columns(dataset.column_names, name)
    found = prompt_problems(dataset["prompt"])
    if found:
        row, problem = next(iter(found.items()))
        more = f" (and {len(found) - 1} more rows are bad)" if len(found) > 1 else ""
        raise UserError(f"{name}: the prompt in row {row} {problem}{more}. Fix or remove such rows.")


def check_columns(columns: list[str], name: str) -> None:
    """Refuses a dataset without a column `prompt`, or with a column name that TRL reserves."""
    if "prompt" not in columns:
        raise UserError(
            f"{name} needs a column 'prompt', but has {', '.join(columns)}. Rename the column "
            "with the questions: dataset.rename_column('...', 'prompt')."
        )
    if taken := [column for column in columns if column in RESERVED]:
        raise UserError(
            f"{name} has a column {taken[0]!r}, which TRL uses for another argument of reward functions. "
            f"Rename or remove it: dataset.remove_columns({taken[0]!r})."
        )


def prompt_problems(prompts: Iterable[Any]) -> dict[int, str]:
    """Rows whose prompt cannot be asked, with the reason.

    Example:
        >>> prompt_problems(["1+1?", None, " "])
        {1: 'is null', 2: "has no text: ' '"}
    """
    found, kind = {}, None
    for row, prompt in enumerate(prompts):
        problem = prompt_problem(prompt)
        if problem is None and kind not in (None, type(prompt)):
            problem = "is plain text, but others are conversations" if isinstance(prompt, str) else (
                "is a conversation, but others are plain text"
            )  # fmt: skip
        kind = kind or (type(prompt) if problem is None else None)
        if problem:
            found[row] = problem
    return found


def prompt_problem(prompt: Any) -> str | None:
    """Why a prompt cannot be asked; None if it can.

    Example:
        >>> prompt_problem([{"role": "user", "content": None}])
        "has a message of 'user' without content (null)"
    """
    if prompt is None:
        return "is null"
    if isinstance(prompt, str):
        return None if prompt.strip() else f"has no text: {prompt!r}"
    if not isinstance(prompt, list):
        return f"is neither text nor a list of messages, but {type(prompt).__name__}: {str(prompt)[:80]!r}"
    if not prompt:
        return "has no messages"
    for message in prompt:
        if not isinstance(message, dict) or "content" not in message:
            return f"has a message without role and content: {str(message)[:80]!r}"
        role, content = message.get("role"), message["content"]
        if not isinstance(role, str) or not role.strip():  # the chat template knows the valid roles
            return f"has a message with the invalid role {role!r}"
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            return f"has a message of {role!r} without content (null)"
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, (str, list))) or not all(
            isinstance(part, dict) and "type" in part and (part["type"] != "text" or isinstance(part.get("text"), str))
            for part in parts
        ):
            return (
                f"has a message of {role!r} whose content is neither text nor parts with a type: {str(content)[:80]!r}"
            )
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    asked = asked or [message["content"] for message in prompt]
    seen = any(isinstance(content, list) and any(part["type"] != "text" for part in content) for content in asked)
    return None if seen or any(text_of(content).strip() for content in asked) else "has no text in its user messages"


def check_gold(dataset: Dataset, name: str) -> None:
    """Refuses gold answers that the accuracy reward cannot read, or would read as something else.

    Raises:
        UserError: There is no column `solution`, prompts are not conversational, or a gold answer is bad.
    """
    if "solution" not in dataset.column_names:
        raise UserError(
            f"{name} needs a column 'solution' with the gold answers for accuracy_reward, but has "
            f"{', '.join(dataset.column_names)}. Rename the column with them: "
            "dataset.rename_column('...', 'solution')."
        )
    if isinstance(dataset[0]["prompt"], str):
        raise UserError(
            f"{name} has plain text prompts, but accuracy_reward needs conversational ones. Make each prompt "
            "[{'role': 'user', 'content': question}]."
        )
    golds = list(dataset["solution"])
    if bad := problems(golds):
        examples = "; ".join(f"row {row}, {golds[row]!r}: {bad[row]}" for row in list(bad)[:EXAMPLES])
        raise UserError(
            f"{name}: math-verify cannot parse {len(bad)} of {len(golds)} gold answers in 'solution', or reads them "
            f"as something else ({examples}). Wrap each gold answer in $...$ or \\boxed{{...}} (see "
            "trl_capo.data.golds.wrap_gold), or drop those rows: "
            "trl_capo.data.conversations.drop_unparsable_gold(dataset), or "
            "--drop_unparsable_gold true of trl-capo train."
        )


def checked_stream(rows: IterableDataset, name: str, graded: bool) -> IterableDataset:
    """The same stream, but each row is checked when it is drawn.

    Args:
        rows: The stream.
        name: Its name in messages.
        graded: Whether math-verify reads gold answers.
    """

    def check(row: dict, number: int) -> dict:
        check_columns(list(row), name)
        if problem := prompt_problem(row["prompt"]):
            raise UserError(f"{name}: the prompt in row {number} {problem}. Fix or remove the row.")
        if graded:
            if "solution" not in row:
                raise UserError(f"{name} needs a column 'solution' with the gold answers for accuracy_reward.")
            if problem := gold_problem(row["solution"]):
                raise UserError(f"{name}: row {number}, gold answer {row['solution']!r}: {problem}.")
        return row

    return rows.map(check, with_indices=True, features=rows.features)


def with_checked_streams(reward_funcs: Any, **datasets: Any) -> Iterator[Any]:
    """The datasets, whose streams check each row when it is drawn."""
    graded = graded_by_math(reward_funcs)

    def wrap(rows: Any, name: str) -> Any:
        if isinstance(rows, dict):
            return type(rows)({part: wrap(part_rows, f"{name}[{part!r}]") for part, part_rows in rows.items()})
        return checked_stream(rows, name, graded) if isinstance(rows, IterableDataset) else rows

    return (wrap(rows, name) for name, rows in datasets.items())
