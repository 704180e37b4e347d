"""Checks that prompts fit the chat template and the context, and the tokenizer the model's vocabulary."""

import os
import warnings
from collections.abc import Iterator

from datasets import Dataset
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase

from trl_capo.errors import UserError
from trl_capo.models.chat_templates import with_defaults
from trl_capo.models.prompts import tokenize


ROWS = 1000  # rows of each set that `check_prompts_fit` reads


def check_prompts_fit(tokenizer, vocabulary: int | None, chat_template_kwargs: dict | None, **datasets) -> None:
    """Refuses conversations that the chat template cannot render, or whose system message it leaves out.

    Args:
        tokenizer: The tokenizer. Image processors and None are not checked.
        vocabulary: Size of the model's vocabulary; None if unknown.
        chat_template_kwargs: From the trainer's configuration.
        datasets: `train_dataset` and `eval_dataset`, as given to the trainer. Streams are not read.

    Raises:
        UserError: Says what to change in the template or the prompts.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    kwargs = chat_template_kwargs or {}
    if vocabulary is not None:
        _check_special_tokens(tokenizer, vocabulary)
    too_small = vocabulary is not None and vocabulary < len(tokenizer)
    seen, texts = set(), []
    for name, prompt in _first_prompts(datasets):
        if isinstance(prompt, str):
            texts.append(prompt)
            continue
        if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
            continue
        roles = tuple(message.get("role") for message in prompt)
        if roles in seen and not too_small:
            continue
        text = _rendered(tokenizer, prompt, roles, name, kwargs)
        texts.append(text)
        if roles not in seen and "system" in roles:
            other = [{**m, "content": f"{m['content']} ?"} if m["role"] == "system" else m for m in prompt]
            is_text = isinstance(prompt[roles.index("system")]["content"], str)
            if is_text and _rendered(tokenizer, other, roles, name, kwargs) == text:
                raise UserError(
                    f"{name}: the chat template of {_name(tokenizer)} leaves the system message out of the prompt. "
                    "Put its text into the user's message, or choose a chat template with a system role."
                )
        seen.add(roles)
    if too_small and texts:
        highest = max(max(ids, default=0) for ids in tokenizer(text=texts, add_special_tokens=False)["input_ids"])
        if vocabulary is not None and highest >= vocabulary:
            raise UserError(
                f"The prompts have the token {tokenizer.convert_ids_to_tokens(highest)!r} with id {highest}, but the "
                f"model's vocabulary has {vocabulary} tokens. Use the tokenizer that belongs to the model, or resize "
                f"the model: model.resize_token_embeddings({len(tokenizer)})."
            )


def check_lengths_fit(tokenizer, config, args, **datasets) -> None:
    """Refuses prompts that leave less of the model's context than `max_completion_length`. Checks all rows.

    Args:
        tokenizer: The tokenizer. Image processors and None are not checked.
        config: The model's configuration. Without `max_position_embeddings` there is no limit.
        args: The trainer's configuration.
        datasets: `train_dataset` and `eval_dataset`, as given to the trainer. Streams are not read.

    Raises:
        UserError: Names the first such row.
    """
    context = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    tokenizer = with_defaults(tokenizer, args.chat_template_kwargs)
    limit = context - args.max_completion_length
    if limit < 1:  # TRL trains here, as its defaults do with a small model: warn only
        warnings.warn(
            f"max_completion_length={args.max_completion_length} exceeds the model's context of {context} tokens: "
            "longer completions use positions that the model has never seen.",
            UserWarning,
            stacklevel=2,
        )
        limit = context - 1
    for name, rows in _datasets_with_prompts(datasets):
        for start in range(0, len(rows), ROWS):
            prompts = rows[start : start + ROWS]["prompt"]
            around = _bytes_around(tokenizer, prompts[0])
            long = [p for p, prompt in enumerate(prompts) if _bytes_at_most(prompt, around) > limit]
            for p, ids in zip(long, tokenize(tokenizer, [prompts[p] for p in long]), strict=True):
                if len(ids) > limit:
                    raise UserError(
                        f"{name}: row {start + p} has a prompt of {len(ids)} tokens. With max_completion_length="
                        f"{args.max_completion_length}, the model's context of {context} tokens leaves {limit}. Drop "
                        f"longer prompts (trl-capo train --max_prompt_tokens {limit}) or lower max_completion_length."
                    )


def _bytes_around(tokenizer, prompt) -> int:
    """Bytes that the tokenizer may put around a message; no token is shorter than a byte."""
    return 16 if isinstance(prompt, str) else 16 + len(tokenizer.decode(tokenize(tokenizer, [prompt])[0]).encode())


def _bytes_at_most(prompt, around: int) -> int:
    messages = [prompt] if isinstance(prompt, str) else [str(message) for message in prompt]
    return around * len(messages) + sum(len(text.encode()) for text in messages)


def check_prompts(model, args, given: dict) -> bool:
    """Checks prompts as far as possible without the Hub, even before the model is loaded.

    Args:
        model: A name, or a model.
        args: The trainer's configuration.
        given: The trainer's other arguments, by name.

    Returns:
        Whether the prompts were checked.
    """
    if given["environment_factory"] is not None:
        return True  # the environment brings its own prompts
    config, tokenizer = getattr(model, "config", None), given["processing_class"]
    if isinstance(model, str):
        if not os.path.isdir(model):
            return False
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code)
            if tokenizer is None:
                tokenizer = AutoProcessor.from_pretrained(model, trust_remote_code=args.trust_remote_code)
        except Exception:
            return False  # the trainer says what is wrong when it loads the model
    if tokenizer is None:
        return False
    datasets = {name: given[name] for name in ("train_dataset", "eval_dataset")}
    check_prompts_fit(tokenizer, vocabulary_of(config), args.chat_template_kwargs, **datasets)
    check_lengths_fit(tokenizer, config, args, **datasets)
    return True


def vocabulary_of(config) -> int | None:
    """Size of a model's vocabulary, from its configuration; None if unknown."""
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def _datasets_with_prompts(datasets: dict) -> Iterator[tuple[str, Dataset]]:
    for name, dataset in datasets.items():
        parts = dataset if isinstance(dataset, dict) else {None: dataset}
        for part, rows in parts.items():
            if isinstance(rows, Dataset) and "prompt" in rows.column_names:
                yield (name if part is None else f"{name}[{part!r}]"), rows


