"""Run trainings and their evaluations, several at a time, each in its own folder, and resume interrupted ones.

Each run is a `trl-capo train` and a `trl-capo evaluate`, in separate processes. If it is stopped, the same
call resumes it. A failed run is named and does not affect the others. A run that another process is working on is
skipped. A run counts as complete as long as its weights, samples and summary have not changed since it finished.

Concurrent runs share the machine: each gets some of the cores and, if GPUs are available, one GPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

from trl_capo.compare.bars import Bars
from trl_capo.errors import UserError, one_line
from trl_capo.files import check_settings, remember_settings, write_json, write_text
from trl_capo.processes import Children
from trl_capo.progress import PROGRESS
from trl_capo.workers import num_cores


WORK = "work.json"  # whether a run is trained, its files once it is complete, and its duration in seconds
REPORTS = "progress.json"  # progress reports of its commands
_children = Children()


@dataclass(frozen=True)
class Run:
    """A model to train, or an existing model, and its evaluation.

    Attributes:
        name: A readable name.
        folder: Folder of the run's lock, recipe, settings, logs and `WORK`.
        recipe: Options of `trl-capo train`, including `output_dir`. None if nothing is trained.
        model: Folder of the trained model, or an existing model for `trl-capo evaluate`.
        evaluation: Folder of the samples and their summary.
        benchmarks: Benchmarks to evaluate on.
        options: Options of `trl-capo evaluate`, by name.
    """

    name: str
    folder: Path
    recipe: dict[str, Any] | None
    model: str
    evaluation: Path
    benchmarks: list[str]
    options: dict[str, Any]


def evaluation_options(benchmarks: list[str], options: dict[str, Any]) -> list[str]:
    """Options of `trl-capo evaluate` as command-line words."""
    words = ["--benchmark", *benchmarks]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}={value}"]
    return words


def check_runs(runs: Iterable[Run]) -> None:
    """Refuse folders that contain runs with other options. Checks all folders before the first run starts."""
    for run in runs:
        if run.recipe is not None:
            check_settings(run.folder, run.recipe, "a run")


def run_all(
    runs: Sequence[Run],
    shares: Sequence[dict[str, str]],
    minutes: float | None = None,
    *,
    title: str = "compare",
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Do all unfinished runs, one at a time on each share of the machine.

    Args:
        runs: The runs, in starting order.
        shares: Environment variables of the concurrent runs, from `shares_of_the_machine`.
        minutes: Time limit. No run starts that would end later, judging by the duration of earlier runs.
        title: Title of the bar that counts runs.
        say: Receives messages.

    Returns:
        Logs of failed runs.
    """
    from tqdm import tqdm

    _children.stopped = False
    runs = [run for run in runs if not is_done(run)]
    started, failed, postponed = time.time(), [], []
    free: SimpleQueue = SimpleQueue()
    for line_and_share in enumerate(shares, start=1):
        free.put(line_and_share)
    running: dict[int, tuple[str, Path]] = {}

    def work(run: Run) -> Path | None:
        if minutes is not None and time.time() - started + seconds_of_a_run(run.folder.parent) > 60 * minutes:
            postponed.append(run)
            return None
        line, share = free.get()
        try:
            running[line] = run.name, run.folder / REPORTS
            return do(run, share, say)
        finally:
            running.pop(line, None)
            free.put((line, share))

    with (
        ThreadPoolExecutor(len(shares)) as pool,
        tqdm(total=len(runs), unit="run", desc=title) as bar,
        Bars() as bars,
    ):
        futures = {pool.submit(work, run) for run in runs}
        try:
            while futures:
                ended, futures = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                bars.show(dict(running))
                for future in ended:
                    if (log := future.result()) is not None:
                        failed.append(log)
                        bar.write(f"failed: {log}: {_last_line(log)}")
                    bar.update()
                    bar.set_postfix_str(f"{len(postponed)} postponed" if postponed else "")
        except BaseException:  # e.g. Ctrl-C or a full disk: start no more runs
            pool.shutdown(wait=False, cancel_futures=True)
            _children.stop()
            raise
    if postponed:
        say(f"{len(postponed)} runs were not started: they would have ended after --minutes {minutes:g}.")
    return failed


