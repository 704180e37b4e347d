"""Add sections to a model card, each between two marks: usage, figures, a report's tables, and training details.

The report's section is also stored next to the card in `calibration.md`, so that a trainer that rewrites the card can
restore it. A trainer that changes the weights deletes it. Training details come from `trl_capo.publish.record`'s
files.
"""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

from trl_capo.errors import UserError
from trl_capo.files import write_text
from trl_capo.markdown import markdown_text
from trl_capo.publish.model_files import CALIBRATION as FILE_NAME
from trl_capo.publish.model_files import CARD, figures
from trl_capo.publish.record import card_section, hub_dataset, run_folder
from trl_capo.redact import mask


BEGIN, END = "<!-- trl-capo: calibration -->", "<!-- trl-capo: end of calibration -->"
TRAINING_BEGIN, TRAINING_END = "<!-- trl-capo: training -->", "<!-- trl-capo: end of training -->"
USE_BEGIN, USE_END = "<!-- trl-capo: use -->", "<!-- trl-capo: end of use -->"
FIGURES_BEGIN, FIGURES_END = "<!-- trl-capo: figures -->", "<!-- trl-capo: end of figures -->"

# Text in TRL's template, and our replacement.
QUESTION = re.compile(r'^question = ("(?:[^"\\\n]|\\.)*")$', re.MULTILINE)
TIME_MACHINE = "If you had a time machine"
PIPELINE = re.compile(r'^generator = pipeline\("text-generation", model="[^"\n]*"', re.MULTILINE)
PEFT_TEMPLATE = "# Model Card for Model ID"  # PEFT's empty template
LONGEST_QUESTION = 500

# Logged numbers that a card shows. These are training names; an evaluation adds `eval_` or `eval_NAME_` in front.
FIGURES = {
    "reward": "Mean reward",
    "capo/auc_within": "AUC within",
    "capo/auc_pooled": "AUC pooled",
    "capo/frac_mixed": "Share of mixed groups",
    "completions/mean_length": "Mean length in tokens",
}
LOGGED = re.compile(rf"(?P<eval>eval_(?:(?P<set>.+)_)?)?(?P<name>{'|'.join(map(re.escape, FIGURES))})")


def add_to_model_card(block: str | Path, folder: str | Path) -> Path:
    """Add a report's results to a model card.

    Args:
        block: The Markdown file of a report, with its figures in the same folder.
        folder: Folder of the model. Receives the figures, `calibration.md`, and a section in its `README.md` that
            replaces an earlier one.

    Returns:
        Path of the card.

    Raises:
        UserError: The folder does not exist.
    """
    block, folder = Path(block), Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder of the model whose card you want to change.")
    text = mask(block.read_text(encoding="utf-8"))
    if folder.resolve() != block.parent.resolve():
        for image in figures(text, block.parent):
            shutil.copy(block.parent / image, folder / image)
    write_text(folder / FILE_NAME, text)
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
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        write_text(card, put_section(text, block.read_text(encoding="utf-8"), BEGIN, END))
    return card


def put_section(text: str, section: str, begin: str, end: str) -> str:
    """Put a section between two marks. It replaces the text between them, or goes to the end of the text.

    Example:
        >>> put_section("My model.", "New.", "<1>", "<2>")
        'My model.\\n\\n<1>\\nNew.\\n<2>\\n'
        >>> put_section("<1>\\nOld.\\n<2> More.", "New.", "<1>", "<2>")
        '<1>\\nNew.\\n<2> More.'
    """
    section = section.replace("<!-- trl-capo:", "<!- trl-capo:")  # quoted text must not begin or end a section
    there, start, rest = text.partition(begin)
    _, stop, after = rest.partition(end)
    if not (start and stop):
        there, after = text.rstrip() + "\n\n" * bool(text), "\n"
    return f"{there}{begin}\n{section.strip()}\n{end}{after}"


