"""Checkpoints that are damaged or of another run, options that change, streams, and weights that are not finite."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.helpers import (
    conversations,
    logged,
    parameters,
    parity_reward,
    prompt_dataset,
    recipe_options,
    tiny_trainer,
)
from trl_capo import CAPOTrainer, GroupAdvantageTrainer, cli
from trl_capo.errors import UserError
from trl_capo.methods.codapo import CoDaPOTrainer
from trl_capo.trainer.checkpoints import RUN_FILE, current_run, find_checkpoint, last_complete_checkpoint
from trl_capo.trainer.manifest import MANIFEST, STATE_FILE, read_checkpoint


SAVES = dict(save_strategy="steps", save_steps=2, max_steps=4, learning_rate=0.01)
FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
    STATE_FILE,
    MANIFEST,
]


def make(model, folder, **options):
    options = {**SAVES, **options}
    if "eval_strategy" in options:
        options["eval_dataset"] = prompt_dataset(8)
    return tiny_trainer(GroupAdvantageTrainer, model, folder, **options)


def equal(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run of four steps with checkpoints 2 and 4, and its last weights."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make(tiny_model, folder)
    trainer.train()
    return folder, parameters(trainer)


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "deleted":
        path.unlink()
    elif kind == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(b"" if kind == "emptied" else content[: len(content) // 2])


def as_an_earlier_version(run: Path) -> None:
    """What version 0.1.0 would have written."""
    (run / RUN_FILE).unlink()
    for folder in run.glob("checkpoint-*"):
        (folder / MANIFEST).unlink()
        state = json.loads((folder / STATE_FILE).read_text())
        state.pop("manifest")
        (folder / STATE_FILE).write_text(json.dumps(state))


# Damage ----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_checkpoint_are_these(run):
    assert sorted(path.name for path in (run / "checkpoint-4").iterdir()) == sorted(FILES)
    listed = json.loads((run / "checkpoint-4" / MANIFEST).read_text())["files"]
    assert sorted(listed) == sorted(set(FILES) - {MANIFEST})


@pytest.mark.parametrize("kind", ["deleted", "emptied", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(run, name, kind):
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    if name == MANIFEST and kind == "flipped":  # one bit of a file's digest
        path = run / "checkpoint-4" / MANIFEST
        text = path.read_text()
        at = text.rindex('"', 0, text.rindex('"')) + 1
        path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    else:
        damage(run / "checkpoint-4" / name, kind)
    search = find_checkpoint(run)
    assert search.newest.folder == run / "checkpoint-2"
    [(skipped, reason)] = search.skipped
    assert skipped == "checkpoint-4" and (name in reason or name == MANIFEST)


@pytest.mark.parametrize(
    ("key", "value"),
    [("world_size", None), ("world_size", "1"), ("files", {}), ("step", 2), ("step", "4"), ("exact", "yes")],
)
def test_a_manifest_that_lacks_something_is_damaged(run, key, value):
    path = run / "checkpoint-4" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    search = find_checkpoint(run)
    assert search.newest.folder.name == "checkpoint-2" and search.lost == ["checkpoint-4"]
    assert MANIFEST in search.lines[0]


def test_a_renamed_checkpoint_is_none_of_that_step(run):
    (run / "checkpoint-4").rename(run / "checkpoint-9")
    search = find_checkpoint(run)
    assert search.newest.folder.name == "checkpoint-2" and "says step 4, but the folder name says 9" in search.lines[0]
    assert read_checkpoint((run / "checkpoint-9").rename(run / "mine-9")).step == 4  # a copy may have any other name


def test_the_run_resumes_exactly_from_the_checkpoint_before(tiny_model, finished, run, capsys):
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = make(tiny_model, run)
    trainer.train(resume_from_checkpoint=True)
    assert "Skipped checkpoint-4: optimizer.pt is missing." in capsys.readouterr().out
    assert equal(parameters(trainer), finished[1])
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4"), "it was written anew"


def test_a_damaged_checkpoint_that_was_asked_for(tiny_model, run):
    damage(run / "checkpoint-4" / "scheduler.pt", "truncated")
    with pytest.raises(UserError, match=r"scheduler.pt has .* bytes instead of .* Use .*checkpoint-2, the newest"):
        make(tiny_model, run).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_a_damaged_best_model_is_not_loaded(tiny_model, run):
    trainer = make(tiny_model, run)
    trainer.state.best_model_checkpoint = str(run / "checkpoint-2")
    trainer._run = current_run(run)
    trainer._load_best_model()
    damage(run / "checkpoint-2" / "model.safetensors", "flipped")
    with pytest.raises(UserError, match="the content of model.safetensors is damaged"):
        trainer._load_best_model()


def test_a_checkpoint_without_an_optimizer_says_that_it_is_not_exact(tiny_model, tmp_path, capsys):
    make(tiny_model, tmp_path, save_only_model=True, max_steps=2).train()
    trainer = make(tiny_model, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2 lacks the optimizer, scheduler or random state" in capsys.readouterr().out
    assert trainer.state.global_step == 4


def test_a_checkpoint_is_complete_before_it_is_pushed(tiny_model, tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append(last_complete_checkpoint(tmp_path) == folder)

    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    trainer = make(tiny_model, tmp_path)
    trainer.args.push_to_hub, trainer.push_in_progress = True, None
    trainer.train()
    assert pushed == [True, True]


# Other runs ------------------------------------------------------------------------------------------------------


def test_a_new_run_does_not_resume_from_the_old_one(tiny_model, run, tmp_path, capsys):
    old = read_checkpoint(run / "checkpoint-4").run
    make(tiny_model, run, learning_rate=1e-4, max_steps=2).train()
    whole, resumed = (
        make(tiny_model, tmp_path / "whole", learning_rate=1e-4),
        make(tiny_model, run, learning_rate=1e-4),
    )
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert "Skipped checkpoint-4: it belongs to another run" in capsys.readouterr().out
    assert equal(parameters(resumed), parameters(whole))
    new = read_checkpoint(run / "checkpoint-4").run
    assert new == read_checkpoint(run / "checkpoint-2").run == current_run(run) and new.id != old.id


def test_a_run_that_resumes_keeps_its_identity(tiny_model, run):
    before = current_run(run)
    make(tiny_model, run, max_steps=6).train(resume_from_checkpoint=True)
    assert before == current_run(run) == read_checkpoint(run / "checkpoint-6").run and before.id


def test_a_branch_does_not_take_what_came_after_it(tiny_model, run):
    """Resumed from checkpoint-2 by name and killed, it continues from there, not from the old checkpoint-4."""
    trainer = make(tiny_model, run, learning_rate=1e-4)
    trainer.training_step = lambda *args, **kwargs: (_ for _ in ()).throw(InterruptedError)
    with pytest.raises(InterruptedError):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_another_runs_checkpoint_by_name(tiny_model, run, tmp_path):
    make(tiny_model, tmp_path / "other", max_steps=6).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert last_complete_checkpoint(tmp_path / "other") == str(tmp_path / "other" / "checkpoint-6")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


def test_checkpoints_without_the_runs_file(run):
    (run / RUN_FILE).unlink()
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    (run / RUN_FILE).write_text("[")
    with pytest.raises(UserError, match="records the run that the folder belongs to, cannot be read"):
        last_complete_checkpoint(run)


@pytest.mark.parametrize("way", ["newest", "folder"])
def test_checkpoints_of_an_earlier_version(tiny_model, finished, run, capsys, way):
    as_an_earlier_version(run)
    shutil.rmtree(run / "checkpoint-4")
    trainer = make(tiny_model, run)
    trainer.train(resume_from_checkpoint=True if way == "newest" else str(run / "checkpoint-2"))
    assert "written by an earlier version" in capsys.readouterr().out
    assert equal(parameters(trainer), finished[1])
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")
    make(tiny_model, run, max_steps=2).train()  # a new run leaves the old one's checkpoints alone
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_a_checkpoint_that_was_killed_while_it_was_written_is_none_of_an_earlier_version(run):
    (run / "checkpoint-4" / MANIFEST).unlink()
    (run / RUN_FILE).unlink()
    search = find_checkpoint(run)
    assert search.newest.folder == run / "checkpoint-2" and search.lost == []
    assert search.skipped == [("checkpoint-4", "it is incomplete")]


@pytest.mark.parametrize("best", [False, True])
def test_a_limit_counts_the_runs_own_checkpoints(tiny_model, run, best):
    """The old run's checkpoint-4 is neither removed nor takes the place of a new one."""
    old, options = read_checkpoint(run / "checkpoint-4").run, {}
    if best:
        options = dict(
            load_best_model_at_end=True, metric_for_best_model="eval_reward", eval_strategy="steps", eval_steps=1
        )
    trainer = make(tiny_model, run, save_steps=1, max_steps=3, save_total_limit=1, **options)
    trainer.train()
    left = {path.name: read_checkpoint(path).run for path in run.glob("checkpoint-*")}
    assert left.pop("checkpoint-4") == old
    kept = Path(trainer.state.best_model_checkpoint).name if best else "checkpoint-3"
    assert {name for name, of in left.items() if of == current_run(run)} == {kept}


