"""`trl-capo abstain`: from graded samples, the confidence below which a model should not answer.

    trl-capo evaluate runs/capo --benchmark arithmetic_validation
    trl-capo abstain runs/evaluation/capo --precision 0.9 --model runs/capo

Prints what the threshold promises and answers, and saves it as `abstention.json` beside the model, where
`trl-capo answer` finds it.
"""

import argparse
import json
import sys
from pathlib import Path

from trl_capo.cli import main as cli_main
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
    return parser


def main(argv: list[str] | None = None) -> None:
    """Choose, print, save."""
    args = make_parser().parse_args(argv)
    require("report")
    from trl_capo.evaluation.predictor import choose_abstention
    from trl_capo.evaluation.samples import read_samples

    sets = read_samples(args.samples)
    known = [of.benchmark for of in sets]
    if missing := sorted(set(args.benchmark or []) - set(known)):
        raise ValueError(f"{args.samples} has no benchmark {', '.join(missing)}, only {', '.join(known)}.")
    sets = [of for of in sets if args.benchmark is None or of.benchmark in args.benchmark]
    sampling = _sampling(Path(args.samples), [of.benchmark for of in sets])
    chosen = choose_abstention(sets, args.precision, args.delta, sampling=sampling)
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


def _sampling(samples: Path, benchmarks: list[str]) -> dict:
    """How `trl-capo evaluate` drew the samples; empty for samples from elsewhere."""
    settings = (samples if samples.is_dir() else samples.parent) / "settings.json"
    if not settings.exists():
        return {}
    known = json.loads(settings.read_text())
    sampling = {"temperature": known["temperature"]}
    for name in ("max_new_tokens", "system_prompt"):
        values = {known[name][benchmark] for benchmark in benchmarks}
        if len(values) > 1:
            raise ValueError(f"the benchmarks were sampled with another {name} each: choose one with --benchmark.")
        sampling[name] = values.pop()
    return sampling


if __name__ == "__main__":
    sys.exit(cli_main(["abstain", *sys.argv[1:]]))
