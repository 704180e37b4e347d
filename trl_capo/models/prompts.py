"""Convert prompts to token ids, and check that they leave room in the model's context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from trl_capo.errors import UserError
from trl_capo.models.messages import text_of


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of prompts. Conversations use the chat template; without one, their contents are concatenated."""
    if not prompts:
        return []
    encoded: Any
    conversations = cast(list[list[dict[str, str]]], prompts)
    if isinstance(prompts[0], str):
        encoded = tokenizer(cast(list[str], prompts))
    elif tokenizer.chat_template is None:
        encoded = tokenizer(
            ["\n\n".join(text_of(message["content"]) for message in prompt) for prompt in conversations]
        )
    else:
        encoded = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    return encoded["input_ids"]


def check_lengths(prompt_ids: list[list[int]], max_new_tokens: int, config: PreTrainedConfig) -> None:
    """Refuse prompts without tokens, and prompts that leave too little of the model's context.

    Raises:
        UserError: A prompt is refused. The message names the first one.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for p, ids in enumerate(prompt_ids):
        if not ids:
            raise UserError(f"`prompts[{p}]` has no tokens. Remove it, or use a tokenizer that adds a BOS token.")
        if context is not None and len(ids) + max_new_tokens > context:
            raise UserError(
                f"`prompts[{p}]` has {len(ids)} tokens; with `max_new_tokens={max_new_tokens}` that exceeds the "
                f"model's context of {context}. Drop the prompt or lower `max_new_tokens`."
            )
