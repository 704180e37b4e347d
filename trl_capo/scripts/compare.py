"""`trl-capo compare`: train several methods from one base, evaluate them alike, and test which differences are real.

    trl-capo compare recipes/arithmetic/compare.yaml
    trl-capo compare recipes/arithmetic/compare.yaml --methods capo --seeds 0 1 --minutes 80    # a part of it

The YAML file is a plan (`trl_capo.compare.plan`). Each run is a `trl-capo train` and a `trl-capo evaluate` in its own
folder. Rerun the same command to resume. If a run fails, the command names it and continues with the others. It then
compares the finished runs in `comparison.md`, `.json`, `.npz` and `.png` and in `report.html`.

Parallel runs (`--workers`) share the machine. Each gets its part of the cores as `OMP_NUM_THREADS`, unless you set
that, and one GPU, if there are any and the plan does not set `use_cpu`. A run is one process, so its model must fit on
one GPU.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from trl_capo.cli import main as cli_main
from trl_capo.compare.plan import BASE, read_plan, runs_of
from trl_capo.compare.runner import check_runs, is_done, run_all, shares_of_the_machine
from trl_capo.errors import UserError
from trl_capo.extras import require
from trl_capo.files import remember_settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-capo compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("plan", help="YAML file with baseline, methods, train, benchmarks and seeds")
    parser.add_argument("--methods", nargs="+", help="run only these methods of the plan")
    parser.add_argument("--seeds", nargs="+", type=int, help="run only these seeds of the plan")
    parser.add_argument("--workers", type=int, default=1, help="number of parallel runs (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, help="start no run that would end later, judged by how long earlier runs took"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then compare what is finished. Returns 1 if there is nothing to compare."""
    args = make_parser().parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}.")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes must be a positive number, got {args.minutes}.")
    require("report")
    plan = read_plan(args.plan)
    from trl_capo.preflight.checks import check_output_dir
    from trl_capo.report.comparison import write_comparison

    for option, wanted, known in (("methods", args.methods, plan.methods), ("seeds", args.seeds, plan.seeds)):
        if missing := [str(name) for name in wanted or [] if name not in known]:
            raise UserError(f"--{option} {', '.join(missing)}: {args.plan} has {', '.join(map(str, known))}.")
    shares = shares_of_the_machine(args.workers, plan.train.get("use_cpu", False))
    check_output_dir(plan.output_dir)
    folder, runs = Path(plan.output_dir), runs_of(plan)
    check_runs(run for by_seed in runs.values() for run in by_seed.values())
    shared = {"baseline": plan.baseline, "train": plan.train, "benchmarks": plan.benchmarks, "evaluate": plan.evaluate}
    remember_settings(folder, shared, "a comparison")
    chosen = [runs[name][seed] for seed in args.seeds or plan.seeds for name in args.methods or plan.methods]
    before = [run for run in chosen if is_done(run)]
    failed = run_all([runs[BASE][None]], shares[:1]) + run_all(chosen, shares, args.minutes)

    done = {name: {seed: run for seed, run in by_seed.items() if is_done(run)} for name, by_seed in runs.items()}
    missing = [
        run.name
        for name, by_seed in runs.items()
        if name != BASE
        for seed, run in by_seed.items()
        if seed not in done[name]
    ]
    undefined = False
    if compared := bool(done[BASE] and done[plan.baseline]):
        folders = {
            name: {seed: run.folder for seed, run in by_seed.items()} for name, by_seed in done.items() if by_seed
        }
        print(write_comparison(folder, folders, plan.baseline, asdict(plan) | {"missing": missing}))
        rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]
        undefined = all(row[metric] is None for row in rows for metric in ("accuracy", "auc_within"))
        print(f"\nFigure and answers: {folder / 'comparison.png'}, {folder / 'report.html'}")
    else:
        print(f"Nothing to compare yet: {BASE} and {plan.baseline} are needed.")
    if missing:
        print(f"\n{len(missing)} of {len(plan.methods) * len(plan.seeds)} runs are missing: {', '.join(missing)}.")
        print(f"Next: trl-capo compare {args.plan}    # runs these")
    if failed:
        raise UserError("some runs failed. See the end of their logs: " + ", ".join(map(str, failed)))
    if undefined:
        raise UserError(
            f"no metric is defined, because no answer of any run could be graded. See {folder / 'report.html'}."
        )
    return int(not compared and len([run for run in chosen if is_done(run)]) == len(before))


if __name__ == "__main__":
    sys.exit(cli_main(["compare", *sys.argv[1:]]))
