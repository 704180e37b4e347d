"""The seam: it changes the advantages and nothing else."""

import math

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import VOCABULARY, largest_change, logged, parameters, tiny_trainer
from tests.trainer.runs import LinearSurrogateTrainer, ScoredCAPO
from trl_capo import CAPOTrainer, GroupAdvantageTrainer


# Steps large enough to see an error, small enough that rounding is not amplified: at 0.3, weights perturbed by one
# part in 10^7 end 6e-5 apart.
SGD = dict(optim="sgd", learning_rate=0.05, max_steps=5)


LAYOUTS = {
    "on-policy": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "paper": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
    "two iterations": {"num_iterations": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_the_linear_surrogate_it_is_grpo(tiny_model, tmp_path, layout):
    options = {**SGD, **LAYOUTS[layout], "loss_type": "grpo"}
    stock = tiny_trainer(GRPOTrainer, tiny_model, tmp_path / "stock", scale_rewards="none", **options)
    start = parameters(stock)
    stock.train()
    ours = tiny_trainer(LinearSurrogateTrainer, tiny_model, tmp_path / "ours", ref_ppl_mask=False, **options)
    ours.train()
    assert largest_change(start, parameters(stock)) >= 1e-2
    assert largest_change(parameters(stock), parameters(ours)) <= 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_used_as_it_is_it_is_grpo(tiny_model, tmp_path, loss_type):
    trainers = []
    for trainer_class in (GRPOTrainer, GroupAdvantageTrainer):
        options = dict(config_class=GRPOConfig, loss_type=loss_type, **SGD)
        trainers.append(tiny_trainer(trainer_class, tiny_model, tmp_path / trainer_class.__name__, **options))
        start = parameters(trainers[-1])
        trainers[-1].train()
    assert largest_change(start, parameters(trainers[0])) >= 1e-2
    assert largest_change(parameters(trainers[0]), parameters(trainers[1])) <= 1e-5
    assert logged(trainers[1], "capo/auc_within")


class ByToken(GroupAdvantageTrainer):
    """GRPO's advantages a token; remembers the batch that the loss sees."""

    def _token_advantages(self, advantages, inputs):
        self.a_completion = advantages
        return advantages.unsqueeze(1) * inputs["completion_mask"]

    def _compute_loss(self, model, inputs):
        self.batch = inputs
        return super()._compute_loss(model, inputs)


def test_a_method_may_change_grpos_advantages_by_token_alone(tiny_model, tmp_path):
    trainer = tiny_trainer(ByToken, tiny_model, tmp_path)
    trainer.train()
    assert trainer.batch["advantages"].shape == trainer.batch["completion_mask"].shape
    assert set(trainer.batch["advantages"][:, 0].tolist()) == set(trainer.a_completion.tolist()) != {0.0}


def test_hooks_reach_the_loss(tiny_model, tmp_path):
    """A method may return advantages a token and ask for more numbers a completion."""

    class Method(ByToken):
        def _sequence_statistics(self, per_token_logps, mask):
            return {"lowest": (per_token_logps * mask).min(dim=1).values}

        def _compute_advantages(self, groups):
            self.groups = groups
            return 1 + torch.arange(groups.rewards.numel(), dtype=torch.float32).view_as(groups.rewards)

    trainer = tiny_trainer(Method, tiny_model, tmp_path)
    trainer.train()
    assert trainer.batch["advantages"].shape == trainer.batch["completion_mask"].shape
    assert sorted(trainer.batch["advantages"].max(dim=1).values.tolist()) == list(range(1, 9))
    assert (trainer.groups.extras["lowest"] <= trainer.groups.mean_logps).all()


def test_a_method_with_wrong_shape_is_told(tiny_model, tmp_path):
    class Method(GroupAdvantageTrainer):
        def _compute_advantages(self, groups):
            return groups.rewards.flatten()

    trainer = tiny_trainer(Method, tiny_model, tmp_path)
    with pytest.raises(ValueError, match=r"one advantage per completion, shape \(2, 4\), got \(8,\)"):
        trainer.train()


class CannedVLLM:
    """Stands in for TRL's vLLM engine: fixed completions, the last log-prob of the first row missing."""

    def __init__(self, **kwargs):
        self.settings = kwargs

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, **kwargs):
        completions = [[2 + (3 * i + j) % 10 for j in range(2 + i % 4)] + [1] for i in range(len(prompts))]
        logprobs = [[[-0.5] for _ in ids] for ids in completions]
        logprobs[0][-1] = [None]
        return prompts, completions, logprobs, None


@pytest.mark.parametrize("correction", [True, False])
def test_vllm_rollouts(tiny_model, tmp_path, monkeypatch, correction):
    """vLLM passes through; scores are the trainer's own log-probs whatever the sampler returned."""
    import trl.trainer.grpo_trainer as grpo_trainer

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", CannedVLLM)
    options = dict(use_vllm=True, vllm_mode="colocate", vllm_importance_sampling_correction=correction)
    trainer = tiny_trainer(ScoredCAPO, tiny_model, tmp_path, ref_ppl_mask=False, **options)
    assert trainer.vllm_generation.settings["mode"] == "colocate"
    trainer.train()
    [groups], [batch] = trainer.groups, trainer.seen
    assert groups.mean_logps.isfinite().all() and groups.valid.all()
    assert groups.lengths.flatten().tolist() == [3 + i % 4 for i in range(8)]
    assert not torch.allclose(groups.mean_logps, torch.tensor(-0.5))
    assert batch["sampling_per_token_logps"].isnan().sum() == 1
    assert ("importance_sampling_ratio" in batch) == correction
    [loss] = logged(trainer, "loss")
    assert math.isfinite(loss)


def test_token_environments_and_tool_masks_count_only_what_the_model_wrote(tiny_model, tmp_path):
    """A rollout function may mark tokens that an environment wrote: they are no part of the score."""

    def rollout(prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [
            tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True)["input_ids"] for prompt in prompts
        ]
        completions = [[2 + i % 8, 3, 4, 5, 1] for i in range(len(prompts))]
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": [[-1.0] * 5 for _ in prompts],
            "env_mask": [[1, 0, 0, 1, 1] for _ in prompts],
        }

    options = dict(ref_ppl_mask=False, learning_rate=0.0, rollout_func=rollout)
    trainer = tiny_trainer(ScoredCAPO, tiny_model, tmp_path, **options)
    trainer.train()
    [groups], [batch] = trainer.groups, trainer.generations
    assert (groups.lengths == 3).all()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logps = trainer.model(input_ids=ids, attention_mask=attention).logits.log_softmax(dim=-1)
    tokens = logps[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[:, -5:]
    expected = tokens[:, [0, 3, 4]].mean(dim=1)
    torch.testing.assert_close(groups.mean_logps.flatten(), expected, atol=1e-4, rtol=0)


def test_log_probs_with_gradient_are_trls(tiny_model, tmp_path):
    """A method's own loss may pass over a batch in chunks: then TRL's method must be TRL's, gradient included."""
    trainers = [tiny_trainer(trainer_class, tiny_model, tmp_path) for trainer_class in (GRPOTrainer, CAPOTrainer)]
    ids = torch.randint(2, VOCABULARY, (4, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 6:] = 0
    gradients = []
    for trainer in trainers:
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 5, batch_size=2, compute_entropy=True
        )
        logps_alone, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5, batch_size=2)
        assert torch.equal(logps, logps_alone) and entropies.shape == logps.shape
        gradients.append(torch.autograd.grad(logps_alone.sum(), trainer.model.lm_head.weight)[0])
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_vision_language_batches_pass_whole_on_every_rank(tiny_model, tmp_path):
    """A rank whose rows happen to have no images must take part in the same collectives as the others."""
    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path)
    trainer._is_vlm = True
    gathers, widths = [], []
    trainer.accelerator.gather = lambda value: gathers.append(1) or value
    trainer._logps_of_batch = lambda model, batch, **kwargs: widths.append((len(batch["prompt_ids"]), kwargs))
    batch = {name: torch.ones(4, 3, dtype=torch.long) for name in ("prompt_ids", "prompt_mask")}
    batch |= {name: torch.ones(4, 2, dtype=torch.long) for name in ("completion_ids", "completion_mask")}
    images = {"num_images": [1, 0, 0, 0], "pixel_values": torch.ones(1, 3)}
    rows = torch.tensor([True, False, False, False])
    for more in ({}, images):
        trainer._logps_of_rows(trainer.model, batch | more, rows, 2)
    assert gathers == []
    assert widths == [(4, {"batch_size": 2}), (4, {"batch_size": 2, **images})]
