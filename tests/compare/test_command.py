"""`trl-capo compare`: what is there is not run again, what fails is named, and the table is what was measured."""

import json
from importlib.metadata import version

import numpy as np
import pytest

from tests.compare.plans import plan_for
from trl_capo import cli
from trl_capo.calibration.bootstrap import paired_difference
from trl_capo.compare import runner
from trl_capo.evaluation.samples import read_samples
from trl_capo.report.comparison import by_prompt, evaluation_folder
from trl_capo.scripts import compare as script


@pytest.fixture
def calls(monkeypatch):
    """Commands run in this process instead of in one of their own: faster by the imports."""
    made = []

    def succeeds(command, options, log, lock, share):
        log.touch()
        made.append((command, next((p for p in options if "recipe.yaml" in p or "model" in p), options[0])))
        return cli.main([command, *options]) == 0

    monkeypatch.setattr(runner, "_succeeds", succeeds)
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
    assert f"Next: trl-capo compare {plan} " in captured.out and "report.html" in captured.out
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
        and "Runs used different" not in text
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


def test_a_plan_for_the_cpu_leaves_the_gpus_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    seen = []
    monkeypatch.setattr(script, "run_all", lambda runs, shares, minutes=None: seen.append(shares) or [])
    assert cli.main(["compare", plan_for(tmp_path), "--workers", "3"]) == 1, "nothing was run or compared"
    assert [len(shares) for shares in seen] == [1, 3]
    assert {share["CUDA_VISIBLE_DEVICES"] for shares in seen for share in shares} == {""}


def test_a_base_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    tried = []

    def do(run, share, say):
        tried.append(run.name)
        log = tmp_path / "x.log"
        log.write_text("trl-capo evaluate: no such model\n")
        return log

    monkeypatch.setattr(runner, "do", do)
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "grpo", "--seeds", "1"]) == 2
    assert tried == ["base", "grpo-1"]


def test_no_folder_is_claimed_before_its_run(tmp_path, calls, capsys):
    """Settings that were not run yet may still change."""
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "none"]) == 2
    assert "--methods none: " in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "grpo", "--seeds", "0"]) == 0
    changed = dict(grpo=dict(method="grpo"), capo=dict(method="capo", tau=0.4))
    assert cli.main(["compare", plan_for(tmp_path, methods=changed), "--methods", "grpo", "--seeds", "0"]) == 0


def test_a_changed_plan_is_refused(tmp_path, calls, capsys):
    assert cli.main(["compare", plan_for(tmp_path), "--methods", "capo", "--seeds", "0"]) == 0
    calls.clear()
    for changes, message in (
        (dict(baseline="capo"), "already contains a comparison with baseline=grpo."),
        (dict(methods=dict(grpo=dict(method="grpo"), capo=dict(method="capo", tau=0.4))), "already contains a run"),
    ):
        assert cli.main(["compare", plan_for(tmp_path, **changes)]) == 2
        assert message in capsys.readouterr().err and calls == []


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


def test_a_method_of_your_own_stands_beside_capo(tmp_path, calls, monkeypatch, repository):
    """The example of docs/your_method.md."""
    page = (repository / "docs" / "your_method.md").read_text()
    (tmp_path / "leave_one_out.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    methods = dict(
        capo=dict(method="capo", ref_ppl_mask=False, tau=0.5),
        rloo=dict(method="leave_one_out:LeaveOneOutTrainer", advantage_scale=0.5),
    )
    wrong = methods | dict(rloo=methods["rloo"] | dict(advantage_size=0.5))
    assert cli.main(["compare", plan_for(tmp_path, baseline="capo", seeds=[0], methods=wrong)]) == 2
    assert cli.main(["compare", plan_for(tmp_path, baseline="capo", seeds=[0], methods=methods)]) == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["capo", "base", "rloo"]
    assert rows[2]["accuracy_difference"] is not None
