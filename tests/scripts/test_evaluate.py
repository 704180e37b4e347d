"""`trl-capo evaluate`: what is sampled is kept once, killed or not, in one process or two."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from trl_capo import cli
from trl_capo.evaluation import run
from trl_capo.evaluation.grade import grade
from trl_capo.evaluation.samples import read_samples, write_part
from trl_capo.evaluation.summary import summarize


ROOT = Path(__file__).parents[2]


def arguments(model, folder, *more):
    options = [
        "--benchmark",
        "arithmetic_test_2",
        "--num_prompts",
        "70",
        "--num_samples",
        "3",
        "--max_new_tokens",
        "12",
    ]
    return ["evaluate", model, *options, "--output_dir", str(folder), *more]


def tables(folder):
    return pq.read_table(folder / "samples.parquet").to_pylist()


@pytest.fixture(scope="module")
def done(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    assert cli.main(arguments(tiny_model, folder, "--statistics")) == 0
    return folder / Path(tiny_model).name


def test_every_sample_once_and_graded(done):
    rows = tables(done)
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(p, n) for p in range(70) for n in range(3)]
    assert not (done / "parts").exists()
    texts, golds = [row["completion"] for row in rows], [row["solution"] for row in rows]
    grades = grade(texts, golds, progress=False)
    assert [row["correct"] for row in rows] == grades.correct.tolist()
    [of] = read_samples(done)
    assert of.confidences == ["self_certainty", "tail_confidence", "lowest_group_confidence"]
    assert np.isfinite(of.grid("self_certainty")).all()
    assert rows[0]["prompt"].endswith("=") and rows[0]["length"] >= 1

    summary = json.loads((done / "summary.json").read_text())["benchmarks"]["arithmetic_test_2"]
    expected = summarize(of.correct, of.mean_logps, of.answers)
    found = {name: np.nan if summary[name] is None else summary[name] for name in expected}
    assert found == pytest.approx(expected, nan_ok=True)
    assert (summary["num_prompts"], summary["grading_failed"]) == (70, 0)


def test_a_finished_evaluation_is_not_repeated(done, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(run, "load_engine", pytest.fail)
    before = (done / "samples.parquet").stat().st_mtime_ns
    assert cli.main(arguments(tiny_model, done.parent, "--statistics")) == 0
    assert (done / "samples.parquet").stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert "arithmetic_test_2" in out and "already exists: nothing was sampled" in out


def test_other_weights_or_questions_are_another_evaluation(tiny_model, tmp_path, capsys):
    model, questions = tmp_path / "model", tmp_path / "q.jsonl"
    shutil.copytree(tiny_model, model)
    questions.write_text('{"prompt": "1+1=", "solution": "2"}\n{"prompt": "1+2=", "solution": "3"}\n')
    command = ["evaluate", str(model), "--benchmark", str(questions), "--num_samples", "2", "--max_new_tokens", "4"]
    command += ["--output_dir", str(tmp_path / "out")]
    assert cli.main(command) == 0
    questions.write_text('{"prompt": "1+1=", "solution": "2"}\n{"prompt": "1+3=", "solution": "4"}\n')
    assert cli.main(command) == 2
    assert "already contains an evaluation with questions=" in capsys.readouterr().err
    questions.write_text('{"prompt": "1+1=", "solution": "2"}\n{"prompt": "1+2=", "solution": "3"}\n')
    assert cli.main(command) == 0
    weights = model / "model.safetensors"
    os.utime(weights, (1, 1))
    (model / "notes.txt").write_text("mine")
    assert cli.main(command) == 0
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert cli.main(command) == 2
    assert "already contains an evaluation with weights=" in capsys.readouterr().err


def test_a_broken_part_is_sampled_again(tiny_model, tmp_path, capsys):
    """One that a full disk left empty once blocked its evaluation."""
    name = Path(tiny_model).name
    assert cli.main(arguments(tiny_model, tmp_path / "whole")) == 0
    rows = tables(tmp_path / "whole" / name)
    folder = tmp_path / "out" / name
    shutil.copytree(tmp_path / "whole" / name, folder)
    table = pq.read_table(folder / "samples.parquet")
    (folder / "samples.parquet").unlink()
    write_part(folder, "arithmetic_test_2", 0, table.slice(0, 32 * 3))
    part = folder / "parts" / "arithmetic_test_2-000032.parquet"
    part.write_bytes(b"")
    capsys.readouterr()
    assert cli.main(arguments(tiny_model, tmp_path / "out")) == 0
    assert f"{part} cannot be read. It is set aside, and its questions are sampled again" in capsys.readouterr().out
    assert tables(folder) == rows


def test_processes_that_do_not_know_of_each_other_are_refused(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(arguments(tiny_model, tmp_path)) == 2
    assert "2 processes were launched, but each would do the whole job alone" in capsys.readouterr().err


def test_bad_input_is_found_before_anything_is_sampled(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "load_engine", pytest.fail)
    questions = tmp_path / "q.jsonl"
    lines = [json.dumps({"prompt": "1+1=", "solution": "2"})] * 50
    for row, message in (
        ({"prompt": "1" * 40000, "solution": "2"}, "has 40000 tokens"),
        ({"prompt": None, "solution": "2"}, "the prompt in row 50"),
    ):
        questions.write_text("\n".join([*lines, json.dumps(row)]))
        command = ["evaluate", tiny_model, "--benchmark", str(questions), "--output_dir", str(tmp_path / "out")]
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err
    questions.write_text('{"prompt": "1+1=", ')
    assert cli.main(command) == 2
    assert "cannot be read as questions and answers" in capsys.readouterr().err
    first, _, *options = arguments(tiny_model, tmp_path)
    assert cli.main([first, tiny_model, "/nowhere/model", *options]) == 2
    assert "/nowhere/model" in capsys.readouterr().err


def test_a_base_model_without_a_chat_template(tiny_model, tmp_path):
    model = tmp_path / "base"
    shutil.copytree(tiny_model, model)
    for path in (model / "chat_template.jinja", model / "tokenizer_config.json"):
        if path.suffix == ".jinja":
            path.unlink(missing_ok=True)
        else:
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
    assert cli.main(arguments(str(model), tmp_path)) == 0
    [of] = read_samples(tmp_path / "base")
    assert of.correct.shape == (70, 3)


def test_a_folder_holds_one_evaluation(done, tiny_model, capsys):
    assert cli.main(arguments(tiny_model, done.parent, "--statistics", "--seed", "1")) == 2
    assert "already contains an evaluation with seed=0." in capsys.readouterr().err


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_nothing_is_lost_or_repeated(tiny_model, tmp_path, kills):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--num_prompts", "800", "--num_samples", "2"]  # 25 parts
    command = [sys.executable, "-m", "trl_capo.scripts.evaluate", *arguments(tiny_model, tmp_path, *options)[1:]]
    parts, kept, rng = tmp_path / Path(tiny_model).name / "parts", {}, random.Random(0)
    for kill in range(kills):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(parts.glob("*.parquet"))) < 18 * (kill + rng.random()) / kills:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        written = {part: part.stat().st_mtime_ns for part in parts.glob("*.parquet")}
        assert written.items() >= kept.items()  # nothing is sampled again
        kept = written
    assert 0 < len(kept) < 25
    subprocess.run(command, env=environment, check=True, capture_output=True)
    rows = [(row["prompt_id"], row["sample"], row["completion"]) for row in tables(parts.parent)]
    assert [row[:2] for row in rows] == [(p, n) for p in range(800) for n in range(2)]
    assert cli.main(arguments(tiny_model, tmp_path / "whole", *options)) == 0
    whole = tables(tmp_path / "whole" / Path(tiny_model).name)
    assert rows == [(row["prompt_id"], row["sample"], row["completion"]) for row in whole]


def test_two_processes_share_the_work(done, tiny_model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "--mixed_precision",
        "no",
    ]
    command += ["-m", "trl_capo.scripts.evaluate", *arguments(tiny_model, tmp_path, "--statistics")[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert tables(tmp_path / done.name) == tables(done)
    assert result.stdout.count("Samples and summaries") == 1


def test_several_models_and_benchmarks(tiny_model, tmp_path, capsys):
    other = tmp_path / "elsewhere" / Path(tiny_model).name
    other.parent.mkdir()
    other.symlink_to(tiny_model)
    options = arguments(tiny_model, tmp_path / "out")
    options[2:3] = [str(other), "--benchmark", "arithmetic_test_3"]
    options[options.index("70")] = "3"
    assert cli.main(options) == 0
    out = capsys.readouterr().out
    assert "arithmetic_test_2" in out and "arithmetic_test_3" in out
    name = Path(tiny_model).name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [name, f"{name}-2"]
    first, second = (read_samples(tmp_path / "out" / folder) for folder in (name, f"{name}-2"))
    assert [of.benchmark for of in first] == ["arithmetic_test_2", "arithmetic_test_3"]
    assert first[0].table.equals(second[0].table)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--benchmark", "arithmetic_9"], "unknown benchmark 'arithmetic_9'. Use one of"),
        (["--num_samples", "0"], "--num_samples must be at least 1"),
        (["--num_prompts", "0"], "--num_prompts must be at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--max_new_tokens", "100000"], "exceeds the model's context"),
        (["--engine", "vllm"], "vllm must be installed"),
        (["--output_dir", "/proc/nothing"], "cannot be written"),
    ],
)
def test_bad_input_is_one_message(tiny_model, tmp_path, capsys, options, message):
    assert cli.main(arguments(tiny_model, tmp_path, *options)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
