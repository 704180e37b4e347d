"""Text of conversations: content may be text, parts (`[{"type": "text", "text": ...}]`) or null."""

from typing import Any


def text_of(content: Any) -> str:
    """The text of a message's content.

    Example:
        >>> text_of("1+1?"), text_of([{"type": "text", "text": "1+1?"}]), text_of(None)
        ('1+1?', '1+1?', '')
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.get("text") or "" for part in content if part.get("type", "text") == "text")


def question_of(prompt: str | list[dict]) -> str:
    """The user's question: all user messages, without the system prompt, intermediate answers or a prefill.

    Example:
        >>> question_of([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>"}])
        '1+1?'
    """
    if isinstance(prompt, str):
        return prompt
    asked = [text_of(message.get("content")) for message in prompt if message.get("role") == "user"]
    return "\n\n".join(asked) if asked else text_of(prompt[-1].get("content"))


def answer_of(completion: str | list[dict]) -> str:
    """The model's final answer: its last message, because a completion with tools has several.

    Example:
        >>> answer_of([{"role": "assistant", "content": "Let me look."}, {"role": "tool", "content": "7"},
        ...            {"role": "assistant", "content": "It is 7."}])
        'It is 7.'
    """
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    return text_of(said[-1].get("content")) if said else ""
