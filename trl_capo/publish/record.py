"""Record a run next to its model, so that others can repeat and cite it.

- `recipe.yaml`: every option that differs from its default, so that `trl-capo train --config recipe.yaml` repeats
  the run. Paths stay as given, relative to the folder in which the run started.
- `reproduction.json`: command, date, versions, commit, machine, and fingerprints of the data and the model. A resumed
  run adds an entry to its list `resumed` and changes nothing else.

Neither file ever contains a secret: values with a secret's name are left out, and their names are noted; see
`trl_capo.redact`.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trl_capo import __version__
from trl_capo.files import write_json, write_text
from trl_capo.markdown import code_block, markdown_text
from trl_capo.publish.model_files import RECIPE, RECORD
from trl_capo.redact import redact, redact_words


PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "vllm")


def write_reproduction(
    trainer, argv: list[str], options: dict[str, Any], left_out: list[str], resumed_from: str | None = None
) -> None:
    """Write `recipe.yaml` and `reproduction.json` into the run's folder, or record a resumption in the latter.

    Args:
        trainer: The trainer, before it trains. Only its main process writes.
        argv: Words of the command line after `trl-capo train`, with `--config FILE` as two words.
        options: Options that differ from their defaults, without secrets.
        left_out: Names of the omitted secrets.
        resumed_from: Checkpoint that the run resumes from; None at its start.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    event = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["trl-capo", "train", *redact_words(argv)]),
        **({"left_out": left_out} if left_out else {}),
        "versions": versions(),
        "git": {
            "working_directory": git_state(Path.cwd()),
            "package": git_state(Path(__file__).parent, tracked=Path(__file__).name),
        },
    }
    if resumed_from is not None and (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        entry = {**event, "from": Path(resumed_from).name, "changed_options": _changed(folder / RECIPE, options)}
        write_json(folder / RECORD, {**redact(record), "resumed": [*record.get("resumed", []), entry]})
        return
    record = {
        **event,
        "world_size": trainer.accelerator.num_processes,
        "device": _device_name(trainer.accelerator.device),
        "model": redact(_model_record(trainer, options)),
        "data": redact(_data_record(trainer, options)),
    }
    if resumed_from is not None:  # the run started without these files
        record["resumed"] = [{**event, "from": Path(resumed_from).name}]
    _write_recipe(folder / RECIPE, options, str(event["date"]), left_out)
    write_json(folder / RECORD, record)


def versions() -> dict[str, str]:
    """Versions of Python, this package and its dependencies, without those that are not installed."""
    found = {"python": platform.python_version(), "trl_capo": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path, tracked: str | None = None) -> dict[str, Any] | None:
    """The commit that a folder is at.

    Args:
        folder: Any folder.
        tracked: A file in it that git must track, because an installed package may lie inside another repository.

    Returns:
        `commit`, and `dirty`: whether a tracked file has changed since. None outside a repository.
    """
    try:
        if tracked is not None:
            _git(folder, "ls-files", "--error-unmatch", tracked)
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint(rows) -> str | None:
    """SHA-256 over the rows as JSON, one line per row in order, with sorted keys: the same on every machine.

    Args:
        rows: A `Dataset`, read in batches. Images and audio count by their bytes.

    Returns:
        64 hexadecimal digits; None for a stream, which cannot be read in advance.

    Example:
        >>> from datasets import Dataset
        >>> fingerprint(Dataset.from_dict({"a": [1], "b": ["x"]})) == hashlib.sha256(b'{"a":1,"b":"x"}\\n').hexdigest()
        True
    """
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return None
    encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain).encode
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        digest.update("".join(encode(row) + "\n" for row in table.to_pylist()).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def run_folder(folder: str | Path) -> Path:
    """The folder with a model's recipe: its own folder, or the parent if it is a checkpoint."""
    folder = Path(folder)
    return folder.resolve().parent if folder.resolve().name.startswith("checkpoint-") else folder


def hub_dataset(folder: str | Path) -> str | None:
    """The Hub's name of the dataset that a folder's model was trained on; None if it has none, or several."""
    path = Path(folder) / RECORD
    train = json.loads(path.read_text(encoding="utf-8"))["data"].get("train", {}) if path.exists() else {}
    sources = train.get("hub") or []
    return sources[0]["id"] if len(sources) == 1 else None


def card_section(folder: str | Path) -> str | None:
    """The model card's section about the run: data, base, versions and the recipe, without local folders.

    Args:
        folder: Folder with `recipe.yaml` and `reproduction.json`.

    Returns:
        Markdown; None if one of the files is missing.
    """
    import yaml

    folder = Path(folder)
    if not (folder / RECIPE).exists() or not (folder / RECORD).exists():
        return None
    record = redact(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    recipe = _without_folders(redact(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))))
    lines = ["## How it was trained", "", f"With `trl-capo train --config {RECIPE}`, the recipe below.", ""]
    model = record["model"]
    lines.append(f"- Base model: {_base_model(model)}")
    lines += [f"- Data, {name}: {_data_line(split)}" for name, split in record["data"].items()]
    lines.append(f"- Processes: {record['world_size']}, on {record['device']}")
    lines.append(f"- Versions: {', '.join(f'{name} {number}' for name, number in record['versions'].items())}")
    for name, git in record["git"].items():
        if git is not None:
            changed = ", with uncommitted changes" if git["dirty"] else ""
            lines.append(f"- Commit of the {name.replace('_', ' ')}: `{git['commit']}`{changed}")
    if times := len(record.get("resumed", [])):
        lines.append(f"- Resumed {times} time{'s' * (times > 1)}, see `{RECORD}`")
    dumped = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100).strip()
    return "\n".join([*lines, "", code_block(dumped, "yaml")])


