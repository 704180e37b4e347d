"""Run an evaluation: draw missing samples, grade them and summarise them, in a folder that records its settings.

Each launched process samples its share of the questions in parts, and saves each part when it is complete. A run that
is stopped loses only its unfinished parts.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np

from trl_capo.data.benchmarks import ARITHMETIC, LANGUAGE
from trl_capo.data.language import has_text_answers
from trl_capo.errors import UserError
from trl_capo.evaluation.engines import choose_engine, load_engine
from trl_capo.evaluation.grade import canonical_answers, grade, grade_texts
from trl_capo.evaluation.identity import fingerprint, is_recorded, model_identity, read_settings, with_content
from trl_capo.evaluation.samples import (
    FILE_NAME,
    merge_parts,
    sampled_prompts,
    schema,
    set_aside_broken_parts,
    write_part,
)
from trl_capo.evaluation.summary import write_summary
from trl_capo.files import check_names, remember_settings
from trl_capo.models.adapter import base_of, merged
from trl_capo.models.chat_templates import with_defaults
from trl_capo.models.messages import question_of
from trl_capo.models.prompts import check_lengths, tokenize
from trl_capo.models.source import model_path
from trl_capo.progress import report_progress
from trl_capo.ranks import agree


PROMPTS_PER_PART = 32  # at most; a part is saved, or lost if the run is killed, as a whole


def patient_state():
    """accelerate's `PartialState`; its long timeout lets finished processes wait for one that is still sampling."""
    from accelerate import PartialState

    return PartialState(timeout=timedelta(weeks=1))


def evaluate_all(
    models: list[str], data: dict, output_dir: str | Path, state, names: list[str] | None = None, **sampling
) -> list[Path]:
    """Evaluate models one after another, each in its own folder. All models are checked before sampling starts.

    Args:
        models: See `evaluate`.
        data: Questions by benchmark, from `load_benchmark`.
        output_dir: Parent of the models' folders.
        state: accelerate's `PartialState`.
        names: Names of the folders. None means the default of `folder_names`.
        sampling: See `evaluate`. `engine` may also be "auto".

    Returns:
        The folder of each model.

    Raises:
        ValueError: A model cannot be asked these questions, or a folder holds another evaluation.
    """
    sampling["engine"] = choose_engine(sampling.get("engine", "auto"))
    folders = [Path(output_dir) / name for name in folder_names(models, names)]
    for model in models:
        check_model(model, data, sampling.get("max_new_tokens"), sampling.get("chat_template_kwargs"))
    for model, folder in zip(models, folders, strict=True):
        agree(partial(remember, folder, settings_of(model, data, sampling), state.print))
        evaluate(model, folder, data, state, **sampling)
    return folders


