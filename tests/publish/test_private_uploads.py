"""A model that must be private never reaches a public repository, whatever uploads it; no upload takes too much."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

from tests.helpers import TOKEN, prompt_dataset, recipe_options, save_tiny_model, tiny_trainer
from trl_capo import CAPOTrainer, GroupAdvantageTrainer, cli
from trl_capo.errors import UserError
from trl_capo.publish.hub import wants_private


STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
VISIBLE = {"public": False, "not told": None}


def occupied(hub, visibility: str = "public") -> None:
    hub.repositories["me/mine"], hub.private["me/mine"] = {"README.md": b"x"}, VISIBLE[visibility]


def assert_untouched(hub) -> None:
    assert hub.commits == [] and hub.stored == {}
    assert hub.repositories["me/mine"] == {"README.md": b"x"}


def make_trainer(model, folder, own: bool = True, **options):
    trainer_class = CAPOTrainer if own else GroupAdvantageTrainer
    return tiny_trainer(trainer_class, model, folder, dataset=prompt_dataset(8), ref_ppl_mask=False, **options)


@pytest.mark.parametrize("visibility", VISIBLE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_command_refuses_before_it_trains(hub, tiny_model, tmp_path, capsys, strategy, visibility):
    occupied(hub, visibility)
    pushes = dict(push_to_hub=True, hub_model_id="me/mine", hub_private_repo=True, hub_strategy=strategy)
    options = dict(ref_ppl_mask=False, save_strategy="steps", save_steps=1, **pushes)
    options = recipe_options(tiny_model, tmp_path / "run", **options)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(options))
    assert cli.main(["train", "--config", str(tmp_path / "mine.yaml")]) == 2
    output = capsys.readouterr()
    error = output.err.strip().splitlines()[-1]
    assert "me/mine" in error and "hub_private_repo" in error and "use another name" in error
    assert "Training completed" not in output.out and not list((tmp_path / "run").glob("checkpoint-*"))
    assert_untouched(hub)


@pytest.mark.parametrize("own", [True, False])
def test_constructor_refuses(hub, tiny_model, tmp_path, own):
    occupied(hub)
    with pytest.raises(UserError, match="me/mine exists and is public"):
        make_trainer(tiny_model, tmp_path, own, push_to_hub=True, hub_model_id="me/mine", hub_private_repo=True)
    assert_untouched(hub)


@pytest.mark.parametrize(
    ("configured", "asked", "error"),
    [
        (True, None, "me/mine exists and is public"),
        (True, True, "me/mine exists and is public"),
        (None, True, "me/mine exists and is public"),
        (False, True, "me/mine exists and is public"),
        (True, False, "contradicts hub_private_repo=True"),
    ],
)
def test_push_to_hub_of_a_script(hub, tiny_model, tmp_path, configured, asked, error):
    occupied(hub)
    trainer = make_trainer(tiny_model, tmp_path / "run", hub_model_id="me/mine", hub_private_repo=configured)
    for call in (
        lambda: trainer.push_to_hub(private=asked),
        lambda: trainer.push_to_hub("m", True, None, None, asked),
    ):
        with pytest.raises(UserError, match=error):
            call()
    assert_untouched(hub)


def test_repository_that_became_public(hub, tiny_model, tmp_path, caplog):
    """Private at the start; uploads at checkpoints stop with a line, and every later one is refused."""
    options = dict(push_to_hub=True, hub_model_id="me/mine", hub_private_repo=True, hub_strategy="every_save")
    trainer = make_trainer(tiny_model, tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=2, **options)
    hub.private["me/mine"] = False
    trainer.train()
    trainer._finish_current_push()
    assert trainer.state.global_step == 2 and hub.commits == [] and "me/mine exists and is public" in caplog.text
    for push in (trainer.push_to_hub, trainer.save_model):  # the latter pushes, too
        with pytest.raises(UserError, match="me/mine exists and is public"):
            push()
    assert hub.commits == [] and hub.repositories["me/mine"] == {} and hub.stored == {}


def test_hub_that_does_not_answer_about_a_private_repository(hub, tiny_model, tmp_path):
    occupied(hub)
    hub.failing["info"] = 10**6
    with pytest.raises(OSError, match="could not be created"):
        make_trainer(tiny_model, tmp_path / "a", push_to_hub=True, hub_model_id="me/mine", hub_private_repo=True)
    trainer = make_trainer(tiny_model, tmp_path / "b", hub_model_id="me/mine", hub_private_repo=True)
    trainer.hub_model_id = "me/mine"
    with pytest.raises(HfHubHTTPError, match="503"):
        trainer.push_to_hub()
    assert_untouched(hub)


@pytest.mark.parametrize("visibility", VISIBLE)
@pytest.mark.parametrize("said", ["option", "recipe"])
def test_push_of_a_folder(hub, tmp_path, capsys, visibility, said):
    """Also without --private, if that is what the run's recipe says; --no-private publishes."""
    occupied(hub, visibility)
    folder = tmp_path / "run"
    save_tiny_model(folder)
    if said == "recipe":
        (folder / "recipe.yaml").write_text("method: capo\nhub_private_repo: true\n")
    words = ["push", str(folder), "--repo_id", "me/mine"]
    assert cli.main([*words, "--private"] if said == "option" else words) == 1
    assert "requires a private one" in capsys.readouterr().err
    assert_untouched(hub)
    if said == "recipe":
        assert cli.main([*words[:-1], "me/new"]) == 0 and hub.private["me/new"] is True
        assert cli.main([*words, "--no-private"]) == 0 and "model.safetensors" in hub.repositories["me/mine"]


