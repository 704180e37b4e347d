"""`trl-capo compare`: train several methods from one base, evaluate them alike, and say which differences are sure.

    trl-capo compare recipes/arithmetic/compare.yaml
    trl-capo compare recipes/arithmetic/compare.yaml --methods capo --seeds 0 1 --minutes 80    # a part of it

The YAML names what all share, what each method changes, the seeds, the benchmarks, and the one configuration that the
others are compared with, which is to be chosen beforehand. Each run is a `trl-capo train` and a `trl-capo evaluate` in
a folder of its own: stopped at any point, the same command goes on; a run that fails is named and leaves the others
alone. What is there is then compared in `comparison.md`, `comparison.json`, `comparison.png` and `report.html`.
"""

import argparse
import fcntl
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from trl_capo.cli import main as cli_main
from trl_capo.extras import require
from trl_capo.folders import remember_settings, write_json


BASE = "base"


@dataclass(frozen=True)
class Plan:
    """What is compared: the content of the YAML.

    Attributes:
        baseline: The method that the others are compared with.
        methods: Options of `trl-capo train` by name of the configuration; each names its `method`.
        train: Options that all share.
        benchmarks: What `trl-capo evaluate` takes.
        seeds: Of the trainings; the evaluation draws the same random numbers for all.
        evaluate: Further options of `trl-capo evaluate`.
        output_dir: Where everything goes.
    """

    baseline: str
    methods: dict[str, dict]
    train: dict
    benchmarks: list[str]
    seeds: list[int]
    evaluate: dict = field(default_factory=dict)
    output_dir: str = "runs/compare"


