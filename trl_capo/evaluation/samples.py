"""`samples.parquet`: graded samples of one model, from any trainer. All other evaluation code reads this file.

It has one row per completion:

| column | type | meaning |
|---|---|---|
| `benchmark` | string | name of the benchmark |
| `prompt_id` | int32 | number of the question in it, from 0 |
| `sample` | int32 | number of the completion, from 0 |
| `prompt` | string | the question: the last user message |
| `solution` | string | the gold answer |
| `completion` | string | what the model wrote |
| `answer` | string or null | its answer, one text for answers that mean the same; null if there is none |
| `correct` | double or null | 1, 0; null where the gold answer cannot be read or grading failed |
| `mean_logp` | double | mean log-prob of the tokens, the last one included, at temperature 1; at most 0 |
| `length` | int32 | number of tokens |
| `truncated` | bool | whether it reached the limit of tokens |
| `grading_failed` | bool | whether math-verify hung or crashed on it: neither right nor wrong |

Any other numeric column is a confidence with that name, e.g. `self_certainty`.

During sampling, samples lie in `parts/`. Each file holds some prompts and is written completely or not at all. A run
that is killed loses only its unfinished prompts.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from trl_capo.errors import UserError
from trl_capo.files import replacing


if TYPE_CHECKING:
    import pyarrow

FILE_NAME = "samples.parquet"
KEY = ("benchmark", "prompt_id", "sample")
REQUIRED = (*KEY, "answer", "correct", "mean_logp")  # columns required in files from other tools


def schema(statistics: Sequence[str] = ()) -> pyarrow.Schema:
    """Columns and their types, including additional confidences."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    columns = dict(benchmark=text, prompt_id=pa.int32(), sample=pa.int32(), prompt=text, solution=text)
    columns |= dict(completion=text, answer=text, correct=number, mean_logp=number, length=pa.int32())
    columns |= dict(truncated=pa.bool_(), grading_failed=pa.bool_())
    return pa.schema(list(columns.items()) + [(name, number) for name in statistics])


