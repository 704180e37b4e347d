"""Make the tables and figures of `docs/evidence.md` from the runs of `arithmetic_study.py`, without training.

    python benchmarks/arithmetic_evidence.py
    python benchmarks/arithmetic_evidence.py --report slips    # runs/slips.html, a page on one seed

Writes `docs/figures/evidence_*.png`, `benchmarks/results/arithmetic_study/tables.json`, and the tables between the
`<!-- table: name -->` marks of `docs/evidence.md`. Every interval is the 95% crossed bootstrap over seeds and prompts
of `trl_capo.calibration.bootstrap`. It is paired: two methods are compared on the seeds that both have, with the same
prompts and the same random numbers. A number without a split is the plain mean over the splits. Numbers that exist
once per seed (entropy, pooled AUC) vary over seeds only.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from arithmetic_study import (
    NUM_SAMPLES,
    RESULTS,
    TEST_SPLITS,
    TUNING,
    WORLDS,
    result_path,
)
from tqdm import tqdm

from trl_capo.calibration.bootstrap import (
    Estimate,
    bootstrap_means,
    bootstrap_statistic,
    holm,
    interval,
    mean_over_seeds_and_prompts,
    paired_difference,
    two_sided_p,
)
from trl_capo.calibration.metrics import nanmean, precision_coverage
from trl_capo.calibration.selection import Selection, majority_vote, perplexity_consistency, weighted_vote
from trl_capo.evaluation.predictor import question_confidence
from trl_capo.evaluation.samples import SampleSet


ROOT = Path(__file__).parent.parent
COMPARISON = RESULTS.parent / "compare"  # written by `trl-capo compare recipes/arithmetic/compare.yaml`
LOOKS = (range(20, 25), range(25, 30))  # its seeds: the planned ones and the added ones
MAPPED = ("slips_flat", "clean")  # worlds with few seeds, only in the table of regimes
NAMES = {
    "base": "base",
    "grpo": "GRPO",
    "capo": "CAPO",
    "capo_no_mask": "CAPO without mask",
    "grpo_mask": "GRPO + mask only",
    "grpo_paper_mask": "GRPO + the paper's mask only",
    "grpo_no_std": "GRPO, not divided by std",
    "capo_tau_low": "CAPO, half the tau",
    "capo_tau_high": "CAPO, twice the tau",
    "capo_paper_mask": "CAPO, the paper's thresholds",
    "capo_paper_mask_2": "CAPO, its second thresholds",
    "capo_gap": 'CAPO, `tau_unit="gap"`',
    "capo_sum": "CAPO, sums over pairs",
    "capo_batch": 'CAPO, `pair_scope="batch"`',
    "capo_ema": "CAPO, EMA reference",
    "grpo_graded": "GRPO, graded rewards",
    "capo_graded": "CAPO, graded rewards",
    "capo_falling": "CAPO, falling tau",
    "cde": "CDE",
    "gspo": "GSPO",
}
COLORS = {"base": "#7f7f7f", "grpo": "#d55e00", "capo": "#0072b2", "capo_no_mask": "#56b4e9", "grpo_mask": "#e69f00"}
COLORS |= {"capo_falling": "#56b4e9", "cde": "#009e73", "gspo": "#cc79a7"}
HEADLINE = ("slips_constant", "misconceptions")  # worlds at a constant learning rate
COUNTS = (1, 2, 4, 8, 16)  # numbers of answers in a vote
PRECISIONS = (0.8, 0.9)  # required among the answered questions
VOTE_TAU = 0.15  # CAPO's tau in the world of slips; its loss treats s / tau as the log-odds of being right


@dataclass(frozen=True)
class Runs:
    """The runs of one method in one world, by training seed.

    Attributes:
        numbers: Content of each seed's JSON file.
        arrays: Content of each seed's NPZ file.
    """

    numbers: dict[int, dict]
    arrays: dict[int, dict[str, np.ndarray]]

    @property
    def steps(self) -> list[int]:
        return [int(key) for key in next(iter(self.numbers.values()))["checkpoints"] if not key.startswith("T")]

    @property
    def temperatures(self) -> list[tuple[float, int | str]]:
        """Temperatures of the samples at the end, coldest first, each with its key."""
        keys = [key for key in next(iter(self.numbers.values()))["checkpoints"] if key.startswith("T")]
        return sorted([(1.0, self.steps[-1]), *((float(key[1:]), key) for key in keys)])

    @property
    def curve_prompts(self) -> int:
        """Prompts per split, the first, at every checkpoint but the last; the first runs did not record it."""
        return next(iter(self.numbers.values()))["base"].get("curve_prompts", 250)

    def only(self, seeds) -> "Runs":
        return Runs({s: self.numbers[s] for s in seeds}, {s: self.arrays[s] for s in seeds})

    def by_prompt(self, name: str, step: int | str, splits=tuple(TEST_SPLITS)) -> np.ndarray:
        """An array with every seed and the splits concatenated: `right`, `auc` (S, P); `correct`, ... (S, P, .)."""
        return np.stack(
            [np.concatenate([a[f"{step}/{split}/{name}"] for split in splits]) for a in self.arrays.values()]
        )

    def accuracy(self, step: int | str, split: str) -> np.ndarray:
        """Share of right samples, (S, P)."""
        return self.by_prompt("right", step, (split,)) / NUM_SAMPLES

    def auc(self, step: int | str, split: str) -> np.ndarray:
        """AUC within each prompt, (S, P); NaN where it is undefined."""
        return self.by_prompt("auc", step, (split,))

    def summary(self, name: str, step: int | str, split: str) -> np.ndarray:
        """A number from each seed's evaluation, (S, 1)."""
        return np.array([[numbers["checkpoints"][str(step)][split][name]] for numbers in self.numbers.values()])

    def samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Correctness, mean log-prob and numbered answer of each sample of all splits at the end, (S, P, N) each."""
        correct = np.unpackbits(self.by_prompt("correct", self.steps[-1]), axis=-1)
        return correct, self.by_prompt("mean_logps", self.steps[-1]), self.by_prompt("answers", self.steps[-1])

    def logged(self, name: str) -> float:
        """A number from the last logging window of training, averaged over seeds; NaN if it was not logged."""
        return nanmean([n["training"][-1].get(name, np.nan) for n in self.numbers.values() if n["training"]])


def load(world: str) -> dict[str, Runs]:
    """Load the finished runs of a world, by method in the order of `NAMES`."""
    runs = {}
    for method in NAMES:
        folder = result_path(world, method, 0, False).parent
        paths = sorted(folder.glob(f"{method}-*.json"), key=_seed)
        if paths:
            numbers = {_seed(path): json.loads(path.read_text()) for path in paths}
            runs[method] = Runs(numbers, {_seed(path): dict(np.load(path.with_suffix(".npz"))) for path in paths})
    return runs


def _seed(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def followed(runs: dict[str, Runs]) -> list[str]:
    """The base, and the methods that were evaluated along training."""
    return [method for method, method_runs in runs.items() if method == "base" or len(method_runs.steps) > 1]


def both(runs: Runs, baseline: Runs) -> tuple[Runs, Runs]:
    """Restrict two methods to the seeds that both have."""
    seeds = [seed for seed in runs.numbers if seed in baseline.numbers]
    return runs.only(seeds), baseline.only(seeds)


def over_splits(numbers: Callable[[str], np.ndarray], splits=tuple(TEST_SPLITS)) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds and prompts, averaged over splits, and their bootstrap replicates.

    Args:
        numbers: Returns the measurements on a split, shape (..., S, P).
        splits: The splits.

    Returns:
        Means, shape (...), and replicates, shape (B, ...). All splits of a replicate use the same draw of seeds.
    """
    measured = np.mean([mean_over_seeds_and_prompts(numbers(split)) for split in splits], axis=0)
    return measured, np.mean([bootstrap_means(numbers(split)) for split in splits], axis=0)


