"""Uploads through the real huggingface_hub client, to a Hub on 127.0.0.1 that fails when it is told to."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.publish.pushed import assert_arrived, contents, save_run
from trl_capo import cli


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return save_run(tiny_model, tmp_path / "capo")


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
        assert [line.rpartition(". ")[2] for line in shown] == ["Retrying in 5 s.", "Retrying in 20 s."]
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
    assert error[0].endswith(f"To retry: {command}")
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
    assert "nowhere is not a folder" in first
    assert "contains no weights" in second and str(tmp_path / "checkpoint-5") in second
