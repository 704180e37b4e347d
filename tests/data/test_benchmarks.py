import json

import pytest
from datasets import Dataset

from trl_capo.data.benchmarks import ARITHMETIC, load_benchmark


def test_arithmetic_splits_are_benchmarks():
    data = load_benchmark("arithmetic_test_3", 5)
    assert data.column_names == ["prompt", "solution"] and len(data) == 5
    assert len(load_benchmark("arithmetic_validation")) == 400
    assert "arithmetic_train" not in ARITHMETIC and "arithmetic_base" not in ARITHMETIC


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_are_benchmarks(tmp_path, suffix):
    rows = Dataset.from_dict({"question": ["1+1?", "2+2?"], "gold": ["2", r"\frac{8}{2}"], "other": [0, 0]})
    path = str(tmp_path / f"mine.{suffix}")
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(suffix, rows.to_json)(path)
    data = load_benchmark(path, prompt_column="question", solution_column="gold", system_prompt="Think.")
    assert data[1] == {
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}],
        "solution": r"$\frac{8}{2}$",
    }
    with pytest.raises(ValueError, match="has no column 'answer', only question, gold, other"):
        load_benchmark(path, prompt_column="question", solution_column="answer")
    with pytest.raises(ValueError, match="no column 'prompt'"):
        load_benchmark(path, solution_column="gold")


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="unknown benchmark 'math5000'. Use one of arithmetic_validation, .*math500"):
        load_benchmark("math5000")
    with pytest.raises(ValueError, match="unknown benchmark 'missing.jsonl'"):
        load_benchmark("missing.jsonl")


def test_unreadable_golds_stay_and_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "?", "solution": gold}) for gold in ("east $ or west", "$3$")))
    with pytest.warns(UserWarning, match="cannot read the gold answer of 1 of 2 questions.*east . or west"):
        assert len(load_benchmark(str(path))) == 2


def test_an_empty_benchmark_is_refused(tmp_path):
    path = tmp_path / "empty.csv"
    path.write_text("prompt,solution\n")
    with pytest.raises(ValueError, match="empty.csv has no rows"):
        load_benchmark(str(path))
