r"""From how a gold answer is written down to one formula in LaTeX that math-verify reads.

Markup goes first (Markdown, tags, boxes, dollars, words before the answer). Then notations of one meaning are
rewritten (Unicode, mixed numbers, spaced thousands, units, `pi`), and those of several or none raise `Misread`: lists,
truth values, dates, times of day, two boxes in prose, `2 million`.
"""

import math
import re
import unicodedata

from trl_capo.errors import UserError


SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
SYMBOLS = {
    "−": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "°": r"^\circ ", "∅": r"\emptyset ", "⁄": "/", "∕": "/", "％": "%", "ℝ": r"\mathbb{R}", "ℕ": r"\mathbb{N}",
    "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
}  # fmt: skip
GREEK = "alpha beta gamma delta epsilon theta lambda mu pi sigma phi omega".split()
FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot ln log exp".split()

NUMBER = r"[+-]?\s*(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
VALUE = rf"(?:[+-]?\d+\s+)?\d+\s*/\s*\d+|[+-]?\d*\s*\\frac\{{\d+\}}\{{\d+\}}|[+-]?\d+,\d{{1,2}}(?!\d)|{NUMBER}"
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# Words after a number that are no unit, for they change what it is worth.
NO_UNITS = set(
    """hundred thousand million billion trillion dozen dozens pair pairs score bn mn percent percentage pct
    squared cubed factorial times to and or plus minus over of by per am pm a.m. p.m. noon o'clock oclock half halves
    third thirds quarter quarters fourths fifths sixths eighths tenths hundredths thousandths bc ad january february
    march april may june july august september october november december jan feb mar apr jun jul aug sep sept oct nov
    dec remainder base mod modulo choose in is not sqrt root roots pi inf infinity millions thousands hundreds billions
    """.split()
) | set(GREEK) | set(FUNCTIONS)  # fmt: skip
SHORT_UNITS = set(
    "mm cm dm km kg mg ml cl dl ft in yd mi lb lbs oz hr hrs min mins sec secs ms kw kj mw hz kb mb gb kmh kph mph "
    "m s g h l".split()
)  # fmt: skip
CURRENCIES = r"(?:(?:US|CA|AU)?\s?\\?\$|[€£¥₹]|USD|EUR|GBP|Rs\.?)"
CONNECTORS = re.compile(r"(?:\s|,|;|and|or|\.$)*", re.IGNORECASE)
SPAN = re.compile(r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


class Misread(UserError):
    """A gold answer has no single meaning that math-verify would read."""


# From markup to the answer itself.


def unwrap(text: str) -> str:
    """The answer without Markdown, tags, boxes, dollars and words before it."""
    if "####" in text:
        text = text.rpartition("####")[2]
    previous = None
    while text != previous:
        previous = text = text.strip()
        if re.fullmatch(r".*\\boxed.*", text, re.DOTALL):
            text = _box(text)
        for pattern in (
            r"```(?:[A-Za-z]+\s)?\s*(.+?)\s*```",
            r"`([^`]+)`",
            r"\*\*([^*]+)\*\*",
            r"__([^_]+)__",
            r"\*([^*]+)\*",
            r"_([^_]+)_",
            r"<(\w+)>(?P<of>[^<]*)</\1>",
            r"(?:the\s+)?(?:final\s+)?(?:answer|solution|result)(?:\s+is)?\s*[:=]?\s+(.+)",
            r"(?:the\s+)?(?:final\s+)?(?:answer|solution|result)\s*[:=]\s*(.+)",
            r"(?:option|choice)\s*:?\s*(\(?[A-Za-z]\)?)\.?",
        ):
            if found := re.fullmatch(pattern, text, re.DOTALL | re.IGNORECASE):
                text = found.groupdict().get("of") or found[1]
        text = _span(text)
        text = re.sub(r"(?<=[\w)}\]%])\s*\.$", "", text)
    return text


def _box(text: str) -> str:
    """What is in the box; two boxes in prose may be an intermediate result and an answer."""
    text = re.sub(r"\\boxed\s+([^\s{$]+)", r"\\boxed{\1}", text)
    boxes, between, position = [], [], 0
    for start in [found.start() for found in re.finditer(r"\\boxed", text)]:
        if start < position:
            continue
        if not (opening := re.compile(r"\\boxed\s*\{").match(text, start)):
            raise Misread(r"\boxed has no braces")
        depth, end = 1, opening.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        if depth:
            raise Misread("a brace of its box is not closed")
        boxes.append(text[opening.end() : end - 1].strip())
        between.append(text[position:start])
        position = end
    if len(set(boxes)) == 1:
        return boxes[0]
    if all(CONNECTORS.fullmatch(part.strip(" $")) for part in between[1:]):
        return ", ".join(boxes)
    raise Misread("it has two boxes, and either could be the answer")


def _span(text: str) -> str:
    """What is between dollars, with words around it or not."""
    spans = [next(part for part in found.groups() if part) for found in SPAN.finditer(text)]
    if not spans:
        return text
    around = SPAN.sub(" ", text)
    if len(spans) == 1:
        words = set(re.findall(r"[a-z.']+", around.lower())) - {"is", "of", "and", "in", "to", "may"}
        if words & NO_UNITS or re.search(r"\d", around):
            raise Misread("what is beside the dollars changes the answer")
        if re.fullmatch(r"\s*(?:\\?%|percent)\s*", around):
            return spans[0] + r"\%"
        return spans[0]
    if CONNECTORS.fullmatch(around.strip()):
        return ", ".join(span.strip() for span in spans)
    raise Misread("it has several formulas, and each could be the answer")


# From notations to LaTeX.


def rewrite(text: str) -> str:
    """One answer in LaTeX that math-verify reads; raises `Misread` for notations of several meanings."""
    text = re.sub(r"\\!\s*", "", _unicode(text))
    text = re.sub(r",\s*(and|or)\s", r" \1 ", text)
    text = re.sub(r"\^(-\d+)", r"^{\1}", text)
    text = re.sub(r"(?<=\d) ?[xX] ?(?=10\^)", r" \\times ", text)
    if re.search(r"[\[({]\s*['\"]", text):
        raise Misread("it is a list, not one answer")
    bare = re.sub(r"(?<=\d)(?:\\[,; !]|~)\s?(?=\d{3})", " ", text)
    if re.fullmatch(r"[+-]?\d{1,3}(?:[ '_]\d{3})+(?:[.,]\d+)?", bare):
        return re.sub(r"[ '_]", "", bare).replace(",", ".")
    if re.fullmatch(r"[+-]?\d{1,3}(?:\.\d{3})+,\d+|[+-]?\d{1,3}(?:\.\d{3}){2,}", text):
        return text.replace(".", "").replace(",", ".")
    if re.fullmatch(r"[+-]?\d+,0\d*", text) and not re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}|[+-]?\d+,0", text):
        return text.replace(",", ".")
    if found := re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*(?:[eE]|\*\s*10\s*(?:\^|\*\*))\s*\{?\+?(-?\d+)\}?", text):
        return rf"{found[1]} \times 10^{{{found[2]}}}"
    if found := re.fullmatch(r"([+-]?)\s*(\d+)(?:\s+|\s*-\s*|\s*&\s*)(\d+)\s*/\s*(\d+)", text):
        return _mixed(text, *found.groups())
    if found := re.fullmatch(r"([+-]?)\s*(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}", text):
        return _mixed(text, *found.groups()) if found[1] == "-" else text
    if found := re.fullmatch(r"(\d+)\s*(?:st|nd|rd|th|\^\{?\\(?:text|mathrm)\{(?:st|nd|rd|th)\}\}?)", text):
        return found[1]
    if re.fullmatch(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}([-/.])\d{1,2}\1\d{2,4}", text):
        raise Misread("it looks like a date, which math-verify would calculate")
    if found := re.fullmatch(r"(\d{1,2}):(\d{2})(?::\d{2})?(.*)", text):
        hour, minute = int(found[1]), int(found[2])
        if found[3].strip() or found[0].count(":") > 1 or "0" in (found[1][0], found[2][0]) or (
            hour < 24 and minute < 60 and math.gcd(hour, minute) > 1
        ):  # fmt: skip
            raise Misread("it looks like a time of day, which math-verify would take for a ratio")
    if found := re.fullmatch(rf"({CURRENCIES}\s*)?({VALUE})(\s*{CURRENCIES})?(\s*[^\d\s].*)?", text, re.DOTALL):
        value = found[2] if re.fullmatch(NUMBER, found[2]) else re.sub(r"^([+-]?\d+),(\d+)$", r"\1.\2", found[2])
        if (found[1] or found[3]) and not found[4]:
            return rewrite(value)
        if found[4] and (unit := _unit(found[4], spaced=found[4][0].isspace())) is not None:
            return rewrite(value) + unit
        if found[1] and found[4]:
            raise Misread("what stands beside the number changes it")
    if re.fullmatch(r"\(?[A-Za-z]\)?[.):]", text):
        return re.sub(r"[^A-Za-z]", "", text)
    if re.fullmatch(r"\(?[A-Z][.):]\)?\s*\S.*|\(?[a-z]+\)\s+\w.*", text) and not re.match(
        r"\([A-Za-z]\)[^\s\w]", text
    ):
        raise Misread("it is a letter and an answer in one; keep the letter or the answer")
    if text.lower() in WORDS:
        return str(WORDS.index(text.lower()))
    if re.fullmatch(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*|[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*[ '-][A-Za-z]{3,}", text):
        lowered = set(re.split(r"[ '-]", text.lower()))
        if lowered & {"or", "and", "half", "hundred", "thousand", "million", *WORDS}:
            raise Misread("its words are no formula; write it in numbers or LaTeX")
        if not lowered & (set(GREEK) | set(FUNCTIONS) | {"infinity", "sqrt"}):
            return rf"\text{{{text}}}"
    return _words(text)


def _mixed(text: str, sign: str, whole: str, top: str, bottom: str) -> str:
    if not 0 < int(top) < int(bottom):
        raise Misread(f"{text} is no mixed number")
    return rf"{sign.replace('+', '')}\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}"


def _unit(rest: str, spaced: bool) -> str | None:
    r"""What stays of what follows a number: nothing of a unit, `\%` of per cent; None if it is part of a formula."""
    rest = rest.strip()
    word = re.sub(r"^\\(?:text|mathrm|textrm|mbox|,|;|:|!| )+\s*\{?\s*|\}(?=$|\^)", "", rest).strip()
    if re.fullmatch(r"\\?%|(?i:per\s?cent|percent|percentage|pct)", word):
        return r"\%"
    plain = re.sub(r"\^?\{?-?[23]?\}?$", "", word)
    parts = [part for part in re.split(r"[\s/.-]+|\\cdot|\^\{?-?\d\}?|\bper\b|\bof\b", plain) if part]
    if not parts or not all(part.isalpha() for part in parts):
        return None
    lowered = [part.lower() for part in parts]
    if set(lowered) & NO_UNITS - {"in"}:
        raise Misread(f"{rest!r} after the number changes it")
    if word != rest:  # in \text{...}
        return ""
    units = [part in SHORT_UNITS or len(part) >= 3 for part in lowered]
    if not all(units):
        return None
    if len(lowered) == 1 and len(lowered[0]) == 1 and "^" in word:
        return "" if spaced else None  # `2 m^2` is an area, `2m^2` a formula
    return "" if spaced or len(lowered[0]) > 1 else None


def _unicode(text: str) -> str:
    """Unicode's mathematics in LaTeX."""
    text = re.sub(r"[\u00a0\u2000-\u200a\u202f\u205f\u3000]", " ", text)
    text = re.sub(r"[\u200b-\u200d\u2060\ufeff]", "", text)
    text = re.sub(r"^[–—‐‑‒]\s*(?=[\d√\\.])", "-", text)
    if re.search(r"[–—‒]", text):
        raise Misread("a dash between two parts is a range or a minus sign; write one of them")

    def vulgar(found: re.Match) -> str:
        top, _, bottom = unicodedata.normalize("NFKC", found[3]).partition("⁄")
        if found[2]:
            return _mixed(found[0], found[1] or "", found[2], top, bottom)
        return rf"{found[1] or ''}\frac{{{top}}}{{{bottom}}}"

    text = re.sub(rf"([-−])?\s*(?:(?<![\d.])(\d+)\s*)?([{FRACTIONS}])", vulgar, text)
    for scripts, mark in ((SUPERSCRIPTS, "^"), (SUBSCRIPTS, "_")):
        for run in sorted(set(re.findall(f"[{''.join(scripts)}]+", text)), key=len, reverse=True):
            text = text.replace(run, f"{mark}{{{''.join(scripts[character] for character in run)}}}")
    for symbol, latex in SYMBOLS.items():
        text = text.replace(symbol, latex)
    for root, order in (("√", ""), ("∛", "[3]"), ("∜", "[4]")):
        pattern = root + r"\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))"
        text = re.sub(pattern, lambda f: rf"\sqrt{order}{{{f[1] or f[2] or f[3]}}}", text)  # noqa: B023
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in unicodedata.normalize("NFKC", text))
    for name in GREEK:
        letter = unicodedata.lookup(f"GREEK SMALL LETTER {'LAMDA' if name == 'lambda' else name.upper()}")
        text = text.replace(letter, rf"\{name} ")
    return text.strip()


def _words(text: str) -> str:
    r"""Functions and Greek letters get their backslash (`pi`, `ln 2`, `sqrt(3)`); other words are refused."""
    hidden: list[str] = []

    def hide(found: re.Match) -> str:
        hidden.append(found[0])
        return f"\0{len(hidden) - 1}\0"

    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|textit|operatorname|mbox|begin|end)\s*\{[^{}]*\}", hide, text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])log_?(\d+)\s*\(", r"\\log_{\1}(", text)
    text = text.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = re.sub(rf"(?<![\\A-Za-z])({'|'.join(GREEK + FUNCTIONS)})(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"(?i)(?<![\\A-Za-z])(?:infinity|infty|inf)(?![A-Za-z])", r"\\infty", text)
    allowed = {"percent", "percentage"}
    for word in re.findall(r"(?<!\\)(?<![A-Za-z])[A-Za-z]{4,}", re.sub(r"\\[A-Za-z]+", " ", text)):
        if word.lower() not in allowed:
            raise Misread(f"math-verify would take the word {word!r} for a product of letters")
    return re.sub("\0(\\d+)\0", lambda found: hidden[int(found[1])], text)
