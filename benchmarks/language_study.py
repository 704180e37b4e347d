"""Does CAPO do with a real language model what it does with a tiny one? SmolLM2-135M on a task in plain English.

    python -m trl_capo.scripts.language_base --task chain_sum --output_dir runs/smollm2-chain_sum
    python benchmarks/language_study.py --task chain_sum                 # all methods, three seeds
    python benchmarks/language_study.py --task chain_sum --report        # results/language/chain_sum.md, .json, .png

All runs start from one base and share prompts, rewards, options and seeds; only the method differs. A run trains for
`--steps` generations of 8 prompts x 8 completions, then samples 300 held-out questions 16 times at temperature 1.

Each finished run leaves `<task>/<method>-<seed>.json` (numbers) and `.npz` (outcomes of every prompt) in
`benchmarks/results/language/` and is not repeated. Rerun the same command to resume: an interrupted run continues from
its last checkpoint, in `runs/language_study/`. No run starts after `--minutes`.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trl_capo.data.language import TASKS
from trl_capo.files import replacing, write_json


RESULTS = Path(__file__).parent / "results" / "language"
CHECKPOINTS = Path("runs/language_study")
NUM_PROMPTS, NUM_SAMPLES, SAVE_EVERY = 300, 16, 10
SHARED = dict(
    per_device_train_batch_size=16,
    gradient_accumulation_steps=4,
    num_generations=8,
    max_completion_length=56,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    loss_type="grpo",
    generation="compact",
    mean_logps_from="sampler",
    bf16=False,
    gradient_checkpointing=False,
    logging_steps=1,
    save_total_limit=1,
    report_to="none",
    disable_tqdm=True,
)
CAPO = dict(tau=2.0, tau_unit="gap", pair_normalization="group")
MASK = dict(ref_ppl_mask=True, ref_ppl_quantiles=[0.05, 0.95])
# By name: the method in `trl-capo train`, its options, and its updates for each generation.
METHODS = {
    "grpo": ("grpo", dict(scale_rewards="group"), 1),
    "capo": ("capo", CAPO | dict(ref_ppl_mask=False), 1),
    "capo_mask": ("capo", CAPO | MASK, 1),
    "gspo": ("gspo", dict(gradient_accumulation_steps=1, steps_per_generation=4), 4),
}
BASE = "base"
NOT_OF_TRAINING = ("num_prompts", "num_samples", "base")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--base", help="folder of the base (default: runs/smollm2-TASK)")
    parser.add_argument("--methods", nargs="+", choices=[BASE, *METHODS], default=[BASE, *METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--steps", type=int, default=40, help="generations of 8 prompts x 8 completions")
    parser.add_argument("--num_prompts", type=int, default=NUM_PROMPTS, help="held-out questions")
    parser.add_argument("--minutes", type=float, default=300, help="start no run after this time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="on cpu one thread for each run")
    parser.add_argument("--workers", type=int, default=1, help="parallel runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--report", action="store_true", help="run nothing: table and figure of the finished runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    folder = args.output / args.task
    if args.report:
        from language_report import report

        return report(folder)
    base = args.base or f"runs/smollm2-{args.task}"
    if not (Path(base) / "model.safetensors").exists():
        raise SystemExit(
            f"{base} has no model. Make it: python -m trl_capo.scripts.language_base --task {args.task} "
            f"--output_dir {base}"
        )
    # Another machine's warm-up gives other weights, and runs from two bases must not be compared.
    with Path(base, "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    wanted = [
        (folder / f"{method}-{seed}.json", args.task, base, method, {**options_of(args, method, seed), "base": digest})
        for seed in args.seeds
        for method in args.methods
    ]
    jobs = [job for job in wanted if not is_done(job[0], job[-1])]
    deadline, failures = time.time() + 60 * args.minutes, []
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, *job, deadline): job[0].stem for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), desc=args.task, unit="run"):
            if future.exception():
                failures.append(f"{futures[future]}: {future.exception()!r}")
    print(
        f"{sum(job[0].exists() for job in wanted)} of {len(wanted)} runs are done, in {folder}.", *failures, sep="\n"
    )
    if failures:
        raise SystemExit(1)


def options_of(args: argparse.Namespace, method: str, seed: int) -> dict:
    """What determines a run besides its base: the options of training, if there is any, and of the evaluation."""
    options = dict(num_prompts=args.num_prompts, num_samples=NUM_SAMPLES, seed=seed, use_cpu=args.device == "cpu")
    if method == BASE:
        return options
    _, own, updates = METHODS[method]
    steps = dict(max_steps=args.steps * updates, save_strategy="steps", save_steps=SAVE_EVERY * updates)
    return SHARED | own | steps | options


def is_done(path: Path, options: dict) -> bool:
    """Whether the run exists; one with other options would be mistaken for it, so that is an error."""
    if not path.exists():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["options"] != options:
        raise SystemExit(
            f"{path} was made with other options or another base. Delete it to run it again, or choose another "
            "--output."
        )
    return True


def run(path: Path, task: str, base: str, method: str, options: dict, deadline: float) -> None:
    """Train, evaluate and save, unless it is too late to start."""
    if time.time() > deadline:
        return
    import torch
    from quiet import be_quiet
    from step_cost import cpu_name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_capo.publish.record import git_state

    be_quiet()
    if options["use_cpu"]:
        torch.set_num_threads(1)
    started, history = time.time(), []
    if method == BASE:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        model = model if options["use_cpu"] else model.cuda()
    else:
        model, tokenizer, history = train(path, task, base, method, options)
    trained = time.time()
    numbers, arrays = evaluate(model, tokenizer, task, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    summary = {
        "task": task,
        "method": method,
        "seed": options["seed"],
        "options": options,
        "numbers": numbers,
        "training": history,
        "seconds": {"training": round(trained - started), "evaluation": round(time.time() - trained)},
        "date": date.today().isoformat(),
        "hardware": f"{cpu_name()}, one thread of {os.cpu_count()}"
        if options["use_cpu"]
        else torch.cuda.get_device_name(),
        "package": git_state(Path(__file__).parent, tracked=Path(__file__).name),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "trl-capo", "reasoning-gym")},
    }
    write_json(path, summary)  # last, because it marks the run as complete
    shutil.rmtree(checkpoints(path), ignore_errors=True)


def checkpoints(path: Path) -> Path:
    return CHECKPOINTS / path.parent.name / path.stem


def train(path: Path, task: str, base: str, method: str, options: dict) -> tuple:
    """Train a method, from its last checkpoint if it was interrupted. Returns model, tokenizer and logged metrics."""
    from transformers import PrinterCallback

    from trl_capo.data.language import language_dataset
    from trl_capo.methods import trainer_of
    from trl_capo.rewards import accuracy_reward, text_reward

    trainer_class, folder = trainer_of(METHODS[method][0]), checkpoints(path)
    settings = {name: value for name, value in options.items() if name not in NOT_OF_TRAINING}
    trainer = trainer_class(
        base,
        accuracy_reward if TASKS[task].answers is None else text_reward,
        trainer_class.config_class(str(folder), **settings),
        language_dataset(task, "train"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True if any(folder.glob("checkpoint-*")) else None)
    return trainer.model, trainer.processing_class, trainer.state.log_history


def evaluate(model, tokenizer, task: str, options: dict) -> tuple[dict, dict]:
    """Sample held-out questions. Returns the numbers, and each prompt's outcomes as compact arrays."""
    from trl_capo.calibration.metrics import auc_by_prompt, coverage_at_precision
    from trl_capo.data.language import language_dataset
    from trl_capo.evaluation.grade import grade_samples
    from trl_capo.evaluation.sampling import sample_completions
    from trl_capo.evaluation.summary import summarize

    data = language_dataset(task, "test", options["num_prompts"])
    samples = sample_completions(
        model,
        tokenizer,
        list(data["prompt"]),
        num_samples=options["num_samples"],
        max_new_tokens=SHARED["max_completion_length"],
        batch_size=64,
        seed=options["seed"],
        progress=False,
    )
    answers, correct = grade_samples(
        samples, data["solution"], text_answers=TASKS[task].answers is not None, progress=False
    )
    numbers = summarize(correct, samples.mean_logps, answers) | {
        "coverage_at_90": coverage_at_precision(correct, samples.mean_logps, precision=0.9),
        "frac_mixed": float(np.mean((correct.mean(1) > 0) & (correct.mean(1) < 1))),
        "length": float(samples.lengths.mean()),
    }
    arrays = {
        "correct": correct.astype(np.float32),
        "mean_logps": samples.mean_logps.astype(np.float32),
        "auc": auc_by_prompt(correct, samples.mean_logps).astype(np.float32),
    }
    return numbers, arrays


if __name__ == "__main__":
    main()
