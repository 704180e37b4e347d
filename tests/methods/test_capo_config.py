"""Every option survives the parser, and bad input is answered with what to change."""

import warnings

import pytest
from datasets import Dataset
from trl import TrlParser
from trl.rewards import accuracy_reward

from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import CAPOConfig, CAPOTrainer


def make_config(tmp_path, **options) -> CAPOConfig:
    return CAPOConfig(**config_kwargs(tmp_path, **options))


def test_defaults_are_the_papers(tmp_path):
    config = CAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (config.tau, config.ref_ppl_low, config.ref_ppl_high) == (0.6, 1.05, 2.5)
    assert (config.num_generations, config.temperature, config.beta, config.epsilon) == (8, 1.0, 0.0, 0.2)
    assert (config.loss_type, config.learning_rate, config.ref_ppl_mask) == ("grpo", 1e-6, True)
    assert (config.pair_normalization, config.pair_scope, config.mask_partners) == ("sum", "group", False)


def test_every_option_survives_command_line_and_yaml(tmp_path):
    options = dict(
        tau=0.4,
        tau_end=0.1,
        reward_only_share=0.25,
        tau_unit="gap",
        pair_normalization="group",
        scale_by_tau=True,
        pair_scope="group",
        ref_ppl_mask=True,
        ref_ppl_low=1.1,
        ref_ppl_high=2.0,
        ref_ppl_quantiles=[0.2, 0.8],
        ref_ppl_quantiles_by_class=True,
        ref_ppl_quantile_samples=64,
        mask_partners=True,
        graded_rewards=True,
        auxiliary_rewards="ignore",
        correctness_reward="accuracy_reward",
        correct_threshold=0.7,
        ref_model_name_or_path="base",
        sync_ref_model=True,
    )
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in (common | options).items()))
    (from_yaml,) = TrlParser((CAPOConfig,)).parse_args_and_config(["--config", str(recipe)])
    arguments = []
    for name, value in (common | options).items():
        arguments += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    (from_command_line,) = TrlParser((CAPOConfig,)).parse_args_and_config(arguments)
    for config in (from_yaml, from_command_line):
        assert {name: getattr(config, name) for name in options} == options
    own = set(CAPOConfig.__annotations__) | {"correctness_reward", "correct_threshold", "ref_model_name_or_path"}
    assert own - set(options) == {"loss_type"}, "an option is missing from this test"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"tau": 0.0}, "tau must be positive and finite, got 0.0"),
        ({"tau": -1.0}, "tau must be positive and finite, got -1.0"),
        ({"tau": float("nan")}, "tau must be positive and finite, got nan"),
        ({"tau_end": 0.0}, "tau_end must be positive and finite, got 0.0"),
        ({"reward_only_share": 1.5}, r"reward_only_share must be in \[0, 1\], got 1.5"),
        ({"reward_only_share": float("nan")}, r"reward_only_share must be in \[0, 1\], got nan"),
        ({"tau_unit": "nat"}, "tau_unit must be one of nats, gap, got 'nat'"),
        ({"pair_normalization": "mean"}, "pair_normalization must be one of sum, group"),
        ({"pair_scope": "batch", "pair_normalization": "std"}, "pair_scope='batch' needs pair_normalization='sum'"),
        ({"auxiliary_rewards": "mul"}, "auxiliary_rewards must be one of add, ignore"),
        ({"ref_ppl_low": 0.9}, "ref_ppl_low must be a finite perplexity of at least 1, got 0.9"),
        ({"ref_ppl_high": float("inf")}, "ref_ppl_high must be a finite perplexity of at least 1, got inf"),
        ({"ref_ppl_high": float("nan")}, "ref_ppl_high must be a finite perplexity of at least 1, got nan"),
        ({"ref_ppl_quantiles": [0.0, 0.75]}, r"ref_ppl_quantiles must be two numbers in \(0, 1\)"),
        ({"ref_ppl_quantiles": [0.5]}, r"ref_ppl_quantiles must be two numbers in \(0, 1\)"),
        ({"ref_ppl_quantile_samples": 1}, "ref_ppl_quantile_samples must be at least 2, got 1"),
        ({"ref_ppl_quantiles_by_class": True}, "needs ref_ppl_quantiles"),
        ({"sync_ref_model": True, "ref_ppl_mask": False}, "sync_ref_model=True has no reference"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_ppl_low": 2.5}, "ref_ppl_low and ref_ppl_high are 2.5 and 2.5"),
        ({"ref_ppl_quantiles": [0.8, 0.2]}, "ref_ppl_quantiles are 0.8 and 0.2"),
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"loss_type": "dapo"}, "loss_type='dapo'"),
    ],
)
def test_doubtful_options_are_warned_of(tmp_path, options, message):
    with pytest.warns(UserWarning, match=message):
        make_config(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ref_ppl_quantiles": [0.8, 0.2], "ref_ppl_quantiles_by_class": True},
        {"temperature": 0.7, "ref_ppl_quantiles": [0.25, 0.75]},
        {"temperature": 0.7, "ref_ppl_mask": False},
        {"loss_type": "sapo"},
        {"sync_ref_model": True},
        {"sync_ref_model": True, "ref_ppl_mask": False, "beta": 0.1},
    ],
)
def test_sound_options_pass_in_silence(tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_config(tmp_path, **options)


@pytest.mark.parametrize(
    ("layout", "save_steps", "nearest"),
    [
        ({"steps_per_generation": 4}, 6, 8),
        ({"steps_per_generation": 4}, 1, 4),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 3, 4),
        ({"num_iterations": 3}, 5, 6),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, 2, 3),
    ],
)
def test_checkpoints_inside_a_generation_are_refused(tmp_path, layout, save_steps, nearest):
    options = dict(save_strategy="steps", max_steps=12, per_device_train_batch_size=4, **layout)
    with pytest.raises(ValueError, match=f"save_steps={nearest}, or another multiple"):
        trainer = make_config(tmp_path, save_steps=save_steps, **options)
        CAPOTrainer("/no/such/model", parity_reward, trainer, prompt_dataset())
    accepted = make_config(tmp_path, save_steps=nearest, **options)
    with pytest.raises(OSError, match="/no/such/model"):
        CAPOTrainer("/no/such/model", parity_reward, accepted, prompt_dataset())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"question": ["1+1="]}, "needs a column 'prompt', but has question"),
        ({"prompt": [[{"role": "user", "content": "1+1="}]]}, "needs a column 'solution'.*but has prompt"),
        ({"prompt": ["1+1="], "solution": ["$2$"]}, "has plain text prompts"),
        (
            {"prompt": [[{"role": "user", "content": "1+1="}]] * 2, "solution": ["$2$", "east"]},
            r"cannot parse 1 of 2 gold answers in 'solution'.*row 1, 'east'.*Wrap each gold",
        ),
        ({"prompt": []}, "has no rows"),
    ],
)
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset", "eval_dataset['hard']"])
def test_bad_data_is_refused_before_the_model_is_loaded(tmp_path, rows, message, part):
    good = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+1="}]], "solution": ["$2$"]})
    bad = Dataset.from_dict(rows)
    datasets = {"train_dataset": good, "eval_dataset": good}
    if part == "eval_dataset['hard']":
        datasets["eval_dataset"] = {"easy": good, "hard": bad}
    else:
        datasets[part] = bad
    with pytest.raises(ValueError, match=message) as caught:
        CAPOTrainer("/no/such/model", accuracy_reward, make_config(tmp_path), **datasets)
    assert str(caught.value).startswith(part)


