"""Reads recipes and checks options before anything heavy is imported.

Importing a configuration class takes seconds, because TRL brings torch along. The names and annotations of its fields
stand in the source, so they are read from there (`option_annotations`): never stale, in a fraction of a second. Where
the source cannot be followed, nothing is refused here and the parser of `trl-capo train` decides.
"""

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from trl_capo.errors import UserError


# A recipe may come from a stranger. Variables can replace programs and libraries, or send tokens and data elsewhere,
# so only those that tune or name a run may stand in one.
ENV_PREFIXES = ("HF_", "NCCL_", "TOKENIZERS_", "TORCH_NCCL_", "TRACKIO_", "VLLM_", "WANDB_")
ENV_NAMES = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
    "TRL_EXPERIMENTAL_SILENCE",
}
# Words of a name that is refused in spite of its prefix: credentials, addresses, and code or files to load.
ENV_REFUSED = re.compile(
    r"(^|_)(TOKEN|KEY|SECRET|PASS|PASSWORD|PASSWD|CREDENTIALS?|AUTH|NETRC|ENDPOINT|URL|URI|HOST|PROXY|SERVER|PLUGINS?"
    r"|PATH|LIB|LIBRARY|MODULES?|CONF|FILE|COMMAND|EXECUTABLE|WORKER|CLASS|CLS|HOOKS?|TUNER|NET|INSECURE|TRUST|PICKLE"
    r"|KERNELS?)(_|$)"
)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a file of `key: value` lines.

    Args:
        path: A YAML file.

    Returns:
        Its content.

    Raises:
        UserError: The path is no file, or the file is not YAML, is empty, holds no keys or holds one twice.
        OSError: It cannot be read.
    """
    import yaml

    if Path(path).is_dir():
        raise UserError(f"{path} is a folder. Give the YAML file in it.")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _loader())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        found = "nothing" if not content else type(content).__name__
        raise UserError(f"{path} must hold one `key: value` a line, got {found}.")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise UserError(f"{path}: key {strange[0]!r} is not text. Put it in quotes, or remove it.")
    return content


@lru_cache(maxsize=1)
def _loader():
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML takes the last of two equal keys without a word."""

        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value!r} appears twice; keep one", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def check_env(path: str, env: Any) -> None:
    """Refuse environment variables that a recipe may not set.

    Raises:
        UserError: Names the variable.
    """
    if env is None:
        return
    if not isinstance(env, dict):
        raise UserError(f"{path}: env must hold one `NAME: value` a line, got {env!r}.")
    for name, value in env.items():
        allowed = isinstance(name, str) and (name in ENV_NAMES or name.startswith(ENV_PREFIXES))
        if not allowed or (name not in ENV_NAMES and ENV_REFUSED.search(name)):
            raise UserError(
                f"{path}: env may not set {name!r}, because it can run other code or send data elsewhere. If you mean "
                "it, remove it here and `export` it in the shell. recipes/README.md lists what a recipe may set."
            )
        if not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise UserError(f"{path}: env {name} must be text or a number, got {value!r}.")


def check_recipe(
    path: str, recipe: dict, method: str, methods: dict[str, tuple[str, str]], classes: list[str]
) -> None:
    """Refuse a recipe with a key that is no option of its method, or a value of another type.

    Args:
        path: Names the recipe in messages.
        recipe: Its content.
        method: Which method it is for.
        methods: `METHODS` of `trl-capo train`.
        classes: The other dataclasses whose fields are options, as `module:Class`.

    Raises:
        UserError: Says which key, and what may have been meant.
    """
    check_env(path, recipe.get("env"))
    if {"baseline", "methods"} <= recipe.keys():
        raise UserError(f"{path} is a plan for `trl-capo compare`, not a recipe for `trl-capo train`.")
    known = known_options(method, methods, classes)
    if known is None:
        return
    for key, value in recipe.items():
        if key == "env":
            continue
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}.{_hint(key, list(known), key, method, methods)}")
        if problem := value_problem(value, known[key]):
            raise UserError(f"{path}: {key} must be {problem}, got {value!r}.")


def check_options(argv: list[str], method: str, methods: dict[str, tuple[str, str]], classes: list[str]) -> None:
    """Refuse an unknown option, or a value of another type, on the command line.

    Raises:
        UserError: Says which, and what may have been meant.
    """
    known = known_options(method, methods, classes)
    if known is None:
        return
    extra = {"config", "help", "dry_run", "accelerate_config", "gpu_memory"}
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if name in extra or name.removeprefix("no_") in known and name not in known:
            continue
        if name not in known:
            spelt = [f"--{key}" for key in [*known, *extra]]
            raise UserError(f"unknown option {option}.{_hint(option, spelt, name, method, methods)}")
        if not equals:
            value = argv[position + 1] if position + 1 < len(argv) else "--"
        if not value.startswith("--") and (problem := value_problem(value, known[name])):
            raise UserError(f"{option} must be {problem}, got {value!r}.")


