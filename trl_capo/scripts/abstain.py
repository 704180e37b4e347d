"""`trl-capo abstain`: from graded samples, the confidence below which a model should not answer.

    trl-capo evaluate runs/capo --benchmark arithmetic_validation
    trl-capo abstain runs/evaluation/capo --precision 0.9 --model runs/capo

Prints what the threshold promises and answers, and saves it as `abstention.json` beside the model, where
`trl-capo answer` finds it.
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
    parser.add_argument("--delta", type=float, default=0.05, help="how likely the promise may fail (default: 0.05)")
    parser.add_argument("--benchmark", nargs="+", help="only these benchmarks of the file")
    parser.add_argument("--model", help="folder of the model, which gets abstention.json")
    parser.add_argument("--force", action="store_true", help="save it even if the model should always abstain")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Choose, print, save."""
    args = make_parser().parse_args(argv)
    for name in ("precision", "delta"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"--{name}: `{name}` must lie in (0, 1), got {getattr(args, name)}.")
    if args.model is not None and not Path(args.model).is_dir():
        raise UserError(
            f"--model takes the folder of a model, which gets abstention.json: {args.model}: No such file."
        )
    require("report")
    from trl_capo.calibration.abstention import advice
    from trl_capo.evaluation.identity import check_unchanged, read_settings, sampling_of
    from trl_capo.evaluation.predictor import all_questions, choose_abstention
    from trl_capo.evaluation.samples import read_samples

    sets = read_samples(args.samples)
    known = [of.benchmark for of in sets]
    if missing := sorted(set(args.benchmark or []) - set(known)):
        raise UserError(f"{args.samples} has no benchmark {', '.join(missing)}, only {', '.join(known)}.")
    sets = [of for of in sets if args.benchmark is None or of.benchmark in args.benchmark]
    samples = Path(args.samples)
    settings = read_settings(samples if samples.is_dir() else samples.parent)
    sampling = sampling_of(settings, [of.benchmark for of in sets])
    chosen = choose_abstention(sets, args.precision, args.delta, sampling=sampling)
    if args.model is not None and settings:
        check_unchanged(args.model, settings)
    if chosen.threshold is None:
        message = advice(*all_questions(sets), chosen)
        if args.model is not None and not args.force:
            raise UserError(f"{message} Nothing was saved; with --force the model always abstains.")
        print(message)
    else:
        print(
            f"Answer from confidence {chosen.threshold:.4f} on: at least {chosen.precision:.0%} of the answers are "
            f"right, with probability {1 - chosen.delta:.0%}.\nOf the {chosen.num_questions} calibration questions it "
            f"answers {chosen.coverage:.0%}, and {chosen.calibration_precision:.1%} of these rightly."
        )
    if args.model is not None:
        print(f"Saved: {chosen.save(args.model)}")


if __name__ == "__main__":
    sys.exit(cli_main(["abstain", *sys.argv[1:]]))
