"""`trl-capo data`: check whether a dataset is fit for training, and keep the questions that teach a model something.

    trl-capo data check aime24 gsm8k mine.jsonl
    trl-capo data check deepscaler --against aime24 math500 --model Qwen/Qwen2.5-Math-1.5B
    trl-capo data filter deepscaler --prompt_template qwen25-math-cot --model Qwen/Qwen2.5-Math-1.5B \\
        --output mixed.jsonl
    trl-capo data regime runs/evaluation/Qwen2.5-Math-1.5B --tau 0.6

CAPO and GRPO learn only from questions that a model answers sometimes right and sometimes wrong. `filter` samples
each question, keeps these, and writes a file that you can use as `dataset_name`. Rerun the same command to resume.
`regime` reads samples, of `filter` or of `trl-capo evaluate`, and prints what says how training will move confidence.
"""

import argparse
import functools
import sys
from pathlib import Path

from trl_capo.cli import main as cli_main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo data", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", help="configuration of a dataset on the Hub")
    shared.add_argument("--split", default="train", help="split of a dataset on the Hub (default: %(default)s)")
    shared.add_argument("--prompt_column", help="column of the questions (default: the catalogue's, or prompt)")
    shared.add_argument("--solution_column", help="column of the gold answers (default: the catalogue's, or solution)")
    shared.add_argument("--system_prompt", help="system message before questions that are plain text")
    shared.add_argument("--prompt_template", help="instead: qwen25-math-cot, qwen-boxed or step-by-step")

    check = commands.add_parser("check", parents=[shared], help="report problems in datasets", allow_abbrev=False)
    check.add_argument("names", nargs="+", help="names in the catalogue, files, folders, or datasets on the Hub")
    check.add_argument("--against", nargs="+", default=[], help="datasets that must not share a question with these")
    check.add_argument("--model", help="model whose tokenizer counts the tokens")
    check.add_argument("--normalize_operators", action="store_true", help="grade as trl-capo train does with it")
    check.add_argument("--output", help="also write the numbers to this JSON file")

    keep = commands.add_parser(
        "filter", parents=[shared], help="keep the questions with mixed outcomes", allow_abbrev=False
    )
    keep.add_argument("name", help="name in the catalogue, file, folder, or dataset on the Hub")
    keep.add_argument("--model", required=True, help="model that answers the questions")
    keep.add_argument("--output", required=True, help="file to write (.jsonl)")
    keep.add_argument("--num_samples", type=int, default=8, help="completions per question (default: %(default)s)")
    keep.add_argument("--num_prompts", type=int, help="number of questions, from the first (default: all)")
    keep.add_argument("--lowest", type=float, default=0.0, help="keep pass rates above this (default: %(default)s)")
    keep.add_argument("--highest", type=float, default=1.0, help="keep pass rates below this (default: %(default)s)")
    keep.add_argument("--max_new_tokens", type=int, default=3000, help="longest completion (default: %(default)s)")
    keep.add_argument("--batch_size", type=int, default=256, help="completions per batch, with transformers")
    keep.add_argument(
        "--engine", choices=("auto", "transformers", "vllm"), default="auto", help="as in trl-capo evaluate"
    )
    keep.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    keep.add_argument("--chat_template_kwargs", metavar="JSON", help="as in trl-capo evaluate")
    keep.add_argument("--output_dir", default="runs/filter", help="folder for the samples (default: %(default)s)")

    tell = commands.add_parser(
        "regime", help="print what a model's samples say about training its confidence", allow_abbrev=False
    )
    tell.add_argument("samples", nargs="+", help="folders of samples, as trl-capo evaluate and data filter write them")
    tell.add_argument("--tau", type=float, default=0.6, help="CAPO's tau, in nats (default: %(default)s)")
    tell.add_argument("--output", help="also write the numbers to this JSON file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check datasets, filter one, or read samples."""
    args = make_parser().parse_args(argv)
    {"check": check, "filter": keep_mixed, "regime": tell_regime}[args.command](args)


def reader(args: argparse.Namespace):
    """`load_split` with the columns, prompts and split that the command line gives."""
    from trl_capo.data.splits import load_split
    from trl_capo.data.training import DataArguments

    columns = dict(dataset_prompt_column=args.prompt_column, dataset_solution_column=args.solution_column)
    prompts = dict(system_prompt=args.system_prompt, prompt_template=args.prompt_template)
    return functools.partial(
        load_split, args=DataArguments(**columns, **prompts), config=args.config, split=args.split
    )


def check(args: argparse.Namespace) -> None:
    """Print the health of each dataset, and write it if the command line names a file."""
    from transformers import AutoTokenizer

    from trl_capo.data.catalogue import CATALOGUE
    from trl_capo.evaluation.health import health, print_health
    from trl_capo.files import write_json
    from trl_capo.models.source import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path(args.model)) if args.model else None
    load = reader(args)
    against = {name: load(name) for name in args.against}
    options = dict(against=against, tokenizer=tokenizer, normalize_operators=args.normalize_operators)
    found = {}
    for name in args.names:
        found[name] = health(load(name), **options)
        if name in CATALOGUE:
            found[name] |= {"expected_rows": CATALOGUE[name].num_rows, "licence": CATALOGUE[name].licence}
    print_health(found)
    if args.output:
        write_json(Path(args.output), found)


