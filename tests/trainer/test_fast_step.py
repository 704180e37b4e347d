"""A repacked run ends where TRL's own does, whatever the loss and the layout, and does the work that is claimed.

Completions are canned: drawn once from a seed, so that every trainer of a test trains on the same ones. Each
comparison is with stock `GRPOTrainer`, or with the same trainer and `repack=False` where stock has no such method.
"""

import copy
import gc
import math
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer, TrlParser

from tests.helpers import config_kwargs, literal_mean_logp, unpadded_rows
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer
from trl_capo.methods.grpo import GRPO


NUM_GENERATIONS = 4
VOCABULARY = 17


def canned_completions(num_groups: int, seed: int = 0, degenerate: float = 0.5) -> list[list[int]]:
    """Groups of completions of 1 to 13 tokens, most of them with an EOS; the first token's parity is the reward."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_groups):
        labels = [rng.random() < 0.5 for _ in range(NUM_GENERATIONS)]
        if rng.random() < degenerate:
            labels = [labels[0]] * NUM_GENERATIONS
        elif len(set(labels)) == 1:
            labels[0] = not labels[0]
        for label in labels:
            length = rng.choice([1, 2, 2, 3, 4, 6, 9, 12])
            row = [2 * rng.randrange(1, 8) + (not label)]
            row += [rng.randrange(2, VOCABULARY) for _ in range(length - 1)]
            rows.append(row + [1] * (rng.random() < 0.8))
    return rows


def first_token_is_even(completion_ids, **kwargs) -> list[float]:
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


class Canned:
    """Stands in for `_generate_single_turn`: the next completions, whatever the prompts and the weights."""

    def __init__(self, seed: int = 0, degenerate: float = 0.5):
        self.rows = canned_completions(200, seed, degenerate)
        self.position = 0

    def next(self, count: int) -> list[list[int]]:
        rows = [self.rows[(self.position + i) % len(self.rows)] for i in range(count)]
        self.position += count
        return copy.deepcopy(rows)

    def __call__(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        return self.next(len(prompt_ids)), None


def questions(num_prompts: int = 32) -> Dataset:
    """Conversational prompts of 1 to 9 tokens."""
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": "123456789"[: 1 + 4 * i % 9]}] for i in range(num_prompts)]}
    )


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """accelerate collects garbage in every run, and among all that was imported that takes longer than the run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def one_layer_model(initializer_range: float) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=initializer_range,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory):
    """Smaller than the shared tiny model, since some hundred runs start from it. Stock TRL reloads it as reference."""
    folder = tmp_path_factory.mktemp("one-layer")
    one_layer_model(0.5).save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


@pytest.fixture
def make(one_layer, tokenizer, tmp_path):
    """Makes a trainer on canned completions: `make(class, **options)`; `repack` and CAPO's are dropped for stock."""
    configs = {GRPOTrainer: GRPOConfig, GroupAdvantageTrainer: GroupAdvantageConfig, CAPOTrainer: CAPOConfig}

    def make_trainer(
        trainer_class, model=None, dataset=None, canned=None, reward=first_token_is_even, build=None, **options
    ):
        config_class = next(configs[base] for base in trainer_class.__mro__ if base in configs)
        options = {**SGD, **options}
        if config_class is GRPOConfig:
            options.pop("repack", None)
        trainer = trainer_class(
            copy.deepcopy(one_layer if model is None else model),
            reward,
            config_class(**config_kwargs(options.pop("output_dir", tmp_path / "run"), **options)),
            questions() if dataset is None else dataset,
            processing_class=tokenizer,
            **(build or {}),
        )
        if trainer.rollout_func is None and not trainer.use_vllm:
            trainer._generate_single_turn = canned or Canned()
        return trainer

    return make_trainer


# Ten steps that move some parameter by at least 1e-2, and not by much more, so that rounding is not amplified: weights
# perturbed by one part in 10^7 end 3e-7 to 6e-7 apart in every layout and loss below.
SGD = dict(
    optim="sgd",
    learning_rate=0.03,
    max_steps=10,
    max_completion_length=16,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    logging_steps=10,
)

# Micro-steps of an optimizer step (G) and of a generation (S). Where S is no multiple of G, an optimizer step spans
# generations. An epoch of 6 prompts has 6 micro-steps, so its last optimizer step has 2 of 4; of 9 prompts 9, 1 of 2.
LAYOUTS = {
    "on-policy": dict(),
    "accumulation": dict(gradient_accumulation_steps=4),
    "paper": dict(steps_per_generation=4),
    "two iterations": dict(num_iterations=2),
    "G=2, S=3": dict(steps_per_generation=3),
    "G=3, S=2": dict(gradient_accumulation_steps=3, steps_per_generation=2),
    "last step short": dict(gradient_accumulation_steps=4, steps_per_generation=2, dataset=questions(6)),
    "last step short, G=2, S=3": dict(steps_per_generation=3, dataset=questions(9)),
}
LEARNING_RATES = {
    "grpo": 0.03,
    "bnpo": 0.03,
    "dr_grpo": 0.05,
    "dapo": 0.03,
    "cispo": 0.07,
    "sapo": 0.03,
    "luspo": 0.03,
    "vespo": 0.03,
}
PAPER = LAYOUTS["paper"]
# Thresholds of CAPO's mask between which this model's perplexities lie, so that it binds on either side.
MASK = dict(ref_ppl_low=50.0, ref_ppl_high=80.0)


