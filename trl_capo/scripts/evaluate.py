"""`trl-capo evaluate`: sample answers to held-out questions, grade them, and measure how far to trust the confidence.

    trl-capo evaluate runs/demo/capo arithmetic-base --benchmark arithmetic_test_2 arithmetic_test_3
    accelerate launch -m trl_capo.scripts.evaluate Qwen/Qwen2.5-Math-1.5B --benchmark math500 --max_new_tokens 3000

Each model gets a folder in `--output_dir` with `samples.parquet` (one row per completion, see
`trl_capo.evaluation.samples`) and `summary.json`. Rerun the same command to resume.
"""

import sys

from trl_capo.cli import main as cli_main
from trl_capo.evaluation.options import READING, check_sampling, make_parser


SAMPLING = (
    "num_samples",
    "temperature",
    "max_new_tokens",
    "seed",
    "statistics",
    "engine",
    "batch_size",
    "dtype",
    "chat_template_kwargs",
)


def main(argv: list[str] | None = None) -> None:
    """Sample, grade and summarise each model in turn; each launched process takes its share of the questions."""
    args = make_parser().parse_args(argv)
    from trl_capo.extras import require
    from trl_capo.models.chat_templates import read_kwargs

    check_sampling(args)
    args.chat_template_kwargs = read_kwargs(args.chat_template_kwargs) or None
    if args.engine == "vllm":
        require("vllm")
    from trl_capo.data.benchmarks import load_benchmark
    from trl_capo.evaluation.run import evaluate_all, patient_state
    from trl_capo.evaluation.summary import notes, print_summaries, read_summary
    from trl_capo.models.adapter import base_of
    from trl_capo.models.source import model_path
    from trl_capo.preflight.checks import check_launch, check_output_dir

    for model in args.models:
        base_of(model_path(model))  # refuses a missing model or base before anything is loaded
    check_output_dir(args.output_dir)
    columns = {name: getattr(args, name) for name in READING}
    data = {name: load_benchmark(name, args.num_prompts, **columns) for name in args.benchmark}
    state = patient_state()
    check_launch(state.num_processes)
    sampling = {name: getattr(args, name) for name in SAMPLING}
    sampling |= {"normalize_operators": True} if args.normalize_operators else {}
    sampling |= {"text_answers": True} if args.text_answers else {}
    folders = evaluate_all(args.models, data, args.output_dir, state, names=args.names, **sampling)
    if state.is_main_process:
        summaries = {folder.name: read_summary(folder) for folder in folders}
        print_summaries(summaries)
        for note in notes(summaries):
            print(note)
        print(f"\nSamples and summaries: {args.output_dir}/")
        print(f"Next: trl-capo report {' '.join(map(str, folders))} --output report.html")


if __name__ == "__main__":
    sys.exit(cli_main(["evaluate", *sys.argv[1:]]))
