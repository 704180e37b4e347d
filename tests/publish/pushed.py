"""A run's folder to push, and what must arrive of it."""

import json
import shutil
from pathlib import Path

import yaml


def save_run(model: str, folder: Path) -> Path:
    """A model's folder as a run leaves it, with a report in it and things that do not belong on the Hub."""
    shutil.copytree(model, folder)
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
    return not name.startswith(
        (
            "checkpoint",
            "optimizer",
            "training_args",
            "completions",
            "runs",
            "slurm",
            "m.jsonl",
            "trl_capo_run",
            "trainer_state",
        )
    )


def assert_arrived(files: dict[str, bytes], folder: Path) -> None:
    """Everything that belongs on the Hub is there, byte for byte, and nothing else. The card may say more."""
    expected = {name: content for name, content in contents(folder).items() if belongs(name)}
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"} <= set(files)
    assert set(files) == {*expected, "README.md"}
    for name in set(files) - {"README.md"}:
        assert files[name] == expected[name], name
