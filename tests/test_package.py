"""Importing the package is cheap and says at once if TRL does not fit."""

import subprocess
import sys

import pytest

import trl_capo


def test_import_loads_nothing_heavy():
    code = "import sys, trl_capo; print([name for name in ('torch', 'trl', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("installed", ["1.15.3", "1.17.0", "2.0.0", "1.1.16"])
def test_another_trl_is_refused_with_what_to_install(monkeypatch, installed):
    monkeypatch.setattr(trl_capo, "version", lambda name: installed)
    with pytest.raises(ImportError, match=f"TRL {installed} is installed. Run: pip install 'trl.math-verify.>=1.16"):
        trl_capo._check_trl_version()


def test_missing_trl_is_named(monkeypatch):
    def missing(name):
        raise trl_capo.PackageNotFoundError(name)

    monkeypatch.setattr(trl_capo, "version", missing)
    with pytest.raises(ImportError, match="trl_capo needs TRL: pip install"):
        trl_capo._check_trl_version()


@pytest.mark.parametrize("installed", ["1.16.0", "1.16.4", "1.16.1.dev0"])
def test_tested_versions_pass(monkeypatch, installed):
    monkeypatch.setattr(trl_capo, "version", lambda name: installed)
    trl_capo._check_trl_version()


def test_public_names():
    assert {name: getattr(trl_capo, name).__name__ for name in trl_capo.__all__} == {
        name: name for name in trl_capo.__all__
    }
    with pytest.raises(AttributeError, match="has no attribute 'CAPO'"):
        trl_capo.CAPO  # noqa: B018
