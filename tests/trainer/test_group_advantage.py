"""The seam: it changes the advantages and nothing else, counts right, and survives a restart."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import config_kwargs, length_reward, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer


# Steps large enough to see an error, small enough that rounding is not amplified: at 0.3, weights perturbed by one
# part in 10^7 end 6e-5 apart.
SGD = dict(optim="sgd", learning_rate=0.05, max_steps=5)


def parameters(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in before)


class LinearSurrogateTrainer(CAPOTrainer):
    """CAPO's pairs with the linear loss -t, over the valid count: by identity, reward minus group mean."""

    def _compute_advantages(self, groups):
        advantages = torch.zeros_like(groups.rewards)
        num_prompts, num_generations = groups.rewards.shape
        for p in range(num_prompts):
            members = [g for g in range(num_generations) if groups.valid[p, g]]
            for i in members:
                gaps = [(groups.rewards[p, i] - groups.rewards[p, j]).item() for j in members]
                advantages[p, i] = sum(gaps) / len(members)
        return advantages


LAYOUTS = {
    "on-policy": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "paper": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 4},
    "two iterations": {"num_iterations": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_the_linear_surrogate_it_is_grpo(tiny_model, tmp_path, layout):
    options = {**SGD, **LAYOUTS[layout], "loss_type": "grpo"}
    stock = GRPOTrainer(
        tiny_model,
        parity_reward,
        GRPOConfig(**config_kwargs(tmp_path / "stock", scale_rewards="none", **options)),
        prompt_dataset(),
    )
    start = parameters(stock)
    stock.train()
    ours = LinearSurrogateTrainer(
        tiny_model,
        parity_reward,
        CAPOConfig(**config_kwargs(tmp_path / "ours", ref_ppl_mask=False, **options)),
        prompt_dataset(),
    )
    ours.train()
    assert largest_change(start, parameters(stock)) >= 1e-2
    assert largest_change(parameters(stock), parameters(ours)) <= 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_used_as_it_is_it_is_grpo(tiny_model, tmp_path, loss_type):
    trainers = []
    for trainer_class in (GRPOTrainer, GroupAdvantageTrainer):
        config = GRPOConfig(**config_kwargs(tmp_path / trainer_class.__name__, loss_type=loss_type, **SGD))
        trainers.append(trainer_class(tiny_model, parity_reward, config, prompt_dataset()))
        start = parameters(trainers[-1])
        trainers[-1].train()
    assert largest_change(start, parameters(trainers[0])) >= 1e-2
    assert largest_change(parameters(trainers[0]), parameters(trainers[1])) <= 1e-5
    assert any("capo/auc_within" in entry for entry in trainers[1].state.log_history)


class ByToken(GroupAdvantageTrainer):
    """GRPO's advantages a token; remembers the batch that the loss sees."""

    def _token_advantages(self, advantages, inputs):
        self.a_completion = advantages
        return advantages.unsqueeze(1) * inputs["completion_mask"]

    def _compute_loss(self, model, inputs):
        self.batch = inputs
        return super()._compute_loss(model, inputs)


def test_a_method_may_change_grpos_advantages_by_token_alone(tiny_model, tmp_path):
    trainer = ByToken(tiny_model, parity_reward, GroupAdvantageConfig(**config_kwargs(tmp_path)), prompt_dataset())
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

    trainer = Method(tiny_model, parity_reward, GroupAdvantageConfig(**config_kwargs(tmp_path)), prompt_dataset())
    trainer.train()
    assert trainer.batch["advantages"].shape == trainer.batch["completion_mask"].shape
    assert sorted(trainer.batch["advantages"].max(dim=1).values.tolist()) == list(range(1, 9))
    assert (trainer.groups.extras["lowest"] <= trainer.groups.mean_logps).all()


def test_curves_of_the_pooled_auc_do_not_depend_on_what_else_was_scored(tiny_model, tmp_path):
    class ScoresAll(GroupAdvantageTrainer):
        def _rows_needing_logps(self, groups):
            self.has_a_group_of_one_kind = not groups.mixed.all()
            return groups.valid

    def half_of_the_first_group(completion_ids, **kwargs):
        return [float(i < 2) for i in range(len(completion_ids))]

    curves = []
    for trainer_class in (GroupAdvantageTrainer, ScoresAll):
        config = GroupAdvantageConfig(**config_kwargs(tmp_path))
        trainer = trainer_class(tiny_model, half_of_the_first_group, config, prompt_dataset())
        trainer.train()
        curves.append([e["capo/auc_pooled"] for e in trainer.state.log_history if "capo/auc_pooled" in e])
    assert trainer.has_a_group_of_one_kind
    assert curves[0] == curves[1] != [None]


def test_a_method_with_wrong_shape_is_told(tiny_model, tmp_path):
    class Method(GroupAdvantageTrainer):
        def _compute_advantages(self, groups):
            return groups.rewards.flatten()

    trainer = Method(tiny_model, parity_reward, GroupAdvantageConfig(**config_kwargs(tmp_path)), prompt_dataset())
    with pytest.raises(ValueError, match=r"one advantage a completion, shape \(2, 4\), got \(8,\)"):
        trainer.train()


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
    )
    trainer = CollectingTrainer(
        tiny_model,
        parity_reward,
        CAPOConfig(**config_kwargs(tmp_path, **options)),
        prompt_dataset(),
        eval_dataset=prompt_dataset(7),  # two prompts a batch, so the last one is short
    )
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

    trainer = CAPOTrainer(tiny_model, never, CAPOConfig(**config_kwargs(tmp_path)), prompt_dataset())
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
    )
    trainer = CAPOTrainer(
        tiny_model,
        reward_func,
        CAPOConfig(**config_kwargs(tmp_path, **options)),
        prompt_dataset(),
        eval_dataset=prompt_dataset(8),
    )
    trainer.train()
    values = [entry["eval_capo/auc_within"] for entry in trainer.state.log_history if "eval_capo/auc_within" in entry]
    assert trainer.state.best_metric == max(value for value in values if value is not None)
    assert [value is None for value in values] == [False, *[reward_func is always_right_later] * 2]


