import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks.abstention import confidence_of, oracle, right_at, simulate
from trl_capo.calibration.abstention import Abstention, choose_threshold, reach, starts
from trl_capo.errors import UserError


def literal_threshold(correct, confidence, precision, delta):
    """The procedure step by step, with scipy's own Clopper-Pearson interval."""
    rows = sorted(zip(confidence, correct, strict=True), reverse=True)
    begin = [n for n in starts(len(rows), precision, delta) if n <= len(rows)]
    step, best, level = max(1, round(0.01 * len(rows))), None, 0.0
    for n in range(begin[0], len(rows) + 1) if begin else ():
        if n not in begin and (n - begin[0]) % step:
            continue
        if n in begin:
            level += delta / len(begin)
        threshold = rows[n - 1][0]
        kept = [c for s, c in rows if s >= threshold]
        test = binomtest(int(sum(kept)), len(kept), alternative="greater")
        if level > 0 and test.proportion_ci(1 - level, method="exact").low >= precision:
            best = threshold
        else:
            level = 0.0
    return best


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.2])
def test_every_start_can_pass(precision, delta):
    """No level is spent on a start that could not pass if all its answers were right."""
    for n in (50, 59, 100, 299, 300, 500, 1000, 4000, 100_000):
        begin = starts(n, precision, delta)
        assert begin == sorted(set(begin)) and begin[0] >= max(50, 0.1 * n) and len(begin) <= 4
        assert all(precision**start <= delta / len(begin) * (1 + 1e-9) for start in begin)
        assert len(begin) == 1 or begin[-1] <= n


@pytest.mark.parametrize("precision, needed", [(0.8, 50), (0.9, 50), (0.95, 59), (0.99, 299), (0.999, 2995)])
def test_enough_right_answers_prove_any_precision(precision, needed):
    """ceil(log 0.05 / log precision), and at least 50: one question fewer proves nothing."""
    assert choose_threshold(np.ones(needed), np.arange(needed), precision).threshold == 0.0
    if needed > 50:
        assert choose_threshold(np.ones(needed - 1), np.arange(needed - 1), precision).threshold is None


@pytest.mark.parametrize("population", ["flat top", "low flat top", "noisy top", "noisy tenth"])
def test_coverage_where_the_surest_are_no_safe_start(population):
    """Shares of the oracle's coverage, measured over 1,000 sets by `benchmarks/abstention.py`."""
    found = simulate(population, 0.9, 1000, 60)
    assert found["share"] >= 0.63 and found["broken"] <= 9  # P(Binomial(60, 0.05) > 9) is 0.0006
    assert simulate(population, 0.9, 4000, 15)["share"] >= 0.85


@pytest.mark.parametrize("name", ["flat top", "ties, flat top", "noisy top"])
def test_the_oracle_of_the_simulation(name):
    """Against a search over all thresholds among many drawn questions."""
    coverage, at = oracle(name, 0.9)
    rng = np.random.default_rng(0)
    c = rng.random(400_000)
    correct, seen = rng.random(c.size) < right_at(name, c, 0.9), confidence_of(name, c)
    grid = [(seen >= t) for t in np.linspace(0, 0.95, 96)]
    best = max(kept.mean() for kept in grid if correct[kept].mean() >= 0.9)
    assert coverage == pytest.approx(best, abs=0.012)
    assert at(0.5) == pytest.approx(((seen >= 0.5).mean(), correct[seen >= 0.5].mean()), abs=0.005)


def test_what_is_within_reach():
    rng = np.random.default_rng(0)
    confidence = rng.random(200)
    correct = rng.random(200) < np.where(confidence > 0.6, 0.97, 0.5)
    assert choose_threshold(correct, confidence, 0.94).threshold is None
    best, needed = reach(correct, confidence, 0.94)
    assert choose_threshold(correct, confidence, best).threshold is not None
    assert choose_threshold(correct, confidence, best + 0.001).threshold is None
    assert 200 < needed < 20_000
    found = 0
    for _ in range(40):
        more = rng.random(int(needed))
        right = rng.random(more.size) < np.where(more > 0.6, 0.97, 0.5)
        found += choose_threshold(right, more, 0.94).threshold is not None
    assert found >= 12, (needed, found)  # a rough guide: four in five if the precision seen is the true one
    assert reach(np.zeros(100), np.arange(100.0), 0.9)[1] == math.inf
    assert math.isnan(reach(np.zeros(100), np.arange(100.0), 0.9)[0])


GOOD = dict(threshold=0.3, precision=0.8, delta=0.05, num_questions=100, coverage=0.5, calibration_precision=0.9)


