"""`trl-capo demo`: GRPO and CAPO side by side from the same tiny base, in minutes on a CPU.

Both are trained on the embedded arithmetic world with the same steps, prompts and seed, as two processes of one thread
each. Then base, GRPO and CAPO answer the same held-out prompts, and a table, `results.json` and `results.png` compare
how often they are right with how well their confidence tells right from wrong.

Stopped at any point, the same command goes on where it was.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from trl_capo.cli import main as cli_main


TEST_SPLITS = ("test_2", "test_3", "test_4", "test_5")
MODELS = ("base", "grpo", "capo")
COLUMNS = {
    "accuracy": "accuracy\nmean@N",
    "auc_within": "AUC\nwithin",
    "auc_pooled": "AUC\npooled",
    "majority": "majority\nvote@N",
    "perplexity_consistency": "PC@N",
    "precision_at_50": "precision\n@50%",
    "precision_at_80": "precision\n@80%",
    "ppl_correct": "perplexity\nright",
    "ppl_wrong": "perplexity\nwrong",
}


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
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the demo draws a figure and needs matplotlib: pip install 'trl-capo[report]'.")
    folder = Path(args.output_dir)
    _remember_settings(folder, vars(args))
    print(f"Training GRPO and CAPO from the shipped base, {args.steps} steps each, into {folder}/ ...")
    _in_processes(_train, [(method, folder, args.steps, args.seed) for method in ("grpo", "capo")])
    print(f"Sampling {args.prompts} held-out prompts x {args.samples} of {len(TEST_SPLITS)} splits ...")
    _in_processes(_evaluate, [(model, folder, args.prompts, args.samples, args.seed) for model in MODELS])

    results = {
        "settings": vars(args),
        "splits": {
            split: {model: _read(folder, f"evaluation/{model}.json")["splits"][split]["summary"] for model in MODELS}
            for split in TEST_SPLITS
        },
        "training": {method: _read(folder, f"{method}/history.json") for method in ("grpo", "capo")},
    }
    _write(folder / "results.json", results)
    _print_table(results["splits"], args.samples)
    _draw(folder, results["training"])
    _say_what_to_look_at(results, folder)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _remember_settings(folder: Path, settings: dict) -> None:
    """A folder holds one demo: finished parts are not done again, so they must be of the same settings."""
    from trl_capo.checks import check_output_dir

    check_output_dir(str(folder))
    path = folder / "settings.json"
    settings = {name: value for name, value in settings.items() if name != "output_dir"}
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{folder} holds a demo with other settings, {json.loads(path.read_text())}. Repeat those, choose another "
            "--output_dir, or remove the folder."
        )
    _write(path, settings)


def _in_processes(function: Callable, jobs: list[tuple]) -> None:
    """One job a core, one thread each: this model is too small for more threads to help."""
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    lock = context.RLock()  # keeps the progress bars of the jobs from overwriting each other
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, initializer=tqdm.set_lock, initargs=(lock,)) as pool:
        for future in [pool.submit(function, position, *job) for position, job in enumerate(jobs)]:
            future.result()


def _train(position: int, method: str, folder: Path, steps: int, seed: int) -> None:
    if (folder / method / "history.json").exists():
        return
    import torch
    from transformers import PrinterCallback, ProgressCallback
    from trl.rewards import accuracy_reward

    from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer
    from trl_capo.checkpoints import last_complete_checkpoint
    from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
    from trl_capo.progress import RunProgress

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
    _write(folder / method / "history.json", history)  # last: it says that the run is complete


def _evaluate(position: int, model: str, folder: Path, num_prompts: int, num_samples: int, seed: int) -> None:
    path = folder / "evaluation" / f"{model}.json"
    if path.exists():
        return
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_capo.calibration.metrics import precision_coverage
    from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
    from trl_capo.evaluation.grade import grade_samples
    from trl_capo.evaluation.sample import sample_completions
    from trl_capo.evaluation.summary import summarize

    be_quiet()
    torch.set_num_threads(1)
    source = str(BASE_MODEL if model == "base" else folder / model)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    splits, all_correct, all_logps = {}, [], []
    for split in tqdm(TEST_SPLITS, desc=f"{model.upper():5}", unit="split", position=position):
        data = arithmetic_dataset(split, num_prompts)
        samples = sample_completions(
            policy,
            tokenizer,
            data["prompt"],
            num_samples=num_samples,
            max_new_tokens=training_options("grpo", 1, seed)["max_completion_length"],
            seed=seed,
            progress=False,
        )
        answers, correct = grade_samples(samples, data["solution"], progress=False)
        splits[split] = {"summary": summarize(correct, samples.mean_logps, answers)}
        all_correct.append(correct)
        all_logps.append(samples.mean_logps)
    coverage, precision = precision_coverage(np.concatenate(all_correct), np.concatenate(all_logps))
    points = np.unique(np.linspace(0, len(coverage) - 1, 400).astype(int))
    curve = {"coverage": coverage[points].tolist(), "precision": precision[points].tolist()}
    path.parent.mkdir(exist_ok=True)
    _write(path, {"splits": splits, "precision_coverage": curve})


def be_quiet() -> None:
    """Keeps the libraries' own messages and bars away from ours."""
    import warnings

    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _write(path: Path, content) -> None:
    """All or nothing: a demo that is stopped while it writes leaves no half file behind."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def _read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def _print_table(splits: dict, num_samples: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out prompts", header_style="bold")
    table.add_column("split")
    table.add_column("model")
    for header in COLUMNS.values():
        table.add_column(header.replace("N", str(num_samples)), justify="right")
    for split, models in splits.items():
        for model, summary in models.items():
            first = split if model == MODELS[0] else ""
            values = [f"{summary[name]:.3f}" for name in COLUMNS]
            table.add_row(first, model.upper() if model != "base" else model, *values, end_section=model == MODELS[-1])
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        "AUC within: how often, of a right and a wrong answer to one prompt, the right one has the higher mean "
        "log-prob.\nAUC pooled: the same over all prompts. PC: Perplexity Consistency. "
        "precision@50%: accuracy of the surest half.",
        highlight=False,
    )


def _draw(folder: Path, training: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"base": "#7f7f7f", "grpo": "#d55e00", "capo": "#0072b2"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, metric, title in (
        (axes[0], "capo/auc_within", "AUC within prompts, fresh training prompts"),
        (axes[1], "reward", "accuracy, fresh training prompts"),
    ):
        for method, history in training.items():
            points = [(entry["step"], entry[metric]) for entry in history if entry[metric] is not None]
            axis.plot(*zip(*points, strict=True), color=colors[method], label=method.upper(), linewidth=2)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
    for model in MODELS:
        curve = _read(folder, f"evaluation/{model}.json")["precision_coverage"]
        label = model.upper() if model != "base" else model
        axes[2].plot(curve["coverage"], curve["precision"], color=colors[model], label=label, linewidth=2)
    axes[2].set_title("precision of the surest samples, held out")
    axes[2].set_xlabel("coverage: share of all samples that is answered")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(folder / "results.png", dpi=110)
    plt.close(figure)


def _say_what_to_look_at(results: dict, folder: Path) -> None:
    print("\nCAPO minus GRPO, one seed:")
    for split, models in results["splits"].items():
        gap = {name: models["capo"][name] - models["grpo"][name] for name in ("auc_within", "accuracy")}
        print(f"  {split}: AUC within {gap['auc_within']:+.3f}, accuracy {gap['accuracy']:+.3f}")
    command = "trl-capo" if shutil.which("trl-capo") else os.path.relpath(Path(sys.executable).parent / "trl-capo")
    seed = results["settings"]["seed"] + 1
    print(
        f"""
What to look at: {folder}/results.png, and the columns AUC within and precision: at about the same accuracy, a higher
value means that you can rely more on the answers the model is sure of. One seed proves nothing: repeat with another.
All numbers: {folder}/results.json

What to type next:
  {command} demo --output_dir runs/demo-{seed} --seed {seed}
  {command} train --config recipes/arithmetic/capo/config_demo.yaml     the same CAPO run from a recipe
  {command} train --help                                                your own model and data
How it works: docs/method.md. Every logged number: docs/metrics.md."""
    )


if __name__ == "__main__":
    sys.exit(cli_main(["demo", *sys.argv[1:]]))
