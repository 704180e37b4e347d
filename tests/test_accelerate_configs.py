from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


CONFIGS = sorted((Path(__file__).parents[1] / "recipes/accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_accelerate_reads_it(name, kind):
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.distributed_type.value == kind


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_command_line_wins_and_the_recipe_chooses_precision(path):
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), "--num_processes", "2", "script.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == 2
    # Anything else ends up in the environment, where TrainingArguments prefers it to the recipe's `bf16: false`.
    assert args.mixed_precision == "no"