def complete_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    dataset: str | None = None,
    question: str | None = None,
    history: list[dict] | None = None,
) -> str:
    """The complete card of a model, without secrets. Nothing is written.

    Args:
        folder: Folder of the model. The card starts from its `README.md`, or from a short text without one.
        repo_id: The model's name on the Hub (default: none yet, and the card names the folder).
        dataset: Dataset on the Hub to name in the metadata (default: the run's dataset, if the card names none).
        question: A training prompt (default: the one in the card, or in the run's card).
        history: `log_history` of the trainer (default: the figures in the card, or those in `trainer_state.json`).

    Returns:
        Text of the card.
    """
    folder = Path(folder)
    run = run_folder(folder)
    known = [path.read_text(encoding="utf-8") for path in (folder / CARD, run / CARD) if path.exists()]
    question = question or next((found for text in known if (found := _question_in(text))), None)
    name = repo_id or folder.resolve().name
    text = known[0] if (folder / CARD).exists() else PEFT_TEMPLATE
    if PEFT_TEMPLATE in text:
        text = _short_card(folder, name, question)
    # TRL's template when the base model is a folder, and when there was no repository yet.
    text = text.replace("[None](https://huggingface.co/None)", "a local model")
    text = PIPELINE.sub(lambda _: _pipeline(name), text)
    text = re.sub(r"(## Training procedure)\s+", r"\1\n\n", text)  # room for the links of trackers
    if question is not None:
        text = QUESTION.sub(lambda _: f"question = {_python_text(question)}", text)
    elif TIME_MACHINE in text:
        text = QUESTION.sub('question = "YOUR QUESTION"', text)
    text = _with_dataset(text, dataset, hub_dataset(run))
    text = put_section(text, _use(name, question), USE_BEGIN, USE_END)
    if history is None and FIGURES_BEGIN not in text:  # a trainer wrote them at the end of its run
        history = _history(folder)
    if shown := final_figures(history or []):
        text = put_section(text, shown, FIGURES_BEGIN, FIGURES_END)
    if (folder / FILE_NAME).exists():
        text = put_section(text, (folder / FILE_NAME).read_text(encoding="utf-8"), BEGIN, END)
    training = card_section(run)
    if training is not None:
        text = put_section(text, training, TRAINING_BEGIN, TRAINING_END)
    return mask(text)


def example_question(rows) -> str | None:
    """A prompt for the card: the first training prompt that is not too long. For a conversation, its last question.

    Args:
        rows: The training set. Only the first row of a stream is read.

    Returns:
        Text; None if the rows have no text prompt.
    """
    from datasets import Dataset

    try:
        first = (
            [rows[number] for number in range(min(50, len(rows)))] if isinstance(rows, Dataset) else [next(iter(rows))]
        )
    except Exception:  # an error in a stream must not stop training because of the card
        return None
    asked = [text for row in first if (text := _last_question(row.get("prompt")))]
    return next(
        (text for text in asked if len(text) <= LONGEST_QUESTION), asked[0][:LONGEST_QUESTION] if asked else None
    )


def _last_question(prompt) -> str | None:
    if isinstance(prompt, list):
        asked = [message["content"] for message in prompt if message.get("role") == "user" and message.get("content")]
        prompt = asked[-1] if asked else None
        if isinstance(prompt, list):  # content in parts
            prompt = " ".join(part["text"] for part in prompt if isinstance(part.get("text"), str))
    return prompt.strip() or None if isinstance(prompt, str) else None