def test_files_of_the_old_run_do_not_stay_in_a_new_checkpoint(tiny_model, run):
    (run / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"of a second process")
    make(tiny_model, run, max_steps=2).train()
    assert not (run / "checkpoint-2" / "rng_state_1.pth").exists()


# Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"learning_rate": 1e-4}, {"lr": [1e-4, 1e-4]}),
        ({}, {"weight_decay": 0.5, "adam_beta1": 0.5, "adam_epsilon": 1e-3}, {}),
        ({}, {"lr_scheduler_type": "linear"}, {"lr": [0.01 * 2 / 4, 0.01 * 1 / 4]}),
        ({}, {"warmup_steps": 4, "lr_scheduler_type": "constant_with_warmup"}, {"lr": [0.01 * 2 / 4, 0.01 * 3 / 4]}),
        ({"lr_scheduler_type": "linear"}, {"max_steps": 8}, {"lr": [0.0075, 0.00625]}),
    ],
)
def test_options_of_the_new_command_are_used(tiny_model, tmp_path, capsys, before, after, expected):
    make(tiny_model, tmp_path, max_steps=2, **before).train()
    trainer = make(tiny_model, tmp_path, **{**before, **after})
    trainer.train(resume_from_checkpoint=True)
    group, args = trainer.optimizer.param_groups[0], trainer.args
    assert (group["weight_decay"], group["betas"]) == (args.weight_decay, (args.adam_beta1, args.adam_beta2))
    assert group["eps"] == args.adam_epsilon and trainer.optimizer.param_groups[1]["weight_decay"] == 0
    rates = logged(trainer, "learning_rate")
    assert rates[2:4] == pytest.approx(expected.get("lr", [0.01, 0.01]))
    said = capsys.readouterr().out
    assert all(f"{option} " in said.partition("new values are used from here on: ")[2] for option in after)


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_another_optimizer_is_refused_before_its_state_is_loaded(tiny_model, run, optim):
    with pytest.raises(UserError, match=f"optim={optim}: checkpoint-4 holds the state of optim=adamw_torch"):
        make(tiny_model, run, max_steps=6, optim=optim).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_options_that_did_not_change_resume_bit_for_bit(tiny_model, tmp_path, schedule):
    options = dict(lr_scheduler_type=schedule, warmup_steps=1, weight_decay=0.1)
    whole = make(tiny_model, tmp_path, **options)
    whole.train()
    again = make(tiny_model, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(parameters(whole), parameters(again))
    assert logged(whole, "learning_rate") == logged(again, "learning_rate")


def test_intervals_of_the_new_command_are_used(tiny_model, run):
    make(tiny_model, run, max_steps=6, save_steps=1).train(resume_from_checkpoint=True)
    assert (run / "checkpoint-5").exists()


# Streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [2, 3, 4])
def test_a_stream_resumes_in_a_later_pass(tiny_model, tmp_path, killed_after):
    """Three prompts, two a generation: every pass over the stream has one generation."""

    def rows():
        for i in range(5 if killed_after == 3 else 3):
            yield {"prompt": [{"role": "user", "content": f"{i}+2="}]}

    def train(folder, steps, resume=None):
        seen = []

        def reward(prompts, completion_ids, **kwargs):
            seen.append([prompt[0]["content"] for prompt in prompts][::4])
            return parity_reward(completion_ids)

        stream = IterableDataset.from_generator(rows)
        options = dict(dataset=stream, reward=reward, max_steps=steps, save_steps=1)
        trainer = make(tiny_model, tmp_path / folder, **options)
        trainer.train(resume_from_checkpoint=resume)
        return seen, parameters(trainer)

    seen, expected = train("whole", 7)
    train("killed", killed_after)
    resumed, actual = train("killed", 7, True)
    assert resumed == seen[killed_after:]
    assert equal(actual, expected)


def test_a_training_without_a_step_fails(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, dataset=conversations(["1+2="]).to_iterable_dataset())
    with pytest.raises(UserError, match="no optimizer step was made"):
        trainer.train()


# Weights that are not finite -------------------------------------------------------------------------------------


class SpoilWeights(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.model.norm.weight[3] = math.inf


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_training(tiny_model, tmp_path, value, max_grad_norm):
    trainer = make(tiny_model, tmp_path, max_grad_norm=max_grad_norm)
    step = trainer.training_step

    def spoil(model, *args, **kwargs):
        loss = step(model, *args, **kwargs)
        if trainer.state.global_step == 2:
            next(model.parameters()).grad[0, 0] = value
        return loss

    trainer.training_step = spoil
    with pytest.raises(UserError, match=r"step 3: the gradient norm is (nan|inf).*learning_rate.*checkpoint-2"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_skipped_step_of_float16_is_no_fault(tiny_model, tmp_path):
    from types import SimpleNamespace

    trainer = make(tiny_model, tmp_path)
    trainer.args.fp16 = True
    trainer.accelerator.scaler = scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 1024.0)
    trainer._check_gradient_norm(torch.tensor(math.inf))
    scaler.get_scale = lambda: 0.5
    with pytest.raises(UserError, match="step 1: the gradient norm is inf.*There is no earlier checkpoint"):
        trainer._check_gradient_norm(torch.tensor(math.inf))


@pytest.mark.parametrize("step", [3, 4])
def test_weights_that_are_not_finite_are_not_saved(tiny_model, tmp_path, step):
    """Spoilt in step 3 they are found before completions are sampled, in the last step before the checkpoint."""
    trainer = make(tiny_model, tmp_path)
    trainer.add_callback(SpoilWeights(step))
    with pytest.raises(
        UserError, match=f"step {step}: model.norm.weight .*The last finite checkpoint is .*checkpoint-2"
    ):
        trainer.train()
    with pytest.raises(UserError, match="model.norm.weight has values that are not finite"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "checkpoint-4").exists() and not (tmp_path / "model").exists()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_weights_that_the_last_step_spoils_without_a_checkpoint(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, save_strategy="no", max_steps=1)
    trainer.add_callback(SpoilWeights(1))
    with pytest.raises(UserError, match="step 1: model.norm.weight has values that are not finite"):
        trainer.train()


def test_finite_weights_that_cannot_be_sampled_from(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, learning_rate=1e30, save_steps=1)
    with pytest.raises(UserError, match=r"step \d: .*learning_rate \(now 1e\+30\).*checkpoint-1"):
        trainer.train()


def test_weights_are_read_once_a_step(tiny_model, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr("trl_capo.trainer.finite.first_not_finite", reads.append)
    trainer = make(tiny_model, tmp_path, save_steps=1, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(reads) == 3  # before the first step and after each
    trainer.evaluate()
    assert len(reads) == 3
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    trainer.save_model(str(tmp_path / "model"))
    assert len(reads) == 4


def test_only_the_main_process_looks_for_a_checkpoint(tiny_model, tmp_path, monkeypatch):
    def look(folder):
        raise AssertionError(folder)

    trainer = make(tiny_model, tmp_path)
    monkeypatch.setattr("trl_capo.trainer.finite.last_complete_checkpoint", look)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = math.inf
    with pytest.raises(UserError, match="The main process names the last finite checkpoint"):
        trainer.save_model(str(tmp_path / "model"))


# State files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readers(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    estimates = dict(tau_unit="gap", ref_ppl_quantiles=[0.25, 0.75], ref_ppl_quantile_samples=32)
    return {
        "capo": tiny_trainer(CAPOTrainer, tiny_model, folder, **estimates),
        "codapo": tiny_trainer(CoDaPOTrainer, tiny_model, folder),
    }


GOOD = {
    "capo": {"tau": 0.3, "gaps": [0.5], "ref_ppl_low": 1.1, "ref_ppl_high": 2.0, "ref_ppl_correct": [1.2]},
    "codapo": {"replayed": [0, 1]},
}


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        *(("capo", "tau", value) for value in (math.nan, math.inf, 0, -1, "0.3", True, [0.3])),
        *(("capo", "gaps", value) for value in ([math.nan], [0.1, math.inf], [-0.1], ["1"], [None], "many", 3, None)),
        *(("capo", key, math.nan) for key in ("ref_ppl_low", "ref_ppl_high")),
        *(("capo", key, [value]) for key in ("ref_ppl_correct", "ref_ppl_wrong") for value in (math.nan, -2, "x")),
        *(("codapo", "replayed", value) for value in ([-1], [2], [0.5], ["0"], [True], [], 1, "all")),
    ],
)
def test_a_state_file_is_checked(readers, tmp_path, method, key, value):
    path = tmp_path / STATE_FILE
    path.write_text(json.dumps(GOOD[method]))
    readers[method]._load_state_file(str(tmp_path))
    path.write_text(json.dumps({**GOOD[method], key: value}))
    with pytest.raises(UserError) as error:
        readers[method]._load_state_file(str(tmp_path))
    bad = value[-1] if isinstance(value, list) and value else value
    assert str(path) in str(error.value) and key in str(error.value) and repr(bad) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_state_file_that_is_none(readers, tmp_path, text):
    (tmp_path / STATE_FILE).write_text(text)
    with pytest.raises(UserError, match=STATE_FILE):
        readers["capo"]._load_state_file(str(tmp_path))


# The command -----------------------------------------------------------------------------------------------------


def command(model, folder, **options):
    options = recipe_options(model, folder, method="grpo", **{**SAVES, **options})
    options["reward_funcs"] = "tests.helpers.parity_reward"
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def test_nothing_to_resume_yet(tiny_model, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)  # killed while it wrote its first one
    words = command(tiny_model, tmp_path / "run", resume_from_checkpoint=True, max_steps=1, save_steps=1)
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "Skipped checkpoint-2: it is incomplete." in said
    assert "There is no checkpoint of this run" in said and "training starts from scratch" in said


def test_only_damaged_checkpoints_are_not_replaced(tiny_model, run, capsys):
    for folder in run.glob("checkpoint-*"):
        damage(folder / "model.safetensors", "flipped")
    assert cli.main(command(tiny_model, run, resume_from_checkpoint=True)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "every checkpoint of the run" in error and "model.safetensors is damaged" in error
    assert (run / "checkpoint-4" / MANIFEST).exists()


def test_the_command_continues_the_new_run(tiny_model, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(command(tiny_model, folder)) == 0
    assert cli.main(command(tiny_model, folder, max_steps=2, learning_rate=1e-3)) == 0
    assert "which has checkpoints of an earlier run" in capsys.readouterr().out
    words = command(tiny_model, folder, learning_rate=1e-4, resume_from_checkpoint=True)
    assert cli.main(words) == 0
    assert f"Resuming from {folder / 'checkpoint-2'}" in capsys.readouterr().out
    record = json.loads((folder / "reproduction.json").read_text())
    assert record["resumed"][0]["changed_options"] == {"max_steps": 4, "learning_rate": 1e-4}
    rates = [entry.get("learning_rate") for entry in read_history(folder / "checkpoint-4")]
    assert rates == [1e-3, 1e-3, 1e-4, 1e-4]
    first, second = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    assert 0 < max((first[name] - second[name]).abs().max() for name in first) < 3e-4


def read_history(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