class StopAt(Exception):
    pass


@pytest.mark.parametrize("num_prompts", [32, 6], ids=["one epoch", "several epochs"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny_model, tmp_path, num_prompts):
    options = dict(
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.01,
        optim="adamw_torch",
        tau_unit="gap",
        ref_ppl_quantiles=[0.25, 0.75],
        ref_ppl_quantile_samples=16,
    )

    def make(folder):
        config = CAPOConfig(**config_kwargs(tmp_path / folder, **options))
        return CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset(num_prompts))

    whole = make("whole")
    whole.train()
    first = make("parts")
    step = first.training_step

    def stop_in_the_middle(*args, **kwargs):
        if first.state.global_step == 5:
            raise StopAt
        return step(*args, **kwargs)

    first.training_step = stop_in_the_middle
    with pytest.raises(StopAt):
        first.train()
    second = make("parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert largest_change(parameters(whole), parameters(second)) <= 1e-5
    assert second.tau == whole.tau and second.mask.thresholds == whole.mask.thresholds


@pytest.mark.parametrize("way", ["folder", "newest"])
def test_a_finished_run_is_not_trained_further(tiny_model, tmp_path, way):
    options = dict(max_steps=2, save_strategy="steps", save_steps=2, learning_rate=0.01)

    def make():
        config = CAPOConfig(**config_kwargs(tmp_path, **options))
        return CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset())

    whole = make()
    whole.train()
    again = make()
    result = again.train(resume_from_checkpoint=True if way == "newest" else str(tmp_path / "checkpoint-2"))
    assert result.global_step == 2 and again.state.log_history == whole.state.log_history[:-1]
    assert largest_change(parameters(whole), parameters(again)) == 0


def test_moving_reference_survives_a_restart(tiny_model, tmp_path):
    options = dict(
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        learning_rate=0.01,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=0.3,
    )

    def make(folder):
        config = CAPOConfig(**config_kwargs(tmp_path / folder, **options))
        return CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset())

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, actual = whole.ref_model.state_dict(), resumed.ref_model.state_dict()
    assert largest_change(expected, actual) <= 1e-5
    assert largest_change(expected, parameters(whole)) > 1e-4


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
    config = CAPOConfig(
        **config_kwargs(
            tmp_path,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_importance_sampling_correction=correction,
            ref_ppl_mask=False,
        )
    )
    seen = {}

    class Recording(CAPOTrainer):
        def _compute_advantages(self, groups):
            seen["groups"] = groups
            return super()._compute_advantages(groups)

        def _compute_loss(self, model, inputs):
            seen["batch"] = inputs
            return super()._compute_loss(model, inputs)

    trainer = Recording(tiny_model, parity_reward, config, prompt_dataset())
    assert trainer.vllm_generation.settings["mode"] == "colocate"
    trainer.train()
    groups, batch = seen["groups"], seen["batch"]
    assert groups.mean_logps.isfinite().all() and groups.valid.all()
    assert groups.lengths.flatten().tolist() == [3 + i % 4 for i in range(8)]
    assert not torch.allclose(groups.mean_logps, torch.tensor(-0.5))
    assert batch["sampling_per_token_logps"].isnan().sum() == 1
    assert ("importance_sampling_ratio" in batch) == correction
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_wrong_config_class_is_refused(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="CAPOTrainer takes a CAPOConfig as args, got GRPOConfig"):
        CAPOTrainer(tiny_model, parity_reward, GRPOConfig(**config_kwargs(tmp_path)), prompt_dataset())


