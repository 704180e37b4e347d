"""Small local repositories with the columns, configurations and oddities of the datasets of the catalogue."""

import json
from pathlib import Path

from trl_capo.data.catalogue import CATALOGUE


def question(number: int) -> str:
    return f"What is ${number}+{number}$?"


LATEX = [r"\frac{1}{2}", r"\sqrt{3}+1", r"x \in [-2,7]", r"\text{east}", r"2^{10}-1", "p - q"]
ROWS = {
    "HuggingFaceH4/aime_2024": [
        {"id": i, "problem": question(100 + i), "solution": "long", "answer": f"0{i}3", "url": "", "year": "2024"}
        for i in range(4)
    ],
    "math-ai/aime25": [{"problem": question(110 + i), "answer": str(70 + i), "id": str(i)} for i in range(4)],
    "math-ai/amc23": [{"id": i, "question": question(120 + i), "answer": 27.0 + i, "url": ""} for i in range(4)],
    "HuggingFaceH4/MATH-500": [
        {
            "problem": question(130 + i),
            "solution": "",
            "answer": a,
            "subject": "Algebra",
            "level": 3,
            "unique_id": str(i),
        }
        for i, a in enumerate(LATEX)
    ],
    "math-ai/minervamath": [
        {"question": question(140 + i), "answer": a} for i, a in enumerate(["4.5e33", "2", "1 - x"])
    ],
    "math-ai/olympiadbench": [
        {"id": i, "question": question(150 + i), "final_answer": a, "is_multiple_answer": len(a) > 1}
        for i, a in enumerate([["$2$"], ["$\\frac{1}{2}$", "3"], ["5"]])
    ],
    "openai/gsm8k": [{"question": question(160 + i), "answer": f"He has {i}.\n#### 1,00{i}"} for i in range(4)],
    # Two repeats, a question of a benchmark, a missing and an unreadable answer, an empty solution.
    "agentica-org/DeepScaleR-Preview-Dataset": [
        *({"problem": question(i), "answer": str(2 * i), "solution": ""} for i in range(60)),
        {"problem": "What is $1 + 1$", "answer": "2", "solution": ""},
        {"problem": question(2), "answer": "4", "solution": ""},
        {"problem": question(101), "answer": "13", "solution": "from AIME"},
        {"problem": "Who?", "answer": "", "solution": ""},
        {"problem": "Where?", "answer": "$ east", "solution": ""},
    ],
    "open-r1/DAPO-Math-17k-Processed": [
        {"prompt": question(170 + i), "solution": str(i), "data_source": "math_dapo", "ability": "MATH"}
        for i in range(4)
    ],
}


def make_repositories(folder: Path) -> Path:
    """Writes one repository a dataset, as `TRL_CAPO_DATA` wants them."""
    for path, rows in ROWS.items():
        repository = folder / path
        repository.mkdir(parents=True)
        entries = [of for of in CATALOGUE.values() if of.path == path]
        configs = {of.config or "default" for of in entries} | ({"other"} if entries[0].config else set())
        header = "configs:\n"
        for config in sorted(configs):
            header += f"- config_name: {config}\n  data_files:\n"
            for split in {of.split for of in entries}:
                file = f"{config}-{split}.jsonl"
                header += f"  - split: {split}\n    path: {file}\n"
                shown = rows if config != "other" else rows[:1]
                (repository / file).write_text("\n".join(json.dumps(row) for row in shown))
        (repository / "README.md").write_text(f"---\n{header}---\n")
    return folder
