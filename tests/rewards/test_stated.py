"""Stated confidence: what is read, what is refused, and that no text is slow or fatal to read."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_capo.errors import UserError
from trl_capo.rewards.stated import FORMATS, rlcr_confidence, stated_confidence, terminal_tags


def tagged(content: str, before: str = "It is 7. ", after: str = "") -> str:
    return f"{before}<confidence>{content}</confidence>{after}"


@pytest.mark.parametrize(
    ("content", "scale", "expected"),
    [
        ("0.8", "unit", 0.8),
        (" .5\n", "unit", 0.5),
        ("1", "unit", 1.0),
        ("0.", "unit", 0.0),
        ("80%", "unit", 0.8),
        ("80 %", "percent", 0.8),
        ("80", "percent", 0.8),
        ("0.5", "percent", 0.005),
        ("7", "ten", 0.7),
        ("10", "ten", 1.0),
    ],
)
def test_numbers_on_their_scale(content, scale, expected):
    assert stated_confidence(tagged(content), scale=scale) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("content", "scale"),
    [
        ("8", "unit"),
        ("80", "unit"),
        ("1.01", "unit"),
        ("101", "percent"),
        ("120%", "unit"),
        ("11", "ten"),
        ("80%", "ten"),
        ("-0.5", "unit"),
        ("nan", "unit"),
        ("inf", "unit"),
        ("1e-1", "unit"),
        ("0,8", "unit"),
        ("about 0.8", "unit"),
        ("0.8 0.9", "unit"),
        ("", "unit"),
        ("\u0660.\u0668", "unit"),
        ("0." + 50 * "1", "unit"),
    ],
)
def test_anything_else_is_nan_and_no_scale_is_guessed(content, scale):
    assert math.isnan(stated_confidence(tagged(content), scale=scale))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.8",
        "<confidence>0.8",
        "0.8</confidence>",
        "</confidence>0.8<confidence>",
        tagged("0.8", after="."),
        tagged("0.8", before=tagged("0.8")),
        "<confidence><confidence>0.8</confidence></confidence>",
        "<confidence>0.8</confidence></confidence>",
        "<Confidence>0.8</Confidence>",
    ],
)
def test_exactly_one_terminal_pair(text):
    assert math.isnan(stated_confidence(text))


PARTS = {"answer": "<answer>7</answer>", "analysis": "<analysis>hm</analysis>", "confidence": tagged("0.8", before="")}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("written", FORMATS)
def test_each_format_accepts_its_own_order_only(format, written):
    text = "so</think>\n" + "\n".join(PARTS[tag] for tag in FORMATS[written])
    ends_alike = FORMATS[written][-len(FORMATS[format]) :] == FORMATS[format]
    assert (terminal_tags(text, format) is not None) == ends_alike
    assert math.isnan(stated_confidence(text, format=format)) != ends_alike


def test_nested_and_separated_tags_break_the_format():
    assert terminal_tags("<answer>7<confidence>0.8</confidence></answer>", "tac") is None
    assert terminal_tags("<answer>7</answer> well, <confidence>0.8</confidence>", "tac") is None


def test_options_are_checked():
    with pytest.raises(UserError, match="scale must be one of unit, ten, percent, got 'five'"):
        stated_confidence("", scale="five")
    with pytest.raises(UserError, match="format must be one of c, tac, tabc, tbac, got 'abc'"):
        stated_confidence("", format="abc")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tagged("0.8", after=" trailing"), 0.8),
        (tagged("0.2", after=tagged("0.9")), 0.9),
        (tagged("80"), 0.8),
        (tagged("80%"), 0.8),
        (tagged("about 0.7, or 0.9"), 0.7),
        (tagged("no idea"), 0.0),
        (tagged("1000"), 0.0),
        ("none", 0.0),
        ("<confidence>0.4", 0.0),
    ],
)
def test_rlcr_reads_leniently(text, expected):
    assert rlcr_confidence(text) == pytest.approx(expected, abs=1e-12)


FRAGMENTS = st.sampled_from(
    [
        "<confidence>",
        "</confidence>",
        "<answer>",
        "</answer>",
        "<analysis>",
        "</analysis>",
        "<",
        "0.8",
        "80%",
        "9" * 60,
    ]
    + [" ", "\n", "\ud800", "\x00", ".", "1"]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=5), max_size=14).map("".join)


@settings(max_examples=3000, deadline=None)
@given(TEXTS, st.sampled_from(["unit", "ten", "percent"]), st.sampled_from(sorted(FORMATS)))
def test_no_text_is_fatal_and_a_value_means_one_terminal_pair(text, scale, format):
    strict, lenient = stated_confidence(text, scale=scale, format=format), rlcr_confidence(text)
    assert 0 <= lenient <= 1
    if not math.isnan(strict):
        assert 0 <= strict <= 1
        assert text.count("<confidence>") == text.count("</confidence>") == 1
        assert text.rstrip().endswith("</confidence>")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1000), st.text(alphabet="ab <>/\n", max_size=30))
def test_a_stated_number_is_read_back(thousandths, before):
    assert stated_confidence(tagged(str(thousandths / 1000), before=before)) == thousandths / 1000


@pytest.mark.parametrize("unit", ["<confidence>", "</confidence>", "<confidence>0</confidence>", "<", "0", " ", "9."])
def test_megabytes_of_hostile_text_end(unit):
    # A reader that takes quadratic time would need hours here.
    text = unit * (2_000_000 // len(unit))
    for hostile in (text, tagged(text), tagged("0.5", after=text)):
        stated_confidence(hostile, format="tabc")
        stated_confidence(hostile)
        assert 0 <= rlcr_confidence(hostile) <= 1