def known_options(method: str, methods: dict[str, tuple[str, str]], classes: list[str]) -> dict[str, str] | None:
    """Annotation by name of every option of a method; None if the source cannot be followed."""
    known: dict[str, str] = {}
    for name in [methods[method][0], *classes]:
        annotations = option_annotations(name)
        if annotations is None:
            return None
        known |= annotations
    return known


def value_problem(value: Any, annotation: str) -> str | None:
    """What a value should be and is not, by a field's annotation; None if it will do, or only the parser can tell."""
    kinds = {kind.strip() for kind in annotation.replace("Optional[", "").replace("]", "").split("|")}
    optional = "None" in kinds or annotation.startswith("Optional[")
    kinds -= {"None"}
    if len(kinds) != 1 or (kind := kinds.pop()) not in ("int", "float", "bool", "str"):
        return None
    if value is None:
        return None if optional or kind == "str" else {"bool": "true or false"}.get(kind, "a number")
    if kind == "str":
        return "text" if isinstance(value, (list, dict)) else None
    text = value.strip().lower() if isinstance(value, str) else value
    if kind == "bool":
        ok = isinstance(value, bool) or text in (0, 1, "true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
        return None if ok else "true or false"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return "a whole number" if kind == "int" else "a number"
    try:
        number = float(text)
    except ValueError:
        return "a whole number" if kind == "int" else "a number"
    if kind == "float":
        return None
    whole = re.fullmatch(r"[+-]?\d[\d_]*", text) if isinstance(text, str) else number.is_integer()
    return None if whole else "a whole number"


@lru_cache(maxsize=64)
def option_annotations(reference: str) -> dict[str, str] | None:
    """Fields of a dataclass with their annotations, its bases' included, from its source.

    Args:
        reference: `module:Class`; the class may stand inside a function.

    Returns:
        Annotation by name; None if the class or one of its bases cannot be found.
    """
    module, _, name = reference.partition(":")
    found = _find_class(module, name)
    if found is None:
        return None
    module, node = found
    fields: dict[str, str] = {}
    for base in reversed(node.bases):
        if not isinstance(base, ast.Name):
            return None
        inherited = option_annotations(f"{module}:{base.id}") if base.id != "object" else {}
        if inherited is None:
            return None
        fields |= inherited
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            annotation = ast.unparse(statement.annotation).strip("'\"")
            if not annotation.startswith("ClassVar"):
                fields[statement.target.id] = annotation
    return fields


def _find_class(module: str, name: str, depth: int = 0) -> tuple[str, ast.ClassDef] | None:
    """Where a class is defined, through the imports that bring it into a module, lazy ones included."""
    source = _source(module)
    if source is None or depth > 8:
        return None
    is_package, tree = source
    for node in _classes_and_imports(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".") if is_package else module.split(".")[:-1]
                    package = parts[: len(parts) - node.level + 1] if node.level else []
                    target = ".".join([*package, *([node.module] if node.module else [])])
                    if found := _find_class(target, alias.name, depth + 1):
                        return found
    return None


@lru_cache(maxsize=64)
def _source(module: str) -> tuple[bool, ast.Module] | None:
    """Whether a module is a package, and its syntax tree, without importing it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # of a top-level name, which imports nothing
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], *rest)
    for is_package, file in ((False, path.with_name(f"{path.name}.py")), (True, path / "__init__.py")):
        if rest and not is_package or is_package:
            try:
                return is_package, ast.parse(file.read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):
                continue
    return None


def _classes_and_imports(tree: ast.Module) -> Iterator[ast.stmt]:
    """Also those inside functions and `if TYPE_CHECKING`. Bodies only: expressions hold neither."""
    pending: list[ast.stmt] = list(tree.body)
    for node in pending:
        yield node
        for part in ("body", "orelse", "finalbody"):
            pending += getattr(node, part, [])


def _hint(typed: str, spelt: list[str], name: str, method: str, methods: dict[str, tuple[str, str]]) -> str:
    owners = [other for other, (config, _) in methods.items() if name in (option_annotations(config) or {})]
    if owners:
        return f" It is an option of {owners[0]}, not of {method}."
    close = difflib.get_close_matches(typed, spelt, n=1)
    return f" Did you mean {close[0]!r}?" if close else " See trl-capo train --help for the options."
