r"""One page that compares runs: a self-contained `report.html`, its figures as PNG files and a table in Markdown.

The page shows all metrics with intervals over prompts, paired differences from the first run, the figures, and a table
of completions that you can sort, filter and page through. The table has the numbers of all completions and the texts
of the most informative ones (confidently wrong, or right but unsure). The page neither loads nor sends anything over
the network; its content security policy enforces this. Completions enter the page as text, never as HTML. Formulas in
`$...$`, `\(...\)` and `\[...\]` are shown as MathML, which browsers render natively.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_capo.calibration import metrics
from trl_capo.calibration.metrics import nanmean
from trl_capo.calibration.prompt_bootstrap import prompt_difference, prompt_interval
from trl_capo.calibration.selection import SELECTORS, choose_all
from trl_capo.errors import UserError
from trl_capo.evaluation.samples import shared_prompts
from trl_capo.evaluation.summary import METRICS
from trl_capo.files import write_bytes, write_text
from trl_capo.markdown import markdown_text


if TYPE_CHECKING:
    from trl_capo.evaluation.samples import SampleSet

NUM_TEXTS = 500  # per run
NUM_RESAMPLES = 300
TEMPLATE = Path(__file__).parent / "report_template.html"
MARKDOWN_HEAD = """## Can its confidence be trusted?

Confidence is the mean log-prob of a completion. AUC within: how often a right answer has higher confidence than a
wrong answer to the same question. 95% intervals over questions."""
FORMULAS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
OPENING = re.compile("|".join(re.escape(opening) for opening, _ in FORMULAS))
LONGEST_FORMULA = 2000  # characters; longer formulas stay text, because conversion time is not linear in length


def write_report(
    runs: dict[str, list[SampleSet]],
    path: str | Path,
    *,
    histories: dict[str, list[dict]] | None = None,
    first_section: str = "",
) -> Path:
    """Write the page, its figures, and `<name>.md`, the block for a model card.

    Args:
        runs: Samples of each run by benchmark, from `read_samples`.
        path: Path of the page. The other files go into the same folder.
        histories: `log_history` from the trainer state of each trained run.
        first_section: HTML for the first section, from `html_section`.

    Returns:
        Path of the page.

    Raises:
        UserError: The runs share no benchmark or answered different questions, or the page cannot be written.
    """
    from trl_capo.preflight.checks import check_output_dir

    path = Path(path)
    shared = [samples.benchmark for samples in next(iter(runs.values()))]
    shared = [
        name for name in shared if all(any(samples.benchmark == name for samples in sets) for sets in runs.values())
    ]
    if not shared:
        raise UserError(
            "the runs have no benchmark in common: "
            + "; ".join(
                f"{name} has {', '.join(samples.benchmark for samples in sets)}" for name, sets in runs.items()
            )
        )
    check_output_dir(str(path.parent))
    if path.is_dir():
        raise UserError(f"{path} is a folder. Name the page, e.g. {path / 'report.html'}.")
    sections, tables = [first_section], []
    for number, benchmark in enumerate(shared, 1):
        compared = {name: next(s for s in sets if s.benchmark == benchmark) for name, sets in runs.items()}
        header, rows = metric_rows(compared)
        figure = draw_benchmark(compared)
        # Not percent-quoted, because a Markdown link would read that as an escape. Numbered: names may collide.
        picture = path.parent / f"{re.sub(r'[^0-9A-Za-z._-]', '_', f'{path.stem}-{number}-{benchmark}')}.png"
        write_bytes(picture, figure)
        figures = f"![figures of {re.sub(r'[^0-9A-Za-z._ -]', '_', benchmark)}]({picture.name})"
        tables.append(f"### {markdown_text(benchmark)}\n\n{markdown(header, rows)}\n\n{figures}")
        sections.append(
            f"<h2>{html.escape(benchmark)}</h2>{_html_table(header, rows)}{_image(figure, f'figures of {benchmark}')}"
        )
    if histories:
        figure = draw_histories(histories, list(runs))
        write_bytes(path.parent / f"{path.stem}-training.png", figure)
        sections.append(f"<h2>Training</h2>{_image(figure, 'training curves')}")
    page = TEMPLATE.read_text(encoding="utf-8").replace("<!-- sections -->", "\n".join(sections))
    page = page.replace("<!-- data -->", _embedded(completions(runs, shared)))
    write_text(path, page)
    write_text(path.with_suffix(".md"), "\n\n".join([MARKDOWN_HEAD, *tables]) + "\n")
    return path


def read_history(path: Path) -> list[dict]:
    """Read the log from a trainer state, or from a file with only the log."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, list) else content["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the trainer_state.json of a run: {error!r}.") from error


