"""Names of models: shipped ones, folders and the Hub's, and one line where there is no such model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer
from trl_capo.cli import main
from trl_capo.errors import UserError
from trl_capo.evaluation.predictor import SelectivePredictor
from trl_capo.models.source import SHIPPED, ModelNotFound, check_trainable, model_path


def test_a_folder_comes_before_a_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_path("arithmetic-base") == str(SHIPPED["arithmetic-base"])
    for name in ("arithmetic-base", "runs/capo", "deep/er/still"):
        (tmp_path / name).mkdir(parents=True)
        assert model_path(name) == name
        assert model_path(f"./{name}") == f"./{name}" and model_path(str(tmp_path / name)) == str(tmp_path / name)
        assert model_path(f"~/{name}") == str(tmp_path / name)
    for name in ("gpt2", "Qwen/Qwen2.5-Math-1.5B"):
        assert model_path(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "is not a folder"),
        ("./runs/cap", r"is not a folder \('runs' contains capo, grpo\)"),
        ("runs/cap", r"is not a folder \('runs' contains capo, grpo\), and the Hub has no model with that name"),
        ("runs/capo/checkpoint-8", r"is not a folder \('runs/capo' contains no folders\)"),
        ("../elsewhere", "is not a folder"),
        ("~/elsewhere", "is not a folder"),
        ("owner/", "is not a folder"),
        ("runs\\capo", "is not a folder"),
        ("", "is not a folder"),
        ("arithmetic-bass", "is neither a folder nor a shipped model .arithmetic-base, arithmetic-flat"),
        ("model.safetensors", "is a file. A model is a folder"),
    ],
)
def test_a_missing_folder_is_refused_without_asking_the_hub(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "capo").mkdir(parents=True)
    (tmp_path / "runs" / "grpo").mkdir()
    (tmp_path / "model.safetensors").touch()
    for kind in (UserError, OSError):
        with pytest.raises(kind, match=message):
            model_path(name)


def test_nothing_heavy_is_imported_for_it():
    code = "import sys, trl_capo.models.source as m; m.model_path('arithmetic-base'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": "{}"}, "contains an adapter, not a whole model. Merge it into its base"),
        ({"README.md": ""}, "contains no model: it has no config.json"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": "[]"}, "has no 'model_type'"),
        ({"config.json": "{}"}, "has no 'model_type'"),
    ],
)
def test_folders_that_hold_no_model(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    args = CAPOConfig(**config_kwargs(tmp_path / "run", ref_ppl_mask=False))
    with pytest.raises(ModelNotFound, match=message):
        CAPOTrainer(str(tmp_path), parity_reward, args, prompt_dataset())


def test_the_advice_for_an_adapter_works(tiny_model, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    with pytest.raises(ModelNotFound) as caught:
        check_trainable("adapter")
    command = str(caught.value).split("result: ")[1].split(";")[0].replace("FOLDER", "'merged'")
    eval(command, {"AutoPeftModelForCausalLM": AutoPeftModelForCausalLM})
    check_trainable("merged")


def test_the_hub_that_cannot_be_asked_is_one_line(tmp_path):
    args = CAPOConfig(**config_kwargs(tmp_path, ref_ppl_mask=False))
    message = "'nobody/there' is neither a local folder nor in the cache, and HF_HUB_OFFLINE is set"
    with pytest.raises(ModelNotFound, match=message):
        CAPOTrainer("nobody/there", parity_reward, args, prompt_dataset())


@pytest.mark.parametrize("option", ["ref_model_name_or_path", "reward"])
def test_other_models_are_looked_for_too(tiny_model, tmp_path, option):
    options = {"ref_model_name_or_path": "/no/such/model"} if option != "reward" else {}
    args = CAPOConfig(**config_kwargs(tmp_path, ref_ppl_mask=False, **options))
    with pytest.raises(ModelNotFound, match="'/no/such/model' is not a folder"):
        CAPOTrainer(tiny_model, "/no/such/model" if option == "reward" else parity_reward, args, prompt_dataset())


def test_a_reference_may_be_a_shipped_model(tmp_path):
    args = CAPOConfig(**config_kwargs(tmp_path, ref_model_name_or_path="arithmetic-flat"))
    trainer = CAPOTrainer("arithmetic-base", parity_reward, args, prompt_dataset())
    flat = AutoModelForCausalLM.from_pretrained(SHIPPED["arithmetic-flat"])
    for ours, theirs in zip(trainer.ref_model.parameters(), flat.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_entry_point_knows_the_names(monkeypatch):
    from trl_capo.evaluation.run import check_model

    assert model_path("arithmetic-base") == str(SHIPPED["arithmetic-base"])
    assert isinstance(SelectivePredictor.from_pretrained("arithmetic-base"), SelectivePredictor)
    with pytest.raises(ModelNotFound):
        SelectivePredictor.from_pretrained("/no/such/model")
    rows = {"arithmetic_test_2": prompt_dataset(2)}
    check_model("arithmetic-base", rows, 4)
    with pytest.raises(ModelNotFound):
        check_model("/no/such/model", rows, 4)


def train(tmp_path, capsys, *options: str) -> str:
    """The last line of an error of `trl-capo train`."""
    words = ["--dataset_name", "arithmetic", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    words += ["--bf16", "false", "--report_to", "none", "--max_steps", "1"]
    assert main(["train", *words, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-capo train: error: ")
    return error


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_the_command_says_it_before_it_reads_data(tmp_path, capsys, monkeypatch, dry_run):
    monkeypatch.setattr("trl_capo.data.training.load_data", lambda *args: pytest.fail("data are read"))
    assert "is not a folder" in train(tmp_path, capsys, "--model_name_or_path", "no/such/model", *dry_run)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({}))
    assert "an adapter" in train(tmp_path, capsys, "--model_name_or_path", str(tmp_path / "adapter"), *dry_run)


def test_vllm_that_is_not_installed_is_said_before_data_are_read(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_capo.extras.MODULES", {"vllm": ("no_such_module",)})
    args = CAPOConfig(**config_kwargs(tmp_path, ref_ppl_mask=False, use_vllm=True))
    with pytest.raises(UserError, match="use_vllm=True: no_such_module must be installed.*trl-capo.vllm.*use_vllm=F"):
        CAPOTrainer(tiny_model, parity_reward, args, prompt_dataset())
    monkeypatch.setattr("trl_capo.data.training.load_data", lambda *args: pytest.fail("data are read"))
    assert "must be installed" in train(tmp_path, capsys, "--model_name_or_path", tiny_model, "--use_vllm", "true")


def test_the_shipped_folders_are_models():
    for folder in SHIPPED.values():
        check_trainable(str(folder))
        assert os.path.exists(Path(folder) / "model.safetensors")
        assert AutoTokenizer.from_pretrained(folder).chat_template
