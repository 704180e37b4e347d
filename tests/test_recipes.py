"""Every recipe parses with the installed TRL and says what it is meant to say."""

from pathlib import Path

import pytest
import yaml

from trl_capo.scripts.demo import training_options
from trl_capo.scripts.train import make_parser


RECIPES = sorted(path for path in Path("recipes").rglob("config_*.yaml"))


def parse(path: Path):
    method = yaml.safe_load(path.read_text())["method"]
    # bf16 recipes are for GPUs; on a machine without one the parser needs to hear that the CPU is meant.
    arguments = ["--config", str(path), "--use_cpu", "true"]
    script, training, model, *_ = make_parser(method).parse_args_and_config(arguments)
    return script, training, model


def test_there_are_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_parses(path, monkeypatch):
    from trl_capo.checks import check_save_steps

    script, training, model = parse(path)
    assert path.parent.name == script.method
    assert model.model_name_or_path and script.dataset_name and training.output_dir.startswith("runs/")
    check_save_steps(training)


@pytest.mark.parametrize("path", [path for path in RECIPES if "Qwen2.5-Math" in str(path)], ids=str)
def test_paper_layout(path):
    """128 prompts x 8 completions on 8 GPUs, two updates a generation, the paper's number of rollout batches."""
    _, training, _ = parse(path)
    rows = 8 * training.per_device_train_batch_size
    assert rows * training.steps_per_generation == 128 * 8
    assert rows * training.gradient_accumulation_steps == 64 * 8
    small = "1.5B" in str(path)
    assert (training.max_steps, training.tau) == ((1200, 0.6) if small else (800, 0.5))
    assert (training.lr_scheduler_type, training.learning_rate, training.loss_type) == ("constant", 1e-6, "grpo")


@pytest.mark.parametrize("method", ["capo", "grpo"])
def test_arithmetic_recipe_is_the_demo(method):
    _, training, model = parse(Path(f"recipes/arithmetic/{method}/config_demo.yaml"))
    options = training_options(method, steps=training.max_steps, seed=training.seed)
    assert model.model_name_or_path == "arithmetic-base"
    for name, value in options.items():
        if name != "report_to":
            assert getattr(training, name) == value, name
