"""The plan of `trl-capo compare`: read it, check all of it before anything runs, and list its runs.

The YAML contains the shared options, the changes of each method, the seeds, the benchmarks, and the baseline that the
others are compared with. Choose the baseline in advance.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from trl_capo.compare.runner import Run, evaluation_options
from trl_capo.errors import UserError, UserErrors
from trl_capo.evaluation.options import READING, check_sampling, make_parser
from trl_capo.files import check_names
from trl_capo.methods import METHODS
from trl_capo.recipe import check_recipe, read_yaml
from trl_capo.redact import secret_problems


BASE = "base"
MAX_SEED = 2**32 - 1  # numpy's
SET_BY_PLAN = {"seed": "seeds", "output_dir": "output_dir of the plan"}


@dataclass(frozen=True)
class Plan:
    """A comparison plan: the content of the YAML.

    Attributes:
        baseline: The method that the others are compared with.
        methods: Options of `trl-capo train` by configuration name. Each sets its `method`.
        train: Shared options of `trl-capo train`.
        benchmarks: Benchmarks for `trl-capo evaluate`.
        seeds: Training seeds. The evaluation draws the same random numbers for all runs.
        evaluate: Other options of `trl-capo evaluate`.
        output_dir: Folder for all output.
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
        UserError: Some values cannot work. The message names each key, its value, and the allowed values.
    """
    content = read_yaml(path)
    known = [f.name for f in fields(Plan)]
    if set(content) - set(known) or set(known[:5]) - set(content):
        raise UserError(
            f"{path} must have the keys {', '.join(known[:5])}, may have {', '.join(known[5:])}, and no others."
        )
    plan = Plan(**content)
    if problems := list(_shapes(path, plan)):
        raise UserErrors(problems)
    copied = {"train": plan.train, "methods": plan.methods, "evaluate": plan.evaluate}
    if problems := [*secret_problems(path, copied), *_names_and_seeds(path, plan), *_options(path, plan)]:
        raise UserErrors(problems)

    from trl_capo.data.benchmarks import load_benchmark

    reading = {name: plan.evaluate[name] for name in READING if name in plan.evaluate}
    for benchmark in plan.benchmarks:
        load_benchmark(benchmark, plan.evaluate.get("num_prompts"), **reading)
    return plan


def runs_of(plan: Plan) -> dict[str, dict[int | None, Run]]:
    """The plan's runs by method and seed. `BASE`, which has no seed, comes first."""
    base = plan.train["model_name_or_path"]
    runs: dict[str, dict[int | None, Run]] = {BASE: {None: _run(plan, BASE, None, base)}}
    for name in plan.methods:
        runs[name] = {seed: _run(plan, name, seed, None) for seed in plan.seeds}
    return runs


def _run(plan: Plan, name: str, seed: int | None, model: str | None) -> Run:
    from trl_capo.report.comparison import run_name

    folder = Path(plan.output_dir) / run_name(name, seed)
    trained = str(folder / "model")
    return Run(
        name=run_name(name, seed),
        folder=folder,
        recipe=None if model else recipe(plan, name, seed, trained),
        model=model or trained,
        evaluation=folder / "evaluation" / Path(os.path.abspath(model or trained)).name,
        benchmarks=plan.benchmarks,
        options=plan.evaluate,
    )


def recipe(plan: Plan, name: str, seed: int | None, output_dir: str) -> dict:
    """Options of `trl-capo train` for one run."""
    return plan.train | plan.methods[name] | {"seed": seed, "output_dir": output_dir}


