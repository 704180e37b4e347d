"""Calibration metrics of sampled answers.

Every function takes plain arrays. `correct` contains 0, 1 or NaN (booleans also work). `confidence` is any score where
higher means more confident, so pass a mean log-prob, never a perplexity. If a metric looks inside a prompt, its arrays
have shape (P, G), P prompts with G completions each. If it pools all rows, they can have any shape.

Rules that hold everywhere:

- A row takes part if its correctness and its confidence are numbers and `valid`, when given, is true for it.
- Ties count one half, or their average over all orders of the tied rows. Input order never matters.
- Undefined results are NaN, never 0.5: a prompt that is always answered right has no ranking, not a random one.
"""

from trl_capo.calibration.probabilities import brier_score, calibration_bins, expected_calibration_error
from trl_capo.calibration.ranking import (
    accuracy,
    auc_by_prompt,
    auc_per_slot,
    auc_pooled,
    auc_within,
    group_fractions,
    pass_at_k,
    perplexity,
)
from trl_capo.calibration.rows import nanmean, paired_rows
from trl_capo.calibration.selective import (
    aurc,
    coverage_at_precision,
    deferral_curve,
    excess_aurc,
    precision_at_coverage,
    precision_coverage,
    prediction_rejection_ratio,
)


__all__ = [
    "accuracy",
    "auc_by_prompt",
    "auc_per_slot",
    "auc_pooled",
    "auc_within",
    "aurc",
    "brier_score",
    "calibration_bins",
    "coverage_at_precision",
    "deferral_curve",
    "excess_aurc",
    "expected_calibration_error",
    "group_fractions",
    "nanmean",
    "paired_rows",
    "pass_at_k",
    "perplexity",
    "precision_at_coverage",
    "precision_coverage",
    "prediction_rejection_ratio",
]