def write_part(folder: Path, benchmark: str, first_prompt: int, rows: pyarrow.Table) -> None:
    """Save the rows of some prompts, all or nothing."""
    import pyarrow.parquet as pq

    path = part_path(folder, benchmark, first_prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(rows, partial)


def part_path(folder: Path, benchmark: str, first_prompt: int) -> Path:
    """Path of the part that starts at a prompt number (six digits, which `sampled_prompts` reads back)."""
    # Quoted: a benchmark may be a file, and files in different folders may share a name.
    return folder / "parts" / f"{quote(benchmark, safe='')}-{first_prompt:06d}.parquet"


def sampled_prompts(folder: Path, benchmark: str, num_samples: int) -> set[int]:
    """Numbers of the prompts whose samples are saved in parts."""
    import pyarrow.parquet as pq

    done: set[int] = set()
    for path in (folder / "parts").glob(f"{glob.escape(quote(benchmark, safe=''))}-??????.parquet"):
        start = int(path.stem[-6:])
        done.update(range(start, start + pq.read_metadata(path).num_rows // num_samples))
    return done


def set_aside_broken_parts(folder: Path) -> list[Path]:
    """Rename unreadable parts, such as a full disk leaves behind. Returns their former paths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = []
    for path in sorted((folder / "parts").glob("*.parquet")):
        try:
            rows = pq.read_table(path, columns=list(REQUIRED))
            fit = len(rows) > 0
        except (pa.ArrowException, OSError, ValueError):
            fit = False
        if not fit:
            path.replace(path.with_suffix(".broken"))
            broken.append(path)
    return broken


def merge_parts(folder: Path) -> Path:
    """Merge all parts into one sorted `samples.parquet` and remove them. Does nothing if that is already done."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / FILE_NAME
    if not path.exists():
        parts = [pq.read_table(part) for part in sorted((folder / "parts").glob("*.parquet"))]
        table = pa.concat_tables(parts).sort_by([(name, "ascending") for name in KEY])
        with replacing(path) as partial:
            pq.write_table(table, partial)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    for left in folder.glob(f"{path.name}.*.partial"):  # left by a merge that was killed
        left.unlink()
    return path


@dataclass(frozen=True)
class SampleSet:
    """The samples of one model on one benchmark, P prompts with N samples each.

    Attributes:
        benchmark: Its name.
        table: The rows, sorted by prompt and sample.
        num_samples: N.
    """

    benchmark: str
    table: pyarrow.Table
    num_samples: int

    def grid(self, column: str) -> np.ndarray:
        """A column with shape (P, N): numbers as float64 with NaN for null, text as objects with None."""
        values = self.table[column].to_numpy(zero_copy_only=False)
        if values.dtype != object:
            values = values.astype(np.float64)
        return values.reshape(-1, self.num_samples)

    @cached_property
    def correct(self) -> np.ndarray:
        """Correctness, shape (P, N): 1, 0 or NaN."""
        return self.grid("correct")

    @cached_property
    def mean_logps(self) -> np.ndarray:
        """Mean token log-probs, shape (P, N)."""
        return self.grid("mean_logp")

    @cached_property
    def answers(self) -> list[list[str | None]]:
        """Canonical answers, P lists of N."""
        return self.grid("answer").tolist()

    @property
    def confidences(self) -> list[str]:
        """Names of the additional numeric columns."""
        import pyarrow.types as types

        known = set(schema().names)
        return [field.name for field in self.table.schema if field.name not in known and types.is_floating(field.type)]


def shared_prompts(ours: SampleSet, theirs: SampleSet) -> tuple[np.ndarray, np.ndarray, int]:
    """Align two runs by their prompt numbers.

    Args:
        ours: Samples of one run.
        theirs: Samples of another run on the same benchmark.

    Returns:
        Rows of the prompts that both runs answered, in each run. Also how many of these prompts have different texts,
        i.e. how many questions differ; 0 if a run has no texts.
    """
    numbers, their_numbers = ours.grid("prompt_id")[:, 0], theirs.grid("prompt_id")[:, 0]
    _, rows, their_rows = np.intersect1d(numbers, their_numbers, return_indices=True)
    if any("prompt" not in samples.table.column_names for samples in (ours, theirs)):
        return rows, their_rows, 0
    return rows, their_rows, int((ours.grid("prompt")[rows, 0] != theirs.grid("prompt")[their_rows, 0]).sum())


def read_samples(path: str | Path) -> list[SampleSet]:
    """Read and check a samples file, or the one in a folder.

    Args:
        path: `samples.parquet` or its folder.

    Returns:
        One set per benchmark, sorted by name.

    Raises:
        UserError: The file or a column is missing, a column has the wrong type, a row appears twice, a prompt has
            fewer samples than another, or a log-prob is not finite or is positive.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path} does not exist. Make it with `trl-capo evaluate MODEL --benchmark ...`.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as a parquet file: {error}. Evaluate again into another folder."
        ) from error
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}, only {', '.join(table.column_names)}.")
    if len(table) == 0:
        raise UserError(f"{path} has no rows.")
    try:
        for i, field in enumerate(table.schema):
            if field.name in schema().names:
                table = table.set_column(i, field.name, table[field.name].cast(schema().field(field.name).type))
    except pa.ArrowException as error:
        raise UserError(f"{path}: column {field.name!r} has the wrong type: {error}") from error
    for name in KEY:
        if table[name].null_count:
            raise UserError(f"{path}: `{name}` is null in {table[name].null_count} rows. Every row needs a value.")
    logps = table["mean_logp"]
    bad = pc.sum(pc.invert(pc.fill_null(pc.and_(pc.is_finite(logps), pc.less_equal(logps, 0)), False))).as_py()
    if bad:
        raise UserError(
            f"{path}: `mean_logp` must be finite and <= 0; {bad} rows are not. It is a mean log-prob, "
            "not a perplexity or a probability."
        )
    strange = pc.sum(pc.invert(pc.is_in(table["correct"].drop_null(), pa.array([0.0, 1.0])))).as_py()
    if strange:
        raise UserError(f"{path}: `correct` must be 0, 1 or null; {strange} rows are not.")
    table = table.sort_by([(name, "ascending") for name in KEY])
    return [_sample_set(path, table, name) for name in sorted(pc.unique(table["benchmark"]).to_pylist())]


def _sample_set(path: Path, table: pyarrow.Table, benchmark: str) -> SampleSet:
    import pyarrow.compute as pc

    table = table.filter(pc.equal(table["benchmark"], benchmark)).combine_chunks()
    prompts, samples = (table[name].to_numpy() for name in KEY[1:])
    twice = np.flatnonzero((prompts[1:] == prompts[:-1]) & (samples[1:] == samples[:-1]))
    if len(twice):
        raise UserError(
            f"{path}: {benchmark}, prompt {prompts[twice[0]]}, sample {samples[twice[0]]} appears twice "
            f"({len(twice)} such rows). Remove the copies."
        )
    _, counts = np.unique(prompts, return_counts=True)
    if counts.min() != counts.max():
        raise UserError(
            f"{path}: the prompts of {benchmark} have between {counts.min()} and {counts.max()} samples; all must "
            "have the same number. Sample the missing ones, or drop these prompts."
        )
    return SampleSet(benchmark, table, int(counts[0]))