def shares_of_the_machine(workers: int, use_cpu: bool = False) -> list[dict[str, str]]:
    """Environment variables of each concurrent run.

    Args:
        workers: Number of concurrent runs.
        use_cpu: Do not use GPUs.

    Raises:
        ValueError: The runs need GPUs, and there are fewer GPUs than workers.
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
        raise UserError(f"--workers {workers}: each run needs its own GPU, but only {len(gpus)} are visible.")
    return [share | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:workers]]


def seconds_of_a_run(folder: Path) -> float:
    """Estimated duration of the next run: 1.5 times the median of finished runs, or 0 if none has finished.

    Args:
        folder: Parent folder of the runs.
    """
    works = [read_work(path.parent)["seconds"] for path in folder.glob(f"*/{WORK}")]
    known = [sum(seconds.values()) for seconds in works if len(seconds) == 2]
    return 1.5 * statistics.median(known) if known else 0.0


def do(run: Run, share: dict[str, str], say: Callable[[str], None] = print) -> Path | None:
    """Train and evaluate, each in a separate process. Returns the log of a failed command.

    Args:
        run: The run.
        share: Environment variables that set the run's share of the machine.
        say: Receives messages.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{run.folder}: another process is working on it, so it is skipped.")
            return None
        work = read_work(run.folder)
        steps = {}
        if run.recipe is not None:
            recipe = run.folder / "recipe.yaml"
            remember_settings(run.folder, run.recipe, "a run")
            write_text(recipe, yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True))
            steps["train"] = ["--config", str(recipe), "--resume_from_checkpoint", "true"]
            recorded = {name: size for name, size in work["complete"].items() if _is_weight(name)}
            if work["complete"] and not _unchanged(run, recorded):
                say(f"The weights in {run.model} changed or are missing: this run is repeated.")
                work["trained"] = False
                shutil.rmtree(run.evaluation, ignore_errors=True)  # its weights are gone
            work["trained"] &= any(map(_is_weight, _files(run)))
        where = ["--output_dir", str(run.evaluation.parent), "--names", run.evaluation.name]
        steps["evaluate"] = [run.model, *evaluation_options(run.benchmarks, run.options), *where]
        work["complete"] = {}
        work["threads"] = int(share["OMP_NUM_THREADS"])
        for command, options in steps.items():
            if command == "train" and work["trained"]:
                continue
            begin, log = time.time(), run.folder / f"{command}.log"
            succeeded = _succeeds(command, options, log, lock, share)
            seconds = round(time.time() - begin)
            work["seconds"][command] = work["seconds"].get(command, 0) + seconds  # without killed commands
            work["trained"] |= command == "train" and succeeded
            write_json(run.folder / WORK, work)
            if not succeeded:
                return log
        if problem := _incomplete(run):
            with log.open("a", encoding="utf-8") as file:
                file.write(f"trl-capo compare: {run.folder}: {problem}\n")
            return log
        write_json(run.folder / WORK, work | {"complete": _files(run)})  # last: it marks the run as complete
        return None


def is_done(run: Run) -> bool:
    """Whether a run was recorded as complete and its weights and samples have not changed since."""
    complete = read_work(run.folder)["complete"]
    return bool(complete) and _unchanged(run, complete) and not _incomplete(run)


def read_work(folder: Path) -> dict:
    """The record of the work on a run; empty if the file is missing or unreadable."""
    work = {"trained": False, "seconds": {}, "complete": {}}
    try:
        read = json.loads((folder / WORK).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return work
    if not isinstance(read, dict) or not all(type(read.get(key, kind)) is type(kind) for key, kind in work.items()):
        return work
    return work | read


def _files(run: Run) -> dict[str, int]:
    """Sizes of a run's weights, samples and summary, by path relative to its folder."""
    kinds = ("*.safetensors", "*.bin") if run.recipe is not None else ()
    found = [path for kind in kinds for path in Path(run.model).glob(kind)]
    found += [run.evaluation / "samples.parquet", run.evaluation / "summary.json"]
    sizes = {os.path.relpath(path, run.folder): path.stat().st_size for path in sorted(found) if path.exists()}
    return {name: size for name, size in sizes.items() if size}


def _is_weight(name: str) -> bool:
    return name.endswith((".safetensors", ".bin")) and "training_args" not in name


def _unchanged(run: Run, files: dict[str, int]) -> bool:
    now = _files(run)
    return all(now.get(name) == size for name, size in files.items())


def _incomplete(run: Run) -> str | None:
    """The missing part of a run, whatever was recorded: weights, or a summary of these benchmarks and samples."""
    import pyarrow.parquet as pq

    if run.recipe is not None and not any(map(_is_weight, _files(run))):
        return "the training saved no weights."
    try:
        summary = json.loads((run.evaluation / "summary.json").read_text(encoding="utf-8"))["benchmarks"]
        expected = sum(counts["num_prompts"] * counts["num_samples"] for counts in summary.values())
        rows = pq.read_metadata(run.evaluation / "samples.parquet").num_rows
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"the evaluation cannot be read: {one_line(str(error), 200)}"
    if set(summary) != set(run.benchmarks) or rows != expected:
        return "the summary covers other benchmarks or samples."
    return None


def _last_line(log: Path) -> str:
    with log.open("rb") as file:  # logs may be long
        file.seek(max(0, log.stat().st_size - 10_000))
        lines = file.read().decode(errors="replace").split("\n")
    return one_line(next((line for line in reversed(lines) if line.strip()), "the log is empty"), 500)


def _succeeds(command: str, options: list[str], log: Path, lock, share: dict[str, str]) -> bool:
    """Run a command. The child inherits the lock, so if this process is killed, no other one starts the run."""
    with log.open("a", encoding="utf-8") as file:
        call = [sys.executable, "-m", f"trl_capo.scripts.{command}", *options]
        outputs = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[lock.fileno()])
        reports = log.with_name(REPORTS)
        reports.unlink(missing_ok=True)
        return _children.run(call, env=os.environ | share | {PROGRESS: str(reports)}, **outputs) == 0
