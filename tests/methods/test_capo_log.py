"""What a CAPO run writes: its log and its model card."""

import math
import re

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import length_reward, literal_mean_logp, logged, unpadded_rows
from tests.methods.capo_runs import make_trainer
from trl_capo.publish.card import add_to_model_card


def test_logged_advantages_are_those_of_the_loss(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, ref_ppl_mask=False, max_steps=1)
    trainer.train()
    assert list(trainer._logs["advantages"]) == trainer.generations[-1]["advantages"].flatten().tolist()


def test_every_logged_metric_is_documented_and_the_other_way_round(tiny_model, tmp_path, repository):
    trainer = make_trainer(tiny_model, tmp_path, prompt_selection="informative")
    trainer.train()
    written = {name for entry in trainer.state.log_history for name in entry if name.startswith("capo/")}
    rows = [
        line for line in (repository / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `capo/")
    ]
    documented = {name for row in rows for name in re.findall(r"`(capo/\w+)`", row.split("|")[1])}
    assert written == documented


def test_card_names_capo_and_its_paper(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, ref_ppl_mask=False)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "CAPO" in card and "2604.12632" in card and "Calibration-Aware Policy Optimization" in card
    assert "DeepSeekMath" not in card
    assert "trl-capo" in card.split("---")[1]


def test_a_calibration_section_outlives_a_new_card(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, ref_ppl_mask=False)
    (tmp_path / "report.md").write_text("### arithmetic\n\nAUC within 0.9\n")
    add_to_model_card(tmp_path / "report.md", tmp_path)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---") and "2604.12632" in card and card.count("AUC within 0.9") == 1
    trainer.train()
    trainer.create_model_card(model_name="mine")
    assert "AUC within 0.9" not in (tmp_path / "README.md").read_text(), "that was about other weights"


def test_mask_and_reference_metrics(tiny_model, tmp_path):
    """What the log says of the mask and the reference, counted by hand over the rows of the window."""
    trainer = make_trainer(tiny_model, tmp_path, max_steps=4, logging_steps=4, ref_ppl_low=30.0, ref_ppl_high=30.0)
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = {0.0: [], 1.0: []}
    misranking = []
    for generation in trainer.generations:
        groups = generation["groups"]
        logps = iter([literal_mean_logp(base, *row) for row in unpadded_rows(generation["batch"])])
        for labels, scores in zip(groups.correct.tolist(), groups.mean_logps.tolist(), strict=True):
            ref_logps = [next(logps) for _ in labels]
            pairs = [
                (a, b)
                for a, x in zip(scores, labels, strict=True)
                for b, y in zip(scores, labels, strict=True)
                if x > y
            ]
            if pairs:
                misranking.append(np.mean([1 / (1 + math.exp((right - wrong) / 0.6)) for right, wrong in pairs]))
                for label, ref_logp in zip(labels, ref_logps, strict=True):
                    rows[label].append(ref_logp)
    [entry] = [entry for entry in trainer.state.log_history if "capo/tau" in entry]
    right, wrong = np.array(rows[1.0]), np.array(rows[0.0])
    assert entry["capo/frac_masked_correct"] == pytest.approx(np.mean(np.exp(-right) > 30.0))
    assert entry["capo/frac_masked_wrong"] == pytest.approx(np.mean(np.exp(-wrong) < 30.0))
    assert 0 < entry["capo/frac_masked_correct"] < 1 and 0 < entry["capo/frac_masked_wrong"] < 1
    assert entry["capo/ref_ppl_correct"] == pytest.approx(math.exp(-right.mean()), rel=1e-4)
    assert entry["capo/ref_ppl_wrong"] == pytest.approx(math.exp(-wrong.mean()), rel=1e-4)
    assert entry["capo/soft_misranking"] == pytest.approx(np.mean(misranking), abs=1e-5)


def test_unknown_correctness_beside_another_reward_is_counted(tiny_model, tmp_path):
    def unknown(completion_ids, **kwargs):
        return [None for _ in completion_ids]

    functions = [unknown, length_reward]
    trainer = make_trainer(tiny_model, tmp_path, reward_funcs=functions, correctness_reward="unknown")
    trainer.train()
    assert logged(trainer, "capo/frac_unscorable") == [1.0]
