"""The report page: what it says is what was sampled, and nothing in a completion can act."""

import json
import random
import re

import numpy as np
import pytest

from tests.evaluation.test_samples import rows
from trl_capo import cli
from trl_capo.calibration.metrics import auc_within
from trl_capo.calibration.prompt_bootstrap import prompt_difference, prompt_interval
from trl_capo.evaluation.samples import merge_parts, read_samples, write_part
from trl_capo.report import page as report_page
from trl_capo.report.page import NUM_TEXTS, completions, surprise, with_formulas, write_report


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 $\\frac{1}{2}$ $<svg onload=alert(3)>$"


def make_run(folder, seed, prompts=range(40), benchmarks=("b",), text=EVIL):
    rng = np.random.default_rng(seed)
    for benchmark in benchmarks:
        n = len(prompts) * 4
        correct = (rng.random(n) < 0.5).astype(float)
        logps = -rng.exponential(size=n) * (2 - correct)
        columns = dict(correct=correct, mean_logp=logps, completion=[f"{i} {text}" for i in range(n)])
        columns["answer"] = [None if i % 7 == 0 else str(int(c) + i % 2) for i, c in enumerate(correct)]
        write_part(folder, benchmark, 0, rows(benchmark, prompts, 4, **columns))
    merge_parts(folder)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = [str(make_run(folder / name, seed)) for seed, name in enumerate(("base", "trained"))]
    state = folder / "trainer_state.json"
    state.write_text(
        json.dumps({"log_history": [{"step": s, "reward": 0.1 * s, "capo/auc_within": 0.5} for s in (1, 2)]})
    )
    command = ["report", *paths, "--output", str(folder / "out" / "page.html"), "--trainer_states", f"trained={state}"]
    assert cli.main(command) == 0
    return folder / "out" / "page.html"


def test_tables_hold_the_metrics(page):
    base, trained = (read_samples(page.parents[1] / name)[0] for name in ("base", "trained"))
    lines = page.with_suffix(".md").read_text().splitlines()
    assert "| metric | base | trained | trained - base |" in lines and "![figures of b](page-1-b.png)" in lines
    row = next(line for line in lines if line.startswith("| AUC within |"))
    alone = [prompt_interval(auc_within, of.correct, of.mean_logps, num_resamples=300) for of in (base, trained)]
    gap = prompt_difference(
        auc_within, (trained.correct, trained.mean_logps), (base.correct, base.mean_logps), num_resamples=300
    )
    expected = f"| AUC within | {alone[0]} | {alone[1]} | {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] |"
    assert row == expected
    text = page.read_text()
    assert str(alone[0]) in text and f"{gap.value:+.3f}" in text
    for name in ("page-1-b.png", "page-training.png"):
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    assert text.count("data:image/png;base64,") == 2


def test_nothing_in_a_completion_can_act(page):
    text = page.read_text()
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 2  # the data and the page's own
    assert "onerror" not in text.split('id="data">')[0]
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert EVIL.split(" $")[0] in "".join(p for p in data["texts"]["0"]["completion"] if isinstance(p, str))
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text.split('id="data">')[0])


def test_the_most_telling_texts_are_kept(page):
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    sets = [read_samples(page.parents[1] / name)[0] for name in ("base", "trained")]
    assert data["columns"]["logp"] == [round(v, 4) for of in sets for v in of.mean_logps.ravel()]
    scores = np.concatenate([surprise(of.correct, of.mean_logps).ravel() for of in sets])
    assert len(data["texts"]) == 320 <= 2 * NUM_TEXTS
    for row, text in data["texts"].items():
        assert text["score"] == pytest.approx(scores[int(row)], abs=1e-4)


def test_only_so_many_texts_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report_page, "NUM_TEXTS", 5)
    sets = {name: read_samples(make_run(tmp_path / name, seed)) for seed, name in enumerate(("a", "b"))}
    data = completions(sets, ["b"])
    assert len(data["texts"]) == 10 and len(data["columns"]["run"]) == 320
    for r, [of] in enumerate(sets.values()):
        scores = np.sort(surprise(of.correct, of.mean_logps).ravel())[::-1]
        kept = sorted(
            (t["score"] for row, t in data["texts"].items() if data["columns"]["run"][row] == r), reverse=True
        )
        assert kept == pytest.approx(scores[:5], abs=1e-4)


def test_surprise_counts_what_is_ranked_wrongly():
    rng = np.random.default_rng(0)
    correct, logps = rng.choice([0.0, 1.0, np.nan], (20, 4)), rng.integers(-5, 0, (20, 4)).astype(float)
    found = surprise(correct, logps)
    for at in np.ndindex(correct.shape):
        if np.isnan(correct[at]):
            assert np.isnan(found[at])
        elif correct[at] == 0:
            assert found[at] == pytest.approx(np.mean(logps[correct == 1] < logps[at]))
        else:
            assert found[at] == pytest.approx(np.mean(logps[correct == 0] > logps[at]))
    assert np.isnan(surprise(np.ones((2, 2)), np.zeros((2, 2)))).all()