def test_config_may_be_left_out(tiny_model, tmp_path, monkeypatch):
    @dataclass
    class CPUConfig(CAPOConfig):  # like TRL's, the defaults need a GPU
        bf16: bool = False
        use_cpu: bool = True

    monkeypatch.setattr(CAPOTrainer, "config_class", CPUConfig)
    monkeypatch.chdir(tmp_path)
    trainer = CAPOTrainer(tiny_model, parity_reward, train_dataset=prompt_dataset())
    assert isinstance(trainer.args, CPUConfig) and trainer.args.output_dir.endswith("-CAPO")


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

    class Recording(CAPOTrainer):
        def _generate_and_score_completions(self, inputs):
            self.batch = super()._generate_and_score_completions(inputs)
            return self.batch

        def _compute_advantages(self, groups):
            self.groups = groups
            return super()._compute_advantages(groups)

    config = CAPOConfig(**config_kwargs(tmp_path, ref_ppl_mask=False, learning_rate=0.0))
    trainer = Recording(tiny_model, parity_reward, config, prompt_dataset(), rollout_func=rollout)
    trainer.train()
    assert (trainer.groups.lengths == 3).all()
    ids = torch.cat([trainer.batch["prompt_ids"], trainer.batch["completion_ids"]], dim=1)
    attention = torch.cat([trainer.batch["prompt_mask"], trainer.batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logps = trainer.model(input_ids=ids, attention_mask=attention).logits.log_softmax(dim=-1)
    tokens = logps[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)[:, -5:]
    expected = tokens[:, [0, 3, 4]].mean(dim=1)
    torch.testing.assert_close(trainer.groups.mean_logps.flatten(), expected, atol=1e-4, rtol=0)


def test_checks_come_before_the_model_is_loaded(tmp_path):
    """A missing column is reported even if the model does not exist: no time is spent on loading it."""
    rows = Dataset.from_dict({"question": ["1+1="]})
    with pytest.raises(ValueError, match="needs a column 'prompt', but has question"):
        CAPOTrainer("/no/such/model", parity_reward, CAPOConfig(**config_kwargs(tmp_path)), rows)


def test_correctness_reward_must_be_named_and_known(tmp_path):
    functions = [parity_reward, length_reward]
    with pytest.raises(ValueError, match="set correctness_reward.*parity_reward, length_reward"):
        CAPOTrainer("/no/such/model", functions, CAPOConfig(**config_kwargs(tmp_path)), prompt_dataset())
    config = CAPOConfig(**config_kwargs(tmp_path, correctness_reward="accuracy"))
    with pytest.raises(ValueError, match="'accuracy' is not a reward function: one of parity_reward, length_reward"):
        CAPOTrainer("/no/such/model", functions, config, prompt_dataset())


def test_state_file_is_json(tiny_model, tmp_path):
    config = CAPOConfig(**config_kwargs(tmp_path, save_strategy="steps", save_steps=1))
    CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset()).train()
    state = json.loads((tmp_path / "checkpoint-1" / "trl_capo_state.json").read_text())
    assert state["tau"] == 0.6 and (state["ref_ppl_low"], state["ref_ppl_high"]) == (1.05, 2.5)


def test_prediction_does_not_leak_into_the_next_evaluation(tiny_model, tmp_path):
    def by_prompt(prompts, **kwargs):
        return [float(prompt[0]["content"].startswith("7")) for prompt in prompts]

    def rows(text):
        return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}]] * 4})

    config = CAPOConfig(**config_kwargs(tmp_path, ref_ppl_mask=False))
    trainer = CAPOTrainer(tiny_model, by_prompt, config, rows("7"), eval_dataset=rows("8"))
    trainer.predict(rows("7"))
    metrics = trainer.evaluate()
    assert metrics["eval_capo/frac_all_wrong"] == 1.0 and metrics["eval_capo/frac_all_correct"] == 0.0