@pytest.mark.parametrize(
    "key, value",
    [
        *((key, bad) for key in GOOD for bad in (math.nan, math.inf, "0.5", True, [])),
        *((key, None) for key in GOOD if key != "threshold"),
        *((key, -1) for key in GOOD if key != "threshold"),
        ("precision", 1.5), ("delta", 0), ("coverage", 1.1), ("calibration_precision", 2), ("num_questions", 2.5),
        ("num_samples", 0), ("num_samples", "16"), ("confidence", 3), ("sampling", None), ("sampling", [1]),
        ("sampling", {"temperature": -1}), ("sampling", {"temperature": "hot"}), ("sampling", {"max_new_tokens": 0}),
        ("sampling", {"system_prompt": 5}), ("sampling", {"chat_template_kwargs": "x"}), ("version", 7),
    ],
)  # fmt: skip
def test_a_state_file_is_not_believed(tmp_path, key, value):
    path = tmp_path / "abstention.json"
    path.write_text(json.dumps(GOOD))
    assert Abstention.load(path) == Abstention(**GOOD)
    path.write_text(json.dumps(GOOD | {key: value}))
    with pytest.raises(UserError, match=f"{path}.*{key}"):
        Abstention.load(path)
    if key in GOOD:
        path.write_text(json.dumps({name: of for name, of in GOOD.items() if name != key}))
        with pytest.raises(UserError, match=f"{key}' is missing"):
            Abstention.load(path)


@pytest.mark.parametrize("seed", range(30))
def test_threshold_follows_the_procedure(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(50, 400))
    confidence = rng.random(n).round(int(rng.integers(1, 4)))  # ties
    correct = rng.random(n) < confidence ** rng.uniform(0.1, 1)
    for precision in (0.5, 0.8):
        chosen = choose_threshold(correct, confidence, precision)
        assert chosen.threshold == literal_threshold(correct, confidence, precision, 0.05)
        if chosen.threshold is not None:
            answered = confidence >= chosen.threshold
            assert chosen.coverage == pytest.approx(answered.mean())
            assert chosen.calibration_precision == pytest.approx(correct[answered].mean())
            np.testing.assert_array_equal(chosen.answers(confidence), answered)


def test_the_promise_is_kept_in_simulation():
    """P(correct | c) = c, c uniform: the precision above t is (1 + t) / 2, and the oracle answers 0.4 at 0.8."""
    rng = np.random.default_rng(0)
    broken, coverages = 0, []
    for _ in range(1000):
        confidence = rng.random(5000)
        chosen = choose_threshold(rng.random(5000) < confidence, confidence, 0.8, delta=0.05)
        threshold = 1.0 if chosen.threshold is None else chosen.threshold
        broken += chosen.threshold is not None and (1 + threshold) / 2 < 0.8
        coverages.append(1 - threshold)
    # At most a twentieth; 69 of 1,000 is what a rate of exactly 0.05 exceeds once in 200 times.
    assert binomtest(broken, 1000, 0.05, alternative="greater").pvalue > 0.005
    assert np.mean(coverages) >= 0.85 * 0.4


@pytest.mark.parametrize("num_questions", [60, 300])
def test_the_promise_is_kept_where_it_is_hard(num_questions):
    """A confidence that says nothing, and a true precision just below the target: any threshold breaks the promise."""
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(1000):
        chosen = choose_threshold(rng.random(num_questions) < 0.799, rng.random(num_questions), 0.8, delta=0.05)
        broken += chosen.threshold is not None
    assert 0 < broken and binomtest(broken, 1000, 0.05, alternative="greater").pvalue > 0.005


def test_no_threshold_is_an_answer(tmp_path):
    chosen = choose_threshold(np.zeros(100), np.arange(100.0), 0.8, name="mean log-prob")
    assert chosen.threshold is None and chosen.coverage == 0 and math.isnan(chosen.calibration_precision)
    assert not chosen.answers([0.0, 1e9, math.nan]).any()
    chosen.save(tmp_path)
    json.loads((tmp_path / "abstention.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    loaded = Abstention.load(tmp_path)
    assert loaded.threshold is None and math.isnan(loaded.calibration_precision)
    assert loaded.confidence == "mean log-prob"


def test_saved_and_loaded(tmp_path):
    chosen = choose_threshold(np.ones(100), np.arange(100.0), 0.8)
    assert chosen.threshold == 0.0 and chosen.coverage == 1.0
    assert Abstention.load(chosen.save(tmp_path)) == chosen


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 50 calibration questions are needed, got 49"):
        choose_threshold(np.ones(60), np.where(np.arange(60) < 49, 1.0, np.nan), 0.8)
    with pytest.raises(ValueError, match=r"one row per question, shape \(P,\)"):
        choose_threshold(np.ones((10, 16)), np.ones((10, 16)), 0.8)
    for bad in (0, 1, 1.2):
        with pytest.raises(ValueError, match=r"`precision` must lie in \(0, 1\)"):
            choose_threshold(np.ones(60), np.ones(60), bad)
        with pytest.raises(ValueError, match=r"`delta` must lie in \(0, 1\)"):
            choose_threshold(np.ones(60), np.ones(60), 0.8, delta=bad)
    with pytest.raises(ValueError, match="does not exist"):
        Abstention.load(tmp_path)
    for content in ("[]", "{}", "nonsense", '{"calibration_precision": 1, "other": 2}'):
        (tmp_path / "abstention.json").write_text(content)
        with pytest.raises(ValueError, match="does not contain a threshold"):
            Abstention.load(tmp_path)
