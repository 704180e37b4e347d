"""What a LoRA run leaves is evaluated as the model that it means."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from trl_capo import cli
from trl_capo.data.arithmetic import BASE_MODEL
from trl_capo.errors import UserError
from trl_capo.evaluation.predictor import SelectivePredictor
from trl_capo.evaluation.samples import read_samples
from trl_capo.models import adapter


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


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A base whose embedding and output are one matrix, large enough to matter."""
    folder = tmp_path_factory.mktemp("tied") / "base"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(BASE_MODEL)), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)
    return folder


KINDS = {
    "attention": dict(target_modules=["q_proj"]),
    "lm_head": dict(target_modules=["q_proj", "lm_head"]),
    "embed_tokens": dict(target_modules=["q_proj", "embed_tokens"]),
    "both": dict(target_modules=["lm_head", "embed_tokens"]),
    "dora": dict(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "saved head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved embedding": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved both": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "resized": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapter_whatever_it_changes(tied, tmp_path, kind):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tied)
    if kind == "resized":
        base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tied).save_pretrained(tmp_path / "run")
    tokens = torch.tensor([[2, 3, 4, 5, 6, 7]])
    path = adapter.merged(str(tmp_path / "run"), tmp_path / "merged")
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(path).eval()(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert not list(tmp_path.glob("*.partial"))


def test_a_merge_that_changes_the_model_is_refused(trained, tmp_path, monkeypatch):
    """Whatever the cause: here the adapter is lost."""
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(UserError, match="cannot be merged with its base: log-probs of the merged model differ by"):
        adapter.merged(str(trained / "run"), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_its_base_is_one_line(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(trained / "run", tmp_path / "run")
    config = json.loads((run / "adapter_config.json").read_text())
    for base, message in (
        ("/nowhere/base", "whose base, /nowhere/base, does not exist"),
        ("run/base", "whose base, run/base, does not exist"),  # like a name on the Hub, but beside a folder
        (3, "does not name the adapter's base"),
    ):
        (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        for command in (["evaluate", str(run), *OPTIONS], ["answer", str(run), "1+1="]):
            assert cli.main(command) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1


def test_the_base_is_found_as_any_model_is(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "arithmetic-base"}))
    assert adapter.base_of(str(run)) == str(BASE_MODEL)
