"""`trl-capo data`: is a dataset fit to train on, and which of its questions teach a model anything?

    trl-capo data check aime24 gsm8k mine.jsonl
    trl-capo data check deepscaler --against aime24 math500 --model Qwen/Qwen2.5-Math-1.5B
    trl-capo data filter deepscaler --prompt_template qwen25-math-cot --model Qwen/Qwen2.5-Math-1.5B \\
        --output mixed.jsonl

CAPO and GRPO learn only from questions that a model answers now rightly, now wrongly. `filter` samples each question,
keeps those, and writes a file that `dataset_name` takes. Stopped at any point, the same command goes on.
"""

import argparse
import json
import sys
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.files import replacing, write_json


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo data", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", help="configuration of a dataset on the Hub")
    shared.add_argument("--split", default="train", help="of a dataset on the Hub (default: %(default)s)")
    shared.add_argument("--prompt_column", help="the questions (default: prompt, or what the catalogue says)")
    shared.add_argument("--solution_column", help="the gold answers (default: solution, or what the catalogue says)")
    shared.add_argument("--system_prompt", help="system message before questions that are plain text")
    shared.add_argument("--prompt_template", help="instead: qwen25-math-cot, qwen-boxed or step-by-step")

    check = commands.add_parser("check", parents=[shared], help="print the health of datasets", allow_abbrev=False)
    check.add_argument("names", nargs="+", help="names of the catalogue, files, folders, or datasets on the Hub")
    check.add_argument("--against", nargs="+", default=[], help="datasets that should share no question with them")
    check.add_argument("--model", help="count tokens with its tokenizer")
    check.add_argument("--normalize_operators", action="store_true", help="grade as with this option of train")
    check.add_argument("--output", help="also write the numbers to this JSON file")

    keep = commands.add_parser(
        "filter", parents=[shared], help="keep the questions with mixed outcomes", allow_abbrev=False
    )
    keep.add_argument("name", help="name of the catalogue, file, folder, or dataset on the Hub")
    keep.add_argument("--model", required=True, help="whose outcomes count")
    keep.add_argument("--output", required=True, help="file to write (.jsonl)")
    keep.add_argument("--num_samples", type=int, default=8, help="completions a question (default: %(default)s)")
    keep.add_argument("--num_prompts", type=int, help="only the first so many questions")
    keep.add_argument("--lowest", type=float, default=0.0, help="keep pass rates above this (default: %(default)s)")
    keep.add_argument("--highest", type=float, default=1.0, help="and below this (default: %(default)s)")
    keep.add_argument("--max_new_tokens", type=int, default=3000, help="longest completion (default: %(default)s)")
    keep.add_argument("--batch_size", type=int, default=256, help="completions at a time, with transformers")
    keep.add_argument(
        "--engine", choices=("auto", "transformers", "vllm"), default="auto", help="as trl-capo evaluate"
    )
    keep.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    keep.add_argument("--chat_template_kwargs", metavar="JSON", help="as trl-capo evaluate")
    keep.add_argument("--output_dir", default="runs/filter", help="where the samples go (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check, or filter."""
    args = make_parser().parse_args(argv)
    (check if args.command == "check" else keep_mixed)(args)


def check(args: argparse.Namespace) -> None:
    """Print, and perhaps write, the health of each dataset."""
    from transformers import AutoTokenizer

    from trl_capo.data.arithmetic import model_path
    from trl_capo.data.catalogue import CATALOGUE
    from trl_capo.evaluation.health import health

    tokenizer = AutoTokenizer.from_pretrained(model_path(args.model)) if args.model else None
    against = {name: load(name, args) for name in args.against}
    found = {}
    for name in args.names:
        found[name] = health(
            load(name, args), against=against, tokenizer=tokenizer, normalize_operators=args.normalize_operators
        )
        if name in CATALOGUE:
            found[name] |= {"expected_rows": CATALOGUE[name].num_rows, "licence": CATALOGUE[name].licence}
    print_health(found)
    if args.output:
        write_json(Path(args.output), found)


def load(name: str, args: argparse.Namespace):
    """One split of a dataset, as conversations."""
    from trl_capo.data.arithmetic import SPLITS
    from trl_capo.data.catalogue import CATALOGUE
    from trl_capo.data.training import DataArguments, load_splits

    wanted = DataArguments(
        dataset_prompt_column=args.prompt_column,
        dataset_solution_column=args.solution_column,
        system_prompt=args.system_prompt,
        prompt_template=args.prompt_template,
    )
    if name.startswith("arithmetic_") and name.removeprefix("arithmetic_") in SPLITS:
        return load_splits("arithmetic", None, wanted)[name.removeprefix("arithmetic_")]
    splits = load_splits(name, args.config, wanted)
    split = CATALOGUE[name].split if name in CATALOGUE else args.split
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}: --split takes one of {', '.join(splits)}.")
    rows = splits[split]
    if "solution" not in rows.column_names:
        raise ValueError(
            f"{name} has no column 'solution', only {', '.join(rows.column_names)}. Name the one that holds the gold "
            "answers with --solution_column."
        )
    return rows


