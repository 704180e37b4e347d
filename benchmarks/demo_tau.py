"""Choose the demo's tau from the comparison of `benchmarks/demo_tau.yaml`.

    trl-capo compare benchmarks/demo_tau.yaml --workers 2
    python benchmarks/demo_tau.py runs/demo-tau/comparison.json

The rule: of the values that lose on average at most one point of accuracy to GRPO, choose the one with the highest AUC
within prompts. The committed `benchmarks/results/demo_tau.md` and `.json` come from an earlier command with the same
options, which sampled each run's answers with the run's own seed.
"""

import argparse
import json
from pathlib import Path


MOST_LOST = 0.01  # accuracy


def chosen(rows: list[dict]) -> dict:
    """The row of `comparison.json` that the rule chooses."""
    accuracy = next(row["accuracy"] for row in rows if row["method"] == "grpo")
    fit = [row for row in rows if row["method"].startswith("capo") and accuracy - row["accuracy"] <= MOST_LOST]
    if not fit:
        raise SystemExit(f"every tau loses more than {MOST_LOST} accuracy to GRPO.")
    return max(fit, key=lambda row: row["auc_within"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("comparison", type=Path, help="comparison.json of the plan")
    row = chosen(json.loads(parser.parse_args(argv).comparison.read_text())["rows"])
    print(f"{row['method']}: accuracy {row['accuracy']:.3f}, AUC within {row['auc_within']:.3f}")


if __name__ == "__main__":
    main()
