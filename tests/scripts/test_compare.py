"""`trl-capo compare`: what is there is not run again, what fails is named, and the table is what was measured."""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from trl_capo import cli
from trl_capo.calibration.bootstrap import holm, paired_difference
from trl_capo.evaluation.samples import read_samples
from trl_capo.report.comparison import by_prompt, check_same_questions, compare, evaluation_folder, table
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

    def succeeds(command, options, log, lock, share):
        log.touch()
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
    assert "2 of 6 runs are missing: broken-0, broken-1" in captured.out
    assert f"What to type next: trl-capo compare {plan} " in captured.out and "report.html" in captured.out
    assert [command for command, _ in calls].count("train") == 4 and not any("capo" in where for _, where in calls)

    rows = {row["method"]: row for row in json.loads((out / "comparison.json").read_text())["rows"]}
    assert list(rows) == ["grpo", "base", "capo"] and rows["capo"]["seeds"] == 2
    sets = {
        name: {seed: read_samples(evaluation_folder(out / f"{name}-{seed}")) for seed in (0, 1)}
        for name in ("grpo", "capo")
    }
    for metric in ("accuracy", "auc_within"):
        ours, theirs = (by_prompt(sets[name], metric) for name in ("capo", "grpo"))
        assert [of.shape for of in ours] == [(2, 5), (2, 5)]
        expected = paired_difference(ours, theirs)
        found = [np.nan if number is None else number for number in rows["capo"][f"{metric}_difference"]]
        assert found == pytest.approx([expected.value, expected.low, expected.high], nan_ok=True)
        assert rows["base"][f"{metric}_difference"] is rows["grpo"][f"{metric}_difference"] is None
    correct = np.array([[s.correct.mean() for s in of] for of in sets["capo"].values()])
    assert rows["capo"]["accuracy"] == pytest.approx(correct.mean())
    text, page = (out / "comparison.md").read_text(), (out / "report.html").read_text()
    assert "| capo | 2 | " in text and "broken" not in text
    assert (
        "arithmetic_test_2 (5 questions x 4)" in text
        and "Not all runs" not in text
        and "could not be graded" not in text
    )
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "All seeds" in page and "capo, seed 0 - grpo, seed 0" in page and "- base" not in page

    written = json.loads((out / "comparison.json").read_text())
    assert written["planned"]["missing"] == ["broken-0", "broken-1"] and written["planned"]["seeds"] == [0, 1]
    made = written["runs"]["capo-1"]
    assert (
        made["versions"][0]["trl"] == version("trl")
        and len(made["versions"]) == 1
        and set(made["seconds"]) == {"train", "evaluate"}
    )
    assert made["threads"] >= 1 and made["date"]
    saved = np.load(out / "comparison.npz")
    for i, of in enumerate(sets["capo"][1]):
        by_seed = rows["capo"]["by_run"]["capo-1"][of.benchmark]
        assert by_seed["accuracy"] == pytest.approx(of.correct.mean())
        np.testing.assert_allclose(saved[f"capo-1/{of.benchmark}/accuracy"], of.correct.mean(axis=1))
        np.testing.assert_array_equal(
            saved[f"capo-1/{of.benchmark}/auc_within"], by_prompt(sets["capo"])[i][1].astype(np.float32)
        )

    calls.clear()
    assert cli.main(["compare", plan, "--methods", "grpo", "capo"]) == 0
    assert calls == []


def test_a_run_that_would_not_end_in_time_is_not_started(tmp_path, monkeypatch, capsys):
    plan, started = script.read_plan(plan_for(tmp_path)), []
    monkeypatch.setattr(script, "run", lambda plan, name, seed, share: started.append(name))
    script.run_all(plan, [("grpo", 0)], [{}], 5)
    assert started == ["grpo"], "how long it takes is not known yet"
    for seed, seconds in enumerate((240, 10, 9000)):  # the median counts: a suspended laptop is no measure
        folder = script.run_folder(plan, "grpo", seed)
        folder.mkdir(parents=True)
        (folder / "work.json").write_text(json.dumps({"seconds": {"train": seconds, "evaluate": 1}}))
    script.run_all(plan, [("capo", 0)], [{}], 6)
    assert started == ["grpo"] and "1 runs were not started: they would have ended" in capsys.readouterr().out
    script.run_all(plan, [("capo", 0)], [{}], 7)
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
        assert not script._succeeds("train", ["--config", str(tmp_path / "none.yaml")], log, lock, {})
    assert "none.yaml" in log.read_text()


