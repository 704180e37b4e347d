"""Differences between methods: paired, benchmarks weigh alike, and many are corrected."""

from types import SimpleNamespace

import numpy as np
import pytest

from trl_capo.calibration.bootstrap import holm
from trl_capo.report.comparison import check_same_questions, compare, table


def test_other_questions_are_not_paired():
    def samples(*prompts):
        columns = {"prompt_id": np.arange(len(prompts)), "prompt": np.array(prompts, dtype=object)}
        table = SimpleNamespace(column_names=list(columns))
        return SimpleNamespace(benchmark="b", table=table, grid=lambda name: columns[name][:, None])

    check_same_questions({"grpo": {0: [samples("1+1", "2+2")], 1: [samples("1+1", "2+2")]}})
    for others in (samples("1+1", "2+3"), samples("1+1")):
        with pytest.raises(ValueError, match="capo-0 answered different questions of b"):
            check_same_questions({"grpo": {0: [samples("1+1", "2+2")]}, "capo": {0: [others]}})


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
