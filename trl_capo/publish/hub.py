"""Prepare the upload of a saved model to the Hub: the command for it, and checks before uploading."""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from trl_capo.errors import UserError
from trl_capo.publish.model_files import files_to_upload
from trl_capo.redact import mask


logger = logging.getLogger(__name__)


def push_command(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    dataset: str | None = None,
    revision: str | None = None,
) -> str:
    """The command that uploads a folder.

    Example:
        >>> push_command("runs/capo", "me/capo", private=True)
        'trl-capo push runs/capo --repo_id me/capo --private'
    """
    words = ["trl-capo", "push", str(folder), "--repo_id", repo_id] + ["--private"] * bool(private)
    for name, value in (("--dataset", dataset), ("--revision", revision)):
        words += [name, value] if value is not None else []
    return shlex.join(words)


def wants_private(configured: bool | None, asked: bool | None = None) -> bool | None:
    """Whether a repository must be private according to the configuration or the call.

    Args:
        configured: `hub_private_repo` of the configuration.
        asked: `private` of the call.

    Raises:
        UserError: The configuration says private and the call says public.
    """
    if configured and asked is not None and not asked:
        raise UserError(
            "push_to_hub(private=False) contradicts hub_private_repo=True in the configuration. To publish the model, "
            "set hub_private_repo=False; otherwise leave private out."
        )
    return True if configured or asked else configured if asked is None else asked


def check_private(repo_id: str, token: str | None = None, repo_type: str | None = None, api=None) -> None:
    """Refuse a repository that is not private.

    Args:
        repo_id: Name of the repository, which exists.
        token: Access token (default: the login's token).
        repo_type: `"dataset"`, or None for a model.
        api: Client for the Hub (default: a new one).

    Raises:
        UserError: The repository is public, or the Hub does not say.
        OSError: The Hub could not be reached.
    """
    from huggingface_hub import HfApi

    private = (api or HfApi()).repo_info(repo_id, repo_type=repo_type, token=token).private
    if private:
        return
    state = "exists and is public" if private is False else "has a visibility that the Hub does not report"
    raise UserError(
        f"{repo_id} {state}, but hub_private_repo (--private) requires a private one. Nothing was uploaded. Make it "
        "private in its settings, or use another name."
    )


def check_completions_repo(args) -> None:
    """Refuse to log the completions of a private model to an existing public dataset.

    Raises:
        UserError: The dataset is public, or the Hub does not say.
        OSError: The Hub could not be reached.
    """
    repo_id = getattr(args, "log_completions_hub_repo", None)
    if not (args.hub_private_repo and args.log_completions and repo_id):
        return
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        check_private(repo_id, repo_type="dataset")
    except RepositoryNotFoundError:
        pass  # TRL creates a private one


@contextmanager
def guarded_uploads(private: bool | None) -> Iterator[None]:
    """Uploads by transformers' trainer inside this context go through `GuardedApi`.

    Args:
        private: Whether uploads may go into private repositories only.
    """
    from transformers import trainer

    original = trainer.hf_api
    trainer.hf_api = lambda: GuardedApi(original(), private)  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        trainer.hf_api = original


class GuardedApi:
    """transformers' Hub client, restricted: it uploads only a model's files, and a private model stays private.

    It checks the visibility right before each upload. If a background upload fails, it prints one line.
    """

    def __init__(self, api, private: bool | None):
        self._api, self._private = api, private

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, *, run_as_future: bool = False, **options) -> Any:
        """`HfApi.upload_folder` with the list from `publish.model_files` instead of ignore patterns."""
        options.pop("ignore_patterns", None)
        if options.get("path_in_repo") is None:
            options["allow_patterns"] = [escape(name) for name in files_to_upload(options["folder_path"])]
        else:  # a whole checkpoint to resume from (hub_strategy), in its own folder
            options["ignore_patterns"] = [".*", "*/.*"]
        if not run_as_future:
            return self._upload(options)
        return self._api.run_as_future(self._upload_in_background, options)

    def _upload(self, options: dict) -> Any:
        if self._private:
            check_private(options["repo_id"], options.get("token"), api=self._api)
        return self._api.upload_folder(**options)

    def _upload_in_background(self, options: dict) -> Any:
        try:
            return self._upload(options)
        except Exception as error:  # catch any error, because nobody may ever read the result
            reason = mask(" ".join(str(error).split()))
            logger.warning(f"⚠️ A background upload to the Hub failed; the files are still here: {reason}")
            raise
