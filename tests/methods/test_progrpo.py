"""ProGRPO: the confidence of the least likely tokens by loops, an unpadded pass of each prompt, and its options."""

import math

import pytest
import torch

from tests.helpers import literal_mean_logp, prompt_dataset, tiny_trainer, unpadded_rows
from trl_capo.methods.progrpo import ProGRPOConfig, ProGRPOTrainer, low_token_confidence


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_random_rows_by_loops(share):
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(40, 11, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, 11, generator=generator) < 0.7
    mask[0] = False
    found = low_token_confidence(logps, mask, share).tolist()
    assert math.isnan(found[0])
    for row, (values, kept) in enumerate(zip(logps.tolist(), mask.tolist(), strict=True)):
        tokens = sorted(value for value, ok in zip(values, kept, strict=True) if ok)
        if tokens:
            lowest = tokens[: math.ceil(share * len(tokens) - 1e-9)]
            assert found[row] == pytest.approx(math.exp(sum(lowest) / len(lowest)), abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(arm_scope="mixed", arm_correct_only=True), dict(generation="compact", mean_logps_from="sampler")],
)
def test_a_generation_equals_unpadded_passes(tiny_model, tmp_path, options):
    # With a share of 1, the confidence is the exponential of a mean, for which there is an independent pass.
    options = dict(dataset=prompt_dataset(16), arm_share=1.0, arm_alpha=0.8, scale_rewards="none", **options)
    trainer = tiny_trainer(ProGRPOTrainer, tiny_model, tmp_path, **options)
    seen, model = [], trainer.model
    compute, replace = trainer._compute_advantages, trainer._replace_advantages
    trainer._compute_advantages = lambda groups: seen.append(groups) or compute(groups)
    checked = []

    def recorded(output, advantages):
        groups, rows = seen[-1], unpadded_rows(output)
        shape = groups.rewards.shape
        if not checked:
            model.eval()
            prompts = torch.tensor([literal_mean_logp(model, prompt[:1], prompt[1:]) for prompt, _ in rows]).exp()
            answers = torch.tensor([literal_mean_logp(model, *row) for row in rows]).exp()
            model.train()
            expected = groups.rewards - groups.rewards.mean(dim=1, keepdim=True)
            right = groups.correct == 1
            scope = groups.mixed if options.get("arm_scope") == "mixed" else right.any(dim=1, keepdim=True)
            scope = scope & (right if options.get("arm_correct_only") else True)
            gain = 0.8 * (prompts - answers).view(shape)
            assert scope.any() and gain.std() > 1e-3
            expected = torch.where(scope, expected + gain, expected)
            torch.testing.assert_close(advantages.view(shape), expected, atol=1e-5, rtol=1e-4)
        checked.append(True)
        replace(output, advantages)

    trainer._replace_advantages = recorded
    before = model.model.norm.weight.detach().clone()
    trainer.train()
    assert checked and (model.model.norm.weight != before).any()


def test_prompts_are_read_once_and_only_where_needed(tiny_model, tmp_path, monkeypatch):
    trainer = tiny_trainer(ProGRPOTrainer, tiny_model, tmp_path)
    passed = []
    monkeypatch.setattr(
        trainer, "_policy_logps", lambda batch, rows: passed.append(rows) or torch.zeros(batch["completion_ids"].shape)
    )
    prompts = torch.tensor([[0, 5, 6], [0, 5, 6], [7, 8, 9], [7, 8, 9]])
    output = {"prompt_ids": prompts, "prompt_mask": (prompts > 0).long()}
    logps, mask = trainer._prompt_logps(output, torch.tensor([False, True, False, False]))
    assert passed[0].tolist() == [True, False, False, False]
    assert mask.tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]] and logps.shape == mask.shape


def test_prompts_of_one_token_have_no_confidence(tiny_model, tmp_path):
    trainer = tiny_trainer(ProGRPOTrainer, tiny_model, tmp_path)
    one = torch.ones(2, 1, dtype=torch.long)
    logps, mask = trainer._prompt_logps({"prompt_ids": 5 * one, "prompt_mask": one}, one[:, 0].bool())
    assert logps.shape == mask.shape == (2, 0)
    assert low_token_confidence(logps, mask).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arm_share=0.0), r"arm_share must be in \(0, 1\], got 0.0"),
        (dict(arm_alpha=float("inf")), "arm_alpha must be finite, got inf"),
        (dict(arm_scope="all"), "arm_scope must be one of any_correct, mixed, got 'all'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ProGRPOConfig(str(tmp_path), **options)
