"""TRL's `GRPOTrainer` with accurate model cards, and uploads of only what belongs on the Hub."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_config_model_id

from trl_capo.files import write_text
from trl_capo.models.chat_templates import with_defaults
from trl_capo.preflight.schedule import FilledConfig
from trl_capo.publish.card import complete_card, example_question
from trl_capo.publish.hub import check_completions_repo, check_private, guarded_uploads, push_command, wants_private
from trl_capo.redact import mask
from trl_capo.trainer.config import checked_config, without_secrets


class PublishingGRPOTrainer(GRPOTrainer):
    """Stock GRPO that writes its own card, keeps private what must be private, and uploads no secrets or pickles."""

    args: FilledConfig
    model: PreTrainedModel
    config_class: type[GRPOConfig] = GRPOConfig
    _tag_names = ["trl", "trl-capo", "grpo"]

    def __init_subclass__(cls, **kwargs):
        """A method that sets `_name` but no `_paper` has no paper: its card must not cite its parent's."""
        super().__init_subclass__(**kwargs)
        if "_name" in cls.__dict__ and "_paper" not in cls.__dict__:
            cls._paper = {}

    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        args = self._checked_args(model, args)
        check_completions_repo(args)
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        # Saved with the model, so that later prompts render as they did in training.
        self.processing_class = with_defaults(self.processing_class, self.chat_template_kwargs)

    def _checked_args(self, model, args: GRPOConfig | None) -> FilledConfig:
        """The configuration, with this layer's defaults if a plain `GRPOConfig` was passed.

        Raises:
            TypeError: It is not an instance of `config_class`.
        """
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        return checked_config(args, self.config_class, type(self).__name__)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card plus this model's repository, question, figures and recipe, and what `trl-capo report` added."""
        super().create_model_card(*args, **kwargs)
        self._complete_card(self.args.output_dir)

    def _complete_card(self, folder: str) -> None:
        if self.is_world_process_zero():
            card = complete_card(
                folder,
                repo_id=self.hub_model_id or self.args.hub_model_id,
                question=example_question(self.train_dataset),
                history=self.state.log_history,
            )
            write_text(Path(folder, "README.md"), card)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as transformers does, with a card, so that `trl-capo push` can upload the folder later."""
        with _pickles_no_secrets():
            super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        if not _internal_call and Path(folder).resolve() != Path(self.args.output_dir).resolve():
            self._complete_card(folder)
        elif not _internal_call and not self.args.push_to_hub:
            self.create_model_card(model_name=(self.args.hub_model_id or Path(folder).resolve().name).split("/")[-1])

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository before training, as transformers does; refuses a public one that must be private.

        A failure says in one line what to do.
        """
        private = wants_private(self.args.hub_private_repo, private)
        try:
            super().init_hf_repo(token, private)
            self._check_private(private, token)
        except (HTTPError, OSError) as error:
            reason = mask(" ".join(str(error).split()))
            raise OSError(
                f"push_to_hub: the repository could not be created ({reason}). Log in with `hf auth login` or set "
                "HF_TOKEN, or train without push_to_hub and push afterwards: "
                f"{push_command(self.args.output_dir, self.args.hub_model_id or 'NAME', private)}"
            ) from error

    def push_to_hub(self, *args, **kwargs):
        """Uploads only what belongs on the Hub. A failure says where the model is and how to upload it."""
        given = inspect.signature(super().push_to_hub).bind(*args, **kwargs).arguments
        private = wants_private(self.args.hub_private_repo, given.get("private"))
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(given.get("token"), private)
            else:
                self._check_private(private, given.get("token"))
            with guarded_uploads(private):
                return super().push_to_hub(*args, **kwargs)
        except (HTTPError, OSError, RuntimeError) as error:
            repo_id = self.hub_model_id or self.args.hub_model_id or "NAME"
            command = push_command(self.args.output_dir, repo_id, private)
            error.add_note(f"Nothing is lost: the model is in {self.args.output_dir}. To upload it: {command}")
            raise

    def _check_private(self, private: bool | None, token: str | None) -> None:
        if private and self.is_world_process_zero():
            check_private(cast(str, self.hub_model_id), token or self.args.hub_token)

    def _push_from_checkpoint(self, checkpoint_folder):
        with guarded_uploads(self.args.hub_private_repo), _pickles_no_secrets():
            super()._push_from_checkpoint(checkpoint_folder)


@contextmanager
def _pickles_no_secrets() -> Iterator[None]:
    """transformers pickles its arguments next to the model, and they reach the Hub with a checkpoint."""
    save = torch.save

    def save_clean(content, *args, **kwargs):
        return save(without_secrets(content) if isinstance(content, TrainingArguments) else content, *args, **kwargs)

    torch.save = save_clean  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save = save
