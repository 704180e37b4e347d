"""JSON is written whole or not at all, and a folder is of one run."""

import json
import math

import pytest

from trl_capo.errors import UserError
from trl_capo.files import check_names, remember_settings, write_json


def test_nan_becomes_null_and_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [math.nan, 1.5], "y": {"z": -math.inf}, "w": (1, "NaN")})
    assert json.loads(path.read_text()) == {"x": [None, 1.5], "y": {"z": None}, "w": [1, "NaN"]}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == [None, 1.5]


def test_a_folder_is_of_one_run(tmp_path):
    remember_settings(tmp_path / "run", {"seed": 0, "names": ("a", "b")}, "a demo")
    before = (tmp_path / "run" / "settings.json").stat().st_mtime_ns
    remember_settings(tmp_path / "run", {"seed": 0, "names": ("a", "b")}, "a demo")
    assert (tmp_path / "run" / "settings.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="already contains a demo with seed=0. Rerun with these settings"):
        remember_settings(tmp_path / "run", {"seed": 1, "names": ["a", "b"]}, "a demo")
    with pytest.raises(ValueError, match="with names=.'a', 'b'.. "):
        remember_settings(tmp_path / "run", {"seed": 0}, "a demo")


def test_names_are_counted_in_bytes():
    check_names("models", ["é" * 100, "a" * 120])
    with pytest.raises(UserError, match="models: .* has 400 bytes in UTF-8"):
        check_names("models", ["🙂" * 100])
