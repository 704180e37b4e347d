"""A live CAPO step against literal oracles, and every option of `CAPOConfig` in training."""

import json
import math
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers import (
    config_kwargs,
    length_reward,
    literal_capo_advantages,
    literal_mean_logp,
    parity_reward,
    prompt_dataset,
    unpadded_rows,
)
from trl_capo import CAPOConfig, CAPOTrainer
from trl_capo.publish.card import add_to_model_card


class RecordingTrainer(CAPOTrainer):
    """Keeps what each generation went in and out with, and the weights that generated it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generations = []

    def _compute_advantages(self, groups):
        self.generations.append({"groups": groups, "training": self.model.training})
        return super()._compute_advantages(groups)

    def _replace_advantages(self, output, advantages):
        groups = self.generations[-1]["groups"]
        self.generations[-1]["advantages"] = advantages.view(groups.valid.shape)
        super()._replace_advantages(output, advantages)

    def _generate_and_score_completions(self, inputs):
        policy = self.accelerator.unwrap_model(self.model)
        weights = {name: value.clone() for name, value in policy.state_dict().items()}
        output = super()._generate_and_score_completions(inputs)
        self.generations[-1] |= {"batch": output, "weights": weights}
        return output


def make_trainer(
    model, tmp_path, trainer_class=RecordingTrainer, reward_funcs=parity_reward, peft_config=None, **options
):
    evaluates = options.get("eval_strategy", "no") != "no"
    return trainer_class(
        model,
        reward_funcs,
        CAPOConfig(**config_kwargs(tmp_path, **options)),
        prompt_dataset(),
        eval_dataset=prompt_dataset(6) if evaluates else None,
        peft_config=peft_config,
    )


def policy_logps(trainer, generation, model_path) -> list[float]:
    """Mean log-probs of a generation's rows, one unpadded forward of the plain model each."""
    plain = AutoModelForCausalLM.from_pretrained(model_path)
    if hasattr(trainer.model, "peft_config"):
        plain = get_peft_model(plain, trainer.model.peft_config["default"])
    plain.load_state_dict(generation["weights"])
    plain.eval()
    return [literal_mean_logp(plain, prompt, completion) for prompt, completion in unpadded_rows(generation["batch"])]


LAYOUTS = {
    "on-policy": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "two updates a generation": {"steps_per_generation": 2, "max_steps": 4, "per_device_train_batch_size": 4},
    "paper": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
    },
    "peft": {},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 8},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_live_step_matches_literal_oracle(tiny_model, tmp_path, layout):
    lora = LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    options = {"max_steps": 2, "ref_ppl_mask": False, **LAYOUTS[layout]}
    trainer = make_trainer(tiny_model, tmp_path, peft_config=lora if layout == "peft" else None, **options)
    trainer.train()

    seen_nonzero = False
    for generation in trainer.generations:
        groups, advantages = generation["groups"], generation["advantages"]
        if layout == "evaluation" and not generation["training"]:
            assert groups.rewards.shape[1] == 8
        expected_logps = np.array(policy_logps(trainer, generation, tiny_model)).reshape(groups.rewards.shape)
        scored = (groups.mixed if generation["training"] else groups.valid).expand_as(groups.valid).numpy()
        np.testing.assert_allclose(groups.mean_logps.numpy()[scored], expected_logps[scored], atol=1e-4)
        assert groups.mean_logps.isnan().numpy()[~scored].all(), "the policy ran on rows that cannot matter"
        rewards = [float(sum(completion) % 2 == 0) for _, completion in unpadded_rows(generation["batch"])]
        np.testing.assert_array_equal(groups.correct.flatten().numpy(), rewards)
        for own_logps, scores, target in (
            (False, expected_logps.tolist(), 1e-4),
            (True, groups.mean_logps.double().tolist(), 1e-5),
        ):
            literal = [
                literal_capo_advantages(r, s, tau=0.6) for r, s in zip(groups.correct.tolist(), scores, strict=True)
            ]
            error = np.abs(advantages.numpy() - np.array(literal)).max()
            # With the oracle's own log-probs, errors of at most 1e-4 in a score move a sum over 3 partners by less.
            assert error < target, (own_logps, error)
        torch.testing.assert_close(generation["batch"]["advantages"], advantages.flatten())
        seen_nonzero |= bool((advantages != 0).any())
    assert seen_nonzero
    if layout == "evaluation":
        assert any(not generation["training"] for generation in trainer.generations)