def test_other_rewards_need_no_solution(tmp_path):
    with pytest.raises(OSError, match="/no/such/model"):
        CAPOTrainer("/no/such/model", parity_reward, make_config(tmp_path), prompt_dataset())


def test_output_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="output_dir=.*file/run' cannot be written"):
        CAPOTrainer("/no/such/model", parity_reward, config, prompt_dataset())


def test_processes_that_do_not_know_of_each_other(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but each would do the whole job alone"):
        CAPOTrainer("/no/such/model", parity_reward, config, prompt_dataset())


def test_reference_path_with_peft_is_refused(tiny_model, tmp_path):
    from peft import LoraConfig

    config = make_config(tmp_path, ref_model_name_or_path=tiny_model)
    with pytest.raises(ValueError, match="ref_model_name_or_path cannot be used with PEFT"):
        CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset(), peft_config=LoraConfig())


def test_a_moving_reference_is_not_kept_in_half_precision(tmp_path):
    with pytest.raises(ValueError, match="ref_model_dtype='bfloat16' is too coarse for sync_ref_model=True"):
        CAPOConfig(**config_kwargs(tmp_path, sync_ref_model=True, ref_model_dtype="bfloat16"))
    assert CAPOConfig(**config_kwargs(tmp_path, sync_ref_model=True, ref_model_dtype="float32")).sync_ref_model
