"""The options of each method and their types, without importing anything heavy.

Importing a configuration class takes seconds, because TRL imports torch. `option_annotations` therefore reads the
names and annotations of its fields from the source, in a fraction of a second and always up to date. If it cannot
follow the source, nothing is refused here, and the parser of `trl-capo train` decides. A method from outside the
package is imported, because its class may be built in any way.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from inspect import get_annotations
from pathlib import Path
from typing import Any

from trl_capo.methods import METHODS, trainer_of
from trl_capo.preflight.numbers import number_problem


# Classes whose fields are options of every method.
OPTION_CLASSES = [
    "trl_capo.recipe:TrainArguments",
    "trl:ModelConfig",
    "trl_capo.data.training:DataArguments",
    "trl:DatasetMixtureConfig",
]

FILE_OR_JSON = ("accelerator_config", "deepspeed", "fsdp_config")  # dictionary options that also accept a file


def known_options(method: str) -> dict[str, str] | None:
    """All options of a method, as annotations by name; None if the source cannot be followed.

    Raises:
        UserError: A method from outside the package cannot be imported, or is not a trainer.
    """
    known: dict[str, str] = {}
    for annotations in [options_of_method(method), *map(option_annotations, OPTION_CLASSES)]:
        if annotations is None:
            return None
        known |= annotations
    return known


def options_of_method(method: str) -> dict[str, str] | None:
    """Like `known_options`, without the options that all methods share."""
    if method in METHODS:
        config = _config_class(METHODS[method])
        return option_annotations(config) if config else None
    return annotations_of(trainer_of(method).config_class)


def annotations_of(config_class: type) -> dict[str, str]:
    """Fields of a dataclass with their types as they are written: `int`, `list[str] | None`."""
    # Not from the fields themselves: a parser that was made for them has taken `| None` away.
    kinds = {name: kind for cls in reversed(config_class.__mro__) for name, kind in get_annotations(cls).items()}
    kinds = {field.name: kinds[field.name] for field in dataclasses.fields(config_class)}
    return {
        name: kind.__name__ if type(kind) is type else str(kind).removeprefix("typing.")
        for name, kind in kinds.items()
    }


def value_problem(value: Any, annotation: str) -> str | None:
    """What a field's annotation requires, if the value is wrong; None if it is right or only the parser can tell."""
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


def option_problem(name: str, value: Any, annotation: str) -> str | None:
    """What an option's value must be, if its type, range or JSON is wrong; None if the value is acceptable."""
    if "dict" in annotation and isinstance(value, str):
        is_file = name in FILE_OR_JSON and not value.lstrip().startswith("{")
        return None if is_file else _json_problem(value)
    problem = value_problem(value, annotation)
    if problem is None and re.search(r"\b(int|float)\b", annotation):
        problem = number_problem(name, value)
    return problem


def _json_problem(value: str) -> str | None:
    try:
        content = json.loads(value)
    except ValueError as error:
        return f"JSON such as '{{\"key\": 1}}' ({error})"
    return None if content is None or isinstance(content, dict) else "JSON such as '{\"key\": 1}'"


def suggestion(typed: str, spelt: list[str], name: str, method: str) -> str:
    """The end of a message about an option that a method does not have: the option you may have meant."""
    owners = [other for other in METHODS if name in (options_of_method(other) or {})]
    if owners:
        return f" It is an option of {owners[0]}, not of {method}."
    close = difflib.get_close_matches(typed, spelt, n=1)
    return f" Did you mean {close[0]!r}?" if close else " See trl-capo train --help for the options."


@lru_cache(maxsize=64)
def option_annotations(reference: str) -> dict[str, str] | None:
    """Read the fields of a dataclass and of its bases, with their annotations, from the source.

    Args:
        reference: `module:Class`. The class may be defined inside a function.

    Returns:
        Annotations by field name; None if the class or one of its bases cannot be found.
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


@lru_cache(maxsize=64)
def _config_class(trainer: str) -> str | None:
    """The `config_class` of a trainer, or of its first base that has one; both as `module:Class`."""
    found = _find_class(*trainer.split(":"))
    if found is None:
        return None
    module, node = found
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
            if [ast.unparse(target) for target in statement.targets] == ["config_class"]:
                return f"{module}:{statement.value.id}"
    bases = (_config_class(f"{module}:{base.id}") for base in node.bases if isinstance(base, ast.Name))
    return next(filter(None, bases), None)


@lru_cache(maxsize=256)
def _find_class(module: str, name: str, depth: int = 0) -> tuple[str, ast.ClassDef] | None:
    """Find where a class is defined by following imports, including lazy ones."""
    source = _source(module)
    if source is None or depth > 8:
        return None
    is_package, tree = source
    for node in _classes_and_imports(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            if name in [ast.unparse(target) for target in node.targets]:
                return _find_class(module, node.value.id, depth + 1)
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
    spec = importlib.util.find_spec(top)  # imports nothing, because the name is top-level
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
    """All statements, including those inside functions and `if TYPE_CHECKING`, whose `else` runs and comes first."""
    pending: list[ast.stmt] = list(tree.body)
    for node in pending:
        yield node
        for part in ("orelse", "body", "finalbody"):
            pending += getattr(node, part, [])
