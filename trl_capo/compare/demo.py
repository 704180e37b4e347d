"""The demo: train GRPO and CAPO side by side from the same tiny base, in minutes on a CPU, and compare them.

Both are trained on the embedded arithmetic world with the same steps, prompts and seed, each on one thread. The base,
GRPO and CAPO answer the same held-out questions.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from trl_capo.compare.plan import BASE, Plan, recipe
from trl_capo.compare.runner import Run, check_runs, is_done, run_all
from trl_capo.errors import UserError
from trl_capo.files import replacing, write_json
from trl_capo.workers import num_cores


BENCHMARKS = ["arithmetic_test_2", "arithmetic_test_3", "arithmetic_test_4", "arithmetic_test_5"]
MODELS = (BASE, "grpo", "capo")


# Shared options, and options that define each method; also in `recipes/arithmetic/*/`. Tau was chosen on the
# validation split, with other seeds (`benchmarks/results/demo_tau.md`).
SHARED: dict[str, Any] = dict(
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
OWN: dict[str, dict[str, Any]] = {
    "grpo": dict(scale_rewards="none"),
    "capo": dict(tau=0.25, pair_normalization="group", ref_ppl_mask=False),
}
DATA: dict[str, Any] = dict(
    model_name_or_path="arithmetic-base",
    dtype="float32",
    dataset_name="arithmetic",
    reward_funcs=["accuracy_reward"],
)


def demo_plan(folder: Path, steps: int, seed: int, prompts: int, samples: int) -> Plan:
    """The demo as a plan of `trl-capo compare`."""
    return Plan(
        baseline="grpo",
        methods={method: {"method": method} | own for method, own in OWN.items()},
        train=DATA | SHARED | {"max_steps": steps},
        benchmarks=BENCHMARKS,
        seeds=[seed],
        evaluate=dict(
            num_prompts=prompts,
            num_samples=samples,
            max_new_tokens=SHARED["max_completion_length"],
            seed=seed,
            engine="transformers",
        ),
        output_dir=str(folder),
    )


def demo_runs(plan: Plan) -> list[Run]:
    """The plan's runs, in a layout for users: models and evaluations by name, everything else in `logs/`."""
    folder, runs = Path(plan.output_dir), []
    for name in [*plan.methods, BASE]:
        trained = name != BASE
        model = str(folder / name) if trained else plan.train["model_name_or_path"]
        runs.append(
            Run(
                name=name.upper() if trained else name,
                folder=folder / "logs" / name,
                recipe=recipe(plan, name, plan.seeds[0], model) if trained else None,
                model=model,
                evaluation=folder / "evaluation" / name,
                benchmarks=plan.benchmarks,
                options=plan.evaluate,
            )
        )
    return runs


def run(plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Do the missing training and evaluation, and write `results.json`.

    Args:
        plan: From `demo_plan`.
        settings: The user's options, to be recorded.

    Returns:
        The content of `results.json`.
    """
    runs, folder = demo_runs(plan), Path(plan.output_dir)
    check_runs(runs)
    # One thread each: the model is too small to benefit from more.
    share = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    failed = run_all(runs, [share] * min(len(runs), num_cores()), title="demo")
    if failed:
        raise UserError("some runs failed; see the end of their logs: " + ", ".join(map(str, failed)))
    if unfinished := [run.name for run in runs if not is_done(run)]:
        raise UserError(f"{folder}: another process is working on {', '.join(unfinished)}. Wait for it, then rerun.")
    results = {
        "settings": settings,
        "models": {name: _read(folder / "evaluation" / name / "summary.json")["benchmarks"] for name in MODELS},
        "training": {method: _history(folder / method) for method in plan.methods},
    }
    write_json(folder / "results.json", results)
    return results


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _history(model: Path) -> list[dict]:
    history = [entry for entry in _read(model / "trainer_state.json")["log_history"] if "capo/auc_within" in entry]
    if not history:
        raise RuntimeError(f"{model}: the training logged nothing. Delete the folder and rerun.")
    return history


def draw(folder: Path, training: dict[str, list[dict]]) -> None:
    """Write `report.html` and `results.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from trl_capo.evaluation.samples import read_samples
    from trl_capo.report.figures import draw_precision_coverage, draw_training
    from trl_capo.report.page import write_report

    runs = {model: read_samples(folder / "evaluation" / model) for model in MODELS}
    write_report(runs, folder / "report.html", histories=training)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    draw_training(axes[:2], training, MODELS)
    draw_precision_coverage(axes[2], {model: sets[1] for model, sets in runs.items()})
    axes[2].set_title(f"{axes[2].get_title()}, {BENCHMARKS[1]}", fontsize=11)
    with replacing(folder / "results.png") as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def what_to_look_at(results: dict[str, Any], folder: Path) -> str:
    """A message with the differences and the files to look at."""
    lines = ["", "CAPO minus GRPO, one seed:"]
    for benchmark in BENCHMARKS:
        grpo, capo = (results["models"][model][benchmark] for model in ("grpo", "capo"))
        gap = {
            name: "undefined" if None in (capo[name], grpo[name]) else f"{capo[name] - grpo[name]:+.3f}"
            for name in ("auc_within", "accuracy")
        }
        lines.append(f"  {benchmark}: AUC within {gap['auc_within']}, accuracy {gap['accuracy']}")
    command = "trl-capo" if shutil.which("trl-capo") else os.path.relpath(Path(sys.executable).parent / "trl-capo")
    seed = results["settings"]["seed"] + 1
    lines.append(
        f"""
Look at {folder}/results.png, and at the columns AUC within and precision. At about the same accuracy, a higher value
means that you can rely more on the answers the model is sure of. One seed proves nothing, so repeat with another.
Open {folder}/report.html in a browser for intervals, more figures, and the answers themselves.
All numbers: {folder}/results.json. All samples: {folder}/evaluation/

Next steps:
  {command} demo --output_dir runs/demo-{seed} --seed {seed}
  {command} train --config recipes/arithmetic/capo/config_demo.yaml     the same CAPO run from a recipe
  {command} train --help                                                your own model and data
How it works: docs/method.md. Every logged number: docs/metrics.md."""
    )
    return "\n".join(lines)
