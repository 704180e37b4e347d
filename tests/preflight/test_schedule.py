"""How many steps and prompts a run makes: the count against runs, and against TRL's sampler cut up by accelerate."""

import math
import re

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from trl.trainer.utils import RepeatSampler

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer
from trl_capo.cli import main
from trl_capo.errors import UserError
from trl_capo.methods.codapo import CoDaPOConfig, CoDaPOTrainer
from trl_capo.planning.dry_run import as_if_launched, batch_lines
from trl_capo.preflight.schedule import check_enough_prompts, check_some_steps, schedule


def config(folder, kind=CAPOConfig, **options):
    return kind(**config_kwargs(folder, ref_ppl_mask=False, learning_rate=0.0, max_completion_length=2, **options))


LAYOUTS = [
    dict(max_steps=5),
    dict(max_steps=-1, num_train_epochs=2),
    dict(max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2),
    dict(max_steps=7, gradient_accumulation_steps=2, steps_per_generation=3),
    dict(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, steps_per_generation=3),
    dict(max_steps=4, num_iterations=2, gradient_accumulation_steps=2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [(CAPOTrainer, CAPOConfig), (CoDaPOTrainer, CoDaPOConfig)])
def test_the_count_is_what_a_run_does(tiny_model, tmp_path, layout, kind):
    trainer_class, config_class = kind
    seen = []

    class Counting(trainer_class):
        def _generate_and_score_completions(self, inputs):
            seen.append([row["prompt"][0]["content"] for row in inputs])
            return super()._generate_and_score_completions(inputs)

    args = config(tmp_path, config_class, per_device_train_batch_size=4, num_generations=2, **layout)
    num_prompts = 13  # does not fill generations
    trainer = Counting(tiny_model, parity_reward, args, prompt_dataset(num_prompts))
    trainer.train()
    draws = trainer_class.generations_per_batch(args)
    counted = schedule(args, num_prompts, draws)
    assert counted.steps == trainer.state.global_step == trainer.state.max_steps
    assert counted.rollout_batches == len(seen)
    assert counted.prompts_seen == sum(len(set(prompts)) for prompts in seen[::draws])
    [line] = [line for line in batch_lines(trainer_class, args, 1, num_prompts, 0) if line.startswith("Training")]
    assert line.startswith(f"Training: {trainer.state.global_step} optimizer steps = {len(seen)} rollout batches")


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_prompts", [5, 6, 11, 12, 25])
def test_over_ranks_it_is_trls_sampler_cut_up(tmp_path, num_processes, num_prompts):
    with as_if_launched(num_processes):
        args = config(
            tmp_path, steps_per_generation=2, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=1
        )
        counted = schedule(args, num_prompts)
        needed = args.generation_batch_size // args.num_generations
        sampler = RepeatSampler(range(num_prompts), args.num_generations, needed, repeat_count=2)
        batches = BatchSampler(sampler, args.per_device_train_batch_size * 2, drop_last=False)
        for rank in range(num_processes):
            assert math.ceil(len(list(BatchSamplerShard(batches, num_processes, rank))) / 4) == counted.steps
        rows = prompt_dataset(num_prompts)
        if counted.steps == 0:
            with pytest.raises(UserError, match=f"has {num_prompts} prompts, but one generation takes {needed}"):
                check_enough_prompts(args, rows)
        else:
            check_enough_prompts(args, rows)


def test_too_few_prompts_are_refused_with_what_to_lower(tmp_path):
    args = config(tmp_path, gradient_accumulation_steps=4)
    message = (
        "5 prompts, but one generation takes 8, so nothing would be trained: per_device_train_batch_size=8 x 1 "
        "process x gradient_accumulation_steps=4 = 32 completions, num_generations=4 for each prompt. Lower "
        "per_device_train_batch_size or gradient_accumulation_steps to at most 20 completions per generation"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        CAPOTrainer("/no/such/model", parity_reward, args, prompt_dataset(5))
    enough = config(tmp_path, gradient_accumulation_steps=2)  # 4 of 5 prompts
    with pytest.raises(OSError, match="/no/such/model"):
        CAPOTrainer("/no/such/model", parity_reward, enough, prompt_dataset(5))
    args = config(tmp_path, steps_per_generation=4)
    with pytest.raises(UserError, match="steps_per_generation=4 = 32 completions"):
        CAPOTrainer("/no/such/model", parity_reward, args, prompt_dataset(5))


def test_an_evaluation_that_drops_all_it_has_is_refused(tmp_path):
    options = dict(eval_strategy="steps", eval_steps=1)
    check_enough_prompts(config(tmp_path, **options), prompt_dataset(), prompt_dataset(1))
    args = config(tmp_path, dataloader_drop_last=True, **options)
    check_enough_prompts(args, prompt_dataset(), prompt_dataset(2))
    message = r"eval_dataset\['b'\] has 1 prompt x 4 generations.*fewer than 8 completions"
    with pytest.raises(UserError, match=message):
        check_enough_prompts(args, prompt_dataset(), {"a": prompt_dataset(2), "b": prompt_dataset(1)})


@pytest.mark.parametrize("options", [dict(max_steps=0), dict(max_steps=-1, num_train_epochs=0)])
def test_a_run_of_no_steps_is_refused(tmp_path, options):
    with pytest.raises(UserError, match="trains nothing"):
        check_some_steps(config(tmp_path, **options))


@pytest.mark.parametrize("more", [["--max_steps", "3"], ["--max_steps", "-1", "--num_train_epochs", "4"]])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_the_command_refuses_it_and_saves_nothing(tiny_model, tmp_path, capsys, more, dry_run):
    data = tmp_path / "few.jsonl"
    data.write_text("\n".join(f'{{"prompt": "{i}+2=", "solution": "{i + 2}"}}' for i in range(5)))
    options = ["--model_name_or_path", tiny_model, "--dataset_name", str(data), "--output_dir", str(tmp_path / "run")]
    options += ["--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "8", "--num_generations", "4"]
    options += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    assert main(["train", *options, *more, *dry_run]) == 2
    assert "train_dataset has 5 prompts, but one generation takes 8" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(per_device_train_batch_size=3, gradient_accumulation_steps=4, num_generations=8),
            "per_device_train_batch_size=3 x 1 process x gradient_accumulation_steps=4 = 12 completions, which "
            "num_generations=8 does not divide. Set per_device_train_batch_size to 2 or 4, or num_generations to 4 or "
            "6.",
        ),
        (
            dict(per_device_train_batch_size=3, steps_per_generation=3, num_generations=4),
            "x steps_per_generation=3 = 9 completions",
        ),
        (
            dict(generation_batch_size=12, num_generations=8),
            "generation_batch_size=12 must be a multiple of 8, which both",
        ),
        (
            dict(generation_batch_size=24, num_generations=3, per_device_train_batch_size=16),
            "generation_batch_size=24 must be a multiple of 48",
        ),
        (
            dict(eval_strategy="steps", per_device_eval_batch_size=6),
            "per_device_eval_batch_size=6 x 1 process = 6 completions, which num_generations=4 does not divide. Set "
            "per_device_eval_batch_size to 4 or 8",
        ),
        (dict(eval_strategy="steps", num_generations_eval=3), "which num_generations_eval=3 does not divide"),
        (dict(generation_batch_size=8, steps_per_generation=1), "can not be both configured"),
    ],
)
def test_batches_that_do_not_divide_name_what_was_set(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CAPOConfig(**config_kwargs(tmp_path, **options))


def test_the_values_that_are_named_fit(tmp_path):
    layout = dict(gradient_accumulation_steps=4, num_generations=8)
    for options in (dict(per_device_train_batch_size=2), dict(per_device_train_batch_size=4)):
        assert CAPOConfig(**config_kwargs(tmp_path, **layout, **options)).generation_batch_size % 8 == 0


def test_other_errors_of_a_configuration_stay(tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size is not supported"):
        CAPOConfig(**config_kwargs(tmp_path, auto_find_batch_size=True))
