"""What a LoRA run leaves is evaluated as the model that it means."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_capo import cli
from trl_capo.evaluation import adapter
from trl_capo.evaluation.predictor import SelectivePredictor
from trl_capo.evaluation.samples import read_samples


OPTIONS = ["--benchmark", "arithmetic_test_2", "--num_prompts", "6", "--num_samples", "2", "--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A folder as a LoRA run leaves it, and beside it base and adapter added up by hand."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    model.save_pretrained(folder / "run")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "run")
    added = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            change = module.lora_B["default"].weight @ module.lora_A["default"].weight * (8 / 2)
            added.get_submodule(name).weight.data += change.detach()
    added.save_pretrained(folder / "added")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "added")
    return folder


def test_an_adapter_is_evaluated_with_its_base(trained, tiny_model, tmp_path):
    models = [str(trained / "run"), str(trained / "added"), tiny_model]
    assert cli.main(["evaluate", *models, *OPTIONS, "--output_dir", str(tmp_path)]) == 0
    ours, expected, base = (read_samples(tmp_path / Path(model).name)[0] for model in models)
    assert (ours.grid("completion") == expected.grid("completion")).all()
    assert ours.mean_logps == pytest.approx(expected.mean_logps, abs=1e-5)
    assert (ours.grid("completion") != base.grid("completion")).any()
    assert not (tmp_path / "run" / "merged").exists(), "as large as the model"


def test_it_answers_too(trained, tiny_model):
    paths = (trained / "run", trained / "added", tiny_model)
    tokens = torch.tensor([[2, 3, 4]])
    ours, expected, base = (SelectivePredictor.from_pretrained(path).model(tokens).logits for path in paths)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (ours - base).abs().max() > 0.1


def test_merged_once_and_any_other_model_is_left_as_it_is(trained, tiny_model, tmp_path, monkeypatch):
    path = adapter.merged(str(trained / "run"), tmp_path / "merged")
    monkeypatch.setattr("peft.PeftModel.from_pretrained", pytest.fail)
    assert adapter.merged(str(trained / "run"), tmp_path / "merged") == path == str(tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert adapter.merged(tiny_model, tmp_path / "other") == tiny_model == adapter.base_of(tiny_model)
    assert adapter.base_of(str(trained / "run")) == tiny_model
    assert adapter.merged("someone/model", tmp_path / "other") == "someone/model" and not (tmp_path / "other").exists()
    shutil.rmtree(tmp_path / "merged")
