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
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from trl_capo.cli import main as cli_main


PROMPTS_PER_PART = 32  # kept, and lost if the run is killed, together


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo evaluate", description=__doc__.split("\n\n")[0])
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
    parser.add_argument("--output_dir", default="runs/evaluation", help="where everything goes (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Sample, grade, summarise; each model in turn, each process of the launcher its share of the questions."""
    args = make_parser().parse_args(argv)
    from accelerate import PartialState

    from trl_capo.checks import check_output_dir
    from trl_capo.data.benchmarks import load_benchmark

    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    check_output_dir(args.output_dir)
    columns = dict(
        prompt_column=args.prompt_column, solution_column=args.solution_column, system_prompt=args.system_prompt
    )
    data = {name: load_benchmark(name, args.num_prompts, **columns) for name in args.benchmark}
    state = PartialState()
    folders = [Path(args.output_dir) / name for name in _folder_names(args.models)]
    for model, folder in zip(args.models, folders, strict=True):
        if state.is_main_process:
            _remember_settings(folder, model, args)
        state.wait_for_everyone()
        evaluate(model, folder, data, args, state)
    if state.is_main_process:
        read = {folder.name: json.loads((folder / "summary.json").read_text()) for folder in folders}
        _print_summaries({name: summary["benchmarks"] for name, summary in read.items()})
        print(f"\nSamples and summaries: {args.output_dir}/")
        print(f"What to type next: trl-capo report {' '.join(map(str, folders))} --output report.html")


def evaluate(
    model: str, folder: Path, data: dict, args: argparse.Namespace, state, *, position: int | None = None
) -> None:
    """Sample what is missing, then merge and summarise.

    Args:
        model: Folder, name on the Hub, or name of a shipped model.
        folder: Gets `samples.parquet` and `summary.json`.
        data: Questions by benchmark, from `load_benchmark`.
        args: From `make_parser`.
        state: accelerate's `PartialState`.
        position: Line of the progress bar, where several are shown at once.
    """
    from trl_capo.data.benchmarks import ARITHMETIC
    from trl_capo.evaluation.samples import FILE_NAME, merge_parts, part_path, write_part

    if not (folder / FILE_NAME).exists():
        parts = [
            (name, start, min(start + PROMPTS_PER_PART, len(rows)))
            for name, rows in data.items()
            for start in range(0, len(rows), PROMPTS_PER_PART)
        ]
        mine = parts[state.process_index :: state.num_processes]
        missing = [part for part in mine if not part_path(folder, *part[:2]).exists()]
        sample = None
        for name, start, stop in _with_progress(missing, mine, args.num_samples, folder.name, state, position):
            sample = sample or load_engine(model, args, state)
            limit = args.max_new_tokens or (64 if name in ARITHMETIC else 3000)
            rows = data[name].select(range(start, stop))
            samples = sample(list(rows["prompt"]), max_new_tokens=limit, first_prompt=start)
            write_part(folder, name, start, graded_table(name, start, rows, samples))
    state.wait_for_everyone()
    if state.is_main_process:
        merge_parts(folder)
        _summarize(model, folder)
    state.wait_for_everyone()


def load_engine(model: str, args: argparse.Namespace, state) -> Callable:
    """A function from prompts, `max_new_tokens` and `first_prompt` to `Samples`."""
    from trl_capo.data.arithmetic import model_path

    model = model_path(model)
    shared = dict(
        num_samples=args.num_samples, temperature=args.temperature, seed=args.seed, statistics=args.statistics
    )
    if choose_engine(args.engine) == "vllm":
        from trl_capo.evaluation.sample_vllm import load_vllm, sample_completions_vllm

        return functools.partial(sample_completions_vllm, load_vllm(model, dtype=args.dtype), **shared)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_capo.evaluation.sample import sample_completions

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=args.dtype).to(state.device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return functools.partial(
        sample_completions, policy, tokenizer, batch_size=args.batch_size, progress=False, **shared
    )


def choose_engine(asked: str) -> str:
    """vLLM where it is installed and there is a CUDA GPU, unless one is asked for."""
    import torch

    if asked != "auto":
        return asked
    return "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "transformers"


def graded_table(benchmark: str, first_prompt: int, rows, samples):
    """The rows of `samples.parquet` for some prompts."""
    import numpy as np
    import pyarrow as pa

    from trl_capo.evaluation.grade import canonical_answers, grade
    from trl_capo.evaluation.samples import schema

    num_prompts, num_samples = samples.mean_logps.shape
    prompts = np.repeat(np.arange(first_prompt, first_prompt + num_prompts), num_samples)
    texts = [text for row in samples.completions for text in row]
    solutions = np.repeat(np.array(rows["solution"], dtype=object), num_samples).tolist()
    grades = grade(texts, solutions, progress=False)
    questions = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in rows["prompt"]]
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


def _folder_names(models: list[str]) -> list[str]:
    """The last part of each model's path, numbered where two are the same."""
    names = [Path(model).name or model for model in models]
    return [f"{name}-{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _remember_settings(folder: Path, model: str, args: argparse.Namespace) -> None:
    """A folder holds one evaluation: what is there is not sampled again, so it must be of the same settings."""
    settings = {k: v for k, v in vars(args).items() if k not in ("models", "output_dir", "batch_size", "engine")}
    settings |= {"model": model, "engine": choose_engine(args.engine)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists() and (known := json.loads(path.read_text())) != settings:
        changed = [name for name in settings if settings[name] != known.get(name)]
        raise ValueError(
            f"{folder} holds an evaluation with another {', '.join(changed)}: "
            f"{', '.join(str(known.get(name)) for name in changed)}. Repeat that, choose another --output_dir, or "
            "remove the folder."
        )
    path.write_text(json.dumps(settings, indent=1))


def _with_progress(
    missing: list[tuple], mine: list[tuple], num_samples: int, name: str, state, position: int | None
) -> Iterator[tuple]:
    """Parts to do, with a bar that counts samples."""
    from tqdm import tqdm

    total = sum(stop - start for _, start, stop in mine) * num_samples
    done = total - sum(stop - start for _, start, stop in missing) * num_samples
    shown = dict(desc=name, unit="sample", position=position, disable=not state.is_local_main_process)
    with tqdm(total=total, initial=done, **shown) as bar:
        for part in missing:
            yield part
            bar.update((part[2] - part[1]) * num_samples)


def _summarize(model: str, folder: Path) -> None:
    from trl_capo.evaluation.samples import read_samples
    from trl_capo.evaluation.summary import summarize

    summary = {
        of.benchmark: summarize(of.correct, of.mean_logps, of.answers)
        | {
            "num_prompts": len(of.correct),
            "num_samples": of.num_samples,
            "grading_failed": int(of.grid("grading_failed").sum()),
        }
        for of in read_samples(folder)
    }
    partial = folder / "summary.partial"
    partial.write_text(json.dumps({"model": model, "benchmarks": summary}, indent=1))
    partial.replace(folder / "summary.json")


def _print_summaries(summaries: dict[str, dict]) -> None:
    from trl_capo.evaluation.summary import print_summaries

    print_summaries(summaries)
    failed = sum(of["grading_failed"] for benchmarks in summaries.values() for of in benchmarks.values())
    if failed:
        print(f"{failed} completions count as wrong because math-verify hung or crashed on them.")


if __name__ == "__main__":
    sys.exit(cli_main(["evaluate", *sys.argv[1:]]))
