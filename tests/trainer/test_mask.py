"""CAPO's mask as an option of every method."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import length_reward, literal_mean_logp, logged, parity_reward, tiny_trainer, unpadded_rows
from trl_capo.methods import METHODS, trainer_of
from trl_capo.methods.grpo import GRPO


pytestmark = pytest.mark.filterwarnings("ignore:every optimizer step uses whole generations")  # GSPO, on-policy


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory) -> str:
    """Another model, so that its perplexities are not the policy's."""
    folder = tmp_path_factory.mktemp("reference")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data.mul_(0.5)
    model.save_pretrained(folder)
    return str(folder)


def generations(method, model, folder, reward_func=parity_reward, **options) -> tuple[list[dict], list[dict]]:
    """The batches of a run that learns nothing, with their advantages; and its log."""
    batches = []

    class Recording(trainer_of(method)):
        def _generate_and_score_completions(self, inputs):
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

    settings = {"per_device_train_batch_size": 16, "learning_rate": 0.0, "max_steps": 2, **options}
    if method == "gspo":
        settings["steps_per_generation"] = 1
    trainer = tiny_trainer(Recording, model, folder, reward_func, **settings)
    trainer.train()
    return batches, trainer.state.log_history


def literal_perplexities(batch, path: str) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return np.exp([-literal_mean_logp(model, prompt, completion) for prompt, completion in unpadded_rows(batch)])


@pytest.mark.parametrize("method", METHODS)
def test_masked_completions_have_no_advantage_and_the_others_keep_theirs(method, tiny_model, reference, tmp_path):
    shared = dict(ref_model_name_or_path=reference) if method == "ace" else {}  # it reads the reference without a mask
    plain, _ = generations(method, tiny_model, tmp_path / "plain", ref_ppl_mask=False, **shared)
    thresholds = dict(ref_ppl_mask=True, ref_ppl_low=7.0, ref_ppl_high=8.0, ref_model_name_or_path=reference)
    masked, log = generations(method, tiny_model, tmp_path / "masked", **thresholds)
    bites = {"right": False, "wrong": False}
    for before, after in zip(plain, masked, strict=True):
        assert torch.equal(before["completion_ids"], after["completion_ids"])
        ppl = literal_perplexities(after, reference)
        right = np.array([sum(completion) % 2 == 0 for _, completion in unpadded_rows(after)])
        kept = np.where(right, ppl <= 8, ppl >= 7)
        changed = ~kept & (before["advantages"] != 0).numpy()
        bites["right"] |= changed[right].any()
        bites["wrong"] |= changed[~right].any()
        np.testing.assert_allclose(after["advantages"], np.where(kept, before["advantages"], 0), atol=1e-6)
    assert all(bites.values())
    assert any(0 < entry["capo/frac_masked_wrong"] < 1 for entry in log if "capo/auc_within" in entry)


@pytest.mark.parametrize("method", ["grpo", "gspo", "simko", "cde"])
def test_a_mask_that_drops_nothing_changes_nothing_where_completions_are_truncated(method, tiny_model, tmp_path):
    options = dict(mask_truncated_completions=True, max_completion_length=24, per_device_train_batch_size=32)
    plain, _ = generations(method, tiny_model, tmp_path / "plain", ref_ppl_mask=False, **options)
    thresholds = dict(ref_ppl_mask=True, ref_ppl_low=1.0, ref_ppl_high=1e9)
    masked, _ = generations(method, tiny_model, tmp_path / "masked", **thresholds, **options)
    for before, after in zip(plain, masked, strict=True):
        has_loss = before["completion_mask"].any(dim=1)
        torch.testing.assert_close(after["advantages"][has_loss], before["advantages"][has_loss], atol=1e-6, rtol=0)
        assert not has_loss.all() and (before["advantages"][has_loss] != 0).any()


@pytest.mark.parametrize("method", ["grpo", "codapo"])
def test_graded_rewards_are_masked_where_no_answer_is_right(method, tiny_model, reference, tmp_path):
    options = dict(
        ref_ppl_mask=True, ref_ppl_low=7.0, ref_ppl_high=8.0, ref_model_name_or_path=reference, correct_threshold=2.0
    )
    batches, _ = generations(method, tiny_model, tmp_path, length_reward, **options)
    dropped = literal_perplexities(batches[0], reference) < 7
    advantages = batches[0]["advantages"].numpy()
    assert (advantages[dropped] == 0).all() and (advantages[~dropped] != 0).any() and dropped.any()


@pytest.mark.parametrize("method", ["grpo", "cde"])
def test_quantiles_are_estimated_once_and_survive_a_restart(method, tiny_model, reference, tmp_path):
    options = dict(ref_ppl_mask=True, ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=16)
    options |= dict(ref_model_name_or_path=reference, save_strategy="steps", save_steps=2, max_steps=3)
    whole = tiny_trainer(trainer_of(method), tiny_model, tmp_path, **options)
    whole.train()
    estimated = whole.mask._estimated
    np.testing.assert_allclose(whole.mask.thresholds, np.quantile(estimated.correct + estimated.wrong, [0.25, 0.75]))
    assert logged(whole, "capo/mask_active") == [0, 1, 1]  # 8 completions a step
    resumed = tiny_trainer(trainer_of(method), tiny_model, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.mask.thresholds == whole.mask.thresholds


def test_without_the_mask_it_costs_and_logs_nothing(tiny_model, tmp_path):
    trainer = tiny_trainer(GRPO, tiny_model, tmp_path)
    assert trainer.ref_model is None
    trainer.train()
    assert not any("mask" in name or "ref_ppl" in name for entry in trainer.state.log_history for name in entry)


@pytest.mark.parametrize("method", METHODS)
def test_rewards_normalised_one_by_one_are_for_advantages_that_trl_computes(method, tiny_model, tmp_path):
    has_its_own = method not in ("grpo", "gspo", "simko")
    for mask in (False, True):
        options = dict(
            ref_ppl_mask=mask, multi_objective_aggregation="normalize_then_sum", per_device_train_batch_size=16
        )
        if has_its_own:
            with pytest.raises(ValueError, match="multi_objective_aggregation='normalize_then_sum'.*: set it to"):
                tiny_trainer(trainer_of(method), tiny_model, tmp_path, **options)
        else:  # the mask drops from TRL's own advantages
            tiny_trainer(trainer_of(method), tiny_model, tmp_path, **options).train()
