"""The report in a real browser: fast, usable, closed to the network, and safe. Run by `make test-browser`."""

import shutil
import time

import numpy as np
import pytest

from tests.evaluation.test_samples import rows
from trl_capo.evaluation.samples import merge_parts, read_samples, write_part
from trl_capo.report.page import write_report


pytestmark = pytest.mark.browser
EVIL = "</script><script>window.hacked=1</script><img src=https://example.org/x onerror='window.hacked=1'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three runs of 20,000 completions of 2,000 characters."""
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    text = EVIL + r" Since $\frac{1}{2} < \sqrt{2}$ we get \(x^2\). " + "words and more words " * 95
    runs = {}
    for name in ("base", "grpo", "capo"):
        correct = (rng.random(20_000) < 0.4).astype(float)
        columns = dict(correct=correct, mean_logp=-rng.exponential(0.3, 20_000) * (2 - correct))
        columns["completion"] = [f"{i}: {text}"[:2000] for i in range(20_000)]
        write_part(folder / name, "b", 0, rows("b", range(1250), 16, **columns))
        merge_parts(folder / name)
        runs[name] = read_samples(folder / name)
    path = write_report(runs, folder / "report.html")
    assert path.stat().st_size < 15e6
    return path


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.fail("Chromium is not on the PATH; install it, e.g. apt-get install chromium.")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, report):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_selector("#rows tbody tr")
    yield page
    assert page.errors == []
    page.close()


def column(page, number):
    return page.eval_on_selector_all(
        f"#rows tbody tr td:nth-child({number})", "cells => cells.map(c => c.textContent)"
    )


def test_it_is_there_at_once(browser, report):
    page = browser.new_page()
    started = time.time()
    page.goto(report.as_uri())
    page.wait_for_selector("#rows tbody tr")
    assert time.time() - started < 5
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 2000
    page.close()


def test_nothing_leaves_the_page_and_nothing_in_it_acts(page, report):
    page.click("#rows tbody tr:first-child")
    text = page.inner_text("td.text")
    assert "window.hacked=1" in text and "<script>" in text  # shown
    assert page.evaluate("window.hacked") is None  # not run
    assert page.locator("td.text img, td.text script").count() == 0
    assert [url for url in page.requests if not url.startswith("data:")] == [report.as_uri()]


def test_formulas_are_drawn(page):
    page.click("#rows tbody tr:first-child")
    assert page.locator("td.text math mfrac").count() == 1
    box = page.locator("td.text math mfrac").bounding_box()
    assert box["height"] > box["width"]  # one above the other


def test_it_opens_on_the_most_telling(page):
    outcomes, logps = column(page, 5), [float(value) for value in column(page, 6)]
    assert len(outcomes) == 50
    # Surprise is near 1: wrong and very sure, or right and very unsure.
    for outcome, logp in zip(outcomes, logps, strict=True):
        assert logp > -0.02 if outcome == "wrong" else logp < -1


def test_sorting_and_filtering(page):
    page.uncheck("#texts")
    assert "60000 completions" in page.inner_text("#where")
    page.click("#rows th:nth-child(6)")
    falling = [float(value) for value in column(page, 6)]
    assert falling == sorted(falling, reverse=True)
    page.click("#rows th:nth-child(6)")
    rising = [float(value) for value in column(page, 6)]
    assert rising == sorted(rising) and rising[0] < falling[-1]
    assert page.get_attribute("#rows th:nth-child(6)", "aria-sort") == "ascending"

    page.select_option("#run", label="capo")
    page.select_option("#outcome", label="wrong")
    assert set(column(page, 1)) == {"capo"} and set(column(page, 5)) == {"wrong"}
    number = int(page.inner_text("#where").split()[0])
    assert 11_000 < number < 13_000
    page.click("#next")
    assert "page 2 of" in page.inner_text("#where")
    page.check("#texts")
    page.fill("#search", "no completion says this")
    assert page.inner_text("#where").startswith("0 completions")
    assert page.is_disabled("#back") and page.is_disabled("#next")


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits(browser, report, width, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(report.as_uri())
    page.wait_for_selector("#rows tbody tr")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / f"report-{width}.png", full_page=True)  # for a person to look at
    page.close()
