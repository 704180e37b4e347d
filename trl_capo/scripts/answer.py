"""`trl-capo answer`: ask a model; it samples, chooses, and says when it is not sure enough.

    trl-capo answer runs/capo "63*15-43="
    trl-capo answer runs/capo "63*15-43=" --fallback_model runs/larger

The threshold is the one that `trl-capo abstain` saved beside the model. A question below it goes to the fallback
model, if there is one.
"""

import argparse
import sys

from trl_capo.cli import main as cli_main
from trl_capo.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo answer", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder, name on the Hub, arithmetic-base or arithmetic-flat")
    parser.add_argument("questions", nargs="+", help="what to ask")
    parser.add_argument("--fallback_model", help="who is asked where the model abstains")
    parser.add_argument("--num_samples", type=int, help="samples a question (default: those of the threshold, or 16)")
    parser.add_argument("--max_new_tokens", type=int, help="longest completion (default: the threshold's, or 3000)")
    parser.add_argument("--temperature", type=float, help="of the sampler (default: the threshold's, or 1)")
    parser.add_argument("--system_prompt", help="system message (default: the threshold's, or none)")
    parser.add_argument(
        "--chat_template_kwargs", metavar="JSON", help="variables of the chat template (default: the threshold's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="also the surest completion with the answer")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Ask, and ask the fallback where needed."""
    args = make_parser().parse_args(argv)
    from trl_capo.models.chat_templates import read_kwargs

    if empty := [question for question in args.questions if not question.strip()]:
        raise UserError(f"a question is empty: {empty[0]!r}. Ask something, or leave it out.")
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
            f"{args.model} has no abstention.json: it answers everything. See trl-capo abstain --help.",
            file=sys.stderr,
        )
    fallback = None
    if args.fallback_model is not None:
        fallback = SelectivePredictor.from_pretrained(args.fallback_model, num_samples=args.num_samples, **options)
    predictions, asked = predictor.predict_or_ask(fallback, args.questions, seed=args.seed)
    for i, (question, said) in enumerate(zip(args.questions, predictions, strict=True)):
        by = f", asked {args.fallback_model}" if i in asked else ""
        if said.abstains:
            guess = "" if said.answer is None else f"; its guess would be {said.answer}"
            print(f"{question}  not sure enough (confidence {said.confidence:.3f}{by}{guess})")
        else:
            print(f"{question}  {said.answer}  (confidence {said.confidence:.3f}{by})")
        if args.show and said.completion is not None:
            print(f"    {said.completion}")


if __name__ == "__main__":
    sys.exit(cli_main(["answer", *sys.argv[1:]]))