def read_plan(path: str) -> Plan:
    """Read and check the YAML.

    Raises:
        ValueError: A key or a method is missing or unknown, or an option that `trl-capo train` does not know.
    """
    from trl_capo.data.benchmarks import load_benchmark
    from trl_capo.scripts import evaluate
    from trl_capo.scripts.train import METHODS, check_recipe_keys, make_parser

    content = yaml.safe_load(Path(path).read_text())
    known = [f.name for f in fields(Plan)]
    if not isinstance(content, dict) or set(content) - set(known) or set(known[:5]) - set(content):
        raise ValueError(f"{path} must hold {', '.join(known[:5])} and may hold {', '.join(known[5:])}, nothing else.")
    plan = Plan(**content)
    if plan.baseline not in plan.methods or BASE in plan.methods:
        raise ValueError(
            f"{path}: baseline must be one of {', '.join(plan.methods)}, and no method may be called {BASE!r}, which "
            "is the model that all start from."
        )
    if "model_name_or_path" not in plan.train or len(set(plan.seeds)) < len(plan.seeds):
        raise ValueError(f"{path}: train needs a model_name_or_path, and no seed may be named twice.")
    for name, options in plan.methods.items():
        method = (options or {}).get("method")
        if method not in METHODS:
            raise ValueError(f"{path}: {name} needs a `method` of {', '.join(METHODS)}, got {method!r}.")
        check_recipe_keys(f"{path}, {name}", plan.train | options, make_parser(method), method)
    evaluate.make_parser().parse_args(["model", *_evaluation_options(plan.benchmarks, plan.evaluate)])
    for benchmark in plan.benchmarks:
        load_benchmark(benchmark, plan.evaluate.get("num_prompts"))
    return plan


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("plan", help="YAML with baseline, methods, train, benchmarks and seeds")
    parser.add_argument("--methods", nargs="+", help="run only these of its methods")
    parser.add_argument("--seeds", nargs="+", type=int, help="run only these of its seeds")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, help="start no run after so many minutes, less the longest training so far"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then compare what is there."""
    args = make_parser().parse_args(argv)
    require("report")
    from trl_capo.checks import check_output_dir
    from trl_capo.evaluation.comparison import evaluation_folder, write_comparison

    plan = read_plan(args.plan)
    check_output_dir(plan.output_dir)
    folder = Path(plan.output_dir)
    shared = {"baseline": plan.baseline, "train": plan.train, "benchmarks": plan.benchmarks, "evaluate": plan.evaluate}
    remember_settings(folder, shared, "a comparison")
    for name in plan.methods:  # all before the first run: what is there must be of the same options
        for seed in plan.seeds:
            remember_settings(run_folder(plan, name, seed), recipe(plan, name, seed), "a run")
    for option, wanted, known in (("methods", args.methods, plan.methods), ("seeds", args.seeds, plan.seeds)):
        if missing := [str(name) for name in wanted or [] if name not in known]:
            raise ValueError(f"--{option} {', '.join(missing)}: {args.plan} has {', '.join(map(str, known))}.")
    jobs = [(name, seed) for seed in args.seeds or plan.seeds for name in args.methods or plan.methods]
    failed = run_all(plan, [(BASE, None)], 1, None) or run_all(plan, jobs, args.workers, args.minutes)

    done = {
        name: {seed: run_folder(plan, name, seed) for seed in seeds if evaluation_folder(run_folder(plan, name, seed))}
        for name, seeds in {BASE: [None], **dict.fromkeys(plan.methods, plan.seeds)}.items()
    }
    missing = [f"{name} {seed}" for name in plan.methods for seed in plan.seeds if seed not in done[name]]
    if not done[BASE] or not done[plan.baseline]:
        print(f"Nothing to compare yet: {BASE} and {plan.baseline} are needed.")
    else:
        print(write_comparison(folder, {name: runs for name, runs in done.items() if runs}, plan.baseline))
    if missing:
        print(f"\n{len(missing)} of {len(plan.methods) * len(plan.seeds)} runs are missing: {', '.join(missing)}.")
    if failed:
        raise ValueError("some runs failed, see the end of their logs: " + ", ".join(map(str, failed)))


def run_folder(plan: Plan, name: str, seed: int | None) -> Path:
    """Where a run is."""
    return Path(plan.output_dir) / (name if seed is None else f"{name}-{seed}")


def recipe(plan: Plan, name: str, seed: int) -> dict:
    """Options of `trl-capo train` for a run."""
    return plan.train | plan.methods[name] | {"seed": seed, "output_dir": str(run_folder(plan, name, seed) / "model")}


def run_all(plan: Plan, jobs: list[tuple], workers: int, minutes: float | None) -> list[Path]:
    """Run what is not done; returns the logs of what failed."""
    from tqdm import tqdm

    from trl_capo.evaluation.comparison import evaluation_folder

    jobs = [job for job in jobs if evaluation_folder(run_folder(plan, *job)) is None]
    started, failed = time.time(), []

    def work(job: tuple) -> Path | None:
        known = [json.loads(path.read_text())["seconds"] for path in Path(plan.output_dir).glob("*/trained.json")]
        if minutes is not None and time.time() - started + max(known, default=0) > 60 * minutes:
            return None
        return run(plan, *job)

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), unit="run", desc="compare") as bar:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                if (log := future.result()) is not None:
                    failed.append(log)
                    bar.write(f"failed: {log}")
                bar.update()
        except BaseException:  # Ctrl-C, a full disk: start nothing more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def run(plan: Plan, name: str, seed: int | None) -> Path | None:
    """Train and evaluate, each as a process of its own; returns the log of the one that failed."""
    folder = run_folder(plan, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is being worked on by another process: left to it.")
            return None
        begin, model, trained = time.time(), str(folder / "model"), folder / "trained.json"
        if name == BASE:
            model = plan.train["model_name_or_path"]
        elif not trained.exists():
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(plan, name, seed), sort_keys=False))
            options = ["--config", str(folder / "recipe.yaml"), "--resume_from_checkpoint", "true"]
            if not _succeeds("train", options, folder / "train.log", lock):
                return folder / "train.log"
            write_json(trained, {"seconds": round(time.time() - begin)})
        options = [model, *_evaluation_options(plan.benchmarks, plan.evaluate)]
        options += ["--output_dir", str(folder / "evaluation")]
        return None if _succeeds("evaluate", options, folder / "evaluate.log", lock) else folder / "evaluate.log"


def _evaluation_options(benchmarks: list[str], options: dict) -> list[str]:
    words = ["--benchmark", *benchmarks]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def _succeeds(command: str, options: list[str], log: Path, lock) -> bool:
    """The child inherits the lock: should this process be killed, nobody else starts what the child still does."""
    with log.open("a") as file:
        call = [sys.executable, "-m", f"trl_capo.scripts.{command}", *options]
        return subprocess.run(call, stdout=file, stderr=file, pass_fds=[lock.fileno()]).returncode == 0


if __name__ == "__main__":
    sys.exit(cli_main(["compare", *sys.argv[1:]]))
