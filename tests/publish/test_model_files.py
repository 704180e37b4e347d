"""What a model repository gets: a list of names. Everything else, whatever it is called, stays here."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_capo import cli
from trl_capo.publish.model_files import files_to_upload, left_behind
from trl_capo.publish.push import model_files


NEEDED = (
    "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json config.json "
    "generation_config.json adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json "
    "special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model spiece.model "
    "sentencepiece.bpe.model source.spm qwen.tiktoken preprocessor_config.json processor_config.json "
    "chat_template.jinja additional_chat_templates/tool_use.jinja README.md LICENSE LICENSE.txt recipe.yaml "
    "reproduction.json calibration.md abstention.json tokenizer.model.v3 tokenizer.model.v7m1 NOTICE NOTICE.md "
    "modeling_mine.py configuration_mine.py layers_mine.py tokenization_mine.py"
).split()
NOT_NEEDED = (
    "train.csv train.json data.arrow data.jsonl data.parquet dataset_info.json state.json .env .gitattributes "
    "sub/.env sub/.git/config .git/config .ssh/id_rsa id_rsa secrets.yaml config.yaml notes.md notes.txt "
    "events.out.tfevents.1.h logs/events.out.tfevents.1.h wandb/run-1/files/config.yaml "
    "wandb/run-1/model.safetensors sub/optimizer.pt optimizer.pt optimizer.bin scheduler.pt rng_state.pth "
    "scaler.pt training_args.bin sub/training_args.bin pytorch_model.bin model.pkl model.pt model.pth "
    "weights.ckpt reward.joblib trainer_state.json trl_capo_state.json all_results.json "
    "checkpoint-3/model.safetensors checkpoint-3/README.md checkpoint-3/adapter_config.json "
    "global_step3/mp_rank_00_model_states.pt ref/adapter_config.json ref/adapter_model.safetensors samples.npz "
    "reference/model.safetensors completions/completions_00001.parquet slurm-1.out run.log train.py my.ipynb "
    "photo.png curve.svg README.md.bak model.safetensors.123.partial sub/config.json sub/model.safetensors "
    "additional_chat_templates/x.txt zero_to_fp32.py settings.json LICENSE.key LICENSE.pkl LICENSE_KEYS.json "
    "NOTICE.env tokenizer.model.env tokenizer.model.bak tokenizer.modelcache.pkl tokenizer.model.v3.pkl "
    "optimizer.safetensors scheduler.safetensors train.safetensors data.safetensors model_data.safetensors "
    "processing_data.py modeling_secrets.py modeling_other.py sentencepiece.keys.model mine.spm "
    "data.safetensors.index.json"
).split()
CONTENT = {
    "config.json": json.dumps(
        {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": "me/x--modeling_other.Other"}}
    ),
    "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}),
    "modeling_mine.py": "import torch\nfrom .configuration_mine import Config\nfrom . import layers_mine\n",
}


def test_the_list(tmp_path, capsys):
    for name in (*NEEDED, *NOT_NEEDED):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CONTENT.get(name, "{}"))
    assert set(model_files(tmp_path / "run")) == set(NEEDED)
    uploaded = files_to_upload(tmp_path / "run")
    rest = left_behind(tmp_path / "run", uploaded)
    assert set(rest) == {
        name.partition("/")[0] + "/" * ("/" in name) for name in NOT_NEEDED if not name.startswith("additional")
    }


def test_weights_are_those_of_the_index(tmp_path):
    """Whatever they are called; a broken index names none."""
    for name in ("part_a.safetensors", "part_b.safetensors", "keys.pem"):
        (tmp_path / name).write_bytes(b"x")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part_a.safetensors", "b": "keys.pem", "c": "../x.safetensors"}}))
    assert set(files_to_upload(tmp_path)) == {index.name, "part_a.safetensors"}
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        assert files_to_upload(tmp_path) == [index.name]


def test_what_stays_is_said_in_a_line(hub, tiny_model, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(tiny_model, folder)
    words = ["push", str(folder), "--repo_id", "me/x"]
    assert cli.main(words) == 0
    assert "Not uploaded" not in capsys.readouterr().out
    for number in range(9):
        (folder / f"{number}.csv").write_text("1")
    (folder / ".env").write_text("A=1")
    assert cli.main(words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not uploaded")]
    assert len(said) == 1 and ".env, 0.csv, 1.csv" in said[0] and said[0].endswith("and 2 more.")
    assert set(hub.repositories["me/x"]) == {
        *(path.name for path in (tmp_path.parent / tiny_model).iterdir()),
        "README.md",
    }


def test_weights_in_a_pickle(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert cli.main(["push", str(tmp_path), "--repo_id", "me/x"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "Pickles are not uploaded (pytorch_model.bin)" in error and "save_pretrained" in error


def test_adapters(tiny_model, tmp_path):
    """The default one lies beside the card, one of another name in its folder; a reference stays here."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM"))
    model.add_adapter("ref", LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / "ref" / "adapter_model.safetensors").exists()
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(files_to_upload(tmp_path / "run")) == expected
    named = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM"), adapter_name="mine"
    )
    named.save_pretrained(tmp_path / "named")
    expected = {"README.md", "mine/adapter_config.json", "mine/adapter_model.safetensors"}
    assert set(files_to_upload(tmp_path / "named")) == expected


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "/etc/secret.png",
        "sub/secret.png",
        "..\\secret.png",
        "./secret.png",
        "%2e%2e/secret.png",
        "..%2Fsecret.png",
        "sub/../secret.png",
        ".hidden.png",
        "secret.txt",
        "id_rsa",
        ".env",
        "optimizer.pt",
        "file:///etc/secret.png",
        "link.png",
        "https://example.com/x.png",
        "a b.png",
    ],
)
def test_image_by_its_path(tmp_path, path):
    """Neither copied into a model's folder nor uploaded, however it is spelt; the report's own figure is both."""
    from trl_capo.publish.card import add_to_model_card

    report, model = tmp_path / "report", tmp_path / "model"
    for folder in (report, model, report / "sub", report / "%2e%2e", model / "sub"):
        folder.mkdir()
    for where in (tmp_path, report, report / "sub", report / "%2e%2e"):
        for name in (
            "secret.png",
            ".hidden.png",
            "secret.txt",
            "id_rsa",
            ".env",
            "optimizer.pt",
            "..%2Fsecret.png",
            "a b.png",
        ):
            (where / name).write_bytes(b"geheim")
    (report / "link.png").symlink_to(tmp_path / "secret.png")
    (report / "page-1-maths.png").write_bytes(b"figure")
    text = f"### ![x]({path})\n\n| ![x]({path}) |\n\n![x]({path})\n\n![figures of maths](page-1-maths.png)\n"
    (report / "page.md").write_text(text)
    add_to_model_card(report / "page.md", model)
    found = {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()}
    assert found == {"README.md", "calibration.md", "page-1-maths.png"}
    assert not (tmp_path.parent / "secret.png").exists()

    shutil.copytree(report, model, dirs_exist_ok=True, symlinks=True)  # now they lie in the model's folder, too
    (model / "model.safetensors").write_bytes(b"x")
    assert set(files_to_upload(model)) == {"README.md", "calibration.md", "page-1-maths.png", "model.safetensors"}


def test_benchmark_that_is_called_like_an_image(tmp_path):
    """The report escapes it, and its figure has a plain name."""
    from tests.report.test_page import make_run
    from trl_capo.evaluation.samples import read_samples
    from trl_capo.publish.card import add_to_model_card
    from trl_capo.report.page import write_report

    (tmp_path / "secret.png").write_bytes(b"geheim")
    (tmp_path / "report").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "report" / "secret.png").write_bytes(b"geheim")
    sets = read_samples(make_run(tmp_path / "s", 0, benchmarks=["![x](secret.png)\n![x](../secret.png)\n<b>|"]))
    page = write_report({"![y](secret.png)": sets}, tmp_path / "report" / "my page.html")
    add_to_model_card(page.with_suffix(".md"), tmp_path / "model")
    copied = {path.name for path in (tmp_path / "model").iterdir()} - {
        "README.md",
        "calibration.md",
        "model.safetensors",
    }
    assert len(copied) == 1 and (tmp_path / "model" / copied.pop()).read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "<b>" not in card and "![x](" not in card and "![y](" not in card
