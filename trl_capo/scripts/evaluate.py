"""`trl-capo evaluate`: sample held-out questions, grade the answers, say how far confidence can be trusted.

    trl-capo evaluate runs/demo/capo arithmetic-base --benchmark arithmetic_test_2 arithmetic_test_3
    accelerate launch -m trl_capo.scripts.evaluate Qwen/Qwen2.5-Math-1.5B --benchmark math500 --max_new_tokens 3000

For each model a folder of `--output_dir` gets `samples.parquet` (one row a completion, see
`trl_capo.evaluation.samples`) and `summary.json`. Stopped at any point, the same command goes on where it was.
"""

import argparse
import functools
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.errors import UserError
from trl_capo.files import check_names, remember_settings, write_json
from trl_capo.progress import report_progress


PROMPTS_PER_PART = 32  # at most; kept, and lost if the run is killed, together
SAMPLING = ("num_samples", "temperature", "max_new_tokens", "seed", "statistics", "engine", "batch_size", "dtype")
SAMPLING += ("chat_template_kwargs",)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-capo evaluate", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", help="folders, names on the Hub, or arithmetic-base, arithmetic-flat")
    parser.add_argument(
        "--benchmark", nargs="+", required=True, help="names, or files with questions and gold answers"
    )
    parser.add_argument("--num_samples", type=int, default=16, help="completions a question (default: %(default)s)")
    parser.add_argument("--num_prompts", type=int, help="only the first so many questions of each benchmark")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampler (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, help="longest completion (default: 3000; arithmetic: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--statistics", action="store_true", help="also self-certainty and DeepConf's confidences")
    parser.add_argument(
        "--engine", choices=("auto", "transformers", "vllm"), default="auto", help="auto: vLLM where it and a GPU are"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="completions at a time, with transformers")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as stored)")
    parser.add_argument("--prompt_column", default="prompt", help="of a file: the questions")
    parser.add_argument("--solution_column", default="solution", help="of a file: the gold answers")
    parser.add_argument("--system_prompt", help="system message before questions that are plain text")
    parser.add_argument("--prompt_template", help="instead: qwen25-math-cot, qwen-boxed or step-by-step")
    parser.add_argument(
        "--normalize_operators", action="store_true", help=r"let \frac13, 2\sqrt3 and \boxed 7 in answers count"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        metavar="JSON",
        help="variables of the chat template, e.g. '{\"enable_thinking\": false}' (default: those of the training)",
    )
    parser.add_argument("--output_dir", default="runs/evaluation", help="where everything goes (default: %(default)s)")
    parser.add_argument("--names", nargs="+", help="folders for the models in it (default: the last part of each)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Sample, grade, summarise; each model in turn, each process of the launcher its share of the questions."""
    args = make_parser().parse_args(argv)
    from trl_capo.extras import require
    from trl_capo.models.chat_templates import read_kwargs

    _check_numbers(args)
    args.chat_template_kwargs = read_kwargs(args.chat_template_kwargs) or None
    if args.engine == "vllm":
        require("vllm")
    from trl_capo.data.arithmetic import model_path
    from trl_capo.data.benchmarks import load_benchmark
    from trl_capo.models.adapter import base_of
    from trl_capo.preflight.checks import check_launch, check_output_dir

    for model in args.models:
        base_of(model_path(model))  # a model or a base that does not exist is refused before anything is loaded
    check_output_dir(args.output_dir)
    columns = {
        name: getattr(args, name) for name in ("prompt_column", "solution_column", "system_prompt", "prompt_template")
    }
    data = {name: load_benchmark(name, args.num_prompts, **columns) for name in args.benchmark}
    state = patient_state()
    check_launch(state.num_processes)
    sampling = {name: getattr(args, name) for name in SAMPLING}
    sampling |= {"normalize_operators": True} if args.normalize_operators else {}
    sampling["engine"] = choose_engine(args.engine)
    folders = [Path(args.output_dir) / name for name in folder_names(args.models, args.names)]
    for model in args.models:
        check_model(model, data, args.max_new_tokens, args.chat_template_kwargs)
    for model, folder in zip(args.models, folders, strict=True):
        if state.is_main_process:
            _remember(folder, _settings(model, data, sampling))
        state.wait_for_everyone()
        evaluate(model, folder, data, state, **sampling)
    if state.is_main_process:
        _print_summaries({folder.name: _read_summary(folder) for folder in folders})
        print(f"\nSamples and summaries: {args.output_dir}/")
        print(f"What to type next: trl-capo report {' '.join(map(str, folders))} --output report.html")


def patient_state():
    """accelerate's `PartialState`: at the end processes wait for the slowest, with an hour's completion in hand."""
    from accelerate import PartialState

    return PartialState(timeout=timedelta(weeks=1))


def _remember(folder: Path, settings: dict) -> None:
    """Refuse a folder whose samples come from another model, other questions or other settings."""
    from trl_capo.evaluation.identity import is_recorded, read_settings
    from trl_capo.evaluation.samples import FILE_NAME, set_aside_broken_parts

    for part in set_aside_broken_parts(folder):
        print(f"{part} cannot be read and is set aside: its questions are sampled again.")
    if not (folder / FILE_NAME).exists() and not any((folder / "parts").glob("*.parquet")):
        (folder / "settings.json").unlink(missing_ok=True)  # of a run that sampled nothing
        shutil.rmtree(folder / "merged", ignore_errors=True)  # it may be of another model
    known = read_settings(folder)
    if known and not is_recorded(known):
        print(
            f"{folder} was made by an earlier version, which recorded neither tokenizer, configuration, base nor "
            "commit of the model: whether these have changed is not checked. To be sure, choose another --output_dir."
        )
        checked = {*known, "chat_template_kwargs"}
        settings = {name: value for name, value in settings.items() if name in checked or value is None}
    remember_settings(folder, settings, "an evaluation")


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("num_samples", "num_prompts", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if not args.temperature > 0:
        raise ValueError(
            f"--temperature must be positive, got {args.temperature}. Use 0.01 for nearly greedy samples."
        )


def check_model(model: str, data: dict, max_new_tokens: int | None, chat_template_kwargs: dict | None = None) -> None:
    """Refuse a model that is not there, cannot be asked so, or has too short a context, before anything is sampled."""
    from transformers import AutoConfig, AutoTokenizer

    from trl_capo.data.arithmetic import model_path
    from trl_capo.models.adapter import base_of
    from trl_capo.models.chat_templates import with_defaults
    from trl_capo.models.prompts import check_lengths, tokenize

    path = model_path(model)
    config, tokenizer = AutoConfig.from_pretrained(base_of(path)), AutoTokenizer.from_pretrained(path)
    if chat_template_kwargs and tokenizer.chat_template is None:
        raise UserError(f"--chat_template_kwargs has no effect: {model} has no chat template. Leave it out.")
    tokenizer = with_defaults(tokenizer, chat_template_kwargs)
    for name, rows in data.items():
        check_lengths(tokenize(tokenizer, list(rows["prompt"])), _limit(name, max_new_tokens), config)


def evaluate(
    model: str,
    folder: Path,
    data: dict,
    state,
    *,
    max_new_tokens: int | None = None,
    num_samples: int = 16,
    position: int | None = None,
    normalize_operators: bool = False,
    **sampling,
) -> None:
    """Sample what is missing, then merge and summarise.

    Args:
        model: Folder, with a model or an adapter, name on the Hub, or name of a shipped model.
        folder: Gets `samples.parquet` and `summary.json`.
        data: Questions by benchmark, from `load_benchmark`.
        state: accelerate's `PartialState`.
        max_new_tokens: Longest completion; None: 64 in the arithmetic world, else 3000.
        num_samples: Completions a question.
        position: Line of the progress bar, where several are shown at once.
        normalize_operators: See `grade`.
        sampling: See `load_engine`.
    """
    from trl_capo.data.arithmetic import model_path
    from trl_capo.evaluation.samples import FILE_NAME, merge_parts, write_part
    from trl_capo.models.adapter import merged

    if (folder / FILE_NAME).exists():
        state.print(f"{folder / FILE_NAME} is there already: nothing was sampled.")
    else:
        mine = _missing_parts(folder, data, num_samples, state)[state.process_index :: state.num_processes]
        if state.is_main_process:
            merged(model_path(model), folder / "merged")
        state.wait_for_everyone()  # nobody writes before all have looked
        total = sum(stop - start for _, start, stop in mine) * num_samples
        if mine:
            path = merged(model_path(model), folder / "merged")
            sample, close = load_engine(path, state, num_samples=num_samples, **sampling)
            for name, start, stop in _with_progress(mine, total, num_samples, folder.name, state, position):
                rows = data[name].select(range(start, stop))
                limit = _limit(name, max_new_tokens)
                samples = sample(list(rows["prompt"]), max_new_tokens=limit, first_prompt=start)
                write_part(folder, name, start, graded_table(name, start, rows, samples, normalize_operators))
            close()
    state.wait_for_everyone()
    if state.is_main_process:
        merge_parts(folder)
        shutil.rmtree(folder / "merged", ignore_errors=True)  # as large as the model, and quickly made again
        _summarize(model, folder)
    state.wait_for_everyone()


def _limit(benchmark: str, max_new_tokens: int | None) -> int:
    from trl_capo.data.benchmarks import ARITHMETIC

    return max_new_tokens or (64 if benchmark in ARITHMETIC else 3000)


def _missing_parts(folder: Path, data: dict, num_samples: int, state) -> list[tuple[str, int, int]]:
    """Benchmark, first prompt and end of the parts to sample: so small that every process has some."""
    from trl_capo.evaluation.samples import sampled_prompts

    parts = []
    for name, rows in data.items():
        done = sampled_prompts(folder, name, num_samples)
        missing = [p for p in range(len(rows)) if p not in done]
        size = min(PROMPTS_PER_PART, -(-len(missing) // state.num_processes))
        while missing:
            start = missing[0]
            together = [p for i, p in enumerate(missing[:size]) if p == start + i]  # up to the next one that is there
            parts.append((name, start, start + len(together)))
            missing = missing[len(together) :]
    return parts


def load_engine(
    model: str,
    state,
    *,
    engine: str = "transformers",
    dtype: str = "auto",
    batch_size: int = 256,
    chat_template_kwargs: dict | None = None,
    **sampling,
) -> tuple[Callable, Callable[[], None]]:
    """A function from prompts, `max_new_tokens` and `first_prompt` to `Samples`, and one that frees what it holds.

    Args:
        model: Folder, name on the Hub, or name of a shipped model.
        state: accelerate's `PartialState`.
        engine: "transformers" or "vllm".
        dtype: Of the weights.
        batch_size: Completions at a time, with transformers.
        chat_template_kwargs: Variables of the chat template.
        sampling: `num_samples`, `temperature`, `seed`, `statistics`.
    """
    from trl_capo.data.arithmetic import model_path
    from trl_capo.models.chat_templates import with_defaults

    model = model_path(model)
    if engine == "vllm":
        from trl_capo.evaluation.vllm import load_vllm, sample_completions_vllm, shut_down

        if state.num_processes > 1:
            _show_own_device(state.local_process_index)
        llm = load_vllm(model, dtype=dtype)
        sampling["chat_template_kwargs"] = chat_template_kwargs
        return functools.partial(sample_completions_vllm, llm, **sampling), functools.partial(shut_down, llm)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_capo.evaluation.sampling import sample_completions

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(state.device)
    tokenizer = with_defaults(AutoTokenizer.from_pretrained(model), chat_template_kwargs)
    options = dict(batch_size=batch_size, progress=False)
    return functools.partial(sample_completions, policy, tokenizer, **options, **sampling), lambda: None


def _show_own_device(local_process_index: int) -> None:
    """vLLM's engine, a process of its own, takes the first GPU that it sees: let it see this process's only."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(local_process_index + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_process_index % len(devices)]


def choose_engine(asked: str) -> str:
    """vLLM where it is installed and there is a CUDA GPU, unless one is asked for."""
    import torch

    if asked != "auto":
        return asked
    return "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "transformers"


def graded_table(benchmark: str, first_prompt: int, rows, samples, normalize_operators: bool = False):
    """The rows of `samples.parquet` for some prompts."""
    import numpy as np
    import pyarrow as pa

    from trl_capo.evaluation.grade import canonical_answers, grade
    from trl_capo.evaluation.samples import schema
    from trl_capo.models.messages import question_of

    num_prompts, num_samples = samples.mean_logps.shape
    prompts = np.repeat(np.arange(first_prompt, first_prompt + num_prompts), num_samples)
    texts = [text for row in samples.completions for text in row]
    solutions = np.repeat(np.array(rows["solution"], dtype=object), num_samples).tolist()
    grades = grade(texts, solutions, progress=False, normalize_operators=normalize_operators)
    questions = [question_of(prompt) for prompt in rows["prompt"]]
    columns = dict(
        benchmark=[benchmark] * len(texts),
        prompt_id=prompts,
        sample=np.tile(np.arange(num_samples), num_prompts),
        prompt=np.repeat(np.array(questions, dtype=object), num_samples).tolist(),
        solution=solutions,
        completion=texts,
        answer=canonical_answers(grades, prompts.tolist()),
        correct=pa.array(grades.correct, from_pandas=True),  # NaN becomes null
        mean_logp=samples.mean_logps.ravel(),
        length=samples.lengths.ravel(),
        truncated=samples.truncated.ravel(),
        grading_failed=grades.failed,
        **{name: values.ravel() for name, values in samples.statistics.items()},
    )
    return pa.table(columns, schema=schema(list(samples.statistics)))


def folder_names(models: list[str], chosen: list[str] | None = None) -> list[str]:
    """Those that were chosen, or the last part of each model's path, numbered where that is taken."""
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


def _settings(model: str, data: dict, sampling: dict) -> dict:
    """What decides the samples."""
    from trl_capo.data.arithmetic import model_path
    from trl_capo.evaluation.identity import fingerprint, model_identity

    questions = {name: fingerprint([list(rows["prompt"]), list(rows["solution"])]) for name, rows in data.items()}
    firsts = {name: rows["prompt"][0][0] for name, rows in data.items()}  # the first message of the first question
    return {
        **{name: value for name, value in sampling.items() if name != "batch_size"},
        "model": model,
        **model_identity(model_path(model)),
        "questions": questions,
        "max_new_tokens": {name: _limit(name, sampling["max_new_tokens"]) for name in data},
        "system_prompt": {name: m["content"] if m["role"] == "system" else None for name, m in firsts.items()},
    }


def _with_progress(
    parts: list[tuple], total: int, num_samples: int, name: str, state, position: int | None
) -> Iterator[tuple]:
    """The parts, with a bar that counts samples."""
    from tqdm import tqdm

    shown = dict(desc=name, unit="sample", position=position, disable=not state.is_local_main_process)
    with tqdm(total=total, **shown) as bar:
        for part in parts:
            if state.is_main_process:
                report_progress(bar.n, total, "sample")
            yield part
            bar.update((part[2] - part[1]) * num_samples)


def _summarize(model: str, folder: Path) -> None:
    import numpy as np

    from trl_capo.evaluation.samples import read_samples
    from trl_capo.evaluation.summary import summarize

    summary = {
        of.benchmark: summarize(of.correct, of.mean_logps, of.answers)
        | {
            "num_prompts": len(of.correct),
            "num_samples": of.num_samples,
            "grading_failed": int(of.grid("grading_failed").sum()),
            "ungraded": int(np.isnan(of.correct).sum()),
            "truncated": int(of.grid("truncated").sum()),
        }
        for of in read_samples(folder)
    }
    write_json(folder / "summary.json", {"model": model, "benchmarks": summary})


def _read_summary(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["benchmarks"]


def _print_summaries(summaries: dict[str, dict]) -> None:
    from trl_capo.evaluation.summary import print_summaries

    print_summaries(summaries)
    failed = sum(of["grading_failed"] for benchmarks in summaries.values() for of in benchmarks.values())
    if failed:
        print(f"{failed} completions count as neither right nor wrong because math-verify hung or crashed on them.")
    for model, benchmarks in summaries.items():
        for benchmark, of in benchmarks.items():
            for problem in _problems(of):
                print(f"Warning: {model}, {benchmark}: {problem}")


def _problems(summary: dict) -> list[str]:
    """What leaves the numbers of a benchmark without a meaning. Summaries of earlier versions lack some counts."""
    total, problems = summary["num_prompts"] * summary["num_samples"], []
    if summary["grading_failed"] == total:
        problems.append("grading failed for every completion, so every number is undefined.")
    if summary.get("ungraded") == total:
        problems.append("no gold answer can be read, so nothing is graded and every number is undefined.")
    if summary.get("truncated") == total:
        problems.append("every completion ran into --max_new_tokens. Raise it, or check the end-of-sequence token.")
    if summary["num_samples"] == 1:
        problems.append("AUC within needs several samples of each question: --num_samples 2 or more.")
    return problems


if __name__ == "__main__":
    sys.exit(cli_main(["evaluate", *sys.argv[1:]]))
