"""What a model is, as far as samples depend on it: its files, its base's, its commit.

Everything goes by content, except that weights go by name, size and time of change, since reading them takes minutes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from trl_capo.errors import UserError
from trl_capo.files import SETTINGS
from trl_capo.models.adapter import base_of


WEIGHTS = ("*.safetensors", "*.bin")
DECIDING = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja")
# Written by trainers and by us beside a model, without effect on its samples; the index only lists the weights.
BOOKKEEPING = {
    "abstention.json", "all_results.json", "eval_results.json", "reproduction.json", "requirements.txt",
    "train_results.json", "trainer_state.json", "trl_capo_state.json",
}  # fmt: skip


def model_identity(model: str) -> dict[str, str | None]:
    """Fingerprints by what they are of: `weights`, `commit` on the Hub, each file, and the same of an adapter's base.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        `weights` is None where the model is no folder, `commit` where it is one.
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
    weights = sorted(path for kind in WEIGHTS for path in folder.glob(kind))
    written = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    files = {str(path.relative_to(folder)): path for kind in DECIDING for path in folder.glob(kind) if path.is_file()}
    return {
        "weights": fingerprint(written) if written else None,
        "commit": None,
        **{
            name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for name, path in sorted(files.items())
            if name not in BOOKKEEPING
        },
    }


def _commit(model: str) -> str | None:
    """The commit that loading this name from the Hub gives now: its folder in the cache."""
    from transformers.utils import cached_file

    path = Path(str(cached_file(model, "config.json")))
    return path.parent.name if path.parent.parent.name == "snapshots" else None


def fingerprint(content: list) -> str:
    """A short hash of JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_settings(folder: Path) -> dict:
    """What an evaluation was made with; empty where nothing is recorded.

    Raises:
        UserError: The file holds something else.
    """
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove {folder} and evaluate again.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings of an evaluation. Remove {folder} and evaluate again.")
    return settings


def is_recorded(settings: dict) -> bool:
    """Whether settings say which files and commit a model had; those of earlier versions do not."""
    return "commit" in settings