def _write_recipe(path: Path, options: dict, date: str, left_out: list[str]) -> None:
    import yaml

    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=100)
    head = f"# Run started {date}. Relative paths start from the folder in which it was started.\n"
    if left_out:
        head += f"# Secrets that were set but are not stored here: {' '.join(', '.join(left_out).split())}\n"
    write_text(path, head + text)


def _without_folders(value: Any) -> Any:
    """Shorten absolute paths to their last part: they show who trained, not how."""
    if isinstance(value, dict):
        return {name: _without_folders(content) for name, content in value.items()}
    if isinstance(value, list):
        return [_without_folders(content) for content in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")) and "\n" not in value
    return Path(value).name if is_path else value


def _changed(recipe: Path, options: dict) -> dict[str, Any]:
    """Options of a resumed run that differ from those at its start; None for options back at their default."""
    import yaml

    before = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    names = [name for name in {**before, **options} if before.get(name) != options.get(name)]
    return {name: options.get(name) for name in names}


def _git(folder: Path, *arguments: str) -> str:
    # Avoid taking git's optional locks while the user runs git.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=environment)
    return result.stdout.strip()


def _device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _model_record(trainer, options: dict) -> dict[str, Any]:
    from trl_capo.models.source import model_path

    name = options.get("model_name_or_path")
    config = Path(model_path(name)) / "config.json" if name else None
    loaded = trainer.accelerator.unwrap_model(trainer.model).config
    return {
        "name": name,
        "revision": options.get("model_revision", "main") if config is None or not config.exists() else None,
        "commit": getattr(loaded, "_commit_hash", None),
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config and config.exists() else None,
    }


def _data_record(trainer, options: dict) -> dict[str, dict]:
    parts = {"train": (options.get("dataset_train_split", "train"), trainer.train_dataset)}
    if isinstance(trainer.eval_dataset, dict):
        parts |= {f"eval {name}": (name, rows) for name, rows in trainer.eval_dataset.items()}
    elif trainer.eval_dataset is not None:
        parts["eval"] = (options.get("dataset_test_split", "test"), trainer.eval_dataset)
    return {part: _split_record(name, rows, options) for part, (name, rows) in parts.items()}


def _split_record(split: str, rows, options: dict) -> dict[str, Any]:
    from trl_capo.data.catalogue import CATALOGUE
    from trl_capo.data.language import TASKS

    digest = fingerprint(rows)
    mixture = [source["path"] for source in options.get("datasets", [])]
    names = [CATALOGUE[name].path if name in CATALOGUE else name for name in mixture or [options.get("dataset_name")]]
    loaded_from = getattr(rows.info, "download_checksums", None) or {}
    revisions = dict(re.findall(r"hf://datasets/([^@\s]+)@([0-9a-f]{40})/", "\n".join(loaded_from)))
    on_hub = [name for name in names if name and name not in ("arithmetic", *TASKS) and not os.path.exists(name)]
    return {
        "name": ", ".join(str(name) for name in names),
        "split": split,
        "rows": len(rows) if digest else None,
        "columns": rows.column_names,
        "sha256_of_rows": digest,
        **({} if digest else {"note": "a stream: neither counted nor fingerprinted"}),
        "hub": [{"id": name, "revision": revisions.get(name), **_local_copy(name)} for name in on_hub] or None,
    }


def _local_copy(name: str) -> dict[str, str]:
    """The source of a dataset that was not read from the Hub."""
    from trl_capo.data.catalogue import location

    found = location(name)["path"]
    return {} if found == name else {"local_copy": found}


def _base_model(model: dict) -> str:
    if model["config_sha256"]:
        name = markdown_text(str(_without_folders(model["name"])))
        return f"{name}, a folder whose `config.json` has SHA-256 `{model['config_sha256']}`"
    return f"{_hub_link(model['name'])} at `{model['commit'] or model['revision']}`"


def _data_line(split: dict) -> str:
    if split["hub"]:
        name = ", ".join(_hub_link(source["id"], "datasets/") for source in split["hub"])
        revisions = [s["revision"] for s in split["hub"] if s["revision"]]
        name += f" at `{', '.join(revisions)}`" if revisions else ""
        name += ", read from a local copy" if any("local_copy" in s for s in split["hub"]) else ""
    else:
        name = markdown_text(str(_without_folders(split["name"])))
    size = f"{split['rows']:,} rows with SHA-256 `{split['sha256_of_rows']}`" if split["rows"] else "a stream"
    return f"{name}, split `{split['split']}`, {size}"


def _hub_link(name: str, kind: str = "") -> str:
    return f"[{markdown_text(str(name))}](https://huggingface.co/{kind}{quote(str(name))})"


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
