"""`trl-capo demo`: GRPO and CAPO side by side from the same tiny base, in minutes on a CPU.

Both are trained on the embedded arithmetic world with the same steps, prompts and seed, as two processes of one thread
each. Then base, GRPO and CAPO answer the same held-out prompts as `trl-capo evaluate` would have them, and a table,
`results.json`, `results.png` and `report.html` compare how often they are right with how well their confidence tells
right from wrong.

Stopped at any point, the same command goes on where it was.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.extras import require
from trl_capo.files import remember_settings, replacing, write_json
from trl_capo.processes import end_with_parent
from trl_capo.workers import num_cores


BENCHMARKS = ("arithmetic_test_2", "arithmetic_test_3", "arithmetic_test_4", "arithmetic_test_5")
MODELS = ("base", "grpo", "capo")


def training_options(method: str, steps: int, seed: int) -> dict:
    """Options of a run, the same for both methods but for what defines them; also `recipes/arithmetic/*/`.

    Tau was chosen on the validation split, with other seeds (`benchmarks/results/demo_tau.md`).
    """
    options = dict(
        max_steps=steps,
        seed=seed,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=56,
        loss_type="grpo",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=10,
        save_strategy="steps",
        save_steps=20,
        save_total_limit=1,
        report_to="none",
    )
    if method == "grpo":
        return options | dict(scale_rewards="none")
    return options | dict(tau=0.25, pair_normalization="group", ref_ppl_mask=False)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="runs/demo", help="where everything goes (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=80, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of both runs (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=_positive, default=400, help="prompts a held-out split (default: %(default)s)"
    )
    parser.add_argument("--samples", type=_positive, default=16, help="samples a prompt (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate, compare."""
    args = make_parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the Hub
    require("report")
    from trl_capo.preflight.checks import check_output_dir

    folder = Path(args.output_dir)
    check_output_dir(str(folder))
    remember_settings(folder, {name: value for name, value in vars(args).items() if name != "output_dir"}, "a demo")
    print(f"Training GRPO and CAPO from the shipped base, {args.steps} steps each, into {folder}/ ...")
    _in_processes(_train, [(method, folder, args.steps, args.seed) for method in ("grpo", "capo")])
    print(f"Sampling {args.prompts} held-out prompts x {args.samples} of {len(BENCHMARKS)} splits ...")
    _in_processes(_evaluate, [(model, folder, args.prompts, args.samples, args.seed) for model in MODELS])

    from trl_capo.evaluation.summary import print_summaries

    results = {
        "settings": vars(args),
        "models": {model: _read(folder, f"evaluation/{model}/summary.json")["benchmarks"] for model in MODELS},
        "training": {method: _read(folder, f"{method}/history.json")["history"] for method in ("grpo", "capo")},
    }
    write_json(folder / "results.json", results)
    print_summaries(results["models"])
    _draw(folder, results["training"])
    _say_what_to_look_at(results, folder)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _in_processes(function: Callable, jobs: list[tuple]) -> None:
    """One job a core, one thread each: this model is too small for more threads to help."""
    context = multiprocessing.get_context("spawn")
    lock = context.RLock()  # keeps the progress bars of the jobs from overwriting each other
    workers, others = min(len(jobs), num_cores()), set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(lock, os.getpid())) as pool:
        try:
            for future in [pool.submit(function, position, *job) for position, job in enumerate(jobs)]:
                future.result()
        except BaseException:  # or the executor would let the others end their jobs first
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


def _start_worker(lock, parent: int) -> None:
    from tqdm import tqdm

    tqdm.set_lock(lock)
    end_with_parent(parent)


def _is_trained(folder: Path) -> bool:
    """Whether a run wrote its last file, `history.json`, and its weights are still those that it names."""
    try:
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        return history["weights"] == _weights(folder) != {}
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return False