def print_health(found: dict[str, dict]) -> None:
    """A table, one column a dataset, then examples of what is wrong."""
    from rich.console import Console
    from rich.table import Table

    lines = {
        "rows": lambda of: f"{of['rows']:,}" + (f" of {of['expected_rows']:,}" if "expected_rows" in of else ""),
        "licence": lambda of: of.get("licence", "-"),
        "empty questions": lambda of: of["empty_questions"],
        "repeated questions": lambda of: of["repeated_questions"],
        "gold answers missing": lambda of: of["missing_golds"],
        "gold answers not readable": lambda of: of["unreadable_golds"],
        "gold answers that fail themselves": lambda of: of["golds_that_fail_themselves"],
    }
    first = next(iter(found.values()))
    for name in first["shared_questions"]:
        lines[f"questions shared with {name}"] = lambda of, name=name: of["shared_questions"][name]
    for name in first.get("prompt_tokens", ()):
        lines[f"tokens of a prompt: {name}"] = lambda of, name=name: of["prompt_tokens"][name]
    table = Table(header_style="bold")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for line, value in lines.items():
        table.add_row(line, *(str(value(of)) for of in found.values()))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for name, of in found.items():
        for kind, examples in of["examples"].items():
            for example in examples:
                console.print(f"{name}, {kind.replace('_', ' ')}: {example}", highlight=False, markup=False)


def keep_mixed(args: argparse.Namespace) -> None:
    """Sample and grade every question with `trl-capo evaluate`, and write those with mixed outcomes."""
    from trl_capo.evaluation.run import folder_names, patient_state
    from trl_capo.preflight.checks import check_output_dir
    from trl_capo.scripts import evaluate

    if not 0 <= args.lowest < args.highest <= 1:
        raise ValueError(
            f"--lowest and --highest must be 0 <= lowest < highest <= 1, got {args.lowest}, {args.highest}."
        )
    if args.num_samples < 2:
        raise ValueError(f"--num_samples must be at least 2, or no outcome is mixed; got {args.num_samples}.")
    check_output_dir(args.output_dir)
    check_output_dir(str(Path(args.output).parent))
    state = patient_state()
    questions = Path(args.output_dir) / "questions.parquet"
    with state.main_process_first():
        rows = load(args.name, args).select_columns(["prompt", "solution"])
    rows = rows.select(range(min(args.num_prompts or len(rows), len(rows))))
    if state.is_main_process:
        rows.to_parquet(str(questions))
    state.wait_for_everyone()
    sampling = ("num_samples", "max_new_tokens", "batch_size", "engine", "seed", "output_dir")
    options = [f"--{name}={getattr(args, name)}" for name in sampling]
    if args.chat_template_kwargs is not None:
        options.append(f"--chat_template_kwargs={args.chat_template_kwargs}")
    evaluate.main([args.model, "--benchmark", str(questions), *options])
    if state.is_main_process:
        write_mixed(rows, Path(args.output_dir) / folder_names([args.model])[0], args)


def write_mixed(rows, samples: Path, args: argparse.Namespace) -> None:
    """The questions whose pass rate lies between the two bounds, with it, one JSON a line.

    They are written as they were before the template, which the training puts around them again.
    """
    import numpy as np

    from trl_capo.evaluation.samples import read_samples

    (of,) = read_samples(samples)
    readable = np.isfinite(of.correct).all(axis=1)
    rates = np.where(readable, of.correct.mean(axis=1), np.nan)
    kept = np.flatnonzero((rates > args.lowest) & (rates < args.highest))
    plain = argparse.Namespace(**{**vars(args), "system_prompt": None, "prompt_template": None})
    raw = load(args.name, plain)
    with replacing(Path(args.output)) as path, path.open("w", encoding="utf-8") as file:
        for row in kept.tolist():
            messages = raw[row]["prompt"]
            prompt = messages[0]["content"] if len(messages) == 1 else messages
            line = {"prompt": prompt, "solution": raw[row]["solution"], "pass_rate": float(rates[row])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    shares = {
        "kept": len(kept),
        "always right": int((rates == 1).sum()),
        "never right": int((rates == 0).sum()),
        "without a readable gold answer": int((~readable).sum()),
    }
    rest = len(rows) - sum(shares.values())
    print(", ".join(f"{count:,} {name}" for name, count in (shares | {"outside the bounds": rest}).items() if count))
    template = f" --prompt_template {args.prompt_template}" if args.prompt_template else ""
    print(f"What to type next: trl-capo train --config RECIPE --dataset_name {args.output}{template}")


if __name__ == "__main__":
    sys.exit(cli_main(["data", *sys.argv[1:]]))