def run_names(paths: list[str]) -> list[str]:
    """Names of runs: the folder of each samples file, or its whole path if two folders share a name."""
    short = [(Path(path) if Path(path).is_dir() else Path(path).parent).resolve().name for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def html_section(title: str, text: str, table: tuple[list[str], list[list[str]]], png: bytes) -> str:
    """A section of the page: a text, a table (header and rows) and a picture."""
    title, text = html.escape(title), html.escape(text)
    return f"<h2>{title}</h2><p>{text}</p>{_html_table(*table)}{_image(png, title)}"


def metric_rows(runs: dict[str, SampleSet]) -> tuple[list[str], list[list[str]]]:
    """Metrics with 95% intervals over prompts: a column for each run, then its paired difference from the first."""
    first, baseline = next(iter(runs.items()))
    titles = [title for title, _ in METRICS.values()]
    header, columns = ["metric"], [["questions x samples", *titles, *SELECTORS, "perplexity right / wrong"]]
    for name, samples in runs.items():
        numbers = _numbers(samples, np.arange(len(samples.correct)))
        ppl = [metrics.perplexity(samples.mean_logps, valid=samples.correct == label) for label in (1, 0)]
        intervals = [prompt_interval(f, *arrays, num_resamples=NUM_RESAMPLES) for f, arrays in numbers]
        header.append(name)
        columns.append(
            [f"{len(samples.correct)} x {samples.num_samples}", *map(str, intervals), f"{ppl[0]:.3f} / {ppl[1]:.3f}"]
        )
        rows, of_baseline, differing = shared_prompts(samples, baseline)
        if differing:
            raise UserError(
                f"the runs answered different questions of {samples.benchmark}, {differing} of {len(rows)}. "
                "Evaluate them on one version of it."
            )
        if name == first or len(rows) == 0:
            continue
        gaps = [
            prompt_difference(f, ours, theirs, num_resamples=NUM_RESAMPLES)
            for (f, ours), (_, theirs) in zip(_numbers(samples, rows), _numbers(baseline, of_baseline), strict=True)
        ]
        header.append(f"{name} - {first}")
        columns.append(
            [f"{len(rows)} questions", *(f"{g.value:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for g in gaps), ""]
        )
    return header, [list(row) for row in zip(*columns, strict=True)]


def _numbers(samples: SampleSet, prompts: np.ndarray) -> list[tuple]:
    """The inputs of each table row: a metric, and the correctness and confidence of some prompts."""
    chosen = (samples.correct[prompts], samples.mean_logps[prompts])
    numbers = [(f, chosen) for _, f in METRICS.values()]
    for select in SELECTORS.values():
        right = choose_all(select, samples.answers, samples.mean_logps, samples.correct)[1][prompts, None]
        numbers.append((lambda right, _: nanmean(right), (right, right)))
    return numbers


def draw_benchmark(runs: dict[str, SampleSet]) -> bytes:
    """The figures of a benchmark as one PNG."""
    from trl_capo.report import figures

    figure, axes = _subplots(3, 2, (11, 11.5))
    figures.draw_precision_coverage(axes[0, 0], runs)
    figures.draw_questions(axes[0, 1], runs)
    figures.draw_reliability(axes[1, 0], runs)
    figures.draw_perplexities(axes[1, 1], runs)
    figures.draw_selection(axes[2, 0], runs)
    if len(runs) > 1:
        figures.draw_deferral(axes[2, 1], runs)
    else:
        axes[2, 1].set_visible(False)
    return _png(figure)


def draw_histories(histories: dict[str, list[dict]], runs: list[str]) -> bytes:
    """Training curves as one PNG."""
    from trl_capo.report import figures

    figure, axes = _subplots(1, 2, (11, 3.8))
    figures.draw_training(axes[0], histories, runs)
    return _png(figure)


def _subplots(rows: int, columns: int, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def _png(figure) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def completions(runs: dict[str, list[SampleSet]], benchmarks: list[str]) -> dict[str, Any]:
    """All completions for the page's table: columns of numbers, and the texts of the most informative ones."""
    columns: dict[str, list] = {
        name: [] for name in ("run", "benchmark", "prompt", "sample", "correct", "logp", "length", "answer")
    }
    texts: dict[int, dict] = {}
    for r, sets in enumerate(runs.values()):
        of_run, telling = [samples for samples in sets if samples.benchmark in benchmarks], []
        for samples in of_run:
            start, count = len(columns["run"]), samples.correct.size
            columns["run"] += [r] * count
            columns["benchmark"] += [benchmarks.index(samples.benchmark)] * count
            columns["prompt"] += samples.table["prompt_id"].to_pylist()
            columns["sample"] += samples.table["sample"].to_pylist()
            columns["correct"] += [None if np.isnan(c) else int(c) for c in samples.correct.ravel()]
            columns["logp"] += np.round(samples.mean_logps.ravel(), 4).tolist()
            names = samples.table.column_names
            columns["length"] += samples.table["length"].to_pylist() if "length" in names else [None] * count
            columns["answer"] += [None if a is None else a[:40] for row in samples.answers for a in row]
            telling += [
                (score, start + i, samples, i)
                for i, score in enumerate(surprise(samples.correct, samples.mean_logps).ravel())
            ]
        telling.sort(key=lambda row: (-np.nan_to_num(row[0], nan=-1.0), row[1]))
        for score, row, samples, i in telling[:NUM_TEXTS]:
            at = {
                name: samples.table[name][i].as_py()
                for name in ("prompt", "solution", "completion")
                if name in samples.table.column_names
            }
            texts[row] = {name: with_formulas(text or "") for name, text in at.items()} | {
                "score": round(float(np.nan_to_num(score)), 4)
            }
    return {"runs": list(runs), "benchmarks": benchmarks, "columns": columns, "texts": texts}


def surprise(correct: np.ndarray, mean_logps: np.ndarray) -> np.ndarray:
    """How surprising a completion is: the share of completions with the opposite label that it is misranked against.

    A wrong completion scores near 1 if it is more confident than nearly all right ones. A right completion scores near
    1 if it is less confident than nearly all wrong ones.

    Args:
        correct: Shape (P, N), 1, 0 or NaN.
        mean_logps: Shape (P, N).

    Returns:
        Shape (P, N), in [0, 1]; NaN if correctness is unknown or no completion has the opposite label.

    Example:
        >>> surprise(np.array([[1.0, 0.0, 0.0]]), np.array([[-0.5, -0.1, -0.9]])).tolist()
        [[0.5, 1.0, 0.0]]
    """
    result = np.full(correct.shape, np.nan)
    right, wrong = np.sort(mean_logps[correct == 1]), np.sort(mean_logps[correct == 0])
    if len(right) and len(wrong):
        result[correct == 0] = np.searchsorted(right, mean_logps[correct == 0]) / len(right)
        result[correct == 1] = 1 - np.searchsorted(wrong, mean_logps[correct == 1], side="right") / len(wrong)
    return result


def with_formulas(text: str) -> list[str | list[str]]:
    r"""Split text into plain strings and formulas. Each formula is [MathML, source].

    Example:
        >>> [piece if isinstance(piece, str) else piece[1] for piece in with_formulas(r"so $x^2$ and \(y\).")]
        ['so ', 'x^2', ' and ', 'y', '.']
    """
    from latex2mathml.converter import convert

    pieces: list[str | list[str]] = []
    end = 0
    for start, stop, source in _formulas(text):
        try:
            formula = convert(source)
        except Exception:  # text between dollars may not be LaTeX, and the converter can raise any error
            continue
        pieces += [text[end:start], [formula, source]]
        end = stop
    return [piece for piece in [*pieces, text[end:]] if piece]


def _formulas(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and content of the text between delimiters, in linear time.

    In `\\(\\(\\(...`, a regular expression would search for the end again from each delimiter.
    """
    missing, at = set(), 0
    while found := OPENING.search(text, at):
        at = found.start()
        for opening, closing in FORMULAS:
            begin = at + len(opening)
            if closing in missing or not text.startswith(opening, at):
                continue
            close = text.find(closing, begin + 1)  # at least one character between them
            if close < 0:
                missing.add(closing)  # no later one exists either
                continue
            stop = close + len(closing)
            if close - begin <= LONGEST_FORMULA:
                yield at, stop, text[begin:close]
            at = stop
            break
        else:
            at += 1


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table for a model card."""
    lines = [" | ".join(map(markdown_text, cells)) for cells in (header, *rows)]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="metrics"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _embedded(content: dict) -> str:
    """JSON that never closes a script element, whatever completions contain."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
