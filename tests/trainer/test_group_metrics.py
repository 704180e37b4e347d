"""Metrics of a group cover the logging window and each evaluation set, and may name the best model."""

import math
from collections import defaultdict

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.helpers import conversations, logged, parity_reward, prompt_dataset, tiny_trainer
from trl_capo import CAPOTrainer, GroupAdvantageTrainer


def test_curves_of_the_pooled_auc_do_not_depend_on_what_else_was_scored(tiny_model, tmp_path):
    class ScoresAll(GroupAdvantageTrainer):
        def _rows_needing_logps(self, groups):
            self.has_a_group_of_one_kind = not groups.mixed.all()
            return groups.valid

    def half_of_the_first_group(completion_ids, **kwargs):
        return [float(i < 2) for i in range(len(completion_ids))]

    curves = []
    for trainer_class in (GroupAdvantageTrainer, ScoresAll):
        trainer = tiny_trainer(trainer_class, tiny_model, tmp_path, half_of_the_first_group)
        trainer.train()
        curves.append(logged(trainer, "capo/auc_pooled"))
    assert trainer.has_a_group_of_one_kind
    assert curves[0] == curves[1] != [None]


class CollectingTrainer(CAPOTrainer):
    """Keeps the raw rows that the logged metrics speak of."""

    rows = None

    def _compute_advantages(self, groups):
        self.rows = self.rows or defaultdict(list)
        mode = "train" if self.model.training else "eval"
        self.rows[mode].append((groups.correct.numpy(), groups.mean_logps.double().numpy()))
        return super()._compute_advantages(groups)


def literal_metrics(rows) -> dict[str, float]:
    """AUCs and fractions over all rows together, through scikit-learn; the pooled one over those with a score."""
    correct = np.concatenate([labels for labels, _ in rows])
    scores = np.concatenate([values for _, values in rows])
    mixed = [p for p in range(len(correct)) if 0 < correct[p].sum() < len(correct[p])]
    return {
        "capo/auc_within": np.mean([roc_auc_score(correct[p], scores[p]) for p in mixed]),
        "capo/auc_pooled": roc_auc_score(correct[np.isfinite(scores)], scores[np.isfinite(scores)]),
        "capo/frac_mixed": len(mixed) / len(correct),
        "capo/frac_all_correct": np.mean([row.all() for row in correct]),
        "capo/frac_all_wrong": np.mean([not row.any() for row in correct]),
        "capo/ppl_correct": math.exp(-scores[mixed][correct[mixed] == 1].mean()),
        "capo/ppl_wrong": math.exp(-scores[mixed][correct[mixed] == 0].mean()),
    }


def test_metrics_cover_the_logging_window_and_the_evaluation_set(tiny_model, tmp_path):
    options = dict(
        ref_ppl_mask=False,
        max_steps=4,
        logging_steps=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        num_generations_eval=4,
        learning_rate=1e-4,
        eval_dataset=prompt_dataset(7),  # two prompts a batch, so the last one is short
    )
    trainer = tiny_trainer(CollectingTrainer, tiny_model, tmp_path, **options)
    trainer.train()
    for mode, prefix in (("train", ""), ("eval", "eval_")):
        entry = next(entry for entry in trainer.state.log_history if f"{prefix}capo/auc_within" in entry)
        for name, expected in literal_metrics(trainer.rows[mode]).items():
            assert entry[prefix + name] == pytest.approx(expected, abs=1e-5), (mode, name)
    assert sum(len(labels) for labels, _ in trainer.rows["eval"]) == 7
    assert all(np.isfinite(scores).all() for _, scores in trainer.rows["eval"]), "evaluation scores every row"


def test_undefined_metrics_are_none_in_the_log(tiny_model, tmp_path):
    def never(completion_ids, **kwargs):
        return [0.0 for _ in completion_ids]

    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, never)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "capo/auc_within" in entry)
    assert entry["capo/auc_within"] is None and entry["capo/soft_misranking"] is None
    assert entry["capo/frac_all_wrong"] == 1.0 and entry["capo/frac_mixed"] == 0.0


def always_right_later(completion_ids, trainer_state, **kwargs):
    return parity_reward(completion_ids) if trainer_state.global_step < 2 else [1.0] * len(completion_ids)


@pytest.mark.parametrize("reward_func", [parity_reward, always_right_later])
def test_best_model_by_calibration(tiny_model, tmp_path, reward_func):
    """An evaluation without a mixed prompt has no AUC: it is not the best, and does not end the run."""
    options = dict(
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        ref_ppl_mask=False,
        load_best_model_at_end=True,
        metric_for_best_model="eval_capo/auc_within",
        eval_dataset=prompt_dataset(8),
    )
    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, reward_func, **options)
    trainer.train()
    values = logged(trainer, "eval_capo/auc_within")
    assert trainer.state.best_metric == max(value for value in values if value is not None)
    assert [value is None for value in values] == [False, *[reward_func is always_right_later] * 2]


def prompt_is_right(prompts, **kwargs):
    """All completions of the prompt RIGHT are right, and none of WRONG."""
    return [float(prompt[0]["content"] == "7") for prompt in prompts]


RIGHT, WRONG = conversations(["7"] * 4), conversations(["8"] * 4)


def test_prediction_does_not_leak_into_the_next_evaluation(tiny_model, tmp_path):
    options = dict(dataset=RIGHT, eval_dataset=WRONG, ref_ppl_mask=False)
    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, prompt_is_right, **options)
    trainer.predict(RIGHT)
    metrics = trainer.evaluate()
    assert metrics["eval_capo/frac_all_wrong"] == 1.0 and metrics["eval_capo/frac_all_correct"] == 0.0


def test_every_evaluation_set_has_its_own_metrics(tiny_model, tmp_path):
    options = dict(eval_dataset={"right": RIGHT, "wrong": WRONG}, ref_ppl_mask=False)
    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path, prompt_is_right, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_right_capo/frac_all_correct"] == 1.0 and metrics["eval_wrong_capo/frac_all_correct"] == 0.0
