"""The study with the language model: what is run, what is refused, and the report. No model is needed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import language_report
import language_study


def arguments(*words: str):
    return language_study.make_parser().parse_args(["--task", "family", *words])


def test_methods_see_as_many_generations():
    from trl_capo.methods import trainer_of

    for method, (kind, _, updates) in language_study.METHODS.items():
        options = language_study.options_of(arguments("--steps", "3"), method, 0)
        options = {name: value for name, value in options.items() if name not in language_study.NOT_OF_TRAINING}
        config = trainer_of(kind).config_class("x", **options)
        assert config.generation_batch_size == 64
        assert config.steps_per_generation == updates * config.gradient_accumulation_steps
        assert config.max_steps == 3 * updates and config.save_steps % updates == 0


def test_a_run_with_other_options_is_refused(tmp_path):
    path = tmp_path / "grpo-0.json"
    options = language_study.options_of(arguments(), "grpo", 0)
    assert not language_study.is_done(path, options)
    path.write_text(json.dumps({"options": options}))
    assert language_study.is_done(path, options)
    with pytest.raises(SystemExit, match="other options"):
        language_study.is_done(path, options | {"max_steps": 1})


def test_runs_from_two_bases_are_not_mixed(tmp_path, monkeypatch):
    base, results = tmp_path / "base", tmp_path / "results"
    base.mkdir()
    options = language_study.options_of(arguments(), "base", 0)
    words = ["--task", "family", "--methods", "base", "--seeds", "0", "--base", str(base), "--output", str(results)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (results / "family").mkdir(parents=True)
    for weights, digest in ((b"one", "7692c3ad3540bb80"), (b"two", "3fc4ccfe745870e2")):  # sha256sum
        (base / "model.safetensors").write_bytes(weights)
        (results / "family" / "base-0.json").write_text(json.dumps({"options": {**options, "base": digest}}))
        language_study.main(words)  # is done
    (base / "model.safetensors").write_bytes(b"one")
    with pytest.raises(SystemExit, match="another base"):
        language_study.main(words)


def test_a_missing_base_says_how_to_make_it(tmp_path):
    with pytest.raises(SystemExit, match="language_base --task family"):
        language_study.main(["--task", "family", "--base", str(tmp_path / "none"), "--output", str(tmp_path)])


def test_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "family"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for method, rate in (("grpo", 0.5), ("capo", 0.8)):
        for seed in (0, 1):
            correct = (rng.random((20, 4)) < rate).astype(np.float32)
            np.savez(folder / f"{method}-{seed}.npz", correct=correct, auc=rng.random(20).astype(np.float32))
            numbers = dict.fromkeys(language_report.WHOLE, 0.5) | {"coverage_at_90": None}
            content = {"method": method, "seed": seed, "numbers": numbers}
            (folder / f"{method}-{seed}.json").write_text(json.dumps(content))
    language_report.report(folder)
    found = json.loads((tmp_path / "family.json").read_text())
    assert found["capo"]["accuracy"][0] > found["grpo"]["accuracy"][0]
    assert found["capo"]["accuracy_difference"] and "accuracy_difference" not in found["grpo"]
    assert "| capo | 2 |" in capsys.readouterr().out and (tmp_path / "family.png").exists()
