"""`trl-capo train`: the same job from options, a recipe and a launcher; killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from tests.helpers import recipe_options
from trl_capo import cli
from trl_capo.data.training import load_data
from trl_capo.methods import METHODS
from trl_capo.models.source import model_path
from trl_capo.recipe import make_parser


def write_recipe(folder, model: str, **overrides):
    """A recipe for the tiny model on the arithmetic world, with the reward that gives mixed groups."""
    options = recipe_options(model, folder / "run", **{"max_steps": 2, **overrides})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def run_command(arguments: list[str], cwd, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def finish(process, seconds: float = 300) -> str:
    """Output of a command; one that hangs is killed with all its processes."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-3000:]
    return output


def test_recipe_trains_and_saves(tiny_model, tmp_path, capsys):
    assert cli.main(["train", f"--config={write_recipe(tmp_path, tiny_model)}"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "✅ Training completed." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("per_device_train_batch_size", "0", "at least 1"),
        ("learning_rate", "-1", "at least 0"),
        ("learning_rate", "nan", "at least 0"),
        ("temperature", "0", "above 0"),
        ("temperature", "-1", "above 0"),
        ("seed", "-1", "from 0 to 4294967295"),
        ("warmup_steps", "nan", "at least 0"),
        ("adam_beta2", "nan", "below 1"),
        ("ref_ppl_low", "nan", "a number"),
        ("chat_template_kwargs", "{bad", "JSON such as"),
        ("model_init_kwargs", "{bad", "JSON such as"),
        ("generation_kwargs", "bad", "JSON such as"),
        # Found when the configuration is made:
        ("load_best_model_at_end", "true", "requires the save and eval strategy to match"),
        ("num_train_prompts", "0", "num_train_prompts must be at least 1"),
        # Before the model, which does not exist, is loaded:
        ("loss_type", "foo", "loss_type='foo' must be one of bnpo, cispo, dapo, "),
        ("report_to", "nobody", "report_to='nobody' must be one of none, "),
    ],
)
def test_a_bad_value_is_one_line(tmp_path, capsys, monkeypatch, option, value, message):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: 1 / 0)
    options = {"output_dir": tmp_path, "use_cpu": "true", "bf16": "false", "dataset_name": "arithmetic"}
    options |= {"model_name_or_path": "arithmetic-base", "num_generations": "2", option: value}
    words = [word for name, text in options.items() for word in (f"--{name}", str(text))]
    assert cli.main(["train", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and option in error[0] and message in error[0]


def test_modules_that_the_model_has_not(tiny_model, tmp_path, capsys):
    recipe = write_recipe(tmp_path, tiny_model, use_peft=True, lora_target_modules=["nope"])
    assert cli.main(["train", "--config", str(recipe)]) == 2
    assert "error: lora_target_modules=nope is not part of the model" in capsys.readouterr().err.splitlines()[-1]


def test_no_model_and_no_data_are_one_line(tmp_path, capsys):
    words = ["train", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    assert cli.main(words) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err
    assert cli.main([*words, "--model_name_or_path", "arithmetic-base"]) == 2
    assert "dataset_name is missing" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["capo", "grpo"])
def test_option_beats_recipe_beats_default(tiny_model, tmp_path, monkeypatch, method):
    recipe = write_recipe(tmp_path, tiny_model, learning_rate=0.5, method="grpo" if method == "capo" else "capo")
    seen = {}

    def remember(self, *args, **kwargs):
        seen["trainer"] = self
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.train", remember)
    arguments = ["--config", str(recipe), "--method", method, "--num_generations", "2"]
    assert cli.main(["train", *arguments]) == 130
    trainer = seen["trainer"]
    assert trainer._name == {"capo": "CAPO", "grpo": "GRPO"}[method]
    assert (trainer.args.learning_rate, trainer.args.num_generations, trainer.args.epsilon) == (0.5, 2, 0.2)


def test_own_data_with_other_column_names(tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"{n}+1=", "answer": n + 1, "solution": "worked out"} for n in range(16)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        tmp_path,
        tiny_model,
        dataset_name=str(data),
        dataset_prompt_column="question",
        dataset_solution_column="answer",
        reward_funcs=["accuracy_reward"],
        ref_ppl_mask=False,
    )
    assert cli.main(["train", "--config", str(recipe)]) == 0


def test_unparsable_gold_is_refused_or_dropped(tiny_model, tmp_path, capsys):
    data = tmp_path / "data"
    golds = ["$2$", "$3$", "$4$", "$5$", "east $ or west"]
    prompts = [[{"role": "user", "content": f"{n}+1="}] for n in range(5)]
    data.mkdir()
    Dataset.from_dict({"prompt": prompts, "solution": golds}).to_parquet(data / "train.parquet")
    recipe = write_recipe(tmp_path, tiny_model, dataset_name=str(data), reward_funcs=["accuracy_reward"])
    assert cli.main(["train", "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "cannot parse 1 of 5 gold answers" in error and "--drop_unparsable_gold true" in error
    with pytest.warns(UserWarning, match="Dropping 1 of 5 rows whose gold answer cannot be parsed: 'east"):
        assert cli.main(["train", "--config", str(recipe), "--drop_unparsable_gold", "true"]) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tauu": 0.5}, "unknown key 'tauu'. Did you mean 'tau'?"),
        ({"method": "ppo"}, f"method must be one of {', '.join(METHODS)}, or package.module:Trainer, got 'ppo'"),
        ({"tau": 0}, "tau must be positive"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"dataset_train_split": "trian"}, "dataset_train_split='trian' is not a split of the dataset"),
        ({"reward_funcs": ["acuracy"]}, "'acuracy' is not in trl.rewards"),
        ({"resume_from_checkpoint": "/no/such/folder"}, "is not a folder"),
    ],
)
def test_bad_recipes_get_one_line(tiny_model, tmp_path, capsys, overrides, message):
    assert cli.main(["train", "--config", str(write_recipe(tmp_path, tiny_model, **overrides))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-capo train: error:") and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--taau", "6"], "unknown option --taau. Did you mean '--tau'?"),
        (["--max_step", "6"], "unknown option --max_step. Did you mean '--max_steps'?"),
        (["--method", "grpo"], "unknown key 'tau'. It is an option of capo, not of grpo."),
    ],
)
def test_bad_options_get_one_line(tiny_model, tmp_path, capsys, arguments, message):
    assert cli.main(["train", "--config", str(write_recipe(tmp_path, tiny_model, tau=0.5)), *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_missing_recipe(capsys):
    assert cli.main(["train", "--config", "/no/such/recipe.yaml"]) == 2
    assert "/no/such/recipe.yaml: No such file" in capsys.readouterr().err


def test_killed_and_resumed_run_ends_where_the_uninterrupted_one_does(tiny_model, tmp_path, repository):
    """SIGKILL in the middle, then the same command with --resume_from_checkpoint true."""
    options = dict(
        max_steps=30,
        save_strategy="steps",
        save_steps=5,
        learning_rate=0.01,
        tau_unit="gap",
        ref_ppl_quantiles=[0.25, 0.75],
        ref_ppl_quantile_samples=32,
    )
    recipe = write_recipe(tmp_path, tiny_model, **options)
    command = [sys.executable, "-m", "trl_capo.cli", "train", "--config", str(recipe)]
    whole = run_command([*command, "--output_dir", str(tmp_path / "whole")], repository)
    killed = tmp_path / "killed"
    victim = run_command([*command, "--output_dir", str(killed)], repository)
    deadline = time.time() + 120
    while not (killed / "checkpoint-10" / "trainer_state.json").exists():
        assert time.time() < deadline and victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (killed / "model.safetensors").exists()

    resumed = run_command([*command, "--output_dir", str(killed), "--resume_from_checkpoint", "true"], repository)
    assert "Resuming from" in finish(resumed)
    finish(whole)
    expected, actual = load_file(tmp_path / "whole" / "model.safetensors"), load_file(killed / "model.safetensors")
    assert max((expected[name] - actual[name]).abs().max().item() for name in expected) <= 1e-6
    states = [
        json.loads((folder / "checkpoint-30" / "trl_capo_state.json").read_text())
        for folder in (tmp_path / "whole", killed)
    ]
    assert states[0] == states[1] and states[0]["method"]["tau"] > 0


def test_half_written_checkpoints_are_passed_over(tmp_path):
    from trl_capo.trainer.checkpoints import last_complete_checkpoint

    for step, state in ((9, "{}"), (10, '{"global_step":'), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def test_launched_on_two_processes(tiny_model, tmp_path, repository):
    recipe = write_recipe(tmp_path, tiny_model, per_device_train_batch_size=4, num_generations=8)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(repository / "recipes" / "accelerate_configs" / "ddp.yaml"), "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "trl_capo.scripts.train", "--config", str(recipe)]
    output = finish(run_command(launch, repository))
    assert output.count("✅ Training completed.") == 1
    assert torch.isfinite(load_file(tmp_path / "run" / "model.safetensors")["model.norm.weight"]).all()


def test_every_method_has_a_parser():
    for method in METHODS:
        assert "--num_generations" in make_parser(method).format_help()


@pytest.mark.parametrize("name", ["arithmetic-base", "arithmetic-flat"])
def test_shipped_models_have_names(name):
    assert (Path(model_path(name)) / "model.safetensors").exists()
    assert model_path("some/other") == "some/other"


def loaded(folder, **options):
    """What `trl-capo train` would train and evaluate on."""
    options = {"output_dir": folder / "run", "use_cpu": "true", "bf16": "false", "dataset_name": folder, **options}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    script_args, training_args, model_args, data_args, mixture = make_parser("capo").parse_args_and_config(words)
    return load_data(script_args, data_args, mixture, training_args, model_args)


@pytest.fixture
def two_splits(tmp_path):
    for split, golds in (("train", ["2", "$ east", "4"]), ("test", ["$ west", "6"])):
        rows = [{"prompt": f"{split} {i}", "solution": gold} for i, gold in enumerate(golds)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.filterwarnings("ignore:Dropping")
def test_both_splits_are_cleaned(two_splits):
    rows, held_out = loaded(two_splits, drop_unparsable_gold="true", eval_strategy="steps", eval_steps=1)
    assert rows["solution"][:] == ["$2$", "$4$"] and held_out["solution"][:] == ["$6$"]
    rows, held_out = loaded(two_splits, drop_unparsable_gold="true")
    assert len(rows) == 2 and held_out is None


def test_a_stream_stays_one(two_splits):
    rows, _ = loaded(two_splits, dataset_streaming="true", drop_unparsable_gold="true")
    assert isinstance(rows, IterableDataset)
    assert [row["prompt"][0]["content"] for row in rows] == ["train 0", "train 2"]
