"""The recipe for Qwen2.5-Math-1.5B as a person with 8 GPUs would use it, with a Qwen2 of 0.9 M parameters on a CPU.

Model, data and sizes are overridden on the command line, and what needs a GPU is turned off; everything else is the
recipe's: the cleaning of the data, the validation split, the layout of two updates a generation, the mask.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.standins import make_repositories
from trl_capo.cli import main
from trl_capo.data.arithmetic import BASE_MODEL, arithmetic_dataset
from trl_capo.data.benchmarks import BENCHMARKS


RECIPE = "recipes/Qwen2.5-Math-1.5B/capo/config_deepscaler.yaml"
SIZES = {
    "num_train_prompts": 60,
    "num_validation_prompts": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "per_device_eval_batch_size": 32,
    "max_completion_length": 40,
    "eval_steps": 2,
    "save_steps": 2,
    "learning_rate": 1e-4,
}
NO_GPU = {"use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false", "use_vllm": "false"}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Questions with DeepScaleR's columns, one of them from a benchmark; and the benchmarks."""
    monkeypatch.setenv("TRL_CAPO_DATA", str(make_repositories(tmp_path / "data")))
    rows = [
        {"problem": row["prompt"][0]["content"], "answer": row["solution"][7:-1], "solution": ""}
        for row in arithmetic_dataset("train", 80)
    ]
    rows.append({"problem": "What is $100+100$?", "answer": "200", "solution": ""})
    path = tmp_path / "deepscaler.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.filterwarnings("ignore:.*rows, .* were expected")
def test_the_paper_recipe_trains_resumes_evaluates_and_pushes(data, hub, tmp_path, capsys):
    output = tmp_path / "run"
    options = {"model_name_or_path": "arithmetic-base", "dataset_name": data, "dataset_prompt_column": "problem"}
    options |= {"dataset_solution_column": "answer", "output_dir": output, **SIZES, **NO_GPU}
    command = ["train", "--config", RECIPE, *(f"--{name}={value}" for name, value in options.items())]
    assert main([*command, "--max_steps", "2"]) == 0
    assert "1 in a benchmark; 60 to train on and 8 to validate on" in capsys.readouterr().out

    pushed = ["--push_to_hub", "true", "--hub_model_id", "me/capo", "--hub_private_repo", "true"]
    assert main([*command, "--max_steps", "4", "--resume_from_checkpoint", "true", *pushed]) == 0
    assert f"Resuming from {output}/checkpoint-2" in capsys.readouterr().out
    before, after = load_file(Path(BASE_MODEL) / "model.safetensors"), load_file(output / "model.safetensors")
    assert max((before[name] - after[name]).abs().max().item() for name in before) > 1e-5
    log = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry["step"] for entry in log if "eval_reward" in entry]
    assert evaluated == [2, 4] and any(0 < entry.get("reward", 0) < 1 for entry in log)
    assert {"recipe.yaml", "reproduction.json", "README.md", "config.json"} <= set(hub.repositories["me/capo"])
    assert hub.private["me/capo"] and torch.equal(
        load_bytes(hub.repositories["me/capo"]["model.safetensors"])["model.norm.weight"], after["model.norm.weight"]
    )

    benchmarks = [name for name in BENCHMARKS if name != "gsm8k"]
    folder = tmp_path / "evaluation"
    options = ["--num_samples", "2", "--max_new_tokens", "8", "--output_dir", str(folder)]
    assert main(["evaluate", str(output), "--benchmark", *benchmarks, *options]) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())["benchmarks"]
    assert set(summary) == set(benchmarks) and len(benchmarks) == 6
    assert summary["math500"]["num_prompts"] == 6 and summary["olympiadbench"]["num_samples"] == 2


def load_bytes(content: bytes) -> dict:
    from safetensors.torch import load

    return load(content)