def _shapes(path: str, plan: Plan) -> Iterator[str]:
    """Problems with keys and types. All other checks depend on these."""
    for key, kind, wanted in (
        ("methods", dict, "have one `name: {method: ...}` per line"),
        ("train", dict, "have one `option: value` per line"),
        ("benchmarks", list, "be a list of names or files"),
        ("seeds", list, "be a list of whole numbers"),
    ):
        value = getattr(plan, key)
        if not isinstance(value, kind) or not value:
            yield f"{path}: {key} must {wanted}, got {value!r}."
    if not isinstance(plan.evaluate, dict):
        yield f"{path}: evaluate must have one `option: value` per line, got {plan.evaluate!r}."
    if not isinstance(plan.output_dir, str) or not plan.output_dir.strip() or not plan.output_dir.isprintable():
        yield f"{path}: output_dir must be the path of a folder, got {plan.output_dir!r}."


def _names_and_seeds(path: str, plan: Plan) -> Iterator[str]:
    """Problems with names and seeds, which determine the folders of the runs."""
    try:
        check_names(f"{path}: methods", [*plan.methods])
    except UserError as error:
        yield str(error)
    if plan.baseline not in [*plan.methods] or BASE in [str(name).casefold() for name in plan.methods]:
        yield (
            f"{path}: baseline must be one of {', '.join(map(str, plan.methods))}, got {plan.baseline!r}. No "
            f"method may be called {BASE!r}, the name of the model that all start from."
        )
    for seed in plan.seeds:
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            yield f"{path}: seeds must be whole numbers from 0 to {MAX_SEED}, got {seed!r}."
    for key, values in (("seed", plan.seeds), ("benchmark", plan.benchmarks)):
        for value in _repeated(values):
            yield f"{path}: {key} {value!r} appears twice. Remove one."
    for benchmark in plan.benchmarks:
        # A benchmark may be a path, so it is quoted when it becomes a file name. It must not look like an option.
        if not isinstance(benchmark, str) or not benchmark.strip() or not benchmark.isprintable():
            yield f"{path}: benchmarks must be names or files, got {benchmark!r}."
        elif benchmark.startswith("-"):
            yield f"{path}: benchmarks: {benchmark!r} starts with '-'. If it is a file, write ./{benchmark}."


def _repeated(values: list) -> list:
    return [value for i, value in enumerate(values) if value in values[:i] and value not in values[i + 1 :]]


def _options(path: str, plan: Plan) -> Iterator[str]:
    """Problems with options that `trl-capo train` and `trl-capo evaluate` do not accept."""
    if not isinstance(plan.train.get("model_name_or_path"), str):
        yield f"{path}: train needs a model_name_or_path, got {plan.train.get('model_name_or_path')!r}."
    for key in SET_BY_PLAN.keys() & plan.train.keys():
        yield f"{path}: train: {key} comes from the {SET_BY_PLAN[key]}. Remove it."
    for name, options in plan.methods.items():
        method = options.get("method") if isinstance(options, dict) else None
        if not isinstance(method, str) or method not in METHODS and ":" not in method:
            yield f"{path}: {name} needs a `method`, one of {', '.join(METHODS)}; got {method!r}."
            continue
        for key in SET_BY_PLAN.keys() & options.keys():
            yield f"{path}: {name}: {key} comes from the {SET_BY_PLAN[key]}. Remove it."
        try:
            check_recipe(f"{path}, {name}", plan.train | options, method)
        except UserError as error:
            yield str(error)
    for key in {"models", "benchmark", "output_dir", "names"} & plan.evaluate.keys():
        yield f"{path}: evaluate: {key} comes from the plan itself. Remove it."
    for key, value in plan.evaluate.items():
        if not isinstance(key, str) or not isinstance(value, (str, int, float)) or value is False:
            yield f"{path}: evaluate: {key} must be text, a number or true, got {value!r}. Remove it for the default."
            return
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{path}: evaluate: {key} must be a finite number, got {value!r}."
    parser: Any = make_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{path}: evaluate: {message}.")

    parser.error = refuse
    try:
        args = parser.parse_args(["model", *evaluation_options(["benchmark"], plan.evaluate)])
        check_sampling(args)
    except (UserError, ValueError) as error:
        yield str(error) if path in str(error) else f"{path}: evaluate: {error}"
