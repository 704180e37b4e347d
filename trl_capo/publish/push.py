"""Upload a trained model to the Hub: all files in one commit, with retries while the Hub is unreachable.

With one commit, the Hub never shows half a model. Files that are already there are not sent again. The card gets
training details, and the calibration report if the folder has one. The folder itself is not changed.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from time import sleep

from trl_capo.errors import UserError
from trl_capo.publish.card import complete_card
from trl_capo.publish.hub import check_private, push_command
from trl_capo.publish.model_files import CALIBRATION, CARD, RECIPE, RECORD, files_to_upload, left_behind
from trl_capo.publish.record import hub_dataset, run_folder
from trl_capo.redact import mask, redact


WAITS = (5, 20, 60)  # seconds between attempts
SHOWN = 8  # names of files that are not uploaded


class PushError(Exception):
    """An upload failed permanently. The message gives the reason, that nothing is lost, and the command to retry."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    say: Callable[..., None] = print,
) -> str:
    """Upload a model, and retry while the Hub is unreachable.

    Args:
        folder: Folder of the model. Nothing in it is changed.
        repo_id: Name on the Hub. Created if it does not exist.
        private: True uploads only to a private repository. None does the same if the run's recipe has
            `hub_private_repo`; otherwise a new repository follows the account's default. False makes a new one public.
        dataset: Dataset on the Hub that the card names (default: the run's dataset).
        revision: Branch, which must exist. None means main.
        token: Access token (default: the login's token, or HF_TOKEN).
        say: Prints a line.

    Returns:
        Address of the model.

    Raises:
        PushError: The Hub could not be reached in four attempts, or rejected the request.
        ValueError: The folder contains no model.
    """
    from huggingface_hub.errors import HTTPError

    files = model_files(folder)
    private = _private_by_recipe(Path(folder), say) if private is None else private
    size = sum(path.stat().st_size for path in files.values()) / 1e6
    say(f"Uploading {folder} to {repo_id}: {len(files)} files, {size:,.1f} MB.")
    if rest := left_behind(folder, list(files)):
        shown = ", ".join(rest[:SHOWN]) + f" and {len(rest) - SHOWN} more" * (len(rest) > SHOWN)
        say(f"Not uploaded, because a model repository does not need them: {shown}.")
    for wait in (*WAITS, None):
        try:
            address = _push(folder, files, repo_id, private, dataset, revision, token)
            say(f"🤗 {address}")
            return address
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            reason = _reason(error)
            if wait is None or not _may_pass(error):
                command = push_command(folder, repo_id, private, dataset, revision)
                raise PushError(
                    f"{folder} could not be pushed to {repo_id}: {reason} Nothing is lost, the model is in {folder}. "
                    f"To retry: {command}"
                ) from error
            say(f"⚠️ The upload failed: {reason} Retrying in {wait} s.", flush=True)
            sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def push_trained(trainer) -> bool:
    """Write the card of a model that was just saved, and push the model if the training arguments say so.

    Args:
        trainer: The trainer. Only its main process does anything.

    Returns:
        False if the push failed. The reason and the command to retry are printed. The model itself is safe.
    """
    if not trainer.is_world_process_zero():
        return True
    args = trainer.args
    repo_id = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name
    if args.push_to_hub:
        try:  # trackio uploads its dashboard here and tags the model with it
            trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        except Exception as error:  # any error: the model comes first
            sys.stderr.write(f"⚠️ A tracker failed before the push: {_reason(error)}\n")
    trainer.create_model_card(
        model_name=repo_id.split("/")[-1],
        dataset_name=hub_dataset(args.output_dir),
        tags=getattr(trainer.model, "model_tags", None),
    )
    if not args.push_to_hub:
        return True
    options = dict(private=args.hub_private_repo, revision=args.hub_revision, token=args.hub_token)
    try:
        push_folder(args.output_dir, repo_id, **options)
    except PushError as error:
        sys.stderr.write(f"trl-capo train: error: {error}\n")
        return False
    return True


