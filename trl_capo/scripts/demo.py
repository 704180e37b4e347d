"""`trl-capo demo`: train GRPO and CAPO side by side from the same tiny base, in minutes on a CPU.

Both train on the embedded arithmetic world with the same steps, prompts and seed, as two processes of one thread each.
Then base, GRPO and CAPO answer the same held-out prompts, as in `trl-capo evaluate`. A table, `results.json`,
`results.png` and `report.html` show how often each is right and how well its confidence separates right from wrong
answers.

Rerun the same command to resume.
"""

import argparse
import os
import sys
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.extras import require
from trl_capo.files import remember_settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="runs/demo", help="folder for all output (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=80, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of both runs (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=_positive, default=400, help="prompts per held-out split (default: %(default)s)"
    )
    parser.add_argument("--samples", type=_positive, default=16, help="samples per prompt (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and compare."""
    args = make_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the Hub
    require("report")
    from trl_capo.compare import demo
    from trl_capo.evaluation.summary import print_summaries
    from trl_capo.preflight.checks import check_output_dir

    folder = Path(args.output_dir)
    check_output_dir(str(folder))
    remember_settings(folder, {name: value for name, value in vars(args).items() if name != "output_dir"}, "a demo")
    print(
        f"Training GRPO and CAPO from the shipped base, {args.steps} steps each, in {folder}/. Then sampling "
        f"{args.samples} answers to each of {args.prompts} held-out prompts in {len(demo.BENCHMARKS)} splits ..."
    )
    plan = demo.demo_plan(folder, args.steps, args.seed, args.prompts, args.samples)
    results = demo.run(plan, vars(args))
    print_summaries(results["models"])
    print("Writing the report ...")
    demo.draw(folder, results["training"])
    print(demo.what_to_look_at(results, folder))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(cli_main(["demo", *sys.argv[1:]]))
