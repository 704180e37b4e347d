"""`trl-capo compare`: what is there is not run again, what fails is named, and the table is what was measured."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from trl_capo import cli
from trl_capo.calibration.bootstrap import holm, paired_difference
from trl_capo.evaluation.comparison import by_prompt, compare, evaluation_folder, table
from trl_capo.evaluation.samples import read_samples
from trl_capo.scripts import compare as script


def plan_for(folder, **changes):
    plan = dict(
        output_dir=str(folder / "out"),
        baseline="grpo",
        seeds=[0, 1],
        benchmarks=["arithmetic_test_2", "arithmetic_test_3"],
        evaluate=dict(num_prompts=5, num_samples=4, max_new_tokens=40),
        train=dict(
            model_name_or_path="arithmetic-base",
            dtype="float32",
            dataset_name="arithmetic",
            reward_funcs=["tests.helpers.parity_reward"],
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=24,
            max_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
        ),
        methods=dict(
            grpo=dict(method="grpo"),
            capo=dict(method="capo", ref_ppl_mask=False, tau=0.5),
            broken=dict(method="grpo", model_name_or_path="/nowhere"),
        ),
    )
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return str(path)


@pytest.fixture
def calls(monkeypatch):
    """Commands run in this process instead of in one of their own: faster by the imports."""
    made = []

    def succeeds(command, options, log, lock):
        made.append((command, next((p for p in options if "recipe.yaml" in p or "model" in p), options[0])))
        return cli.main([command, *options]) == 0

    monkeypatch.setattr(script, "_succeeds", succeeds)
    return made


def test_runs_then_compares_what_is_there(tmp_path, calls, capsys):
    plan, out = plan_for(tmp_path), tmp_path / "out"
    assert cli.main(["compare", plan, "--methods", "capo"]) == 0
    assert "Nothing to compare yet: base and grpo are needed" in capsys.readouterr().out
    assert len(calls) == 5  # the base's evaluation, two trainings, two evaluations
    calls.clear()

    assert cli.main(["compare", plan]) == 2
    captured = capsys.readouterr()
    assert "some runs failed" in captured.err and "broken-0/train.log" in captured.err
    assert "2 of 6 runs are missing: broken 0, broken 1" in captured.out
    assert [command for command, _ in calls].count("train") == 4 and not any("capo" in where for _, where in calls)

    rows = {row["method"]: row for row in json.loads((out / "comparison.json").read_text())["rows"]}
    assert list(rows) == ["base", "grpo", "capo"] and rows["capo"]["seeds"] == 2
    sets = {
        name: {seed: read_samples(evaluation_folder(out / f"{name}-{seed}")) for seed in (0, 1)}
        for name in ("grpo", "capo")
    }
    for metric in ("accuracy", "auc_within"):
        ours, theirs = (by_prompt(sets[name], metric) for name in ("capo", "grpo"))
        assert ours.shape == (2, 10)
        expected = paired_difference(ours, theirs)
        assert rows["capo"][f"{metric}_difference"] == pytest.approx([expected.value, expected.low, expected.high])
        assert rows["base"][f"{metric}_difference"] is rows["grpo"][f"{metric}_difference"] is None
    correct = np.array([[s.correct.mean() for s in of] for of in sets["capo"].values()])
    assert rows["capo"]["accuracy"] == pytest.approx(correct.mean())
    text = (out / "comparison.md").read_text()
    assert "| capo | 2 | " in text and "broken" not in text
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG") and "capo, seed 0" in (
        out / "report.html"
    ).read_text()

    calls.clear()
    assert cli.main(["compare", plan, "--methods", "grpo", "capo"]) == 0
    assert calls == []


def test_a_run_that_would_not_end_in_time_is_not_started(tmp_path, monkeypatch):
    plan, started = script.read_plan(plan_for(tmp_path)), []
    monkeypatch.setattr(script, "run", lambda plan, name, seed: started.append(name))
    script.run_all(plan, [("grpo", 0)], 1, 5)
    assert started == ["grpo"], "how long it takes is not known yet"
    (script.run_folder(plan, "grpo", 0)).mkdir(parents=True)
    (script.run_folder(plan, "grpo", 0) / "trained.json").write_text('{"seconds": 400}')
    script.run_all(plan, [("capo", 0)], 1, 5)
    assert started == ["grpo"]
    script.run_all(plan, [("capo", 0)], 1, 10)
    assert started == ["grpo", "capo"]


def test_trained_and_killed_before_the_evaluation(tmp_path, calls):
    plan = plan_for(tmp_path)
    folder = tmp_path / "out" / "grpo-0"
    assert cli.main(["compare", plan, "--methods", "grpo", "--seeds", "0"]) == 0
    weights = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    (evaluation_folder(folder) / "summary.json").unlink()
    calls.clear()
    assert cli.main(["compare", plan, "--methods", "grpo", "--seeds", "0"]) == 0
    assert [command for command, _ in calls] == ["evaluate"]
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_processes_of_their_own_and_their_logs(tmp_path):
    log = tmp_path / "x.log"
    with (tmp_path / "lock").open("w") as lock:
        assert not script._succeeds("train", ["--config", str(tmp_path / "none.yaml")], log, lock)
    assert "none.yaml" in log.read_text()


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path, monkeypatch, capsys):
    plan = script.read_plan(plan_for(tmp_path))
    folder = script.run_folder(plan, "grpo", 0)
    folder.mkdir(parents=True)
    code = f"import fcntl, time; f = open({str(folder / 'lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    other = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(script, "_succeeds", pytest.fail)
        assert script.run(plan, "grpo", 0) is None
        assert "grpo-0 is being worked on by another process" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()


def test_an_interrupt_starts_nothing_more(tmp_path, monkeypatch):
    plan, started = script.read_plan(plan_for(tmp_path)), []

    def interrupted(plan, name, seed):
        started.append(name)
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.run_all(plan, [(name, seed) for seed in (0, 1) for name in plan.methods], 1, None)
    assert len(started) < 6


def test_a_changed_plan_is_refused(tmp_path, calls, capsys):
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "capo", "--seeds", "0"]) == 0
    calls.clear()
    for changes, message in (
        (dict(baseline="capo"), "holds a comparison with another baseline: grpo"),
        (dict(methods=dict(grpo=dict(method="grpo"), capo=dict(method="capo", tau=0.4))), "a run with another"),
    ):
        assert cli.main(["compare", plan_for(tmp_path, **changes)]) == 2
        assert message in capsys.readouterr().err and calls == []


def test_many_differences_are_corrected():
    class Samples:
        def __init__(self, rng, shift):
            self.correct = (rng.random((30, 8)) < 0.5 + shift).astype(float)
            self.mean_logps = -rng.random((30, 8))

    sets = {
        name: {seed: [Samples(np.random.default_rng(10 * i + seed), shift)] for seed in range(3)}
        for i, (name, shift) in enumerate({"grpo": 0.0, "a": 0.0, "b": 0.02, "c": 0.4}.items())
    }
    alone = [compare({k: sets[k] for k in ("grpo", name)}, "grpo")[1]["accuracy_p"] for name in "abc"]
    together = [row["accuracy_p"] for row in compare(sets, "grpo")[1:]]
    few = compare({"grpo": {0: sets["grpo"][0]}, "c": sets["c"]}, "grpo")[1]
    assert (few["seeds"], few["seeds_compared"]) == (3, 1) and np.isnan(few["accuracy_p"])
    assert table([few | dict(auc_pooled=0.5, perplexity_consistency=0.5)], "grpo")[1][0][1] == "3, 1 compared"
    assert together == pytest.approx(holm(alone).tolist()) and together[2] < 0.05 <= together[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(baseline="none"), "baseline must be one of grpo, capo, broken"),
        (dict(extra=1), "must hold baseline, methods, train, benchmarks, seeds and may hold"),
        (dict(methods=dict(grpo=dict(method="ppo"))), "grpo needs a `method` of"),
        (dict(methods=dict(grpo=dict(method="grpo", tau=1))), "unknown key 'tau'. It is an option of capo"),
        (dict(methods=dict(grpo=None)), "grpo needs a `method` of"),
        (dict(seeds=[0, 0]), "no seed may be named twice"),
        (dict(benchmarks=["arithmetic_9"]), "there is no benchmark"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(tmp_path, capsys, changes, message):
    assert cli.main(["compare", plan_for(tmp_path, **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_options_of_the_evaluation_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", plan_for(tmp_path, evaluate=dict(num_sample=4))])
    assert "--num_sample" in capsys.readouterr().err
    assert script._evaluation_options(["b"], dict(statistics=True, seed=1)) == [
        "--benchmark",
        "b",
        "--statistics",
        "--seed",
        "1",
    ]


def test_the_recipe_holds_every_method(repository):
    from trl_capo.scripts.train import METHODS

    plan = script.read_plan(str(repository / "recipes" / "arithmetic" / "compare.yaml"))
    assert {options["method"] for options in plan.methods.values()} == set(METHODS)
    assert Path(plan.output_dir).parts[0] == "runs"
