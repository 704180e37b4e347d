"""`trl-capo abstain`: from graded samples, the confidence below which a model should not answer.

    trl-capo evaluate runs/capo --benchmark arithmetic_validation
    trl-capo abstain runs/evaluation/capo --precision 0.9 --model runs/capo

Prints what the threshold promises and answers, and saves it as `abstention.json` beside the model, where
`trl-capo answer` finds it.
"""

import argparse
import sys

from trl_capo.cli import main as cli_main


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo abstain", description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", help="samples.parquet of calibration questions, or its folder")
    parser.add_argument(
        "--precision", type=float, required=True, help="promised share of right answers among those given"
    )
    parser.add_argument("--delta", type=float, default=0.05, help="how likely the promise may fail (default: 0.05)")
    parser.add_argument("--benchmark", nargs="+", help="only these benchmarks of the file")
    parser.add_argument("--model", help="folder of the model, which gets abstention.json")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Choose, print, save."""
    args = make_parser().parse_args(argv)
    from trl_capo.evaluation.predictor import choose_abstention
    from trl_capo.evaluation.samples import read_samples

    sets = read_samples(args.samples)
    known = [of.benchmark for of in sets]
    if missing := sorted(set(args.benchmark or []) - set(known)):
        raise ValueError(f"{args.samples} has no benchmark {', '.join(missing)}, only {', '.join(known)}.")
    sets = [of for of in sets if args.benchmark is None or of.benchmark in args.benchmark]
    chosen = choose_abstention(sets, args.precision, args.delta)
    if chosen.threshold is None:
        print(
            f"No threshold is right {chosen.precision:.0%} of the time on {chosen.num_questions} questions: the model "
            "should always abstain. Ask for less, or calibrate on more questions."
        )
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