def test_logged_advantages_are_those_of_the_loss(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, ref_ppl_mask=False, max_steps=1)
    trainer.train()
    assert list(trainer._logs["advantages"]) == trainer.generations[-1]["advantages"].flatten().tolist()


def test_mask_uses_the_reference_and_only_zeroes_the_masked(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, max_steps=3, ref_ppl_low=3.0, ref_ppl_high=8.0)
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    dropped = 0
    for generation in trainer.generations:
        groups = generation["groups"]
        rows = unpadded_rows(generation["batch"])
        ref_ppl = np.exp([-literal_mean_logp(base, *row) for row in rows]).reshape(groups.rewards.shape)
        mixed = groups.mixed.expand_as(groups.valid).numpy()
        np.testing.assert_allclose(groups.ref_mean_logps.neg().exp().numpy()[mixed], ref_ppl[mixed], rtol=1e-3)
        assert groups.ref_mean_logps.isnan().numpy()[~mixed].all(), "the reference ran on rows that cannot matter"
        correct = groups.correct.numpy() == 1
        keep = np.where(correct, ref_ppl <= 8.0, ref_ppl >= 3.0)
        pairs = zip(groups.correct.tolist(), groups.mean_logps.tolist(), strict=True)
        literal = np.array([literal_capo_advantages(r, s, tau=0.6) for r, s in pairs])
        np.testing.assert_allclose(generation["advantages"].numpy(), np.where(keep, literal, 0.0), atol=1e-5)
        dropped += int((~keep & (literal != 0)).sum())
    assert dropped > 0, "the thresholds of this test mask nothing, so it shows nothing"


def test_mask_partners_restores_zero_sums(tiny_model, tmp_path):
    options = dict(max_steps=3, ref_ppl_low=3.0, ref_ppl_high=8.0)
    sums = {}
    for mask_partners in (False, True):
        trainer = make_trainer(tiny_model, tmp_path, mask_partners=mask_partners, **options)
        trainer.train()
        sums[mask_partners] = max(g["advantages"].sum(dim=1).abs().max().item() for g in trainer.generations)
    assert sums[True] < 1e-5 < sums[False]


def test_no_reference_is_loaded_without_mask_and_kl(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, ref_ppl_mask=False)
    assert trainer.ref_model is None
    assert make_trainer(tiny_model, tmp_path).ref_model is not None


def test_kl_and_mask_share_one_reference_forward(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, beta=0.1, max_steps=1)
    calls = []
    forward = trainer.ref_model.forward
    trainer.ref_model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    trainer.train()
    assert len(calls) == 1  # one micro-batch of 8 rows
    assert trainer.beta == 0.1
    assert any("kl" in entry for entry in trainer.state.log_history)
    assert (
        not trainer.generations[0]["groups"].ref_mean_logps[trainer.generations[0]["groups"].mixed[:, 0]].isnan().any()
    )


def test_reference_of_an_instance_is_a_copy_not_a_reload(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)  # no longer what its path holds
    trainer = make_trainer(model, tmp_path)
    torch.testing.assert_close(trainer.ref_model.model.norm.weight, trainer.model.model.norm.weight)
    assert trainer.ref_model is not trainer.model
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


@pytest.mark.parametrize("as_instance", [False, True])
def test_reference_of_its_own(tiny_model, tmp_path, as_instance):
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.model.norm.weight.mul_(3.0)
    other.save_pretrained(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tiny_model) if as_instance else tiny_model
    trainer = make_trainer(model, tmp_path / "run", ref_model_name_or_path=str(tmp_path / "other"))
    torch.testing.assert_close(trainer.ref_model.model.norm.weight, 3.0 * trainer.model.model.norm.weight)
    trainer.train()


