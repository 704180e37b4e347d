r"""A gold answer means to math-verify what it says, or is refused: judged by TRL's own reward."""

import json

import pytest
from trl.rewards import accuracy_reward

from tests.helpers import conversations
from trl_capo.data.golds import gold_problem, problems, wrap_gold
from trl_capo.data.rows import check_gold
from trl_capo.evaluation.health import health


def reward(gold: str, *answers: str) -> list[float | None]:
    return accuracy_reward([[{"content": rf"\boxed{{{answer}}}"}] for answer in answers], [gold] * len(answers))


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("2√3", r"2\sqrt{3}", "2"),
        ("½", "0.5", "2"),
        ("3½", "3.5", "3"),
        ("-3 1/2", "-3.5", "-2.5"),
        ("2 1/2 hours", "2.5", "1"),
        ("1 000 000", "1000000", "0"),
        (r"1\,000", "1000", "0"),
        ("1\u00a0000", "1000", "0"),
        ("1'000", "1000", "1"),
        ("1.234,5", "1234.5", "1.234"),
        ("1,234.5", "1234.5", "1"),
        ("3,5 kg", "3.5", "5"),
        ("pi", r"\pi", "3"),
        ("ln 2", r"\ln 2", "2"),
        ("2*pi", r"2\pi", "2"),
        ("sqrt(2)", r"\sqrt{2}", "2"),
        ("10**3", "1000", "10"),
        ("10⁻³", "0.001", "10"),
        ("5 x 10^3", "5000", "5"),
        ("x ≥ 5", r"x \ge 5", "5"),
        ("∞", r"\infty", "0"),
        ("−5", "-5", "5"),
        ("１２", "12", "1"),
        ("12 dollars", "12", "13"),
        ("€1,200", "1200", "1"),
        ("12 cm^2", "12", "13"),
        ("60 km/h", "60", "61"),
        ("50 percent", r"50\%", "5"),
        ("2nd", "2", "4"),
        ("seven", "7", "8"),
        ("Option B", "B", "C"),
        ("Answer: (B)", "B", "C"),
        ("A, B, and C", "A, B, C", "A, B"),
        ("**12**", "12", "1"),
        ("<answer>12</answer>", "12", "1"),
        (r"\[12\]", "12", "1"),
        ("```12```", "12", "1"),
        ("so 3 + 9 #### 12", "12", "3"),
        (r"The answer is $12$.", "12", "1"),
        (["7"], "7", "8"),
        (12.0, "12", "1"),
        (3e7, "30000000", "3"),
        ("Monday", r"\text{Monday}", r"\text{Sunday}"),
        ("3:4", "3:4", "3:5"),
        ("$4-1/2$", "3.5", "4.5"),
        ("5 - 1/2", "4.5", "5.5"),
        (r"\boxed{1-1/2}", "0.5", "1.5"),
        ("1 - 2/3", r"\frac{1}{3}", r"\frac{5}{3}"),
        ("3 s - 2", "3s-2", "3"),
        ("$3 s^2 - 2$", "3s^2-2", "3"),
        ("4 h / 3", r"\frac{4h}{3}", "4"),
        ("10 m - 3", "10m-3", "10"),
        ("5 x^{2}", "5x^2", "5"),
        (r"$5\,x$", "5x", "5"),
        ("$2 x y$", "2xy", "2"),
        ("2xyz", "2xyz", "2"),
        ("12 J", "12", "13"),
        ("100 W", "100", "0"),
        ("5 Ω", "5", "6"),
        ("20°C", "20", "21"),
        ("5 °C", "5", "6"),
        (r"$20^\circ\text{F}$", "20", "21"),
        ("3 nm", "3", "4"),
        ("2 wk", "2", "3"),
        ("5 N/m", "5", "6"),
        ("9.8 m/s^2", "9.8", "9"),
        ("12 kWh", "12", "13"),
        (r"$\text{12 dollars}$", "12", "13"),
        (r"$\$32{,}348$", "32348", "32"),
        ("2pi", r"2\pi", "2"),
        ("25 pi", r"25\pi", "25"),
        ("5 log 2", r"5\log 2", "5"),
        (r"\operatorname{arctan} 2", r"\arctan 2", "2"),
        (r"0.\overline{6}", r"\frac{2}{3}", "0.6"),
        (r"-1.2\overline{34}", r"-\frac{611}{495}", "-1.2"),
        (r"33\frac13\%", r"\frac{1}{3}", "33"),
        ("1½%", r"1.5\%", "2"),
        ("1/2%", r"0.5\%", r"50"),
        (r"18_{\text{ten}}", r"18_{\text{ten}}", "10"),
    ],
)
def test_what_has_one_meaning_is_rewritten(gold, right, wrong):
    wrapped = wrap_gold(gold)
    assert gold_problem(wrapped) is None
    assert reward(wrapped, right, wrong) == [1.0, 0.0]
    assert wrap_gold(wrapped) == wrapped, "a gold that is read twice must stay"


