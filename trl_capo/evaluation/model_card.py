"""What we add to a model card, each between two marks: the tables and figures of a report, and how it was trained.

The report's is kept beside the card in `calibration.md`, so that a trainer that writes its card anew puts it back; a
trainer that changes the weights forgets it. How it was trained comes from the files of `trl_capo.reproduction`.
"""

import re
import shutil
from pathlib import Path

from trl_capo.reproduction import card_section, hub_dataset


FILE_NAME = "calibration.md"
BEGIN, END = "<!-- trl-capo: calibration -->", "<!-- trl-capo: end of calibration -->"
TRAINING_BEGIN, TRAINING_END = "<!-- trl-capo: training -->", "<!-- trl-capo: end of training -->"
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
        text = card.read_text() if card.exists() else ""
        card.write_text(put_section(text, block.read_text(), BEGIN, END))
    return card


def put_section(text: str, section: str, begin: str, end: str) -> str:
    """The text with a section between two marks, in place of what is there between them, or else at its end.

    Example:
        >>> put_section("My model.", "New.", "<1>", "<2>")
        'My model.\\n\\n<1>\\nNew.\\n<2>\\n'
        >>> put_section("<1>\\nOld.\\n<2> More.", "New.", "<1>", "<2>")
        '<1>\\nNew.\\n<2> More.'
    """
    if begin in text and end in text:
        before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
    else:
        before, after = text.rstrip() + "\n\n" * bool(text), "\n"
    return f"{before}{begin}\n{section.strip()}\n{end}{after}"


def complete_card(
    folder: str | Path, *, repo_id: str | None = None, dataset: str | None = None, run_folder: str | Path | None = None
) -> str:
    """The card of a model with all that is known about it. Nothing is written.

    Args:
        folder: Folder of the model. Its `README.md` is the start; without one, a short card is made.
        repo_id: Where the model goes on the Hub.
        dataset: Dataset on the Hub to name in the metadata (default: the one of the run, if the card names none).
        run_folder: Where `recipe.yaml` and `reproduction.json` are (default: the model's folder).

    Returns:
        Text of the card.
    """
    folder = Path(folder)
    run_folder = run_folder or folder
    path, block = folder / "README.md", folder / FILE_NAME
    text = path.read_text() if path.exists() else _short_card(folder, repo_id)
    # TRL's template when the base model is a folder, and when there was no repository yet.
    text = text.replace("[None](https://huggingface.co/None)", "a local model")
    if repo_id is not None:
        text = text.replace('model="None"', f'model="{repo_id}"')
    text = _with_dataset(text, dataset, hub_dataset(run_folder))
    if block.exists():
        text = put_section(text, block.read_text(), BEGIN, END)
    training = card_section(run_folder)
    return text if training is None else put_section(text, training, TRAINING_BEGIN, TRAINING_END)


def _short_card(folder: Path, repo_id: str | None) -> str:
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    name = (repo_id or folder.resolve().name).split("/")[-1]
    return f"---\nlibrary_name: {library}\ntags:\n- trl\n- trl-capo\n---\n\n# {name}\n"


def _with_dataset(text: str, wanted: str | None, known: str | None) -> str:
    from huggingface_hub import ModelCard

    if wanted is None and known is None:
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    if wanted is None and card.data.datasets:
        return text
    card.data.datasets = [wanted or known]
    return str(card)


def forget_calibration(folder: str | Path) -> None:
    """Remove the folder's `calibration.md`: what it says is about other weights than those to come.

    Args:
        folder: Folder of the model; its next card has no such section.
    """
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)