def parameters(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in before)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train(trainer) -> None:
    torch.manual_seed(0)  # TRL shuffles a generation by the global generator
    trainer.train()


def assert_equal_runs(expected, actual, least_change: float = 1e-2, tolerance: float = 1e-5) -> None:
    """Trains both, and compares parameters, the logged loss, and the norm of the last gradient."""
    start = parameters(expected)
    assert largest_change(start, parameters(actual)) == 0
    train(expected)
    train(actual)
    difference = largest_change(parameters(expected), parameters(actual))
    change = largest_change(start, parameters(expected))
    print(f"changed {change:.1e}, different {difference:.1e}")  # noqa: T201 (shown for a test that fails)
    assert change >= least_change
    assert difference <= tolerance
    assert expected.state.global_step == actual.state.global_step
    for name in ("loss", "grad_norm"):
        assert logged(actual, name) == pytest.approx(logged(expected, name), rel=1e-2, abs=1e-4), name


# Equal parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_type", LEARNING_RATES)
def test_every_loss_and_layout_ends_where_trl_does(make, loss_type, layout):
    options = dict(loss_type=loss_type, learning_rate=LEARNING_RATES[loss_type], **LAYOUTS[layout])
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


@pytest.mark.parametrize("layout", ["on-policy", "paper", "G=3, S=2"])
def test_without_repacking_nothing_differs(make, layout):
    options = dict(loss_type="grpo", **LAYOUTS[layout])
    expected, actual = make(GRPOTrainer, **options), make(GroupAdvantageTrainer, repack=False, **options)
    assert_equal_runs(expected, actual, tolerance=0.0)