def value(numbers: Callable[[str], np.ndarray], splits=tuple(TEST_SPLITS)) -> float:
    """The mean over seeds and prompts, averaged over splits, without replicates."""
    return float(np.mean([mean_over_seeds_and_prompts(numbers(split)) for split in splits]))


def difference(
    numbers: Callable[[str], np.ndarray], baseline: Callable[[str], np.ndarray], splits=tuple(TEST_SPLITS)
) -> Estimate:
    measured, replicates = over_splits(lambda split: np.stack([numbers(split), baseline(split)]), splits)
    return interval(measured[0] - measured[1], replicates[:, 0] - replicates[:, 1])


def against(runs: Runs, baseline: Runs, splits=tuple(TEST_SPLITS)) -> dict[str, Estimate]:
    """One method minus another at the end of training.

    `auc_within` compares means over the prompts that are mixed for each method. Training changes which prompts are
    mixed, so `auc_common` compares both methods on the prompts that are mixed for both.
    """
    runs, baseline = both(runs, baseline)
    step, step_b = runs.steps[-1], baseline.steps[-1]

    def where_both(method_runs: Runs, at: int) -> Callable[[str], np.ndarray]:
        def auc(split: str) -> np.ndarray:
            undefined = np.isnan(runs.auc(step, split)) | np.isnan(baseline.auc(step_b, split))
            return np.where(undefined, np.nan, method_runs.auc(at, split))

        return auc

    result = {
        "auc_within": difference(lambda s: runs.auc(step, s), lambda s: baseline.auc(step_b, s), splits),
        "auc_common": difference(where_both(runs, step), where_both(baseline, step_b), splits),
        "accuracy": difference(lambda s: runs.accuracy(step, s), lambda s: baseline.accuracy(step_b, s), splits),
    }
    for name in ("auc_pooled", "entropy"):
        result[name] = difference(
            lambda s, name=name: runs.summary(name, step, s),
            lambda s, name=name: baseline.summary(name, step_b, s),
            splits,
        )
    return result