def model_files(folder: str | Path) -> dict[str, Path]:
    """The files of a model that belong on the Hub, by their names there. They may lack a card.

    For a checkpoint, the run's recipe comes from the parent folder.

    Raises:
        ValueError: The folder contains no weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the output_dir of a run.")
    names = files_to_upload(folder)
    if not any(name.endswith(".safetensors") for name in names):
        checkpoints = sorted(str(path) for path in folder.glob("checkpoint-*"))
        hint = f" You can push one of its checkpoints: {', '.join(checkpoints)}." if checkpoints else ""
        if pickles := sorted(path.name for path in folder.glob("*.bin") if path.name != "training_args.bin"):
            hint = (
                f" Pickles are not uploaded ({', '.join(pickles)}). Load the model with from_pretrained and save it "
                "with save_pretrained, which writes safetensors."
            )
        raise UserError(f"{folder} contains no weights (*.safetensors).{hint}")
    files = {name: folder / name for name in names}
    run = run_folder(folder)
    return files | {name: run / name for name in (RECIPE, RECORD) if (run / name).exists()}


def _private_by_recipe(folder: Path, say: Callable[..., None]) -> bool | None:
    """Whether the run asked for a private repository; None if it did not."""
    import yaml

    path = run_folder(folder) / RECIPE
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    wanted = str(recipe.get("hub_private_repo")).lower() in ("true", "1", "yes") if isinstance(recipe, dict) else False
    if wanted:
        say(f"{path} says hub_private_repo: true, so the repository must be private. To publish it, use --no-private.")
    return True if wanted else None


def _content(name: str, path: Path) -> bytes | str:
    """A file's content for upload. Our own text files, perhaps from an earlier version, have their secrets removed."""
    import yaml

    if name == RECIPE:
        text = path.read_text(encoding="utf-8")
        options = yaml.safe_load(text)
        clean = redact(options)
        return (text if clean == options else yaml.safe_dump(clean, sort_keys=False, allow_unicode=True)).encode()
    if name == RECORD:
        record = json.loads(path.read_text(encoding="utf-8"))
        clean = redact(record)
        return str(path) if clean == record else json.dumps(clean, indent=1).encode()
    return mask(path.read_text(encoding="utf-8")).encode() if name == CALIBRATION else str(path)


def _push(folder, files: dict[str, Path], repo_id: str, private, dataset, revision, token) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="trl-capo", token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if private:
        check_private(url.repo_id, api=api)
    card = complete_card(folder, repo_id=url.repo_id, dataset=dataset)
    contents = {**{name: _content(name, path) for name, path in files.items()}, CARD: card.encode()}
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    api.create_commit(url.repo_id, operations, commit_message="Upload by trl-capo push", revision=revision)
    return str(url)


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """Whether a retry may succeed: the Hub is busy or unreachable, rather than rejecting the request."""
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for cause in _causes(error):
        status = _status(cause)
        if status is not None:
            return status in (408, 429) or status >= 500
        if isinstance(cause, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
            return False
        # An HTML page instead of an answer comes from a proxy in front of the Hub.
        if isinstance(cause, (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)):
            return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any(
        "xet" in frame.name for frame in frames
    )  # hf_xet has no error types


def _reason(error: Exception) -> str:
    """The first cause of an error in one line. For login problems it also says what to do."""
    root = list(_causes(error))[-1]
    status = next((status for cause in _causes(error) if (status := _status(cause)) is not None), None)
    shown = next((cause for cause in _causes(error) if _status(cause) is not None), root)
    text = " ".join(re.sub(r"For more information check: \S+", "", str(shown)).split()) or type(shown).__name__
    text = mask(text)
    text = text if len(text) <= 300 else f"{text[:297]}..."
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    return f"{text} Log in with `hf auth login`, or set HF_TOKEN." if status in (401, 403) else text