OPTIONS = {
    "sequence-level ratios": dict(importance_sampling_level="sequence", loss_type="grpo"),
    "sequence-level ratios, dapo": dict(importance_sampling_level="sequence", loss_type="dapo"),
    "sequence-level ratios, luspo": dict(importance_sampling_level="sequence", loss_type="luspo"),
    "two-sided clipping": dict(delta=1.05, epsilon=0.02, loss_type="grpo"),
    "off-policy mask": dict(off_policy_mask_threshold=0.001, loss_type="grpo"),
    "masked truncated completions": dict(mask_truncated_completions=True, loss_type="grpo"),
    "masked truncated completions, dapo": dict(mask_truncated_completions=True, loss_type="dapo"),
    "rewards scaled by batch": dict(scale_rewards="batch", loss_type="dr_grpo"),
    "padding to a multiple": dict(pad_to_multiple_of=8, loss_type="dapo"),
    "gradient checkpointing": dict(gradient_checkpointing=True, loss_type="grpo"),
    "weight decay and clipping": dict(weight_decay=0.1, max_grad_norm=0.5, loss_type="grpo", learning_rate=0.1),
    "one row a micro-batch": dict(
        per_device_train_batch_size=1, gradient_accumulation_steps=8, steps_per_generation=16, loss_type="grpo"
    ),
    "another temperature": dict(temperature=0.7, loss_type="dapo", learning_rate=0.02),
    # Sorted or trimmed only:
    "KL term": dict(beta=0.1, loss_type="grpo"),
    "KL term, dapo": dict(beta=0.1, loss_type="dapo"),
    "KL term, bias corrected": dict(beta=0.1, use_bias_correction_kl=True, loss_type="dr_grpo"),
    "KL term, masked truncated": dict(beta=0.1, mask_truncated_completions=True, loss_type="luspo"),
    "entropy quantile": dict(top_entropy_quantile=0.5, loss_type="grpo"),
    "entropy bonus": dict(entropy_coef=0.05, loss_type="dapo"),
    "adaptive entropy": dict(use_adaptive_entropy=True, entropy_target=1.0, loss_type="grpo"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_loss(make, option):
    options = {**PAPER, **OPTIONS[option]}
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


class Recording:
    """A trainer that keeps every micro-batch it is trained on; `seen` holds lists of rows, one a micro-step."""

    def _compute_loss(self, model, inputs):
        if model.training:
            self.__dict__.setdefault("seen", []).append(inputs)
        return super()._compute_loss(model, inputs)


class RecordingStock(Recording, GRPOTrainer):
    pass


class RecordingTrainer(Recording, GRPO):
    pass


class RecordingCAPO(Recording, CAPOTrainer):
    pass


@pytest.mark.parametrize("threshold", [0.001, None])
def test_the_options_above_are_not_vacuous(make, threshold):
    """Ratios differ from 1 in the paper layout, and thresholds are where they bind."""
    stock = make(RecordingStock, **PAPER, loss_type="grpo", off_policy_mask_threshold=threshold, epsilon=0.02)
    masks = []
    stock.get_off_policy_mask = lambda **kwargs: masks.append(GRPOTrainer.get_off_policy_mask(**kwargs)) or masks[-1]
    train(stock)
    assert logged(stock, "clip_ratio/region_mean")[0] > 0
    assert any((mask == 0).any() for mask in masks) == (threshold is not None)
    truncated = [row for batch in stock.seen for row in unpadded_rows(batch) if row[1][-1] != 1]
    assert len(truncated) > 0


def rollout_with_environment(canned: Canned):
    """Completions in two of three of which an environment wrote all but the first third, or but that and the end."""

    def rollout(prompts, trainer):
        completions = canned.next(len(prompts))
        masks = []
        for i, ids in enumerate(completions):
            hole = range(len(ids) // 3, len(ids) - i % 2) if i % 3 else range(0)
            masks.append([int(t not in hole) for t in range(len(ids))])
        render = trainer.processing_class.apply_chat_template
        return {
            "prompt_ids": [render(prompt, tokenize=True, return_dict=True)["input_ids"] for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[-1.0 - 0.1 * (t % 3) for t in range(len(ids))] for ids in completions],
            "env_mask": masks,
        }

    return rollout


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
def test_tokens_of_an_environment(make, loss_type):
    options = dict(loss_type=loss_type, mask_truncated_completions=True, **PAPER)
    expected, actual = (
        make(cls, build={"rollout_func": rollout_with_environment(Canned())}, **options)
        for cls in (RecordingStock, RecordingTrainer)
    )
    assert_equal_runs(expected, actual)
    assert any((batch["tool_mask"] == 0).any() for batch in actual.seen)


class CannedVLLM(Canned):
    """Stands in for TRL's vLLM engine; log-probs near those of a uniform policy, some tokens' or rows' missing."""

    def __init__(self, **kwargs):
        super().__init__()

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, **kwargs):
        completions = self.next(len(prompts))
        rng = random.Random(self.position)
        logprobs = [
            [[None if i % 7 == 3 or rng.random() < 0.1 else -math.log(VOCABULARY) + rng.gauss(0, 0.5)] for _ in ids]
            for i, ids in enumerate(completions)
        ]
        return prompts, completions, logprobs, None


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", CannedVLLM)
    return dict(use_vllm=True, vllm_mode="colocate")


@pytest.mark.parametrize(
    ("mode", "loss_type", "layout", "bounds"),
    [
        ("token_truncate", "grpo", "on-policy", {}),
        ("token_truncate", "grpo", "paper", {}),
        ("token_mask", "dapo", "paper", dict(vllm_importance_sampling_clip_min=0.3)),
        ("sequence_truncate", "dapo", "on-policy", {}),
        ("sequence_mask", "grpo", "paper", dict(vllm_importance_sampling_clip_max=20.0)),
        ("token_truncate", "vespo", "on-policy", {}),
        ("token_mask", "vespo", "paper", dict(vllm_importance_sampling_clip_min=0.3)),
        ("token_truncate", "luspo", "G=2, S=3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ratios_to_vllm(make, vllm, mode, loss_type, layout, bounds):
    options = dict(loss_type=loss_type, vllm_importance_sampling_mode=mode, learning_rate=0.05)
    options |= {**bounds, **vllm, **LAYOUTS[layout]}
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


def test_a_rollout_function_may_ask_the_trainer_for_log_probs(make):
    """The pass that is put off is TRL's own, not one that happens to come while TRL is at work."""
    canned = Canned()

    def rollout(prompts, trainer):
        completions = canned.next(len(prompts))
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([5, *row]) for row in completions], batch_first=True)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, (ids != 0).long(), ids.size(1) - 1, batch_size=4
        )
        return {
            "prompt_ids": [[5] for _ in prompts],
            "completion_ids": completions,
            "logprobs": [row[: len(c)].tolist() for row, c in zip(logps, completions, strict=True)],
        }

    trainer = make(RecordingTrainer, build={"rollout_func": rollout}, loss_type="grpo", max_steps=2, **PAPER)
    train(trainer)
    assert all(batch["sampling_per_token_logps"].isfinite().all() for batch in trainer.seen)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_vllm_without_correction(make, vllm, threshold):
    options = dict(loss_type="grpo", vllm_importance_sampling_correction=False, **vllm, **PAPER)
    options["off_policy_mask_threshold"] = threshold  # reads the sampler's log-probs, NaN among them
    assert_equal_runs(make(GRPOTrainer, **options), make(GroupAdvantageTrainer, **options))


def test_adapters(make):
    # Not zero from the start, so that the adapter's second matrix has a gradient too.
    build = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
    for beta in (0.0, 0.1):
        options = dict(loss_type="grpo", beta=beta, gradient_checkpointing=True, **PAPER)
        trainers = []
        for trainer_class in (GRPOTrainer, GroupAdvantageTrainer):
            torch.manual_seed(0)
            trainers.append(make(trainer_class, build=build, **options))
        assert_equal_runs(*trainers)


def test_adapters_with_a_mask(make):
    """The reference is the model without its adapter."""
    build = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
    trainers = []
    for repack in (False, True):
        torch.manual_seed(0)
        trainers.append(
            make(CAPOTrainer, build=build, repack=repack, loss_type="grpo", learning_rate=0.05, **MASK, **PAPER)
        )
    assert_equal_runs(*trainers)


def test_a_run_without_any_gradient_still_steps(make):
    """AdamW moves weights by decay alone; and by its moments, once there were gradients."""
    options = dict(loss_type="grpo", optim="adamw_torch", weight_decay=0.5, learning_rate=0.01)
    expected, actual = (
        make(cls, canned=Canned(degenerate=1.0), **options) for cls in (RecordingStock, RecordingTrainer)
    )
    assert_equal_runs(expected, actual)
    assert logged(actual, "frac_reward_zero_std") == [1.0]
    assert sum(len(batch["completion_ids"]) for batch in actual.seen) == len(actual.seen) == len(expected.seen) == 20


def test_moments_outlive_the_last_gradient(make):
    def reward_of_two_generations():
        calls = []

        def reward(completion_ids, **kwargs):
            calls.append(1)
            return first_token_is_even(completion_ids) if len(calls) <= 2 else [1.0] * len(completion_ids)

        return reward

    options = dict(loss_type="dapo", optim="adamw_torch", weight_decay=0.1, learning_rate=0.003)
    options["adam_epsilon"] = 1e-3  # at 1e-8 rounding of a gradient near 0 decides the sign of a step
    expected, actual = (
        make(cls, reward=reward_of_two_generations(), **options) for cls in (RecordingStock, RecordingTrainer)
    )
    assert_equal_runs(expected, actual)
    without_gradient = [batch for batch in actual.seen if not batch["advantages"].any()]
    assert len(without_gradient) >= 16 and len(actual.seen) == 20


class TokenAdvantages(RecordingTrainer):
    """(B, T) advantages: 0 for every other token, and for all of a completion that starts with a token above 9."""

    def _compute_advantages(self, groups):
        return groups.correct - groups.correct.mean(dim=1, keepdim=True) + 0.3  # no row is 0 by itself

    def _token_advantages(self, advantages, inputs):
        ids = inputs["completion_ids"]
        every_other = (torch.arange(ids.size(1)) % 2 == 0).float()
        return advantages.unsqueeze(1) * every_other * (ids[:, :1] <= 9)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_advantages_a_token(make, loss_type):
    options = dict(loss_type=loss_type, **PAPER)
    expected, actual = make(TokenAdvantages, repack=False, **options), make(TokenAdvantages, **options)
    assert_equal_runs(expected, actual)
    rows, packed = ([row for batch in t.seen for row in batch["advantages"].tolist()] for t in (expected, actual))
    nonzero = sum(any(row) for row in rows)
    assert nonzero < len(rows) and len(packed) == sum(any(row) for row in packed) == nonzero


CAPO_OPTIONS = {
    "mask": dict(**MASK),
    "no mask": dict(ref_ppl_mask=False),
    # Between samples: at a quantile that is a sample, rounding decides whether it is masked.
    "estimated mask": dict(ref_ppl_quantiles=[0.3, 0.7], ref_ppl_quantile_samples=16),
    "mask among partners": dict(**MASK, mask_partners=True),
    "gap unit": dict(ref_ppl_mask=False, tau_unit="gap"),
    "pairs across prompts": dict(ref_ppl_mask=False, pair_scope="batch"),
    "moving mask": dict(**MASK, sync_ref_model=True, ref_model_sync_steps=2),
    "mask and KL term": dict(**MASK, beta=0.1),
    "mask and bnpo": dict(**MASK, loss_type="bnpo"),
}


@pytest.mark.parametrize(
    ("option", "layout"),
    [(option, "paper") for option in CAPO_OPTIONS] + [("mask", "on-policy"), ("gap unit", "G=2, S=3")],
)
def test_capo(make, option, layout):
    options = {"loss_type": "grpo", "learning_rate": 0.06, **CAPO_OPTIONS[option], **LAYOUTS[layout]}
    expected, actual = make(RecordingCAPO, repack=False, **options), make(RecordingCAPO, **options)
    assert_equal_runs(expected, actual)
    if actual.args.ref_ppl_mask:
        masked = [entry["capo/frac_masked_wrong"] for entry in actual.state.log_history if "capo/tau" in entry]
        assert 0 < masked[0] < 1
    for name in ("capo/soft_misranking", "capo/auc_within", "capo/frac_mixed", "capo/ppl_wrong"):
        assert logged(actual, name) == pytest.approx(logged(expected, name), abs=1e-3), name


def test_capo_with_auxiliary_and_graded_rewards(make):
    """Groups that are all right may still have an advantage: of another reward, or of unequal grades."""

    def graded(completion_ids, **kwargs):
        return [(ids[0] % 5) / 4 for ids in completion_ids]

    options = dict(
        reward=[graded, one_over_length],
        reward_weights=[1.0, 0.5],
        correctness_reward="graded",
        graded_rewards=True,
        auxiliary_rewards="add",
        ref_ppl_mask=False,
        loss_type="grpo",
        **PAPER,
    )
    assert_equal_runs(make(CAPOTrainer, repack=False, **options), make(CAPOTrainer, **options))


def one_over_length(completion_ids, **kwargs) -> list[float]:
    return [1.0 / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_outside_mixed_groups(make, aggregation):
    """Where another reward tells completions apart that are all right or all wrong, old log-probs are needed too."""
    options = dict(
        reward=[first_token_is_even, one_over_length],
        correctness_reward="first_token_is_even",
        multi_objective_aggregation=aggregation,
        loss_type="grpo",
        learning_rate=0.05,
        **PAPER,
    )
    actual = make(RecordingTrainer, **options)
    options.pop("correctness_reward")
    assert_equal_runs(make(GRPOTrainer, **options), actual)
    advantages = [a for batch in actual.seen for a in batch["advantages"].tolist()]
    assert sum(a != 0 for a in advantages) > 0.8 * len(advantages)


def test_unscorable_completions(make):
    def sometimes(completion_ids, **kwargs):
        return [None if ids[-1] % 3 == 0 else float(ids[0] % 2 == 0) for ids in completion_ids]

    for trainer_class in (GRPOTrainer, CAPOTrainer):
        options = dict(reward=sometimes, loss_type="grpo", **PAPER)
        if trainer_class is CAPOTrainer:
            options["ref_ppl_mask"] = False
        other = GroupAdvantageTrainer if trainer_class is GRPOTrainer else CAPOTrainer
        assert_equal_runs(make(trainer_class, repack=False, **options), make(other, **options))


def test_evaluation_in_between(make):
    """It generates, scores and computes a loss of its own, on batches that stay as they are."""
    options = dict(
        loss_type="grpo", eval_strategy="steps", eval_steps=3, num_generations_eval=4, per_device_eval_batch_size=8
    )
    build = {"eval_dataset": questions(4)}
    expected, actual = (make(cls, build=build, **options, **PAPER) for cls in (GRPOTrainer, GroupAdvantageTrainer))
    assert_equal_runs(expected, actual)
    for name in ("eval_loss", "eval_reward", "eval_entropy"):
        assert len(logged(expected, name)) >= 3
        assert logged(actual, name) == pytest.approx(logged(expected, name), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("trainer_class", [GroupAdvantageTrainer, CAPOTrainer])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(make, tmp_path, trainer_class):
    options = dict(loss_type="grpo", save_strategy="steps", save_steps=4, max_steps=8, dataset=questions(12), **PAPER)
    whole = make(trainer_class, output_dir=tmp_path / "whole", **options)
    train(whole)
    canned = Canned()
    canned.next(2 * 16)  # what was generated up to the checkpoint: every second step, 16 rows
    second = make(trainer_class, output_dir=tmp_path / "second", canned=canned, **options)
    start = parameters(second)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert largest_change(start, parameters(whole)) >= 1e-2
    assert largest_change(parameters(whole), parameters(second)) <= 1e-5


# What is not exact is not done, and said ----------------------------------------------------------------------------


@pytest.fixture
def mixture_of_experts():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            initializer_range=0.5,
            router_aux_loss_coef=0.1,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )


@pytest.fixture
def learned_positions():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=1,
            n_head=4,
            n_positions=64,
            initializer_range=0.5,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )


@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_mixture_of_experts(make, mixture_of_experts, capsys, coefficient):
    options = dict(loss_type="grpo", router_aux_loss_coef=coefficient, model=mixture_of_experts, **PAPER)
    expected, actual = make(RecordingStock, **options), make(RecordingTrainer, **options)
    assert ("repack: rows are only trimmed, for the auxiliary loss" in capsys.readouterr().out) == (coefficient > 0)
    assert_equal_runs(expected, actual)
    rows = [sum(len(batch["completion_ids"]) for batch in trainer.seen) for trainer in (expected, actual)]
    assert (rows[0] == rows[1]) == (coefficient > 0)


def test_learned_positions_leave_batches_alone(make, learned_positions, capsys):
    options = dict(loss_type="grpo", model=learned_positions, **PAPER)
    expected, actual = make(RecordingStock, **options), make(RecordingTrainer, **options)
    line = "repack: batches stay as TRL makes them, for the model's positions depend on padding."
    assert capsys.readouterr().out.count(line) == 1
    assert_equal_runs(expected, actual, tolerance=0.0)
    for stock, ours in zip(expected.seen, actual.seen, strict=True):
        assert all(torch.equal(stock[name], ours[name]) for name in ("prompt_ids", "completion_ids", "advantages"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, None),
        ({"repack": False, "beta": 0.1}, None),
        ({"beta": 0.1}, "repack: rows are sorted and trimmed but not dropped, for rows without advantage still carry"),
        ({"loss_type": "bnpo"}, "repack: rows are only trimmed, for loss_type='bnpo' depends on which rows share"),
        ({"top_entropy_quantile": 0.5}, "repack: rows are only trimmed, for top_entropy_quantile depends on"),
        ({"entropy_coef": 0.1}, "repack: rows are only trimmed, for the entropy bonus depends on"),
        ({"use_adaptive_entropy": True}, "repack: rows are only trimmed, for the entropy bonus depends on"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_one_line_says_what_is_not_done(make, capsys, options, line):
    trainer = make(RecordingTrainer, max_steps=1, **options)
    out = capsys.readouterr().out
    assert out.count("repack:") == (line is not None) and (line or "") in out
    train(trainer)
    assert "repack:" not in capsys.readouterr().out
    num_rows = sum(len(batch["completion_ids"]) for batch in trainer.seen)
    assert (num_rows == 8) == bool(options), "rows are dropped where nothing is said, and only there"


# The work that is saved ---------------------------------------------------------------------------------------------


class Meter:
    """Rows and padded tokens of each forward of a model, with and without gradient, generation excepted."""

    def __init__(self, model):
        self.forwards = {True: [], False: []}
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, positional, inputs):
        self.forwards[torch.is_grad_enabled()].append(inputs["attention_mask"].clone())

    def calls(self, grad: bool) -> int:
        return len(self.forwards[grad])

    def rows(self, grad: bool) -> int:
        return sum(len(mask) for mask in self.forwards[grad])

    def tokens(self, grad: bool) -> int:
        return sum(mask.numel() for mask in self.forwards[grad])


def rows_of_each_step(trainer, num_micro_steps: int) -> list[list[tuple]]:
    """(prompt, completion, advantage) of the rows of each optimizer step."""
    rows = [
        [(tuple(p), tuple(c), a) for (p, c), a in zip(unpadded_rows(batch), batch["advantages"].tolist(), strict=True)]
        for batch in trainer.seen
    ]
    return [sum(rows[i : i + num_micro_steps], []) for i in range(0, len(rows), num_micro_steps)]


@pytest.mark.parametrize("layout", ["on-policy", "accumulation", "paper"])
def test_only_rows_with_advantage_are_trained_on(make, layout):
    options = dict(loss_type="grpo", learning_rate=0.0, **LAYOUTS[layout])
    trainers, meters = [], []
    for trainer_class in (RecordingStock, RecordingTrainer):
        trainers.append(make(trainer_class, **options))
        meters.append(Meter(trainers[-1].model))
        train(trainers[-1])
    num_micro_steps = trainers[0].args.gradient_accumulation_steps
    assert meters[0].calls(True) == meters[1].calls(True) == 10 * num_micro_steps
    expected_rows = expected_tokens = 0
    for stock, ours in zip(*(rows_of_each_step(trainer, num_micro_steps) for trainer in trainers), strict=True):
        kept = [row for row in stock if row[2] != 0]
        assert Counter(row for row in ours if row[2] != 0) == Counter(kept)
        dropped = sorted(len(p) + len(c) for p, c, advantage in stock if advantage == 0)
        fill = sorted(len(p) + len(c) for p, c, advantage in ours if advantage == 0)
        assert fill == dropped[: max(0, num_micro_steps - len(kept))]
        expected_rows += max(len(kept), num_micro_steps)
        expected_tokens += sum(len(p) + len(c) for p, c, _ in ours)
    assert meters[1].rows(True) == expected_rows < 0.7 * meters[0].rows(True)
    assert meters[0].rows(True) == 10 * num_micro_steps * 4
    for mask in meters[1].forwards[True]:
        assert mask[:, 0].any() and mask[:, -1].any(), "a column that is padding in every row"
    assert expected_tokens <= meters[1].tokens(True) < 0.5 * meters[0].tokens(True)
    largest = [max(mask.numel() for mask in meter.forwards[True]) for meter in meters]
    assert largest[1] <= largest[0]


def test_old_log_probs_only_where_they_are_read(make):
    """In the paper layout TRL passes over every row. CAPO needs mixed groups, and GRPO rows with an advantage."""
    for trainer_class, options in ((RecordingTrainer, {}), (RecordingCAPO, {"ref_ppl_mask": False})):
        stock = make(RecordingStock, loss_type="grpo", **PAPER)
        ours = make(trainer_class, loss_type="grpo", **PAPER, **options)
        meters = [Meter(trainer.model) for trainer in (stock, ours)]
        train(stock)
        train(ours)
        mixed = sum(a != 0 for batch in stock.seen for a in batch["advantages"].tolist())
        assert mixed == sum(a != 0 for batch in ours.seen for a in batch["advantages"].tolist())
        assert meters[0].rows(False) == 5 * 16
        assert meters[1].rows(False) == mixed < 5 * 16
        assert meters[1].tokens(False) < 0.6 * meters[0].tokens(False)
        assert meters[1].calls(False) <= meters[0].calls(False) // 2
        for mask in meters[1].forwards[False]:
            assert mask[:, 0].any() and mask[:, -1].any()


def test_old_log_probs_are_those_trl_would_have_used(make):
    stock = make(RecordingStock, loss_type="grpo", max_steps=2, learning_rate=0.0, **PAPER)
    ours = make(RecordingTrainer, loss_type="grpo", max_steps=2, learning_rate=0.0, **PAPER)
    for trainer in (stock, ours):
        train(trainer)
    expected = {}
    for batch in stock.seen:
        for row, logps, mask in zip(
            unpadded_rows(batch), batch["old_per_token_logps"], batch["completion_mask"], strict=True
        ):
            expected[str(row)] = logps[mask.bool()]
    compared = 0
    for batch in ours.seen:
        assert batch["old_per_token_logps"].shape == batch["completion_ids"].shape
        for i, row in enumerate(unpadded_rows(batch)):
            if batch["advantages"][i] != 0:
                logps = batch["old_per_token_logps"][i][batch["completion_mask"][i].bool()]
                torch.testing.assert_close(logps, expected[str(row)], atol=1e-4, rtol=0)
                compared += 1
    assert compared >= 4


def test_on_policy_grpo_scores_mixed_groups_only(make):
    ours = make(RecordingTrainer, loss_type="grpo")
    meter = Meter(ours.model)
    train(ours)
    kept = sum(a != 0 for batch in ours.seen for a in batch["advantages"].tolist())
    assert meter.rows(False) == kept and logged(ours, "capo/auc_within")[0] is not None


def test_reference_of_the_mask_and_of_the_kl_term(make):
    """The mask needs mixed groups only; the KL term all rows, sorted and trimmed."""
    capo = make(RecordingCAPO, loss_type="grpo", **PAPER)
    meter = Meter(capo.ref_model)
    train(capo)
    assert meter.rows(False) == round(logged(capo, "capo/frac_mixed")[0] * 80) and meter.calls(True) == 0
    meters = []
    for trainer_class in (GRPOTrainer, GroupAdvantageTrainer):
        trainer = make(trainer_class, loss_type="grpo", beta=0.1, **PAPER)
        meters.append(Meter(trainer.ref_model))
        train(trainer)
    assert meters[0].rows(False) == meters[1].rows(False) == 80
    assert meters[1].calls(False) == meters[0].calls(False) // 2
    assert meters[1].tokens(False) < 0.85 * meters[0].tokens(False)


def test_rows_with_a_kl_term_are_sorted_not_dropped(make):
    trainers = [make(cls, loss_type="grpo", beta=0.1, learning_rate=0.0) for cls in (RecordingStock, RecordingTrainer)]
    for trainer in trainers:
        train(trainer)
    stock, ours = (rows_of_each_step(trainer, 2) for trainer in trainers)
    for expected, actual in zip(stock, ours, strict=True):
        assert Counter(row[:2] for row in expected) == Counter(row[:2] for row in actual)
        lengths = [len(p) + len(c) for p, c, _ in actual]
        assert lengths == sorted(lengths, reverse=True)


def test_padding_to_a_multiple_is_kept(make):
    trainer = make(RecordingTrainer, loss_type="grpo", pad_to_multiple_of=4, **PAPER)
    meter = Meter(trainer.model)
    train(trainer)
    assert meter.calls(False) > 0 and all(mask.size(1) % 4 == 0 for mask in meter.forwards[False])
    for batch in trainer.seen:
        assert batch["prompt_ids"].size(1) % 4 == 0 and batch["completion_ids"].size(1) % 4 == 0
        assert batch["prompt_mask"][:, :4].any() and batch["completion_mask"][:, -4:].any()
    assert len({batch["completion_ids"].size(1) for batch in trainer.seen}) > 1


# Scores from the sampler --------------------------------------------------------------------------------------------


class ScoredCAPO(RecordingCAPO):
    """Keeps the groups and the whole generation."""

    def _compute_advantages(self, groups):
        self.__dict__.setdefault("groups", []).append(groups)
        return super()._compute_advantages(groups)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("generations", []).append(output)
        return output


SAMPLER = dict(mean_logps_from="sampler", ref_ppl_mask=False, loss_type="grpo", learning_rate=0.05)


def test_sampler_scores_are_means_over_what_is_known(make, vllm):
    trainer = make(ScoredCAPO, **SAMPLER, **vllm, vllm_importance_sampling_correction=False)
    meter = Meter(trainer.model)
    train(trainer)
    assert meter.calls(False) == 0, "on-policy nothing needs a pass before the loss"
    unknown = 0
    for groups, generation in zip(trainer.groups, trainer.generations, strict=True):
        logps = generation["sampling_per_token_logps"].masked_fill(generation["completion_mask"] == 0, torch.nan)
        torch.testing.assert_close(groups.mean_logps.flatten(), logps.nanmean(dim=1), equal_nan=True)
        assert torch.equal(groups.valid.flatten(), ~logps.nanmean(dim=1).isnan())
        unknown += int((~groups.valid).sum())
    assert unknown > 0


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("layout", ["on-policy", "paper", "G=2, S=3", "two iterations"])
def test_sampler_scores_leave_the_loss_alone(make, vllm, layout, correction):
    options = {**SAMPLER, **vllm, **LAYOUTS[layout], "vllm_importance_sampling_correction": correction}
    if correction and layout in ("on-policy", "two iterations"):
        options["learning_rate"] = 0.2  # ratios make its gradients small
    expected, actual = make(RecordingCAPO, repack=False, **options), make(RecordingCAPO, **options)
    meters = [Meter(trainer.model) for trainer in (expected, actual)]
    assert_equal_runs(expected, actual)
    if layout == "paper" and not correction:
        kept = sum(a != 0 for batch in actual.seen for a in batch["advantages"].tolist())
        assert meters[1].rows(False) == kept < meters[0].rows(False) == 80


def test_sampler_scores_from_a_rollout_function(make):
    build = {"rollout_func": rollout_with_environment(Canned())}
    trainer = make(ScoredCAPO, build=build, max_steps=2, **SAMPLER)
    train(trainer)
    for groups, generation in zip(trainer.groups, trainer.generations, strict=True):
        mask = generation["completion_mask"] * generation["tool_mask"]
        known = generation["sampling_per_token_logps"].masked_fill(mask == 0, torch.nan)
        torch.testing.assert_close(groups.mean_logps.flatten(), known.nanmean(dim=1), equal_nan=True)
    assert any((generation["tool_mask"] == 0).any() for generation in trainer.generations)


def test_a_rollout_function_without_log_probs_is_told(make):
    rollout = rollout_with_environment(Canned())

    def without(prompts, trainer):
        return {**rollout(prompts, trainer), "logprobs": None}

    with pytest.raises(ValueError, match="no log-probs came with the completions: let rollout_func return"):
        make(CAPOTrainer, build={"rollout_func": without}, **SAMPLER).train()


def test_sampler_scores_need_a_sampler_with_log_probs(make):
    with pytest.raises(ValueError, match="needs a sampler that returns log-probs: set use_vllm=True, pass a"):
        make(CAPOTrainer, **SAMPLER)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_p": 0.9}, "top_p=1.0, got 0.9"),
        ({"top_k": 5}, "top_k=0, got 5"),
        ({"min_p": 0.1}, "min_p=0.0, got 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.0, got 1.1"),
        ({"generation_kwargs": {"top_p": 0.9}}, "top_p=1.0, got 0.9"),
        ({"generation_kwargs": '{"top_k": 3}'}, "top_k=0, got 3"),
        # They make the sampler's distribution another one too.
        ({"generation_kwargs": {"temperature": 0.5}}, "temperature"),
        ({"generation_kwargs": {"presence_penalty": 1.0}}, "presence_penalty"),
        ({"generation_kwargs": {"logit_bias": {"5": 10.0}}}, "logit_bias"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "vllm_structured_outputs_regex"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_samplers_of_another_distribution_are_refused(make, vllm, options, named):
    with pytest.raises(ValueError, match=f"mean_logps_from='sampler'.*{named}"):
        make(CAPOTrainer, **SAMPLER, **vllm, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9, "generation_kwargs": {"top_p": 1.0}},
        {"top_k": -1, "min_p": None},
        {"generation_kwargs": {"stop": ["x"], "top_k": 0}},
        {"temperature": 0.7},
    ],
    ids=str,
)
def test_samplers_of_the_whole_distribution_are_not_refused(make, vllm, options):
    trainer = make(CAPOTrainer, **SAMPLER, **vllm, **options)
    assert trainer.args.mean_logps_from == "sampler"


# The reference's precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["initial policy", "named"])
@pytest.mark.parametrize("way", ["path", "instance"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_dtype_of_the_reference(tokenizer, tmp_path, beta, way, reference):
    """For the mask and for the KL term, whatever the policy and the reference were given as."""
    folder = str(tmp_path / "model")
    one_layer_model(0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    scores = {}
    for dtype in (None, "bfloat16"):
        options = {**SGD, "max_steps": 1, "ref_model_dtype": dtype, "beta": beta}
        options |= {"ref_model_name_or_path": folder} if reference == "named" else {}
        policy = folder if way == "path" else Qwen2ForCausalLM.from_pretrained(folder)
        config = CAPOConfig(**config_kwargs(tmp_path / "run", **options))
        trainer = ScoredCAPO(policy, first_token_is_even, config, questions(), processing_class=tokenizer)
        trainer._generate_single_turn = Canned()
        assert {value.dtype for value in trainer.ref_model.parameters()} == {getattr(torch, dtype or "float32")}
        assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
        train(trainer)
        scores[dtype] = trainer.groups[0].ref_mean_logps
    scored = scores[None].isfinite()
    assert scored.any() and torch.equal(scored, scores["bfloat16"].isfinite())
    assert 0 < (scores[None] - scores["bfloat16"])[scored].abs().max() < 1e-2


def test_wrong_values_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="ref_model_dtype must be one of None, bfloat16, float16, float32, got 'int8'"
    ):
        CAPOConfig(**config_kwargs(tmp_path, ref_model_dtype="int8"))
    with pytest.raises(ValueError, match="mean_logps_from must be one of policy, sampler, got 'vllm'"):
        GroupAdvantageConfig(**config_kwargs(tmp_path, mean_logps_from="vllm"))


@pytest.mark.parametrize("config_class", [GroupAdvantageConfig, CAPOConfig])
def test_options_on_the_command_line(tmp_path, config_class):
    parser = TrlParser((config_class,))
    base = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    (config,) = parser.parse_args_and_config(base)
    assert (config.repack, config.mean_logps_from, config.ref_model_dtype) == (True, "policy", None)
    given = ["--repack", "false", "--mean_logps_from", "sampler", "--ref_model_dtype", "bfloat16"]
    (config,) = parser.parse_args_and_config(base + given)
    assert (config.repack, config.mean_logps_from, config.ref_model_dtype) == (False, "sampler", "bfloat16")
    with pytest.raises(SystemExit):
        parser.parse_args_and_config([*base, "--mean_logps_from", "vllm"])


def test_scores_are_unchanged_by_repacking(make):
    """Against unpadded forwards of one sequence each."""
    trainer = make(ScoredCAPO, ref_ppl_mask=False, loss_type="grpo", learning_rate=0.0, **PAPER)
    train(trainer)
    policy = copy.deepcopy(trainer.model).eval()
    compared = 0
    for groups, generation in zip(trainer.groups, trainer.generations, strict=True):
        scored = groups.mixed.expand_as(groups.valid).flatten()
        assert torch.equal(groups.mean_logps.flatten().isfinite(), scored)
        for i, (prompt, completion) in enumerate(unpadded_rows(generation)):
            if scored[i]:
                literal = literal_mean_logp(policy, prompt, completion)
                assert groups.mean_logps.flatten()[i].item() == pytest.approx(literal, abs=1e-4)
                compared += 1
    assert compared > 20
