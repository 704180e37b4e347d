"""Read datasets from files, folders and the Hub. Errors say in one line what is wrong."""

import codecs
import os
from pathlib import Path

from datasets import IterableDataset, load_dataset

from trl_capo.errors import UserError


FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def read_dataset(source: str, option: str = "dataset_name", /, **arguments):
    """`load_dataset` with errors that say in one line what to change.

    Args:
        source: The user's value: a file (.parquet, .jsonl, .json, .csv), a folder, or a dataset on the Hub.
        option: The option with this value, for the message.
        arguments: Arguments of `load_dataset`. Without `path`, `source` must be a file.

    Raises:
        UserError: The file, folder or dataset does not exist or cannot be read.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise UserError(f"{option}: {source} must end in one of {', '.join(FORMATS)}.")
        if path.stat().st_size == 0:
            raise UserError(f"{option}: {source} is an empty file. Write it again, or use another file.")
        _check_encoding(path)
        arguments = {"path": FORMATS[path.suffix], "data_files": source, **arguments}
    elif not path.is_dir() and is_local(source):
        raise UserError(f"{option}: there is no file or folder {source!r} (looked in {os.getcwd()}).")
    try:
        found = load_dataset(**arguments)
        for rows in found.values() if isinstance(found, dict) else [found]:
            if isinstance(rows, IterableDataset):
                next(iter(rows), None)  # a broken file shows now, not in the middle of a run
        return found
    except Exception as error:  # noqa: BLE001 - readers can raise any error
        if "corresponds to no data" in str(error):  # raised by `datasets` for blank lines, or only a header
            raise UserError(f"{option}: {source} has no rows. Write it again, or use another file.") from error
        if path.exists():
            raise UserError(
                f"{option}: {source} cannot be read as questions and answers: {_reason(error)} Check that it is "
                "complete, in UTF-8, and in the format of its extension."
            ) from error
        raise UserError(
            f"{option}={source!r} is not a local file or folder, and it cannot be read from the Hub: {_reason(error)}"
        ) from error


def _check_encoding(path: Path) -> None:
    """Refuse other encodings than UTF-8: pyarrow reads such JSON, and fails only when a row is accessed."""
    if path.suffix == ".parquet":
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error.reason}). Save it in UTF-8.") from error


def is_local(name: str) -> bool:
    """Whether a name can only mean a file or folder: names on the Hub are `name` or `owner/name`.

    Example:
        >>> is_local("data/mine.jsonl"), is_local("./mine"), is_local("openai/gsm8k")
        (True, True, False)
    """
    return Path(name).suffix in {*FORMATS, ".txt", ".tsv", ".arrow", ".gz"} or (
        name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1
    )


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."
