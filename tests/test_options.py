"""Names and types of options read from source are those of the parser."""

import subprocess
import sys

import pytest

from trl_capo.methods import METHODS
from trl_capo.options import known_options
from trl_capo.recipe import make_parser


@pytest.mark.parametrize("method", METHODS)
def test_the_source_has_the_options_of_the_parser(method):
    parsed = {action.dest for action in make_parser(method)._actions} - {"help", "config"}
    known = known_options(method)
    assert known is not None
    assert {name for name in parsed if name.removeprefix("no_") not in known} == set()
    assert set(known) - parsed == set()


def test_options_are_checked_before_anything_heavy_is_imported():
    code = (
        "import sys; from trl_capo.recipe import check_options, make_parser; check_options(['--tau', '0.5'], 'capo'); "
        "assert not {'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
