"""Keep secrets out of everything that is written next to a model, uploaded or shown. All rules for secrets are here.

A secret is recognised by its name (`hub_token`, `PGPASSWORD`, `apiKey`) or by its shape (an access token of the Hub,
OpenAI, GitHub or AWS, a JSON web token, a private key, the password in a URL). Names are kept, values are not.
`pad_token`, `max_prompt_tokens` or `num_key_value_heads` are not secrets.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any


STARS = "***"

# Matched anywhere in a name that is in lower case and without separators.
_ALWAYS = re.compile(
    r"passw(or)?d|passphrase|passcode|secret(?!ar(y|ies|ial|iat)|ion|ive)|credential|apikey|accesskey|privatekey|signingkey|encryptionkey|"
    r"(api|auth|access|refresh|session|bearer|bot|hub|hf|github|id)tokens?$|connectionstring|webhook|authorization|"
    r"(db|user|my|root|admin|ssh|pg|smtp|mail|ftp|http|proxy|login|sudo|wifi|app|api)pass$|(amz|goog)signature$"
)
_WORDS = {"pwd", "bearer", "cookie", "cookies", "jwt", "auth", "oauth", "dsn", "cred", "creds"}
_LAST_WORDS = {"pass", "pin", "otp", "totp"}  # but not in pin_memory
# After one of the first words, "token" means the tokenizer's text; before one of the second, a number of the trainer.
_TEXT_TOKENS = set(
    "pad eos bos unk mask sep cls image video audio boi eoi stop start end think first last per next new prefix "
    "suffix middle fim object ref box vision extra forced decoder special additional fake by each".split()
)
_AFTER_TOKEN = set(
    "id ids type types level count counts budget limit length index indices mask masks logp logps loss weight weights "
    "entropy entropies advantages embedding embeddings dropout classification accuracy idx".split()
)
# After one of these words, "key" names a column or an order.
_PLAIN_KEYS = set(
    "sort primary foreign prompt question answer label text dataset metric group cache completion image column query "
    "value messages message json field dict reward solution gold tags".split()
)

# Shapes of secrets, anywhere in a text but not in the middle of a word.
_SHAPES = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r".*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)"
    r"|(?<![A-Za-z0-9])(?:"
    r"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.-]*|api_org_[A-Za-z0-9]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}|[rsp]k_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/=]{16,}"
    r"|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|gl[a-z]{2,5}-[\w-]{16,}"
    r"|xox[a-z](?:\.xox[a-z])?-[\w-]{8,}|xapp-[\w-]{8,}|hooks\.slack\.com/(?:services|workflows|triggers)/[\w/]+"
    r"|discord(?:app)?\.com/api/(?:v\d{1,3}/)?webhooks/[\w/-]+|webhook\.office\.com/[\w/@-]+"
    r"|api\.telegram\.org/bot[\w:-]+"
    r"|(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA|ABIA|ACCA)[A-Z0-9]{12,}|AIza[\w-]{30,}|ya29\.[\w-]{16,}"
    r"|eyJ[\w-]{6,}\.[\w-]{4,}(?:\.[\w-]*)?"
    r"|wandb_v1_\w{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|rpa_[A-Za-z0-9]{20,}|gsk_[A-Za-z0-9]{20,}"
    r"|r8_[A-Za-z0-9]{30,}|nvapi-[\w-]{20,}|dckr_pat_[\w-]{16,}|dop_v1_[a-f0-9]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r")",
    re.DOTALL,
)
# Credentials in an authorization header. In prose, "bearer" is followed by an ordinary word.
_HEADER = re.compile(
    r"(?i)\b(authorization[\"']?[ \t]{0,20}[:=][ \t]{0,20}[\"']?(?:\w{1,20}[ \t]{1,20})?"
    r"|bearer[ \t]{1,20}(?=[\w.~+/=-]{0,400}[\d_~+/=-]))[\w.~+/=-]{4,}+(?![ \t]+\*\*\*)"
)
# A password may contain a slash; a port is not a password.
_URL = re.compile(
    r"\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)(?:[^\s/'\"<>?#]+|[^\s/@:'\"<>]{0,200}:(?!\d*/)[^\s@'\"<>]{0,200})@"
)
_OPTION = re.compile(
    r"(?<!\S)(--?(?P<name>[\w-]{1,80})[ \t]{1,20})(?=[^\s-])(?!'\*\*\*')(?:'[^'\n]*'|\"[^\"\n]*\"|\S+)"
)
# Signatures in the URLs of Azure, AWS or Google.
_SIGNED = re.compile(r"(?i)((?:[?&;]|%3F|%26)(?:sig|signature)(?:=|%3D))[^\s\"'<>&#*]{6,}")
_CURL = re.compile(  # but not numeric ids of a user and a group
    r"(?<!\S)((?:-u|--user|--proxy-user)[ \t=]{0,20}[\"']?[^\s:\"']{1,80}:)"
    r"(?!\*\*\*|(?<=\d:)\d{1,6}(?!\S))[^\s\"']+"
)
# In a netrc file: an entry, or a password on its own that contains a digit.
_NETRC = re.compile(
    r"(\b(?:machine\s{1,20}\S{1,200}|default)\s{1,20}login\s{1,20}\S{1,80}\s{1,20}password\s{1,20}"
    r"|\bpassword[ \t]{1,20}(?=[^\s\d]{0,80}\d)(?=\S{6}))(?!\*\*\*)\S+"
)
# `NAME=value`, `name: value`, `"name": "value"`, also percent-encoded.
_ASSIGNED = re.compile(
    r"(?P<name>(?:(?<!\w)|(?<=%[0-9A-Fa-f][0-9A-Fa-f]))[A-Za-z_][\w.-]{0,80}+)"
    r"(?P<between>(?:\\?[\"']|%2[27])?(?:[ \t]|%20){0,20}(?:[=:]|%3[ADad])(?:[ \t]|%20){0,20}(?:%2[27])?)"
)
# Up to the quote or bracket that ends it, or to a space. In JSON within JSON, quotes are `\"` and those within `\\\"`.
_VALUE = re.compile(
    r"(?P<quote>\\?[\"']|)(?:"
    r"(?<=\\\")(?:[^\"\\\n]|\\\\(?:\\\")?|\\[^\"\\\n])*(?:\\\")?|(?<=\\')(?:[^'\\\n]|\\[^'\n])*(?:\\')?"
    r"|(?<=\")(?:[^\"\\\n]|\\[^\n])*\"?|(?<=')(?:[^'\\\n]|\\[^\n]|'')*'?"
    r"|\[[^\]]{0,1000}\]|\([^)]{0,1000}\)|\{[^}]{0,1000}\}"
    r"|[\[({]?[^\s\"',;&}\])]*)"
)
_NOT_SECRET = {"", "none", "null", "true", "false", "~", "bearer", "basic", STARS, "[]", "{}", "()"}
# A name that is an everyday word too, as in "The key: think first" and "Solve for key = 3".
_EVERYDAY = re.compile(r"(?!.*pass)[A-Z]?[a-z]+")
_LOOKS_SECRET = re.compile(r"(?=.*(?:\d|[a-z][A-Z]))(?!\d+\.\d+$|.*://)[^\s\\^{}|<>()\[\]]{12,}")
_WORD = re.compile(r"\\?[\"']?([^\s\"',;&}\])]{0,100})")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a value with this name is a secret.

    Example:
        >>> [is_secret_name(name) for name in ("hub_token", "PGPASSWORD", "apiKey", "AWS_ACCESS_KEY_ID")]
        [True, True, True, True]
        >>> [is_secret_name(name) for name in ("pad_token", "max_prompt_tokens", "num_key_value_heads", "tokenizer")]
        [False, False, False, False]
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    if re.fullmatch(r"[A-Z0-9]+PASS", name):  # SSHPASS
        return True
    words = [word.lower() for word in words]
    if not words:
        return False
    joined, last = "".join(words), words[-1]
    if words[0] in _TEXT_TOKENS - {"ref"} and last in ("token", "tokens"):
        return False
    if _ALWAYS.search(joined) or _WORDS & set(words) or last in _LAST_WORDS:
        return True
    if "token" in words:
        at = words.index("token")
        before, after = words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else ""
        return before not in _TEXT_TOKENS and after not in _AFTER_TOKEN
    return last == "key" and (len(words) == 1 or words[-2] not in _PLAIN_KEYS)


def mask(text: str) -> str:
    """Replace every secret in a text, recognised by its shape or by the name before it, with stars.

    Example:
        >>> mask("https://me:s3cret@example.com/?api_key=abc&tau=0.3")
        'https://***@example.com/?api_key=***&tau=0.3'
    """
    text = _SHAPES.sub(STARS, text)
    text = _URL.sub(rf"\1{STARS}@", text)
    for pattern in (_SIGNED, _CURL, _NETRC):
        text = pattern.sub(rf"\1{STARS}", text)
    text = _HEADER.sub(rf"\1{STARS}", text)
    text = _OPTION.sub(lambda match: f"{match[1]}{STARS}" if is_secret_name(match["name"]) else match[0], text)
    return _mask_assigned(text)


def _mask_assigned(text: str) -> str:
    parts, position = [], 0
    while match := _ASSIGNED.search(text, position):
        name, start = match["name"], match.end()
        parts.append(text[position:start])
        position = start
        if is_secret_name(name) and not _is_prose(name, match["between"], text, match.start(), start):
            value = _VALUE.match(text, start)
            if value and value[0].strip("\\\"'").lower() not in _NOT_SECRET:
                parts.append(f"{value['quote']}{STARS}{value['quote']}")
                position = value.end()
    return "".join([*parts, text[position:]])


def _is_prose(name: str, between: str, text: str, begin: int, start: int) -> bool:
    """Whether a name that is also an everyday word is only a word here: the next text does not look like a secret."""
    if not _EVERYDAY.fullmatch(name):
        return False
    found = _WORD.match(text, start)  # bounded: a text may be one long value
    word = found[1] if found else ""
    if name.lower() == "key" and re.fullmatch(r"-?\d[\d.]*", word):
        return True
    if between.strip() == ":":
        return not _LOOKS_SECRET.fullmatch(word)
    if not re.fullmatch(r"[ \t]+=[ \t]+", between) or text[start : start + 1] in ("'", '"'):
        return False
    if not text[max(0, begin - 80) : begin].rpartition("\n")[2].strip():
        return False  # a line of a configuration
    return len(word) < 6 or word.isalpha()


def redact(value: Any, left_out: list[str] | None = None, path: str = "") -> Any:
    """Remove entries with a secret's name, at any depth, and replace text with a secret's shape with stars.

    Args:
        value: Dictionaries, lists, text (which may contain JSON); anything else stays unchanged.
        left_out: Receives the names of removed entries, such as `model_init_kwargs.token`.
        path: Name of the value itself, for `left_out`.

    Example:
        >>> redact({"tau": 0.3, "hub_token": "x", "model_init_kwargs": '{"token": "y", "revision": "z"}'})
        {'tau': 0.3, 'model_init_kwargs': '{"revision": "z"}'}
    """
    left_out = [] if left_out is None else left_out
    if isinstance(value, dict):
        kept = {}
        for name, content in value.items():
            name_path = f"{path}.{name}" if path else str(name)
            if is_secret_name(str(name)) and not isinstance(content, (bool, type(None))):
                left_out.append(mask(name_path))
            else:
                kept[mask(name) if isinstance(name, str) else name] = redact(content, left_out, name_path)
        return kept
    if type(value) in (list, tuple):
        hidden = _secret_items(value)
        return type(value)(
            STARS if at in hidden else redact(content, left_out, path) for at, content in enumerate(value)
        )
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("{", "["):  # options may be given as JSON
        try:
            content = json.loads(value)
        except json.JSONDecodeError:
            pass
        else:
            clean = redact(content, left_out, path)
            return value if clean == content else json.dumps(clean)
    masked = mask(value)
    return value if masked == value else masked  # an enumeration's text stays one


def _secret_items(items: list | tuple) -> set[int]:
    """Indices of values that follow their option, as `["--token", value]`, or their name, as `("token", value)`."""
    hidden = set()
    for at, (name, value) in enumerate(zip(items, items[1:], strict=False)):
        if not isinstance(name, str) or not isinstance(value, str) or value.lower() in _NOT_SECRET:
            continue
        if name.startswith("-"):
            secret = is_secret_name(name.lstrip("-")) and "=" not in name and not value.startswith("--")
        elif len(items) == 2 and re.fullmatch(r"[\w.-]+", name) and is_secret_name(name):
            # "key" and "value" are also names of layers and columns, and two names are a list of names.
            names = name.lower() in ("key", "keys") or is_secret_name(value)
            secret = not names or bool(_LOOKS_SECRET.fullmatch(value))
        else:
            secret = False
        if secret:
            hidden.add(at + 1)
    return hidden


def secret_problems(file: str, content: dict, path: str = "") -> Iterator[str]:
    """A message for each secret in content that will be copied unchanged, such as options for another run's recipe.

    Args:
        file: The file with the content, for the message.
        content: Options, at any depth.
        path: Name of the content itself.

    Example:
        >>> [message.partition(" is")[0] for message in secret_problems("plan.yaml", {"train": {"hub_token": "x"}})]
        ['plan.yaml: train.hub_token']
    """
    for name, value in content.items():
        name_path = f"{path}.{name}" if path else str(name)
        clean = redact({name: value})
        if clean == {name: value}:
            continue
        if isinstance(value, dict) and name in clean:
            yield from secret_problems(file, value, name_path)
        else:
            yield (
                f"{file}: {mask(name_path)} is or contains a secret, which would be copied into every run's recipe. "
                "Remove it, and log in with `hf auth login` or set an environment variable."
            )


def redact_words(words: list[str]) -> list[str]:
    """Words of a command line with the values of secret options, separate, after `=` or inside JSON, as stars."""
    shown, secret = [], False
    for word in words:
        option, equals, value = word.partition("=")
        if word.startswith("--"):
            secret = is_secret_name(option.lstrip("-"))
            shown.append(f"{option}={STARS if secret else redact(value)}" if equals else word)
            secret = secret and not equals
        else:
            shown.append(STARS if secret else redact(word))
    return shown