def in_second_half(name: str, runs: Runs, baseline: Runs, splits=tuple(TEST_SPLITS)) -> Estimate:
    """Accuracy or AUC of one method minus another, averaged over the checkpoints after the middle of training.

    At a constant learning rate a single checkpoint has much noise. A baseline without training counts as it is.
    """
    runs, baseline = both(runs, baseline)
    first = slice(runs.curve_prompts)
    late = [[step for step in method.steps if 2 * step > method.steps[-1] or step == 0] for method in (runs, baseline)]
    late[1] = late[1] * (len(late[0]) // len(late[1]))

    def numbers(split: str) -> np.ndarray:
        return np.array(
            [
                [getattr(method, name)(step, split)[:, first] for step in steps]
                for method, steps in zip((runs, baseline), late, strict=True)
            ]
        )  # (methods, checkpoints, S, P)

    measured, replicates = over_splits(numbers, splits)
    gaps, drawn = measured.mean(axis=1), replicates.mean(axis=2)
    return interval(gaps[0] - gaps[1], drawn[:, 0] - drawn[:, 1])


def at_matched_accuracy(
    runs: Runs, baseline: Runs, base: Runs, splits=tuple(TEST_SPLITS)
) -> dict[str, float | Estimate]:
    """AUC on both learning curves at the same accuracy: the lower of their two final accuracies.

    A method's curve starts at the base and goes through its checkpoints, on the prompts that all of them share.
    """
    seeds = [seed for seed in base.numbers if seed in runs.numbers and seed in baseline.numbers]
    curves = [
        [(base.only(seeds), 0), *((method.only(seeds), step) for step in method.steps)] for method in (runs, baseline)
    ]

    def points(split: str) -> np.ndarray:
        return np.array(
            [
                [[model.accuracy(at, split)[:, : runs.curve_prompts] for model, at in curve] for curve in curves],
                [[model.auc(at, split)[:, : runs.curve_prompts] for model, at in curve] for curve in curves],
            ]
        )  # accuracy and AUC, (2, methods, checkpoints, S, P)

    (accuracy, auc), replicates = over_splits(points, splits)
    level = float(accuracy[:, -1].min())
    measured = [auc_at(level, accuracy[m], auc[m]) for m in (0, 1)]
    drawn = np.array([[auc_at(level, accuracy[m], auc[m]) for m in (0, 1)] for accuracy, auc in replicates])
    return {
        "accuracy": level,
        "auc_within": measured[0],
        "auc_within_baseline": measured[1],
        "difference": interval(measured[0] - measured[1], drawn[:, 0] - drawn[:, 1]),
    }


def at_matched_temperature(runs: Runs, baseline: Runs, splits=tuple(TEST_SPLITS)) -> Estimate:
    """AUC of a method at the temperature where it is as accurate as the baseline at 1, minus the baseline's AUC.

    A hotter sampler makes more errors, and improbable ones, which are easy to tell from right answers: entropy buys
    AUC with accuracy. This compares two models at the same accuracy. NaN if more than 5% of the replicates leave the
    sampled temperatures.
    """
    runs, baseline = both(runs, baseline)
    ends = [(runs, key) for _, key in reversed(runs.temperatures)]  # hottest and least accurate first
    ends.append((baseline, baseline.steps[-1]))

    def points(split: str) -> np.ndarray:
        first = slice(baseline.curve_prompts)
        accuracy = [model.accuracy(at, split)[:, first] for model, at in ends]
        return np.array([accuracy, [model.auc(at, split)[:, first] for model, at in ends]])  # (2, K + 1, S, P)

    def gap(accuracy: np.ndarray, auc: np.ndarray) -> float:
        if not accuracy[0] <= accuracy[-1] <= accuracy[-2]:
            return np.nan
        return auc_at(accuracy[-1], accuracy[:-1], auc[:-1]) - auc[-1]

    measured, replicates = over_splits(points, splits)
    gaps = np.array([gap(*drawn) for drawn in replicates])
    if np.isnan(gaps).mean() > 0.05:
        return Estimate(np.nan, np.nan, np.nan)
    return interval(gap(*measured), gaps)


def auc_at(level: float, accuracy: np.ndarray, auc: np.ndarray) -> float:
    """AUC where a curve of points, (K,) each, first reaches an accuracy, interpolated; otherwise at its end."""
    if accuracy.max() < level:
        return float(auc[-1])
    after = int(np.argmax(accuracy >= level))
    if after == 0:
        return float(auc[0])
    share = (level - accuracy[after - 1]) / (accuracy[after] - accuracy[after - 1])
    return float(auc[after - 1] + share * (auc[after] - auc[after - 1]))


SELECTORS = {
    "majority vote": lambda answers, logps: majority_vote(answers),
    "Perplexity Consistency": lambda answers, logps: perplexity_consistency(answers, logps),
    f"vote weighted by exp(s / {VOTE_TAU})": lambda answers, logps: weighted_vote(
        answers, np.exp(logps / VOTE_TAU), mean_logps=logps
    ),
    "surest answer": lambda answers, logps: weighted_vote(answers, logps == logps.max(), mean_logps=logps),
}


def selected(runs: Runs) -> dict[str, dict[int, np.ndarray]]:
    """Accuracy of each selector for each number of samples, over disjoint sets of them, by seed and prompt (S, P)."""
    correct, logps, answers = runs.samples()
    result = {name: {count: np.zeros(correct.shape[:2]) for count in COUNTS} for name in SELECTORS}
    for at in tqdm(list(np.ndindex(correct.shape[:2])), desc="Voting", unit="prompt"):
        for count in COUNTS:
            for start in range(0, NUM_SAMPLES, count):
                part = slice(start, start + count)
                votes = [None if answer < 0 else answer for answer in answers[at][part].tolist()]
                for name, select in SELECTORS.items():
                    choice = select(votes, logps[at][part])
                    result[name][count][at] += is_right(choice, votes, correct[at][part]) * count / NUM_SAMPLES
    return result


def is_right(choice: Selection, votes: list, correct: np.ndarray) -> int:
    return 0 if choice.answer is None else int(correct[votes.index(choice.answer)])


def questions(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Whether the answer that Perplexity Consistency chooses from 16 is right, and its confidence, (S, P) each."""
    correct, logps, answers = runs.samples()
    right, confidence = np.zeros(correct.shape[:2]), np.zeros(correct.shape[:2])
    for at in np.ndindex(right.shape):
        votes = [None if answer < 0 else answer for answer in answers[at].tolist()]
        answer, confidence[at] = question_confidence(votes, logps[at])
        right[at] = 0 if answer is None else correct[at][votes.index(answer)]
    return right, confidence


def precision_differences(tables: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, Estimate]]:
    """Precision of the most confident 50% and 80%, for each method and for CAPO minus GRPO, by coverage.

    Args:
        tables: Correctness and confidence of each method, shape (S, P), or (S, P, N) with N rows per prompt.
    """
    coverages = (0.5, 0.8)
    sorted_tables = {}
    for method, (right, confidence) in tables.items():
        rows_per_prompt = right[0].size // right.shape[1]
        orders = [np.argsort(-c.ravel(), kind="stable") for c in confidence]
        sorted_tables[method] = [(r.ravel()[o], o // rows_per_prompt) for r, o in zip(right, orders, strict=True)]

    def statistic(seeds: np.ndarray, prompts: np.ndarray) -> list[list[float]]:
        return [
            np.average(
                [precision_of_top(right, prompts[prompt_of_row], coverages) for right, prompt_of_row in by_seed],
                axis=0,
                weights=seeds,
            )
            for by_seed in sorted_tables.values()
        ]

    num_seeds, num_prompts = next(iter(tables.values()))[0].shape[:2]
    measured = np.array(statistic(np.ones(num_seeds), np.ones(num_prompts, dtype=int)))
    replicates = bootstrap_statistic(statistic, num_seeds, num_prompts, num_resamples=1000)
    methods = list(tables)
    capo, grpo = methods.index("capo"), methods.index("grpo")
    result = {}
    for k, coverage in enumerate(coverages):
        result[f"{coverage:.0%}"] = {m: interval(measured[i, k], replicates[:, i, k]) for i, m in enumerate(methods)}
        gap = interval(measured[capo, k] - measured[grpo, k], replicates[:, capo, k] - replicates[:, grpo, k])
        result[f"{coverage:.0%}"]["capo - grpo"] = gap
    return result


def precision_of_top(right: np.ndarray, counts: np.ndarray, coverages: tuple[float, ...]) -> list[float]:
    """Precision of the most confident shares of rows, which are sorted by confidence and have counts, (M,) each."""
    covered, hits = np.cumsum(counts), np.cumsum(counts * right)
    ends = [np.searchsorted(covered, coverage * covered[-1]) for coverage in coverages]
    return [hits[end] / covered[end] for end in ends]


def abstention(
    tables: dict[str, tuple[np.ndarray, np.ndarray]], precisions: tuple[float, ...]
) -> dict[float, dict[str, tuple[Estimate, Estimate]]]:
    """Answer only above a threshold chosen on other questions: is its precision kept, and at what coverage?

    The threshold is the lowest confidence at which the most confident questions of the odd prompts have the precision.
    It is applied to the even prompts, and the other way round. Without such a threshold, nothing is answered.

    Args:
        tables: Correctness and confidence of each method, shape (S, P).
        precisions: The required precisions.

    Returns:
        By precision and method: the precision of the answered questions, and their share. A seed that answers nothing
        has no precision, and the estimate leaves it out.
    """
    result = {}
    for asked in precisions:
        result[asked] = {}
        for method, (right, confidence) in tables.items():
            kept, answered = [], []
            for r, c in zip(right, confidence, strict=True):
                halves = [(r[0::2], c[0::2]), (r[1::2], c[1::2])]
                hits = [
                    their_r[their_c >= threshold(my_r, my_c, asked)]
                    for (my_r, my_c), (their_r, their_c) in (halves, halves[::-1])
                ]
                hits = np.concatenate(hits)
                kept.append([hits.mean() if len(hits) else np.nan])
                answered.append([len(hits) / len(r)])
            result[asked][method] = tuple(
                interval(mean_over_seeds_and_prompts(numbers), bootstrap_means(numbers))
                for numbers in (kept, answered)
            )
    return result


def threshold(right: np.ndarray, confidence: np.ndarray, precision: float) -> float:
    """The lowest confidence at or above which the precision is reached, or infinity. Shapes (P,)."""
    order = np.argsort(-confidence, kind="stable")
    precise = np.cumsum(right[order]) / np.arange(1, len(right) + 1) >= precision
    last_of_ties = np.append(confidence[order][1:] < confidence[order][:-1], True)
    ends = np.flatnonzero(precise & last_of_ties)
    return float(confidence[order][ends[-1]]) if len(ends) else np.inf


def table(header: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def main_table(runs: dict[str, Runs]) -> str:
    rows = []
    for split in TEST_SPLITS:
        for method in followed(runs):
            method_runs, step = runs[method], runs[method].steps[-1]
            cells = [
                value(lambda s, method_runs=method_runs, step=step: method_runs.accuracy(step, s), (split,)),
                value(lambda s, method_runs=method_runs, step=step: method_runs.auc(step, s), (split,)),
                *(
                    method_runs.summary(name, step, split).mean()
                    for name in ("auc_pooled", "perplexity_consistency", "entropy")
                ),
            ]
            gaps = ["", ""]
            if method not in ("base", "grpo"):
                gap = against(method_runs, runs["grpo"], (split,))
                gaps = [signed(gap["auc_within"]), signed(gap["accuracy"])]
            name = f"{NAMES[method]} (`{method}`)"
            rows.append([split if method == "base" else "", name, *(f"{cell:.3f}" for cell in cells), *gaps])
    header = ["split", "method", "accuracy", "AUC within", "AUC pooled", "PC@16", "entropy"]
    return table([*header, "AUC within minus GRPO", "accuracy minus GRPO"], rows)


def headline_table(worlds: dict[str, dict[str, Runs]]) -> str:
    """What GRPO and CAPO do to their base, one block per world."""
    rows = []
    for world, runs in worlds.items():
        for method in [m for m in ("base", "grpo", "capo", "capo_falling", "cde", "gspo") if m in runs]:
            method_runs = runs[method]
            step = method_runs.steps[-1]
            row = [f"`{world}`" if method == "base" else "", NAMES[method]]
            for measured in (method_runs.accuracy, method_runs.auc):
                row.append(f"{value(lambda s, measured=measured, step=step: measured(step, s)):.3f}")
            row += ["", "", ""]
            if method != "base":
                row[4] = signed(against(method_runs, runs["base"])["auc_within"])
            if method not in ("base", "grpo"):
                gap = against(method_runs, runs["grpo"])
                row[5:] = [signed(gap["auc_within"]), signed(gap["accuracy"])]
            rows.append(row)
    header = ["world", "", "accuracy", "AUC within", "AUC minus base", "AUC minus GRPO", "accuracy minus GRPO"]
    return table(header, rows)


def late_table(runs: dict[str, Runs]) -> str:
    """Differences at the end, over the second half of training, and at equal accuracy."""
    others = [method for method in followed(runs) if method not in ("base", "grpo")]
    rows = []
    for method, other in [("grpo", "base"), *((m, o) for m in others for o in ("base", "grpo"))]:
        gap = against(runs[method], runs[other])
        estimates = [gap["auc_within"], gap["accuracy"]]
        estimates += [in_second_half(name, runs[method], runs[other]) for name in ("auc", "accuracy")]
        if other == "grpo":
            estimates.append(at_matched_accuracy(runs[method], runs["grpo"], runs["base"])["difference"])
        cells = [signed(estimate) for estimate in estimates]
        rows.append([f"{NAMES[method]} - {NAMES[other]}", *cells, *[""] * (5 - len(cells))])
    header = ["", "AUC at the end", "accuracy", "AUC, second half", "accuracy, second half", "AUC at equal accuracy"]
    return table(header, rows)


def looks_table(num_resamples: int = 20_000) -> str:
    """AUC within of each rival minus CAPO's, for the planned and the added seeds separately, with Holm's p-values."""
    runs = np.load(COMPARISON / "comparison.npz")
    rivals = [
        m for m in dict.fromkeys(name.split("/")[0].rsplit("-", 1)[0] for name in runs) if m not in ("base", "capo")
    ]

    def auc(method: str, seeds: range) -> list[np.ndarray]:
        return [
            np.stack([runs[f"{method}-{seed}/arithmetic_{split}/auc_within"] for seed in seeds])
            for split in TEST_SPLITS
        ]

    columns = [rivals]
    for seeds in LOOKS:
        both = [(auc(method, seeds), auc("capo", seeds)) for method in rivals]
        p_values = holm([two_sided_p(*pair, num_resamples=num_resamples) for pair in both])
        gaps = [signed(paired_difference(*pair)) for pair in both]
        columns.append([f"{gap}, {p:.2f}" for gap, p in zip(gaps, p_values, strict=True)])
    header = ["AUC within minus CAPO, p", *(f"seeds {seeds[0]} to {seeds[-1]}" for seeds in LOOKS)]
    return table(header, list(zip(*columns, strict=True)))


def pairs_table(runs: dict[str, Runs], pairs: list[tuple[str, str]]) -> str:
    """One method minus another at the end of training, over all splits."""
    rows = []
    for method, baseline in pairs:
        if method not in runs or baseline not in runs:
            continue
        method_runs = runs[method]
        gap = against(method_runs, runs[baseline])
        masked = [method_runs.logged(f"capo/frac_masked_{kind}") for kind in ("correct", "wrong")]
        tau = method_runs.logged("capo/tau")
        rows.append(
            [
                f"{NAMES[method]} (`{method}`)",
                NAMES[baseline],
                "" if np.isnan(tau) or "grpo" in method else f"{tau:.2f}",
                "" if np.isnan(masked).any() else f"{masked[0]:.1%} / {masked[1]:.1%}",
                *(signed(gap[name]) for name in ("auc_within", "auc_common", "accuracy", "auc_pooled", "entropy")),
                len(both(method_runs, runs[baseline])[0].numbers),
            ]
        )
    header = ["method", "minus", "tau", "masked right / wrong", "AUC within", "on prompts mixed for both", "accuracy"]
    return table([*header, "AUC pooled", "entropy", "seeds"], rows)


def fall_table(runs: dict[str, Runs]) -> str:
    """AUC within of each checkpoint minus the base's, on the prompts of the curves: does training harm it?"""
    rows = []
    for method in [m for m in followed(runs) if m != "base"]:
        method_runs, base = both(runs[method], runs["base"])
        first = slice(method_runs.curve_prompts)
        for step in method_runs.steps:
            gaps = [
                difference(
                    lambda s, m=method_runs, step=step, name=name, first=first: getattr(m, name)(step, s)[:, first],
                    lambda s, base=base, name=name, first=first: getattr(base, name)(0, s)[:, first],
                )
                for name in ("auc", "accuracy")
            ]
            rows.append([NAMES[method] if step == method_runs.steps[0] else "", step, *map(signed, gaps)])
    return table(["method", "step", "AUC within minus base", "accuracy minus base"], rows)


def matched_table(runs: dict[str, Runs]) -> str:
    rows = []
    for method in [m for m in followed(runs) if m not in ("base", "grpo")]:
        for name, splits in [("all", tuple(TEST_SPLITS)), *((split, (split,)) for split in TEST_SPLITS)]:
            found = at_matched_accuracy(runs[method], runs["grpo"], runs["base"], splits)
            cells = [f"{found[k]:.3f}" for k in ("accuracy", "auc_within", "auc_within_baseline")]
            rows.append([NAMES[method] if name == "all" else "", name, *cells, signed(found["difference"])])
    return table(["method", "split", "at accuracy", "AUC within", "of GRPO", "difference"], rows)


def temperature_table(runs: dict[str, Runs]) -> str:
    rows = []
    for method, other in (("base", "grpo"), ("grpo", "capo"), ("capo", "grpo"), ("capo_no_mask", "grpo")):
        if method not in runs:
            continue
        method_runs, first = runs[method], slice(runs["grpo"].curve_prompts)
        for temperature, key in method_runs.temperatures:
            cells = [
                value(lambda s, measured=measured, key=key, first=first: measured(key, s)[:, first])
                for measured in (method_runs.accuracy, method_runs.auc)
            ]
            gap = ""
            if temperature == 1:
                lead = at_matched_temperature(method_runs, runs[other])
                gap = f"{'not reached' if np.isnan(lead.value) else signed(lead)} ({NAMES[other]})"
            name = NAMES[method] if key == method_runs.temperatures[0][1] else ""
            rows.append([name, temperature, *(f"{cell:.3f}" for cell in cells), gap])
    header = ["model", "temperature", "accuracy", "AUC within"]
    return table([*header, "AUC within, at the temperature where it is as accurate as the other at 1"], rows)


def selection_table(votes: dict[str, dict]) -> str:
    rows = []
    for method, by_selector in votes.items():
        for name, by_count in by_selector.items():
            cells = [f"{mean_over_seeds_and_prompts(by_count[count]):.3f}" for count in COUNTS]
            most, grpo = by_count[COUNTS[-1]], votes["grpo"][name][COUNTS[-1]]
            gap = signed(paired_difference(most, grpo)) if method == "capo" else ""
            rows.append([NAMES[method] if name == next(iter(SELECTORS)) else "", name, *cells, gap])
    return table(["model", "answer chosen by", *(f"N = {count}" for count in COUNTS), "N = 16, CAPO minus GRPO"], rows)


def precision_table(samples: dict[str, dict], chosen: dict[str, dict]) -> str:
    rows = []
    for name, tables in (("single samples, by s", samples), ("questions, PC@16 answers", chosen)):
        for coverage, estimates in tables.items():
            cells = [str(estimates[method]) for method in ("base", "grpo", "capo")]
            rows.append([name if coverage == "50%" else "", coverage, *cells, signed(estimates["capo - grpo"])])
    return table(["what is answered", "surest", "base", "GRPO", "CAPO", "CAPO minus GRPO"], rows)


def abstention_table(tables: dict[float, dict[str, tuple[Estimate, Estimate]]]) -> str:
    rows = []
    for asked, by_method in tables.items():
        for method, (kept, answered) in by_method.items():
            rows.append([f"{asked:.0%}" if method == "base" else "", NAMES[method], str(kept), str(answered)])
    return table(["precision asked for", "model", "precision of what it answers", "share of questions answered"], rows)


def tuned(world: str) -> dict[str, dict[int, list[float]]]:
    """Accuracy, AUC within, AUC pooled and entropy on the validation split, by setting and seed."""
    found = {}
    for setting in TUNING[world]:
        paths = (RESULTS / f"{world}_tuning").glob(f"{setting.replace(' ', '_')}-[0-9]*.json")
        last = {
            _seed(p): list(json.loads(p.read_text())["checkpoints"].values())[-1] for p in sorted(paths, key=_seed)
        }
        names = ("accuracy", "auc_within", "auc_pooled", "entropy")
        found[setting] = {
            seed: [nanmean([numbers[name] for numbers in at.values()]) for name in names] for seed, at in last.items()
        }
    return found


def chosen_settings(world: str) -> tuple[str, str]:
    """GRPO's and CAPO's settings in the study, chosen from those that were run with every tuning seed.

    GRPO's is the most accurate. CAPO's has the highest AUC within among those at most two points less accurate; if
    there is none, it is the most accurate.
    """
    by_seed = tuned(world)
    seeds = max(map(len, by_seed.values()))
    means = {
        setting: np.mean(list(found.values()), axis=0) for setting, found in by_seed.items() if len(found) == seeds
    }
    grpo = max((setting for setting in means if setting.startswith("grpo")), key=lambda setting: means[setting][0])
    capo = [setting for setting in means if setting.startswith("capo")]
    close = [setting for setting in capo if means[setting][0] >= means[grpo][0] - 0.02]
    if close:
        return grpo, max(close, key=lambda setting: means[setting][1])
    return grpo, max(capo, key=lambda setting: means[setting][0])


def chosen_alike(world: str) -> dict[str, str]:
    """Each method's setting for the comparison: CAPO's rule for all methods, on the first tuning seed alone.

    A method has no setting until all its settings were run. If all of them are more than two points less accurate than
    GRPO, the most accurate one is chosen.
    """
    by_seed = tuned(world)
    first = min(seed for runs in by_seed.values() for seed in runs)
    found = {setting: runs[first] for setting, runs in by_seed.items() if first in runs}
    floor = max(numbers[0] for setting, numbers in found.items() if setting.startswith("grpo")) - 0.02
    chosen = {}
    for method in dict.fromkeys(setting.split()[0] for setting in TUNING[world]):
        settings = [setting for setting in TUNING[world] if setting.split()[0] == method]
        if not set(settings) <= set(found):
            continue
        close = [setting for setting in settings if found[setting][0] >= floor]
        if close:
            chosen[method] = max(close, key=lambda setting: found[setting][1])
        else:
            chosen[method] = max(settings, key=lambda setting: found[setting][0])
    return chosen


def tuning_table(world: str) -> str:
    """All settings; those chosen for the study or the comparison are bold."""
    chosen = [*chosen_settings(world), *chosen_alike(world).values()]
    rows = [
        [f"**{setting}**" if setting in chosen else setting, seed, *(f"{number:.3f}" for number in numbers)]
        for setting, runs in tuned(world).items()
        for seed, numbers in runs.items()
    ]
    return table(["setting", "seed", "accuracy", "AUC within", "AUC pooled", "entropy"], rows)


def regime_table(worlds: dict[str, dict[str, Runs]]) -> str:
    """One row per world: how GRPO changes the base's AUC, and what CAPO adds."""
    rows = []
    for world, runs in worlds.items():
        base, grpo, capo = runs["base"], runs["grpo"], runs["capo"]
        fall, gap = against(grpo, base), against(capo, grpo)
        matched = at_matched_accuracy(capo, grpo, base)
        start = [value(lambda s, base=base, name=name: getattr(base, name)(0, s)) for name in ("accuracy", "auc")]
        rows.append(
            [
                f"`{world}`",
                " / ".join(f"{number:.3f}" for number in start),
                f"{WORLDS[world].tau / median_gap(base):.1f}",
                signed(fall["accuracy"]),
                signed(fall["auc_within"]),
                signed(fall["auc_common"]),
                signed(gap["accuracy"]),
                signed(gap["auc_within"]),
                signed(matched["difference"]),
                len(both(capo, grpo)[0].numbers),
            ]
        )
    header = [
        "world",
        "base: accuracy / AUC",
        "tau in gaps",
        "GRPO - base: accuracy",
        "AUC",
        "on prompts mixed for both",
    ]
    return table([*header, "CAPO - GRPO: accuracy", "AUC", "AUC at matched accuracy", "seeds"], rows)


def median_gap(base: Runs) -> float:
    """Median gap in mean log-prob between a right and a wrong answer of the base to the same prompt."""
    correct, logps, _ = base.samples()
    pairs = [
        np.abs(np.subtract.outer(logps[at][correct[at] == 1], logps[at][correct[at] == 0])).ravel()
        for at in np.ndindex(correct.shape[:2])
    ]
    return float(np.median(np.concatenate(pairs)))


def learning_curve(name: str, runs: Runs, base: Runs) -> np.ndarray:
    """Accuracy or AUC of the base and at each checkpoint, averaged over the splits, (1 + checkpoints, S)."""
    runs, base = both(runs, base)
    first = slice(runs.curve_prompts)
    by_split = [
        [getattr(model, name)(step, split)[:, first] for model, step in ((base, 0), *((runs, s) for s in runs.steps))]
        for split in TEST_SPLITS
    ]
    return np.nanmean(by_split, axis=-1).mean(axis=0)


def draw_curve(axis, world: str, method: str, runs: dict[str, Runs], name: str) -> None:
    """Draw the mean over seeds, and their range."""
    values, steps = learning_curve(name, runs[method], runs["base"]), [0, *runs[method].steps]
    at = [step * WORLDS[world].steps / steps[-1] for step in steps]  # GSPO takes several for each generation
    axis.plot(at, values.mean(axis=1), color=COLORS[method], label=NAMES[method], linewidth=2)
    axis.fill_between(at, values.min(axis=1), values.max(axis=1), color=COLORS[method], alpha=0.12)


def draw_curves(worlds: dict[str, dict[str, Runs]], path: Path) -> None:
    """Draw accuracy and AUC during training, with mean and range over seeds, and AUC against accuracy."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(worlds), 3, figsize=(13, 3.6 * len(worlds)), layout="constrained", squeeze=False)
    for (world, runs), row in zip(worlds.items(), axes, strict=True):
        for method in [m for m in followed(runs) if m != "base"]:
            accuracy, auc = (
                learning_curve(name, runs[method], runs["base"]).mean(axis=1) for name in ("accuracy", "auc")
            )
            draw_curve(row[0], world, method, runs, "accuracy")
            draw_curve(row[1], world, method, runs, "auc")
            style = dict(color=COLORS[method], label=NAMES[method], linewidth=2, marker="o", markersize=4)
            row[2].plot(accuracy, auc, **style)
            for axis in row[1:]:
                axis.axhline(auc[0], color=COLORS["base"], linestyle=":", linewidth=1)
        row[0].set_ylabel(f"world: {world}", fontsize=12)
        row[0].set_title("accuracy")
        row[1].set_title("AUC within prompts (dotted: base)")
        row[2].set_title("AUC within prompts against accuracy")
        row[0].set_xlabel("optimizer step")
        row[1].set_xlabel("optimizer step")
        row[2].set_xlabel("accuracy")
    _finish(figure, axes, path)


def draw_headline(worlds: dict[str, dict[str, Runs]], path: Path) -> None:
    """Draw the README's figure: AUC within during training, of GRPO and CAPO, where each world's base is dotted."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(worlds), figsize=(9, 3.4), layout="constrained", squeeze=False)
    for (world, runs), axis in zip(worlds.items(), axes[0], strict=True):
        for method in ("grpo", "capo"):
            draw_curve(axis, world, method, runs, "auc")
        base = learning_curve("auc", runs["capo"], runs["base"])[0].mean()
        axis.axhline(base, color=COLORS["base"], linestyle=":", linewidth=1.5, label="base")
        axis.set_title(f"AUC within prompts, world {world}")
        axis.set_xlabel("optimizer step")
    _finish(figure, axes, path)


def draw_uses(runs: dict[str, Runs], votes: dict, chosen: dict, path: Path) -> None:
    """Draw the uses of confidence: votes against N, and precision against coverage of samples and questions."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", squeeze=False)
    for method, method_runs in runs.items():
        style = dict(color=COLORS[method], linewidth=2)
        for name, line in (("Perplexity Consistency", "-"), ("majority vote", ":"), ("surest answer", "--")):
            label = f"{NAMES[method]}, {name}" if method == "capo" else NAMES[method] if line == "-" else None
            accuracy = [mean_over_seeds_and_prompts(votes[method][name][count]) for count in COUNTS]
            axes[0, 0].plot(COUNTS, accuracy, linestyle=line, label=label, **style)
        for axis, (right, confidence) in ((axes[0, 1], method_runs.samples()[:2]), (axes[0, 2], chosen[method])):
            curves = [precision_coverage(r, c) for r, c in zip(right, confidence, strict=True)]
            coverage = curves[0][0]
            points = np.unique(np.linspace(len(coverage) // 50, len(coverage) - 1, 300).astype(int))
            precision = np.mean([precision[points] for _, precision in curves], axis=0)
            axis.plot(coverage[points], precision, label=NAMES[method], **style)
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_title("accuracy of the chosen answer")
    axes[0, 0].set_xlabel("samples")
    axes[0, 1].set_title("precision of the surest samples")
    axes[0, 2].set_title("precision of the surest questions (PC@16)")
    for axis in axes[0, 1:]:
        axis.set_xlabel("coverage")
    _finish(figure, axes, path)


def _finish(figure, axes, path: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PAIRS = [
    *((method, "grpo") for method in NAMES if method not in ("base", "grpo")),
    ("capo_no_mask", "capo"),
    ("capo_no_mask", "capo_paper_mask"),
    ("capo_batch", "capo_sum"),
    ("capo_graded", "grpo_graded"),
]


def world_tables(world: str, runs: dict[str, Runs], figures: Path) -> dict[str, str]:
    """All tables of one world; also draws its figure."""
    tables = {
        "pairs": pairs_table(runs, PAIRS),
        "main": main_table(runs),
        "fall": fall_table(runs),
        "matched": matched_table(runs),
        "late": late_table(runs),
        "temperature": temperature_table(runs),
    }
    seeds = [seed for seed in runs["base"].numbers if seed in runs["grpo"].numbers and seed in runs["capo"].numbers]
    users = {method: runs[method].only(seeds) for method in ("base", "grpo", "capo")}
    votes = {method: selected(method_runs) for method, method_runs in users.items()}
    chosen = {method: questions(method_runs) for method, method_runs in users.items()}
    samples = {method: method_runs.samples()[:2] for method, method_runs in users.items()}
    tables["selection"] = selection_table(votes)
    tables["precision"] = precision_table(precision_differences(samples), precision_differences(chosen))
    tables["abstention"] = abstention_table(abstention(chosen, PRECISIONS))
    draw_uses(users, votes, chosen, figures / f"evidence_uses_{world}.png")
    return tables


def sample_sets(runs: Runs, seed: int) -> list[SampleSet]:
    """The final samples of a run, without their texts, which the study does not keep."""
    import pyarrow as pa

    sets = []
    for split in TEST_SPLITS:
        arrays = {name: runs.arrays[seed][f"{runs.steps[-1]}/{split}/{name}"] for name in ("mean_logps", "answers")}
        prompt_ids, samples = np.indices(arrays["answers"].shape).reshape(2, -1)
        columns = dict(
            prompt_id=prompt_ids,
            sample=samples,
            correct=np.unpackbits(runs.arrays[seed][f"{runs.steps[-1]}/{split}/correct"]).astype(float),
            mean_logp=arrays["mean_logps"].ravel().astype(float),
            answer=[None if answer < 0 else str(answer) for answer in arrays["answers"].ravel()],
        )
        sets.append(SampleSet(split, pa.table(columns), NUM_SAMPLES))
    return sets


def write_page(world: str, seed: int = 0) -> None:
    """Write a `trl-capo report` page with base, GRPO and CAPO of one seed."""
    from trl_capo.report.page import write_report

    runs = {NAMES[name]: method_runs for name, method_runs in load(world).items() if name in ("base", "grpo", "capo")}
    histories = {
        name: method_runs.numbers[seed]["training"]
        for name, method_runs in runs.items()
        if method_runs.numbers[seed]["training"]
    }
    sets = {name: sample_sets(method_runs, seed) for name, method_runs in runs.items()}
    print(write_report(sets, ROOT / "runs" / f"{world}.html", histories=histories))


def main() -> None:
    import matplotlib

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--report", metavar="WORLD", choices=list(WORLDS), help="write a report page instead")
    if (world := parser.parse_args().report) is not None:
        write_page(world)
        return
    matplotlib.use("Agg")
    figures = ROOT / "docs" / "figures"
    worlds = {world: runs for world in WORLDS if {"base", "grpo", "capo"} <= set(runs := load(world))}
    if not worlds:
        raise SystemExit(
            "no world has runs of base, grpo and capo yet. Make them first, for example: "
            "python benchmarks/arithmetic_study.py --world slips --methods base grpo capo"
        )
    tables, shown = {}, {world: runs for world, runs in worlds.items() if world not in MAPPED}
    for world, runs in shown.items():
        print(f"{world}:", {method: len(method_runs.numbers) for method, method_runs in runs.items()})
        tables |= {f"{world} {name}": content for name, content in world_tables(world, runs, figures).items()}
    tables |= {f"{world} tuning": tuning_table(world) for world in WORLDS if (RESULTS / f"{world}_tuning").exists()}
    tables["regimes"] = regime_table(worlds)
    tables["rivals"] = (COMPARISON / "comparison.md").read_text().strip()
    tables["rivals looks"] = looks_table()
    draw_curves(shown, figures / "evidence_curves.png")
    if headline := {world: runs for world, runs in shown.items() if world in HEADLINE}:
        draw_headline(headline, figures / "auc_along_training.png")
        tables["headline"] = headline_table(headline)
    (RESULTS / "tables.json").write_text(json.dumps(tables, indent=1))
    for page in ("docs/evidence.md", "README.md"):
        write_tables(ROOT / page, tables)


def write_tables(document: Path, tables: dict[str, str]) -> None:
    """Put each table between the document's marks for it."""
    text = document.read_text()
    for name in re.findall(r"<!-- table: (.*) -->", text):
        between = re.compile(f"({re.escape(f'<!-- table: {name} -->')}\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda found, content=tables[name]: f"{found[1]}\n{content}\n\n{found[2]}", text)
    document.write_text(text)


if __name__ == "__main__":
    main()
