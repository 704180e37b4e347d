"""A training that pushes: from a recipe, from a script, and with a Hub that goes away."""

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers import TOKEN, recipe_options, tiny_trainer
from tests.publish.pushed import assert_arrived, contents
from trl_capo import CAPOTrainer, cli


def write_recipe(folder: Path, model: str, **overrides) -> str:
    pushes = {"push_to_hub": True, "hub_model_id": "tiny-capo"}
    options = recipe_options(model, folder / "run", ref_ppl_mask=False, **{**pushes, **overrides})
    path = folder / "recipe-of-mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_from_a_recipe(hub, tiny_model, tmp_path, where):
    recipe = write_recipe(tmp_path, tiny_model, hub_private_repo=where == "recipe", hub_token=TOKEN)
    options = [] if where == "recipe" else ["--hub_private_repo", "true"]
    assert cli.main(["train", "--config", recipe, *options]) == 0
    files = hub.repositories["me/tiny-capo"]
    assert hub.private == {"me/tiny-capo": True} and hub.requests["commit"] == 1
    assert_arrived(files, tmp_path / "run")
    assert files["README.md"] == (tmp_path / "run" / "README.md").read_bytes()
    card = files["README.md"].decode()
    assert "2604.12632" in card and "method: capo" in card and str(tmp_path) not in card and "None]" not in card
    assert not any(TOKEN.encode() in content for content in contents(tmp_path / "run").values())


def test_hub_that_goes_away_during_training(hub, tiny_model, tmp_path, capsys):
    """Training goes on, the model is saved, and the command of the error message uploads it."""
    hub.failing.update({"preupload": 10**6, "validate": 10**6})
    recipe = write_recipe(tmp_path, tiny_model, max_steps=2, save_strategy="steps", save_steps=1)
    assert cli.main(["train", "--config", recipe]) == 1
    output = capsys.readouterr()
    run = tmp_path / "run"
    assert "✅ Training completed." in output.out and "💾 Model saved" in output.out
    assert json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    command = f"trl-capo push {run} --repo_id me/tiny-capo"
    errors = [line for line in output.err.splitlines() if line.startswith("trl-capo train: error:")]
    assert len(errors) == 1 and errors[0].endswith(f"To retry: {command}") and "Traceback" not in output.err
    assert hub.repositories["me/tiny-capo"] == {}
    assert 10**6 - hub.failing["validate"] > 4  # four attempts at the end; so there were some in the middle

    hub.failing.clear()
    assert cli.main(command.split()[1:]) == 0
    assert_arrived(hub.repositories["me/tiny-capo"], run)


def test_hub_that_is_away_before_training(hub, tiny_model, tmp_path, capsys):
    hub.failing["create"] = 10**6
    assert cli.main(["train", "--config", write_recipe(tmp_path, tiny_model)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the repository could not be created" in error
    assert error.endswith(f"trl-capo push {tmp_path / 'run'} --repo_id tiny-capo")


def test_from_a_script(hub, tiny_model, tmp_path):
    options = dict(hub_model_id="tiny-capo", hub_private_repo=True, hub_token=TOKEN, ref_ppl_mask=False)
    trainer = tiny_trainer(CAPOTrainer, tiny_model, tmp_path / "run", **options)
    trainer.train()
    hub.failing["commit"] = 10**6
    with pytest.raises(OSError, match="503") as failure:
        trainer.push_to_hub()
    command = f"trl-capo push {tmp_path / 'run'} --repo_id me/tiny-capo --private"
    assert failure.value.__notes__ == [f"Nothing is lost: the model is in {tmp_path / 'run'}. To upload it: {command}"]
    hub.failing.clear()
    trainer.push_to_hub()
    files = hub.repositories["me/tiny-capo"]
    assert hub.private == {"me/tiny-capo": True}
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert "2604.12632" in files["README.md"].decode()
    assert "training_args.bin" not in files and not any(TOKEN.encode() in content for content in files.values())
