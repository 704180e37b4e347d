"""`trl-capo demo`, small: it trains, evaluates, compares, draws, and goes on where it was stopped."""

import json

import pytest

from trl_capo import cli
from trl_capo.compare.demo import what_to_look_at
from trl_capo.evaluation.samples import read_samples


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    arguments = ["demo", "--output_dir", str(folder), "--steps", "22", "--prompts", "6", "--samples", "4"]
    assert cli.main(arguments) == 0
    return folder, arguments


def test_results(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    assert set(results["models"]) == {"base", "grpo", "capo"}
    for benchmarks in results["models"].values():
        assert list(benchmarks) == [f"arithmetic_test_{n}" for n in (2, 3, 4, 5)]
        for summary in benchmarks.values():
            assert 0 <= summary["accuracy"] <= 1 and summary["ppl_wrong"] > 1
    for history in results["training"].values():
        assert [entry["step"] for entry in history] == [10, 20, 22]
        assert all(0 < entry["capo/frac_mixed"] < 1 for entry in history)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "arithmetic_test_5" in (folder / "report.html").read_text()


def test_numbers_are_those_of_the_samples(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())["models"]
    for model in ("base", "capo"):
        sets = read_samples(folder / "evaluation" / model)
        assert {of.benchmark for of in sets} == set(results[model])
        for of in sets:
            assert of.correct.shape == (6, 4)
            assert results[model][of.benchmark]["accuracy"] == pytest.approx(of.correct.mean(), abs=1e-12)


def test_finished_parts_are_kept_missing_ones_resumed_and_the_table_printed(finished, capfd):
    """As if stopped twice: GRPO after its last checkpoint, the evaluation of CAPO in the middle."""
    folder, arguments = finished
    first = json.loads((folder / "results.json").read_text())
    for name in ("grpo/model.safetensors", "evaluation/capo/samples.parquet", "results.json"):
        (folder / name).unlink()
    kept = {
        name: (folder / name).stat().st_mtime_ns
        for name in ("capo/model.safetensors", "evaluation/base/samples.parquet")
    }
    capfd.readouterr()
    assert cli.main(arguments) == 0
    again = json.loads((folder / "results.json").read_text())
    assert again["models"] == first["models"]
    rewards = {name: [e["reward"] for e in run["training"]["grpo"]] for name, run in (("1", first), ("2", again))}
    assert len(rewards["2"]) >= 2 and rewards["2"] == rewards["1"][: len(rewards["2"])]
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert (folder / "grpo" / "model.safetensors").exists()
    out = capfd.readouterr().out
    columns = ("accuracy", "AUC", "majority", "PC@4", "precision", "perplexity")
    for text in (*columns, "arithmetic_test_5", "CAPO minus GRPO"):
        assert text in out
    assert "train --config recipes/arithmetic/capo/config_demo.yaml" in out


def test_other_settings_need_another_folder(finished, capsys):
    folder, arguments = finished
    assert cli.main([*arguments, "--seed", "1"]) == 2
    assert "already contains a demo with seed=0." in capsys.readouterr().err


def test_bad_numbers(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--steps", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_an_undefined_auc_does_not_end_the_demo(finished):
    """With one sample a prompt there is no pair."""
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    for benchmark in results["models"]["capo"].values():
        benchmark["auc_within"] = None
    assert "AUC within undefined, accuracy " in what_to_look_at(results, folder)