def keep_mixed(args: argparse.Namespace) -> None:
    """Sample and grade every question with `trl-capo evaluate`, and write those with mixed outcomes."""
    from trl_capo.data.language import has_text_answers
    from trl_capo.evaluation.mixed import check_bounds, write_mixed
    from trl_capo.evaluation.run import folder_names, patient_state
    from trl_capo.preflight.checks import check_output_dir
    from trl_capo.ranks import agree
    from trl_capo.scripts import evaluate

    check_bounds(args.lowest, args.highest, args.num_samples)
    check_output_dir(args.output_dir)
    check_output_dir(str(Path(args.output).parent))
    state = patient_state()
    questions = Path(args.output_dir) / "questions.parquet"
    with state.main_process_first():
        rows = reader(args)(args.name).select_columns(["prompt", "solution"])
    rows = rows.select(range(min(args.num_prompts or len(rows), len(rows))))
    agree(lambda: rows.to_parquet(str(questions)))
    sampling = ("num_samples", "max_new_tokens", "batch_size", "engine", "seed", "output_dir")
    options = [f"--{name}={getattr(args, name)}" for name in sampling]
    if has_text_answers(args.name):
        options.append("--text_answers")
    if args.chat_template_kwargs is not None:
        options.append(f"--chat_template_kwargs={args.chat_template_kwargs}")
    evaluate.main([args.model, "--benchmark", str(questions), *options])
    if state.is_main_process:
        # Write the questions without the template, because training adds it again.
        plain = argparse.Namespace(**{**vars(args), "system_prompt": None, "prompt_template": None})
        samples = Path(args.output_dir) / folder_names([args.model])[0]
        counts = write_mixed(Path(args.output), reader(plain)(args.name), samples, args.lowest, args.highest)
        print(", ".join(f"{count:,} {what}" for what, count in counts.items() if count))
        template = f" --prompt_template {args.prompt_template}" if args.prompt_template else ""
        print(f"Next: trl-capo train --config RECIPE --dataset_name {args.output}{template}")


def tell_regime(args: argparse.Namespace) -> None:
    """Print the regime of each sample set, and write it if the command line names a file."""
    from trl_capo.calibration.regime import print_regimes, regime
    from trl_capo.errors import UserError
    from trl_capo.evaluation.samples import read_samples
    from trl_capo.files import write_json

    if not args.tau > 0:
        raise UserError(f"--tau must be positive, got {args.tau}.")
    found = {}
    for folder in args.samples:
        for samples in read_samples(Path(folder)):
            numbers = regime(samples.correct, samples.mean_logps, samples.answers)
            numbers["tau_in_gaps"] = args.tau / numbers["gap"] if numbers["gap"] > 0 else float("nan")
            found[f"{Path(folder)}, {samples.benchmark}"] = numbers  # the whole path: names may repeat
    print_regimes(found)
    print("How to read it: docs/evidence.md, 'Which regime is your model in?'")
    if args.output:
        write_json(Path(args.output), found)


if __name__ == "__main__":
    sys.exit(cli_main(["data", *sys.argv[1:]]))
