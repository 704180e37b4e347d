"""SimKO: the gradient of the formula as it is released, old log-probs included; without its two changes it is GRPO."""

import pytest
import torch

from tests.helpers import (
    config_kwargs,
    first_batch,
    largest_change,
    literal_logits,
    logged,
    move,
    parameters,
    prompt_dataset,
    tiny_trainer,
)
from tests.methods.batches import assert_same_gradient
from trl_capo import CAPOTrainer, GroupAdvantageTrainer
from trl_capo.methods.simko import (
    CAPOSimKOConfig,
    CAPOSimKOTrainer,
    SimKOConfig,
    SimKOTrainer,
    surrogate_logps,
)


def released_loss(logits, old_logps, tokens, mask, advantages, top_k, mix, quantile, penalty):
    """Token by token: mixed ratios to the old policy, stop-gradients and all; the sum over tokens of ratio times A."""
    loss = 0.0
    logps = logits.log_softmax(-1)
    for b in range(len(tokens)):
        steps = [t for t in range(tokens.shape[1]) if mask[b, t]]
        entropies = {t: -(logps[b, t].exp() * logps[b, t]).sum().item() for t in steps}
        threshold = torch.tensor(list(entropies.values()), dtype=torch.double).quantile(quantile).item()
        for t in steps:
            y, fork = tokens[b, t].item(), entropies[t] > threshold
            gamma = (logps[b, t] - old_logps[b, t]).exp()
            ratio, advantage = gamma[y], advantages[b].item()
            if fork and advantage > 0:
                top = logps[b, t].topk(top_k).indices.tolist()
                shared = sum((gamma[y] / gamma[k]).detach() * gamma[k] for k in top) * mix / top_k
                ratio = (1 - mix) * gamma[y] + shared
            if fork and advantage < 0 and logps[b, t].argmax().item() == y:
                advantage *= penalty
            loss = loss - ratio * advantage
    return loss


def test_gradient_is_that_of_the_released_formula():
    generator = torch.Generator().manual_seed(0)
    shape = (12, 7, 9)
    logits = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()
    old_logps = (logits.detach() + 0.3 * torch.randn(*shape, generator=generator)).log_softmax(-1)
    tokens = torch.multinomial(logits.detach().softmax(-1).view(-1, 9), 1, generator=generator).view(12, 7)
    tokens[::3] = logits.detach().argmax(-1)[::3]
    mask = (torch.arange(7) < torch.randint(1, 8, (12, 1), generator=generator)).long()
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    advantages[5] = 0.0
    options = dict(top_k=3, mix=0.2, quantile=0.6, penalty=1.5)

    expected = torch.autograd.grad(released_loss(logits, old_logps, tokens, mask, advantages, **options), logits)[0]
    logps = logits.log_softmax(-1)
    entropies = torch.distributions.Categorical(logits=logits.detach()).entropy()
    surrogate = surrogate_logps(logps, entropies, tokens, mask, advantages, **options)
    plain = logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(surrogate, plain)
    ratio = (surrogate - old_logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)).exp()
    found = torch.autograd.grad(-(ratio * advantages.unsqueeze(1) * mask).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    grpo = (plain - old_logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)).exp()
    unchanged = torch.autograd.grad(-(grpo * advantages.unsqueeze(1) * mask).sum(), logits)[0]
    assert (found - unchanged).abs().max() > 0.05


