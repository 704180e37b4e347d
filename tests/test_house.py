"""The house as CONTRIBUTING describes it: one room a job, arrows that run downward, TRL's insides in one room."""

import ast
import re
from pathlib import Path

import pytest

import trl_capo


PACKAGE = Path(trl_capo.__file__).parent

# From the ground up: a room may import from its own floor and from those before it.
FLOORS = [
    ("errors", "extras", "files", "imports", "markdown", "redact", "processes", "progress", "ranks", "__init__"),
    ("cli", "workers"),
    ("calibration",),
    ("grading", "models", "rewards"),
    ("data",),
    ("evaluation",),
    ("worlds",),
    ("publish",),
    ("preflight",),
    ("report",),
    ("trainer",),
    ("methods", "advantages"),
    ("options", "recipe"),
    ("planning",),
    ("compare",),
    ("scripts",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MAX_LINES, MAX_CLASS_LINES, MAX_SCRIPT_LINES = 400, 250, 1100


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, also within functions, but not for type checking alone."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("trl_capo.") for name in names if name.startswith("trl_capo.")}
    return {name for name in inside if name in known} | {f"{name}.__init__" for name in inside} & known


MODULES = modules()
GRAPH = {name: imports(tree, set(MODULES)) - {name} for name, tree in MODULES.items() if name != "__init__"}


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_arrows_run_downward(name):
    room = name.split(".")[0]
    upward = [other for other in GRAPH[name] if FLOOR[other.split(".")[0]] > FLOOR[room]]
    assert not upward, f"{name} imports from above: {upward}"


def test_contributing_draws_every_room_in_this_order_and_every_layer(repository):
    from trl import GRPOTrainer

    from trl_capo import GroupAdvantageTrainer

    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The house")[2]
    rooms, ground, layers = text.split("```")[1:6:2]
    drawn = [[re.match(r"\w+", line)[0] for line in block.strip().splitlines()] for block in (rooms, ground)]
    assert sorted(drawn[0] + drawn[1]) == sorted(FLOOR.keys() - {"__init__"})
    floors = [FLOOR[room] for room in drawn[0]]
    assert floors == sorted(floors, reverse=True) and {FLOOR[room] for room in drawn[1]} == {0}
    mro = GroupAdvantageTrainer.__mro__
    stack = [kind.__name__ for kind in mro[: mro.index(GRPOTrainer)]]
    assert [line.split()[0] for line in layers.strip().splitlines()] == [*stack, "trl.GRPOTrainer"]


def test_no_module_imports_itself_by_a_detour():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in GRAPH.get(name, ()):
                visit(other)
            done.add(path.pop())

    for name in GRAPH:
        visit(name)


def test_files_and_classes_fit_in_a_head():
    long_files = {p: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long_files, long_files
    classes = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert not {name: n for name, n in classes.items() if n > MAX_CLASS_LINES}


def test_a_script_parses_and_prints():
    lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "scripts").glob("*.py"))
    assert lines < MAX_SCRIPT_LINES, lines


def private_names_of_trl() -> set[str]:
    """What `GRPOTrainer` and its parents define with one leading underscore."""
    from trl import GRPOTrainer

    return {name for name in dir(GRPOTrainer) if name.startswith("_") and not name.startswith("__")}


def test_private_names_of_trl_appear_in_the_trainer_room_only():
    # What TRL has a subclass define for its card is no secret of its inside.
    private = private_names_of_trl() - {"_name", "_paper", "_tag_names"}
    found = {
        f"{name}: {used}"
        for name, tree in MODULES.items()
        if not name.startswith("trainer")
        for node in ast.walk(tree)
        for used in [getattr(node, "attr", None) or (node.name if isinstance(node, ast.FunctionDef) else None)]
        if used in private
    }
    assert not found, sorted(found)


def opens_text_by_locale(call: ast.Call) -> bool:
    """Whether a call reads or writes text in an encoding that depends on the machine."""
    attribute = isinstance(call.func, ast.Attribute)
    name = call.func.attr if attribute else getattr(call.func, "id", "")
    if name not in ("open", "read_text", "write_text") or any(word.arg == "encoding" for word in call.keywords):
        return False
    if attribute and ast.unparse(call.func.value) == "os" or not attribute and name != "open":
        return False  # os.open is of bytes, and our own write_text of UTF-8
    return name != "open" or not any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in call.args)


def test_text_is_utf8_on_every_machine():
    found = [
        f"{name}:{node.lineno}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and opens_text_by_locale(node)
    ]
    assert not found
