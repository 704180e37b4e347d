"""Train the base model of the arithmetic world from scratch.

    python -m trl_capo.scripts.arithmetic_base --output_dir trl_capo/assets/arithmetic-base
    python -m trl_capo.scripts.arithmetic_base --output_dir trl_capo/assets/arithmetic-flat --world flat
    python -m trl_capo.scripts.arithmetic_base --output_dir trl_capo/assets/arithmetic-misconceptions \\
        --world misconceptions

Trains in two supervised stages, on prompts that reinforcement learning and evaluation never see: first on clean
answers, so that the model knows sums and half knows products; then on human-like answers with slips and free
separators (see `trl_capo.data.arithmetic`). Takes about 7 minutes on one core; the third, which continues from the
second, takes two. Prints accuracy and how well confidence ranks answers. With `--num_eval_prompts 400`, the first
shipped model gave

    validation   accuracy 0.296   AUC within prompts 0.624   pooled 0.810   mixed prompts 0.71
    test_2       accuracy 0.416   AUC within prompts 0.653   pooled 0.799   mixed prompts 0.81
    test_3       accuracy 0.208   AUC within prompts 0.567   pooled 0.770   mixed prompts 0.65
    test_4       accuracy 0.136   AUC within prompts 0.591   pooled 0.783   mixed prompts 0.54
    test_5       accuracy 0.091   AUC within prompts 0.566   pooled 0.766   mixed prompts 0.47
"""

import argparse
from pathlib import Path

from trl_capo.worlds.arithmetic_base import HUMAN_STEPS, build, reports


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--clean_steps", type=int, default=1800, help="steps on clean answers")
    parser.add_argument("--human_steps", type=int, help="steps on human-like answers (default: the shipped model's)")
    parser.add_argument(
        "--world",
        choices=list(HUMAN_STEPS),
        default="slips",
        help="what makes answers wrong; see trl_capo.data.arithmetic",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="answers per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate of the first stage")
    parser.add_argument("--num_eval_prompts", type=int, default=100, help="prompts per split in the final report")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train, save and report."""
    options = vars(make_parser().parse_args(argv))
    num_prompts = options.pop("num_eval_prompts")
    model, tokenizer = build(**options)
    for line in reports(model, tokenizer, num_prompts):
        print(line, flush=True)


if __name__ == "__main__":
    main()