def test_completions_of_a_private_model(hub, tiny_model, tmp_path):
    hub.datasets["me/texts"] = False
    options = dict(log_completions=True, log_completions_hub_repo="me/texts", hub_private_repo=True)
    with pytest.raises(UserError, match="me/texts exists and is public"):
        make_trainer(tiny_model, tmp_path, **options)
    assert hub.commits == []


def test_what_the_call_and_the_configuration_say():
    told = [(configured, asked) for configured in (True, False, None) for asked in (True, False, None)]
    found = [wants_private(*pair) for pair in told if pair != (True, False)]
    assert found == [True, True, True, False, False, True, False, None]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uploads_during_training_take_what_belongs_there(hub, tiny_model, tmp_path, strategy):
    """A private repository gets the model at a checkpoint, and with two strategies whole checkpoints to resume from.

    Nothing else that lies in the folder goes up, and no upload of the trainer holds the token.
    """
    run = tmp_path / "run"
    options = dict(push_to_hub=True, hub_model_id="me/mine", hub_private_repo=True, hub_strategy=strategy)
    options |= dict(save_strategy="steps", save_steps=1, hub_token=TOKEN)
    trainer = make_trainer(tiny_model, run, **options)
    (run / "sub").mkdir(parents=True)
    for name in ("train.csv", "data.arrow", ".env", "sub/.env", "sub/model.safetensors", "weights.pkl", "mine.pt"):
        (run / name).write_text("mine")
    trainer.train()
    trainer._finish_current_push()
    during = {name for _, names in hub.commits for name in names}
    model = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    model |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {name for name in during if "/" not in name} == (set() if strategy == "end" else model)
    folders = {name.partition("/")[0] for name in during if "/" in name}
    assert (
        folders
        == {
            "end": set(),
            "every_save": set(),
            "checkpoint": {"last-checkpoint"},
            "all_checkpoints": {"checkpoint-1"},
        }[strategy]
    )
    for folder in folders:
        assert {f"{folder}/optimizer.pt", f"{folder}/trainer_state.json", f"{folder}/rng_state.pth"} <= during
    trainer.push_to_hub()
    files = hub.repositories["me/mine"]
    assert {name for name in files if "/" not in name} == model
    assert not any(TOKEN.encode() in content for content in files.values())
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    saved = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in saved)
    assert not [path for path in saved if TOKEN.encode() in path.read_bytes()]
    assert trainer.args.hub_token == TOKEN


def test_failure_in_the_background_is_said(hub, tiny_model, tmp_path, caplog):
    options = dict(push_to_hub=True, hub_model_id="me/mine", hub_strategy="every_save")
    trainer = make_trainer(tiny_model, tmp_path / "run", save_strategy="steps", save_steps=1, **options)
    hub.failing["commit"] = 10**6
    trainer.train()
    trainer._finish_current_push()
    assert "A background upload to the Hub failed" in caplog.text and "503" in caplog.text
    assert Path(tmp_path / "run" / "checkpoint-1" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
