"""Fixtures for runs on canned completions."""

import copy
import gc
import math
import random

import pytest
from transformers import AutoTokenizer, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tests.helpers import VOCABULARY, config_kwargs, first_token_is_even, tiny_qwen2
from tests.trainer.runs import SGD, Canned, questions
from trl_capo import CAPOConfig, CAPOTrainer, GroupAdvantageConfig, GroupAdvantageTrainer


@pytest.fixture(scope="module")
def quick_garbage_collection():
    """accelerate collects garbage in every run, and among all that was imported that takes longer than the run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory):
    """Smaller than the shared tiny model, since some hundred runs start from it. Stock TRL reloads it as reference."""
    folder = tmp_path_factory.mktemp("one-layer")
    tiny_qwen2(num_hidden_layers=1).save_pretrained(folder)
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
