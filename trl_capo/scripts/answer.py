"""`trl-capo answer`: ask a model, which samples, chooses an answer, and abstains when it is not confident enough.

    trl-capo answer runs/capo "63*15-43="
    trl-capo answer runs/capo "63*15-43=" --fallback_model runs/larger

Uses the threshold that `trl-capo abstain` saved next to the model. Questions below the threshold go to the fallback
model, if you give one.
"""

import argparse
import sys

from trl_capo.cli import main as cli_main
from trl_capo.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo answer", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="model: a folder, a name on the Hub, or a shipped model such as arithmetic-base")
    parser.add_argument("questions", nargs="+", help="questions to ask")
    parser.add_argument("--fallback_model", help="model to ask if the first one abstains")
    parser.add_argument("--num_samples", type=int, help="samples per question (default: the threshold's, or 16)")
    parser.add_argument("--max_new_tokens", type=int, help="longest completion (default: the threshold's, or 3000)")
    parser.add_argument("--temperature", type=float, help="sampling temperature (default: the threshold's, or 1)")
    parser.add_argument("--system_prompt", help="system message (default: the threshold's, or none)")
    parser.add_argument(
        "--chat_template_kwargs", metavar="JSON", help="variables of the chat template (default: the threshold's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="also show the most confident completion with the answer")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Ask the model, and the fallback where the model abstains."""
    args = make_parser().parse_args(argv)
    from trl_capo.models.chat_templates import read_kwargs

    if empty := [question for question in args.questions if not question.strip()]:
        raise UserError(f"a question is empty: {empty[0]!r}. Fill it in or remove it.")
    for name in ("num_samples", "max_new_tokens", "temperature"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be positive, got {value}.")
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "system_prompt")}
    options["chat_template_kwargs"] = read_kwargs(args.chat_template_kwargs) or None
    from trl_capo.evaluation.predictor import SelectivePredictor

    predictor = SelectivePredictor.from_pretrained(args.model, num_samples=args.num_samples, **options)
    if predictor.abstention is None:
        print(
            f"{args.model} has no abstention.json, so it answers every question. See trl-capo abstain --help.",
            file=sys.stderr,
        )
    fallback = None
    if args.fallback_model is not None:
        fallback = SelectivePredictor.from_pretrained(args.fallback_model, num_samples=args.num_samples, **options)
    predictions, asked = predictor.predict_or_ask(fallback, args.questions, seed=args.seed)
    for i, (question, prediction) in enumerate(zip(args.questions, predictions, strict=True)):
        by = f", asked {args.fallback_model}" if i in asked else ""
        if prediction.abstains:
            guess = "" if prediction.answer is None else f"; its guess would be {prediction.answer}"
            print(f"{question}  not sure enough (confidence {prediction.confidence:.3f}{by}{guess})")
        else:
            print(f"{question}  {prediction.answer}  (confidence {prediction.confidence:.3f}{by})")
        if args.show and prediction.completion is not None:
            print(f"    {prediction.completion}")


if __name__ == "__main__":
    sys.exit(cli_main(["answer", *sys.argv[1:]]))
