"""Store the `chat_template_kwargs` of a training in the chat template.

Training may render prompts with template variables, e.g. `enable_thinking: false`. If the saved template has these
values as defaults, every later tool renders the same prompt. A caller can still override a variable.
"""

import copy
import inspect
import json
from typing import Any

from trl_capo.errors import UserError


def with_defaults(tokenizer, chat_template_kwargs: dict[str, Any] | None):
    """A tokenizer whose chat template has these variables as defaults.

    Args:
        tokenizer: Tokenizer or processor. It is not changed.
        chat_template_kwargs: Variables of the template, with JSON values.

    Returns:
        A shallow copy with a new `chat_template`, or the given tokenizer if nothing has to change.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not chat_template_kwargs or template is None:
        return tokenizer
    changed = copy.copy(tokenizer)
    if isinstance(template, dict):  # several by name
        changed.chat_template = {name: add_defaults(text, chat_template_kwargs) for name, text in template.items()}
    else:
        changed.chat_template = add_defaults(template, chat_template_kwargs)
    return changed


def add_defaults(template: str, variables: dict[str, Any]) -> str:
    r"""Add default values for variables to a Jinja template. Adding them again changes nothing.

    Example:
        >>> add_defaults("{{ a }}", {"a": False})
        '{% if a is not defined %}{% set a = false %}{% endif %}\n{{ a }}'
    """
    from transformers import PreTrainedTokenizerBase

    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters  # never reach the template
    prefix = ""
    for name, value in variables.items():
        if name not in own:
            prefix += f"{{% if {name} is not defined %}}{{% set {name} = {_literal(name, value)} %}}{{% endif %}}"
    # transformers renders with `trim_blocks`, which drops this newline, and with `lstrip_blocks`, which drops blanks
    # before the template's own first block only if that starts a line.
    prefix += "\n" if prefix else ""
    return template if template.startswith(prefix) else prefix + template


def read_kwargs(text: str | dict | None, name: str = "--chat_template_kwargs") -> dict[str, Any]:
    """Template variables from the command line: a JSON object. None means no variables.

    Raises:
        UserError: The value is not a JSON object.
    """
    try:
        value = json.loads(text) if isinstance(text, str) else text or {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object such as '{{\"enable_thinking\": false}}', got {text!r}.")
    for variable, content in value.items():
        _literal(variable, content)
    return value


def _literal(name: str, value: Any) -> str:
    """A JSON value in Jinja syntax, which differs only for null."""
    try:
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError("its name is not a valid variable name")
        json.dumps(value, allow_nan=False)
        return _write(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"chat_template_kwargs: {name}={value!r} cannot be stored in a chat template ({error}). Use text, "
            "numbers, true, false, null, lists and objects."
        ) from error


def _write(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_write(str(key))}: {_write(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_write, value)) + "]"
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False)  # Jinja cannot read surrogate pairs
