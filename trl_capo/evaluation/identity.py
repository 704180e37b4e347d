"""Identify a model by its files, its base model's files, its commit, and the settings that an evaluation recorded.

A model's files are compared by content. Weights are first compared by name, size and modification time, because
reading them takes a while. Their content is compared only if one of these differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trl_capo.errors import UserError
from trl_capo.files import SETTINGS
from trl_capo.models.adapter import base_of
from trl_capo.models.source import model_path


WEIGHTS = ("*.safetensors", "*.bin")
# Files are listed by name, because anything may lie next to a model. The index of the weights only lists them.
DECIDING = (
    "config.json", "generation_config.json", "adapter_config.json", "params.json",
    "quantize_config.json", "quantization_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json",
    "vocab.*", "merges.txt", "bpe.codes", "normalizer.json", "emoji.json", "*.model", "tokenizer.model.*", "*.spm",
    "*.tiktoken", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "*processor_config.json", "configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py",
    "image_processing_*.py",
)  # fmt: skip


def model_identity(model: str) -> dict[str, str | None]:
    """Fingerprints of `weights`, the `commit` on the Hub and each file. An adapter's base model is included.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        Fingerprints by name. `weights` is None if the model is not a folder; `commit` is None if it is one.
    """
    identity = _own_identity(model)
    base = base_of(model)
    if base != model:
        identity |= {"base": base} | {f"base/{name}": value for name, value in _own_identity(base).items()}
    return identity


def _own_identity(model: str) -> dict[str, str | None]:
    folder = Path(model)
    if not folder.is_dir():
        return {"weights": None, "commit": _commit(model)}
    written = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _weights(folder)]
    files = {str(path.relative_to(folder)): path for kind in DECIDING for path in folder.glob(kind) if path.is_file()}
    return {
        "weights": fingerprint(written) if written else None,
        "commit": None,
        **{name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sorted(files.items())},
    }


def with_content(model: str, settings: dict, known: dict) -> dict:
    """Add the content of the weights to settings, so that a copy or `touch` does not count as a change.

    Args:
        model: A folder, or a name on the Hub.
        settings: Settings that include the model's identity.
        known: Settings of an earlier evaluation, or empty. Earlier versions recorded no content.

    Returns:
        `settings` with `weights_content`. If the content matches the recorded content, `weights` is the recorded
        value.
    """
    settings = dict(settings)
    for weights, folder in (("weights", model), ("base/weights", base_of(model))):
        content = f"{weights}_content"
        if settings.get(weights) is None:
            continue
        if known and (content not in known or known.get(weights) == settings[weights]):
            settings[content] = known.get(content)
            continue
        settings[content] = _content(Path(folder))
        if known and known[content] == settings[content]:
            settings[weights] = known.get(weights)
    return settings


def _content(folder: Path) -> str:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = _weights(folder)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        return fingerprint(list(zip([path.name for path in paths], pool.map(digest, paths), strict=True)))


def _weights(folder: Path) -> list[Path]:
    return sorted(path for kind in WEIGHTS for path in folder.glob(kind))


def _commit(model: str) -> str | None:
    """The commit that this Hub name currently loads: the name of its folder in the cache."""
    from transformers.utils import cached_file

    path = Path(str(cached_file(model, "config.json")))
    return path.parent.name if path.parent.parent.name == "snapshots" else None


def fingerprint(content: list) -> str:
    """A short hash of JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_settings(folder: Path) -> dict:
    """The recorded settings of an evaluation, or an empty dictionary.

    Raises:
        UserError: The file does not contain settings.
    """
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove {folder} and evaluate again.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not contain the settings of an evaluation. Remove {folder} and evaluate again.")
    return settings


def is_recorded(settings: dict) -> bool:
    """Whether settings record the model's files and commit. Earlier versions did not record them."""
    return "commit" in settings


def check_unchanged(model: str, settings: dict) -> None:
    """Refuse samples from an earlier state of the same model folder."""
    evaluated = model_path(str(settings.get("model")))
    same_folder = Path(evaluated).is_dir() and Path(evaluated).resolve() == Path(model).resolve()
    if same_folder and is_recorded(settings):
        identity = with_content(model, model_identity(model), settings)
        changed = [name for name, value in identity.items() if settings.get(name) != value]
        if changed:
            raise UserError(
                f"{model} has changed since the samples were drawn ({', '.join(changed)}). Evaluate it again into "
                "another --output_dir."
            )


def sampling_of(settings: dict, benchmarks: list[str]) -> dict:
    """The sampling settings of `trl-capo evaluate`; empty for samples from other tools."""
    if not settings:
        return {}
    sampling = {}
    try:
        sampling["temperature"] = settings["temperature"]
        for name in ("max_new_tokens", "system_prompt"):
            values = {settings[name][benchmark] for benchmark in benchmarks}
            if len(values) > 1:
                raise UserError(f"the benchmarks were sampled with different {name}. Choose one with --benchmark.")
            sampling[name] = values.pop()
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the settings.json beside the samples does not match them: {error!r}. Evaluate again, or remove the "
            "file. Without it, `trl-capo answer` cannot check its sampling settings."
        ) from error
    if settings.get("chat_template_kwargs"):
        sampling["chat_template_kwargs"] = settings["chat_template_kwargs"]
    return sampling
