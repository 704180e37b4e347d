"""Names and types of options read from source are those of the parser."""

import subprocess
import sys

import pytest

from trl_capo.errors import UserError
from trl_capo.methods import METHODS
from trl_capo.options import annotations_of, known_options, value_problem
from trl_capo.recipe import check_recipe, make_parser


@pytest.mark.parametrize("method", METHODS)
def test_the_source_has_the_options_of_the_parser(method):
    parsed = {action.dest for action in make_parser(method)._actions} - {"help", "config"}
    known = known_options(method)
    assert known is not None
    assert {name for name in parsed if name.removeprefix("no_") not in known} == set()
    assert set(known) - parsed == set()


@pytest.mark.parametrize("method", METHODS)
def test_the_source_has_the_types_of_the_classes(method):
    """`if TYPE_CHECKING` may hold a class for the type checker that takes less than the one that runs."""
    known = known_options(method)
    fields = {name: kind for cls in make_parser(method).dataclass_types for name, kind in annotations_of(cls).items()}
    for value in (None, "text", "null", 1, 1.5, True, ["a"], {"a": 1}):
        said = {name: value_problem(value, known[name]) for name in fields}
        assert said == {name: value_problem(value, kind) for name, kind in fields.items()}


def test_null_is_refused_only_where_the_parser_refuses_it():
    check_recipe("r.yaml", {"steps_per_generation": None, "generation_batch_size": 64}, "capo")
    with pytest.raises(UserError, match="max_steps must be a number, got None"):
        check_recipe("r.yaml", {"max_steps": None}, "capo")


def test_options_are_checked_before_anything_heavy_is_imported():
    code = (
        "import sys; from trl_capo.recipe import check_options, make_parser; check_options(['--tau', '0.5'], 'capo'); "
        "assert not {'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
