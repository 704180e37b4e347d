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
    from trl_capo.evaluation.identity import read_settings
    from trl_capo.evaluation.predictor import choose_abstention
    from trl_capo.evaluation.samples import read_samples

    sets = read_samples(args.samples)
    known = [of.benchmark for of in sets]
    if missing := sorted(set(args.benchmark or []) - set(known)):
        raise UserError(f"{args.samples} has no benchmark {', '.join(missing)}, only {', '.join(known)}.")
    sets = [of for of in sets if args.benchmark is None or of.benchmark in args.benchmark]
    samples = Path(args.samples)
    settings = read_settings(samples if samples.is_dir() else samples.parent)
    sampling = _sampling(settings, [of.benchmark for of in sets])
    chosen = choose_abstention(sets, args.precision, args.delta, sampling=sampling)
    if args.model is not None and settings:
        _check_model(args.model, settings)
    if chosen.threshold is None:
        message = _nothing_found(sets, chosen)
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


def _nothing_found(sets, chosen) -> str:
    import math

    from trl_capo.calibration.abstention import reach
    from trl_capo.evaluation.predictor import all_questions

    best, needed = reach(*all_questions(sets), chosen.precision, delta=chosen.delta)
    story = [
        f"No threshold is right {chosen.precision:.6g} of the time with probability {1 - chosen.delta:.0%} on "
        f"{chosen.num_questions} questions, so the model should always abstain."
    ]
    if not math.isnan(best):
        story.append(f"The best precision within reach is about {best:.3f}.")
    if math.isinf(needed):
        story.append("No part of the answers is seen to be that precise, so more questions would hardly help.")
    else:
        story.append(f"For {chosen.precision:.6g}, calibrate on about {needed:,.0f} questions.")
    return " ".join(story)


def _check_model(model: str, settings: dict) -> None:
    """Refuse samples that an earlier state of the same folder gave."""
    from trl_capo.data.arithmetic import model_path
    from trl_capo.evaluation.identity import is_recorded, model_identity

    evaluated = model_path(str(settings.get("model")))
    same_folder = Path(evaluated).is_dir() and Path(evaluated).resolve() == Path(model).resolve()
    if same_folder and is_recorded(settings):
        identity = model_identity(model)
        changed = [name for name, value in identity.items() if settings.get(name) != value]
        if changed:
            raise UserError(
                f"{model} has changed since the samples were drawn ({', '.join(changed)}): evaluate it again, into "
                "another --output_dir."
            )


def _sampling(settings: dict, benchmarks: list[str]) -> dict:
    """How `trl-capo evaluate` drew the samples; empty for samples from elsewhere."""
    if not settings:
        return {}
    sampling = {}
    try:
        sampling["temperature"] = settings["temperature"]
        for name in ("max_new_tokens", "system_prompt"):
            values = {settings[name][benchmark] for benchmark in benchmarks}
            if len(values) > 1:
                raise UserError(f"the benchmarks were sampled with another {name} each: choose one with --benchmark.")
            sampling[name] = values.pop()
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the settings.json beside the samples is not that of these samples: {error!r}. Evaluate again, or remove "
            "it; then `trl-capo answer` cannot check how it samples."
        ) from error
    if settings.get("chat_template_kwargs"):
        sampling["chat_template_kwargs"] = settings["chat_template_kwargs"]
    return sampling


if __name__ == "__main__":
    sys.exit(cli_main(["abstain", *sys.argv[1:]]))