def test_formulas_are_found_and_the_rest_is_left_alone():
    pieces = with_formulas(r"A $\frac{1}{2}$ and \(x\) or \[y\], $$z$$; costs 5$.")
    assert [p if isinstance(p, str) else p[1] for p in pieces] == [
        "A ",
        r"\frac{1}{2}",
        " and ",
        "x",
        " or ",
        "y",
        ", ",
        "z",
        "; costs 5$.",
    ]
    assert all("<math" in p[0] for p in pieces if not isinstance(p, str))
    assert with_formulas(r"$\frac{$ broken") == [r"$\frac{$ broken"]
    assert with_formulas("") == []


def by_regular_expression(text):
    pattern = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
    return [(m.start(), m.end(), next(g for g in m.groups() if g is not None)) for m in pattern.finditer(text)]


def test_formulas_are_those_of_the_regular_expression():
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(
            rng.choice(["$", "$$", r"\(", r"\)", r"\[", r"\]", "x", "\n"]) for _ in range(rng.randrange(14))
        )
        assert list(report_page._formulas(text)) == by_regular_expression(text), text


@pytest.mark.parametrize("opening", [r"\(", r"\[", "$$ ", "$", r"\[\("])
def test_formulas_take_linear_time(opening, monkeypatch):
    """Counted, not timed: each end is looked for at most once more than there are formulas."""
    calls = []

    class Counting(str):
        def find(self, *args):
            calls.append(args)
            return super().find(*args)

    monkeypatch.setattr("latex2mathml.converter.convert", lambda source: "<math/>")
    with_formulas(Counting(opening * (10**6 // len(opening)) + ("" if opening.startswith("$") else "(")))
    assert len(calls) <= 10**6 // len(opening) + 8
    if not opening.startswith("$"):
        assert len(calls) <= 4


def test_runs_of_other_prompts_are_compared_on_the_shared_ones(tmp_path):
    ours = make_run(tmp_path / "a", 0, range(10, 30))
    theirs = make_run(tmp_path / "b", 1)
    path = write_report({"b": read_samples(theirs), "a": read_samples(ours)}, tmp_path / "page.html")
    assert "| 40 x 4 | 20 x 4 | 20 questions |" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("correct", [0.0, 1.0, None])
def test_one_prompt_and_one_class(tmp_path, correct):
    write_part(tmp_path / "a", "b", 0, rows(prompts=[0], correct=[correct] * 2))
    merge_parts(tmp_path / "a")
    path = write_report({"a": read_samples(tmp_path / "a")}, tmp_path / "page.html")
    text = path.with_suffix(".md").read_text()
    value = "nan" if correct is None else f"{correct:.3f}"
    assert f"| accuracy | {value} [nan, nan] |" in text, "one prompt has no interval"


def test_a_card_gets_tables_and_figures(tmp_path):
    samples, model = make_run(tmp_path / "samples", 0, benchmarks=("some/file with spaces.jsonl",)), tmp_path / "model"
    model.mkdir()
    command = ["report", str(samples), "--output", str(tmp_path / "page.html"), "--model_card", str(model)]
    assert cli.main(command) == 0
    card = (model / "README.md").read_text()
    assert "| AUC within | " in card
    [picture] = re.findall(r"!\[.*\]\((\S+)\)", card)
    assert (model / picture).read_bytes().startswith(b"\x89PNG")
    command[command.index("--output") + 1] = str(model / "page.html")
    assert cli.main(command) == 0, "the page may lie beside the card"
    assert (model / "README.md").read_text().count("## Can its confidence be trusted?") == 1


def test_different_questions_are_not_compared(tmp_path):
    for name, question in (("a", "1+1="), ("b", "1+2=")):
        write_part(tmp_path / name, "b", 0, rows(prompts=[0, 1], prompt=[question] * 2 + ["3="] * 2))
        merge_parts(tmp_path / name)
    with pytest.raises(ValueError, match="answered different questions of b, 1 of 2"):
        write_report({name: read_samples(tmp_path / name) for name in ("a", "b")}, tmp_path / "page.html")


def test_a_log_by_itself_is_a_history(tmp_path, capsys):
    run, history = make_run(tmp_path / "run", 0), tmp_path / "history.json"
    history.write_text(json.dumps([{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}]))
    command = ["report", str(run), "--output", str(tmp_path / "p.html"), "--trainer_states", f"run={history}"]
    assert cli.main(command) == 0 and (tmp_path / "p-training.png").exists()
    history.write_text("{")
    assert cli.main(command) == 2
    assert "is not the trainer_state.json of a run" in capsys.readouterr().err


def test_bad_input_is_one_message(tmp_path, capsys):
    make_run(tmp_path / "a", 0)
    make_run(tmp_path / "c", 0, benchmarks=("other",))
    a, c, out = str(tmp_path / "a"), str(tmp_path / "c"), str(tmp_path / "p.html")
    for arguments, message in (
        ([a, c], "no benchmark in common: a has b; c has other"),
        ([str(tmp_path)], "does not exist. Make it with"),
        ([a, c, "--names", "x"], "--names must give 2 different names, one per run, got x"),
        ([a, "--trainer_states", "z=y"], "must be NAME=FILE, where NAME is one of a, got 'z=y'"),
        ([a, "--trainer_states", "a=/nowhere.json"], "No such file"),
    ):
        assert cli.main(["report", *arguments, "--output", out]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
