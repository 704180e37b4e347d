"""How tau of the demo was chosen: GRPO and CAPO at several tau, judged on the validation split, with other seeds.

    python benchmarks/demo_tau.py

The rule: of the values that on average lose at most one point of accuracy to GRPO, the one with the highest AUC within
prompts. Same base, steps and batches as `trl-capo demo`. Each finished run is added to
`benchmarks/results/demo_tau.json` at once and not repeated; the table is `benchmarks/results/demo_tau.md`. About 4
minutes a run on one core, two at a time.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from tqdm import tqdm


RESULTS = Path(__file__).parent / "results" / "demo_tau.json"
MEASURED = ("accuracy", "auc_within", "auc_pooled", "majority", "perplexity_consistency")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--taus", type=float, nargs="+", default=[0.15, 0.25, 0.4], help="values of tau, in nats")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11], help="training seeds")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--prompts", type=int, default=800, help="validation prompts, 16 samples each")
    return parser


def run(tau: float | None, seed: int, steps: int, prompts: int) -> dict:
    """Train (tau None: GRPO) and measure on the validation split."""
    import torch
    from trl.rewards import accuracy_reward

    from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer
    from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
    from trl_capo.evaluation.grade import grade_samples
    from trl_capo.evaluation.sampling import sample_completions
    from trl_capo.evaluation.summary import summarize
    from trl_capo.scripts.demo import be_quiet, training_options

    be_quiet()
    torch.set_num_threads(1)
    options = training_options("grpo" if tau is None else "capo", steps, seed) | dict(save_strategy="no")
    with tempfile.TemporaryDirectory() as folder:
        if tau is None:
            trainer_class, config = GroupAdvantageTrainer, GroupAdvantageConfig(folder, disable_tqdm=True, **options)
        else:
            trainer_class, config = CAPOTrainer, CAPOConfig(folder, disable_tqdm=True, **(options | dict(tau=tau)))
        trainer = trainer_class(str(BASE_MODEL), accuracy_reward, config, arithmetic_dataset("train"))
        trainer.train()
    data = arithmetic_dataset("validation", prompts)
    samples = sample_completions(
        trainer.model, trainer.processing_class, data["prompt"], max_new_tokens=56, seed=seed, progress=False
    )
    answers, correct = grade_samples(samples, data["solution"], progress=False)
    summary = summarize(correct, samples.mean_logps, answers)
    return dict(tau=tau, seed=seed, steps=steps, prompts=prompts) | {name: summary[name] for name in MEASURED}


def main() -> None:
    args = make_parser().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(r["tau"], r["seed"], r["steps"], r["prompts"]) for r in results}
    wanted = [(tau, seed, args.steps, args.prompts) for tau in [None, *args.taus] for seed in args.seeds]
    jobs = [job for job in wanted if job not in done]
    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            results.append(future.result())
            RESULTS.write_text(json.dumps(results, indent=1))
    rows = [r for r in results if (r["tau"], r["seed"], r["steps"], r["prompts"]) in wanted]
    table = write_table(rows, args)
    RESULTS.with_suffix(".md").write_text(table)
    print(table)


def write_table(rows: list[dict], args: argparse.Namespace) -> str:
    lines = [
        "# Choosing tau of the demo",
        "",
        f"`python benchmarks/demo_tau.py`, {date.today()}, {platform.machine()} CPU, two runs at a time on one core "
        f"each. {args.steps} steps, validation split, {args.prompts} prompts x 16 samples.",
        "",
        "Rule: of the values that on average lose at most one point of accuracy to GRPO, the one with the highest AUC "
        "within prompts.",
        "",
        "| method | seed | " + " | ".join(MEASURED) + " |",
        "|---|---|" + "---|" * len(MEASURED),
    ]
    for row in sorted(rows, key=lambda row: (row["tau"] or 0, row["seed"])):
        method = "GRPO" if row["tau"] is None else f"CAPO, tau {row['tau']}"
        lines.append(f"| {method} | {row['seed']} | " + " | ".join(f"{row[name]:.3f}" for name in MEASURED) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
