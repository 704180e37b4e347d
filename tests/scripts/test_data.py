"""`trl-capo data check`, `filter` and `regime`, as a user types them."""

import json
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_capo.cli import main
from trl_capo.data.training import DataArguments, load_splits


@pytest.mark.filterwarnings("ignore:.*rows, .* were expected")
def test_check_prints_and_writes_the_health(repositories, tiny_model, tmp_path, capsys):
    output = tmp_path / "health.json"
    options = ["--against", "aime24", "aime25", "--model", tiny_model, "--output", str(output)]
    assert main(["data", "check", "deepscaler", "gsm8k", *options]) == 0
    printed = capsys.readouterr().out
    assert "65 of 40,315" in printed and "questions shared with aime24" in printed and "row 64: $ east" in printed
    found = json.loads(output.read_text())
    assert (found["deepscaler"]["repeated_questions"], found["gsm8k"]["rows"]) == (2, 4)
    assert found["deepscaler"]["prompt_tokens"]["longest"] > found["deepscaler"]["prompt_tokens"]["median"]
    assert found["deepscaler"]["licence"] == "MIT"


def test_check_names_what_is_missing(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "1+1?", "gold": "2"}))
    assert main(["data", "check", str(path)]) == 2
    assert "has no column 'solution', only prompt, gold. Set --solution_column" in capsys.readouterr().err
    assert main(["data", "check", str(path), "--solution_column", "gold", "--split", "test"]) == 2
    assert "has no split 'test': --split takes one of train." in capsys.readouterr().err


def test_filter_keeps_the_mixed_outcomes_and_does_not_sample_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "mixed.jsonl"
    command = ["data", "filter", "arithmetic_test_2", "--model", "arithmetic-base", "--output", str(output)]
    command += ["--num_prompts", "24", "--num_samples", "4", "--max_new_tokens", "40"]
    assert main(command) == 0
    right = defaultdict(list)
    for row in pq.read_table("runs/filter/arithmetic-base/samples.parquet").to_pylist():
        right[row["prompt"]].append(row["correct"])
    expected = {prompt: sum(of) / 4 for prompt, of in right.items() if 0 < sum(of) < 4}
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["prompt"]: row["pass_rate"] for row in kept} == expected and 0 < len(kept) < 24
    assert f"{len(kept)} kept" in capsys.readouterr().out
    assert [row["solution"] for row in load_splits(str(output), None, DataArguments())["train"]] == [
        row["solution"] for row in kept
    ]

    assert main([*command, "--lowest", "0.3"]) == 0
    assert "nothing was sampled" in capsys.readouterr().out
    stricter = [json.loads(line)["pass_rate"] for line in output.read_text().splitlines()]
    assert stricter == [row["pass_rate"] for row in kept if row["pass_rate"] > 0.3]

    assert main(["data", "regime", "runs/filter/arithmetic-base", "--tau", "0.3", "--output", "regime.json"]) == 0
    [(name, found)] = json.loads(Path("regime.json").read_text()).items()
    assert name.startswith("runs/filter/arithmetic-base, ") and found["prompts"] == 24 and found["samples"] == 96
    assert found["frac_mixed"] == len(expected) / 24
    assert found["tau_in_gaps"] == pytest.approx(0.3 / found["gap"])
    assert f"{found['tau_in_gaps']:.1f}" in capsys.readouterr().out.split("tau in gaps")[1]


def test_regime_of_two_runs_with_one_name(tmp_path, monkeypatch, capsys):
    """Equal confidences have no gap to measure tau by."""
    monkeypatch.chdir(tmp_path)
    columns = ("benchmark", "prompt_id", "sample", "answer", "correct", "mean_logp")
    for parent, logps in (("a", (-1.0, -1.0)), ("b", (-1.0, -1.5))):
        rows = [("mine", 0, n, str(n), float(n == 0), logp) for n, logp in enumerate(logps)]
        path = Path(parent, "model", "samples.parquet")
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows]), path)
    assert main(["data", "regime", "a/model", "b/model", "--tau", "0.2", "--output", "regime.json"]) == 0
    first, second = (json.loads(Path("regime.json").read_text())[f"{parent}/model, mine"] for parent in "ab")
    assert (first["gap"], first["tau_in_gaps"], first["auc_within"]) == (0, None, 0.5)
    assert (second["gap"], second["tau_in_gaps"], second["auc_within"]) == (0.5, pytest.approx(0.4), 1)
    assert "nan" in capsys.readouterr().out


def test_regime_refuses_a_tau_that_is_none(tmp_path, capsys):
    assert main(["data", "regime", str(tmp_path), "--tau", "0"]) == 2
    assert "--tau must be positive, got 0.0" in capsys.readouterr().err


def test_what_is_filtered_gets_its_template_again(tmp_path, monkeypatch, capsys):
    """Sampled in a template, written without it: training puts it around the questions again."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+2=", "solution": str(i + 2)} for i in range(12)]
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["data", "filter", "sums.jsonl", "--model", "arithmetic-base", "--output", "mixed.jsonl"]
    command += ["--prompt_template", "qwen25-math-cot", "--num_samples", "8", "--max_new_tokens", "24"]
    assert main(command) == 0
    assert "--dataset_name mixed.jsonl --prompt_template qwen25-math-cot" in capsys.readouterr().out
    kept = [json.loads(line) for line in Path("mixed.jsonl").read_text().splitlines()]
    assert kept and {row["prompt"] for row in kept} <= {row["prompt"] for row in rows}
    again = load_splits("mixed.jsonl", None, DataArguments(prompt_template="qwen25-math-cot"))["train"]
    sampled = {
        tuple(m["content"] for m in prompt)
        for prompt in pq.read_table("runs/filter/questions.parquet")["prompt"].to_pylist()
    }
    assert {tuple(m["content"] for m in prompt) for prompt in again["prompt"]} <= sampled


def test_only_the_arithmetic_world_has_its_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train").mkdir()
    Path("train/train.jsonl").write_text(json.dumps({"prompt": "1+1?", "solution": "2"}))
    assert main(["data", "check", "train", "--output", "health.json"]) == 0
    assert json.loads(Path("health.json").read_text())["train"]["rows"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_samples", "1"], "--num_samples must be at least 2"),
        (["--lowest", "0.5", "--highest", "0.5"], "must be 0 <= lowest < highest <= 1"),
    ],
)
def test_bad_bounds(options, message, capsys):
    assert main(["data", "filter", "arithmetic", "--model", "arithmetic-base", "--output", "x.jsonl", *options]) == 2
    assert message in capsys.readouterr().err