def test_every_evaluation_set_has_its_own_metrics(tiny_model, tmp_path):
    def by_prompt(prompts, **kwargs):
        return [float(prompt[0]["content"].startswith("7")) for prompt in prompts]

    sets = {
        name: Dataset.from_dict({"prompt": [[{"role": "user", "content": text}]] * 4})
        for name, text in (("right", "7"), ("wrong", "8"))
    }
    config = CAPOConfig(**config_kwargs(tmp_path, ref_ppl_mask=False))
    trainer = CAPOTrainer(tiny_model, by_prompt, config, prompt_dataset(), eval_dataset=sets)
    metrics = trainer.evaluate()
    assert metrics["eval_right_capo/frac_all_correct"] == 1.0 and metrics["eval_wrong_capo/frac_all_correct"] == 0.0


def test_a_finished_run_keeps_its_best_model(tiny_model, tmp_path):
    options = dict(
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        ref_ppl_mask=False,
        load_best_model_at_end=True,
        metric_for_best_model="eval_capo/ppl_wrong",
        greater_is_better=False,
    )

    def make():
        config = CAPOConfig(**config_kwargs(tmp_path, **options))
        return CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset(), eval_dataset=prompt_dataset(8))

    first = make()
    first.train()
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_change(parameters(first), parameters(again)) == 0


def test_resuming_without_a_checkpoint_is_an_error(tiny_model, tmp_path):
    trainer = CAPOTrainer(tiny_model, parity_reward, CAPOConfig(**config_kwargs(tmp_path)), prompt_dataset())
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_in_the_middle_of_a_generation_is_warned_of(tiny_model, tmp_path, capsys):
    options = dict(steps_per_generation=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)

    def make(max_steps):
        config = CAPOConfig(**config_kwargs(tmp_path, max_steps=max_steps, **options))
        return CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset())

    make(3).train()  # transformers saves after the last step, wherever that is
    make(6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "lies in the middle of a generation" in capsys.readouterr().out


def test_an_epoch_may_end_within_a_generation(tiny_model, tmp_path, capsys):
    """Its last optimizer step takes fewer micro-batches, so where generations end is not a multiple of steps."""

    def make():
        layout = dict(per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=3)
        options = dict(save_strategy="steps", save_steps=4, max_steps=9)
        config = GroupAdvantageConfig(**config_kwargs(tmp_path, **layout, **options))
        return GroupAdvantageTrainer(tiny_model, parity_reward, config, prompt_dataset(8))

    make().train()
    make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "lies in the middle of a generation" in capsys.readouterr().out


def test_a_moving_reference_may_be_switched_on_at_a_restart(tiny_model, tmp_path, capsys):
    options = dict(save_strategy="steps", save_steps=1)
    config = CAPOConfig(**config_kwargs(tmp_path, **options))
    CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset()).train()
    config = CAPOConfig(**config_kwargs(tmp_path, max_steps=2, sync_ref_model=True, **options))
    trainer = CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "has no moving reference" in capsys.readouterr().out


def test_log_probs_with_gradient_are_trls(tiny_model, tmp_path):
    """A method's own loss may pass over a batch in chunks: then TRL's method must be TRL's, gradient included."""
    trainers = [
        trainer_class(tiny_model, parity_reward, config_class(**config_kwargs(tmp_path)), prompt_dataset())
        for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (CAPOTrainer, CAPOConfig))
    ]
    ids = torch.randint(2, 17, (4, 9))
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


def test_a_reward_object_may_have_a_method_called_start(tiny_model, tmp_path):
    class Sandbox:
        __name__ = "sandbox"

        def start(self):
            raise AssertionError("the sandbox is not ours to start")

        def __call__(self, completion_ids, **kwargs):
            return parity_reward(completion_ids)

    trainer = CAPOTrainer(tiny_model, Sandbox(), CAPOConfig(**config_kwargs(tmp_path)), prompt_dataset())
    trainer.train()
    assert trainer.state.global_step == 1


def test_vision_language_batches_pass_whole_on_every_rank(tiny_model, tmp_path):
    """A rank whose rows happen to have no images must take part in the same collectives as the others."""
    trainer = CAPOTrainer(tiny_model, parity_reward, CAPOConfig(**config_kwargs(tmp_path)), prompt_dataset())
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
