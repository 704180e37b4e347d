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
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

import yaml

from trl_capo.cli import main as cli_main
from trl_capo.compare.plan import BASE, Plan, evaluation_options, read_plan
from trl_capo.errors import UserError, one_line
from trl_capo.extras import require
from trl_capo.files import check_settings, remember_settings, write_json, write_text
from trl_capo.processes import Children
from trl_capo.workers import num_cores


WORK = "work.json"  # whether a run is trained, its files once it is complete, and the seconds that it took
_children = Children()


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


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then compare what is there. Returns 1 if there is nothing to show for it."""
    args = make_parser().parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}.")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes must be a positive number, got {args.minutes}.")
    require("report")
    plan = read_plan(args.plan)
    from trl_capo.preflight.checks import check_output_dir
    from trl_capo.report.comparison import run_name, write_comparison

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
    before = [job for job in jobs if is_done(plan, *job)]
    failed = run_all(plan, [(BASE, None)], shares[:1], None) + run_all(plan, jobs, shares, args.minutes)

    done = {
        name: {seed: run_folder(plan, name, seed) for seed in seeds if is_done(plan, name, seed)}
        for name, seeds in {BASE: [None], **dict.fromkeys(plan.methods, plan.seeds)}.items()
    }
    missing = [run_name(name, seed) for name in plan.methods for seed in plan.seeds if seed not in done[name]]
    undefined = False
    if compared := bool(done[BASE] and done[plan.baseline]):
        runs = {name: of for name, of in done.items() if of}
        print(write_comparison(folder, runs, plan.baseline, asdict(plan) | {"missing": missing}))
        rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]
        undefined = all(row[metric] is None for row in rows for metric in ("accuracy", "auc_within"))
        print(f"\nPicture and answers: {folder / 'comparison.png'}, {folder / 'report.html'}")
    else:
        print(f"Nothing to compare yet: {BASE} and {plan.baseline} are needed.")
    if missing:
        print(f"\n{len(missing)} of {len(plan.methods) * len(plan.seeds)} runs are missing: {', '.join(missing)}.")
        print(f"What to type next: trl-capo compare {args.plan}    # it goes on with these")
    if failed:
        raise UserError("some runs failed, see the end of their logs: " + ", ".join(map(str, failed)))
    if undefined:
        raise UserError(f"no metric is defined: no answer of any run could be graded, see {folder / 'report.html'}.")
    return int(not compared and len([job for job in jobs if is_done(plan, *job)]) == len(before))


def run_folder(plan: Plan, name: str, seed: int | None) -> Path:
    """Where a run is."""
    from trl_capo.report.comparison import run_name

    return Path(plan.output_dir) / run_name(name, seed)


def recipe(plan: Plan, name: str, seed: int) -> dict:
    """Options of `trl-capo train` for a run."""
    return plan.train | plan.methods[name] | {"seed": seed, "output_dir": str(run_folder(plan, name, seed) / "model")}


def run_all(plan: Plan, jobs: list[tuple], shares: list[dict[str, str]], minutes: float | None) -> list[Path]:
    """Run what is not done, one job a share of the machine at a time; returns the logs of what failed."""
    from tqdm import tqdm

    _children.stopped = False
    jobs = [job for job in jobs if not is_done(plan, *job)]
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
                    bar.write(f"failed: {log}: {_last_line(log)}")
                bar.update()
                bar.set_postfix_str(f"{len(postponed)} postponed" if postponed else "")
        except BaseException:  # Ctrl-C, a full disk: start nothing more
            pool.shutdown(wait=False, cancel_futures=True)
            _children.stop()
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
    works = [read_work(path.parent)["seconds"] for path in Path(plan.output_dir).glob(f"*/{WORK}")]
    known = [sum(seconds.values()) for seconds in works if len(seconds) == 2]
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
        evaluation = [*evaluation_options(plan.benchmarks, plan.evaluate), "--output_dir", str(folder / "evaluation")]
        work = read_work(folder)
        if name == BASE:
            steps = {"evaluate": [plan.train["model_name_or_path"], *evaluation]}
        else:
            options = recipe(plan, name, seed)
            remember_settings(folder, options, "a run")
            write_text(folder / "recipe.yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
            steps = {
                "train": ["--config", str(folder / "recipe.yaml"), "--resume_from_checkpoint", "true"],
                "evaluate": [str(folder / "model"), *evaluation],
            }
            if work["complete"] and not _unchanged(folder, _weights(work["complete"])):
                print(f"The weights in {folder / 'model'} changed or are missing: this run is repeated.")
                work["trained"] = False
                shutil.rmtree(folder / "evaluation", ignore_errors=True)  # of weights that are gone
            work["trained"] &= bool(_weights(_files(folder)))
        work["complete"] = {}
        work["threads"] = int(share["OMP_NUM_THREADS"])
        for command, options in steps.items():
            if command == "train" and work["trained"]:
                continue
            begin, log = time.time(), folder / f"{command}.log"
            succeeded = _succeeds(command, options, log, lock, share)
            seconds = round(time.time() - begin)
            work["seconds"][command] = work["seconds"].get(command, 0) + seconds  # of attempts that were not killed
            work["trained"] |= command == "train" and succeeded
            write_json(folder / WORK, work)
            if not succeeded:
                return log
        if problem := _incomplete(folder, name != BASE, plan.benchmarks):
            with log.open("a", encoding="utf-8") as file:
                file.write(f"trl-capo compare: {folder}: {problem}\n")
            return log
        write_json(folder / WORK, work | {"complete": _files(folder)})  # last: it says that the run is complete
        return None


def is_done(plan: Plan, name: str, seed: int | None) -> bool:
    """Whether a run was recorded as complete, and its weights and samples still are as they were then."""
    folder = run_folder(plan, name, seed)
    complete = read_work(folder)["complete"]
    return bool(complete) and _unchanged(folder, complete) and not _incomplete(folder, name != BASE, plan.benchmarks)


def read_work(folder: Path) -> dict:
    """What is known about the work on a run; nothing if the file is missing or unreadable."""
    work = {"trained": False, "seconds": {}, "complete": {}}
    try:
        read = json.loads((folder / WORK).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return work
    if not isinstance(read, dict) or not all(type(read.get(key, kind)) is type(kind) for key, kind in work.items()):
        return work
    return work | read


def _files(folder: Path) -> dict[str, int]:
    """Sizes of what a run is: weights of the model, samples and their summaries."""
    kinds = ("model/*.safetensors", "model/*.bin", "evaluation/*/samples.parquet", "evaluation/*/summary.json")
    found = sorted(path for kind in kinds for path in folder.glob(kind))
    return {str(path.relative_to(folder)): path.stat().st_size for path in found if path.stat().st_size}


def _weights(files: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in files.items() if name.startswith("model/") and "training_args" not in name}


def _unchanged(folder: Path, files: dict[str, int]) -> bool:
    now = _files(folder)
    return all(now.get(name) == size for name, size in files.items())


def _incomplete(folder: Path, trained: bool, benchmarks: list[str]) -> str | None:
    """What a run lacks, whatever was recorded: weights, or a summary of these benchmarks and of these samples."""
    import pyarrow.parquet as pq

    if trained and not _weights(_files(folder)):
        return "the training left no weights."
    summaries = list((folder / "evaluation").glob("*/summary.json"))
    if len(summaries) != 1:
        return f"{len(summaries)} evaluations where there must be one."
    try:
        summary = json.loads(summaries[0].read_text(encoding="utf-8"))["benchmarks"]
        expected = sum(of["num_prompts"] * of["num_samples"] for of in summary.values())
        rows = pq.read_metadata(summaries[0].with_name("samples.parquet")).num_rows
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"the evaluation cannot be read: {one_line(str(error), 200)}"
    if set(summary) != set(benchmarks) or rows != expected:
        return "the summary is of other benchmarks or samples."
    return None


def _last_line(log: Path) -> str:
    with log.open("rb") as file:  # logs may be long
        file.seek(max(0, log.stat().st_size - 10_000))
        lines = file.read().decode(errors="replace").split("\n")
    return one_line(next((line for line in reversed(lines) if line.strip()), "it says nothing"), 500)


def _succeeds(command: str, options: list[str], log: Path, lock, share: dict[str, str]) -> bool:
    """The child inherits the lock: should this process be killed, nobody else starts what the child still does."""
    with log.open("a") as file:
        call = [sys.executable, "-m", f"trl_capo.scripts.{command}", *options]
        outputs = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[lock.fileno()])
        return _children.run(call, env=os.environ | share, **outputs) == 0


if __name__ == "__main__":
    sys.exit(cli_main(["compare", *sys.argv[1:]]))