@pytest.mark.parametrize(("set_to", "expected"), [(None, "1"), ("7", "7")])
def test_runs_at_a_time_share_the_cores(tmp_path, monkeypatch, set_to, expected):
    plan, seen = script.read_plan(plan_for(tmp_path)), []
    if set_to is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    monkeypatch.setattr(script, "num_cores", lambda: 2)

    def called(words, env, **kwargs):
        seen.append(env["OMP_NUM_THREADS"])
        return 0

    monkeypatch.setattr(script._children, "run", called)
    monkeypatch.setattr(script, "_incomplete", lambda *run: None)
    script.run_all(plan, [("grpo", 0)], script.shares_of_the_machine(2), None)
    assert seen == [expected, expected]
    assert json.loads((tmp_path / "out" / "grpo-0" / "work.json").read_text())["threads"] == int(expected)


def test_each_run_at_a_time_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    plan, used, together = script.read_plan(plan_for(tmp_path)), [], []

    def run(plan, name, seed, share):
        used.append(share["CUDA_VISIBLE_DEVICES"])
        together.append(sorted(used))
        time.sleep(0.1)
        used.remove(share["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(script, "run", run)
    script.run_all(
        plan, [(name, seed) for seed in (0, 1) for name in plan.methods], script.shares_of_the_machine(3), None
    )
    assert all(len(set(gpus)) == len(gpus) for gpus in together) and ["0", "1", "2"] in together
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in script.shares_of_the_machine(2)] == ["5", "7"]
    with pytest.raises(ValueError, match="--workers 3: each run needs a GPU of its own, and 2 can be seen"):
        script.shares_of_the_machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # hides them all
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert not any("CUDA_VISIBLE_DEVICES" in share for share in script.shares_of_the_machine(3))


def test_a_plan_for_the_cpu_leaves_the_gpus_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    seen = []
    monkeypatch.setattr(script, "run_all", lambda plan, jobs, shares, minutes: seen.append(shares) or [])
    assert cli.main(["compare", plan_for(tmp_path), "--workers", "3"]) == 1, "nothing was run or compared"
    assert [len(shares) for shares in seen] == [1, 3]
    assert {share["CUDA_VISIBLE_DEVICES"] for shares in seen for share in shares} == {""}


def test_a_base_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    tried = []

    def run(plan, name, seed, share):
        tried.append(name)
        log = tmp_path / "x.log"
        log.write_text("trl-capo evaluate: no such model\n")
        return log

    monkeypatch.setattr(script, "run", run)
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "grpo", "--seeds", "1"]) == 2
    assert tried == ["base", "grpo"]


def test_no_folder_is_claimed_before_its_run(tmp_path, calls, capsys):
    """Settings that were not run yet may still change."""
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "none"]) == 2
    assert "--methods none: " in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "grpo", "--seeds", "0"]) == 0
    changed = dict(grpo=dict(method="grpo"), capo=dict(method="capo", tau=0.4))
    assert cli.main(["compare", plan_for(tmp_path, methods=changed), "--methods", "grpo", "--seeds", "0"]) == 0


def test_other_questions_are_not_paired():
    def samples(*prompts):
        columns = {"prompt_id": np.arange(len(prompts)), "prompt": np.array(prompts, dtype=object)}
        table = SimpleNamespace(column_names=list(columns))
        return SimpleNamespace(benchmark="b", table=table, grid=lambda name: columns[name][:, None])

    check_same_questions({"grpo": {0: [samples("1+1", "2+2")], 1: [samples("1+1", "2+2")]}})
    for others in (samples("1+1", "2+3"), samples("1+1")):
        with pytest.raises(ValueError, match="capo-0 answered other questions of b"):
            check_same_questions({"grpo": {0: [samples("1+1", "2+2")]}, "capo": {0: [others]}})


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
        assert script.run(plan, "grpo", 0, {}) is None
        assert "grpo-0 is being worked on by another process" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()


def test_an_interrupt_starts_nothing_more(tmp_path, monkeypatch):
    plan, started = script.read_plan(plan_for(tmp_path)), []

    def interrupted(plan, name, seed, share):
        started.append(name)
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.run_all(plan, [(name, seed) for seed in (0, 1) for name in plan.methods], [{}], None)
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


