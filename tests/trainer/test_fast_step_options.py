"""Options of the fast step, and the reference's precision."""

from dataclasses import field, make_dataclass

import pytest
import torch
from transformers import Qwen2ForCausalLM
from trl import TrlParser

from tests.helpers import config_kwargs, first_token_is_even, tiny_qwen2
from tests.trainer.runs import SGD, Canned, ScoredCAPO, questions, train
from trl_capo import CAPOConfig, GroupAdvantageConfig
from trl_capo.trainer.config import FastGRPOConfig


pytestmark = pytest.mark.usefixtures("quick_garbage_collection")


@pytest.mark.parametrize("reference", ["initial policy", "named"])
@pytest.mark.parametrize("way", ["path", "instance"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_dtype_of_the_reference(tokenizer, tmp_path, beta, way, reference):
    """For the mask and for the KL term, whatever the policy and the reference were given as."""
    folder = str(tmp_path / "model")
    tiny_qwen2(num_hidden_layers=1, initializer_range=0.1).save_pretrained(folder)
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
    with pytest.raises(ValueError, match="ref_model_dtype must be one of bfloat16, float16, float32, got 'int8'"):
        CAPOConfig(**config_kwargs(tmp_path, ref_model_dtype="int8"))
    with pytest.raises(ValueError, match="mean_logps_from must be one of policy, sampler, got 'vllm'"):
        GroupAdvantageConfig(**config_kwargs(tmp_path, mean_logps_from="vllm"))


def test_choices_of_a_method_of_ones_own_are_checked(tmp_path):
    choices = field(default=None, metadata={"choices": ["mean", "median"]})
    config_class = make_dataclass("Mine", [("centre", str | None, choices)], bases=(FastGRPOConfig,))
    assert [config_class(**config_kwargs(tmp_path, centre=c)).centre for c in (None, "mean")] == [None, "mean"]
    with pytest.raises(ValueError, match="centre must be one of mean, median, got 'mode'"):
        config_class(**config_kwargs(tmp_path, centre="mode"))


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
