"""CAPO's mask and its reference in training: which model that is, and which rows it scores."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers import count_forwards, literal_advantages_of_groups, literal_mean_logp, logged, unpadded_rows
from tests.methods.capo_runs import make_trainer, strong_lora


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
        literal = literal_advantages_of_groups(groups.correct, groups.mean_logps)
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
    calls = count_forwards(trainer.ref_model)
    trainer.train()
    assert len(calls) == 1  # one micro-batch of 8 rows
    assert trainer.beta == 0.1
    assert logged(trainer, "kl")
    groups = trainer.generations[0]["groups"]
    assert groups.mixed.any() and not groups.ref_mean_logps[groups.mixed[:, 0]].isnan().any()


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
    trainer = make_trainer(tiny_model, tmp_path, peft_config=strong_lora(), max_steps=1)
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
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), strong_lora())
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.train()
    groups = trainer.generations[0]["groups"]
    rows = groups.mixed.expand_as(groups.valid)
    torch.testing.assert_close(groups.ref_mean_logps[rows], groups.mean_logps[rows], atol=1e-5, rtol=0)


def test_mask_on_graded_rewards_reaches_groups_without_a_wrong_answer(tiny_model, tmp_path):
    """Labels differ although all are above the threshold: such a group has pairs, so it needs its reference."""

    def good_or_better(completion_ids, **kwargs):
        return [0.6 + 0.1 * (sum(ids) % 5) for ids in completion_ids]

    options = dict(graded_rewards=True, ref_ppl_low=1.0, ref_ppl_high=1e6)
    trainer = make_trainer(tiny_model, tmp_path, reward_funcs=good_or_better, **options)
    trainer.train()
    groups, advantages = trainer.generations[0]["groups"], trainer.generations[0]["advantages"]
    assert not groups.mixed.any()
    literal = literal_advantages_of_groups(groups.rewards_per_func[..., 0], groups.mean_logps)
    assert np.abs(literal).max() > 0.1
    np.testing.assert_allclose(advantages.numpy(), literal, atol=1e-5)


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


def test_adapters_that_cannot_serve_as_reference(tiny_model, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    named = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora, adapter_name="mine")
    with pytest.raises(ValueError, match="copy of its adapter 'default', but this one has mine"):
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
