r"""Gold answers: how they are read, which are rewritten, and which are refused because they would be misread.

If math-verify does not know a notation, it silently reads a part of it: `2√3` as 2, `3 1/2` as 3/2, `1 000` as 0. A
right answer then gets 0, and for some golds a wrong answer gets 1. So every gold answer passes through `read_gold`:

- Notations with one meaning are rewritten, notations with several are refused (`trl_capo.data.notations`).
- math-verify must use the whole result: its parser has to reach the end of the text, and its rewriting must not drop a
  letter from an expression (in `1+2t` it takes the t for a unit).
"""

import functools
import math
import re
from collections.abc import Iterable
from typing import Any

from trl_capo.data.notations import NO_UNITS, NUMBER, SHORT_UNITS, SPAN, Misread, rewrite, unwrap
from trl_capo.grading import equal, parse_gold, seconds


# Most golds are such numbers. math-verify reads them correctly, so we skip its parser, which takes 10 ms per call.
PLAIN = re.compile(r"-?(?:\d{1,30}|[1-9]\d{0,2}(?:,\d{3}){1,9})(?:\.\d{1,30})?|-?\d{1,30}/[1-9]\d{0,30}")
MISSING = {"", "none", "null", "nan", "n/a", "na", "<na>", "nat"}


def wrap_gold(answer: Any) -> str:
    r"""A gold answer in the form that math-verify reads: `$answer$`, unless it is marked up already.

    Args:
        answer: Gold answer; numbers are written out. A missing one (None, NaN, "null") becomes empty, which no parser
            accepts.

    Returns:
        The result of `read_gold`. A refused answer stays unchanged, without dollars, so that `gold_problem` finds it.

    Example:
        >>> wrap_gold("4.5e33"), wrap_gold("2√3"), wrap_gold("**3 1/2**"), wrap_gold("12 dollars")
        ('$4.5 \\times 10^{33}$', '$2\\sqrt{3}$', '$\\frac{7}{2}$', '$12$')
        >>> wrap_gold(r"\sqrt{3}+1"), wrap_gold(27), wrap_gold(r"so \boxed{4}"), wrap_gold("$7$"), wrap_gold(None)
        ('$\\sqrt{3}+1$', '$27$', 'so \\boxed{4}', '$7$', '')
    """
    try:
        return read_gold(answer)
    except Misread:
        return answer.strip() if isinstance(answer, str) else f"{type(answer).__name__} {answer!r}"


def read_gold(answer: Any) -> str:
    r"""The gold answer in the form that math-verify should see.

    Raises:
        Misread: It has several meanings, or none that math-verify would read.

    Example:
        >>> read_gold(12), read_gold(["7"]), read_gold("Option B")
        ('$12$', '$7$', '$B$')
    """
    if hasattr(answer, "item") and not getattr(answer, "shape", ()):  # a number of numpy
        answer = answer.item()
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return ""
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        return read_gold(answer[0])
    if isinstance(answer, (bool, list, tuple, dict, set, bytes)) or bool(getattr(answer, "shape", False)):
        raise Misread(f"it is a {type(answer).__name__}, not one answer")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) >= 1e6:
        answer = int(answer)  # a CSV column of integers with a hole is read as floats, which are compared roughly
    text = str(answer).strip()
    if re.match(r"(?:list|tuple|dict|bool|set|bytes|ndarray) [\[({TFb]", text):  # what `wrap_gold` left of one
        raise Misread(f"it is a {text.split()[0]}, not one answer")
    inner = unwrap(text)
    if inner.lower() in MISSING:
        return ""
    marked_up = bool(SPAN.search(text)) or r"\boxed" in text
    latex = rewrite(inner, marked_up)
    if not PLAIN.fullmatch(latex):
        _check_read_whole(latex)
    return text if marked_up and latex == inner and not text.startswith(r"\[") else f"${latex}$"


def gold_problem(gold: Any) -> str | None:
    r"""Why a gold answer, as it stands in the column `solution`, cannot be graded; None if it can.

    Example:
        >>> gold_problem("$12$"), gold_problem("2√3")
        (None, 'math-verify reads 2; write $2\\sqrt{3}$')
    """
    if not isinstance(gold, str):
        return "it is not text" if gold is not None else "it is missing"
    return _problem(gold)


@functools.lru_cache(maxsize=100_000)  # a dataset is checked when it is cleaned and when it is trained on
def _problem(gold: str) -> str | None:
    from math_verify.errors import TimeoutException

    if gold.startswith("$") and gold.endswith("$") and PLAIN.fullmatch(gold[1:-1]):
        return None
    try:
        reading = read_gold(gold)
        parsed = parse_gold(gold)
        if not reading:
            return "it is missing"
        if not parsed:
            return "math-verify cannot read it"
        if reading != gold and not equal(parse_gold(reading), parsed):
            return f"math-verify reads {parsed[0]}; write {reading}"
    except Misread as error:
        return str(error)
    except TimeoutException:
        return "math-verify needs too long to read it"
    return None


