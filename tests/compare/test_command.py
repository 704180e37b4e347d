"""`trl-capo compare`: what is there is not run again, what fails is named, and the table is what was measured."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tests.compare.plans import plan_for
from trl_capo import cli
from trl_capo.calibration.bootstrap import paired_difference
from trl_capo.compare import runner
from trl_capo.evaluation.samples import read_samples
from trl_capo.report.comparison import by_prompt, evaluation_folder
from trl_capo.scripts import compare as script


def run_in_this_process(monkeypatch) -> list[tuple[str, str]]:
    """Commands run here instead of in a process of their own: faster by the imports. Returns those that were run."""
    made = []

    def succeeds(command, options, log, lock, share):
        log.touch()
        made.append((command, next((p for p in options if "recipe.yaml" in p or "model" in p), options[0])))
        return cli.main([command, *options]) == 0

    monkeypatch.setattr(runner, "_succeeds", succeeds)
    return made


@pytest.fixture
def calls(monkeypatch):
    return run_in_this_process(monkeypatch)


@dataclass
class Command:
    """What one `trl-capo compare` returned, printed and ran."""

    code: int
    out: str
    err: str
    calls: list[tuple[str, str]]


@dataclass
class Comparison:
    """A plan of which CAPO was run first, alone, and then all the rest, of which two runs fail."""

    plan: str
    first: Command
    second: Command
    folder: Path

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "comparison.json").read_text())

    @property
    def rows(self) -> dict[str, dict]:
        return {row["method"]: row for row in self.results["rows"]}

    @property
    def samples(self) -> dict[str, dict[int, list]]:
        """Samples by method and seed."""
        return {
            name: {seed: read_samples(evaluation_folder(self.folder / f"{name}-{seed}")) for seed in (0, 1)}
            for name in ("grpo", "capo")
        }


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("compared")
    plan = plan_for(folder)

    def run(*options: str) -> Command:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(out), redirect_stderr(err):
            calls = run_in_this_process(monkeypatch)
            code = cli.main(["compare", plan, *options])
        return Command(code, out.getvalue(), err.getvalue(), calls)

    return Comparison(plan, run("--methods", "capo"), run(), folder / "out")


def test_a_part_of_the_plan_is_run_alone(compared):
    assert compared.first.code == 0
    assert "Nothing to compare yet: base and grpo are needed" in compared.first.out
    assert len(compared.first.calls) == 5  # the base's evaluation, two trainings, two evaluations


def test_what_is_there_is_not_run_again_and_what_fails_is_named(compared):
    second = compared.second
    assert second.code == 2
    assert "some runs failed" in second.err and "broken-0/train.log" in second.err
    assert "2 of 6 runs are missing: broken-0, broken-1" in second.out
    assert f"Next: trl-capo compare {compared.plan} " in second.out and "report.html" in second.out
    assert [command for command, _ in second.calls].count("train") == 4
    assert not any("capo" in where for _, where in second.calls)


def test_differences_are_those_of_the_samples(compared):
    rows, samples = compared.rows, compared.samples
    assert list(rows) == ["grpo", "base", "capo"] and rows["capo"]["seeds"] == 2
    for metric in ("accuracy", "auc_within"):
        ours, theirs = (by_prompt(samples[name], metric) for name in ("capo", "grpo"))
        assert [of.shape for of in ours] == [(2, 5), (2, 5)]
        expected = paired_difference(ours, theirs)
        found = [np.nan if number is None else number for number in rows["capo"][f"{metric}_difference"]]
        assert found == pytest.approx([expected.value, expected.low, expected.high], nan_ok=True)
        assert rows["base"][f"{metric}_difference"] is rows["grpo"][f"{metric}_difference"] is None
    correct = np.array([[s.correct.mean() for s in sets] for sets in samples["capo"].values()])
    assert rows["capo"]["accuracy"] == pytest.approx(correct.mean())


def test_table_figure_and_page_of_what_was_run(compared):
    text, page = ((compared.folder / name).read_text() for name in ("comparison.md", "report.html"))
    assert "| capo | 2 | " in text and "broken" not in text
    assert "arithmetic_test_2 (5 questions x 4)" in text
    assert "Runs used different" not in text and "could not be graded" not in text
    assert (compared.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "All seeds" in page and "capo, seed 0 - grpo, seed 0" in page and "- base" not in page


def test_numbers_of_each_run_are_written(compared):
    results = compared.results
    assert results["planned"]["missing"] == ["broken-0", "broken-1"] and results["planned"]["seeds"] == [0, 1]
    made = results["runs"]["capo-1"]
    assert made["versions"][0]["trl"] == version("trl") and len(made["versions"]) == 1
    assert set(made["seconds"]) == {"train", "evaluate"}
    assert made["threads"] >= 1 and made["date"]
    saved, sets = np.load(compared.folder / "comparison.npz"), compared.samples["capo"]
    for i, of in enumerate(sets[1]):
        by_seed = compared.rows["capo"]["by_run"]["capo-1"][of.benchmark]
        assert by_seed["accuracy"] == pytest.approx(of.correct.mean())
        np.testing.assert_allclose(saved[f"capo-1/{of.benchmark}/accuracy"], of.correct.mean(axis=1))
        expected = by_prompt(sets)[i][1].astype(np.float32)
        np.testing.assert_array_equal(saved[f"capo-1/{of.benchmark}/auc_within"], expected)
    assert i == 1, "both benchmarks"


def test_a_finished_comparison_runs_nothing(compared, calls):
    assert cli.main(["compare", compared.plan, "--methods", "grpo", "capo"]) == 0
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