def folder_names(models: list[str], chosen: list[str] | None = None) -> list[str]:
    """The chosen names, or the last part of each model's path, with a number if that name is taken."""
    if chosen is not None:
        if len(chosen) != len(models):
            raise UserError(f"--names needs one name for each of the {len(models)} models, got {len(chosen)}.")
        check_names("--names", chosen)
        return chosen
    names: list[str] = []
    for model in models:
        name = Path(os.path.abspath(model)).name
        numbered = (f"{name}-{number}" for number in range(2, len(models) + 2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    check_names("models", names)
    return names


def check_model(model: str, data: dict, max_new_tokens: int | None, chat_template_kwargs: dict | None = None) -> None:
    """Refuse a model that is missing, cannot be asked these prompts, or has too short a context, before sampling."""
    from transformers import AutoConfig, AutoTokenizer

    path = model_path(model)
    config, tokenizer = AutoConfig.from_pretrained(base_of(path)), AutoTokenizer.from_pretrained(path)
    if chat_template_kwargs and tokenizer.chat_template is None:
        raise UserError(f"--chat_template_kwargs has no effect: {model} has no chat template. Leave it out.")
    tokenizer = with_defaults(tokenizer, chat_template_kwargs)
    for name, rows in data.items():
        check_lengths(tokenize(tokenizer, list(rows["prompt"])), _limit(name, max_new_tokens), config)


def settings_of(model: str, data: dict, sampling: dict) -> dict:
    """The settings that determine the samples."""
    questions = {name: fingerprint([list(rows["prompt"]), list(rows["solution"])]) for name, rows in data.items()}
    firsts = {name: rows["prompt"][0][0] for name, rows in data.items()}  # the first message of the first question
    return {
        **{name: value for name, value in sampling.items() if name != "batch_size"},
        "model": model,
        **model_identity(model_path(model)),
        "questions": questions,
        "max_new_tokens": {name: _limit(name, sampling.get("max_new_tokens")) for name in data},
        "system_prompt": {name: m["content"] if m["role"] == "system" else None for name, m in firsts.items()},
    }


def remember(folder: Path, settings: dict, say: Callable[[str], None]) -> None:
    """Refuse a folder whose samples come from another model, other questions or other settings.

    Args:
        folder: Folder of the samples.
        settings: From `settings_of`.
        say: Receives a note for the user if the folder is accepted.
    """
    for part in set_aside_broken_parts(folder):
        say(f"{part} cannot be read. It is set aside, and its questions are sampled again.")
    if not (folder / FILE_NAME).exists() and not any((folder / "parts").glob("*.parquet")):
        (folder / "settings.json").unlink(missing_ok=True)  # left by a run that sampled nothing
        shutil.rmtree(folder / "merged", ignore_errors=True)  # it may belong to another model
    known = read_settings(folder)
    settings = with_content(model_path(settings["model"]), settings, known)
    if known and not is_recorded(known):
        say(
            f"{folder} comes from an earlier version, which did not record the model's tokenizer, configuration, base "
            "and commit, so changes to these are not noticed. To be sure, use another --output_dir."
        )
        checked = {*known, "chat_template_kwargs"}
        settings = {name: value for name, value in settings.items() if name in checked or value is None}
    remember_settings(folder, settings, "an evaluation")


def evaluate(
    model: str,
    folder: Path,
    data: dict,
    state,
    *,
    max_new_tokens: int | None = None,
    num_samples: int = 16,
    normalize_operators: bool = False,
    text_answers: bool = False,
    **sampling,
) -> None:
    """Draw the missing samples, then merge and summarise.

    Args:
        model: Folder with a model or an adapter, name on the Hub, or name of a shipped model.
        folder: Receives `samples.parquet` and `summary.json`.
        data: Questions by benchmark, from `load_benchmark`.
        state: accelerate's `PartialState`.
        max_new_tokens: Longest completion, in tokens. None means 64 in the arithmetic world, else 3000.
        num_samples: Completions per question.
        normalize_operators: See `grade`.
        text_answers: Answers are words, as they are where `has_text_answers`: use `grade_texts`.
        sampling: See `load_engine`.
    """
    if (folder / FILE_NAME).exists():
        state.print(f"{folder / FILE_NAME} already exists: nothing was sampled.")
    else:
        mine = _missing_parts(folder, data, num_samples, state)[state.process_index :: state.num_processes]
        agree(lambda: merged(model_path(model), folder / "merged"))
        state.wait_for_everyone()  # no process writes before all have looked
        total = sum(stop - start for _, start, stop in mine) * num_samples
        if mine:
            path = merged(model_path(model), folder / "merged")
            sample, close = load_engine(path, state, num_samples=num_samples, **sampling)
            for name, start, stop in _with_progress(mine, total, num_samples, folder.name, state):
                rows = data[name].select(range(start, stop))
                limit = _limit(name, max_new_tokens)
                samples = sample(list(rows["prompt"]), max_new_tokens=limit, first_prompt=start)
                words = text_answers or has_text_answers(name)
                write_part(folder, name, start, graded_table(name, start, rows, samples, normalize_operators, words))
            close()
    state.wait_for_everyone()
    agree(lambda: _finish(model, folder))


def _finish(model: str, folder: Path) -> None:
    merge_parts(folder)
    shutil.rmtree(folder / "merged", ignore_errors=True)  # as large as the model, and quick to recreate
    write_summary(model, folder)


def _limit(benchmark: str, max_new_tokens: int | None) -> int:
    return max_new_tokens or (64 if benchmark in (*ARITHMETIC, *LANGUAGE) else 3000)


def _missing_parts(folder: Path, data: dict, num_samples: int, state) -> list[tuple[str, int, int]]:
    """Benchmark, first prompt and end of each part to sample. Parts are small enough that every process gets some."""
    parts = []
    for name, rows in data.items():
        done = sampled_prompts(folder, name, num_samples)
        missing = [p for p in range(len(rows)) if p not in done]
        size = min(PROMPTS_PER_PART, -(-len(missing) // state.num_processes))
        while missing:
            start = missing[0]
            together = [p for i, p in enumerate(missing[:size]) if p == start + i]  # up to the next existing one
            parts.append((name, start, start + len(together)))
            missing = missing[len(together) :]
    return parts


def graded_table(
    benchmark: str, first_prompt: int, rows, samples, normalize_operators: bool = False, text_answers: bool = False
):
    """The rows of `samples.parquet` for some prompts."""
    import pyarrow as pa

    num_prompts, num_samples = samples.mean_logps.shape
    prompts = np.repeat(np.arange(first_prompt, first_prompt + num_prompts), num_samples)
    texts = [text for row in samples.completions for text in row]
    solutions = np.repeat(np.array(rows["solution"], dtype=object), num_samples).tolist()
    if text_answers:
        grades = grade_texts(texts, solutions)
    else:
        grades = grade(texts, solutions, progress=False, normalize_operators=normalize_operators)
    questions = [question_of(prompt) for prompt in rows["prompt"]]
    columns = dict(
        benchmark=[benchmark] * len(texts),
        prompt_id=prompts,
        sample=np.tile(np.arange(num_samples), num_prompts),
        prompt=np.repeat(np.array(questions, dtype=object), num_samples).tolist(),
        solution=solutions,
        completion=texts,
        answer=grades.answers if text_answers else canonical_answers(grades, prompts.tolist()),
        correct=pa.array(grades.correct, from_pandas=True),  # NaN becomes null
        mean_logp=samples.mean_logps.ravel(),
        length=samples.lengths.ravel(),
        truncated=samples.truncated.ravel(),
        grading_failed=grades.failed,
        **{name: values.ravel() for name, values in samples.statistics.items()},
    )
    return pa.table(columns, schema=schema(list(samples.statistics)))


def _with_progress(parts: list[tuple], total: int, num_samples: int, name: str, state) -> Iterator[tuple]:
    """The parts, with a bar that counts samples."""
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit="sample", disable=not state.is_local_main_process) as bar:
        for part in parts:
            if state.is_main_process:
                report_progress(int(bar.n), total, "sample")
            yield part
            bar.update((part[2] - part[1]) * num_samples)
