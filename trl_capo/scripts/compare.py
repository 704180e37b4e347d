"""`trl-capo compare`: train several methods from one base, evaluate them alike, and say which differences are sure.

    trl-capo compare recipes/arithmetic/compare.yaml
    trl-capo compare recipes/arithmetic/compare.yaml --methods capo --seeds 0 1 --minutes 80    # a part of it

The YAML names what all share, what each method changes, the seeds, the benchmarks, and the one configuration that the
others are compared with, which is to be chosen beforehand. Each run is a `trl-capo train` and a `trl-capo evaluate` in
a folder of its own: stopped at any point, the same command goes on; a run that fails is named and leaves the others
alone. What is there is then compared in `comparison.md`, `.json`, `.npz` and `.png` and in `report.html`.

Runs at a time (`--workers`) share the machine: each has its part of the cores as `OMP_NUM_THREADS`, unless that is
set, and, where there are GPUs and the plan does not say `use_cpu`, one of them. A run is one process, so its model
must fit on one GPU.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from queue import SimpleQueue

import yaml

from trl_capo.cli import main as cli_main
from trl_capo.extras import require
from trl_capo.folders import check_settings, remember_settings, write_json
from trl_capo.workers import num_cores


BASE = "base"
WORK = "work.json"  # whether a run is trained, and the seconds that it took


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
        "--minutes", type=float, help="start no run that would end later, by what the runs before took"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then compare what is there."""
    args = make_parser().parse_args(argv)
    require("report")
    from trl_capo.checks import check_output_dir
    from trl_capo.evaluation.comparison import evaluation_folder, run_name, write_comparison

    plan = read_plan(args.plan)
    for option, wanted, known in (("methods", args.methods, plan.methods), ("seeds", args.seeds, plan.seeds)):
        if missing := [str(name) for name in wanted or [] if name not in known]:
            raise ValueError(f"--{option} {', '.join(missing)}: {args.plan} has {', '.join(map(str, known))}.")
    shares = shares_of_the_machine(args.workers, plan.train.get("use_cpu", False))
    check_output_dir(plan.output_dir)
    folder = Path(plan.output_dir)
    for name in plan.methods:  # all before the first run: what is there must be of the same options
        for seed in plan.seeds:
            check_settings(run_folder(plan, name, seed), recipe(plan, name, seed), "a run")
    shared = {"baseline": plan.baseline, "train": plan.train, "benchmarks": plan.benchmarks, "evaluate": plan.evaluate}
    remember_settings(folder, shared, "a comparison")
    jobs = [(name, seed) for seed in args.seeds or plan.seeds for name in args.methods or plan.methods]
    failed = run_all(plan, [(BASE, None)], shares[:1], None) + run_all(plan, jobs, shares, args.minutes)

    done = {
        name: {seed: run_folder(plan, name, seed) for seed in seeds if evaluation_folder(run_folder(plan, name, seed))}
        for name, seeds in {BASE: [None], **dict.fromkeys(plan.methods, plan.seeds)}.items()
    }
    missing = [run_name(name, seed) for name in plan.methods for seed in plan.seeds if seed not in done[name]]
    if not done[BASE] or not done[plan.baseline]:
        print(f"Nothing to compare yet: {BASE} and {plan.baseline} are needed.")
    else:
        runs = {name: of for name, of in done.items() if of}
        print(write_comparison(folder, runs, plan.baseline, asdict(plan) | {"missing": missing}))
        print(f"\nPicture and answers: {folder / 'comparison.png'}, {folder / 'report.html'}")
    if missing:
        print(f"\n{len(missing)} of {len(plan.methods) * len(plan.seeds)} runs are missing: {', '.join(missing)}.")
        print(f"What to type next: trl-capo compare {args.plan}    # it goes on with these")
    if failed:
        raise ValueError("some runs failed, see the end of their logs: " + ", ".join(map(str, failed)))


def run_folder(plan: Plan, name: str, seed: int | None) -> Path:
    """Where a run is."""
    from trl_capo.evaluation.comparison import run_name

    return Path(plan.output_dir) / run_name(name, seed)


def recipe(plan: Plan, name: str, seed: int) -> dict:
    """Options of `trl-capo train` for a run."""
    return plan.train | plan.methods[name] | {"seed": seed, "output_dir": str(run_folder(plan, name, seed) / "model")}


