"""Runs share the machine, leave each other alone, and are not started in vain."""

import json
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.compare.plans import plan_for
from trl_capo.compare import runner
from trl_capo.compare.bars import Bars
from trl_capo.compare.plan import read_plan, runs_of
from trl_capo.progress import PROGRESS, report_progress


def runs_in(folder):
    return runs_of(read_plan(plan_for(folder)))


def trained(runs):
    return [run for of_method in runs.values() for run in of_method.values() if run.recipe is not None]


def test_a_run_that_would_not_end_in_time_is_not_started(tmp_path, monkeypatch, capsys):
    runs, started = runs_in(tmp_path), []
    monkeypatch.setattr(runner, "do", lambda run, share, say: started.append(run.name))
    runner.run_all([runs["grpo"][0]], [{}], 5)
    assert started == ["grpo-0"], "how long it takes is not known yet"
    for seed, seconds in enumerate((240, 10, 9000)):  # the median counts: a suspended laptop is no measure
        folder = tmp_path / "out" / f"grpo-{seed}"
        folder.mkdir(parents=True)
        (folder / "work.json").write_text(json.dumps({"seconds": {"train": seconds, "evaluate": 1}}))
    runner.run_all([runs["capo"][0]], [{}], 6)
    assert started == ["grpo-0"] and "1 runs were not started: they would have ended" in capsys.readouterr().out
    runner.run_all([runs["capo"][0]], [{}], 7)
    assert started == ["grpo-0", "capo-0"]


def test_processes_of_their_own_and_their_logs(tmp_path):
    log = tmp_path / "x.log"
    with (tmp_path / "lock").open("w") as lock:
        assert not runner._succeeds("train", ["--config", str(tmp_path / "none.yaml")], log, lock, {})
    assert "none.yaml" in log.read_text()


@pytest.mark.parametrize(("set_to", "expected"), [(None, "1"), ("7", "7")])
def test_runs_at_a_time_share_the_cores(tmp_path, monkeypatch, set_to, expected):
    runs, seen = runs_in(tmp_path), []
    if set_to is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    monkeypatch.setattr(runner, "num_cores", lambda: 2)

    def called(words, env, **kwargs):
        seen.append(env["OMP_NUM_THREADS"])
        return 0

    monkeypatch.setattr(runner._children, "run", called)
    monkeypatch.setattr(runner, "_incomplete", lambda *run: None)
    runner.run_all([runs["grpo"][0]], runner.shares_of_the_machine(2))
    assert seen == [expected, expected]
    assert json.loads((tmp_path / "out" / "grpo-0" / "work.json").read_text())["threads"] == int(expected)


def test_each_run_at_a_time_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    runs, used, together = runs_in(tmp_path), [], []

    def do(run, share, say):
        used.append(share["CUDA_VISIBLE_DEVICES"])
        together.append(sorted(used))
        time.sleep(0.1)
        used.remove(share["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(runner, "do", do)
    runner.run_all(trained(runs), runner.shares_of_the_machine(3))
    assert all(len(set(gpus)) == len(gpus) for gpus in together) and ["0", "1", "2"] in together
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in runner.shares_of_the_machine(2)] == ["5", "7"]
    with pytest.raises(ValueError, match="--workers 3: each run needs its own GPU, but only 2 are visible"):
        runner.shares_of_the_machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # hides them all
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    shares = runner.shares_of_the_machine(3)
    assert len(shares) == 3 and not any("CUDA_VISIBLE_DEVICES" in share for share in shares)


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path, monkeypatch, capsys):
    run = runs_in(tmp_path)["grpo"][0]
    run.folder.mkdir(parents=True)
    code = f"import fcntl, time; f = open({str(run.folder / 'lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    other = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(runner, "_succeeds", pytest.fail)
        assert runner.do(run, {}) is None
        assert "grpo-0: another process is working on it" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()


def test_an_interrupt_starts_nothing_more(tmp_path, monkeypatch):
    runs, started = runs_in(tmp_path), []

    def interrupted(run, share, say):
        started.append(run.name)
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "do", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_all(trained(runs), [{}])
    assert len(started) < 6


def test_bars_show_what_the_commands_report(tmp_path, monkeypatch, capfd):
    path = tmp_path / "progress.json"
    report_progress(1, 4, "step")
    assert not path.exists(), "nobody asked"
    monkeypatch.setenv(PROGRESS, str(path))
    running = {1: ("GRPO", path)}
    with Bars() as bars:
        bars.show(running)
        for done in (0, 2):
            report_progress(done, 4, "step", accuracy=0.25, auc_within=None)
            bars.show(running)
        bar = bars._bars[1]
        bars.show(running)
        assert bars._bars[1] is bar and (bar.n, bar.total) == (2, 4)
        report_progress(16, 64, "sample")  # the next command
        bars.show(running)
        assert bars._bars[1] is not bar and bars._bars[1].n == 16
        bars.show({})
        assert bars._bars == {}
    shown = capfd.readouterr().err
    assert "GRPO:  50%" in shown and "accuracy=0.25" in shown and "16/64" in shown and "auc_within" not in shown


def finished(folder, rows=20):
    """What a run leaves, recorded as `do` does it."""
    for part in ("model", "evaluation/model"):
        (folder / part).mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"w" * 8)
    pq.write_table(pa.table({"sample": list(range(rows))}), folder / "evaluation" / "model" / "samples.parquet")
    summary = {"benchmarks": {"b": {"num_prompts": 5, "num_samples": 4}}}
    (folder / "evaluation" / "model" / "summary.json").write_text(json.dumps(summary))
    evaluation = folder / "evaluation" / "model"
    run = runner.Run("grpo-0", folder, {}, str(folder / "model"), evaluation, ["b"], {})
    record = {"trained": True, "seconds": {"train": 1, "evaluate": 1}, "complete": runner._files(run)}
    (folder / "work.json").write_text(json.dumps(record))
    return run


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
    run = finished(tmp_path / "grpo-0")
    assert runner.is_done(run)
    path = tmp_path / "grpo-0" / file
    path.unlink() if content is None else path.write_bytes(content)
    assert not runner.is_done(run)


def test_a_summary_of_other_samples_does_not_complete_a_run(tmp_path):
    run = finished(tmp_path / "grpo-0", rows=19)
    assert not runner.is_done(run)
    assert runner._incomplete(run) == "the summary covers other benchmarks or samples."


def test_a_run_is_complete_while_its_files_are_what_they_were(tmp_path, monkeypatch):
    """Also one of an earlier version: sizes by path from the folder of the run."""
    run = runs_in(tmp_path)["grpo"][0]
    monkeypatch.setattr(runner, "_incomplete", lambda run: None)
    files = {"model/model.safetensors": 3, "model/training_args.bin": 2, "evaluation/model/samples.parquet": 4}
    for name, size in files.items():
        path = run.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert not runner.is_done(run)
    (run.folder / "work.json").write_text(json.dumps({"trained": True, "complete": files}))
    assert runner.is_done(run)
    (run.folder / "model" / "model.safetensors").write_bytes(b"")
    assert not runner.is_done(run)
