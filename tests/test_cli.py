import importlib
import subprocess
import sys
import time
import types

import pytest

import trl_capo
from trl_capo import cli


IMPORT = "from trl_capo.errors import UserError"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    command = ["-c", code] if code else ["-m", "trl_capo.cli", *arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)


@pytest.fixture
def script(monkeypatch):
    """A command `fake` whose module is made from the given source, as if it were `trl_capo/scripts/fake.py`."""

    def make(source: str) -> None:
        module = types.ModuleType("trl_capo.scripts.fake")
        exec(source, module.__dict__)
        monkeypatch.setitem(sys.modules, "trl_capo.scripts.fake", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", "a command of this test")

    return make


def test_help_lists_every_command_within_a_second():
    seconds = []
    for _ in range(3):  # best of three: the machine may be busy
        start = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert all(name in result.stdout and text in result.stdout for name, text in cli.COMMANDS.items())
    assert min(seconds) < 1.0


def test_import_stays_light():
    heavy = "('torch', 'trl', 'transformers', 'datasets', 'accelerate', 'matplotlib')"
    result = run(code=f"import sys, trl_capo.cli; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_script_with_parser_and_main(name):
    module = importlib.import_module(f"trl_capo.scripts.{name}")
    assert callable(module.main)
    assert callable(module.make_parser)


def test_version():
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout == f"trl-capo {trl_capo.__version__}\n"


def test_nothing_asked_for_shows_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: trl-capo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "hint"), [("trian", "did you mean 'train'?"), ("xyz", "choose from train, data, evaluate, ")]
)
def test_unknown_command_is_one_line(typed, hint, capsys):
    assert cli.main([typed, "--config", "x.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"trl-capo: error: unknown command '{typed}': {hint}")
    assert captured.err.count("\n") == 1


def test_arguments_and_exit_code_are_passed_on(script, capsys):
    script("def main(argv):\n    print(argv)\n    return len(argv)")
    assert cli.main(["fake", "--tau", "0.6", "--help"]) == 3
    assert capsys.readouterr().out == "['--tau', '0.6', '--help']\n"
    script("def main(argv): pass")
    assert cli.main(["fake"]) == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{IMPORT}; raise UserError('tau must be positive,\\n    got -1')", "tau must be positive, got -1"),
        ("open('/no/such/recipe.yaml')", "/no/such/recipe.yaml: No such file or directory"),
        ("import os; os.makedirs('/dev/null/run')", "/dev/null/run: Not a directory"),
        ("raise OSError('no model of this name')", "no model of this name"),
    ],
)
def test_user_error_is_one_line(script, capsys, body, message):
    script(f"def main(argv):\n    {body}")
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == f"trl-capo fake: error: {message}\n"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("taau: 1.0", "taau"), ("tau: [1", "expected ',' or ']'"), ("tau: -1.0", "tau must be positive")],
)
def test_error_in_a_recipe_is_one_line(capsys, tmp_path, recipe, message):
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n{recipe}")
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trl-capo train: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise ValueError('a bug')", ValueError),
        ("import json; json.loads('{')", ValueError),
        ("{}['missing']", KeyError),
        ("raise RuntimeError('bug')", RuntimeError),
    ],
)
def test_unexpected_error_keeps_its_traceback(script, body, error):
    script(f"def main(argv):\n    {body}")
    with pytest.raises(error):
        cli.main(["fake"])


def test_traceback_on_request(script, monkeypatch):
    script(f"def main(argv):\n    {IMPORT}; raise UserError('tau must be positive')")
    monkeypatch.setenv("TRL_CAPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="tau must be positive"):
        cli.main(["fake"])


def test_interrupted(script, capsys):
    script("def main(argv):\n    raise KeyboardInterrupt")
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err.strip() == "trl-capo fake: stopped by SIGINT"
