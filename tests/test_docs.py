"""Numbers in the README are those of the committed results."""

import json
import re
from pkgutil import resolve_name

from trl_capo.data.catalogue import CATALOGUE
from trl_capo.methods import METHODS


def test_demo_table_is_the_committed_result(repository):
    results = json.loads((repository / "benchmarks" / "results" / "demo" / "results.json").read_text())["models"]
    expected = [
        [
            summary[name]
            for name in ("accuracy", "auc_within", "auc_pooled", "precision_at_50", "ppl_correct", "ppl_wrong")
        ]
        for benchmark in results["base"]
        for summary in (results[model][benchmark] for model in ("base", "grpo", "capo"))
    ]
    page = (repository / "docs" / "demo.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\|[^|]*\| (base|GRPO|CAPO) \|", line)]
    written = [re.findall(r"\d\.\d{3}", row) for row in rows]
    assert written == [[f"{value:.3f}" for value in row] for row in expected]
    gaps, accuracies = (
        [results["capo"][benchmark][name] - results["grpo"][benchmark][name] for benchmark in results["base"]]
        for name in ("auc_within", "accuracy")
    )
    for points in (min(gaps), max(gaps), max(accuracies), -min(accuracies)):
        assert f"{100 * points:.1f}" in page


def test_every_method_is_in_the_table(repository):
    rows = re.findall(r"^\| `(\w+)` \|", (repository / "docs" / "rivals.md").read_text(), re.MULTILINE)
    assert rows == list(dict.fromkeys(rows)) and set(rows) == set(METHODS)


def test_every_dataset_is_in_the_table(repository):
    page = (repository / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^,|]+),[^|]*\| ([\d,]+) \| ([^|]+) \|", page, re.MULTILINE)
    assert rows == [(name, of.path, f"{of.num_rows:,}", of.licence) for name, of in CATALOGUE.items()]


def test_links_in_the_documentation_lead_somewhere(repository):
    pages = [
        repository / "README.md",
        *sorted((repository / "docs").glob("*.md")),
        *sorted(repository.glob("recipes/**/*.md")),
    ]
    links = 0
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
            links += 1
    assert links >= 8


def test_modules_and_files_in_the_documentation_exist(repository):
    """A name that moved is a lie in every page that still has the old one."""
    pages = [*repository.glob("*.md"), *repository.glob("docs/*.md"), *repository.glob("recipes/**/*.md")]
    modules, files = 0, 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"\btrl_capo(?:\.[A-Za-z_]\w*)+", text)):
            resolve_name(name)
            modules += 1
        for path in set(re.findall(r"\b(?:trl_capo|tests|benchmarks|docs|recipes)/[\w./-]+\.\w+", text)):
            pattern = re.sub(r"\b[A-Z]{4,}\b|(?<=config_)[A-Z]+", "*", path)  # METHOD stands for any
            assert list(repository.glob(pattern)), f"{page.name}: {path}"
            files += 1
    assert modules > 20 and files > 20


def test_step_cost_figures_are_the_committed_results(repository):
    """The rows of docs/fast_step.md: time over TRL's GRPO, median and range, with two layouts a row."""
    page = (repository / "docs" / "fast_step.md").read_text()
    names = {
        "capo_naive": "CAPO, naively",
        "grpo_ours": "GRPO, ours",
        "capo_ours": "CAPO, ours",
        "floor": "plain loop",
    }
    found = 0
    for result in ("step_cost", "step_cost_no_waste"):
        layouts = json.loads((repository / "benchmarks" / "results" / f"{result}.json").read_text())["layouts"]
        for variant, name in names.items():
            cells = []
            for rows in layouts.values():
                low, high = rows[variant]["phases_over_grpo_stock_range"]
                cells.append(f"{rows[variant]['phases_over_grpo_stock']:.2f} ({low:.2f} to {high:.2f})")
            assert f"| {name} | {' | '.join(cells)} |" in page
            found += 1
    assert found == 8
    assert "| CAPO, ours | " in page and "](../benchmarks/results/step_cost_sweep.png)" in page


def test_grading_figures_are_the_committed_results(repository):
    measured = json.loads((repository / "benchmarks" / "results" / "grading_evaluation.json").read_text())
    page = (repository / "docs" / "evaluation.md").read_text()
    seconds = measured["seconds"]
    for figure in (f"{seconds['pool']} s", f"{measured['times_faster']} times", f"{seconds['pool, 1% hanging']} s"):
        assert figure in page
    assert measured["equal"] and measured["others_equal"] and measured["others_given_up"] == 0


def test_step_cost_in_short(repository):
    page = (repository / "docs" / "fast_step.md").read_text()
    results = repository / "benchmarks" / "results"
    section = page[page.index("## In short") : page.index("## What is saved")]
    figures = []
    for name, variant in (("step_cost", "capo_ours"), ("step_cost_no_waste", "capo_ours"), ("step_cost", "grpo_ours")):
        layouts = json.loads((results / f"{name}.json").read_text())["layouts"]
        figures += [f"{layouts[layout][variant]['phases_over_grpo_stock']:.2f}" for layout in ("S=G", "S=2G")]
    assert re.findall(r"\d\.\d\d", section) == figures


def test_the_evidence_is_what_was_measured(repository):
    """Every table is the committed one, and every estimate with an interval, in the prose too, stands in a table."""
    tables = json.loads((repository / "benchmarks" / "results" / "arithmetic_study" / "tables.json").read_text())
    page = (repository / "docs" / "evidence.md").read_text()
    between = dict(re.findall(r"<!-- table: (.*?) -->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL))
    assert len(between) >= 8
    assert between == {name: tables[name] for name in between}

    estimate = re.compile(r"[+-]?\d\.\d{3} \[[+-]?\d\.\d{3}, [+-]?\d\.\d{3}\]")
    measured = set(estimate.findall(" ".join(tables.values())))
    for text in (page, (repository / "README.md").read_text()):
        claimed = set(estimate.findall(" ".join(text.split())))  # an interval may stand on the next line
        assert claimed and claimed <= measured, claimed - measured


def test_the_comparison_is_what_was_measured(repository):
    """The page shows the committed comparison."""
    results = repository / "benchmarks" / "results" / "compare"
    assert (results / "comparison.md").read_text().strip() in (repository / "docs" / "evidence.md").read_text()


def test_the_cost_model_is_what_was_measured(repository):
    results = (repository / "benchmarks" / "results" / "cost_model.md").read_text()
    page = (repository / "docs" / "scaling.md").read_text()
    tables = re.findall(r"<!-- table: \w+ -->\n\n(.*?)\n\n<!-- end -->", page, re.DOTALL)
    assert len(tables) == 2
    assert all(table in results for table in tables)


def test_the_example_of_the_cost_model_runs(repository):
    page = (repository / "docs" / "scaling.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), names)
    assert 1 < names["time"] < 1000