def _weights(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _train(position: int, method: str, folder: Path, steps: int, seed: int) -> None:
    if _is_trained(folder / method):
        return
    import torch
    from transformers import PrinterCallback, ProgressCallback
    from trl.rewards import accuracy_reward

    from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer
    from trl_capo.compare.progress import RunProgress
    from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
    from trl_capo.trainer.checkpoints import last_complete_checkpoint

    be_quiet()
    torch.set_num_threads(1)
    output_dir = str(folder / method)
    trainer_class, config_class = {
        "grpo": (GroupAdvantageTrainer, GroupAdvantageConfig),
        "capo": (CAPOTrainer, CAPOConfig),
    }[method]
    trainer = trainer_class(
        str(BASE_MODEL),
        accuracy_reward,
        config_class(output_dir, disable_tqdm=True, **training_options(method, steps, seed)),
        arithmetic_dataset("train"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RunProgress(method.upper(), position))
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
    trainer.save_model(output_dir)
    history = [entry for entry in trainer.state.log_history if "capo/auc_within" in entry]
    if not history:
        raise RuntimeError(f"{output_dir}: the training logged nothing. Delete the folder and start again.")
    record = {"weights": _weights(folder / method), "history": history}
    write_json(folder / method / "history.json", record)  # last: it says that the run is complete


def _evaluate(position: int, model: str, folder: Path, num_prompts: int, num_samples: int, seed: int) -> None:
    import torch
    from accelerate import PartialState

    from trl_capo.data.benchmarks import load_benchmark
    from trl_capo.evaluation.run import evaluate

    be_quiet()
    torch.set_num_threads(1)
    evaluate(
        "arithmetic-base" if model == "base" else str(folder / model),
        folder / "evaluation" / model,
        {name: load_benchmark(name, num_prompts) for name in BENCHMARKS},
        PartialState(cpu=True),
        num_samples=num_samples,
        max_new_tokens=training_options("grpo", 1, seed)["max_completion_length"],
        temperature=1.0,
        seed=seed,
        statistics=False,
        position=position,
    )


def be_quiet() -> None:
    """Keeps the libraries' own messages and bars away from ours."""
    import warnings

    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def _draw(folder: Path, training: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_capo.evaluation.samples import read_samples
    from trl_capo.report.figures import draw_precision_coverage, draw_training
    from trl_capo.report.page import write_report

    runs = {model: read_samples(folder / "evaluation" / model) for model in MODELS}
    print("Writing the report ...")
    write_report(runs, folder / "report.html", histories=training)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    draw_training(axes[:2], training, MODELS)
    draw_precision_coverage(axes[2], {model: sets[1] for model, sets in runs.items()})
    axes[2].set_title(f"{axes[2].get_title()}, {BENCHMARKS[1]}", fontsize=11)
    with replacing(folder / "results.png") as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def _say_what_to_look_at(results: dict, folder: Path) -> None:
    print("\nCAPO minus GRPO, one seed:")
    for benchmark in BENCHMARKS:
        grpo, capo = (results["models"][model][benchmark] for model in ("grpo", "capo"))
        gap = {
            name: "undefined" if None in (capo[name], grpo[name]) else f"{capo[name] - grpo[name]:+.3f}"
            for name in ("auc_within", "accuracy")
        }
        print(f"  {benchmark}: AUC within {gap['auc_within']}, accuracy {gap['accuracy']}")
    command = "trl-capo" if shutil.which("trl-capo") else os.path.relpath(Path(sys.executable).parent / "trl-capo")
    seed = results["settings"]["seed"] + 1
    print(
        f"""
What to look at: {folder}/results.png, and the columns AUC within and precision: at about the same accuracy, a higher
value means that you can rely more on the answers the model is sure of. One seed proves nothing: repeat with another.
{folder}/report.html has intervals, more figures, and the answers themselves: open it in a browser.
All numbers: {folder}/results.json. All samples: {folder}/evaluation/

What to type next:
  {command} demo --output_dir runs/demo-{seed} --seed {seed}
  {command} train --config recipes/arithmetic/capo/config_demo.yaml     the same CAPO run from a recipe
  {command} train --help                                                your own model and data
How it works: docs/method.md. Every logged number: docs/metrics.md."""
    )


if __name__ == "__main__":
    sys.exit(cli_main(["demo", *sys.argv[1:]]))
