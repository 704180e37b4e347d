"""One split of a dataset, by any name that `trl-capo data` takes."""

from datasets import Dataset

from trl_capo.data import language
from trl_capo.data.arithmetic import SPLITS
from trl_capo.data.catalogue import CATALOGUE
from trl_capo.data.training import DataArguments, load_splits
from trl_capo.errors import UserError


def load_split(name: str, args: DataArguments, *, config: str | None = None, split: str = "train") -> Dataset:
    """One split of a dataset, as conversations.

    Args:
        name: `arithmetic_SPLIT`, `chain_sum_SPLIT`, `family_SPLIT`, a key of `CATALOGUE`, a file, a folder, or a
            dataset on the Hub.
        args: Columns and prompts.
        config: Configuration of a dataset on the Hub.
        split: The split. Not used for embedded tasks and the catalogue, whose names determine it.

    Raises:
        UserError: The split or its gold answers do not exist.
    """
    if name.startswith("arithmetic_") and name.removeprefix("arithmetic_") in SPLITS:
        return load_splits("arithmetic", None, args)[name.removeprefix("arithmetic_")]
    task, _, part = name.rpartition("_")
    if task in language.TASKS and part in language.SPLITS:
        return language.language_dataset(task, part)
    splits = load_splits(name, config, args)
    split = CATALOGUE[name].split if name in CATALOGUE else split
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}: --split takes one of {', '.join(splits)}.")
    rows = splits[split]
    if "solution" not in rows.column_names:
        raise UserError(
            f"{name} has no column 'solution', only {', '.join(rows.column_names)}. Set --solution_column to the "
            "column with the gold answers."
        )
    return rows
