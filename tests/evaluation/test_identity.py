"""What a model is: whatever of its files, base or commit decides the samples."""

import json
import os
import shutil

from trl_capo.evaluation.identity import model_identity


def test_an_adapters_base_is_part_of_it(tiny_model, tmp_path):
    base, run = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = model_identity(str(run))
    os.utime(base / "model.safetensors", (1, 1))
    (base / "generation_config.json").write_text("{}")
    after = model_identity(str(run))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"base/weights", "base/generation_config.json"}


def test_a_commit_of_the_hub_is_part_of_it(tiny_model, tmp_path, monkeypatch):
    """As `from_pretrained` resolves the name now, here in a cache without a connection."""
    repo, found = tmp_path / "models--me--tiny", []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    (repo / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_model, repo / "snapshots" / commit)
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr(
            "transformers.utils.hub.cached_files",
            lambda *args, commit=commit, **kwargs: [str(repo / "snapshots" / commit / "config.json")],
        )
        found.append(model_identity("me/tiny"))
    assert [of["commit"] for of in found] == ["a" * 40, "b" * 40] and found[0]["weights"] is None
