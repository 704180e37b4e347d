"""The study's own parts against the product's slower ones, and a tiny study from runs to tables."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trl_capo.calibration.metrics import precision_at_coverage
from trl_capo.evaluation.grade import grade
from trl_capo.evaluation.summary import summarize


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import arithmetic_evidence as evidence
import arithmetic_study as study


def test_grading_boxes_agrees_with_math_verify():
    row = [
        r"12+30=42;\boxed{42}",
        r"12+30=042;\boxed{042}",
        r"12+30=43;\boxed{43}",
        r"12+30=42;\boxed{42}\boxed{43}",
        r"12+30=42;\boxed{4:2}",
        r"12+30=42;\boxed{40+2}",
        r"12+30=42;\boxed{}",
        "12+30=42;",
        r"12+30=42;\boxed{42",
        "",
    ]
    answers, correct = study.grade_boxes([row], [r"\boxed{42}"])
    expected = grade(row, [r"\boxed{42}"] * len(row), progress=False)
    assert answers == [expected.answers]
    np.testing.assert_array_equal(correct[0], expected.correct)
    assert 0 < correct.sum() < len(row)


def test_step_credit_counts_right_steps():
    prompt = [{"role": "user", "content": "63*15-43="}]  # 945, then 902
    texts = [
        r"63*15=945;945-43=902;\boxed{902}",
        r"63*15=945;945-43=912;\boxed{912}",
        r"63*15=955;955-43=912;\boxed{912}",
        r"63*15=945;",
        "",
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = study.step_credit(completions, [prompt] * 5, [r"\boxed{902}"] * 5)
    assert rewards == [1.0, 0.2, 0.0, 0.2, 0.0]


def test_curves_are_read_where_they_first_reach_an_accuracy():
    accuracy, auc = np.array([0.2, 0.4, 0.6]), np.array([0.6, 0.8, 0.7])
    assert evidence.auc_at(0.3, accuracy, auc) == pytest.approx(0.7)
    assert evidence.auc_at(0.6, accuracy, auc) == pytest.approx(0.7)
    assert evidence.auc_at(0.2, accuracy, auc) == pytest.approx(0.6)
    assert evidence.auc_at(0.9, accuracy, auc) == pytest.approx(0.7)


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.8, 1.0])
def test_precision_of_counted_rows_is_that_of_repeated_rows(coverage):
    rng = np.random.default_rng(0)
    right, confidence = (rng.random(40) < 0.5).astype(float), -np.sort(rng.random(40))
    counts = rng.integers(0, 4, 40)
    [found] = evidence.precision_of_top(right, counts, (coverage,))
    # Copies of a row tie, which the metric averages; rows differ, so both agree wherever a row is not cut in two.
    expected = precision_at_coverage(np.repeat(right, counts), np.repeat(confidence, counts), coverage)
    assert found == pytest.approx(expected, abs=3 / (coverage * counts.sum()))
    ones = np.ones(40, dtype=int)
    assert evidence.precision_of_top(right, ones, (coverage,)) == [precision_at_coverage(right, confidence, coverage)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Base, GRPO and CAPO of a study of two steps, one seed."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RESULTS", folder)
        patch.setattr(evidence, "RESULTS", folder)
        patch.setitem(study.WORLDS, "slips", study.World(steps=2, checkpoints=1, curve_prompts=8))
        splits = {"test_2": 12, "test_3": 12, "test_4": 12}
        patch.setattr(study, "TEST_SPLITS", splits)
        for method in ("base", "grpo", "capo"):
            assert study.run("slips", method, 0, False, time.time() + 3600)
        yield folder


def test_a_run_without_time_is_not_started(results):
    assert not study.run("slips", "capo", 1, False, time.time() - 1)
    assert not (results / "slips" / "capo-1.json").exists()


def test_what_is_stored_gives_back_what_was_measured(results):
    runs = evidence.load("slips")
    assert list(runs) == ["base", "grpo", "capo"]
    assert [t for t, _ in runs["base"].temperatures] == [0.3, 0.5, 0.7, 1.0]
    assert [key for _, key in runs["grpo"].temperatures] == ["T0.7", 2, "T1.3"]
    for method, last in (("base", 0), ("grpo", 2), ("capo", 2)):
        of = runs[method]
        assert of.steps == ([0] if method == "base" else [1, 2])
        for split in ("test_2", "test_3", "test_4"):
            correct = np.unpackbits(of.by_prompt("correct", last, (split,)), axis=-1)[0]
            logps, answers = of.by_prompt("mean_logps", last, (split,))[0], of.by_prompt("answers", last, (split,))[0]
            stored = of.numbers[0]["checkpoints"][str(last)][split]
            again = summarize(correct, logps, [[None if a < 0 else a for a in row] for row in answers.tolist()])
            assert correct.shape == (12, 16)
            assert again["accuracy"] == pytest.approx(stored["accuracy"])
            assert evidence.value(lambda s, of=of, last=last: of.accuracy(last, s), (split,)) == stored["accuracy"]
            auc = evidence.value(lambda s, of=of, last=last: of.auc(last, s), (split,))
            assert auc == pytest.approx(stored["auc_within"], abs=1e-6)
            assert again["auc_within"] == pytest.approx(stored["auc_within"], abs=1e-6)
            assert stored["majority"] == pytest.approx(again["majority"])
    cold, warm, hot = (runs["grpo"].summary("entropy", key, "test_4") for key in ("T0.7", 2, "T1.3"))
    assert cold < warm < hot
    assert (runs["grpo"].accuracy(2, "test_2") != runs["base"].accuracy(0, "test_2")).any()
    options = json.loads((results / "slips" / "capo-0.json").read_text())["options"]
    assert options["tau"] == study.WORLDS["slips"].tau and options["learning_rate"] == 2e-4


def test_the_page_is_about_the_stored_samples(results, tmp_path, monkeypatch):
    runs = evidence.load("slips")
    for of in evidence.sample_sets(runs["capo"], 0):
        stored = runs["capo"].numbers[0]["checkpoints"]["2"][of.benchmark]
        again = summarize(of.correct, of.mean_logps, of.answers)
        for name in ("accuracy", "auc_within", "perplexity_consistency"):
            assert again[name] == pytest.approx(stored[name], abs=1e-6, nan_ok=True)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    evidence.write_page("slips")
    assert "CAPO - base" in (tmp_path / "runs" / "slips.html").read_text()


def test_votes_and_questions_agree_with_the_summary(results):
    runs = evidence.load("slips")["grpo"]
    votes, (right, confidence) = evidence.selected(runs), evidence.questions(runs)
    checkpoint = runs.numbers[0]["checkpoints"]["2"]
    expected = np.mean([checkpoint[split]["perplexity_consistency"] for split in ("test_2", "test_3", "test_4")])
    assert votes["Perplexity Consistency"][16].mean() == pytest.approx(expected)
    np.testing.assert_array_equal(right, votes["Perplexity Consistency"][16])
    assert ((confidence > 0) & (confidence <= 1)).all()
    for by_count in votes.values():
        one = np.concatenate([runs.accuracy(2, split) for split in ("test_2", "test_3", "test_4")], axis=1)
        np.testing.assert_allclose(by_count[1], one)  # one sample leaves no choice


def test_tables_say_what_was_measured(results, tmp_path):
    runs = evidence.load("slips")
    tables = evidence.world_tables("slips", runs, tmp_path)
    evidence.draw_curves({"slips": runs}, tmp_path / "curves.png")
    uses = list(tmp_path.glob("*uses*"))
    assert uses and all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "curves.png", *uses))
    capo = next(row for row in tables["main"].splitlines() if "(`capo`)" in row)
    gap = runs["capo"].accuracy(2, "test_2").mean() - runs["grpo"].accuracy(2, "test_2").mean()
    assert f"| {gap:+.3f} [" in capo
    assert tables["fall"].count("\n") == 5 and "| 2 |" in tables["fall"]
    assert "| CAPO | single" not in tables["precision"] and "single samples" in tables["precision"]


def test_a_method_differs_from_itself_by_nothing(results):
    runs = evidence.load("slips")
    for name, gap in evidence.against(runs["grpo"], runs["grpo"]).items():
        assert gap.value == gap.low == gap.high == 0, name
    matched = evidence.at_matched_accuracy(runs["grpo"], runs["grpo"], runs["base"])["difference"]
    assert matched.value == matched.low == matched.high == 0


def test_common_prompts_only(results):
    """The AUC on prompts that are mixed for both, by hand."""
    runs = evidence.load("slips")
    ours, theirs = (runs[method].auc(2, "test_3")[0] for method in ("capo", "grpo"))
    common = ~np.isnan(ours) & ~np.isnan(theirs)
    found = evidence.against(runs["capo"], runs["grpo"], ("test_3",))["auc_common"].value
    assert found == pytest.approx(ours[common].mean() - theirs[common].mean(), abs=1e-6)


def test_a_threshold_is_the_lowest_that_is_precise_enough():
    rng = np.random.default_rng(1)
    for _ in range(50):
        right, confidence = (rng.random(30) < 0.7).astype(float), rng.integers(0, 12, 30) / 12
        found = evidence.threshold(right, confidence, 0.8)
        precise = [level for level in np.unique(confidence) if right[confidence >= level].mean() >= 0.8]
        assert found == (min(precise) if precise else np.inf)
    assert evidence.threshold(np.zeros(4), np.arange(4.0), 0.8) == np.inf


def test_abstention_promises_on_one_half_and_keeps_on_the_other():
    right = np.array([[1, 1, 1, 1, 0, 0, 1, 0]])
    confidence = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]])
    # Even prompts are right at .9, .7 and .3 and wrong at .5: at .8 they promise .7, above which the odd ones answer
    # one question, rightly. Odd prompts promise .6, above which the even ones answer two, rightly.
    kept, answered = evidence.abstention({"capo": (right, confidence)}, (0.8,))[0.8]["capo"]
    assert kept.value == 1 and answered.value == 3 / 8
    kept, answered = evidence.abstention({"capo": (0 * right, confidence)}, (0.8,))[0.8]["capo"]
    assert np.isnan(kept.value) and answered.value == 0


def test_settings_are_chosen_by_the_rule(tmp_path, monkeypatch):
    tried = ("grpo", "grpo std", "capo", "capo tau 0.1", "capo tau 0.25", "capo lr 1e-4", "simko", "simko mix 0.1")
    tried += ("gspo", "gspo lr 1e-4", "gspo lr 4e-4", "cde", "cde omega 2", "codapo")
    monkeypatch.setattr(evidence, "TUNING", {"slips": dict.fromkeys(tried)})
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    (tmp_path / "slips_tuning").mkdir()

    def write(setting: str, seed: int, accuracy: float, auc: float):
        numbers = {"accuracy": accuracy, "auc_within": auc, "auc_pooled": 0.9, "entropy": 0.2}
        path = tmp_path / "slips_tuning" / f"{setting.replace(' ', '_')}-{seed}.json"
        path.write_text(json.dumps({"checkpoints": {"120": {"validation_2": numbers}}}))

    for seed in (10, 11):
        write("grpo", seed, 0.40, 0.80)
        write("grpo std", seed, 0.42, 0.70)
        write("capo", seed, 0.41, 0.75)
        write("capo tau 0.1", seed, 0.39, 0.90)  # too inaccurate
        write("capo tau 0.25", seed, 0.401, 0.80)
    write("capo lr 1e-4", 10, 0.42, 0.95)  # one seed only
    for setting, accuracy, auc in (("gspo", 0.41, 0.7), ("gspo lr 1e-4", 0.402, 0.8), ("gspo lr 4e-4", 0.39, 0.9)):
        write(setting, 10, accuracy, auc)
    for setting, accuracy, auc in (("cde", 0.3, 0.9), ("cde omega 2", 0.31, 0.8)):  # none is accurate enough
        write(setting, 10, accuracy, auc)
    write("simko", 10, 0.42, 0.9)  # its other setting was not run yet
    write("codapo", 10, 0.4, 0.7)
    assert evidence.chosen_settings("slips") == ("grpo std", "capo tau 0.25")
    assert evidence.chosen_alike("slips") == {
        "grpo": "grpo",
        "capo": "capo lr 1e-4",
        "gspo": "gspo lr 1e-4",
        "codapo": "codapo",
        "cde": "cde omega 2",
    }
    assert "| **gspo lr 1e-4** | 10 |" in evidence.tuning_table("slips")
    assert "| **capo tau 0.25** | 11 | 0.401 | 0.800 |" in evidence.tuning_table("slips")
    for seed in (10, 11):
        write("grpo std", seed, 0.5, 0.7)  # now no setting of CAPO is accurate enough: the most accurate one counts
    assert evidence.chosen_settings("slips") == ("grpo std", "capo")


def test_the_median_gap_is_over_pairs_of_one_prompt(results):
    base = evidence.load("slips")["base"]
    correct, logps, _ = (array[0] for array in base.samples())
    gaps = [
        abs(logps[p, i] - logps[p, j])
        for p in range(len(correct))
        for i in range(16)
        for j in range(16)
        if correct[p, i] > correct[p, j]
    ]
    assert evidence.median_gap(base) == pytest.approx(np.median(gaps))
    row = evidence.regime_table({"slips": evidence.load("slips")}).splitlines()[-1]
    assert row.startswith("| `slips` |") and f"| {study.WORLDS['slips'].tau / np.median(gaps):.1f} |" in row


def test_tables_go_between_their_marks(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- table: a -->\nold\n<!-- end -->\nafter\n<!-- end -->\n")
    evidence.write_tables(document, {"a": "| \\1 new |"})
    evidence.write_tables(document, {"a": "| \\1 new |"})
    assert document.read_text() == ("before\n<!-- table: a -->\n\n| \\1 new |\n\n<!-- end -->\nafter\n<!-- end -->\n")
    document.write_text("<!-- table: b -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="b"):
        evidence.write_tables(document, {"a": ""})
