"""Recipe and record of a run: they repeat it, they do not depend on the machine, and they hold no secret."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from tests.helpers import TOKEN, conversations, recipe_options
from trl_capo import cli
from trl_capo.publish.record import RECIPE, RECORD, card_section, fingerprint, git_state, hub_dataset
from trl_capo.recipe import make_parser, resolved_options


def sums(size: int) -> Dataset:
    """Conversations and their gold answers."""
    return conversations([f"{n}+1=" for n in range(size)], solution=[f"${n + 1}$" for n in range(size)])


def recipe_of_mine(folder: Path, model: str, **overrides) -> Path:
    data = folder / "data"
    data.mkdir()
    for split, size in (("train", 16), ("test", 8)):
        sums(size).to_json(data / f"{split}.jsonl")
    options = recipe_options(model, folder / "run", dataset_name=str(data), ref_ppl_mask=False, **overrides)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def parsed(arguments: list[str], method: str) -> list[dict]:
    """All values that a run sees, also those that the configuration derives. Times and places are left out."""
    groups = make_parser(method).parse_args_and_config(arguments)
    return [{f.name: str(getattr(group, f.name, None)) for f in fields(group)} for group in groups]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("capo", []),
        ("capo", ["--tau", "0.3", "--steps_per_generation", "4", "--learning_rate", "2e-6", "--hub_token", TOKEN]),
        ("capo", ["--ref_ppl_quantiles", "0.25", "0.75", "--repack", "false", "--push_to_hub", "true"]),
        ("grpo", ["--generation_batch_size", "32", "--eval_strategy", "no", "--use_peft", "--lora_r", "4"]),
        (
            "cde",
            ["--model_init_kwargs", '{"revision": "x", "token": "' + TOKEN + '"}', "--resume_from_checkpoint", "true"],
        ),
    ],
)
def test_recipe_parses_to_the_same_values(tmp_path, method, arguments):
    written = {"warmup_steps": 3, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "num_iterations": 2}
    written |= {"save_strategy": "no", "beta": "1e-3", "system_prompt": "a: b\n'c'", "max_grad_norm": 1.0}
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**written, "use_cpu": True, "bf16": False}))
    arguments = ["--config", str(mine), "--method", method, *arguments]
    options, left_out = resolved_options(arguments, method, str(mine))
    assert next(iter(options)) == "method" and TOKEN not in json.dumps(options)
    assert not {"max_grad_norm", "resume_from_checkpoint", "hub_token"} & set(options)  # a default, a way, a secret
    assert options.get("model_init_kwargs") in (None, '{"revision": "x"}')
    again = tmp_path / "recipe.yaml"
    again.write_text(yaml.safe_dump(options))

    expected, actual = parsed(arguments, method), parsed(["--config", str(again)], method)
    for before, after in zip(expected, actual, strict=True):
        for name in ("hub_token", "resume_from_checkpoint", "model_init_kwargs"):
            before.pop(name, None), after.pop(name, None)
        assert before == after


def test_environment_of_a_recipe_stays_but_for_its_secrets(tmp_path):
    mine = tmp_path / "mine.yaml"
    secrets = {
        "WANDB_API_KEY": "a",
        "HF_TOKEN": TOKEN,
        "AWS_SECRET_ACCESS_KEY": "b",
        "OPENAI_KEY": "c",
        "DB_PASSWD": "d",
    }
    environment = {"TRL_CAPO_TEST": 1, **secrets}
    mine.write_text(yaml.safe_dump({"tau": 0.3, "env": environment}))
    options, left_out = resolved_options(["--config", str(mine)], "capo", str(mine))
    assert sorted(left_out) == sorted(f"env.{name}" for name in secrets)
    assert options == {"method": "capo", "env": {"TRL_CAPO_TEST": 1}, "tau": 0.3}


def test_run_writes_both_and_a_resumed_one_adds_to_them(tiny_model, tmp_path):
    run = tmp_path / "run"
    mine = recipe_of_mine(
        tmp_path, tiny_model, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=100
    )
    arguments = [f"--config={mine}", "--tau", "0.3", "--hub_token", TOKEN]
    assert cli.main(["train", *arguments]) == 0
    recipe, record = (run / RECIPE).read_text(), json.loads((run / RECORD).read_text())
    assert record["command"] == f"trl-capo train --config {mine} --tau 0.3 --hub_token '***'"
    assert {"python", "trl_capo", "trl", "transformers", "torch", "accelerate", "datasets"} <= set(record["versions"])
    assert record["world_size"] == 1 and record["device"].startswith("cpu") and "resumed" not in record
    config = hashlib.sha256(Path(tiny_model, "config.json").read_bytes()).hexdigest()
    assert record["model"] == {"name": tiny_model, "revision": None, "commit": None, "config_sha256": config}

    data = {"name": str(tmp_path / "data"), "columns": ["prompt", "solution"], "hub": None}
    assert record["data"] == {
        "train": {"split": "train", "rows": 16, "sha256_of_rows": fingerprint(sums(16)), **data},
        "eval": {"split": "test", "rows": 8, "sha256_of_rows": fingerprint(sums(8)), **data},
    }

    arguments += ["--resume_from_checkpoint", "true", "--max_steps", "2"]
    for times in (1, 2):
        assert cli.main(["train", *arguments]) == 0
        after = json.loads((run / RECORD).read_text())
        assert len(after["resumed"]) == times and (run / RECIPE).read_text() == recipe
        assert {name: value for name, value in after.items() if name != "resumed"} == record
    entry = after["resumed"][0]
    assert entry["from"] == "checkpoint-1" and entry["changed_options"] == {"max_steps": 2}
    assert entry["command"].endswith("--resume_from_checkpoint true --max_steps 2")
    assert TOKEN not in (run / RECIPE).read_text() + (run / RECORD).read_text()

    section = card_section(run)
    assert "method: capo" in section and str(tmp_path) not in section and "Resumed 2 times" in section
    assert section in (run / "README.md").read_text()

    (run / RECIPE).rename(tmp_path / RECIPE)
    shutil.rmtree(run)
    assert cli.main(["train", "--config", str(tmp_path / RECIPE)]) == 0
    repeated = json.loads((run / RECORD).read_text())
    assert repeated["data"] == record["data"] and "resumed" not in repeated
    assert yaml.safe_load((run / RECIPE).read_text()) == yaml.safe_load(recipe)


def test_fingerprint_is_of_the_rows_in_order(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{n}+ü="}], "solution": str(n), "x": n / 3} for n in range(2500)]
    literal = "".join(
        json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows
    )
    expected = hashlib.sha256(literal.encode()).hexdigest()
    dataset = Dataset.from_list(rows)
    assert fingerprint(dataset) == expected
    dataset.to_parquet(tmp_path / "rows.parquet")
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert fingerprint(again.select_columns(["x", "solution", "prompt"])) == expected
    assert fingerprint(dataset.select(range(2499, -1, -1))) != expected
    assert fingerprint(dataset.select(range(2499, -1, -1)).select(range(2499, -1, -1))) == expected
    assert fingerprint(dataset.to_iterable_dataset()) is None


def test_bytes_count_by_their_content():
    dataset = Dataset.from_dict({"image": [b"\x00\xff"]})
    digest = hashlib.sha256(b"\x00\xff").hexdigest()
    assert fingerprint(dataset) == hashlib.sha256(b'{"image":"%s"}\n' % digest.encode()).hexdigest()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_commit_and_whether_something_was_changed(tmp_path):
    assert git_state(tmp_path) is None and git_state(tmp_path / "nowhere") is None
    who = ["-c", "user.name=me", "-c", "user.email=me@example.com"]

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "mine.py").write_text("1")
    git("add", "mine.py")
    git("commit", "-m", "first")
    (tmp_path / "other.py").write_text("of an installed package")
    state = git_state(tmp_path, tracked="mine.py")
    assert len(state["commit"]) == 40 and not state["dirty"]
    assert git_state(tmp_path, tracked="other.py") is None
    (tmp_path / "mine.py").write_text("2")
    assert git_state(tmp_path)["dirty"]


def test_without_git(monkeypatch, repository):
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_state(repository) is None


def test_name_on_the_hub(tmp_path):
    assert hub_dataset(tmp_path) is None and card_section(tmp_path) is None
    for hub, name in ((None, None), ([{"id": "me/a"}], "me/a"), ([{"id": "me/a"}, {"id": "me/b"}], None)):
        (tmp_path / RECORD).write_text(json.dumps({"data": {"train": {"hub": hub}}}))
        assert hub_dataset(tmp_path) == name


def test_a_local_copy_is_said_to_be_one(tmp_path, monkeypatch):
    from trl_capo.publish.record import _data_line, _split_record

    monkeypatch.setenv("TRL_CAPO_DATA", str(tmp_path))
    (tmp_path / "math-ai" / "aime25").mkdir(parents=True)
    record = _split_record("test", Dataset.from_dict({"prompt": ["x"]}), {"dataset_name": "aime25"})
    assert record["hub"][0] == {
        "id": "math-ai/aime25",
        "revision": None,
        "local_copy": str(tmp_path / "math-ai" / "aime25"),
    }
    assert "read from a local copy" in _data_line(record)


def test_revision_of_a_dataset_from_the_hub():
    from trl_capo.publish.record import _split_record

    dataset = Dataset.from_dict({"prompt": ["x"]})
    dataset.info.download_checksums = {f"hf://datasets/me/sums@{'c' * 40}/data/train.parquet": {}}
    record = _split_record("train", dataset, {"dataset_name": "me/sums"})
    assert record["hub"] == [{"id": "me/sums", "revision": "c" * 40}] and record["rows"] == 1
    stream = _split_record("train", dataset.to_iterable_dataset(), {"datasets": [{"path": "me/a"}, {"path": "me/b"}]})
    assert stream["rows"] is None and stream["name"] == "me/a, me/b" and "stream" in stream["note"]
    assert [source["id"] for source in stream["hub"]] == ["me/a", "me/b"]