def _first_prompts(datasets: dict) -> Iterator[tuple[str, object]]:
    for name, rows in _datasets_with_prompts(datasets):
        for prompt in rows.select(range(min(ROWS, len(rows))))["prompt"]:
            yield name, prompt


def _check_special_tokens(tokenizer, vocabulary: int) -> None:
    for name in ("pad_token", "eos_token"):
        token = getattr(tokenizer, name)
        index = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if index is not None and index >= vocabulary:
            raise UserError(
                f"The tokenizer's {name} {token!r} has id {index}, but the model's vocabulary has {vocabulary} "
                f"tokens. Use the tokenizer that belongs to the model, set {name} to a token that the model "
                f"knows, or resize the model: model.resize_token_embeddings({len(tokenizer)})."
            )


def _rendered(tokenizer, prompt: list[dict], roles: tuple, name: str, kwargs: dict) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name} has conversations as prompts, but {_name(tokenizer)} has no chat template. Use an instruct "
            "model, set tokenizer.chat_template, or give prompts as plain text."
        )
    try:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:
        system = (
            " Put the system message's text into the user's message, or choose" if "system" in roles else " Choose"
        )
        raise UserError(
            f"{name}: the chat template of {_name(tokenizer)} refuses a prompt with the roles "
            f"{', '.join(map(str, roles))} ({' '.join(str(error).split())}).{system} another chat template."
        ) from error


def _name(tokenizer) -> str:
    return getattr(tokenizer, "name_or_path", "") or "the tokenizer"