def problems(golds: Iterable[Any]) -> dict[int, str]:
    r"""Rows whose gold answer cannot be graded, with the reason.

    Example:
        >>> problems(["$\\frac{1}{2}$", "", r"\boxed{7}"])
        {1: 'it is missing'}
    """
    from tqdm.auto import tqdm

    golds = list(golds)
    distinct = {gold for gold in golds if isinstance(gold, str)}
    progress = tqdm(distinct, desc="Checking gold answers", disable=len(distinct) < 2000)
    known = {gold: _problem(gold) for gold in progress}
    found = {row: known[gold] if isinstance(gold, str) else gold_problem(gold) for row, gold in enumerate(golds)}
    return {row: problem for row, problem in found.items() if problem}


def unparsable_golds(solutions: Iterable[Any]) -> list[int]:
    r"""Rows whose gold answer the accuracy reward cannot read, or would read as something else.

    Args:
        solutions: Gold answers, as in the dataset's column `solution`.

    Returns:
        Indices into `solutions`, ascending.

    Example:
        >>> unparsable_golds(["$\\frac{1}{2}$", "3 1/2", r"\boxed{7}"])
        [1]
    """
    return list(problems(solutions))


# Does math-verify read the whole answer?


def _check_read_whole(latex: str) -> None:
    """Raises `Misread` if math-verify ignores a part of the text."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

    # `18_{\text{ten}}` is read as `18_{10}` is, though cut in the middle of the base.
    latex = re.sub(r"(?<=\d)_\{?\\text\{[a-z]+\}\}?", "_{10}", latex)
    mended = dict(basic_latex=True, malformed_operators=True, nits=True, boxed="all")
    with_units, used = (
        normalize_latex(latex, NormalizationConfig(**mended, units=units)).strip() for units in (False, True)
    )
    if re.search(r"\d\s+\d", used) and "matrix" not in used and "&" not in used:
        raise Misread("math-verify reads digits separated by a space as a product")
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[_^]\s*\w", "\\\\", used)
    if re.search(r"[A-Za-z]\s*\d|\d\.\d+\.\d", bare):
        raise Misread("math-verify reads a number after a letter or another number as a factor")
    taken = with_units[len(used) :] if with_units.startswith(used) else with_units
    if re.search("[A-Za-z]", taken) and not re.fullmatch(r"(?:\s|\\[,;: ])*\\(?:text|mbox)\s*\{.*\}.*", taken):
        number = re.fullmatch(rf"{NUMBER}(?:\\[,;: ]|\s)*", used) or re.fullmatch(r"[-\d\\frac{}.\s]+", used)
        unit = taken.strip().lower()
        words = re.fullmatch(r"[a-z]{3,}(?:[\s.]+[a-z]{3,})*\.?", unit)
        if not (words or (unit in SHORT_UNITS and (number or len(unit) > 1))):
            raise Misread(f"math-verify takes {taken.strip()!r} at the end for a unit and drops it")
    changing = NO_UNITS - {"percent", "pct", "percentage", "per", "in", "of", "and"}
    if r"\text" in taken and re.search(r"\d", used) and changing & set(re.findall("[a-z.']+", taken.lower())):
        raise Misread(f"math-verify drops {taken.strip()!r}, which changes the number")
    from math_verify.utils import timeout

    try:
        whole = timeout(seconds(10))(_reaches_the_end)(used)
    except Exception as error:
        if _is_compared_as_text(latex):
            return
        reason = str(error).partition("\n")[0]
        raise Misread(f"math-verify cannot read {latex!r} as LaTeX ({reason or type(error).__name__})") from error
    if not whole:
        raise Misread(f"math-verify reads only the beginning of {latex!r}")


def _is_compared_as_text(latex: str) -> bool:
    r"""Whether math-verify cannot parse a formula and compares its text: `a \mid b` only matches `a \mid b`."""
    if not re.search(r"\\[A-Za-z]{2,}", re.sub(r"\\text\s*\{[^{}]*\}$", "", latex)):
        return False
    parsed = parse_gold(f"${latex}$")
    return bool(parsed) and all(isinstance(reading, str) for reading in parsed) and equal(parsed, parsed)


def _reaches_the_end(latex: str) -> bool:
    """Whether the parser behind math-verify uses every token."""
    from antlr4 import Token
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    parser = _Latex2Sympy().create_parser(latex)
    parser.math()
    return parser.getCurrentToken().type == Token.EOF
