r"""Convert a gold answer's notation to one LaTeX formula that math-verify reads.

First, markup is removed (Markdown, tags, boxes, dollars, words before the answer). Then notations with one meaning are
rewritten (Unicode, mixed numbers, spaced thousands, units, `pi`). Notations with several meanings or none raise
`Misread`: lists, truth values, dates, times of day, two boxes in prose, `2 million`.
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
    "°": r"^\circ ", "∅": r"\emptyset ", "⁄": "/", "∕": "/", "％": "%", "′": "'", "″": "''",
    "ℝ": r"\mathbb{R}", "ℕ": r"\mathbb{N}",
    "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
}  # fmt: skip
GREEK = "alpha beta gamma delta epsilon theta lambda mu pi sigma phi omega".split()
FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan sec csc cot ln log exp".split()

NUMBER = r"[+-]?\s*(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
VALUE = rf"(?:[+-]?\d+\s+)?\d+\s*/\s*\d+|[+-]?\d*\s*\\frac\{{\d+\}}\{{\d+\}}|[+-]?\d+,\d{{1,2}}(?!\d)|{NUMBER}"
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# Words after a number that are not units, because they change its value.
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
    "wk wks yr yrs qt qts kwh khz mhz ghz rpm bpm ppm mpg pcs m s g h l".split()
)  # fmt: skip
# Units in text, variables in formulas; K is also a thousand.
LETTER_UNITS, IN_COMPOUNDS = set("J N V W Ω Pa kPa dB mV mA nm pt pts ha".split()), set("ACFKT")
NAMES = "max min abs gcd lcm hcf nCr nPr det mod lim sup sgn arg sum".split()
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
    """The content of the box. Two boxes in prose may be an intermediate result and an answer."""
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
            raise Misread(r"\boxed has an unclosed brace")
        boxes.append(text[opening.end() : end - 1].strip())
        between.append(text[position:start])
        position = end
    if len(set(boxes)) == 1:
        return boxes[0]
    if all(CONNECTORS.fullmatch(part.strip(" $")) for part in between[1:]):
        return ", ".join(boxes)
    raise Misread("it has two boxes, and either could be the answer")


def _span(text: str) -> str:
    """The text between dollars, with or without words around it."""
    spans = [next(part for part in found.groups() if part) for found in SPAN.finditer(text)]
    if not spans:
        return text
    around = SPAN.sub(" ", text)
    if len(spans) == 1:
        words = set(re.findall(r"[a-z.']+", around.lower())) - {"is", "of", "and", "in", "to", "may"}
        if words & NO_UNITS or re.search(r"\d", around):
            raise Misread("the text outside the dollars changes the answer")
        if re.fullmatch(r"\s*(?:\\?%|percent)\s*", around):
            return spans[0] + r"\%"
        return spans[0]
    if CONNECTORS.fullmatch(around.strip()):
        return ", ".join(span.strip() for span in spans)
    raise Misread("it has several formulas, and each could be the answer")


# From notations to LaTeX.


def rewrite(text: str, marked_up: bool = False) -> str:
    """One answer in LaTeX that math-verify reads. Raises `Misread` for notations with several meanings.

    Args:
        text: The result of `unwrap`.
        marked_up: Whether it stood between dollars or in a box: there `1-1/2` is a difference and `2k` a product.
    """
    text = re.sub(r"\\!\s*", "", _unicode(text)).replace("{,}", ",")
    text = re.sub(rf"\\operatorname\*?\{{({'|'.join(FUNCTIONS)})\}}", r"\\\1", text)
    if found := re.fullmatch(rf"\\(?:text|textbf|mathrm|mbox)\{{({NUMBER}\s+[A-Za-z ]+)\}}", text):
        text = found[1]
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
    _refuse_ambiguous(text, marked_up)
    if found := re.fullmatch(r"([+-]?\d+)\.(\d*)\\overline\{(\d+)\}", text):
        return _repeating(*found.groups())
    if found := re.fullmatch(r"([+-]?)\s*(\d+)(?:\s+|\s*&\s*)(\d+)\s*/\s*(\d+)", text):
        return _mixed(text, *found.groups())
    text = re.sub(r"(?<=\d)(\s*)\\[dt]?frac\s*(\d)\s*(\d)(?!\d)", r"\1\\frac{\2}{\3}", text)
    if found := re.fullmatch(r"([+-]?)\s*(?:(\d+)\s*)?\\[dt]?frac\{(\d+)\}\{(\d+)\}\s*\\?%", text):
        return _percent(*found.groups())
    if found := re.fullmatch(r"([+-]?)\s*(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}", text):
        return _mixed(text, *found.groups()) if found[1] == "-" else text
    if found := re.fullmatch(r"(\d+)\s*(?:st|nd|rd|th|\^\{?\\(?:text|mathrm)\{(?:st|nd|rd|th)\}\}?)", text):
        return found[1]
    if re.fullmatch(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}([-/.])\d{1,2}\1\d{2,4}", text):
        raise Misread("it looks like a date, which math-verify would read as arithmetic")
    if found := re.fullmatch(r"(\d{1,2}):(\d{2})(?::\d{2})?(.*)", text):
        hour, minute = int(found[1]), int(found[2])
        if found[3].strip() or found[0].count(":") > 1 or "0" in (found[1][0], found[2][0]) or (
            hour < 24 and minute < 60 and math.gcd(hour, minute) > 1
        ):  # fmt: skip
            raise Misread("it looks like a time of day, which math-verify would read as a ratio")
    if found := re.fullmatch(rf"({CURRENCIES}\s*)?({VALUE})(\s*{CURRENCIES})?(\s*[^\d\s].*)?", text, re.DOTALL):
        value = found[2] if re.fullmatch(NUMBER, found[2]) else re.sub(r"^([+-]?\d+),(\d+)$", r"\1.\2", found[2])
        if (found[1] or found[3]) and not found[4]:
            return rewrite(value, True)
        if found[4] and (unit := _unit(found[4], found[4][0].isspace(), marked_up)) is not None:
            value = rewrite(value, True)
            value = re.sub(r"^([+-]?)\s*(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}", value) if unit else value
            return rewrite(value + unit, True) if unit and "frac" in value else value + unit
        if found[1] and found[4]:
            raise Misread("the text beside the number changes it")
    if re.fullmatch(r"\(?[A-Za-z]\)?[.):]", text):
        return re.sub(r"[^A-Za-z]", "", text)
    if re.fullmatch(r"\(?[A-Z][.):]\)?\s*\S.*|\(?[a-z]+\)\s+\w.*", text) and not re.match(
        r"\([A-Za-z]\)[^\s\w]", text
    ):
        raise Misread("it has both a letter and an answer; keep one of them")
    if text.lower() in WORDS:
        return str(WORDS.index(text.lower()))
    if re.fullmatch(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*|[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*[ '-][A-Za-z]{3,}", text):
        lowered = set(re.split(r"[ '-]", text.lower()))
        if lowered & {"or", "and", "half", "hundred", "thousand", "million", *WORDS}:
            raise Misread("it is in words; write it in numbers or LaTeX")
        if not lowered & (set(GREEK) | set(FUNCTIONS) | {"infinity", "sqrt"}):
            return rf"\text{{{text}}}"
    return _words(text)


def _mixed(text: str, sign: str, whole: str, top: str, bottom: str) -> str:
    if not 0 < int(top) < int(bottom):
        raise Misread(f"{text} is not a mixed number")
    return rf"{sign.replace('+', '')}\frac{{{int(whole) * int(bottom) + int(top)}}}{{{bottom}}}"


def _repeating(whole: str, fixed: str, repeated: str) -> str:
    """A repeating decimal as a fraction."""
    bottom = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    top = abs(int(whole + fixed + repeated)) - abs(int(whole + fixed))
    divisor = math.gcd(top, bottom)
    return rf"{'-' if whole[0] == '-' else ''}\frac{{{top // divisor}}}{{{bottom // divisor}}}"


def _percent(sign: str, whole: str | None, top: str, bottom: str) -> str:
    """A fraction of a hundredth, which math-verify cannot read with its percent sign."""
    if not int(bottom) or (whole and not 0 < int(top) < int(bottom)):
        raise Misread("it is not a mixed number")
    over = int(whole or 0) * int(bottom) + int(top)
    if 10**9 * over % int(bottom) == 0:
        return f"{sign}{over / int(bottom):.9f}".rstrip("0").rstrip(".") + r"\%"
    divisor = math.gcd(over, 100 * int(bottom))
    return rf"{sign.replace('+', '')}\frac{{{over // divisor}}}{{{100 * int(bottom) // divisor}}}"


def _refuse_ambiguous(text: str, marked_up: bool) -> None:
    """Raises `Misread` for notations whose author may mean something else than math-verify reads."""
    if not marked_up and re.fullmatch(r"[+-]?\d+-\d+\s*/\s*\d+", text):
        whole, _, part = text.rpartition("-")
        raise Misread(f"it could be a mixed number or a difference; write {whole} {part} or ${text}$")
    if re.fullmatch(r"[+-]?\d+,\d+", text) and not re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text):
        whole, _, part = text.partition(",")
        if not re.fullmatch(r"0\d*", part) or part == "0":
            raise Misread(
                f"its comma could be a decimal comma or separate two numbers; write {whole}.{part} or {whole}, {part}"
            )
    if re.fullmatch(r"[+-]?\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?", text):
        raise Misread(f"it could be one number or several; write {text.replace(',', '')} or {text.replace(',', ', ')}")
    if re.fullmatch(r"[+-]?[\d.,]*\d(?:\s*[KMB]|\s*bn|k)", text) and not (marked_up and text.endswith("k")):
        raise Misread("its letter could be a multiple, a unit or a variable; write out the number")
    if re.search(r"\d\s*['\"]+\s*\d", text):
        raise Misread("its marks could be feet and inches, or minutes and seconds; write one number")
    if re.fullmatch(rf"{NUMBER}\s+\((?:{VALUE}|[A-Za-z ]{{2,}}|[^()]*%)\)", text):
        raise Misread("math-verify reads the brackets as a factor; keep one of the two")
    if len({"%" in part for part in re.split(r"\bor\b|\\text\s*\{\s*or\s*\}", text)}) > 1:
        raise Misread("math-verify would read it as two answers; keep one of them")
    plain = re.sub(r"\\(?!(?:" + "|".join(set(GREEK) - {"pi"}) + r")\b)[A-Za-z]+", " ", text)
    if re.search(r"(?<![<>!:])=", plain) and not re.search(r"[^\W\d_]", plain):
        raise Misread("it is an equation between numbers; keep only the side that is the answer")
    if found := re.search(rf"(?<![\\A-Za-z])(?:{'|'.join(NAMES)})(?![A-Za-z])|(?<![\\A-Za-z])[CP](?=\(\d+,)", text):
        raise Misread(f"math-verify would read {found[0]!r} as a product of letters; write the value or LaTeX")


UNIT = r"[A-Za-zΩμ]+(?:\^\{?-?[1-9]\}?)?"
UNITS = re.compile(rf"{UNIT}(?:(?:\s*/\s*|\s*\\cdot\s*|\s+|(?<=[A-Za-z]{{3}})-(?=[A-Za-z]{{3}})){UNIT})*")


def _unit(rest: str, spaced: bool, marked_up: bool) -> str | None:
    r"""The part to keep of the text after a number: "" for a unit, `\%` for per cent, None for a part of a formula.

    Text that may be a unit or a variable is refused.
    """
    rest = rest.strip()
    if re.fullmatch(r"\^\s*\{?\\circ\s*\}?\s*(?:\\(?:text|mathrm)\s*\{\s*)?[CFK]\s*\}?", rest):
        return ""
    word = re.sub(r"^(?:\\[,;:! ]|[~\s])+", "", rest)
    if in_text := re.fullmatch(r"\\(?:text|mathrm|textrm|mbox)\s*\{[~\s]*([^{}]*)\}(\^.+)?", word):
        word = in_text[1].strip() + (in_text[2] or "")
    if re.fullmatch(r"\\?%|(?i:per\s?cent|percent|percentage|pct)", word):
        return r"\%"
    if set(re.findall("[a-z]+", word.lower())) & {*GREEK, *FUNCTIONS, "sqrt", "inf"} or not (
        UNITS.fullmatch(word.rstrip("."))
    ):
        return None
    parts = re.findall(r"[A-Za-zΩμ]+", re.sub(r"\\cdot", " ", word))
    lowered = [part.lower() for part in parts]
    if set(lowered) & NO_UNITS - ({"in", "per", "of"} if len(parts) > 1 or lowered == ["in"] else set()):
        raise Misread(f"{rest!r} after the number changes it")
    if in_text:
        return ""
    spaced = spaced or word != rest
    letters = [part for part in parts if len(part) == 1]
    compound = re.search(r"/|\\cdot", word)
    if len(letters) > 1 and not compound and set(lowered) <= SHORT_UNITS:
        raise Misread(f"{rest!r} after the number could be a unit or a product; write \\text{{{rest}}}, or no spaces")
    known = LETTER_UNITS | (IN_COMPOUNDS if compound else set())
    if spaced and marked_up and set(parts) & (LETTER_UNITS | {"u"}):
        raise Misread(f"{rest!r} after the number could be a unit or a variable; write \\text{{{rest}}}, or no space")
    if all(part in known or part.lower() in SHORT_UNITS or _is_word(part) for part in parts):
        if len(parts) == len(letters) > 1 and lowered not in (["m", "s"], ["g", "l"]) and not known & set(parts):
            raise Misread(
                f"{rest!r} after the number could be a unit or a quotient; write \\text{{{rest}}}, or no space"
            )
        if len(letters) == len(parts) == 1 and "^" in word:
            return "" if spaced else None  # `2 m^2` is an area, `2m^2` a formula
        return "" if spaced or len(parts[0]) > 1 else None
    if spaced and not marked_up and (re.search("[A-ZΩμ]", word) or lowered == ["u"] or len(parts[0]) > 1):
        raise Misread(f"{rest!r} after the number is not a known unit; remove it, or remove the space")
    return None


def _is_word(part: str) -> bool:
    """Whether letters are a word rather than a product of variables, such as `xyz`."""
    return len(part) >= 3 and part != "abc" and bool(re.search("(?i)[aeiou]", part) or len(part) > 3)


def _unicode(text: str) -> str:
    """Convert Unicode mathematics to LaTeX."""
    text = re.sub(r"[\u00a0\u2000-\u200a\u202f\u205f\u3000]", " ", text)
    text = re.sub(r"[\u200b-\u200d\u2060\ufeff]", "", text)
    text = re.sub(r"^[–—‐‑‒]\s*(?=[\d√\\.])", "-", text)
    if re.search(r"[–—‒]", text):
        raise Misread("a dash between two parts could be a range or a minus sign; write one of them")

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
    r"""Add backslashes to functions and Greek letters (`pi`, `ln 2`, `sqrt(3)`). Other words are refused."""
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
            raise Misread(f"math-verify would read the word {word!r} as a product of letters")
    return re.sub("\0(\\d+)\0", lambda found: hidden[int(found[1])], text)
