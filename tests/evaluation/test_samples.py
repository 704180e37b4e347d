"""The samples file: what is written is read back, and what cannot be right is refused."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_capo.evaluation.samples import (
    merge_parts,
    part_path,
    read_samples,
    sampled_prompts,
    schema,
    set_aside_broken_parts,
    write_part,
)


def rows(benchmark="b", prompts=range(3), num_samples=2, **columns) -> pa.Table:
    keys = [(p, n) for p in prompts for n in range(num_samples)]
    content = dict(
        benchmark=[benchmark] * len(keys),
        prompt_id=[p for p, _ in keys],
        sample=[n for _, n in keys],
        prompt=[f"question {p}" for p, _ in keys],
        solution=["$1$"] * len(keys),
        completion=[f"text {p} {n}" for p, n in keys],
        answer=["1" if n else None for _, n in keys],
        correct=[float(n) if p else None for p, n in keys],
        mean_logp=[-0.1 * (1 + p + n) for p, n in keys],
        length=[3] * len(keys),
        truncated=[False] * len(keys),
        grading_failed=[False] * len(keys),
    )
    return pa.table(content | columns, schema=schema([name for name in columns if name not in schema().names]))


def test_parts_become_one_sorted_file(tmp_path):
    write_part(tmp_path, "b", 2, rows(prompts=[2, 3], certainty=[1.0, 2.0, 3.0, 4.0]))
    write_part(tmp_path, "b", 0, rows(prompts=[0, 1], certainty=[5.0, 6.0, 7.0, 8.0]))
    write_part(tmp_path, "a/other.jsonl", 0, rows("a/other.jsonl", prompts=[0], certainty=[9.0, 9.0]))
    assert part_path(tmp_path, "b", 2).exists()
    assert part_path(tmp_path, "a/x.jsonl", 0) != part_path(tmp_path, "b/x.jsonl", 0)  # neither overwrites the other
    merge_parts(tmp_path)
    merge_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.parquet"]
    other, of = read_samples(tmp_path)
    assert (other.benchmark, of.benchmark, of.num_samples) == ("a/other.jsonl", "b", 2)
    assert of.correct.tolist()[1:] == [[0.0, 1.0]] * 3 and np.isnan(of.correct[0]).all()
    assert of.answers == [[None, "1"]] * 4
    np.testing.assert_allclose(of.mean_logps, -0.1 * np.array([[1, 2], [2, 3], [3, 4], [4, 5]]))
    assert of.confidences == ["certainty"] and of.grid("certainty").tolist() == [[5, 6], [7, 8], [1, 2], [3, 4]]
    assert of.grid("completion")[1, 0] == "text 1 0"


def write(path, table):
    pq.write_table(table, path / "samples.parquet")
    return path


def test_the_order_of_rows_does_not_matter(tmp_path):
    table = rows()
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    [of] = read_samples(write(tmp_path, shuffled))
    assert of.table.equals(table.combine_chunks())


def test_files_from_elsewhere_need_six_columns_of_any_fitting_type(tmp_path):
    few = rows().select(["benchmark", "prompt_id", "sample", "mean_logp"])
    few = few.append_column("correct", pa.array([True, False, None] * 2)).append_column(
        "answer", pa.array([7, None, 8, 7, 9, 9])
    )
    [of] = read_samples(write(tmp_path, few))
    assert of.answers == [["7", None], ["8", "7"], ["9", "9"]]
    np.testing.assert_array_equal(of.correct, [[1, 0], [np.nan, 1], [0, np.nan]])
    assert of.mean_logps.shape == (3, 2)


@pytest.mark.parametrize(
    "table, message",
    [
        (rows().drop_columns(["correct", "sample"]), "has no column sample, correct, only benchmark"),
        (rows().drop_columns(["answer"]), "has no column answer"),
        (rows(mean_logp=[-0.1, -math.inf, -0.1, -0.1, -0.1, 0.0]), "finite and <= 0; 1 rows are not"),
        (rows(prompt_id=[0, 0, None, 1, 2, 2]), "`prompt_id` is null in 1 rows"),
        (
            rows().drop_columns(["correct"]).append_column("correct", pa.array(["yes"] * 6)),
            "column 'correct' has the wrong type",
        ),
        (pa.concat_tables([rows(), rows(prompts=[1])]), r"prompt 1, sample 0 appears twice \(2 such rows\)"),
        (rows(mean_logp=[-0.1, math.nan, -0.1, 0.5, None, 0.0]), "finite and <= 0; 3 rows are not"),
        (rows(correct=[0.5, 1, 0, 1, 2, None]), "`correct` must be 0, 1 or null; 2 rows are not"),
        (pa.concat_tables([rows(), rows(prompts=[9], num_samples=1)]), "have between 1 and 2 samples"),
        (rows(prompts=[]), "has no rows"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, table, message):
    with pytest.raises(ValueError, match=message):
        read_samples(write(tmp_path, table))


def test_what_is_no_samples_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist. Make it with `trl-capo evaluate"):
        read_samples(tmp_path)
    (tmp_path / "samples.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="is not a parquet file"):
        read_samples(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 half", None], ids=["empty", "half", "no rows"])
def test_a_broken_part_is_set_aside_and_its_prompts_are_missing(tmp_path, content):
    write_part(tmp_path, "b", 0, rows(prompts=[0, 1]))
    write_part(tmp_path, "b", 2, rows(prompts=[2]))
    broken = part_path(tmp_path, "b", 2)
    if content is None:
        write_part(tmp_path, "b", 2, rows(prompts=[]))
    else:
        broken.write_bytes(content)
    assert set_aside_broken_parts(tmp_path) == [broken] and not broken.exists()
    assert set_aside_broken_parts(tmp_path) == []
    assert sampled_prompts(tmp_path, "b", 2) == {0, 1}
    write_part(tmp_path, "b", 2, rows(prompts=[2]))
    merge_parts(tmp_path)
    assert len(read_samples(tmp_path)[0].correct) == 3
