r"""A gold answer means to math-verify what it says, or is refused: judged by TRL's own reward."""

import json

import pytest
from datasets import Dataset
from trl.rewards import accuracy_reward

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
        "between 3 and 5", "about 12", "20 mod 7", "twenty seven", "If $x=2$ then $y=3$.",
    ],
)  # fmt: skip
def test_what_has_several_meanings_is_refused(gold):
    assert gold_problem(wrap_gold(gold))


ORDINARY = r"""
0 ; 7 ; -3 ; 1000000 ; 1,234 ; 0.5 ; .5 ; -0.25 ; 1/2 ; -3/4 ; \frac{1}{2} ; -\dfrac{5}{6} ; \sqrt{2} ;
2\sqrt{3} ; \sqrt[3]{2} ; \frac{1+\sqrt{5}}{2} ; \pi ; \frac{\pi}{4} ; e^2 ; \ln{2} ; \log_2 3 ; \sin x ;
x ; 2x ; 3x^2+2x+1 ; (x+1)(x-2) ; ab ; abc ; 2k ; n(n+1)/2 ; 2^{10} ; 4.5 \times 10^{33} ; 3 \cdot 10^8 ;
n! ; \binom{5}{2} ; (1,2) ; [0,1) ; (1,2,3) ; (-\infty, -2) \cup (2, \infty) ;
\left(\frac{1}{2}, 3\right) ; \{1,2,3\} ; 1, 2, 3 ; x = 5 ; y=2x+3 ; x \le 5 ; 1<x<3 ; x \in [-2,7] ;
\begin{pmatrix}1&2\\3&4\end{pmatrix} ; \begin{bmatrix} -1 & 0 \\ 0 & 5 \end{bmatrix} ; A ; (C) ; E ;
\text{(B)} ; \text{east} ; Yes ; even ; 50\% ; 12.5% ; \$18 ; 30^\circ ; 2+3i ; -\infty ;
3 \pm \sqrt{2} ; 5 \text{ cm} ; 12\,\text{cm} ; 2041_5 ; \text{no solution} ; |x| ; \lfloor x \rfloor ;
\frac{a}{b} ; \sqrt{x^2+1} ; \alpha ; x=1 \text{ or } x=2 ; a=1,b=2 ; f(x)=x^2 ; \emptyset ;
\tan^{-1}(2) ; S_n ; 2t+1 ; \frac{t}{2} ; \text{June 20} ; 10\sqrt{2}\text{ m} ; 6 \text{ units} ;
\$32,\!348 ; 4210_{5} ; \left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right]
"""


@pytest.mark.parametrize("gold", [gold.strip() for gold in ORDINARY.split(";")])
def test_ordinary_golds_are_no_false_alarms(gold):
    wrapped = wrap_gold(gold)
    assert gold_problem(wrapped) is None
    assert reward(wrapped, gold) == [1.0]


def test_golds_of_the_embedded_world_stay_as_they_are():
    from trl_capo.data.arithmetic import arithmetic_dataset

    golds = list(arithmetic_dataset("test_3", 50)["solution"])
    assert problems(golds) == {} and [wrap_gold(gold) for gold in golds] == golds


def test_training_names_row_value_and_what_is_read():
    prompt = [{"role": "user", "content": "?"}]
    rows = Dataset.from_dict({"prompt": [prompt] * 2, "solution": ["$12$", "2√3"]})
    with pytest.raises(ValueError, match=r"row 1, '2√3': math-verify reads 2; write \$2\\sqrt\{3\}\$"):
        check_gold(rows, "train_dataset")
    assert health(rows, num_workers=1)["unreadable_golds"] == 1


def test_a_benchmark_counts_no_answer_to_a_misread_gold(tmp_path):
    from trl_capo.data.benchmarks import load_benchmark

    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "?", "solution": gold}) for gold in ("2 million", "3")))
    with pytest.warns(UserWarning, match="1 of 2 questions.*'2 million' .row 0: 'million' after the number"):
        assert load_benchmark(str(path))["solution"] == ["", "$3$"]