@pytest.mark.parametrize(
    "gold",
    [
        [], ["4", "-4"], {}, {"a": 1}, True, False, None, float("nan"), "None", "null", "NaN", "", "['4', '-4']",
        r"\boxed{3} first; the total is \boxed{12}", "2 million", "$2$ million", "1+2t", "2020-01-05", "12/25/2020",
        "12:30", "3 pm", "5 May", "5 ft 3 in", "3 hours 20 minutes", "5 R 2", "B. 12", "(a) 3", "3–5", "1.2.3",
        "1-1/2", "3 h / m", "2 h - m", "7 apples - 2", "6 m g h", "8 g h", "8 m s", "$8 m s$", "$6 m g h$", "12 A",
        "12 K", "12 C", "5 T", "10 u", "$12 J$", "$3 nm$", "100K", "5k", "3M", "2B", "2 xy", "5'6\"", "5′6″",
        "0.5 (1/2)", "12 (3)", "12 (a dozen)", "0.05 or 5%", "max(1,2)", "abs(x)", "nCr(5,2)", "C(5,2)", "3+4=7",
        "12 = 3 * 4", "$2^{3}=8$", "1=1", r"\pi = 3", "0,5", "3,14", "$3,14$", "12,5", "12,34", "1234,567", "0,125",
        "1,00,000", "6mn", "3 a b", "2ab", "between 3 and 5", "about 12", "20 mod 7", "twenty seven",
        "If $x=2$ then $y=3$.",
    ],
)  # fmt: skip
def test_what_has_several_meanings_is_refused(gold):
    assert gold_problem(wrap_gold(gold))


ORDINARY = r"""
0 ; 7 ; -3 ; 1000000 ; 1,234 ; 0.5 ; .5 ; -0.25 ; 1/2 ; -3/4 ; \frac{1}{2} ; -\dfrac{5}{6} ; \sqrt{2} ;
2\sqrt{3} ; \sqrt[3]{2} ; \frac{1+\sqrt{5}}{2} ; \pi ; \frac{\pi}{4} ; e^2 ; \ln{2} ; \log_2 3 ; \sin x ;
x ; 2x ; 3x^2+2x+1 ; (x+1)(x-2) ; ab ; abc ; $2k$ ; n(n+1)/2 ; 2^{10} ; 4.5 \times 10^{33} ; 3 \cdot 10^8 ;
n! ; \binom{5}{2} ; (1,2) ; [0,1) ; (1,2,3) ; (-\infty, -2) \cup (2, \infty) ;
\left(\frac{1}{2}, 3\right) ; \{1,2,3\} ; 1, 2, 3 ; x = 5 ; y=2x+3 ; x \le 5 ; 1<x<3 ; x \in [-2,7] ;
\begin{pmatrix}1&2\\3&4\end{pmatrix} ; \begin{bmatrix} -1 & 0 \\ 0 & 5 \end{bmatrix} ; A ; (C) ; E ;
\text{(B)} ; \text{east} ; Yes ; even ; 50\% ; 12.5% ; \$18 ; 30^\circ ; 2+3i ; -\infty ;
3 \pm \sqrt{2} ; 5 \text{ cm} ; 12\,\text{cm} ; 2041_5 ; \text{no solution} ; |x| ; \lfloor x \rfloor ;
\frac{a}{b} ; \sqrt{x^2+1} ; \alpha ; x=1 \text{ or } x=2 ; a=1,b=2 ; f(x)=x^2 ; \emptyset ;
\tan^{-1}(2) ; S_n ; 2t+1 ; \frac{t}{2} ; \text{June 20} ; 10\sqrt{2}\text{ m} ; 6 \text{ units} ;
\frac{1 \pm \sqrt{5}}{2} ; \mathbb{R} \backslash \{1\} ; a \mid b ; n \text{ is even} ; 2\alpha ; 1,2,3 ;
\theta = 30^\circ ; i^2=-1 ; y = 3+4 ; x=y=2 ; (1, 2), (3, 4) ; 1 \text{ or } 2 ; 3-2i ; x-\frac{1}{2} ; 2^{x-1} ;
\frac{2}{3}x ; f'(x) ; x(x+1) ; 3(x+2) ; -x^2+4 ; 4n+1 ; 12! ; 6 \times 7 ; 10^{-3} ; $3 x$ ; 8 x y z ;
3 k ; 15' ; 7 k + 1 ; \frac{m}{n} ; \sin(2x)+1 ; \$32,\!348 ; 4210_{5} ;
\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]
"""


@pytest.mark.parametrize("gold", [gold.strip() for gold in ORDINARY.split(";")])
def test_ordinary_golds_are_no_false_alarms(gold):
    wrapped = wrap_gold(gold)
    assert gold_problem(wrapped) is None
    assert reward(wrapped, gold) == [1.0]


def test_plain_numbers_need_no_parser(monkeypatch):
    """They are most golds, and what is skipped for them takes 10 ms a gold; each of these is read as it should be."""
    from trl_capo.data import golds

    plain = ["0", "-7", "12.50", "1,234", "12,345,678.9", "3/4", "-10/5"]
    for number in plain:
        assert reward(f"${number}$", number, f"{number}1") == [1.0, 0.0]
    golds._problem.cache_clear()
    monkeypatch.setattr(golds, "_check_read_whole", lambda latex: pytest.fail(f"{latex} was parsed"))
    assert problems([f"${number}$" for number in plain] * 2) == {} and problems(plain) == {}


def test_golds_of_the_embedded_world_stay_as_they_are():
    from trl_capo.data.arithmetic import arithmetic_dataset

    golds = list(arithmetic_dataset("test_3", 50)["solution"])
    assert problems(golds) == {} and [wrap_gold(gold) for gold in golds] == golds


def test_training_names_row_value_and_what_is_read():
    rows = conversations(["?"] * 2, solution=["$12$", "2√3"])
    with pytest.raises(ValueError, match=r"row 1, '2√3': math-verify reads 2; write \$2\\sqrt\{3\}\$"):
        check_gold(rows, "train_dataset")
    assert health(rows, num_workers=1)["unreadable_golds"] == 1


def test_a_benchmark_counts_no_answer_to_a_misread_gold(tmp_path):
    from trl_capo.data.benchmarks import load_benchmark

    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "?", "solution": gold}) for gold in ("2 million", "3")))
    with pytest.warns(UserWarning, match="1 of 2 questions.*'2 million' .row 0: 'million' after the number"):
        assert load_benchmark(str(path))["solution"] == ["", "$3$"]
