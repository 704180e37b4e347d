"""Uploads through the real huggingface_hub client, to a Hub on 127.0.0.1 that fails when it is told to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.fake_hub import running_hub
from tests.helpers import config_kwargs, parity_reward, prompt_dataset
from trl_capo import cli
from trl_capo.publish.hub import push_command


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A model's folder as a run leaves it, with a report in it and things that do not belong on the Hub."""
    folder = tmp_path / "capo"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# Mine\n\nText.\n")
    (folder / "calibration.md").write_text("### maths\n\n| AUC |\n|---|\n| 0.7 |\n\n![figures](_maths.png)\n")
    (folder / "_maths.png").write_bytes(b"\x89PNG figure")
    recipe = {"method": "capo", "output_dir": str(folder), "dataset_name": "me/sums"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    data = {"name": "me/sums", "split": "train", "rows": 3, "sha256_of_rows": "ab", "hub": [{"id": "me/sums"}]}
    data["hub"][0]["revision"] = "c" * 40
    record = {
        "versions": {"python": "3.11.0", "trl_capo": "0.1.0"},
        "git": {"package": None, "working_directory": None},
        "world_size": 1,
        "device": "cpu (x86_64)",
        "model": {"name": "/home/me/base", "revision": None, "commit": None, "config_sha256": "ef"},
        "data": {"train": data},
    }
    (folder / "reproduction.json").write_text(json.dumps(record))
    left = (
        "completions/completions_00001.parquet",
        "runs/Nov22_host/events.out.tfevents.1.host",
        "slurm.out",
        "m.jsonl",
    )
    for name in (
        "checkpoint-3/model.safetensors",
        "checkpoint-3/optimizer.pt",
        "training_args.bin",
        "optimizer.pt",
        *left,
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"not for the Hub")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def belongs(name: str) -> bool:
    return not name.startswith(("checkpoint", "optimizer", "training_args", "completions", "runs", "slurm", "m.jsonl"))


def assert_arrived(files: dict[str, bytes], folder: Path) -> None:
    """Everything that belongs on the Hub is there, byte for byte, and nothing else. The card may say more."""
    expected = {name: content for name, content in contents(folder).items() if belongs(name)}
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"} <= set(files)
    assert set(files) == {*expected, "README.md"}
    for name in set(files) - {"README.md"}:
        assert files[name] == expected[name], name


@pytest.mark.parametrize("private", [False, True])
def test_command_in_a_process_of_its_own(model, private):
    """Nothing is patched: HF_ENDPOINT and the token are in the environment, as a user's are."""
    before = contents(model)
    with running_hub() as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_of_this_test"}
        words = push_command("capo", "tiny", private).split()[1:]
        command = [sys.executable, "-m", "trl_capo.cli", *words]
        path = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
        environment["PYTHONPATH"] = path
        result = subprocess.run(
            command, cwd=model.parent, env=environment, capture_output=True, text=True, timeout=120
        )
    assert result.returncode == 0, result.stderr
    assert f"{hub.endpoint}/me/tiny" in result.stdout
    assert hub.private == {"me/tiny": private}
    assert_arrived(hub.repositories["me/tiny"], model)
    assert contents(model) == before


def test_card_has_report_recipe_and_data(hub, model):
    assert cli.main(["push", str(model), "--repo_id", "me/tiny"]) == 0
    card = hub.repositories["me/tiny"]["README.md"].decode()
    assert "# Mine\n\nText.\n" in card and "| 0.7 |" in card and "method: capo" in card
    assert hub.repositories["me/tiny"]["_maths.png"] == b"\x89PNG figure"  # the card refers to it
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "transformers", "datasets": ["me/sums"]}
    assert "[me/sums](https://huggingface.co/datasets/me/sums)" in card and "c" * 40 in card
    assert str(model.parent) not in card and "/home/me" not in card and "output_dir: capo" in card

    assert cli.main(["push", str(model), "--repo_id", "me/tiny", "--dataset", "me/others"]) == 0
    card = hub.repositories["me/tiny"]["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["me/others"]


def test_card_is_made_where_there_is_none(hub, tiny_model):
    assert cli.main(["push", tiny_model, "--repo_id", "bare"]) == 0
    card = hub.repositories["me/bare"]["README.md"].decode()
    assert "# bare" in card and yaml.safe_load(card.split("---")[1])["tags"] == ["trl", "trl-capo"]


def test_a_second_time_only_what_is_missing_is_sent(hub, model, capsys):
    """The client compares content hashes: it neither sends nor commits what the repository has."""
    command = ["push", str(model), "--repo_id", "tiny"]
    assert cli.main(command) == 0
    once = dict(hub.requests)
    assert once["store"] == 2 and once["commit"] == 1  # the weights and the figure; the rest is in the commit
    assert cli.main(command) == 0
    assert (hub.requests["store"], hub.requests["commit"]) == (2, 1)

    (model / "calibration.md").write_text("new")
    del hub.repositories["me/tiny"]["model.safetensors"]
    assert cli.main(command) == 0
    assert (hub.requests["store"], hub.requests["commit"]) == (2, 2)  # the storage still had the weights
    assert_arrived(hub.repositories["me/tiny"], model)


@pytest.mark.parametrize("kind", ["create", "validate", "store", "commit"])
def test_busy_hub_is_asked_again(hub, model, capsys, kind):
    hub.failing[kind] = 2
    assert cli.main(["push", str(model), "--repo_id", "tiny"]) == 0
    assert_arrived(hub.repositories["me/tiny"], model)
    output = capsys.readouterr()
    if kind == "store":
        assert "The upload failed" not in output.out  # the client itself tried again
    else:
        assert hub.waits == [5, 20]
        shown = [line for line in output.out.splitlines() if line.startswith("⚠️ The upload failed: ")]
        assert [line.rpartition(". ")[2] for line in shown] == ["Trying again in 5 s.", "Trying again in 20 s."]
        assert all("503" in line for line in shown)


def test_hub_that_stays_away(hub, model, capsys):
    """One line with the command to go on with; that command then uploads everything."""
    before = contents(model)
    hub.failing["commit"] = 10**6
    arguments = ["push", str(model), "--repo_id", "me/tiny", "--private"]
    assert cli.main(arguments) == 1
    output = capsys.readouterr()
    error = [line for line in output.err.splitlines() if "error:" in line]
    assert len(error) == 1 and "Traceback" not in output.err
    assert error[0].startswith(f"trl-capo push: error: {model} could not be pushed to me/tiny: ")
    assert "503" in error[0] and f"Nothing is lost, the model is in {model}." in error[0]
    command = f"trl-capo push {model} --repo_id me/tiny --private"
    assert error[0].endswith(f"To go on: {command}")
    assert hub.waits == [5, 20, 60] and hub.repositories["me/tiny"] == {}
    assert contents(model) == before

    hub.failing.clear()
    assert cli.main(command.split()[1:]) == 0
    assert hub.private == {"me/tiny": True}
    assert_arrived(hub.repositories["me/tiny"], model)
    assert hub.requests["store"] == 2  # sent once, before the commit failed
    assert contents(model) == before


def test_no_hub_at_all(hub, model, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert cli.main(["push", str(model), "--repo_id", "me/tiny"]) == 1
    assert "Connection refused" in capsys.readouterr().err
    assert hub.waits == [5, 20, 60]


@pytest.mark.parametrize(("status", "advice"), [(401, "hf auth login"), (403, "hf auth login"), (400, "out of order")])
def test_refusal_is_not_repeated(hub, model, capsys, status, advice):
    hub.status = status
    hub.failing["all"] = 10**6
    assert cli.main(["push", str(model), "--repo_id", "me/tiny"]) == 1
    assert advice in capsys.readouterr().err
    assert hub.waits == []


def test_a_bug_is_not_taken_for_a_busy_hub(hub, model, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", broken)
    assert cli.main(["push", str(model), "--repo_id", "tiny"]) == 1
    assert hub.waits == [] and "a bug" in capsys.readouterr().err

    def upload_xet_files(*args, **kwargs):
        raise RuntimeError("Data processing error")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", upload_xet_files)
    assert cli.main(["push", str(model), "--repo_id", "tiny"]) == 1
    assert hub.waits == [5, 20, 60]


def test_private_model_does_not_go_into_a_public_repository(hub, model, capsys):
    hub.repositories["me/tiny"], hub.private["me/tiny"] = {}, False
    assert cli.main(["push", str(model), "--repo_id", "me/tiny", "--private"]) == 1
    assert "me/tiny exists and is public" in capsys.readouterr().err
    assert hub.repositories["me/tiny"] == {} and hub.stored == {}


def test_checkpoint_gets_the_recipe_of_its_run(hub, model, tiny_model):
    checkpoint = model / "checkpoint-7"
    shutil.copytree(tiny_model, checkpoint)
    shutil.copytree(tiny_model, checkpoint / "reference")
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    (checkpoint / "trainer_state.json").write_text("{}")
    assert cli.main(["push", str(checkpoint), "--repo_id", "step7"]) == 0
    files = hub.repositories["me/step7"]
    assert files["recipe.yaml"] == (model / "recipe.yaml").read_bytes()
    assert "method: capo" in files["README.md"].decode() and "0.7" not in files["README.md"].decode()
    assert set(files) == {*contents(Path(tiny_model)), "README.md", "recipe.yaml", "reproduction.json"}


def test_folder_without_a_model(hub, tmp_path, capsys):
    assert cli.main(["push", str(tmp_path / "nowhere"), "--repo_id", "x"]) == 2
    (tmp_path / "checkpoint-5").mkdir()
    assert cli.main(["push", str(tmp_path), "--repo_id", "x"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "nowhere is no folder" in first
    assert "holds no weights" in second and str(tmp_path / "checkpoint-5") in second


# Training --------------------------------------------------------------------------------------------------------


def write_recipe(folder: Path, model: str, **overrides) -> str:
    options = {"model_name_or_path": model, "dataset_name": "arithmetic", "ref_ppl_mask": False}
    options |= {"reward_funcs": ["tests.helpers.parity_reward"]}
    options |= config_kwargs(folder / "run", **{"push_to_hub": True, "hub_model_id": "tiny-capo", **overrides})
    path = folder / "recipe-of-mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return str(path)


@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_from_a_recipe(hub, tiny_model, tmp_path, where):
    token = "hf_" + 20 * "x"
    recipe = write_recipe(tmp_path, tiny_model, hub_private_repo=where == "recipe", hub_token=token)
    options = [] if where == "recipe" else ["--hub_private_repo", "true"]
    assert cli.main(["train", "--config", recipe, *options]) == 0
    files = hub.repositories["me/tiny-capo"]
    assert hub.private == {"me/tiny-capo": True} and hub.requests["commit"] == 1
    assert_arrived(files, tmp_path / "run")
    assert files["README.md"] == (tmp_path / "run" / "README.md").read_bytes()
    card = files["README.md"].decode()
    assert "2604.12632" in card and "method: capo" in card and str(tmp_path) not in card and "None]" not in card
    assert not any(token.encode() in content for content in contents(tmp_path / "run").values())


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
    assert len(errors) == 1 and errors[0].endswith(f"To go on: {command}") and "Traceback" not in output.err
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
    from trl_capo import CAPOConfig, CAPOTrainer

    token = "hf_" + 20 * "x"
    options = dict(hub_model_id="tiny-capo", hub_private_repo=True, hub_token=token, ref_ppl_mask=False)
    config = CAPOConfig(**config_kwargs(tmp_path / "run", **options))
    trainer = CAPOTrainer(tiny_model, parity_reward, config, prompt_dataset())
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
    assert "training_args.bin" not in files and not any(token.encode() in content for content in files.values())