def test_benchmarks_weigh_alike_whatever_is_mixed():
    """Right answers are surer on the first benchmark and not on the second, for both; one has more mixed prompts."""

    def samples(num_mixed, num_prompts, auc):
        correct = np.ones((num_prompts, 2))
        correct[:num_mixed, 1] = 0
        return SimpleNamespace(correct=correct, mean_logps=np.tile([-1.0, -2.0 if auc else -0.5], (num_prompts, 1)))

    sets = {
        "grpo": {seed: [samples(1, 4, True), samples(4, 4, False)] for seed in range(2)},
        "capo": {seed: [samples(3, 4, True), samples(4, 4, False)] for seed in range(2)},
    }
    grpo, capo = compare(sets, "grpo")
    assert grpo["auc_within"] == capo["auc_within"] == 0.5
    assert capo["auc_within_difference"] == [0, 0, 0]  # in one heap: 3/7 - 1/5
    assert capo["accuracy_difference"][0] == pytest.approx(-2 / 16)


def test_the_difference_on_prompts_that_are_mixed_for_both():
    """The new one is worse on the prompt that both have, and has an easy one more."""

    def samples(*prompts):
        correct, mean_logps = zip(*prompts, strict=True)
        return SimpleNamespace(correct=np.array(correct, dtype=float), mean_logps=np.array(mean_logps, dtype=float))

    right_is_surer, wrong_is_surer, never_wrong = (
        ([1, 1, 0, 0], [-1, -2, -3, -4]),
        ([1, 1, 0, 0], [-1, -4, -2, -3]),
        ([1, 1, 1, 1], [-1, -2, -3, -4]),
    )
    sets = {
        "grpo": {seed: [samples(right_is_surer, never_wrong)] for seed in range(2)},
        "capo": {seed: [samples(wrong_is_surer, right_is_surer)] for seed in range(2)},
    }
    row = compare(sets, "grpo")[1]
    assert row["auc_within_difference"][0] == pytest.approx((0.5 + 1) / 2 - 1)
    assert row["auc_common_difference"][0] == pytest.approx(0.5 - 1)