def test_peft_reference_is_the_model_without_adapter(tiny_model, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(tiny_model, tmp_path, peft_config=lora, max_steps=1)
    trainer.train()
    assert trainer.ref_model is None
    generation = trainer.generations[0]
    groups = generation["groups"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = np.array([literal_mean_logp(base, *row) for row in unpadded_rows(generation["batch"])])
    mixed = groups.mixed.expand_as(groups.valid).flatten().numpy()
    np.testing.assert_allclose(groups.ref_mean_logps.flatten().numpy()[mixed], expected[mixed], atol=1e-4)
    assert not np.allclose(groups.mean_logps.flatten().numpy(), expected, atol=1e-3), "the adapter changes nothing"


def test_peft_reference_of_an_existing_adapter_is_that_adapter(tiny_model, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    groups = trainer.generations[0]["groups"]
    rows = groups.mixed.expand_as(groups.valid)
    torch.testing.assert_close(groups.ref_mean_logps[rows], groups.mean_logps[rows], atol=1e-5, rtol=0)


def test_quantile_thresholds_are_estimated_once_from_valid_training_completions(tiny_model, tmp_path):
    options = dict(ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=16, max_steps=5)
    trainer = make_trainer(tiny_model, tmp_path, **options)
    trainer.train()
    first = np.concatenate(
        [
            np.exp(-generation["groups"].ref_mean_logps.double().numpy()).flatten()
            for generation in trainer.generations[:2]
        ]
    )
    assert len(first) == 16
    expected = np.quantile(first, [0.25, 0.75])
    np.testing.assert_allclose(trainer.mask.thresholds, expected, rtol=1e-5)
    history = [entry for entry in trainer.state.log_history if "capo/mask_active" in entry]
    assert [entry["capo/mask_active"] for entry in history] == [0, 1, 1, 1, 1]
    assert history[0]["capo/ref_ppl_low"] is None
    np.testing.assert_allclose([entry["capo/ref_ppl_low"] for entry in history[1:]], expected[0], rtol=1e-5)


def test_quantiles_by_class(tiny_model, tmp_path):
    options = dict(ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=16, ref_ppl_quantiles_by_class=True)
    trainer = make_trainer(tiny_model, tmp_path, max_steps=2, **options)
    trainer.train()
    groups = [generation["groups"] for generation in trainer.generations]
    ref_ppl = np.concatenate([np.exp(-g.ref_mean_logps.double().numpy()).flatten() for g in groups])
    correct = np.concatenate([g.correct.numpy().flatten() for g in groups]) == 1
    expected = np.quantile(ref_ppl[~correct], 0.25), np.quantile(ref_ppl[correct], 0.75)
    np.testing.assert_allclose(trainer.mask.thresholds, expected, rtol=1e-5)


def test_tau_in_gaps_is_the_frozen_median(tiny_model, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_model, tmp_path, tau=0.5, tau_unit="gap", ref_ppl_mask=False, max_steps=6)
    trainer._gap_scale.min_gaps = 8
    trainer.train()
    gaps = []
    taus = []
    for generation in trainer.generations:
        groups = generation["groups"]
        if len(gaps) < 8:
            for labels, scores in zip(groups.correct.tolist(), groups.mean_logps.tolist(), strict=True):
                right = [s for s, label in zip(scores, labels, strict=True) if label == 1]
                wrong = [s for s, label in zip(scores, labels, strict=True) if label == 0]
                gaps += [abs(a - b) for a in right for b in wrong]
        taus.append(0.5 * float(np.median(gaps)))
        literal = [
            literal_capo_advantages(r, s, taus[-1])
            for r, s in zip(groups.correct.tolist(), groups.mean_logps.tolist(), strict=True)
        ]
        np.testing.assert_allclose(generation["advantages"].numpy(), literal, atol=1e-5)
    logged = [entry["capo/tau"] for entry in trainer.state.log_history if "capo/tau" in entry]
    np.testing.assert_allclose(logged, taus, rtol=1e-5)
    assert taus[-1] == taus[-2] and len(gaps) >= 8


def test_pair_scope_batch(tiny_model, tmp_path):
    trainer = make_trainer(
        tiny_model, tmp_path, pair_scope="batch", ref_ppl_mask=False, per_device_train_batch_size=16
    )
    trainer.train()
    groups, advantages = trainer.generations[0]["groups"], trainer.generations[0]["advantages"]
    num_prompts, num_generations = groups.rewards.shape
    rewards, scores = groups.correct.flatten().tolist(), groups.mean_logps.flatten().tolist()
    for i in range(len(rewards)):
        own, other = 0.0, 0.0
        for j in range(len(rewards)):
            gap = rewards[i] - rewards[j]
            weight = gap / (1 + math.exp((scores[i] - scores[j]) * gap / 0.6))
            if i // num_generations == j // num_generations:
                own += weight
            else:
                other += weight / num_prompts
        assert advantages.flatten()[i].item() == pytest.approx(own + other, abs=1e-5)
    assert advantages.sum().item() == pytest.approx(0.0, abs=1e-5)


def test_graded_rewards(tiny_model, tmp_path):
    trainer = make_trainer(
        tiny_model, tmp_path, reward_funcs=length_reward, graded_rewards=True, ref_ppl_mask=False, max_steps=3
    )
    trainer.train()
    grades = set()
    for generation in trainer.generations:
        groups = generation["groups"]
        graded = groups.rewards_per_func[..., 0].tolist()
        grades |= {grade for row in graded for grade in row}
        literal = [literal_capo_advantages(r, s, 0.6) for r, s in zip(graded, groups.mean_logps.tolist(), strict=True)]
        np.testing.assert_allclose(generation["advantages"].numpy(), literal, atol=1e-5)
    assert len(grades) > 2


def test_mask_on_graded_rewards_reaches_groups_without_a_wrong_answer(tiny_model, tmp_path):
    """Labels differ although all are above the threshold: such a group has pairs, so it needs its reference."""

    def good_or_better(completion_ids, **kwargs):
        return [0.6 + 0.1 * (sum(ids) % 5) for ids in completion_ids]

    options = dict(graded_rewards=True, ref_ppl_low=1.0, ref_ppl_high=1e6)
    trainer = make_trainer(tiny_model, tmp_path, reward_funcs=good_or_better, **options)
    trainer.train()
    groups, advantages = trainer.generations[0]["groups"], trainer.generations[0]["advantages"]
    assert not groups.mixed.any()
    labels = groups.rewards_per_func[..., 0].tolist()
    literal = [literal_capo_advantages(r, s, 0.6) for r, s in zip(labels, groups.mean_logps.tolist(), strict=True)]
    assert np.abs(literal).max() > 0.1
    np.testing.assert_allclose(advantages.numpy(), literal, atol=1e-5)


def test_graded_rewards_outside_the_unit_interval(tiny_model, tmp_path):
    def points(completion_ids, **kwargs):
        return [3.0 for _ in completion_ids]

    trainer = make_trainer(tiny_model, tmp_path, reward_funcs=points, graded_rewards=True)
    with pytest.raises(ValueError, match=r"rewards in \[0, 1\], but 'points' returned 3"):
        trainer.train()


@pytest.mark.parametrize("mode", ["add", "ignore"])
def test_auxiliary_rewards(tiny_model, tmp_path, mode):
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        reward_funcs=[length_reward, parity_reward],
        correctness_reward="parity_reward",
        reward_weights=[0.25, 5.0],
        auxiliary_rewards=mode,
        ref_ppl_mask=False,
        max_steps=3,
    )
    trainer.train()
    for generation in trainer.generations:
        groups = generation["groups"]
        for p in range(len(groups.rewards)):
            expected = np.array(
                literal_capo_advantages(groups.correct[p].tolist(), groups.mean_logps[p].tolist(), 0.6)
            )
            if mode == "add":
                other = groups.rewards_per_func[p, :, 0].double().numpy()
                expected = expected + 0.25 * (other - other.mean())
            np.testing.assert_allclose(generation["advantages"][p].numpy(), expected, atol=1e-5)


def test_unscorable_and_truncated_completions_take_part_in_nothing(tiny_model, tmp_path):
    def sometimes(completion_ids, **kwargs):
        return [None if i % 4 == 0 else float(sum(ids) % 2 == 0) for i, ids in enumerate(completion_ids)]

    trainer = make_trainer(
        tiny_model, tmp_path, reward_funcs=sometimes, mask_truncated_completions=True, ref_ppl_mask=False, max_steps=4
    )
    trainer.train()
    truncated = 0
    for generation in trainer.generations:
        groups = generation["groups"]
        scores = groups.mean_logps.tolist()
        assert groups.correct[:, 0].isnan().all()
        assert torch.equal(groups.mean_logps.isfinite(), groups.mixed & groups.valid)
        truncated += int((groups.lengths == 0).sum())
        assert not groups.valid[groups.lengths == 0].any()
        literal = [literal_capo_advantages(r, s, 0.6) for r, s in zip(groups.correct.tolist(), scores, strict=True)]
        np.testing.assert_allclose(generation["advantages"].numpy(), literal, atol=1e-5)
        assert (generation["advantages"][~groups.valid] == 0).all()
    assert truncated > 0
    unscorable = [
        entry["capo/frac_unscorable"] for entry in trainer.state.log_history if "capo/frac_unscorable" in entry
    ]
    assert all(0.25 <= value <= 1 for value in unscorable)


def test_moving_reference(tiny_model, tmp_path):
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=0.5,
        max_steps=2,
        ref_ppl_low=1.0,
        ref_ppl_high=1e6,
    )
    start = trainer.ref_model.model.norm.weight.clone()
    trainer.train()
    weights = [generation["weights"]["model.norm.weight"] for generation in trainer.generations]
    final = trainer.model.model.norm.weight.detach()
    after_one = 0.5 * start + 0.5 * weights[1]
    torch.testing.assert_close(trainer.ref_model.model.norm.weight, 0.5 * after_one + 0.5 * final)


def test_every_logged_metric_is_documented_and_the_other_way_round(tiny_model, tmp_path, repository):
    trainer = make_trainer(tiny_model, tmp_path)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("capo/")}
    rows = [
        line for line in (repository / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `capo/")
    ]
    documented = {name for row in rows for name in re.findall(r"`(capo/\w+)`", row.split("|")[1])}
    assert logged == documented


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


def test_state_is_saved_beside_the_checkpoint(tiny_model, tmp_path):
    options = dict(
        tau=0.5, tau_unit="gap", ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=16, save_strategy="steps"
    )
    trainer = make_trainer(tiny_model, tmp_path, max_steps=3, save_steps=3, **options)
    trainer._gap_scale.min_gaps = 8
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-3" / "trl_capo_state.json").read_text())
    assert state["tau"] == trainer.tau
    assert (state["ref_ppl_low"], state["ref_ppl_high"]) == trainer.mask.thresholds
    resumed = make_trainer(tiny_model, tmp_path, max_steps=5, save_steps=3, **options)
    resumed._gap_scale.min_gaps = 8
    assert math.isnan(resumed.tau)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.tau == trainer.tau and resumed.mask.thresholds == trainer.mask.thresholds


def test_restored_samples_serve_new_quantiles(tiny_model, tmp_path):
    options = dict(ref_ppl_quantile_samples=16, save_strategy="steps", save_steps=2)
    first = make_trainer(tiny_model, tmp_path, max_steps=2, ref_ppl_quantiles=[0.25, 0.75], **options)
    first.train()
    second = make_trainer(tiny_model, tmp_path, max_steps=4, ref_ppl_quantiles=[0.05, 0.95], **options)
    second.train(resume_from_checkpoint=True)
    values = first.mask._estimated.correct + first.mask._estimated.wrong
    np.testing.assert_allclose(second.mask.thresholds, np.quantile(values, [0.05, 0.95]))


def test_options_reach_the_formula(tiny_model, tmp_path):
    """A threshold, a normalisation and a scale that differ from the defaults."""
    options = dict(correct_threshold=0.75, pair_normalization="opposite_mean", scale_by_tau=True, tau=0.3)
    trainer = make_trainer(
        tiny_model, tmp_path, reward_funcs=quarter_reward, ref_ppl_mask=False, max_steps=3, **options
    )
    trainer.train()
    nonzero = 0
    for generation in trainer.generations:
        groups = generation["groups"]
        labels = (groups.rewards_per_func[..., 0] >= 0.75).float()
        torch.testing.assert_close(groups.correct, labels)
        for p, (row, scores) in enumerate(zip(labels.tolist(), groups.mean_logps.tolist(), strict=True)):
            opposite = [sum(other != own for other in row) for own in row]
            sums = literal_capo_advantages(row, scores, 0.3)
            expected = [total / max(count, 1) / 0.3 for total, count in zip(sums, opposite, strict=True)]
            np.testing.assert_allclose(generation["advantages"][p].numpy(), expected, atol=1e-4)
            nonzero += any(sums)
    assert nonzero > 0


def quarter_reward(completion_ids, **kwargs) -> list[float]:
    return [(sum(ids) % 5) / 4 for ids in completion_ids]


def test_evaluation_in_larger_batches_leaves_the_estimates_alone(tiny_model, tmp_path):
    options = dict(tau_unit="gap", ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=512)
    trainer = make_trainer(
        tiny_model, tmp_path, per_device_eval_batch_size=24, eval_strategy="steps", eval_steps=1, **options
    )
    trainer.evaluate()
    evaluated = trainer.generations[-1]
    assert math.isnan(trainer.tau) and evaluated["groups"].rewards.numel() == 24
    settled = ~evaluated["groups"].mixed[:, 0]
    assert settled.any() and evaluated["groups"].ref_mean_logps[settled].isnan().all()
    assert list(trainer._logs["advantages"]) == evaluated["advantages"].flatten().tolist()[-8:]
    trainer.train()
    training = [generation["groups"] for generation in trainer.generations if generation["training"]]
    seen = len(trainer.mask._estimated.correct) + len(trainer.mask._estimated.wrong)
    assert seen == sum(groups.rewards.numel() for groups in training) == 8


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
    [entry] = [entry for entry in trainer.state.log_history if "capo/tau" in entry]
    assert entry["capo/frac_unscorable"] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_generation": 2},
        {"steps_per_generation": 2, "repack": False},
        {"steps_per_generation": 2, "loss_type": "bnpo"},
        {"steps_per_generation": 2, "beta": 0.01},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:loss_type='bnpo'")
def test_scores_are_without_dropout(tiny_model, tmp_path, options):
    """Whoever computes them: with two updates a generation, some settings let TRL."""
    lora = LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
    )
    trainer = make_trainer(tiny_model, tmp_path, peft_config=lora, ref_ppl_mask=False, **options)
    trainer.train()
    generation = trainer.generations[0]
    expected = policy_logps(trainer, generation, tiny_model)
    assert trainer.model.training
    np.testing.assert_allclose(generation["groups"].mean_logps.flatten().numpy(), expected, atol=1e-4)


def test_adapters_that_cannot_serve_as_reference(tiny_model, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    named = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora, adapter_name="mine")
    with pytest.raises(ValueError, match="copy of its adapter 'default', but it has mine"):
        make_trainer(named, tmp_path)
    used = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    make_trainer(used, tmp_path)
    assert "ref" in used.peft_config
    make_trainer(used, tmp_path)  # a second trainer on the same model starts from where that is


def test_the_revision_is_the_policys_only(tiny_model, tmp_path, monkeypatch):
    import trl.trainer.grpo_trainer as grpo_trainer

    load, revisions = grpo_trainer.create_model_from_path, []

    def remember(model_id, **kwargs):
        revisions.append(kwargs.pop("revision", None))
        return load(model_id, **kwargs)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", remember)
    options = dict(ref_model_name_or_path=tiny_model, model_init_kwargs={"revision": "step-100"})
    make_trainer(tiny_model, tmp_path, **options)
    assert revisions == ["step-100", None]
