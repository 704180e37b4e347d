"""`trl-capo abstain`: choose the confidence below which a model should not answer, from graded samples.

    trl-capo evaluate runs/capo --benchmark arithmetic_validation
    trl-capo abstain runs/evaluation/capo --precision 0.9 --model runs/capo

Prints the threshold, the precision it promises and the share of questions it answers. Saves it next to the model as
`abstention.json`, where `trl-capo answer` finds it.
"""

import argparse
import sys
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.errors import UserError
from trl_capo.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo abstain", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", help="samples.parquet of calibration questions, or its folder")
    parser.add_argument(
        "--precision", type=float, required=True, help="promised share of right answers among those given"
    )
    parser.add_argument("--delta", type=float, default=0.05, help="probability that the promise fails (default: 0.05)")
    parser.add_argument("--benchmark", nargs="+", help="benchmarks of the file to use (default: all)")
    parser.add_argument("--model", help="folder of the model, to save abstention.json there")
    parser.add_argument("--force", action="store_true", help="save it even if the model should always abstain")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Choose the threshold, print it and save it."""
    args = make_parser().parse_args(argv)
    for name in ("precision", "delta"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name} must be strictly between 0 and 1, got {getattr(args, name)}.")
    if args.model is not None and not Path(args.model).is_dir():
        raise UserError(
            f"--model must be the folder of a model, to save abstention.json there: {args.model} is not a folder."
        )
    require("report")
    from trl_capo.calibration.abstention import advice
    from trl_capo.evaluation.identity import check_unchanged, read_settings, sampling_of
    from trl_capo.evaluation.predictor import all_questions, choose_abstention
    from trl_capo.evaluation.samples import read_samples

    sets = read_samples(args.samples)
    known = [samples.benchmark for samples in sets]
    if missing := sorted(set(args.benchmark or []) - set(known)):
        raise UserError(f"{args.samples} has no benchmark {', '.join(missing)}, only {', '.join(known)}.")
    sets = [samples for samples in sets if args.benchmark is None or samples.benchmark in args.benchmark]
    path = Path(args.samples)
    settings = read_settings(path if path.is_dir() else path.parent)
    sampling = sampling_of(settings, [samples.benchmark for samples in sets])
    chosen = choose_abstention(sets, args.precision, args.delta, sampling=sampling)
    if args.model is not None and settings:
        check_unchanged(args.model, settings)
    if chosen.threshold is None:
        message = advice(*all_questions(sets), chosen)
        if args.model is not None and not args.force:
            raise UserError(f"{message} Nothing was saved. With --force, the model always abstains.")
        print(message)
    else:
        print(
            f"Answer at confidence {chosen.threshold:.4f} or higher: at least {chosen.precision:.0%} of the answers "
            f"are right, with probability {1 - chosen.delta:.0%}.\nIt answers {chosen.coverage:.0%} of the "
            f"{chosen.num_questions} calibration questions, and {chosen.calibration_precision:.1%} of these answers "
            "are right."
        )
    if args.model is not None:
        print(f"Saved: {chosen.save(args.model)}")


if __name__ == "__main__":
    sys.exit(cli_main(["abstain", *sys.argv[1:]]))
