"""Numbers in the README are those of the committed results."""

import json
import re


def test_demo_table_is_the_committed_result(repository):
    results = json.loads((repository / "benchmarks" / "results" / "demo" / "results.json").read_text())["splits"]
    expected = [
        [
            summary[name]
            for name in ("accuracy", "auc_within", "auc_pooled", "precision_at_50", "ppl_correct", "ppl_wrong")
        ]
        for models in results.values()
        for summary in models.values()
    ]
    readme = (repository / "README.md").read_text()
    rows = [line for line in readme.splitlines() if re.match(r"\|[^|]*\| (base|GRPO|CAPO) \|", line)]
    written = [re.findall(r"\d\.\d{3}", row) for row in rows]
    assert written == [[f"{value:.3f}" for value in row] for row in expected]
    gaps = [models["capo"]["auc_within"] - models["grpo"]["auc_within"] for models in results.values()]
    accuracies = [models["capo"]["accuracy"] - models["grpo"]["accuracy"] for models in results.values()]
    for points in (min(gaps), max(gaps), max(accuracies), -min(accuracies)):
        assert f"{100 * points:.1f}" in readme


def test_links_in_the_documentation_lead_somewhere(repository):
    pages = [
        repository / "README.md",
        *sorted((repository / "docs").glob("*.md")),
        *sorted(repository.glob("recipes/*.md")),
    ]
    links = 0
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
            links += 1
    assert links >= 8
