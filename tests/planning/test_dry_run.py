"""What a dry run says about the launch that it is told of, and what it refuses as the run itself would."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trl_capo.cli import main
from trl_capo.planning.dry_run import as_if_launched, end_of_turn_warning


@pytest.fixture
def dry_run(tiny_model, tmp_path, capsys):
    """Runs `trl-capo train --dry-run` on eight processes and returns what it printed, or the error."""
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}+2=", "solution": str(i + 2)}) for i in range(64)))
    launch = tmp_path / "ddp.yaml"
    launch.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\n")

    def run(method="capo", **options):
        options = {"model_name_or_path": tiny_model, "dataset_name": data, "output_dir": tmp_path / "run", **options}
        options = {"bf16": "false", "max_steps": 12, "num_generations": 8, **options}
        words = [f"--{name}={value}" for name, value in options.items()]
        code = main(["train", "--method", method, *words, "--accelerate_config", str(launch), "--dry-run"])
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


def test_the_configuration_is_that_of_the_launch(dry_run):
    """One row on each of eight GPUs is one group; on one process it would be refused."""
    printed = dry_run(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert "A generation: 8 processes x 1 rows x 4 = 32 completions, 8 for each of 4 prompts." in printed
    printed = dry_run(per_device_train_batch_size=2, gradient_accumulation_steps=4, generation_batch_size=128)
    assert "A generation: 8 processes x 2 rows x 8 = 128 completions" in printed
    assert "12 optimizer steps = 6 rollout batches = 96 prompts = 1.50 epochs of 64." in printed
    assert re.search(r"8 processes, ddp", printed)


def test_a_batch_that_is_drawn_twice_has_half_as_many_prompts(dry_run):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert "12 rollout batches = 96 prompts = 1.50 epochs" in dry_run(**options)
    printed = dry_run("codapo", **options)
    assert "12 rollout batches = 48 prompts, each batch drawn 2 times, = 0.75 epochs of 64." in printed
    assert "12 rollout batches = 96 prompts = 1.50" in dry_run("codapo", **options, replay="false")


def test_an_evaluation_has_as_many_completions_as_training_unless_said_otherwise(dry_run):
    options = dict(num_validation_prompts=16, dataset_test_split="validation", eval_strategy="steps", eval_steps=4)
    assert "Evaluation: 16 prompts x 8 = 2 batches, 3 times." in dry_run(**options)
    assert "Evaluation: 16 prompts x 4 = 1 batches, 3 times." in dry_run(**options, num_generations_eval=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(save_steps=5, steps_per_generation=4, gradient_accumulation_steps=2), "set save_steps=4"),
        (dict(reward_funcs="no_such_reward"), "'no_such_reward' is not in trl.rewards"),
        (dict(num_validation_prompts=4), "sets prompts aside that nothing uses"),
        (dict(generation_batch_size=12), "generation_batch_size"),
    ],
)
def test_what_the_run_would_refuse_is_refused(dry_run, options, message):
    assert message in dry_run(**{"per_device_train_batch_size": 2, **options})


def test_unreadable_golds_are_refused(dry_run, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "solution": "$ east"}))
    assert "math-verify cannot parse 1 of 1 gold answers" in dry_run(dataset_name=data, per_device_train_batch_size=1)


def test_the_world_size_is_put_back():
    from transformers import TrainingArguments

    before = TrainingArguments.world_size
    with pytest.raises(RuntimeError), as_if_launched(8):
        raise RuntimeError
    assert TrainingArguments.world_size is before


def test_a_turn_that_ends_where_nothing_stops(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert end_of_turn_warning(tiny_model, tokenizer, None) == []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    [warning] = end_of_turn_warning(tiny_model, tokenizer, None)
    assert "ends a turn with <|im_end|>" in warning
    stops = {"eos_token_id": [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stops))
    assert end_of_turn_warning(str(Path(tmp_path)), tokenizer, None) == []