@pytest.mark.parametrize(
    ("entropies", "forks"),
    [
        ([1.0], []),
        ([0.1, 0.6, 0.2, 0.5, 0.3, 0.4], [1]),  # the quantile is 0.5 itself
        ([0.1, 0.2, 0.3, 0.5, 0.4], [3]),
        ([0.0] * 18 + [1.0, 2.0], [18, 19]),
        ([0.7] * 4, []),
        ([0.1 * i for i in range(11)], [9, 10]),
    ],
)
def test_a_token_forks_above_the_quantile_of_its_completion(entropies, forks):
    length = len(entropies)
    logits = torch.randn(1, length, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens, mask = torch.zeros(1, length + 2, dtype=torch.long), torch.tensor([[1.0] * length + [0.0] * 2])
    padded = torch.cat([logits, torch.zeros(1, 2, 5)], dim=1).log_softmax(-1)
    surrogate = surrogate_logps(padded, torch.tensor([entropies + [9.0] * 2]), tokens, mask, torch.ones(1), mix=0.5)
    found = torch.autograd.grad((surrogate * mask).sum(), logits, retain_graph=True)[0]
    plain = torch.autograd.grad((padded[..., 0] * mask).sum(), logits)[0]
    assert (found - plain).abs().amax(-1)[0].gt(1e-4).nonzero().flatten().tolist() == forks


SGD = dict(optim="sgd", learning_rate=0.05)  # Adam would blow rounding up


NOTHING = dict(simko_mix=0.0, simko_penalty=1.0)  # neither of its two changes


def train(trainer_class, tiny_model, folder, **options):
    options |= dict(max_steps=3, temperature=0.9, steps_per_generation=2, dataset=prompt_dataset(16), **SGD)
    trainer = tiny_trainer(trainer_class, tiny_model, folder, **options)
    trainer.train()
    return parameters(trainer), trainer


def test_the_gradient_in_training_is_that_of_the_released_formula(tiny_model, tmp_path):
    """With every option away from its default, after a step away from the policy that sampled."""
    options = dict(top_k=2, mix=0.3, quantile=0.4, penalty=1.7)
    config = dict(per_device_train_batch_size=16, loss_type="grpo", num_iterations=2, epsilon=0.9, repack=False)
    config |= {f"simko_{name}": value for name, value in options.items()}
    trainer = tiny_trainer(SimKOTrainer, tiny_model, tmp_path, dataset=prompt_dataset(16), **config)
    batch, model = first_batch(trainer), trainer.model
    old = [logits.log_softmax(-1).detach() for logits in literal_logits(model, batch)]
    move(model, 0.002)
    loss = 0.0
    for row, (logits, old_logps) in enumerate(zip(literal_logits(model, batch), old, strict=True)):
        tokens = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        one = (logits[None], old_logps[None], tokens[None], torch.ones(1, len(tokens)), batch["advantages"][row, None])
        loss = loss + released_loss(*one, **options) / len(tokens) / 16
    assert_same_gradient(trainer, batch, loss)


def test_without_its_changes_it_is_grpo(tiny_model, tmp_path):
    expected, plain = train(GroupAdvantageTrainer, tiny_model, tmp_path / "grpo")
    found, ours = train(SimKOTrainer, tiny_model, tmp_path / "nothing", **NOTHING)
    assert largest_change(expected, found) <= 1e-5
    assert logged(plain, "entropy") == pytest.approx(logged(ours, "entropy"), abs=1e-5)
    changed, _ = train(SimKOTrainer, tiny_model, tmp_path / "simko", simko_mix=0.3)
    assert largest_change(expected, changed) > 1e-4


def test_capo_in_its_loss(tiny_model, tmp_path):
    options = dict(ref_ppl_mask=False, tau=0.5)
    expected, _ = train(CAPOTrainer, tiny_model, tmp_path / "capo", **options)
    found, _ = train(CAPOSimKOTrainer, tiny_model, tmp_path / "nothing", **options, **NOTHING)
    assert largest_change(expected, found) <= 1e-5
    changed, _ = train(CAPOSimKOTrainer, tiny_model, tmp_path / "both", **options, simko_mix=0.3)
    assert largest_change(expected, changed) > 1e-4


def test_dropping_and_trimming_rows_changes_nothing(tiny_model, tmp_path):
    options = dict(simko_mix=0.3, simko_penalty=1.5)
    plain, _ = train(SimKOTrainer, tiny_model, tmp_path / "plain", repack=False, **options)
    packed, _ = train(SimKOTrainer, tiny_model, tmp_path / "packed", **options)
    assert largest_change(plain, packed) <= 1e-5


def test_all_logits_are_read_in_training_only(tiny_model, tmp_path, monkeypatch):
    """An evaluation has many rows and no gradient: their logits would not fit, and the loss has the same value."""
    seen = []
    unfused = SimKOTrainer._unfused_logps

    def counted(self, *args):
        seen.append(self.model.training)
        return unfused(self, *args)

    monkeypatch.setattr(SimKOTrainer, "_unfused_logps", counted)
    options = dict(eval_strategy="steps", eval_steps=1, max_steps=2, eval_dataset=prompt_dataset(4))
    trainer = tiny_trainer(SimKOTrainer, tiny_model, tmp_path, dataset=prompt_dataset(16), **options)
    trainer.train()
    assert seen and all(seen) and logged(trainer, "eval_loss")


def test_what_its_forward_cannot_do_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
        train(SimKOTrainer, tiny_model, tmp_path, cast_lm_head_to_fp32=True)


def test_a_penalty_is_a_penalty(tmp_path):
    with pytest.raises(ValueError, match="simko_penalty must be positive"):
        SimKOConfig(**config_kwargs(tmp_path, simko_penalty=-3))


@pytest.mark.parametrize("options", [dict(simko_top_k=0), dict(simko_mix=1.5), dict(simko_quantile=-0.1)])
def test_bad_options(tmp_path, options):
    with pytest.raises(ValueError, match="simko_top_k must be at least 1"):
        SimKOConfig(str(tmp_path), **options)


def test_no_kl_term(tmp_path):
    with pytest.raises(ValueError, match="set beta=0"):
        CAPOSimKOConfig(**config_kwargs(tmp_path, beta=0.1))