def run_all(plan: Plan, jobs: list[tuple], shares: list[dict[str, str]], minutes: float | None) -> list[Path]:
    """Run what is not done, one job a share of the machine at a time; returns the logs of what failed."""
    from tqdm import tqdm

    from trl_capo.evaluation.comparison import evaluation_folder

    jobs = [job for job in jobs if evaluation_folder(run_folder(plan, *job)) is None]
    started, failed, postponed = time.time(), [], []
    free = SimpleQueue()
    for share in shares:
        free.put(share)

    def work(job: tuple) -> Path | None:
        if minutes is not None and time.time() - started + seconds_of_a_run(plan) > 60 * minutes:
            postponed.append(job)
            return None
        share = free.get()
        try:
            return run(plan, *job, share)
        finally:
            free.put(share)

    with ThreadPoolExecutor(len(shares)) as pool, tqdm(total=len(jobs), unit="run", desc="compare") as bar:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                if (log := future.result()) is not None:
                    failed.append(log)
                    bar.write(f"failed: {log}: {(log.read_text().splitlines() or ['it says nothing'])[-1]}")
                bar.update()
                bar.set_postfix_str(f"{len(postponed)} postponed" if postponed else "")
        except BaseException:  # Ctrl-C, a full disk: start nothing more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if postponed:
        print(f"{len(postponed)} runs were not started: they would have ended after --minutes {minutes:g}.")
    return failed


def shares_of_the_machine(workers: int, use_cpu: bool = False) -> list[dict[str, str]]:
    """Environment variables of each of the runs at a time.

    Args:
        workers: How many these are.
        use_cpu: Leave the GPUs alone.

    Raises:
        ValueError: GPUs are to be used, and there are fewer than workers.
    """
    import torch

    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // workers))}
    if use_cpu:
        return [share | {"CUDA_VISIBLE_DEVICES": ""}] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible and visible != "-1" else [str(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        return [share] * workers
    if workers > len(gpus):
        raise ValueError(f"--workers {workers}: each run needs a GPU of its own, and {len(gpus)} can be seen.")
    return [share | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:workers]]


def seconds_of_a_run(plan: Plan) -> float:
    """How long the next one may take: half as long again as the median of those that are done; 0 while none is."""
    works = [json.loads(path.read_text()) for path in Path(plan.output_dir).glob(f"*/{WORK}")]
    known = [sum(work["seconds"].values()) for work in works if len(work["seconds"]) == 2]
    return 1.5 * statistics.median(known) if known else 0.0


def run(plan: Plan, name: str, seed: int | None, share: dict[str, str]) -> Path | None:
    """Train and evaluate, each as a process of its own; returns the log of the one that failed.

    Args:
        plan: The whole.
        name: Of the method, or `BASE`.
        seed: Of the training.
        share: Environment variables that say which part of the machine is its own.
    """
    folder = run_folder(plan, name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is being worked on by another process: left to it.")
            return None
        evaluation = [*_evaluation_options(plan.benchmarks, plan.evaluate), "--output_dir", str(folder / "evaluation")]
        if name == BASE:
            steps = {"evaluate": [plan.train["model_name_or_path"], *evaluation]}
        else:
            options = recipe(plan, name, seed)
            remember_settings(folder, options, "a run")
            (folder / "recipe.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
            steps = {
                "train": ["--config", str(folder / "recipe.yaml"), "--resume_from_checkpoint", "true"],
                "evaluate": [str(folder / "model"), *evaluation],
            }
        path = folder / WORK
        work = json.loads(path.read_text()) if path.exists() else {"trained": False, "seconds": {}}
        work["threads"] = int(share["OMP_NUM_THREADS"])
        for command, options in steps.items():
            if command == "train" and work["trained"]:
                continue
            begin, log = time.time(), folder / f"{command}.log"
            succeeded = _succeeds(command, options, log, lock, share)
            seconds = round(time.time() - begin)
            work["seconds"][command] = work["seconds"].get(command, 0) + seconds  # of attempts that were not killed
            work["trained"] |= command == "train" and succeeded
            write_json(path, work)
            if not succeeded:
                return log
        return None


def _evaluation_options(benchmarks: list[str], options: dict) -> list[str]:
    words = ["--benchmark", *benchmarks]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def _succeeds(command: str, options: list[str], log: Path, lock, share: dict[str, str]) -> bool:
    """The child inherits the lock: should this process be killed, nobody else starts what the child still does."""
    with log.open("a") as file:
        call = [sys.executable, "-m", f"trl_capo.scripts.{command}", *options]
        done = subprocess.run(call, stdout=file, stderr=file, pass_fds=[lock.fileno()], env=os.environ | share)
        return done.returncode == 0


if __name__ == "__main__":
    sys.exit(cli_main(["compare", *sys.argv[1:]]))
