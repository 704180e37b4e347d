"""The options of `trl-capo evaluate`, for the command and for plans that contain them."""

import argparse

from trl_capo.errors import UserError


# Those that `load_benchmark` takes.
READING = ("prompt_column", "solution_column", "system_prompt", "prompt_template", "text_answers")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-capo evaluate",
        description="`trl-capo evaluate`: sample answers to held-out questions, grade them, and measure how far their "
        "confidence can be trusted.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", help="folders, names on the Hub, or a shipped arithmetic base")
    parser.add_argument(
        "--benchmark", nargs="+", required=True, help="names, or files with questions and gold answers"
    )
    parser.add_argument("--num_samples", type=int, default=16, help="completions per question (default: %(default)s)")
    parser.add_argument(
        "--num_prompts", type=int, help="use only this number of questions from the start of each benchmark"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens", type=int, help="longest completion (default: 3000; arithmetic, chain_sum and family: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument(
        "--statistics", action="store_true", help="also compute self-certainty and DeepConf's confidences"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "transformers", "vllm"),
        default="auto",
        help="auto: vLLM if it is installed and a GPU is available",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="completions decoded together (transformers)")
    parser.add_argument("--dtype", default="auto", help="data type of the weights (default: as stored)")
    parser.add_argument("--prompt_column", default="prompt", help="column with the questions, for a file")
    parser.add_argument("--solution_column", default="solution", help="column with the gold answers, for a file")
    parser.add_argument("--system_prompt", help="system message before questions that are plain text")
    parser.add_argument(
        "--prompt_template", help="template, instead of a system prompt: qwen25-math-cot, qwen-boxed or step-by-step"
    )
    parser.add_argument(
        "--normalize_operators", action="store_true", help=r"accept \frac13, 2\sqrt3 and \boxed 7 in answers"
    )
    parser.add_argument(
        "--text_answers", action="store_true", help=r"answers are words (\boxed{Yes}): compare as text, in any case"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        metavar="JSON",
        help="variables of the chat template, e.g. '{\"enable_thinking\": false}' (default: those used in training)",
    )
    parser.add_argument("--output_dir", default="runs/evaluation", help="folder for all output (default: %(default)s)")
    parser.add_argument("--names", nargs="+", help="subfolder for each model (default: the last part of its path)")
    return parser


def check_sampling(args: argparse.Namespace) -> None:
    """Refuse numbers that no evaluation can use.

    Raises:
        ValueError: A number is out of range. The message names the option and its value.
    """
    for name in ("num_samples", "num_prompts", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if not args.temperature > 0:
        raise UserError(f"--temperature must be positive, got {args.temperature}. Use 0.01 for nearly greedy samples.")
