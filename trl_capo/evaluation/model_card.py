"""The calibration section of a model card: the tables and figures of a report, between two marks.

It is kept beside the card in `calibration.md`, so that a trainer that writes its card anew puts it back; a trainer
that changes the weights forgets it.
"""

import re
import shutil
from pathlib import Path


FILE_NAME = "calibration.md"
BEGIN, END = "<!-- trl-capo: calibration -->", "<!-- trl-capo: end of calibration -->"
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def add_to_model_card(block: str | Path, folder: str | Path) -> Path:
    """Put what a report says into the card of a model.

    Args:
        block: The Markdown file of a report; its figures lie beside it.
        folder: Folder of the model. Gets the figures, `calibration.md`, and the section in its `README.md`, which
            replaces an earlier one.

    Returns:
        Path of the card.

    Raises:
        ValueError: If the folder does not exist.
    """
    block, folder = Path(block), Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of a model, so it has no card to write into.")
    text = block.read_text()
    if folder.resolve() != block.parent.resolve():
        for image in IMAGE.findall(text):
            shutil.copy(block.parent / image, folder / image)
    (folder / FILE_NAME).write_text(text)
    return restore_in_model_card(folder)


def restore_in_model_card(folder: str | Path) -> Path:
    """Put the folder's `calibration.md`, if there is one, into its `README.md`.

    Args:
        folder: Folder of the model.

    Returns:
        Path of the card.
    """
    block, card = Path(folder) / FILE_NAME, Path(folder) / "README.md"
    if block.exists():
        section = f"{BEGIN}\n{block.read_text().strip()}\n{END}"
        text = card.read_text() if card.exists() else ""
        if BEGIN in text and END in text:
            before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
        else:
            before, after = text.rstrip() + "\n\n" * bool(text), "\n"
        card.write_text(before + section + after)
    return card


def forget_calibration(folder: str | Path) -> None:
    """Remove the folder's `calibration.md`: what it says is about other weights than those to come.

    Args:
        folder: Folder of the model; its next card has no such section.
    """
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)