def final_figures(history: list[dict]) -> str | None:
    """The final values of important numbers in a log, as a Markdown table; None if the log has none."""
    last, seen = {}, {}
    for entry in history:
        for name, value in entry.items():
            if match := LOGGED.fullmatch(name):
                seen[name] = match
                if isinstance(value, (int, float)) and math.isfinite(value):
                    part = f"evaluation {match['set'] or ''}".strip() if match["eval"] else "training"
                    last[name] = (part, FIGURES[match["name"]], f"{value:.4g}", entry.get("step", ""))
    if not seen:
        return None
    for name in seen.keys() - last.keys():
        match = seen[name]
        part = f"evaluation {match['set'] or ''}".strip() if match["eval"] else "training"
        last[name] = (part, FIGURES[match["name"]], "undefined", "")
    order = list(FIGURES.values())
    rows = sorted(last.values(), key=lambda row: (row[0] != "training", row[0], order.index(row[1])))
    table = [f"| {part} | {figure} | {value} | {step} |" for part, figure, value, step in map(_cells, rows)]
    head = ["| | Figure | Value | Step |", "|---|---|---|---|"]
    about = "The last logged values. Training values cover the completions sampled since the previous log."
    return "\n".join(["## Final figures", "", about, "", *head, *table])


def _cells(row: tuple) -> list[str]:
    return [markdown_text(str(cell)) for cell in row]


def _history(folder: Path) -> list[dict]:
    """The log from the folder's trainer state, or from that of its newest checkpoint."""
    checkpoints = [path for path in folder.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    newest = sorted(checkpoints, key=lambda path: int(path.parent.name[11:]))[-1:]
    for path in (folder / "trainer_state.json", *newest):
        try:
            return json.loads(path.read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError):
            continue
    return []


def _use(name: str, question: str | None) -> str:
    asked = _shell_word(question or "YOUR QUESTION")
    return (
        "## Ask it\n\n"
        "`trl-capo` samples several answers, chooses one and says how sure it is:\n\n"
        f"```bash\ntrl-capo answer {shlex.quote(name)} {asked}\n```"
    )


def _question_in(card: str) -> str | None:
    for literal in QUESTION.findall(card):
        try:
            question = json.loads(literal)
        except ValueError:
            continue
        if not question.startswith((TIME_MACHINE, "YOUR QUESTION")):
            return question
    return None


def _python_text(text: str) -> str:
    """A one-line Python and JSON literal that neither closes a code block nor opens an HTML comment."""
    literal = json.dumps(mask(text).encode("utf-8", "replace").decode(), ensure_ascii=False)
    return re.sub(r"[<\u0085\u2028\u2029\x7f]", lambda match: f"\\u{ord(match[0]):04x}", literal)


def _shell_word(text: str) -> str:
    """The text as one shell word, on one line that does not close a code block."""
    text = mask(text).encode("utf-8", "replace").decode()
    if not re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029`<]", text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + re.sub(r"[\x00-\x1f\x7f`<]", lambda match: f"\\x{ord(match[0]):02x}", escaped) + "'"


def _pipeline(name: str) -> str:
    return f'generator = pipeline("text-generation", model={_python_text(name)}'


def _short_card(folder: Path, name: str, question: str | None) -> str:
    library = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    asked = "YOUR QUESTION" if question is None else question
    return (
        f"---\nlibrary_name: {library}\ntags:\n- trl\n- trl-capo\n---\n\n# {markdown_text(name.split('/')[-1])}\n\n"
        f"```python\nfrom transformers import pipeline\n\nquestion = {_python_text(asked)}\n"
        f'{_pipeline(name)}, device_map="auto")\n'
        'output = generator([{"role": "user", "content": question}], return_full_text=False)[0]\n'
        'print(output["generated_text"])\n```\n'
    )


def _with_dataset(text: str, wanted: str | None, known: str | None) -> str:
    from huggingface_hub import ModelCard

    if wanted is None and known is None:
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    if wanted is None and card.data.get("datasets"):
        return text
    card.data["datasets"] = [wanted or known]
    return str(card)


def forget_calibration(folder: str | Path) -> None:
    """Remove the folder's `calibration.md`, because it does not describe the new weights.

    Args:
        folder: Folder of the model. Its next card will not have this section.
    """
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)
