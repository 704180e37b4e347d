"""An evaluation's folder: which settings it remembers, and which parts are still to be sampled."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from tests.evaluation.test_samples import rows
from trl_capo.errors import UserError
from trl_capo.evaluation import run
from trl_capo.evaluation.identity import check_unchanged, read_settings
from trl_capo.evaluation.samples import write_part


@pytest.mark.parametrize(
    "file, change",
    [
        ("chat_template.jinja", lambda text: "9*9*" + text),
        ("generation_config.json", lambda text: json.dumps({**json.loads(text), "eos_token_id": [1, 5, 6]})),
        ("tokenizer_config.json", lambda text: json.dumps({**json.loads(text), "eos_token": ";"})),
        ("config.json", lambda text: json.dumps({**json.loads(text), "rms_norm_eps": 0.1})),
        ("tokenizer.json", lambda text: text + " "),
        ("modeling_own.py", lambda text: "changed = True"),
    ],
)
def test_whatever_decides_the_samples_is_recorded(tiny_model, tmp_path, capsys, file, change):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    known = run.settings_of(str(model), {}, {"max_new_tokens": None})
    run.remember(tmp_path / "out", known, print)
    write_part(tmp_path / "out", "b", 0, rows())
    beside = ("notes.txt", "lm_eval_results.json", "trl_capo_run.json", "model.safetensors.index.json", "plot.py")
    for name in ("README.md", "trainer_state.json", "abstention.json", "reproduction.json", "figure.png", *beside):
        (model / name).write_text("written beside the model")
    run.remember(tmp_path / "out", run.settings_of(str(model), {}, {"max_new_tokens": None}), print)
    path = model / file
    path.write_text(change(path.read_text() if path.exists() else ""))
    with pytest.raises(ValueError, match=f"already contains an evaluation with {file}="):
        run.remember(tmp_path / "out", run.settings_of(str(model), {}, {"max_new_tokens": None}), print)
    # A folder of an earlier version knows none of these, and says so.
    old = {name: value for name, value in known.items() if name in ("model", "weights", "questions")}
    (tmp_path / "out" / "settings.json").write_text(json.dumps(old))
    run.remember(tmp_path / "out", run.settings_of(str(model), {}, {"max_new_tokens": None}), print)
    assert "comes from an earlier version" in capsys.readouterr().out
    with pytest.raises(ValueError, match="with chat_template_kwargs="):
        with_kwargs = {"max_new_tokens": None, "chat_template_kwargs": {"a": 1}}
        run.remember(tmp_path / "out", run.settings_of(str(model), {}, with_kwargs), print)
    (tmp_path / "out" / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not contain the settings of an evaluation"):
        run.remember(tmp_path / "out", known, print)


def test_weights_are_those_of_their_content(tiny_model, tmp_path):
    model, folder = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "out"
    weights = model / "model.safetensors"

    def evaluate_again():
        run.remember(folder, run.settings_of(str(model), {}, {"max_new_tokens": None}), print)
        check_unchanged(str(model), read_settings(folder))

    evaluate_again()
    write_part(folder, "b", 0, rows())
    os.utime(weights, (1, 1))
    evaluate_again()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="with weights="):
        evaluate_again()
    with pytest.raises(UserError, match="has changed since the samples were drawn .weights"):
        check_unchanged(str(model), read_settings(folder))
    # Settings that recorded no content go by size and time alone.
    old = {**read_settings(folder), "weights": run.settings_of(str(model), {}, {})["weights"]}
    old.pop("weights_content")
    (folder / "settings.json").write_text(json.dumps(old))
    evaluate_again()


def test_every_process_gets_parts_and_gaps_are_filled(tmp_path):
    parts = run._missing_parts(tmp_path, {"b": range(30)}, 2, SimpleNamespace(num_processes=8))
    assert parts == [("b", start, min(start + 4, 30)) for start in range(0, 30, 4)]
    write_part(tmp_path, "b", 4, rows("b", range(4, 8), 2))
    write_part(tmp_path, "b", 20, rows("b", range(20, 21), 2))
    parts = run._missing_parts(tmp_path, {"b": range(30)}, 2, SimpleNamespace(num_processes=2))
    assert parts == [("b", 0, 4), ("b", 8, 20), ("b", 21, 30)]
    assert run._missing_parts(tmp_path, {"b": range(4, 8)}, 2, SimpleNamespace(num_processes=1))[0] == ("b", 0, 4)


def test_folders_have_the_names_that_were_chosen():
    assert run.folder_names(["runs/a/model", "runs/b/model"]) == ["model", "model-2"]
    assert run.folder_names(["runs/a/model", "runs/b/model"], ["a", "b"]) == ["a", "b"]
    for names, message in (
        (["a"], "needs one name for each of the 2 models, got 1"),
        (["a", "A"], "become the same file"),
    ):
        with pytest.raises(ValueError, match=message):
            run.folder_names(["runs/a/model", "runs/b/model"], names)
