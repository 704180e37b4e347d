"""What a trainer is given: its config, its data and its reward functions."""

from dataclasses import dataclass

import pytest
from datasets import Dataset
from trl import GRPOConfig

from tests.helpers import config_kwargs, length_reward, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer


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
    with pytest.raises(ValueError, match="must be one of the reward functions: parity_reward, length_reward"):
        CAPOTrainer("/no/such/model", functions, config, prompt_dataset())


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