def test_a_method_without_a_mixed_prompt_has_no_test():
    mixed = SimpleNamespace(correct=np.array([[1.0, 0.0]]), mean_logps=np.array([[-1.0, -2.0]]))
    solved = SimpleNamespace(correct=np.ones((1, 2)), mean_logps=mixed.mean_logps)
    sets = {name: {seed: [of] for seed in range(2)} for name, of in dict(grpo=mixed, a=solved, b=mixed).items()}
    rows = compare(sets, "grpo")
    assert np.isnan(rows[1]["auc_within"]) and np.isnan(rows[1]["auc_within_p"]) and rows[2]["auc_within_p"] == 1
    extra = dict(auc_pooled=0.5, perplexity_consistency=0.5)
    assert table([rows[1] | extra], "grpo")[1][0][-3:-1] == ["undefined", "undefined"]


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
    far_out = few | dict(auc_pooled=0.5, perplexity_consistency=0.5, accuracy_p=0.0004)
    assert table([far_out], "grpo")[1][0][-1].endswith("], <0.01")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(baseline="none"), "baseline must be one of grpo, capo, broken"),
        (dict(extra=1), "must hold baseline, methods, train, benchmarks, seeds and may hold"),
        (dict(methods=dict(grpo=dict(method="ppo"))), "grpo needs a `method` of"),
        (dict(methods=dict(grpo=dict(method="grpo", tau=1))), "unknown key 'tau'. It is an option of capo"),
        (dict(methods=dict(grpo=None)), "grpo needs a `method` of"),
        (dict(seeds=[0, 0]), "no seed may be named twice, but 0 is"),
        *((dict(seeds=[seed]), f"from 0 to 4294967295, got {seed!r}") for seed in (-1, "1", 1.5, True, None, 2**32)),
        (dict(seeds=[]), "seeds must be a list of whole numbers, got []"),
        (dict(seeds=3), "seeds must be a list of whole numbers, got 3"),
        *(
            (dict(baseline=name, methods={name: dict(method="grpo")}), "becomes the name of a file or folder")
            for name in ("../x", "..", "/x", "", "a/b", "a\\b", ".x", "-x", "NUL", "a\nb", "x" * 300, 5)
        ),
        (dict(methods=dict(grpo=dict(method="grpo"), GRPO=dict(method="grpo"))), "'grpo' and 'GRPO' would become one"),
        (dict(baseline="Base", methods=dict(Base=dict(method="grpo"))), "no method may be called 'base'"),
        (dict(methods=dict(grpo=dict(method="grpo", seed=1))), "seed comes from the seeds"),
        (dict(methods=dict(grpo=dict(method="grpo", env=dict(LD_PRELOAD="x")))), "env may not set 'LD_PRELOAD'"),
        (dict(output_dir=""), "output_dir must be the path of a folder, got ''"),
        (dict(evaluate=dict(output_dir="x")), "output_dir comes from the plan itself"),
        (dict(evaluate=dict(temperature=-1)), "must be positive, got -1.0"),
        (dict(benchmarks=["arithmetic_9"]), "there is no benchmark"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(tmp_path, capsys, changes, message):
    assert cli.main(["compare", plan_for(tmp_path, **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_plan_are_named_at_once(tmp_path, capsys):
    methods = {"a/b": dict(method="grpo"), "x": dict(method="capo", tau="high")}
    assert cli.main(["compare", plan_for(tmp_path, baseline="x", seeds=[-1, "2"], methods=methods)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("trl-capo compare: error: ") for line in lines)
    for wanted in ("'a/b' contains '/'", "got -1", "got '2'", "tau must be a number, got 'high'"):
        assert sum(wanted in line for line in lines) == 1


def finished(folder, rows=20, weights=b"w" * 8):
    """What a run leaves, recorded as `run` does it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in ("model", "evaluation/model"):
        (folder / part).mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    pq.write_table(pa.table({"sample": list(range(rows))}), folder / "evaluation" / "model" / "samples.parquet")
    summary = {"benchmarks": {"b": {"num_prompts": 5, "num_samples": 4}}}
    (folder / "evaluation" / "model" / "summary.json").write_text(json.dumps(summary))
    record = {"trained": True, "seconds": {"train": 1, "evaluate": 1}, "complete": script._files(folder)}
    (folder / "work.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model/model.safetensors", None),
        ("model/model.safetensors", b""),
        ("model/model.safetensors", b"w" * 7),
        ("evaluation/model/summary.json", b"{"),
        ("evaluation/model/summary.json", b'{"benchmarks": {"other": {"num_prompts": 5, "num_samples": 4}}}'),
        ("evaluation/model/samples.parquet", None),
        ("evaluation/model/samples.parquet", b"PAR1"),
        ("work.json", None),
        ("work.json", b""),
        ("work.json", b'{"trained": true, "seconds": {}, "complete": [1]}'),
    ],
)
def test_a_run_is_complete_only_while_its_files_are_those_recorded(tmp_path, file, content):
    plan = script.Plan("grpo", {"grpo": {}}, {}, ["b"], [0], output_dir=str(tmp_path))
    finished(tmp_path / "grpo-0")
    assert script.is_done(plan, "grpo", 0)
    path = tmp_path / "grpo-0" / file
    path.unlink() if content is None else path.write_bytes(content)
    assert not script.is_done(plan, "grpo", 0)


def test_a_summary_of_other_samples_does_not_complete_a_run(tmp_path):
    plan = script.Plan("grpo", {"grpo": {}}, {}, ["b"], [0], output_dir=str(tmp_path))
    finished(tmp_path / "grpo-0", rows=19)
    assert not script.is_done(plan, "grpo", 0)
    assert script._incomplete(tmp_path / "grpo-0", True, ["b"]) == "the summary is of other benchmarks or samples."


def test_unknown_options_of_the_evaluation_are_refused(tmp_path, capsys):
    assert cli.main(["compare", plan_for(tmp_path, evaluate=dict(num_sample=4))]) == 2
    assert "--num_sample" in capsys.readouterr().err
    words = script.evaluation_options(["b"], dict(statistics=True, seed=1))
    assert words == ["--benchmark", "b", "--statistics", "--seed=1"]


def test_the_recipe_holds_every_method(repository):
    from trl_capo.methods import METHODS

    plan = script.read_plan(str(repository / "recipes" / "arithmetic" / "compare.yaml"))
    assert {options["method"] for options in plan.methods.values()} == set(METHODS)
    assert Path(plan.output_dir).parts[0] == "runs"
