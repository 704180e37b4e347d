"""What we add to a model card, each between two marks: use, figures, a report's tables, and how it was trained.

The report's part is kept beside the card in `calibration.md`, so that a trainer that writes its card anew puts it
back; a trainer that changes the weights forgets it. How it was trained comes from `trl_capo.publish.record`'s files.
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

# What TRL's template writes, and what we write in its place.
QUESTION = re.compile(r'^question = ("(?:[^"\\\n]|\\.)*")$', re.MULTILINE)
TIME_MACHINE = "If you had a time machine"
PIPELINE = re.compile(r'^generator = pipeline\("text-generation", model="[^"\n]*"', re.MULTILINE)
PEFT_TEMPLATE = "# Model Card for Model ID"  # of PEFT, with nothing filled in
LONGEST_QUESTION = 500

# What a card shows of a log; the training's names, with `eval_` or `eval_NAME_` before them those of an evaluation.
FIGURES = {
    "reward": "Mean reward",
    "capo/auc_within": "AUC within",
    "capo/auc_pooled": "AUC pooled",
    "capo/frac_mixed": "Share of mixed groups",
    "completions/mean_length": "Mean length in tokens",
}
LOGGED = re.compile(rf"(?P<eval>eval_(?:(?P<set>.+)_)?)?(?P<name>{'|'.join(map(re.escape, FIGURES))})")


def add_to_model_card(block: str | Path, folder: str | Path) -> Path:
    """Put what a report says into the card of a model.

    Args:
        block: The Markdown file of a report; its figures lie beside it.
        folder: Folder of the model. Gets the figures, `calibration.md`, and the section in its `README.md`, which
            replaces an earlier one.

    Returns:
        Path of the card.

    Raises:
        UserError: If the folder does not exist.
    """
    block, folder = Path(block), Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of a model, so it has no card to write into.")
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
    """The text with a section between two marks, in place of what is there between them, or else at its end.

    Example:
        >>> put_section("My model.", "New.", "<1>", "<2>")
        'My model.\\n\\n<1>\\nNew.\\n<2>\\n'
        >>> put_section("<1>\\nOld.\\n<2> More.", "New.", "<1>", "<2>")
        '<1>\\nNew.\\n<2> More.'
    """
    section = section.replace("<!-- trl-capo:", "<!- trl-capo:")  # no text that we quote begins or ends a section
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
    """The card of a model with all that is known about it, and without secrets. Nothing is written.

    Args:
        folder: Folder of the model. Its `README.md` is the start; without one, a short card is made.
        repo_id: Where the model goes on the Hub (default: nowhere yet, and the card names the folder).
        dataset: Dataset on the Hub to name in the metadata (default: the one of the run, if the card names none).
        question: A prompt of the training (default: that of the card, or of the card of the run).
        history: `log_history` of the trainer (default: the figures of the card, or those of `trainer_state.json`).

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
    """A prompt for the card: the first of the training that is not too long; of a conversation, the last question.

    Args:
        rows: The training set. Of a stream only the first row is read.

    Returns:
        Text; None if the rows have no prompt in text.
    """
    from datasets import Dataset

    try:
        first = (
            [rows[number] for number in range(min(50, len(rows)))] if isinstance(rows, Dataset) else [next(iter(rows))]
        )
    except Exception:  # whatever a stream runs into, the card is no reason to stop
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
    """The last values of what matters in a log, as a table in Markdown; None for a log without them."""
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
    about = (
        "The last values that were logged. Those of the training are of the completions sampled since the log before."
    )
    return "\n".join(["## Final figures", "", about, "", *head, *table])


def _cells(row: tuple) -> list[str]:
    return [markdown_text(str(cell)) for cell in row]


def _history(folder: Path) -> list[dict]:
    """The log of the folder's own trainer state, or else of its newest checkpoint."""
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
    """A literal of Python and JSON, in one line, that neither closes a block of code nor begins a comment of HTML."""
    literal = json.dumps(mask(text).encode("utf-8", "replace").decode(), ensure_ascii=False)
    return re.sub(r"[<\u0085\u2028\u2029\x7f]", lambda match: f"\\u{ord(match[0]):04x}", literal)


def _shell_word(text: str) -> str:
    """The text as one word of a shell, in one line that does not close a block of code."""
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
    """Remove the folder's `calibration.md`: what it says is about other weights than those to come.

    Args:
        folder: Folder of the model; its next card has no such section.
    """
    (Path(folder) / FILE_NAME).unlink(missing_ok=True)
